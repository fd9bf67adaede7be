"""Every combination of some settings as runs of one script, here or on a cluster.

python -m tools.sweep ogpo_state.py --env lift --seed 1 2 3 --actor-lr 1e-4 3e-4 --jobs 2     # six runs, two at a time
python -m tools.sweep ogpo_state.py --env lift --actor-hidden 256 256 --actor-hidden 512 512  # two
python -m tools.sweep flm_train.py --seed 1 2 --engine slurm --partition gpu --gpus 1         # needs submitit

A flag followed by several values is swept over them. One that takes several values itself (--actor-hidden, --steps) is
swept if it is given several times, a setting each time; so is any other. Names of runs are made from what differs. The
same command skips finished runs and goes on with interrupted ones. Ctrl-C stops the runs, which save.
"""

import argparse
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from os.path import relpath
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from common import cli, jobs, record
from common.errors import UserError, first_line
from common.ranges import ranges
from common.runlog import counted
from tools.compare import PLACES

FREE = PLACES - {"seed", "cloned", "teacher"}  # arguments that may be others when a sweep goes on
SUBMITIT = "submitit==1.5.4"


def load(script: str) -> ModuleType:
    """The module of a training script. Raises UserError if the file is none."""
    path = Path(script)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not (spec and spec.loader and path.is_file()):
        raise UserError(f"{script} is no script; begin with one, as in: python -m tools.sweep ogpo_state.py --seed 1 2")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where `start` looks for it
    spec.loader.exec_module(module)
    if not (hasattr(module, "Args") and hasattr(module, "main")):
        raise UserError(f"{script} is no training script; give one such as ogpo_state.py or flm_train.py")
    return module


class _Parsed(Exception):
    """Where a script would make its run folder."""


def arguments(script: ModuleType, flags: Sequence[str]) -> dict[str, Any]:
    """All arguments of a new run, by name, as the script itself reads and checks them. Raises its UserError."""

    def stop(root: Path, name: str, numbered: bool, weights: record.Weights, args: Mapping[str, Any]) -> Path:
        raise _Parsed(args)

    reserve, record.reserve = record.reserve, stop
    try:
        script.main(list(flags))
    except _Parsed as parsed:
        return dict(parsed.args[0])
    finally:
        record.reserve = reserve
    raise UserError(f"{script.__name__} makes no run with these flags; leave --eval, --resume and the like out")


def settings(script: ModuleType, words: Sequence[str]) -> list[list[tuple[str, ...]]]:
    """For every argument in `words` its settings, each as words of a command line. Raises UserError."""
    known = {name: get_args(kind)[1:] == (...,) for name, kind, _ in ranges(script.Args)}  # whether it has many values
    given: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            given.append((name if name in known else name.removeprefix("no_"), word.split("=", 1)))
        elif given:
            given[-1][1].append(word)
        else:
            raise UserError(f"{word}: expected a flag of the script; flags come behind its name")
    found: dict[str, list[tuple[str, ...]]] = {}
    for name, (flag, *values) in given:
        if name in ("eval", "resume", "run_name"):
            raise UserError(f"{flag}: a sweep names its runs and goes on with them by itself; leave it out")
        one = known.get(name) or len(values) < 2
        new = [(flag, *values)] if one else [(flag, value) for value in values]
        found[name] = list(dict.fromkeys([*found.get(name, []), *new]))
    return list(found.values())


