"""A trained model on the hub: what is uploaded, what its card says, and what is refused. The hub itself is played."""

from __future__ import annotations

import fnmatch
import json
import logging
import socket
import threading
import traceback
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from huggingface_hub import HfApi, ModelCard, constants
from rated import rated
from training import command

from internal_policy import UserError
from internal_policy.bupo import Run, plan
from internal_policy.bupo.call import call_of
from internal_policy.bupo.card import BEGIN, END, body, code, prose, write_card
from internal_policy.bupo.places import named, tells
from internal_policy.capture.nnsight_library import told_in_one_line
from internal_policy.testbed import make as testbed_make

HOSTILE = "ab<script>alert(1)<script>|`x`\n---\nlicense: mit\n---\n# Title [c](d)"
SECRET = "hf_NobodyMaySeeThis"
HELD = {
    *(
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
    ),
}
KEPT_HERE = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "notes.txt")


def make(path, name="some/model", **changed):
    """A finished run as `train` leaves one, with a model of a few bytes."""
    history = pd.DataFrame({"step": range(1, 31), "phase": ["ipa"] * 3 + ["grpo"] * 27})
    history["reward"] = [0.25 + i / 100 for i in range(30)]
    history["policy_entropy"], history["length"] = 0.125, 20.0
    config = {
        **{"model": name, "weights": "w0", "prompts": "d1", "rewards": ["exact_reward"], "peft": None},
        "plan": {"max_steps": 30, "mini_batches": 2, "template": "chat", "lora_rank": 0, "revision": None},
        "trainer": {"site": "layer", "lens": "policy", "ipa_steps": 3, "learning_rate": 1e-6, "seed": 0},
    }
    run = Run(
        name=name,
        method="bupo",
        layer=6,
        layer_reason="the boundary layer of its analysis",
        ipa_steps=3,
        ipa_reason="as it was asked for",
        config=config,
        history=history,
        dynamics=pd.DataFrame(),
        dynamics_layers=pd.DataFrame(),
        path=path,
        evaluation_paths={"start": "evaluations/start", "trained": "evaluations/trained"},
        failures={"crashes": 2, "timeouts": 0},
        versions={"internal-policy": "0.1.0", "torch": "2.13.0"},
        **changed,
    )
    for which, correct in (("start", [3, 9, 16, 1]), ("trained", [5, 9, 16, 2])):
        rated(correct, benchmark="testbed").save(path / "evaluations" / which)
    (path / "model").mkdir(parents=True)
    for file in (HELD - {"README.md"}) | set(KEPT_HERE):
        (path / "model" / file).write_text("{}")
    (path / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    run.save()
    return run


@pytest.fixture
def hub(monkeypatch):
    """What the hub was asked, at the boundary to the network; ``fails`` is raised by the next request."""
    asked = SimpleNamespace(calls=[], fails=None, card=None)

    def create_repo(self, repo_id, **words):
        asked.calls.append(("create_repo", repo_id, self.token, words))
        if asked.fails is not None:
            raise asked.fails
        whole = repo_id if "/" in repo_id else f"me/{repo_id}"
        return type("Made", (str,), {"repo_id": whole})(f"https://huggingface.co/{whole}")

    def upload_folder(self, **words):
        asked.calls.append(("upload_folder", words))
        asked.card = (words["folder_path"] / "README.md").read_text()

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "create_branch", lambda self, repo, **words: asked.calls.append(("branch", repo, words)))
    return asked


def test_only_what_transformers_loads_is_uploaded(tmp_path, hub):
    run = make(tmp_path / "run")
    url = run.push_to_hub("mine", private=True, token="hf_x", revision="try")
    assert url == "https://huggingface.co/me/mine"
    made, branch, (_, words) = hub.calls
    assert made == ("create_repo", "mine", "hf_x", {"repo_type": "model", "private": True, "exist_ok": True})
    assert branch == ("branch", "me/mine", {"branch": "try", "exist_ok": True})
    assert (words["repo_id"], words["revision"], words["folder_path"]) == ("me/mine", "try", run.model_dir)
    files = {p.name for p in run.model_dir.iterdir()}
    sent = {f for f in files if any(fnmatch.fnmatch(f, pattern) for pattern in words["allow_patterns"])}
    assert sent == HELD
    assert files - sent == set(KEPT_HERE)
    assert 'from_pretrained("me/mine")' in hub.card.replace("'", '"')


