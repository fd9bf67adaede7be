"""Makes demonstration files: what experts and policies do, and images for files that have only simulator states."""

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from common.demos.checks import note
from common.demos.robomimic import episode_names, image_key
from common.download import check_digest, digest_file
from common.envs import Pixels, TaskSpec, make_env
from common.errors import EnvError, UserError, blame, first_line, reading
from common.files import replacing, sha256
from common.seeds import demo_seed
from tools.policy_file import load_policy
from tools.scripted import MAX_STEPS, VERSION, Expert, find_expert


@dataclass
class Episode:
    """T steps: observation parts (T, width) or images, simulator states (T, S), actions (T, A), rewards (T,)."""

    obs: dict[str, NDArray[Any]]
    states: NDArray[np.float64]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float64]


def made_file(
    task: TaskSpec, source: str, num: int, noise: float, seed: int, cache_dir: Path, spare: Path, pixels: Pixels | None
) -> Path:
    """File of `num` episodes of the task's expert ("scripted") or of a policy (POLICY.npz), made on first use.

    noise is that of the expert, seed the one of the episodes; with `pixels` it holds images too; spare: see `cached`.
    Raises UserError.
    """
    if source == "scripted":
        expert, kind = find_expert(task), f"scripted-v{VERSION}"
    else:
        policy = Path(source)
        if task.suite == "gymnasium":
            raise UserError(
                f"--demos {source}: only built-in tasks roll out a policy; record it with python -m tools.record"
            )
        expert, kind = load_policy(policy, task), f"{policy.stem}-{sha256(policy)[:8]}"
    path = cache_dir / f"{task.name}_{kind}_n{num}_noise{noise:g}_seed{seed}{_suffix(pixels)}.hdf5"
    return cached(path, spare, lambda path: generate(task, expert, num, noise, seed, path, pixels))


def drawn_file(path: Path, task: TaskSpec, pixels: Pixels, cache_dir: Path, spare: Path) -> Path:
    """Copy of a file of simulator states with images, drawn on first use. Raises UserError, see `draw_images`."""
    target = cache_dir / f"{path.stem}-{sha256(path)[:8]}{_suffix(pixels)}.hdf5"
    return cached(target, spare, lambda target: draw_images(path, task, pixels, target))


