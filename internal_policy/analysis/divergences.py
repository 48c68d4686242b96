"""Divergences between the policies of the layers, as tables (``--divergences``): an optional pass over the responses.

KL(pi_theta || pi^l) and the agreement of the most probable tokens say how far the policy of a layer is from the final
one, KL(pi^l || pi^(l+1)) how far the next layer moves it. Every response token is measured: all pairs of layers at a
position cost little more than the projections of its states.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd

from internal_policy.analysis.additions import AdditionRun
from internal_policy.analysis.position_sampling import MEMORY_ADVICE
from internal_policy.data.responses import Response, prompt_indices
from internal_policy.extractors import Extractor
from internal_policy.extractors.divergences import measure_divergences
from internal_policy.models.options import Lens
from internal_policy.statistics import Floats, clustered_mean, confidence_interval
from internal_policy.utils.distributed import run_with_oom_retry
from internal_policy.utils.workspace import Arrays

_CURVES = ("kl_policy", "kl_next", "top1")


def measure(run: AdditionRun) -> dict[str, pd.DataFrame]:
    """Measure the divergences of every response; an interrupted measurement is resumed.

    Args:
        run: the analysis with its responses, and the model.

    Returns:
        The tables ``divergences`` and ``divergence_matrix`` (see ``tabulate``).

    Raises:
        UserError: NaN or inf in a state, or too little memory for a single response.
    """
    responses = run.responses

    def compute(batch: list[int]) -> Arrays:
        measure_batch = partial(_measure_batch, extractor=run.extractor, lens=run.lens)
        found = run_with_oom_retry([responses[i] for i in batch], measure_batch, MEMORY_ADVICE)
        return {name: np.stack([each[name] for each in found]) for name in (*_CURVES, "matrix")}

    lengths = {i: len(response.input_ids) for i, response in enumerate(responses)}
    portions = run.workspace.run_stage(
        "divergences",
        lengths,
        run.config.batch_size,
        compute,
        description="comparing the policies of the layers",
        processes=run.state,
    )
    return tabulate(portions, responses)


def _measure_batch(responses: Sequence[Response], extractor: Extractor, lens: Lens) -> list[Arrays]:
    return [vars(each) for each in measure_divergences(extractor, responses, lens)]


def tabulate(portions: Sequence[Arrays], responses: Sequence[Response]) -> dict[str, pd.DataFrame]:
    """Tabulate means over all tokens, with standard errors and 95% intervals clustered by prompt.

    Args:
        portions: with ``index`` [R], ``kl_policy``, ``kl_next`` and ``top1`` [R, L] and ``matrix`` [R, L, L], means
            over the tokens of each response.
        responses: all responses, in order.

    Returns:
        ``divergences``: a row per layer with kl_policy = KL(pi_theta || pi^l), kl_next = KL(pi^l || pi^(l+1)) (for the
        last layer KL(pi^L || pi_theta), since pi_theta is what follows it) and top1, the share of the tokens for which
        pi^l and pi_theta have the same most probable token; each followed by its _stderr, _low and _high; n_tokens.
        ``divergence_matrix``: a row per layer and other layer with kl = KL(pi^layer || pi^other), its kl_stderr, kl_low
        and kl_high; n_tokens. Divergences are in nats.
    """
    order = np.argsort(np.concatenate([portion["index"] for portion in portions]))
    values = {name: np.concatenate([p[name] for p in portions])[order] for name in (*_CURVES, "matrix")}
    n_tokens, prompts = [r.n_tokens for r in responses], prompt_indices(responses)
    n_layers, total = values["top1"].shape[1], sum(n_tokens)

    def summarize(name: str, means: Floats) -> dict[str, Floats]:
        mean, stderr = clustered_mean(means, n_tokens, prompts)
        low, high = confidence_interval(means, n_tokens, prompts)
        return {name: mean, f"{name}_stderr": stderr, f"{name}_low": low, f"{name}_high": high}

    layers = np.arange(1, n_layers + 1)
    curves: dict[str, object] = {"layer": layers}
    for name in _CURVES:
        curves |= summarize(name, values[name])
    matrix: dict[str, object] = {"layer": np.repeat(layers, n_layers), "other": np.tile(layers, n_layers)}
    matrix |= summarize("kl", values["matrix"].reshape(len(responses), -1))
    table = pd.DataFrame({**curves, "n_tokens": total})
    # A share lies between 0 and 1, and so does what is known of it.
    table[["top1_low", "top1_high"]] = table[["top1_low", "top1_high"]].clip(0.0, 1.0)
    return {"divergences": table, "divergence_matrix": pd.DataFrame({**matrix, "n_tokens": total})}
