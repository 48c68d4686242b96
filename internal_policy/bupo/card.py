"""The model card of a trained model: README.md beside its weights, as the hub shows it.

It says what was done and measured, and nothing else: not where on a machine or in a network things lay. Whatever comes
from a user or a model is written as text, never as markup; the metadata is YAML that ``huggingface_hub`` writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from internal_policy.bupo import places
from internal_policy.bupo.presets import ALIGNMENT
from internal_policy.bupo.results import EVALUATIONS, Run
from internal_policy.utils.citation import bibtex
from internal_policy.utils.console import number, percent_span
from internal_policy.utils.errors import UserError, counted
from internal_policy.utils.io import write_text

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

    from internal_policy.evaluation import Evaluation

CARD = "README.md"
BEGIN, END = "<!-- internal_policy: begin -->", "<!-- internal_policy: end -->"
"""What stands between the two is written anew when the model is pushed; the rest of a card is the user's own."""
_METHODS = {
    "bupo": "Bottom-up Policy Optimization (BuPO, [arXiv 2512.19673](https://arxiv.org/abs/2512.19673))",
    "grpo": "Group Relative Policy Optimization (GRPO)",
    "rloo": "REINFORCE Leave-One-Out (RLOO)",
    "reinforce++": "REINFORCE++",
}
_MOST_STEPS = 12
_TRLS_BATCH = ("gradient_accumulation_steps", "steps_per_generation", "generation_batch_size")
_PAPERS_PROMPTS = "zwhe99/DeepMath-103K"


