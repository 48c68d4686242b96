"""The settings of interventions; checked before a model is loaded, and before anything heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

from internal_policy.analysis.config import (
    InputOptions,
    LoadOptions,
    ModelOptions,
    PlacementOptions,
    SamplingOptions,
    require_revision,
    slug_of,
)
from internal_policy.data.prompts import Chat, content_of, whole_text
from internal_policy.models.options import check_device_map, check_quantization
from internal_policy.utils.errors import UserError
from internal_policy.utils.options import (
    Numbers,
    check_options,
    flag_of,
    listed,
    option,
    parse_numbers,
    require_one_of,
    whole_numbers,
    write_numbers,
)

Site: TypeAlias = Literal["attn", "ffn", "layer"]
"""What writes: the attention (A^l), the FFN (F^l), or the whole layer (A^l + F^l)."""
SITES: tuple[Site, ...] = get_args(Site)
How: TypeAlias = Literal["zero", "mean", "resample", "scale"]
HOWS: tuple[How, ...] = get_args(How)
Metric: TypeAlias = Literal["logit-difference", "log-prob"]
_SLUG = 40
"""Letters of a prompt in the name of a directory."""


@dataclass(frozen=True, kw_only=True)
class _Placed(PlacementOptions):
    """How a model is opened on which hooks are put."""

    @property
    def backend(self) -> str:
        """What changes the states."""
        return "hooks"

    @property
    def remote(self) -> bool:
        """Whether the model runs elsewhere."""
        return False

    @property
    def generator(self) -> str:
        """What samples responses: hooks are on the transformers model only."""
        return "transformers"


@dataclass(frozen=True, kw_only=True)
class AblateOptions(InputOptions, SamplingOptions, _Placed):
    """Which writes are changed, and on which responses."""

    layers: Numbers = "all"
    """The layers that are changed, one by one unless --together: all, or numbers and ranges such as 1,4-6."""
    sites: str | tuple[str, ...] = "attn,ffn"
    """What is changed there: attn, ffn or layer (the writes of both); several are separated by commas."""
    how: str | tuple[str, ...] = option("zero", completions=HOWS)
    """What a write is replaced by: zero, its mean over the response tokens (mean), what another response has there
    (resample), or itself times --alpha (scale); several are separated by commas."""
    alpha: float | None = None
    """The factor on a write that is scaled."""
    head: Numbers | None = None
    """Change the writes of single attention heads, one by one unless --together: all, or numbers and ranges."""
    expert: Numbers | None = None
    """Change the writes of single routed experts, one by one unless --together: all, or numbers and ranges."""
    together: bool = False
    """Change all of these at once, as one intervention."""
    samples: int | None = option(None, least=1)
    """Sample this number of responses to each prompt under every intervention, and score them."""
    reward: str | None = option(None, completions=("math", "exact"))
    """What scores these responses: math, exact or module:function. Default: math, or exact for the embedded tasks."""


@dataclass(frozen=True)
class AblateConfig(AblateOptions, ModelOptions):
    """What to change and how. Every field is an option of ``internal-policy ablate``."""

    def __post_init__(self) -> None:
        """Check the fields, and bring those with several values into one form.

        Raises:
            UserError: a value out of range, or options that contradict each other; the message states the rule.
        """
        check_options(self)
        require_revision(self.revision)
        check_device_map(self.device_map, self.device)
        check_quantization(self.quantization)
        self._check_inputs()
        for name in ("layers", "head", "expert"):
            value = getattr(self, name)
            object.__setattr__(
                self, name, None if value is None else write_numbers(parse_numbers(flag_of(name), value))
            )
        parts = self.head is not None or self.expert is not None
        if self.head is not None and self.expert is not None:
            raise UserError("both --head and --expert were given; change one kind of part at a time")
        if parts:
            own = "attn" if self.head is not None else "ffn"
            if _several(self.sites, "--sites") not in (_several(AblateOptions.sites), (own,)):
                raise UserError(
                    f"--sites {self.sites} was given with --{'head' if own == 'attn' else 'expert'}, which is a part "
                    f"of {own}; leave it out"
                )
            object.__setattr__(self, "sites", own)
        for name, known in (("sites", SITES), ("how", HOWS)):
            values = _several(getattr(self, name), flag_of(name))
            for value in values or ("",):
                require_one_of(flag_of(name), value, known)
            object.__setattr__(self, name, ",".join(values))
        hows = _several(self.how)
        if ("scale" in hows) != (self.alpha is not None):
            raise UserError(
                "--how scale needs the factor; give --alpha"
                if self.alpha is None
                else f"--alpha {self.alpha:g} was given with --how {self.how}; it is the factor of --how scale"
            )
        if self.alpha is not None and not abs(self.alpha) < float("inf"):
            raise UserError(f"--alpha is {self.alpha}; needed is a finite number")
        if self.expert is not None and (bad := next((each for each in hows if each in ("mean", "resample")), None)):
            raise UserError(
                f"--how {bad} was given with --expert; an expert writes only where the router chose it, so its write "
                "can be set to zero or scaled"
            )
        self._check_sampling(hows)

    def _check_sampling(self, hows: Sequence[str]) -> None:
        if self.samples is None:
            if self.reward is not None:
                raise UserError(f"--reward {self.reward} was given without --samples, which it scores; give both")
            return
        if self.responses is not None:
            raise UserError(
                "--samples was given with --responses, which have no reference answers; give --prompts with answers"
            )
        if "resample" in hows:
            raise UserError(
                "--samples was given with --how resample; another response's write at a token that is not sampled yet "
                "is not known: use zero, mean or scale"
            )
        if self.samples > 1 and self.temperature == 0:
            raise UserError(
                f"--samples is {self.samples} at --temperature 0, where all of them are equal; give --samples 1, or a "
                "temperature above 0"
            )

    @property
    def kinds(self) -> tuple[How, ...]:
        """The values of `how`."""
        hows: Any = _several(self.how)
        return tuple(hows)

    @property
    def chosen_sites(self) -> tuple[Site, ...]:
        """The values of `sites`."""
        sites: Any = _several(self.sites)
        return tuple(sites)

    @property
    def slug(self) -> str:
        """Where the result is written, below the output directory: ``<model>--<how>``, and the parts if any."""
        kinds = self.how if isinstance(self.how, str) else ",".join(self.how)
        name = kinds.replace(",", "-") + ("" if self.alpha is None else f"-{self.alpha:g}")
        parts = "--heads" if self.head is not None else "--experts" if self.expert is not None else ""
        return f"{slug_of(self.model, self.revision)}--{name}{parts}"

    def cache_key(self) -> dict[str, Any]:
        """The settings that determine the numbers together with weights and inputs, which are known by their digests.

        Returns:
            JSON-able fields without the device, the batch size and the spelling of a path.
        """
        settings = asdict(self)
        for name in ("device", "device_map", "model", "prompts", "responses"):
            del settings[name]
        if self.quantization != "8bit":
            del settings["batch_size"]
        return settings


@dataclass(frozen=True, kw_only=True)
class PatchOptions(LoadOptions, _Placed):
    """Two prompts of equal length, and which states of the first are put into the run on the second."""

    clean: str | Chat | tuple[int, ...]
    """The prompt whose states are put in; in Python also a chat, or token ids."""
    corrupted: str | Chat | tuple[int, ...]
    """The prompt that is run, of as many tokens."""
    prefix: str | None = None
    """A text that begins the response to both prompts, before the token that is asked for."""
    answer: str | int | None = None
    """The token to recover, as text; in Python also an id. Default: what the model finds most probable after the clean
    prompt."""
    wrong: str | int | None = None
    """The token that the answer is compared with. Default: what it finds most probable after the corrupted prompt."""
    metric: Metric = "logit-difference"
    """What is recovered at the last token: the logit of the answer less that of the wrong token, or the answer's
    log-probability (log-prob)."""
    layers: Numbers = "all"
    """The layers: all, or numbers and ranges such as 1,4-6."""
    sites: str | tuple[str, ...] = "layer,attn,ffn"
    """Which states: H^l (layer), A^l (attn) or F^l (ffn); several are separated by commas."""
    positions: Numbers = "all"
    """The tokens, from 1: all, or numbers and ranges."""
    batch_size: int = option(16, least=1)
    """Positions that are run together."""


@dataclass(frozen=True)
class PatchConfig(PatchOptions, ModelOptions):
    """What to patch. Every field is an option of ``internal-policy patch``."""

    def __post_init__(self) -> None:
        """Check the fields, and bring those with several values into one form.

        Raises:
            UserError: a value out of range; the message states the rule.
        """
        check_options(self)
        require_revision(self.revision)
        check_device_map(self.device_map, self.device)
        check_quantization(self.quantization)
        for name in ("clean", "corrupted"):
            given = getattr(self, name)
            if ids := whole_numbers(given):
                object.__setattr__(self, name, ids)
            else:
                object.__setattr__(self, name, content_of(given, flag_of(name)))
        if self.prefix is not None:
            whole_text(self.prefix, "--prefix")
        for name in ("layers", "positions"):
            object.__setattr__(self, name, write_numbers(parse_numbers(flag_of(name), getattr(self, name))))
        values = _several(self.sites, "--sites")
        for value in values or ("",):
            require_one_of("--sites", value, SITES)
        object.__setattr__(self, "sites", ",".join(values))
        if self.wrong is not None and self.metric == "log-prob":
            raise UserError(
                f"--wrong {self.wrong} was given with --metric log-prob, which compares with no other token"
            )

    @property
    def chosen_sites(self) -> tuple[Site, ...]:
        """The values of `sites`."""
        sites: Any = _several(self.sites)
        return tuple(sites)

    @property
    def slug(self) -> str:
        """Where the result is written, below the output directory: ``<model>--<first words of the clean prompt>``."""
        words = "-".join(re.findall(r"\w+", str(self.clean)))[:_SLUG].strip("-_") or "prompt"
        return f"{slug_of(self.model, self.revision)}--{words}"


def _several(value: str | Sequence[str], flag: str = "") -> tuple[str, ...]:
    """The values of an option that takes several, each once; `flag` names it in the message about another type."""
    values = value.split(",") if isinstance(value, str) else [str(each) for each in listed(flag, value)]
    return tuple(dict.fromkeys(each.strip() for each in values if each.strip()))
