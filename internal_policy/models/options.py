"""The values of the options of a model and their checks, without torch."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

from internal_policy.utils.errors import UserError
from internal_policy.utils.options import require_one_of

Lens = Literal["policy", "logit-lens", "unit-norm"]
"""``policy`` projects a state as it is (arXiv 2512.19673v3, eqs. 5-6); ``logit-lens`` applies LN_final first, and
``unit-norm`` divides it by its root mean square."""
DEFAULT_LENS: Lens = "policy"

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
