"""Texts and tokenizers: packing by hand, builds that survive interruptions, and one line for whatever can be wrong."""

import fcntl
import gzip
import hashlib
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from common import files
from common.errors import UserError
from common.files import sha256
from common.text import corpora, load_text, load_tokenizer, packing, tokenizers, toy_probabilities, toy_rows
from common.text.corpora import (
    austen_sentences,
    find_source,
    fingerprint,
    local_splits,
    text_files,
    undo_lm1b_spacing,
)
from common.text.packing import Split, cut, describe, token_dtype
from common.text.tokenizers import Tokenizer, own_tokenizer
from tests.helpers import hub_in_a_folder

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TOKENIZERS = Path(os.environ.get("FLM_TEST_TOKENIZERS", SHARED / "tokenizers"))
LM1B = SHARED / "text" / "lm1b_heldout"

needs_gpt2 = pytest.mark.skipif(not (TOKENIZERS / "vocab.bpe").exists(), reason="GPT-2's vocab.bpe is not here")
needs_bert = pytest.mark.skipif(
    not (TOKENIZERS / "bert-base-uncased-vocab.txt").exists(), reason="BERT's vocabulary is not here"
)


def letters(vocab_size: int = 27) -> Tokenizer:
    """a is 0, z is 25; the separator is 26."""
    return Tokenizer(
        "letters",
        vocab_size,
        26,
        "",
        lambda texts: [[ord(c) - ord("a") for c in text] for text in texts],
        lambda ids: "".join("|" if i == 26 else chr(i + ord("a")) for i in ids),
    )


def split(texts: list[str]) -> Split:
    return Split(len(texts), lambda start: iter(texts[start:]))


def make(folder: Path, texts: list[str], tokenizer: Tokenizer, length: int = 6) -> dict[str, np.memmap]:
    made_from = describe("test", tokenizer, length)
    return packing.build(folder, made_from, tokenizer, lambda: {"train": split(texts), "valid": split(texts[-40:])})


WORDS = ["".join(random.Random(i).choices("abcdefg", k=1 + i % 7)) for i in range(200)]


# Packing


def test_cut_by_hand() -> None:
    rows, rest = cut(np.arange(1, 9, dtype=np.uint16), 5, 0)
    assert rows.tolist() == [[0, 1, 2, 3, 0], [0, 4, 5, 6, 0]] and rest.tolist() == [7, 8]
    rows, rest = cut(np.arange(1, 3, dtype=np.uint16), 5, 0)
    assert rows.shape == (0, 5) and rest.tolist() == [1, 2]


def test_build_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BATCH_TEXTS", 2)  # no boundary of batches shows in the rows
    rows = make(tmp_path / "x", ["abc", "", "de", "fgh", "i"], letters())
    assert [letters().literal(row) for row in rows["train"].tolist()] == ["|abc||", "|de|f|", "|gh|i|"]
    assert rows["train"].dtype == np.uint16 and not rows["train"].flags.writeable
    manifest = json.loads((tmp_path / "x" / "manifest.json").read_bytes())
    state = manifest["splits"]["train"]
    assert (state["texts"], state["tokens"], state["rows"], state["rest"]) == (5, 13, 3, [26])
    assert state["sha256"] == sha256(tmp_path / "x" / "train.bin")
    assert (tmp_path / "x" / "train.bin").stat().st_size == 3 * 6 * 2


def test_token_dtype_is_two_bytes_if_they_fit(tmp_path: Path) -> None:
    assert token_dtype(2**16) == np.uint16 and token_dtype(2**16 + 1) == np.uint32
    assert make(tmp_path / "x", WORDS, letters(2**16 + 1))["train"].dtype == np.uint32


@pytest.mark.parametrize("good_calls", range(0, 25, 3))
def test_build_goes_on_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good_calls: int) -> None:
    monkeypatch.setattr(packing, "BATCH_TEXTS", 10)  # 24 batches
    monkeypatch.setattr(packing, "SAVE_TOKENS", 100)  # saved after every second or third
    whole = make(tmp_path / "whole", WORDS, letters())
    calls: list[int] = []

    def interrupted(texts: list[str]) -> list[list[int]]:
        if len(calls) == good_calls:
            raise KeyboardInterrupt
        calls.append(len(texts))
        return letters().encode_batch(texts)

    tokenizer = Tokenizer("letters", 27, 26, "", interrupted, str)
    folder = tmp_path / "x"
    if good_calls < 24:
        with pytest.raises(KeyboardInterrupt):
            make(folder, WORDS, tokenizer)
        assert not folder.exists()
    done, good_calls = sum(calls), 99
    calls.clear()
    rows = make(folder, WORDS, tokenizer)
    for name in rows:
        np.testing.assert_array_equal(rows[name], whole[name])
    assert sum(calls) <= 240 - done + 40  # at most what came after the last save is encoded again
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "whole.lock", "x", "x.lock"}
    assert {path.name for path in folder.iterdir()} == {"train.bin", "valid.bin", "manifest.json"}


