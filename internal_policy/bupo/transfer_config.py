"""The settings of ``bupo.transfer``: its keywords, the options of ``internal-policy transfer``, and what is stored."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from internal_policy.analysis.config import ModelOptions, SamplingOptions, require_revision, slug_of
from internal_policy.bupo.config import VERIFIERS
from internal_policy.utils.errors import UserError
from internal_policy.utils.options import check_options, option, parse_numbers, require_whole_number

ALL = "all"


@dataclass(frozen=True)
class TransferConfig(SamplingOptions, ModelOptions):
    """What to measure and how. Every field is an option of ``internal-policy transfer``."""

    prompts: str | None = None
    """Hub data set id, or a parquet, jsonl or json file, with answers. Default: zwhe99/DeepMath-103K (the paper's), or
    problems of the embedded tasks for an embedded model."""
    prompts_split: str | None = None
    """Split of a hub data set. Default: test if there is one, or the first."""
    max_prompts: int = option(128, least=2)
    """Largest number of prompts, from the first."""
    num_generations: int = option(8, least=2)
    """Responses sampled for each prompt, whose rewards are compared with each other."""
    layers: str = ALL
    """all, or layers from 1 and ranges of them, such as 2,4,6-8."""
    batch_size: int = option(16, least=1)
    """Sequences in a batch."""
    reward: str | None = option(None, completions=VERIFIERS)
    """What scores a response: math, exact or module:function. Default: math, or exact for the embedded tasks."""
    temperature: float = 1.0
    """Sampling temperature, which also divides the logits of all policies, as in training."""

    def __post_init__(self) -> None:
        """Check the fields; a `UserError` states a bad value and the rule."""
        given: Any = self.layers
        if not isinstance(given, str):
            numbers = [given] if hasattr(given, "__index__") else list(given)
            listed = ",".join(str(require_whole_number("--layers", each)) for each in numbers)
            object.__setattr__(self, "layers", listed)
        check_options(self)
        require_revision(self.revision)
        if not self.temperature > 0:
            raise UserError(
                f"--temperature is {self.temperature}; needed is a number above 0: the most probable tokens alone have "
                "equal rewards, and so no gradient"
            )
        if self.layers != ALL:
            # Whether the model has them is known when it is loaded.
            parse_layers(self.layers)

    @property
    def slug(self) -> str:
        """Where the result is written, below the output directory."""
        return slug_of(self.model, self.revision)

    def chosen_layers(self, n_layers: int) -> list[int]:
        """Read the layers, ascending.

        Args:
            n_layers: L.

        Returns:
            Layers from 1.

        Raises:
            UserError: no such layer, or a text that names none.
        """
        return parse_layers(self.layers, n_layers)

    def cache_key(self) -> dict[str, Any]:
        """The settings that determine the numbers; weights and prompts are known by their digests."""
        settings = asdict(self)
        for name in ("batch_size", "device", "model", "prompts", "max_prompts", "layers"):
            del settings[name]
        return settings


def parse_layers(layers: str, n_layers: int | None = None) -> list[int]:
    """Read layers such as ``2,4,6-8`` or ``all``.

    Args:
        layers: the text.
        n_layers: L; without it only the form is checked.

    Returns:
        Layers from 1, ascending, each once; none without L.

    Raises:
        UserError: a layer that does not exist, or a text that names none.
    """
    chosen = parse_numbers("--layers", layers)
    if n_layers is None:
        return []
    if chosen is None:
        return list(range(1, n_layers + 1))
    if chosen[-1] > n_layers:
        raise UserError(f"--layers is {layers!r}; needed are layers of this model, 1 to {n_layers}")
    return list(chosen)
