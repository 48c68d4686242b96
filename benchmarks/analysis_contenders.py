"""Ways to the same entropies, one function each, for ``benchmark_analysis.py`` to run side by side.

Each takes a model and returns the function to be timed, which maps responses to H of the six states of every layer at
every response token. Preparation before that counts as loading.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from internal_policy import analyze
from internal_policy.data.responses import Response, pad
from internal_policy.entropy import DEFAULT_MEMORY_BUDGET, reference
from internal_policy.entropy.streaming import block_sizes
from internal_policy.extractors import QUANTITIES, HookExtractor, Reducer, reduce_responses
from internal_policy.extractors.hooks import first_tensor
from internal_policy.models import LanguageModel, Projection

STATES = ("layer_in", "layer_out", "attn_in", "attn_out", "ffn_in", "ffn_out")
"""The states of a layer whose entropies are wanted; eqs. 11-13 take their differences in pairs."""
TOLERANCE = 0.05
"""Nats either way, for the contender that analyses some positions only."""

OPTIONS: dict[str, dict[str, Any]] = {
    "analyze": {},
    "--lens logit-lens": {"lens": "logit-lens"},
    "--lens unit-norm": {"lens": "unit-norm"},
    "--by kind": {"by": ("kind",)},
    "--heads": {"heads": True},
    "--divergences": {"divergences": True},
    "--random-baseline": {"random_baseline": True},
}
"""Whole calls of ``analyze``, by what the command line adds."""

_ENTROPIES = Projection.entropies
_BATCH = 16
_COLUMNS = [QUANTITIES.index(name) for name in STATES]


@dataclass(frozen=True)
class Found:
    """What a contender found."""

    entropies: NDArray[np.floating[Any]] | None = None
    """[n, L, 6] nats, the tokens of all responses in order; None where it does not give each token's."""
    changes: NDArray[np.float64] | None = None
    """[L, 3] estimated changes of the layer, the attention and the FFN, nats, where it estimates."""
    half_widths: NDArray[np.float64] | None = None
    """[L, 3] half of the 95% interval of each change, nats."""
    facts: dict[str, float] = field(default_factory=dict)
    """Further facts."""


Run = Callable[[Sequence[Response]], Found]


def ours(model: LanguageModel) -> Run:
    """This package at every position: hooks, 4 L + 2 products, online entropies."""
    reducer = Reducer(HookExtractor(model), "policy")

    def run(responses: Sequence[Response]) -> Found:
        found: dict[int, NDArray[np.float32]] = {}
        for places in batches(responses):
            values = reduce_responses(reducer, [responses[i] for i in places])
            found |= {i: v.layers[:, :, _COLUMNS] for i, v in zip(places, values, strict=True)}
        return Found(np.concatenate([found[i] for i in range(len(responses))]))

    return run


def without_parts(model: LanguageModel) -> Run:
    """This package without the entropies at other lengths, from which the parts of a change follow."""
    run = ours(model)

    def entropies(self: Projection, states: Any, sums: Any = (), lengths: Any = ()) -> Tensor:
        found = _ENTROPIES(self, states, sums)
        return torch.cat([found, found[:1].expand(len(lengths), -1)])

    def run_patched(responses: Sequence[Response]) -> Found:
        with patch.object(Projection, "entropies", entropies):
            return run(responses)

    return run_patched


def whole_analysis(**options: Any) -> Callable[[LanguageModel], Run]:
    """``analyze`` with its statistics and tables, and options."""

    def prepare(model: LanguageModel) -> Run:
        def run(responses: Sequence[Response]) -> Found:
            records = [asdict(r) for r in responses]
            analyze(model.model, model.tokenizer, responses=records, keep_tokens=0, **options)
            return Found()

        return run

    return prepare


def ours_with_tolerance(model: LanguageModel) -> Run:
    """This package at as many positions as a tolerance requires: ``analyze`` with its statistics and tables."""

    def run(responses: Sequence[Response]) -> Found:
        records = [asdict(r) for r in responses]
        analysis = analyze(model.model, model.tokenizer, responses=records, tolerance=TOLERANCE, keep_tokens=0)
        layers = analysis.layers
        changes, half_widths = (
            np.stack([layers.loc[layers["site"] == site, name].to_numpy() for site in ("layer", "attn", "ffn")], axis=1)
            for name in ("change", "change_half_width")
        )
        sample = analysis.positions or {}
        facts = {name: float(sample[name]) for name in ("analysed", "total", "rounds", "half_width")}
        return Found(None, changes, half_widths, {**facts, "capture_seconds": analysis.timings["capture"]})

    return run


def paper(model: LanguageModel) -> Run:
    """The procedure of the paper's script, rewritten: hooks, states to the host, then logits in full.

    One response at a time; six states a layer; of each [n, V] logits, softmax and log-softmax.
    """
    weight, device = model.projection.weight, model.projection.weight.device

    def entropy(state: Tensor) -> Tensor:
        logits = state.to(device) @ weight.T
        probabilities = torch.softmax(logits, dim=-1)
        return -(probabilities * torch.log_softmax(logits, dim=-1)).sum(dim=-1)

    return _by_hooks(model, entropy)


