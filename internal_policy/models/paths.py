"""Where the files of a model are, without torch or transformers."""

from __future__ import annotations

import json
from pathlib import Path

from internal_policy.models import testbed
from internal_policy.utils.errors import UserError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_LAYER_KEYS = ("num_hidden_layers", "n_layer")


def locate(name: str, revision: str | None) -> str:
    """Resolve a model's name to a directory or hub id, and refuse a directory without a model; nothing is loaded."""
    if name.split("/")[0] == "testbed" and not Path(name).exists():
        if revision is not None:
            raise UserError(
                f"{name}: --revision {revision} was given with an embedded model; revisions exist on the hub only"
            )
        return str(testbed.path(name))
    directory = Path(name)
    if not directory.exists():
        if directory.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise UserError(
                f"{name}: no such directory; give a directory with config.json and *.safetensors, or a hub id"
            )
        return name
    if not directory.is_dir():
        raise UserError(f"{name}: is a file; give the directory that holds config.json and *.safetensors")
    if revision is not None:
        raise UserError(
            f"{name}: --revision {revision} was given with a local directory; revisions exist on the hub only"
        )
    if not (directory / "config.json").is_file():
        raise UserError(
            f"{name}: no config.json in this directory; save the model with model.save_pretrained(directory)"
        )
    if not any((directory / f).is_file() for f in _TOKENIZER_FILES):
        raise UserError(
            f"{name}: no tokenizer in this directory; save the model's own with tokenizer.save_pretrained(directory)"
        )
    if not any(directory.glob("*.safetensors")):
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        if pickles:
            raise UserError(
                f"{name}: weights in pickle format only ({pickles[0]}); pickle can run code, so only safetensors is "
                "read. Convert with model.save_pretrained(directory)"
            )
        raise UserError(
            f"{name}: no weights (*.safetensors) in this directory; save them with model.save_pretrained(directory)"
        )
    return str(directory)


def declared_layers(name: str, revision: str | None = None) -> int | None:
    """Read the number of layers L from a model's config.json; None if it is on the hub, or config.json has no such key.

    Raises:
        UserError: there is no such model, or no config.json.
    """
    directory = Path(locate(name, revision))
    try:
        settings = json.loads((directory / "config.json").read_bytes())
    # Loading the configuration reports what is wrong with it.
    except (OSError, ValueError, RecursionError):
        return None
    text = settings.get("text_config", settings) if isinstance(settings, dict) else {}
    found = next((text[key] for key in _LAYER_KEYS if isinstance(text.get(key), int)), None)
    return found
