"""The numbers of an inspection's heat maps, as a tidy table. Neither torch nor matplotlib is needed."""

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
        inspection: What was looked at.
        sites: Which policies; the final policy, site ``policy``, always follows.
        tokens: Which tokens, from 1; see ``Inspection.positions``.
        last: So many tokens at the end; 24 where neither is given.

    Returns:
        A row for each position, layer (1..L) and site: position, part, token (which was read), next_token (which came
        next; empty where none did), layer, site, entropy (nats), top1_id, top1_token, top1_probability, hit (whether
        the top token came next).

    Raises:
        UserError: a site or tokens that are not there.
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
