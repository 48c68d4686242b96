"""The command `internal-policy inspect`: what every internal policy says at every token of one prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from internal_policy.analysis.config import AnalyzeConfig
from internal_policy.cli import common
from internal_policy.inspection.settings import DEFAULT_NEW_TOKENS, LAST, Site, check_choice, check_settings, slug
from internal_policy.models.options import Lens
from internal_policy.utils.io import expanded
from internal_policy.utils.locks import locked, writing
from internal_policy.utils.logging import importing
from internal_policy.utils.output import document
from internal_policy.utils.shell import figure_name

if TYPE_CHECKING:
    from internal_policy.inspection.results import Inspection

DATA = Path("data/inspections")
FIGURES = Path("figures")
DEFAULTS = AnalyzeConfig()
TOP_K = 5


def inspect(
    model: Annotated[str, common.Model],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What is asked.")],
    response: Annotated[
        str | None, typer.Option(help="What is answered.", show_default="sampled from the model")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Sample at most so many tokens; 0 looks at the prompt only.", show_default=str(DEFAULT_NEW_TOKENS)
        ),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Show the tokens FIRST:LAST, from 1; 5: from the 5th on, : all.")
    ] = None,
    last: Annotated[int | None, typer.Option(help="Show so many tokens at the end.", show_default=str(LAST))] = None,
    site: Annotated[Site, typer.Option(help="Which policies the terminal shows; all are drawn.")] = "layer",
    template: common.Template = DEFAULTS.template,
    lens: Annotated[Lens, typer.Option(help="Without or with the final norm.")] = DEFAULTS.lens,
    top_k: Annotated[int, typer.Option(help="Tokens of each policy that the table keeps.")] = TOP_K,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = DEFAULTS.temperature,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = DEFAULTS.seed,
    dtype: common.Dtype = DEFAULTS.dtype,
    device: common.Device = DEFAULTS.device,
    device_map: common.DeviceMap = DEFAULTS.device_map,
    quantization: common.Quantization = DEFAULTS.quantization,
    backend: common.Backend = DEFAULTS.backend,
    remote: common.Remote = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = DEFAULTS.revision,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Directory for results.", show_default=f"{DATA}, figures in {FIGURES}"),
    ] = None,
    trust_remote_code: common.TrustRemoteCode = False,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Look into one prompt: entropy and top token of every internal policy at every token, as a heat map."""
    options: dict[str, Any] = {
        "template": template,
        "lens": lens,
        "temperature": temperature,
        "seed": seed,
        "dtype": dtype,
        "device": device,
        "device_map": device_map,
        "quantization": quantization,
        "backend": backend,
        "remote": remote,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }
    # A bad setting is told before anything heavy is imported.
    config = AnalyzeConfig(model=model, **options)
    check_settings(prompt, response, max_new_tokens, top_k, temperature)
    check_choice(tokens, last)
    common.require_packages(backend, quantization)
    common.require_there([model], revision)
    with importing():
        from internal_policy.cli.display import list_files
        from internal_policy.cli.display_inspection import show
        from internal_policy.inspection import inspect as looking
        from internal_policy.inspection import results
        from internal_policy.inspection.figure_data import inspection_data
        from internal_policy.utils.workspace import Workspace

    name = f"{figure_name([(config.slug, lens)])}--{slug(prompt)}"
    root = DATA if output is None else expanded(output)
    Workspace(root / name, results.INSPECTION).check()
    look = looking.inspect(
        model, prompt=prompt, response=response, max_new_tokens=max_new_tokens, top_k=top_k, **options
    )
    # Nothing is written where what was asked for is not there.
    look.positions(tokens, last)
    # Alone among the looks while a free name is chosen.
    with locked(root, wait=True):
        name = look.place(root, name)
        directory, figures = root / name, (FIGURES if output is None else root / "figures") / name
        with writing(directory):
            look.save(directory)
    # Shown when it is safe: a pager that is left early ends the command.
    show(look, site, tokens=tokens, last=last)
    list_files("inspection", [directory / file for file in (*results.INSPECTION.files, results.MANIFEST)])
    draw(look, figures, tokens=tokens, last=last)
    shown = inspection_data(look, [site], tokens=tokens, last=last)
    document(
        {"command": "inspect", "inspection": {**look.manifest(), "path": directory}, "site": site, "values": shown}
    )


def draw(look: Inspection, directory: Path, *, tokens: str | None = None, last: int | None = None) -> None:
    """Draw the heat maps, and list the files.

    Args:
        look: what is drawn.
        directory: where; made where it does not exist.
        tokens: which tokens, from 1.
        last: so many at the end; 24 where neither is given.

    Raises:
        UserError: it cannot be written.
    """
    from internal_policy.cli.display import list_files
    from internal_policy.plotting import inspection as figure

    with writing(directory):
        paths = figure.save_inspection_figures(look, directory, tokens=tokens, last=last)
    list_files("figures", paths)
