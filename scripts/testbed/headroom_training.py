"""Supervised training of a start, on a CPU or a GPU, interruptible after any kept step.

No step waits for the device: the loss stays there until it is asked for, and every label is used where it lies.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from headroom_data import IGNORED, STEPS_A_BLOCK, Block, Candidate
from recipe import build_model, make_tokenizer
from train import Muon
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from internal_policy.data.arithmetic import LETTERS

MAX_NEW_TOKENS = 80
"""The limit on a response; the longest solution, of level 8, has 68 tokens."""
_STATE = "training.pt"


class Kept(NamedTuple):
    """A step of the training that can be the start.

    Attributes:
        step: The step, counted from 1.
        loss: The mean loss since the last kept step, in nats a response token.
        path: The directory with its weights and tokenizer.
    """

    step: int
    loss: float
    path: Path


class Training:
    """A candidate in training.

    Args:
        candidate: What to train.
        directory: Where it keeps its steps; what an earlier run of the same candidate left there is gone on from.
        device: The torch device.
    """

    def __init__(self, candidate: Candidate, directory: Path, device: str) -> None:
        self.candidate, self.directory, self.device = candidate, directory, device
        self.tokenizer: PreTrainedTokenizerFast = make_tokenizer(LETTERS)
        model = build_model(candidate.architecture, candidate.recipe, self.tokenizer)
        model.generation_config.max_new_tokens = MAX_NEW_TOKENS
        self.model: PreTrainedModel = model.to(device)
        recipe, embedding = candidate.recipe, model.get_input_embeddings().weight
        matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
        norms = [p for p in model.parameters() if p.ndim == 1]
        small = [{"params": [embedding], "lr": recipe.embedding_lr}, {"params": norms, "lr": recipe.norm_lr}]
        self._optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=recipe.matrix_lr, weight_decay=recipe.matrix_decay),
            torch.optim.AdamW(small, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self._optimizers]
        self._parameters = list(model.parameters())
        self.step = 0
        self._resume()

    def run(self, every: int, stop: Callable[[], bool] = lambda: False) -> Iterator[Kept]:
        """Train, and stop for the caller at each kept step.

        The rate is constant after the warm-up, so that a training that is stopped early is what a shorter one gives.

        Args:
            every: Steps from one kept step to the next.
            stop: Asked before each step whether to end here.

        Yields:
            Each kept step, with the model in evaluation mode; first the one from which an interrupted run goes on,
            since the caller may not have come to measure it.
        """
        recipe, block = self.candidate.recipe, None
        losses: list[torch.Tensor] = []
        if self.step:
            self.model.eval()
            yield Kept(self.step, math.nan, self._path())
        self.model.train()
        while self.step < recipe.clean_steps and not stop():
            self.step += 1
            number = (self.step - 1) // STEPS_A_BLOCK
            if block is None or block.number != number:
                block = Block(self.candidate, number, self.device)
            self._set_rates(min(1.0, self.step / recipe.warmup))
            losses.append(self._update(*block.batch(self.step)))
            if self.step % every == 0 or self.step == recipe.clean_steps:
                loss = float(torch.stack(losses).mean())
                losses = []
                self.model.eval()
                yield Kept(self.step, loss, self._keep())
                self.model.train()

    def _update(self, ids_bt: torch.Tensor, labels_bt: torch.Tensor) -> torch.Tensor:
        # Padding on the right needs no mask in a causal model, and leaves attention its fast path.
        hidden_btd = self.model.model(input_ids=ids_bt, use_cache=False).last_hidden_state
        logits_btv = self.model.lm_head(hidden_btd)
        loss: torch.Tensor = F.cross_entropy(logits_btv.flatten(0, 1), labels_bt.flatten(), ignore_index=IGNORED)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._parameters, self.candidate.recipe.clip)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    def _set_rates(self, scale: float) -> None:
        for optimizer, peaks in zip(self._optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * scale

    def _keep(self) -> Path:
        """Write the weights of this step, and the state from which the next run goes on."""
        path = self._path()
        partial = path.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        self.model.save_pretrained(partial)
        self.tokenizer.save_pretrained(partial)
        (partial / "candidate.json").write_text(json.dumps(asdict(self.candidate), indent=1) + "\n")
        # safetensors writes private files, but an archive of them is read by others.
        for file in partial.iterdir():
            file.chmod(0o644)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
        state = {
            "candidate": asdict(self.candidate),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        unfinished = self.directory / f"{_STATE}.partial"
        torch.save(state, unfinished)
        unfinished.replace(self.directory / _STATE)
        return path

    def _path(self) -> Path:
        return self.directory / f"step-{self.step:05d}"

    def _resume(self) -> None:
        file = self.directory / _STATE
        if not file.is_file():
            return
        state = torch.load(file, weights_only=True, map_location=self.device)
        if state["candidate"] != asdict(self.candidate):
            return
        self.model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        self.step = int(state["step"])
