"""Statistics of groups of tokens: against formulas in float64 over single tokens, stored, resumed, and refused."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from capture_checks import captured
from command_line import run as run_command
from command_line import save
from tiny import VOCAB, ragged_responses, reference, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from internal_policy import Analysis, UserError, analyze
from internal_policy.analysis import group_capture, pipeline
from internal_policy.analysis.config import GROUPINGS
from internal_policy.analysis.inputs import Inputs
from internal_policy.analysis.token_labels import LABELS
from internal_policy.cli import display
from internal_policy.extractors import reduce_responses, registry
from internal_policy.models.families import FAMILIES as TABLE
from internal_policy.report import analysis_report
from internal_policy.report.reproduce import analysis_commands
from internal_policy.statistics import QUANTITIES

NATS = 1e-5
"""What float32 states may differ by from the definition in float64."""
ROUNDING = 5e-6
"""The same float32 values from batches of other sizes: entropies below 5 nats, and intervals of some times their
error."""
KINDS = {"digit": 20, "operator": 8, "word": 19, "format": 12}
WORDS = ["<bos>", "<eos>", *map(str, range(20)), *"+-*/<>=^", *"abcdefghijklmnopqrs", *".,;:!?()[]{}"]


def tokenizer():
    """A word-level tokenizer of numbers, operators, letters and marks."""
    assert len(WORDS) == VOCAB
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


def records():
    """Six responses to four prompts, half of them right."""
    found = ragged_responses(6, seed=6, longest=36)
    for first, second in ((0, 1), (2, 3)):
        start = found[first]["input_ids"][: found[first]["prompt_length"]]
        rest = found[second]["input_ids"][found[second]["prompt_length"] :]
        found[second] |= {"input_ids": [*start, *rest], "prompt_length": len(start)}
    return [{**record, "reward": float(i % 2)} for i, record in enumerate(found)]


def kind_of(token_id):
    ends = np.cumsum([2, *KINDS.values()])
    return "format" if token_id < 2 else list(KINDS)[int(np.searchsorted(ends, token_id, side="right")) - 1]


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def token_values(model):
    """Every value of every token in float64, with the labels of each grouping, as a table in long form."""
    oracle, rows = copy.deepcopy(model), []
    for number, record in enumerate(records()):
        layers, policy = reference(oracle, record)
        ids, start = record["input_ids"], record["prompt_length"]
        n = len(ids) - start
        for t in range(n):
            keys = {
                "response": number,
                # Responses 0 and 1 are to one prompt, and 2 and 3.
                "prompt": {1: 0, 3: 2}.get(number, number),
                "kind": kind_of(ids[start + t]),
                "position": f"decile {next(d for d in range(1, 11) if 10 * t < d * n)}",
                "correct": "right" if record["reward"] else "wrong",
                "policy": policy[t, 1],
            }
            for layer, values in enumerate(layers, start=1):
                for site in ("layer", "attn", "ffn"):
                    into, out, rescaled = (values[f"{site}_{end}"][t] for end in ("in", "out", "rescaled"))
                    numbers = (into, out, out - into, rescaled - into, out - rescaled)
                    cosine = np.nan if site == "layer" else values[f"{site}_cosine"][t]
                    lengths = [values[f"{site}_rms_{end}"][t] for end in ("in", "out")]
                    row = dict(zip(QUANTITIES, (*numbers, cosine, *lengths), strict=True))
                    rows.append({**keys, "token": t, "layer": layer, "site": site, **row})
    table = pd.DataFrame(rows)
    order = table.drop_duplicates(["response", "token"]).sort_values("policy", ascending=False)
    fifth = order.head(round(0.2 * len(order)))
    highest = pd.MultiIndex.from_frame(fifth[["response", "token"]])
    is_highest = pd.MultiIndex.from_frame(table[["response", "token"]]).isin(highest)
    return table.assign(**{"policy-entropy": np.where(is_highest, "forking", "rest")})


def measured(model, **options):
    return analyze(model, tokenizer(), responses=records(), **options)


@pytest.fixture(scope="module")
def analysis(model, tmp_path_factory):
    """All groupings from a pass of its own, because the tokens of two responses are kept."""
    return measured(model, by=GROUPINGS, keep_tokens=2, batch_size=4, output=tmp_path_factory.mktemp("groups"))


def test_an_analysis_without_the_parts_of_changes_is_refused(analysis):
    names = ["change_direction", "change_scale", "rms_in", "rms_out"]
    older = replace(analysis, responses=analysis.responses.drop(columns=names))
    for grouping in ("correct", "position"):
        with pytest.raises(UserError, match="lacks change_direction, change_scale, rms_in, rms_out; analyse again"):
            older.by(grouping)


def mean_and_error(values, prompts):
    """The mean over tokens, and its error clustered by prompt, written out as loops."""
    mean = values.mean()
    sums = [(values[prompts == p] - mean).sum() for p in set(prompts)]
    n = len(sums)
    return mean, np.sqrt(n / (n - 1) * sum(s**2 for s in sums)) / len(values) if n > 1 else np.nan


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_every_statistic_is_that_of_the_tokens_of_the_group(analysis, token_values, grouping):
    groups = analysis.by(grouping)
    assert groups.note is None
    assert groups.n_responses == 6
    assert set(groups.groups) == set(token_values[grouping])
    assert list(groups.groups) == [g for g in LABELS[grouping] if g in groups.groups]
    assert list(groups.layers.columns) == ["group", *analysis.layers.columns]
    by_key = dict(list(token_values.groupby([grouping, "layer", "site"])))
    assert len(groups.layers) == len(by_key)
    for row in groups.layers.to_dict("records"):
        tokens = by_key[row["group"], row["layer"], row["site"]]
        assert row["n_tokens"] == len(tokens)
        for name in QUANTITIES:
            mean, error = mean_and_error(tokens[name].to_numpy(), tokens["prompt"].to_numpy())
            assert row[name] == pytest.approx(mean, abs=NATS, nan_ok=True)
            assert row[f"{name}_stderr"] == pytest.approx(error, abs=NATS, nan_ok=True)
            if error > NATS:
                assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
    once = token_values.drop_duplicates(["response", "token"])
    for row, share in zip(groups.policy_entropy.to_dict("records"), groups.shares.to_dict("records"), strict=True):
        tokens = once[once[grouping] == row["group"]]
        mean, error = mean_and_error(tokens["policy"].to_numpy(), tokens["prompt"].to_numpy())
        assert (row["mean"], row["stderr"]) == pytest.approx((mean, error), abs=NATS, nan_ok=True)
        wanted = (row["group"], len(tokens), len(tokens) / len(once), tokens["response"].nunique())
        assert tuple(share.values()) == pytest.approx(wanted)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_groups_partition_the_tokens(analysis, grouping):
    groups = analysis.by(grouping)
    table = groups.layers.set_index(["layer", "site"])
    total = table["n_tokens"].groupby(level=[0, 1]).sum()
    assert (total == analysis.n_tokens).all()
    whole = analysis.layers.set_index(["layer", "site"])
    for name in QUANTITIES:
        sums = (table[name] * table["n_tokens"]).groupby(level=[0, 1]).sum(min_count=1)
        pd.testing.assert_series_equal(sums / total, whole[name].sort_index(), check_names=False, atol=1e-12, rtol=0)
    assert groups.shares["share"].sum() == pytest.approx(1)


def test_differences_are_those_of_the_tokens_with_errors_clustered_by_prompt(analysis, token_values):
    groups = analysis.by("kind")
    pair = groups.difference("digit", "word")
    rest = groups.difference("digit")
    assert {"n_pairs", "change_low", "rms_in_stderr"} <= set(pair.columns)
    for table, others in ((pair, ["word"]), (rest, ["word", "operator", "format"])):
        for row in table.to_dict("records"):
            own = token_values[(token_values["layer"] == row["layer"]) & (token_values["site"] == row["site"])]
            sides = [own[own["kind"] == "digit"], own[own["kind"].isin(others)]]
            for name in ("change", "cosine") if row["site"] == "ffn" else ("change_direction",):
                means = [side[name].mean() for side in sides]
                assert row[name] == pytest.approx(means[0] - means[1], abs=NATS)
                # Each prompt's part of one mean less its part of the other.
                parts = []
                for side, mean in zip(sides, means, strict=True):
                    n = side["prompt"].nunique()
                    residuals = (side[name] - mean).groupby(side["prompt"]).sum() / len(side)
                    parts.append(residuals * np.sqrt(n / (n - 1)))
                error = np.sqrt(parts[0].sub(parts[1], fill_value=0).pow(2).sum())
                assert row[f"{name}_stderr"] == pytest.approx(error, abs=NATS)
                assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
            both = set(sides[0]["prompt"]) & set(sides[1]["prompt"])
            assert row["n_pairs"] == len(both)
    back = groups.difference("word", "digit")
    np.testing.assert_allclose(back["change"], -pair["change"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(back["change_low"], -pair["change_high"], rtol=0, atol=1e-12)
    for arguments, message in (
        (("digits",), r"no group is called 'digits'; groups are digit, .* \(did you mean digit\?\)"),
        (("digit", "digit"), "has nothing to be compared with"),
    ):
        with pytest.raises(UserError, match=message):
            groups.difference(*arguments)


def test_the_summary_averages_the_ffn_over_the_layers_of_exploration(analysis, token_values):
    stages = ("exploration", "exploration", "convergence")
    groups = replace(analysis.by("policy-entropy"), stages=stages)
    tokens = token_values[(token_values["site"] == "ffn") & (token_values["layer"] < 3)]
    means = tokens.groupby("policy-entropy")["change"].mean()
    summary = groups.summary.set_index("group")
    np.testing.assert_allclose(summary["change"], means[summary.index], rtol=0, atol=NATS)
    assert summary.loc["forking", "difference"] == pytest.approx(means["forking"] - means["rest"], abs=NATS)
    assert summary.loc["rest", "difference"] == pytest.approx(-summary.loc["forking", "difference"], abs=1e-12)
    assert summary.loc["rest", "difference_stderr"] == summary.loc["forking", "difference_stderr"]
    assert "forking" in groups._repr_html_()
    # Without such a layer there is nothing to average.
    none = replace(groups, stages=("convergence",) * 3).summary
    assert none[["change", "difference", "difference_low"]].isna().all(axis=None)
    assert none["policy_entropy"].notna().all()


def test_the_pass_agrees_with_kept_tokens(analysis, model, monkeypatch):
    monkeypatch.setattr(group_capture, "reduce_responses", lambda *_: pytest.fail("the responses are run again"))
    kept = measured(model, by=GROUPINGS, keep_tokens=6)
    keys = ["response", "group", "layer", "site"]
    for grouping in GROUPINGS:
        one, other, later = (
            each.by(grouping).responses.sort_values(keys, ignore_index=True)
            # Without the addition the groups are those of the kept tokens.
            for each in (kept, analysis, replace(kept, additions={}))
        )
        assert one["response"].nunique() == 6
        pd.testing.assert_frame_equal(one, other[one.columns], rtol=0, atol=ROUNDING)
        pd.testing.assert_frame_equal(one, later[one.columns])


def test_a_function_labels_the_tokens_that_were_kept(analysis, token_values):
    seen = []

    def label(token, position, response):
        seen.append((token, position, response.prompt_length))
        own = response.input_ids[response.prompt_length + position]
        assert WORDS[own] == token
        return None if position == 0 else own % 2 == 0

    groups = analysis.by(label)
    lengths = [len(r["input_ids"]) - r["prompt_length"] for r in records()[:2]]
    assert len(seen) == sum(lengths)
    assert groups.grouping == "label"
    assert groups.groups == ("False", "True")
    assert groups.n_responses == 2
    assert groups.note == "2 of 6 responses, those kept token by token"
    assert groups.note in groups._repr_html_()
    assert groups.shares["n_tokens"].sum() == sum(lengths) - 2
    ids = {(i, t): each for i, r in enumerate(records()) for t, each in enumerate(r["input_ids"][r["prompt_length"] :])}
    even = [
        ids[r, t] % 2 == 0 and t > 0 and r < 2 for r, t in zip(token_values.response, token_values.token, strict=True)
    ]
    wanted = token_values[even].groupby(["layer", "site"])["change"].mean()
    table = groups.layers[groups.layers["group"] == "True"].set_index(["layer", "site"])
    np.testing.assert_allclose(table["change"], wanted[table.index], rtol=0, atol=NATS)
    # Numbers are ordered by size, and text by alphabet.
    assert analysis.by(lambda token, position, response: 10 - position % 4).groups == ("7", "8", "9", "10")
    with pytest.raises(UserError, match="labels no token: it returned None for each"):
        analysis.by(lambda token, position, response: None)


def test_a_built_in_name_that_was_not_measured_works_on_the_tokens_that_were_kept(analysis, token_values):
    bare = replace(analysis, additions={})
    groups = bare.by("kind")
    assert groups.note == "2 of 6 responses, those kept token by token"
    own = token_values[token_values["response"] < 2].groupby(["kind", "layer", "site"])["change"].mean()
    table = groups.layers.set_index(["group", "layer", "site"])
    np.testing.assert_allclose(table["change"], own[table.index], rtol=0, atol=NATS)
    # Whether an answer is right is known of every response.
    assert bare.by("correct").note is None
    pd.testing.assert_frame_equal(bare.by("correct").layers, analysis.by("correct").layers)
    some = bare.sequences.assign(reward=[1.0, None, 0.0, None, None, 1.0])
    assert replace(bare, sequences=some).by("correct").note == "3 of 6 responses, those with a reward"


def test_groups_that_cannot_be_made_are_refused(analysis, model):
    bare = replace(analysis, additions={})
    nothing = replace(bare, tokens=bare.tokens.iloc[:0])
    sampled = replace(bare, positions={"tolerance": 0.1})
    cases = (
        (bare, "kinds", r"tokens are grouped by 'kinds'; needed is one of kind, .* \(did you mean kind\?\)"),
        (nothing, "kind", r"'kind' needs the values of single tokens.*keep_tokens, or with by=\(\"kind\",\)$"),
        (nothing, lambda *_: 1, r"a function needs the values of single tokens.*analyse again with keep_tokens$"),
        (sampled, "position", "chose positions at random for its tolerance; analyse again without tolerance"),
        (replace(bare, tokens=bare.tokens.drop(columns="token_text")), "kind", "needs the texts of tokens"),
        (replace(bare, sequences=bare.sequences.assign(reward=None)), "correct", "none of the 6 responses has one"),
    )
    for given, by, message in cases:
        with pytest.raises(UserError, match=message):
            given.by(by)


@pytest.mark.parametrize("reward", [None, float("nan")])
def test_grouping_by_correctness_without_rewards_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, reward):
    save(tiny_model("llama"), tmp_path / "model")

    def refuse(*_):
        pytest.fail("the model was loaded")

    monkeypatch.setattr(registry, "opener", refuse)
    records = [{**record, "reward": reward} for record in ragged_responses(5)]
    with pytest.raises(UserError, match=r"none of the 5 responses has one; give --responses with a reward each"):
        analyze(str(tmp_path / "model"), responses=records, by="correct", output=tmp_path / "out")
    for prompts, named in ((None, "MATH-500"), (["w1 w2"], "the prompts that were given")):
        with pytest.raises(UserError, match=rf"sampled to \S*{named} get none .*give --responses with a reward each"):
            analyze(str(tmp_path / "model"), prompts=prompts, by="correct", output=tmp_path / "out")
    assert not list(tmp_path.rglob("analysis.json"))


def test_sampling_of_a_model_in_memory_is_refused_before_it_begins(model, monkeypatch):
    monkeypatch.setattr(pipeline, "gather_inputs", lambda *_: Inputs([None], []))
    with pytest.raises(UserError, match="get none"):
        analyze(model, tiny_tokenizer(), by="correct")


def test_the_command_refuses_grouping_without_rewards_in_one_line(tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps({"prompt": "a=1;a?", "response": "a=1"}) + "\n")
    for source in (("--responses", "r.jsonl"), ("--prompts", "r.jsonl")):
        done = run_command("analyze", "--by", "correct", *source, cwd=tmp_path)
        assert done.stderr.count("\n") == 1
        assert "--by correct needs rewards" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


@pytest.mark.parametrize(("reward", "group"), [(1.0, "right"), (0.0, "wrong")])
def test_a_single_group_is_said_to_leave_nothing_to_compare(analysis, capsys, reward, group):
    assert analysis.by("correct").nothing_to_compare is None
    alike = analysis.additions["groups"][lambda rows: rows["grouping"] == "correct"].assign(group=group)
    groups = alike.drop_duplicates(["response", "layer", "site"])
    sequences = analysis.sequences.assign(reward=reward)
    settings = {**analysis.config, "by": ["correct"]}
    only = replace(analysis, sequences=sequences, additions={"groups": groups}, config=settings, path=None)
    sentence = f"by correct there is one group only ({group}), so there is nothing to compare"
    assert only.by("correct").nothing_to_compare == sentence
    display.show_analysis(only)
    out = capsys.readouterr().out
    assert " ".join(out.split()).count(sentence) == 1
    assert sentence in analysis_report(only)


def test_unscored_responses_are_left_out_with_a_line(model, caplog):
    given = [{**record, "reward": None if i < 2 else record["reward"]} for i, record in enumerate(records())]
    with caplog.at_level(logging.WARNING):
        found = analyze(model, tokenizer(), responses=given, by="correct")
    assert "--by correct leaves out 2 responses without a reward" in caplog.text
    assert set(found.by("correct").responses["response"]) == {2, 3, 4, 5}


@pytest.mark.slow
def test_groups_are_stored_and_added_to_a_finished_analysis(analysis, model, tmp_path, monkeypatch):
    first = measured(model, keep_tokens=2, output=tmp_path)
    assert first.groupings == ()
    some = measured(model, keep_tokens=2, output=tmp_path, by=("kind",))
    before = (some.path / "layers.csv").read_bytes()
    assert some.groupings == ("kind",)
    calls = []
    monkeypatch.setattr(group_capture, "_captured", lambda run, names: calls.append(names) or _captured(run, names))
    every = measured(model, keep_tokens=2, output=tmp_path, by=("position", "policy-entropy"))
    # What was measured stays, and is not measured again.
    assert calls == [["position", "policy-entropy"]]
    assert every.groupings == ("kind", "position", "policy-entropy")
    assert (every.path / "layers.csv").read_bytes() == before
    loaded = Analysis.load(every.path)
    for grouping in every.groupings:
        table, wanted = loaded.by(grouping).layers, analysis.by(grouping).layers
        pd.testing.assert_frame_equal(table, wanted, rtol=0, atol=ROUNDING)
    assert measured(model, keep_tokens=2, output=tmp_path, by=("kind", "position")).groupings == every.groupings
    assert len(calls) == 1


_captured = group_capture._captured


@pytest.mark.slow
def test_an_interrupted_pass_is_resumed(analysis, model, tmp_path, monkeypatch):
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        # The entropies of the policy take three batches; the second batch of the groups is interrupted.
        if len(calls) == 5:
            raise KeyboardInterrupt
        return reduce_responses(*arguments)

    monkeypatch.setattr(group_capture, "reduce_responses", interrupted)
    options = {"keep_tokens": 2, "batch_size": 2, "output": tmp_path, "by": ("kind", "policy-entropy")}
    with pytest.raises(KeyboardInterrupt):
        measured(model, **options)
    resumed = measured(model, **options)
    assert [len(batch) for _, batch in calls] == [2, 2, 2, 2, 2, 2, 2]
    for grouping in ("kind", "policy-entropy"):
        found, wanted = (each.by(grouping).layers for each in (resumed, analysis))
        pd.testing.assert_frame_equal(found, wanted, rtol=0, atol=ROUNDING)
    assert not (resumed.path / "work").exists()


@pytest.mark.parametrize("lens", ["policy", pytest.param("logit-lens", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "model_type",
    [name if name in ("gemma2", "qwen3_moe") else pytest.param(name, marks=pytest.mark.slow) for name in TABLE],
)
def test_groups_of_every_family_are_means_of_its_token_values(model_type, lens):
    model, given = tiny_model(model_type), records()
    values = captured(model, given, lens=lens)
    found = analyze(model, tokenizer(), responses=given, keep_tokens=0, lens=lens, by=("policy-entropy",))
    entropies = np.concatenate([v.policy[:, 1] for v in values])
    highest = entropies >= np.sort(entropies)[-round(0.2 * len(entropies))]
    table = found.by("policy-entropy").layers.set_index(["group", "site"])
    layers = np.concatenate([v.layers for v in values]).astype(np.float64)
    for group, chosen in (("forking", highest), ("rest", ~highest)):
        for site in ("layer", "attn", "ffn"):
            own = table.loc[(group, site)]
            for name, quantity in (("entropy_in", "in"), ("entropy_out", "out"), ("rms_out", "rms_out")):
                wanted = layers[chosen][:, :, quantity_index(f"{site}_{quantity}")].mean(axis=0)
                np.testing.assert_allclose(own[name], wanted, rtol=1e-5, atol=NATS)


def quantity_index(name):
    from internal_policy.extractors import QUANTITIES as CAPTURED

    return CAPTURED.index(name)


@pytest.mark.slow
def test_the_terminal_and_the_report_show_the_groups(analysis, capsys):
    with_groups = replace(analysis, path=None, selection=with_stages(analysis))
    display.show_analysis(with_groups)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    page = analysis_report([with_groups])
    for grouping in GROUPINGS:
        assert [f"{analysis.name}:", "tokens", "by", grouping] in lines
        assert f'data-part="groups-{grouping}"' in page
        for row in with_groups.by(grouping).summary.to_dict("records"):
            share, name = f"{row['share']:.1%}", row["group"].split()
            (line,) = (line for line in lines if line[: len(name) + 2] == [*name, str(row["n_tokens"]), share])
            assert line[len(name) + 3].startswith(f"{row['change']:+.3f}")
            assert line[-1].startswith(f"{row['difference']:+.3f}")
            assert f"{row['n_tokens']} ({share})" in page
            assert f"{row['difference']:+.3f}".replace("-", "−") in page


def test_the_commands_that_reproduce_an_analysis_name_its_groupings(analysis):
    assert f"by={GROUPINGS!r}" in analysis_commands(Analysis.load(analysis.path)).python.replace("\n", "")
    # JSON has lists where the settings have tuples, also for no grouping at all.
    assert "by=" not in analysis_commands(replace(analysis, config={**analysis.config, "by": []})).python


def with_stages(analysis):
    """The selection of an analysis as if its first two layers explored."""
    stages = ("exploration", "exploration", "convergence")
    return replace(analysis.selection, stages=stages)


@pytest.mark.slow
def test_the_command_groups_tokens_shows_them_and_draws_them(tmp_path):
    words = ("analyze", "--max-responses", 6, "--max-new-tokens", 12, "--by", "kind", "--by", "position")
    done = run_command(*words, cwd=tmp_path, code=0)
    assert "testbed/qwen3: tokens by kind" in done.stdout
    assert "decile 10" in done.stdout
    (figure,) = tmp_path.rglob("groups_kind.png")
    assert (figure.parent / "groups_position.pdf").is_file()
    again = run_command(*words, "--by", "correct", cwd=tmp_path, code=0)
    assert "tokens by correct" in again.stdout
    assert "tokens by position" in again.stdout
    assert (figure.parent / "groups_correct.png").is_file()


def test_a_misspelt_grouping_is_refused_before_anything_is_loaded(tmp_path):
    done = run_command("analyze", "--by", "knd", cwd=tmp_path)
    assert "--by is 'knd'; needed is one of kind, position, correct, policy-entropy (did you mean kind?)" in done.stderr
    assert list(tmp_path.iterdir()) == []
