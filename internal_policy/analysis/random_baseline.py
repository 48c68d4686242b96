"""The baseline of an analysis: the same responses through the same architecture with random weights.

It separates the contribution of the training to a curve from that of the architecture. The weights are those
that transformers initialises from the model's configuration, drawn on the CPU by the seed, so that they are the same on
every machine. Eq. 4 is verified for this model as for any other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from internal_policy import models, statistics
from internal_policy.analysis import tables
from internal_policy.analysis.config import AnalyzeConfig
from internal_policy.analysis.layer_selection import select_layer
from internal_policy.analysis.position_sampling import CaptureResult
from internal_policy.analysis.results import ANALYSIS, Analysis
from internal_policy.data.responses import Response
from internal_policy.extractors import Extractor
from internal_policy.extractors.verify import prove
from internal_policy.models import LanguageModel, devices, quantization
from internal_policy.utils.distributed import Processes, release_memory
from internal_policy.utils.errors import UserError, as_user_error
from internal_policy.utils.logging import status
from internal_policy.utils.workspace import Workspace

Capture = Callable[[AnalyzeConfig, Extractor, list[Response], Workspace, Processes], CaptureResult]


def architecture(config: AnalyzeConfig, network: Any = None) -> Any:
    """Read the transformers configuration from which random weights are made, before anything long begins.

    `network` is the transformers model if it is in memory.

    Raises:
        UserError: no such model, or one whose weights are quantised.
    """
    found = getattr(network, "config", None)
    if network is None:
        found = models.check(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)[1]
    if (how := quantization.describe(found)) is not None:
        raise UserError(
            f"{config.model}: --random-baseline was given with quantised weights ({how}), and random ones are not "
            "quantised; leave it out"
        )
    return found


def add_baseline(
    analysis: Analysis, config: AnalyzeConfig, source: Any, network: Any, capture: Capture, state: Processes
) -> Analysis:
    """Measure the baseline of an analysis and write it to its directory; an interrupted one is resumed.

    Args:
        analysis: the finished analysis, on disk.
        config: its settings.
        source: the configuration from `architecture`.
        network: the transformers model, if it is in memory.
        capture: analyses responses, writing its portions to a workspace.
        state: the processes.

    Raises:
        UserError: the weights cannot be made, or eq. 4 does not hold for them.
    """
    assert analysis.path is not None
    # The analysed model is freed, unless the user still has it, because two models would need twice the memory.
    release_memory()
    with status(f"making random weights for {config.model}"):
        extractor = prove(_random_model(analysis, config, source, _device(config, network, state)))
    seed_and_weights = {"seed": config.seed, "weights": extractor.model.fingerprint()}
    workspace = Workspace(analysis.path, ANALYSIS)
    identity = {"baseline": seed_and_weights, "responses": analysis.responses_digest, "lens": config.lens_name}
    state.on_main(lambda: workspace.open(identity, overwrite=False))
    rows: Any = analysis.sequences.to_dict("records")
    responses = [Response(**row) for row in rows]
    with models.limit_threads(extractor.model):
        captured = capture(replace(config, keep_tokens=0), extractor, responses, workspace, state)

    def assemble() -> None:
        _with_baseline(analysis, captured, responses, seed_and_weights).save_baseline()
        workspace.close()

    state.on_main(assemble)
    return Analysis.load(analysis.path)


def _with_baseline(
    analysis: Analysis, captured: CaptureResult, responses: Sequence[Response], seed_and_weights: dict[str, Any]
) -> Analysis:
    per_response = tables.response_table(captured.portions, responses)
    layers = statistics.layer_table(per_response)
    seconds = sum(float(portion["seconds"]) for portion in captured.portions)
    chosen = select_layer(SimpleNamespace(layers=layers, responses=per_response), seed=seed_and_weights["seed"])
    return replace(
        analysis,
        config={**analysis.config, "random_baseline": True},
        baseline=layers,
        baseline_model={
            **seed_and_weights,
            "boundary_layer": chosen.boundary_layer,
            "policy_entropy": statistics.policy_entropy(per_response),
        },
        timings={**analysis.timings, "baseline": round(seconds, 3)},
    )


def _random_model(analysis: Analysis, config: AnalyzeConfig, source: Any, device: torch.device) -> LanguageModel:
    from transformers import AutoModelForCausalLM

    name = f"{config.model} with random weights"
    dtype = getattr(torch, analysis.model["dtype"])
    # The user's random streams continue as if nothing had been drawn.
    with torch.random.fork_rng(devices=[]), as_user_error(name, "its architecture"):
        # Only the generator of the CPU: torch.manual_seed would seed those of all devices.
        torch.set_rng_state(torch.Generator().manual_seed(config.seed).get_state())
        drawn = AutoModelForCausalLM.from_config(
            copy.deepcopy(source), dtype=dtype, trust_remote_code=config.trust_remote_code
        )
        return models.wrap(drawn.to(device), None, name)


def _device(config: AnalyzeConfig, network: Any, state: Processes) -> torch.device:
    if network is not None:
        return devices.input_device(network)
    own = state.number > 1 and config.device in ("auto", "cuda")
    return state.device if own else models.choose_device(config.device)
