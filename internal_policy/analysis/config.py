"""The settings of an analysis, and the options that analyses, evaluations and inspections share."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from internal_policy.data.prompts import TEMPLATES
from internal_policy.models.options import (
    DEFAULT_LENS,
    DEVICE_MAPS,
    DTYPES,
    LENSES,
    QUANTIZATIONS,
    LensChoice,
    check_device_map,
    check_lens,
    check_quantization,
    is_own_lens,
    lens_digest,
    lens_name,
)
from internal_policy.utils.errors import UserError
from internal_policy.utils.options import check_options, flag_of, listed, option, require_one_of

BACKENDS = ("hooks", "transformer-lens", "nnsight")
GENERATORS = ("transformers", "vllm")
EMBEDDED = ("testbed/qwen3", "testbed/llama")
"""The models that come with the package."""
DEVICES = ("auto", "cuda", "mps", "cpu")
DEFAULT_RESPONSES = 256
GROUPINGS = ("kind", "position", "correct", "policy-entropy")
ADDITIONS = ("heads", "divergences", "by")
"""The options that add measurements to an analysis and change nothing in it."""


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Which version of a model is studied, and how it is prompted."""

    revision: str | None = None
    """Branch, tag or commit on the hub."""
    template: str = option("chat", choices=TEMPLATES)
    """How a prompt is put to the model: the tokenizer's own chat template (plain text if it has none), plain text,
    or a template of the paper; qwen3 is the non-thinking one."""


@dataclass(frozen=True)
class ModelOptions(PromptOptions):
    """Which model is studied, and how it is prompted."""

    model: str = option("testbed/qwen3", completions=EMBEDDED)
    """Hub id, local directory, or an embedded model (testbed/qwen3, testbed/llama)."""


@dataclass(frozen=True, kw_only=True)
class LensOptions(ModelOptions):
    """Which model is studied, and through which lens."""

    lens: LensChoice = option(DEFAULT_LENS, completions=LENSES)
    """What a state goes through before the unembedding: policy (nothing, as in the paper), logit-lens (the final norm),
    unit-norm (every state at root mean square 1), the directory of a trained lens, or in Python a function
    (layer, states) -> states."""

    @property
    def lens_name(self) -> str:
        """The name of the lens, which is safe in a path: that of a directory is its last part."""
        return lens_name(self.lens)

    def lens_settings(self) -> dict[str, Any]:
        """The lens as settings store it: its name, and the path and the digest of a trained one."""
        if not isinstance(self.lens, (str, Path)) or not is_own_lens(self.lens):
            return {"lens": self.lens_name}
        return {"lens": self.lens_name, "lens_path": str(self.lens), "lens_digest": lens_digest(self.lens)}


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is loaded."""

    dtype: str = option("auto", choices=DTYPES)
    """Type of the weights; auto is the checkpoint's own on cuda, and float32 elsewhere."""
    device: str = option("auto", completions=DEVICES)
    """auto (cuda, mps, cpu) or a torch device."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(LoadOptions):
    """How a model is loaded, and how responses are sampled from it."""

    max_new_tokens: int | None = option(None, least=1)
    """Largest number of tokens in a response. Default: what the checkpoint's generation config says, or 1024."""
    temperature: float = option(1.0, least=0)
    """Sampling temperature; 0 takes the most probable token."""
    seed: int = option(0, least=0)
    """Seed of all random numbers."""


@dataclass(frozen=True, kw_only=True)
class BatchOptions(SamplingOptions):
    """How many responses are sampled."""

    generator: str = option("transformers", choices=GENERATORS)
    """What samples the responses; vllm must be installed and needs a GPU."""


@dataclass(frozen=True, kw_only=True)
class PlacementOptions:
    """On which devices the layers of a model are, and in how many bits."""

    device_map: str | None = option(None, completions=DEVICE_MAPS)
    """Distribute the layers over several devices, as accelerate does: auto, balanced, balanced_low_0 or sequential."""
    quantization: str | None = option(None, choices=QUANTIZATIONS)
    """Quantise the weights of the layers while loading, by bitsandbytes."""