def _by_hooks(model: LanguageModel, entropy: Callable[[Tensor], Tensor]) -> Run:
    """One response at a time; hooks take six states of each layer to the host, and each is reduced on its own."""

    @torch.no_grad()
    def run(responses: Sequence[Response]) -> Found:
        found = []
        for response in responses:
            states: dict[tuple[int, str], Tensor] = {}
            handles = []
            for layer, module in enumerate(model.layers):
                handles += _to_host(layer, module, model, states)
            try:
                model.model(input_ids=torch.tensor([response.input_ids], device=model.device), use_cache=False)
            finally:
                for handle in handles:
                    handle.remove()
            at = slice(response.prompt_length - 1, len(response.input_ids) - 1)
            rows = [[entropy(states[layer, s][0, at]).cpu() for s in STATES] for layer in range(model.n_layers)]
            found.append(np.stack([torch.stack(row, dim=-1).numpy() for row in rows], axis=1))
        return Found(np.concatenate(found))

    return run


def _to_host(layer: int, module: nn.Module, model: LanguageModel, states: dict[tuple[int, str], Tensor]) -> list[Any]:
    """Hooks that keep the six states of a layer in host memory."""

    def keep_input(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states[layer, name] = (first_tensor(args) if args else kwargs["hidden_states"]).detach().cpu()

        return hook

    def keep_output(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            states[layer, name] = first_tensor(output).detach().cpu()

        return hook

    parts = {"layer": module}
    parts |= {"attn": operator.attrgetter(model.family.attention)(module)}
    parts |= {"ffn": operator.attrgetter(model.family.ffn)(module)}
    handles: list[Any] = []
    for name, part in parts.items():
        handles.append(part.register_forward_pre_hook(keep_input(f"{name}_in"), with_kwargs=True))
        handles.append(part.register_forward_hook(keep_output(f"{name}_out")))
    return handles


def in_float64(model: LanguageModel) -> Run:
    """The definition in float64 on the states of the paper's procedure: the reference of the others, not timed."""
    weight = model.projection.weight.double()
    return _by_hooks(model, lambda state: reference.policy_entropy(state.double(), weight))


def transformer_lens(model: LanguageModel) -> Run:
    """TransformerLens as a careful user would use it: only these states cached, each projected once, 5 L + 1."""
    from internal_policy.extractors.transformer_lens import from_model

    bridge, weight = from_model(model).bridge, model.projection.weight
    hooks = {
        "layer_out": "hook_resid_post",
        "attn_in": "ln1.hook_out",
        "attn_out": "hook_attn_out",
        "ffn_in": "ln2.hook_out",
        "ffn_out": "hook_mlp_out",
    }
    first = "blocks.0.hook_resid_pre"
    wanted = [first, *(f"blocks.{i}.{hook}" for i in range(model.n_layers) for hook in hooks.values())]

    @torch.no_grad()
    def run(responses: Sequence[Response]) -> Found:
        found = []
        for response in responses:
            ids = torch.tensor([response.input_ids], device=model.device)
            _, cache = bridge.run_with_cache(ids, names_filter=wanted)
            at = slice(response.prompt_length - 1, len(response.input_ids) - 1)

            def entropy(name: str, cache: Any = cache, at: slice = at) -> Tensor:
                log_probs: Tensor = (cache[name][0, at] @ weight.T).log_softmax(dim=-1)
                return -(log_probs.exp() * log_probs).sum(dim=-1).cpu()

            rows, before = [], entropy(first)
            for layer in range(model.n_layers):
                row = {name: entropy(f"blocks.{layer}.{hook}") for name, hook in hooks.items()}
                row["layer_in"], before = before, row["layer_out"]
                rows.append(torch.stack([row[name] for name in STATES], dim=-1).numpy())
            found.append(np.stack(rows, axis=1))
        return Found(np.concatenate(found))

    return run


def floor(model: LanguageModel) -> Run:
    """The minimum for every exact method: the decoder's forward pass and bare products of 4 L + 2 states in blocks."""
    weight = model.projection.weight
    vocab, d = weight.shape
    n, v = block_sizes(d, vocab, DEFAULT_MEMORY_BUDGET, weight.device)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(n, d, generator=generator).to(weight.device)

    @torch.no_grad()
    def run(responses: Sequence[Response]) -> Found:
        buffer = torch.empty(n * v, device=weight.device)
        for places in batches(responses):
            chosen = [responses[i] for i in places]
            model.backbone(**model.forward_arguments(*pad([r.input_ids for r in chosen], "right")))
            rows = sum(r.n_tokens for r in chosen) * (4 * model.n_layers + 2)
            for start in range(0, rows, n):
                block = states[: min(n, rows - start)]
                for first in range(0, vocab, v):
                    e_vd = weight[first : first + v]
                    torch.mm(block, e_vd.T, out=buffer[: len(block) * len(e_vd)].view(len(block), len(e_vd)))
        return Found()

    return run


def batches(responses: Sequence[Response]) -> list[list[int]]:
    """Group responses of similar length as an analysis does by default; the groups contain indices."""
    order = sorted(range(len(responses)), key=lambda i: -len(responses[i].input_ids))
    return [order[start : start + _BATCH] for start in range(0, len(order), _BATCH)]


CONTENDERS: dict[str, Callable[[LanguageModel], Run]] = {
    "ours": ours,
    "tolerance": ours_with_tolerance,
    "paper": paper,
    "transformer-lens": transformer_lens,
    "floor": floor,
    "float64": in_float64,
    "without-parts": without_parts,
    **{name: whole_analysis(**options) for name, options in OPTIONS.items()},
}
"""Contenders by their name in the results."""
