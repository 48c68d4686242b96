"""Every family through every backend: the figures of the hooks, or the refusal that the documentation states."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import ragged_responses, tiny_model, tiny_tokenizer

from internal_policy import UserError, analyze, models
from internal_policy.capture import HookExtractor, Reducer, nnsight_backend, prove, reduce_responses, transformer_lens
from internal_policy.config import BACKENDS
from internal_policy.models.families import FAMILIES
from internal_policy.responses import read_responses

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "backends.md"
BEGIN, END = "<!-- the table begins -->\n", "<!-- the table ends -->\n"

OPENERS = {
    "transformer-lens": transformer_lens.from_model,
    "nnsight": nnsight_backend.from_model,
    "nnsight, remote": lambda model: nnsight_backend.from_model(model, remote="local"),
}
GAPS: dict[tuple[str, str], str] = {}
"""Model type and backend: the reason, in the words of the refusal."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Float32: the same products in another order. In 16 bits a state is rounded after each of some ten operations a layer,
# and an operation that rounds the other way moves a logit of size ~5 by 2^-9 of it (bfloat16), an entropy by as much.
NATS = {"float32": 1e-5, "bfloat16": 0.05, "float16": 5e-3}


@cache
def by_hooks(model_type, tied, dtype):
    return values(model_type, tied, dtype, HookExtractor)


def values(model_type, tied, dtype, opener):
    model = tiny_model(model_type, tied=tied, attention="eager").to(DTYPES[dtype])
    tokenizer = tiny_tokenizer()
    extractor = prove(models.wrap(model, tokenizer), opener)
    return reduce_responses(Reducer(extractor, "policy"), read_responses(ragged_responses(3), tokenizer, "plain"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("backend", OPENERS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_parity(model_type, backend, tied, dtype):
    if reason := GAPS.get((model_type, backend)):
        with pytest.raises(UserError, match=reason):
            values(model_type, tied, dtype, OPENERS[backend])
        return
    ours = values(model_type, tied, dtype, OPENERS[backend])
    for one, other in zip(by_hooks(model_type, tied, dtype), ours, strict=True):
        np.testing.assert_allclose(other.layers, one.layers, rtol=0, atol=NATS[dtype])
        np.testing.assert_allclose(other.policy, one.policy, rtol=0, atol=NATS[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_whole_analysis_is_the_same_through_each_backend(backend):
    model, records = tiny_model("qwen3", attention="eager"), ragged_responses(4)
    hooks = analyze(model, tiny_tokenizer(), responses=records)
    other = analyze(model, tiny_tokenizer(), responses=records, backend=backend)
    numbers = ["entropy_in", "entropy_out", "change", "cosine"]
    np.testing.assert_allclose(other.layers[numbers], hooks.layers[numbers], rtol=0, atol=NATS["float32"])
    assert other.config["backend"] == backend
    assert other.config["weights"] == hooks.config["weights"]
    assert other.boundary_layer == hooks.boundary_layer
    assert other.stages == hooks.stages


def table():
    """The table of the documentation, from what the tests hold."""
    head = ["family", "`model_type`", *(f"`{b}`" for b in BACKENDS), "NDIF"]
    lines = [head, ["---"] * len(head)]
    for model_type, family in FAMILIES.items():
        cells = [GAPS.get((model_type, backend), "yes") for backend in OPENERS]
        lines.append([family.name, f"`{model_type}`", "yes", *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def test_the_documentation_has_the_table_of_what_was_tested():
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    found, after = rest.split(END)
    assert found == table(), "run: python tests/test_backends.py, which writes the table"
    assert before
    assert after


if __name__ == "__main__":
    start, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
    DOCUMENT.write_text(start + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")
