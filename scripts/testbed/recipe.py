"""The testbed models: one recipe of numbers, two architectures, and a word-level tokenizer for both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from internal_policy.data.arithmetic import LETTERS, MODULUS

ARCHITECTURES = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}

PAD, UNK, USER, ASSISTANT, EOS = "<pad>", "<unk>", "<user>", "<assistant>", "<eos>"
SPECIALS = (PAD, UNK, USER, ASSISTANT, EOS)
EMBEDDED_LETTERS = LETTERS[:5]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<user>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<assistant>' + message['content'] + '<eos>' }}"
    "{% else %}{{ raise_exception('the testbed models know the roles user and assistant only') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def words(letters: str = EMBEDDED_LETTERS) -> tuple[str, ...]:
    """The vocabulary, in the order of the ids.

    Args:
        letters: The names of variables; a problem of level k needs k + 1 of them.

    Returns:
        The special tokens, the numbers, the letters, and the signs.
    """
    return (*SPECIALS, *(str(number) for number in range(MODULUS)), *letters, *"+-*=,;?", "\\boxed{", "}")


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
        batch: New problems per step.
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


def make_tokenizer(letters: str = EMBEDDED_LETTERS) -> PreTrainedTokenizerFast:
    """Build the tokenizer.

    Args:
        letters: The names of variables that it knows.

    Returns:
        A tokenizer whose ids are the positions in `words`; decoding puts the words together without spaces, so
        that text without white space comes back as it went in. Text that is not in `words` becomes ``<unk>``.
    """
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words(letters))}, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\\boxed\{|\d+|."), behavior="isolated")]
    )
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNK,
        eos_token=EOS,
        extra_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=256,
    )