def test_build_uses_no_progress_of_another_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BATCH_TEXTS", 10)
    monkeypatch.setattr(packing, "SAVE_TOKENS", 1)

    def texts(start: int) -> Iterator[str]:
        yield from WORDS[start:100]
        raise KeyboardInterrupt

    made_from = describe("other", letters(), 6)
    with pytest.raises(KeyboardInterrupt):
        packing.build(tmp_path / "x", made_from, letters(), lambda: {"train": Split(200, texts)})
    assert (tmp_path / "x.partial").exists()
    reverse = WORDS[::-1]
    whole = make(tmp_path / "whole", reverse, letters())
    np.testing.assert_array_equal(make(tmp_path / "x", reverse, letters())["train"], whole["train"])


def test_build_is_done_once_for_many_processes(tmp_path: Path) -> None:
    calls = []

    def encode(texts: list[str]) -> list[list[int]]:
        calls.append(len(texts))
        return letters().encode_batch(texts)

    tokenizer = Tokenizer("letters", 27, 26, "", encode, str)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: make(tmp_path / "x", WORDS, tokenizer)["train"].sum(), range(4)))
    assert calls == [200, 40] and len(set(results)) == 1


def test_build_without_file_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes make the folder at once: each in a place of its own, and one of them moves in."""

    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    files.note.cache_clear()
    calls: list[int] = []

    def encode(texts: list[str]) -> list[list[int]]:
        calls.append(len(texts))
        if len(calls) == 1:
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 1)
                make(tmp_path / "x", WORDS, letters())
        return letters().encode_batch(texts)

    rows = make(tmp_path / "x", WORDS, Tokenizer("letters", 27, 26, "", encode, str))
    np.testing.assert_array_equal(rows["train"], make(tmp_path / "x", WORDS, letters())["train"])
    assert {path.name for path in tmp_path.iterdir()} == {"x", "x.lock"}
    assert capsys.readouterr().out == (
        f"note: {tmp_path} has no file locks ([Errno 37] No locks available); every process works for itself\n"
    )


@pytest.mark.parametrize("damage", ["short", "changed", "missing", "manifest", "other"])
def test_load_refuses_an_unfit_folder_which_is_made_again(tmp_path: Path, damage: str) -> None:
    folder, made_from = tmp_path / "x", describe("test", letters(), 6)
    before = make(folder, WORDS, letters())["train"]
    expected = before.copy()
    if damage == "short":
        os.truncate(folder / "train.bin", (folder / "train.bin").stat().st_size - 1)
    elif damage == "changed":
        with open(folder / "train.bin", "r+b") as file:
            file.write(b"\xff")
    elif damage == "missing":
        (folder / "valid.bin").unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_bytes(b'{"made_')
    else:
        assert packing.load(folder, describe("test", letters(), 7)) is None
        make(folder, WORDS[:50], letters(), length=7)
        np.testing.assert_array_equal(before, expected)  # the map of a running process keeps its file
    assert packing.load(folder, made_from) is None
    np.testing.assert_array_equal(make(folder, WORDS, letters())["train"], expected)


# Local files


def read_all(*names: Path) -> list[str]:
    splits = local_splits(names, str, held_out=20)
    return [*splits["train"].read(0), *splits["valid"].read(0)]


def test_local_splits_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone  é\r\n\ttwo \nthree\n".encode())
    assert read_all(path) == ["one  é", "two", "three"]
    path.write_text("\n".join(["line"] * 60 + [""] + ["line"] * 60))
    assert len(read_all(path)) == 120  # a stray blank line separates no paragraphs


def test_local_splits_of_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\na\nb\n \n\nc\n\nd\ne\n")
    assert read_all(path) == ["a b", "c", "d e"]


def test_local_splits_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, text in {
        "b.txt": "b1\nb2\n",
        "a.txt": "a1\n\na2\nA2",
        "sub/c.txt": "c1",
        "no.pdf": "",
        ".x.md": "",
    }.items():
        (tmp_path / name).write_text(text)
    files, note = text_files(tmp_path)
    assert note == f"note: {tmp_path}: 3 files are read, 1 others left out (.pdf)"
    assert read_all(*files) == ["a1", "a2 A2", "b1", "b2", "c1"]
    splits = local_splits(files, str.upper, held_out=2)
    assert (splits["train"].count, splits["valid"].count) == (3, 2)
    for start in range(4):
        assert list(splits["train"].read(start)) == ["A1", "A2 A2", "B1"][start:]
        assert list(splits["valid"].read(start)) == ["B2", "C1"][start:]
    before = fingerprint(files)
    os.utime(files[0], (0, 0))
    assert fingerprint(files) != before != fingerprint(files[1:])


def test_load_text_reads_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("A line of my own text.\n" * 200)
    load = lambda: load_text(str(path), length=8, data_dir=tmp_path / "data")  # noqa: E731
    first = load()
    assert first.name == str(path) and first.tokenizer.name == "own"
    monkeypatch.setattr(packing, "build", lambda *args: pytest.fail("built twice"))
    np.testing.assert_array_equal(load().train, first.train)
    path.write_text("Another text.\n" * 200)
    with pytest.raises(pytest.fail.Exception, match="built twice"):  # what changed is built again
        load()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "mine.txt is empty; give some text"),
        (b"\n \n", "mine.txt is empty"),
        (b"one line", "mine.txt is a single text, of which no part can be held out"),
        ("é\nna\u00efve".encode() + b"\nab\xe9d\n", r"mine.txt: byte 12 is not UTF-8"),
        ("one\ntwo\n".encode("utf-16"), "byte 0 is not UTF-8"),
        (b"a\nb\n", "too little text: train has 2 tokens, fewer than the 14 that fill a row"),
        (
            b"some words in a line\n" * 40,
            "mine.txt: too little text: valid has 1[0-9] tokens, fewer than the 28 that fill two rows",
        ),
    ],
)
def test_load_text_of_unfit_text_is_a_user_error(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "mine.txt").write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        load_text(str(tmp_path / "mine.txt"), length=16, data_dir=tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert not any(path.is_dir() for path in tmp_path.glob("data/text/*"))


@pytest.mark.parametrize(
    ("data", "kwargs", "words"),
    [
        ("austin", {}, "--data austin: no such file or folder; expected a path, austen, captions, toy"),
        ("", {}, "no such file or folder"),
        ("no/such/folder", {}, "no such file or folder"),
        ("no/such.txt", {}, "no such file or folder"),
        ("lm1b:no_such_file", {"tokenizer": "austen"}, "cannot read no_such_file .*; give an existing text file"),
        ("austen", {"tokenizer": "gpt3"}, "no tokenizer 'gpt3'; expected one of own, austen, gpt2, bert-base-uncased"),
        ("austen", {"length": 2}, "--length 2: must be at least 3"),
        ("toy", {"length": 9}, "--data toy has 8 tokens a row; use --length 8"),
        ("toy", {"length": 8, "tokenizer": "gpt2"}, "--data toy has a tokenizer of its own"),
        (".", {}, r"has no files named .txt, .md, .jsonl or .gz of these"),
        ("/dev/zero", {}, r"cannot read /dev/zero \(no regular file and no folder\)"),
        ("openwebtext:/dev/zero", {"tokenizer": "austen"}, "cannot read /dev/zero"),
    ],
)
def test_load_text_of_a_bad_argument_is_a_user_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, kwargs: dict, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        load_text(data, **{"length": 16, "data_dir": tmp_path / "data"} | kwargs)
    assert "\n" not in str(caught.value)


def test_load_text_in_an_unwritable_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file, not a folder")
    with pytest.raises(UserError, match=r"cannot make .*austen-austen-64 .*run again"):
        load_text("austen", length=64, data_dir=tmp_path / "data")


def test_load_text_of_a_pipe_is_a_user_error(tmp_path: Path) -> None:
    """Nobody writes into it: reading would wait for ever."""
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "pipe.txt")
    for name, words in {"pipe.txt": "no regular file", "folder": "has no files named"}.items():
        with pytest.raises(UserError, match=words):
            load_text(str(tmp_path / name), length=16, data_dir=tmp_path / "data")


def packed(name: str, content: bytes) -> bytes:
    return gzip.compress(content, mtime=0) if name.endswith(".gz") else content


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.txt", "one\ntwo\n", ["one", "two"]),
        ("A.MD", "# Head\n\nOne\npara\n\nTwo\n", ["# Head", "One para", "Two"]),
        ("a.jsonl", '{"id": 1, "text": "on\\ne"}\n\n{"text": " "}\n{"text": "tw\\ud800o"}\n', ["on\ne", "tw?o"]),
    ],
)
def test_local_splits_of_every_kind_of_file(
    tmp_path: Path, name: str, content: str, texts: list[str], end: str
) -> None:
    (tmp_path / (name + end)).write_bytes(packed(name + end, content.encode()))
    files, note = text_files(tmp_path)
    assert read_all(*files) == texts and not note


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n{"txt": "x"}\n',
            'a.jsonl: line 2 is no JSON object with a string "text"; mend it',
        ),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": 5}\n', "line 3 is no JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "x', "line 2 is no JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is no JSON"),
        ("a.jsonl.gz", gzip.compress(b'["text"]', mtime=0), "line 1 is no JSON"),
        ("a.txt.gz", b"plain", r"a.txt.gz cannot be read \(Not a gzipped file.*; give it again, whole"),
        (
            "a.txt.gz",
            gzip.compress(b"a line\n" * 9000, mtime=0)[:-20],
            r"a.txt.gz cannot be read \(.*; give it again, whole",
        ),
        ("a.txt.gz", gzip.compress(b"ab\n\xff\n", mtime=0), "a.txt.gz: byte 3 is not UTF-8"),
    ],
)
def test_load_text_of_a_damaged_file_names_the_place(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        load_text(str(tmp_path / name), length=16, data_dir=tmp_path / "data")
    assert "\n" not in str(caught.value)


def test_load_text_trains_an_encoding_on_own_text(tmp_path: Path) -> None:
    train, _ = austen_sentences()
    path = tmp_path / "mine.txt"
    path.write_text("\n".join(train[:3000]))
    data = load_text(str(path), length=32, data_dir=tmp_path / "data")
    (file,) = (tmp_path / "data" / "text").glob("*.bpe")
    assert f"encoding: {data.tokenizer.vocab_size:,} tokens trained on this text, in {file}" in data.note
    assert 512 < data.tokenizer.vocab_size < 4096 and data.tokenizer.sha256 == sha256(file)
    manifest = json.loads(next((tmp_path / "data" / "text").glob("*/manifest.json")).read_bytes())
    assert manifest["made_from"]["tokenizer"]["sha256"] == sha256(file)
    assert train[0].startswith(data.tokenizer.decode(data.train[0]))
    for folder, length in (("data", 16), ("other", 32)):  # another length, another machine
        again = load_text(str(path), length=length, data_dir=tmp_path / folder)
        assert again.tokenizer.sha256 == data.tokenizer.sha256
    assert load_text(str(path), length=32, data_dir=tmp_path / "data", tokenizer="austen").tokenizer.name == "austen"
    file.write_text("#version: 0.2\nx y\nab c\n")
    with pytest.raises(UserError, match=r"\.bpe cannot be read .*; delete it to have it made again"):
        load_text(str(path), length=32, data_dir=tmp_path / "data")
    path.write_text("\n".join(train[3000:6000]))  # other text, another encoding
    assert load_text(str(path), length=32, data_dir=tmp_path / "data").tokenizer.sha256 != data.tokenizer.sha256


def test_train_merges_makes_the_shipped_encoding_of_austen() -> None:
    assert tokenizers._train_merges(austen_sentences()[0]) == tokenizers.AUSTEN_MERGES.read_bytes()


# The Hugging Face hub, played by a dictionary


class Column(list):
    """The part of a data set that is used: a slice is {text: [...]}."""

    column_names = ("text",)

    def __getitem__(self, part: slice) -> dict[str, list[str]]:
        return {"text": list.__getitem__(self, part)}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict:
    sets: dict = {}

    def load(*names: str, revision: str | None) -> dict:
        return sets[(*names, revision) if revision else names]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    return sets


def test_find_source_of_a_hub_data_set(tmp_path: Path, hub: dict) -> None:
    texts = Column(f"Text number {i}." for i in range(2500))
    hub["owner/name", "config"] = {"train": texts, "test": Column(["A test."] * 50)}
    splits = find_source("owner/name:config").splits()
    assert list(splits["train"].read(1234)) == list(texts)[1234:] and splits["train"].count == 2500
    assert list(splits["valid"].read(0)) == ["A test."] * 50
    hub[("owner/name",)] = {"train": texts}
    splits = find_source("owner/name").splits()
    assert (splits["train"].count, splits["valid"].count) == (2375, 125)
    assert list(splits["train"].read(2000)) + list(splits["valid"].read(0)) == list(texts)[2000:]
    data = load_text("owner/name", length=16, data_dir=tmp_path, tokenizer="austen")
    assert data.tokenizer.decode(data.train[0]) == "Text number 0.\nText number 1"


def test_find_source_splits_benchmarks_as_the_paper(hub: dict) -> None:
    hub["billion-word-benchmark/lm1b", "8d52bfd3cc2819fc1166dbb8144c328e2690de3e"] = {
        "train": Column(["It 's here ."]),
        "test": Column(["Where ?"]),
    }
    hub["Skylion007/openwebtext", "79d93d786212f7344586290adb811d4ae6a1762c"] = {
        "train": Column(map(str, range(100_003)))
    }
    lm1b, owt = find_source("lm1b"), find_source("openwebtext")
    assert (lm1b.tokenizer, owt.tokenizer) == ("bert-base-uncased", "gpt2")
    splits = lm1b.splits()
    assert (list(splits["train"].read(0)), list(splits["valid"].read(0))) == (["It's here."], ["Where?"])
    splits = owt.splits()
    assert list(splits["train"].read(1)) == ["1", "2"] and splits["valid"].count == 100_000
    assert next(splits["valid"].read(0)) == "3"


def test_load_text_refuses_unfit_hub_data_sets(tmp_path: Path, hub: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        load_text(name, length=16, data_dir=tmp_path, tokenizer="austen")

    with pytest.raises(UserError, match=r"cannot load no/such from the Hugging Face hub .*check the name and the netw"):
        load("no/such")
    hub[("owner/name",)] = {"test": Column(["x"])}
    with pytest.raises(UserError, match="has no split train with a column text"):
        load("owner/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install datasets=="):
        load("openwebtext")


# Tokenizers

HARD = ["", " ", "plain words", "  two\n\n\tblanks  ", "naïve 中文 😀 \x00", "it's <|endoftext|> [CLS]", "x" * 500]


def test_load_tokenizer_austen(tmp_path: Path) -> None:
    tok = load_tokenizer("austen", tmp_path)
    assert (tok.vocab_size, tok.separator) == (4096, 4095)
    encoded = tok.encode_batch(HARD)
    assert all(max(ids, default=0) < 4095 for ids in encoded)
    assert [tok.decode(ids) for ids in encoded] == HARD
    assert not list(tmp_path.iterdir())


def test_tokenizer_decode_joins_what_separators_part(tmp_path: Path) -> None:
    tok = load_tokenizer("austen", tmp_path)
    a, b = tok.encode_batch(["He smiled.", "She did not."])
    row = np.array([4095, *a, 4095, 4095, *b, 4095], np.uint16)
    assert tok.decode(row) == "He smiled.\nShe did not."
    assert tok.decode(row, separators=" / ") == "He smiled. / She did not."
    end = "<|endoftext|>"
    assert tok.decode(row, separators=None) == f"{end}He smiled.{end}{end}She did not.{end}"
    assert tok.decode([]) == tok.decode([4095]) == ""


@pytest.fixture
def small_bert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str, str]:
    """A vocabulary whose id 101 is [CLS], served from a folder."""
    hub_in_a_folder(monkeypatch, tmp_path)
    pieces = [f"[unused{i}]" for i in range(100)] + ["[UNK]", "[CLS]", "he", "##llo", "it", "'", "s", ".", "cafe"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    digest = hashlib.sha256((tmp_path / "vocab.txt").read_bytes()).hexdigest()
    url = "https://huggingface.co/owner/name/resolve/main/vocab.txt"
    file = ("bert-vocab.txt", digest, url)
    monkeypatch.setitem(tokenizers._FILES, "bert-base-uncased", file)
    return file


def test_load_tokenizer_fetches_once(tmp_path: Path, small_bert: tuple[str, str, str]) -> None:
    data = tmp_path / "data"
    tok = load_tokenizer("bert-base-uncased", data)
    assert tok.encode_batch(["HELLO, it's. Café [CLS]"]) == [[102, 103, 100, 104, 105, 106, 107, 108, 100, 100, 100]]
    assert tok.decode([101, 102, 103, 107, 101, 108], separators=None) == "[CLS] hello . [CLS] cafe"
    assert tok.decode([101, 102, 103, 107, 101, 108]) == "hello .\ncafe"
    (tmp_path / "vocab.txt").rename(tmp_path / "other.txt")
    assert load_tokenizer("bert-base-uncased", data).vocab_size == 109
    assert [path.name for path in (data / "tokenizers").iterdir()] == ["bert-vocab.txt"]
    for path in (tmp_path / "other.txt", data / "tokenizers"):  # a file under any name, or a folder
        assert load_tokenizer("bert-base-uncased", tmp_path / "empty", path).vocab_size == 109


def test_load_tokenizer_refusals(
    tmp_path: Path, small_bert: tuple[str, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(path: Path | None = None) -> str:
        with pytest.raises(UserError) as caught:
            load_tokenizer("bert-base-uncased", tmp_path / "data", path)
        assert "\n" not in str(caught.value) and not list(tmp_path.glob("data/tokenizers/*"))
        return str(caught.value)

    assert f"{tmp_path}/none is no file and no folder with bert-vocab.txt or vocab.txt" in refusal(tmp_path / "none")
    (tmp_path / "vocab.txt").write_text("changed")
    assert "vocab.txt is not the file of bert-base-uncased (sha256" in refusal(tmp_path)
    assert "its sha256 is not the expected one" in refusal()
    (tmp_path / "vocab.txt").unlink()
    message = refusal()
    for part in (small_bert[2], small_bert[1][:12], str(tmp_path / "data/tokenizers/bert-vocab.txt")):
        assert part in message
    assert capsys.readouterr().out == ""


@needs_gpt2
def test_load_tokenizer_gpt2_ids(tmp_path: Path) -> None:
    tok = load_tokenizer("gpt2", tmp_path, TOKENIZERS)
    assert (tok.vocab_size, tok.separator) == (50258, 50256)
    known = {
        "Hello, I'm a language model,": [15496, 11, 314, 1101, 257, 3303, 2746, 11],
        "The quick brown fox jumps over the lazy dog": [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290],
        "hello world": [31373, 995],
        " Hello world": [18435, 995],
        "000000000": [10535, 830],
    }
    assert tok.encode_batch(list(known)) == list(known.values())
    assert [tok.decode(ids) for ids in tok.encode_batch(HARD)] == HARD
    assert tok.decode([50256, 31373, 50257], separators=None) == "<|endoftext|>hello[PAD]"


@needs_bert
def test_load_tokenizer_bert_ids(tmp_path: Path) -> None:
    tok = load_tokenizer("bert-base-uncased", tmp_path, TOKENIZERS)
    assert (tok.vocab_size, tok.separator) == (30522, 101)
    assert tok.encode_batch(["Hello, my dog is cute"]) == [[7592, 1010, 2026, 3899, 2003, 10140]]
    assert tok.decode([101, 7592, 1010, 2026, 3899, 101], separators=None) == "[CLS] hello , my dog [CLS]"


# Corpora


def test_load_text_austen(tmp_path: Path) -> None:
    data = load_text("austen", length=64, data_dir=tmp_path)
    assert data.train.shape == (15173, 64) and data.valid.shape == (807, 64) and data.train.dtype == np.uint16
    for rows in (data.train, data.valid):
        assert (rows[:, [0, -1]] == 4095).all() and rows.max() == 4095
    counts = data.counts()
    assert counts.shape == (4096,) and counts.sum() == data.train.size and counts[4095] == (data.train == 4095).sum()
    train, valid = austen_sentences()
    stream = [data.tokenizer.decode(row[1:-1], separators="\n") for row in data.valid[:2]]
    assert "\n".join(valid).startswith(stream[0]) and valid[0] in stream[0]
    assert 0.049 < sum(map(len, valid)) / sum(map(len, train + valid)) < 0.051
    # Chapters are held out whole; only stock phrases ("He shook his head.") are on both sides.
    assert max((sentence for sentence in set(train) & set(valid)), key=len) == "He shook his head."
    for name in ("Emma", "Fanny", "Catherine", "Wentworth", "Elizabeth", "Marianne"):  # every novel, on both sides
        assert any(name in text for text in train) and any(name in text for text in valid)


def test_undo_lm1b_spacing() -> None:
    text = "He said : \" It isn 't $ 5 ( or £ 4 ) ; see http : / / a.b / c \" , didn 't he ? Yes !"
    assert undo_lm1b_spacing(text) == "He said: \"It isn't $5 (or £4); see http://a.b/c\", didn't he? Yes!"


@needs_bert
@pytest.mark.skipif(not LM1B.exists(), reason="no excerpt of LM1B here")
def test_load_text_lm1b_excerpt(tmp_path: Path) -> None:
    """Packed LM1B has the unigram entropy per row that the paper reports for its data, 4.31 nats."""
    data = load_text(f"lm1b:{LM1B}", length=128, data_dir=tmp_path, tokenizer_path=TOKENIZERS)
    assert (data.train[:, [0, -1]] == 101).all()
    counts = [np.array(list(Counter(row).values())) / 128 for row in data.train[:1000].tolist()]
    assert np.mean([-(p * np.log(p)).sum() for p in counts]) == pytest.approx(4.31, abs=0.02)


# The toy language


def test_toy_rows_have_the_distribution() -> None:
    table = toy_probabilities()
    assert len(table) == 64 and sum(table.values()) == pytest.approx(1) and len(set(table.values())) > 30
    rows = toy_rows(20_000, seed=3)
    assert rows.shape == (20_000, 8) and rows.dtype == np.uint16
    counts = Counter(map(tuple, rows.tolist()))
    assert counts.keys() <= table.keys()
    chi2 = sum((counts[s] - 20_000 * p) ** 2 / (20_000 * p) for s, p in table.items())
    assert chi2 < 63 + 4 * np.sqrt(2 * 63)  # four standard deviations above its mean
    np.testing.assert_array_equal(rows, toy_rows(20_000, seed=3))
    assert (rows != toy_rows(20_000, seed=4)).any()


def test_toy_probabilities_are_of_words_that_agree(tmp_path: Path) -> None:
    tok = load_text("toy", length=8, data_dir=tmp_path).tokenizer
    assert tok.vocab_size == 18
    for ids in toy_probabilities():
        words = tok.decode(ids, separators=None).split()
        plural = words[0] == "some"
        assert words[2].endswith("s") == plural and words[6].endswith("s") != plural
        assert tok.encode_batch([" ".join(words)]) == [list(ids)]
    assert tok.decode(ids) == "some small dogs behind the tree run"


def test_load_text_toy(tmp_path: Path) -> None:
    data = load_text("toy", length=8, data_dir=tmp_path)
    assert data.train.shape == (20_000, 8) and data.valid.shape == (2_000, 8)
    assert not data.train.flags.writeable and not data.valid.flags.writeable
    assert (data.train[:2_000] != data.valid).any()
    assert not list(tmp_path.iterdir())


def test_own_tokenizer_of_a_given_size(tmp_path: Path) -> None:
    texts = [f"{a}{b} {b}{c} {a}{c}" for a in "abcdef" for b in "ghijkl" for c in "mnopqr"]
    sizes = [own_tokenizer(tmp_path / f"{size}.bpe", lambda: texts, size).vocab_size for size in (300, 320)]
    assert sizes == [300, 320]


def test_captions_are_read_from_the_files_of_texygen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"train": [f"a dog number {i} on a bed ." for i in range(300)], "valid": ["a cat sits .", "two birds fly"]}
    monkeypatch.setattr(corpora, "CAPTIONS", {})
    for name, lines in texts.items():
        file = tmp_path / "captions" / f"{name}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(lines))
        monkeypatch.setitem(corpora.CAPTIONS, name, (f"no/such/place/{file.name}", sha256(file)))
    splits = find_source("captions", tmp_path).splits()
    assert {name: list(split.read(0)) for name, split in splits.items()} == texts
    assert list(splits["train"].read(298)) == texts["train"][298:] and splits["valid"].count == 2
    data = load_text("captions", length=8, data_dir=tmp_path)
    assert data.tokenizer.name == "own" and "dog number" in data.tokenizer.decode(data.train[0])
    (tmp_path / "captions" / "valid.txt").write_text("another text")
    with pytest.raises(UserError, match=r"valid\.txt"):
        find_source("captions", tmp_path).splits()
