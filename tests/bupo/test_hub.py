"""A trained model on the hub: what is uploaded and what is refused, with a simulated hub."""

from __future__ import annotations

import fnmatch
import json
import logging
import socket
import threading
import traceback
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import make as testbed_make
import pytest
from huggingface_hub import HfApi, constants
from synthetic_run import NOT_UPLOADED, UPLOADED, make
from training_calls import command

from internal_policy import UserError
from internal_policy.bupo import Run, TrainConfig, push_to_hub
from internal_policy.bupo.trainer_config import check_trl_options
from internal_policy.extractors.nnsight import as_nnsight_error

SECRET = "hf_NobodyMaySeeThis"


@pytest.fixture
def hub(monkeypatch):
    """Requests to the simulated hub; ``fails`` is raised by the next request."""
    hub_calls = SimpleNamespace(calls=[], fails=None, card=None)

    def create_repo(self, repo_id, **words):
        hub_calls.calls.append(("create_repo", repo_id, self.token, words))
        if hub_calls.fails is not None:
            raise hub_calls.fails
        whole = repo_id if "/" in repo_id else f"me/{repo_id}"
        return type("Made", (str,), {"repo_id": whole})(f"https://huggingface.co/{whole}")

    def upload_folder(self, **words):
        hub_calls.calls.append(("upload_folder", words))
        hub_calls.card = (words["folder_path"] / "README.md").read_text()

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(
        HfApi, "create_branch", lambda self, repo, **words: hub_calls.calls.append(("branch", repo, words))
    )
    return hub_calls


def test_only_what_transformers_loads_is_uploaded(tmp_path, hub):
    run = make(tmp_path / "run")
    url = push_to_hub(run, "mine", private=True, token="hf_x", revision="try")
    assert url == "https://huggingface.co/me/mine"
    created, branch, (_, words) = hub.calls
    assert created == ("create_repo", "mine", "hf_x", {"repo_type": "model", "private": True, "exist_ok": True})
    assert branch == ("branch", "me/mine", {"branch": "try", "exist_ok": True})
    assert (words["repo_id"], words["revision"], words["folder_path"]) == ("me/mine", "try", run.model_dir)
    files = {p.name for p in run.model_dir.iterdir()}
    sent = {f for f in files if any(fnmatch.fnmatch(f, pattern) for pattern in words["allow_patterns"])}
    assert sent == UPLOADED
    assert files - sent == set(NOT_UPLOADED)
    assert 'from_pretrained("me/mine")' in hub.card.replace("'", '"')


def test_incomplete_models_are_not_pushed(tmp_path, hub):
    run = make(tmp_path / "run")
    (run.model_dir / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no model"):
        push_to_hub(run, "me/it")
    (run.path / "run.json").unlink()
    with pytest.raises(UserError, match="has not ended"):
        push_to_hub(run, "me/it")
    with pytest.raises(UserError, match="has not ended"):
        Run.load(run.path)
    assert hub.calls == []


@pytest.fixture
def online(monkeypatch):
    """The hub's real client with this address and network access."""

    def ask(port):
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    return ask


@pytest.fixture
def answering(online):
    """A server in place of the hub: ``answers`` maps the last part of the address to status and body."""
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
def test_hub_errors_are_reported_in_one_line(tmp_path, answering, status, message):
    answering.update({"create": (status, {"error": "no"}), "*": (status, {"error": "no"})})
    with pytest.raises(UserError, match=message) as info:
        push_to_hub(make(tmp_path / "run"), "me/it")
    assert "\n" not in str(info.value)


def test_metadata_errors_name_the_card(tmp_path, answering):
    answering["validate-yaml"] = 400, {"errors": [{"message": '"license" must be one of [mit]'}, {"message": "and"}]}
    run = make(tmp_path / "run")
    with pytest.raises(UserError) as info:
        push_to_hub(run, "me/it")
    assert str(info.value) == (
        f'{run.model_dir}/README.md: the hub refuses its metadata ("license" must be one of [mit] - and); mend it, '
        "then push again"
    )


def test_an_unreachable_hub_is_reported_in_one_line(tmp_path, online, monkeypatch, capsys):
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
def test_client_errors_are_reported_in_one_line(tmp_path, hub, fails):
    hub.fails = fails
    with pytest.raises(UserError, match=rf"cannot be pushed \({fails}\)"):
        push_to_hub(make(tmp_path / "run"), "me/it")
    hub.fails = ZeroDivisionError("a defect of the program")
    with pytest.raises(ZeroDivisionError):
        push_to_hub(Run.load(tmp_path / "run"), "me/it")


@pytest.mark.parametrize("library", ["httpx", "httpx2", "httpcore", "httpcore2"])
def test_exceptions_of_any_http_library_are_reported_in_one_line(tmp_path, hub, library):
    hub.fails = type("ConnectError", (Exception,), {"__module__": f"{library}._exceptions"})("no route to host")
    with pytest.raises(UserError, match=r"cannot be pushed \(no route to host\); check the network"):
        push_to_hub(make(tmp_path / "run"), "me/it")
    with pytest.raises(UserError, match="no connection to NDIF"), as_nnsight_error("m"):
        raise hub.fails


def test_no_message_contains_a_token(tmp_path, hub):
    run = make(tmp_path / "run")
    push_to_hub(run, "me/it", token=f"{SECRET}\n")
    assert hub.calls[0][2] == SECRET
    messages = []
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
            push_to_hub(run, "me/it", token=token)
        assert "\n" not in str(info.value)
        # A notebook shows the whole chain, with the lines of this file.
        messages += [line for line in traceback.format_exception(info.value) if "info" not in line]
        assert info.value.__cause__ is None
    text = "".join(messages)
    assert not [part for part in (SECRET[:6], SECRET[6:], "own-secret", "own-s") if part in text]
    with pytest.raises(UserError, match="token= is empty"):
        push_to_hub(run, "me/it", token=" \n")


def test_the_recipe_silences_the_http_library(monkeypatch, tmp_path):
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
    ("repo", "message"), [("me/it", "while HF_HUB_OFFLINE is set"), ("a b!", "is not a repository name")]
)
def test_the_real_client_without_network_is_reported_in_one_line(tmp_path, monkeypatch, capsys, repo, message):
    make(tmp_path / "run")
    code, out, err = command(monkeypatch, capsys, "push", tmp_path / "run", "--repo", repo)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {repo}: ")
    assert message in err
    assert err.count("\n") == 1


def test_the_command_prints_the_address(tmp_path, monkeypatch, capsys, hub):
    make(tmp_path / "run")
    words = ("push", tmp_path / "run", "--repo", "it", "--private")
    assert command(monkeypatch, capsys, *words) == (0, "pushed: https://huggingface.co/me/it\n", "")
    assert hub.calls[0][3]["private"]
    code, out, _ = command(monkeypatch, capsys, *words, "--json")
    assert (code, json.loads(out)["url"]) == (0, "https://huggingface.co/me/it")
    code, _, err = command(monkeypatch, capsys, "push", tmp_path / "nowhere", "--repo", "it")
    assert (code, err.count("\n")) == (2, 1)


def test_push_to_hub_of_transformers_is_refused():
    # It would upload the checkpoints with the optimiser's state while the run is going on.
    with pytest.raises(UserError, match="internal-policy push RUN --repo NAME"):
        check_trl_options(TrainConfig.from_keywords(push_to_hub=True))
