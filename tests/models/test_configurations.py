"""With any config.json, a model loads and verifies eq. 4, or is refused in one line."""

from __future__ import annotations

import json
import shutil

import pytest
from command_line import save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from internal_policy import UserError, models
from internal_policy.data.prompts import Prompt
from internal_policy.extractors import prove
from internal_policy.generation import Request, sample

FAMILIES = ("llama", "gemma2")
FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(
        [0, 1, -1, 3, 2**31, 0.0, -0.5, 1e30, "", "bogus", "int8", "float32", "4", [], [0], [None], {}, {"a": 1}]
    ),
    st.integers(-2, 8),
)
# Larger sizes would allocate memory, which is limited elsewhere.
BOUNDED = {"num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("configurations")
    return {name: save(tiny_model(name), root / name) for name in FAMILIES}


def refused_or_right(source, place, file, changes):
    """The error for a checkpoint with other settings; None if it verifies eq. 4 and can be sampled from."""
    content = json.loads((source / file).read_text())
    for link in source.iterdir():
        if link.name != file and not (place / link.name).exists():
            (place / link.name).symlink_to(link)
    (place / file).unlink(missing_ok=True)
    (place / file).write_text(json.dumps({**content, **changes}))
    try:
        model = prove(models.load(str(place), dtype="auto", device="cpu")).model
        sample(model, [Request(Prompt("w2"), [2, 3], 0, 0)], max_new_tokens=2, temperature=1.0, seed=0)
    except UserError as error:
        refusal = str(error)
    else:
        return None
    assert "\n" not in refusal
    assert len(refusal) < 700
    return refusal


def keys(directory, file):
    return sorted(json.loads((directory / file).read_text()))


MORE = {
    "config.json": [
        "quantization_config",
        "rope_scaling",
        "transformers_weights",
        "auto_map",
        "layer_types",
        "is_decoder",
    ],
    "generation_config.json": ["pad_token_id", "max_new_tokens", "temperature", "cache_implementation", "stop_strings"],
    "tokenizer_config.json": ["extra_special_tokens", "model_max_length", "chat_template", "added_tokens_decoder"],
}


def mutate(data, checkpoints, tmp_path_factory):
    family, file = data.draw(st.sampled_from(FAMILIES)), data.draw(st.sampled_from(FILES))
    source = checkpoints[family]
    named = st.sampled_from([*keys(source, file), *MORE[file]])
    changes = data.draw(st.dictionaries(named, ODD, min_size=1, max_size=2))
    refused_or_right(source, tmp_path_factory.mktemp("mutated"), file, changes)


UNHURRIED = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)


@settings(UNHURRIED, max_examples=10)
@given(data=st.data())
def test_any_setting_loads_or_is_refused(data, checkpoints, tmp_path_factory):
    mutate(data, checkpoints, tmp_path_factory)


@pytest.mark.slow
@settings(UNHURRIED, max_examples=600)
@given(data=st.data())
def test_any_of_many_settings_loads_or_is_refused(data, checkpoints, tmp_path_factory):
    mutate(data, checkpoints, tmp_path_factory)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"num_attention_heads": 0}, "cannot load its"),
        ("config.json", {"vocab_size": 0}, "another shape for lm_head.weight"),
        ("config.json", {"architectures": [3]}, "3 is not a causal LM"),
        ("config.json", {"architectures": "BertModel"}, "BertModel is not a causal LM"),
        ("config.json", {"hidden_act": "bogus"}, "cannot load its weights: KeyError: 'bogus'"),
        ("config.json", {"rms_norm_eps": "small"}, "cannot "),
        ("config.json", {"dtype": "bogus"}, "cannot load its config.json"),
        (
            "generation_config.json",
            {"eos_token_id": ""},
            "says eos_token_id ''; needed is a token id or a list of them",
        ),
    ],
    ids=str,
)
def test_settings_with_specific_error_messages(file, changes, message, checkpoints, tmp_path):
    error = refused_or_right(checkpoints["llama"], tmp_path, file, changes)
    assert message in error


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"model": 3}', '{"model": {"type": "BPE"}}', "\ud83d"], ids=repr
)
def test_a_broken_tokenizer_is_refused(content, checkpoints, tmp_path):
    directory = shutil.copytree(checkpoints["llama"], tmp_path / "model")
    (directory / "tokenizer.json").write_text(content, errors="surrogatepass")
    with pytest.raises(UserError, match="cannot load its tokenizer") as error:
        models.load(str(directory))
    assert "\n" not in str(error.value)
