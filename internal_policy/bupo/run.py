"""A training run on disk and in memory.

A directory holds one run. ``run.json`` is written last: a directory without it holds an unfinished run, whose
``history.csv`` and ``dynamics.csv`` are still growing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from internal_policy.analysis.config import AnalyzeConfig
from internal_policy.analysis.finished import source_digest
from internal_policy.analysis.results import ANALYSIS as ANALYSIS_FORMAT
from internal_policy.bupo.config import AUTO, EVALUATION_SETTINGS, VERIFIERS, TrainConfig, second_phase
from internal_policy.data.records import SUFFIXES
from internal_policy.utils.errors import UserError, counted
from internal_policy.utils.io import expanded, write_atomically
from internal_policy.utils.result_format import ResultFormat, is_up_to_date
from internal_policy.utils.table_io import EXACT

if TYPE_CHECKING:
    from internal_policy.evaluation import Evaluation

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
MANIFEST = "run.json"
HISTORY = "history.csv"
DYNAMICS = "dynamics.csv"
DYNAMICS_LAYERS = "dynamics_layers.csv"
LAYER_ACCURACY = "layer_accuracy.csv"
MODEL = "model"
RUN = ResultFormat(
    *("training run", "training runs", "train", "train", MANIFEST, SCHEMA_VERSION),
    (HISTORY, DYNAMICS, DYNAMICS_LAYERS, LAYER_ACCURACY),
)
CHECKPOINTS = "checkpoints"
EVALUATIONS = "evaluations"
ADAPTER = "adapter"
ANALYSIS = "analysis"
"""Directory of the analysis that chose the layer."""
TRANSFER = "transfer"
"""Directory of the comparison of alignment with GRPO, next to that analysis."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Run:
    """A finished training run. Layers and steps count from 1; a step is a batch of rollouts with all its updates."""

    name: str
    """The model's name."""
    method: str
    """bupo, grpo, rloo, reinforce++ or ppo."""
    layer: int | None
    """The layer whose policy was optimised first."""
    layer_reason: str
    """Why this layer was chosen."""
    ipa_steps: int
    """Number of steps in the first phase."""
    ipa_reason: str
    """Why the first phase ended there."""
    config: dict[str, Any]
    """Everything that determines the result: the settings, including the preset's, and digests of weights and
    prompts."""
    history: pd.DataFrame
    """A row per step: phase, reward, policy_entropy and entropy (nats), length (tokens), loss, seconds and more."""
    dynamics: pd.DataFrame
    """A row per measurement on fixed responses: change, perplexity, KL to later layers (figure 5)."""
    dynamics_layers: pd.DataFrame
    """A row per measurement and later layer: cosine and KL (figure 5)."""
    path: Path
    """Its directory."""
    layer_accuracy: pd.DataFrame = field(default_factory=pd.DataFrame)
    """With ``eval_layer``, a row per measurement of that internal policy on the benchmark: step, phase, layer, site,
    lens, avg (0 to 1) with avg_stderr, avg_low, avg_high, agreement and kl with pi_theta, length, truncated, problems,
    samples."""
    evaluation_paths: dict[str, str] = field(default_factory=dict)
    """Directories of the evaluations ``start`` and ``trained``, relative to ``path``."""
    failures: dict[str, int] = field(default_factory=dict)
    """Number of rewards that crashed or took too long, and were counted as zero."""
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds spent in each stage."""
    versions: dict[str, str] = field(default_factory=dict)
    """Library versions."""
    call: dict[str, Any] = field(default_factory=dict)
    """The arguments of ``train``: ``options``, the fields of ``TrainConfig`` that differ from their defaults, by name;
    ``objects``, names of arguments that cannot be stored; ``from_hub``, which of model and prompts came from the hub;
    ``digest``, of the files that the options name."""

    @property
    def model_dir(self) -> Path:
        """Directory of the trained model, which transformers can load."""
        return self.path / MODEL

    @cached_property
    def evaluation(self) -> Evaluation | None:
        """The evaluation of the trained model on held-out problems; None if there is none."""
        return self._evaluation("trained")

    @cached_property
    def evaluation_start(self) -> Evaluation | None:
        """The evaluation of the initial model on the same problems."""
        return self._evaluation("start")

    def _evaluation(self, which: str) -> Evaluation | None:
        from internal_policy.evaluation import Evaluation

        return Evaluation.load(self.path / self.evaluation_paths[which]) if which in self.evaluation_paths else None

    @property
    def label(self) -> str:
        """The name of the run in figures."""
        config = self.config
        if self.method != "bupo" or self.layer is None:
            # The second phase of bupo is GRPO.
            parts = [second_phase(self.method).upper()]
        else:
            site = {"layer": "layer", "attn": "attention", "ffn": "FFN"}[config["site"]]
            steps = AUTO if config["ipa_steps"] == AUTO else counted(self.ipa_steps, "step")
            parts = ["BuPO", f"{site} {self.layer}", steps]
        parts += [
            text.format(config[name]) for name, (usual, text) in _LABEL_PARTS.items() if config.get(name) not in usual
        ]
        return ", ".join(parts)

    @property
    def setting(self) -> dict[str, Any]:
        """The settings without seed and prompts: runs for which it is equal are repetitions with other seeds."""
        return {name: value for name, value in self.config.items() if name not in _NOT_IN_SETTING}

    def save(self) -> None:
        """Write the tables, and the manifest last."""
        for name, table in (
            (HISTORY, self.history),
            (DYNAMICS, self.dynamics),
            (DYNAMICS_LAYERS, self.dynamics_layers),
        ):
            write_table(self.path / name, table)
        if len(self.layer_accuracy):
            write_table(self.path / LAYER_ACCURACY, self.layer_accuracy)
        RUN.write_manifest(self.path, self.manifest())

    def manifest(self) -> dict[str, Any]:
        """Return the content of ``run.json``."""
        stored = {name: getattr(self, name) for name in (*_STORED_AS_IS, "call")}
        return {"schema_version": SCHEMA_VERSION, **stored}

    def _repr_html_(self) -> str:
        from internal_policy.utils.console import number
        from internal_policy.utils.html import card

        def span(rows: pd.DataFrame, column: str, form: str) -> str:
            ends = rows[column].iloc[[0, -1]] if column in rows else (None, None)
            return " to ".join(number(value, form) for value in ends)

        forms = {"step": ".0f", "reward": ".3f", "policy_entropy": ".3f", "length": ".1f"}
        cells = [
            (phase, *(span(rows, column, form) for column, form in forms.items()))
            for phase, rows in (() if self.history.empty else self.history.groupby("phase", sort=False))
        ]
        rates = [
            f"{name} Avg@{found.n_samples} {100 * found.avg['mean']:.2f}%"
            for name, found in (("start", self.evaluation_start), ("trained", self.evaluation))
            if found is not None
        ]
        layer = "" if self.layer is None else f"layer {self.layer}: {self.layer_reason}"
        table = pd.DataFrame(cells, columns=["phase", "steps", "reward", "H(π_θ)", "tokens"])
        note = "first and last step of each phase; entropy in nats"
        return card("Run", f"{self.name}: {self.label}", (*rates, layer, str(self.path)), table, note)

    def __repr__(self) -> str:
        reward = self.history.get("reward", pd.Series(dtype=float))
        moved = f", reward {reward.iloc[0]:.3f} to {reward.iloc[-1]:.3f}" if len(reward) else ""
        return f"Run({self.name!r}: {self.label}; {counted(len(self.history), 'step')}{moved}; {str(self.path)!r})"

    @classmethod
    def load(cls, directory: str | Path) -> Run:
        """Load a training run from disk, without its model.

        Args:
            directory: a directory that ``train`` wrote.

        Returns:
            The run.

        Raises:
            UserError: it is not a run, is unfinished, or has another schema version.
        """
        path = expanded(directory)
        manifest = path / MANIFEST
        if not manifest.is_file():
            state = "holds a run that has not ended" if (path / CHECKPOINTS).is_dir() else "is not a training run"
            raise UserError(f"{path}: {state} (no {MANIFEST}); give a directory that `internal-policy train` finished")
        with RUN.reading(path) as data:
            return cls(
                **{name: data[name] for name in (*_STORED_AS_IS, "call")},
                history=read_table(path / HISTORY),
                dynamics=read_table(path / DYNAMICS),
                dynamics_layers=read_table(path / DYNAMICS_LAYERS),
                layer_accuracy=read_table(path / LAYER_ACCURACY),
                path=path,
            )


# Settings that a label shows after method, layer and steps: the usual values, which it omits, and the text for others.
_LABEL_PARTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "lens": (("policy",), "{}"),
    "ipa_learning_rate": ((None,), "first at {:g}"),
    "freeze_layers": ((0,), "layers 1-{} frozen"),
    "only_layer": ((None,), "only layer {} trained"),
    "upper_lr_scale": ((1.0,), "{:g}x above"),
    "aggregation": ((None, "sequence-mean"), "{}"),
    "lora_rank": ((0,), "LoRA {}"),
    "gamma": ((None, 1.0), "gamma {:g}"),
    "gae_lambda": ((None, 1.0), "lambda {:g}"),
    "value_clip": ((None, 0.2), "value clip {:g}"),
}
_NOT_IN_SETTING = {
    *("seed", "prompts", "dynamics_every", "dynamics_responses", "benchmark", "save_steps", "save_total_limit"),
    *("report_to", "entropy_sequences", "eval_layer", *EVALUATION_SETTINGS),
}

_STORED_AS_IS = (
    *("name", "method", "layer", "layer_reason", "ipa_steps", "ipa_reason", "config", "failures", "timings"),
    *("versions", "evaluation_paths"),
)


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV, atomically."""
    write_atomically(path, lambda temporary: table.to_csv(temporary, index=False))


