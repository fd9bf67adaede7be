"""Makes austen.txt.xz and austen_4096.bpe from Jane Austen's six novels.

    python assets/make_austen.py FOLDER     # with the six .txt files; needs tokenizers==0.23.3

The text has one sentence a line and an empty line between chapters. The tokenizer is byte-level BPE, trained on the
training chapters alone.
"""

import json
import lzma
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from common.text.corpora import AUSTEN_TEXT, austen_sentences
from common.text.tokenizers import AUSTEN_MERGES, load_tokenizer

NOVELS = ("emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility")
TOKENS = 4095  # and the separator
CHAPTER = re.compile(r"chapter ([ivxlc]+|\d+)", re.IGNORECASE)
LAST_LINES = ("FINIS", "Finis", "THE END", "A NOTE ON THE TEXT")
# A full stop ends no sentence after a title or an initial other than "I".
NOT_AN_END = "".join(rf"(?<!\b{word})" for word in ("Mr", "Mrs", "Dr", "St", "Messrs", "Esq", "[A-HJ-Z]"))
SENTENCE_END = re.compile(NOT_AN_END + r"([.!?][\"')\]]*) (?=[\"'(\[]*[A-Z£])")


def chapters(novel: str) -> list[list[str]]:
    """Sentences of each chapter, without headings, notes, the marks of italics and the wrapping of lines."""
    found: list[list[str]] = []
    for line in novel.splitlines():
        line = line.strip()
        if CHAPTER.fullmatch(line):
            found.append([])
        elif line in LAST_LINES:
            break
        elif found and not line.startswith("VOLUME "):
            found[-1].append(line)
    return [sentences("\n".join(lines)) for lines in found]


def sentences(text: str) -> list[str]:
    kept = []
    for paragraph in text.split("\n\n"):
        paragraph = " ".join(paragraph.replace("_", "").split())
        if paragraph and paragraph[0] not in "[*":  # editors' notes and rows of asterisks
            kept += SENTENCE_END.sub(r"\1\n", paragraph.replace("*", "")).split("\n")
    return kept


def train_bpe(texts: list[str]) -> Tokenizer:
    """Byte-level BPE of TOKENS tokens over GPT-2's pieces of words."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def main(folder: Path) -> None:
    novels = [chapters((folder / f"{name}.txt").read_text(encoding="utf-8")) for name in NOVELS]
    text = "\n\n".join("\n".join(chapter) for novel in novels for chapter in novel) + "\n"
    AUSTEN_TEXT.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))

    train, valid = austen_sentences()
    bpe = train_bpe(train)
    merges = [" ".join(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    AUSTEN_MERGES.write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")

    shipped = load_tokenizer("austen", AUSTEN_MERGES.parent)
    for sentence, ids in zip(train + valid, shipped.encode_batch(train + valid), strict=True):
        if ids != bpe.encode(sentence).ids or shipped.decode(ids) != sentence:
            raise SystemExit(f"the file and the trainer differ on: {sentence}")
    print(f"{sum(map(len, novels))} chapters, {len(train)} + {len(valid)} sentences, {len(text)} characters")
    for path in (AUSTEN_TEXT, AUSTEN_MERGES):
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
