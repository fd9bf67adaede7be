"""Rows and random draws of every step as functions of the seed: the same in any number of processes."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """The processes of a torchrun, which work together in its `with` block; one process without it."""

    rank: int = 0
    world: int = 1

    @staticmethod
    def of_torchrun() -> "Ranks":
        """This process' place, on a GPU of its own if there are any."""
        ranks = Ranks(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        if ranks.world > 1 and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return ranks

    def __enter__(self) -> "Ranks":
        """Joins the others, over NCCL with GPUs, else gloo; what some do before this may take any time."""
        if self.world > 1:
            store, *_ = next(dist.rendezvous("env://"))
            store.add("here", 1)
            while store.add("here", 0) < self.world:  # the group itself waits ten minutes only
                time.sleep(0.1)
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world)
        return self

    def __exit__(self, *error: object) -> None:
        if self.world > 1:
            dist.destroy_process_group()

    @property
    def chief(self) -> bool:
        """Whether this is the first process, which alone writes and prints."""
        return self.rank == 0

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is true in any process."""
        return self.mean({"flag": torch.tensor(float(flag), device=device)})["flag"].item() > 0

    def by_chief(self, work: Callable[[], None], device: torch.device) -> None:
        """work() in the first process; a UserError there ends all of them."""
        failed = None
        try:
            if self.chief:
                work()
        except UserError as error:
            failed = error
        if self.any(failed is not None, device):
            raise failed or SystemExit(2)

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Mean of each scalar over the processes."""
        if self.world == 1:
            return values
        total = torch.stack(list(values.values()))
        dist.all_reduce(total)
        return dict(zip(values, total / self.world, strict=True))

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces every gradient by its mean over the processes; all have gradients of the same parameters."""
        if self.world == 1:
            return
        for p in parameters:
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= self.world


def mixed_seed(*parts: int) -> int:
    """One seed from several small numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def micro_batches(
    data: np.ndarray, step: int, batch: int, micro: int, seed: int, ranks: Ranks, device: torch.device
) -> Iterator[tuple[range, Tensor]]:
    """This process's part of the batch of a step, in pieces: (places in the global batch, token ids (n, L)).

    data (N, L) of integers; batch: rows over all processes, a multiple of their number; micro: rows in a piece, 0 all.
    """
    order = row_order(step, batch, len(data), seed)
    mine = range(ranks.rank * batch // ranks.world, (ranks.rank + 1) * batch // ranks.world)
    for first in range(0, len(mine), micro or len(mine)):
        places = mine[first : first + (micro or len(mine))]
        yield places, token_ids(data[order[places]], device)


def token_ids(rows: np.ndarray, device: torch.device) -> Tensor:
    """Stored rows (n, L) as int64 on the device."""
    return torch.from_numpy(rows.astype(np.int64)).to(device)


def row_order(step: int, batch: int, rows: int, seed: int) -> np.ndarray:
    """Indices (batch,) of the rows of optimizer step `step`: every epoch is a permutation of its own."""
    place = step * batch + np.arange(batch)
    epochs = np.unique(place // rows)
    order = np.concatenate([_permutation(rows, seed, int(e)) for e in epochs])
    return order[place - epochs[0] * rows]


@lru_cache(maxsize=2)  # a batch lies in one epoch or across two; permuting a large corpus at every step takes long
def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def row_noise(step: int, places: range, shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Standard normal (len(places), *shape): a function of seed, step and the row's place in the global batch."""
    generator = torch.Generator(device)
    seeds = (mixed_seed(seed, 2, step, place) for place in places)
    return torch.stack([torch.randn(shape, generator=generator.manual_seed(s), device=device) for s in seeds])


def rows_at_once(device: torch.device, length: int) -> int:
    """Rows whose logits exist at a time outside training: what a CPU's cache holds, what a GPU's memory does."""
    return max(1, 2 ** (14 if device.type == "cuda" else 10) // length)
