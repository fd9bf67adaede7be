"""Corpora by name or path: where their texts come from, their usual tokenizer, and what is held out."""

import gzip
import hashlib
import json
import lzma
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from common.download import obtain
from common.errors import UserError, first_line, reading
from common.files import sha256
from common.text.packing import Split
from common.text.tokenizers import ASSETS, OWN

AUSTEN_TEXT = ASSETS / "austen.txt.xz"
AUSTEN_HELD_OUT = slice(11, None, 20)  # of 269 chapters: one to three of every novel, 5.0 % of the text
# Captions of images of COCO, 10,000 for training and as many held out, as Texygen chose them for "Image COCO".
_TEXYGEN = "https://raw.githubusercontent.com/geek-ai/Texygen/3104e22ac75f3cc2070da2bf5e2da6d2bef149ad/data/"
CAPTIONS = {  # place and sha256 of each split; a file keeps its name in the cache
    "train": ("image_coco.txt", "2c0fd1f0f43aac6a9dc3926a535516ccf395de535e15ac1fd17cd569420736f5"),
    "valid": ("testdata/test_coco.txt", "72e25c9fb4d2cd43182ac602c92f6ffc377762147f9709572943b0b09174bcae"),
}
CAPTION_TOKENS = 4096  # nearly every word that occurs twice is a token
HELD_OUT = 20  # one text in so many, the last ones, where a source does not say what is for validation
SUFFIXES = (".txt", ".md", ".jsonl")  # of files that are read in a folder, each also with .gz behind
LINES_PER_PARAGRAPH = 50  # files with fewer on average have paragraphs; a stray blank line does not join a book


@dataclass(frozen=True)
class Source:
    """Where texts come from.

    `key` names their folder, `identity` changes when the texts may have changed, `tokenizer` is the usual one;
    `splits` opens {train, valid} and may take long. The others are cheap. `note` is to be told to the user. `tokens`:
    most tokens of an encoding trained on the text; 0: by its length.
    """

    key: str
    identity: Any
    tokenizer: str
    splits: Callable[[], dict[str, Split]]
    note: str = ""
    tokens: int = 0


@dataclass(frozen=True)
class HubData:
    """A data set of the Hugging Face hub; its last `held_out` texts are for validation if no part of it is."""

    hub: str
    revision: str | None = None
    tokenizer: str = "gpt2"
    clean: Callable[[str], str] = str
    held_out: int | None = None  # 5 %


def find_source(data: str, data_dir: Path = Path("data")) -> Source:
    """The source of `data`:

        austen               six novels shipped with the repository; every 20th chapter is held out
        captions             captions of images, Texygen's "Image COCO", fetched once into `data_dir`'s folder captions
        lm1b, openwebtext    the paper's benchmarks, from the Hugging Face hub
        lm1b:PATH            local files of LM1B's tokenized text, a sentence a line: its spacing is undone
        openwebtext:PATH     local files as below, with that benchmark's tokenizer (gpt2)
        FILE or FOLDER       UTF-8 text, of a folder .txt, .md, .jsonl and .gz of these: a text a line, or paragraphs
                             between blank lines; of .jsonl the field "text" of every line
        OWNER/NAME[:CONFIG]  a data set of the Hugging Face hub with a column named text, taken not to change

    The last 5 % of a path's texts are held out; of a hub data set its validation or test split if it has one. Paths
    get a tokenizer of their own, which needs no download; hub data sets take gpt2. Raises UserError if it is no source.
    """
    if data == "austen":
        return Source("austen", sha256(AUSTEN_TEXT), "austen", lambda: _splits_of(*austen_sentences()))
    if data == "captions":
        identity = [CAPTION_TOKENS, *(digest for _, digest in CAPTIONS.values())]
        files = data_dir / "captions"
        return Source("captions", identity, OWN, lambda: _splits_of(*captions(files)), tokens=CAPTION_TOKENS)
    kind, _, rest = data.partition(":")
    if source := BENCHMARKS.get(kind):
        if rest:
            return _local(Path(rest).expanduser(), ("",), source.tokenizer, kind, source.clean)
        if data == kind:
            return Source(kind, [source.hub, source.revision], source.tokenizer, lambda: _hub_splits(source))
    path = Path(data).expanduser()
    if data and path.exists():
        return _local(path, SUFFIXES, OWN, "text", str)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(?<!\.txt)(:[\w.-]+)?", data):
        return Source(re.sub("[/:]", "--", data), data, "gpt2", lambda: _hub_splits(HubData(data)))
    raise UserError(
        f"--data {data}: no such file or folder; expected a path, austen, captions, toy, {', '.join(BENCHMARKS)} or a "
        "Hugging Face data set as owner/name"
    )


