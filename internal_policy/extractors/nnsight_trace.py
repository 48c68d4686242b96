"""What runs inside an nnsight trace, next to the model: in this process or on an NDIF server.

A server receives these functions as source, without this package. Therefore they have no decorators, define no classes
and reach weights through modules only: a server may run them in another process than the model, where calling a module
works and reading its weight does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from internal_policy.extractors.hooks import first_tensor, pick
from internal_policy.models.projection import weight_by_calls

_CHOSEN = 1e4


def reduce_layers(
    root: Any,
    row: dict[str, Any],
    positions: Tensor,
    reduce: Callable[[Any, Any], Tensor],
    at_once: int,
    states_class: Callable[..., Any],
    projection: Any,
) -> list[Tensor]:
    """Reduce the states of layers 1..L in groups, while the forward pass computes them.

    ``row`` is the result of ``NnsightExtractor.row``, ``positions`` are [n] flat indices into B * T, and
    ``states_class`` is ``LayerStates`` or the plain class that a server can build.
    """
    blocks = root.get(row["layers"])
    values: list[Tensor] = []
    group: list[Any] = []
    for layer, block in enumerate(blocks, start=1):
        # Locations must be read in the order of the forward pass.
        read = {
            "residual_in": received(block),
            "attention_in": received(block.get(row["attention"])),
            "attention_write": first_tensor(block.get(row["attention_write"]).output),
            "ffn_in": received(block.get(row["ffn"])),
            "ffn_write": first_tensor(block.get(row["ffn_write"]).output),
            "residual_out": first_tensor(block.output),
        }
        with torch.no_grad():
            states = {name: pick(tensor, positions) for name, tensor in read.items()}
            del read
            if row["multiplier"] != 1.0:
                for name in ("attention_write", "ffn_write"):
                    states[name] = states[name] * row["multiplier"]
            if group:
                # One copy of what one layer returned and the next received.
                states["residual_in"] = group[-1].residual_out.to(states["residual_out"].device)
            group.append(states_class(layer=layer, **states))
            del states
            if len(group) == at_once or layer == len(blocks):
                values.append(reduce(group, projection))
                group = []
    return values


def reduce_logits(
    root: Any, row: dict[str, Any], positions: Tensor, reduce: Callable[[Tensor, Tensor, Any], Tensor], projection: Any
) -> Tensor:
    """Reduce the model's own logits and H^L at [n] flat positions."""
    last = first_tensor(root.get(row["layers"])[-1].output)
    own = root.output.logits
    with torch.no_grad():
        return reduce(pick(own, positions), pick(last, positions), projection)


def choose_token(root: Any, row: dict[str, Any], sampler: Callable[[Any, Tensor], Tensor] | None) -> None:
    """Choose the next token of each sequence, and leave greedy search no other choice.

    ``sampler`` adds noise to [B, V] logits on the CPU; without it, the most probable token is chosen.
    """
    head = root.get(row["unembedding"])
    projected = head.output
    with torch.no_grad():
        scores = projected[:, -1] * row["transform"]["scale"]
        softcap = row["transform"]["softcap"]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.float().cpu()
        chosen = (scores if sampler is None else sampler(None, scores)).argmax(dim=-1).to(projected.device)
        decided = torch.zeros_like(projected)
        decided[:, -1].scatter_(1, chosen[:, None], _CHOSEN)
    head.output = decided


def received(module: Any) -> Tensor:
    """Read the states [B, T, d] that a module receives."""
    arguments, named = module.inputs
    return first_tensor(arguments) if arguments else named["hidden_states"]


def build_projection(root: Any, row: dict[str, Any], projection_class: Callable[..., Any]) -> Any:
    """Build the projection from the model's modules, where they are."""
    head = root.get(row["unembedding"])
    with torch.no_grad():
        weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
        if weight is None or weight.is_meta or tuple(weight.shape) != (row["vocabulary"], row["width"]):
            here = "cpu" if weight is None or weight.is_meta else weight.device
            weight, bias = weight_by_calls(head, row["width"], getattr(torch, row["dtype"]), here)
        return projection_class(
            weight=weight.detach(),
            bias=None if bias is None else bias.detach(),
            final_norm=root.get(row["final_norm"]),
            **row["transform"],
        )
