"""A small copy of a run to give away: its weights, what loads them, and a model card; into a folder, or to a hub.

python -m tools.share runs/NAME FOLDER
python -m tools.share runs/NAME --push owner/name --private     # to the Hugging Face hub, after `hf auth login`
python -m tools.share runs/NAME FOLDER --half                   # a language model in bfloat16

--eval, --cloned, --teacher, --distill and load_policy take such a folder, and hf://owner/name. --resume does not: the
copy has no optimizers and no replay buffer.
"""

import argparse
import inspect
import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError

from common import checkpoint, cli, record
from common.errors import UserError, first_line, reading
from common.policy import ROOT, file_of, load_acting, networks, script_of
from common.run import POLICY_NAMES
from common.runlog import write_json
from common.start import CHECKPOINT

# Arguments that mean something on this machine only: they go back to their defaults, of a path the last part stays.
HERE = (
    "eval",
    "resume",
    "run_name",
    "run_dir",
    "data_dir",
    "device",
    "threads",
    "compile",
    "tensorboard",
    "wandb_project",
)
PATHS = ("demos", "cloned", "teacher", "distill", "released", "tokenizer_path", "judge_path")
KEPT = ("version", "args", "step", "encoding")  # of a checkpoint, beside the weights


def portable(args: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a run without what only this machine has."""
    args = {k: defaults.get(k, v) if k in HERE else v for k, v in args.items()}
    return args | {k: Path(args[k]).name for k in PATHS if args.get(k)}


def without_optimizers(state: Any) -> Any:
    """The packed state of an agent; that of every optimizer in it is {}."""
    if not isinstance(state, dict):
        return state
    return {} if state.keys() == {"state", "param_groups"} else {k: without_optimizers(v) for k, v in state.items()}


def slim_agent(run: Path, agent: dict[str, Any], pixels: bool) -> dict[str, Any]:
    """The agent without optimizers. A network of which only the slow copy acts has the copy's weights, stored once."""
    agent = without_optimizers(agent)
    if not pixels:
        acts = [networks(load_acting(run, which, torch.device("cpu"))) for which in ("acting", "noise-free")]
        once = [name for name in agent if f"{name}_ema" in agent and not any(name in nets for nets in acts)]
        agent |= {name: agent[f"{name}_ema"] for name in once}
    return agent


def halved(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.bfloat16() if v.is_floating_point() else v for k, v in weights.items()}


def write_copy(run: Path, folder: Path, half: bool, name: str) -> None:
    """Write the copy of `run` into `folder`, under `name` in its card. Raises UserError on a folder without a run."""
    module, made = script_of(run), record.read(run)
    saved, robot = checkpoint.load(run / CHECKPOINT), hasattr(module, "Agent")
    if half and robot:
        raise UserError("--half is for language models; leave it out, a robot policy is small")
    with reading(run / CHECKPOINT, "share a run of this version"):
        chosen = inspect.signature(module.default_args).parameters.keys() - {"teacher", "distill"}
        defaults = cli.flatten(module.default_args(**{k: v for k, v in saved["args"].items() if k in chosen}))
        defaults = {
            k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()
        }  # as a checkpoint holds them
        args = portable(saved["args"], defaults)
        state = {k: saved[k] for k in KEPT if k in saved} | {"args": args, "shared": True}
        if robot:
            state["agent"] = slim_agent(run, saved["agent"], "cameras" in args)
        else:
            state["ema"] = halved(saved["ema"]) if half else saved["ema"]
    checkpoint.save(folder / CHECKPOINT, state)
    kept = {k: made[k] for k in ("script", "definitions", "versions", "git") if k in made}
    write_json(folder / record.RECORD, kept | {"args": args})
    for file in (run / "cloned.pt", ROOT / "LICENSE"):
        if file.exists():
            shutil.copy(file, folder)
    flags = {k: v for k, v in args.items() if k in chosen or (v != defaults.get(k) and k not in HERE)}
    (folder / "README.md").write_text(card(run, file_of(module), state, flags, kept, name))


def card(
    run: Path, script: str, state: Mapping[str, Any], flags: Mapping[str, Any], kept: Mapping[str, Any], name: str
) -> str:
    """The model card, from the numbers of the run. flags: arguments with which it was made."""
    args, robot = state["args"], "agent" in state
    subject, holds = (args["env"], "policies") if robot else (args["data"], "averaged network")
    if not robot and any(value.dtype == torch.bfloat16 for value in state["ema"].values()):
        holds += ", rounded to bfloat16 after the evaluations below,"
    command = ["python", script, *(part for k, v in flags.items() for part in flag(k, v))]
    versions = ", ".join(f"{package} {version}" for package, version in kept.get("versions", {}).items())
    commit = (kept.get("git") or {}).get("commit")
    own = ["--env", args["env"]] if robot and ":" in args["env"] else []
    parts = [
        f"---\nlicense: mit\ntags:\n- {'robotics' if robot else 'text-generation'}\n---\n\n# {subject}, by {script}\n",
        f"The {holds} of a run of `{script}` after {state['step']:,} steps, for the code of *OGPO and FLM: reference "
        "implementations*. The weights alone: the run cannot be resumed.\n",
        "## Evaluations\n",
        scores(run) if robot else tables(run),
        f"## Evaluate it\n\n```bash\n{shlex.join(['python', script, '--eval', name, *own])}\n```\n",
    ]
    if robot and "cameras" not in args:
        lines = ["from common.policy import load_policy\n", f'policy = load_policy("{name}")', "action = policy(obs)"]
        parts.append("## Act with it\n\n```python\n" + "\n".join(lines) + "\n```\n")
    parts.append(f"## Made with\n\n```bash\n{shlex.join(command)}\n```\n\n{versions}\n")
    if commit:
        parts.append(f"Commit {commit}{', with changes' if kept['git'].get('dirty') else ''}.\n")
    return "\n".join(parts)


def flag(name: str, value: Any) -> list[str]:
    """A command line's flag and its values."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


def scores(run: Path) -> str:
    """A robot run's newest evaluation as a table."""
    file = run / "evaluation.json"
    if not file.exists():
        return "None yet.\n"
    with reading(file, "evaluate the run again"):
        kept = json.loads(file.read_text())
        lines = ["| policy | success | 95 % interval | episodes | mean length |", "|---|---|---|---|---|"]
        for name, result in kept["policies"].items():
            low, high = result["interval"]
            n, steps = result["episodes"], result["mean_length"]
            rate = result["successes"] / n
            lines.append(
                f"| {POLICY_NAMES.get(name, name)} | {rate:.2f} | {low:.2f} to {high:.2f} | {n} | {steps:.1f} |"
            )
        said = f"At step {kept['step']:,}, on episodes that decided nothing in training; Wilson intervals.\n"
    return "\n".join([*lines, "", said])


def tables(run: Path) -> str:
    """A language run's evaluations, by judge."""
    files = sorted(run.glob("evaluation_*.md"))
    parts = [f"Judge {file.stem.removeprefix('evaluation_')}:\n\n{file.read_text()}" for file in files]
    return "\n".join(parts) or "None yet.\n"


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload `folder` to a model repository on the hub, made if it is new; its address.

    Raises UserError without a token, on what the hub and the network refuse, and if it is there, and public, but is to
    be private.
    """
    if not huggingface_hub.get_token():
        raise UserError("--push needs a token of the Hugging Face hub; run: hf auth login, or set HF_TOKEN")
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.repo_info(repository).private:  # which create_repo leaves as it is
            raise UserError(f"{repository} is there already and public; give another name, or leave out --private")
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="A run, by tools/share.py")
    except UserError:
        raise
    except HFValidationError as error:
        raise UserError(f"--push {repository}: {first_line(error)}; give owner/name") from error
    except Exception as error:  # hub and network have exceptions of their own
        raise UserError(
            f"cannot push to {repository} ({first_line(error)}); check network and name, and that the token may write"
        ) from error
    return f"{api.endpoint}/{repository}"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("folder", type=Path, nargs="?", help="the new folder")
    parser.add_argument("--push", metavar="OWNER/NAME", help="to this repository of the Hugging Face hub, in its place")
    parser.add_argument("--private", action="store_true", help="with --push: a new repository is private")
    parser.add_argument("--half", action="store_true", help="a language model's weights in bfloat16: half the size")
    args = parser.parse_args(argv)
    if bool(args.folder) == bool(args.push):
        raise UserError("give a FOLDER to write, or --push owner/name: one of the two")
    if args.private and not args.push:
        raise UserError("--private is for --push; leave it out")
    if args.folder and args.folder.exists():
        raise UserError(f"{args.folder} is there already; give another name, or remove it")
    home = args.folder.parent if args.folder else None
    name = f"hf://{args.push}" if args.push else args.folder.name  # in the card, no path of this machine
    try:
        if home:
            home.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=home, prefix=".share") as temp:
            new = Path(temp) / "run"
            new.mkdir()
            write_copy(args.run, new, args.half, name)
            size = sum(file.stat().st_size for file in new.iterdir())
            if args.push:
                place = push(new, args.push, args.private)
            else:
                place = os.fspath(args.folder)
                os.replace(new, place)
    except OSError as error:
        raise UserError(
            f"cannot write {args.folder or 'the copy'} ({first_line(error)}); give a folder of yours"
        ) from error
    print(f"{place}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
