"""The command line: parse, make a configuration, one call into the package, show the result."""

from __future__ import annotations

import inspect as inspection
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from internal_policy.cli.analyze import FIGURES, analyze
from internal_policy.cli.common import Debug, Json, Quiet, speaking
from internal_policy.cli.compare import compare
from internal_policy.cli.evaluate import evaluate
from internal_policy.cli.inspect import inspect
from internal_policy.cli.models import models
from internal_policy.cli.push import push
from internal_policy.cli.report import kind_of, report
from internal_policy.cli.train import train
from internal_policy.utils.citation import __version__
from internal_policy.utils.errors import UserError
from internal_policy.utils.io import expanded
from internal_policy.utils.output import document, is_quiet
from internal_policy.utils.shell import figure_name, is_main_process, rank, visible

INTERRUPTED = 130
_LONGEST = 2000
"""No message is longer: what was given may be, and stands in it."""

app = typer.Typer(
    name="internal-policy",
    help="Internal policies of language models: entropies, boundary layer, figures (arXiv 2512.19673v3).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # As markup "[default: ...]" would be taken for a style, and not be shown.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# typer carries a click of its own in some versions: this is the one name of its usage errors that holds in all.
UsageError: Any = typer.BadParameter.__bases__[0]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"internal-policy {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _summary(command: Callable[..., None]) -> str:
    """The first sentence of a command's help, which the list of commands would otherwise cut to the width of a line."""
    return (inspection.getdoc(command) or "").partition("\n\n")[0]


# What a shell makes of an unquoted --checkpoints glob arrives as extra words.
app.command(short_help=_summary(analyze), context_settings={"allow_extra_args": True})(speaking(analyze))
for _command in (train, push, evaluate, compare, inspect, models, report):
    app.command(short_help=_summary(_command))(speaking(_command))


@app.command(short_help="Redraw the figures of analyses, training runs, evaluations and looks, without a model.")
@speaking
def figures(
    directories: Annotated[
        list[Path],
        typer.Argument(
            help="What analyze, train, evaluate or inspect wrote, also mixed; one that holds several stands for all."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for figures.")] = FIGURES,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Redraw the figures of analyses, training runs and evaluations from disk, without a model."""
    from internal_policy.analysis.sources import gather
    from internal_policy.bupo.run import Run
    from internal_policy.cli import (
        analyze as cli_analyze,
    )
    from internal_policy.cli import (
        evaluate as cli_evaluate,
    )
    from internal_policy.cli import (
        inspect as cli_inspect,
    )
    from internal_policy.cli import (
        train as cli_train,
    )
    from internal_policy.cli.compare import redrawing
    from internal_policy.evaluation.results import EVALUATION, Evaluation
    from internal_policy.inspection.results import INSPECTION, Inspection
    from internal_policy.utils.console import say

    kinds = [(kind_of(path), path) for path in map(expanded, directories)]
    # All are read before any is drawn, so that a bad one is told at once.
    held = [(path, gather([path])) for kind, path in kinds if kind == "analysis"]
    analyses = [analysis for _, found in held for analysis in found]
    runs = [Run.load(path) for kind, path in kinds if kind == "run"]
    evaluations = [
        Evaluation.load(each) for kind, path in kinds if kind == "evaluation" for each in EVALUATION.below(path)
    ]
    looks = [Inspection.load(each) for kind, path in kinds if kind == "inspection" for each in INSPECTION.below(path)]
    if compared := next((path for kind, path in kinds if kind == "comparison"), None):
        raise UserError(f"{compared}: a comparison is drawn from its analyses; draw it by {redrawing(compared)}")
    root = expanded(output)
    for path, found in held:
        if len(found) > 1:
            say(f"{path}: holds {len(found)} analyses, drawn together: {', '.join(a.name for a in found)}")
    if analyses:
        cli_analyze.draw(analyses, root)
    if runs:
        cli_train.draw(runs, root / figure_name([(run.path.resolve().name, "policy") for run in runs]))
    if evaluations:
        cli_evaluate.draw(evaluations, root)
    for look in looks:
        cli_inspect.draw(look, root / figure_name([((look.path or root).resolve().name, "policy")]))
    document({"command": "figures"})


def main() -> None:
    """Run the command line: exit code 2 and one line for an error that the user can mend, 130 for an interrupt."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a sign gets another one, not a crash after the work is done.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    _name_the_shell(sys.argv[1:])
    # TRL reports each training to the hub; who wants that sets the variable to 0.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    debug = "--debug" in sys.argv
    try:
        _refuse_bytes(sys.argv[1:])
        with _notices(debug):
            code = app(standalone_mode=False)
    except UsageError as error:
        message = error.format_message()
        # Without arguments the help is the answer: printed already, or the message, as this version of typer has it.
        if not message or message.lstrip().startswith("Usage:"):
            typer.echo(message, err=True)
            sys.exit(2)
        command = f"{error.ctx.info_name} " if error.ctx and error.ctx.parent else ""
        message = message.rstrip(".")
        _fail(f"{message}{'' if message.endswith('?') else '.'} See internal-policy {command}--help")
    except UserError as error:
        _fail(str(error), traced=debug)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(
            f"{where}{error.strerror or error}; mend that, then repeat the command: it goes on where it stopped",
            traced=debug,
        )
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        without = " without --overwrite" if "--overwrite" in sys.argv else ""
        typer.echo(f"interrupted; the same command{without} goes on where it stopped", err=True)
    sys.exit(code)


def _refuse_bytes(words: list[str]) -> None:
    """Refuse before the work what no result can name: paths may hold bytes that are no text, and manifests may not."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{word}: holds bytes that are not UTF-8; rename it, or give another name") from error


def _name_the_shell(words: list[str]) -> None:
    """Let ``--show-completion SHELL`` and ``--install-completion SHELL`` mean the shell that they name.

    typer looks for the shell among the processes that called this one, and there is none in a container's build.
    """
    if len(words) == 2 and words[0] in ("--show-completion", "--install-completion"):
        os.environ["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"


class _Visible(logging.Formatter):
    """A line a message, whatever names and templates put into it."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), one_line=True)


@contextmanager
def _notices(debug: bool) -> Iterator[None]:
    """Show what the package logs on standard error, once however many processes there are; --debug shows all of it."""
    handler = logging.StreamHandler() if is_main_process() else logging.NullHandler()
    handler.setFormatter(_Visible("%(message)s"))
    handler.addFilter(lambda record: record.levelno >= logging.ERROR or not is_quiet())
    logger = logging.getLogger("internal_policy")
    before = logger.level
    logger.addHandler(handler)
    if debug:
        logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _fail(message: str, *, traced: bool = False) -> NoReturn:
    if traced:
        typer.echo(visible(traceback.format_exc()), err=True, nl=False)
    # Of several processes each says what stopped it: it need not be what stopped the others.
    which = "" if is_main_process() else f" (process {rank()})"
    if len(message) > _LONGEST:
        # The end says what to do next.
        message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
    typer.echo(f"error{which}: {visible(message, one_line=True)}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
