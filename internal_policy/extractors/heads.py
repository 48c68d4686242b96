"""What each attention head writes to the residual stream: its slice of the output projection's input times its weights.

``find_heads`` proves on random tokens, before a long run, that the heads and the bias add up to A^l in every layer and
that every slice is one head's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from internal_policy.extractors.base import LayerStates
from internal_policy.extractors.hooks import first_tensor, pick, residual_hooks
from internal_policy.extractors.parts import norms_after, portion, precise, rounding_error, shared_by_norm, sum_bound
from internal_policy.models import LanguageModel, without_autocast
from internal_policy.models.linear import LinearNorm, read_linear
from internal_policy.utils.errors import UserError

_WIDTHS = ("v_head_dim", "head_dim", "head_size")
"""What attention modules call the width of a head's result."""
_SEQUENCES, _LENGTH = 2, 12
_PAIRS = 16
_MIXTURE = 16.0
"""Bound on what is left of a head's result beside a mixture of two values, in units of rounding."""


@dataclass(frozen=True)
class Heads:
    """The attention heads of a model."""

    model: LanguageModel
    """The model."""
    n_heads: int
    """Query heads of a layer; each has a write of its own, also where several share keys and values."""
    has_bias: bool
    """Whether the output projection has a bias, which is one more part."""
    norms: tuple[LinearNorm | None, ...]
    """For each layer the norm after its attention, if there is one."""

    @property
    def numbers(self) -> list[int]:
        """The number of each part: heads from 1, and 0 for the bias if there is one, which comes last."""
        return [*range(1, self.n_heads + 1), *([0] if self.has_bias else [])]

    def writes(self, states: LayerStates, results: Tensor) -> Iterator[Tensor]:
        """Compute the writes of a layer's heads, a portion of the positions at a time.

        Args:
            states: the layer's states at n positions.
            results: [n, heads * width] what the output projection received there.

        Yields:
            [p, heads (+ 1), d] writes in float32 or more, which add up to A^l.
        """
        path, width = projection_path(self.model, states.layer), results.shape[1]
        dtype = precise(states.attention_write.dtype)
        weight, bias = read_linear(self.model.model, path, width, states.attention_write.dtype)
        by_head = rearrange(weight.to(results.device, dtype), "d (head width) -> head width d", head=self.n_heads)
        size = portion(len(self.numbers), by_head.shape[-1])
        for z, write in zip(torch.split(results, size), torch.split(states.attention_write, size), strict=True):
            z = rearrange(z.to(dtype), "n (head width) -> n head width", head=self.n_heads)
            parts = einsum(z, by_head, "n head width, head width d -> n head d")
            if self.has_bias:
                row = torch.zeros_like(parts[0, :1]) if bias is None else bias.to(parts)[None]
                parts = torch.cat([parts, row.expand(len(parts), 1, -1)], dim=1)
            yield shared_by_norm(parts, write, self.norms[states.layer - 1], self.model.write_multiplier)


def projection_path(model: LanguageModel, layer: int) -> str:
    """The path of the attention's output projection in a layer, from the model."""
    family = model.family
    return f"{family.layers}.{layer - 1}.{family.attention}.{family.output_projection}"


