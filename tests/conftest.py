"""Settings of all tests: one thread for small models, no network, library objects excluded from garbage collection."""

from __future__ import annotations

import gc
import logging
import os

import pytest

# Two threads on products this small cost more in hand-over than they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_collection_finish(session):
    # A collection goes through all objects of torch and transformers otherwise, half a second each time.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _logging_is_left_as_it_was():
    """A level that a test leaves behind hides messages from the tests after it, in whatever order they run."""
    logger = logging.getLogger("internal_policy")
    before = logger.level, logger.propagate, logger.handlers[:]
    yield
    after = logger.level, logger.propagate, logger.handlers[:]
    logger.setLevel(before[0])
    logger.propagate, logger.handlers[:] = before[1:]
    assert after == before
