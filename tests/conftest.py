"""One thread per test process: small tensors gain nothing from more, and two test workers share two cores.

Files go to the workers one by one; those with the longest tests first, so that none is left alone with them at the end.
A shell that starts the tests in the background has them ignore Ctrl-C, and nohup a hangup: tests send themselves both.
"""

import os
import signal

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

LONGEST = ("test_text_training", "test_training", "test_evaluator", "test_failures", "test_variants", "test_pixels")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))
