"""Carries a change of a script into the files that share its text: its twin and its variants.

python tools/carry.py ogpo_state.py             # the change since the last commit
python tools/carry.py ogpo_state.py --base REV  # the change since REV, where all were last in step

Each file is merged on its own by `git merge-file`, with the script at the base as the common ancestor; then the change
of that file is carried on to its own variants. Where both changed the same lines, the file gets conflict markers, is
named, and the exit code is 1. Carrying the same change twice does no harm.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIES: dict[str, tuple[str, ...]] = {  # script -> files that share its text
    "ogpo_state.py": (
        "ogpo_pixels.py",
        "variants/ogpo_critic.py",
        "variants/ogpo_diffusion.py",
        "variants/ogpo_extraction.py",
        "variants/ogpo_reference.py",
        "variants/ogpo_released.py",
        *(f"baselines/{name}.py" for name in ("dppo", "dsrl", "expo", "qam", "qc", "qf3", "residual", "rlpd")),
    ),
    "ogpo_pixels.py": ("variants/ogpo_pixels_reference.py",),
    "flm_train.py": (
        "fmlm_distill.py",
        "variants/flm_ablations.py",
        "variants/flm_sampling.py",
        *(f"baselines/{name}.py" for name in ("ar", "duo", "mdlm")),
    ),
    "fmlm_distill.py": ("variants/fmlm_recipes.py", "variants/fmlm_two_stage.py"),
}


def at(revision: str, path: str) -> str:
    """Text of a file at a revision. Raises SystemExit if git does not have it."""
    shown = subprocess.run(["git", "show", f"{revision}:{path}"], cwd=ROOT, capture_output=True, text=True)
    if shown.returncode:
        sys.exit(f"error: git has no {path} at {revision}: {shown.stderr.strip()}")
    return shown.stdout


def merge(path: Path, base: str, changed: str) -> int:
    """Merges the change from `base` to `changed` into the file; number of conflicts."""
    with tempfile.TemporaryDirectory() as folder:
        ancestor, theirs = Path(folder, "base"), Path(folder, "changed")
        ancestor.write_text(base)
        theirs.write_text(changed)
        labels = ("-L", path.name, "-L", "base", "-L", "changed script")
        command = ["git", "merge-file", "--diff3", *labels, str(path), str(ancestor), str(theirs)]
        code = subprocess.run(command, cwd=ROOT).returncode
    if code > 127:  # what git returns for an error; else the number of conflicts
        sys.exit(f"error: git merge-file could not merge {path}")
    return code


def carry(script: str, revision: str) -> int:
    """Carries the change of a script since `revision` into its copies, and theirs into their own; conflicts."""
    base, changed, conflicts = at(revision, script), (ROOT / script).read_text(), 0
    for name in COPIES.get(script, ()):
        copy = ROOT / name
        before = copy.read_text()
        found = merge(copy, base, changed)
        state = f"{found} conflicts" if found else ("changed" if copy.read_text() != before else "unchanged")
        print(f"{name}: {state}")
        conflicts += found or carry(name, revision)
    return conflicts


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=sorted(COPIES))
    parser.add_argument("--base", default="HEAD", help="revision at which all files were in step")
    args = parser.parse_args(argv)
    return int(carry(args.script, args.base) > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
