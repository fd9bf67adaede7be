"""Tokenizers: the paper's two, whose files are fetched once, and one shipped with the repository."""

import base64
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from common.download import obtain
from common.errors import UserError
from common.files import sha256

ASSETS = Path(__file__).resolve().parents[2] / "assets"
AUSTEN_RANKS = ASSETS / "austen_4096.tiktoken"
# GPT-2's pieces: contractions, words, numbers, other signs, blanks; "++" gives nothing back, so long runs stay cheap.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
END = "<|endoftext|>"
CLS = 101


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids below `vocab_size` and back.

    The id `separator` ends every text of a stream and stands at both ends of a packed row. `encode_batch` adds no
    special ids; the names of special tokens in a text are plain text to it. `sha256` is of the defining file.
    """

    name: str
    vocab_size: int
    separator: int
    sha256: str
    encode_batch: Callable[[list[str]], list[list[int]]]
    literal: Callable[[list[int]], str]  # ids -> text in which special tokens stand under their names

    def decode(self, ids: Iterable[int], *, separators: str | None = "\n") -> str:
        """The texts between separators, joined by `separators`; empty ones vanish.

        None keeps every separator under its name ([CLS], <|endoftext|>), as the paper's evaluation scores samples.
        """
        ids = [int(i) for i in ids]
        if separators is None:
            return self.literal(ids)
        parts = groupby(ids, key=lambda i: i == self.separator)
        return separators.join(self.literal(list(part)) for is_separator, part in parts if not is_separator)


@dataclass(frozen=True)
class _File:
    """A tokenizer's defining file: names it is found under (the first is used in the cache), content and origin."""

    names: tuple[str, ...]
    sha256: str
    url: str


_FILES = {
    "gpt2": _File(
        ("vocab.bpe",),
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
    ),
    "bert-base-uncased": _File(
        ("bert-base-uncased-vocab.txt", "vocab.txt"),
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        "https://huggingface.co/google-bert/bert-base-uncased/resolve/main/vocab.txt",
    ),
}
NAMES = ("austen", *_FILES)


def load_tokenizer(name: str, data_dir: Path, path: Path | None = None) -> Tokenizer:
    """The tokenizer of this name: austen, gpt2 or bert-base-uncased.

    Args:
        data_dir: files are fetched once into its folder tokenizers.
        path: the tokenizer's file or a folder with it, instead of fetching; austen needs none.

    Raises UserError for an unknown name, a file that is missing or not the right one, and a missing package.
    """
    if name == "austen":
        return _austen()
    if name not in _FILES:
        raise UserError(f"there is no tokenizer {name!r}; expected one of {', '.join(NAMES)}")
    file = _find(name, data_dir, path)
    return _gpt2(file) if name == "gpt2" else _bert(file)


def _find(name: str, data_dir: Path, path: Path | None) -> Path:
    """The verified defining file of a tokenizer."""
    spec = _FILES[name]
    if path is None:
        found = data_dir / "tokenizers" / spec.names[0]
        if not found.exists():
            obtain(found, spec.url, "give its place with --tokenizer-path", spec.sha256)
    else:
        places = (path, *(path / file for file in spec.names))
        found = next((place for place in places if place.is_file()), path)
        if not found.is_file():
            raise UserError(f"{path} is no file and no folder with {' or '.join(spec.names)}, the file of {name}")
    if sha256(found) != spec.sha256:
        raise UserError(f"{found} is not the file of {name} (sha256 {spec.sha256[:12]}...); replace it by {spec.url}")
    return found


def _tiktoken(name: str, ranks: dict[bytes, int], specials: dict[str, int], digest: str) -> Tokenizer:
    # tiktoken's own loaders are not used: they copy local files into a cache of theirs and delete what does not match.
    import tiktoken

    encoding = tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    size = len(ranks) + len(specials)
    return Tokenizer(name, size, specials[END], digest, encoding.encode_ordinary_batch, encoding.decode)


def _austen() -> Tokenizer:
    """Byte-level BPE of 4,095 tokens, made from the training part of the shipped novels; any text round-trips."""
    lines = [line.split() for line in AUSTEN_RANKS.read_bytes().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    return _tiktoken("austen", ranks, {END: len(ranks)}, sha256(AUSTEN_RANKS))


def _gpt2(file: Path) -> Tokenizer:
    """GPT-2's BPE. V = 50258: the paper's code adds [PAD], which never occurs in packed rows."""
    ranks = {bytes([b]): rank for rank, b in enumerate(gpt2_alphabet().values())}
    alphabet = gpt2_alphabet()
    for merge in file.read_text(encoding="utf-8").splitlines()[1:]:  # the first line is a version
        ranks[bytes(alphabet[letter] for letter in merge.replace(" ", ""))] = len(ranks)
    return _tiktoken("gpt2", ranks, {END: len(ranks), "[PAD]": len(ranks) + 1}, _FILES["gpt2"].sha256)


def gpt2_alphabet() -> dict[str, int]:
    """{letter: byte} of the 256 letters that GPT-2's files write bytes with, in the order of the single-byte tokens.

    Printable bytes other than the space stand for themselves, the rest follow as letters from U+0100 on.
    """
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _bert(file: Path) -> Tokenizer:
    """Lowercase WordPiece, V = 30522. The separator is [CLS]: the paper's code resolves both ends of a text to it.

    Decoding joins words by spaces and undoes no spacing of punctuation, as the released evaluation's tokenizer does.
    """
    try:
        from tokenizers import Tokenizer as Pipeline
        from tokenizers.models import WordPiece
        from tokenizers.normalizers import BertNormalizer
        from tokenizers.pre_tokenizers import BertPreTokenizer
    except ImportError as error:
        raise UserError("bert-base-uncased needs a package: pip install tokenizers==0.23.3") from error
    pieces = file.read_text(encoding="utf-8").splitlines()
    # From its parts: the ready-made BertWordPieceTokenizer reads the names of special tokens in a text as their ids.
    pipeline = Pipeline(WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    pipeline.normalizer, pipeline.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()

    def encode_batch(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in pipeline.encode_batch(texts, add_special_tokens=False)]

    def literal(ids: list[int]) -> str:
        return " ".join(pieces[i] for i in ids).replace(" ##", "")

    return Tokenizer("bert-base-uncased", len(pieces), CLS, _FILES["bert-base-uncased"].sha256, encode_batch, literal)
