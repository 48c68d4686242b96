"""The values of the options of a model and their checks, without torch."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, get_args

from internal_policy.utils.errors import UserError
from internal_policy.utils.io import expanded, sha256_of
from internal_policy.utils.options import require_one_of

LensName = Literal["policy", "logit-lens", "unit-norm"]
"""``policy`` projects a state as it is (arXiv 2512.19673v3, eqs. 5-6); ``logit-lens`` applies LN_final first, and
``unit-norm`` divides it by its root mean square."""
LENSES: tuple[LensName, ...] = get_args(LensName)
DEFAULT_LENS: LensName = "policy"
TAKEN_NAMES = (*LENSES, "measured", "direction", "literal")
"""Names that no other lens may have; the last are readings beside which ``Selection.sensitivity`` lists lenses."""
LensFunction: TypeAlias = Callable[[int, Any], Any]
"""Maps a layer (1..L, 0 for the embedding) and its states [N, d] to the states [N, d] that E_u projects."""
LensChoice: TypeAlias = str | Path | LensFunction
"""What a user gives as a lens: a name of ``LENSES``, the directory of a trained lens, or a function."""


class LayerLens(Protocol):
    """A lens other than those of ``LENSES``, ready to be applied: a trained one, or a user's function."""

    @property
    def name(self) -> str:
        """Its name, which is safe in a path."""
        ...

    def apply(self, layer: int, states: Any, projection: Any) -> Any:
        """Map states [N, d] of a layer (0 for H^0) to the states [N, d] that E_u projects."""
        ...


Lens: TypeAlias = LensName | LayerLens
"""A lens that is ready to be applied, see ``Projection.apply_lens``."""

Site: TypeAlias = Literal["layer", "attn", "ffn"]
"""Whose policy: that of H^l (arXiv 2512.19673v3, eq. 5), or of what the attention or the FFN of layer l writes
(eq. 6)."""
SITES: tuple[Site, ...] = get_args(Site)

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""The strategies by which accelerate distributes a model over the devices of a machine."""
QUANTIZATIONS = ("8bit", "4bit")


def check_device_map(device_map: str | dict[str, Any] | None, device: str) -> None:
    """Refuse a device map that is neither None, one of ``DEVICE_MAPS`` nor a dict, or that contradicts the device."""
    if device_map is None:
        return
    if not isinstance(device_map, (str, dict)):
        raise UserError(f"device_map is a {type(device_map).__name__}; needed is a name or a dict")
    if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
        raise UserError(
            f"--device-map is {device_map!r}; needed is one of {', '.join(DEVICE_MAPS)} (one device is --device)"
        )
    if device != "auto":
        raise UserError(
            f"--device {device} was given with --device-map, which places the model itself; leave one of them out"
        )


def check_quantization(quantization: str | None) -> None:
    """Refuse a quantisation that does not exist."""
    if quantization is not None:
        require_one_of("--quantization", quantization, QUANTIZATIONS)


def check_lens(lens: LensChoice, remote: bool | str = False) -> str | LensFunction:
    """Refuse a lens that is none of ``LENSES``, no directory of a trained lens and no function.

    Nothing but names of files is read. With `remote`, states are reduced on a server, which has the named lenses only.

    Returns:
        The lens; a path as text.
    """
    if not isinstance(lens, (str, Path)):
        if not callable(lens):
            raise UserError(
                f"lens is a {type(lens).__name__}; needed is one of {', '.join(LENSES)}, the directory of a trained "
                "lens, or a function (layer, states) -> states"
            )
    elif lens not in LENSES:
        lens = str(lens)
        if not lens or not expanded(lens).is_dir():
            meant = difflib.get_close_matches(lens, LENSES, n=1)
            suggestion = f" (did you mean {meant[0]}?)" if meant else ""
            raise UserError(
                f"--lens is {lens!r}; needed is one of {', '.join(LENSES)}, or the directory of a trained lens"
                f"{suggestion}"
            )
        lens_files(lens)
    name = lens_name(lens)
    if is_own_lens(lens) and (name in TAKEN_NAMES or not name):
        raise UserError(
            f"lens {_shown(lens)} would be called {name!r} in directories and figures; needed is a name of its own, "
            f"other than {', '.join(TAKEN_NAMES)}: rename it"
        )
    if remote and is_own_lens(lens):
        raise UserError(
            f"--remote was given with the lens {name}, which is on this machine only; needed is one of "
            f"{', '.join(LENSES)}, or leave --remote out"
        )
    return str(lens) if isinstance(lens, Path) else lens


def is_own_lens(lens: LensChoice) -> bool:
    """Whether a lens is a directory or a function of the user's own, and not one of ``LENSES``."""
    return not (isinstance(lens, str) and lens in LENSES)


def lens_name(lens: LensChoice) -> str:
    """Name a lens: one of ``LENSES``, the last part of a directory, or a function's name, safe in a path."""
    if not is_own_lens(lens):
        return str(lens)
    if isinstance(lens, (str, Path)):
        path = expanded(lens)
        name = path.name if path.name not in ("", "..") else path.resolve().name
    else:
        # A partial has the name of the function that it calls.
        function = getattr(lens, "func", lens)
        name = getattr(function, "__name__", type(function).__name__)
    return re.sub(r"[^\w.@-]+", "-", name).strip("-.")


def lens_files(directory: str | Path) -> tuple[Path, Path]:
    """Find the files of a trained lens: its ``config.json`` and its weights.

    Raises:
        UserError: one is missing, or there are several files of weights.
    """
    place = expanded(directory)
    config, tuned = place / "config.json", place / "params.pt"
    weights = sorted(place.glob("*.safetensors")) or ([tuned] if tuned.is_file() else [])
    if not config.is_file() or len(weights) != 1:
        found = ", ".join(path.name for path in ([config] if config.is_file() else []) + weights) or "neither"
        raise UserError(
            f"--lens {directory}: needed are config.json and one file of weights, *.safetensors or the params.pt of "
            f"tuned-lens; found: {found}"
        )
    return config, weights[0]


def lens_digest(directory: str | Path) -> str:
    """16 hexadecimal digits of the SHA-256 of the files of a trained lens: another training gives others."""
    digest = hashlib.sha256()
    for path in lens_files(directory):
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()[:16]


def _shown(lens: LensChoice) -> str:
    return repr(str(lens)) if isinstance(lens, (str, Path)) else f"of class {type(lens).__name__}"
