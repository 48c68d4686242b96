"""A causal language model with its parts located, on which the rest of the package works."""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from internal_policy.models import context, devices, fingerprint, quantization
from internal_policy.models.families import FAMILIES, Family, guess_families
from internal_policy.models.projection import FLOAT_DTYPES, Projection, projection_of
from internal_policy.utils.errors import UserError
from internal_policy.utils.logging import status


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer, its row of the family table and its projection."""

    name: str
    """The name that the user gave it."""
    revision: str | None
    """The hub's commit, or the revision that the user named."""
    model: nn.Module
    """The transformers model, in evaluation mode."""
    tokenizer: Any
    """Its tokenizer."""
    family: Family
    """Where its parts are."""
    projection: Projection
    """E_u with the model's own transform of logits, and LN_final."""

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.model.config

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers; layer l of the paper is ``layers[l - 1]``."""
        layers: nn.ModuleList = operator.attrgetter(self.family.layers)(self.model)
        return layers

    @property
    def backbone(self) -> nn.Module:
        """The decoder without the unembedding."""
        backbone: nn.Module = operator.attrgetter(self.family.backbone)(self.model)
        return backbone

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def vocab_size(self) -> int:
        """V: rows of E_u."""
        return int(self.projection.weight.shape[0])

    @property
    def n_parameters(self) -> int:
        """Parameters of the whole model; packed weights count unpacked, and shared ones once."""
        return int(cast(Any, self.model).num_parameters())

    @property
    def device(self) -> torch.device:
        """The device of the token ids."""
        return devices.input_device(self.model)

    @property
    def placement(self) -> str:
        """The devices of the weights, in the order of the decoder, such as ``cpu`` or ``cuda:0, cuda:1, cpu, disk``."""
        return devices.describe(self.model)

    @property
    def quantization(self) -> str | None:
        """How the weights are quantised, such as ``bitsandbytes 4-bit (nf4)``; None if they are not."""
        return quantization.describe(self.config)

    @property
    def rounds_by_batch(self) -> bool:
        """Whether the numbers of a sequence depend on the rest of its batch."""
        return quantization.rounds_by_batch(self.config)

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest dtype in which the model computes states: that of its weights, except quantised ones."""
        found = [p.dtype for p in self.model.parameters() if p.dtype in FLOAT_DTYPES]
        return max([*found, self.projection.weight.dtype], key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def parallel(self) -> bool:
        """Whether attention and FFN of a layer both start from H^{l-1}, so that there is no H_mid."""
        return self.family.is_parallel(self.config)

    @property
    def write_multiplier(self) -> float:
        """The factor on both writes before they are added to the stream."""
        return self.family.multiplier(self.config)

    def forward_arguments(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        """Build the arguments of a forward pass of the decoder or of the whole model, without a cache.

        Args:
            input_ids: [B, T] ids.
            attention_mask: [B, T] 1 for tokens, 0 for padding on either side.

        Returns:
            The keyword arguments; positions are counted over real tokens, if the model takes positions.
        """
        mask = attention_mask.to(self.device)
        arguments = {"input_ids": input_ids.to(self.device), "attention_mask": mask, "use_cache": False}
        if "position_ids" in inspect.signature(self.backbone.forward).parameters:
            arguments["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        return arguments

    @property
    def max_length(self) -> int | None:
        """The longest sequence that the model has positions for."""
        return context.max_length(self.config)

    @property
    def length_switch(self) -> int | None:
        """The length beyond which a batch runs with other position frequencies; see ``context.length_switch``."""
        return context.length_switch(self.config)

    def fingerprint(self) -> str:
        """Compute a digest of every bit of every weight, of the configuration and of the classes.

        It reads the whole model, a few tensors at a time, which takes seconds for some gigabytes.

        Returns:
            16 hexadecimal digits, which do not depend on the devices of the weights.
        """
        with status(f"reading all weights of {self.name}"):
            return fingerprint.digest(self.model)


def wrap(
    model: Any, tokenizer: Any, name: str | None = None, revision: str | None = None, family: Family | None = None
) -> LanguageModel:
    """Wrap a transformers model that is already in memory.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        name: its name in results; its ``name_or_path`` by default.
        revision: the hub's commit, if known.
        family: where its parts are; by default its row of the table, or a guess by structure.

    Returns:
        The model with its parts located. The model itself is put in evaluation mode, and its 4-bit layers are kept
        from repacking their weights; it does not change otherwise.

    Raises:
        UserError: it is not a causal LM, or its parts cannot be found.
    """
    name = name or getattr(model, "name_or_path", "") or type(model).__name__
    if not hasattr(model, "config"):
        raise UserError(f"got a {type(model).__name__}; needed is a transformers causal LM, or a name")
    family = family or family_of(model, name)
    for part in (family.backbone, family.layers, family.final_norm, family.unembedding):
        try:
            operator.attrgetter(part)(model)
        except AttributeError as error:
            raise UserError(
                f"{name}: this {type(model).__name__} has no {part}; needed is a causal LM with its head, "
                "as AutoModelForCausalLM loads it"
            ) from error
    if len(operator.attrgetter(family.layers)(model)) == 0:
        raise UserError(f"{name}: this model has no layers; needed is at least one")
    quantization.keep_exact(model, name)
    return LanguageModel(name, revision, model.eval(), tokenizer, family, projection_of(model, family))


def family_of(model: Any, name: str) -> Family:
    """Look up the row of a model's family, or guess one by structure for a model type without a row.

    Raises:
        UserError: there is no row, and no known structure.
    """
    model_type = model.config.model_type
    family = FAMILIES.get(model_type) or next(guess_families(model), None)
    if family is None:
        raise unknown_family(name, model_type, "has no parts of a decoder under names that are known")
    return family


def unknown_family(name: str, model_type: str, why: str) -> UserError:
    """Create the error for a model without a row; ``why`` says why none could be guessed."""
    return UserError(
        f"{name}: family {model_type!r} is not in the table (internal-policy models prints it) and {why}; "
        "to add it, write one row in internal_policy/models/families.py"
    )
