"""What every measurement says about each layer of one model, in one table. Nothing here needs torch.

    table = layer_evidence(analysis, evaluations=evaluations, ablation=ablation, transfer=transfer)
    table[["change", "change_direction", "accuracy", "ablation_ffn", "cosine"]].corr("spearman")

An entropy curve points to a layer; the other columns ask whether that layer matters: whether its policy solves the
task, what happens without its modules, and whether aligning it moves the parameters as GRPO does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from internal_policy.utils.errors import UserError
from internal_policy.utils.result_format import describe_differences

if TYPE_CHECKING:
    from internal_policy.analysis.results import Analysis
    from internal_policy.bupo.run import Run
    from internal_policy.bupo.transfer_results import Transfer
    from internal_policy.evaluation.results import Evaluation
    from internal_policy.interventions.results import Ablation

QUANTITIES = {
    "change": "ΔH FFN (nats)",
    "change_direction": "its direction part (nats)",
    "accuracy": "accuracy of the layer's policy",
    "ablation_attn": "KL without its attention (nats)",
    "ablation_ffn": "KL without its FFN (nats)",
    "cosine": "cosine with the gradient of GRPO",
    "across": "the same across halves of the prompts",
    "training": "what training at the layer did",
}
"""The columns of the table, each followed by its ``_low`` and ``_high`` where it has an interval."""
_ENDS = ("", "_low", "_high")
_EVALUATED_BY = ("template", "temperature", "token_limit", "reward", "reward_code")
"""Settings of an evaluation that change its accuracy, besides problems and samples."""


def layer_evidence(
    analysis: Analysis,
    *,
    evaluations: Iterable[Evaluation] = (),
    ablation: Ablation | None = None,
    transfer: Transfer | None = None,
    outcomes: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Tabulate what was measured of each layer.

    Args:
        analysis: the analysis, whose FFN changes and boundary layer are compared with the rest.
        evaluations: evaluations of layer policies of the same weights, one a layer, all on the same problems with the
            same settings; those of modules are left out.
        ablation: an ablation of modules, of the same weights.
        transfer: the transfer of each layer, of the same weights.
        outcomes: what training at a layer did: columns layer and value, perhaps low and high.

    Returns:
        A row per layer, indexed from 1: ``QUANTITIES``, of which those that were not measured are missing or NaN, with
        their 95% intervals; ``ceiling`` of the transfer; ``stage``; and whether the layer is the boundary layer, as
        measured (``boundary``) and by direction alone (``boundary_by_direction``).

    Raises:
        UserError: a result is of other weights or another lens than the analysis, or is not of single layers; or the
            evaluations differ in more than the layer, or two are of one layer.
    """
    index = pd.RangeIndex(1, analysis.n_layers + 1, name="layer")
    ffn = analysis.layers[analysis.layers["site"] == "ffn"].set_index("layer")
    columns = [f"{name}{end}" for name in ("change", "change_direction") for end in _ENDS]
    table = ffn[[name for name in columns if name in ffn]].reindex(index)
    given = list(evaluations)
    for result in (*given, ablation, transfer):
        require_same_weights(analysis, result)
    if other := sorted({e.lens for e in given if e.lens is not None} - {analysis.lens}):
        raise UserError(
            f"the evaluations are of policies under the lens {other[0]}, and the analysis is under {analysis.lens}; "
            "give results of one lens"
        )
    own_policies = [e for e in given if e.layer is not None and e.site == "layer"]
    _require_same_benchmark(own_policies)
    layers = {e.layer: e for e in own_policies}
    if len(layers) < len(own_policies):
        twice = next(e for e in own_policies if layers[e.layer] is not e)
        raise UserError(f"layer {twice.layer} has two evaluations; needed is one of each layer, so leave one out")
    if layers:
        rates = {layer: [e.avg["mean"], e.avg["low"], e.avg["high"]] for layer, e in layers.items()}
        table = table.join(pd.DataFrame.from_dict(rates, "index", columns=[f"accuracy{end}" for end in _ENDS]))
    if ablation is not None:
        whole = ablation.table
        parts = [name for name in ("head", "expert", "last_layer") if name in whole]
        if parts or not whole["site"].isin(["attn", "ffn"]).any() or len(set(whole["how"])) > 1:
            raise UserError(
                f"the ablation of {ablation.name} is of single parts, of several layers at once or of several kinds; "
                "needed is one kind (--how) for the attention or the FFN of single layers"
            )
        for site in ("attn", "ffn"):
            rows = whole[whole["site"] == site].drop_duplicates("layer").set_index("layer")
            if len(rows):
                own = rows[[f"kl{end}" for end in _ENDS]]
                table = table.join(own.set_axis([f"ablation_{site}{end}" for end in _ENDS], axis=1))
    if transfer is not None:
        rows = transfer.table.set_index("layer")
        table = table.join(
            rows[["cosine", "low", "high", "across", "ceiling"]].rename(
                columns={"low": "cosine_low", "high": "cosine_high"}
            )
        )
    if outcomes is not None:
        if outcomes["layer"].duplicated().any():
            raise UserError("the outcomes have several rows for one layer; needed is one, such as the mean over seeds")
        rows = outcomes.set_index("layer")
        names = {"value": "training", "low": "training_low", "high": "training_high"}
        table = table.join(rows[[name for name in names if name in rows]].rename(columns=names))
    table["stage"] = list(analysis.stages)
    table["boundary"] = table.index == analysis.boundary_layer
    table["boundary_by_direction"] = table.index == analysis.selection.sensitivity.get("direction")
    return table


