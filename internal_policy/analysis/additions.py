"""Optional measurements of an analysis, each with its own pass over the responses and its own tables.

They add to an analysis and change nothing in it, so that they are not among the settings by which it is recognised: one
that is asked of a finished analysis is measured on its responses and stored with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import pandas as pd

from internal_policy.analysis.config import AnalyzeConfig
from internal_policy.analysis.finished import missing_additions
from internal_policy.analysis.results import ANALYSIS, Analysis
from internal_policy.data.responses import Response
from internal_policy.extractors import Extractor
from internal_policy.models import LanguageModel
from internal_policy.models.lenses import open_lens
from internal_policy.models.options import Lens
from internal_policy.utils.distributed import Processes
from internal_policy.utils.workspace import Workspace


@dataclass(frozen=True)
class AdditionRun:
    """What a measurement works with."""

    config: AnalyzeConfig
    """The settings."""
    extractor: Extractor
    """The backend with the model."""
    responses: Sequence[Response]
    """The analysed responses."""
    analysis: Analysis
    """The finished analysis."""
    workspace: Workspace
    """Where finished portions are kept until the addition is complete."""
    state: Processes
    """The processes that share the work."""

    @property
    def model(self) -> LanguageModel:
        """The model."""
        return self.extractor.model

    @cached_property
    def lens(self) -> Lens:
        """The lens, ready to be applied."""
        return open_lens(self.config.lens, self.model)


Measure = Callable[[AdditionRun], dict[str, pd.DataFrame]]
"""Measures an addition and returns its tables by name (see ``results.ADDITION_FILES``)."""


def add_missing(
    analysis: Analysis,
    config: AnalyzeConfig,
    extractor: Extractor,
    responses: Sequence[Response],
    measures: dict[str, Measure],
    state: Processes,
) -> Analysis:
    """Measure the additions that an analysis lacks and write them to its directory; interrupted ones are resumed.

    Args:
        analysis: the finished analysis, on disk.
        config: the settings with the additions that are asked for.
        extractor: the backend with the model.
        responses: the analysed responses.
        measures: how each addition is measured, by its option.
        state: the processes.

    Returns:
        The analysis with its additions.
    """
    if not (missing := missing_additions(config, analysis)):
        return analysis
    assert analysis.path is not None
    workspace = Workspace(analysis.path, ANALYSIS)
    identity = {"additions_to": analysis.config["weights"], "responses": analysis.responses_digest}
    identity |= {"lens": config.lens_name, "seed": config.seed}
    state.on_main(lambda: workspace.open(identity, overwrite=False))
    run = AdditionRun(replace(config, **missing), extractor, responses, analysis, workspace, state)
    tables: dict[str, pd.DataFrame] = {}
    for option in missing:
        tables |= measures[option](run)

    def store() -> None:
        analysis.save_additions(tables, missing)
        workspace.close()

    state.on_main(store)
    return Analysis.load(analysis.path)
