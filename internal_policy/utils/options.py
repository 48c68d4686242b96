"""Options as fields of dataclasses, each declared once with its name, type, default, range and docstring.

The same field is a keyword of the Python function, an option of the command line and an entry of the stored settings::

    @dataclass(frozen=True)
    class Config:
        batch_size: int = option(16, least=1)
        \"\"\"Sequences that are run together.\"\"\"
"""

from __future__ import annotations

import ast
import inspect
import json
import numbers
import operator
import re
import textwrap
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

from internal_policy.utils.errors import UserError

Function = TypeVar("Function", bound=Callable[..., Any])

Numbers: TypeAlias = str | int | Sequence[int]
"""Numbers from 1: ``"all"``, one, several, or text such as ``"1,4-6"``."""
_NUMBERS = re.compile(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?")
_MOST_NUMBERS = 1_000_000

LARGEST: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("max_responses", "max_problems", "eval_problems", "max_steps"), 1_000_000),
        **dict.fromkeys(("samples_per_prompt", "samples", "eval_samples", "num_generations", "num_iterations"), 10_000),
        **dict.fromkeys(("prompts_per_step", "mini_batches", "dynamics_responses"), 100_000),
        **dict.fromkeys(("max_new_tokens", "max_completion_length", "max_prompt_length", "top_k"), 10_000_000),
        **dict.fromkeys(("batch_size", "keep_tokens", "entropy_sequences"), 1_000_000),
        "lora_rank": 4096,
        # What the generators of numpy and transformers take.
        "seed": 2**32 - 1,
    }
)
"""The largest value of each count. No run needs more; a typing error is refused before memory fills."""
MOST_PROMPTS = 10_000_000
"""The most prompts or samples that one run or evaluation may list."""


@dataclass(frozen=True)
class Option:
    """An option as a field of a dataclass declares it."""

    name: str
    """The name of the field."""
    kind: type
    """The type of one value: bool, int, float, str or Path."""
    default: Any
    """The default; ``dataclasses.MISSING`` of a required option."""
    many: bool
    """Whether it takes several values."""
    choices: tuple[str, ...]
    """The values that it may have; empty if any value of its type will do."""
    least: float | None
    """The smallest number that it may be."""
    completions: tuple[str, ...]
    """Values that a shell offers in addition to ``choices``."""
    positional: bool
    """Whether the command line takes its values without a flag."""
    help: str
    """The docstring of the field, on one line; empty if the field is not an option for users."""
    nullable: bool
    """Whether it may be None."""
    checked: bool
    """Whether a value in Python has to be of ``kind``; False if the field takes values of several types."""

    @property
    def flag(self) -> str:
        """The name on the command line."""
        return flag_of(self.name)

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is MISSING


def option(
    default: Any = MISSING,
    *,
    choices: Iterable[str] = (),
    least: float | None = None,
    completions: Iterable[str] = (),
    positional: bool = False,
) -> Any:
    """Declare an option with more properties than a type and a default; without a default it is required.

    `choices` are its possible values, if the type does not list them, `completions` further values that a shell offers.
    The command line takes the values of a `positional` option without a flag.
    """
    metadata = {"choices": choices, "least": least, "completions": completions, "positional": positional}
    return field(default=default, metadata=metadata)


def options_of(config: type[Any]) -> Mapping[str, Option]:
    """The options that a dataclass declares, by name: its own first, then those that it inherits."""
    docstrings, hints = field_docstrings(config), get_type_hints(config)
    # A default factory makes an object, which can be given only in Python.
    by_name = {each.name: each for each in fields(config) if each.default_factory is MISSING}
    order = [name for each in config.__mro__ for name in inspect.get_annotations(each) if name in by_name]
    # The model comes first, wherever it is declared.
    order.sort(key=lambda name: name != "model")
    found = {}
    for name in dict.fromkeys(order):
        metadata = by_name[name].metadata
        kind, many, choices, single = _read_type(hints[name])
        found[name] = Option(
            name=name,
            kind=kind,
            default=by_name[name].default,
            many=many,
            choices=tuple(metadata.get("choices", ())) or choices,
            least=metadata.get("least"),
            completions=tuple(metadata.get("completions", ())),
            positional=metadata.get("positional", False),
            help=docstrings.get(name, ""),
            nullable=type(None) in get_args(hints[name]),
            checked=single and not many,
        )
    return MappingProxyType(found)


