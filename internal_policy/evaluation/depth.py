"""Evaluations of internal policies over depth: which layers are meant, and their rates and agreement in one table.

    evaluations = evaluate_layers("testbed/qwen3", layers="all")
    table = depth_table(evaluations)
    table[table["quantity"] == "avg"]  # Avg@K against the layer, with intervals

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from internal_policy import statistics
from internal_policy.evaluation import metrics
from internal_policy.evaluation.config import EvaluateConfig
from internal_policy.evaluation.results import Evaluation
from internal_policy.models.paths import declared_layers
from internal_policy.utils.errors import UserError
from internal_policy.utils.options import Numbers, parse_numbers

if TYPE_CHECKING:
    from internal_policy.models import LanguageModel

COMPARED = ("agreement", "kl", "log_prob", "policy_log_prob")
"""The quantities that compare an internal policy with pi_theta; see ``generation.Agreement``."""
_COLUMNS = ("model", "benchmark", "layer", "site", "lens", "quantity", "value", "stderr", "low", "high")


def require_layer(layer: int, model: LanguageModel | EvaluateConfig) -> None:
    """Refuse a layer that a model does not have, before its weights are loaded.

    Args:
        layer: l, counted from 1.
        model: the model, or the settings that name it.

    Raises:
        UserError: there is no such layer.
    """
    n = _n_layers(model)
    if n is not None and not 1 <= layer <= n:
        raise UserError(f"--layer is {layer}; {_name(model)} has {n} layers")


def choose_layers(layers: Numbers, model: LanguageModel | EvaluateConfig) -> list[int]:
    """Find the layers that are meant, before the weights are loaded.

    Args:
        layers: ``all``, or numbers from 1, also as text such as ``"2,4-6"``.
        model: the model, or the settings that name it.

    Returns:
        The layers in ascending order, each once.

    Raises:
        UserError: something else, or a layer that the model does not have.
    """
    n = _n_layers(model)
    chosen = parse_numbers("--layers", layers)
    if chosen is None:
        if n is None:
            raise UserError(f"--layers is all, and {_name(model)} does not say how many layers it has; give numbers")
        return list(range(1, n + 1))
    if n is not None and chosen[-1] > n:
        raise UserError(f"--layers asks for layer {chosen[-1]}; {_name(model)} has {n} layers")
    return list(chosen)


def _name(model: LanguageModel | EvaluateConfig) -> str:
    return model.model if isinstance(model, EvaluateConfig) else model.name


def _n_layers(model: LanguageModel | EvaluateConfig) -> int | None:
    """L; None if it is only known when the model is loaded."""
    if not isinstance(model, EvaluateConfig):
        return model.n_layers
    declared = declared_layers(model.model, model.revision)
    if declared is not None:
        return declared
    from internal_policy.models import check

    _, config = check(model.model, revision=model.revision, trust_remote_code=model.trust_remote_code)
    found = getattr(config.get_text_config(), "num_hidden_layers", None)
    return None if found is None else int(found)


def depth_table(evaluations: Evaluation | Sequence[Evaluation]) -> pd.DataFrame:
    """Tabulate rates, lengths and agreement of internal policies, with 95% intervals over problems.

    Args:
        evaluations: of internal policies, and of pi_theta itself for comparison, of one model or several.

    Returns:
        A row for each evaluation and quantity: model, benchmark, layer (from 1; NA for pi_theta), site (layer, attn,
        ffn, or policy for pi_theta), lens, quantity, value, stderr (clustered by problem), low, high. Quantities: avg
        (Avg@K), pass@k for each K and truncated are rates from 0 to 1, length is in tokens; of internal policies also
        agreement (share of tokens at which the most probable token is that of pi_theta), kl (KL(pi^l || pi_theta)),
        log_prob and policy_log_prob (log-probability of the sampled tokens under the internal policy and under
        pi_theta), means over tokens in nats.
    """
    given = [evaluations] if isinstance(evaluations, Evaluation) else list(evaluations)
    parts = []
    for evaluation in given:
        own = {
            "model": evaluation.model_name,
            "benchmark": evaluation.benchmark,
            "layer": evaluation.layer,
            "site": evaluation.site or "policy",
            "lens": evaluation.lens or "",
        }
        parts += [{**own, "quantity": name, **row} for name, row in _measures(evaluation).items()]
    table = pd.DataFrame(parts, columns=list(_COLUMNS)).astype({"layer": "Int64"})
    return table.sort_values(["model", "benchmark", "site", "lens", "layer"], kind="stable", ignore_index=True)


def _measures(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Each quantity with its standard error and interval."""
    problems, samples = evaluation.problems, evaluation.samples
    rates = {"avg": problems["correct"] / problems["n"]}
    ks = [int(k) for k in evaluation.pass_at_k["k"]]
    rates |= {f"pass@{k}": v for k, v in zip(ks, metrics.pass_values(problems, ks).T, strict=True)}
    rates["truncated"] = problems["truncated"] / problems["n"]
    measures = {
        name: _mean(values, np.ones(len(problems)), problems["problem"], rate=True) for name, values in rates.items()
    }
    measures["length"] = _mean(problems["mean_length"], np.ones(len(problems)), problems["problem"])
    if evaluation.layer is not None:
        for name in COMPARED:
            found = _mean(samples[name], samples["n_tokens"], samples["problem"])
            if name == "agreement":
                found |= {end: float(np.clip(found[end], 0, 1)) for end in ("low", "high")}
            measures[name] = found
    return measures


def _mean(
    values: npt.ArrayLike, weights: npt.ArrayLike, problems: npt.ArrayLike, rate: bool = False
) -> dict[str, float]:
    column = np.asarray(values, dtype=np.float64)[:, None]
    mean, stderr = statistics.clustered_mean(column, weights, problems)
    low, high = statistics.rate_interval(column) if rate else statistics.confidence_interval(column, weights, problems)
    return {"value": float(mean[0]), "stderr": float(stderr[0]), "low": float(low[0]), "high": float(high[0])}
