"""Command line: nested argument groups with flat flags, defaults from tables, one-line errors."""

import argparse
import contextlib
import dataclasses
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import tyro

from common.errors import EnvError, UserError, first_line

T = TypeVar("T")


def flatten(args: Any) -> dict[str, Any]:
    """{field: value} over all groups of a nested dataclass; field names are unique across groups."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        new = flatten(value) if dataclasses.is_dataclass(value) else {field.name: value}
        assert not flat.keys() & new.keys(), f"field name used in two groups: {flat.keys() & new.keys()}"
        flat |= new
    return flat


def override(args: T, values: Mapping[str, Any]) -> T:
    """A copy of nested dataclass `args` with the named fields replaced. Raises KeyError on an unknown name."""
    if unknown := values.keys() - flatten(args).keys():
        raise KeyError(f"no such argument: {', '.join(sorted(unknown))}")

    def fill(node: Any) -> Any:
        new = {}
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                new[field.name] = fill(value)
            elif field.name in values:
                new[field.name] = type(value)(values[field.name]) if isinstance(value, tuple) else values[field.name]
        return dataclasses.replace(node, **new)

    return fill(args)


def peek(argv: Sequence[str], *names: str) -> dict[str, str]:
    """Values of the given string flags if present, before the real parse (they choose the defaults)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in names:
        parser.add_argument(f"--{name}", default=None)
    try:
        known, _ = parser.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}; see --help") from error
    return {k: v for k, v in vars(known).items() if v is not None}


def parse(default: T, argv: Sequence[str], description: str) -> T:
    """Parse flags over `default`; --help shows these defaults. Raises UserError on a bad flag."""
    said, config = io.StringIO(), (tyro.conf.OmitArgPrefixes,)
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(type(default), default=default, args=list(argv), description=description, config=config)
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(f"{_unboxed(said.getvalue())}; see --help") from None


def _unboxed(box: str) -> str:
    """tyro's message in one line: what is wrong, and the flag it guesses was meant."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    parts = " ".join(lines).split("─" * 8)  # between horizontal rules
    guess = re.search(r"Perhaps you meant:\s+(--\S+)", box.replace("│", " "))
    said = " ".join(parts[0].split()).removeprefix("Error parsing ").rstrip(".")
    return said + (f"; perhaps {guess[1]}" if guess else "")


def parse_saved(
    default: T, saved: Mapping[str, Any], argv: Sequence[str], description: str, fixed: Collection[str]
) -> T:
    """Parse flags over the arguments of a saved run.

    Raises UserError if one of the `fixed` arguments changes, or the run has arguments that this script does not know:
    a variant's, without which its weights mean something else.
    """
    if unknown := [f"--{k.replace('_', '-')} {v}" for k, v in saved.items() if k not in flatten(default)]:
        raise UserError(f"the run was made with {', '.join(unknown)}, unknown here; use the script that made it")
    args = parse(override(default, saved), argv, description)
    new = flatten(args)
    for name in sorted(saved.keys() & new.keys()):
        before, after = saved[name], new[name]
        if isinstance(after, tuple):
            before = tuple(before)
        if before == after or name in ("eval", "resume"):
            continue
        change = f"--{name.replace('_', '-')}: the run was started with {before}, not {after}"
        if name in fixed:
            raise UserError(f"{change}; that holds for a whole run: leave the flag out or start a new run")
        print(f"note: {change}; going on with {after}")
    return args


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises UserError if the value of a flag that chooses defaults is none of its choices."""
    if value not in choices:
        raise UserError(f"--{name} {value}: expected one of {', '.join(choices)}")


class _Lasting(io.FileIO):
    """An output whose reader may leave: what is written then is lost, and the run goes on. Its folder has the log."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def run(main: Callable[[], None]) -> None:
    """Call main. A UserError becomes one line on stderr and exit code 2, an EnvError one and exit code 1; an abort by
    a signal exit code 128 and its number, 130 for Ctrl-C.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # nobody has put another in its place
            raw = _Lasting(stream.fileno(), "w", closefd=False)
            lasting = io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, "replace", line_buffering=True)
            setattr(sys, name, lasting)
    try:
        main()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            # Gloo's threads outlive destroy_process_group where DistributedDataParallel was used (torch 2.13), and now
            # and then abort the process when the interpreter is taken down under them. All is saved and closed here.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    except KeyboardInterrupt as abort:
        sys.exit(128 + (abort.args[0] if abort.args else signal.SIGINT))
    except EnvError as e:
        sys.exit(f"error: {e}")
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(e.code)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(
            f"error: {first_line(e)}; the last checkpoint is intact: free some disk space, then go on with --resume"
        )
