"""Perplexity of token rows under a causal language model."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

POSITIONS = 1024  # scored at once: bounds the logits, here at 200 MB for 50,000 tokens


@torch.inference_mode()
def corpus_perplexity(
    hidden: Callable[[Tensor], Tensor], head: Tensor, batches: Iterable[tuple[Tensor, Tensor]]
) -> float:
    """exp(total negative log likelihood / number of scored tokens), in one sum over all batches.

    Args:
        hidden: maps tokens (B, L) to the last hidden states (B, L, D), causally.
        head: output matrix (V, D); logits are hidden states times its transpose.
        batches: pairs of tokens (B, L) int64 and a bool mask (B, L) of the tokens to score. The first column is
            never scored: nothing comes before it.

    Returns NaN if no token is scored.
    """
    total, count = 0.0, 0
    for ids, scored in batches:
        scored = scored[:, 1:].to(head.device)
        if not scored.any():
            continue
        ids = ids.to(head.device)
        states, targets = hidden(ids[:, :-1])[scored], ids[:, 1:][scored]
        for state, target in zip(states.split(POSITIONS), targets.split(POSITIONS), strict=True):
            total += F.cross_entropy(state @ head.T, target, reduction="sum").item()
        count += len(targets)
    return math.exp(total / count) if count else math.nan
