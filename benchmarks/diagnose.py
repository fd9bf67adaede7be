"""Inside a run of the study: are the critics right, and where does the policy still vary?

python benchmarks/diagnose.py run --env lift --configs ogpo+ca bptt  # after `study.py run` has made the cloned policy
python benchmarks/diagnose.py dip --env lift --configs start+ start+ca ogpo+ ogpo+ca lr_warmup --seeds 1 2 3
python benchmarks/diagnose.py report          # study/diagnostics.md, diagnostics.png and dip.png from the stored JSON

A run is stopped at several step counts, and its checkpoint is asked at each (20 episodes of the acting policy):

Q against return     Q of every decision (mean over the target heads) beside the discounted reward that followed; an
                     episode cut by the time limit goes on with the value of never succeeding, a bound from below
variance of actions  64 chains at each of 200 visited states: variance along the gradient of Q with respect to the
                     action, and per direction across it; consensus is the mean cosine between the heads' gradients

`dip` stops a run 500 updates after its actor first moved, and asks the actor before that and on the way: success of the
noise-free policy over 50 episodes, always the same. `study.py report` judges the lowest (measure *early*).
"""

import argparse
import os
import shutil
import sys

import numpy as np
from matplotlib.figure import Figure

import plots
import runs
import study_stats as stats
from common.runlog import write_json
from runs import ROOT, RUNS, Run
from study import cloned, common_flags
from study_configs import ALONE, CONFIGS, SEEDS

STEPS = {"lift": (0, 3_000, 4_000, 6_000, 8_000, 12_000), "can": (0, 4_000, 8_000, 12_000, 20_000)}


def run_flags(env: str, config: str, seed: int) -> list[str]:
    start = str(cloned(env, seed).relative_to(ROOT))
    return [*common_flags(env, config, seed), *CONFIGS[config].flags, "--eval-episodes", "20", "--cloned", start]


def run(env: str, config: str, seed: int) -> int:
    """Exit code of a run that is stopped at every step count of STEPS and asked."""
    import probes  # with torch and the scripts, which a report does without

    name, script = f"diagnose_{env}_{config}_s{seed}", probes.module(config)
    folder, points = RUNS / name, []
    shutil.rmtree(folder, ignore_errors=True)  # its early checkpoints are gone: always from the start
    for steps in STEPS[env]:
        flags = [*run_flags(env, config, seed), "--eval-every", "2000", "--total-steps", str(steps)]
        (folder / "wall_seconds").unlink(missing_ok=True)
        if code := runs.execute(CONFIGS[config].script, name, flags, resume=["--total-steps", str(steps)]):
            return code
        agent, args = probes.load(script, folder)
        found = probes.rollouts(script, agent, args)
        point = {"step": steps, "q": found["q"].tolist(), "return": found["return"].tolist()}
        point |= {"success": float(found["success"].mean())} | probes.spread(script, agent, args, found["obs"])
        points.append(point)
        print(f"{name} at {steps}: success {point['success']:.2f}", flush=True)
    runs.keep(stats.STORE, {name: folder}, lambda _: {"diagnostics.json": points})
    return 0


def dip(env: str, config: str, seed: int) -> int:
    """0 if the run's actor made the updates after which it is asked; their success is stored then."""
    import probes

    name = f"{env}_{config}_s{seed}"
    flags = [*run_flags(env, config, seed), "--eval-every", "1000000"]
    found = probes.dip(probes.module(config), f"dip_{name}", flags)
    if probes.AFTER[-1] not in found:
        return 1
    dips = stats.read_dips() | {name: {str(updates): rate for updates, rate in found.items()}}
    write_json(stats.STORE / "dip.json", dict(sorted(dips.items())))
    return 0


def diagnosed() -> dict[str, Run]:
    """{TASK_CONFIG_sSEED: run} of the stored diagnostics."""
    found = runs.read(stats.STORE).items()
    return {name.removeprefix("diagnose_"): run for name, run in found if name.startswith("diagnose_")}


def dips() -> dict[tuple[str, str], dict[int, dict[str, float]]]:
    """{(task, configuration): {seed: {updates of the actor: success}}}"""
    found = stats.read_dips()
    by_seed = {
        (env, config): {seed: found[name] for seed in SEEDS if (name := f"{env}_{config}_s{seed}") in found}
        for env in STEPS
        for config in CONFIGS
    }
    return {key: rows for key, rows in by_seed.items() if rows}


