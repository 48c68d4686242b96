"""Lenses of the user's own: a function, or an affine map per layer that was trained, as tuned-lens trains them.

A trained lens is a directory with ``config.json`` and one file of weights. Translator l maps the state H^l, l = 0 being
the embedding, before the model's final norm:

- ``*.safetensors`` with the keys ``layer.{l}.weight`` [d, d] and ``layer.{l}.bias`` [d]. The map is x + W x + b, or
  W x + b if ``config.json`` has ``"residual": false``. A layer without a weight keeps x, one without a bias adds none.
- ``params.pt`` as tuned-lens writes it (keys ``{l}.weight``, ``{l}.bias``, l = 0..L-1; x + W x + b). It is a pickle, of
  which torch reads nothing but tensors (``weights_only=True``).

Source: Belrose et al., "Eliciting Latent Predictions from Transformers with the Tuned Lens", arXiv 2303.08112;
``tuned_lens/nn/lenses.py`` (``TunedLens.transform_hidden``), whose index of a translator is that of ``hidden_states``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from internal_policy.models.language_model import LanguageModel
from internal_policy.models.options import LENSES, Lens, LensChoice, LensFunction, lens_files, lens_name
from internal_policy.models.projection import FLOAT_DTYPES, Projection
from internal_policy.utils.errors import UserError

_KEYS = {
    ".safetensors": (re.compile(r"layer\.(\d+)\.(weight|bias)"), "layer.1.weight, layer.1.bias"),
    ".pt": (re.compile(r"(\d+)\.(weight|bias)"), "0.weight, 0.bias"),
}
"""The keys of a file of weights by its suffix, and what they look like."""


@dataclass(frozen=True)
class FunctionLens:
    """A function of the user's own; see ``LayerLens``."""

    function: LensFunction
    """(layer, states [N, d]) -> [N, d]."""
    name: str
    """Its name."""

    def apply(self, layer: int, states: Tensor, projection: Projection) -> Tensor:
        """Call the function with a copy of the states, and check what it returns.

        Args:
            layer: l; 0 for H^0.
            states: [N, d].
            projection: E_u, on whose device the result is needed.

        Returns:
            [N, d] in the dtype of the states.

        Raises:
            UserError: the function returns something else, or NaN or inf for finite states.
        """
        # A function that works in place would change what the other numbers of the layer are computed from.
        found = self.function(layer, states.clone())
        if not isinstance(found, Tensor):
            problem = f"a {type(found).__name__}"
        elif found.shape != states.shape or found.dtype != states.dtype:
            problem = _described(found)
        elif bool(found.isfinite().all()) or not bool(states.isfinite().all()):
            return found.detach().to(projection.weight.device)
        else:
            problem = "NaN or inf"
        raise UserError(
            f"lens {self.name}, layer {layer}: the function returned {problem}; needed are finite numbers in a tensor "
            f"like the states that it got, {_described(states)}"
        )


@dataclass(frozen=True)
class AffineLens:
    """An affine map per layer before LN_final; see ``LayerLens``."""

    name: str
    """Its name."""
    weights: Mapping[int, Tensor]
    """W_l [d, d] by layer, from 0."""
    biases: Mapping[int, Tensor]
    """b_l [d] by layer, from 0."""
    residual: bool
    """Whether the map is x + W x + b, or W x + b."""
    source: Path
    """The file of the weights."""
    config: Mapping[str, Any]
    """The content of its ``config.json``."""

    def apply(self, layer: int, states: Tensor, projection: Projection) -> Tensor:
        """Map states in float32, or float64 if they are, and apply LN_final.

        Args:
            layer: l; 0 for H^0.
            states: [N, d].
            projection: E_u and LN_final.

        Returns:
            [N, d] in the dtype of the states.
        """
        weight, bias = self.weights.get(layer), self.biases.get(layer)
        dtype = torch.promote_types(states.dtype, torch.float32)
        x = states.to(projection.weight.device, dtype)
        mapped = x
        if weight is not None:
            mapped = x @ weight.to(dtype).T
            mapped = mapped + x if self.residual else mapped
        if bias is not None:
            mapped = mapped + bias.to(dtype)
        return projection.apply_final_norm(mapped.to(states.dtype))


def open_lens(lens: LensChoice, model: LanguageModel) -> Lens:
    """Prepare a lens for a model: read the directory of a trained one, and check that it fits.

    Args:
        lens: a name of ``LENSES``, a directory, or a function (layer, states) -> states.
        model: the model whose states are projected.

    Returns:
        The lens for ``Projection.apply_lens``.

    Raises:
        UserError: a file that holds more than tensors or is damaged, other keys or shapes, or a lens of another model.
    """
    if not isinstance(lens, (str, Path)):
        return FunctionLens(lens, lens_name(lens))
    named = next((name for name in LENSES if name == lens), None)
    return _fitted(read_lens(lens), model) if named is None else named


