"""Judges of generated text: language models that the evaluated model has no part in, and a table of what they say.

A perplexity alone is easy to win: repetition is likely text. `format_table` therefore prints it beside the entropy
of the samples, their distance from held-out text, and the same numbers of real text.
"""

from collections.abc import Iterable
from pathlib import Path

import torch

from common.errors import UserError
from common.judge.metrics import Judge, TextScore, format_table, score_texts, split_real

__all__ = ["JUDGES", "Judge", "TextScore", "format_table", "get_judge", "score_texts", "split_real"]

JUDGES = ("ngram", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "smollm2")


def get_judge(
    name: str,
    *,
    data_dir: Path,
    train_texts: Iterable[str] | None = None,
    path: Path | None = None,
    device: torch.device | str = "cpu",
) -> Judge:
    """The judge `name`, ready to score.

    Args:
        name: one of JUDGES. "ngram" needs nothing but the training text; "gpt2-large" is the judge of published
            tables; "smollm2" is a neural judge that comes as a Python package.
        data_dir: GPT-2's weights are kept in its folder judges/NAME, downloaded on first use, and GPT-2's
            encoding is that of `common.text`.
        train_texts: for "ngram", the training split as texts in order, read once; others ignore it.
        path: instead of fetching: for GPT-2 a folder with model.safetensors, for SmolLM2 the GGUF file.
        device: where a neural judge runs.

    Raises UserError for an unknown name, and for files that are missing, damaged or not to be had.
    """
    if name not in JUDGES:
        raise UserError(f"there is no judge {name!r}; choose one of {', '.join(JUDGES)}")
    if name == "ngram":
        from common.judge.ngram import NgramJudge

        if path:
            raise UserError(f"the judge ngram is trained on the corpus and takes no file, but {path} was given")
        if train_texts is None:
            raise ValueError("the judge ngram needs train_texts")
        return NgramJudge(train_texts)
    if name == "smollm2":
        from common.judge.smollm2 import load_smollm2

        return load_smollm2(path, device)
    from common.judge.gpt2 import load_gpt2

    return load_gpt2(name, data_dir, path, device)
