"""The settings of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from internal_policy.analysis.config import BatchOptions, LensOptions, require_revision, slug_of
from internal_policy.data import benchmarks
from internal_policy.data.prompts import TESTBED
from internal_policy.models.options import DEFAULT_LENS, LENSES, LensChoice, Site, check_lens
from internal_policy.utils.errors import UserError
from internal_policy.utils.options import check_options, flag_of, option, require_at_least, require_whole_number

PAPER_K = (1, 4, 16, 64, 256)
"""The K of arXiv 2512.19673v3, section 5 and appendix A.5."""
SITE_NAMES: Mapping[str, str] = MappingProxyType({"layer": "layer", "attn": "attention", "ffn": "FFN"})
POLICY_FIELDS = ("layer", "site", "lens")
"""The settings that name an internal policy."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(BatchOptions):
    """The settings of an evaluation that apply to every model and benchmark."""

    samples: int | None = option(None, least=1)
    """Responses sampled for each problem. Default: 16, or 32 for AIME, as in the paper; 1 at temperature 0."""
    max_problems: int | None = option(None, least=1)
    """Largest number of problems, from the first. Default: all."""
    k: Sequence[int] | int | None = None
    """The K of Pass@K. Default: 1, 4, 16, 64, 256 as far as there are samples, and their number."""
    batch_size: int = option(64, least=1)
    """Responses sampled together. It does not change the result in float32."""
    reward: str | None = option(None, completions=("math", "exact"))
    """What scores a response: math, exact or module:function. Default: math, or exact for testbed."""
    site: Site = "layer"
    """With a layer: whether the policy is that of its output (layer), or of what its attention (attn) or FFN (ffn)
    writes."""
    lens: LensChoice = option(DEFAULT_LENS, completions=LENSES)
    """With a layer: policy (no final norm, as in the paper), logit-lens (the final norm before the unembedding),
    unit-norm (every state at root mean square 1), the directory of a trained lens, or in Python a function
    (layer, states) -> states."""


@dataclass(frozen=True)
class EvaluateConfig(EvaluateOptions, LensOptions):
    """What to evaluate and how. Every field is an option of ``internal-policy evaluate``."""

    benchmark: str = field(default=TESTBED, kw_only=False)
    """What `benchmarks.label` calls the problems."""
    layer: int | None = option(None, least=1)
    """Sample from the internal policy of this layer, counted from 1, with no layer above it running. Default: from the
    model's own policy."""

    def __post_init__(self) -> None:
        """Check each field and fill in what depends on another.

        Raises:
            UserError: a value out of range; the message states it and the rule.
        """
        check_options(self)
        require_revision(self.revision)
        if self.samples is None:
            fitting = 1 if self.temperature == 0 else benchmarks.default_samples(self.benchmark)
            object.__setattr__(self, "samples", fitting)
        elif self.samples > 1 and self.temperature == 0:
            raise UserError(
                f"--samples is {self.samples} at --temperature 0, where all of them are equal; give --samples 1, or a "
                "temperature above 0"
            )
        object.__setattr__(self, "k", self._ks())
        self._check_policy()

    def _check_policy(self) -> None:
        object.__setattr__(self, "lens", check_lens(self.lens))
        for name, given in (("site", self.site), ("lens", self.lens_name)):
            if self.layer is None and given != type(self).__dataclass_fields__[name].default:
                raise UserError(
                    f"{flag_of(name)} {given} was given without a layer; add --layer or --layers, or leave "
                    f"{flag_of(name)} out"
                )
        if self.layer is not None and self.generator != "transformers":
            raise UserError(
                f"--generator {self.generator} runs all layers of a model, and the policy of a layer was asked for; "
                "leave --generator out"
            )

    def _ks(self) -> tuple[int, ...]:
        if self.k is None:
            return default_k(self.n)
        given = self.k if isinstance(self.k, Sequence) else [self.k]
        ks = tuple(sorted({require_whole_number("--k", k) for k in given}))
        for k in ks:
            require_at_least("--k", k, 1)
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
        """Where the result is written, below the output directory: ``<model>/<benchmark>``.

        That of an internal policy is ``<model>/<benchmark>--layer-6``, or ``--ffn-6--logit-lens``.
        """
        whose = "" if self.layer is None else f"--{self.site}-{self.layer}"
        lens = "" if self.lens == DEFAULT_LENS else f"--{self.lens_name}"
        return f"{slug_of(self.model, self.revision)}/{benchmarks.slug(self.benchmark)}{whose}{lens}"

    @property
    def policy_label(self) -> str:
        """What is sampled from, for names in tables and figures: ``layer 6``; empty for the model's own policy."""
        if self.layer is None:
            return ""
        lens = "" if self.lens == DEFAULT_LENS else f" ({self.lens_name})"
        return f"{SITE_NAMES[self.site]} {self.layer}{lens}"

    def settings(self) -> dict[str, Any]:
        """The fields as they are stored; those of an internal policy only if there is one."""
        # No deep copy: a function of the user's own may hold a whole network.
        settings = {**{each.name: getattr(self, each.name) for each in fields(self)}, **self.lens_settings()}
        if self.layer is None:
            for name in POLICY_FIELDS:
                del settings[name]
        return settings

    def cache_key(self) -> dict[str, Any]:
        """The settings that determine which responses are sampled and how they are scored.

        Returns:
            JSON-able fields: neither where and in what portions the work is done, nor how a path was spelt, nor K,
            which is computed from what was sampled. Weights and problems are known by their digests.
        """
        settings = self.settings()
        for name in ("batch_size", "device", "model", "benchmark", "max_problems", "k"):
            del settings[name]
        settings.pop("lens_path", None)
        return settings


def default_k(samples: int) -> tuple[int, ...]:
    """Return the K of the paper that the number of samples allows, and this number, in ascending order."""
    return tuple(sorted({*(k for k in PAPER_K if k <= samples), samples}))
