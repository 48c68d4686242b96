"""Activation patching: put states of a clean run into the run on a corrupted prompt, and see what is recovered.

from internal_policy import patch

patching = patch("testbed/qwen3", "a=22,b=a-3;b?", "a=21,b=a-3;b?", prefix="b=")
patching.values            # DataFrame: the metric and its recovery per layer, site and position

Wang et al. 2022 (arXiv 2211.00593) and Meng et al. 2022 (arXiv 2202.05262) for the method; the recovery is normalised
as by Zhang and Nanda 2023 (arXiv 2309.16042).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from internal_policy.data.prompts import Chat, Prompt, render, token_ids
from internal_policy.data.token_text import texts_of
from internal_policy.extractors import registry
from internal_policy.extractors.hooks import first_tensor
from internal_policy.interventions.ablation import refuse_other_library
from internal_policy.interventions.changes import read_writes, with_first, writer
from internal_policy.interventions.config import PatchConfig
from internal_policy.interventions.patching_results import Patching
from internal_policy.interventions.replay import CleanRun, prove_restarts
from internal_policy.models import LanguageModel, eval_mode, limit_threads, without_autocast
from internal_policy.utils.distributed import run_with_oom_retry
from internal_policy.utils.errors import UserError, counted
from internal_policy.utils.logging import progress, quiet_libraries, status
from internal_policy.utils.options import choose_numbers, refuse_unknown, takes_options

_ADVICE = "lower --batch-size, shorten the prompts, use --dtype bfloat16 or another --device"
_LIBRARIES = ("internal-policy", "torch", "transformers", "tokenizers")
_LEAST = 1e-6
"""A difference between the clean and the corrupted metric below which nothing can be recovered, nats."""


@quiet_libraries()
@takes_options(PatchConfig)
@without_autocast()
def patch(
    model: Any,
    clean: str | Chat | Sequence[int],
    corrupted: str | Chat | Sequence[int],
    tokenizer: Any = None,
    **options: Any,
) -> Patching:
    """Put each state of the run on a clean prompt into the run on a corrupted one, and measure what it recovers.

    Args:
        model: hub id, local directory, embedded model (``testbed/qwen3``, ``testbed/llama``), or a transformers model.
        clean: text, a chat, or token ids.
        corrupted: a prompt of as many tokens, which differs in what the answer depends on.
        tokenizer: the tokenizer of a model given as an object.
        **options: the further fields of ``PatchConfig``.

    Returns:
        The metric with each state patched, and its recovery (patched - corrupted) / (clean - corrupted).

    Raises:
        UserError: bad input; the message says what to do.
    """
    refuse_unknown(PatchConfig, options)
    in_memory = registry.is_object(model, tokenizer, [k for k, v in options.items() if v not in (None, "auto", False)])
    name = registry.name_of(model) if in_memory else str(model)
    refuse_other_library(model)
    config = PatchConfig(model=name, clean=_plain(clean), corrupted=_plain(corrupted), **options)
    opened = registry.wrap_in_memory(model, tokenizer, name, config) if in_memory else registry.opener(config)
    with ExitStack() as stack:
        if in_memory:
            stack.enter_context(eval_mode(registry.module_of(model)))
        with status(f"loading {name}"):
            found = opened().model
        stack.enter_context(limit_threads(found))
        return _patch(found, config)


def _plain(prompt: Any) -> Any:
    """A prompt as the configuration takes it: ids of an array or a tensor as a list."""
    return prompt.tolist() if hasattr(prompt, "tolist") else prompt


@torch.no_grad()
def _patch(model: LanguageModel, config: PatchConfig) -> Patching:
    prove_restarts(model)
    clean, corrupted = (_prompt_ids(model, config, name) for name in ("clean", "corrupted"))
    if len(clean) != len(corrupted):
        raise UserError(
            f"--clean has {counted(len(clean), 'token')} and --corrupted {len(corrupted)}; both need the same "
            "number, so that each state has a counterpart: reword one of them"
        )
    if clean == corrupted:
        raise UserError("--clean and --corrupted are the same tokens; nothing differs that could be recovered")
    layers = choose_numbers("--layers", str(config.layers), model.n_layers, "layers")
    positions = choose_numbers("--positions", str(config.positions), len(clean), "tokens")
    patches = _Patches(model, clean, corrupted, layers, config)
    rows = []
    total = len(layers) * len(config.chosen_sites) * len(positions)
    with progress("patching", total) as advance:
        for layer in layers:
            for site in config.chosen_sites:
                for start in range(0, len(positions), config.batch_size):
                    batch = positions[start : start + config.batch_size]
                    run = partial(patches.run, layer, site)
                    for position, value in zip(batch, run_with_oom_retry(batch, run, _ADVICE), strict=True):
                        rows.append({"layer": layer, "site": site, "position": position, "value": value})
                    advance(len(batch))
    values = pd.DataFrame(rows)
    if not np.isfinite(values["value"]).all():
        raise UserError(f"{model.name}: NaN or inf in the patched logits; they overflow in this dtype: try float32")
    values["recovery"] = (values["value"] - patches.corrupted_value) / (patches.clean_value - patches.corrupted_value)
    texts = texts_of(model.tokenizer, [*clean, *corrupted, patches.answer, patches.wrong])
    tokens = pd.DataFrame(
        {
            "position": range(1, len(clean) + 1),
            "clean_id": clean,
            "clean_token": [texts[i] for i in clean],
            "corrupted_id": corrupted,
            "corrupted_token": [texts[i] for i in corrupted],
        }
    )
    by_difference = config.metric == "logit-difference"
    return Patching(
        name=config.model if config.revision is None else f"{config.model}@{config.revision}",
        model={
            "id": config.model,
            "revision": model.revision,
            "family": model.family.name,
            "layers": model.n_layers,
            "vocabulary": model.vocab_size,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
        },
        config={
            **{k: v for k, v in asdict(config).items() if k not in ("model", "device", "device_map", "batch_size")},
            "weights": model.fingerprint(),
        },
        metric={
            "name": config.metric,
            "clean": patches.clean_value,
            "corrupted": patches.corrupted_value,
            "answer_id": patches.answer,
            "answer_token": texts[patches.answer],
            "wrong_id": patches.wrong if by_difference else None,
            "wrong_token": texts[patches.wrong] if by_difference else None,
        },
        tokens=tokens,
        values=values,
        versions={library: metadata.version(library) for library in _LIBRARIES},
    )


def _prompt_ids(model: LanguageModel, config: PatchConfig, name: str) -> list[int]:
    given: Any = getattr(config, name)
    ids = list(given) if isinstance(given, tuple) else render(Prompt(given), config.template, model.tokenizer)
    if config.prefix is not None:
        ids += token_ids(model.tokenizer, config.prefix, add_special_tokens=False)
    if not ids:
        raise UserError(f"--{name} has no tokens; needed is at least one")
    if not 0 <= min(ids) <= max(ids) < model.vocab_size:
        bad = min(ids) if min(ids) < 0 else max(ids)
        raise UserError(f"--{name}: id {bad} is beyond the vocabulary of {model.vocab_size}")
    if model.max_length is not None and len(ids) > model.max_length:
        raise UserError(
            f"--{name}: {counted(len(ids), 'token')}, and the model's context is {model.max_length}; shorten it"
        )
    return ids


class _Patches:
    """The clean and the corrupted run, and runs on the corrupted prompt with one clean state in each row.

    All rows of a batch are the corrupted prompt: the arguments of the layers, such as masks, then fit the batch in
    every family.
    """

    def __init__(
        self, model: LanguageModel, clean: list[int], corrupted: list[int], layers: Sequence[int], config: PatchConfig
    ) -> None:
        self._model, self._config = model, config
        self._layers, self._corrupted = layers, corrupted
        self._runs: dict[int, CleanRun] = {}
        self._states = _clean_states(model, clean, layers)
        ends = [self._final_states(ids) for ids in (clean, corrupted)]
        tops = model.projection.changes([torch.cat(ends)], torch.zeros(2, dtype=torch.long)).top[0].tolist()
        self.answer = _token(model, config.answer, "answer", tops[0])
        self.wrong = _token(model, config.wrong, "wrong", tops[1])
        if config.metric == "logit-difference" and self.answer == self.wrong:
            raise UserError(
                f"the answer and the wrong token are both id {self.answer}, so that their logits do not differ; give "
                "--answer or --wrong, prompts with different answers, or --metric log-prob"
            )
        self.clean_value, self.corrupted_value = (self._values(end)[0] for end in ends)
        if not abs(self.clean_value - self.corrupted_value) > _LEAST:
            raise UserError(
                f"the metric is {self.clean_value:.4g} after both prompts; nothing differs that could be recovered: "
                "give other prompts, --answer or --wrong"
            )

    def run(self, layer: int, site: str, positions: Sequence[int]) -> list[float]:
        """The metric with the clean state of a layer and site put in at each position, from 1."""
        places = torch.tensor(positions) - 1
        run = self._run_of(len(positions))
        clean = self._states[layer, site]
        if site == "layer":
            after = run.inputs[layer + 1] if layer < self._model.n_layers else run.final
            return self._values(self._last(run.restart(layer + 1, _patched(after, clean, places))))
        with _patched_writes(writer(self._model, layer, site), clean, places):
            return self._values(self._last(run.restart(layer)))

    def _run_of(self, rows: int) -> CleanRun:
        """The corrupted run with a number of rows; the last one is kept, since most batches have the same."""
        if rows not in self._runs:
            self._runs.clear()
            ids = torch.tensor([self._corrupted] * rows)
            restarts = {number for layer in self._layers for number in (layer, layer + 1)}
            self._runs[rows] = CleanRun(self._model, ids, torch.ones_like(ids), restarts)
        return self._runs[rows]

    def _final_states(self, ids: list[int]) -> Tensor:
        row = torch.tensor([ids])
        return self._last(CleanRun(self._model, row, torch.ones_like(row), ()).final)

    def _last(self, final: Tensor) -> Tensor:
        """LN_final(H^L) at the last position, [rows, d]."""
        return self._model.projection.apply_final_norm(final[:, -1])

    def _values(self, states: Tensor) -> list[float]:
        """The metric of policies [rows, d]."""
        projection = self._model.projection

        def log_prob(token: int) -> Tensor:
            targets = torch.full((len(states),), token)
            return projection.changes([states], targets).log_prob[0].double()

        # The normaliser is the same for both tokens: a difference of log-probabilities is one of logits.
        values = log_prob(self.answer)
        if self._config.metric == "logit-difference":
            values = values - log_prob(self.wrong)
        return [float(value) for value in values]


def _clean_states(model: LanguageModel, clean: list[int], layers: Sequence[int]) -> dict[tuple[int, str], Tensor]:
    """H^l, and the outputs of the modules that write A^l and F^l, at every position of the clean prompt, [T, d]."""
    states: dict[tuple[int, str], Tensor] = {}

    def keep(layer: int, point: str, write: Tensor) -> None:
        states[layer, point] = write.reshape(len(clean), -1)

    def keep_layer(layer: int) -> Callable[..., None]:
        return lambda module, args, output: keep(layer, "layer", first_tensor(output))

    ids = torch.tensor([clean])
    with ExitStack() as hooks:
        hooks.enter_context(read_writes(model, [(layer, site) for layer in layers for site in ("attn", "ffn")], keep))
        for layer in layers:
            hooks.callback(model.layers[layer - 1].register_forward_hook(keep_layer(layer)).remove)
        model.backbone(**model.forward_arguments(ids, torch.ones_like(ids)))
    return states


@contextmanager
def _patched_writes(module: nn.Module, clean: Tensor, places: Tensor) -> Iterator[None]:
    """Put the clean output of a module in at one position of each row; the hook is removed on any exit."""

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        write = first_tensor(output)
        changed = _patched(write.reshape(len(places), len(clean), -1), clean, places)
        return with_first(output, changed.reshape(write.shape))

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _patched(states: Tensor, clean: Tensor, places: Tensor) -> Tensor:
    """States [rows, T, d] in which each row has the clean state [T, d] at its own position."""
    changed, places = states.clone(), places.to(states.device)
    changed[torch.arange(len(places), device=states.device), places] = clean.to(states.device)[places]
    return changed


def _token(model: LanguageModel, given: str | int | None, name: str, default: int) -> int:
    """The id of a token that was given as text or as an id."""
    if given is None:
        return default
    if isinstance(given, str):
        ids = token_ids(model.tokenizer, given, add_special_tokens=False)
        if len(ids) != 1:
            raise UserError(f"--{name} {given!r} has {counted(len(ids), 'token')}; needed is a text of exactly one")
        return ids[0]
    if isinstance(given, bool) or not hasattr(given, "__index__") or not 0 <= given < model.vocab_size:
        raise UserError(f"--{name} is {given!r}; needed is a text of one token, or an id below {model.vocab_size}")
    return int(given)
