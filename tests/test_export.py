"""tools/export.py: the file acts as the run's policy does, where this repository is not."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.policy import load_policy
from tests.test_policy import save_run
from tools import export

ELSEWHERE = """
import json, sys
import numpy as np, torch
assert not any((__import__("pathlib").Path(place) / "ogpo_state.py").exists() for place in sys.path)
obs = torch.from_numpy(np.load("obs.npy"))
for name in ("acting", "noise-free"):
    extra = {"policy.json": ""}
    policy = torch.export.load(f"{name}.pt2", extra_files=extra).module()
    torch.manual_seed(3)
    np.savez(f"{name}.npz", first=policy(obs).numpy(), second=policy(obs).numpy())
print(extra["policy.json"])
"""


def test_exported_policy_acts_without_the_repository_as_the_loaded_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_run(run)
    obs = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    np.save(tmp_path / "obs.npy", obs)
    for name in ("acting", "noise-free"):
        export.main([str(run), str(tmp_path / f"{name}.pt2"), "--policy", name, "--rows", "6"])
    done = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    about = json.loads(done.stdout)
    assert {k: about[k] for k in ("env", "script", "obs_dim", "chunk", "act_dim", "rows")} == dict(
        env="toy", script="ogpo_state.py", obs_dim=5, chunk=4, act_dim=2, rows=6
    )
    for name in ("acting", "noise-free"):
        policy, acted = load_policy(run, name, device="cpu", seed=3), np.load(tmp_path / f"{name}.npz")
        for call in ("first", "second"):  # the program goes on drawing
            np.testing.assert_allclose(acted[call], policy.chunks(obs), rtol=1e-5, atol=1e-6)
        assert np.abs(acted["first"] - acted["second"]).max() > 0.01


def test_exported_file_holds_the_networks_that_act_alone(tmp_path: Path) -> None:
    save_run(tmp_path / "run")
    export.main([str(tmp_path / "run"), str(tmp_path / "p.pt2")])
    program = torch.export.load(tmp_path / "p.pt2")
    assert {name.partition(".")[0] for name in program.state_dict} == {"actor_ema", "critic_ema"}


@pytest.mark.parametrize(
    ("record", "flags", "said"),
    [
        (None, ["p.txt"], "files end in .pt2"),
        (None, ["here.pt2"], "here.pt2 is there already"),
        (None, ["p.pt2", "--rows", "0"], "--rows 0: give at least one"),
        ({}, ["p.pt2"], "without an args.json"),
        ({"script": "flm_train.py"}, ["p.pt2"], "trains no robot policy"),
    ],
)
def test_export_refuses_in_one_line(
    record: dict | None, flags: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "run")
    Path("here.pt2").touch()
    if record is not None:
        Path("run/args.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=said) as caught:
        export.main(["run", *flags])
    assert "\n" not in str(caught.value) and not Path("p.pt2").exists()
