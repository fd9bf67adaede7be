"""One language-model run: its folder, log and checkpoints, and how its samples are scored and shown."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import checkpoint
from common.batches import Ranks
from common.errors import UserError
from common.files import write_atomic
from common.judge import get_judge
from common.judge.metrics import REAL, Judge, format_table, score_texts, split_real, unigram_entropy
from common.runlog import write_json
from common.text import TextData, load_text, toy_probabilities
from common.textplots import plot_scores
from common.tracked_run import TrackedRun

Generate = Callable[[int], torch.Tensor]  # number of network calls -> token rows (samples, L)


class TextRun(TrackedRun):
    """Writes log, checkpoints and samples to the run folder, from the first process; `step` counts optimizer steps."""

    def __init__(
        self, folder: Path, saved: dict[str, Any] | None, *, stop: checkpoint.StopSignal, args: Mapping[str, Any],
        ranks: Ranks, device: torch.device, data: TextData, judge: Judge | None,
    ) -> None:  # fmt: skip
        """judge: of the first process; the first arguments are those of `TrackedRun`."""
        super().__init__(folder, saved, stop, args)
        self.ranks, self.device, self.data, self.judge = ranks, device, data, judge
        self.total_steps = 0  # to make

    def open_log(self, total_steps: int, weights: int, wandb_project: str, tensorboard: bool) -> None:
        """As `TrackedRun.open_log`, in the first process. weights: how many a checkpoint must hold.

        Raises UserError if the run folder cannot be written or has no room for them, and what `RunLog` raises.
        """
        self.total_steps = total_steps
        if self.ranks.chief:
            checkpoint.check_run_dir(self.folder, 3 * 16 * weights)
            super().open_log(total_steps, wandb_project, tensorboard)

    def stop_requested(self) -> bool:
        """Whether any process was asked to stop."""
        return self.ranks.any(self.stop.requested, self.device)

    def due(self, every: int) -> bool:
        """Whether the step just made is one in `every`, or the last."""
        return self.step % every == 0 or self.step == self.total_steps

    def log_training(self, metrics: Mapping[str, float], speed: Mapping[str, float]) -> None:
        """A line of metrics.jsonl and the progress line."""
        if self.log:
            self.log.log(self.step, {f"train/{k}": v for k, v in metrics.items()} | speed)
            fields = {
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
            shown.append(f"{n:4d} calls: perplexity {perplexity:.1f}, entropy {entropy:.2f}: {sample!r}")
        self.log.log(self.step, metrics)
        self.log.say("\n  ".join([f"step {self.step}: {len(rows)} samples, judge {self.judge.name}", *shown]))

    def evaluate(self, generate: Generate, steps: Sequence[int], samples: int, show: int, tag: str = "") -> None:
        """Print samples and the table of perplexity, entropy and distances; write samples, table and figure.

        tag: part of the files' names, to set another sampler's apart. A stop signal raises Stopped.
        """
        with self.stop.at_once():
            self._evaluate(generate, steps, samples, show, tag)

    def _evaluate(self, generate: Generate, steps: Sequence[int], samples: int, show: int, tag: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        real, reference = split_real(self.data.valid, samples)
        scores, shown = [], []
        for n in (*steps, None):
            label = f"{n} steps" if n else REAL
            rows = generate(n).cpu().numpy() if n else real
            judged, train = self._judged(rows), self.data.train
            scores.append(score_texts(label, rows, judged, self.judge, reference_rows=reference, train_rows=train))
            if self.data.name == "toy":
                shown.append(f"{label}: total variation distance from the language {toy_distance(rows):.3f}")
            texts, file = decode(self.data, rows), self.folder / f"samples_{label.replace(' ', '_')}{tag}.txt"
            write_atomic(file, ("\n----\n".join(texts) + "\n").encode())
            shown += [f"\n{label} ({file}):", *("  " + text.replace("\n", "\n  ") for text in texts[:show])]
        table, name = format_table(scores), f"evaluation_{self.judge.name}{tag}"
        write_atomic(self.folder / f"{name}.md", f"{table}\n".encode())
        write_json(self.folder / f"{name}.json", [asdict(score) for score in scores])
        plot_scores({self.folder.name: scores}, self.folder / f"{name}.png", f"{self.data.name}: {samples} samples")
        print("\n".join([*shown, "", table]), flush=True)

    def _judged(self, rows: np.ndarray) -> list[str]:
        """Texts as the judge is to read them: GPT-2 expects separators as the tokenizer writes them."""
        return decode(self.data, rows, separators=None if self.judge.name.startswith("gpt2") else "\n")


def open_text(name: str, length: int, data_dir: Path, tokenizer: str, tokenizer_path: str, ranks: Ranks) -> TextData:
    """Rows of a corpus, tokenized by the first process. tokenizer_path "": fetched. Raises what `load_text` raises."""
    path = Path(tokenizer_path) if tokenizer_path else None
    return ranks.first(
        lambda: load_text(name, length=length, data_dir=data_dir, tokenizer=tokenizer, tokenizer_path=path)
    )


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
