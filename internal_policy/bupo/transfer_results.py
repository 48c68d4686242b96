"""Which layer carries the reward: the settings and the result of ``bupo.transfer``. Nothing here needs torch.

``transfer.json`` is written last, so that a directory without it is not a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from internal_policy.analysis.config import ModelOptions, SamplingOptions, require_revision, slug_of
from internal_policy.utils.errors import UserError, counted
from internal_policy.utils.io import expanded, write_atomically
from internal_policy.utils.options import check_options, option, require_whole_number
from internal_policy.utils.result_format import ResultFormat

SCHEMA_VERSION = 1
MANIFEST = "transfer.json"
TABLE = "transfer.csv"
TRANSFER = ResultFormat("transfer", "transfers", "transfer", "measure", MANIFEST, SCHEMA_VERSION, (TABLE,))
COLUMNS = ("layer", "cosine", "stderr", "low", "high", "across", "ceiling", "own_ceiling")
ALL = "all"
_MOST_LAYERS = 100_000


@dataclass(frozen=True, kw_only=True)
class TransferOptions(SamplingOptions):
    """The settings of a measurement of transfer that apply to every model."""

    prompts: str | None = None
    """Hub data set id, or a parquet, jsonl or json file, with answers. Default: zwhe99/DeepMath-103K (the paper's), or
    problems of the embedded tasks for an embedded model."""
    prompts_split: str | None = None
    """Split of a hub data set. Default: train if there is one, or the first."""
    max_prompts: int = option(128, least=2)
    """Largest number of prompts, from the first."""
    num_generations: int = option(8, least=2)
    """Responses sampled for each prompt, whose rewards are compared with each other."""
    layers: str = ALL
    """all, or layers from 1 and ranges of them, such as 2,4,6-8."""
    batch_size: int = option(16, least=1)
    """Sequences in a batch."""
    reward: str | None = option(None, completions=("math", "exact"))
    """What scores a response: math, exact or module:function. Default: math, or exact for the embedded tasks."""
    temperature: float = 1.0
    """Sampling temperature, which also divides the logits of all policies, as in training."""

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


@dataclass(frozen=True)
class TransferConfig(TransferOptions, ModelOptions):
    """What to measure and how. Every field is an option of ``internal-policy transfer``."""

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
            parse_layers(self.layers, _MOST_LAYERS)

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


def parse_layers(layers: str, n_layers: int) -> list[int]:
    """Read layers such as ``2,4,6-8`` or ``all``.

    Args:
        layers: the text.
        n_layers: L.

    Returns:
        Layers from 1, ascending, each once.

    Raises:
        UserError: a layer that does not exist, or a text that names none.
    """
    if layers == ALL:
        return list(range(1, n_layers + 1))
    found: set[int] = set()
    for part in layers.split(","):
        first, _, last = part.strip().partition("-")
        ends = [first, last] if last else [first, first]
        if not all(end.strip().isdecimal() and end.strip().isascii() for end in ends):
            raise UserError(f"--layers is {layers!r}; needed is all, or layers from 1 such as 2,4,6-8")
        low, high = (int(end) for end in ends)
        if not 1 <= low <= high <= n_layers:
            raise UserError(f"--layers is {layers!r}; needed are layers of this model, 1 to {n_layers}")
        found.update(range(low, high + 1))
    return sorted(found)


@dataclass(frozen=True)
class Transfer:
    """How much of the gradient of GRPO the alignment of each layer's policy already follows. Layers from 1."""

    name: str
    """The model's name."""
    model: dict[str, Any]
    """id, revision, family, layers L, dtype, device."""
    config: dict[str, Any]
    """The settings, with digests of weights and prompts."""
    table: pd.DataFrame
    """A row per layer: cosine of the two gradients over the parameters that both reach, its stderr over prompts, low
    and high (95% interval); across, the mean cosine of one's gradient on one half of the prompts with the other's on
    the other half, which share no noise; ceiling, the cosine of GRPO's own gradients on the two halves, and
    own_ceiling, that of the alignment's."""
    n_prompts: int
    """Prompts."""
    n_informative: int
    """Prompts whose responses have different rewards; the others have no gradient."""
    mean_reward: float
    """Mean reward of the responses."""
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds of sampling and of the gradients."""
    versions: dict[str, str] = field(default_factory=dict)
    """Library versions."""
    path: Path | None = None
    """Its directory."""

    @property
    def n_layers(self) -> int:
        """L."""
        return int(self.model["layers"])

    @property
    def summary(self) -> str:
        """One sentence that says at which layers the two objectives agree most."""
        rows = self.table.sort_values("cosine", kind="stable").to_dict("records")
        top = rows[-1]
        return (
            f"alignment agrees most with GRPO at layer {int(top['layer'])}: cosine {top['cosine']:.2f} (95% "
            f"{top['low']:.2f} to {top['high']:.2f}); across two halves of the prompts {top['across']:.2f}, where "
            f"GRPO agrees with itself to {top['ceiling']:.2f}"
        )

    def save(self, directory: str | Path) -> Path:
        """Write the result to a directory; the manifest last.

        Args:
            directory: made if it does not exist; files of the same names are replaced.

        Returns:
            The directory.
        """
        with TRANSFER.writing(directory, self.manifest()) as target:
            write_atomically(target / TABLE, partial(self.table.to_csv, index=False))
        return target

    def manifest(self) -> dict[str, Any]:
        """Return the content of ``transfer.json``."""
        return {
            "schema_version": SCHEMA_VERSION,
            **{name: getattr(self, name) for name in ("name", "model", "config", "n_prompts", "n_informative")},
            **{name: getattr(self, name) for name in ("mean_reward", "timings", "versions")},
        }

    @classmethod
    def load(cls, directory: str | Path) -> Transfer:
        """Read a result from disk.

        Args:
            directory: of one result, or one that contains a single one.

        Returns:
            The result.

        Raises:
            UserError: none there, unfinished, broken, or written by a newer version.
        """
        source = TRANSFER.find(expanded(directory))
        with TRANSFER.reading(source) as manifest:
            table = pd.read_csv(source / TABLE)
            if lacking := [name for name in COLUMNS if name not in table]:
                raise ValueError(f"{TABLE} has no column {lacking[0]}")
            stored = ("name", "model", "config", "n_prompts", "n_informative", "mean_reward", "timings", "versions")
            return cls(table=table, path=source, **{name: manifest[name] for name in stored})

    def _repr_html_(self) -> str:
        from internal_policy.utils.console import number
        from internal_policy.utils.html import card

        rows = [
            (
                int(row["layer"]),
                number(row["cosine"], "+.3f"),
                f"{number(row['low'], '+.3f')} to {number(row['high'], '+.3f')}",
                number(row["across"], "+.3f"),
                number(row["ceiling"], "+.3f"),
            )
            for row in self.table.to_dict("records")
        ]
        facts = (
            f"{counted(self.n_prompts, 'prompt')}, {self.n_informative} with different rewards",
            f"mean reward {number(self.mean_reward, '.3f')}",
        )
        frame = pd.DataFrame(rows, columns=["layer", "cosine with GRPO", "95% interval", "across halves", "ceiling"])
        return card("Transfer", self.name, facts, frame, self.summary)

    def __repr__(self) -> str:
        return f"Transfer({self.name!r}, {counted(len(self.table), 'layer')}, {counted(self.n_prompts, 'prompt')})"


def transfer_data(results: Transfer | Sequence[Transfer]) -> pd.DataFrame:
    """Return the numbers of the figure: the table of each result, with its model."""
    given = [results] if isinstance(results, Transfer) else list(results)
    return pd.concat([result.table.assign(model=result.name) for result in given], ignore_index=True)