def test_the_card_tells_what_was_done_and_measured(tmp_path):
    prompts = "zwhe99/DeepMath-103K"
    run = make(tmp_path / "run", call=call_of({"model": "some/model", "prompts": prompts}, {}))
    card = ModelCard.load(write_card(run))
    assert card.data.to_dict() == {
        "license": "unknown",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "some/model",
        "datasets": ["zwhe99/DeepMath-103K"],
        "tags": ["internal_policy", "bupo", "reinforcement-learning", "arxiv:2512.19673"],
    }
    text = card.text
    avg = run.evaluation.avg
    for told in (
        *(
            "policy of layer 6",
            "the boundary layer of its analysis",
            "30 steps, which are 60 updates",
            "as it was asked",
        ),
        f"| trained | Avg@16 | {100 * avg['mean']:.2f} | {100 * avg['low']:.2f} to {100 * avg['high']:.2f} |",
        *("| difference | Avg@K | +4.69 |", "| 1 | alignment | 0.250 | 0.125 | 20.0 |", "| 30 | grpo | 0.540 |"),
        *("| `learning_rate` | `1e-06` |", "one run with one seed", "2 crashes", "| `torch` | `2.13.0` |"),
        *("@article{tan2025bottomup", "@software{internal_policy", "## Limits", "licence of the start"),
    ):
        assert told in text, told
    assert "timeouts" not in text
    assert "from_pretrained" not in text


@pytest.mark.parametrize(
    ("aligned", "told", "untold"),
    [
        (3, "For 3 steps the policy of layer 6, counted from 1, was optimised first, then the model's", "not optim"),
        (30, "For 30 steps the policy of layer 6, counted from 1, was optimised first; the", ", then"),
        (0, "A step is one batch", "optimised first"),
    ],
)
def test_the_card_tells_the_phases_that_there_were(tmp_path, aligned, told, untold):
    run = make(tmp_path / "run")
    history = run.history.assign(phase=["ipa"] * aligned + ["grpo"] * (30 - aligned))
    method = body(replace(run, history=history)).partition("## Method")[2].partition("## ")[0]
    assert told in method
    assert untold not in method


def test_nothing_is_said_that_was_not_measured(tmp_path):
    run = replace(make(tmp_path / "run", name="testbed/qwen3"), evaluation_paths={}, history=pd.DataFrame())
    card = ModelCard.load(write_card(run))
    assert card.data.base_model is None
    assert card.data.license == "mit"
    assert "Start and result were not evaluated." in card.text
    assert "No steps were recorded." in card.text


def test_a_directory_is_no_base_model_wherever_the_card_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    call = call_of({"model": "runs/model", "prompts": Path("data/x.jsonl")}, {})
    run = make(tmp_path / "run", name="runs/model", call=call)
    run = Run.load(run.path)
    # Seen from elsewhere both names would pass for ones of the hub.
    monkeypatch.chdir("/")
    card = ModelCard.load(write_card(run, "me/it"))
    assert (card.data.base_model, card.data.datasets) == (None, None)
    assert "runs/" not in card.text
    assert "Prompts: `x.jsonl`" in card.text


def test_what_a_run_does_not_say_is_not_claimed(tmp_path):
    card = ModelCard.load(write_card(make(tmp_path / "run")))
    assert (card.data.base_model, card.data.datasets) == (None, None)
    assert "# `some/model` after" in card.text
    assert "Prompts: `not recorded`" in card.text


def test_a_call_tells_what_came_from_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    in_memory = SimpleNamespace(name_or_path="some/model", config=SimpleNamespace(_commit_hash="c0"))
    saved = SimpleNamespace(name_or_path="runs/model", config=SimpleNamespace(_commit_hash=None))
    for model, expected in (
        *(("some/model", ["model"]), ("a/b", []), ("/a/b", []), ("testbed/qwen3", []), ("a/b/c", [])),
        *((in_memory, ["model"]), (saved, [])),
    ):
        assert call_of({"model": model}, {})["from_hub"] == expected, model
    assert call_of({"model": "a/b", "prompts": "zwhe99/DeepMath-103K"}, {})["from_hub"] == ["prompts"]
    assert call_of({"model": "a/b", "prompts": ["zwhe99/DeepMath-103K"]}, {})["from_hub"] == []


def test_the_card_tells_no_paths_and_no_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, prompts = "/home/me/client-x/model", "/mnt/client-x/questions.jsonl"
    run = make(tmp_path / "run", name=name, call=call_of({"model": name, "prompts": prompts}, {}))
    (tmp_path / "client-x").mkdir()
    run.config["trainer"] |= {
        **{
            "vllm_server_base_url": "http://10.0.0.1:8000",
            "vllm_server_host": "gpu7.client-x",
            "logging_dir": "client-x",
        },
        **{
            "deepspeed": "client-x",
            "accelerator_config": "conf/client-x.json",
            "fsdp_config": {"a": "/mnt/client-x/b"},
        },
        **{"lr_scheduler_kwargs": {"table": "~/client-x"}, "run_name": "client-x", "optim": "adamw_torch"},
    }
    run.config["plan"]["benchmark"] = "./client-x/test.parquet"
    run.config["peft"] = "LoraConfig(r=8, base_model_name_or_path='client-x/model', lora_alpha=16)"
    text = write_card(run).read_text()
    assert not [line for line in text.splitlines() if any(s in line for s in ("client-x", "/home", "/mnt", "10.0.0.1"))]
    for told in ("# `model` after", "Prompts: `questions.jsonl`", "| `optim` | `adamw_torch` |", "r=8, lora_alpha=16"):
        assert told in text, told