def plan(script: str, words: Sequence[str]) -> dict[Path, list[str]]:
    """{run folder: flags} of all combinations. Raises UserError on the first that the script would refuse."""
    module, found = load(script), {}
    choices = settings(module, words)
    for chosen in product(*choices):
        differs = ["-".join(s)[2:] for s, all_of_it in zip(chosen, choices, strict=True) if len(all_of_it) > 1]
        name = re.sub(r"[^\w.+-]+", "-", "__".join([Path(script).stem, *differs]))
        flags = [word for setting in chosen for word in setting]
        args = arguments(module, flags)
        folder = Path.cwd() / args["run_dir"] / name  # as if it were started here
        if folder in found:
            raise UserError(f"two runs would be {name}: {shlex.join(found[folder])}, and {shlex.join(flags)}")
        made = record.read(folder).get("args", {}) if jobs.state(folder) != "new" else {}
        for key, value in json.loads(json.dumps(args, default=str)).items():
            if key not in FREE and made.get(key, value) != value:
                flag = f"--{key.replace('_', '-')}"
                raise UserError(
                    f"{relpath(folder)} was made with {flag} {made[key]}, not {value}; give another --run-dir"
                )
        found[folder] = flags
    return found


def submitter(engine: str, folder: Path, parameters: Mapping[str, Any]) -> Callable[..., int]:
    """`jobs.execute` as a job of submitit, which the caller waits for. Raises UserError if it cannot be had."""
    try:
        import submitit
    except ImportError as error:
        raise UserError(f"--engine {engine} needs submitit, not installed; run: pip install {SUBMITIT}") from error
    try:
        executor = submitit.AutoExecutor(folder, cluster=engine)
        executor.update_parameters(**{name: value for name, value in parameters.items() if value is not None})
    except (RuntimeError, OSError) as error:
        raise UserError(f"--engine {engine}: {first_line(error)}; run it where slurm is, or leave it out") from error

    def submit(*job: Any) -> int:
        submitted = executor.submit(jobs.execute, *job)
        with jobs.stoppable(submitted.cancel):
            return submitted.result()

    return submit


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("script", help="and its flags, of which those with several values are swept")
    parser.add_argument("--jobs", type=int, help="runs at a time; default: 1, with slurm all")
    parser.add_argument("--engine", choices=("here", "local", "slurm"), default="here", help="local: submitit, here")
    parser.add_argument("--partition", help="of slurm")
    parser.add_argument("--minutes", type=int, default=24 * 60, help="a run's longest time under submitit; then again")
    parser.add_argument("--gpus", type=int, help="a run's, under submitit")
    parser.add_argument("--cpus", type=int, help="a run's, under submitit")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    args, words = parser.parse_known_args(argv)
    for name in ("jobs", "minutes", "cpus"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    runs = plan(args.script, words)
    states = {folder: jobs.state(folder) for folder in runs}
    if args.dry_run:
        for folder, flags in runs.items():
            command = shlex.join(["python", args.script, *jobs.line(folder, flags)])
            print(f"# finished: {relpath(folder)}" if states[folder] == "finished" else command)
        return
    first, launch = next(iter(runs)), jobs.execute
    if args.engine != "here":
        needs = {"timeout_min": args.minutes, "gpus_per_node": args.gpus, "cpus_per_task": args.cpus}
        launch = submitter(args.engine, first.parent / "submitit", needs | {"slurm_partition": args.partition})
    count = ", ".join(f"{list(states.values()).count(state)} {state}" for state in dict.fromkeys(states.values()))
    where = relpath(first.parent / "NAME.txt")
    print(f"{counted(len(runs), 'run')}: {count}; what a run prints is in {where}", flush=True)

    def one(name: str) -> int:
        folder = named[name]
        if states[folder] == "finished":
            return 0
        try:
            code = launch(str(Path(args.script).resolve()), folder, runs[folder], (), Path.cwd())
            said = {0: "finished", jobs.STOPPED: "stopped", jobs.BUSY: "another process has it"}.get(code)
            lines = [] if said else jobs.output(folder).read_text().splitlines()
            print(f"{name}: {said or f'exit code {code}: {lines[-1] if lines else None}'}", flush=True)
        except Exception as error:  # of submitit
            print(f"{name}: {first_line(error)}", flush=True)
            return 1
        return code

    named = {relpath(folder): folder for folder in runs}
    workers = args.jobs or (len(runs) if args.engine == "slurm" else 1)
    sys.exit(jobs.execute_all(one, [(name,) for name in named], workers))


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
