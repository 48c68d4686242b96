"""``bupo.train``: what the user said, brought into one session."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from internal_policy.analysis.inputs import Source
from internal_policy.analysis.options import showing
from internal_policy.analysis.results import Analysis
from internal_policy.bupo import plan as planning
from internal_policy.bupo.call import call_of, digest
from internal_policy.bupo.config import BuPOConfig
from internal_policy.bupo.presets import AUTO, DATA
from internal_policy.bupo.results import Run
from internal_policy.bupo.session import Session
from internal_policy.models import LanguageModel, exclusive_use, without_autocast, wrap
from internal_policy.utils.errors import UserError
from internal_policy.utils.io import expanded
from internal_policy.utils.quiet import quiet_libraries
from internal_policy.utils.shell import is_number


@quiet_libraries()
@showing(planning.Plan, BuPOConfig)
@without_autocast()
@torch.inference_mode(False)
@torch.enable_grad()
def train(
    model: Any = "testbed/qwen3",
    prompts: Source | None = None,
    *,
    layer: int | str | Path | Analysis | None = None,
    ipa_steps: int | str | None = None,
    method: str | None = None,
    reward: Any = None,
    max_steps: int | None = None,
    output: str | Path | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    wait: bool = False,
    peft_config: Any = None,
    callbacks: list[Any] | None = None,
    **options: Any,
) -> Run:
    r"""Train a language model with BuPO, GRPO, RLOO or REINFORCE++.

    A step is one batch of rollouts with all its updates, as in the paper; all ``*_steps`` here count steps. Options
    that are not given are those of the preset, and where it says nothing the defaults here.

    Args:
        model: hub id, local directory, embedded model (``testbed/qwen3``, ``testbed/llama``), or a transformers model,
            which is then trained in place.
        prompts: hub data set id, parquet, jsonl or json file, or a list or DataFrame of {"prompt", "answer"}. By
            default fresh problems of the embedded tasks for an embedded model, else zwhe99/DeepMath-103K (the paper's).
        layer: the layer whose policy is optimised first, from 1; or an ``Analysis`` or its directory, whose boundary
            layer is taken; or ``auto`` (the default): the model's own responses to the prompts are analysed first.
        ipa_steps: steps of that first phase (s_inter), or ``auto``: until its own dynamics turn. By default the
            preset's share of the run: a tenth for the paper's.
        method: ``bupo`` (the default), ``grpo``, ``rloo`` or ``reinforce++``.
        reward: ``math`` (math-verify on the last ``\boxed{}``; the default), ``exact`` (the default for the embedded
            tasks), ``module:function``, or a callable or list of callables in TRL's form.
        max_steps: steps in all.
        output: directory of the run, ``data/runs/<model>--<method>...`` by default; an interrupted run is taken up.
        tokenizer: the tokenizer of a model given as an object.
        overwrite: start over where the directory holds another run.
        wait: where another process writes there, start when it has ended.
        peft_config: a peft configuration; ``lora_rank`` is the short way.
        callbacks: further transformers callbacks.
        **options: the fields of ``Plan`` and ``BuPOConfig``, and every other option of ``trl.GRPOConfig``, such as
            ``learning_rate``, ``num_generations`` (responses to a prompt), ``max_completion_length`` (their tokens),
            ``temperature``, ``save_steps`` (from checkpoint to checkpoint), ``report_to`` and ``seed`` (0).

    Returns:
        The run: ``model_dir``, ``history``, ``dynamics``, ``evaluation``.

    Raises:
        UserError: bad input; the message says what to do.
    """
    if isinstance(layer, str) and is_number(layer):
        # As on the command line: the run's directory is named by it, and its page gives it again.
        layer = int(layer)
    objects = {"tokenizer": tokenizer, "peft_config": peft_config, "callbacks": callbacks or None}
    given_words = {"model": model, "prompts": prompts, "layer": layer, "ipa_steps": ipa_steps, "method": method}
    given_words |= {"reward": reward, "max_steps": max_steps, **objects}
    name, given_model = _name_of(model, tokenizer, options)
    words = {"method": method, "ipa_steps": ipa_steps, "max_steps": max_steps}
    plan, trainer_options = planning.split(name, words, options)
    seed = trainer_options.get("seed", 0)
    trainer_options["seed"] = seed
    steps = trainer_options["ipa_steps"]
    wanted_layer = (layer if layer is not None else AUTO) if trainer_options["method"] == "bupo" and steps else layer
    directory = (
        expanded(output)
        if output is not None
        else Path(DATA) / planning.slug(name, plan.revision, trainer_options["method"], wanted_layer, steps, seed)
    )
    call = call_of({**given_words, "output": directory}, options)
    call["digest"] = digest({**given_words, "output": output, **options})
    session = Session(name, plan, trainer_options, directory, wanted_layer, call)
    with exclusive_use(None if given_model is None else given_model.model):
        return session.run(given_model, prompts, reward, overwrite, wait, peft_config, callbacks or [])


def _name_of(model: Any, tokenizer: Any, options: Mapping[str, Any]) -> tuple[str, LanguageModel | None]:
    if isinstance(model, (str, Path)):
        if tokenizer is not None:
            raise UserError(f"tokenizer= was given with the name {str(model)!r}, which brings its own; leave it out")
        return str(model), None
    if tokenizer is None:
        raise UserError("a model object was given without its tokenizer; pass tokenizer=")
    if told := sorted(options.keys() & {"revision", "dtype", "trust_remote_code", "attn_implementation"}):
        raise UserError(f"{told[0]} was given with a model object, which is taken as it is; set it when loading")
    opened = wrap(model, tokenizer)
    return opened.name, opened
