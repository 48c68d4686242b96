"""Untrusted text on the terminal is readable and has no other effect."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text
from training_calls import command

import internal_policy
from internal_policy import UserError
from internal_policy.analysis.results import ANALYSIS
from internal_policy.utils import console
from internal_policy.utils.shell import visible
from internal_policy.utils.workspace import Workspace

HOSTILE = "a[/b][link=x]\x1b[2J\x1b]0;title\x07\x9b1m\r\u202eback\u2066\ud800\x7f"


def printed(*things, **options):
    out = io.StringIO()
    opened = console.console()
    opened.file = out
    opened.width = 200
    for thing in things:
        opened.print(thing, **options)
    return out.getvalue()


def test_hostile_text_is_escaped_everywhere():
    table = console.table(HOSTILE, HOSTILE, HOSTILE, "n", fold=(HOSTILE,))
    table.add_row(HOSTILE, "1")
    text = printed(table, HOSTILE, Text(HOSTILE), f"name {HOSTILE}")
    assert text.count("a[/b][link=x]") == 7
    assert not set(text) & set("\x1b\x07\x9b\r\u202e\u2066\ud800\x7f")
    # Widths are those of the escaped text, so no name is truncated.
    assert text.count(visible(HOSTILE)) == 6


@given(st.text(alphabet=st.characters(codec=None)))
def test_visible_text_is_one_line_without_cursor_movement(text):
    shown = visible(text, one_line=True)
    shown.encode()
    assert len(shown.splitlines()) <= 1
    assert visible(shown, one_line=True) == shown
    assert not any(ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 for c in shown)


def test_a_table_on_a_narrow_terminal_keeps_its_numbers(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    opened = console.console()
    opened.file = out = io.StringIO()
    table = console.table("title", None, "a", "b", "c", "d")
    table.add_row(*["+0.123±0.456"] * 4)
    opened.print(table)
    assert out.getvalue().count("+0.123±0.456") == 4


def test_a_closed_pipe_does_not_stop_the_command(tmp_path):
    code = (
        "from internal_policy.utils import console\n"
        "for n in range(20000): console.say(f'line {n}')\n"
        f"open({str(tmp_path / 'done')!r}, 'w').close()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"line 0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("value", ["²", "٣", "x", ""])
def test_an_invalid_rank_is_ignored(monkeypatch, value):
    from internal_policy.utils.shell import rank

    for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", value)
    assert rank() == (3 if value == "٣" else 0)
    assert os.environ["RANK"] == value


def test_unreadable_names_are_reported_in_one_readable_line(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for words, expected in (
        (("analyze", "--model", "./" + "a" * 20_000), "File name too long"),
        (("figures", "b" * 20_000), "File name too long"),
        (
            ("analyze", "-o", "results-\udcff"),
            "results-\N{REPLACEMENT CHARACTER}: holds bytes that are not UTF-8; rename it",
        ),
        (("report", "two\nlines\x1b(B"), "two\N{SYMBOL FOR NEWLINE}lines\N{SYMBOL FOR ESCAPE}(B: no finished"),
    ):
        code, out, err = command(monkeypatch, capsys, *words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert expected in err
        assert len(err) < 2100
    with pytest.raises(UserError, match="holds bytes that are not UTF-8"):
        Workspace(tmp_path / "results-\udcff", ANALYSIS).check()
    assert list(tmp_path.iterdir()) == []


def test_all_terminal_output_is_escaped():
    package = Path(internal_policy.__file__).parent
    others = [
        f"{path.relative_to(package)}: {line.strip()}"
        for path in sorted(package.rglob("*.py"))
        if path.name != "printing.py" and "testbed" not in path.parts
        for line in path.read_text().splitlines()
        if re.search(r"\bConsole\(|rich\.print|from rich\.markup|\[/?(bold|yellow|red|green)\]", line)
    ]
    assert others == []