def read_table(path: Path) -> pd.DataFrame:
    """Read a table that ``write_table`` wrote; an empty one if the file is missing or has no columns."""
    try:
        # The default parser may be off in the last digit, and a resumed run must end with the same numbers.
        table: pd.DataFrame = pd.read_csv(path, **EXACT)
        return table
    except (FileNotFoundError, pd.errors.EmptyDataError):
        return pd.DataFrame()


def why_no_dynamics(run: Run) -> str | None:
    """Return why there is no figure 5 of a run; None if there is one."""
    name = f"{run.name}, {run.label}"
    if run.dynamics.empty:
        how = "give --dynamics-every to measure them" if run.layer is not None else "it has no alignment phase"
        return f"{name}: there is no figure 5 of this run: no dynamics were measured ({how})"
    if run.dynamics_layers.empty:
        return (
            f"{name}: there is no figure 5 of this run: it compares a layer with the layers above it, and layer "
            f"{run.layer} is the model's last"
        )
    return None


def last_alignment_step(run: Run) -> int | None:
    """Return the last step of alignment, if there was one and training continued after it."""
    steps = run.ipa_steps or 0
    return steps if len(run.history) and 0 < steps < run.history["step"].max() else None


def find_finished(config: TrainConfig) -> Run | None:
    """Find the finished run that a call would return, without torch or a model; None if this cannot be decided."""
    directory = config.directory
    try:
        stored = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        call, versions = stored["call"], stored["versions"]
        # A run that was moved to a directory named after the settings is not the one that the call would make.
        in_place = config.output is not None or call["options"]["output"] == str(directory)
        known = {"files": call["digest"], "hooked": stored["config"]["hooked"]}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    if not in_place or not is_up_to_date(known, versions, partial(call_digest, config)):
        return None
    run = Run.load(directory)
    warn_complete(directory)
    return run


