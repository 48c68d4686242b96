"""Settings of all tests: one thread for small models, no network, library objects excluded from garbage collection."""

from __future__ import annotations

import gc
import os

# Two threads on products this small cost more in hand-over than they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_collection_finish(session):
    # A collection goes through all objects of torch and transformers otherwise, half a second each time.
    gc.collect()
    gc.freeze()
