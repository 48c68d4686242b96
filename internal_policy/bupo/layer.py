"""Which layer's policy comes first: a number, or the boundary layer of an analysis."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internal_policy.analysis.results import Analysis
from internal_policy.bupo.config import AUTO, require_layer
from internal_policy.bupo.forward import check_layer
from internal_policy.models import LanguageModel
from internal_policy.utils.console import few_prompts
from internal_policy.utils.errors import UserError
from internal_policy.utils.shell import is_number


@dataclass(frozen=True)
class LayerChoice:
    """A layer and why it was taken."""

    layer: int | None
    """l, from 1; None where there is none, or none yet."""
    reason: str
    """One sentence."""
    analysed: dict[str, Any] | None = None
    """The model that the analysis was of."""

    def check(self, model: LanguageModel) -> None:
        """Check that the layer is one of this model.

        Args:
            model: the model to be trained.

        Raises:
            UserError: out of range, or of an analysis of another model.
        """
        if self.analysed is not None:
            mine = {
                "family": model.family.name,
                "layers": model.n_layers,
                "vocabulary": model.vocab_size,
                "hidden_size": model.projection.weight.shape[1],
            }
            for key, value in mine.items():
                told = self.analysed.get(key, value)
                if told != value:
                    raise UserError(
                        f"layer: the analysis is of another model ({self.analysed.get('id')}: {key} {told}), and "
                        f"{model.name} has {key} {value}; give an analysis of this model, a number, or auto"
                    )
        if self.layer is not None:
            check_layer(self.layer, model.n_layers)


def choose_layer(layer: Any) -> LayerChoice:
    """Turn what the user gave into a layer.

    Args:
        layer: a number from 1, an ``Analysis``, its directory, ``auto``, or None.

    Returns:
        The choice; without a layer for ``auto``, whose analysis has yet to be made, and for None.

    Raises:
        UserError: not a layer, or an analysis without a boundary layer.
    """
    if layer is None or layer == AUTO:
        return LayerChoice(None, "")
    if isinstance(layer, str) and is_number(layer):
        layer = int(layer)
    if hasattr(layer, "__index__") and not isinstance(layer, bool):
        return LayerChoice(int(layer), "as it was asked for")
    if isinstance(layer, (str, Path)):
        require_layer(layer)
        layer = Analysis.load(layer)
    if not isinstance(layer, Analysis):
        raise UserError(f"layer is a {type(layer).__name__}; needed is a number from 1, an Analysis, its path, or auto")
    selection = layer.selection
    if selection.boundary_layer is None:
        near = ", ".join(map(str, selection.candidates)) or "none"
        raise UserError(
            f"layer: the analysis of {layer.name} finds no boundary layer ({selection.reason.rstrip('.')}); nearest "
            f"candidates: {near}; give one of them as a number"
        )
    few = few_prompts(layer.n_prompts)
    reason = selection.reason if few is None else f"{selection.reason}; {few}"
    return LayerChoice(selection.boundary_layer, reason, dict(layer.model))
