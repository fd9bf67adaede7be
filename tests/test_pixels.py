"""ogpo_pixels.py and what it stands on: encoders, images once a chunk, chunk rows, demonstrations with images."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch

import ogpo_pixels as op
import ogpo_state as og
from common import checkpoint, cli
from common.backbone import Backbone
from common.demos import Demos, get_demos
from common.demos.robomimic import read_images
from common.envs import ChunkStep, Pixels, make_env, resolve
from common.episodes import Episodes
from common.errors import UserError
from common.replay import ReplayBuffer
from common.rng import Rng
from common.runlog import read_metrics
from tests.helpers import definitions, differing
from tests.warm import run_script
from tools.recording import draw_images
from variants import ogpo_pixels_reference, ogpo_reference

TOP = Pixels(("top",), 32)
# What ogpo_pixels.py defines in its own words; all else is the text of ogpo_state.py.
OWN = {
    *("PixelArgs", "Args", "default_args", "Encoder", "TwoTier", "VelocityNet", "CriticEnsemble", "random_shift"),
    *("Agent", "encode", "pretrain", "train", "main"),
    *("CriticArgs", "update_critic"),  # without Cal-QL
}
STATE_ONLY = {"CALQL_COEF", "CALQL_ACTIONS", "calql_term", "pretrain_critic"}


def test_ogpo_pixels_shares_the_text_of_ogpo_state() -> None:
    assert differing(og, op) == OWN | STATE_ONLY, "carry a change over with: python tools/carry.py ogpo_state.py"
    assert definitions(og).keys() - definitions(op).keys() == STATE_ONLY


def test_ogpo_pixels_reference_is_the_same_change_as_ogpo_reference() -> None:
    state, pixels = definitions(ogpo_reference), definitions(ogpo_pixels_reference)
    changed = differing(og, ogpo_reference)
    assert differing(op, ogpo_pixels_reference) == changed, "python tools/carry.py ogpo_pixels.py"
    for name in changed - OWN:
        assert pixels[name] == state[name]
    command = ["diff", op.__file__, ogpo_pixels_reference.__file__]
    assert 30 < len(subprocess.run(command, capture_output=True, text=True).stdout.splitlines()) < 150


# --- encoders ---------------------------------------------------------------------------------------------------------


def test_encoder_features_are_the_places_of_patterns() -> None:
    """One camera sees a red spot, the other a green one; each camera's first pattern is "much red"."""
    encoder = op.Encoder(op.PixelArgs(cameras=("a", "b"), channels=2))
    look = torch.nn.Conv2d(6, 4, 1, groups=2, bias=False)
    with torch.no_grad():
        look.weight.zero_()
        look.weight[[0, 2], 0] = 50.0
    encoder.convs = torch.nn.ModuleList([look])
    images = torch.zeros(1, 2, 11, 11, 3, dtype=torch.uint8)
    images[0, 0, 2, 9, 0] = 255  # row 2, column 9
    images[0, 1, 7, 1, 1] = 255
    features = encoder(images)
    assert features.shape == (1, 8) and encoder.features == 8
    rows, columns = features[0, :4], features[0, 4:]
    assert columns[0].item() == pytest.approx(2 * 9 / 10 - 1, abs=1e-4)
    assert rows[0].item() == pytest.approx(2 * 2 / 10 - 1, abs=1e-4)
    assert torch.allclose(columns[1:], torch.zeros(3), atol=1e-5)  # nothing red, or nothing looked for: the middle
    assert torch.allclose(rows[1:], torch.zeros(3), atol=1e-5)


def test_encoder_cameras_have_networks_of_their_own() -> None:
    encoder = op.Encoder(op.PixelArgs(cameras=("a", "b"), channels=4))
    images = torch.randint(0, 255, (3, 2, 32, 32, 3), dtype=torch.uint8)
    other = images.clone()
    other[:, 1] = 255 - other[:, 1]
    a, b = (encoder(x).unflatten(1, (2, 2, 4)) for x in (images, other))  # (n, row or column, camera, pattern)
    assert torch.equal(a[:, :, 0], b[:, :, 0]) and not torch.equal(a[:, :, 1], b[:, :, 1])
    assert a.abs().max() <= 1