def _read_type(hint: Any) -> tuple[type, bool, tuple[str, ...], bool]:
    """The type of one value, whether there are several, what they may be, and whether the hint names one type."""
    kinds = [hint]
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    # A type that includes str is parsed as str, unless it also includes bool: a switch stays a switch.
    first = str if str in kinds and bool not in kinds else kinds[0]
    origin = get_origin(first)
    if origin is Literal:
        return str, False, get_args(first), len(kinds) == 1
    if origin in (list, tuple, Sequence):
        kind, _, choices, single = _read_type(get_args(first)[0])
        return kind, True, choices, single
    return (first if isinstance(first, type) else str), False, (), len(kinds) == 1


def flag_of(name: str) -> str:
    """Write the name of a field as the command line does: ``--max-new-tokens`` for ``max_new_tokens``."""
    return "--" + name.replace("_", "-")


def check_options(config: Any) -> None:
    """Check the type and the range of each field, and make whole numbers ints and numbers floats.

    The fields of a frozen instance are changed all the same. A `UserError` states a bad value and the rule.
    """
    for each in options_of(type(config)).values():
        value = getattr(config, each.name)
        if not each.checked or (value is None and each.nullable):
            continue
        if each.choices:
            require_one_of(each.flag, value, each.choices)
        elif each.kind in (int, float):
            number = (require_whole_number if each.kind is int else _number)(each.flag, value)
            if each.least is not None:
                require_at_least(each.flag, number, each.least)
            refuse_too_large(each.name, number, each.flag)
            object.__setattr__(config, each.name, number)