def critics_table() -> str:
    """Q against return, and the variance of the action, at every step count."""
    lines = []
    for name, run in diagnosed().items():
        for point in run.files["diagnostics.json"]:
            q, returns = np.array(point["q"]), np.array(point["return"])
            along, across = np.mean(point["along"]), np.mean(point["across"])
            correlation = np.corrcoef(q, returns)[0, 1] if q.std() > 0 and returns.std() > 0 else float("nan")
            cells = (f"{point['step']:,}", f"{point['success']:.2f}", f"{q.mean():.1f}", f"{returns.mean():.1f}")
            cells += (f"{correlation:.2f}", f"{along:.2e}", f"{across:.2e}", f"{along / across:.2f}")
            lines.append((name, *cells, f"{np.mean(point['consensus']):.2f}"))
    return runs.table(
        "| run | step | success | mean Q | mean return | correlation | variance along | across | ratio | consensus |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        lines,
    )


def dip_tables() -> dict[str, str]:
    """{task: success over the first updates of the actor, all seeds in a cell, a column a configuration}"""
    found: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
    for (env, config), by_seed in dips().items():
        found.setdefault(env, {})[CONFIGS[config].title] = by_seed
    return {
        env: runs.table(
            f"| {env}, updates | {' | '.join(by_title)} |",
            "|---|" + "---|" * len(by_title),
            [
                (n, *(" ".join(f"{row[n]:.2f}" for row in by_seed.values()) for by_seed in by_title.values()))
                for n in next(iter(next(iter(by_title.values())).values()))
            ],
        )
        for env, by_title in found.items()
    }


def tables() -> dict[str, str]:
    return {"diagnostics/critics": critics_table()} | {f"dip/{env}": table for env, table in dip_tables().items()}


def report() -> None:
    text = [
        "# Diagnostics: stored results",
        "",
        "Made by `python benchmarks/diagnose.py report`. Q against return: over all decisions of 20 episodes. "
        "Variance: mean over states, in squared units of the action range, per direction.",
        "",
        critics_table(),
        "",
        f"Success of the noise-free policy over {stats.DIP_EPISODES} episodes after so many updates of the actor, by "
        "seed (0: the cloned policy):",
        *(f"\n{table}" for table in dip_tables().values()),
    ]
    (stats.STORE / "diagnostics.md").write_text("\n".join(text) + "\n")
    plot_critics().savefig(stats.STORE / "diagnostics.png", dpi=110)
    plot_dip().savefig(stats.STORE / "dip.png", dpi=110)


def plot_critics() -> Figure:
    """Above, every decision's Q over its return, by step count; below, the variance of the action."""
    found = diagnosed()
    figure, axes = plots.panels(2, len(found), 4.6, 3.4, sharey="row")
    for (name, run), (top, bottom) in zip(found.items(), axes.T, strict=True):
        points = run.files["diagnostics.json"]
        for i, point in enumerate(points):
            colour = plots.sequential(i, len(points))
            top.plot(point["return"], point["q"], ".", color=colour, markersize=3, label=f"{point['step']:,}")
        low = min(min(point["return"] + point["q"]) for point in points)
        top.plot([low, 5], [low, 5], "k:", linewidth=1, label="Q = return")
        top.set(title=name, xlabel="return that followed", ylabel="Q")
        steps = [point["step"] for point in points]
        bottom.plot(steps, [np.mean(point["along"]) for point in points], "o-", label="along grad Q")
        bottom.plot(steps, [np.mean(point["across"]) for point in points], "s-", label="across, per direction")
        bottom.set(xlabel="environment steps", ylabel="variance of the action", yscale="log")
        plots.step_axes([bottom])
    axes[0, -1].legend(title="steps", fontsize=8, markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5))
    axes[1, -1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_dip() -> Figure:
    """Success of the noise-free policy over the first updates of its actor, by seed."""
    found = dips()
    figure, axes = plots.panels(-(-len(found) // 3), 3, 3.4, 3, sharey=True)
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    for axis, ((env, config), by_seed) in zip(axes.flat, found.items(), strict=False):
        for seed, row in by_seed.items():
            axis.plot(range(len(row)), list(row.values()), "o-", color=f"C{seed}", markersize=3, label=f"seed {seed}")
            axis.set_xticks(range(len(row)), ["cloned", *list(row)[1:]])
        axis.set_title(f"{env}: {CONFIGS[config].title}", fontsize=9)
        axis.set(ylim=(-0.03, 1.03), xlabel="updates of the actor")
        axis.grid(alpha=0.3)
    figure.supylabel("success, noise-free")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(SEEDS))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "dip", "report"))
    parser.add_argument("--env", choices=list(STEPS), default="lift")
    parser.add_argument("--configs", nargs="+", choices=[c for c in CONFIGS if c not in ALONE], default=["ogpo+ca"])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS[:1]))
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.what == "report":
        report()
        return
    one = {"run": run, "dip": dip}[args.what]
    failed = [(c, s) for s in args.seeds for c in args.configs if one(args.env, c, s)]
    print(f"failed: {failed or '-'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
