"""The numbers in the figures of interventions, as tidy tables. Neither torch nor matplotlib is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from internal_policy.interventions.config import SITES
from internal_policy.utils.errors import UserError
from internal_policy.utils.options import parse_numbers, spans

if TYPE_CHECKING:
    from internal_policy.interventions.patching_results import Patching
    from internal_policy.interventions.results import Ablation

SHOWN = ("kl", "entropy_change", "log_prob_change", "flips", "accuracy_change")
"""The quantities of a map, of which the last is there if responses were sampled."""
_PARTS = ("head", "expert")


def ablation_data(ablation: Ablation, quantities: Sequence[str] | None = None) -> pd.DataFrame:
    """Return the numbers of the maps and bars of an ablation.

    Args:
        ablation: The ablation.
        quantities: Which of kl, entropy_change, log_prob_change, flips, accuracy and accuracy_change; by default all
            that a map shows.

    Returns:
        A row per intervention and quantity: the columns of ``ablation.keys``, name (what was changed there: ``ATTN``,
        ``head 3``, ``heads 1-4``, ``FFN, mean``), quantity, value, low and high (95% interval).

    Raises:
        UserError: A quantity that there is not.
    """
    table = ablation.table
    wanted = [q for q in SHOWN if q in table] if quantities is None else list(quantities)
    if bad := [q for q in wanted if q not in table or q + "_low" not in table]:
        known = ", ".join(name.removesuffix("_low") for name in table.columns if name.endswith("_low"))
        raise UserError(f"quantity {bad[0]!r} is not in this ablation; needed is one of {known}")
    names = _names(ablation)
    frames = [
        table[ablation.keys].assign(
            name=names,
            quantity=quantity,
            value=table[quantity],
            low=table[f"{quantity}_low"],
            high=table[f"{quantity}_high"],
        )
        for quantity in wanted
    ]
    return pd.concat(frames, ignore_index=True)


def _names(ablation: Ablation) -> list[str]:
    """What each intervention changed, without the layer."""
    table = ablation.table
    several = len(set(table["how"])) > 1
    names = []
    for row in table.to_dict("records"):
        part = next((_name_part(part, row[part]) for part in _PARTS if part in row), None)
        site = "+".join(TITLES.get(site, site) for site in str(row["site"]).split("+"))
        names.append((part or site) + (f", {row['how']}" if several else ""))
    return names


def _name_part(part: str, value: Any) -> str:
    """Name a head or expert, or several that were changed together: ``head 3``, ``heads 1-4``."""
    return f"{part}{'s' if isinstance(value, str) and not value.isdigit() else ''} {value}"


def layers_changed(ablation: Ablation) -> str | None:
    """Say which layers were changed together.

    Args:
        ablation: The ablation.

    Returns:
        Such as ``3-6``; None if they were changed one by one.
    """
    table = ablation.table
    if "last_layer" not in table:
        return None
    layers = parse_numbers("--layers", str(ablation.config.get("layers", "all")))
    return spans(layers or range(int(table["layer"].min()), int(table["last_layer"].max()) + 1))


def describe_writes(ablation: Ablation) -> str:
    """Say which writes were changed: ``writes``, ``writes of heads``, ``writes of heads 1-4 of layers 3-6``.

    Args:
        ablation: The ablation.

    Returns:
        The writes, with the parts that wrote them, and the layers if several were changed together.
    """
    table, layers = ablation.table, layers_changed(ablation)
    part = next((part for part in _PARTS if part in table), None)
    texts = ["writes"]
    if part is not None:
        first = table[part].iloc[0]
        texts.append(_name_part(part, first) if isinstance(first, str) else f"{part}s")
    return " of ".join(texts if layers is None else [*texts, f"layers {layers}"])


TITLES = {"attn": "ATTN", "ffn": "FFN", "layer": "Layer"}
"""What sites are called in figures."""


def describe_how(ablation: Ablation) -> str:
    """Say what was done to writes: ``set to zero``, ``set to zero or replaced by their mean``.

    Args:
        ablation: The ablation.

    Returns:
        A participle, or several.
    """
    alpha = ablation.config.get("alpha")
    phrases = {
        "zero": "set to zero",
        "mean": "replaced by their mean",
        "resample": "replaced by another response's",
        "scale": f"times {alpha:g}" if alpha is not None else "scaled",
    }
    return " or ".join(phrases[how] for how in dict.fromkeys(ablation.table["how"]))


def patching_data(patching: Patching, sites: Sequence[str] | None = None) -> pd.DataFrame:
    """Return the numbers of the maps of activation patching.

    Args:
        patching: The result.
        sites: Which of layer, attn and ffn; by default all that were patched.

    Returns:
        A row per layer, site and position: token (both where the prompts differ), value and recovery.

    Raises:
        UserError: A site that was not patched.
    """
    wanted = list(patching.sites) if sites is None else list(sites)
    if bad := [site for site in wanted if site not in patching.sites]:
        needed = patching.sites if bad[0] in SITES else SITES
        raise UserError(f"site {bad[0]!r} was not patched; needed is one of {', '.join(needed)}")
    values = patching.values  # noqa: PD011
    rows = values[values["site"].isin(wanted)]
    return rows.assign(token=rows["position"].map(patching.labels())).reset_index(drop=True)
