"""FLM and FMLM on captions, beside the published samples of the text-GAN literature: runs, BLEU and self-BLEU.

python benchmarks/captions.py run               # resumable; about 20 minutes a seed on two cores
python benchmarks/captions.py store             # keep the finished runs and their samples in captions/runs.jsonl.gz
python benchmarks/captions.py published FOLDER  # score Texygen's sample files (docs/instances of its repository)
python benchmarks/captions.py report            # captions/results.md from captions/ alone

BLEU-n as Texygen (arXiv 1802.01886) has it: mean over samples of BLEU against all held-out captions at once, "method 1"
smoothing; self-BLEU the same of each sample against all others. Texygen's own tables take fewer references in places,
so its published samples are scored here by the same functions, on equal numbers of captions.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import flm
import runs
from common.files import write_atomic
from common.judge.metrics import REAL, bleu, self_bleu
from common.judge.ngram import words
from common.text import load_text
from common.text.corpora import captions
from common.text_run import decode
from runs import ROOT, RUNS

STORE = ROOT / "benchmarks" / "captions"
SEEDS = (1, 2, 3)
ORDERS = (2, 3, 4, 5)
SIZE = 500  # captions that are scored, of the samples and of the published files
SAMPLES = 1_024  # rows drawn for them: two to three captions each, of which the cut ones do not count
PUBLISHED = {  # file of Texygen's repository -> name
    "seq": "SeqGAN", "maligan": "MaliGAN", "rank": "RankGAN", "leakgan": "LeakGAN", "textgan": "TextGAN", "mle": "MLE",
}  # fmt: skip
SHORT = (  # run, title and text of the lines of the short table
    ("flm", "FLM, 32 calls", "32 steps"),
    ("fmlm", "FMLM, one call", "1 steps"),
    ("fmlm", "FMLM, eight calls", "8 steps"),
    ("flm", "held-out captions", REAL),
)
SHORT_PUBLISHED = ("training captions, from packed rows", "SeqGAN", "LeakGAN", "MLE")
TEXYGEN = "3104e22ac75f3cc2070da2bf5e2da6d2bef149ad"  # the commit of those files


def whole_captions(texts: Sequence[str]) -> list[list[str]]:
    """Words of the captions that no edge of a row has cut: all lines of a text but its first and last."""
    lines = (line for text in texts for line in text.strip("\n").split("\n")[1:-1])
    return [found for line in lines if (found := words(line))]


def score(rows: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    """BLEU and self-BLEU of the first SIZE captions, by order."""
    some = rows[:SIZE]
    return {
        "bleu": [bleu(some, references, n) for n in ORDERS],
        "self": [self_bleu(some, n) for n in ORDERS],
        "captions": [float(len(some))],
    }


def references(data_dir: Path) -> tuple[list[list[str]], list[list[str]]]:
    """Words of the captions for training and of the held-out ones."""
    return tuple([words(text) for text in texts] for texts in captions(data_dir / "captions"))


def run() -> None:
    for seed in SEEDS:
        flags = ["--seed", str(seed)]
        pair = (f"captions_flm_s{seed}", f"captions_fmlm_s{seed}")
        teacher = ["--teacher", f"runs/{pair[0]}"]
        for script, name, more in (
            ("flm_train.py", pair[0], ["--data", "captions"]),
            ("fmlm_distill.py", pair[1], teacher),
        ):
            if runs.execute(script, name, [*flags, *more]):
                raise SystemExit(f"{name} failed: see {RUNS / name}.txt")


def results(folder: Path) -> dict[str, object]:
    """Tables of a run's evaluations, its first samples, and BLEU of the samples of every number of calls."""
    held_out = references(ROOT / "data")[1]
    scores = {
        file.stem.removeprefix("samples_"): score(
            whole_captions(file.read_text().removesuffix("\n").split("\n----\n")), held_out
        )
        for file in sorted(folder.glob("samples_*_steps*.txt"))
    }
    return flm.results(folder) | {"bleu.json": scores}


def store() -> None:
    names = [f"captions_{kind}_s{seed}" for kind in ("flm", "fmlm") for seed in SEEDS]
    runs.keep(STORE, {name: RUNS / name for name in names}, results)


def published(folder: Path) -> None:
    """Scores Texygen's sample files and real captions, whole ones and those that packed rows leave whole."""
    train, held_out = references(ROOT / "data")
    found = {"training captions": score(train, held_out)}
    data = load_text("captions", length=32, data_dir=ROOT / "data")
    found["training captions, from packed rows"] = score(whole_captions(decode(data, data.train[:SAMPLES])), held_out)
    for file, name in PUBLISHED.items():
        found[name] = score([words(line) for line in (folder / f"{file}.txt").read_text().splitlines()], held_out)
    write_atomic(STORE / "published.json", (json.dumps(found, indent=1) + "\n").encode())


