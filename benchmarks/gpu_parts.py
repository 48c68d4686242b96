"""The parts of ``gpu_checks.py`` that only read: the fused kernel, the tests that need CUDA, the analysis.

Each runs in a process of its own, which a fault of the device cannot leave; it imports what it needs inside.
"""

from __future__ import annotations

import io
import os
import statistics
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from gpu_model import PROMPT, build, responses
from gpu_recorder import GIB, Recorder

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/entropy/test_on_cuda.py", "tests/models/test_devices.py")
"""Files with tests that need CUDA; of the second only those are run whose name has ``SELECTED`` in it."""
SELECTED = "test_on_cuda or real_gpu"
TOKENS = {"bfloat16": (1024, 4096, 8192), "float32": (1024, 4096)}
"""Rows, by dtype. Full float32 is computed by blocks and not by the kernel, which would take a minute for 8192."""
CHECKED = 16
"""Tokens whose entropies are compared with the definition in float64."""


def kernel(record: Recorder, dtype: str) -> None:
    """The kernel's rate against one large product of the same operands, its memory and its errors.

    Args:
        record: of the part.
        dtype: of states and E_u.
    """
    import benchmark_kernel as benchmark
    import torch

    vocab, width = (200, 48) if record.quick else (151_936, 2560)
    torch.manual_seed(0)
    unembedding = torch.randn(vocab, width, device=record.device).mul_(0.02).to(getattr(torch, dtype))
    right = []
    for name in benchmark.KERNELS:
        # As many rows as are compared; the first call compiles and tunes, and shows whether the kernel runs at all.
        few = 12 if record.quick else 1024
        states = torch.randn(few, width, device=record.device).to(unembedding.dtype)
        rows = torch.linspace(0, few - 1, min(few, 4 * CHECKED), device=record.device).long()

        def check(name: str = name, states: Any = states, rows: Any = rows) -> dict[str, Any]:
            error = benchmark.error_of(name, states, unembedding, rows)
            return {"kernel": name, "error_nats": error, "rows": len(rows), "tile": _tile(name)}

        if record.step(f"{name} against float64", check, 8.0) is not None:
            right.append(name)
    rates(record, unembedding, TOKENS[dtype] if not record.quick else (12,), right)
    if dtype == "float32" and record.on_gpu:
        torch.set_float32_matmul_precision("high")
        try:
            # Six more tiles are compiled.
            rates(record, unembedding, (4096,), right, ", TF32", 18.0)
        finally:
            torch.set_float32_matmul_precision("highest")


def rates(
    record: Recorder,
    unembedding: Any,
    tokens: tuple[int, ...],
    kernels: list[str],
    suffix: str = "",
    floor: float = 3.0,
) -> None:
    """Measure the kernels that run at each number of tokens; none is begun in fewer than ``floor`` seconds."""
    import benchmark_kernel as benchmark

    a_token = 0.0
    repeats = 10 if unembedding.dtype.itemsize == 2 else 3
    for n in tokens:
        needs = max(floor, 3.0 + 1.3 * a_token * n)

        def measure(n: int = n) -> dict[str, Any]:
            found = benchmark.measure(n, unembedding, repeats, kernels, record.deadline - 2)
            kept = {"tokens": n, "errors_nats": found.errors, "rates_tflops": found.rate, "memory_mib": found.memory}
            if found.seconds:
                kept["seconds"] = {name: statistics.median(times) for name, times in found.seconds.items()}
                kept["repeats"] = len(found.seconds["product"])
            return kept

        kept = record.step(f"{n} tokens{suffix}", measure, needs)
        if kept is not None and "seconds" in kept:
            # Besides the repeats each way runs to be tuned, and for its memory and its errors.
            a_token = sum(kept["seconds"].values()) * (repeats + 3) / n


def _tile(kernel: str) -> str | None:
    """The tile that tuning chose last, in triton's words; None in the interpreter."""
    from internal_policy.entropy import tiles, triton_kernel

    if triton_kernel.INTERPRETED:
        return None
    found: list[str] = []
    # A look into triton's own tuner, whose attributes differ between versions: no figure depends on it.
    with suppress(Exception):
        for half in (True, False):
            tuned = triton_kernel._tuned(tiles.choices(1024, half=half, tf32=False, lengths=kernel != "kernel"))
            found += [str(config) for config in tuned.cache.values()]
    return "; ".join(found) or None


