"""Shared by all tests: one thread for models this small, and no network."""

from __future__ import annotations

import os

# Two threads on products this small cost more in hand-over than they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
