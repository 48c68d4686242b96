"""Means over tokens with standard errors clustered by prompt.

The paper averages over all response tokens of all responses (arXiv 2512.19673v3, section 3.2). Tokens of one response
are not independent, and neither are several responses to one prompt, so the uncertainty is clustered: a cluster (the
prompt, or the response if each prompt was sampled once) is the unit of sampling. A response's length is random, too,
which makes the token mean a ratio of two sums.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from internal_policy.utils.errors import UserError

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]

SITES = ("layer", "attn", "ffn")
QUANTITIES = (
    *("entropy_in", "entropy_out", "change", "change_direction", "change_scale"),
    *("cosine", "rms_in", "rms_out"),
)
_RESAMPLES_PER_CHUNK = 256
_LEVEL = 0.95
_RATE_ROUNDING = 1e-12
"""A rate of at most 1 is computed in a few steps, each of which rounds by at most 1e-16."""


def clustered_mean(
    values: npt.ArrayLike, n_tokens: npt.ArrayLike, clusters: npt.ArrayLike | None = None
) -> tuple[Floats, Floats]:
    """Compute the token mean of each column, with its cluster-robust standard error.

    With cluster totals S_c = sum n_i v_i and N_c = sum n_i, the mean m = sum S_c / sum N_c is a ratio estimator; its
    linearised variance is C/(C-1) * sum_c (S_c - m N_c)^2 / (sum N_c)^2 (Cochran, Sampling Techniques, section 6.3;
    the same as the CR1 sandwich of a weighted regression on a constant).

    Args:
        values: per-response means over tokens, [G, K]; NaN if a response has no value in that column.
        n_tokens: response tokens behind each mean, [G]; [G, K] if they differ between the columns.
        clusters: integer label of the cluster of each response, [G]; by default each response is its own.

    Returns:
        mean [K] and standard error [K], in the unit of `values`. A column with fewer than two clusters has a NaN
        error, and one without any value a NaN mean.

    Raises:
        UserError: if the shapes disagree, a token count is negative or not finite, or a value is infinite.
    """
    sums, tokens = _cluster_totals(values, n_tokens, clusters)
    totals = tokens.sum(axis=0)
    mean = _divide(sums.sum(axis=0), totals)
    count = np.count_nonzero(tokens, axis=0).astype(np.float64)
    scatter = _divide(((sums - np.nan_to_num(mean) * tokens) ** 2).sum(axis=0), totals**2)
    return mean, np.sqrt(scatter * _divide(count, count - 1))


def confidence_interval(
    values: npt.ArrayLike, n_tokens: npt.ArrayLike, clusters: npt.ArrayLike | None = None, level: float = 0.95
) -> tuple[Floats, Floats]:
    """Compute a confidence interval for the token mean of each column.

    It keeps its level from some forty clusters of unequal sizes and skewed values on; with eight to sixteen, a 95%
    interval covers about 0.92.

    Mean +- t * stderr with C-1 degrees of freedom covers only 0.90 if long responses are also the uncertain ones, so
    two standard corrections are applied, each of which vanishes for many equal clusters. A cluster's residual is
    divided by (1 - its share of the tokens) (the delete-one jackknife), and the degrees of freedom follow from the
    residuals' fourth moment (Satterthwaite), at most C-1.

    Args:
        values: per-response means over tokens, [G, K]; NaN where not defined.
        n_tokens: response tokens behind each mean, [G]; [G, K] if they differ between the columns.
        clusters: integer label of the cluster of each response, [G]; by default each response is its own.
        level: confidence level, between 0 and 1.

    Returns:
        lower and upper ends, [K] each, in the unit of `values`; NaN with fewer than two clusters.

    Raises:
        UserError: as `clustered_mean`, and if `level` is not between 0 and 1.
    """
    from scipy.stats import t as scipy_t

    if not 0.0 < level < 1.0:
        raise UserError(f"level is {level}; a confidence level lies between 0 and 1, such as 0.95")
    sums, tokens = _cluster_totals(values, n_tokens, clusters)
    totals = tokens.sum(axis=0)
    mean = _divide(sums.sum(axis=0), totals)
    count = np.count_nonzero(tokens, axis=0).astype(np.float64)
    residuals = np.nan_to_num(_divide(sums - np.nan_to_num(mean) * tokens, totals - tokens))
    square = (residuals**2).sum(axis=0)
    stderr = np.where(count > 1, np.sqrt(square * (1 - 1 / np.maximum(count, 1))), np.nan)
    spread = _divide((residuals**4).sum(axis=0), square**2) - 1 / np.maximum(count, 1)
    degrees = np.where(spread * (count - 1) > 2, 2 / np.where(spread > 0, spread, 1.0), count - 1)
    t: Floats = np.asarray(scipy_t.ppf((1 + level) / 2, degrees), dtype=np.float64)
    return mean - t * stderr, mean + t * stderr


def clustered_difference(
    first: npt.ArrayLike,
    n_first: npt.ArrayLike,
    clusters_first: npt.ArrayLike,
    second: npt.ArrayLike,
    n_second: npt.ArrayLike,
    clusters_second: npt.ArrayLike,
    level: float = 0.95,
) -> tuple[Floats, Floats, Floats, Floats]:
    """Compute the difference of two token means of each column, with an error that is clustered over both.

    Clusters that have tokens on both sides pair them: what such a cluster has in common cancels. The linearised
    residual of a cluster is that of the first mean less that of the second; without common clusters the variances add.
    The interval is corrected as that of `confidence_interval`, and its degrees of freedom are at most Welch's.

    Args:
        first: means over the tokens of each part of the first side, [G, K]; NaN where not defined.
        n_first: tokens behind each, [G].
        clusters_first: integer label of the cluster of each, [G].
        second: the same of the second side, [M, K].
        n_second: tokens behind each, [M].
        clusters_second: integer label of the cluster of each, [M].
        level: confidence level, between 0 and 1.

    Returns:
        difference of the first mean from the second, its standard error, and the lower and upper end of its interval,
        [K] each. With fewer than two clusters on a side the error and the ends are NaN.

    Raises:
        UserError: as `confidence_interval`.
    """
    from scipy.stats import t as scipy_t

    if not 0.0 < level < 1.0:
        raise UserError(f"level is {level}; a confidence level lies between 0 and 1, such as 0.95")
    values = np.concatenate([np.asarray(v, dtype=np.float64) for v in (first, second)])
    counts = [np.asarray(n, dtype=np.float64) for n in (n_first, n_second)]
    clusters = np.concatenate([np.asarray(c) for c in (clusters_first, clusters_second)])
    side = np.repeat([0, 1], [len(n) for n in counts])
    parts = []
    for which in (0, 1):
        # The other side's parts have no tokens here, so that both have the same clusters in the same order.
        sums, tokens = _cluster_totals(values, np.where(side == which, np.concatenate(counts), 0.0), clusters)
        totals = tokens.sum(axis=0)
        mean = _divide(sums.sum(axis=0), totals)
        count = np.count_nonzero(tokens, axis=0).astype(np.float64)
        residuals = sums - np.nan_to_num(mean) * tokens
        # Each side has the factor of its own number of clusters.
        scaled = _divide(residuals, totals * np.ones_like(tokens)) * np.sqrt(_divide(count, count - 1))
        deleted = np.nan_to_num(_divide(residuals, totals - tokens)) * np.sqrt(_divide(count - 1, count))
        parts.append((mean, count, scaled, deleted, tokens > 0))
    (mean, n_a, scaled_a, deleted_a, in_a), (other, n_b, scaled_b, deleted_b, in_b) = parts
    stderr = np.sqrt(((scaled_a - scaled_b) ** 2).sum(axis=0))
    residuals = deleted_a - deleted_b
    square = (residuals**2).sum(axis=0)
    count = np.count_nonzero(in_a | in_b, axis=0).astype(np.float64)
    spread = _divide((residuals**4).sum(axis=0), square**2) - 1 / np.maximum(count, 1)
    own = [(deleted**2).sum(axis=0) for deleted in (deleted_a, deleted_b)]
    welch = _divide((own[0] + own[1]) ** 2, _divide(own[0] ** 2, n_a - 1) + _divide(own[1] ** 2, n_b - 1))
    most = np.fmin(np.where(welch > 0, welch, np.inf), np.maximum(count - 1, 1))
    degrees = np.where(spread * most > 2, 2 / np.where(spread > 0, spread, 1.0), most)
    reach = np.asarray(scipy_t.ppf((1 + level) / 2, degrees), dtype=np.float64) * np.sqrt(square)
    unknown = (n_a < 2) | (n_b < 2)
    stderr, reach = (np.where(unknown, np.nan, each) for each in (stderr, reach))
    difference: Floats = mean - other
    return difference, stderr, difference - reach, difference + reach


def bootstrap_means(
    values: npt.ArrayLike,
    n_tokens: npt.ArrayLike,
    clusters: npt.ArrayLike | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Floats:
    """Compute token means of bootstrap resamples, in which whole clusters are drawn with replacement.

    Args:
        values: per-response means over tokens, [G, K]; NaN where not defined.
        n_tokens: response tokens behind each mean, [G]; [G, K] if they differ between the columns.
        clusters: integer label of the cluster of each response, [G]; by default each response is its own.
        resamples: number B of resamples.
        seed: of the random generator; the same seed gives the same resamples.

    Returns:
        [B, K] means in the unit of `values`. All columns of a row are of the same draw, so that correlations are kept.

    Raises:
        UserError: as `clustered_mean`, and if `resamples` is below 1.
    """
    if resamples < 1:
        raise UserError(f"resamples is {resamples}; at least 1 is needed")
    sums, tokens = _cluster_totals(values, n_tokens, clusters)
    n_clusters = sums.shape[0]
    generator = np.random.default_rng(seed)
    shares = np.full(n_clusters, 1.0 / n_clusters)
    means = np.empty((resamples, sums.shape[1]))
    for start in range(0, resamples, _RESAMPLES_PER_CHUNK):
        stop = min(start + _RESAMPLES_PER_CHUNK, resamples)
        draws = generator.multinomial(n_clusters, shares, size=stop - start).astype(np.float64)
        means[start:stop] = _divide(draws @ sums, draws @ tokens)
    return means


def rate_interval(values: npt.ArrayLike) -> tuple[Floats, Floats]:
    """95% interval for the mean over problems of a rate.

    It is `confidence_interval` with each problem as a cluster, widened if nearly all problems are at 0 or 1, as on a
    benchmark that is too hard or too easy: the observed rates hardly vary there, and an interval from their spread
    alone hardly ever covers the truth. A kind of problem that makes up a share q of all is missing among P of
    them with probability (1-q)^P, so there may be up to u = 1 - 0.05^(1/P) (the "rule of three", 3/P) of such problems,
    with any rate: the interval reaches at least a share u of the way from the mean to 0 and to 1. With some 30 problems
    or more it covers at least 93% (tested by simulation).

    Args:
        values: rates, [P, K], a row per problem.

    Returns:
        lower and upper ends, [K] each, from 0 to 1; NaN with fewer than two problems.
    """
    rates = np.asarray(values, dtype=np.float64)
    low, high = confidence_interval(rates, np.ones(len(rates)), level=_LEVEL)
    mean, unseen = rates.mean(axis=0), _unseen_share(len(rates))
    # minimum and maximum keep the NaN of a single problem.
    low, high = np.minimum(low, mean - unseen * mean), np.maximum(high, mean + unseen * (1 - mean))
    return np.clip(low, 0, 1), np.clip(high, 0, 1)


def rate_difference_interval(differences: npt.ArrayLike) -> tuple[Floats, Floats]:
    """95% interval for the mean over problems of paired differences of rates.

    It is `confidence_interval` with each problem as a cluster. If all problems differ by the same amount, or none at
    all, that would be a point; the interval then reaches at least as far towards -1 and 1 as problems that differ
    otherwise may be missing (see `rate_interval`). It covers at least 93% if some ten problems differ; if both models
    solve nearly everything it is too short.

    Args:
        differences: [P, K], a row per problem.

    Returns:
        lower and upper ends, [K] each, from -1 to 1; NaN with fewer than two problems.
    """
    d = np.asarray(differences, dtype=np.float64)
    low, high = confidence_interval(d, np.ones(len(d)), level=_LEVEL)
    mean, unseen = d.mean(axis=0), np.where(without_spread(d), _unseen_share(len(d)), 0.0)
    # minimum and maximum keep the NaN of a single problem.
    low, high = np.minimum(low, mean - unseen * (1 + mean)), np.maximum(high, mean + unseen * (1 - mean))
    return np.clip(low, -1, 1), np.clip(high, -1, 1)


def without_spread(differences: Floats) -> npt.NDArray[np.bool_]:
    """Say of which columns all differences of rates are the same number, but for rounding.

    Args:
        differences: [P, K], a row per problem.

    Returns:
        [K].
    """
    spread: npt.NDArray[np.bool_] = np.ptp(differences, axis=0) <= _RATE_ROUNDING
    return spread


def _unseen_share(n: int) -> float:
    """The largest share (about 3/n) of a kind of problem that n problems lack with probability 5%."""
    return float(-np.expm1(np.log1p(-_LEVEL) / n))


def layer_table(responses: pd.DataFrame) -> pd.DataFrame:
    """Tabulate mean, clustered standard error and 95% interval of every quantity, one row per layer and site.

    Clusters are the prompts: responses to one prompt share its difficulty and its subject, so they are not independent.
    If each prompt was sampled once, this is the same as clustering by response.

    Args:
        responses: one row per response, layer and site, with the columns response, prompt, layer (1..L), site,
            n_tokens, and `QUANTITIES`: entropy_in, entropy_out, change, change_direction, change_scale (nats), cosine,
            rms_in and rms_out; means over the tokens of the response.

    Returns:
        a row per layer (ascending) and site (layer, attn, ffn) with the columns layer, site, each quantity followed by
        its `_stderr`, `_low` and `_high` (ends of the 95% interval), and n_tokens (the total). A site that was not
        measured has no rows.

    Raises:
        UserError: if a column is missing, or a response appears twice in one layer and site.
    """
    _require_columns(responses, ("response", "prompt", "layer", "site", "n_tokens", *QUANTITIES))
    tables = []
    for site in (site for site in SITES if (responses["site"] == site).any()):
        table: dict[str, object] = {}
        for quantity in QUANTITIES:
            layers, values, tokens, prompts = _by_layer(responses, site, quantity)
            mean, stderr = clustered_mean(values, tokens, prompts)
            low, high = confidence_interval(values, tokens, prompts)
            table |= {"layer": layers, "site": site, quantity: mean, f"{quantity}_stderr": stderr}
            table |= {f"{quantity}_low": low, f"{quantity}_high": high}
        tables.append(pd.DataFrame(table | {"n_tokens": int(tokens.sum())}))
    columns = ["layer", "site", *(q + end for q in QUANTITIES for end in ("", "_stderr", "_low", "_high")), "n_tokens"]
    if not tables:
        return pd.DataFrame(columns=columns)
    return pd.concat(tables)[columns].sort_values("layer", kind="stable", ignore_index=True)


def difference_table(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Tabulate the difference of two means of every quantity, one row per layer and site.

    Args:
        first: as for `layer_table`, such as the means over one group of tokens.
        second: the same of what it is compared with; a prompt that is in both is a pair.

    Returns:
        as `layer_table`: each quantity is the difference, first less second, with its `_stderr`, `_low` and `_high`
        (`clustered_difference`); n_pairs, the number of prompts in both, instead of n_tokens.

    Raises:
        UserError: if a column is missing, or a response appears twice in one layer and site.
    """
    for table in (first, second):
        _require_columns(table, ("response", "prompt", "layer", "site", "n_tokens", *QUANTITIES))
    n_pairs = len(set(first["prompt"]) & set(second["prompt"]))
    tables = []
    for site in (site for site in SITES if all((t["site"] == site).any() for t in (first, second))):
        differences: dict[str, object] = {}
        for quantity in QUANTITIES:
            layers, *one = _by_layer(first, site, quantity)
            _, *other = _by_layer(second, site, quantity)
            found = clustered_difference(one[0], one[1], one[2], other[0], other[1], other[2])
            ends = (quantity, *(f"{quantity}_{end}" for end in ("stderr", "low", "high")))
            differences |= {"layer": layers, "site": site, **dict(zip(ends, found, strict=True))}
        tables.append(pd.DataFrame(differences | {"n_pairs": n_pairs}))
    columns = ("layer", "site", *(q + end for q in QUANTITIES for end in ("", "_stderr", "_low", "_high")), "n_pairs")
    if not tables:
        return pd.DataFrame(columns=list(columns))
    return pd.concat(tables)[list(columns)].sort_values("layer", kind="stable", ignore_index=True)


