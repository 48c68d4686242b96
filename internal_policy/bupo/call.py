"""What a call of ``bupo.train`` said, as far as it can be written down: from it the same run can be asked for again.

A call that says the same of the same files is known by its digest, without the libraries that a training needs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from internal_policy.analysis.config import AnalyzeConfig
from internal_policy.analysis.finished import source_digest
from internal_policy.analysis.results import MANIFEST as ANALYSIS_MANIFEST
from internal_policy.analysis.results import Analysis
from internal_policy.bupo.presets import AUTO, DATA, VERIFIERS
from internal_policy.bupo.results import MANIFEST, Run
from internal_policy.data.records import SUFFIXES
from internal_policy.utils.io import expanded
from internal_policy.utils.result_format import is_up_to_date
from internal_policy.utils.shell import is_number

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def call_of(words: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Write a call down.

    Args:
        words: the named arguments of ``train``; None where one was not given.
        options: its other keyword arguments.

    Returns:
        ``words``: values that JSON can hold, by name; ``objects``: names of arguments that were given as objects, which
        only Python can give again; ``from_hub``: which of model and prompts were taken from the hub.
    """
    told: dict[str, Any] = {}
    objects = []
    for name, value in {**words, **options}.items():
        if value is None:
            continue
        plain = _plain(value)
        if plain is None:
            objects.append(name)
        else:
            told[name] = plain
    # Only here and now can a repository's name be told from a directory's.
    from_hub = [name for name in ("model", "prompts") if _is_on_the_hub(words.get(name))]
    return {"words": told, "objects": objects, "from_hub": from_hub}


def digest(options: Mapping[str, Any]) -> str | None:
    """Digest what a call says, with the files that it names and the code of this package.

    Args:
        options: all keyword arguments of ``train``, as they were given.

    Returns:
        64 hexadecimal digits; None where something else decides too: the hub, a GPU, objects, other code.
    """
    said = {name: value for name, value in options.items() if value is not None and name not in ("overwrite", "wait")}
    model, layer = said.get("model"), said.get("layer", AUTO)
    elsewhere = ("revision", "trust_remote_code", "attn_implementation")
    if not isinstance(model, str) or not isinstance(layer, (str, int)) or any(said.get(name) for name in elsewhere):
        return None
    if "reward" in said and (not isinstance(said["reward"], str) or said["reward"] not in VERIFIERS):
        return None
    layer = str(layer).strip()
    # By default the directory is named by what is said here.
    said |= {"layer": layer, "output": "output" in said, "slug": AnalyzeConfig(model=model).slug}
    sources = [said.get("prompts")]
    if "benchmark" in said:
        sources.append(said["benchmark"])
    if layer != AUTO and not is_number(layer):
        sources.append(str(expanded(layer) / ANALYSIS_MANIFEST))
    if not all(source is None or isinstance(source, str) for source in sources):
        return None
    try:
        told = json.dumps(said, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError):
        return None
    files = source_digest(model, sources)
    return None if files is None else hashlib.sha256(f"{files} {told}".encode()).hexdigest()


def complete(options: Mapping[str, Any]) -> Run | None:
    """Find the finished run that a call would give back, without its model.

    Args:
        options: all keyword arguments of ``train``.

    Returns:
        The run; None where there is none, or where only the model can tell.

    Raises:
        UserError: a broken run.
    """
    output = options.get("output")
    if output is not None:
        places = [expanded(output)]
    else:
        places = sorted(manifest.parent for manifest in Path(DATA).glob(f"*/{MANIFEST}"))
    asked = partial(digest, options)
    for place in places:
        try:
            stored = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
            call, config, versions = stored["call"], stored["config"], stored["versions"]
            # A run that was moved into this place is not the one that the call would make.
            here = output is not None or call["words"]["output"] == str(place)
            known = {"files": call["digest"], "hooked": config["hooked"]}
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue
        if here and is_up_to_date(known, versions, asked):
            run = Run.load(place)
            tell_complete(place)
            return run
    return None


def tell_complete(directory: Path) -> None:
    """Say that there is nothing to do.

    Args:
        directory: of the run.
    """
    logger.warning("%s: already complete; nothing to train (--overwrite starts over)", directory)


def _plain(value: Any) -> Any:
    """The value as JSON has it; None where it cannot be written down."""
    if isinstance(value, Analysis):
        return value.boundary_layer if value.path is None else str(value.path)
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, (str, bool, int, float, dict)):
        # A list may be prompts or rewards of any size and kind.
        return None
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return None


def _is_on_the_hub(value: Any) -> bool:
    if isinstance(value, (str, Path)):
        name = str(value)
        local = Path(name).exists() or name.endswith(SUFFIXES) or name.startswith("testbed/")
        return bool(_HUB_ID.fullmatch(name)) and not local
    # transformers notes the commit of what it loads from the hub, and of nothing else.
    commit = getattr(getattr(value, "config", None), "_commit_hash", None)
    return commit is not None and bool(_HUB_ID.fullmatch(str(getattr(value, "name_or_path", ""))))
