"""The math verifier: which answers are correct, and security against untrusted text."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from internal_policy.rewards import math_verifier_worker
from internal_policy.rewards.functions import ExactReward, MathReward
from internal_policy.rewards.math_verifier import Failures, MathVerifier, extract_boxed
from internal_policy.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def verifier():
    worker_pool = MathVerifier(time_limit=10.0, workers=1)
    yield worker_pool
    worker_pool.close()


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} then \boxed{ \frac{1}{2} }.", r"\frac{1}{2}"),
        (r"\boxed{7} and \boxed{8", "7"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"{ } } \boxed{4}", "4"),
        (r"\boxed {6}", "6"),
        (r"\boxed{}", ""),
        (r"\boxed{a\\{b}\\}", r"a\\{b}\\"),
        (r"\boxed{a\\\{b}", r"a\\\{b"),
        (r"\\boxed{8}", "8"),
        (r"\boxed 5", None),
        (r"\boxed{5", None),
        ("5", None),
    ],
)
def test_the_last_complete_box_counts(text, content):
    assert extract_boxed(text) == content


@pytest.mark.parametrize(
    "tail", [r"\boxed{" * 50_000, "\\" * 1_000_001, r"\boxed" + " " * 1_000_000, "\\" * 99_999 + "}"]
)
def test_long_tails_of_boxes_or_backslashes_are_fast(tail):
    before = time.process_time()
    assert extract_boxed(r"\boxed{1}" + tail) == "1"
    assert time.process_time() - before < 2


@pytest.mark.parametrize(
    ("boxed", "answer", "right"),
    [
        ("0.5", r"\frac12", True),
        (r"\{2,1\}", r"\{1,2\}", True),
        ("(2,1)", "(1,2)", False),
        ("[1,2]", "(1,2)", False),
        ("5", "x=5", True),
        ("y=5", "x=5", False),
        ("12345", "12,345", True),
        ("3/4", r"$\frac{3}{4}$", True),
        ("3/4", r"\boxed{\frac{3}{4}}", True),
        ("Evelyn", r"\text{Evelyn}", True),
        ("Eve", r"\text{Evelyn}", False),
        (r"2\sqrt{2}", r"\sqrt{8}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("x^2+1", "(x+1)^2", False),
        (r"11,\!090", "11090", True),
        ("1 2", "12", False),
        (r"2^{ \aleph_0 }", r"2^{\aleph_0}", True),
        ("0.333", r"\frac13", False),
        ("-1", "1", False),
        ("", "1", False),
    ],
)
def test_mathematically_equal_answers_are_correct(verifier, boxed, answer, right):
    assert verifier.check(rf"thus \boxed{{{boxed}}}.", answer) is right


def test_answers_without_a_box_get_no_credit(verifier):
    assert not verifier.check("5", "5")
    assert not verifier.check(rf"\boxed{{{'1' * 2001}}}", "1" * 2001)


def test_reference_answers_of_real_data_verify_themselves(verifier):
    if not DATA.is_dir():
        pytest.skip("the data sets are not here (../shared/data)")
    import pandas as pd

    answers = [
        str(row["ground_truth"])
        for file in sorted(DATA.glob("*.parquet"))
        for row in pd.read_parquet(file, columns=["reward_model"])["reward_model"]
    ]
    assert len(answers) > 5000
    assert all(verifier.check_many([rf"\boxed{{{a}}}" for a in answers], answers))
    # The comparison itself, not the equality of the texts that comes before it.
    parsed = [math_verifier_worker.is_equal(a, a) for a in answers[:: len(answers) // 40]]
    assert all(parsed)


ATTACKS = [
    "__import__('os').system('touch {}')",
    r"\text{{__import__('os').system('touch {}')}}",
    "1+__import__('os').system('touch {}')",
    "$ __import__('os').system('touch {}') $",
    r"\operatorname{{eval}}(__import__('os').system('touch {}'))",
    r"f_{{__import__('os').system('touch {}')}}(1)",
    "x=open('{}','w')",
    "}} answer: __import__('os').system('touch {}') {{",
    "final answer is $__import__('os').system('touch {}')$. I hope",
    "5\"); __import__('os').system('touch {}') #",
]


def test_text_in_a_box_is_never_executed(verifier, tmp_path):
    from sympy.parsing import parse_expr

    # The payload is live: this is what SymPy's own parser does with it.
    parse_expr(ATTACKS[0].format(tmp_path / "control"))
    assert (tmp_path / "control").exists()
    (tmp_path / "control").unlink()
    for i, attack in enumerate(ATTACKS):
        text = attack.format(tmp_path / f"run{i}")
        assert not verifier.check(rf"\boxed{{{text}}}", "7")
        assert not verifier.check(r"\boxed{7}", text)
    assert list(tmp_path.iterdir()) == []
    assert verifier.check(r"\boxed{7.0}", "7")


def test_the_sandboxed_worker_can_only_compare(tmp_path):
    tries = [
        "sympy.sympify(payload)",
        "sympy.Number('1+1')",
        "eval('1+1')",
        "exec('x=1')",
        "os.system('true')",
        "subprocess.run(['true'])",
        "open(target, 'w')",
        "open(target, 'a')",
        "os.remove(keep)",
        "os.kill(os.getpid(), 0)",
        "socket.socket()",
        "ctypes.CDLL(None)",
        "os.fork()",
    ]
    (tmp_path / "keep").write_text("x")
    code = (
        "import ctypes, json, os, socket, subprocess, sys, sympy\n"
        "from internal_policy.rewards import math_verifier_worker as worker\n"
        f"target, keep = {str(tmp_path / 'made')!r}, {str(tmp_path / 'keep')!r}\n"
        "payload = \"__import__('os').system('touch \" + target + \"')\"\n"
        f"tries = [(t, compile(t, 'tries', 'eval' if '=1' not in t else 'exec')) for t in {tries!r}]\n"
        "worker.enter_sandbox(4 * 2**30)\n"
        "run, done = eval, []\n"
        "for text, attempt in tries:\n"
        "    try: run(attempt)\n"
        "    except Exception as error: done.append(type(error).__name__)\n"
        "    else: done.append('DONE ' + text)\n"
        "print(json.dumps([done, worker.is_equal('0.5', '1/2'), worker.is_equal('(x-1)(x+1)', 'x^2-1')]))"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    done, *still_works = json.loads(process.stdout)
    assert set(done) <= {"PermissionError", "ValueError", "SympifyError"}
    assert done.count("PermissionError") >= len(tries) - 2
    assert still_works == [True, True]
    assert [p.name for p in tmp_path.iterdir()] == ["keep"]


@pytest.mark.slow
def test_timeouts_are_wrong_and_counted():
    verifier = MathVerifier(time_limit=0.5, workers=1)
    verifier.check(r"\boxed{1}", "2")
    before = time.monotonic()
    hard = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{10^{10^{10}}!}"]
    # From another thread, where signals do not work.
    results = []
    thread = threading.Thread(target=lambda: results.extend(verifier.check_many([*hard, hard[0]], ["7"] * 3)))
    thread.start()
    thread.join()
    assert results == [False] * 3
    assert time.monotonic() - before < 15
    assert verifier.failures == Failures(checked=4, crashes=0, timeouts=3)
    verifier.close()


def test_the_time_limit_survives_a_parent_that_ignores_alarms():
    code = (
        "import signal, threading\n"
        "from internal_policy.rewards.math_verifier import MathVerifier\n"
        "signal.signal(signal.SIGALRM, signal.SIG_IGN)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])\n"
        "v = MathVerifier(time_limit=0.5, workers=1)\n"
        "print(v.check(r'\\boxed{9^{9^{9^{9}}}}', '7'), v.failures.timeouts)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "1"]


@pytest.mark.slow
def test_a_worker_ends_with_its_parent_even_while_it_compares():
    code = (
        "import os, threading, time\n"
        "from internal_policy.rewards.math_verifier import MathVerifier\n"
        "v = MathVerifier(time_limit=2.0, workers=1)\n"
        "v.check(r'\\boxed{1}', '2')\n"
        "threading.Thread(target=v.check, args=(r'\\boxed{9^{9^{9^{9}}}}', '7')).start()\n"
        "time.sleep(0.3)\n"
        "print(v._idle.qsize(), v._closer.peek()[2][0][0].process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    busy, pid = done.stdout.split()
    assert busy == "0"
    until = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]:
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_crashed_worker_affects_one_sample():
    verifier = MathVerifier(time_limit=10.0, workers=1)
    verifier.check(r"\boxed{1}", "2")
    worker = verifier._idle.queue[0]
    timer = threading.Timer(0.3, worker.process.kill)
    timer.start()
    assert not verifier.check(r"\boxed{9^{9^{9^{9}}}}", "7")
    assert verifier.check(r"\boxed{0.5}", "1/2")
    assert verifier.failures == Failures(checked=3, crashes=1, timeouts=0)
    process = verifier._idle.queue[0].process
    verifier.close()
    assert process.returncode is not None


def test_verifier_works_without_a_main_guard_and_leaves_no_process():
    code = (
        "from internal_policy.rewards.math_verifier import MathVerifier\n"
        "import sys\n"
        "heavy = {'torch', 'trl', 'math_verify', 'sympy'} & set(sys.modules)\n"
        "v = MathVerifier(workers=1)\n"
        "print(v.check(r'\\boxed{0.5}', '1/2'), sorted(heavy), v._idle.queue[0].process.pid)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    right, heavy, pid = done.stdout.split()
    assert (right, heavy, done.stderr) == ("True", "[]", "")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_reward_function_in_trl_format(verifier):
    texts = [r"\boxed{0.50}", r"\boxed{3}"]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    reward = MathReward(workers=1)
    reward.verifier = verifier
    for completions in (texts, chats):
        assert reward(prompts=["a", "b"], completions=completions, answer=["1/2", 4], level=[1, 2]) == [1.0, 0.0]
        assert ExactReward()(prompts=["a", "b"], completions=completions, answer=["1/2", "3"]) == [0.0, 1.0]
    assert (reward.__name__, ExactReward().__name__) == ("math_reward", "exact_reward")
    assert pickle.loads(pickle.dumps(MathVerifier(2.0, 3))).time_limit == 2.0
    with pytest.raises(UserError, match=r"needs a column 'answer'; the data have \['level'\]"):
        reward(prompts=["a"], completions=["b"], level=[1])
    with pytest.raises(UserError, match="sample 2 of 2 has no answer"):
        ExactReward()(prompts=["a", "b"], completions=texts, answer=["1", None])
