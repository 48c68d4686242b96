"""Measurements of the model card: accuracy, and the entropies of the internal policies by a second implementation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from internal_policy.data.arithmetic import Problem, check


@torch.no_grad()
def respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    seed: int = 0,
    greedy: bool = False,
    batch: int = 250,
    max_new_tokens: int = 44,
) -> list[tuple[list[int], list[int]]]:
    """Answer problems, one response each, at temperature 1 or greedily.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        problems: The problems.
        seed: The seed of the sampling.
        greedy: Whether to take the likeliest token instead of sampling.
        batch: Problems answered at a time.
        max_new_tokens: The limit on the tokens of a response.

    Returns:
        For each problem the ids of the templated prompt and those of the response, up to and including ``<eos>``.
    """
    torch.manual_seed(seed)
    out = []
    for start in range(0, len(problems), batch):
        chats = [[{"role": "user", "content": problem.prompt}] for problem in problems[start : start + batch]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        ids_bt = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=not greedy, temperature=1.0, top_p=1.0, top_k=0
        )
        width = inputs["input_ids"].shape[1]
        for row, mask in zip(ids_bt.tolist(), inputs["attention_mask"].tolist(), strict=True):
            response = row[width:]
            if tokenizer.eos_token_id in response:
                response = response[: response.index(tokenizer.eos_token_id) + 1]
            out.append((row[width - sum(mask) : width], response))
    return out


def accuracy(
    tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], responses: Sequence[tuple[list[int], list[int]]]
) -> dict[str, dict[str, float]]:
    """Check responses.

    Args:
        tokenizer: The tokenizer.
        problems: The problems.
        responses: One response to each, as `respond` gives them.

    Returns:
        For each level, and for "all": `n`, the share right as `mean`, and its standard error `stderr`.
    """
    texts = tokenizer.batch_decode([response for _, response in responses], skip_special_tokens=True)
    right: dict[str, list[bool]] = {"all": []}
    for text, problem in zip(texts, problems, strict=True):
        ok = check(text, problem.answer)
        right["all"].append(ok)
        right.setdefault(str(problem.level), []).append(ok)
    table = {}
    for level, oks in sorted(right.items()):
        mean = sum(oks) / len(oks)
        table[level] = {"n": len(oks), "mean": mean, "stderr": math.sqrt(mean * (1 - mean) / len(oks))}
    return table


@torch.no_grad()
def curves(model: PreTrainedModel, responses: Sequence[tuple[list[int], list[int]]]) -> dict[str, list[float]]:
    """Entropies over depth, one response after another, every formula as the paper writes it (eqs. 5-7, 12, 13).

    Args:
        model: A model of the testbed: what its modules return is what they write to the residual stream.
        responses: Ids of prompts and responses, as `respond` gives them.

    Returns:
        For each layer from the first: `H_layer`, `H_attn`, `H_ffn`, `dH_attn`, `dH_ffn` in nats, means over the
        positions that predict a response token; `rms_attn`, `rms_ffn`, `rms_ffn_input`, `rms_layer`, the root mean
        squares of the same states.
    """
    unembedding_vd = model.get_output_embeddings().weight
    sites = ("layer", "attn", "ffn", "attn_input", "ffn_input")
    entropy = {site: torch.zeros(model.config.num_hidden_layers) for site in sites}
    rms = {site: torch.zeros(model.config.num_hidden_layers) for site in sites}
    n = 0
    with _recorded(model) as states:
        for prompt, response in responses:
            model.model(input_ids=torch.tensor([prompt + response]), use_cache=False)
            for (site, layer), state_btd in states.items():
                x_td = state_btd[0, len(prompt) - 1 : -1]
                log_p_tv = (x_td @ unembedding_vd.T).log_softmax(-1)
                entropy[site][layer] -= (log_p_tv.exp() * log_p_tv).sum().item()
                rms[site][layer] += x_td.pow(2).mean(-1).sqrt().sum().item()
            n += len(response)
    named = {
        "H_layer": entropy["layer"],
        "H_attn": entropy["attn"],
        "H_ffn": entropy["ffn"],
        "dH_attn": entropy["attn"] - entropy["attn_input"],
        "dH_ffn": entropy["ffn"] - entropy["ffn_input"],
        "rms_attn": rms["attn"],
        "rms_ffn": rms["ffn"],
        "rms_ffn_input": rms["ffn_input"],
        "rms_layer": rms["layer"],
    }
    return {name: [round(value, 4) for value in (total / n).tolist()] for name, total in named.items()}


@contextmanager
def _recorded(model: PreTrainedModel) -> Iterator[dict[tuple[str, int], torch.Tensor]]:
    states: dict[tuple[str, int], torch.Tensor] = {}

    def record(module: nn.Module, site: str, layer: int) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            states[site, layer] = output[0] if isinstance(output, tuple) else output

        return module.register_forward_hook(hook)

    handles = []
    for index, layer in enumerate(model.model.layers):
        handles += [
            record(layer, "layer", index),
            record(layer.input_layernorm, "attn_input", index),
            record(layer.self_attn, "attn", index),
            record(layer.post_attention_layernorm, "ffn_input", index),
            record(layer.mlp, "ffn", index),
        ]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
