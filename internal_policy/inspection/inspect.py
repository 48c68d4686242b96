"""Look into one prompt: what every internal policy says at every token (arXiv 2512.19673v3, eqs. 5-7).

look = inspect("testbed/qwen3", prompt="a=22,b=a-3,c=b*2;c?")
look.values        # DataFrame: entropy, top tokens, rank of the true next token, per position, layer and site
look.tokens        # DataFrame: the tokens, and which are the prompt's
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from internal_policy.data.prompts import Chat, Prompt, render, token_ids
from internal_policy.data.token_text import texts_of, unknown_pieces
from internal_policy.extractors import Batch, Extractor, registry
from internal_policy.generation import Request, samplers
from internal_policy.inspection.config import SITES, InspectConfig
from internal_policy.inspection.policies import FIRST_SITES, LAST_SITES, N_SCALARS, look_at_layer
from internal_policy.inspection.results import Inspection
from internal_policy.models import LanguageModel, eval_mode, limit_threads, without_autocast
from internal_policy.models.lenses import open_lens
from internal_policy.models.options import Lens
from internal_policy.utils.distributed import run_with_oom_retry
from internal_policy.utils.errors import UserError, counted
from internal_policy.utils.logging import quiet_libraries, status
from internal_policy.utils.options import refuse_unknown, takes_options

logger = logging.getLogger(__name__)

_ADVICE = "shorten the prompt, use --dtype bfloat16 or another --device"
_LIBRARIES = ("internal-policy", "torch", "transformers", "tokenizers")
_MOST_PIECES = 8
_KEYS = ("position", "layer", "site", "entropy", "next_id", "next_rank", "next_probability")


@quiet_libraries()
@takes_options(InspectConfig)
@without_autocast()
def inspect(
    model: Any = "testbed/qwen3",
    tokenizer: Any = None,
    *,
    prompt: str | Chat,
    **options: Any,
) -> Inspection:
    """Compute every internal policy at every token of one prompt and a response to it.

    Args:
        model: hub id, local directory, embedded model (``testbed/qwen3``, ``testbed/llama``), a transformers model, a
            ``transformer_lens`` TransformerBridge, or an ``nnsight`` model.
        tokenizer: the tokenizer of a transformers model given as an object; the others bring theirs.
        prompt: text, or a chat.
        **options: the further fields of ``InspectConfig``.

    Returns:
        The inspection; entropies in nats.

    Raises:
        UserError: bad input; the message says what to do.
    """
    refuse_unknown(InspectConfig, options)
    in_memory = registry.is_object(model, tokenizer, [k for k, v in options.items() if v not in (None, "auto", False)])
    name = registry.name_of(model) if in_memory else str(model)
    if options.get("backend") is None:
        options["backend"] = (registry.library_of(model) if in_memory else None) or "hooks"
    config = InspectConfig(model=name, prompt=prompt, **options)
    opened = registry.wrap_in_memory(model, tokenizer, name, config) if in_memory else registry.opener(config)
    with ExitStack() as stack:
        if in_memory:
            stack.enter_context(eval_mode(registry.module_of(model)))
        with status(f"loading {name}"):
            extractor = opened()
        stack.enter_context(limit_threads(extractor.model))
        lens = open_lens(config.lens, extractor.model)
        ids, length = _sequence(extractor, config)
        with status(f"looking at {counted(len(ids), 'token')}"):
            look = _look(extractor, config, lens, ids, length)
        asked = {"prompt": config.prompt, **({} if config.response is None else {"response": config.response})}
        return replace(look, config={**look.config, **asked})


def _sequence(extractor: Extractor, config: InspectConfig) -> tuple[list[int], int]:
    """The ids of prompt and response, and how many are the prompt's."""
    model, prompt, response, limit = extractor.model, Prompt(config.prompt), config.response, config.token_limit
    ids = render(prompt, config.template, model.tokenizer)
    _check_ids(model, ids, "the prompt", room=limit > 0)
    _warn_of_unknown_text(model, "prompt", [message["content"] for message in prompt.chat])
    if response is not None:
        answer = token_ids(model.tokenizer, response, add_special_tokens=False)
        if not answer:
            raise UserError(f"the response {response!r} has no tokens; needed is at least one")
        _check_ids(model, ids + answer, "prompt and response together", room=False)
        _warn_of_unknown_text(model, "response", [response])
        return ids + answer, len(ids)
    if limit == 0:
        return ids, len(ids)

    draw = samplers.sampler(extractor, config)

    def run(requests: Sequence[Request]) -> list[list[int]]:
        sampled = draw(requests, max_new_tokens=limit, temperature=config.temperature, seed=config.seed)
        return [r.input_ids for r in sampled]

    with status("sampling a response"):
        return run_with_oom_retry([Request(prompt, ids, 0, 0)], run, _ADVICE)[0], len(ids)