def require_whole_number(flag: str, value: Any) -> int:
    """Convert a whole number to Python's int; a `UserError` if it is something else, such as 2.5 or True."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise UserError(f"{flag} is {value!r}; needed is a whole number")
    return operator.index(value)


def _number(flag: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UserError(f"{flag} is {value!r}; needed is a number")
    return float(value)


def require_at_least(flag: str, value: float, least: float) -> None:
    """Raise a `UserError` if a number is too small, infinite or NaN."""
    if not least <= value < float("inf"):
        raise UserError(f"{flag} is {value}; needed is a number of at least {least:g}")


def refuse_too_large(name: str, value: Any, flag: str | None = None) -> None:
    """Raise a `UserError` if a count is larger than `LARGEST` allows; a name that is not listed there has no limit."""
    if value is not None and value > LARGEST.get(name, value):
        shown = f"{value:.6g}" if value < 1e300 else "above 1e300"
        raise UserError(f"{flag or name} is {shown}; needed is a number of at most {LARGEST[name]}")


def require_one_of(flag: str, value: Any, choices: Iterable[str]) -> None:
    """Raise a `UserError` if a value is none of the known ones."""
    if value not in choices:
        raise UserError(f"{flag} is {value!r}; needed is one of {', '.join(choices)}")


def refuse_unknown(config: type, given: Iterable[str]) -> None:
    """Raise a `UserError` if a keyword is not a field of a dataclass of options; the message lists the known ones."""
    known = options_of(config)
    if unknown := sorted(set(given) - set(known)):
        raise UserError(f"unknown option {unknown[0]!r}; known: {', '.join(sorted(known))}")


def field_docstrings(config: type) -> dict[str, str]:
    """Read the docstrings below the fields of a dataclass, which only its source has.

    They are on one line each, by field; those of fields inherited from classes of the same package are included.
    """
    found: dict[str, str] = {}
    package = config.__module__.partition(".")[0]
    for each in reversed(config.__mro__):
        if each.__module__.partition(".")[0] == package:
            found |= _docstrings(each)
    return found


@cache
def _docstrings(declaring: type) -> Mapping[str, str]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(declaring))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        each.target.id: " ".join(str(text.value.value).split())
        for each, text in zip(definition.body, definition.body[1:], strict=False)
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def takes_options(*configs: type, without: Collection[str] = (), more: bool = False) -> Callable[[Function], Function]:
    """Make a function's signature and docstring name the fields of dataclasses that it takes as ``**options``.

    ``help``, the completion of a notebook and the documentation then show each option as the dataclass declares it.
    Fields in `without` are not options of the function. With `more` it takes further options, which its docstring
    describes under ``**options``, its last parameter.
    """

    def show(function: Function) -> Function:
        own = inspect.signature(function)
        *named, rest = own.parameters.values()
        parameters, entries = {p.name: p for p in named}, {}
        for config in configs:
            texts = field_docstrings(config)
            for each in fields(config):
                known = each.name in texts and each.default is not MISSING
                if known and each.name not in {*parameters, *without}:
                    entries[each.name] = texts[each.name]
                    parameters[each.name] = inspect.Parameter(
                        each.name, rest.KEYWORD_ONLY, default=each.default, annotation=each.type
                    )
        # functools.wraps copies __dict__, so a decorator above this one keeps the signature.
        function.__dict__["__signature__"] = own.replace(parameters=[*parameters.values(), *([rest] if more else [])])
        function.__doc__ = _with_entries(function.__doc__ or "", entries, keep=more)
        return function

    return show


def _with_entries(docstring: str, entries: Mapping[str, str], *, keep: bool) -> str:
    """The docstring with an entry for each option before that of ``**options``, or instead of it."""

    def written(found: re.Match[str]) -> str:
        indent = found["indent"]
        lines = [
            textwrap.fill(f"{name}: {text}", 120, initial_indent=indent, subsequent_indent=f"{indent}    ")
            for name, text in entries.items()
        ]
        return "\n".join([*lines, *([found[0]] if keep else [])])

    return re.sub(r"^(?P<indent> *)\*\*options: .*(?:\n(?P=indent) +.*)*", written, docstring, count=1, flags=re.M)


def command_line_of(config: type, settings: Mapping[str, Any], *, always: Collection[str] = ()) -> list[str]:
    """Write the words of the command line that give some settings, not yet quoted for a shell.

    `settings` are values by name, as ``dataclasses.asdict`` or a stored manifest has them. Names that are not options
    of the dataclass are left out, and so are options that have their default, except those in `always`.
    """
    positional: list[str] = []
    words: list[str] = []
    for each in options_of(config).values():
        value = settings.get(each.name)
        if value is None or (value == each.default and each.name not in always):
            continue
        if each.positional:
            positional += map(str, value) if each.many else [str(value)]
        else:
            words += words_of(each.name, value)
    return [*positional, *words]


def words_of(name: str, value: Any) -> list[str]:
    """Write an option and its value as words of a command line, not yet quoted for a shell.

    A list or tuple repeats the option; neither None nor a switch that is off needs a word.
    """
    if value is False or value is None:
        return []
    if value is True:
        return [flag_of(name)]
    if isinstance(value, (list, tuple)):
        return [word for each in value for word in words_of(name, each)]
    text = json.dumps(value) if isinstance(value, (int, float, dict)) else str(value)
    # A value that begins with a dash would be taken for an option.
    return [f"{flag_of(name)}={text}"] if text.startswith("-") else [flag_of(name), text]


def parse_numbers(flag: str, value: Numbers) -> tuple[int, ...] | None:
    """Read a choice of numbers from 1.

    Args:
        flag: the option, for messages.
        value: ``all``, a number, several, or text such as ``1,4-6``.

    Returns:
        The numbers in ascending order, each once; None for all.

    Raises:
        UserError: it is none of these.
    """
    needed = f"{flag} is {value!r}; needed is all, or numbers from 1 and ranges such as 1,4-6"
    if isinstance(value, str):
        if value.strip() == "all":
            return None
        found: set[int] = set()
        for part in value.split(","):
            match = _NUMBERS.fullmatch(part)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
            if not 1 <= first <= last:
                raise UserError(needed)
            if last - first >= _MOST_NUMBERS:
                raise UserError(f"{flag} is {value!r}, which are {last - first + 1} numbers; no model has as many")
            found.update(range(first, last + 1))
        return tuple(sorted(found))
    numbers = whole_numbers([value] if hasattr(value, "__index__") else value)
    if not numbers or min(numbers) < 1:
        raise UserError(needed)
    return tuple(sorted(set(numbers)))


def listed(flag: str, value: Any) -> tuple[Any, ...]:
    """The values of an option that takes one or several; a `UserError` if they are neither a text nor a sequence."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable):
        raise UserError(f"{flag} is {value!r}; needed is a value or a list of values")
    return tuple(value)


def write_numbers(numbers: tuple[int, ...] | None) -> str:
    """One way to write a choice of numbers, by which settings are compared."""
    return "all" if numbers is None else ",".join(map(str, numbers))


def spans(numbers: Iterable[int]) -> str:
    """Write numbers with ranges, in ascending order: ``1,4-6``."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def choose_numbers(flag: str, wanted: str, n: int, what: str) -> list[int]:
    """The numbers that an option asks for, of the n that there are.

    Args:
        flag: the option, for messages.
        wanted: its value, as the configuration holds it.
        n: how many there are.
        what: what they are, in the plural.

    Returns:
        Numbers from 1.

    Raises:
        UserError: one is too large.
    """
    numbers = parse_numbers(flag, wanted)
    if numbers is None:
        return list(range(1, n + 1))
    if numbers[-1] > n:
        raise UserError(f"{flag} asks for {numbers[-1]} of {n} {what}; needed are numbers from 1 to {n}")
    return list(numbers)


def whole_numbers(value: Any) -> tuple[int, ...] | None:
    """Whole numbers as a tuple; None for anything else, and for none."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        return None
    if any(isinstance(each, bool) or not hasattr(each, "__index__") for each in value):
        return None
    return tuple(operator.index(each) for each in value)