def test_a_name_of_the_hub_is_no_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named("Qwen/Qwen3-4B", True) == named("Qwen/Qwen3-4B", None) == "Qwen/Qwen3-4B"
    assert named("testbed/qwen3", False) == "testbed/qwen3"
    assert named("C:\\me\\model", None) == named("../me/model/", None) == named("me/model", False) == "model"
    assert not tells("attn_implementation", "kernels-community/flash-attn")
    assert not tells("report_to", ["none"])
    assert not tells("optim_args", f"a/{'b' * 300}")
    (tmp_path / "Qwen" / "Qwen3-4B").mkdir(parents=True)
    assert named("Qwen/Qwen3-4B", None) == "Qwen3-4B"


def test_a_users_own_words_stay_in_the_card(tmp_path):
    run = make(tmp_path / "run")
    path = write_card(run)
    path.write_text(path.read_text().replace("license: unknown", "license: apache-2.0") + "\nMine below.\n")
    text = write_card(run, "me/it").read_text()
    assert "license: apache-2.0" in text
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.endswith("Mine below.\n")
    assert "from_pretrained" in text
    path.write_text("All by hand.\n")
    assert write_card(run).read_text().endswith("---\n\nAll by hand.\n")
    path.write_text("---\nlicense: [broken\n---\n")
    with pytest.raises(UserError, match="metadata cannot be read"):
        write_card(run)


def test_names_are_text_in_yaml_and_markdown(tmp_path):
    call = {"words": {"prompts": HOSTILE}, "objects": [], "from_hub": []}
    run = make(tmp_path / "run", name=HOSTILE, call=call)
    run = replace(run, layer_reason=HOSTILE, versions={HOSTILE: HOSTILE})
    card = ModelCard.load(write_card(run))
    assert card.data.license == "unknown"
    assert card.data.base_model is None
    assert "\n# Title" not in card.text
    assert "\n---\nlicense" not in card.text
    for line in card.text.splitlines():
        outside = "".join(part for k, part in enumerate(line.split("``")) if k % 2 == 0)
        assert "<script" not in outside.replace("\\<", "")
        assert "[c](" not in outside
    assert code("a`b|c\n d") == "``a`b¦c d``"
    assert prose("<b> *x* [y](z)\n_w_") == r"\<b\> \*x\* \[y\](z) \_w\_"


def test_what_is_not_whole_is_not_pushed(tmp_path, hub):
    run = make(tmp_path / "run")
    (run.model_dir / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no model"):
        run.push_to_hub("me/it")
    (run.path / "run.json").unlink()
    with pytest.raises(UserError, match="has not ended"):
        run.push_to_hub("me/it")
    with pytest.raises(UserError, match="has not ended"):
        Run.load(run.path)
    assert hub.calls == []


@pytest.fixture
def online(monkeypatch):
    """The hub's real client, which asks this address and may use the network."""

    def ask(port):
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    return ask


@pytest.fixture
def answering(online):
    """A server in place of the hub: ``answers`` gives status and body by the address's last part."""
    answers = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, body = answers.get(self.path.rpartition("/")[2], answers.get("*", (404, {})))
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    online(server.server_port)
    answers["create"] = 200, {"url": f"http://127.0.0.1:{server.server_port}/me/it"}
    yield answers
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "log in with `hf auth login`, or set HF_TOKEN"),
        (403, "a token that may write there"),
        (500, "check the network and the name"),
    ],
)
def test_what_the_hub_refuses_is_one_line(tmp_path, answering, status, message):
    answering.update({"create": (status, {"error": "no"}), "*": (status, {"error": "no"})})
    with pytest.raises(UserError, match=message) as info:
        make(tmp_path / "run").push_to_hub("me/it")
    assert "\n" not in str(info.value)


def test_metadata_that_the_hub_refuses_names_the_card(tmp_path, answering):
    answering["validate-yaml"] = 400, {"errors": [{"message": '"license" must be one of [mit]'}, {"message": "and"}]}
    run = make(tmp_path / "run")
    with pytest.raises(UserError) as info:
        run.push_to_hub("me/it")
    assert str(info.value) == (
        f'{run.model_dir}/README.md: the hub refuses its metadata ("license" must be one of [mit] - and); mend it, '
        "then push again"
    )


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, online, monkeypatch, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        online(free.getsockname()[1])
        make(tmp_path / "run")
        code, out, err = command(monkeypatch, capsys, "push", tmp_path / "run", "--repo", "me/it")
    assert (code, out) == (2, "")
    assert err.startswith("error: me/it: cannot be pushed (")
    assert "check the network" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("fails", [OSError("disk"), RuntimeError("upload"), ValueError("branch")])