def test_random_shift_moves_whole_pixels_and_repeats_edges() -> None:
    images = torch.arange(2 * 1 * 4 * 4 * 3).view(2, 1, 4, 4, 3).to(torch.uint8)
    assert torch.equal(op.random_shift(images, torch.zeros(2, 2, dtype=torch.long)), images)
    moved = op.random_shift(images, torch.tensor([[1, -2], [0, 3]]))
    want = np.pad(images[0, 0].numpy(), ((0, 1), (2, 0), (0, 0)), mode="edge")[1:, :4]
    assert np.array_equal(moved[0, 0].numpy(), want)
    assert torch.equal(moved[1, 0], images[1, 0, :, 3:].expand(4, 4, 3))


def test_two_tier_is_a_layer_each_and_heads_are_independent() -> None:
    torch.manual_seed(0)
    tier = op.TwoTier(3, 5, 2, 8)
    obs = torch.randn(4, 7)
    out = tier(obs)
    assert out.shape == (3, 4, 8)
    for m in range(3):
        for x, w, at in ((obs[:, :5], tier.weights[0], 0), (obs[:, 5:], tier.weights[1], 4)):
            want = torch.nn.functional.gelu(torch.nn.functional.layer_norm(x @ w[m], (4,), eps=1e-6))
            assert torch.allclose(out[m, :, at : at + 4], want, atol=1e-6)
    out[1].sum().backward()
    assert all(p.grad[0].abs().sum() == 0 and p.grad[2].abs().sum() == 0 for p in tier.parameters())


