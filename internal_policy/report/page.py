"""The page around a result: templates, styles and scripts in one file that loads nothing and runs nothing foreign."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from internal_policy.report.numbers import interval, number
from internal_policy.utils import palette
from internal_policy.utils.citation import __version__, bibtex
from internal_policy.utils.errors import counted

ASSETS = Path(__file__).parent / "assets"
_STYLES = ("report.css", "tokens.css", "print.css")
_SCRIPTS = ("charts.js", "tokens.js", "page.js")
# A script element ends at the first of these, whatever string it stands in; the separators end a line of JavaScript.
_ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def embed(value: Any) -> Markup:
    """Write a value as JSON that may stand inside a script element.

    Args:
        value: JSON-able, without NaN.

    Returns:
        JSON in ASCII, in which no character can end the element.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character, escape in _ESCAPED.items():
        text = text.replace(character, escape)
    return Markup(text)


def clean(value: Any) -> str:
    """Write any value as a text that every file can hold.

    Args:
        value: a name, a path, what a model wrote.

    Returns:
        The text; half characters and NUL are shown as replaced.
    """
    return str(value).encode("utf-8", "replace").decode("utf-8").replace("\0", "\ufffd")


def render(template: str, *, title: str, charts: dict[str, Any], tokens: dict[str, Any], **context: Any) -> str:
    """Fill a template.

    Args:
        template: its name in ``assets``.
        title: of the page, as text.
        charts: figures by the id of the element that they are drawn in.
        tokens: token views by the id of theirs.
        **context: what the template shows.

    Returns:
        HTML. The same result gives the same text: no date or place of writing is in it.
    """
    scripts = [_theme(), _plotly() if charts else "", *(_asset(name) for name in _SCRIPTS)]
    allowed = " ".join(_digest(script) for script in scripts if script)
    html = (
        _environment()
        .get_template(template)
        .render(
            **context,
            title=clean(title),
            policy=f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:",
            style=Markup("\n".join([palette.stylesheet(), *(_asset(name) for name in _STYLES)])),
            theme=Markup(scripts[0]),
            scripts=[Markup(script) for script in scripts[1:] if script],
            data=embed({"charts": charts, "tokens": tokens}),
            bibtex=bibtex(),
            version=__version__,
        )
    )
    return html.encode("utf-8", "replace").decode("utf-8")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "clean": clean}
    environment.globals |= {"interval": interval, "counted": counted, "boundary_sign": palette.BOUNDARY_SIGN}
    return environment


@cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


@cache
def _theme() -> str:
    return _asset("theme.js")


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    # An HTML parser turns these into line feeds, and the digest is of what it reads.
    return str(get_plotlyjs()).replace("\r\n", "\n").replace("\r", "\n")


@cache
def _digest(script: str) -> str:
    """What the browser must find before it runs an inline script: anything that got in otherwise does not run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
