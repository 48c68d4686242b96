"""The word-level tokenizer of the testbed: one token per number, letter and sign."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from internal_policy.data.arithmetic import LETTERS, MODULUS

PAD, UNK, USER, ASSISTANT, EOS = "<pad>", "<unk>", "<user>", "<assistant>", "<eos>"
SPECIALS = (PAD, UNK, USER, ASSISTANT, EOS)
WORDS = (*SPECIALS, *(str(number) for number in range(MODULUS)), *LETTERS, *"+-*=,;?", "\\boxed{", "}")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<user>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<assistant>' + message['content'] + '<eos>' }}"
    "{% else %}{{ raise_exception('the testbed models know the roles user and assistant only') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer.

    Returns:
        A tokenizer whose ids are the positions in `WORDS`; decoding puts the words together without spaces, so
        that text without white space comes back as it went in. What is not in `WORDS` becomes ``<unk>``.
    """
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token=UNK))
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
