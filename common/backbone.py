"""Frozen pretrained vision models of `transformers`, as makers of features."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError, reading


class Backbone(nn.Module):
    """The mean over a model's tokens, of length 1 for each camera; it stays out of checkpoints [C: PaliGemma].

    Raises UserError if `transformers` is not installed or has no such model.
    """

    def __init__(self, name: str, prompt: str, cameras: int, size: int) -> None:
        """name: folder or hub name; prompt: fixed text for a model that takes one; size: of images, in pixels."""
        super().__init__()
        with reading(f"--backbone {name}", "give a model's folder or hub name"):
            try:
                from transformers import AutoModel, AutoProcessor
            except ImportError as error:
                raise UserError(f"--backbone needs transformers ({error}); run: pip install transformers") from error
            model = AutoModel.from_pretrained(name).eval()  # first: without a network it gives up sooner
            self.processor: Any = AutoProcessor.from_pretrained(name)
        self.model = [model if prompt else getattr(model, "vision_model", model)]  # a list: not in checkpoints
        self.prompt = prompt and f"{getattr(self.processor, 'image_token', '')}{prompt}"
        self.features = cameras * self(torch.zeros(1, 1, size, size, 3, dtype=torch.uint8)).shape[1]  # F

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images (n, N, S, S, 3) uint8 -> features (n, F)"""
        pictures = list(images.flatten(0, 1).cpu().numpy())
        text = {"text": [self.prompt] * len(pictures)} if self.prompt else {}
        inputs = self.processor(images=pictures, return_tensors="pt", **text).to(images.device)
        tokens = self.model[0].to(images.device)(**inputs).last_hidden_state  # (n N, tokens, width)
        return F.normalize(tokens.mean(1), dim=-1).unflatten(0, images.shape[:2]).flatten(1)