def policy_entropy(responses: pd.DataFrame) -> dict[str, float]:
    """Compute the entropy of the language model policy pi_theta, and that of the last layer's internal policy.

    Args:
        responses: as for `layer_table`; the rows of site "policy" are read: entropy_out belongs to
            softmax(LN_final(H^L) E_u^T) (arXiv 2512.19673v3, eq. 1), entropy_in to softmax(H^L E_u^T) (eq. 5).

    Returns:
        mean, stderr, low and high (95% interval) of the policy's entropy, final_state_mean and final_state_stderr
        without the norm; nats.

    Raises:
        UserError: if a column is missing or there is no "policy" row.
    """
    _require_columns(responses, ("prompt", "site", "n_tokens", "entropy_in", "entropy_out"))
    rows = responses[responses["site"] == "policy"]
    if rows.empty:
        raise UserError("the responses have no row of site 'policy'; analyse them again to have the policy's entropy")
    columns = rows[["entropy_out", "entropy_in"]]
    mean, stderr = clustered_mean(columns, rows["n_tokens"], rows["prompt"])
    low, high = confidence_interval(columns, rows["n_tokens"], rows["prompt"])
    return {
        "mean": float(mean[0]),
        "stderr": float(stderr[0]),
        "low": float(low[0]),
        "high": float(high[0]),
        "final_state_mean": float(mean[1]),
        "final_state_stderr": float(stderr[1]),
    }


