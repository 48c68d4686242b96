"""A trained model on the hub: its model card, the upload, and one-line errors for what the hub refuses.

The card, README.md in the directory of the weights, describes the training and its measurements. It is public: it shows
only the settings that are listed here, and only the last part of a path. Text from a user or a model is escaped, so
that it is never markup; the metadata is YAML that ``huggingface_hub`` writes.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from internal_policy.bupo.config import ALIGNMENT, PAPER_PROMPTS, PPO_OPTIONS, TRL_BATCH_OPTIONS
from internal_policy.bupo.run import EVALUATIONS, MANIFEST, Run
from internal_policy.utils.citation import bibtex
from internal_policy.utils.console import number, percent_span
from internal_policy.utils.errors import UserError, counted, is_http_error, shorten
from internal_policy.utils.io import write_text
from internal_policy.utils.logging import status

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

    from internal_policy.evaluation import Evaluation

CARD = "README.md"
BEGIN, END = "<!-- internal_policy: begin -->", "<!-- internal_policy: end -->"
"""The text between the two is replaced when the model is pushed; the rest of a card belongs to the user."""
UPLOADED = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", CARD),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja"),
    *("spiece.model", "sentencepiece*.model", "*.tiktoken", "preprocessor_config.json", "*.py"),
)
"""The files from which transformers loads a model; optimiser states and pickled arguments are not uploaded."""
PUBLISHED_SETTINGS = (
    *("preset", "method", "ipa_steps", "max_steps", "seed", "learning_rate", "ipa_learning_rate", "prompts_per_step"),
    *PPO_OPTIONS,
    *("num_generations", "mini_batches", "max_completion_length", "max_prompt_length", "template", "temperature"),
    *("site", "lens", "aggregation", "freeze_layers", "only_layer", "upper_lr_scale", "lora_rank", "entropy_sequences"),
    *("dynamics_every", "dynamics_responses", "save_steps", "dtype", "trust_remote_code"),
    # TRL's options: numbers, switches, and names that TRL defines.
    *("adam_beta1", "adam_beta2", "adam_epsilon", "beta", "bf16", "delta", "disable_dropout", "entropy_coef"),
    *("epsilon", "epsilon_high", "fp16", "gradient_checkpointing", "importance_sampling_level", "loss_type"),
    *("lr_scheduler_type", "mask_truncated_completions", "max_grad_norm", "min_p", "num_iterations", "optim"),
    *("per_device_train_batch_size", "ref_model_mixup_alpha", "ref_model_sync_steps", "repetition_penalty"),
    *("reward_weights", "router_aux_loss_coef", "scale_rewards", "sync_ref_model", "top_entropy_quantile", "top_k"),
    *("top_p", "use_vllm", "warmup_steps", "weight_decay", *TRL_BATCH_OPTIONS),
)
"""The settings that the card shows. Others may contain paths or network addresses."""
_PUBLISHED_ADAPTERS = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
_REFUSED_CARD = f"Invalid metadata in {CARD}"
"""Beginning of the hub client's message about a card's metadata, which has no exception type of its own."""
_METHODS = {
    "bupo": "Bottom-up Policy Optimization (BuPO, [arXiv 2512.19673](https://arxiv.org/abs/2512.19673))",
    "grpo": "Group Relative Policy Optimization (GRPO)",
    "rloo": "REINFORCE Leave-One-Out (RLOO)",
    "reinforce++": "REINFORCE++",
    "ppo": "Proximal Policy Optimization (PPO)",
}
_MOST_STEPS = 12
_BODY = """\
# {{ code(model) }} after {{ prose(run.label) }}

## Method

The start is {{ code(model) }}; it was trained with {{ method }} for {{ counted(steps, "step") }}
{%- if updates %}, which are {{ counted(updates, "update") }}{% endif %}, by `internal_policy` \
{{ prose(run.versions.get("internal-policy", "")) }} and TRL. A step is one batch of rollouts with all updates on it.
{% if run.layer is not none and aligned %}
For {{ counted(aligned, "step") }} the policy of layer {{ run.layer }}{{ whose }}, counted from 1, was optimised first
{%- if aligned < steps %}, then the model's own{% else %}; the model's own was not optimised after it{% endif %}. \
Why this layer: {{ prose(run.layer_reason) }}. Why the first phase ended there: {{ prose(run.ipa_reason) }}.
{% endif %}
## Data

