"""The statistics of an analysis for groups of tokens: ``analysis.by("kind")``, or by a function of one's own.

A group is some of the response tokens. Its means, standard errors and intervals are those of ``statistics.layer_table``
for these tokens alone: every response contributes the mean over its tokens of the group, weighted by their number, and
errors are clustered by prompt. The groups of a grouping share no token, so their means, weighted by their tokens, give
those of the analysis.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pandas as pd

from internal_policy import statistics
from internal_policy.analysis.token_labels import (
    LABELS,
    GroupingName,
    LabelFunction,
    ResponseTokens,
    correctness,
    label_responses,
    require_grouping,
    suggestion,
)
from internal_policy.data.token_text import from_visible
from internal_policy.utils.errors import UserError, counted

_KEYS = ["response", "layer", "site"]


@dataclass(frozen=True, eq=False)
class TokenGroups:
    """The statistics of an analysis for each group of its tokens. Entropies are in nats, layers counted from 1."""

    name: str
    """The model's name."""
    grouping: str
    """kind, position, correct or policy-entropy, or the name of the function that labelled the tokens."""
    groups: tuple[str, ...]
    """The groups that have tokens, in order."""
    responses: pd.DataFrame
    """One row per response, group, layer and site, as ``Analysis.responses``: the means over the response's n_tokens
    tokens of the group."""
    n_responses: int
    """Responses with labelled tokens."""
    note: str | None = None
    """Which responses that are, in a sentence, if it is not all of them."""
    stages: tuple[str, ...] = ()
    """The stages of layers 1..L in the whole analysis; over those of exploration `summary` averages."""
    lens: str = "policy"
    """The lens of the analysis."""

    @cached_property
    def layers(self) -> pd.DataFrame:
        """One row per group, layer and site: the columns of ``Analysis.layers``, after a column `group`."""
        return self._stack({group: statistics.layer_table(self.rows(group)) for group in self.groups})

    @property
    def nothing_to_compare(self) -> str | None:
        """A sentence if all labelled tokens are in one group; None if there are several."""
        if len(self.groups) > 1:
            return None
        return f"by {self.grouping} there is one group only ({self.groups[0]}), so there is nothing to compare"

    @cached_property
    def policy_entropy(self) -> pd.DataFrame:
        """The entropy of pi_theta at the tokens of each group.

        One row per group: mean, stderr, low and high (95%); final_state_mean and final_state_stderr are of H^L without
        the norm.
        """
        rows = {g: pd.DataFrame([statistics.policy_entropy(self.rows(g))]) for g in self.groups}
        return self._stack(rows)

    @cached_property
    def shares(self) -> pd.DataFrame:
        """One row per group: n_tokens, the share of all labelled tokens, and the n_responses that have some."""
        policy = self.responses[self.responses["site"] == "policy"]
        counts = policy.groupby("group")["n_tokens"].agg(["sum", "count"]).reindex(list(self.groups))
        tokens = counts["sum"].to_numpy(dtype=np.int64)
        numbers = {"n_tokens": tokens, "share": tokens / tokens.sum(), "n_responses": counts["count"].to_numpy()}
        return pd.DataFrame({"group": list(self.groups), **numbers})

    @cached_property
    def summary(self) -> pd.DataFrame:
        """What distinguishes the groups in a few numbers.

        One row per group: n_tokens and share; policy_entropy and its stderr; change, the mean change of the FFN over
        the layers of exploration, and its stderr; and its difference from that of all other tokens, with
        difference_stderr, difference_low and difference_high. NaN where there is nothing to average or to compare.
        """
        rows = []
        for group in self.groups:
            policy = self.policy_entropy.set_index("group").loc[group]
            row = {"policy_entropy": policy["mean"], "policy_entropy_stderr": policy["stderr"]}
            own = self._explored(self.rows(group))
            (change,), (stderr,) = (np.full(1, np.nan),) * 2 if own is None else statistics.clustered_mean(*own)
            row |= {"change": change, "change_stderr": stderr}
            others = None if own is None or len(self.groups) < 2 else self._explored(self._others(group))
            found = [np.full(1, np.nan)] * 4
            if own is not None and others is not None:
                found = [*statistics.clustered_difference(*own, *others)]
            names = ("difference", "difference_stderr", "difference_low", "difference_high")
            row |= {name: float(value[0]) for name, value in zip(names, found, strict=True)}
            rows.append(row)
        return pd.concat([self.shares.drop(columns="n_responses"), pd.DataFrame(rows)], axis=1)

    def rows(self, group: str) -> pd.DataFrame:
        """The rows of `responses` of one group.

        Raises:
            UserError: no such group.
        """
        if group not in self.groups:
            known = ", ".join(self.groups)
            raise UserError(f"no group is called {group!r}; groups are {known}{suggestion(group, self.groups)}")
        return self.responses[self.responses["group"] == group]

    def difference(self, group: str, other: str | None = None) -> pd.DataFrame:
        """Compare two groups in every layer and site.

        Prompts with tokens of both are pairs: what they have in common, such as how hard the problem is, cancels in the
        error of the difference.

        Args:
            group: its name.
            other: the group that is subtracted; by default all other groups together.

        Returns:
            A row per layer and site, as ``statistics.difference_table``: the difference of the means of each quantity
            with its standard error, clustered by prompt, and 95% interval; and n_pairs, the prompts with both.

        Raises:
            UserError: no such group, or nothing to compare it with.
        """
        own = self.rows(group)
        if other == group or len(self.groups) < 2:
            raise UserError(f"the group {group!r} has nothing to be compared with; give two different groups")
        return statistics.difference_table(own, self._others(group) if other is None else self.rows(other))

    def _others(self, group: str) -> pd.DataFrame:
        """The means over the tokens of all other groups, one row per response, layer and site."""
        rows = self.responses[self.responses["group"] != group]
        if len(self.groups) == 2:
            return rows
        names = list(statistics.QUANTITIES)
        sums = rows[names].mul(rows["n_tokens"], axis=0).groupby([rows[k] for k in _KEYS])
        # A sum of nothing is not 0: the site layer has no cosine.
        total = sums.sum(min_count=1)
        first = rows.groupby(_KEYS).agg({"prompt": "first", "n_tokens": "sum"})
        return first.join(total.div(first["n_tokens"], axis=0)).reset_index()

    @property
    def n_layers(self) -> int:
        """L."""
        return int(self.responses["layer"].max())

    @property
    def exploration(self) -> tuple[int, ...]:
        """The layers of the exploration stage of the whole analysis, from 1."""
        return tuple(layer for layer, stage in enumerate(self.stages, start=1) if stage == "exploration")

    def _explored(self, rows: pd.DataFrame) -> tuple[Any, Any, Any] | None:
        """The mean change of the FFN over the layers of exploration, its tokens and its prompt, of each response."""
        rows = rows[(rows["site"] == "ffn") & rows["layer"].isin(self.exploration)]
        if rows.empty:
            return None
        means = rows.groupby("response").agg({"change": "mean", "n_tokens": "first", "prompt": "first"})
        return means[["change"]].to_numpy(), means["n_tokens"].to_numpy(), means["prompt"].to_numpy()

    def _stack(self, tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
        parts = []
        for group, table in tables.items():
            table.insert(0, "group", group)
            parts.append(table)
        return pd.concat(parts, ignore_index=True)

    def _repr_html_(self) -> str:
        from internal_policy.utils.console import number, plus_minus
        from internal_policy.utils.html import card

        shown = pd.DataFrame(
            [
                (
                    row["group"],
                    str(row["n_tokens"]),
                    number(row["share"], ".1%"),
                    number(row["policy_entropy"]) + plus_minus(row["policy_entropy_stderr"]),
                    number(row["change"], "+.3f") + plus_minus(row["change_stderr"]),
                    number(row["difference"], "+.3f") + plus_minus(row["difference_stderr"]),
                )
                for row in self.summary.to_dict("records")
            ],
            columns=["group", "tokens", "share", "H(π_θ)", "mean ΔH FFN, exploration", "less the others'"],
        )
        tokens = counted(int(self.shares["n_tokens"].sum()), "token")
        facts = (f"{counted(self.n_responses, 'response')}, {tokens}", self.note or "", self.nothing_to_compare or "")
        return card(f"Tokens by {self.grouping}", self.name, facts, shown, "nats; .layers has every layer and site")

    def __repr__(self) -> str:
        return f"TokenGroups({self.name!r}, by {self.grouping}: {', '.join(self.groups)})"


class _Measured(Protocol):
    """The parts of an ``Analysis`` that are divided into groups."""

    @property
    def name(self) -> str: ...
    @property
    def lens(self) -> str: ...
    @property
    def stages(self) -> tuple[str, ...]: ...
    @property
    def responses(self) -> pd.DataFrame: ...
    @property
    def tokens(self) -> pd.DataFrame: ...
    @property
    def sequences(self) -> pd.DataFrame: ...
    @property
    def additions(self) -> dict[str, pd.DataFrame]: ...
    @property
    def positions(self) -> dict[str, Any] | None: ...


def group_tokens(analysis: _Measured, by: GroupingName | LabelFunction) -> TokenGroups:
    """Divide the tokens of an analysis into groups (see ``Analysis.by``).

    Args:
        analysis: the analysis.
        by: a built-in grouping, or a function.

    Returns:
        The groups: of all responses for a stored grouping and for ``correct``, otherwise of those kept token by token.

    Raises:
        UserError: an unknown name, no tokens or no rewards, positions chosen at random, or an analysis from before the
            parts of changes were measured.
    """
    if lacking := [name for name in statistics.QUANTITIES if name not in analysis.responses]:
        raise UserError(f"{analysis.name}: this analysis lacks {', '.join(lacking)}; analyse again")
    if callable(by):
        name = getattr(by, "__name__", type(by).__name__)
        _require_tokens(analysis, "a function", texts=True)
        labels, groups = _apply(by, analysis)
        if not groups:
            raise UserError(f"{name} labels no token: it returned None for each; return a label for some")
        found, why = token_rows(analysis.tokens, labels, analysis.responses), "those kept token by token"
    else:
        name = require_grouping(by)
        found, why = _built_in(analysis, name)
        present = set(found["group"])
        groups = tuple(group for group in LABELS[name] if group in present)
    n, total = int(found["response"].nunique()), int(analysis.responses["response"].nunique())
    note = f"{n} of {total} responses, {why}" if n < total else None
    return TokenGroups(analysis.name, name, groups, found, n, note, analysis.stages, analysis.lens)


def _built_in(analysis: _Measured, grouping: GroupingName) -> tuple[pd.DataFrame, str]:
    """The rows of a built-in grouping, and which responses they are of if it is not all of them."""
    scored = "those with a reward"
    stored = analysis.additions.get("groups")
    if stored is not None and not (own := stored[stored["grouping"] == grouping]).empty:
        # Only responses without a reward have no token in a group that was measured.
        return own.drop(columns="grouping"), scored
    if grouping == "correct":
        return correct_rows(analysis.responses, analysis.sequences["reward"]), scored
    _require_tokens(analysis, repr(grouping), f', or with by=("{grouping}",)', texts=grouping == "kind")
    kept = _kept(analysis)
    labels = label_responses(grouping, list(kept.values()))
    rows = token_rows(analysis.tokens, dict(zip(kept, labels, strict=True)), analysis.responses)
    return rows, "those kept token by token"


def token_rows(
    tokens: pd.DataFrame, labels: Mapping[int, Sequence[str | None]], responses: pd.DataFrame
) -> pd.DataFrame:
    """Average per-token values over the tokens of each response and group.

    Args:
        tokens: as ``Analysis.tokens``, every token of its responses.
        labels: by response, the group of each token; None leaves it out.
        responses: as ``Analysis.responses``, for the prompts.

    Returns:
        Columns response, prompt, group, n_tokens, layer, site, and the quantities, float64.
    """
    names = list(statistics.QUANTITIES)
    flat = [(r, t, label) for r, own in labels.items() for t, label in enumerate(own) if label is not None]
    keys = pd.DataFrame(flat, columns=["response", "token", "group"])
    joined = tokens[["response", "token", "layer", "site", *names]].merge(keys, on=["response", "token"])
    by_group = joined.astype(dict.fromkeys(names, np.float64)).groupby(["response", "group", "layer", "site"])
    rows = by_group[names].mean().join(by_group.size().rename("n_tokens")).reset_index()
    prompts = responses.drop_duplicates("response").set_index("response")["prompt"]
    rows.insert(1, "prompt", rows["response"].map(prompts))
    return rows[["response", "prompt", "group", "n_tokens", "layer", "site", *names]]


def correct_rows(responses: pd.DataFrame, rewards: Iterable[float | None]) -> pd.DataFrame:
    """Label whole responses as right or wrong; those without a reward are left out.

    Args:
        responses: as ``Analysis.responses``.
        rewards: of each response, in order; None if it was not scored.

    Returns:
        Columns as `token_rows`.

    Raises:
        UserError: no response has a reward.
    """
    scored = [None if reward is None or pd.isna(reward) else float(reward) for reward in rewards]
    # The same refusal as for labels of single tokens.
    label_responses("correct", [ResponseTokens((), reward) for reward in scored])
    rows = responses.drop(columns="n_analysed", errors="ignore").copy()
    rows["group"] = rows["response"].map(dict(enumerate(map(correctness, scored))))
    columns = ["response", "prompt", "group", "n_tokens", "layer", "site", *statistics.QUANTITIES]
    return rows.loc[rows["group"].notna(), columns].reset_index(drop=True)


def _require_tokens(analysis: _Measured, what: str, instead: str = "", *, texts: bool) -> None:
    tokens = analysis.tokens
    if tokens.empty:
        raise UserError(
            f"grouping by {what} needs the values of single tokens, and this analysis kept none (keep_tokens=0); "
            f"analyse again with keep_tokens{instead}"
        )
    if analysis.positions is not None:
        raise UserError(
            f"grouping by {what} needs every token of a response, and this analysis chose positions at random for its "
            "tolerance; analyse again without tolerance"
        )
    if texts and "token_text" not in tokens:
        raise UserError(
            f"grouping by {what} needs the texts of tokens, which this analysis does not store; analyse again"
        )


def _kept(analysis: _Measured) -> dict[int, ResponseTokens]:
    """The kept responses by their index."""
    policy = analysis.tokens[analysis.tokens["site"] == "policy"].sort_values(["response", "token"])
    texts = policy["token_text"] if "token_text" in policy else pd.Series("", policy.index)
    policy = policy.assign(text=[from_visible(text) for text in texts])
    return {
        int(str(response)): ResponseTokens(rows["text"].tolist(), entropies=rows["entropy_out"].to_numpy())
        for response, rows in policy.groupby("response")
    }


def _apply(by: LabelFunction, analysis: _Measured) -> tuple[dict[int, list[str | None]], tuple[str, ...]]:
    """The label of every kept token as text, and the labels in order: numbers by size, all others by alphabet."""
    labels: dict[int, list[Any]] = {}
    for index, response in _kept(analysis).items():
        row = analysis.sequences.iloc[index]
        labels[index] = [by(text, place, row) for place, text in enumerate(response.texts)]
    distinct = {label for own in labels.values() for label in own if label is not None}
    numeric = all(isinstance(label, (int, float, np.number)) for label in distinct)
    ordered = sorted(distinct) if numeric else sorted(distinct, key=str)
    shown = {r: [None if label is None else str(label) for label in own] for r, own in labels.items()}
    return shown, tuple(dict.fromkeys(map(str, ordered)))
