"""Capture through the hook points of transformer-lens: a ``TransformerBridge`` over the same weights, unprocessed.

transformer-lens 4 wraps the modules of a transformers model and recomputes most attentions eagerly; the rest of the
forward pass is the model's own code. States are read at ``hook_in`` and ``hook_out`` of the wrappers of those modules
that the family's row names, so that no second table of names is needed.
"""

from __future__ import annotations

import copy
import logging
import operator
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from internal_policy.extractors.base import Batch, LayerGroups, LayerReduction, LayerStates, LogitReduction
from internal_policy.extractors.hooks import pick
from internal_policy.models import LanguageModel, wrap
from internal_policy.utils.errors import UserError

_INSTEAD = "use --backend hooks"

_Hook = tuple[str, Callable[..., Tensor | None]]


class TransformerLensExtractor:
    """The transformer-lens backend; see ``Extractor``.

    ``model`` is the plain transformers model, which samples and has the projection; ``bridge`` runs the same weights.
    """

    def __init__(self, model: LanguageModel, bridge: Any) -> None:
        self.model = model
        self.bridge = bridge
        self._bridged = replace(model, model=bridge.original_model)

    @property
    def wrapper(self) -> Any:
        """The bridge."""
        return self.bridge

    @torch.no_grad()
    def run(self, batch: Batch, reduce: LayerReduction, at_once: int = 1) -> list[Tensor]:
        """Run the decoder once, without the unembedding; see ``Extractor.run``.

        The bridge's own forward would also compute the logits of all positions.
        """
        groups = LayerGroups(reduce, self.model.projection, self.model.n_layers, at_once)
        hooks: list[_Hook] = []
        for layer, block in enumerate(self._bridged.layers, start=1):
            hooks += self._layer_hooks(layer, block, batch, groups.append)
        with self.bridge.hooks(fwd_hooks=[*hooks, *self._correcting_hooks()]):
            self._bridged.backbone(**self.model.forward_arguments(batch.input_ids, batch.attention_mask))
        return groups.reduced

    @torch.no_grad()
    def logits(self, batch: Batch, reduce: LogitReduction) -> Tensor:
        """Run the whole model once; see ``Extractor.logits``."""
        last: list[Tensor] = []

        def keep(states: Tensor, *, hook: Any) -> None:
            last.append(pick(states, batch.positions))

        hooks = [(self._name(self._bridged.layers[-1], "hook_out"), keep), *self._correcting_hooks()]
        with self.bridge.hooks(fwd_hooks=hooks):
            own = self._bridged.model(**self.model.forward_arguments(batch.input_ids, batch.attention_mask)).logits
        return reduce(pick(own, batch.positions), last[0], self.model.projection)

    def _layer_hooks(
        self, layer: int, block: nn.Module, batch: Batch, consume: Callable[[LayerStates], None]
    ) -> list[_Hook]:
        family, multiplier = self.model.family, self.model.write_multiplier
        attention, attention_write, ffn, ffn_write = (
            operator.attrgetter(path)(block) for path in family.capture_paths()
        )
        held: dict[str, Tensor] = {}

        def keep(field: str, factor: float = 1.0) -> Callable[..., None]:
            def hold(states: Tensor, *, hook: Any) -> None:
                picked = pick(states, batch.positions)
                held[field] = picked if factor == 1.0 else picked * factor

            return hold

        def pass_on(states: Tensor, *, hook: Any) -> None:
            if missing := {"residual_in", "attention_in", "attention_write", "ffn_in", "ffn_write"} - held.keys():
                raise UserError(
                    f"{self.model.name}: transformer-lens runs layer {layer} without its hook for {min(missing)}; "
                    f"{_INSTEAD}"
                )
            states_of_layer = LayerStates(layer=layer, residual_out=pick(states, batch.positions), **held)
            held.clear()
            consume(states_of_layer)

        return [
            (self._name(block, "hook_in"), keep("residual_in")),
            (self._name(attention, "hook_in"), keep("attention_in")),
            (self._name(attention_write, "hook_out"), keep("attention_write", multiplier)),
            (self._name(ffn, "hook_in"), keep("ffn_in")),
            (self._name(ffn_write, "hook_out"), keep("ffn_write", multiplier)),
            (self._name(block, "hook_out"), pass_on),
        ]

    def _correcting_hooks(self) -> list[_Hook]:
        """Hooks that make the bridge compute in the dtype of the model, and free attention patterns."""
        hooks: list[_Hook] = []
        for block in self._bridged.layers:
            attention: Any = operator.attrgetter(self.model.family.attention)(block)
            received: list[torch.dtype] = []

            def note(states: Tensor, *, hook: Any, received: list[torch.dtype] = received) -> None:
                received[:] = [states.dtype]

            def cast(states: Tensor, *, hook: Any, received: list[torch.dtype] = received) -> Tensor | None:
                return states.to(received[0]) if states.dtype != received[0] else None

            def release(states: Tensor, *, hook: Any, attention: Any = attention) -> None:
                attention._pattern = None

            hooks.append((self._name(attention, "hook_in"), note))
            # OLMo's rotary positions are float32. The model's own attention casts the rotated states back; the bridge's
            # does not, and fails.
            hooks += [
                (self._name(attention, end), cast) for end in ("hook_rot_q", "hook_rot_k") if hasattr(attention, end)
            ]
            # Attentions with a joint QKV store their [B, heads, T, T] pattern, which would accumulate over the layers.
            if hasattr(attention, "_pattern"):
                hooks.append((self._name(block, "hook_out"), release))
        return hooks

    def _name(self, module: nn.Module, end: str) -> str:
        """The bridge's name of a hook point, such as ``blocks.0.attn.hook_in``."""
        name = getattr(getattr(module, end, None), "name", None)
        if name is None:
            raise UserError(
                f"{self.model.name}: transformer-lens has no hook point at the {type(module).__name__} where the row "
                f"{self.model.family.name!r} reads a state; {_INSTEAD}"
            )
        return str(name)