def row(name: str, scores: dict[str, list[float]]) -> tuple[str, ...]:
    numbers = (" / ".join(f"{x:.3f}" for x in scores[kind]) for kind in ("bleu", "self"))
    return (name, *numbers, f"{scores['captions'][0]:.0f}")


def bleu_table() -> str:
    """Samples of every run and number of calls, and the published ones."""
    found = runs.read(STORE)
    lines = []
    for kind, title in (("flm", "FLM"), ("fmlm", "FMLM")):
        for seed in SEEDS:
            if stored := found.get(f"captions_{kind}_s{seed}"):
                for text, scores in stored.files["bleu.json"].items():
                    lines.append(row(f"{title}, {text.replace('_', ' ')}, seed {seed}", scores))
    file = STORE / "published.json"
    lines += [row(name, scores) for name, scores in (json.loads(file.read_text()) if file.exists() else {}).items()]
    orders = ", ".join(map(str, ORDERS))
    head = f"| text | BLEU-{orders} | self-BLEU-{orders} | captions |"
    return runs.table(head, "|---|---|---|---:|", lines)


def score_table() -> str:
    """Perplexity, entropy and copied 8-grams, a line a seed."""
    lines = []
    for kind, title in (("flm", "FLM"), ("fmlm", "FMLM")):
        for seed, stored in runs.read_seeds(STORE, f"captions_{kind}", SEEDS).items():
            for s in flm.read_scores(stored, "ngram"):
                name = s.text if s.text == REAL else f"{title}, {s.text}"
                cells = (f"{s.perplexity:.1f}", f"{s.entropy:.3f}", f"{s.self_bleu:.3f}", f"{s.copied:.2%}")
                lines.append((name, seed, *cells))
    head = "| text | seed | perplexity (ngram) | entropy | self-BLEU-4 of rows | copied 8-grams |"
    return runs.table(head, "|---|---:|---:|---:|---:|---:|", lines)


def short_table() -> str:
    """Means over seeds of a few numbers of calls, and the published samples."""
    lines = []
    for kind, title, calls in SHORT:
        stored = runs.read_seeds(STORE, f"captions_{kind}", SEEDS).values()
        scores = [s for run in stored for s in flm.read_scores(run, "ngram") if s.text == calls]
        bleus = [scored for run in stored if (scored := run.files["bleu.json"].get(calls.replace(" ", "_")))]
        if not scores:
            continue
        each = ", ".join(f"{s.perplexity:.0f}" for s in (scores[:1] if calls == REAL else scores))
        entropy, copied = np.mean([(s.entropy, s.copied) for s in scores], 0)
        mean = {kind: np.mean([scored[kind] for scored in bleus], 0) for kind in (bleus[0] if bleus else ())}
        lines.append((title, each, f"{entropy:.3f}", f"{copied:.2%}", *(row(title, mean)[1:3] if mean else "--")))
    file = STORE / "published.json"
    for name, scores in (json.loads(file.read_text()) if file.exists() else {}).items():
        if lines and name in SHORT_PUBLISHED:
            lines.append((name, "-", "-", "-", *row(name, scores)[1:3]))
    orders = ", ".join(map(str, ORDERS))
    head = f"| text | perplexity (ngram), each seed | entropy | copied 8-grams | BLEU-{orders} | self-BLEU-{orders} |"
    return runs.table(head, "|---|---|---:|---:|---|---|", lines)


def tables() -> dict[str, str]:
    """Those that have lines."""
    found = {"captions/short": short_table(), "captions/scores": score_table(), "captions/bleu": bleu_table()}
    return {name: table for name, table in found.items() if table.count("\n") > 1}


def report() -> None:
    text = [
        "# FLM and FMLM on captions: stored results",
        "",
        f"Made by `python benchmarks/captions.py report`. {SIZE} captions a line where there are as many. Published "
        f"samples: Texygen's repository at {TEXYGEN[:7]}, the first {SIZE} of each file.",
        *(f"\n{table}" for table in tables().values()),
    ]
    (STORE / "results.md").write_text("\n".join(text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "store", "published", "report"))
    parser.add_argument("folder", type=Path, nargs="?", help="of Texygen's sample files")
    args = parser.parse_args()
    STORE.mkdir(exist_ok=True)
    if args.what == "published":
        published(args.folder)
    else:
        {"run": run, "store": store, "report": report}[args.what]()


if __name__ == "__main__":
    main()
