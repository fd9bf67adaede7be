"""One language-model run: its folder, log and checkpoints, and how its samples are scored and shown."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common import checkpoint
from common.batches import Ranks
from common.errors import UserError, first_line
from common.files import write_atomic
from common.judge import get_judge
from common.judge.metrics import REAL, Judge, format_table, score_texts, split_real, unigram_entropy
from common.runlog import counted, write_json
from common.text import TextData, load_text, toy_probabilities
from common.textplots import plot_scores
from common.tracked_run import TrackedRun

Generate = Callable[[int], torch.Tensor]  # number of network calls -> token rows (samples, L)


class TextRun(TrackedRun):
    """Writes log, checkpoints and samples to the run folder, from the first process; `step` counts optimizer steps."""

    def __init__(
        self, folder: Path, saved: dict[str, Any] | None, *, args: Mapping[str, Any], ranks: Ranks,
        device: torch.device, data: TextData, judge: Judge | None,
    ) -> None:  # fmt: skip
        """judge: of the first process; the first arguments are those of `TrackedRun`.

        Raises UserError if the data are not encoded as they were when the checkpoint was made.
        """
        super().__init__(folder, saved, checkpoint.StopSignal(), args)
        self.ranks, self.device, self.data, self.judge = ranks, device, data, judge
        self.total_steps = 0  # to make
        check_encoding(saved or {}, data, folder)
        self.parts["encoding"] = data.tokenizer.sha256

    def open_log(self, total_steps: int, weights: int, wandb_project: str, tensorboard: bool) -> None:
        """As `TrackedRun.open_log`, in the first process. weights: how many a checkpoint must hold.

        Raises UserError if the run folder cannot be written or has no room for them, the data are less than a batch,
        and what `RunLog` raises.
        """
        self.total_steps = total_steps
        if (batch := self.args["batch"]) > (rows := len(self.data.train)):
            raise UserError(
                f"--batch {batch}: {self.data.name} has only {rows} rows to train on; give a smaller --batch or "
                "--length, or more text"
            )

        def make() -> None:
            checkpoint.check_run_dir(self.folder, 3 * 16 * weights)
            super(TextRun, self).open_log(total_steps, wandb_project, tensorboard)
            self._introduce(weights)

        self.ranks.by_chief(make, self.device)

    def _introduce(self, weights: int) -> None:
        a, data, (rows, length) = self.args, self.data, self.data.train.shape
        about = {
            "corpus": f"{data.name}, seed {a['seed']}; {rows:,} rows of {length} tokens ({rows * length:,}), "
            f"{len(data.valid):,} held out",
            "network": f"{weights:,} parameters, vocabulary {data.tokenizer.vocab_size:,}",
        }
        during = counted(-(-self.total_steps // a["eval_every"]), "evaluation")
        rest = f"{counted(a['batch'], 'row')} each; {during}, then one of {counted(a['samples'], 'sample')}"
        self.introduce(self.device, about, self.total_steps, rest)

    def save(self) -> None:
        self.ranks.by_chief(super().save, self.device)

    def say(self, text: str) -> None:
        """Print a line, in the first process."""
        if self.ranks.chief:
            print(text, flush=True)

    def stop_requested(self) -> bool:
        """Whether any process was asked to stop while it trained."""
        return self.ranks.any(self.stop.requested, self.device)

    def due(self, every: int) -> bool:
        """Whether the step just made is one in `every`, or the last."""
        return self.step % every == 0 or self.step == self.total_steps

    def log_training(self, metrics: Mapping[str, float], speed: Mapping[str, float]) -> None:
        """A line of metrics.jsonl and the progress line."""
        if self.log:
            self.log.log(self.step, {f"train/{k}": v for k, v in metrics.items()} | speed)
            fields = {  # the last ones are left out where a line is too short for them
                "loss": f"{metrics['loss']:.3f}",
                "tokens/s": f"{speed['time/tokens_per_second']:,.0f}",
                "MFU": f"{speed['time/mfu']:.0%}",
                "memory": f"{speed['time/memory_gib']:.1f} GiB",
            }
            self.log.progress(self.step, fields)

    def log_validation(self, metrics: Mapping[str, float]) -> None:
        """A line of metrics.jsonl; the first value is printed too."""
        self.log.log(self.step, dict(metrics))
        name, value = next(iter(metrics.items()))
        self.log.say(f"step {self.step}: {name} {value:.3f}")

    def log_samples(self, generate: Generate, steps: Sequence[int]) -> None:
        """Log perplexity and entropy of samples in each number of network calls; print these and one sample each."""
        metrics, shown = {}, []
        for n in steps:
            rows = generate(n).cpu().numpy()
            perplexity = self.judge.perplexity(self._judged(rows), max_length=rows.shape[1])
            entropy = unigram_entropy(rows)
            metrics |= {f"eval/perplexity_{n}": perplexity, f"eval/entropy_{n}": entropy}
            sample = decode(self.data, rows[:1])[0]
            shown.append(f"{n:4d} call{'s' * (n > 1)}: perplexity {perplexity:.1f}, entropy {entropy:.2f}: {sample!r}")
        self.log.log(self.step, metrics)
        about = f"step {self.step}: {counted(len(rows), 'sample')}, judge {self.judge.name}"
        self.log.say("\n  ".join([about, *shown]))

    def evaluate(self, generate: Generate, steps: Sequence[int], samples: int, show: int, tag: str = "") -> None:
        """Print samples and the table of perplexity, entropy and distances; write samples, table and figure.

        tag: part of the files' names, to set another sampler's apart. An earlier evaluation is not overwritten: this
        one goes to the folder evaluation-2, -3, ..., with its arguments.
        """
        table_name, folder = f"evaluation_{self.judge.name}{tag}", self.folder
        if (folder / f"{table_name}.json").exists():
            folder = next(path for n in count(2) if not (path := self.folder / f"evaluation-{n}").exists())
            write_json(folder / "args.json", self.args)
        real, reference = split_real(self.data.valid, samples)
        if len(real) < samples:
            print(f"note: real text has only {counted(len(real), 'row')}: --samples {len(real)} compares equal numbers")
        scores, shown = [], []
        for n in (*steps, None):
            label = f"{n} steps" if n else REAL
            rows = generate(n).cpu().numpy() if n else real
            judged, train = self._judged(rows), self.data.train
            scores.append(score_texts(label, rows, judged, self.judge, reference_rows=reference, train_rows=train))
            if self.data.name == "toy":
                shown.append(f"{label}: total variation distance from the language {toy_distance(rows):.3f}")
            texts, file = decode(self.data, rows), folder / f"samples_{label.replace(' ', '_')}{tag}.txt"
            write_atomic(file, ("\n----\n".join(texts) + "\n").encode())
            shown += [f"\n{label} ({file}):", *("  " + text.replace("\n", "\n  ") for text in texts[:show])]
        table = format_table(scores)
        write_atomic(folder / f"{table_name}.md", f"{table}\n".encode())
        write_json(folder / f"{table_name}.json", [asdict(score) for score in scores])
        plot_scores({self.folder.name: scores}, folder / f"{table_name}.png", f"{self.data.name}: {samples} samples")
        files = f"table, numbers, figure: {folder / table_name}.md, .json, .png"
        print("\n".join([*shown, "", table, "", files]), flush=True)

    def _judged(self, rows: np.ndarray) -> list[str]:
        """Texts as the judge is to read them: GPT-2 expects separators as the tokenizer writes them."""
        return decode(self.data, rows, separators=None if self.judge.name.startswith("gpt2") else "\n")


def open_text(name: str, length: int, data_dir: Path, tokenizer: str, tokenizer_path: str, ranks: Ranks) -> TextData:
    """Rows of a corpus; call it before the processes join, some then wait long while one tokenizes.

    tokenizer_path "": fetched. Raises what `load_text` raises.
    """
    path = Path(tokenizer_path) if tokenizer_path else None
    data = load_text(name, length=length, data_dir=data_dir, tokenizer=tokenizer, tokenizer_path=path)
    if data.note and ranks.chief:
        print(data.note, flush=True)
    return data


def check_encoding(saved: Mapping[str, Any], data: TextData, folder: Path | str) -> None:
    """Raises UserError if the checkpoint was made with another encoding: of another tokenizer, or of changed text."""
    if saved.get("encoding", data.tokenizer.sha256) != data.tokenizer.sha256:
        raise UserError(
            f"{folder} was trained on another encoding of {data.name} (sha256 {saved['encoding'][:12]}..., here "
            f"{data.tokenizer.sha256[:12]}...); give its --tokenizer, restore the text, or train anew"
        )


def saved_args(saved: Mapping[str, Any], run: str, names: Iterable[str], expected: Mapping[str, Any]) -> dict[str, Any]:
    """These arguments of a run's checkpoint. Raises UserError if it lacks one, or has an expected one otherwise."""
    args = saved.get("args", {})
    if missing := [name for name in names if name not in args]:
        raise UserError(f"{run} was trained without --{missing[0].replace('_', '-')}: give a run of flm_train.py")
    if other := [name for name, value in expected.items() if args.get(name, value) != value]:
        raise UserError(f"{run} was trained with --{other[0]} {args[other[0]]}: give a run of flm_train.py")
    return {name: args[name] for name in names}


