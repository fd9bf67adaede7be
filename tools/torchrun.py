"""torchrun to which a stop is no failure: python tools/torchrun.py --nproc_per_node 8 flm_train.py ...

torchrun passes SIGTERM and Ctrl-C on to its processes, which save and leave, but then ends with a traceback and exit
code 1, and kills what has not left after 30 seconds. This one passes them on, and ends as its processes end. Linux.
"""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

from torch.distributed import run


def pass_on(signum: int, frame: FrameType | None) -> None:
    """The signal to all children, whichever thread started them."""
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signum)


def main(argv: list[str]) -> None:
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, pass_on)
    run.main(["--signals-to-handle", "SIGHUP,SIGQUIT", *argv])


if __name__ == "__main__":
    main(sys.argv[1:])
