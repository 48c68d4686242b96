r"""Decide whether the ``\boxed{}`` answer of a response is the reference answer, without trusting the response.

The comparison runs in other processes (`math_verifier_worker`): what a model writes can keep SymPy busy forever inside
one big-integer operation that no Python signal handler interrupts, or take all memory, and a process can be killed.
The workers are programs of their own rather than `multiprocessing` children, because a spawned child runs the user's
script once more where it has no ``__main__`` guard, and a forked one inherits the trainer's locks and CUDA context.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from internal_policy.rewards.math_verifier_worker import START_LIMIT, normalize
from internal_policy.utils.errors import UserError

MAX_LENGTH = 2000
"""Characters; no reference answer is longer, so a longer box counts as wrong unread."""
MEMORY_LIMIT = 4 * 2**30
"""Address space of one worker, in bytes."""

_WORKER = Path(__file__).with_name("math_verifier_worker.py")
_TIMED_OUT = -signal.SIGALRM if hasattr(signal, "SIGALRM") else 1
"""Exit status of a worker that its own timer has ended."""
# A run of backslashes is matched possessively: with backtracking, a long one would take quadratic time.
_BRACES = re.compile(r"(?P<escape>\\++)(?P<box>boxed\s*+\{)?|[{}]")


def extract_boxed(text: str) -> str | None:
    r"""Return the content of the last complete ``\boxed{}`` of a text.

    Args:
        text: A response.

    Returns:
        The content without surrounding white space; None if no box is complete.
    """
    open_braces: list[tuple[int, int] | None] = []
    last, content, escaped = -1, None, -1
    # One pass, because a response may be ten thousand boxes that never close.
    for match in _BRACES.finditer(text):
        if match["box"]:
            open_braces.append((match.start(), match.end()))
        elif match["escape"]:
            # Backslashes escape one another in pairs, and an odd one what follows it.
            escaped = match.end() if len(match["escape"]) % 2 else -1
        elif match.start() == escaped:
            continue
        elif match[0] == "{":
            open_braces.append(None)
        elif match[0] == "}" and open_braces:
            box = open_braces.pop()
            if box and box[0] > last:
                last, content = box[0], text[box[1] : match.start()]
    return None if content is None else content.strip()


@dataclass
class Failures:
    """How often a reward could not be computed and 0 was given instead.

    Attributes:
        checked: Number of samples scored.
        crashes: Samples on which the function raised or its process died.
        timeouts: Samples that took too long.
    """

    checked: int = 0
    crashes: int = 0
    timeouts: int = 0


class _WorkerEnded(Exception):
    """The worker process has ended without an answer."""

    def __init__(self, reason: Literal["timeout", "crash"]) -> None:
        self.reason = reason


class _Worker:
    """One process that compares answers; started at the first question, and again after it has died."""

    def __init__(self, time_limit: float) -> None:
        self.time_limit = time_limit
        self.process: subprocess.Popen[str] | None = None
        self.owner = os.getpid()
        self.has_started = False

    def ask(self, boxed: str, answer: str) -> bool:
        try:
            if self.process is None or self.process.poll() is not None:
                self._start()
            return self._exchange(json.dumps([boxed, answer]) + "\n") == "1"
        except BaseException:
            # Also after an interrupt: a reply left in the pipe would be taken for the reply to the next question.
            self.stop()
            raise

    def _start(self) -> None:
        self.stop()
        # -P keeps the script's own folder off the module search path; a fixed hash seed fixes the order of sets.
        command = [sys.executable, "-P", "-B", str(_WORKER), str(self.time_limit), str(MEMORY_LIMIT)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
            text=True,
            encoding="utf-8",
        )
        try:
            reply = self._exchange()
        except _WorkerEnded as ended:
            # Once a worker has started, a later failure is not the user's to fix: the machine is short of something.
            if self.has_started:
                raise
            why = f"did not start in {START_LIMIT} seconds" if ended.reason == "timeout" else "ended while it started"
            raise UserError(f"the process that checks answers {why}; run {_WORKER} to see its messages") from ended
        if reply != "ready":
            raise UserError(
                f"answers cannot be checked: {reply.removeprefix('error ')}; needed is math-verify 0.9 (pip install "
                "'math-verify[antlr4_13_2]')"
            )
        self.has_started = True

    def _exchange(self, line: str = "") -> str:
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
            reply = process.stdout.readline()
        except OSError:
            reply = ""
        if not reply:
            # Without its pipes the process has ended or is about to; its own timer bounds the wait.
            raise _WorkerEnded("timeout" if process.wait() == _TIMED_OUT else "crash")
        return reply.strip()

    def stop(self) -> None:
        process, self.process = self.process, None
        # In a forked child the process belongs to the parent.
        if process is None or self.owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()


def _stop_all(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.stop()


class MathVerifier:
    r"""Compare the ``\boxed{}`` answers of responses with reference answers, in a pool of sandboxed processes.

    Args:
        time_limit: Seconds that one comparison may take; a longer one counts as wrong.
        workers: Number of processes; by default one per processor, at most 4.

    Attributes:
        failures: How many comparisons crashed or timed out.
    """

    def __init__(self, time_limit: float = 5.0, workers: int | None = None) -> None:
        if not 0 < time_limit < 3600:
            raise UserError(f"the time limit of a check is {time_limit} s; it must be above 0 and below 3600")
        self.time_limit = time_limit
        self.workers = max(1, workers or min(4, os.cpu_count() or 1))
        self.failures = Failures()
        self._open()

    def _open(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        workers = [_Worker(self.time_limit) for _ in range(self.workers)]
        # Last in, first out, so that a few checks start one process and not all of them.
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in workers:
            self._idle.put(worker)
        self._closer = weakref.finalize(self, _stop_all, workers)

    def check(self, response: str, answer: str) -> bool:
        r"""Compare the last ``\boxed{}`` of a response with the reference answer.

        Args:
            response: What the model wrote; never executed.
            answer: The reference answer: LaTeX or plain text, with or without ``$ $`` or ``\boxed{}`` around it.

        Returns:
            True if they are mathematically equal; False if not, if there is no box, or if the comparison failed.

        Raises:
            UserError: math-verify cannot be used.
        """
        return self.check_many([response], [answer])[0]

    def check_many(self, responses: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Compare many responses with their answers, in all processes of the pool.

        Args:
            responses: What the model wrote.
            answers: As many reference answers.

        Returns:
            The result of `check` for each.

        Raises:
            UserError: math-verify cannot be used.
        """
        if self._owner != os.getpid():
            self._open()
        pairs = [(extract_boxed(r), a) for r, a in zip(responses, answers, strict=True)]
        # Samples of one prompt often agree; each distinct pair is compared once.
        verdicts: dict[Any, bool | str | None] = {pair: _compare_texts(*pair) for pair in pairs}
        open_pairs = [pair for pair, verdict in verdicts.items() if verdict is None]
        if open_pairs:
            pool = ThreadPoolExecutor(self.workers)
            try:
                verdicts |= zip(open_pairs, pool.map(self._ask, *zip(*open_pairs, strict=True)), strict=True)
            finally:
                pool.shutdown(cancel_futures=True)
        results = [verdicts[pair] for pair in pairs]
        with self._lock:
            self.failures.checked += len(results)
            self.failures.crashes += results.count("crash")
            self.failures.timeouts += results.count("timeout")
        return [result is True for result in results]

    def _ask(self, boxed: str, answer: str) -> bool | str:
        worker = self._idle.get()
        try:
            return worker.ask(boxed, answer)
        except _WorkerEnded as ended:
            return ended.reason
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the processes; a later check starts new ones."""
        self._closer()
        self._open()

    def __reduce__(self) -> tuple[Any, ...]:
        return MathVerifier, (self.time_limit, self.workers)


def _compare_texts(boxed: str | None, answer: str) -> bool | None:
    """Return the verdict where the texts alone decide, else None."""
    if not boxed or len(boxed) > MAX_LENGTH:
        return False
    return True if boxed == answer.strip() or normalize(boxed) == normalize(answer) else None
