"""`python SCRIPT ...` in a process forked from one that has imported torch already: three seconds sooner.

The script runs as `__main__`, from its file, in a process of its own that has not run anything else. Tests of signals,
of process groups and of the start itself use `subprocess` instead.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SERVER = """
import json, os, runpy, signal, sys
import gymnasium, h5py, mujoco, torch, tyro

for line in sys.stdin:
    argv, cwd, env, out, err = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(3_600)  # one that hangs is given up; no machine is that slow
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        for path, fd, mode in ((os.devnull, 0, os.O_RDONLY), (out, 1, os.O_WRONLY), (err, 2, os.O_WRONLY)):
            os.dup2(os.open(path, mode | os.O_APPEND), fd)
        sys.stdin = open(os.devnull)
        sys.argv = argv
        extra = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
        sys.path[:1] = [os.path.dirname(os.path.abspath(argv[0])), *extra]
        runpy.run_path(argv[0], run_name="__main__")
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def server() -> subprocess.Popen[str]:
    """One for each test process; it ends with it."""
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.kill)
    return process


def run_script(
    argv: Sequence[str], cwd: Path | None = None, check: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Waits for `python *argv`; check: the exit code that it must have."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        out.touch()
        err.touch()
        job = [list(argv), str(cwd or Path.cwd()), dict(os.environ), str(out), str(err)]
        print(json.dumps(job), file=server().stdin, flush=True)
        code = int(server().stdout.readline())
        done = subprocess.CompletedProcess(argv, code, out.read_text(), err.read_text())
    assert check is None or code == check, done.stdout + done.stderr
    return done
