"""Where a layer is listened to: the paths of a family's row."""

from __future__ import annotations

import pytest
from tiny import tiny_model

from internal_policy.models.families import FAMILIES


@pytest.mark.parametrize(
    ("model_type", "classes"),
    [
        ("llama", ("LlamaAttention", "LlamaAttention", "LlamaMLP", "LlamaMLP")),
        ("gemma2", ("Gemma2Attention", "Gemma2RMSNorm", "Gemma2MLP", "Gemma2RMSNorm")),
    ],
)
def test_a_write_is_the_modules_own_unless_a_norm_follows(model_type, classes):
    model, family = tiny_model(model_type), FAMILIES[model_type]
    layer = model.get_submodule(family.layers)[0]
    assert tuple(type(layer.get_submodule(path)).__name__ for path in family.sites()) == classes
