r"""Chained arithmetic modulo 23: problems whose worked solution and final ``\boxed{}`` answer can be checked exactly.

A problem of level k states one variable and k derived ones, each an operation on an earlier variable, and asks for
the last one: ``a=12,b=a-15,c=b*11;c?`` has level 2. Its solution works the variables out in turn,
``b=12-15=20;c=20*11=13;\boxed{13}``.

The embedded models know the letters a to e, which is enough for levels 1 to 4. Higher levels are for a model whose
tokenizer has more of ``LETTERS``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MODULUS = 23
LETTERS = "abcdefghi"
MAX_LEVEL = len(LETTERS) - 1
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda x, y: (x + y) % MODULUS,
    "-": lambda x, y: (x - y) % MODULUS,
    "*": lambda x, y: (x * y) % MODULUS,
}
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


@dataclass(frozen=True)
class Problem:
    r"""One problem with its worked solution.

    Attributes:
        prompt: The question as a user writes it, ``a=12,b=a-15;b?``.
        answer: The value of the last variable, a decimal number from 0 to 22.
        level: The number of derived variables, from 1 to 8.
        solution: The worked solution, which ends with ``\boxed{answer}``.
    """

    prompt: str
    answer: str
    level: int
    solution: str


def make_problem(rng: random.Random, level: int, slip: float = 0.0) -> Problem:
    """Draw one problem of a level from 1 to 8.

    With probability ``slip`` a result in the solution is off by 1 or 2. The wrong value is carried forward, as when a
    person makes a slip; ``answer`` is correct in any case.

    Raises:
        ValueError: there is no such level.
    """
    if not 1 <= level <= MAX_LEVEL:
        raise ValueError(f"level {level}: must be from 1 to {MAX_LEVEL}")
    true = [rng.randrange(MODULUS)]
    written = list(true)
    statements = [f"{LETTERS[0]}={true[0]}"]
    steps = []
    for index in range(1, level + 1):
        source, symbol, operand = rng.randrange(index), rng.choice("+-*"), rng.randrange(MODULUS)
        operation = OPERATIONS[symbol]
        true.append(operation(true[source], operand))
        result = operation(written[source], operand)
        if slip and rng.random() < slip:
            result = (result + rng.choice((-2, -1, 1, 2))) % MODULUS
        written.append(result)
        statements.append(f"{LETTERS[index]}={LETTERS[source]}{symbol}{operand}")
        steps.append(f"{LETTERS[index]}={written[source]}{symbol}{operand}={result};")
    return Problem(
        prompt=",".join(statements) + f";{LETTERS[level]}?",
        answer=str(true[-1]),
        level=level,
        solution="".join(steps) + rf"\boxed{{{written[-1]}}}",
    )


def problems(n: int, seed: int, levels: Sequence[int] = (2, 3, 4)) -> list[Problem]:
    """Draw problems, each level (1 to 8) equally likely; the same arguments give the same ones, which may repeat."""
    rng = random.Random(seed)
    return [make_problem(rng, rng.choice(levels)) for _ in range(n)]


def check(response_text: str, answer: str) -> bool:
    r"""Check whether the last complete ``\boxed{}`` of a response contains the answer, apart from white space."""
    boxed = _BOXED.findall(response_text)
    return bool(boxed) and boxed[-1].strip() == answer.strip()
