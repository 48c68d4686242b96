"""Load a causal language model by hub id, directory or embedded name; one clear line for what cannot be loaded."""

from __future__ import annotations

import hashlib
import inspect
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from internal_policy import testbed
from internal_policy.config import DTYPES
from internal_policy.errors import UserError
from internal_policy.memory import is_out_of_memory
from internal_policy.models.families import FAMILIES, Family
from internal_policy.models.projection import Projection
from internal_policy.models.structure import candidates

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer, its row of the family table and its projection."""

    name: str
    """What the user called it."""
    revision: str | None
    """The hub's commit, or the revision that the user named."""
    model: nn.Module
    """The transformers model, in evaluation mode."""
    tokenizer: Any
    """Its tokenizer."""
    family: Family
    """Where its parts are."""
    projection: Projection
    """E_u with the model's own transform of logits, and LN_final."""

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.model.config

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers; layer l of the paper is ``layers[l - 1]``."""
        layers: nn.ModuleList = operator.attrgetter(self.family.layers)(self.model)
        return layers

    @property
    def backbone(self) -> nn.Module:
        """The decoder without the unembedding."""
        backbone: nn.Module = operator.attrgetter(self.family.backbone)(self.model)
        return backbone

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def vocab_size(self) -> int:
        """V: rows of E_u."""
        return int(self.projection.weight.shape[0])

    @property
    def device(self) -> torch.device:
        """Where the token ids go."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.projection.weight.dtype

    @property
    def parallel(self) -> bool:
        """Whether attention and FFN of a layer both start from H^{l-1}, so that there is no H_mid."""
        return self.family.is_parallel(self.config)

    @property
    def write_multiplier(self) -> float:
        """What the model multiplies both writes by before it adds them."""
        field = self.family.write_multiplier
        return float(getattr(self.config, field)) if field else 1.0

    def forward_arguments(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        """Arguments of a forward pass of the decoder, or of the whole model, without a cache.

        Args:
            input_ids: [B, T] ids.
            attention_mask: [B, T] 1 for tokens, 0 for padding on either side.

        Returns:
            What to call the module with; positions are counted over real tokens, where the model takes positions.
        """
        mask = attention_mask.to(self.device)
        arguments = {"input_ids": input_ids.to(self.device), "attention_mask": mask, "use_cache": False}
        if "position_ids" in inspect.signature(self.backbone.forward).parameters:
            arguments["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        return arguments

    @property
    def max_length(self) -> int | None:
        """The longest sequence that the model has positions for."""
        length = getattr(self.config, "max_position_embeddings", None)
        return int(length) if length else None

    def fingerprint(self) -> str:
        """A digest of the weights: names, shapes and a sample of each tensor. It tells checkpoints apart.

        Returns:
            16 hexadecimal digits.
        """
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            flat = tensor.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 64)].to("cpu", torch.float32)
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(sample.numpy().tobytes())
        return digest.hexdigest()[:16]


