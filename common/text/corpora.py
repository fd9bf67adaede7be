"""Corpora by name or path: where their texts come from, their usual tokenizer, and what is held out."""

import hashlib
import lzma
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError, first_line
from common.files import sha256
from common.text.local import fingerprint, local_splits, text_files
from common.text.packing import Split
from common.text.tokenizers import ASSETS

AUSTEN_TEXT = ASSETS / "austen.txt.xz"
AUSTEN_HELD_OUT = slice(11, None, 20)  # of 269 chapters: one to three of every novel, 5.0 % of the text
HELD_OUT = 20  # one text in so many, the last ones, where a source does not say what is for validation


@dataclass(frozen=True)
class Source:
    """Where texts come from.

    `key` names their folder, `identity` changes when the texts may have changed, `tokenizer` is the usual one;
    `splits` opens {train, valid} and may take long. The others are cheap.
    """

    key: str
    identity: Any
    tokenizer: str
    splits: Callable[[], dict[str, Split]]


@dataclass(frozen=True)
class Benchmark:
    """A data set of the Hugging Face hub at a fixed commit, with its validation part and its tokenizer."""

    hub: str
    revision: str
    valid: str | int  # a split, or so many last texts
    tokenizer: str
    clean: Callable[[str], str]


def find_source(data: str) -> Source:
    """The source of `data`:

        austen               six novels shipped with the repository; every 20th chapter is held out
        lm1b, openwebtext    the paper's benchmarks, from the Hugging Face hub
        lm1b:PATH            local files of LM1B's tokenized text, a sentence a line: its spacing is undone
        openwebtext:PATH     local files as below, with that benchmark's tokenizer (gpt2)
        FILE or FOLDER       UTF-8 text (of a folder all .txt): a text a line, or paragraphs between blank lines
        OWNER/NAME[:CONFIG]  a data set of the Hugging Face hub with a column named text, taken not to change

    The last 5 % of a path's texts are held out; of a hub data set its validation or test split if it has one. Paths
    take the austen tokenizer, which needs no download; hub data sets take gpt2. Raises UserError if it is no source.
    """
    if data == "austen":
        return Source("austen", sha256(AUSTEN_TEXT), "austen", _austen_splits)
    if data in BENCHMARKS:
        bench = BENCHMARKS[data]
        return Source(data, [bench.hub, bench.revision], bench.tokenizer, lambda: _benchmark_splits(bench))
    kind, _, rest = data.partition(":")
    if kind in BENCHMARKS and rest:
        bench = BENCHMARKS[kind]
        return _local(Path(rest).expanduser(), "*", bench.tokenizer, kind, bench.clean)
    path = Path(data).expanduser()
    if data and path.exists():
        return _local(path, "*.txt", "austen", "text", str)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(?<!\.txt)(:[\w.-]+)?", data):
        return Source(re.sub("[/:]", "--", data), data, "gpt2", lambda: _hub_splits(data))
    raise UserError(
        f"--data {data}: no such file or folder; expected a path, austen, toy, {', '.join(BENCHMARKS)} or a "
        "Hugging Face data set as owner/name"
    )


def austen_sentences() -> tuple[list[str], list[str]]:
    """Sentences for training and for validation."""
    chapters = lzma.decompress(AUSTEN_TEXT.read_bytes()).decode().split("\n\n")
    valid = chapters[AUSTEN_HELD_OUT]
    del chapters[AUSTEN_HELD_OUT]
    return "\n".join(chapters).splitlines(), "\n".join(valid).splitlines()


def _austen_splits() -> dict[str, Split]:
    train, valid = austen_sentences()
    return {
        "train": Split(len(train), lambda start: iter(train[start:])),
        "valid": Split(len(valid), lambda start: iter(valid[start:])),
    }


def _local(path: Path, pattern: str, tokenizer: str, kind: str, clean: Callable[[str], str]) -> Source:
    files = text_files(path, pattern)
    path = path.resolve()
    place = hashlib.sha256(str(path).encode()).hexdigest()[:8]  # tells files of one name apart
    identity = [kind, fingerprint(files)]
    return Source(f"{kind}-{path.stem}-{place}", identity, tokenizer, lambda: local_splits(files, clean, HELD_OUT))


# Detokenization of LM1B. WordPiece splits at punctuation anyway: of these rules only the last changes BERT's ids.
_SPACING = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r" ([.,:;?!])(?= |$)", r"\1"),
        (r" '(?=\w)", "'"),  # isn 't, he 's
        (r" ?/ ", "/"),
        (r'" ([^"]+) "', r'"\1"'),
        (r"' ([^']+) '", r"'\1'"),
        (r"([(\[]) ", r"\1"),
        (r" ([)\]])", r"\1"),
        (r"([$£]) ", r"\1"),
    )
]


def undo_lm1b_spacing(text: str) -> str:
    """Plain text from a sentence in which LM1B set words and punctuation apart by spaces."""
    for pattern, replacement in _SPACING:
        text = pattern.sub(replacement, text)
    return text


BENCHMARKS = {
    "lm1b": Benchmark(
        hub="billion-word-benchmark/lm1b",
        revision="8d52bfd3cc2819fc1166dbb8144c328e2690de3e",  # of refs/convert/parquet; its main is a script
        valid="test",
        tokenizer="bert-base-uncased",
        clean=undo_lm1b_spacing,
    ),
    "openwebtext": Benchmark(
        hub="Skylion007/openwebtext",
        revision="79d93d786212f7344586290adb811d4ae6a1762c",
        valid=100_000,
        tokenizer="gpt2",
        clean=str,
    ),
}


def _benchmark_splits(bench: Benchmark) -> dict[str, Split]:
    data = _load_hub(bench.hub, revision=bench.revision)
    if isinstance(bench.valid, str):
        return {"train": _column(data, "train", bench.clean), "valid": _column(data, bench.valid, bench.clean)}
    return _column(data, "train", bench.clean).hold_out(bench.valid)


def _hub_splits(name: str) -> dict[str, Split]:
    data = _load_hub(*name.split(":"))
    if "train" not in data or "text" not in data["train"].column_names:
        raise UserError(f"{name} of the Hugging Face hub has no split train with a column text; choose another one")
    train = _column(data, "train", str)
    for split in ("validation", "test"):
        if split in data:
            return {"train": train, "valid": _column(data, split, str)}
    return train.hold_out(round(train.count / HELD_OUT))


def _load_hub(*args: str, **kwargs: str) -> Any:
    """{split: data set}, downloaded once into the cache of the package datasets."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError("data from the Hugging Face hub needs a package: pip install datasets==5.2.0") from error
    try:
        return load_dataset(*args, **kwargs)
    except Exception as error:  # hub, network, cache and format each have exceptions of their own
        raise UserError(
            f"cannot load {args[0]} from the Hugging Face hub ({first_line(error)}); check the name and the network, "
            "or use local files: see --data"
        ) from error


def _column(data: Any, split: str, clean: Callable[[str], str]) -> Split:
    """The texts of one split, read a thousand at a time."""
    rows = data[split]

    def read(start: int) -> Iterator[str]:
        for at in range(start, len(rows), 1000):
            yield from (clean(text or "") for text in rows[at : at + 1000]["text"])

    return Split(len(rows), read)