def training_outcomes(runs: Iterable[Run]) -> pd.DataFrame:
    """What training at each layer did, from runs of BuPO of one start: the mean gain in held-out accuracy.

    Args:
        runs: finished runs with evaluations; those without a layer, such as GRPO's, are left out.

    Returns:
        Columns layer, value (gain of Avg@K over the start, mean over the runs of a layer) and runs, their number.

    Raises:
        UserError: none of the runs has a layer and both evaluations, or they differ in more than layer and seed.
    """
    found = [
        (run, run.evaluation_start, run.evaluation)
        for run in runs
        if run.layer is not None and run.evaluation is not None and run.evaluation_start is not None
    ]
    for run, _, _ in found:
        # The weights say more than the path to them.
        own, other = ({k: v for k, v in r.setting.items() if k not in ("layer", "model")} for r in (found[0][0], run))
        if differing := describe_differences(own, other):
            raise UserError(
                f"{found[0][0].path} and {run.path} are runs with other settings ({differing}); needed are runs that "
                "differ in layer and seed alone, so give those of one setting"
            )
    _require_same_benchmark([evaluation for _, *both in found for evaluation in both])
    rows = [{"layer": run.layer, "value": end.avg["mean"] - start.avg["mean"]} for run, start, end in found]
    if not rows:
        raise UserError(
            "none of the runs has a layer and evaluations before and after; needed are runs of method bupo with "
            "--eval-samples above 0"
        )
    return pd.DataFrame(rows).groupby("layer", as_index=False).agg(value=("value", "mean"), runs=("value", "size"))


def evidence_sentence(table: pd.DataFrame) -> str:
    """Say in one sentence which layer each measurement favours.

    Args:
        table: of `layer_evidence`.

    Returns:
        Such as "the entropy curve points to layer 6; without its FFN the policy changes most at layer 1".
    """
    boundary = table.index[table["boundary"]]
    parts = [
        f"the entropy curve points to layer {boundary[0]}" if len(boundary) else "the entropy curve names no layer"
    ]
    direction = table.index[table["boundary_by_direction"]]
    if len(direction):
        parts.append(f"its direction part to layer {direction[0]}")
    verb = "the policy changes most "
    for name, module in (("ablation_attn", "attention"), ("ablation_ffn", "FFN")):
        if name in table and table[name].notna().any():
            parts.append(f"without its {module} {verb}at layer {table[name].idxmax()}")
            # It is said once.
            verb = ""
    # At the last layer both objectives are nearly the same.
    below = table["across"].iloc[:-1] if "across" in table else pd.Series(dtype=float)
    if below.notna().any():
        best = int(below.argmax())
        parts.append(
            f"below the last layer alignment moves the parameters most as GRPO does at layer {table.index[best]} "
            f"(cosine across halves {below.iloc[best]:.2f}, ceiling {table['ceiling'].iloc[best]:.2f})"
        )
    if "accuracy" in table and table["accuracy"].notna().any():
        half = table.index[table["accuracy"] >= 0.5 * table["accuracy"].max()]
        parts.append(f"from layer {half[0]} on the layer's policy has at least half of the best accuracy")
    return "; ".join(parts)


def _require_same_benchmark(evaluations: Sequence[Evaluation]) -> None:
    """Raise a `UserError` if evaluations were not made on the same problems in the same way."""

    def made(evaluation: Evaluation) -> dict[str, Any]:
        settings = {name: evaluation.config.get(name) for name in _EVALUATED_BY}
        return {"problems": evaluation.digest(), "samples": evaluation.n_samples, **settings}

    for other in evaluations[1:]:
        first = evaluations[0]
        if differing := describe_differences(made(first), made(other)):
            raise UserError(
                f"{first.name} on {first.benchmark} and {other.name} on {other.benchmark} were not evaluated in the "
                f"same way ({differing}); needed are evaluations on one benchmark with the same settings"
            )


def require_same_weights(analysis: Analysis, result: Evaluation | Ablation | Transfer | Run | None) -> None:
    """Raise a `UserError` if a result, or the start of a run, has other weights than an analysis."""
    if result is None:
        return
    own, theirs = analysis.config.get("weights"), result.config.get("weights")
    if own != theirs:
        raise UserError(
            f"{result.name} has other weights ({theirs}) than the analysis of {analysis.name} ({own}); give results of "
            "one checkpoint"
        )
