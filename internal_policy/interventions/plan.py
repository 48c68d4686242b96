"""Which interventions a configuration asks for, and whether a model allows them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from internal_policy.extractors.experts import find_experts
from internal_policy.extractors.heads import find_heads
from internal_policy.extractors.parts import norms_after
from internal_policy.interventions.changes import Change, Intervention
from internal_policy.interventions.config import AblateConfig, How
from internal_policy.models import LanguageModel
from internal_policy.utils.errors import UserError
from internal_policy.utils.options import choose_numbers


def plan_interventions(config: AblateConfig, model: LanguageModel) -> list[Intervention]:
    """List the interventions, layer by layer.

    Args:
        config: what is asked for.
        model: the model in which they are made.

    Returns:
        The interventions, each with one change, or one for each `how` with all changes if they are made together.

    Raises:
        UserError: a layer, head or expert that does not exist, or whose write cannot be changed in this model.
    """
    layers = choose_numbers("--layers", str(config.layers), model.n_layers, "layers")
    heads = experts = None
    if config.head is not None:
        heads = choose_numbers("--head", str(config.head), find_heads(model).n_heads, "heads")
    if config.expert is not None:
        layers, experts = _experts(config, model, layers)
    by_how = {how: list(_changes(config, how, layers, heads, experts)) for how in config.kinds}
    if config.together:
        _refuse_overlap(config)
        return [Intervention(tuple(changes)) for changes in by_how.values()]
    changes = [change for found in by_how.values() for change in found]
    order = sorted(changes, key=lambda change: change.layer)
    return [Intervention((change,)) for change in order]


def _changes(
    config: AblateConfig, how: How, layers: list[int], heads: list[int] | None, experts: list[int] | None
) -> Iterator[Change]:
    alpha = 1.0 if config.alpha is None else config.alpha
    none: list[int | None] = [None]
    for layer, site, head, expert in product(layers, config.chosen_sites, heads or none, experts or none):
        yield Change(layer, site, how, alpha, head, expert)


def _experts(config: AblateConfig, model: LanguageModel, layers: list[int]) -> tuple[list[int], list[int]]:
    """The layers that have routed experts, and which of these are changed."""
    found = find_experts(model, norms_after(model, model.family.ffn_write))
    if found is None:
        raise UserError(f"{model.name}: --expert {config.expert} was given, and this model has no routed experts")
    dense = [layer for layer in layers if layer not in found.layers]
    if dense and config.layers != "all":
        raise UserError(f"{model.name}: layer {dense[0]} has no routed experts; they are in {_spell(found.layers)}")
    own = [layer for layer in layers if layer in found.layers]
    return own, choose_numbers("--expert", str(config.expert), found.n_experts, "experts")


def _refuse_overlap(config: AblateConfig) -> None:
    if "layer" in config.chosen_sites and len(config.chosen_sites) > 1:
        raise UserError(
            f"--together with --sites {config.sites} would change a write twice: that of a layer is the sum of those "
            "of its attention and FFN; give layer, or the others"
        )


def _spell(layers: tuple[int, ...]) -> str:
    return f"layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
