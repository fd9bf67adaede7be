"""Texts as rows of token ids: load_text("austen", length=64, data_dir=Path("data")).train is an (N, 64) array."""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.text import packing, toy
from common.text.corpora import find_source
from common.text.tokenizers import OWN, Tokenizer, load_tokenizer, own_tokenizer
from common.text.toy import toy_probabilities, toy_rows

__all__ = ["TextData", "Tokenizer", "load_text", "load_tokenizer", "toy_probabilities", "toy_rows"]


@dataclass(frozen=True)
class TextData:
    """Rows of ids below tokenizer.vocab_size: train (N, L) and valid (M, L), uint16 or uint32, read-only.

    `note` is to be told to the user: what was left out or chosen.
    """

    name: str
    tokenizer: Tokenizer
    train: NDArray[Any]
    valid: NDArray[Any]
    note: str = ""

    def counts(self, rows: int = 100_000) -> NDArray[np.int64]:
        """(V,) occurrences of every token in the first rows of the training split."""
        return np.bincount(self.train[:rows].ravel(), minlength=self.tokenizer.vocab_size)


def load_text(
    data: str, *, length: int, data_dir: Path, tokenizer: str = "", tokenizer_path: Path | None = None
) -> TextData:  # fmt: skip
    """Rows of `length` tokens of a corpus: tokenized and packed on first use, mapped from disk ever after.

    Args:
        data: a corpus by name or path, as `find_source` lists them; or toy, sentences of eight words drawn in memory.
        length: L, tokens a row, of which L - 2 are text (see common/text/packing.py); 8 for toy.
        data_dir: rows are kept in its folder text, tokenizers in its folder tokenizers.
        tokenizer: austen, gpt2, bert-base-uncased, or own, trained on the text; "" takes the corpus' usual one.
        tokenizer_path: the tokenizer's file or a folder with it, instead of fetching it.

    Raises UserError, one line with the remedy, for whatever the user can mend: names, files, network, packages, length.
    """
    if data == "toy":
        if length != toy.LENGTH:
            raise UserError(f"--length {length}: --data toy has {toy.LENGTH} tokens a row; use --length {toy.LENGTH}")
        if tokenizer not in ("", "toy"):
            raise UserError(f"--tokenizer {tokenizer}: --data toy has a tokenizer of its own; leave the flag out")
        return TextData("toy", toy.toy_tokenizer(), toy_rows(20_000, seed=0), toy_rows(2_000, seed=1))
    if length < 3:
        raise UserError(f"--length {length}: must be at least 3, a token between two separators")
    source = find_source(data, data_dir)
    splits, note, place = functools.cache(source.splits), source.note, data_dir / "text"
    if (tokenizer or source.tokenizer) == OWN:
        version = hashlib.sha256(repr(source.identity).encode()).hexdigest()[:8]
        file = place / f"{source.key}-{version}.bpe"
        tok = own_tokenizer(file, lambda: splits()["train"].read(0), source.tokens)
        choice = f"encoding: {tok.vocab_size:,} tokens trained on this text, in {file}; --tokenizer takes another"
        note = "\n".join(filter(None, (note, choice)))
    else:
        tok = load_tokenizer(tokenizer or source.tokenizer, data_dir, tokenizer_path)
    folder = place / f"{source.key}-{tok.name}-{length}"
    made_from = packing.describe(source.identity, tok, length)
    rows = packing.load(folder, made_from) or packing.build(folder, made_from, tok, splits, data)
    return TextData(data, tok, rows["train"], rows["valid"], note)
