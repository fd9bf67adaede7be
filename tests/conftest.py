"""One thread per test process: small tensors gain nothing from more, and two test workers share two cores."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
