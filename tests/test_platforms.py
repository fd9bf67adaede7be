"""What other systems lack is not needed: simulated here, where everything is there."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.start import pick_device

ROOT = Path(__file__).resolve().parent.parent
# A system without fcntl, fork, SIGHUP and signal masks: as much of Windows as can be had elsewhere.
WINDOWS = """
import multiprocessing, multiprocessing.context, signal, sys
import psutil  # which needs `resource` here, and not there
for name in ("fcntl", "resource"):
    sys.modules[name] = None
for name in ("SIGHUP", "pthread_sigmask"):
    delattr(signal, name)
multiprocessing.get_all_start_methods = lambda: ["spawn"]
def no(*_, **__):
    raise ValueError("no such start method")
multiprocessing.context.ForkServerContext.Process = multiprocessing.context.ForkContext.Process = no
"""


def run(code: str, tmp_path: Path) -> str:
    script = tmp_path / "script.py"
    script.write_text(WINDOWS + code)
    result = subprocess.run(
        [sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_environments_in_processes_without_fork(tmp_path: Path) -> None:
    said = run(
        """
if __name__ == "__main__":
    import numpy as np
    from common.envs import make_vec_env
    from common.envs.vector import START
    envs = make_vec_env("toy", 2)
    obs, _ = envs.reset(seed=[1, 2])
    obs, reward, *_ = envs.step(np.zeros((2, 2), np.float32))
    envs.close()
    print(START, obs.shape)
""",
        tmp_path,
    )
    assert said.splitlines()[-1] == "spawn (2, 6)"


def test_log_locks_and_stop_signal_without_fcntl_and_sighup(tmp_path: Path) -> None:
    said = run(
        f"""
if __name__ == "__main__":
    from pathlib import Path
    import common.meter
    from common.checkpoint import StopSignal
    from common.errors import UserError
    from common.files import locked
    from common.runlog import RunLog
    folder = Path({str(tmp_path / "run")!r})
    with StopSignal() as stop, locked(folder / "x.lock") as held:
        log = RunLog(folder, total_steps=1, args={{}})
        try:
            RunLog(folder, total_steps=1, args={{}})
        except UserError as error:
            print(error)
        log.close()
        RunLog(folder, total_steps=1, args={{}}).close()
        print(held, stop.requested)
""",
        tmp_path,
    )
    first, last = said.splitlines()[-2:]
    assert first.startswith("another process still writes") and last == "True 0"


def test_apples_gpu_is_refused_where_it_is_not_there_and_for_text() -> None:
    if not torch.backends.mps.is_available():
        with pytest.raises(UserError, match=r"--device mps: .*; use auto, cpu or cuda"):
            pick_device("mps")
    with pytest.raises(UserError, match="--device mps: it has no float64, which times and samples need; use cpu"):
        pick_device("mps", float64=True)