def change_curves(
    responses: pd.DataFrame, site: str = "ffn", quantity: str = "change", *, resamples: int = 1000, seed: int = 0
) -> Floats:
    """Draw bootstrap resamples of each layer's mean, by default of its entropy change (arXiv 2512.19673v3, eqs. 11-13).

    Args:
        responses: as for `layer_table`; whole prompts are drawn, with all layers of their responses.
        site: "layer", "attn" or "ffn".
        quantity: the column whose means are drawn.
        resamples: number B of resamples.
        seed: of the random generator; the same seed draws the same prompts for every quantity.

    Returns:
        [B, L] means in the unit of the quantity, columns in order of the layers.

    Raises:
        UserError: if a column is missing or the site has no rows.
    """
    _require_columns(responses, ("response", "prompt", "layer", "site", "n_tokens", quantity))
    if not (responses["site"] == site).any():
        raise UserError(f"the responses have no row of site {site!r}; sites are {', '.join(SITES)}")
    _, values, tokens, prompts = _by_layer(responses, site, quantity)
    return bootstrap_means(values, tokens, prompts, resamples=resamples, seed=seed)


def _cluster_totals(
    values: npt.ArrayLike, n_tokens: npt.ArrayLike, clusters: npt.ArrayLike | None
) -> tuple[Floats, Floats]:
    """Sum of n_i v_i and of n_i per cluster and column, [C, K] each; a NaN value counts in neither."""
    v = np.asarray(values, dtype=np.float64)
    n = np.asarray(n_tokens, dtype=np.float64)
    if v.ndim != 2 or v.shape[0] == 0 or n.shape not in (v.shape[:1], v.shape):
        raise UserError(
            f"values {v.shape} and n_tokens {n.shape} must be [G, K], and [G] or [G, K], with at least one response"
        )
    if not np.all(np.isfinite(n)) or np.any(n < 0):
        raise UserError("n_tokens holds a negative or non-finite count; each must be 0 or more")
    if np.any(np.isinf(v)):
        raise UserError("values holds an infinite mean; only NaN (not defined) is allowed apart from finite numbers")
    weights = np.where(np.isnan(v), 0.0, n if n.ndim == 2 else n[:, None])
    products = weights * np.nan_to_num(v)
    if clusters is None:
        return products, weights
    labels = np.asarray(clusters)
    if labels.shape != n.shape[:1]:
        raise UserError(f"clusters has shape {labels.shape}; it needs one label for each of the {len(n)} responses")
    unique, index = np.unique(labels, return_inverse=True)
    sums = np.zeros((unique.size, v.shape[1]))
    tokens = np.zeros_like(sums)
    np.add.at(sums, index, products)
    np.add.at(tokens, index, weights)
    return sums, tokens


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)