@dataclass(frozen=True, kw_only=True)
class CaptureOptions(PlacementOptions):
    """How the states of a model are captured."""

    backend: str = option("hooks", choices=BACKENDS)
    """What captures the states. The backends agree to float32 rounding."""
    remote: bool | str = False
    """Run the model on NDIF through nnsight, with the key in NDIF_API_KEY; in Python also a host's address, or "local",
    which does here what NDIF would do there."""

    def _check_capture(self, device: str) -> None:
        if self.remote and self.backend != "nnsight":
            raise UserError(f"--remote was given with --backend {self.backend}; needed is --backend nnsight")
        check_device_map(self.device_map, device)
        check_quantization(self.quantization)
        for name in ("device_map", "quantization"):
            if getattr(self, name) is not None and self.backend != "hooks":
                raise UserError(
                    f"{flag_of(name)} was given with --backend {self.backend}, which supports neither several devices "
                    "nor quantised weights; leave one of them out"
                )


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """The responses that are studied."""

    prompts: str | None = None
    """Hub data set id, or a parquet, jsonl or json file. Default: MATH-500, or the embedded tasks for an embedded
    model."""
    prompts_split: str | None = None
    """Split of a hub data set. Default: test if there is one, or the first."""
    responses: str | None = None
    """Ready responses (jsonl, json, parquet; for the command also the directory of an analysis) instead of sampled
    ones."""
    max_responses: int | None = option(None, least=1)
    """Largest number of responses. Default: 256 when they are sampled, all when they are given."""
    samples_per_prompt: int = option(1, least=1)
    """Responses sampled for each prompt."""
    batch_size: int = option(16, least=1)
    """Sequences in a batch. It does not change the result, except with 8bit weights, which round by the batch."""

    def _check_inputs(self) -> None:
        if self.prompts is not None and self.responses is not None:
            raise UserError(
                "both --prompts and --responses were given; give prompts to sample from, or ready responses"
            )
        if self.responses is not None:
            for name in ("prompts_split", "samples_per_prompt", "max_new_tokens", "temperature", "generator"):
                known = type(self).__dataclass_fields__.get(name)
                if known is not None and getattr(self, name) != known.default:
                    raise UserError(
                        f"{flag_of(name)} was given with --responses, from which nothing is sampled; leave it out"
                    )


@dataclass(frozen=True, kw_only=True)
class AnalyzeOptions(InputOptions, BatchOptions, CaptureOptions):
    """The settings of an analysis that apply to every model."""

    temperature: float = option(1.0, least=0)
    """Sampling temperature; 0 takes the most probable token. The entropies are always those of temperature 1."""
    keep_tokens: int = option(8, least=0)
    """Keep the values of every analysed token for this number of responses, from the first."""
    tolerance: float | None = None
    """Analyse positions chosen at random until every entropy change is known to this number of nats (95%), such as
    0.02. Default: every position is analysed."""
    random_baseline: bool = False
    """Analyse the same responses also with random weights of the same architecture, drawn by the seed."""
    heads: bool = False
    """Measure what each attention head writes, and each routed expert of a mixture; captured by hooks."""
    divergences: bool = False
    """Measure how far each layer's policy is from the final one and from the next layer's."""
    by: tuple[str, ...] = option((), choices=GROUPINGS)
    """Every statistic also for groups of tokens: by kind (digit, operator, word, format), by position (decile of the
    response), by right and wrong answers (correct), or by policy-entropy (the 20% of tokens with the highest entropy
    of the final policy). Repeat it for several."""

    def _check_analysis(self) -> None:
        check_options(self)
        if self.tolerance is not None and not 0 < self.tolerance < float("inf"):
            raise UserError(
                f"--tolerance is {self.tolerance}; needed is a number of nats above 0, such as 0.02, or nothing to "
                "analyse every position"
            )
        self._check_inputs()
        for name in ("remote", "device_map", "quantization"):
            if self.generator == "vllm" and getattr(self, name):
                raise UserError(
                    f"{flag_of(name)} was given with --generator vllm, which loads the weights itself, whole and on "
                    "one GPU; leave one of them out"
                )
        self._check_capture(self.device)
        object.__setattr__(self, "by", tuple(dict.fromkeys(listed("--by", self.by))))
        for grouping in self.by:
            require_one_of("--by", grouping, GROUPINGS)
        for name in ADDITIONS:
            if self.tolerance is not None and getattr(self, name):
                raise UserError(
                    f"{flag_of(name)} was given with --tolerance, which analyses some of the positions; leave one of "
                    "them out"
                )
        if self.heads and self.backend != "hooks":
            raise UserError(f"--heads was given with --backend {self.backend}; heads are measured with --backend hooks")
        for name in ("remote", "device_map", "quantization", "tolerance"):
            if self.random_baseline and getattr(self, name):
                raise UserError(
                    f"{flag_of(name)} was given with --random-baseline, whose weights are made whole on one device and "
                    "analysed at every position; leave one of them out"
                )


