"""Supervised training of a testbed model on worked solutions, resumable at any step, with Muon in float32.

``torch.optim.Muon`` computes in bfloat16, one matrix at a time, which on a CPU costs more than the model's own step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from recipe import Recipe, Stage
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from internal_policy.data.arithmetic import Problem, make_problem

SAVE_EVERY = 100
# Long solutions are harder and have more tokens; short ones are only a step towards them.
LEVEL_WEIGHTS = {1: 1, 2: 2, 3: 2, 4: 3}
# Keller Jordan's quintic: five iterations bring every singular value into about [0.7, 1.2].
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def draw_batch(recipe: Recipe, step: int) -> list[Problem]:
    """Draw the problems of one step; they depend only on the arguments.

    Args:
        recipe: The seed, the batch size and the stages.
        step: The step, counted from 1 over all stages.

    Returns:
        Problems of all levels, the solutions with slips in the last stage.
    """
    rng = random.Random(f"train {recipe.seed} {step}")
    stage, _ = _stage(recipe, step)
    levels = rng.choices(list(LEVEL_WEIGHTS), weights=list(LEVEL_WEIGHTS.values()), k=recipe.batch)
    return [make_problem(rng, level, stage.slip) for level in levels]


def lr_scale(recipe: Recipe, step: int) -> float:
    """The factor on the peak learning rates: in each stage a linear warm-up, then a cosine.

    Args:
        recipe: The lengths of the stages and the factors.
        step: The step, counted from 1 over all stages.

    Returns:
        A factor from 0 to 1.
    """
    stage, at = _stage(recipe, step)
    cosine = 0.5 * (1 + math.cos(math.pi * at / stage.steps))
    scale = recipe.final_lr_scale + (1 - recipe.final_lr_scale) * cosine
    return scale * min(1.0, at / recipe.warmup) * stage.lr_scale


def backward(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch: Sequence[Problem]) -> float:
    """Add the gradient of the mean cross-entropy over the response tokens.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        batch: Problems with solutions.

    Returns:
        The loss, in nats a token.
    """
    pairs = [(_ids(tokenizer, f"<user>{p.prompt}<assistant>"), _ids(tokenizer, f"{p.solution}<eos>")) for p in batch]
    width = max(len(prompt) + len(response) for prompt, response in pairs)
    ids_bt = torch.full((len(pairs), width), tokenizer.pad_token_id)
    predicts_bt = torch.zeros(len(pairs), width, dtype=torch.bool)
    # Padding on the right needs no mask in a causal model, and leaves attention its fast path.
    for row, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        ids_bt[row, :end] = torch.tensor(prompt + response)
        predicts_bt[row, len(prompt) - 1 : end - 1] = True
    hidden_btd = model.model(input_ids=ids_bt, use_cache=False).last_hidden_state
    loss = F.cross_entropy(model.lm_head(hidden_btd[predicts_bt]), ids_bt.roll(-1, dims=1)[predicts_bt])
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    checkpoint: Path | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train a model in place.

    Args:
        model: The model, as `build_model` made it.
        tokenizer: Its tokenizer.
        recipe: The training.
        checkpoint: Where the state is kept between runs: training goes on from it if it is there and of this recipe.
        on_step: Called after each step with the step, counted from 1, and the loss in nats a token.
    """
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    norms = [p for p in model.parameters() if p.ndim == 1]
    small = [{"params": [embedding], "lr": recipe.embedding_lr}, {"params": norms, "lr": recipe.norm_lr}]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=recipe.matrix_lr, weight_decay=recipe.matrix_decay),
        torch.optim.AdamW(small, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    done = _resume(checkpoint, model, optimizers, recipe)
    model.train()
    for step in range(done + 1, recipe.steps + 1):
        scale = lr_scale(recipe, step)
        for optimizer, optimizer_peaks in zip(optimizers, peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, optimizer_peaks, strict=True):
                group["lr"] = peak * scale
        loss = backward(model, tokenizer, draw_batch(recipe, step))
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        on_step(step, loss)
        if checkpoint is not None and step % SAVE_EVERY == 0:
            _save(checkpoint, model, optimizers, recipe, step)
    model.eval()


def _stage(recipe: Recipe, step: int) -> tuple[Stage, int]:
    at = step
    for stage in recipe.stages:
        if at <= stage.steps:
            return stage, at
        at -= stage.steps
    raise ValueError(f"step {step}: the recipe has {recipe.steps}")


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _save(
    checkpoint: Path, model: PreTrainedModel, optimizers: list[torch.optim.Optimizer], recipe: Recipe, step: int
) -> None:
    state = {
        "recipe": asdict(recipe),
        "step": step,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    partial = checkpoint.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(checkpoint)


def _resume(
    checkpoint: Path | None, model: PreTrainedModel, optimizers: list[torch.optim.Optimizer], recipe: Recipe
) -> int:
    if checkpoint is None or not checkpoint.is_file():
        return 0
    state = torch.load(checkpoint, weights_only=True)
    if state["recipe"] != asdict(recipe):
        return 0
    model.load_state_dict(state["model"])
    for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(optimizer_state)
    return int(state["step"])


def orthogonalise(update_nab: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Replace each matrix by the nearest semi-orthogonal one, approximately.

    Args:
        update_nab: Matrices, shape [n, a, b].
        iterations: The number of Newton-Schulz iterations.

    Returns:
        Matrices of the same shape whose singular values are all near 1.
    """
    first, third, fifth = NEWTON_SCHULZ
    tall = update_nab.shape[1] > update_nab.shape[2]
    x = update_nab.mT if tall else update_nab
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = first * x + (third * gram + fifth * gram @ gram) @ x
    result: torch.Tensor = x.mT if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al. 2024), with decoupled weight decay.

    Args:
        params: Weight matrices.
        lr: The learning rate, times sqrt(rows / columns) for a tall matrix.
        momentum: The decay of the running mean of the gradients, used with Nesterov's correction.
        weight_decay: The decoupled weight decay, times lr.
    """

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one update from the gradients; ``closure`` is ignored."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = {}
            for param in group["params"]:
                if param.grad is None:
                    continue
                state: dict[str, Any] = self.state[param]
                mean = state.setdefault("mean", torch.zeros_like(param))
                mean.lerp_(param.grad, 1 - group["momentum"])
                by_shape.setdefault(param.shape, []).append((param, param.grad.lerp(mean, group["momentum"])))
            for shape, pairs in by_shape.items():
                updates = orthogonalise(torch.stack([update for _, update in pairs]))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for (param, _), update in zip(pairs, updates, strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)
        return None
