"""Rows and random draws of every step as functions of the seed: the same in any number of processes."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a torchrun; one process without it."""

    rank: int = 0
    world: int = 1

    @staticmethod
    def join() -> "Ranks":
        """Meet the other processes of this torchrun, over NCCL with GPUs, else gloo."""
        ranks = Ranks(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        if ranks.world > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return ranks

    def mean(self, values: dict[str, float], device: torch.device) -> dict[str, float]:
        """Mean of each value over the processes."""
        if self.world == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return dict(zip(values, (total / self.world).tolist(), strict=True))

    def first(self, make: Callable[[], T]) -> T:
        """make() in the first process, then in the others, which find what it left on disk."""
        if self.rank:
            dist.barrier()
        made = make()
        if self.world > 1 and not self.rank:
            dist.barrier()
        return made

    def leave(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is true in any process."""
        if self.world == 1:
            return flag
        total = torch.tensor(float(flag), device=device)
        dist.all_reduce(total)
        return bool(total > 0)

    def rows(self, batch: int) -> range:
        """Rows of the global batch that this process computes."""
        return range(self.rank * batch // self.world, (self.rank + 1) * batch // self.world)


def mixed_seed(*parts: int) -> int:
    """One seed from several small numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def row_order(step: int, batch: int, rows: int, seed: int) -> np.ndarray:
    """Indices (batch,) of the rows of optimizer step `step`: every epoch is a permutation of its own."""
    place = step * batch + np.arange(batch)
    epochs = np.unique(place // rows)
    order = np.concatenate([_permutation(rows, seed, int(e)) for e in epochs])
    return order[place - epochs[0] * rows]


@lru_cache(maxsize=2)  # a batch lies in one epoch or across two; permuting a large corpus at every step takes long
def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def row_noise(step: int, rows: range, shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Standard normal (len(rows), *shape): a function of seed, step and the row's place in the global batch.

    So any number of processes and micro-batches draws the same noise.
    """
    generator = torch.Generator(device)
    seeds = (mixed_seed(seed, 2, step, row) for row in rows)
    return torch.stack([torch.randn(shape, generator=generator.manual_seed(s), device=device) for s in seeds])
