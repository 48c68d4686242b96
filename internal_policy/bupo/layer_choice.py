"""The layer of a run: as it was given, or the boundary layer of an analysis of the model.

An analysis of the model's own responses chooses it with ``layer="auto"``. What length and gradients say is noted next
to it and changes nothing: the layer by direction alone, and how far alignment at each layer agrees with GRPO.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from internal_policy.analysis.layer_selection import DIRECTION, phrase
from internal_policy.analysis.results import Analysis
from internal_policy.bupo.config import AUTO, TrainConfig, require_layer
from internal_policy.bupo.gradient_transfer import transfer
from internal_policy.bupo.prompts import PromptDataset
from internal_policy.bupo.run import ANALYSIS, TRANSFER
from internal_policy.bupo.trainer_config import BuPOConfig
from internal_policy.extractors.truncated import check_layer
from internal_policy.models import LanguageModel
from internal_policy.models.options import DEFAULT_LENS
from internal_policy.rewards.functions import as_rewards
from internal_policy.utils.console import few_prompts
from internal_policy.utils.distributed import Processes, release_memory
from internal_policy.utils.errors import UserError

logger = logging.getLogger(__name__)

_ANALYSIS_RESPONSES = 128
"""Responses in the analysis that chooses the layer."""
_TRANSFER_PROMPTS = 64
"""Prompts at most on which alignment is compared with GRPO."""
Rewards = list[Callable[..., Any]]


@dataclass(frozen=True)
class LayerChoice:
    """A layer and the reason for it."""

    layer: int | None
    """l, from 1; None if there is none, or none yet."""
    reason: str
    """One sentence."""
    analysed: dict[str, Any] | None = None
    """Description of the model that was analysed, if the layer comes from an analysis."""

    def check(self, model: LanguageModel) -> None:
        """Refuse a layer that the model lacks, and an analysis of another model."""
        expected = {
            "family": model.family.name,
            "layers": model.n_layers,
            "vocabulary": model.vocab_size,
            "hidden_size": model.projection.weight.shape[1],
        }
        analysed = self.analysed or {}
        for name, value in expected.items():
            if analysed.get(name, value) != value:
                raise UserError(
                    f"layer: the analysis is of another model ({analysed.get('id')}: {name} {analysed[name]}), and "
                    f"{model.name} has {name} {value}; give an analysis of this model, a number, or auto"
                )
        if self.layer is not None:
            check_layer(self.layer, model.n_layers)


def choose_layer(layer: Any) -> LayerChoice:
    """Choose the layer by a number from 1, an ``Analysis`` or its directory; ``auto`` and None leave it open."""
    if layer is None or layer == AUTO:
        return LayerChoice(None, "")
    if hasattr(layer, "__index__") and not isinstance(layer, bool):
        return LayerChoice(int(layer), "as it was asked for")
    if isinstance(layer, (str, Path)):
        require_layer(layer)
        layer = Analysis.load(layer)
    if not isinstance(layer, Analysis):
        raise UserError(f"layer is a {type(layer).__name__}; needed is a number from 1, an Analysis, its path, or auto")
    selection = layer.selection
    if selection.boundary_layer is None:
        near = ", ".join(map(str, selection.candidates)) or "none"
        raise UserError(
            f"layer: the analysis of {layer.name} finds no boundary layer ({selection.reason.rstrip('.')}); nearest "
            f"candidates: {near}; give one of them as a number"
        )
    few = few_prompts(layer.n_prompts)
    lens = None if layer.lens == DEFAULT_LENS else f"found under the lens {layer.lens}"
    reason = "; ".join(filter(None, (selection.reason, selection.agreement, few, lens)))
    return LayerChoice(selection.boundary_layer, reason, dict(layer.model))


def copied_rewards(reward: Any, *, exact: bool) -> Rewards | None:
    """Make the rewards of a run once more, so that a measurement leaves their counts and states alone.

    Args:
        reward: what ``as_rewards`` takes.
        exact: as for ``as_rewards``.

    Returns:
        The rewards; None if they cannot be copied, or are models.
    """
    given = list(reward) if isinstance(reward, (list, tuple)) else [reward]
    if any(isinstance(each, nn.Module) for each in given):
        return None
    try:
        return as_rewards(copy.deepcopy(given), exact=exact)
    # Whatever an object of the user raises.
    except Exception:
        return None


def analyse(
    config: TrainConfig,
    trainer_config: BuPOConfig,
    model: LanguageModel,
    dataset: PromptDataset,
    rewards: Rewards | None,
    state: Processes,
) -> LayerChoice:
    """Choose the layer by an analysis of the model's own responses to its training prompts.

    Args:
        config: of the run, with its preset.
        trainer_config: of its trainer.
        model: the model, which is the same afterwards.
        dataset: the prompts of the run.
        rewards: for the comparison with GRPO; from ``copied_rewards``.
        state: the processes, of which the main one analyses while the others wait.

    Returns:
        The boundary layer, in every process.

    Raises:
        UserError: there is none.
    """
    found = None
    if state.is_main_process:
        from internal_policy.analysis.pipeline import analyze

        analysis = analyze(
            model.model,
            model.tokenizer,
            prompts=[{"prompt": prompt.content} for prompt in dataset.prompts[:_ANALYSIS_RESPONSES]],
            max_responses=_ANALYSIS_RESPONSES,
            max_new_tokens=config.max_completion_length,
            template=config.template or "chat",
            seed=config.seed,
            output=config.directory / ANALYSIS,
            # The main process does this while the others wait.
            alone=True,
        )
        found = choose_layer(analysis)
        found.check(model)
        agreement = ""
        if config.aligns:
            agreement = _agreement(config, trainer_config, model, dataset, rewards, state, found.layer or 0)
        notes = [f"layer {found.layer} (boundary layer)"]
        if DIRECTION in analysis.selection.sensitivity:
            layer = analysis.selection.sensitivity[DIRECTION]
            notes.append(f"{phrase(DIRECTION)} {'there is none' if layer is None else f'layer {layer}'}")
        logger.warning("%s", "; ".join(filter(None, [*notes, agreement])))
        found = replace(found, reason="; ".join(filter(None, [found.reason, agreement])))
    choice: LayerChoice = state.broadcast(found)
    return choice


def _agreement(
    config: TrainConfig,
    trainer_config: BuPOConfig,
    model: LanguageModel,
    dataset: PromptDataset,
    rewards: Rewards | None,
    state: Processes,
    layer: int,
) -> str:
    """How far alignment agrees with GRPO on the prompts of one step, in a clause; or why this was not measured."""
    place = config.directory / TRANSFER
    per_step = trainer_config.generation_batch_size // trainer_config.num_generations
    prompts = dataset.prompts[: min(per_step, _TRANSFER_PROMPTS)]
    try:
        if state.sharded:
            raise UserError("the weights are divided among processes")
        if (config.site, config.lens) != ("layer", "policy"):
            raise UserError("only the policy of a layer without the final norm is")
        if rewards is None or trainer_config.reward_weights is not None:
            raise UserError("the rewards are models, cannot be copied or have weights")
        measured = transfer(
            replace(model, name=config.model),
            [{"prompt": prompt.content, "answer": prompt.answer} for prompt in prompts],
            reward=rewards,
            max_prompts=len(prompts),
            num_generations=trainer_config.num_generations,
            max_new_tokens=trainer_config.max_completion_length,
            batch_size=trainer_config.per_device_train_batch_size,
            temperature=config.temperature,
            template=config.template or "chat",
            seed=config.seed,
            output=place,
        )
    # It is a note: whatever keeps it from being made, the run goes on.
    except UserError as error:
        shutil.rmtree(place, ignore_errors=True)
        return f"alignment was not compared with GRPO ({str(error).partition(';')[0]})"
    finally:
        release_memory()
    cosines = measured.table.set_index("layer")["cosine"]
    best = int(cosines.index[int(cosines.argmax())])
    own = f"alignment at layer {layer} agrees with GRPO to {cosines[layer]:.2f}"
    return f"{own}, the most of all layers" if best == layer else f"{own}, most at layer {best} ({cosines[best]:.2f})"