def read_lens(directory: str | Path) -> AffineLens:
    """Read a trained lens from its directory.

    Args:
        directory: with ``config.json`` and ``*.safetensors`` or tuned-lens's ``params.pt``.

    Returns:
        The lens, on the CPU.

    Raises:
        UserError: a file that holds more than tensors or is damaged, or other keys or shapes than those of a lens.
    """
    config_file, source = lens_files(directory)
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{config_file}: is no JSON ({error}); needed is the config.json of a lens") from error
    residual = config.get("residual", True) if isinstance(config, dict) else None
    if not isinstance(residual, bool):
        raise UserError(f'{config_file}: needed is a JSON object in which "residual", if given, is true or false')
    tensors = _tensors_of(source)
    pattern, shown = _KEYS[source.suffix]
    parts: dict[str, dict[int, Tensor]] = {"weight": {}, "bias": {}}
    for key, tensor in tensors.items():
        match = pattern.fullmatch(str(key))
        if match is None:
            raise UserError(f"{source}: has {str(key)[:80]!r}; the keys of a lens are {shown} and so on")
        parts[match[2]][int(match[1])] = _checked(source, str(key), tensor, 2 if match[2] == "weight" else 1)
    lens = AffineLens(lens_name(directory), parts["weight"], parts["bias"], residual, source, config)
    if source.suffix == ".pt":
        _require_all_translators(lens)
    return lens


def _tensors_of(source: Path) -> dict[str, Any]:
    if source.suffix == ".safetensors":
        try:
            tensors: dict[str, Any] = load_file(source)
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"{source}: is no safetensors file ({error}); write the lens again") from error
        return tensors
    try:
        found = torch.load(source, map_location="cpu", weights_only=True)
    # A file that is no pickle of tensors makes torch raise exceptions of many kinds.
    except Exception as error:
        raise UserError(
            f"{source}: torch.load(weights_only=True) refuses it ({type(error).__name__}): it is damaged, or holds "
            "more than tensors, which could run code; needed is what tuned-lens saves, or *.safetensors"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{source}: holds a {type(found).__name__}; needed is a state dict as tuned-lens saves it")
    return found


def _checked(source: Path, key: str, tensor: Any, dimensions: int) -> Tensor:
    """A tensor of a lens, which has to be a finite square matrix or vector."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOAT_DTYPES:
        kind = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise UserError(f"{source}: {key} is a {kind}; needed is a tensor of floating point numbers")
    if tensor.ndim != dimensions or tensor.shape[0] != tensor.shape[-1]:
        needed = "[d, d]" if dimensions == 2 else "[d]"
        raise UserError(f"{source}: {key} has the shape {list(tensor.shape)}; needed is {needed}")
    if not bool(tensor.isfinite().all()):
        raise UserError(f"{source}: {key} holds NaN or inf; needed is a lens whose training has not diverged")
    return tensor.detach()


def _require_all_translators(lens: AffineLens) -> None:
    """Refuse a file of tuned-lens that lacks some of the L translators, which would silently be the identity."""
    n = lens.config.get("num_hidden_layers")
    if not isinstance(n, int) or sorted(lens.weights) != list(range(n)):
        raise UserError(
            f"{lens.source}: has {len(lens.weights)} translators, and its config.json says num_hidden_layers {n}; "
            "needed are the translators 0 to num_hidden_layers - 1, as tuned-lens saves them"
        )


def _fitted(lens: AffineLens, model: LanguageModel) -> AffineLens:
    """The lens on the model's device, if it has the model's layers and width."""
    n, width = model.n_layers, int(model.projection.weight.shape[1])
    device = model.projection.weight.device
    layers = sorted({*lens.weights, *lens.biases})
    problem = None
    for name, wanted in (("num_hidden_layers", n), ("d_model", width)):
        if lens.config.get(name, wanted) != wanted:
            problem = f"its config.json says {name} {lens.config[name]}"
    if problem is None and layers and layers[-1] > n:
        problem = f"it has a map of layer {layers[-1]}"
    for part in (lens.weights, lens.biases):
        for layer, tensor in part.items():
            if tensor.shape[0] != width:
                problem = problem or f"its map of layer {layer} has the width {tensor.shape[0]}"
    if problem is not None:
        raise UserError(
            f"{lens.source.parent}: {problem}, and {model.name} has {n} layers of width {width}; needed is a lens that "
            "was trained for this model"
        )
    return replace(
        lens,
        weights={layer: tensor.to(device) for layer, tensor in lens.weights.items()},
        biases={layer: tensor.to(device) for layer, tensor in lens.biases.items()},
    )


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
