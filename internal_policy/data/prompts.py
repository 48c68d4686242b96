"""Prompts: their sources, and the templates that turn them into the text that a model reads."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from internal_policy.data import records
from internal_policy.data.chat_templates import apply_chat_template
from internal_policy.utils.errors import UserError, as_user_error, shorten

Chat = list[dict[str, str]]

MATH_500 = "HuggingFaceH4/MATH-500"
TESTBED = "testbed"
TESTBED_PROBLEMS = 256
TESTBED_SEED = 20_251_219

TEXT_COLUMNS = ("prompt", "problem", "question")
ANSWER_COLUMNS = ("answer", "final_answer")

_STEP_BY_STEP = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Prompt:
    """A question to the model."""

    content: str | Chat
    """Text, or a chat."""
    answer: str | None = None
    """The reference answer, if known."""
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The other columns of its record."""
    unusable: str = field(default="", compare=False, repr=False)
    """What the answer is if no response can be compared with it, such as a list; otherwise empty."""

    @property
    def problem(self) -> str:
        """The bare question: the text, or the last message of the user."""
        if isinstance(self.content, str):
            return self.content
        questions = [m["content"] for m in self.content if m["role"] == "user"]
        return questions[-1] if questions else self.content[-1]["content"]

    @property
    def chat(self) -> Chat:
        """The question as a chat."""
        return [{"role": "user", "content": self.content}] if isinstance(self.content, str) else self.content


def read_prompts(
    source: str | Sequence[Any], *, split: str | None = None, usual: str = "test", limit: int | None = None
) -> list[Prompt]:
    """Read at most ``limit`` prompts from a file, the hub, the built-in tasks (``testbed``) or a list.

    The source is a hub data set id, of which ``split`` is read (by default ``usual``, or the first if there is none),
    the path of a parquet, jsonl or json file, ``testbed``, or a list of texts or records.

    Raises:
        UserError: the source is unreadable, empty, or without a prompt column.
    """
    if not isinstance(source, str):
        where = "the list of prompts"
        found = [
            _prompt(_record(item, f"{where}: item {i}"), f"{where}: item {i}") for i, item in enumerate(source, start=1)
        ]
    elif source == TESTBED:
        from internal_policy.data import arithmetic as tasks

        problems = tasks.problems(max(limit or 0, TESTBED_PROBLEMS), seed=TESTBED_SEED)
        found = [Prompt(p.prompt, p.answer) for p in problems[: limit or TESTBED_PROBLEMS]]
        where = source
    else:
        where = source
        path = Path(source)
        is_file = path.exists() or path.suffix in records.SUFFIXES
        rows = records.read_file(path, limit) if is_file else records.read_hub(source, split, usual)
        found = [_prompt(row, f"{source}: record {i}") for i, row in enumerate(rows[:limit], start=1)]
    if not found:
        raise UserError(f"{where}: is empty; needed is at least one prompt")
    return found[:limit]


def _record(item: Any, where: str) -> Mapping[str, Any]:
    if isinstance(item, Path) or (isinstance(item, str) and item.endswith(records.SUFFIXES) and len(item.split()) == 1):
        raise UserError(f"{where} is the name of a file ({item}); give it by itself, without a list around it")
    return {"prompt": item} if isinstance(item, (str, list)) else records.as_object(item, where)


def _prompt(row: Mapping[str, Any], where: str) -> Prompt:
    column = next((c for c in TEXT_COLUMNS if row.get(c) is not None), None)
    if column is None:
        present = sorted(key for key, value in row.items() if value is not None)
        raise UserError(f"{where} has values for {present}; needed is one of {', '.join(TEXT_COLUMNS)}")
    content = content_of(row[column], f"{where}, column {column!r}")
    answer = next((row[c] for c in ANSWER_COLUMNS if row.get(c) is not None), None)
    reward_model = row.get("reward_model")
    if answer is None and isinstance(reward_model, Mapping):
        answer = reward_model.get("ground_truth")
    others = {key: value for key, value in row.items() if key not in (column, *ANSWER_COLUMNS)}
    try:
        text = answer_text(answer)
        return Prompt(content, None if text is None else whole_text(text, f"{where}, its answer"), others)
    except TypeError as error:
        # Only rewards and evaluations need an answer.
        return Prompt(content, repr(answer), others, unusable=str(error))
    except ValueError as error:
        raise UserError(f"{where}: an answer of thousands of digits cannot be written; give it as text") from error


