"""Trainers of tiny models, and recorders of their updates."""

from __future__ import annotations

import torch
from datasets import Dataset
from tiny import VOCAB, tiny_model, tiny_tokenizer
from trl import GRPOConfig

from internal_policy.bupo.trainer import BuPOTrainer
from internal_policy.bupo.trainer_config import BuPOConfig
from internal_policy.extractors import residual_hooks
from internal_policy.models import wrap

LAYERS = 4


def reward(prompts, completions, **kwargs):
    """A deterministic reward that differs within a group."""
    return [float(sum(map(len, text.split())) % 5) for text in completions]


def dataset(n=64):
    words = [f"w{i}" for i in range(2, VOCAB)]
    return Dataset.from_list(
        [{"prompt": " ".join(words[i : i + 1 + i % 4]), "answer": "w2"} for i in (j % 40 for j in range(n))]
    )


def options(**changed):
    return {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 1,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "shuffle_dataset": False,
        "disable_tqdm": True,
        "max_steps": 1,
        "seed": 3,
        **changed,
    }


def make_trainer(tmp_path, model=None, kind=BuPOTrainer, **changed):
    model = model if model is not None else tiny_model("qwen3", layers=LAYERS)
    settings = options(output_dir=str(tmp_path / "out"), **changed)
    config = BuPOConfig(**settings) if issubclass(kind, BuPOTrainer) else GRPOConfig(loss_type="grpo", **settings)
    return kind(
        model=model,
        reward_funcs=[reward],
        args=config,
        train_dataset=dataset(),
        processing_class=tiny_tokenizer(),
    )


def make_bupo_trainer(tmp_path, model=None, layer=2, ipa_steps=1, **changed):
    return make_trainer(tmp_path, model, method="bupo", layer=layer, ipa_steps=ipa_steps, **changed)


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def left_padded(seed=0, rows=3, longest=11, completion=5):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (rows, longest), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 2 * row] = 0
    return ids * mask, mask, completion


def by_hooks(model, ids, mask, keep, layer, site, lens, temperature):
    """Log-probabilities and entropies of pi^l from the states that hooks see in a full forward pass, in float64."""
    language_model = wrap(model, None, "tiny")
    states = {}
    rows, length = ids.shape
    positions = torch.arange(rows * length)
    with torch.no_grad(), residual_hooks(language_model, positions, lambda s: states.setdefault(s.layer, s)):
        language_model.backbone(**language_model.forward_arguments(ids, mask))
    found = {"layer": "residual_out", "attn": "attention_write", "ffn": "ffn_write"}[site]
    state = getattr(states[layer], found)
    if lens == "logit-lens":
        state = language_model.projection.final_norm(state)
    logits = state.double() @ model.get_output_embeddings().weight.detach().double().T / temperature
    log_p = logits.view(rows, length, -1).log_softmax(-1)[:, -keep - 1 : -1]
    chosen = log_p.gather(-1, ids[:, -keep:, None]).squeeze(-1)
    return chosen, -(log_p.exp() * log_p).sum(-1)


class _Gradients(__import__("transformers").TrainerCallback):
    def __init__(self, model, found):
        self.model, self.found = model, found

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for name, parameter in self.model.named_parameters():
            self.found[name] = None if parameter.grad is None else float(parameter.grad.abs().max())


class Recorder(BuPOTrainer):
    """Records which policy the old and the new log-probabilities of each update belong to."""

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        self.__dict__.setdefault("calls", []).append(self._aligning)
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        start = len(self.__dict__.setdefault("calls", []))
        batch = super()._generate_and_score_completions(inputs)
        # The first call is of the old log-probabilities; the entropy of pi_theta is measured last.
        batch["old_policy"] = torch.tensor(self.calls[start])
        return batch

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        self.__dict__.setdefault("updates", []).append((bool(inputs["old_policy"]), self.calls[-1]))
        return loss
