"""Speed of training against the device's own matrix-multiplication rate."""

import sys
import time

import psutil
import torch
from torch import nn


class Meter:
    """Tokens per second, share of the device's own matrix-multiplication rate (measured at the start), memory.

    Work counts the matrix products of a transformer's weights, 2 operations forward and 4 backward per weight and
    token, and its attention; a lookup table is no product and does not count.
    """

    def __init__(
        self, net: nn.Module, *, batch: int, layers: int, length: int, width: int, processes: int, bf16: bool,
        step: int, forwards: float = 0.0,
    ) -> None:  # fmt: skip
        """batch: rows of a step, over all processes; step: the first; forwards: passes without gradients, per row."""
        self.device, self.tokens = next(net.parameters()).device, batch * length
        weights = sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Linear))
        self.work = self.tokens * (3 + forwards) * (2 * weights + 4 * layers * length * width) / processes
        x = torch.randn(2048, 2048, device=self.device, dtype=torch.bfloat16 if bf16 else torch.float32)
        self.peak = max(2 * 2048**3 / self._seconds(x) for _ in range(4))
        self.started, self.step = time.perf_counter(), step

    def _seconds(self, x: torch.Tensor) -> float:
        start = time.perf_counter()
        _ = x @ x
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def take(self, step: int) -> dict[str, float]:
        """Means over the steps since the last call; step: how many are made now."""
        seconds = (time.perf_counter() - self.started) / (step - self.step)
        self.started, self.step = time.perf_counter(), step
        return {
            "time/tokens_per_second": self.tokens / seconds,
            "time/mfu": self.work / seconds / self.peak,
            "time/memory_gib": memory(self.device) / 2**30,
        }


def memory(device: torch.device) -> int:
    """Peak bytes: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not there on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