def answer_text(value: Any) -> str | None:
    """Format a reference answer as text; None for no answer.

    A whole number is 4 and not 4.0, since a column of integers with a missing value becomes one of floats.

    Raises:
        TypeError: the value is not a single answer, such as a list; the message describes it.
        ValueError: the number has more digits than Python converts to text.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, numbers.Integral):
        return str(value)
    if isinstance(value, numbers.Real) and math.isfinite(value):
        number = float(value)
        return str(int(number)) if number.is_integer() and abs(number) < 1e15 else str(value)
    if isinstance(value, Decimal) and value.is_finite():
        return str(int(value)) if value == value.to_integral_value() else str(value)
    raise TypeError(f"an answer that is a {type(value).__name__} ({str(value)[:40]}); needed is one text or number")


def content_of(value: Any, where: str) -> str | Chat:
    """Check that a value is a text or a chat, which is reduced to role and content; ``where`` is its position."""
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{where} is an empty text; needed is a question")
        return whole_text(value, where)
    if isinstance(value, list) and value:
        good = all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in value
        )
        if good:
            return [{"role": m["role"], "content": whole_text(m["content"], where)} for m in value]
    raise UserError(f"{where} is neither a text nor a chat; needed is text or a list of {{role, content}}")


def whole_text(text: str, where: str) -> str:
    """Refuse half a character (a lone surrogate), which no tokenizer and no file accepts.

    A response that was cut in the middle of an emoji ends with one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} holds half a character at place {error.start + 1} (a lone surrogate); remove it"
        ) from error
    return text


def _im_chat(problem: str) -> str:
    return (
        f"<|im_start|>system\n{_STEP_BY_STEP}<|im_end|>\n<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"
    )


def _qwen3(problem: str) -> str:
    return _im_chat(problem) + "<think>\n\n</think>\n\n"


def _octothinker(problem: str) -> str:
    return (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
        "The assistant first thinks about the reasoning process in the mind and then provides the user with "
        "the answer.\n"
        "User: You must put your answer inside \\boxed{} and Your final answer will be extracted automatically by the "
        f"\\boxed{{}} tag.\n{problem}\nAssistant:"
    )


NAMED_TEMPLATES: dict[str, Callable[[str], str]] = {
    "qwen-math": _im_chat,
    "qwen3": _qwen3,
    "octothinker": _octothinker,
}
"""The paper's templates (arXiv 2512.19673v3, appendix A.2)."""

TEMPLATES = ("chat", "plain", *NAMED_TEMPLATES)


def render(prompt: Prompt, template: str, tokenizer: Any) -> list[int]:
    """Turn one prompt into token ids; see ``render_all``."""
    return render_all([prompt], template, tokenizer)[0]


def render_all(prompts: Sequence[Prompt], template: str, tokenizer: Any) -> list[list[int]]:
    """Turn prompts into token ids.

    ``chat`` applies the tokenizer's chat template and falls back to plain text if it has none; ``plain`` uses the text
    unchanged; the named templates build the paper's prompts from the bare question.

    Raises:
        UserError: the template is unknown, or the tokenizer's template refuses or does not finish a chat.
    """
    if template in NAMED_TEMPLATES:
        return [token_ids(tokenizer, NAMED_TEMPLATES[template](p.problem)) for p in prompts]
    if template not in TEMPLATES:
        raise UserError(f"template {template!r} is unknown; use one of {', '.join(TEMPLATES)}")
    if template == "chat" and getattr(tokenizer, "chat_template", None):
        texts = apply_chat_template(tokenizer, [p.chat for p in prompts])
        # The chat template adds the special tokens itself.
        return [token_ids(tokenizer, text, add_special_tokens=False) for text in texts]
    return [token_ids(tokenizer, "\n\n".join(m["content"] for m in p.chat)) for p in prompts]


def token_ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Tokenise a text, with one-line errors; ``options`` are those of the tokenizer."""
    name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
    advice = "needed is a tokenizer that knows every text (an unknown token, or bytes)"
    with as_user_error(name, f"the text {shorten(text, 40)!r}", doing="tokenise", advice=advice):
        return list(tokenizer(text, **options)["input_ids"])
