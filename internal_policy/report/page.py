"""The page around a result: one file of templates, styles and scripts that loads nothing from a network.

Texts of a model, and all names, reach the page as text, and only the page's own scripts run.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from internal_policy.utils import palette
from internal_policy.utils.citation import __version__, bibtex
from internal_policy.utils.errors import counted

if TYPE_CHECKING:
    from internal_policy.analysis.results import Analysis
    from internal_policy.bupo.run import Run
    from internal_policy.report.charts import Chart

MISSING = "–"
_MAX_SETTING = 400
ASSETS = Path(__file__).parent / "assets"
_STYLES = ("report.css", "tokens.css", "print.css")
_SCRIPTS = ("charts.js", "tokens.js", "page.js")
# A script element ends at the first "<", even inside a string; the separators end a line of JavaScript.
_ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def number(value: Any, form: str = ".3f") -> str:
    """Format a number with a true minus sign; a dash if it is not defined."""
    if value is None or pd.isna(value):
        return MISSING
    return format(value, form).replace("-", "−") if form[-1] != "s" else str(value)


def interval(low: Any, high: Any, form: str = ".3f") -> str:
    """Format a 95% interval as ``[low, high]``; nothing if it is not defined."""
    known = not (low is None or high is None or pd.isna(low) or pd.isna(high))
    return f"[{number(low, form)}, {number(high, form)}]" if known else ""


def clean(value: Any) -> str:
    """Return any value as a text that every file can hold; half characters and NUL are replaced."""
    return str(value).encode("utf-8", "replace").decode("utf-8").replace("\0", "\ufffd")


def setting(value: Any) -> str:
    """Return the value of a setting as text; a very long one is cut."""
    if value is None:
        return "none"
    plain = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    text = clean(value if plain else json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= _MAX_SETTING else f"{text[:_MAX_SETTING]} […]"


def settings_tables(result: Analysis | Run) -> list[dict[str, Any]]:
    """Return the tables of a result's model, settings, timings and versions: a title, and rows of name and value."""
    tables: dict[str, Mapping[str, Any]] = {
        "Model": getattr(result, "model", {}),
        "Settings": result.config,
        "Seconds": {name: f"{seconds:.1f}" for name, seconds in result.timings.items()},
        "Versions": result.versions,
    }
    return [
        {"title": title, "rows": [{"name": clean(name), "value": setting(value)} for name, value in table.items()]}
        for title, table in tables.items()
        if table
    ]


def embed(value: Any) -> Markup:
    """Write a value without NaN as JSON in ASCII, in which no character can end the script element around it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character, escape in _ESCAPED.items():
        text = text.replace(character, escape)
    return Markup(text)


def render(
    template: str, *, title: str, charts: Mapping[str, Chart], tokens: dict[str, Any] | None = None, **context: Any
) -> str:
    """Fill a template of ``assets``.

    `charts` are by the id of the element in which they are drawn, and `tokens` is the data of the token views by the id
    of theirs; `context` is what the template shows.

    Returns:
        HTML. The same result gives the same text: it contains no date and no place of writing.
    """
    scripts = [_asset("theme.js"), _plotly() if charts else "", *(_asset(name) for name in _SCRIPTS)]
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
            data=embed({"charts": {key: chart.spec() for key, chart in charts.items()}, "tokens": tokens or {}}),
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
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    # An HTML parser turns these into line feeds, and the digest is of what it reads.
    return str(get_plotlyjs()).replace("\r\n", "\n").replace("\r", "\n")


@cache
def _digest(script: str) -> str:
    """Return the digest that lets the browser run an inline script; it runs no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
