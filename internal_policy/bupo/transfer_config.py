"""The settings of ``bupo.transfer``: its keywords, the options of ``internal-policy transfer``, and what is stored."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from internal_policy.analysis.config import ModelOptions, SamplingOptions, require_revision, slug_of
from internal_policy.bupo.config import VERIFIERS
from internal_policy.utils.errors import UserError
from internal_policy.utils.options import Numbers, check_options, option, parse_numbers, write_numbers


@dataclass(frozen=True)
class TransferConfig(SamplingOptions, ModelOptions):
    """What to measure and how. Every field is an option of ``internal-policy transfer``."""

    prompts: str | None = None
    """Hub data set id, or a parquet, jsonl or json file, with answers. Default: zwhe99/DeepMath-103K (the paper's), or
    problems of the embedded tasks for an embedded model."""
    prompts_split: str | None = None
    """Split of a hub data set. Default: train if there is one, or the first."""
    max_prompts: int = option(128, least=2)
    """Largest number of prompts, from the first."""
    num_generations: int = option(8, least=2)
    """Responses sampled for each prompt, whose rewards are compared with each other."""
    layers: Numbers = "all"
    """all, or layers from 1 and ranges of them, such as 2,4,6-8."""
    batch_size: int = option(16, least=1)
    """Sequences in a batch."""
    reward: str | None = option(None, completions=VERIFIERS)
    """What scores a response: math, exact or module:function. Default: math, or exact for the embedded tasks."""
    temperature: float = 1.0
    """Sampling temperature, which also divides the logits of all policies, as in training."""

    def __post_init__(self) -> None:
        """Check the fields; a `UserError` states a bad value and the rule."""
        object.__setattr__(self, "layers", write_numbers(parse_numbers("--layers", self.layers)))
        check_options(self)
        require_revision(self.revision)
        if not self.temperature > 0:
            raise UserError(
                f"--temperature is {self.temperature}; needed is a number above 0: the most probable tokens alone have "
                "equal rewards, and so no gradient"
            )

    @property
    def slug(self) -> str:
        """Where the result is written, below the output directory."""
        return slug_of(self.model, self.revision)

    def cache_key(self) -> dict[str, Any]:
        """The settings that determine the numbers; weights and prompts are known by their digests."""
        settings = asdict(self)
        for name in ("batch_size", "device", "model", "prompts", "max_prompts", "layers"):
            del settings[name]
        return settings
