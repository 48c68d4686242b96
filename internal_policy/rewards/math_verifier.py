r"""Says whether the ``\boxed{}`` answer of a response is the reference answer, without trusting the response.

The comparison runs in other processes (`verifier_worker`): what a model writes can keep SymPy busy for ever inside one
big-integer operation that no signal interrupts, or take all memory, and a process can be killed.
"""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from internal_policy.rewards.math_verifier_worker import plain
from internal_policy.utils.errors import UserError

MAX_LENGTH = 2000
"""No answer is longer; a longer box is wrong without being looked at."""
MEMORY = 4 * 2**30
"""What one worker may have, in bytes."""

_WORKER = Path(__file__).with_name("math_verifier_worker.py")
# A run of backslashes is taken whole and never given back: tried from each of its places, a long one would take a time
# that grows with its square.
_BRACES = re.compile(r"(?P<escape>\\++)(?P<box>boxed\s*+\{)?|[{}]")


def boxed_answer(text: str) -> str | None:
    r"""Find what the last complete ``\boxed{}`` of a text holds.

    Args:
        text: A response.

    Returns:
        Its content, outer white space apart; None where there is no complete one.
    """
    open_braces: list[tuple[int, int] | None] = []
    last, content, escaped = -1, None, -1
    # One pass: a response may well be ten thousand boxes that never close.
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
    """How often a reward could not be worked out and 0 was given instead.

    Attributes:
        checked: Samples in all.
        crashes: Samples on which the function raised or its process died.
        timeouts: Samples that took too long.
    """

    checked: int = 0
    crashes: int = 0
    timeouts: int = 0


class _Died(Exception):
    """The worker is gone."""


class _Late(Exception):
    """The worker was killed for being late."""


class _Worker:
    """One process, started when first asked."""

    def __init__(self, time_limit: float) -> None:
        self.time_limit = time_limit
        self.process: subprocess.Popen[str] | None = None
        self.owner = os.getpid()
        self.has_worked = False

    def ask(self, boxed: str, answer: str) -> bool:
        if self.process is None or self.process.poll() is not None:
            self.start()
        try:
            return self._exchange(json.dumps([boxed, answer]), self.time_limit) == "1"
        except BaseException:
            # Also after an interrupt: an answer left in the pipe would be taken for that to the next question.
            self.stop()
            raise

    def start(self) -> None:
        # The script's own folder must not be searched for modules (-P); the order of sets must not change (the seed).
        command = [sys.executable, "-P", "-B", str(_WORKER), str(self.time_limit), str(MEMORY)]
        self.stop()
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
            said = self._exchange(None, 120)
        except (_Died, _Late) as error:
            self.stop()
            # What once worked is not the user's to mend: the machine is short of something just now.
            if self.has_worked:
                raise _Died from error
            why = "did not start in 120 seconds" if isinstance(error, _Late) else "ended while it started"
            raise UserError(f"the process that checks answers {why}; see what {command[3]} says when run") from error
        except BaseException:
            self.stop()
            raise
        if said != "ready":
            self.stop()
            raise UserError(
                f"answers cannot be checked: {said.removeprefix('error ')}; needed is math-verify 0.9 (pip install "
                "'math-verify[antlr4_13_2]')"
            )
        self.has_worked = True

    def _exchange(self, line: str | None, limit: float) -> str:
        process = self.process
        assert process is not None
        late = threading.Event()

        def kill() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limit, kill)
        timer.daemon = True
        timer.start()
        try:
            stdin, stdout = _pipes(process)
            if line is not None:
                stdin.write(line + "\n")
                stdin.flush()
            reply = stdout.readline()
        except OSError:
            reply = ""
        finally:
            timer.cancel()
            # Only then is it certain that the process is not killed after it answered.
            timer.join()
        if late.is_set():
            raise _Late
        if not reply:
            raise _Died
        return reply.strip()

    def stop(self) -> None:
        process, self.process = self.process, None
        # After a fork the process is the parent's.
        if process is None or self.owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in _pipes(process):
            try:
                pipe.close()
            except OSError:
                continue


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def _stop_all(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.stop()


class MathVerifier:
    r"""Compares the ``\boxed{}`` answer of responses with reference answers, in a pool of guarded processes.

    Args:
        time_limit: Seconds that one comparison may take; a longer one counts as wrong.
        workers: Processes; as many as there are processors, at most 4, if None.

    Attributes:
        failures: How many comparisons crashed or took too long.
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
        # Last in, first out: a few checks start one process, not all.
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
            True if they are mathematically the same; False if not, without a box, late or crashed.

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
            What `check` says of each.

        Raises:
            UserError: math-verify cannot be used.
        """
        if self._owner != os.getpid():
            self._open()
        pairs = [(boxed_answer(r), a) for r, a in zip(responses, answers, strict=True)]
        verdicts = {pair: _at_once(*pair) for pair in pairs}
        # Samples of one prompt often agree; each pair is compared once.
        asked = [(boxed, answer) for (boxed, answer), known in verdicts.items() if known is None and boxed is not None]
        failed: dict[Any, str] = {}
        if len(asked) == 1 or self.workers == 1:
            results = [self._ask(*pair) for pair in asked]
        else:
            pool = ThreadPoolExecutor(self.workers)
            try:
                results = list(pool.map(self._ask, *zip(*asked, strict=True))) if asked else []
            finally:
                pool.shutdown(cancel_futures=True)
        for pair, result in zip(asked, results, strict=True):
            verdicts[pair] = result is True
            if isinstance(result, str):
                failed[pair] = result
        with self._lock:
            self.failures.checked += len(pairs)
            self.failures.crashes += sum(failed.get(pair) == "crash" for pair in pairs)
            self.failures.timeouts += sum(failed.get(pair) == "timeout" for pair in pairs)
        return [bool(verdicts[pair]) for pair in pairs]

    def _ask(self, boxed: str, answer: str) -> bool | str:
        worker = self._idle.get()
        try:
            return worker.ask(boxed, answer)
        except _Late:
            return "timeout"
        except _Died:
            return "crash"
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the processes; a later check starts new ones."""
        self._closer()
        self._open()

    def __reduce__(self) -> tuple[Any, ...]:
        return MathVerifier, (self.time_limit, self.workers)


def _at_once(boxed: str | None, answer: str) -> bool | None:
    if not boxed or len(boxed) > MAX_LENGTH:
        return False
    return True if boxed == answer.strip() or plain(boxed) == plain(answer) else None