Prompts: {{ code(prompts) }} (digest {{ code(config.prompts) }}). \
Reward: {{ config.rewards | map("code") | join(", ") }}. \
Template: {{ code(config.template) }}.

## Evaluation

{% if change is none -%}
The training evaluated neither its start nor its result; evaluations that were made apart from it are not known here.
{%- else -%}
{{ code(trained.benchmark) }}: {{ counted(trained.n_problems, "problem") }}, \
{{ counted(trained.n_samples, "sample") }} of each; \
percent, with 95% intervals over problems; the difference is paired by problem \
(p {{ "%.2g" | format(change.p_permutation) }}, sign flips).

{{ table(("model", "measure", "%", "95% interval"), rates) }}
{%- endif %}

## Training curves

{% if steps -%}
{{ curves | length }} of {{ counted(steps, "step") }}.

{{ table(("step", "phase", "reward", "policy entropy, nats", "response length, tokens"), curves) }}
{%- else -%}
No steps were recorded.
{%- endif %}

## Settings

{{ table(("setting", "value"), settings) }}

{% if repo_id -%}
## How to load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({{ repo_id }})
tokenizer = AutoTokenizer.from_pretrained({{ repo_id }})
```

{% endif -%}
## Limits

- This is one run with one seed: the intervals are over problems and say nothing about how far another seed would have \
come.
- Only the results above were measured; safety, other languages and other tasks were not.
{%- if failed %}
- The reward failed on some responses, which count as 0: {{ failed }}.
{%- endif %}
{%- if embedded %}
- The start is an embedded model for trials; what is found on it says little about large models.
{%- else %}
- The licence of the start holds for what was made of it; it was not looked up here.
{%- endif %}

## Versions

{{ table(("library", "version"), versions) }}

## How to cite

```bibtex
{{ bibtex }}
```
"""
"""The card in Markdown, as a Jinja template; ``code`` and ``prose`` escape text from a user or a model."""


def write_card(run: Run, repo_id: str | None = None) -> Path:
    """Write the card to the model's directory, or replace the run's part of an existing card; return the file."""
    from huggingface_hub import ModelCard, ModelCardData

    path = run.model_dir / CARD
    text, before = f"{BEGIN}\n{body(run, repo_id)}\n{END}", ""
    data: Any = metadata(run)
    if path.is_file():
        try:
            kept: Any = ModelCard(path.read_text(encoding="utf-8"))
        # From the hub's client or its YAML parser; a card that was edited by hand may contain anything.
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path}: its metadata cannot be read ({reason}); mend it, or delete the file") from error
        # Hub names are known only where the training ran, and the user may have added a licence.
        if known := kept.data.to_dict():
            data = ModelCardData(**known)
        before = kept.text
    if BEGIN in before and END in before:
        text = before[: before.index(BEGIN)] + text + before[before.rindex(END) + len(END) :]
    elif before.strip():
        # A card without the markers was written by hand.
        text = before
    write_text(path, f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n")
    return path


def metadata(run: Run) -> ModelCardData:
    """Return the card's metadata for the hub. The licence is known only for the embedded models, which are ours."""
    from huggingface_hub import ModelCardData

    embedded = run.name.startswith("testbed/")
    names_data = "prompts" in run.call["from_hub"] or _prompts_name(run) == PAPER_PROMPTS
    return ModelCardData(
        license="mit" if embedded else "unknown",
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=run.name if "model" in run.call["from_hub"] else None,
        datasets=[_prompts_name(run)] if names_data else None,
        tags=["internal_policy", run.method, "reinforcement-learning", "arxiv:2512.19673"],
    )


def body(run: Run, repo_id: str | None = None) -> str:
    """Return the card in Markdown; with ``repo_id`` it shows how to load the model from there."""
    from jinja2 import Environment

    start, trained, steps = run.evaluation_start, run.evaluation, len(run.history)
    change, rates = None, []
    if start is not None and trained is not None:
        from internal_policy.evaluation import compare

        change, rates = compare(trained, start), _rates(start, trained)
        rates.append(("difference", "Avg@K", *_percent(change.difference, change.low, change.high, "+")))
    environment = Environment()
    environment.filters["code"] = code
    embedded = run.name.startswith("testbed/")
    return environment.from_string(_BODY).render(
        run=run,
        config=run.config,
        model=run.name if embedded else _public_name(run.name, "model" in run.call["from_hub"]),
        prompts=_prompts_name(run),
        method=_METHODS[run.method],
        steps=steps,
        updates=_updates(run),
        aligned=int((run.history["phase"] == ALIGNMENT).sum()) if steps else 0,
        whose={"attn": " (of its attention's output)", "ffn": " (of its FFN's output)"}.get(run.config["site"], ""),
        change=change,
        trained=trained,
        rates=rates,
        curves=_curves(run.history),
        settings=_settings(run.config),
        repo_id=repr(" ".join(repo_id.split())) if repo_id else None,
        failed=", ".join(f"{n} {prose(kind)}" for kind, n in run.failures.items() if n),
        embedded=embedded,
        versions=[(code(library), code(version)) for library, version in run.versions.items()],
        bibtex=bibtex(),
        **{"code": code, "prose": prose, "table": _table, "counted": counted},
    )


def code(value: Any) -> str:
    """Format a value as a line of code, in which neither Markdown nor HTML is interpreted."""
    text = " ".join(str(value).split()).replace("|", "¦")
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{space}{text}{space}{fence}"


def prose(value: Any) -> str:
    """Escape a text as one line without markup."""
    return re.sub(r"([\\`*_\[\]<>|~&$#!])", r"\\\1", " ".join(str(value).split()))


