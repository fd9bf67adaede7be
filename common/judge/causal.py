"""Causal language models of the package transformers: loaded from a file, and the perplexity of token rows."""

import importlib.util
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError, first_line

POSITIONS = 1024  # scored at once: bounds the logits, here at 200 MB for 50,000 tokens


def require(judge: str, packages: Iterable[str], install: str) -> None:
    """Raises UserError with the command `install` if a package of the judge is missing."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(f"the judge {judge} needs {' and '.join(missing)}; run: {install}")


def load_model(kind: str, path: Path, device: torch.device | str, **options: Any) -> Any:
    """The weights file `path` as transformers' class `kind`, in float32: a model without its head.

    `options` are those of `from_pretrained`. Raises UserError unless the file holds every parameter in its shape.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, found = getattr(transformers, kind).from_pretrained(
            path.parent,
            dtype=torch.float32,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # every format of weights has exceptions of its own
        raise UserError(f"{path} is not a readable model ({first_line(error)}); get it again") from error
    if unfit := sorted(found["missing_keys"]) + sorted(key for key, *_ in found["mismatched_keys"]):
        raise UserError(f"{path}: {unfit[0]} is missing or has another shape; the file is of another model")
    return model.to(device)


@torch.inference_mode()
def corpus_perplexity(model: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """exp(total negative log likelihood / number of scored tokens), in one sum over all batches.

    Args:
        model: from `load_model`. Its output matrix is its embedding, as in all models here. It is causal, so that
            padding on the right needs no mask.
        batches: pairs of tokens (B, L) int64 and a bool mask (B, L) of the tokens to score. The first column is
            never scored: nothing comes before it.

    Returns NaN if no token is scored.
    """
    head = model.get_input_embeddings().weight  # (V, D)
    total, count = 0.0, 0
    for ids, scored in batches:
        scored = scored[:, 1:].to(head.device)
        if not scored.any():
            continue
        ids = ids.to(head.device)
        states = model(ids[:, :-1], use_cache=False).last_hidden_state[scored]  # (N, D)
        targets = ids[:, 1:][scored]  # (N,)
        for state, target in zip(states.split(POSITIONS), targets.split(POSITIONS), strict=True):
            total += F.cross_entropy(state @ head.T, target, reduction="sum").item()
        count += len(targets)
    return math.exp(total / count) if count else math.nan
