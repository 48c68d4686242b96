"""What the commands share."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings


def figure_name(analyses: list[tuple[str, str]]) -> str:
    """Name a directory for the figures of some analyses, short enough for any file system.

    Args:
        analyses: the directory's name and the lens of each.

    Returns:
        All names where they are few; else the first, how many more, and a digest of all.
    """
    names = list(dict.fromkeys(name if lens == "policy" else f"{name}-{lens}" for name, lens in analyses))
    whole = "--".join(names)
    if len(whole) <= 120:
        return whole
    digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
    return f"{names[0][:80]}--and-{len(names) - 1}-more-{digest}"


def quiet_libraries(debug: bool) -> None:
    """Leave the terminal to our own progress, table and one-line errors.

    Args:
        debug: show what the libraries say.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # TRL reports each training to the hub; who wants that sets the variable to 0.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if debug:
        return
    # Read when trl and datasets are imported; what they say of themselves tells nothing about the user's command.
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module=r"(transformers|trl|accelerate|datasets|peft|torch)(\.|$)")
    for library in ("trl", "accelerate", "bitsandbytes", "datasets"):
        logging.getLogger(library).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # The hub client warns at each of its retries; what comes of them is told in one line.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def rank() -> int:
    """Tell which process this is, of those that accelerate, torchrun or MPI started.

    Returns:
        From 0; 0 where there is one only.
    """
    return _launched("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK") or 0


def world_size() -> int:
    """Tell how many processes accelerate, torchrun or MPI started.

    Returns:
        Their number, at least 1.
    """
    return _launched("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE") or 1


def _launched(*names: str) -> int | None:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), None)


def is_main_process() -> bool:
    """Whether this process speaks to the user: the only one, or the first of those that a launcher started.

    Returns:
        False in the others.
    """
    return rank() == 0
