"""The command line of a dataclass: its fields are the options, and their docstrings are the help.

argparse parses the words; its import is fast.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import textwrap
from collections.abc import Iterable, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NoReturn

from internal_policy.utils.errors import UserError
from internal_policy.utils.options import Option, options_of

PROGRAM = "internal-policy"
COMMANDS = {
    "analyze": "AnalyzeCommand",
    "train": "TrainCommand",
    "push": "PushCommand",
    "evaluate": "EvaluateCommand",
    "compare": "CompareCommand",
    "inspect": "InspectCommand",
    "ablate": "AblateCommand",
    "patch": "PatchCommand",
    "transfer": "TransferCommand",
    "models": "ModelsCommand",
    "report": "ReportCommand",
    "figures": "FiguresCommand",
}
"""Every command, with its dataclass in the module of the same name."""
SHORT = {"model": "-m", "output": "-o", "quiet": "-q", "prompt": "-p"}
"""Short forms, the same in every command."""
_NUMBER_NAMES = {int: "a whole number", float: "a number"}
_METAVARS = {int: "N", float: "X"}


def command_class(name: str) -> Any:
    """Import the dataclass of a command, whose fields are the options, with a method ``run``.

    Raises:
        UserError: no such command; the message names what was probably meant.
    """
    if name not in COMMANDS:
        what = "option" if name.startswith("-") else "command"
        raise UserError(f"no such {what}: {name}{_suggestion(name, COMMANDS)}. See {PROGRAM} --help")
    return getattr(import_module(f"internal_policy.cli.{name}"), COMMANDS[name])


class _Parser(argparse.ArgumentParser):
    """An argparse parser that raises its errors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse(name: str, words: Sequence[str]) -> Any:
    """Parse the words after the name of a command into an instance of its dataclass.

    Raises:
        UserError: the words cannot be parsed; the message names what was probably meant.
    """
    command = command_class(name)
    try:
        given, unknown = _parser_of(name, command).parse_known_intermixed_args(words)
        if unknown:
            raise UserError(_unknown(unknown, command))
    except UserError as error:
        raise UserError(f"{_readable(str(error))}. See {PROGRAM} {name} --help") from None
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in vars(given).items()}
    return command(**values)


def _parser_of(name: str, command: type) -> _Parser:
    options = options_of(command).values()
    words = "".join(
        f" {metavar_of(option)}..." if option.many else f" {metavar_of(option)}"
        for option in options
        if option.positional and option.help
    )
    parser = _Parser(
        prog=f"{PROGRAM} {name}",
        usage=f"{PROGRAM} {name} [OPTIONS]{words}",
        description=inspect.getdoc(command),
        formatter_class=_Formatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for option in options:
        text = help_of(option).replace("%", "%%") if option.help else argparse.SUPPRESS
        if option.positional:
            nargs = ("+" if option.required else "*") if option.many else None
            read = partial(_read, metavar_of(option), option)
            parser.add_argument(option.name, type=read, metavar=metavar_of(option), help=text, nargs=nargs)
        elif option.kind is bool:
            parser.add_argument(*flags_of(option), action="store_true", dest=option.name, help=text)
        else:
            parser.add_argument(
                *flags_of(option),
                action="append" if option.many else "store",
                type=partial(_read, option.flag, option),
                required=option.required,
                dest=option.name,
                metavar=metavar_of(option),
                help=text,
            )
    return parser


class _Formatter(argparse.HelpFormatter):
    """Keeps the paragraphs of a description, and puts every option on the same column."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.split("\n\n")
        filled = (textwrap.fill(" ".join(each.split()), max(width, 20)) for each in paragraphs)
        return "\n\n".join(filled)


def flags_of(option: Option) -> list[str]:
    """The names of an option on the command line: the short form if there is one, and the long one."""
    return [*filter(None, [SHORT.get(option.name)]), option.flag]


def metavar_of(option: Option) -> str:
    """What the help shows for the value of an option: its choices, a letter for a number, or a word."""
    if option.positional:
        return {"directories": "DIR", "directory": "RUN"}.get(option.name, option.name.upper())
    if option.choices:
        return "{" + ",".join(option.choices) + "}"
    return _METAVARS.get(option.kind, "TEXT" if option.kind is str else "PATH")


def help_of(option: Option) -> str:
    """The help of an option in one line: its docstring, with the default if the dataclass has one."""
    if option.required and not option.positional:
        return f"{option.help} Required."
    if option.required or option.default is None or option.default is False or option.default == ():
        return option.help
    return f"{option.help} [default: {option.default}]"


def _read(flag: str, option: Option, text: str) -> Any:
    """One value from a word."""
    if option.choices and text not in option.choices:
        meant = _suggestion(text, option.choices)
        raise UserError(f"{flag} is {text!r}; needed is one of {', '.join(option.choices)}{meant}")
    try:
        return option.kind(text)
    except ValueError:
        raise UserError(f"{flag} is {text!r}; needed is {_NUMBER_NAMES[option.kind]}") from None


def _unknown(words: Sequence[str], command: type) -> str:
    """Say which word is unknown, and which option was probably meant."""
    flag = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
    if flag is None:
        return f"unexpected extra argument ({words[0]})"
    return f"no such option: {flag}{_suggestion(flag, [option.flag for option in options_of(command).values()])}"


def _suggestion(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def _readable(message: str) -> str:
    """Reword an error message of argparse."""
    message = message.removeprefix("argument ")
    if message.endswith(": expected one argument"):
        flag = message.partition(":")[0].rpartition("/")[2]
        return f"{flag} has no value; one that begins with a dash is given as {flag}=VALUE"
    if ": ignored explicit argument " in message:
        flag, _, value = message.partition(": ignored explicit argument ")
        return f"{flag.rpartition('/')[2]} is a switch and takes no value, and got {value}"
    missing = message.removeprefix("the following arguments are required: ")
    return message if missing == message else f"missing: {', '.join(n.rpartition('/')[2] for n in missing.split(', '))}"
