"""Completion in a shell: the words that may come next, and the scripts with which shells request them."""

from __future__ import annotations

import codecs
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from internal_policy.cli.parser import COMMANDS, PROGRAM, command_class, flags_of
from internal_policy.utils.errors import UserError, first_line
from internal_policy.utils.io import expanded, write_text
from internal_policy.utils.options import options_of

_GLOBAL_FLAGS = ("--help", "--version", "--install-completion", "--show-completion")
# The word at the cursor is the last one, after a dot, because some shells drop an empty word.
_SCRIPTS = {
    "bash": """\
_internal_policy() {
    local IFS=$'\\n'
    COMPREPLY=($(internal-policy --complete "${COMP_WORDS[@]:1:COMP_CWORD-1}" ".${COMP_WORDS[COMP_CWORD]}" 2>/dev/null))
}
complete -o default -F _internal_policy internal-policy
""",
    "zsh": """\
#compdef internal-policy
_internal_policy() {
    local -a found
    found=("${(@f)$(internal-policy --complete "${(@)words[2,CURRENT-1]}" ".${words[CURRENT]}" 2>/dev/null)}")
    if [[ -n "$found" ]]; then compadd -- $found; else _files; fi
}
compdef _internal_policy internal-policy
""",
    "fish": """\
complete -c internal-policy -a '(internal-policy --complete (commandline -opc)[2..] .(commandline -ct))'
""",
    "powershell": """\
Register-ArgumentCompleter -Native -CommandName internal-policy -ScriptBlock {
    param($word, $ast, $cursor)
    $before = @($ast.CommandElements | Select-Object -Skip 1 | ForEach-Object { "$_" })
    if ($word -ne '') { $before = @($before | Select-Object -SkipLast 1) }
    internal-policy --complete @before ".$word" | ForEach-Object {
        [System.Management.Automation.CompletionResult]::new($_, $_, 'ParameterValue', $_)
    }
}
""",
}
_SCRIPTS["pwsh"] = _SCRIPTS["powershell"]


def run(option: str, words: Sequence[str]) -> None:
    """Answer one of the options of completion.

    `words` follow the option: the command line up to the cursor, or the name of a shell, which has to be a known one.
    """
    if option == "--complete":
        *before, at_cursor = words or ["."]
        print(*candidates(before, at_cursor.removeprefix(".")), sep="\n")  # noqa: T201
        return
    shell = words[0] if words else Path(os.environ.get("SHELL", "")).name
    if shell not in _SCRIPTS:
        known = ", ".join(_SCRIPTS)
        raise UserError(f"the shell is {shell!r}; needed is one of {known}, as in {PROGRAM} {option} zsh")
    if option == "--show-completion":
        print(_SCRIPTS[shell], end="")  # noqa: T201
    else:
        print(f"{shell} completion installed in {_install(shell)}; it works in the next shell")  # noqa: T201


def candidates(before: Sequence[str], word: str) -> list[str]:
    """The commands, options or values that may come next and begin with `word`; none if a file is expected.

    `before` are the words of the command line before the cursor, without the program.
    """
    known: Sequence[str] = ()
    if not before:
        known = [*COMMANDS, *_GLOBAL_FLAGS]
    elif before[0] in COMMANDS:
        options = options_of(command_class(before[0]))
        by_flag = {flag: option for option in options.values() for flag in flags_of(option)}
        asked = by_flag.get(before[-1])
        if asked is not None and asked.kind is not bool:
            known = [*asked.choices, *asked.completions]
        elif word.startswith("-"):
            known = [*by_flag, "--help"]
    return [each for each in known if each.startswith(word)]


def _install(shell: str) -> Path:
    """Write the script to the place from which the shell reads it; repeating that changes nothing."""
    home = expanded("~")
    if shell == "fish":
        return _write_script(home / ".config" / "fish" / "completions" / "internal-policy.fish", _SCRIPTS[shell])
    if shell == "bash":
        script = _write_script(home / ".bash_completions" / "internal-policy.sh", _SCRIPTS[shell])
        return _append_lines(home / ".bashrc", f"source '{script}'")
    if shell == "zsh":
        _write_script(home / ".zfunc" / "_internal-policy", _SCRIPTS[shell])
        return _append_lines(home / ".zshrc", "fpath+=~/.zfunc; autoload -Uz compinit; compinit")
    return _append_lines(_find_profile(shell), _SCRIPTS[shell].rstrip())


def _find_profile(shell: str) -> Path:
    """Ask PowerShell for the file that it reads when it starts."""
    try:
        command = [shell, "-NoProfile", "-Command", "echo $profile"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError, UnicodeDecodeError) as error:
        answer, reason = "", first_line(error)
    else:
        reason = "it printed nothing"
    if not answer:
        raise UserError(
            f"{shell} did not say where its profile is ({reason}); install it, or write the output of {PROGRAM} "
            f"--show-completion {shell} into the profile yourself"
        )
    return Path(answer)


def _write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Where it is a link, the file that it leads to is replaced.
    write_text(path.resolve(), text)
    return path


def _append_lines(path: Path, lines: str) -> Path:
    """Append lines to a file of the user's, unless it has them.

    It is never rewritten: what it holds, in whatever encoding, its mode and links to it stay as they are.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.exists() else b""
    if before.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(
            f"{path}: is in UTF-16; needed is UTF-8, so save it as that, or add what --show-completion prints yourself"
        )
    added = f"{lines}\n".encode()
    if added.rstrip() not in before:
        with path.open("ab") as file:
            file.write(added if not before or before.endswith(b"\n") else b"\n" + added)
    return path