def _rates(start: Evaluation, trained: Evaluation) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, found in (("start", start), ("trained", trained)):
        rows.append((name, f"Avg@{found.n_samples}", *_percent(found.avg["mean"], found.avg["low"], found.avg["high"])))
        for row in found.pass_at_k.to_dict("records"):
            rows.append((name, f"Pass@{row['k']}", *_percent(row["value"], row["low"], row["high"])))
    return rows


def _percent(value: float, low: float, high: float, sign: str = "") -> tuple[str, str]:
    return f"{100 * value:{sign}.2f}", percent_span(low, high, sign)


def _curves(history: pd.DataFrame) -> list[tuple[str, ...]]:
    """A few steps of the history, evenly spaced."""
    shown = np.unique(np.linspace(0, len(history) - 1, min(len(history), _MOST_STEPS)).round().astype(int))
    return [
        (
            str(int(row["step"])),
            "alignment" if row["phase"] == ALIGNMENT else prose(row["phase"]),
            *(number(row.get(name), ".3f") for name in ("reward", "policy_entropy")),
            number(row.get("length"), ".1f"),
        )
        for row in history.iloc[shown].to_dict("records")
    ]


def _settings(config: dict[str, Any]) -> list[tuple[str, str]]:
    adapters = config.get("peft") or {}
    shown = {name: config.get(name) for name in PUBLISHED_SETTINGS}
    shown |= {f"peft: {name}": adapters.get(name) for name in _PUBLISHED_ADAPTERS}
    return [(code(name), code(value)) for name, value in sorted(shown.items()) if value is not None]


def _prompts_name(run: Run) -> str:
    """Name the source of the prompts as in the call."""
    if "prompts" in run.call["objects"]:
        return "given in memory"
    if (given := run.call["options"].get("prompts")) is not None:
        return _public_name(given, "prompts" in run.call["from_hub"])
    return "testbed" if run.name.startswith("testbed/") else PAPER_PROMPTS


def _public_name(name: str, from_hub: bool) -> str:
    """Return a hub name unchanged, and only the last part of a path."""
    return name if from_hub else re.split(r"[/\\]", name.rstrip("/\\"))[-1] or "local"


def _updates(run: Run) -> int | None:
    """Return the number of updates of the weights; None if TRL's own batch options were given."""
    if run.config["mini_batches"] is None:
        return None
    return len(run.history) * int(run.config["mini_batches"]) * int(run.config.get("num_iterations") or 1)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def attach_evaluations(run: Run, start: Evaluation, trained: Evaluation) -> Run:
    """Add evaluations that were made separately from the training to the run, its report and its model card.

    Args:
        run: the run.
        start: the evaluation of the initial model.
        trained: the evaluation of the trained model, on the same problems.

    Returns:
        The run, whose directory contains copies of both.
    """
    paths = {"start": f"{EVALUATIONS}/start", "trained": f"{EVALUATIONS}/trained"}
    for which, evaluation in (("start", start), ("trained", trained)):
        evaluation.save(run.path / paths[which])
    evaluated = replace(run, evaluation_paths=paths)
    evaluated.save()
    write_card(evaluated)
    return evaluated