def _check_ids(model: LanguageModel, ids: list[int], what: str, *, room: bool) -> None:
    if not ids:
        raise UserError(f"{what} has no tokens; needed is at least one")
    if max(ids) >= model.vocab_size:
        raise UserError(
            f"{what}: id {max(ids)} is beyond the vocabulary of {model.vocab_size}; does this tokenizer belong to this "
            "model?"
        )
    if model.max_length is not None and len(ids) + room > model.max_length:
        advice = "shorten it" + (", or give --max-new-tokens 0" if room and len(ids) == model.max_length else "")
        raise UserError(f"{what}: {len(ids)} tokens, and the model's context is {model.max_length}; {advice}")


def _warn_of_unknown_text(model: LanguageModel, what: str, texts: Sequence[str]) -> None:
    """Warn of text that the tokenizer does not know: the inspection is then of a different text."""
    found = dict.fromkeys(piece for text in texts for piece in unknown_pieces(model.tokenizer, text))
    if not found:
        return
    named = ", ".join(f"'{piece}'" for piece in list(found)[:_MOST_PIECES])
    more = f" and {len(found) - _MOST_PIECES} more" if len(found) > _MOST_PIECES else ""
    logger.warning(
        "%s: its tokenizer does not know %s%s of the %s and reads %s instead",
        *(model.name, named, more, what, model.tokenizer.unk_token),
    )


def _look(extractor: Extractor, config: InspectConfig, lens: Lens, ids: list[int], length: int) -> Inspection:
    model, limit = extractor.model, config.token_limit
    top_k = min(config.top_k, model.vocab_size)
    n = len(ids)
    row = torch.tensor([ids])
    reduce = partial(
        look_at_layer,
        next_ids=torch.tensor([*ids[1:], 0]),
        lens=lens,
        n_layers=model.n_layers,
        top_k=top_k,
    )

    def run(batches: Sequence[Batch]) -> list[list[NDArray[np.float32]]]:
        return [[values.cpu().numpy() for values in extractor.run(batch, reduce)] for batch in batches]

    layers = run_with_oom_retry([Batch(row, torch.ones_like(row), torch.arange(n))], run, _ADVICE)[0]
    values = _value_table(layers, ids, top_k, model)
    texts = texts_of(model.tokenizer, [*ids, *pd.unique(values[_columns(top_k, "id")].to_numpy().ravel())])
    named = {f"top{k}_token": values[f"top{k}_id"].map(texts) for k in range(1, top_k + 1)}
    values = pd.concat([values, pd.DataFrame(named)], axis=1)[[*_KEYS, *_columns(top_k, "id", "token", "probability")]]
    tokens = pd.DataFrame(
        {
            "position": np.arange(1, n + 1),
            "part": np.where(np.arange(n) < length, "prompt", "response"),
            "id": ids,
            "token": [texts[i] for i in ids],
        }
    )
    return Inspection(
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
            **config.lens_settings(),
            "template": config.template,
            "top_k": top_k,
            **({"max_new_tokens": limit, "temperature": config.temperature, "seed": config.seed} if limit else {}),
            "weights": model.fingerprint(),
        },
        tokens=tokens,
        values=values,
        versions={library: metadata.version(library) for library in _LIBRARIES},
    )


def _columns(top_k: int, *parts: str) -> list[str]:
    return [f"top{k}_{part}" for k in range(1, top_k + 1) for part in parts]


def _value_table(layers: list[NDArray[np.float32]], ids: list[int], top_k: int, model: LanguageModel) -> pd.DataFrame:
    """Long form of what ``look_at_layer`` returns for each layer, [S, n, 3 + 2 top_k]."""
    n = len(ids)
    best, probable = slice(N_SCALARS, N_SCALARS + top_k), slice(N_SCALARS + top_k, None)
    frames = []
    for layer, found in enumerate(layers, start=1):
        sites = [*(FIRST_SITES if layer == 1 else SITES), *(LAST_SITES if layer == len(layers) else ())]
        for site, columns in zip(sites, found, strict=True):
            at, called = (0, "layer") if site == "embedding" else (layer, site)
            if not np.isfinite(columns).all():
                raise UserError(
                    f"{model.name}: NaN or inf in the states of layer {at} ({called}); they overflow in this dtype or "
                    "the weights are broken: try --dtype float32 or bfloat16"
                )
            frames.append(
                pd.DataFrame(
                    {
                        "position": np.arange(1, n + 1),
                        "layer": at,
                        "site": called,
                        "entropy": columns[:, 0],
                        # There is no token after the last.
                        "next_id": pd.array([*ids[1:], pd.NA], dtype="Int64"),
                        "next_rank": pd.array([*columns[:-1, 1].astype(np.int64), pd.NA], dtype="Int64"),
                        "next_probability": np.append(columns[:-1, 2], np.float32(np.nan)),
                        **dict(zip(_columns(top_k, "id"), columns[:, best].T.astype(np.int64), strict=True)),
                        **dict(zip(_columns(top_k, "probability"), columns[:, probable].T, strict=True)),
                    }
                )
            )
    order = {site: i for i, site in enumerate((*SITES, *LAST_SITES))}
    table = pd.concat(frames, ignore_index=True)
    places = table["site"].map(order)
    return table.loc[np.lexsort((places, table["layer"], table["position"]))].reset_index(drop=True)
