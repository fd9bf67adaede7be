"""Random draws that can be saved and brought back."""

import torch
from torch import Tensor


class Rng:
    """A source of random tensors on one device; the same seed gives the same draws on the same kind of device."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device, self.generator = device, torch.Generator(device).manual_seed(seed)

    def randn(self, *shape: int) -> Tensor:
        """Standard normal."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def rand(self, *shape: int) -> Tensor:
        """Uniform in [0, 1)."""
        return torch.rand(shape, generator=self.generator, device=self.device)

    def randint(self, low: int, high: int, *shape: int) -> Tensor:
        """Uniform integers in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def state_dict(self) -> dict[str, Tensor]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        try:
            self.generator.set_state(state["generator"])
        except RuntimeError:  # its state has another size there
            print("note: the run was on another kind of device; its noise starts anew from the seed", flush=True)