def test_backbone_gives_features_of_length_one_and_stays_out_of_checkpoints(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    size = {"height": 28, "width": 28}
    transformers.BitImageProcessor(size={"shortest_edge": 28}, crop_size=size).save_pretrained(tmp_path)
    backbone = Backbone(str(tmp_path), "", 2, 84)
    images = torch.randint(0, 255, (3, 2, 40, 40, 3), dtype=torch.uint8)
    features = backbone(images)
    assert features.shape == (3, 32) and backbone.features == 32
    torch.testing.assert_close(features.unflatten(1, (2, 16)).norm(dim=-1), torch.ones(3, 2))
    assert not list(backbone.parameters()) and not backbone.state_dict() and not features.requires_grad
    other = images.clone()
    other[:, 1] = 0
    assert torch.allclose(backbone(other)[:, :16], features[:, :16], atol=1e-5)
    run = command(tmp_path, "--env", "toy", *SMALL, "--total-steps", "260", "--backbone", str(tmp_path))
    assert run.returncode == 0, run.stdout + run.stderr
    file = tmp_path / "model.safetensors"
    sound = file.read_bytes()
    for length in (0, 5, 100, len(sound) // 2, len(sound) - 1):
        file.write_bytes(sound[:length])
        with pytest.raises(UserError, match=r"--backbone .* cannot be read \(.*\); give a model's folder or hub name$"):
            Backbone(str(tmp_path), "", 2, 84)


def test_backbone_with_a_prompt_reads_it(tmp_path: Path) -> None:
    """A random PaliGemma of a few hundred numbers with a vocabulary of seven words."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {w: i for i, w in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "lift", "the", "cube", "\n"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    images = transformers.SiglipImageProcessor(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    processor = transformers.PaliGemmaProcessor(images, fast)
    token = fast.convert_tokens_to_ids("<image>")
    small = dict(intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.PaliGemmaConfig(
        vision_config=small
        | dict(hidden_size=16, image_size=28, patch_size=14, model_type="siglip_vision_model", vision_use_head=False),
        text_config=small
        | dict(model_type="gemma", hidden_size=24, num_key_value_heads=1, head_dim=12, vocab_size=len(fast) + 4),
        image_token_index=token,
        image_token_id=token,
        projection_dim=24,
    )
    transformers.PaliGemmaForConditionalGeneration(config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    seen = torch.randint(0, 255, (2, 2, 40, 40, 3), dtype=torch.uint8)
    features = [
        Backbone(str(tmp_path), prompt, 2, 84)(seen) for prompt in ("lift the cube", "lift the cube", "the cube")
    ]
    assert features[0].shape == (2, 48)
    assert torch.equal(features[0], features[1]) and not torch.allclose(features[0], features[2], atol=1e-4)


def test_backbone_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # asking the hub again takes half a minute
    with pytest.raises(UserError, match="--backbone no/where cannot be read"):
        Backbone("no/where", "", 2, 84)


def test_agent_policy_and_critics_on_features_broadcast_as_from_state() -> None:
    changes = dict(actor_hidden=(32, 32), critic_hidden=(32, 32))
    args = cli.override(op.default_args("toy", "laptop", "ogpo+ca"), changes)
    felt = np.random.default_rng(0).normal(1, 3, (50, 4)).astype(np.float32)
    demos = Demos(felt, np.zeros((50, 2), np.float32), np.array([50]), "fifty steps")
    agent = op.Agent(args, 4, 2, torch.device("cpu"), demos)
    features = agent.encoder.features
    assert agent.actor.obs_mean[:features].abs().sum() == 0
    torch.testing.assert_close(agent.actor.obs_mean[features:], torch.from_numpy(felt.mean(0)))
    obs = torch.randn(6, features + 4)
    chain, old = op.sample_chain(agent.actor, obs, torch.randn(6, 5, 8), args.policy)
    torch.testing.assert_close(op.chain_log_prob(agent.actor, obs, chain, args.policy), old, rtol=1e-4, atol=1e-5)
    q = agent.critic(obs, chain[:, -1])
    with torch.no_grad():
        torch.testing.assert_close(agent.critic(obs, chain[:, -1]), q, rtol=1e-4, atol=1e-4)


# --- images once a chunk ----------------------------------------------------------------------------------------------


def test_pixel_env_draws_once_a_chunk_and_what_is_felt_is_the_state_s() -> None:
    env, plain = make_env("toy", chunk=4, pixels=TOP), make_env("toy")
    drawn = []
    real = env.unwrapped.images
    env.unwrapped.images = lambda *a: drawn.append(1) or real(*a)
    shown, _ = env.reset(seed=3)
    obs, _ = plain.reset(seed=3)
    for _ in range(3):
        chunk = np.full((4, 2), 0.3, np.float32)
        np.testing.assert_array_equal(shown["proprio"], obs[[0, 1, 4, 5]])
        assert shown["images"].shape == (1, 32, 32, 3) and shown["images"].dtype == np.uint8
        shown = env.step(chunk)[0]
        for action in chunk:
            obs = plain.step(action)[0]
    assert len(drawn) == 4
    assert (shown["images"][0] == (40, 90, 220)).all(-1).any() and (shown["images"][0] == (40, 170, 70)).all(-1).any()


def test_make_env_bad_cameras_are_user_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no camera 'side'; the toy task has top"):
        make_env("toy", pixels=Pixels(("side",), 32)).reset(seed=0)
    with pytest.raises(UserError, match="pen has no cameras here; use one of toy, lift, can"):
        make_env("pen", pixels=TOP)
    env = make_env("toy", pixels=TOP)
    monkeypatch.setattr(env.unwrapped, "images", lambda *a: np.full((1, 32, 32, 3), 7, np.uint8))
    with pytest.raises(UserError, match=r"camera top shows one colour, \[7, 7, 7\]"):
        env.reset(seed=0)


class Scripted(gym.Env):
    """Counts its steps; reward is the count; succeeds at `success_at`, ends at `horizon`."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, success_at: int, horizon: int) -> None:
        self.success_at, self.horizon = success_at, horizon

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(1, np.float32), {"success": False}

    def step(self, action: np.ndarray) -> tuple:
        self.count += 1
        success = self.count == self.success_at
        truncated = self.count == self.horizon and not success
        return np.full(1, self.count, np.float32), float(self.count), success, truncated, {"success": success}


def trained(monkeypatch: pytest.MonkeyPatch, success_at: int, horizon: int) -> tuple[MagicMock, ReplayBuffer, Episodes]:
    """What `train` leaves of one episode of Scripted, with actions from -1 to 1 in every chunk and no update."""
    vector = gym.vector.SyncVectorEnv(
        [lambda: ChunkStep(Scripted(success_at, horizon), 4)], autoreset_mode=gym.vector.AutoresetMode.DISABLED
    )
    monkeypatch.setattr(op, "make_vec_env", lambda *args, **kwargs: vector)
    monkeypatch.setattr(op, "encode", lambda agent, shown: shown)
    actions = torch.linspace(-1, 1, 4).view(1, 4, 1)
    monkeypatch.setattr(op, "act_best_of_n", lambda *args: actions)
    run = MagicMock(step=0, obs_dim=1, act_dim=1, good_enough=lambda _: False)
    run.stop.requested, run.closing = False, lambda envs: envs
    kept = {}
    run.track = lambda **parts: kept.update(parts)
    agent = SimpleNamespace(encoder=SimpleNamespace(features=0), rng=Rng(0, torch.device("cpu")))
    changes = dict(total_steps=min(success_at, horizon), start_training=10**9, success_bonus=100.0, reward_offset=0.0)
    buffer = ReplayBuffer(100, 1, 4, 1, rewards=4)
    op.train(run, agent, buffer, cli.override(op.default_args("toy"), changes))
    return run, buffer, kept["episodes"]


@pytest.mark.parametrize(("success_at", "rows"), [(6, 2), (8, 2), (99, 2)])
def test_train_rows_are_chunks_with_the_rewards_of_their_steps(
    success_at: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 4: a success in the middle of one ends its rewards, a time limit of 10 leaves the third chunk out."""
    run, buffer, episodes = trained(monkeypatch, success_at, 10)
    (lo, hi, success) = buffer.episodes[0]
    assert hi - lo == rows + 1 and success == (success_at < 99)
    assert run.step == episodes.lengths[0] == min(success_at, 10)
    want = [[1, 2, 3, 4], [5, 106, 0, 0] if success_at == 6 else [5, 6, 7, 108 if success_at == 8 else 8]]
    assert buffer.rewards[lo : lo + 2].tolist() == want
    assert buffer.obs[lo:hi, 0].tolist() == [0, 4, 6 if success_at == 6 else 8]
    assert buffer.terminated[lo : lo + 2].tolist() == [0, float(success_at < 99)]
    assert (buffer.actions[lo : lo + 2] == torch.linspace(-1, 1, 4).numpy()).all()
    batch = buffer.sample(64, np.random.default_rng(0), torch.device("cpu"))
    assert batch.rewards.shape == (64, 4) and batch.actions.shape == (64, 1, 4)
    second = batch.obs[:, 0] == 4
    targets = og.td_target(batch.rewards, batch.steps, batch.terminated, torch.full((2, 64), 1000.0), 0.5)
    target = targets[second][0].item()
    if success_at < 99:
        assert target == pytest.approx(5 + 106 / 2 if success_at == 6 else 5 + 6 / 2 + 7 / 4 + 108 / 8)
    else:
        assert target == pytest.approx(5 + 6 / 2 + 7 / 4 + 8 / 8 + 1000 / 16)


def test_train_an_episode_shorter_than_a_chunk_leaves_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    run, buffer, episodes = trained(monkeypatch, 99, 3)
    assert run.step == 3 and not buffer.episodes and episodes.finished == 1 and episodes.lengths[0] == 3


# --- demonstrations ---------------------------------------------------------------------------------------------------


def test_get_demos_come_with_the_images_of_their_steps(tmp_path: Path) -> None:
    demos = get_demos("toy", "scripted", 3, 0.1, tmp_path, pixels=TOP)
    plain = get_demos("toy", "scripted", 3, 0.1, tmp_path)
    np.testing.assert_array_equal(demos.actions, plain.actions)
    np.testing.assert_array_equal(demos.obs, plain.obs[:, [0, 1, 4, 5]])
    assert demos.images.shape == (len(demos.obs), 1, 32, 32, 3) and plain.images is None
    row = demos.ends[0] + 2
    blue = np.argwhere((demos.images[row, 0] == (40, 90, 220)).all(-1)).mean(0)  # row, column
    x, y = demos.obs[row, :2]
    np.testing.assert_allclose(blue, [(1 - y) * 31 / 2, (x + 1) * 31 / 2], atol=0.8)
    path = next(tmp_path.glob("*top_32.hdf5"))
    train = read_images(path, TOP, "train")
    assert len(train) == get_demos("toy", str(path), 0, 0, tmp_path, filter_key="train", pixels=TOP).ends[-1]
    for wrong, text in ((Pixels(("top",), 48), r"images \(.*32, 32, 3\)"), (Pixels(("side",), 32), "no images of")):
        with pytest.raises(UserError, match=text):
            get_demos("toy", str(path), 0, 0, tmp_path, pixels=wrong)


def test_draw_images_from_states_are_those_of_the_recording(tmp_path: Path) -> None:
    """A file with states and models, as robomimic's: its images are drawn, and equal the ones seen while recording."""
    pixels = Pixels(("agentview", "robot0_eye_in_hand"), 32)
    seen = get_demos("lift", "scripted", 1, 0.1, tmp_path, pixels=pixels)
    recorded = next(tmp_path.glob("lift*.hdf5"))
    task = resolve("lift")
    env = make_env("lift")
    env.reset(seed=2**31)
    states = tmp_path / "states.hdf5"
    with h5py.File(recorded) as source, h5py.File(states, "w") as file:
        source.copy("data", file)
        for key in list(file["data/demo_0/obs"]):
            if key.endswith("_image"):
                del file[f"data/demo_0/obs/{key}"]
        with pytest.raises(UserError, match="neither images nor states with their model_file"):
            file.flush()
            draw_images(states, task, pixels, tmp_path / "no.hdf5")
        file["data/demo_0"].attrs["model_file"] = env.env.sim.model.get_xml()
    env.close()
    drawn = get_demos("lift", str(states), 0, 0, tmp_path, pixels=pixels)
    assert drawn.images.shape == seen.images.shape
    difference = np.abs(drawn.images.astype(int) - seen.images)
    assert difference.mean() < 1.0 and seen.images.std() > 20
    np.testing.assert_array_equal(drawn.obs, seen.obs)


# --- the script -------------------------------------------------------------------------------------------------------

SMALL = [
    *("--preset", "laptop", "--no-video", "--num-demos", "6", "--bc-steps", "20", "--bc-eval-every", "20"),
    *("--bc-eval-episodes", "2", "--eval-episodes", "2", "--eval-interval-episodes", "2", "--eval-every", "200"),
    *("--actor-hidden", "16", "16", "--critic-hidden", "16", "16", "--states", "8", "--start-training", "120"),
    *("--critic-successes", "0", "--critic-warmup", "3", "--success-min", "1", "--critic-batch", "32"),
    *("--image-size", "24", "--channels", "4", "--checkpoint-every", "100"),
]  # fmt: skip


def command(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return run_script([op.__file__, "--run-dir", str(tmp_path), "--data-dir", str(tmp_path), *flags])


def test_main_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    for name, steps in (("whole", "500"), ("parts", "300")):
        done = command(tmp_path, "--env", "toy", *SMALL, "--total-steps", steps, "--run-name", name)
        assert done.returncode == 0, done.stdout + done.stderr
    done = command(tmp_path, "--resume", str(tmp_path / "parts"), "--total-steps", "500")
    assert done.returncode == 0, done.stdout + done.stderr
    whole, parts = (
        [row for row in read_metrics(tmp_path / name) if "final/bon_success" not in row] for name in ("whole", "parts")
    )
    strip = [[{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows] for rows in (whole, parts)]
    assert strip[0] == strip[1]
    states = [checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts")]
    assert torch.equal(states[0]["buffer"]["obs"], states[1]["buffer"]["obs"])
    variant = [ogpo_pixels_reference.__file__, "--run-dir", str(tmp_path), "--data-dir", str(tmp_path)]
    run_script([*variant, "--env", "toy", *SMALL, "--total-steps", "200"], check=0)
    done = command(tmp_path, "--eval", str(tmp_path / "whole"))
    assert done.returncode == 0 and "best-of-N policy: success" in done.stdout


@pytest.mark.slow
def test_start_a_changed_camera_does_not_fit_a_checkpoint(tmp_path: Path) -> None:
    done = command(tmp_path, "--env", "toy", *SMALL, "--total-steps", "130", "--run-name", "a")
    assert done.returncode == 0, done.stdout + done.stderr
    done = command(tmp_path, "--resume", str(tmp_path / "a"), "--image-size", "32")
    assert done.returncode == 2 and "--image-size: the run was started with 24" in done.stderr


def test_write_views_writes_what_cameras_see(tmp_path: Path) -> None:
    done = command(tmp_path, "--env", "toy", "--preset", "laptop", "--render-check", "--run-name", "look")
    assert done.returncode == 0, done.stdout + done.stderr
    import imageio.v3 as imageio

    image = imageio.imread(tmp_path / "look" / "cameras_top.png")
    assert image.shape == (48, 48, 3) and image.std() > 10


@pytest.mark.slow
def test_main_learns_the_toy_task_from_pixels(tmp_path: Path) -> None:
    """From a cloned policy that fails about every second time to above 0.9."""
    done = command(tmp_path, "--env", "toy", "--no-video", "--run-name", "toy")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_metrics(tmp_path / "toy")
    assert next(row["eval/ode_success"] for row in rows if "eval/ode_success" in row) < 0.6
    assert rows[-1]["final/bon_success"] > 0.9 and rows[-1]["final/ode_success"] > 0.9