@dataclass(frozen=True)
class AnalyzeConfig(AnalyzeOptions, LensOptions):
    """What to analyse and how. Every field is an option of ``internal-policy analyze``."""

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            UserError: a value out of range, or options that contradict each other; the message states the rule.
        """
        self._check_analysis()
        require_revision(self.revision)
        object.__setattr__(self, "lens", check_lens(self.lens, self.remote))

    @property
    def slug(self) -> str:
        """A name for model and lens that is safe in a path: ``Qwen--Qwen3-4B``, ``testbed--qwen3--logit-lens``."""
        return slug_of(self.model, self.revision, self.lens_name)

    def settings(self) -> dict[str, Any]:
        """The fields as they are stored, JSON-able, with those of ``lens_settings``."""
        # No deep copy: a function of the user's own may hold a whole network.
        return {**{each.name: getattr(self, each.name) for each in fields(self)}, **self.lens_settings()}

    def cache_key(self) -> dict[str, Any]:
        """The settings that determine the numbers together with weights and inputs, which are known by their digests.

        Returns:
            JSON-able fields without the device, the batch size, the spelling of a path and what is added; of a trained
            lens the digest of its files. The batch size is included for 8bit, whose rounding depends on it.
        """
        settings = self.settings()
        for name in ("device", "device_map", "model", "prompts", "responses", "random_baseline", *ADDITIONS):
            del settings[name]
        settings.pop("lens_path", None)
        if self.quantization != "8bit":
            del settings["batch_size"]
        return settings


def require_revision(revision: str | None) -> None:
    """Raise a `UserError` if a revision is empty."""
    if revision == "":
        raise UserError("--revision is empty; needed is a branch, tag or commit on the hub, or leave it out")


def slug_of(model: str, revision: str | None = None, lens: str = DEFAULT_LENS) -> str:
    """A path-safe name of a model, and of a lens other than the default: ``Qwen--Qwen3-4B``, ``model--logit-lens``."""
    path = Path(model)
    parts = _last_parts(path.resolve()) if path.exists() else tuple(model.split("/"))
    name = "--".join(p for p in parts if p not in {"/", ""})
    name += f"@{revision}" if revision else ""
    name += f"--{lens}" if lens != DEFAULT_LENS else ""
    return "".join(c if c.isalnum() or c in "-_.@" else "-" for c in name)


def _last_parts(path: Path) -> tuple[str, ...]:
    """As many last parts of a directory's path as name it: ``checkpoints/checkpoint-5`` is in every run."""
    return path.parts[-3:] if path.parent.name == "checkpoints" else path.parts[-2:]