@contextmanager
def head_hooks(model: LanguageModel, positions: Tensor, held: dict[int, Tensor]) -> Iterator[None]:
    """Keep what the output projection of each layer receives while the decoder runs; hooks are removed on any exit.

    Args:
        model: the model to hook.
        positions: [n] flat indices into B * T.
        held: gets [n, heads * width] under the layer's number; whoever reads an entry removes it.
    """

    def keep(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            held[layer] = pick(first_tensor(args or tuple(kwargs.values())), positions)

        return hook

    with ExitStack() as hooks:
        for layer in range(1, model.n_layers + 1):
            module = operator.attrgetter(projection_path(model, layer))(model.model)
            hooks.callback(module.register_forward_pre_hook(keep(layer), with_kwargs=True).remove)
        yield


@without_autocast()
@torch.no_grad()
def find_heads(model: LanguageModel, seed: int = 0) -> Heads:
    """Find the heads of a model, and prove on random tokens that they are the parts of its attention.

    Two things are proved: in every layer the heads' writes and the bias add up to A^l, element by element, within
    rounding; and in layer 1 each slice of the output projection's input is a mixture, with one pair of weights, of two
    tokens' values, which a slice with channels of two heads is not. The number of heads is the configuration's, and
    must agree with the width of a head in the attention module.

    Args:
        model: the model.
        seed: seed of the random tokens.

    Returns:
        The heads.

    Raises:
        UserError: what does not hold, and in which layer.
    """
    n_heads = getattr(model.config, "num_attention_heads", None)
    if not isinstance(n_heads, int):
        raise _refusal(model, "its configuration has no single num_attention_heads")
    layers = range(1, model.n_layers + 1)
    for layer in layers:
        _check_structure(model, layer)
    projections = [operator.attrgetter(projection_path(model, layer))(model.model) for layer in layers]
    has_bias = any(getattr(projection, "bias", None) is not None for projection in projections)
    heads = Heads(model, n_heads, has_bias, norms_after(model, model.family.attention_write))
    _prove_sum(heads, seed)
    _prove_slices(heads, seed)
    return heads


def _check_structure(model: LanguageModel, layer: int) -> None:
    path = projection_path(model, layer)
    try:
        operator.attrgetter(path)(model.model)
    except AttributeError:
        raise _refusal(
            model, f"layer {layer} has no {path}; name the module in output_projection of the family's row"
        ) from None


def _prove_sum(heads: Heads, seed: int) -> None:
    model, held, n_heads = heads.model, dict[int, Tensor](), heads.n_heads
    ids = torch.randint(0, model.vocab_size, (_SEQUENCES, _LENGTH), generator=torch.Generator().manual_seed(seed))
    positions, reached = torch.arange(ids.numel()), 0

    def check(states: LayerStates) -> None:
        nonlocal reached
        reached = states.layer
        if states.layer not in held:
            raise _refusal(model, f"{projection_path(model, states.layer)} did not run")
        results = held.pop(states.layer)
        attention = operator.attrgetter(model.family.attention)(model.layers[states.layer - 1])
        width = next((getattr(attention, name) for name in _WIDTHS if hasattr(attention, name)), None)
        if results.shape[1] % n_heads or (width is not None and results.shape[1] != n_heads * width):
            raise _refusal(
                model,
                f"the attention of layer {states.layer} gives {results.shape[1]} channels to its output projection, "
                f"which are not those of {n_heads} heads" + (f" of {width}" if width is not None else ""),
            )
        parts = torch.cat(list(heads.writes(states, results)))
        write = states.attention_write
        error = float(rounding_error(parts, write, heads.norms[states.layer - 1] is not None).max())
        bound = sum_bound(write.dtype)
        if not error <= bound:
            raise _refusal(
                model,
                f"in layer {states.layer} the writes of the heads do not add up to that of the attention: the sum "
                f"differs by {error:.3g} times what rounding explains (at most {bound:g})",
            )

    with head_hooks(model, positions, held), residual_hooks(model, positions, check):
        model.backbone(**model.forward_arguments(ids, torch.ones_like(ids)))
    assert reached == model.n_layers


def _prove_slices(heads: Heads, seed: int) -> None:
    """Each head of layer 1 mixes the values of two tokens: z_1 = a v_0 + b v_1 with one a and one b for its channels.

    v_0 is what the head gives for the first token, which sees only itself, and v_1 what it gives for the second token
    without the first. An attention sink takes away from a + b = 1, but stays a mixture.
    """
    model = heads.model
    ids = torch.randint(0, model.vocab_size, (_PAIRS, 2), generator=torch.Generator().manual_seed(seed))

    def results(tokens: Tensor, first: int) -> Tensor:
        held: dict[int, Tensor] = {}
        arguments = model.forward_arguments(tokens, torch.ones_like(tokens))
        if "position_ids" in arguments:
            arguments["position_ids"] = arguments["position_ids"] + first
        with head_hooks(model, torch.arange(tokens.numel()), held):
            model.backbone(**arguments)
        return rearrange(held[1].cpu().double(), "(n t) (head width) -> n t head width", n=_PAIRS, head=heads.n_heads)

    both, alone = results(ids, 0), results(ids[:, 1:], 1)
    values = torch.stack([both[:, 0], alone[:, 0]], dim=-1)
    mixed = both[:, 1].unsqueeze(-1)
    weights = torch.linalg.lstsq(values, mixed, driver="gelsd").solution
    left = (values @ weights - mixed).norm(dim=(-2, -1))
    size = torch.finfo(model.dtype).eps * values.norm(dim=(-2, -1)).clamp(min=torch.finfo(torch.float64).tiny)
    error = (left / size).amax(dim=0)
    if not float(error.max()) <= _MIXTURE:
        raise _refusal(
            model,
            f"slice {int(error.argmax()) + 1} of {heads.n_heads} of what the output projection of layer 1 receives is "
            f"not one head's: its channels mix two tokens' values with different weights ({float(error.max()):.3g} "
            f"times what rounding explains, at most {_MIXTURE:g})",
        )


def _refusal(model: LanguageModel, why: str) -> UserError:
    return UserError(f"{model.name}: --heads cannot be measured: {why}; leave it out")
