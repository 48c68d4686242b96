"""The numbers in the figures of an inspection, as tidy tables. Neither torch nor matplotlib is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from internal_policy.inspection.config import SITES, Site, Span
from internal_policy.utils.errors import UserError

if TYPE_CHECKING:
    from internal_policy.inspection.results import Inspection


def inspection_data(
    inspection: Inspection, sites: Sequence[Site] = SITES, *, tokens: Span | None = None, last: int | None = None
) -> pd.DataFrame:
    """Return the numbers of the heat maps.

    Args:
        inspection: The inspection.
        sites: Which policies; the final policy, site ``policy``, is always included.
        tokens: Which tokens, from 1; see ``Inspection.positions``.
        last: The number of tokens at the end; 24 if neither is given.

    Returns:
        A row per position, layer (1..L) and site: position, part, token (the one read), next_token (empty at the last
        position), layer, site, entropy (nats), top1_id, top1_token, top1_probability, hit (whether the top token came
        next).

    Raises:
        UserError: a site or tokens that do not exist.
    """
    if wrong := [site for site in sites if site not in SITES]:
        raise UserError(f"--site is {wrong[0]!r}; needed is one of {', '.join(SITES)}")
    places = inspection.positions(tokens, last)
    values = inspection.values  # noqa: PD011
    wanted = values["position"].isin(list(places)) & values["site"].isin([*sites, "policy"]) & (values["layer"] > 0)
    columns = ["position", "layer", "site", "entropy", "top1_id", "top1_token", "top1_probability"]
    frame = values.loc[wanted, columns].reset_index(drop=True)
    by_position = inspection.tokens.set_index("position")
    following = by_position["token"].shift(-1, fill_value="")
    frame.insert(1, "part", frame["position"].map(by_position["part"]))
    frame.insert(2, "token", frame["position"].map(by_position["token"]))
    frame.insert(3, "next_token", frame["position"].map(following))
    next_id = values.loc[wanted, "next_id"].reset_index(drop=True)
    frame["hit"] = (next_id == frame["top1_id"]).fillna(False).astype(bool)
    return frame


def decision_data(inspection: Inspection) -> pd.DataFrame:
    """Find for each position the layer from which on all layer policies have the final policy's top token on top.

    Args:
        inspection: The inspection.

    Returns:
        A row per position: position, part, token (the one read), next_token (empty at the last position), top_token
        and top_probability (of pi_theta), entropy (of pi_theta, nats), hit (whether the top token came next),
        decided_layer (the lowest l from which on pi^l to pi^L have that token on top; NA if not even pi^L does, so that
        only the final norm puts it there).
    """
    values = inspection.values  # noqa: PD011
    final = values[values["site"] == "policy"].set_index("position")
    layers = values[(values["site"] == "layer") & (values["layer"] > 0)]
    tops = layers.pivot_table(index="position", columns="layer", values="top1_id").sort_index(axis=1)
    agrees = tops.eq(final["top1_id"], axis=0)
    # From the last layer down, as long as all agree.
    n_agreeing = agrees.iloc[:, ::-1].cummin(axis=1).sum(axis=1).astype("Int64")
    tokens = inspection.tokens.set_index("position")
    table = pd.DataFrame(
        {
            "part": tokens["part"],
            "token": tokens["token"],
            "next_token": tokens["token"].shift(-1, fill_value=""),
            "top_token": final["top1_token"],
            "top_probability": final["top1_probability"],
            "entropy": final["entropy"],
            "hit": (final["next_id"] == final["top1_id"]).fillna(False).astype(bool),
            "decided_layer": (inspection.n_layers + 1 - n_agreeing).where(n_agreeing > 0),
        }
    )
    return table.rename_axis("position").reset_index()
