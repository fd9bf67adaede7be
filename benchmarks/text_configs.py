"""The comparison of language models: data, methods, and the samplers that each is measured with."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import plots
from runs import ROOT, RUNS

STORE = ROOT / "benchmarks" / "text_peers"
SEEDS = (1, 2, 3)
TUNED_ON = 4  # a seed outside the comparison
DATA = {  # learning rates that are tried
    "toy": ("1.5e-3", "3e-3", "6e-3"), "captions": ("1e-3", "2e-3", "4e-3"), "austen": ("1e-3", "2e-3", "4e-3"),
}  # fmt: skip
CALLS = (1, 2, 4, 8, 16, 32, 128)  # of the network; students and the coarse part of a grid: without the last
JUDGED = (1, 4, 8, 32)  # those of a further judge
SHOWN = (1, 8, 32)  # those whose frontiers are drawn
TUNED_AT = 32  # calls in which a rate of FLM is judged, as it has no likelihood


@dataclass(frozen=True)
class Method:
    """One curve: its title, script and flags; a student's teacher, and the flag that takes its run."""

    title: str
    script: str
    flags: tuple[str, ...] = ()
    teacher: str = ""
    taken_by: str = "--distill"


METHODS = {  # teachers first
    "ar": Method("AR", "baselines/ar.py"),
    "mdlm": Method("MDLM", "baselines/mdlm.py"),
    "duo": Method("Duo", "baselines/duo.py"),
    "flm": Method("FLM", "flm_train.py"),
    "fmlm": Method("FMLM", "fmlm_distill.py", teacher="flm", taken_by="--teacher"),
    "sdtt": Method("SDTT", "baselines/mdlm.py", teacher="mdlm"),
    "imdm": Method("IMDM", "baselines/mdlm.py", ("--random-mask",), teacher="mdlm"),
    "dcd": Method("DCD", "baselines/duo.py", teacher="duo"),
}
COLOURS = dict(zip(METHODS, ("black", *plots.PALETTE[1:4], "tab:orange", *plots.PALETTE[4:7]), strict=True))
TEACHERS = tuple(method for method, m in METHODS.items() if not m.teacher)
TIMED = TEACHERS[:-1]  # run with FLM's seconds too
# (data, teacher) -> rate that `tune` chose, where it is not the default
TUNED: dict[tuple[str, str], str] = {}
Job = tuple[str, str, int, str]  # data, method, seed, and: "" equal tokens, "seconds", or a rate that is tried


def name_of(data: str, method: str, seed: int, kind: str = "") -> str:
    return f"{data}_{method}{kind and f'_{kind}'}_s{seed}"


def folder_of(*job: Any) -> Path:
    return RUNS / f"text_{name_of(*job)}"


def grid(data: str, method: str) -> dict[str, tuple[str, ...]]:
    """{tag: flags} of the samplers of a method; the tag is in the names of an evaluation's files, "" a run's own.

    The law of the toy language is known, so that there nothing is traded: each method as it is.
    """
    if data == "toy":
        return {"": ()}
    if method == "flm":
        found = {f"_euler_t{t}" * (t != "0.55"): ("--temperature", t) for t in ("0.4", "0.55", "0.7", "0.85", "1")}
        bridge = {f"_bridge_t{t}_p1": ("--sampler", "bridge", "--temperature", t) for t in ("0.55", "0.7", "1")}
        return found | bridge
    if method == "fmlm":
        return {
            f"_gamma{g}" * (g != "0") + f"_t{t}" * (t != "1"): ("--gamma", g, "--temperature", t)
            for g, t in product(("0", "0.5", "1"), ("0.8", "1", "1.25"))
        }
    temperatures = ("0.8", "1", "1.2", "1.4") if METHODS[method].teacher else ("0.7", "0.8", "0.9", "1", "1.1")
    nuclei = ("0.9", "0.95", "1") if method == "ar" else ("0.9", "1")
    found = {
        f"_t{t}_p{p}" * ((t, p) != ("1", "1")): ("--temperature", t, "--top-p", p)
        for t, p in product(temperatures, nuclei)
    }
    own = {"dcd": {"_t1_p1_greedy": ("--greedy-tail",)}, "imdm": {"_t1_p1_kept": ("--keep-noise",)}}
    return found | own.get(method, {})


def calls_of(method: str, tag: str = "", judge: str = "ngram") -> tuple[int, ...]:
    """Numbers of network calls at which a sampler is measured, but for AR, which has no choice."""
    coarse = METHODS[method].teacher or "_p0" in tag or "bridge" in tag
    calls = CALLS[:-1] if coarse else CALLS
    return tuple(n for n in calls if judge == "ngram" or n in JUDGED)
