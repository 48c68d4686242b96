"""A stage of a workspace: every item is computed once, by any process, and never again once stored."""

from __future__ import annotations

import numpy as np
import pytest

from internal_policy import UserError
from internal_policy.analysis.results import ANALYSIS
from internal_policy.utils.distributed import Processes
from internal_policy.utils.workspace import Workspace

LENGTHS = {0: 3, 1: 9, 2: 5, 3: 9, 4: 1}


class SingleProcess(Processes):
    """One of several processes that waits for nobody."""

    def wait_for_everyone(self):
        pass


def run(workspace, state=None, seen=None, at=None):
    def compute(batch):
        if at in batch:
            raise KeyboardInterrupt
        if seen is not None:
            seen.append(batch)
        return {"square": np.array(batch) ** 2}

    return workspace.run_stage("squares", LENGTHS, 2, compute, description="squares", processes=state)


@pytest.fixture
def workspace(tmp_path):
    ready = Workspace(tmp_path / "a", ANALYSIS)
    ready.open({"seed": 0}, overwrite=False)
    return ready


def squares(portions):
    return {int(i): int(v) for p in portions for i, v in zip(p["index"], p["square"], strict=True)}


def test_longest_items_are_computed_first_and_stored_items_are_skipped(workspace):
    seen = []
    with pytest.raises(KeyboardInterrupt):
        run(workspace, seen=seen, at=0)
    assert seen == [[1, 3]]
    assert squares(run(workspace, seen=seen)) == {i: i * i for i in LENGTHS}
    assert seen == [[1, 3], [2, 0], [4]]
    run(workspace, seen=seen)
    assert len(seen) == 3


def test_processes_split_the_batches_and_each_returns_all(workspace):
    seen = []
    with pytest.raises(UserError, match="2 of 5 responses are there after all processes have finished"):
        run(workspace, SingleProcess(number=2, rank=1), seen)
    assert seen == [[2, 0]]
    assert squares(run(workspace, SingleProcess(number=2), seen)) == {i: i * i for i in LENGTHS}
    assert seen == [[2, 0], [1, 3], [4]]
    assert len(run(workspace, SingleProcess(number=2, rank=1))) == 3


def empty(path):
    path.write_bytes(b"")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [empty, truncate, flip])
def test_a_damaged_shard_is_set_aside_and_computed_again(workspace, caplog, damage):
    run(workspace)
    shard = sorted(workspace.work.glob("*.npz"))[0]
    damage(shard)
    left, seen = shard.read_bytes(), []
    assert squares(run(workspace, seen=seen)) == {i: i * i for i in LENGTHS}
    assert len(seen) == 1
    assert caplog.messages == [f"{shard}: damaged, or of another run; kept as damaged-1-{shard.name}, and made again"]
    assert (workspace.work / f"damaged-1-{shard.name}").read_bytes() == left


def test_a_shard_that_was_deleted_is_computed_again(workspace):
    run(workspace)
    sorted(workspace.work.glob("*.npz"))[0].unlink()
    assert squares(run(workspace)) == {i: i * i for i in LENGTHS}


def test_a_shard_of_another_run_is_set_aside(workspace, tmp_path):
    other = Workspace(tmp_path / "b", ANALYSIS)
    other.open({"seed": 1}, overwrite=False)
    run(other)
    for shard in other.work.glob("*.npz"):
        shard.rename(workspace.work / shard.name)
    assert list(workspace.shards("squares")) == []
    assert len(list(workspace.work.glob("damaged-1-*"))) == 3


def test_other_settings_are_named(workspace, tmp_path):
    with pytest.raises(
        UserError, match=r"holds an unfinished analysis with other settings \(lens None -> x, seed 0 -> 1\)"
    ):
        Workspace(tmp_path / "a", ANALYSIS).open({"seed": 1, "lens": "x"}, overwrite=False)
    assert Workspace(tmp_path / "a", ANALYSIS).open({"seed": 0}, overwrite=False)
    assert not Workspace(tmp_path / "a", ANALYSIS).open({"seed": 1}, overwrite=True)
