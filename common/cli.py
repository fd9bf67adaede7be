"""Command line: nested argument groups with flat flags, defaults from tables, one-line errors."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import tyro

from common.errors import UserError

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
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}", default=None)
    known, _ = parser.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    return {k: v for k, v in vars(known).items() if v is not None}


def parse(default: T, argv: Sequence[str], description: str) -> T:
    """Parse flags over `default`; --help shows these defaults. A bad flag prints a box and exits with 2."""
    config = (tyro.conf.OmitArgPrefixes,)
    return tyro.cli(type(default), default=default, args=list(argv), description=description, config=config)


def parse_saved(
    default: T, saved: Mapping[str, Any], argv: Sequence[str], description: str, fixed: Collection[str]
) -> T:
    """Parse flags over the arguments of a saved run. Raises UserError if one of the `fixed` arguments changes."""
    known = flatten(default)
    args = parse(override(default, {k: v for k, v in saved.items() if k in known}), argv, description)
    new = flatten(args)
    for name in sorted(saved.keys() & new.keys()):
        before, after = saved[name], new[name]
        if isinstance(after, tuple):
            before = tuple(before)
        if before == after or name in ("eval", "resume"):
            continue
        change = f"--{name.replace('_', '-')}: the run was started with {before}, not {after}"
        if name in fixed:
            raise UserError(f"{change}; its checkpoint does not fit: leave the flag out or start a new run")
        print(f"note: {change}; going on with {after}")
    return args


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises UserError if the value of a flag that chooses defaults is none of its choices."""
    if value not in choices:
        raise UserError(f"--{name} {value}: expected one of {', '.join(choices)}")


def check_at_least(flat: Mapping[str, Any], least: Mapping[str, float]) -> None:
    """Raises UserError naming the first argument below its least value."""
    for name, low in least.items():
        if flat[name] < low:
            raise UserError(f"--{name.replace('_', '-')} {flat[name]}: must be at least {low:g}; see --help")


def run(main: Callable[[], None]) -> None:
    """Call main; a UserError becomes one line on stderr and exit code 2, an abort by Ctrl-C exit code 130."""
    try:
        main()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            # Gloo's threads outlive destroy_process_group where DistributedDataParallel was used (torch 2.13), and now
            # and then abort the process when the interpreter is taken down under them. All is saved and closed here.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
