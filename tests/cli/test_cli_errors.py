"""Every invalid input on the command line: a one-line error, exit code 2, nothing lost and no partial output."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import make_unloadable, refused, run, run_subprocess, save
from tiny import ragged_responses, tiny_model, tiny_tokenizer

from internal_policy import Analysis, UserError, analyze, bupo, compare, sweep
from internal_policy.evaluation import evaluate


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    # The tokenizer has more words than the model: text can also give ids beyond the vocabulary.
    return save(tiny_model("llama"), tmp_path_factory.mktemp("model"), tiny_tokenizer(vocab=100))


@pytest.fixture
def responses(tmp_path):
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ragged_responses()))
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no weights", "no weights (*.safetensors)"),
        ("no config", "no config.json"),
        ("pickle", "pickle format only (pytorch_model.bin)"),
        ("broken weights", "broken safetensors file"),
        ("broken config", "cannot load its config.json"),
        ("encoder", "BertForMaskedLM is not a causal LM"),
        ("encoder-decoder", "is an encoder-decoder model"),
        ("family", "family 'bloom' is not in the table (internal-policy models prints it) and no structure"),
        ("unheard", "cannot load its config.json"),
        ("weights missing", "the checkpoint lacks lm_head.weight and 29 more"),
        ("a million layers", "config.json has 1e+11 layers; needed are at most 10000"),
        ("a layer too many", "has weights that config.json leaves no room for: model.layers.2."),
        ("other shapes", "has another shape for model.layers.0.mlp.down_proj.weight and 8 more"),
        ("impossible config", "cannot load its config.json"),
        ("no tokenizer", "no tokenizer in this directory"),
    ],
)
def test_models_that_cannot_be_loaded(tmp_path, model_dir, kind, message):
    make_unloadable(kind, tmp_path / "bad", model_dir)
    assert message in refused("analyze", "--model", "bad", cwd=tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/no-such-model", "no such model on the hub, or no network"),
        ("./nowhere", "no such directory"),
        ("testbed/gpt5", "no testbed model is called 'testbed/gpt5'; there are testbed/qwen3 and testbed/llama"),
    ],
)
def test_missing_models(tmp_path, name, message):
    assert message in refused("analyze", "--model", name, cwd=tmp_path)


def test_hub_messages_are_truncated_between_words():
    from internal_policy.utils.errors import shorten

    address = "https://huggingface.co/docs/transformers/installation#offline-mode"
    assert shorten(f"{'so ' * 60}see {address} now. ") == f"{'so ' * 60}see ..."
    assert shorten(f"{'so ' * 30}see {address}.") == f"{'so ' * 30}see {address}"
    assert shorten(f"{'x' * 300}: broken") == f"{'x' * 300} ..."
    assert shorten("x" * 300) == "x" * 300


@pytest.mark.slow
def test_a_missing_network_is_reported_in_one_line(tmp_path):
    # A closed local port replaces the hub; the client retries for about twenty seconds.
    nowhere = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = run_subprocess("analyze", "--model", "nobody/no-such-model", cwd=tmp_path, **nowhere)
    first, line = done.stderr.splitlines()
    assert first == "loading the libraries (torch, transformers)"
    assert line.startswith("error: nobody/no-such-model: cannot load its config.json: no such model on the hub, or no")


def test_a_bad_model_is_reported_before_a_good_one_is_analysed(tmp_path, model_dir, responses):
    error = refused("analyze", "--model", model_dir, "--model", "./nowhere", "--responses", responses, cwd=tmp_path)
    assert "./nowhere: no such directory" in error


def test_models_with_the_same_output_directory(tmp_path, model_dir):
    for run_name in ("a", "b"):
        shutil.copytree(model_dir, tmp_path / run_name / "run" / "checkpoint-1")
    error = refused("analyze", "--model", "a/run/checkpoint-1", "--model", "b/run/checkpoint-1", cwd=tmp_path)
    assert "would both be written to run--checkpoint-1" in error


def test_nan_in_the_weights_names_the_layer(tmp_path, responses):
    model = tiny_model("qwen3")
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight[0] = float("nan")
    save(model, tmp_path / "nan")
    assert "NaN or inf in layer 3" in refused("analyze", "--model", "nan", "--responses", responses, cwd=tmp_path)


def test_states_that_overflow_name_the_layer(tmp_path):
    model = tiny_model("qwen3", vocab=4000)
    with torch.no_grad():
        # The proof on load draws 24 tokens at random, and this one is not among them.
        model.model.embed_tokens.weight[3999] = float("inf")
    save(model, tmp_path / "inf", tiny_tokenizer())
    (tmp_path / "given.jsonl").write_text(json.dumps({"input_ids": [2, 3999, 4, 5], "prompt_length": 1}))
    error = refused("analyze", "--model", "inf", "--responses", "given.jsonl", cwd=tmp_path, began=True)
    assert "NaN or inf in the states of layer 1" in error


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--prompts", b"", "is empty"),
        ("--prompts", b'{"text": "w2"}\n', "has values for ['text']"),
        ("--prompts", b'{"prompt": "w2 w80"}\n', "prompt 1: id 80 is beyond the vocabulary of 61"),
        ("--responses", b'{"prompt": "w2", "answer": "w3"}\n', "needed are prompt and response"),
        ("--responses", b'{"prompt": "w2", "response": "\xe9"}\n', "not UTF-8 at line 1"),
        ("--responses", b'{"prompt": "w2", "response": "w3", "reward": "good"}\n', "reward is 'good'"),
        ("--prompts", b'{"prompt": "w2"}\n{"prompt"\n', "broken JSON at line 2"),
        ("--prompts", b'{"prompt": "\xe9"}\n', "not UTF-8 at line 1"),
        ("--prompts", b'{"prompt": "' + b"w2 " * 64 + b'"}\n', "has 64 tokens and the model's context is 64"),
        ("--responses", b"", "is empty"),
        ("--responses", b'{"input_ids": [2, 3], "prompt_length": 1}\n{"input_ids"\n', "broken JSON at line 2"),
        ("--responses", b'{"prompt": "w2", "response": ""}\n', "no response tokens"),
        ("--responses", b'{"input_ids": [2, 3, 4], "prompt_length": 7}\n', "prompt_length is 7"),
        ("--responses", b'{"input_ids": [2, 3, 61], "prompt_length": 1}\n', "id 61 is beyond the vocabulary of 61"),
        (
            "--responses",
            json.dumps({"input_ids": [2] * 65, "prompt_length": 1}).encode(),
            "65 tokens, more than the model's context of 64",
        ),
    ],
)
def test_bad_prompts_and_responses(tmp_path, model_dir, option, content, message):
    (tmp_path / "given.jsonl").write_bytes(content)
    assert message in refused("analyze", "--model", model_dir, option, "given.jsonl", cwd=tmp_path)


def test_missing_data_sets(tmp_path, model_dir):
    error = refused("analyze", "--model", model_dir, "--prompts", "nobody/no-such-data", cwd=tmp_path)
    assert "nobody/no-such-data: cannot load this data set" in error
    assert "no such file" in refused("analyze", "--model", model_dir, "--prompts", "missing.jsonl", cwd=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens is 0; needed is a number of at least 1"),
        (["--temperature", "-1"], "--temperature is -1.0"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--template", "qwen9"], "--template is 'qwen9'; needed is one of chat, plain"),
        (["--dtype", "int8"], "--dtype is 'int8'"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["--prompts", "a", "--responses", "b"], "both --prompts and --responses"),
        (["--lens", "wide"], "--lens is 'wide'; needed is one of policy, logit-lens"),
        (["--no-such-option"], "no such option: --no-such-option"),
        (["--responses", "r.jsonl", "--temperature", "0.5"], "--temperature was given with --responses"),
    ],
)
def test_bad_settings(tmp_path, model_dir, arguments, message):
    assert message in refused("analyze", "--model", model_dir, *arguments, cwd=tmp_path)


def test_unwritable_output(tmp_path, model_dir, responses):
    (tmp_path / "taken").write_text("a file")
    error = refused("analyze", "--model", model_dir, "--responses", responses, "--output", "taken", cwd=tmp_path)
    assert "cannot be written" in error
    assert "choose another --output" in error
    assert (tmp_path / "taken").read_text() == "a file"


@pytest.mark.parametrize(
    "call",
    [
        lambda path: analyze("testbed/llama", output=path),
        lambda path: evaluate("testbed/llama", output=path),
        lambda path: bupo.train("testbed/llama", output=path),
        lambda path: compare(path, path),
        lambda path: Analysis.load(path),
        lambda path: sweep(checkpoints=path),
        lambda path: bupo.train("testbed/llama", layer=path),
    ],
)
def test_unknown_home_directory(call):
    with pytest.raises(UserError, match="no home directory is known for '~nosuchuser'; give the whole path"):
        call("~nosuchuser/out")


def test_output_in_use_for_something_else_is_left_alone(tmp_path, model_dir, responses):
    arguments = ["analyze", "--model", model_dir, "--responses", responses, "--output", "out"]
    slug = "--".join(model_dir.parts[-2:])
    (tmp_path / "out" / slug).mkdir(parents=True)
    (tmp_path / "out" / slug / "thesis.tex").write_text("years of work")
    assert "is in use for something else (it holds thesis.tex)" in refused(*arguments, cwd=tmp_path)
    assert "is in use for something else" in refused(*arguments, "--overwrite", cwd=tmp_path)
    assert (tmp_path / "out" / slug / "thesis.tex").read_text() == "years of work"


def test_a_work_folder_of_the_users_is_left_alone(tmp_path, model_dir, responses):
    notes = tmp_path / "out" / "--".join(model_dir.parts[-2:]) / "work" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    error = refused_keeping(notes, "analyze", "--model", model_dir, "--responses", responses, "-o", "out", cwd=tmp_path)
    assert "is in use for something else (it holds work/notes.txt)" in error


def refused_keeping(path, *arguments, cwd):
    before = path.read_bytes()
    error = run(*arguments, cwd=cwd).stderr
    assert path.read_bytes() == before
    return error


def test_a_table_on_an_ascii_terminal(tmp_path):
    assert "model.layers" in run_subprocess("models", cwd=tmp_path, code=0, PYTHONIOENCODING="ascii").stdout


@pytest.mark.slow
def test_an_ascii_terminal(tmp_path, model_dir, responses):
    done = run_subprocess(
        *("analyze", "--model", model_dir, "--responses", responses, "-o", "out"),
        cwd=tmp_path,
        code=0,
        PYTHONIOENCODING="ascii",
    )
    assert "boundary layer" in done.stdout
    assert list(tmp_path.rglob("fig3_entropy_change.pdf"))


def test_a_used_output_says_how_to_resume_or_start_over(tmp_path, model_dir, responses, monkeypatch):
    # Drawing takes most of the time, and is tested elsewhere.
    monkeypatch.setattr("internal_policy.cli.analyze.draw", lambda analyses, root: None)
    monkeypatch.setattr("internal_policy.cli.report.write_reports", lambda analyses, **options: None)
    arguments = ["analyze", "--model", model_dir, "--responses", responses, "--output", "out"]
    run(*arguments, cwd=tmp_path, code=0)
    manifest = next(tmp_path.glob("out/*/analysis.json"))
    before = manifest.read_bytes()

    other = run(*arguments, "--keep-tokens", "3", cwd=tmp_path)
    assert "already holds an analysis with other settings (keep_tokens 8 -> 3)" in other.stderr
    assert "--overwrite" in other.stderr
    assert manifest.read_bytes() == before

    again = run(*arguments, cwd=tmp_path, code=0)
    assert "already complete" in again.stderr
    assert manifest.read_bytes() == before

    responses.write_text(responses.read_text().splitlines()[0] + "\n")
    assert "other settings (inputs" in run(*arguments, cwd=tmp_path).stderr
    run(*arguments, "--overwrite", cwd=tmp_path, code=0)
    assert json.loads(manifest.read_text())["n_responses"] == 1


def test_figures_without_an_analysis(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no finished analysis here" in refused("figures", "empty", cwd=tmp_path)


def test_debug_shows_the_traceback(tmp_path):
    done = run_subprocess("analyze", "--model", "./nowhere", "--debug", cwd=tmp_path)
    traced, line = done.stderr.rstrip().rsplit("\n", 1)
    # The stages that were reached may precede it.
    assert "Traceback (most recent call last)" in traced
    assert line == "error: " + traced.rsplit("UserError: ", 1)[1]
    assert "no such directory" in line


LIMITED = """
import re, resource, sys
import torch, transformers, internal_policy.analysis.pipeline, transformers.models.qwen2.modeling_qwen2
torch.zeros(64, 64) @ torch.zeros(64, 64)
used = int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024
limit = used + int(sys.argv.pop(1)) * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
from internal_policy.cli.main import main
main()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits memory through Linux's RLIMIT_DATA")
@pytest.mark.slow
@pytest.mark.parametrize(("mebibytes", "code"), [(700, 0), (170, 2)])
def test_out_of_memory_retries_smaller_then_names_the_options_to_lower(tmp_path, mebibytes, code):
    save(tiny_model("qwen2", layers=1, context=4096, intermediate_size=8192), tmp_path / "wide")
    rows = [{"input_ids": [2 + i % 50 for i in range(2048)], "prompt_length": 1024} for _ in range(8)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    # One sequence needs 2 x 2048 x 8192 float32 in the FFN, 128 MiB and more; eight need 1 GiB.
    arguments = ["analyze", "--model", "wide", "--responses", "long.jsonl", "--output", "out", "--keep-tokens", "0"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(mebibytes), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "out of memory on a batch of 8; trying batches of 4" in done.stderr
    if code == 0:
        assert json.loads(next(tmp_path.glob("out/*/analysis.json")).read_text())["n_responses"] == 8
    else:
        assert "error: out of memory on a single sequence; lower --max-new-tokens" in done.stderr
        assert "Traceback" not in done.stderr
