"""The settings of an evaluation."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from internal_policy.analysis.config import AnalyzeConfig
from internal_policy.data import benchmarks
from internal_policy.utils.errors import UserError
from internal_policy.utils.validation import refuse_too_large

PAPER_K = (1, 4, 16, 64, 256)
"""The K of arXiv 2512.19673v3, section 5 and appendix A.5."""
_SHARED = (
    *("model", "revision", "max_new_tokens", "temperature", "template", "batch_size", "dtype", "device", "seed"),
    *("generator", "trust_remote_code"),
)


@dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate and how. Every field is an option of ``internal-policy evaluate``."""

    model: str
    """Hub id, local directory, or an embedded model (testbed/qwen3, testbed/llama)."""
    benchmark: str
    """What `benchmarks.label` calls the problems."""
    samples: int | None = None
    """Samples a problem: the paper's 16, or 32 for AIME; 1 at temperature 0."""
    max_problems: int | None = None
    """At most so many problems, from the start."""
    k: Sequence[int] | int | None = None
    """The K of Pass@K: 1, 4, 16, 64, 256 as far as there are samples, and their number."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    max_new_tokens: int | None = None
    """At most so many tokens a response: what the checkpoint's generation config says, else 1024."""
    temperature: float = 1.0
    """Sampling temperature; 0 takes the most probable token."""
    generator: str = "transformers"
    """transformers or vllm: what samples the responses; vllm must be installed and needs a GPU."""
    template: str = "chat"
    """chat, plain, qwen-math, qwen3 or octothinker."""
    batch_size: int = 64
    """Responses sampled together."""
    dtype: str = "auto"
    """auto (the checkpoint's own on cuda, float32 elsewhere), float32, bfloat16, float16."""
    device: str = "auto"
    """auto (cuda, mps, cpu) or a torch device."""
    seed: int = 0
    """Seed of the sampling."""
    reward: str | None = None
    """math, exact, module:function, or a function's name: what scores a response."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint."""

    def __post_init__(self) -> None:
        """Check each field and fill in what depends on another.

        Raises:
            UserError: a value out of range; the message states it and the rule.
        """
        shared = AnalyzeConfig(**{name: getattr(self, name) for name in _SHARED})
        for name in _SHARED:
            object.__setattr__(self, name, getattr(shared, name))
        for name in ("samples", "max_problems"):
            if getattr(self, name) is not None:
                flag = "--" + name.replace("_", "-")
                object.__setattr__(self, name, _count(flag, getattr(self, name)))
                refuse_too_large(name, getattr(self, name), flag)
        if self.samples is None:
            fitting = 1 if self.temperature == 0 else benchmarks.default_samples(self.benchmark)
            object.__setattr__(self, "samples", fitting)
        elif self.samples > 1 and self.temperature == 0:
            raise UserError(
                f"--samples is {self.samples} at --temperature 0, where all of them are equal; give --samples 1, or a "
                "temperature above 0"
            )
        object.__setattr__(self, "k", self._ks())

    def _ks(self) -> tuple[int, ...]:
        if self.k is None:
            return default_k(self.n)
        given = self.k if isinstance(self.k, Sequence) else [self.k]
        ks = tuple(sorted({_count("--k", k) for k in given}))
        if not ks or ks[-1] > self.n:
            what = f"holds {ks[-1]}" if ks else "is empty"
            raise UserError(f"--k {what} and there are {self.n} samples a problem; needed is K from 1 to {self.n}")
        return ks

    @property
    def n(self) -> int:
        """Samples a problem, whether given or the default."""
        return self.samples or 1

    @property
    def ks(self) -> tuple[int, ...]:
        """The K of Pass@K, whether given or the default."""
        assert isinstance(self.k, tuple)
        return self.k

    @property
    def slug(self) -> str:
        """Where the result is written, below the output directory: ``<model>/<benchmark>``."""
        model = AnalyzeConfig(model=self.model, revision=self.revision).slug
        return f"{model}/{benchmarks.slug(self.benchmark)}"

    def cache_key(self) -> dict[str, Any]:
        """The settings that decide which responses are sampled and how they are scored, beside weights and problems.

        Returns:
            JSON-able fields: neither where and in what portions the work is done, nor how a path was spelt, nor K,
            which is computed from what was sampled.
        """
        fields = asdict(self)
        for name in ("batch_size", "device", "model", "benchmark", "max_problems", "k"):
            del fields[name]
        return fields


def default_k(samples: int) -> tuple[int, ...]:
    """The K of the paper that so many samples allow, and their number.

    Args:
        samples: n.

    Returns:
        Ascending.
    """
    return tuple(sorted({*(k for k in PAPER_K if k <= samples), samples}))


def _count(flag: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise UserError(f"{flag} is {value!r}; needed is a whole number")
    number = operator.index(value)
    if number < 1:
        raise UserError(f"{flag} is {number}; needed is a number of at least 1")
    return number
