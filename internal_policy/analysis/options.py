"""Options that a function takes as ``**options``: shown by ``help``, in a notebook's completion and to type checkers.

What they are and mean is said once, by the dataclass that checks them.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypedDict, TypeVar

from internal_policy.models.options import Lens

Function = TypeVar("Function", bound=Callable[..., Any])


class StudyOptions(TypedDict, total=False):
    """The fields of ``AnalyzeConfig`` that hold for models of all kinds."""

    prompts_split: str | None
    max_responses: int | None
    samples_per_prompt: int
    max_new_tokens: int | None
    temperature: float
    generator: str
    lens: Lens
    backend: str
    remote: bool | str
    batch_size: int
    dtype: str
    device: str
    device_map: str | None
    quantization: str | None
    seed: int
    keep_tokens: int
    tolerance: float | None
    random_baseline: bool
    trust_remote_code: bool


class SweepOptions(StudyOptions, total=False):
    """Those of the checkpoints of one training."""

    template: str


class AnalyzeOptions(SweepOptions, total=False):
    """Those of one model."""

    revision: str | None


def showing(*classes: type, names: frozenset[str] | None = None) -> Callable[[Function], Function]:
    """Make a function's signature and docstring name the fields of dataclasses that it takes as ``**options``.

    Args:
        classes: the dataclasses; of each the fields that it declares itself, but for those that the function names.
        names: which of them, and nothing else; where not given all of them, and further options that are not named.

    Returns:
        A decorator for a function whose docstring has ``**options`` as its last argument.
    """

    def show(function: Function) -> Function:
        own = inspect.signature(function)
        *named, rest = own.parameters.values()
        parameters, entries = {p.name: p for p in named}, {}
        for each in classes:
            texts = _texts(each)
            for field in fields(each):
                known = field.name in texts and field.default is not MISSING and (names is None or field.name in names)
                if known and field.name not in parameters:
                    entries[field.name] = texts[field.name]
                    parameters[field.name] = inspect.Parameter(
                        field.name, rest.KEYWORD_ONLY, default=field.default, annotation=field.type
                    )
        more = [rest] if names is None else []
        # functools.wraps copies what stands in __dict__, so that a decorator above this one loses nothing.
        function.__dict__["__signature__"] = own.replace(parameters=[*parameters.values(), *more])
        function.__doc__ = _with_entries(function.__doc__ or "", entries, keep=names is None)
        return function

    return show


def _texts(declaring: type) -> dict[str, str]:
    """The docstrings of the fields that a dataclass declares, which only its source has."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(declaring))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(str(text.value.value).split())
        for field, text in zip(definition.body, definition.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def _with_entries(docstring: str, entries: Mapping[str, str], *, keep: bool) -> str:
    """The docstring with an entry for each option before that of ``**options``, or in its place."""

    def written(found: re.Match[str]) -> str:
        indent = found["indent"]
        lines = [
            textwrap.fill(f"{name}: {text}", 120, initial_indent=indent, subsequent_indent=f"{indent}    ")
            for name, text in entries.items()
        ]
        return "\n".join([*lines, *([found[0]] if keep else [])])

    return re.sub(r"^(?P<indent> *)\*\*options: .*(?:\n(?P=indent) +.*)*", written, docstring, count=1, flags=re.M)
