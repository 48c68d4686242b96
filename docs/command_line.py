"""Write docs/cli.md, the reference of the commands, from the commands themselves: `python docs/command_line.py`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from internal_policy.utils.options import Option

PAGE = Path(__file__).with_name("cli.md")

_HEAD = """\
# Command line

<!-- Written by `python docs/command_line.py`; a test compares this page with the commands. -->

`internal-policy COMMAND --help` prints the same, `internal-policy --version` the version, and
`internal-policy --install-completion` teaches the shell to complete commands and options. An error that you can fix is
one line on standard error and exit code 2; an interrupted command exits with 130, and the same command resumes where it
stopped.
"""
_SPECIAL = re.compile(r"([\\`*_\[\]|<>$])")
_TYPES = {str: "text", int: "whole number", float: "number", Path: "path", bool: ""}


def page() -> str:
    """Render the reference.

    Returns:
        The page, markdown.
    """
    from internal_policy.cli.parser import COMMANDS, command_class

    commands = {name: command_class(name) for name in COMMANDS}
    table = [f"| [`{name}`](#{name}) | {escape(_paragraphs(command)[0])} |" for name, command in commands.items()]
    sections = [line for name, command in commands.items() for line in _command(name, command)]
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


def _paragraphs(command: type) -> list[str]:
    return (inspect.getdoc(command) or "").split("\n\n")


def _command(name: str, command: type) -> Iterator[str]:
    from internal_policy.cli.parser import metavar_of
    from internal_policy.utils.options import options_of

    found = [option for option in options_of(command).values() if option.help]
    words = {option.name: metavar_of(option) + ("..." if option.many else "") for option in found if option.positional}
    usage = "".join(f" {word}" for word in words.values())
    yield from (f"## {name}", "", f"`internal-policy {name} [OPTIONS]{usage}`", "")
    for paragraph in _paragraphs(command):
        yield from (escape(paragraph), "")
    # A list reads on a phone, where a table of four columns does not.
    yield from (_item(f"`{words[option.name]}`", option) for option in found if option.positional)
    yield from (_item(_names(option), option) for option in found if not option.positional)
    yield ""


def _names(option: Option) -> str:
    from internal_policy.cli.parser import flags_of

    return ", ".join(f"`{flag}`" for flag in reversed(flags_of(option)))


def _item(names: str, option: Option) -> str:
    takes = ", ".join(f"`{choice}`" for choice in option.choices) or _TYPES[option.kind]
    if option.least is not None:
        takes += f" from {option.least:g}"
    if option.many and not option.positional:
        takes += ", repeatable"
    text, _, default = (f"{option.help} Required." if option.required else option.help).partition(" Default: ")
    if default:
        default = f" *Default:* {escape(default)}"
    elif not (option.required or option.default is None or option.default is False or option.default == ()):
        default = f" *Default:* `{option.default}`."
    return f"- **{names}**{f' ({takes})' if takes else ''}: {escape(text)}{default}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