def _require_columns(responses: pd.DataFrame, columns: tuple[str, ...]) -> None:
    missing = [name for name in columns if name not in responses.columns]
    if missing:
        raise UserError(f"the responses lack the column(s) {', '.join(missing)}; needed are {', '.join(columns)}")


def _by_layer(responses: pd.DataFrame, site: str, quantity: str) -> tuple[Ints, Floats, Floats, Ints]:
    """Layers [L], values [G, L], tokens [G] and prompts [G] of one site and quantity."""
    rows = responses[responses["site"] == site]
    # Without pandas, whose pivot table for each quantity would take most of the time of a small analysis.
    names, first, response = np.unique(rows["response"].to_numpy(), return_index=True, return_inverse=True)
    layers, layer = np.unique(rows["layer"].to_numpy(dtype=np.int64), return_inverse=True)
    cells = response * layers.size + layer
    if np.unique(cells).size < cells.size:
        raise UserError(f"a response appears twice in one layer at site {site!r}; each may appear once")
    wide = np.full(names.size * layers.size, np.nan)
    wide[cells] = rows[quantity].to_numpy(dtype=np.float64)
    return (
        layers,
        wide.reshape(names.size, layers.size),
        rows["n_tokens"].to_numpy(dtype=np.float64)[first],
        rows["prompt"].to_numpy(dtype=np.int64)[first],
    )
