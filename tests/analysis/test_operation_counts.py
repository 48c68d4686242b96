"""Operations and memory of an analysis, counted per operation, which unlike time are the same on every machine."""

from __future__ import annotations

import weakref

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from internal_policy import models
from internal_policy.data.responses import read_responses
from internal_policy.extractors import HookExtractor, Reducer, reduce, reduce_responses

LAYERS, VOCAB, PROMPT = 6, 4_099, 5


class Operations(TorchDispatchMode):
    """Counts the logits of internal policies and the peak of allocated bytes."""

    def __init__(self):
        super().__init__()
        self.logits = self.alive = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        # Only the entropies write their products into buffers.
        if func.overloadpacket is torch.ops.aten.mm and "out" in (kwargs or {}):
            self.logits += output.numel()
        known = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in known:
                self._note(tensor.untyped_storage())
        return output

    def _note(self, storage):
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size):
        self.alive -= size


def operations(n=40, *, lens="policy", dtype=torch.float32, vocab=VOCAB, sequences=1):
    """Analyse n tokens of each of some responses."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("qwen3", layers=LAYERS, vocab=vocab, context=n + PROMPT).to(dtype)
    record = {"input_ids": [3] * PROMPT + [5] * n, "prompt_length": PROMPT}
    responses = read_responses([record] * sequences, tokenizer, "plain")
    reducer = Reducer(HookExtractor(models.wrap(model, tokenizer)), lens)
    with Operations() as counted:
        values = reduce_responses(reducer, responses)
    assert [len(v.layers) for v in values] == [n] * sequences
    return counted


def test_four_products_per_layer_plus_embedding_and_policy():
    assert operations(sequences=3).logits == 3 * 40 * VOCAB * (4 * LAYERS + 2)


def test_at_most_four_layers_are_buffered(monkeypatch):
    monkeypatch.setattr(reduce, "_STATES_BUDGET", 1)
    # Layers 1-4 and 5-6: the second group starts with a separate product.
    assert operations().logits == 40 * VOCAB * (4 * LAYERS + 3)


@pytest.mark.parametrize(("lens", "dtype"), [("policy", torch.bfloat16), ("logit-lens", torch.float32)])
def test_five_products_per_layer_if_logits_are_not_additive(lens, dtype):
    assert operations(lens=lens, dtype=dtype).logits == 40 * VOCAB * (5 * LAYERS + 2)


def test_memory_depends_on_the_states_and_not_on_the_vocabulary():
    n = 300
    small, large = (operations(n, vocab=vocab).peak for vocab in (10_007, 20_011))
    # A single [n, V] float32 array is more.
    assert large == pytest.approx(small, rel=0.01)
    assert large < n * 20_011 * 4
