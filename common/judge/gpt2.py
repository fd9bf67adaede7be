"""Generative perplexity under GPT-2, by the protocol of the papers.

Model: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), by the package transformers with
the weights of huggingface.co/openai-community. gpt2-large is the judge of FLM (arXiv 2602.16813), Duo and MDLM.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.download import obtain
from common.errors import UserError
from common.judge.causal import corpus_perplexity, load_model, require
from common.text.tokenizers import END, load_tokenizer

INSTALL = "pip install transformers==5.23.0"
HUB = "https://huggingface.co/openai-community/{name}/resolve/main/{file}"
FILE = "model.safetensors"
SHA256 = {"gpt2": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"}  # of the others not known here
SIZES = {"gpt2": (12, 768), "gpt2-medium": (24, 1024), "gpt2-large": (36, 1280), "gpt2-xl": (48, 1600)}  # layers, width
CONTEXT, HEAD_WIDTH, EOS = 1024, 64, 50256


def paper_batches(
    rows: list[list[int]], max_length: int, batch: int = 8, eos: int = EOS, context: int = CONTEXT
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens (B, L) and which of them count (B, L) bool, as in the released evaluation of FLM, which is that of MDLM.

    - rows are cut to their first `max_length` tokens; nothing is put in front of them;
    - batches of `batch` rows in order, or one batch of all rows if there are fewer. Rows beyond the last full
      batch are dropped;
    - a batch is padded with EOS to its longest row. [deviation: the released code pads, and drops, over one sampled
      batch, the size of which differs between its scripts; for rows that reach `max_length` this is the same]
    - a token counts if it is not EOS, or is the first EOS of its row: so a row shorter than the batch pays for
      one end of text, and every later EOS is free;
    - rows longer than GPT-2's context are cut into pieces that are scored apart;
    - the first token of a row (or piece) is never scored, as there is nothing before it.
    """
    batch = max(1, min(batch, len(rows)))
    for start in range(0, len(rows) - batch + 1, batch):
        cut = [torch.tensor(row[:max_length], dtype=torch.int64) for row in rows[start : start + batch]]
        padded = torch.nn.utils.rnn.pad_sequence(cut, batch_first=True, padding_value=eos)
        for ids in padded.split(context, dim=1):
            is_eos = ids == eos
            yield ids, ~is_eos | (is_eos.cumsum(1) == 1)


class GPT2Judge:
    """Generative perplexity by `paper_batches`, per GPT-2 token; see `Judge`.

    The papers decode samples with their special tokens, so that LM1B texts contain "[CLS]" and are scored with it:
    decode in the same way to compare with published numbers. `max_length` is the evaluated model's length.

    Args:
        name: of the line in a table.
        model: from `load_model`.
        encode: text to GPT-2 ids; a literal "<|endoftext|>" is not seen by it but becomes EOS, as in the papers.
    """

    unit = "GPT-2 token"

    def __init__(self, name: str, model: Any, encode: Callable[[str], list[int]]) -> None:
        self.name = name
        self._model = model
        self._encode = encode

    def rows(self, texts: list[str]) -> list[list[int]]:
        """GPT-2 ids of each text."""
        parts = ([self._encode(part) for part in text.split(END)] for text in texts)
        return [[*first, *(i for part in rest for i in (EOS, *part))] for first, *rest in parts]

    def perplexity(self, texts: list[str], max_length: int) -> float:
        """Perplexity per GPT-2 token of all texts together, under the rules of `paper_batches`."""
        return corpus_perplexity(self._model, paper_batches(self.rows(texts), max_length))


def load_gpt2(name: str, data_dir: Path, folder: Path | None, device: torch.device | str) -> GPT2Judge:
    """The judge `name` of SIZES with the weights in `folder`, by default those fetched into `data_dir`.

    Raises UserError if the package transformers is missing, or a file is not to be had or not what it should be.
    """
    require(name, ["transformers"], INSTALL)
    from transformers import GPT2Config

    tokenizer = load_tokenizer("gpt2", data_dir)  # the small file first: without a network it fails at once
    url = HUB.format(name=name, file=FILE)
    path = folder / FILE if folder else data_dir / "judges" / name / FILE
    if folder and not path.is_file():
        raise UserError(f"{path} does not exist; it should be {url}")
    if not folder:
        obtain(path, url, "choose the judge ngram or smollm2", SHA256.get(name))
    layers, width = SIZES[name]
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=width // HEAD_WIDTH)
    model = load_model("GPT2Model", path, device, config=config)
    return GPT2Judge(name, model, lambda text: tokenizer.encode_batch([text])[0])
