"""Shares of wall time by section."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the seconds spent in named sections; an inner section's time is not counted in the outer one.

    With `sync` it waits for the GPU at every border, so that device time lands in the section that caused it.
    """

    def __init__(self, sync: bool = False) -> None:
        self.sync = sync and torch.cuda.is_available()
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self.start = self._mark = 0.0

    def _lap(self) -> None:
        if self.sync:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.start = self.start or now
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._mark
        self._mark = now

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._lap()
        self._open.append(name)
        try:
            yield
        finally:
            self._lap()
            self._open.pop()

    def shares(self) -> dict[str, float]:
        """Fraction of the wall time since the first section began, by section, the rest as `other`."""
        total = time.perf_counter() - self.start
        shares = {name: s / total for name, s in self.seconds.items()}
        return shares | {"other": 1.0 - sum(shares.values())}
