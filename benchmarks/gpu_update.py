"""The parts of ``gpu_checks.py`` that train: an update of pi^l with AdamW, and whole steps of ``bupo.train``."""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

from gpu_model import PROMPT, build, responses
from gpu_recorder import GIB, Recorder

LEARNING_RATE = 1e-6


def update(record: Recorder) -> None:
    """An update of pi^l in bfloat16, weights and AdamW's moments alike, and of pi_theta.

    The forward pass ends at layer l, the head scores the response tokens without ever storing [tokens, V], and the
    optimiser steps. That is one mini-batch of a step of BuPO without its sampling. (Where trl is installed, its own
    fused head takes the place of this one on a GPU.)

    Args:
        record: of the part.
    """
    made: dict[str, Any] = {}

    def model() -> dict[str, Any]:
        made["model"] = build("bfloat16", record.device, record.quick)
        return {"parameters": made["model"].n_parameters, "dtype": "bfloat16"}

    record.step("model", model, 5.0 if record.on_gpu else 1.0)
    if "model" not in made:
        return
    n_layers = made["model"].n_layers
    # The dose of the paper's boundary layers is low; pi_theta is what they are compared with.
    for layer in (n_layers // 4, n_layers // 2, n_layers, None):
        sizes = [(8, False), (8, True), (4, True), (2, True)] if not record.quick else [(2, False), (2, True)]
        name = "pi_theta" if layer is None else f"layer {layer}"
        # Bound here, since the loop goes on before a size is tried again.
        run = _of_layer(record, made["model"], layer)
        record.largest(name, sizes, run, lambda _: 6.0 if record.on_gpu else 0.5)


def _of_layer(record: Recorder, model: Any, layer: int | None) -> Callable[[tuple[int, bool]], dict[str, Any]]:
    def run(size: tuple[int, bool]) -> dict[str, Any]:
        number, checkpointing = size
        try:
            with activations_recomputed(model.model) if checkpointing else nullcontext():
                return one_update(record, model, layer, number) | {"checkpointing": checkpointing}
        finally:
            model.model.zero_grad(set_to_none=True)

    return run


@contextmanager
def activations_recomputed(network: Any) -> Iterator[None]:
    """Compute activations again in the backward pass, inside the context."""
    with warnings.catch_warnings():
        # A later transformers has another name for it, and says so each time.
        warnings.simplefilter("ignore")
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            yield
        finally:
            network.gradient_checkpointing_disable()


def one_update(record: Recorder, model: Any, layer: int | None, number: int) -> dict[str, Any]:
    """Time updates of one policy.

    Args:
        record: of the part.
        model: the model, whose weights change.
        layer: l, from 1; None for pi_theta.
        number: sequences.

    Returns:
        Seconds and peak memory of an update, and which parameters its gradient reached.
    """
    import torch

    from internal_policy.entropy.log_probs import differentiable_log_probs
    from internal_policy.extractors.truncated import internal_forward

    length = 512 if not record.quick else 24
    network, projection = model.model, model.projection
    ids = torch.tensor([r.input_ids for r in responses(number, length, model.vocab_size)], device=record.device)
    prompt = min(PROMPT, length // 2)
    targets = ids[:, prompt:].reshape(-1)
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(number, generator=generator).to(record.device).repeat_interleave(length - prompt)
    arguments = model.forward_arguments(ids, torch.ones_like(ids))
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=record.on_gpu)
    phases: list[dict[str, float]] = []
    reached: set[str] = set()
    norms: list[float] = []

    def policy() -> AbstractContextManager[None]:
        return nullcontext() if layer is None else internal_forward(network, layer, family=model.family)

    def clock() -> float:
        record.synchronize()
        return time.perf_counter()

    def step() -> None:
        started = clock()
        with policy():
            states = model.backbone(**arguments).last_hidden_state[:, prompt - 1 : -1]
            log_probs, _ = differentiable_log_probs(
                states.reshape(-1, states.shape[-1]),
                targets,
                projection.weight,
                projection.bias,
                scale=projection.scale,
                softcap=projection.softcap,
            )
            # The ratio to the policy that sampled, which is this one at the first update of a batch of rollouts.
            loss = -((log_probs - log_probs.detach()).exp() * advantages).mean()
            forward = clock()
            loss.backward()  # type: ignore[no-untyped-call]
        backward = clock()
        if not reached:
            reached.update(name for name, p in network.named_parameters() if p.grad is not None)
            gradient = network.get_input_embeddings().weight.grad
            norms.append(float(torch.linalg.vector_norm(gradient, dtype=torch.float32)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        phases.append({"forward": forward - started, "backward": backward - forward, "optimizer": clock() - backward})

    figures: dict[str, Any] = {"sequences": number, "length": length}
    with record.peak(figures):
        times = record.seconds(step)
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    trained = sum(p.numel() for name, p in network.named_parameters() if name in reached)
    highest = max((int(n.split("layers.")[1].split(".")[0]) + 1 for n in reached if "layers." in n), default=0)
    return figures | {
        "layer": layer,
        "seconds": statistics.median(times),
        "phases": {name: statistics.median(each[name] for each in phases[-len(times) :]) for name in phases[0]},
        "repeats": len(times),
        "scored_tokens": len(targets),
        "weights_gib": round(weights / GIB, 3),
        "trained_parameters": trained,
        "highest_layer_reached": highest,
        "gradient_norm_of_embedding": norms[0],
    }


def train(record: Recorder) -> None:
    """Two whole steps of ``bupo.train``, sampling included: one of the first phase, one of the second.

    Args:
        record: of the part.
    """
    missing = [name for name in ("trl", "datasets") if find_spec(name) is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        record.skip("bupo.train", f"{' and '.join(missing)} {are} not installed here")
        return
    sizes = [(4, 64), (2, 32)] if not record.quick else [(2, 6)]
    record.largest("bupo.train", sizes, lambda size: steps(record, *size), lambda _: 40.0 if record.on_gpu else 2.0)


def steps(record: Recorder, prompts: int, tokens: int) -> dict[str, Any]:
    """Train for two steps, and keep what each took as soon as it is done: what follows the last one is only saved.

    Args:
        record: of the part.
        prompts: of a step; each has four responses.
        tokens: of a response.

    Returns:
        Seconds of each step and the peak of memory.
    """
    from transformers import TrainerCallback

    from internal_policy import bupo

    model = build("bfloat16" if record.on_gpu else "float32", record.device, record.quick)
    begun: list[float] = []
    taken: list[float] = []
    phases: list[str] = []
    figures: dict[str, Any] = {"prompts": prompts, "responses": 4 * prompts, "response_tokens": tokens}
    figures["layer"] = model.n_layers // 2

    def so_far() -> dict[str, Any]:
        return {**figures, **record.most(), "update_seconds": list(taken), "phases": list(phases)}

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Takes the time of every step."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            record.synchronize()
            begun.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            record.synchronize()
            taken.append(time.perf_counter() - begun[-1])
            # A checkpoint of each step with AdamW's moments would be 24 GB at the shape of Qwen3-4B.
            control.should_save = False

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "reward" in logs:
                phases.append("ipa" if logs["aligns"] > 0.5 else "grpo")
                record.keep("figures", "bupo.train", so_far())

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text.split()))) % 7 for text in completions]

    with tempfile.TemporaryDirectory() as scratch, record.peak(figures):
        run = bupo.train(
            model.model,
            [{"prompt": f"w{i} w{i + 7}"} for i in range(2, 2 + 2 * prompts)],
            tokenizer=model.tokenizer,
            output=f"{scratch}/run",
            layer=figures["layer"],
            ipa_steps=1,
            max_steps=2,
            prompts_per_step=prompts,
            num_generations=4,
            mini_batches=1,
            max_completion_length=tokens,
            dynamics_every=0,
            eval_samples=0,
            learning_rate=LEARNING_RATE,
            template="plain",
            reward=reward,
            callbacks=[Clock()],
        )
        phases[:] = run.history["phase"].tolist()
    return so_far()
