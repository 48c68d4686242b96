"""What each attention head and each routed expert writes, measured over the responses of an analysis (``--heads``)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from internal_policy import statistics
from internal_policy.analysis.additions import AdditionRun
from internal_policy.analysis.position_sampling import MEMORY_ADVICE
from internal_policy.data.responses import prompt_indices
from internal_policy.extractors.experts import Experts, find_experts
from internal_policy.extractors.heads import Heads, find_heads
from internal_policy.extractors.part_means import EXPERT_QUANTITIES, PartReducer
from internal_policy.extractors.parts import PART_QUANTITIES, norms_after
from internal_policy.models import LanguageModel
from internal_policy.statistics import Floats
from internal_policy.utils.distributed import run_with_oom_retry
from internal_policy.utils.errors import UserError
from internal_policy.utils.workspace import Arrays

logger = logging.getLogger(__name__)


def measure_heads(run: AdditionRun) -> dict[str, pd.DataFrame]:
    """Measure the writes of heads and routed experts at every response token.

    Args:
        run: the analysis, with its model and responses.

    Returns:
        ``heads``: a row for each layer and head (from 1; 0 is the bias of the output projection) with the columns
        layer, head, n_tokens, and each of entropy (nats), rms, cosine and attribution (logits) followed by its
        ``_stderr``, ``_low`` and ``_high``. ``experts``, if the model has routed experts: the same for layer and expert
        (from 1; 0 is the sum of the shared experts), with load (share of the response tokens) and weight (of the
        router) before them; n_tokens is the number of tokens that were routed to the expert, over which the other
        numbers are means.

    Raises:
        UserError: the writes of the heads cannot be measured.
    """
    heads = find_heads(run.model)
    experts = _experts(run.model)
    reducer = PartReducer(heads, experts, run.lens)
    responses = run.responses

    def measure(batch: list[int]) -> Arrays:
        means = run_with_oom_retry([responses[i] for i in batch], reducer, MEMORY_ADVICE)
        arrays = {"heads": np.stack([m.heads for m in means])}
        if experts is not None:
            arrays["experts"] = np.stack([m.experts for m in means if m.experts is not None])
        return arrays

    portions = run.workspace.run_stage(
        "heads",
        {i: len(response.input_ids) for i, response in enumerate(responses)},
        run.config.batch_size,
        measure,
        description="measuring heads" if experts is None else "measuring heads and experts",
        processes=run.state,
    )
    order = np.argsort(np.concatenate([portion["index"] for portion in portions]))
    n_tokens = np.array([response.n_tokens for response in responses], dtype=np.float64)
    prompts = np.asarray(prompt_indices(responses))
    found = {"heads": head_table(_joined(portions, "heads", order), n_tokens, prompts, heads)}
    if experts is not None:
        found["experts"] = expert_table(_joined(portions, "experts", order), n_tokens, prompts, experts)
    return found


def head_table(values: Floats, n_tokens: Floats, prompts: Any, heads: Heads) -> pd.DataFrame:
    """Tabulate means over tokens with clustered errors, one row per layer and head.

    Args:
        values: [R, L, heads, len(PART_QUANTITIES)] means of each response.
        n_tokens: [R] its tokens.
        prompts: [R] its prompt.
        heads: the heads.

    Returns:
        The table ``heads`` of ``measure_heads``.
    """
    layers = range(1, values.shape[1] + 1)
    keys = _keys(layers, "head", heads.numbers).assign(n_tokens=int(n_tokens.sum()))
    return _sorted(keys, _columns(values, n_tokens, prompts, PART_QUANTITIES), "head")


def expert_table(values: Floats, n_tokens: Floats, prompts: Any, experts: Experts) -> pd.DataFrame:
    """Tabulate means over the tokens that are routed to each expert, with clustered errors, and the share of these.

    Args:
        values: [R, layers, experts, len(EXPERT_QUANTITIES)] means of each response.
        n_tokens: [R] its tokens.
        prompts: [R] its prompt.
        experts: the experts.

    Returns:
        The table ``experts`` of ``measure_heads``.
    """
    routed = np.rint(values[..., 0] * n_tokens[:, None, None])
    keys = _keys(experts.layers, "expert", experts.numbers).assign(n_tokens=routed.sum(axis=0).ravel().astype(int))
    load = _columns(values[..., :1], n_tokens, prompts, EXPERT_QUANTITIES[:1])
    others = _columns(values[..., 1:], routed.reshape(len(routed), -1), prompts, EXPERT_QUANTITIES[1:])
    return _sorted(keys, {**load, **others}, "expert")


def _experts(model: LanguageModel) -> Experts | None:
    try:
        return find_experts(model, norms_after(model, model.family.ffn_write))
    except UserError as error:
        # The heads can be measured all the same.
        logger.warning("%s; experts.csv is not written", error)
        return None


def _joined(portions: Sequence[Arrays], name: str, order: Any) -> Floats:
    joined: Floats = np.concatenate([portion[name] for portion in portions])[order]
    return joined


def _keys(layers: Sequence[int], what: str, numbers: list[int]) -> pd.DataFrame:
    return pd.DataFrame({"layer": np.repeat(list(layers), len(numbers)), what: np.tile(numbers, len(layers))})


def _columns(values: Floats, n_tokens: Floats, prompts: Any, quantities: Sequence[str]) -> dict[str, Floats]:
    """Mean, error and interval of each quantity, [layers * parts] each, from means [R, layers, parts, quantities]."""
    columns: dict[str, Floats] = {}
    for i, quantity in enumerate(quantities):
        flat = values[..., i].reshape(len(values), -1)
        mean, stderr = statistics.clustered_mean(flat, n_tokens, prompts)
        low, high = statistics.confidence_interval(flat, n_tokens, prompts)
        columns |= {quantity: mean, f"{quantity}_stderr": stderr}
        columns |= {f"{quantity}_low": low, f"{quantity}_high": high}
    return columns


def _sorted(keys: pd.DataFrame, columns: dict[str, Floats], what: str) -> pd.DataFrame:
    return keys.assign(**columns).sort_values(["layer", what], ignore_index=True)
