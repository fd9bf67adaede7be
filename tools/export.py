"""The policy of a run from state as one file, a program of torch.export that acts without this repository.

python -m tools.export runs/NAME policy.pt2                               # the acting policy, one observation at a time
python -m tools.export runs/NAME policy.pt2 --policy noise-free --rows 8

    policy = torch.export.load("policy.pt2").module()
    chunk = policy(obs)  # obs (rows, O) float32 -> (rows, H, A) in [-1, 1]: H actions, executed one after the other

Its noise is drawn by torch's global generator: after torch.manual_seed(0) its chunks are those of load_policy(seed=0).
What it was made for is in the archive as policy.json:

    extra = {"policy.json": ""}
    torch.export.load("policy.pt2", extra_files=extra)
"""

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import cli
from common.download import obtain_run
from common.errors import UserError
from common.files import write_atomic
from common.policy import Acting, load_acting, networks

UNITS = "in [-1, 1]; -1 and 1 are the bounds of the environment's action space"


class Draws:
    """The draws of `common.rng.Rng` from torch's global generator: an exported program has no other."""

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape)


class Policy(nn.Module):
    """The act function of a run's script, with the networks that it calls: obs (n, O) -> chunks (n, H, A)."""

    def __init__(self, made: Acting) -> None:
        super().__init__()
        self.act = made.act
        for name, net in networks(made).items():
            self.add_module(name, net.requires_grad_(False))

    def forward(self, obs: Tensor) -> Tensor:
        return self.act(obs, Draws())


def export(made: Acting, rows: int) -> bytes:
    """The policy for `rows` observations at a time, with policy.json: the content of a .pt2 file."""
    with torch.no_grad():
        program = torch.export.export(Policy(made), (torch.zeros(rows, made.obs_dim),), strict=False)
    about: dict[str, Any] = {k: v for k, v in vars(made).items() if k not in ("agent", "act")}
    about |= {"rows": rows, "actions": UNITS, "torch": torch.__version__}
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"policy.json": json.dumps(about, indent=2)})
    return file.getvalue()


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run, or hf://owner/name")
    parser.add_argument("out", type=Path, help="the file, NAME.pt2")
    parser.add_argument("--policy", choices=("acting", "noise-free"), default="acting", help="default: acting")
    parser.add_argument("--rows", type=int, default=1, help="observations at a time; default: 1")
    args = parser.parse_args(argv)
    if args.rows < 1:
        raise UserError(f"--rows {args.rows}: give at least one")
    if args.out.suffix != ".pt2":
        raise UserError(f"{args.out}: torch.export's files end in .pt2; give a name that ends so")
    if args.out.exists():
        raise UserError(f"{args.out} is there already; give another name, or remove it")
    made = load_acting(obtain_run(args.run, Path("data")), args.policy, torch.device("cpu"))
    content = export(made, args.rows)
    try:
        write_atomic(args.out, content)
    except OSError as error:
        raise UserError(f"cannot write {args.out} ({error}); give a file in a folder of yours") from error
    print(
        f"{args.out}: {len(content) / 1e6:.1f} MB; observations ({args.rows}, {made.obs_dim}) -> chunks "
        f"({args.rows}, {made.chunk}, {made.act_dim}), {UNITS}"
    )


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
