"""What the commands share of their options: how a model is loaded, and what can be told of it before that."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from internal_policy.analysis.config import BACKENDS, GENERATORS
from internal_policy.data.prompts import TEMPLATES
from internal_policy.data.records import SUFFIXES, require_file
from internal_policy.models.options import DEVICE_MAPS, DTYPES, QUANTIZATIONS
from internal_policy.models.paths import locate
from internal_policy.utils.errors import UserError
from internal_policy.utils.imports import require_package
from internal_policy.utils.locks import keep_locks
from internal_policy.utils.output import chosen

EMBEDDED = ("testbed/qwen3", "testbed/llama")


def completing(words: Iterable[str]) -> Callable[[str], list[str]]:
    """Let the shell complete a value; where no word fits, it goes on with files.

    Args:
        words: those that are known without loading anything.

    Returns:
        What typer asks.
    """

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


def speaking(command: Callable[..., None]) -> Callable[..., None]:
    """Let --json, --quiet and locks hold while a command runs, so that help and bad options are told all the same.

    Args:
        command: the function of a command.

    Returns:
        What typer is given in its place; it has the same options.
    """

    @wraps(command)
    def speak(**options: Any) -> None:
        with chosen(json=options.get("as_json", False), quiet=options.get("quiet", False)), keep_locks():
            try:
                command(**options)
            except EOFError as error:
                # typer would take it for an interrupt, and that the same command goes on would not be true.
                raise UserError(f"a file ends too early ({error or 'EOFError'}); --debug shows which") from error

    return speak


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables, for scripts.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only; results are written all the same.")]
Wait = Annotated[
    bool,
    typer.Option("--wait", help="Where another process writes to the output directory, start when it has ended."),
]
Model = typer.Option(
    "--model",
    "-m",
    help="Hub id, local directory, testbed/qwen3 or testbed/llama.",
    autocompletion=completing(EMBEDDED),
)
Models = typer.Option(
    "--model",
    "-m",
    help="Hub id, local directory, testbed/qwen3 or testbed/llama; repeat for several.",
    autocompletion=completing(EMBEDDED),
)
Template = Annotated[str, typer.Option(help=f"One of {', '.join(TEMPLATES)}.", autocompletion=completing(TEMPLATES))]

Dtype = Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.", autocompletion=completing(DTYPES))]
Device = Annotated[
    str,
    typer.Option(
        help="auto (cuda, mps, cpu) or a torch device.", autocompletion=completing(("auto", "cuda", "mps", "cpu"))
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help=f"Share the layers out among several devices: one of {', '.join(DEVICE_MAPS)}.",
        autocompletion=completing(DEVICE_MAPS),
    ),
]
Quantization = Annotated[
    str | None,
    typer.Option(
        help=f"Quantise the layers' weights while loading, by bitsandbytes: one of {', '.join(QUANTIZATIONS)}.",
        autocompletion=completing(QUANTIZATIONS),
    ),
]
Generator = Annotated[
    str,
    typer.Option(
        help=f"What samples the responses: one of {', '.join(GENERATORS)} (if installed, on a GPU).",
        autocompletion=completing(GENERATORS),
    ),
]
Backend = Annotated[
    str,
    typer.Option(help=f"What captures the states: one of {', '.join(BACKENDS)}.", autocompletion=completing(BACKENDS)),
]
Remote = Annotated[
    bool, typer.Option("--remote", help="Run the model on NDIF (--backend nnsight; the key in NDIF_API_KEY).")
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the checkpoint's code.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def told(result: Any) -> dict[str, Any]:
    """Tell a result in a JSON document: what its manifest on disk holds, and where it is.

    Args:
        result: an analysis, evaluation, inspection, comparison or run.

    Returns:
        The fields.
    """
    from internal_policy.analysis.results import REPORT

    path = result.path
    report = None if path is None or not (path / REPORT).is_file() else path / REPORT
    return {**result.manifest(), "path": path, "report": report}


def require_there(models: Iterable[str], revision: str | None, *sources: str | None) -> None:
    """Refuse paths where nothing is, before anything heavy is imported.

    Args:
        models: hub ids, directories and embedded models.
        revision: of a hub model.
        sources: files, hub data sets and benchmarks by name; None stands for a default.

    Raises:
        UserError: a directory without a model, or no such file.
    """
    for model in models:
        locate(model, revision)
    for source in sources:
        if source is not None and Path(source).suffix in SUFFIXES:
            require_file(Path(source))


def require_packages(backend: str, quantization: str | None) -> None:
    """Refuse options whose packages are not installed, before anything heavy is imported.

    Args:
        backend: what captures the states.
        quantization: how the weights are to be quantised.

    Raises:
        UserError: a package is missing.
    """
    if backend != "hooks":
        require_package(backend.replace("-", "_"), f"--backend {backend}", "backends")
    if quantization is not None:
        require_package("bitsandbytes", f"--quantization {quantization}", "quantized")


def require_key(remote: bool | str) -> None:
    """Refuse to go to NDIF without a key, before the hub is asked for a model.

    Args:
        remote: what ``--remote`` says.

    Raises:
        UserError: nnsight is not installed, or there is no key.
    """
    if remote is True:
        from internal_policy.extractors import nnsight

        nnsight.require_key(nnsight.load_nnsight())
