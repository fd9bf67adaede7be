"""Texts to rows of token ids, in a folder that appears whole or not at all; an interrupted build goes on.

A stream is the ids of all texts in order, each text followed by the separator. It is cut into pieces of length - 2
ids; every piece becomes a row: separator, piece, separator. What does not fill a piece is dropped, once, at the end.
[deviation: the released code cuts the stream anew every 1,000 texts and drops each remainder, 0.2 % of LM1B]
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from common.errors import UserError, first_line
from common.files import locked, sha256, write_atomic
from common.text.tokenizers import Tokenizer

BATCH_TEXTS = 1000  # encoded at once: bounds the memory
SAVE_TOKENS = 2**23  # between two saves of the progress: some seconds of work
MANIFEST = "manifest.json"
COMPARED = 2**28  # bytes of a file up to which its contents are compared with the manifest: a fraction of a second


@dataclass(frozen=True)
class Split:
    """`count` texts; `read(start)` gives those from number `start` on."""

    count: int
    read: Callable[[int], Iterator[str]]

    def hold_out(self, valid: int) -> dict[str, "Split"]:
        """The last `valid` texts for validation, the others for training."""
        cut = self.count - valid
        return {
            "train": Split(cut, lambda start: islice(self.read(start), cut - start)),
            "valid": Split(valid, lambda start: self.read(cut + start)),
        }


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 if it holds every id, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def cut(stream: NDArray[Any], length: int, separator: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """A stream of ids (T,) -> rows (N, length) between separators, and the fewer than length - 2 ids that are left."""
    pieces = stream[: len(stream) - len(stream) % (length - 2)].reshape(-1, length - 2)
    rows = np.full((len(pieces), length), separator, stream.dtype)
    rows[:, 1:-1] = pieces
    return rows, stream[pieces.size :]


def describe(source: Any, tokenizer: Tokenizer, length: int) -> dict[str, Any]:
    """All that rows depend on, of JSON's types; rows made from anything else are made again."""
    return {
        "format": 1,
        "source": source,
        "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
        "length": length,
        "dtype": token_dtype(tokenizer.vocab_size).name,
    }


def load(folder: Path, made_from: Mapping[str, Any]) -> dict[str, np.memmap] | None:
    """{split: rows (N, length), read-only}; None if the folder is absent, damaged or made from something else.

    Contents above COMPARED bytes are not read; the manifest has their sha256 for whoever wants to compare.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["made_from"] != made_from:
            return None
        rows = {}
        for name, state in manifest["splits"].items():
            file, shape = folder / f"{name}.bin", (state["rows"], made_from["length"])
            if "sha256" in state and file.stat().st_size <= COMPARED and sha256(file) != state["sha256"]:
                return None
            rows[name] = np.memmap(file, made_from["dtype"], "r", shape=shape)
        return rows
    except (OSError, ValueError, TypeError, KeyError):  # absent, half a file, or not ours
        return None


def build(
    folder: Path, made_from: Mapping[str, Any], tokenizer: Tokenizer, open_splits: Callable[[], Mapping[str, Split]],
    name: str = "the text",
) -> dict[str, np.memmap]:  # fmt: skip
    """Makes `folder` with <split>.bin and a manifest, and loads it. Waits while another process makes it.

    The work is done in <folder>.partial, where the manifest is the progress: a call after an interruption goes on
    from its last save. A rename ends the work. Without file locks every process makes a folder of its own, which an
    interruption costs. `open_splits` may download; it is called once there is work to do. `name` is for messages.

    Raises UserError if there is no row to train on, fewer than two are held out, or a file cannot be written.
    """

    def save(file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())
        write_atomic(partial / MANIFEST, json.dumps(manifest).encode())

    try:
        with locked(folder.with_name(folder.name + ".lock")) as alone, ExitStack() as at_end:
            if (rows := load(folder, made_from)) is not None:  # another process was faster
                return rows
            partial = folder.with_name(folder.name + ("" if alone else f".{os.getpid()}") + ".partial")
            if not alone:
                at_end.callback(shutil.rmtree, partial, ignore_errors=True)
            splits = open_splits()
            if load(partial, made_from):  # what an interrupted build saved
                manifest = json.loads((partial / MANIFEST).read_bytes())
            else:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                manifest = {"made_from": made_from, "splits": {}}
            for part, split in splits.items():
                state = manifest["splits"].setdefault(part, {"texts": 0, "tokens": 0, "rows": 0, "rest": []})
                with open(partial / f"{part}.bin", "ab") as file:
                    for _ in _pack(split, tokenizer, made_from["length"], file, state):
                        save(file)
                    state["sha256"] = sha256(Path(file.name))
                    save(file)
                needed = 2 if part == "valid" else 1  # one to score as real text, one to compare with
                if state["rows"] < needed:
                    shutil.rmtree(partial)
                    raise UserError(
                        f"{name}: too little text: {part} has {state['tokens']} tokens, fewer than the "
                        f"{needed * (made_from['length'] - 2)} that fill {'a row' if needed == 1 else 'two rows'}; "
                        "give more text or a smaller --length"
                    )
            if alone or load(folder, made_from) is None:
                shutil.rmtree(folder, ignore_errors=True)  # maps of it in running processes stay valid
                os.replace(partial, folder)
            rows = load(folder, made_from)
    except OSError as error:
        raise UserError(f"cannot make {folder} ({first_line(error)}); run again to go on where it stopped") from error
    assert rows is not None
    return rows


def _pack(split: Split, tokenizer: Tokenizer, length: int, file: BinaryIO, state: dict[str, Any]) -> Iterator[None]:
    """Appends the rows of a split's texts from `state` on; yields now and then and at the end, to be saved."""
    dtype = token_dtype(tokenizer.vocab_size)
    file.truncate(state["rows"] * length * dtype.itemsize)  # what came after the last save is done again
    texts, unsaved = split.read(state["texts"]), 0
    name = f"{Path(file.name).stem} texts"
    with tqdm(total=split.count, initial=state["texts"], desc=name, unit_scale=True, leave=False, mininterval=1) as bar:
        while batch := list(islice(texts, BATCH_TEXTS)):
            encoded = [[*ids, tokenizer.separator] for ids in tokenizer.encode_batch(batch) if ids]
            stream = np.fromiter(chain(state["rest"], *encoded), dtype)
            rows, rest = cut(stream, length, tokenizer.separator)
            file.write(rows.tobytes())
            unsaved += rows.size
            state["texts"] += len(batch)
            state["tokens"] += len(stream) - len(state["rest"])
            state["rows"] += len(rows)
            state["rest"] = rest.tolist()
            bar.update(len(batch))
            if unsaved >= SAVE_TOKENS:
                yield
                unsaved = 0
    yield
