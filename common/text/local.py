"""Texts in local files: one a line, or paragraphs between blank lines."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path

from common.errors import UserError
from common.text.packing import Split

LINES_PER_PARAGRAPH = 50  # files with fewer on average have paragraphs; a stray blank line does not join a book


def text_files(path: Path, pattern: str) -> list[Path]:
    """The file itself, or the files of this pattern in and below a folder, sorted. Raises UserError without any."""
    files = sorted(p for p in path.rglob(pattern) if p.is_file()) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} has no {pattern} files; put UTF-8 text files there")
    return files


def fingerprint(files: Sequence[Path]) -> str:
    """Changes if a file is added, removed, renamed or written; reads none of them. Raises UserError if one is gone."""
    try:
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError as error:
        raise UserError(f"cannot read {error.filename} ({error.strerror}); give an existing text file") from error
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def local_splits(files: Sequence[Path], clean: Callable[[str], str], held_out: int) -> dict[str, Split]:
    """The texts of all files in order, `clean`ed; the last one in `held_out` for validation.

    Raises UserError if a file is not UTF-8 or cannot be read, or there are fewer than two texts.
    """
    scans = [_scan(file) for file in files]
    count = sum(texts for texts, _ in scans)
    if not count:
        raise UserError(f"{files[0]} is empty{' and so are all others' * (len(files) > 1)}; give some text")
    if count == 1:
        raise UserError(
            f"{files[0]} is a single text, of which no part can be held out for validation; "
            "put one sentence or paragraph a line"
        )

    def read(start: int) -> Iterator[str]:
        every = (text for file, (_, paragraphs) in zip(files, scans, strict=True) for text in _texts(file, paragraphs))
        return map(clean, islice(every, start, None))

    return Split(count, read).hold_out(max(1, round(count / held_out)))


def _lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file without surrounding blanks and without a byte-order mark."""
    offset = 0
    with open(path, "rb") as file:
        for raw in file:
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}: byte {offset + error.start} is not UTF-8; convert the file, e.g. with iconv -t UTF-8"
                ) from error
            yield (line.removeprefix("\ufeff") if offset == 0 else line).strip()
            offset += len(raw)


def _scan(path: Path) -> tuple[int, bool]:
    """Number of texts in a file, and whether they are paragraphs."""
    sizes = [sum(1 for _ in lines) for full, lines in groupby(_lines(path), bool) if full]
    by_paragraph = len(sizes) > 1 and sum(sizes) < LINES_PER_PARAGRAPH * len(sizes)
    return (len(sizes) if by_paragraph else sum(sizes)), by_paragraph


def _texts(path: Path, by_paragraph: bool) -> Iterator[str]:
    """Lines of a file that are not blank, or its paragraphs with their lines joined by spaces."""
    if not by_paragraph:
        return filter(None, _lines(path))
    return (" ".join(lines) for full, lines in groupby(_lines(path), bool) if full)
