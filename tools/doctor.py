"""Which simulators and renderers work on this machine: python -m tools.doctor

Every check runs in a process of its own, so that one that crashes fails alone. Exit code 1 if a suite fails.
"""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

SUITES = {  # suite -> one of its tasks, packages, the line that mends it
    "robosuite": ("lift", ("robosuite", "mujoco", "numba"), "pip install --no-deps -r requirements-nodeps.txt"),
    "metaworld": ("peg-insert-side", ("metaworld", "mujoco"), "pip install metaworld==3.1.1"),
    "adroit": ("door", ("gymnasium-robotics", "mujoco"), "pip install gymnasium-robotics==1.4.2"),
    "kitchen": ("kitchen-complete", ("gymnasium-robotics", "mujoco"), "pip install gymnasium-robotics==1.4.2"),
}
RENDERERS = {  # MUJOCO_GL -> the line that mends it
    "egl": "apt-get install libegl1 libgl1 (with an NVIDIA GPU in a container: NVIDIA_DRIVER_CAPABILITIES=all)",
    "osmesa": "apt-get install libosmesa6; only needed where egl does not work",
}
STEP = """
from common.envs import make_env
env = make_env({task!r})
obs, _ = env.reset(seed=0)
env.step(env.action_space.sample())
print(len(obs), len(env.action_space.low))
"""
DRAW = """
from common.envs.simulation import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 64, 64)
renderer.update_scene(data)
assert renderer.render().any(), "the picture is black"
from OpenGL import GL
print(GL.glGetString(GL.GL_RENDERER).decode())
"""


def attempt(code: str, **environment: str) -> tuple[bool, str]:
    """Whether the code runs, and the last line that it wrote."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=os.environ | environment
    )
    text = (done.stdout if done.returncode == 0 else done.stderr or f"exit code {done.returncode}").strip()
    return done.returncode == 0, text.splitlines()[-1] if text else ""


def versions(packages: tuple[str, ...]) -> str:
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} missing")
    return ", ".join(found)


def main() -> int:
    """Prints a line per suite and renderer; returns the exit code."""
    failed = 0
    for suite, (task, packages, remedy) in SUITES.items():
        works, line = attempt(STEP.format(task=task))
        failed += not works
        what = (
            f"{task} steps: {line.replace(' ', ' observations, ')} actions" if works else f"{line}\n{'':11}-> {remedy}"
        )
        print(f"{suite:10} {'ok    ' if works else 'FAILS '} {versions(packages)}; {what}", flush=True)
    for name, remedy in RENDERERS.items():
        works, line = attempt(DRAW, MUJOCO_GL=name)
        if works and "llvmpipe" in line:
            line += ": draws on the CPU"
        print(f"{name:10} {'ok    ' if works else 'no    '} {line if works else f'{line} -> {remedy}'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