def warn_complete(directory: Path) -> None:
    """Warn that there is nothing to do."""
    logger.warning("%s: already complete; nothing to train (--overwrite starts over)", directory)


def call_digest(config: TrainConfig) -> str | None:
    """Digest the settings of a call, with the files that they name and the code of this package.

    Returns 64 hexadecimal digits, or None if the result depends on anything else: the hub, a GPU, other code.
    """
    if config.revision or config.trust_remote_code or config.attn_implementation:
        return None
    if config.reward not in (None, *VERIFIERS):
        return None
    sources = [config.prompts, *([config.benchmark] if config.benchmark is not None else [])]
    if isinstance(config.layer, str) and config.layer != AUTO:
        sources.append(str(expanded(config.layer) / ANALYSIS_FORMAT.manifest))
    options = {name: value for name, value in config.to_keywords().items() if name not in ("overwrite", "wait")}
    # By default the directory is named after the settings.
    options |= {"layer": str(config.layer or AUTO), "output": config.output is not None}
    options["slug"] = AnalyzeConfig(model=config.model).slug
    try:
        text = json.dumps(options, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError):
        return None
    files = source_digest(config.model, sources)
    return None if files is None else hashlib.sha256(f"{files} {text}".encode()).hexdigest()


def is_on_the_hub(value: Any) -> bool:
    """Return whether a model or data set comes from the hub, by its name or, for a model, by the object."""
    if isinstance(value, (str, Path)):
        name = str(value)
        local = Path(name).exists() or name.endswith(SUFFIXES) or name.startswith("testbed/")
        return bool(_HUB_ID.fullmatch(name)) and not local
    # transformers records a commit only for models that it loads from the hub.
    commit = getattr(getattr(value, "config", None), "_commit_hash", None)
    return commit is not None and bool(_HUB_ID.fullmatch(str(getattr(value, "name_or_path", ""))))