def test_what_the_client_fails_with_is_one_line(tmp_path, hub, fails):
    hub.fails = fails
    with pytest.raises(UserError, match=rf"cannot be pushed \({fails}\)"):
        make(tmp_path / "run").push_to_hub("me/it")
    hub.fails = ZeroDivisionError("a defect of the program")
    with pytest.raises(ZeroDivisionError):
        Run.load(tmp_path / "run").push_to_hub("me/it")


@pytest.mark.parametrize("library", ["httpx", "httpx2", "httpcore", "httpcore2"])
def test_any_http_librarys_exception_is_one_line(tmp_path, hub, library):
    hub.fails = type("ConnectError", (Exception,), {"__module__": f"{library}._exceptions"})("no route to host")
    with pytest.raises(UserError, match=r"cannot be pushed \(no route to host\); check the network"):
        make(tmp_path / "run").push_to_hub("me/it")
    with pytest.raises(UserError, match="no connection to NDIF"), told_in_one_line("m"):
        raise hub.fails


def test_a_token_is_in_no_message(tmp_path, hub):
    run = make(tmp_path / "run")
    run.push_to_hub("me/it", token=f"{SECRET}\n")
    assert hub.calls[0][2] == SECRET
    told = []
    for token, fails in (
        (f"{SECRET[:6]}\n{SECRET[6:]}", None),
        (f"{SECRET}é", None),
        ("own-secret", ValueError(f"{'x' * 195}own-secret")),
        ("own-secret", ValueError("Illegal header value b'Bearer own-secret'")),
        (None, ValueError(f"Illegal header value b'Bearer {SECRET}'")),
        (None, ValueError(SECRET)),
    ):
        hub.fails = fails
        with pytest.raises(UserError) as info:
            run.push_to_hub("me/it", token=token)
        assert "\n" not in str(info.value)
        # A notebook shows the whole chain, with the lines of this file.
        told += [line for line in traceback.format_exception(info.value) if "info" not in line]
        assert info.value.__cause__ is None
    text = "".join(told)
    assert not [part for part in (SECRET[:6], SECRET[6:], "own-secret", "own-s") if part in text]
    with pytest.raises(UserError, match="token= is empty"):
        run.push_to_hub("me/it", token=" \n")


def test_the_recipe_keeps_the_http_library_quiet(monkeypatch, tmp_path):
    monkeypatch.setattr(testbed_make, "make", lambda *_, **__: None)
    libraries = [logging.getLogger(name) for name in ("httpx", "httpx2")]
    before = [library.level for library in libraries]
    try:
        for library in libraries:
            library.setLevel(logging.NOTSET)
        testbed_make.main(["--out", str(tmp_path)])
        assert [library.level for library in libraries] == [logging.WARNING] * 2
    finally:
        for library, level in zip(libraries, before, strict=True):
            library.setLevel(level)


@pytest.mark.parametrize(
    ("repo", "message"), [("me/it", "while HF_HUB_OFFLINE is set"), ("a b!", "is no name of a repository")]
)
def test_the_real_client_without_a_network_is_one_line(tmp_path, monkeypatch, capsys, repo, message):
    make(tmp_path / "run")
    code, out, err = command(monkeypatch, capsys, "push", tmp_path / "run", "--repo", repo)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {repo}: ")
    assert message in err
    assert err.count("\n") == 1


def test_the_command_tells_where_it_is(tmp_path, monkeypatch, capsys, hub):
    make(tmp_path / "run")
    words = ("push", tmp_path / "run", "--repo", "it", "--private")
    assert command(monkeypatch, capsys, *words) == (0, "pushed: https://huggingface.co/me/it\n", "")
    assert hub.calls[0][3]["private"]
    code, out, _ = command(monkeypatch, capsys, *words, "--json")
    assert (code, json.loads(out)["url"]) == (0, "https://huggingface.co/me/it")
    code, _, err = command(monkeypatch, capsys, "push", tmp_path / "nowhere", "--repo", "it")
    assert (code, err.count("\n")) == (2, 1)


def test_transformers_own_push_is_refused():
    # It would upload the checkpoints with the optimiser's state while the run is going on.
    with pytest.raises(UserError, match="internal-policy push RUN --repo NAME"):
        plan.split("testbed/qwen3", {}, {"push_to_hub": True})
