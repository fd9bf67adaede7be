"""Judges of generated text: language models that the evaluated model has no part in, and a table of what they say.

A perplexity alone is easy to win: repetition is likely text. `format_table` therefore prints it beside the entropy
of the samples, their distance from held-out text, and the same numbers of real text.
"""

from collections.abc import Iterable
from pathlib import Path

import torch

from common.errors import UserError
from common.judge.causal import GPT2_SIZES, load_gpt2, load_smollm2
from common.judge.metrics import Judge
from common.judge.ngram import NgramJudge

JUDGES = ("ngram", *GPT2_SIZES, "smollm2")


def get_judge(
    name: str, data_dir: Path, train_texts: Iterable[str] = (), path: Path | None = None,
    device: torch.device | str = "cpu",
) -> Judge:  # fmt: skip
    """The judge `name` of JUDGES, ready to score. docs/flm_train.md, section P 5, says what each of them is and needs.

    Args:
        data_dir: GPT-2's weights and encoding are kept in its folders judges/NAME and tokenizers, fetched on first use.
        train_texts: for "ngram", the training split as texts in order, read once; others ignore it.
        path: instead of fetching: for GPT-2 a folder with model.safetensors, for SmolLM2 the GGUF file.
        device: where a neural judge runs.

    Raises UserError for an unknown name, and for files that are missing, damaged or not to be had.
    """
    if name in GPT2_SIZES:
        return load_gpt2(name, data_dir, path, device)
    if name == "smollm2":
        return load_smollm2(path, device)
    if name != "ngram":
        raise UserError(f"there is no judge {name!r}; choose one of {', '.join(JUDGES)}")
    if path:
        raise UserError(f"the judge ngram is trained on the corpus and takes no file, but {path} was given")
    return NgramJudge(train_texts)
