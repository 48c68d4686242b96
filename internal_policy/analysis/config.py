"""The settings of an analysis."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from internal_policy.data.prompts import TEMPLATES
from internal_policy.models.options import DEFAULT_LENS, DTYPES, Lens, check_device_map, check_quantization
from internal_policy.utils.errors import UserError
from internal_policy.utils.validation import refuse_too_large, require_one_of

BACKENDS = ("hooks", "transformer-lens", "nnsight")
GENERATORS = ("transformers", "vllm")
DEFAULT_RESPONSES = 256

_INTEGERS = ("max_responses", "samples_per_prompt", "max_new_tokens", "batch_size", "seed", "keep_tokens")
_ONE_OF = {
    "lens": get_args(Lens),
    "template": TEMPLATES,
    "dtype": DTYPES,
    "backend": BACKENDS,
    "generator": GENERATORS,
}


@dataclass(frozen=True)
class AnalyzeConfig:
    """What to analyse and how. Every field is an option of ``internal-policy analyze``."""

    model: str = "testbed/qwen3"
    """Hub id, local directory, or an embedded model (testbed/qwen3, testbed/llama)."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    prompts: str | None = None
    """Hub data set id, or a parquet, jsonl or json file; MATH-500, or the built-in tasks for an embedded model."""
    prompts_split: str | None = None
    """Split of a hub data set: test where there is one, else the first."""
    responses: str | None = None
    """Ready responses (jsonl, json, parquet) instead of prompts."""
    max_responses: int | None = None
    """Analyse at most so many responses: 256 when they are sampled, all when they are given."""
    samples_per_prompt: int = 1
    """Responses sampled for each prompt."""
    max_new_tokens: int | None = None
    """At most so many tokens a response: what the checkpoint's generation config says, else 1024."""
    temperature: float = 1.0
    """Sampling temperature; 0 takes the most probable token. The entropies are always those of temperature 1."""
    template: str = "chat"
    """chat (the tokenizer's own; plain text where it has none), plain, qwen-math, qwen3 (non-thinking), octothinker."""
    generator: str = "transformers"
    """transformers or vllm: what samples the responses; vllm must be installed and needs a GPU."""
    lens: Lens = DEFAULT_LENS
    """policy (no final norm, as the paper) or logit-lens (the final norm before the unembedding)."""
    backend: str = "hooks"
    """hooks, transformer-lens or nnsight: what captures the states. They agree to float32 rounding."""
    remote: bool | str = False
    """Run the model on NDIF through nnsight, with the key in NDIF_API_KEY; in Python also a host's address, or "local",
    which does here what NDIF would do there."""
    batch_size: int = 16
    """Sequences run together. It does not change the result, but for 8bit weights, which round by the batch."""
    dtype: str = "auto"
    """auto (the checkpoint's own on cuda, float32 elsewhere), float32, bfloat16, float16."""
    device: str = "auto"
    """auto (cuda, mps, cpu) or a torch device."""
    device_map: str | None = None
    """Share the layers out among several devices: auto, balanced, balanced_low_0 or sequential, as accelerate does."""
    quantization: str | None = None
    """8bit or 4bit: quantise the layers' weights while loading, by bitsandbytes."""
    seed: int = 0
    """Seed of the sampling, of the bootstrap and of the chosen positions."""
    keep_tokens: int = 8
    """Keep the values of every analysed token for the first so many responses."""
    tolerance: float | None = None
    """Analyse positions chosen at random until every entropy change is known to so many nats either way (95%), not all;
    see ``docs/tolerance.md``."""
    random_baseline: bool = False
    """Analyse the same responses also with random weights of the same architecture, drawn by the seed."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint."""

    def __post_init__(self) -> None:
        """Check each field by itself.

        Raises:
            UserError: a value out of range; the message states it and the rule.
        """
        for field in _INTEGERS:
            object.__setattr__(self, field, _integer(field, getattr(self, field)))
        object.__setattr__(self, "temperature", _number("temperature", self.temperature))
        if self.tolerance is not None:
            object.__setattr__(self, "tolerance", _number("tolerance", self.tolerance))
            if not 0 < self.tolerance < float("inf"):
                raise UserError(
                    f"--tolerance is {self.tolerance}; needed is a number of nats above 0, such as 0.02, or nothing to "
                    "analyse every position"
                )
        for field, choices in _ONE_OF.items():
            require_one_of(_flag(field), getattr(self, field), choices)
        if self.revision == "":
            raise UserError("--revision is empty; needed is a branch, tag or commit on the hub, or leave it out")
        for field, low in (
            ("max_responses", 1),
            ("samples_per_prompt", 1),
            ("max_new_tokens", 1),
            ("temperature", 0),
            ("batch_size", 1),
            ("seed", 0),
            ("keep_tokens", 0),
        ):
            value = getattr(self, field)
            if value is not None and not low <= value < float("inf"):
                raise UserError(f"{_flag(field)} is {value}; needed is a number of at least {low}")
            refuse_too_large(field, value, _flag(field))
        if self.prompts is not None and self.responses is not None:
            raise UserError(
                "both --prompts and --responses were given; give prompts to sample from, or ready responses"
            )
        if self.remote and self.backend != "nnsight":
            raise UserError(f"--remote was given with --backend {self.backend}; needed is --backend nnsight")
        self._check_placement()
        for field in ("remote", "device_map", "quantization", "tolerance"):
            if self.random_baseline and getattr(self, field):
                raise UserError(
                    f"{_flag(field)} was given with --random-baseline, whose weights are made whole on one device and "
                    "analysed at every position; leave one of them out"
                )
        if self.responses is not None:
            for field in ("prompts_split", "samples_per_prompt", "max_new_tokens", "temperature", "generator"):
                if getattr(self, field) != type(self).__dataclass_fields__[field].default:
                    raise UserError(
                        f"{_flag(field)} was given with --responses, from which nothing is sampled; leave it out"
                    )

    def _check_placement(self) -> None:
        for field in ("remote", "device_map", "quantization"):
            if self.generator == "vllm" and getattr(self, field):
                raise UserError(
                    f"{_flag(field)} was given with --generator vllm, which loads the weights itself, whole and on one "
                    "GPU; leave one of them out"
                )
        check_device_map(self.device_map, self.device)
        check_quantization(self.quantization)
        for field in ("device_map", "quantization"):
            if getattr(self, field) is not None and self.backend != "hooks":
                raise UserError(
                    f"{_flag(field)} was given with --backend {self.backend}, which knows neither several devices nor "
                    "quantised weights; leave one of them out"
                )

    @property
    def slug(self) -> str:
        """A name for model and lens that is safe in a path: ``Qwen--Qwen3-4B``, ``testbed--qwen3--logit-lens``."""
        path = Path(self.model)
        parts = _last_parts(path.resolve()) if path.exists() else tuple(self.model.split("/"))
        name = "--".join(p for p in parts if p not in {"/", ""})
        name += f"@{self.revision}" if self.revision else ""
        name += f"--{self.lens}" if self.lens != DEFAULT_LENS else ""
        return "".join(c if c.isalnum() or c in "-_.@" else "-" for c in name)

    def cache_key(self) -> dict[str, Any]:
        """The settings that decide the numbers beside weights and inputs, which are known by their digests.

        Returns:
            JSON-able fields: neither where and in what portions the work is done, nor how a path was spelt, nor
            whether a baseline is added. The portions count for 8bit, whose rounding depends on them.
        """
        fields = asdict(self)
        for name in ("device", "device_map", "model", "prompts", "responses", "random_baseline"):
            del fields[name]
        if self.quantization != "8bit":
            del fields["batch_size"]
        return fields


def refuse_unknown(options: Iterable[str]) -> None:
    """Refuse options that are no setting of an analysis.

    Args:
        options: their names.

    Raises:
        UserError: one is unknown; the message lists the known ones.
    """
    known = {field.name for field in fields(AnalyzeConfig)}
    if unknown := sorted(set(options) - known):
        raise UserError(f"unknown option {unknown[0]!r}; known: {', '.join(sorted(known))}")


def _last_parts(path: Path) -> tuple[str, ...]:
    """As many last parts of a directory's path as name it: ``checkpoints/checkpoint-5`` is in every run."""
    return path.parts[-3:] if path.parent.name == "checkpoints" else path.parts[-2:]


def _integer(field: str, value: Any) -> int | None:
    if value is None and field in ("max_responses", "max_new_tokens"):
        return None
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise UserError(f"{_flag(field)} is {value!r}; needed is a whole number")
    return operator.index(value)


def _number(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UserError(f"{_flag(field)} is {value!r}; needed is a number")
    return float(value)


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")