def from_model(model: LanguageModel) -> TransformerLensExtractor:
    """Create a bridge over a model; the model object itself does not change.

    The bridge replaces modules, and switches attention to eager, in a copy of the module tree that shares every weight
    and buffer with the model. It takes memory for attention patterns [B, heads, T, T], which are computed in full, and
    in GPT-NeoX for the fused query, key and value weights, which transformer-lens copies into separate tensors.

    Raises:
        UserError: transformer-lens is not installed, or has no adapter for the architecture.
    """
    sources = _library(model.name)
    shared = {id(t): t for t in [*model.model.parameters(), *model.model.buffers()]}
    architecture = type(model.model).__name__
    try:
        twin: Any = copy.deepcopy(model.model, shared)
        twin.set_attn_implementation("eager")
        # A config made in code may name no architecture, or that of a multimodal parent; the class is always right.
        twin.config.architectures = [architecture, *(twin.config.architectures or [])]
        # Not ``boot_transformers``, which requires a tokenizer, changes it, and loads it from the hub again.
        chosen = sources.transformers.determine_architecture_from_hf_config(twin.config)
        bridge = sources.build_bridge_from_module(twin, chosen, hf_config=twin.config, model_name=model.name)
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, AssertionError, ImportError) as error:
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        raise UserError(
            f"{model.name}: transformer-lens cannot bridge {architecture} ({reason}); {_INSTEAD}"
        ) from error
    return TransformerLensExtractor(model, bridge)


def from_bridge(bridge: Any, tokenizer: Any = None, name: str | None = None) -> TransformerLensExtractor:
    """Analyse a ``TransformerBridge`` that is already in memory.

    The ``model`` of the result is the bridge's plain transformers model, over the same weights. It is put in evaluation
    mode and does not change otherwise.

    Raises:
        UserError: the bridge has processed weights or hooks, so that it does not compute the same as its model, or it
        has no tokenizer.
    """
    name = name or getattr(bridge.cfg, "model_name", None) or type(bridge.original_model).__name__
    tokenizer = tokenizer if tokenizer is not None else bridge.tokenizer
    if bridge._weights_processed:
        raise UserError(
            f"{name}: this bridge's weights are processed (norms folded, weights centred), so that its states are not "
            "the model's; give a bridge without enable_compatibility_mode(), or with its no_processing=True"
        )
    if hooked := next((point.name for point in bridge.hook_points() if _has_hooks(point)), None):
        raise UserError(
            f"{name}: this bridge has a hook at {hooked}, so that its states may not be the model's; "
            "remove it with bridge.reset_hooks(including_permanent=True)"
        )
    if tokenizer is None:
        raise UserError(f"{name}: this bridge has no tokenizer; pass tokenizer=")
    bridge.original_model.eval()
    return TransformerLensExtractor(wrap(_unbridged(bridge.original_model), tokenizer, name), bridge)


def is_bridge(value: object) -> bool:
    """Check whether an object is a ``TransformerBridge``, without importing transformer-lens."""
    library = sys.modules.get("transformer_lens.model_bridge")
    return library is not None and isinstance(value, library.TransformerBridge)


def _library(name: str) -> Any:
    """Import transformer-lens, and undo what its import changes in warnings and in the log of transformers."""
    log = logging.getLogger("transformers")
    level = log.level
    try:
        with warnings.catch_warnings():
            from transformer_lens.model_bridge import sources
    except ImportError as error:
        raise UserError(
            f"{name}: the transformer-lens backend needs transformer-lens 4.3 ({error}); "
            "in a clone: pip install -e '.[backends]'"
        ) from error
    finally:
        log.setLevel(level)
    return sources


def _has_hooks(point: Any) -> bool:
    """Whether a user has hooked a point; transformer-lens hooks some itself, to pass states between points."""
    handles = [*point.fwd_hooks, *point.bwd_hooks]
    return any(not str(getattr(h.user_hook, "__module__", "")).startswith("transformer_lens.") for h in handles)


def _unbridged(module: Any) -> Any:
    """Copy a bridged module tree without the wrappers; weights, buffers and configuration are shared."""
    while (wrapped := module._modules.get("_original_component")) is not None:
        module = wrapped
    kind: Any = type(module)
    twin = kind.__new__(kind)
    twin.__dict__.update({k: copy.copy(v) if isinstance(v, (dict, set)) else v for k, v in vars(module).items()})
    for name, child in module._modules.items():
        twin._modules[name] = child if child is None else _unbridged(child)
    if "bias" in twin._buffers and isinstance(twin, nn.Linear):
        # The bridge gives an unembedding without a bias a buffer of zeros.
        del twin._buffers["bias"]
        twin.register_parameter("bias", None)
    return twin
