"""From which layer on a token is settled, as a table. Neither torch nor matplotlib is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from internal_policy.inspection.results import Inspection


def decision_data(inspection: Inspection) -> pd.DataFrame:
    """Tell for each position from which layer on all layer policies have the final policy's top token on top.

    Args:
        inspection: What was looked at.

    Returns:
        A row for each position: position, part, token (which was read), next_token (which came next; empty where none
        did), top_token and top_probability (of pi_theta), entropy (of pi_theta, nats), hit (whether the top token came
        next), decided_layer (the lowest l from which on pi^l to pi^L have that token on top; NA where not even pi^L
        does, so that only the final norm brings it about).
    """
    values = inspection.values  # noqa: PD011
    final = values[values["site"] == "policy"].set_index("position")
    layers = values[(values["site"] == "layer") & (values["layer"] > 0)]
    tops = layers.pivot_table(index="position", columns="layer", values="top1_id").sort_index(axis=1)
    agrees = tops.eq(final["top1_id"], axis=0)
    # From the top down, as long as all of them agree.
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
