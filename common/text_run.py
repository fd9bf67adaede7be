"""One language-model run: its processes, data, folder, log and counters, how it is saved, resumed and evaluated."""

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from common import checkpoint
from common.batches import Ranks
from common.judge import get_judge
from common.judge.metrics import REAL, Judge, format_table, score_texts, split_real, unigram_entropy
from common.machine import use_bf16
from common.meter import Meter, products
from common.runlog import Averages, RunLog
from common.start import CHECKPOINT, pick_device
from common.text import load_text, toy_probabilities
from common.textplots import plot_scores, write_scores


class TextRun:
    """Holds everything but the networks and optimizers, which `attach` brings in. Only the first process writes.

    `args` are the flat arguments of the script ({name: value}); this class reads: data, length, data_dir, tokenizer,
    tokenizer_path, device, threads, total_steps, batch, precision, layers, width, seed, log_every, eval_every,
    checkpoint_every, wandb_project, tensorboard, steps, samples, judge, judge_path, show.
    """

    def __init__(
        self, args: Mapping[str, Any], run_dir: Path, stop: checkpoint.StopSignal, saved: dict[str, Any] | None
    ) -> None:
        self.flat, self.dir, self.stop, self.saved = dict(args), run_dir, stop, saved
        a = self.a = SimpleNamespace(**args)
        self.ranks = Ranks.join()
        self.chief = self.ranks.rank == 0
        self.device = pick_device(a.device)
        if a.threads:
            torch.set_num_threads(a.threads)
        torch.set_float32_matmul_precision("high")  # TF32 for the fp32 products of a GPU
        path = Path(a.tokenizer_path) if a.tokenizer_path else None
        load = lambda: load_text(  # noqa: E731
            a.data, length=a.length, data_dir=Path(a.data_dir), tokenizer=a.tokenizer, tokenizer_path=path
        )
        self.data = self.ranks.first(load)  # the others find what the first process built
        self.step, self.averages = 0, Averages()

    def attach(self, net: nn.Module, parts: Mapping[str, Any], forwards: float = 0.0) -> None:
        """Begin training `net`. parts: what a checkpoint holds, {name: module or optimizer}; restored on a resume.

        forwards: passes over a batch without gradients in a step, beside the one with; only to measure speed.
        """
        a, saved, self.parts = self.a, self.saved, parts
        bytes_needed = 3 * 16 * sum(p.numel() for p in net.parameters())
        if self.chief:
            checkpoint.check_run_dir(self.dir, bytes_needed)
            _ = self.judge  # one that cannot be had is said before training
        if saved:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            self.step = saved["step"]
            self.averages.load_state_dict(saved["averages"], self.device)
        if self.chief:
            self.log = RunLog(
                self.dir,
                total_steps=a.total_steps,
                wandb_project=a.wandb_project,
                tensorboard=a.tensorboard,
                resume_bytes=saved["log"] if saved else None,
                args=self.flat,
            )
        bf16, attention = use_bf16(a.precision, self.device), a.layers * a.length * a.width
        self.meter = Meter(a.batch * a.length, products(net), attention, self.ranks.world, bf16, self.device, forwards)
        self.saved = None

    def running(self) -> bool:
        """Whether to make another step: not finished, no process asked to stop."""
        return self.step < self.a.total_steps and not self.ranks.any(self.stop.requested, self.device)

    def count(self, metrics: Mapping[str, torch.Tensor]) -> None:
        """After a step: its metrics. Logs and saves when due; a value that is not finite ends the run with a dump."""
        a = self.a
        self.averages.add(dict(metrics))
        self.step, self.meter.steps = self.step + 1, self.meter.steps + 1
        if self.due(a.log_every):
            means, speed = self.ranks.mean(self.averages.take(), self.device), self.meter.take()
            if bad := [k for k, v in means.items() if not math.isfinite(v)]:
                self.save("nonfinite.pt")
                sys.exit(f"stopped at step {self.step}: {', '.join(bad)} not finite; see {self.dir / 'nonfinite.pt'}")
            if self.chief:
                self.log.log(self.step, {f"train/{k}": v for k, v in means.items()} | speed)
                self.log.progress(self.step, {"loss": f"{means['loss']:.3f}"} | self.meter.text(speed))
        if self.due(a.checkpoint_every):
            self.save()

    def due(self, every: int) -> bool:
        """Whether the step just made is one in `every`, or the last."""
        return self.step % every == 0 or self.step == self.a.total_steps

    def note(self, metrics: Mapping[str, float], text: str) -> None:
        """Log and print; only in the first process."""
        if self.chief:
            self.log.log(self.step, dict(metrics))
            self.log.say(f"step {self.step}: {text}")

    def save(self, name: str = CHECKPOINT) -> None:
        if self.chief:
            state = {
                "args": {k: list(v) if isinstance(v, tuple) else v for k, v in self.flat.items()},
                "step": self.step,
                "averages": self.averages.state_dict(),
                "log": self.log.position(),
                "tokenizer": self.data.tokenizer.name,
                "vocab_size": self.data.tokenizer.vocab_size,
            }
            checkpoint.save(self.dir / name, state | {k: part.state_dict() for k, part in self.parts.items()})

    def close(self) -> None:
        if hasattr(self, "log"):
            self.log.close()
        self.ranks.leave()

    def texts(self, rows: np.ndarray, literal: bool = False) -> list[str]:
        """rows (n, L) -> n texts; literal: separators as the tokenizer writes them, which GPT-2 judges expect."""
        separators = None if literal else "\n"
        return [self.data.tokenizer.decode(row, separators=separators) for row in rows.tolist()]

    def training_texts(self) -> Iterator[str]:
        """The training split without the cuts between rows, some thousand tokens at a time."""
        rows = self.data.train
        for i in range(0, len(rows), 512):
            part = rows[i : i + 512]
            yield from self.texts(part) if self.data.name == "toy" else self.texts(part[:, 1:-1].reshape(1, -1))

    @cached_property
    def judge(self) -> Judge:
        a = self.a
        path = Path(a.judge_path) if a.judge_path else None
        texts = self.training_texts()
        return get_judge(a.judge, data_dir=Path(a.data_dir), train_texts=texts, path=path, device=self.device)

    def judged(self, rows: np.ndarray) -> list[str]:
        """Texts as the judge is to read them."""
        return self.texts(rows, literal=self.a.judge.startswith("gpt2"))

    def glance(self, generate: Callable[[int], torch.Tensor], steps: Sequence[int]) -> None:
        """During training: perplexity, entropy and one sample at each number of steps, logged and printed."""
        metrics, shown = {}, []
        for n in steps:
            rows = generate(n).cpu().numpy()
            perplexity = self.judge.perplexity(self.judged(rows), max_length=rows.shape[1])
            metrics |= {f"eval/perplexity_{n}": perplexity, f"eval/entropy_{n}": unigram_entropy(rows)}
            entropy = metrics[f"eval/entropy_{n}"]
            shown.append(f"{n:4d} calls: perplexity {perplexity:.1f}, entropy {entropy:.2f}: {self.texts(rows)[0]!r}")
        self.note(metrics, "\n  ".join([f"{len(rows)} samples, judge {self.judge.name}", *shown]))

    def evaluate(self, generate: Callable[[int], torch.Tensor], tag: str = "") -> None:
        """Print samples and the table of perplexity, entropy and distances; write samples, table and figure.

        generate(steps) gives token rows (samples, L); tag sets the files of another sampler apart.
        """
        a, data = self.a, self.data
        self.dir.mkdir(parents=True, exist_ok=True)
        real, reference = split_real(data.valid, a.samples)
        makers = {f"{n} steps": lambda n=n: generate(n).cpu().numpy() for n in a.steps}
        scores, shown = [], []
        for label, make in (makers | {REAL: lambda: real}).items():
            rows = make()
            texts = self.texts(rows)
            score = score_texts(
                label, rows, self.judged(rows), self.judge, reference_rows=reference, train_rows=data.train
            )
            scores.append(score)
            if data.name == "toy":
                shown.append(f"{label}: total variation distance from the language {toy_distance(rows):.3f}")
            file = self.dir / f"samples_{label.replace(' ', '_')}{tag}.txt"
            file.write_text("\n----\n".join(texts) + "\n")
            shown += [f"\n{label} ({file}):", *("  " + text.replace("\n", "\n  ") for text in texts[: a.show])]
        table, name = format_table(scores), f"evaluation_{a.judge}{tag}"
        (self.dir / f"{name}.md").write_text(table + "\n")
        write_scores(self.dir / f"{name}.json", scores)
        plot_scores({self.dir.name: scores}, self.dir / f"{name}.png", f"{data.name}: {a.samples} samples")
        print("\n".join([*shown, "", table]), flush=True)


def toy_distance(rows: np.ndarray) -> float:
    """Total variation distance of the sampled sentences (n, L) from the toy language's probabilities."""
    counts, language = Counter(map(tuple, rows.tolist())), toy_probabilities()
    sentences = counts.keys() | language.keys()
    return 0.5 * sum(abs(counts[s] / len(rows) - language.get(s, 0.0)) for s in sentences)
