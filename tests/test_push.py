"""A trained model on the hub: what is uploaded, what its card says, and what is refused. The hub itself is played."""

from __future__ import annotations

import fnmatch
import json
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pandas as pd
import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from rated import rated
from training import command

from internal_policy import UserError
from internal_policy.bupo import Run, plan
from internal_policy.bupo.card import BEGIN, END, code, prose, write_card

HOSTILE = "a/b<script>alert(1)</script>|`x`\n---\nlicense: mit\n---\n# Title [c](http://d)"
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
    run = make(tmp_path / "run", call={"words": {"prompts": "zwhe99/DeepMath-103K"}, "objects": []})
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


def test_nothing_is_said_that_was_not_measured(tmp_path):
    run = replace(make(tmp_path / "run", name="testbed/qwen3"), evaluation_paths={}, history=pd.DataFrame())
    card = ModelCard.load(write_card(run))
    assert card.data.base_model is None
    assert card.data.license == "mit"
    assert "Start and result were not evaluated." in card.text
    assert "No steps were recorded." in card.text


def test_a_directory_is_no_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    run = make(tmp_path / "run", name="runs/model")
    assert ModelCard.load(write_card(run)).data.base_model is None
    # Pushed from elsewhere the name would pass for one of the hub.
    monkeypatch.chdir("/")
    assert ModelCard.load(write_card(run, "me/it")).data.base_model is None


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
    call = {"words": {"prompts": HOSTILE}, "objects": []}
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


def refused(status):
    request = httpx.Request("POST", "https://huggingface.co/api")
    return HfHubHTTPError(f"{status} Client Error", response=httpx.Response(status, request=request))


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        (refused(401), "log in with `hf auth login`, or set HF_TOKEN"),
        (refused(403), "a token that may write there"),
        (refused(500), "check the network and the name"),
        (httpx.ConnectError("no route to host"), r"cannot be pushed \(no route to host\); check the network"),
        (OSError("disk"), r"cannot be pushed \(disk\)"),
    ],
)
def test_what_the_hub_refuses_is_one_line(tmp_path, hub, fails, message):
    hub.fails = fails
    with pytest.raises(UserError, match=message) as info:
        make(tmp_path / "run").push_to_hub("me/it")
    assert "\n" not in str(info.value)


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