def push_to_hub(
    run: Run, repo_id: str, *, private: bool = False, token: str | None = None, revision: str | None = None
) -> str:
    """Upload the trained model with its card to the hub, without checkpoints and optimiser states.

    Args:
        run: the run.
        repo_id: the repository, ``name`` or ``owner/name``; created if it does not exist.
        private: whether a repository that is created is private.
        token: the hub token; by default that of ``HF_TOKEN`` or ``hf auth login``.
        revision: branch to upload to; created if it does not exist.

    Returns:
        The repository's address.

    Raises:
        UserError: the run is unfinished, its model is missing, or the hub refuses the upload or cannot be reached.
    """
    if not (run.path / MANIFEST).is_file():
        raise UserError(f"{run.path}: holds a run that has not ended (no {MANIFEST}); repeat its command, then push it")
    if not any(run.model_dir.glob("*.safetensors")):
        raise UserError(f"{run.model_dir}: holds no model (*.safetensors); train again with --overwrite, then push it")
    token = _validate_token(token)
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="internal_policy")
    with status(f"pushing {run.model_dir} to {repo_id}"):
        with _errors_in_one_line(run, repo_id, token):
            made = api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
        write_card(run, made.repo_id)
        with _errors_in_one_line(run, repo_id, token):
            if revision is not None:
                api.create_branch(made.repo_id, branch=revision, exist_ok=True)
            api.upload_folder(
                repo_id=made.repo_id,
                folder_path=run.model_dir,
                revision=revision,
                allow_patterns=list(UPLOADED),
                commit_message=f"{run.label}, {counted(len(run.history), 'step')}",
            )
    return str(made)


def _validate_token(token: str | None) -> str | None:
    """Refuse a token that is invalid in a request's header, because the client's own message would show it."""
    if token is None:
        return None
    # A token that was read from a file may end in a line break.
    token = token.strip()
    if not re.fullmatch(r"[!-~]+", token):
        what = "has characters that no token has" if token else "is empty"
        raise UserError(
            f"token= {what}; copy it again from the hub's settings, or leave it out and use `hf auth login`"
        )
    return token


@contextmanager
def _errors_in_one_line(run: Run, repo_id: str, token: str | None) -> Iterator[None]:
    """Convert errors of the hub's client to one line that never contains the token."""
    from huggingface_hub import errors as hub

    try:
        yield
    except Exception as error:
        # From the client's own checks, the threads and Rust code of its upload, and the network.
        if not isinstance(error, (hub.HfHubHTTPError, OSError, ValueError, RuntimeError)) and not is_http_error(error):
            raise
        line = _push_error_message(error, run, repo_id, _masked(str(error), token))
        chain = "".join(traceback.format_exception(error))
        # The traceback would show the cause, so the cause is dropped if it contains the token.
        raise UserError(line) from (error if _masked(chain, token) == chain else None)


def _push_error_message(error: Exception, run: Run, repo_id: str, text: str) -> str:
    from huggingface_hub import errors as hub

    if isinstance(error, hub.OfflineModeIsEnabled):
        return f"{repo_id}: cannot be pushed while HF_HUB_OFFLINE is set; unset it, and push again"
    said = shorten(text.strip().split("\n")[0]) or type(error).__name__
    if isinstance(error, hub.HFValidationError):
        return f"{repo_id}: is not a repository name ({said}); give owner/name"
    if isinstance(error, ValueError) and text.startswith(_REFUSED_CARD):
        said = shorten(" ".join(text.removeprefix(_REFUSED_CARD).split()).lstrip(".- ")) or "no reason given"
        return f"{run.model_dir / CARD}: the hub refuses its metadata ({said}); mend it, then push again"
    response = getattr(error, "response", None)
    refused = getattr(response, "status_code", None) in (401, 403) or isinstance(error, hub.LocalTokenNotFoundError)
    todo = (
        "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
        if refused
        else "check the network and the name, then push again: files that were uploaded are not sent twice"
    )
    return f"{repo_id}: cannot be pushed ({said}); {todo}"


def _masked(text: str, token: str | None) -> str:
    """Mask the given token, and anything that looks like one from the environment."""
    text = text.replace(token, "***") if token else text
    return re.sub(r"\bhf_[A-Za-z0-9]{8,}|(?<=\bBearer )[^\s'\"]+", "***", text)
