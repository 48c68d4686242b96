"""What the testbed models are: one recipe of numbers, two architectures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ARCHITECTURES = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}


class Stage(NamedTuple):
    """A part of the training with its own warm-up and cosine.

    Attributes:
        steps: Its length.
        lr_scale: The factor on the peak learning rates.
        slip: The probability of a slip in a written result.
    """

    steps: int
    lr_scale: float
    slip: float


@dataclass(frozen=True)
class Recipe:
    """Every number of the training, the same for both architectures.

    Attributes:
        hidden_size: The residual width d.
        layers: The number of layers L.
        heads: Attention heads.
        kv_heads: Key and value heads.
        head_dim: The width of a head.
        ffn_size: The inner width of the feed-forward modules.
        init_std: The standard deviation of the initial weight matrices.
        embedding_std: That of the initial embedding, which is also the unembedding.
        seed: Seeds the weights and the problems of the training.
        batch: Problems a step, drawn afresh.
        clean_steps: Steps on right solutions.
        restart_steps: More such steps, with a second warm-up and cosine.
        slip_steps: Steps, afterwards, on solutions that slip.
        slip: The probability of a slip in a written result.
        matrix_lr: Muon's peak learning rate, for the weight matrices.
        embedding_lr: AdamW's, for the embedding.
        norm_lr: AdamW's, for the norms.
        restart_lr_scale: The factor on all three in the second stage.
        slip_lr_scale: That in the slip stage.
        final_lr_scale: The factor at the end of each stage's cosine.
        matrix_decay: Muon's decoupled weight decay; the embedding and the norms have none.
        warmup: Steps of linear warm-up in each stage.
        clip: The greatest norm of the gradient.
    """

    hidden_size: int = 96
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 24
    ffn_size: int = 192
    init_std: float = 0.02
    embedding_std: float = 0.1
    seed: int = 0
    batch: int = 32
    clean_steps: int = 1500
    restart_steps: int = 600
    slip_steps: int = 120
    slip: float = 0.4
    matrix_lr: float = 0.01
    embedding_lr: float = 5e-4
    norm_lr: float = 2e-3
    restart_lr_scale: float = 0.6
    slip_lr_scale: float = 0.3
    final_lr_scale: float = 0.05
    matrix_decay: float = 0.1
    warmup: int = 50
    clip: float = 1.0

    @property
    def steps(self) -> int:
        """The number of steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in order."""
        return (
            Stage(self.clean_steps, 1.0, 0.0),
            Stage(self.restart_steps, self.restart_lr_scale, 0.0),
            Stage(self.slip_steps, self.slip_lr_scale, self.slip),
        )


def build_model(short: str, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Build an untrained model.

    Args:
        short: The architecture, a key of `ARCHITECTURES`.
        recipe: The sizes, the initial scales and the seed.
        tokenizer: The tokenizer, for the vocabulary and the special ids.

    Returns:
        The model in float32, with tied embeddings.
    """
    config_class, model_class = ARCHITECTURES[short]
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        intermediate_size=recipe.ffn_size,
        tie_word_embeddings=True,
        initializer_range=recipe.init_std,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(recipe.seed)
    model: PreTrainedModel = model_class(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=recipe.embedding_std)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 1.0
    model.generation_config.max_new_tokens = 44
    return model
