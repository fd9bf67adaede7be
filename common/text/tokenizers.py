"""Tokenizers: the paper's two, whose files are fetched once, one shipped with the repository, and a text's own."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from tokenizers import Tokenizer as Pipeline
from tokenizers import decoders
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel
from tokenizers.trainers import BpeTrainer

from common.download import obtain
from common.errors import UserError, reading
from common.files import locked, sha256, write_atomic

ASSETS = Path(__file__).resolve().parents[2] / "assets"
AUSTEN_MERGES = ASSETS / "austen_4096.bpe"
END = "<|endoftext|>"
OWN = "own"
OWN_SIZES = (512, 4096)  # tokens of an encoding trained on a small text and on a large one; between them:
CHARACTERS_PER_TOKEN = 256
OWN_CHARACTERS = 2**25  # of the text that are read to train it: bounds time and memory


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


_FILES = {  # name in the cache, sha256 and origin of a tokenizer's defining file
    "gpt2": (
        "vocab.bpe",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "https://huggingface.co/openai-community/gpt2/resolve/main/merges.txt",
    ),
    "bert-base-uncased": (
        "bert-base-uncased-vocab.txt",
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        "https://huggingface.co/google-bert/bert-base-uncased/resolve/main/vocab.txt",
    ),
}


def load_tokenizer(name: str, data_dir: Path, path: Path | None = None) -> Tokenizer:
    """The tokenizer austen, gpt2 or bert-base-uncased.

    Its file is `path`, or in that folder; else it is fetched once into `data_dir`'s folder tokenizers. austen's is
    shipped. Raises UserError for an unknown name, and a file that is missing or not the right one.
    """
    if name != "austen" and name not in _FILES:
        raise UserError(f"there is no tokenizer {name!r}; expected one of {', '.join((OWN, 'austen', *_FILES))}")
    return _from_file(name, AUSTEN_MERGES if name == "austen" else _find(name, data_dir, path))


def own_tokenizer(file: Path, open_texts: Callable[[], Iterable[str]], size: int = 0) -> Tokenizer:
    """Byte-level BPE trained on texts: made on first use, kept in `file`, in the form of GPT-2's vocab.bpe.

    A function of the texts: the same in every process and on every machine. size: most tokens; 0: within OWN_SIZES,
    growing with the text. Raises UserError if the file cannot be read or written.
    """
    with reading(file, "delete it to have it made again, or choose another --data-dir"):
        with locked(file.with_name(file.name + ".lock")):
            if not file.exists():
                write_atomic(file, _train_merges(open_texts(), size))
        return _from_file(OWN, file)


def _train_merges(texts: Iterable[str], size: int = 0) -> bytes:
    """Content of a file of merges."""
    read, characters = [], 0
    for text in texts:
        read.append(text)
        characters += len(text)
        if characters >= OWN_CHARACTERS:
            break
    low, high = OWN_SIZES
    size = (size or min(max(characters // CHARACTERS_PER_TOKEN, low), high)) - 1  # and the end of a text
    pipeline = Pipeline(BPE())
    pipeline.pre_tokenizer = ByteLevel(add_prefix_space=False)
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=size, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    pipeline.train_from_iterator(read, trainer)
    merges = json.loads(pipeline.to_str())["model"]["merges"]
    return "\n".join(["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""]).encode()


def _from_file(name: str, file: Path) -> Tokenizer:
    """The tokenizer `name` of its defining file."""
    if name == "bert-base-uncased":
        pipeline, separator = _word_piece(file), "[CLS]"  # the paper's code resolves both ends of a text to it
    else:  # V = 50258 for gpt2: the paper's code adds [PAD]; packed rows have none
        pipeline, separator = _byte_level(file, (END, "[PAD]") if name == "gpt2" else (END,)), END

    def encode_batch(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in pipeline.encode_batch(texts, add_special_tokens=False)]

    ids = pipeline.get_vocab(with_added_tokens=False)
    return Tokenizer(name, len(ids), ids[separator], sha256(file), encode_batch, pipeline.decode)


def _find(name: str, data_dir: Path, path: Path | None) -> Path:
    """The verified defining file of a tokenizer."""
    cached, digest, url = _FILES[name]
    if path is None:
        return obtain(data_dir / "tokenizers" / cached, url, "give its place with --tokenizer-path", digest)
    names = (cached, url.rpartition("/")[2])
    for place in filter(Path.is_file, (path, *(path / file for file in names))):
        with reading(place, f"replace it by {url}"):
            if sha256(place) != digest:
                raise UserError(f"{place} is not the file of {name} (sha256 {digest[:12]}...); replace it by {url}")
        return place
    raise UserError(f"{path} is no file and no folder with {' or '.join(names)}, the file of {name}")


def _byte_level(file: Path, specials: tuple[str, ...]) -> Pipeline:
    """Byte-level BPE from a file of merges, as GPT-2's; any text round-trips.

    Ids: the single bytes, the merges in order, `specials`. No merge leads to one of the latter.
    """
    letters = sorted(ByteLevel.alphabet())  # the 256 that stand for bytes
    merges = [tuple(line.split()) for line in file.read_text(encoding="utf-8").splitlines()[1:]]  # first: a version
    tokens = [*letters, *(left + right for left, right in merges), *specials]
    pipeline = Pipeline(BPE({token: i for i, token in enumerate(tokens)}, merges))
    pipeline.pre_tokenizer, pipeline.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return pipeline


def _word_piece(file: Path) -> Pipeline:
    """Lowercase WordPiece of BERT.

    Decoding joins words by spaces and undoes no spacing of punctuation, as the released evaluation's tokenizer does.
    """
    pieces = file.read_text(encoding="utf-8").splitlines()
    # From its parts: the ready-made BertWordPieceTokenizer reads the names of special tokens in a text as their ids.
    pipeline = Pipeline(WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    pipeline.normalizer, pipeline.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    pipeline.decoder = decoders.WordPiece(cleanup=False)
    return pipeline