class _Outcomes:
    """A plugin of pytest that keeps each result as it comes, so that a test that hangs hides no other."""

    def __init__(self, record: Recorder) -> None:
        self._record = record
        self.counts: dict[str, int] = {"passed": 0, "failed": 0, "skipped": 0, "errors": 0}
        self.failures: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a phase of a test that says something of its outcome."""
        if report.failed:
            self.counts["failed" if report.when == "call" else "errors"] += 1
            self.failures[report.nodeid] = str(report.longrepr)[-1500:]
        elif report.skipped:
            self.counts["skipped"] += 1
            where = report.longrepr
            self.reasons[report.nodeid] = str(where[2] if isinstance(where, tuple) else where)[-300:]
        elif report.when == "call":
            self.counts["passed"] += 1
        if report.when == "call":
            self.seconds[report.nodeid] = round(report.duration, 2)
        self._keep()

    def pytest_collectreport(self, report: Any) -> None:
        """Count a file that cannot be collected."""
        if report.failed:
            self.counts["errors"] += 1
            self.failures[report.nodeid] = str(report.longrepr)[-1500:]
            self._keep()

    def pytest_collection_finish(self, session: Any) -> None:
        """Keep how many there are, so that those a limit of time cut off can be counted."""
        self.counts["collected"] = len(session.items)
        self._keep()

    def _keep(self) -> None:
        self._record.keep("figures", "tests", self.found())

    def found(self) -> dict[str, Any]:
        """The figures so far."""
        return {
            **self.counts,
            "failures": dict(self.failures),
            "reasons": dict(self.reasons),
            "seconds": dict(self.seconds),
        }


def cuda_tests(record: Recorder, files: tuple[str, ...] = TESTS) -> None:
    """Run the tests that need CUDA.

    Args:
        record: of the part.
        files: where they are.
    """

    def run() -> dict[str, Any]:
        import pytest

        # The interpreter is for the other parts of a run without a GPU.
        os.environ.pop("TRITON_INTERPRET", None)
        os.chdir(ROOT)
        outcomes, written = _Outcomes(record), io.StringIO()
        arguments = [*files[: 1 if record.quick else None], "-m", "", "-k", SELECTED, "-q", "-p", "no:cacheprovider"]
        with redirect_stdout(written), redirect_stderr(written):
            code = pytest.main([*arguments, "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)], [outcomes])
        kept = {**outcomes.found(), "exit": int(code)}
        # Nothing collected (5) is a finding too, and every other code but 0 and 1 an error of the call.
        return kept if int(code) in (0, 1) else {**kept, "output": written.getvalue()[-2000:]}

    record.step("tests", run, 10.0 if record.on_gpu else 1.0)


def analysis(record: Recorder, dtype: str) -> None:
    """States and entropies of a whole model, against its forward pass alone and the bare products of its states.

    Args:
        record: of the part.
        dtype: of the model.
    """
    from internal_policy.extractors import HookExtractor, verify
    from internal_policy.models import limit_threads

    made: dict[str, Any] = {}

    def model() -> dict[str, Any]:
        figures: dict[str, Any] = {"dtype": dtype}
        with record.peak(figures):
            made["model"] = build(dtype, record.device, record.quick)
        return {**figures, "parameters": made["model"].n_parameters}

    record.step("model", model, 5.0 if record.on_gpu else 1.0)
    if "model" not in made:
        return
    with limit_threads(made["model"]):
        proved = record.step("proof of eq. 4", lambda: {"rounding_units": verify(HookExtractor(made["model"]))})
        if proved is None:
            record.skip("proof", "eq. 4 was not proved: the figures below are times alone")
        record.step("entropies against float64", lambda: against_float64(made["model"]), 8.0)
        sizes = [(8, 1024), (4, 1024), (2, 1024)] if dtype != "float32" else [(4, 256), (2, 256), (1, 256)]
        sizes = [(2, 24)] if record.quick else sizes
        product = record.step("one product", lambda: one_product(record, made["model"], min(2048, _tokens(sizes[0]))))

        a_token = 0.0 if product is None else float(product["seconds_per_token"])

        def needs(size: tuple[int, int]) -> float:
            # The bare products, and at least the whole once and on a first sequence; a whole is up to twice as long.
            return 3.0 + 4.5 * _products(made["model"]) * _tokens(size) * a_token

        record.largest("throughput", sizes, lambda size: throughput(record, made["model"], size), needs)


def _tokens(size: tuple[int, int]) -> int:
    number, length = size
    return number * (length - min(PROMPT, length // 2))


def _products(model: Any) -> int:
    """How many states of every token are multiplied with E_u."""
    from internal_policy.extractors.reduce import logits_are_additive

    a_layer = 4 if logits_are_additive(model, "policy") else 5
    return a_layer * int(model.n_layers) + 2


def _operands(model: Any, rows: int) -> tuple[Any, Any, Any]:
    """Random states, E_u, and a buffer for their logits."""
    import torch

    weight = model.projection.weight.detach()
    states = torch.randn(rows, weight.shape[1], device=weight.device).to(weight.dtype)
    return states, weight, torch.empty(rows, model.vocab_size, dtype=weight.dtype, device=weight.device)


def one_product(record: Recorder, model: Any, rows: int) -> dict[str, Any]:
    """Time one bare product of states with E_u, from which the time of all follows.

    Args:
        record: of the part.
        model: the model.
        rows: states.

    Returns:
        rows, and seconds per row.
    """
    import benchmark_kernel as benchmark

    operands = _operands(model, rows)
    seconds = statistics.median(record.seconds(lambda: benchmark.bare_product(*operands)))
    return {"rows": rows, "seconds_per_token": seconds / rows}


def against_float64(model: Any) -> dict[str, Any]:
    """Compare the entropies of some tokens with the definition on the same states.

    Args:
        model: the model.

    Returns:
        The largest difference in nats, at layers 1, L/2 and L: of H^l, of both writes, of the FFN's at the length of
        its input, and of the policy.
    """
    import numpy as np
    import torch

    from internal_policy.entropy import reference
    from internal_policy.extractors import QUANTITIES, HookExtractor, Reducer, reduce_responses, residual_hooks
    from internal_policy.extractors.reduce import make_batch

    chosen = responses(1, PROMPT + CHECKED, model.vocab_size)
    values = reduce_responses(Reducer(HookExtractor(model), "policy"), chosen)[0]
    batch = make_batch(chosen, "right", [np.arange(chosen[0].n_tokens)])
    states: list[Any] = []
    with torch.no_grad(), residual_hooks(model, batch.positions, states.append):
        model.backbone(**model.forward_arguments(batch.input_ids, batch.attention_mask))
    weight, errors = model.projection.weight.detach(), {}

    def of(state: Any) -> Any:
        return reference.policy_entropy(state, weight).cpu().numpy()

    for layer in sorted({1, model.n_layers // 2, model.n_layers}):
        of_layer = states[layer - 1]
        for column, name in (("layer_out", "residual_out"), ("attn_out", "attention_write"), ("ffn_out", "ffn_write")):
            exact = of(getattr(of_layer, name).double())
            ours = values.layers[:, layer - 1, QUANTITIES.index(column)]
            errors[f"layer {layer}, {column}"] = float(abs(ours - exact).max())
        lengths = [x.float().norm(dim=-1, keepdim=True) for x in (of_layer.ffn_in, of_layer.ffn_write)]
        rescaled = of_layer.ffn_write.double() * (lengths[0] / lengths[1])
        exact = of(rescaled)
        ours = values.layers[:, layer - 1, QUANTITIES.index("ffn_rescaled")]
        errors[f"layer {layer}, ffn_rescaled"] = float(abs(ours - exact).max())
    with torch.no_grad():
        final = model.projection.apply_final_norm(states[-1].residual_out)
    errors["policy"] = float(abs(values.policy[:, 1] - of(final.double())).max())
    return {"error_nats": max(errors.values()), "tokens": chosen[0].n_tokens, "errors_nats": errors}


def throughput(record: Recorder, model: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Time states and entropies of random responses.

    Args:
        record: of the part.
        model: the model.
        size: sequences, and tokens of each.

    Returns:
        Seconds, tokens per second and memory, of the whole and of its floor.
    """
    import benchmark_kernel as benchmark
    import torch

    from internal_policy.entropy import streaming
    from internal_policy.extractors import HookExtractor, Reducer, reduce_responses

    number, length = size
    chosen = responses(number, length, model.vocab_size)
    tokens = sum(r.n_tokens for r in chosen)
    ids = torch.tensor([r.input_ids for r in chosen])
    arguments = model.forward_arguments(ids, torch.ones_like(ids))
    products = _products(model)
    figures: dict[str, Any] = {"sequences": number, "length": length, "tokens": tokens, "products": products}

    def forward() -> None:
        with torch.no_grad():
            model.backbone(**arguments)

    reducer = Reducer(HookExtractor(model), "policy")
    forward_memory: dict[str, Any] = {}
    with record.peak(forward_memory):
        times = {"forward": record.seconds(forward)}
    # Enough tokens for the kernel of many, so that its tuning is not timed.
    reduce_responses(reducer, chosen[:1])
    with record.peak(figures):
        repeats = 3 if model.projection.weight.element_size() == 2 else 2
        times["whole"] = record.seconds(lambda: reduce_responses(reducer, chosen), repeats, warm_up=False)
    rows = min(2048, tokens)
    states, weight, buffer = _operands(model, rows)

    def bare() -> None:
        for _ in range(products * -(-tokens // rows)):
            benchmark.bare_product(states, weight, buffer)

    times["products"] = record.seconds(bare, repeats=1, warm_up=False)
    seconds = {name: statistics.median(each) for name, each in times.items()}
    # The last portion of the positions is smaller than the others.
    seconds["products"] *= tokens / (rows * -(-tokens // rows))
    figures |= {
        "seconds": seconds,
        "repeats": {name: len(each) for name, each in times.items()},
        "tokens_per_second": tokens / seconds["whole"],
        "over_forward": seconds["whole"] / seconds["forward"],
        "over_floor": seconds["whole"] / (seconds["forward"] + seconds["products"]),
        "forward_memory": forward_memory,
        "weights_gib": sum(p.numel() * p.element_size() for p in model.model.parameters()) / GIB,
        "kernel": streaming.kernel_is_faster(states, weight, None) and not streaming._failures,
        "kernel_failures": sorted(streaming._failures),
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
    }
    return figures
