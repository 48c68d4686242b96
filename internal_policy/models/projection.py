"""The unembedding as a matrix E_u, whether plain, offloaded or quantised, and the projection of states by it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from internal_policy.entropy import (
    DEFAULT_MEMORY_BUDGET,
    PolicyChanges,
    policy_changes,
    policy_divergences,
    policy_entropies,
)
from internal_policy.models import devices
from internal_policy.models.families import Family
from internal_policy.models.options import Lens
from internal_policy.utils.errors import UserError

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes in which a model computes; weights of any other are quantised."""
# Some libraries pack weights into a subclass of Tensor.
_DENSE: tuple[type, ...] = (Tensor, nn.Parameter)
# A product in the head's dtype is rounded by a few eps. A head that quantises its inputs to 8 bits errs by half a step,
# 1/254 of the largest number, in each of them.
_ROUNDINGS = 16


@dataclass(frozen=True)
class Projection:
    """E_u with everything that the model does to the logits: bias, scale and soft cap belong to the projection."""

    weight: Tensor
    """[V, d] unembedding matrix E_u."""
    bias: Tensor | None = None
    """[V] bias of the unembedding."""
    scale: float = 1.0
    """Factor on the logits."""
    softcap: float | None = None
    """c in ``c * tanh(logits / c)``."""
    final_norm: Callable[[Tensor], Tensor] = lambda states: states
    """LN_final."""
    memory_budget: int = DEFAULT_MEMORY_BUDGET
    """Bytes of working memory of an entropy."""

    def entropy(self, states: Tensor) -> Tensor:
        """Entropy of the policy of each state.

        Args:
            states: [N, d].

        Returns:
            [N] nats, float32. Source: arXiv 2512.19673v3, eq. 7.
        """
        return self.entropies([states])[0]

    def entropies(
        self,
        states: Sequence[Tensor],
        sums: Sequence[Sequence[int]] = (),
        lengths: Sequence[tuple[int, Tensor]] = (),
    ) -> Tensor:
        """Entropies of the policies of several states at each position, of running sums of them, and at other lengths.

        Args:
            states: S states of the same N positions, [N, d] each.
            sums: R lists of indices into ``states``; see ``policy_entropies``.
            lengths: K pairs of an index into the states and then the sums, and factors [N] on that state.

        Returns:
            [S + R + K, N] nats, float32. Source: arXiv 2512.19673v3, eqs. 4 and 7.
        """
        return policy_entropies(
            [s.to(self.weight.device) for s in states],
            self.weight,
            self.bias,
            sums=sums,
            lengths=lengths,
            scale=self.scale,
            softcap=self.softcap,
            memory_budget=self.memory_budget,
        )

    def changes(self, states: Sequence[Tensor], targets: Tensor) -> PolicyChanges:
        """Compare the policies of several states with that of the first; see ``policy_changes``.

        Args:
            states: S states of the same N positions, [N, d] each.
            targets: [N] token ids whose log-probabilities are read.

        Returns:
            Divergences, entropies and log-probabilities [S, N], nats, and the most probable tokens [S, N].
        """
        return policy_changes(
            [s.to(self.weight.device) for s in states],
            targets.to(self.weight.device),
            self.weight,
            self.bias,
            scale=self.scale,
            softcap=self.softcap,
            memory_budget=self.memory_budget,
        )

    def divergences(self, states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Divergences between all policies at each position, and their most probable tokens.

        Args:
            states: S states of the same N positions, [N, d] each.

        Returns:
            [N, S, S] nats, float32: entry [n, k, l] is KL(p_k || p_l); [N, S] ids. See ``policy_divergences``.
        """
        return policy_divergences(
            [s.to(self.weight.device) for s in states],
            self.weight,
            self.bias,
            scale=self.scale,
            softcap=self.softcap,
            memory_budget=self.memory_budget,
        )

    def apply_lens(self, lens: Lens, states: Tensor, layer: int | None = None) -> Tensor:
        """Apply a lens: nothing for ``policy``, LN_final for ``logit-lens``, the length 1 for ``unit-norm``.

        Args:
            lens: ``policy`` (arXiv 2512.19673v3, eqs. 5-6), ``logit-lens``, ``unit-norm``, which divides a state by
                its root mean square and has no learnt gain, or a lens of the user's own from ``open_lens``.
            states: [N, d].
            layer: l of H^l and of all that layer l reads and writes, 0 for H^0; the named lenses do not need it.

        Returns:
            [N, d] the states that E_u projects, in their dtype; the norm is the model's own module.
        """
        if not isinstance(lens, str):
            if layer is None:
                raise ValueError(f"the lens {lens.name} differs by layer, and no layer was given")
            mapped: Tensor = lens.apply(layer, states, self)
            return mapped
        if lens == "policy":
            return states
        if lens == "logit-lens":
            return self.apply_final_norm(states)
        if lens != "unit-norm":
            raise ValueError(f"{lens!r} is not the name of a lens; open_lens prepares a directory or a function")
        rms = states.float().square().mean(dim=-1, keepdim=True).sqrt()
        return (states / torch.where(rms > 0, rms, 1.0)).to(states.dtype)

    def apply_final_norm(self, states: Tensor) -> Tensor:
        """Apply LN_final on the device of its weights.

        Args:
            states: [N, d].

        Returns:
            [N, d] on the device of E_u, which for tied weights is that of the input embedding.
        """
        return self.final_norm(states).to(self.weight.device)

    @property
    def norm_is_unbiased(self) -> bool:
        """Whether LN_final adds no bias, so that it maps the multiples of a state to multiples of its image."""
        return getattr(self.final_norm, "bias", None) is None

    def logits(self, states: Tensor) -> Tensor:
        """Compute logits in the states' dtype, as the model does; for a few states only.

        Args:
            states: [N, d].

        Returns:
            [N, V].
        """
        logits = torch.nn.functional.linear(states.to(self.weight.device), self.weight, self.bias) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def projection_of(model: Any, family: Family) -> Projection:
    """Read E_u, the transform of the logits and LN_final from the current state of a model.

    Args:
        model: a transformers causal LM.
        family: where its parts are.

    Returns:
        The projection. E_u of an offloaded or quantised unembedding is computed once, and stays on the device where
        the unembedding runs.

    Raises:
        UserError: no matrix represents the unembedding.
    """
    weight, bias = _matrix(model, family.unembedding)
    scale = 1.0
    if family.logit_scale:
        scale *= float(getattr(model.config, family.logit_scale))
    if family.logit_divisor:
        scale /= float(getattr(model.config, family.logit_divisor))
    return Projection(
        weight=weight,
        bias=bias,
        scale=scale,
        softcap=getattr(model.config, family.logit_softcap) if family.logit_softcap else None,
        final_norm=operator.attrgetter(family.final_norm)(model),
    )


def _matrix(model: Any, path: str) -> tuple[Tensor, Tensor | None]:
    """E_u [V, d] and its bias [V]."""
    head = operator.attrgetter(path)(model)
    weight: Tensor | None = getattr(head, "weight", None)
    bias: Tensor | None = getattr(head, "bias", None)
    if weight is None or type(weight) not in _DENSE or weight.dtype not in FLOAT_DTYPES or weight.ndim != 2:
        return _by_calls(model, head, path)
    device = devices.execution_device(head)
    if device is None:
        return weight.detach(), None if bias is None else bias.detach()
    weight = devices.materialize(model, f"{path}.weight", weight.detach()).to(device)
    return weight, None if bias is None else devices.materialize(model, f"{path}.bias", bias.detach()).to(device)


@torch.no_grad()
def _by_calls(model: Any, head: Any, path: str) -> tuple[Tensor, Tensor | None]:
    """E_u of a quantised unembedding, whose bits do not depend on the way in which the weights are packed."""
    embedding = model.get_input_embeddings().weight
    width = int(getattr(head, "in_features", embedding.shape[1]))
    dtype = embedding.dtype if embedding.dtype in FLOAT_DTYPES else torch.float32
    tensors = [*head.parameters(), *head.buffers()]
    device = devices.execution_device(head) or (tensors[0].device if tensors else torch.device("cpu"))
    weight, bias = weight_by_calls(head, width, dtype, device)
    _refuse_inexact(head, weight, bias, dtype, device, f"{getattr(model, 'name_or_path', '') or 'model'}: {path}")
    return weight, bias


def weight_by_calls(
    call: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype, device: Any
) -> tuple[Tensor, Tensor | None]:
    """Read E_u [V, d] and its bias [V], None if it is 0, of an unembedding that can only be called.

    Projecting the identity matrix, in inputs of width d, gives the exact transpose: the values by which the model
    itself multiplies.
    """
    zero = call(torch.zeros(1, width, dtype=dtype, device=device))[0]
    bias = zero if bool(zero.any()) else None
    weight = torch.empty(zero.numel(), width, dtype=zero.dtype, device=zero.device)
    for first in range(0, width, 1024):
        unit = torch.zeros(min(1024, width - first), width, dtype=dtype, device=device)
        unit[:, first : first + len(unit)].fill_diagonal_(1)
        weight[:, first : first + len(unit)] = (call(unit) if bias is None else call(unit) - bias).T
    return weight, bias


def _refuse_inexact(
    call: Any, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, device: torch.device, what: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(8, weight.shape[1], generator=generator).to(device, dtype)
    theirs = devices.in_float64(call(states))
    added = 0 if bias is None else devices.in_float64(bias)
    ours = devices.in_float64(states.to(weight.device)) @ devices.in_float64(weight).T + added
    error = float((ours - theirs).norm() / theirs.norm().clamp(min=torch.finfo(torch.float64).tiny))
    if not error <= _ROUNDINGS * max(torch.finfo(dtype).eps, torch.finfo(weight.dtype).eps):
        raise UserError(
            f"{what} also quantises the states that it receives (relative difference {error:.1e}), so that no matrix "
            "E_u gives the model's logits; leave the unembedding out of the quantisation (llm_int8_skip_modules)"
        )
