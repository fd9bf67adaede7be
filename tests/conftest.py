"""One thread per test process: small tensors gain nothing from more, and two test workers share two cores.

A shell that starts the tests in the background has them ignore Ctrl-C, and nohup a hangup: tests send themselves both.
"""

import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