def write_card(run: Run, repo_id: str | None = None) -> Path:
    """Write the card into the model's directory, or write anew what an earlier one has of the run.

    Args:
        run: the run; its model is on disk.
        repo_id: where the model is pushed to.

    Returns:
        The file.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = run.model_dir / CARD
    text, before = f"{BEGIN}\n{body(run, repo_id)}\n{END}", ""
    data: Any = metadata(run)
    if path.is_file():
        try:
            kept: Any = ModelCard(path.read_text(encoding="utf-8"))
        # Of the hub's client or of its YAML parser; a card that was changed by hand may hold anything.
        except Exception as error:
            told = " ".join(str(error).split())[:200]
            raise UserError(f"{path}: its metadata cannot be read ({told}); mend it, or delete the file") from error
        # Where the training ran a name could be told from a directory's, and a licence is the user's to add.
        if known := kept.data.to_dict():
            data = ModelCardData(**known)
        before = kept.text
    if BEGIN in before and END in before:
        text = before[: before.index(BEGIN)] + text + before[before.rindex(END) + len(END) :]
    elif before.strip():
        # A card without the marks was written by hand.
        text = before
    write_text(path, f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n")
    return path


def metadata(run: Run) -> ModelCardData:
    """What the hub reads of a card.

    Args:
        run: the run.

    Returns:
        The licence is unknown unless the model is an embedded one; the base model is named where it is on the hub.
    """
    from huggingface_hub import ModelCardData

    embedded = run.name.startswith("testbed/")
    return ModelCardData(
        license="mit" if embedded else "unknown",
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=run.name if _is_from_the_hub(run, "model") else None,
        datasets=[_prompts(run)] if _is_from_the_hub(run, "prompts") else None,
        tags=["internal_policy", run.method, "reinforcement-learning", "arxiv:2512.19673"],
    )


def body(run: Run, repo_id: str | None = None) -> str:
    """What a reader reads of a card.

    Args:
        run: the run.
        repo_id: where the model is pushed to; without it the card shows no way to load it from there.

    Returns:
        Markdown.
    """
    parts = [
        f"# {code(_name(run))} after {prose(run.label)}",
        _method(run),
        _data(run),
        _evaluation(run),
        _curves(run),
        _settings(run),
        *([_loading(repo_id)] if repo_id else []),
        _limits(run),
        f"## Versions\n\n{_table(('library', 'version'), [(code(k), code(v)) for k, v in run.versions.items()])}",
        f"## How to cite\n\n```bibtex\n{bibtex()}\n```",
    ]
    return "\n\n".join(parts)


def code(value: Any) -> str:
    """Write a value as code, where Markdown has no markup and HTML no tags.

    Args:
        value: any.

    Returns:
        One line; also in a table.
    """
    text = " ".join(str(value).split()).replace("|", "¦")
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{space}{text}{space}{fence}"


def prose(value: Any) -> str:
    """Write a text so that no character of it is markup.

    Args:
        value: any.

    Returns:
        One line.
    """
    return re.sub(r"([\\`*_\[\]<>|~&$#!])", r"\\\1", " ".join(str(value).split()))


def _method(run: Run) -> str:
    steps = len(run.history)
    told = [f"The start is {code(_name(run))}; it was trained with {_METHODS[run.method]} for {_count(steps, 'step')}"]
    if (updates := _updates(run)) is not None:
        told[0] += f", which are {_count(updates, 'update')}"
    told[0] += f", by `internal_policy` {prose(run.versions.get('internal-policy', ''))} and TRL."
    told.append("A step is one batch of rollouts with all updates on it.")
    aligned = 0 if run.history.empty else int((run.history["phase"] == ALIGNMENT).sum())
    if run.layer is not None and aligned:
        site = str(run.config["trainer"].get("site", "layer"))
        whose = {"layer": "", "attn": " (of what its attention writes)", "ffn": " (of what its FFN writes)"}[site]
        then = ", then the model's own" if aligned < steps else "; the model's own was not optimised after it"
        told.append(
            f"\n\nFor {_count(aligned, 'step')} the policy of layer {run.layer}{whose}, counted from 1, was "
            f"optimised first{then}. Why this layer: {prose(run.layer_reason) or 'not told'}. Why the "
            f"first phase ended there: {prose(run.ipa_reason) or 'not told'}."
        )
    return "## Method\n\n" + " ".join(told).replace(" \n\n", "\n\n")


def _data(run: Run) -> str:
    rewards = ", ".join(map(code, run.config["rewards"]))
    prompts = places.named(_prompts(run), _is_from_the_hub(run, "prompts"))
    return (
        f"## Data\n\nPrompts: {code(prompts)} (digest {code(run.config['prompts'])}). Reward: {rewards}. "
        f"Template: {code(run.config['plan'].get('template'))}."
    )


def _evaluation(run: Run) -> str:
    start, trained = run.evaluation_start, run.evaluation
    if start is None or trained is None:
        return (
            "## Evaluation\n\nThe training evaluated neither its start nor its result; evaluations that were made "
            "apart from it are not known here."
        )
    from internal_policy.evaluation import compare

    change = compare(trained, start)
    rows = []
    for name, found in (("start", start), ("trained", trained)):
        rows.append((name, f"Avg@{found.n_samples}", *_rates(found.avg["mean"], found.avg["low"], found.avg["high"])))
        for row in found.pass_at_k.to_dict("records"):
            rows.append((name, f"Pass@{row['k']}", *_rates(row["value"], row["low"], row["high"])))
    rows.append(("difference", "Avg@K", *_rates(change.difference, change.low, change.high, "+")))
    return (
        f"## Evaluation\n\n{code(trained.benchmark)}: {counted(trained.n_problems, 'problem')}, "
        f"{counted(trained.n_samples, 'sample')} of "
        "each; percent, with 95% intervals over problems; the difference is paired by problem "
        f"(p {change.p_permutation:.2g}, sign flips).\n\n" + _table(("model", "measure", "%", "95% interval"), rows)
    )


def _curves(run: Run) -> str:
    if run.history.empty:
        return "## Training curves\n\nNo steps were recorded."
    places = np.unique(np.linspace(0, len(run.history) - 1, min(len(run.history), _MOST_STEPS)).round().astype(int))
    columns = {"reward": ".3f", "policy_entropy": ".3f", "length": ".1f"}
    rows = [
        (
            str(int(row["step"])),
            "alignment" if row["phase"] == ALIGNMENT else prose(row["phase"]),
            *(number(row.get(name), form) for name, form in columns.items()),
        )
        for row in run.history.iloc[places].to_dict("records")
    ]
    head = ("step", "phase", "reward", "policy entropy, nats", "response length, tokens")
    return f"## Training curves\n\n{len(rows)} of {_count(len(run.history), 'step')}.\n\n{_table(head, rows)}"


def _settings(run: Run) -> str:
    plain = {**run.config["plan"], **run.config["trainer"]}
    if adapters := run.config.get("peft"):
        plain["peft"] = re.sub(r"base_model_name_or_path='[^']*'(, )?", "", adapters)
    shown = {name: value for name, value in plain.items() if value is not None and not places.tells(name, value)}
    rows = [(code(name), code(value)) for name, value in sorted(shown.items())]
    return f"## Settings\n\n{_table(('setting', 'value'), rows)}"


def _loading(repo_id: str) -> str:
    name = repr(" ".join(repo_id.split()))
    return (
        "## How to load\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({name})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name})\n```"
    )


def _limits(run: Run) -> str:
    told = [
        "This is one run with one seed: the intervals are over problems and say nothing about how far another seed "
        "would have come.",
        "Only what stands above was measured; safety, other languages and other tasks were not.",
    ]
    if failed := ", ".join(f"{n} {prose(kind)}" for kind, n in run.failures.items() if n):
        told.append(f"The reward failed on some responses, which count as 0: {failed}.")
    if run.name.startswith("testbed/"):
        told.append("The start is an embedded model for trials; what is found on it says little about large models.")
    else:
        told.append("The licence of the start holds for what was made of it; it was not looked up here.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in told)


def _name(run: Run) -> str:
    return places.named(run.name, _is_from_the_hub(run, "model"))


def _prompts(run: Run) -> str:
    """Where the prompts came from, as the call said it."""
    call: Mapping[str, Any] = run.call or {}
    given = call.get("words", {}).get("prompts")
    if given is not None:
        return str(given)
    if "prompts" in call.get("objects", ()):
        return "given in memory"
    if not call:
        return "not recorded"
    return "testbed" if run.name.startswith("testbed/") else _PAPERS_PROMPTS


def _is_from_the_hub(run: Run, what: str) -> bool | None:
    """Whether the model or the prompts were taken from the hub; None where the run does not say."""
    call: Mapping[str, Any] = run.call or {}
    if "from_hub" not in call:
        return None
    by_default = what == "prompts" and what not in call["words"] and _prompts(run) == _PAPERS_PROMPTS
    return by_default or what in call["from_hub"]


def _updates(run: Run) -> int | None:
    """How often the weights were updated; None where TRL's own words settled it."""
    trainer, plan = run.config["trainer"], run.config["plan"]
    if any(name in trainer for name in _TRLS_BATCH):
        return None
    return len(run.history) * int(plan["mini_batches"]) * int(trainer.get("num_iterations") or 1)


def _rates(value: float, low: float, high: float, sign: str = "") -> tuple[str, str]:
    return f"{100 * value:{sign}.2f}", percent_span(low, high, sign)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def attach_evaluations(run: Run, start: Evaluation, trained: Evaluation) -> Run:
    """Add evaluations that were made apart from the training, so that the run's report and model card have them.

    Args:
        run: the run.
        start: of the model as it was given.
        trained: of the trained model, on the same problems.

    Returns:
        The run, whose directory holds copies of both.
    """
    paths = {"start": f"{EVALUATIONS}/start", "trained": f"{EVALUATIONS}/trained"}
    for which, evaluation in (("start", start), ("trained", trained)):
        evaluation.save(run.path / paths[which])
    evaluated = replace(run, evaluation_paths=paths)
    evaluated.save()
    write_card(evaluated)
    return evaluated