def cached(path: Path, spare: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made if it is missing or no longer what was made; under the folder `spare` where it cannot be written."""
    if path.is_file():
        try:
            return check_digest(path)
        except UserError:
            note(f"{path} has changed since it was made; making it again")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        why = f"{path.parent} cannot be written ({first_line(error)})"
        note(f"{why}; the demonstrations are made for this run alone")
        path = spare / path.name
    make(path)
    digest_file(path).unlink(missing_ok=True)  # of what was there before
    return check_digest(path)


def _suffix(pixels: Pixels | None) -> str:
    return f"_{'+'.join(pixels.cameras)}_{pixels.size}" if pixels else ""


def shares(num: int, weights: Sequence[int]) -> list[int]:
    """`num` episodes divided among tasks in proportion to `weights`; what does not divide goes to the first ones."""
    counts = [num * weight // sum(weights) for weight in weights]
    for i in range(num - sum(counts)):
        counts[i] += 1
    return counts


def generate(
    task: TaskSpec,
    expert: Callable[..., Expert],
    num: int,
    noise: float,
    seed: int,
    path: Path,
    pixels: Pixels | None = None,
) -> None:
    """Writes `num` successful episodes of an expert to `path`, in the robomimic schema. A function of its arguments.

    With `pixels` the images of every step go with them, as obs/CAMERA_image (T, S, S, 3) uint8.
    """
    if num < 1:
        raise UserError(f"{num} demonstrations were asked for; ask for at least one")
    env = make_env(task.name, horizon=MAX_STEPS.get(task.name, task.horizon))
    keys = [key for key, _ in task.obs]
    splits = np.cumsum([width for _, width in task.obs])[:-1]
    episodes: list[Episode] = []
    left = shares(num, task.demo_weights or (1,))
    try:
        with tqdm(total=num, desc=f"{task.name} demonstrations", leave=False, mininterval=1) as bar:
            attempt = 0
            while len(episodes) < num:
                if attempt == 20 * num + 20:
                    raise UserError(f"the {task.name} expert fails with noise {noise}; use less noise")
                rng = np.random.default_rng([seed, attempt])
                start = demo_seed(seed, attempt)
                attempt += 1
                if not left[start % len(left)]:
                    continue  # this task has its share
                try:
                    succeeded, steps = rollout(env, expert, rng, noise, start, pixels)
                except Exception as error:
                    raise EnvError(f"demonstration of episode seed {start}: {blame(error)}") from error
                if succeeded:
                    left[start % len(left)] -= 1
                    obs, states, actions, rewards, *images = steps
                    parts = dict(zip(keys, np.split(obs, splits, axis=1), strict=True))
                    if pixels:
                        parts |= {image_key(name): images[0][:, i] for i, name in enumerate(pixels.cameras)}
                    episodes.append(Episode(parts, states, actions, rewards))
                    bar.update()
    finally:
        env.close()
    write_demos(path, episodes, _env_args(task))


def rollout(
    env: gym.Env[Any, Any],
    expert: Callable[..., Expert],
    rng: np.random.Generator,
    noise: float,
    seed: int,
    pixels: Pixels | None = None,
) -> tuple[bool, tuple[NDArray[Any], ...]]:
    """Whether an episode succeeded; its observations, simulator states, actions, rewards and, if wanted, images."""
    obs, _ = env.reset(seed=seed)
    policy = expert(env, obs, rng, noise)
    action = next(policy)
    steps, done, success = [], False, False
    while not done:
        state = env.state() if hasattr(env, "state") else obs
        images = (env.images(pixels.cameras, pixels.size),) if pixels else ()  # type: ignore[attr-defined]
        next_obs, reward, terminated, truncated, info = env.step(action)
        steps.append((obs, state, action, reward, *images))
        success |= info["success"]
        done, obs = terminated or truncated, next_obs
        if not done:
            action = policy.send(obs)
    return success, tuple(np.stack(column) for column in zip(*steps, strict=True))


def _env_args(task: TaskSpec) -> str:
    if task.suite == "robosuite":
        import robosuite

        from common.envs.robosuite_env import ARM_ACTIONS, env_kwargs

        version, kwargs = robosuite.__version__, env_kwargs(task.action_dim // ARM_ACTIONS)
    else:
        package = {"metaworld": "metaworld", "adroit": "gymnasium-robotics"}.get(task.suite)
        version, kwargs = importlib.metadata.version(package) if package else "1", {}
    return json.dumps({"env_name": task.env_name, "env_version": version, "type": 1, "env_kwargs": kwargs})


def write_demos(path: Path, episodes: list[Episode], env_args: str) -> None:
    """Writes successful episodes atomically; mask/train lists the first nine tenths, mask/valid the rest."""
    names = [f"demo_{i}" for i in range(len(episodes))]
    cut = max(1, len(names) * 9 // 10)
    with replacing(path) as temp, h5py.File(temp, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = sum(len(episode.actions) for episode in episodes)
        data.attrs["env_args"] = env_args
        for name, episode in zip(names, episodes, strict=True):
            demo = data.create_group(name)
            steps = demo.attrs["num_samples"] = len(episode.actions)
            demo["actions"] = episode.actions
            demo["rewards"] = episode.rewards
            demo["states"] = episode.states
            demo["dones"] = (np.arange(steps) == steps - 1).astype(np.int64)
            for key, value in episode.obs.items():
                image = value.dtype == np.uint8
                demo.create_dataset(f"obs/{key}", data=value, compression="gzip" if image else None)
        file["mask/train"] = np.array(names[:cut], "S")
        file["mask/valid"] = np.array(names[cut:], "S")


def draw_images(path: Path, task: TaskSpec, pixels: Pixels, target: Path) -> None:
    """Copies a file of robosuite's states to `target` and adds the images, drawn state by state.

    As robomimic does: the state files have no images. Raises UserError for a file without models and states.
    """
    env = make_env(task.name)
    env.reset(seed=0)
    sim = env.env  # robosuite's own environment
    with replacing(target) as temp:
        shutil.copyfile(path, temp)
        with h5py.File(temp, "r+") as file:
            shown = ""
            for name in tqdm(episode_names(file, path), desc="drawing demonstrations", leave=False):
                demo = file["data"][name]
                if "states" not in demo or "model_file" not in demo.attrs:
                    raise UserError(
                        f"{path}: {name} has neither images nor states with their model_file, from which to draw them"
                    )
                with reading(f"{path}: {name}: its states or model_file", "get the file again"):
                    if demo.attrs["model_file"] != shown:
                        shown = demo.attrs["model_file"]
                        sim.reset_from_xml_string(sim.edit_model_xml(shown))
                    images = []
                    for state in demo["states"][()]:
                        sim.sim.set_state_from_flattened(state)
                        sim.sim.forward()
                        images.append(env.images(pixels.cameras, pixels.size))
                    for i, camera in enumerate(pixels.cameras):
                        data = np.stack(images)[:, i]
                        demo.create_dataset(f"obs/{image_key(camera)}", data=data, compression="gzip")
    env.close()