def choose_device(device: str) -> torch.device:
    """Resolve ``auto`` to cuda, mps or cpu, and check that a named device is there.

    Args:
        device: ``auto`` or a torch device.

    Returns:
        The device.

    Raises:
        UserError: not a device, or not on this machine.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used here ({_first_line(error)}); use auto or cpu") from error
    return chosen


def wrap(
    model: Any, tokenizer: Any, name: str | None = None, revision: str | None = None, family: Family | None = None
) -> LanguageModel:
    """Describe a transformers model that is already in memory.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        name: what to call it; its ``name_or_path`` where not given.
        revision: the hub's commit, where known.
        family: where its parts are; its row of the table, or what its structure says, where not given.

    Returns:
        The model with its parts found. The model itself is put in evaluation mode and not changed otherwise.

    Raises:
        UserError: not a causal LM, or parts that cannot be found.
    """
    name = name or getattr(model, "name_or_path", "") or type(model).__name__
    if not hasattr(model, "config"):
        raise UserError(f"got a {type(model).__name__}; needed is a transformers causal LM, or a name")
    family = family or family_of(model, name)
    for part in (family.backbone, family.layers, family.final_norm, family.unembedding):
        try:
            operator.attrgetter(part)(model)
        except AttributeError as error:
            raise UserError(
                f"{name}: this {type(model).__name__} has no {part}; needed is a causal LM with its head, "
                "as AutoModelForCausalLM loads it"
            ) from error
    if len(operator.attrgetter(family.layers)(model)) == 0:
        raise UserError(f"{name}: this model has no layers; needed is at least one")
    return LanguageModel(name, revision, model.eval(), tokenizer, family, projection_of(model, family))


def family_of(model: Any, name: str) -> Family:
    """Find where the parts of a model are.

    Args:
        model: a transformers causal LM.
        name: its name, for the message.

    Returns:
        Its row of the table; for a model type without one, the likeliest row by its structure, marked as guessed.

    Raises:
        UserError: no row, and no structure that is known.
    """
    model_type = model.config.model_type
    family = FAMILIES.get(model_type) or next(candidates(model), None)
    if family is None:
        raise unknown_family(name, model_type, "has no parts of a decoder under names that are known")
    return family


def unknown_family(name: str, model_type: str, why: str) -> UserError:
    """Say that a model has no row and none could be found.

    Args:
        name: the model's name.
        model_type: its ``config.model_type``.
        why: what was tried.

    Returns:
        The error.
    """
    return UserError(
        f"{name}: family {model_type!r} is not in the table (internal-policy models prints it) and {why}; "
        "to add it, write one row in internal_policy/models/families.py"
    )


def projection_of(model: Any, family: Family) -> Projection:
    """Read E_u, the model's own transform of its logits and LN_final from a model as it is now.

    Args:
        model: a transformers causal LM.
        family: where its parts are.

    Returns:
        The projection.
    """
    head = operator.attrgetter(family.unembedding)(model)
    scale = 1.0
    if family.logit_scale:
        scale *= float(getattr(model.config, family.logit_scale))
    if family.logit_divisor:
        scale /= float(getattr(model.config, family.logit_divisor))
    return Projection(
        weight=head.weight.detach(),
        bias=head.bias.detach() if getattr(head, "bias", None) is not None else None,
        scale=scale,
        softcap=getattr(model.config, family.logit_softcap) if family.logit_softcap else None,
        final_norm=operator.attrgetter(family.final_norm)(model),
    )


def check(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> tuple[str, Any]:
    """Check that a name stands for a causal LM, without loading its weights.

    Args:
        name: hub id, local directory, or an embedded model.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the checkpoint.

    Returns:
        What transformers loads it from, and its configuration.

    Raises:
        UserError: what cannot be loaded, and why.
    """
    from transformers import AutoConfig

    where = _resolve(name, revision)
    with _told_in_one_line(name, "its config.json"):
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
    _refuse_other_architectures(config, name)
    return where, config


def load(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> LanguageModel:
    """Load a causal LM and its tokenizer from safetensors.

    Args:
        name: hub id, local directory, or an embedded model (``testbed/qwen3``, ``testbed/llama``).
        revision: branch, tag or commit on the hub.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: the checkpoint's own on cuda, float32 elsewhere.
        device: ``auto`` (cuda, mps, cpu) or a torch device.
        trust_remote_code: run code that comes with the checkpoint.
        attn_implementation: transformers' attention; its own choice where not given.

    Returns:
        The model on its device, in evaluation mode.

    Raises:
        UserError: what cannot be loaded, and why.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = choose_device(device)
    where, config = check(name, revision=revision, trust_remote_code=trust_remote_code)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    if dtype == "auto":
        dtype = "auto" if target.type == "cuda" else "float32"
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _told_in_one_line(name, "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    with _told_in_one_line(name, "its weights"):
        model, report = AutoModelForCausalLM.from_pretrained(
            where,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            # Shapes that differ then stand in the report, which is read here, instead of on the terminal.
            ignore_mismatched_sizes=True,
            attn_implementation=attn_implementation,
            **options,
        )
        _refuse_other_weights(report, family_of(model, name).layers, name)
        model = model.to(target)
    return wrap(model, tokenizer, name, getattr(config, "_commit_hash", None) or revision)


def _resolve(name: str, revision: str | None) -> str:
    """Turn an embedded name into its directory and check a local directory for what loading needs."""
    if name.split("/")[0] == "testbed" and not Path(name).exists():
        if revision is not None:
            raise UserError(
                f"{name}: --revision {revision} was given with an embedded model; revisions exist on the hub only"
            )
        return str(testbed.path(name))
    directory = Path(name)
    if not directory.exists():
        if directory.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise UserError(
                f"{name}: no such directory; give a directory with config.json and *.safetensors, or a hub id"
            )
        return name
    if not directory.is_dir():
        raise UserError(f"{name}: is a file; give the directory that holds config.json and *.safetensors")
    if revision is not None:
        raise UserError(
            f"{name}: --revision {revision} was given with a local directory; revisions exist on the hub only"
        )
    if not (directory / "config.json").is_file():
        raise UserError(
            f"{name}: no config.json in this directory; save the model with model.save_pretrained(directory)"
        )
    if not any((directory / f).is_file() for f in _TOKENIZER_FILES):
        raise UserError(
            f"{name}: no tokenizer in this directory; save the model's own with tokenizer.save_pretrained(directory)"
        )
    if not any(directory.glob("*.safetensors")):
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        if pickles:
            raise UserError(
                f"{name}: weights in pickle format only ({pickles[0]}); pickle can run code, so only safetensors is "
                "read. Convert with model.save_pretrained(directory)"
            )
        raise UserError(
            f"{name}: no weights (*.safetensors) in this directory; save them with model.save_pretrained(directory)"
        )
    return str(directory)


def _refuse_other_weights(report: Any, layers: str, name: str) -> None:
    """Refuse a checkpoint that does not fill the model: what is missing would be random, and look like a result."""
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    # Some checkpoints carry buffers that are computed anew; a whole layer too many is another matter.
    left_over = [k for k in unexpected if k.startswith(layers) and k.endswith(".weight")]
    for what, keys in (
        ("lacks", missing),
        ("has another shape for", sorted(str(key[0]) for key in report["mismatched_keys"])),
        ("has weights that config.json leaves no room for:", left_over),
    ):
        if keys:
            raise UserError(
                f"{name}: the checkpoint {what} {keys[0]}{f' and {len(keys) - 1} more' if len(keys) > 1 else ''}; "
                "give a checkpoint whose config.json and weights belong together"
            )


def _refuse_other_architectures(config: Any, name: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name}: {config.model_type} is an encoder-decoder model; needed is a decoder-only causal LM")
    architectures = getattr(config, "architectures", None) or []
    causal = [a for a in architectures if a.endswith(("ForCausalLM", "LMHeadModel"))]
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (architectures and not causal):
        what = architectures[0] if architectures else config.model_type
        raise UserError(
            f"{name}: {what} is not a causal LM (encoder-only or another task); needed is a decoder-only causal LM"
        )


@contextmanager
def _told_in_one_line(name: str, what: str) -> Iterator[None]:
    """Turn what transformers and the hub raise on a bad name, file or network into one line."""
    from huggingface_hub import errors as hub
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError(f"{name}: broken safetensors file ({_first_line(error)}); download or save it again") from error
    except (
        *(OSError, ValueError, KeyError, ImportError, TypeError, RuntimeError, MemoryError),
        *(hub.HfHubHTTPError, hub.StrictDataclassError),
    ) as error:
        if is_out_of_memory(error):
            raise UserError(f"{name}: out of memory on {what}; use --dtype bfloat16 or a smaller model") from error
        raise UserError(f"{name}: cannot load {what}: {_explain(name, error)}") from error


def _explain(name: str, error: BaseException) -> str:
    text = " ".join(str(error).split())[:200] or type(error).__name__
    if Path(name).exists():
        return f"{text.rstrip('.:')}; mend this directory, or give another"
    lowered = str(error).lower()
    if "safetensors" in lowered and ("does not appear to have" in lowered or "no file named" in lowered):
        return "the repository has no safetensors weights (pickle only?); only safetensors is read"
    if any(sign in lowered for sign in ("gated repo", "401 client error", "403 client error")):
        return "access is restricted; log in with `hf auth login` and accept the model's terms on the hub"
    if "trust_remote_code" in lowered:
        return "it needs code from its repository; read that code, then pass --trust-remote-code"
    return f"no such model on the hub, or no network ({text.rstrip('.')}); check the name, or give a local directory"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