def austen_sentences() -> tuple[list[str], list[str]]:
    """Sentences for training and for validation."""
    chapters = lzma.decompress(AUSTEN_TEXT.read_bytes()).decode().split("\n\n")
    valid = chapters[AUSTEN_HELD_OUT]
    del chapters[AUSTEN_HELD_OUT]
    return "\n".join(chapters).splitlines(), "\n".join(valid).splitlines()


def captions(folder: Path) -> tuple[list[str], list[str]]:
    """Captions for training and for validation, from the files in a folder, which are fetched if they are missing."""
    train, valid = (
        obtain(folder / Path(place).name, _TEXYGEN + place, "use the text that is shipped, --data austen", digest)
        for place, digest in CAPTIONS.values()
    )
    return list(_lines(train)), list(_lines(valid))


def _splits_of(train: list[str], valid: list[str]) -> dict[str, Split]:
    """Texts that are in memory."""
    named = {"train": train, "valid": valid}
    return {name: Split(len(texts), lambda start, texts=texts: iter(texts[start:])) for name, texts in named.items()}


def text_files(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> tuple[list[Path], str]:
    """The file itself, or the files with these suffixes in and below a folder, sorted; and a note on those left out.

    Hidden ones do not count. Raises UserError without any, and of a pipe or device, which may never end.
    """
    if path.is_file():
        return [path], ""
    if not path.is_dir():
        raise UserError(f"cannot read {path} (no regular file and no folder); give an existing text file or folder")
    found = [p for p in sorted(path.rglob("*")) if p.is_file() and "/." not in f"/{p.relative_to(path).as_posix()}"]
    files = [p for p in found if p.name.lower().removesuffix(".gz").endswith(suffixes)]
    if not files:
        raise UserError(f"{path} has no files named {', '.join(suffixes)} or .gz of these; put UTF-8 text files there")
    others = sorted({p.suffix or p.name for p in found} - {p.suffix or p.name for p in files})
    left_out = f"{len(found) - len(files)} others left out ({', '.join(others[:5])}{', ...' * (len(others) > 5)})"
    return files, f"note: {path}: {len(files)} files are read, {left_out}" * (len(files) < len(found))


def fingerprint(files: Sequence[Path]) -> str:
    """Changes if a file is added, removed, renamed or written; reads none of them. Raises UserError if one is gone."""
    stats = []
    for file in files:
        with reading(file, "give an existing text file"):
            stats.append((str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns))
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def _local(path: Path, suffixes: tuple[str, ...], tokenizer: str, kind: str, clean: Callable[[str], str]) -> Source:
    (files, note), path = text_files(path, suffixes), path.resolve()
    place = hashlib.sha256(str(path).encode()).hexdigest()[:8]  # tells files of one name apart
    identity = [kind, fingerprint(files)]
    return Source(f"{kind}-{path.stem}-{place}", identity, tokenizer, lambda: local_splits(files, clean), note)


def local_splits(files: Sequence[Path], clean: Callable[[str], str], held_out: int = HELD_OUT) -> dict[str, Split]:
    """The texts of all files in order, `clean`ed; the last one in `held_out` for validation.

    Raises UserError if a file is not UTF-8 or cannot be read, or there are fewer than two texts.
    """
    scans = [_scan(file) for file in files]
    count = sum(texts for texts, _ in scans)
    if not count:
        raise UserError(f"{files[0]} is empty{' and so are all others' * (len(files) > 1)}; give some text")
    if count == 1:
        raise UserError(f"{files[0]} is a single text, of which no part can be held out; put one sentence a line")

    def read(start: int) -> Iterator[str]:
        every = (text for file, (_, paragraphs) in zip(files, scans, strict=True) for text in _texts(file, paragraphs))
        return map(clean, islice(every, start, None))

    return Split(count, read).hold_out(max(1, round(count / held_out)))


def _lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file, or of one in .gz, without surrounding blanks and without a byte-order mark."""
    offset, opened = 0, gzip.open if path.name.lower().endswith(".gz") else open
    with reading(path, "give it again, whole and readable"), opened(path, "rb") as file:
        for raw in file:
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                at = offset + error.start
                raise UserError(f"{path}: byte {at} is not UTF-8; convert it, e.g. with iconv -t UTF-8") from error
            yield (line.removeprefix("\ufeff") if offset == 0 else line).strip()
            offset += len(raw)


def _is_json(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(".jsonl")


def _json_texts(path: Path) -> Iterator[str]:
    """The field "text" of every line that is not blank."""
    for number, line in enumerate(_lines(path), 1):
        if not line:
            continue
        try:
            text = json.loads(line)["text"].encode(errors="replace").decode().strip()  # halves of a pair are no text
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            wanted = 'no JSON object with a string "text"'
            raise UserError(f"{path}: line {number} is {wanted}; mend it, or give plain text as .txt") from error
        if text:
            yield text


def _scan(path: Path) -> tuple[int, bool]:
    """Number of texts in a file, and whether they are paragraphs."""
    if _is_json(path):
        return sum(1 for _ in _json_texts(path)), False
    sizes = [sum(1 for _ in lines) for full, lines in groupby(_lines(path), bool) if full]
    by_paragraph = len(sizes) > 1 and sum(sizes) < LINES_PER_PARAGRAPH * len(sizes)
    return (len(sizes) if by_paragraph else sum(sizes)), by_paragraph


def _texts(path: Path, by_paragraph: bool) -> Iterator[str]:
    """Texts of a .jsonl; of others lines that are not blank, or paragraphs with their lines joined by spaces."""
    if _is_json(path):
        return _json_texts(path)
    if not by_paragraph:
        return filter(None, _lines(path))
    return (" ".join(lines) for full, lines in groupby(_lines(path), bool) if full)


# Detokenization of LM1B. WordPiece splits at punctuation anyway: of these rules only the last changes BERT's ids.
_SPACING = (
    (r" ([.,:;?!])(?= |$)", r"\1"),
    (r" '(?=\w)", "'"),  # isn 't, he 's
    (r" ?/ ", "/"),
    (r'" ([^"]+) "', r'"\1"'),
    (r"' ([^']+) '", r"'\1'"),
    (r"([(\[]) ", r"\1"),
    (r" ([)\]])", r"\1"),
    (r"([$£]) ", r"\1"),
)


def undo_lm1b_spacing(text: str) -> str:
    """Plain text from a sentence in which LM1B set words and punctuation apart by spaces."""
    for pattern, replacement in _SPACING:
        text = re.sub(pattern, replacement, text)
    return text


BENCHMARKS = {
    "lm1b": HubData(
        hub="billion-word-benchmark/lm1b",
        revision="8d52bfd3cc2819fc1166dbb8144c328e2690de3e",  # of refs/convert/parquet; its main is a script
        tokenizer="bert-base-uncased",
        clean=undo_lm1b_spacing,
    ),
    "openwebtext": HubData(
        hub="Skylion007/openwebtext",
        revision="79d93d786212f7344586290adb811d4ae6a1762c",
        held_out=100_000,
    ),
}


def _hub_splits(source: HubData) -> dict[str, Split]:
    """The texts of a data set, downloaded once into the cache of the package datasets, cleaned a thousand at a time."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError("data from the Hugging Face hub needs a package: pip install datasets==5.2.0") from error
    try:
        data = load_dataset(*source.hub.split(":"), revision=source.revision)
    except Exception as error:  # hub, network, cache and format each have exceptions of their own
        raise UserError(
            f"cannot load {source.hub} from the Hugging Face hub ({first_line(error)}); check the name and the "
            "network, or use local files: see --data"
        ) from error
    if "train" not in data or "text" not in data["train"].column_names:
        raise UserError(f"{source.hub} of the Hugging Face hub has no split train with a column text; choose another")

    def read(rows: Any, start: int) -> Iterator[str]:
        for at in range(start, len(rows), 1000):
            yield from (source.clean(text or "") for text in rows[at : at + 1000]["text"])

    splits = {name: Split(len(rows), partial(read, rows)) for name, rows in data.items()}
    if valid := splits.get("validation") or splits.get("test"):
        return {"train": splits["train"], "valid": valid}
    return splits["train"].hold_out(source.held_out or round(splits["train"].count / HELD_OUT))