def load_averaged(net: nn.Module, saved: Mapping[str, Any], data: TextData, run: str) -> None:
    """The averaged weights of a run's checkpoint. Raises UserError if they do not fit `net` or the data."""
    check_encoding(saved, data, run)
    try:
        net.load_state_dict(saved["ema"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{run} holds no weights of this network ({first_line(error)}); give a run of the right script"
        ) from error


def check_fit(
    space: str, vocab: int, width: int, heads: int, batch: int, processes: int, steps: Sequence[int]
) -> None:  # fmt: skip
    """Raises UserError on sizes that do not fit each other, and on numbers of network calls below 1."""
    if space == "embedding" and vocab <= width:
        raise UserError(f"--space embedding needs a vocabulary larger than --width ({vocab} <= {width}); use onehot")
    if width % heads or width // heads % 2:
        raise UserError(f"--width {width} must be an even multiple of --heads {heads}")
    if batch % processes:
        raise UserError(f"--batch {batch} must be a multiple of the {processes} processes")
    if min(steps, default=1) < 1:
        raise UserError(f"--steps {min(steps)}: a text needs at least 1 network call")


def load_judge(name: str, path: str, data: TextData, data_dir: Path, device: torch.device) -> Judge:
    """The judge of a run; an n-gram judge learns from the training split. Raises what `get_judge` raises."""
    file = Path(path) if path else None
    return get_judge(name, data_dir=data_dir, train_texts=_training_texts(data), path=file, device=device)


def _training_texts(data: TextData) -> Iterator[str]:
    """The training split without the cuts between rows, some thousand tokens at a time."""
    for i in range(0, len(data.train), 512):
        part = data.train[i : i + 512]
        yield from decode(data, part if data.name == "toy" else part[:, 1:-1].reshape(1, -1))


def decode(data: TextData, rows: np.ndarray, separators: str | None = "\n") -> list[str]:
    """rows (n, L) -> n texts; separators: what stands for them, None: as the tokenizer writes them."""
    return [data.tokenizer.decode(row, separators=separators) for row in rows.tolist()]


def toy_distance(rows: np.ndarray) -> float:
    """Total variation distance of the sampled sentences (n, L) from the toy language's probabilities."""
    counts, language = Counter(map(tuple, rows.tolist())), toy_probabilities()
    sentences = counts.keys() | language.keys()
    return 0.5 * sum(abs(counts[s] / len(rows) - language.get(s, 0.0)) for s in sentences)
