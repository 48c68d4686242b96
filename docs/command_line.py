"""Write docs/cli.md, the reference of the commands, from the commands themselves: `python docs/command_line.py`."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

PAGE = Path(__file__).with_name("cli.md")

_HEAD = """\
# Command line

<!-- Written by `python docs/command_line.py`; a test compares this page with the commands. -->

`internal-policy COMMAND --help` prints the same, `internal-policy --version` the version, and
`internal-policy --install-completion` teaches the shell to complete commands and options. An error that you can mend is
one line on standard error and exit code 2; an interrupted command exits with 130, and the same command goes on where it
stopped.
"""
_DEFAULT = re.compile(r"\s*\[default: (.*)\]$", flags=re.S)
_SPECIAL = re.compile(r"([\\`*_\[\]|<>$])")
_TYPES = {str: "text", int: "whole number", float: "number", Path: "path", bool: ""}


@dataclass(frozen=True)
class Parameter:
    """An option or argument, as the function of its command declares it."""

    name: str
    """Its name in the function."""
    info: Any
    """typer's OptionInfo or ArgumentInfo."""
    annotation: Any
    """Its type, without None."""
    default: Any
    """Its default, or ``inspect.Parameter.empty``."""

    @property
    def is_argument(self) -> bool:
        """Whether it is given without a name."""
        return type(self.info).__name__ == "ArgumentInfo"

    @property
    def is_many(self) -> bool:
        """Whether it may be given several times."""
        return get_origin(self.annotation) is list

    @property
    def flags(self) -> list[str]:
        """The names on the command line."""
        # What typer makes of a function's parameter where no name is declared.
        own = f"--{self.name.replace('_', '-')}"
        # In an annotation typer takes the first name for a default until it reads the function.
        given = (self.info.default, *(self.info.param_decls or ()))
        declared = [name for name in given if isinstance(name, str) and name.startswith("-")]
        return declared or ([own, f"--no-{own[2:]}"] if self.annotation is bool else [own])

    @property
    def takes(self) -> str:
        """What is given with it, markdown."""
        one = get_args(self.annotation)[0] if self.is_many else self.annotation
        if get_origin(one) is Literal:
            takes = ", ".join(f"`{choice}`" for choice in get_args(one))
        else:
            takes = _TYPES[one]
        if self.info.min is not None:
            takes += f" from {self.info.min}"
        return takes + (", repeatable" if self.is_many and not self.is_argument else "")


def page() -> str:
    """Render the reference.

    Returns:
        The page, markdown.
    """
    from internal_policy.cli import app

    commands = {str(c.name or c.callback.__name__): c.callback for c in app.registered_commands if c.callback}
    table = [f"| [`{name}`](#{name}) | {escape(_paragraphs(call)[0])} |" for name, call in commands.items()]
    sections = [line for name, call in commands.items() for line in _command(name, call)]
    return "\n".join([_HEAD, "| command | what it does |", "| --- | --- |", *table, "", *sections]).rstrip() + "\n"


def escape(text: str) -> str:
    """Take their meaning from the signs of markdown, tables, HTML and formulas.

    Args:
        text: plain text.

    Returns:
        Markdown that shows it, on one line.
    """
    escaped = _SPECIAL.sub(r"\\\1", " ".join(text.split()))
    # Not every renderer takes a backslash before these.
    return escaped.replace("\\<", "&lt;").replace("\\>", "&gt;").replace("\\|", "&#124;").replace("\\$", "&#36;")


def parameters(call: Callable[..., Any]) -> list[Parameter]:
    """Read what a command takes from its function, which is where typer reads it.

    Args:
        call: the function of a command.

    Returns:
        Its options and arguments that are shown in its help.
    """
    hints = get_type_hints(call, include_extras=True)
    found = []
    for name, parameter in inspect.signature(call).parameters.items():
        annotation, *rest = get_args(hints[name]) if hasattr(hints[name], "__metadata__") else (hints[name],)
        if rest and not getattr(rest[0], "hidden", False):
            if get_origin(annotation) in (Union, types.UnionType):
                annotation = next(a for a in get_args(annotation) if a is not type(None))
            found.append(Parameter(name, rest[0], annotation, parameter.default))
    return found


def _paragraphs(call: Callable[..., Any]) -> list[str]:
    return (inspect.getdoc(call) or "").split("\n\n")


def _command(name: str, call: Callable[..., Any]) -> Iterator[str]:
    found = parameters(call)
    arguments = [p for p in found if p.is_argument]
    words = {p.name: p.name.upper() + ("..." if p.is_many else "") for p in arguments}
    usage = "".join(f" {word}" for word in words.values())
    yield from (f"## {name}", "", f"`internal-policy {name} [OPTIONS]{usage}`", "")
    for paragraph in _paragraphs(call):
        yield from (escape(paragraph), "")
    # A list reads on a phone, where a table of four columns does not.
    yield from (_item(f"`{words[p.name]}`", p) for p in arguments)
    yield from (_item(", ".join(f"`{flag}`" for flag in p.flags), p) for p in found if not p.is_argument)
    yield ""


def _item(names: str, option: Parameter) -> str:
    text, default = option.info.help or "", ""
    if told := _DEFAULT.search(text) or _DEFAULT.match(text):
        default, text = escape(told[1]), text[: told.start()]
    elif option.default is inspect.Parameter.empty:
        text = f"{text} Required."
    elif option.default is not None and option.default is not False:
        default = f"`{option.default}`"
    takes = f" ({option.takes})" if option.takes else ""
    told_default = f" *Default:* {default.rstrip('.')}." if default else ""
    return f"- **{names}**{takes}: {escape(text)}{told_default}".replace(":  *", ": *")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
