"""The groups of tokens of an analysis (--by), measured on all of its responses.

The values of single tokens are stored for the first responses only. If they are there for all, the groups are averaged
from them; otherwise the responses are run again, and the values are averaged over the groups of each response as soon
as they are computed, so that neither memory nor disk grows with the tokens. The threshold of ``policy-entropy`` is that
of all tokens, so a pass with one projection per token comes first. Right and wrong answers are whole responses, whose
means are in the analysis already.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from internal_policy.analysis import tables
from internal_policy.analysis.additions import AdditionRun
from internal_policy.analysis.position_sampling import MEMORY_ADVICE
from internal_policy.analysis.token_groups import correct_rows, token_rows
from internal_policy.analysis.token_labels import (
    LABELS,
    GroupingName,
    ResponseTokens,
    label_responses,
    require_grouping,
)
from internal_policy.data.responses import Response
from internal_policy.data.token_text import raw_texts_of
from internal_policy.extractors import PolicyReducer, Reducer, TokenValues, reduce_responses
from internal_policy.statistics import Floats
from internal_policy.utils.distributed import run_with_oom_retry
from internal_policy.utils.errors import counted
from internal_policy.utils.workspace import Arrays

logger = logging.getLogger(__name__)

Labels = dict[GroupingName, list[list[str | None]]]
"""For each grouping and response the group of each token."""


def measure_groups(run: AdditionRun) -> dict[str, pd.DataFrame]:
    """Measure every statistic for the groups of tokens that `run.config.by` names.

    Returns:
        ``groups``: the columns of ``Analysis.responses``, with grouping and group; a row per grouping, response, group
        (of which the response has tokens), layer and site. Groupings that are stored already are kept.

    Raises:
        UserError: ``correct`` without rewards.
    """
    known = run.analysis.additions.get("groups")
    there = set() if known is None else set(known["grouping"])
    wanted = [require_grouping(name) for name in run.config.by if name not in there]
    parts = [] if known is None else [known]
    if "correct" in wanted:
        rewards = [response.reward for response in run.responses]
        rows = correct_rows(run.analysis.responses, rewards)
        parts.append(rows.assign(grouping="correct"))
        unscored = sum(reward is None for reward in rewards)
        if unscored and run.state.is_main_process:
            logger.warning("--by correct leaves out %s without a reward", counted(unscored, "response"))
    # In the order of LABELS, by which an interrupted stage is found again.
    if names := [name for name in LABELS if name in wanted and name != "correct"]:
        tokens = run.analysis.tokens
        if tokens["response"].nunique() == len(run.responses):
            labels = _labels(run, names, _stored_entropies(tokens))
            for name in names:
                rows = token_rows(tokens, dict(enumerate(labels[name])), run.analysis.responses)
                parts.append(rows.assign(grouping=name))
        else:
            parts.append(_captured(run, names))
    columns = [name for name in parts[0].columns if name not in ("grouping", "group")]
    columns[2:2] = ["grouping", "group"]
    return {"groups": pd.concat(parts, ignore_index=True)[columns]}


def _labels(run: AdditionRun, names: Sequence[GroupingName], entropies: Sequence[Floats] | None) -> Labels:
    tokenizer = run.model.tokenizer
    ids = [r.input_ids[r.prompt_length :] for r in run.responses]
    texts = raw_texts_of(tokenizer, (i for own in ids for i in own)) if "kind" in names else {}
    special = set(tokenizer.all_special_ids)
    described = [
        ResponseTokens(
            [texts.get(i, "") for i in own],
            entropies=None if entropies is None else entropies[number],
            special=[place for place, i in enumerate(own) if i in special],
        )
        for number, own in enumerate(ids)
    ]
    return {name: label_responses(name, described) for name in names}


def _stored_entropies(tokens: pd.DataFrame) -> list[Floats]:
    policy = tokens[tokens["site"] == "policy"].sort_values(["response", "token"])
    return [own.to_numpy(dtype=np.float64) for _, own in policy.groupby("response")["entropy_out"]]


def _policy_entropies(run: AdditionRun) -> list[Floats]:
    """The entropy of pi_theta at every token of each response, nats."""
    reducer = PolicyReducer(run.extractor)

    def reduce(batch: Sequence[Response]) -> list[TokenValues]:
        return reduce_responses(reducer, batch)

    def compute(batch: list[int]) -> Arrays:
        values = run_with_oom_retry([run.responses[i] for i in batch], reduce, MEMORY_ADVICE)
        return {
            "policy": np.concatenate([v.policy[:, 0] for v in values]),
            "n_tokens": np.array([len(v.policy) for v in values]),
        }

    portions = _stage(run, "policy_entropies", compute, "finding the policy's entropies")
    found = {
        int(i): own.astype(np.float64)
        for p in portions
        for i, own in zip(p["index"], np.split(p["policy"], np.cumsum(p["n_tokens"])[:-1]), strict=True)
    }
    return [found[i] for i in range(len(run.responses))]


def _captured(run: AdditionRun, names: Sequence[GroupingName]) -> pd.DataFrame:
    """The rows of some groupings, from a pass over the responses."""
    entropies = _policy_entropies(run) if "policy-entropy" in names else None
    labels = _labels(run, names, entropies)
    groups: dict[str, tuple[str, ...]] = {name: LABELS[name] for name in names}
    reducer = Reducer(run.extractor, run.lens)

    def reduce(batch: Sequence[Response]) -> list[TokenValues]:
        return reduce_responses(reducer, batch)

    def compute(batch: list[int]) -> Arrays:
        values = run_with_oom_retry([run.responses[i] for i in batch], reduce, MEMORY_ADVICE)
        means: dict[str, list[object]] = {
            name: [] for name in ("layers", "policy", "response", "grouping", "group", "n_tokens")
        }
        for i, value in zip(batch, values, strict=True):
            for grouping, (name, own_labels) in enumerate(labels.items()):
                own = np.array([groups[name].index(label) if label else -1 for label in own_labels[i]])
                for group in np.unique(own[own >= 0]):
                    chosen = own == group
                    found = (
                        value.layers[chosen].mean(axis=0, dtype=np.float64),
                        value.policy[chosen].mean(axis=0, dtype=np.float64),
                        *(i, grouping, group, chosen.sum()),
                    )
                    for column, each in zip(means.values(), found, strict=True):
                        column.append(each)
        return {name: np.array(column) for name, column in means.items()}

    portions = _stage(run, f"groups_{'_'.join(names)}", compute, "grouping tokens")
    return tables.group_table(portions, run.responses, groups)


def _stage(run: AdditionRun, stage: str, compute: Callable[[list[int]], Arrays], what: str) -> list[Arrays]:
    lengths = {i: len(response.input_ids) for i, response in enumerate(run.responses)}
    return run.workspace.run_stage(
        stage, lengths, run.config.batch_size, compute, description=what, processes=run.state
    )
