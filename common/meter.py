"""Speed of training against the device's own matrix-multiplication rate."""

import resource
import sys
import time
from collections.abc import Callable

import torch
from torch import nn


class Meter:
    """Tokens per second, share of the device's own matrix-multiplication rate (measured at the start), memory.

    Work counts the matrix products of a transformer's weights, 2 operations forward and 4 backward per weight and
    token, and its attention; a lookup table is no product and does not count.
    """

    def __init__(
        self, tokens: int, weights: int, attention: int, processes: int, bf16: bool, device: torch.device,
        forwards: float = 0.0,
    ) -> None:  # fmt: skip
        """tokens of an optimizer step; weights in products; attention: layers * length * width; further forwards."""
        self.tokens, self.device, self.steps = tokens, device, 0
        self.work = tokens * (3 + forwards) * (2 * weights + 4 * attention) / processes
        x = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
        self.peak = max(2 * 2048**3 / self._seconds(lambda: x @ x) for _ in range(4))
        self.started = time.perf_counter()

    def _seconds(self, f: Callable[[], object]) -> float:
        start = time.perf_counter()
        f()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Means over the `steps` counted since the last call."""
        seconds = (time.perf_counter() - self.started) / max(self.steps, 1)
        self.started, self.steps = time.perf_counter(), 0
        return {
            "time/tokens_per_second": self.tokens / seconds,
            "time/mfu": self.work / seconds / self.peak,
            "time/memory_gib": memory(self.device) / 2**30,
        }

    @staticmethod
    def text(speed: dict[str, float]) -> dict[str, str]:
        """For the progress line."""
        return {
            "tokens/s": f"{speed['time/tokens_per_second']:,.0f}",
            "MFU": f"{speed['time/mfu']:.0%}",
            "memory": f"{speed['time/memory_gib']:.1f} GiB",
        }


def products(net: nn.Module) -> int:
    """Weights of all linear layers."""
    return sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Linear))


def memory(device: torch.device) -> int:
    """Peak bytes: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
