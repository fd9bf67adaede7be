"""Ranges of arguments, written beside them as their types: `gamma: Unit = 0.99`."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

from common.errors import UserError


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`, without these where the range is open."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, x: float) -> bool:
        above = x > self.low if self.open_low else x >= self.low
        below = x < self.high if self.open_high else x <= self.high
        return math.isfinite(x) and above and below

    def __str__(self) -> str:
        low = "" if self.low == -math.inf else f"{'above' if self.open_low else 'at least'} {self.low:,.10g}"
        high = "" if self.high == math.inf else f"{'below' if self.open_high else 'at most'} {self.high:,.10g}"
        return " and ".join(filter(None, (low, high))) or "a finite number"


LARGE = 10**9  # more steps, episodes or rows than any run has
Natural = Annotated[int, Range(0, LARGE)]
Count = Annotated[int, Range(1, LARGE)]
Size = Annotated[int, Range(1, 2**16)]  # of something held in memory at once: a width, a batch
Several = Annotated[int, Range(2, 2**16)]
Side = Annotated[int, Range(16, 4096)]  # of an image, in pixels
RowLength = Annotated[int, Range(3, 2**16)]  # in tokens
Workers = Annotated[int, Range(1, 1024)]  # processes
Helpers = Annotated[int, Range(0, 1024)]  # threads, or processes; 0: none
Seed = Annotated[int, Range(0, 2**31 - 1)]
Real = Annotated[float, Range()]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, open_low=True)]
Unit = Annotated[float, Range(0, 1)]
Share = Annotated[float, Range(0, 1, open_low=True)]
Fraction = Annotated[float, Range(0, 1, open_high=True)]


def ranges(kind: type) -> Iterator[tuple[str, Any, Range | None]]:
    """(name, type, range) of every argument of a dataclass of dataclasses; a tuple has the range of its values."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from ranges(hint)
        else:
            values = get_args(hint)[0] if get_args(hint)[1:] == (...,) else hint
            found = [x for x in getattr(values, "__metadata__", ()) if isinstance(x, Range)]
            yield name, hint, found[0] if found else None


def check_ranges(kind: type, flat: Mapping[str, Any]) -> None:
    """Raises UserError naming the first argument outside its range, or without a value where several are asked for."""
    for name, _, allowed in ranges(kind):
        value, flag = flat[name], f"--{name.replace('_', '-')}"
        if value == ():
            raise UserError(f"{flag}: give at least one value; see --help")
        if allowed and (bad := [x for x in (value if isinstance(value, tuple) else (value,)) if x not in allowed]):
            raise UserError(f"{flag} {bad[0]}: must be {allowed}; see --help")
