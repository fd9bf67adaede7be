"""GPT-2 in plain PyTorch from its published weights, and generative perplexity by the protocol of the papers.

Model: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019); weights and key names of
huggingface.co/openai-community. gpt2-large is the judge of FLM (arXiv 2602.16813), Duo and MDLM.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.download import obtain
from common.errors import UserError, first_line
from common.judge.scoring import corpus_perplexity
from common.text.tokenizers import END, load_tokenizer

HUB = "https://huggingface.co/openai-community/{name}/resolve/main/{file}"
FILE = "model.safetensors"
SHA256 = {"gpt2": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"}  # of the others not known here
SIZES = {"gpt2": (12, 768), "gpt2-medium": (24, 1024), "gpt2-large": (36, 1280), "gpt2-xl": (48, 1600)}  # layers, width
VOCABULARY, CONTEXT, HEAD_WIDTH, EOS = 50257, 1024, 64, 50256
Weights = dict[str, Tensor]


def shapes(layers: int, width: int, vocabulary: int = VOCABULARY, context: int = CONTEXT) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every parameter in a published state dict. Linear weights are stored (in, out)."""
    d = width
    found = {"wte.weight": (vocabulary, d), "wpe.weight": (context, d), "ln_f.weight": (d,), "ln_f.bias": (d,)}
    for i in range(layers):
        for norm in ("ln_1", "ln_2"):
            found |= {f"h.{i}.{norm}.weight": (d,), f"h.{i}.{norm}.bias": (d,)}
        for key, (n_in, n_out) in {
            "attn.c_attn": (d, 3 * d),
            "attn.c_proj": (d, d),
            "mlp.c_fc": (d, 4 * d),
            "mlp.c_proj": (4 * d, d),
        }.items():
            found |= {f"h.{i}.{key}.weight": (n_in, n_out), f"h.{i}.{key}.bias": (n_out,)}
    return found


def read_weights(path: Path, expected: dict[str, tuple[int, ...]], device: torch.device | str = "cpu") -> Weights:
    """The parameters of a safetensors file in float32; raises UserError unless each is there in its shape.

    The prefix "transformer." and further entries (attention masks, the tied output matrix) are dropped.
    """
    try:
        from safetensors.torch import load_file

        state = {key.removeprefix("transformer."): value for key, value in load_file(path).items()}
    except ImportError as error:
        raise UserError("GPT-2 judges read safetensors files; run: pip install safetensors") from error
    except Exception as error:
        raise UserError(f"{path} is not a readable safetensors file ({first_line(error)}); get it again") from error
    for key, shape in expected.items():
        has = tuple(state[key].shape) if key in state else "nothing"
        if has != shape:
            raise UserError(f"{path}: {key} should be {shape}, found {has}; the file is of another model, get it again")
    return {key: state[key].to(device, torch.float32) for key in expected}


def gpt2_hidden(weights: Weights, ids: Tensor, heads: int) -> Tensor:
    """Last hidden states (B, L, D) of tokens (B, L), L <= 1024; logits are these times wte.weight transposed.

    Causal: position l depends on tokens 0 to l only, so right padding needs no mask.
    """
    batch, length = ids.shape
    width = weights["wte.weight"].shape[1]

    def norm(x: Tensor, key: str) -> Tensor:
        return F.layer_norm(x, (width,), weights[f"{key}.weight"], weights[f"{key}.bias"], eps=1e-5)

    def linear(x: Tensor, key: str) -> Tensor:
        return x @ weights[f"{key}.weight"] + weights[f"{key}.bias"]

    x = weights["wte.weight"][ids] + weights["wpe.weight"][:length]
    for i in range(sum(key.endswith("ln_1.weight") for key in weights)):
        qkv = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
        q, k, v = (part.view(batch, length, heads, -1).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, width)
        x = x + linear(mixed, f"h.{i}.attn.c_proj")
        y = F.gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate="tanh")
        x = x + linear(y, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f")


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
        weights: as `read_weights` gives them.
        encode: text to GPT-2 ids; a literal "<|endoftext|>" is not seen by it but becomes EOS, as in the papers.
    """

    unit = "GPT-2 token"

    def __init__(self, name: str, weights: Weights, encode: Callable[[str], list[int]]) -> None:
        self.name = name
        self._weights = weights
        self._encode = encode

    def rows(self, texts: list[str]) -> list[list[int]]:
        """GPT-2 ids of each text."""
        parts = ([self._encode(part) for part in text.split(END)] for text in texts)
        return [[*first, *(i for part in rest for i in (EOS, *part))] for first, *rest in parts]

    def perplexity(self, texts: list[str], max_length: int) -> float:
        """Perplexity per GPT-2 token of all texts together, under the rules of `paper_batches`."""
        table = self._weights["wte.weight"]
        heads = table.shape[1] // HEAD_WIDTH
        batches = paper_batches(self.rows(texts), max_length)
        return corpus_perplexity(lambda ids: gpt2_hidden(self._weights, ids, heads), table, batches)


def load_gpt2(name: str, data_dir: Path, folder: Path | None, device: torch.device | str) -> GPT2Judge:
    """The judge `name` of SIZES with the weights in `folder`, by default those fetched into `data_dir`.

    Raises UserError if a file is not to be had or is not what it should be.
    """
    tokenizer = load_tokenizer("gpt2", data_dir)  # the small file first: without a network it fails at once
    if folder:
        path = Path(folder) / FILE
        if not path.is_file():
            raise UserError(f"{path} does not exist; it should be {HUB.format(name=name, file=FILE)}")
    else:
        url, otherwise = HUB.format(name=name, file=FILE), "choose the judge ngram or smollm2"
        path = obtain(data_dir / "judges" / name / FILE, url, otherwise, SHA256.get(name))
    weights = read_weights(path, shapes(*SIZES[name]), device)
    return GPT2Judge(name, weights, lambda text: tokenizer.encode_batch([text])[0])
