r"""What a start with headroom may be trained on: candidates, and their worked solutions drawn without a Python loop.

Every solution is right. The problems on which reinforcement learning is to act have levels 5 to 8, a starts them, and
every statement is worked out. The candidates see such problems seldom or never:

- a training problem of level k uses neighbouring letters that begin anywhere, so that all nine are learnt at level 1
- with ``constants`` its prompt has further statements that give a number, ``a=3,b=7,c=b*2;c?``, and need no step: long
  prompts and late letters are then read, although at most three steps are written
- a small share of higher levels shows that a solution may be long

On a CPU core the 64 problems of a step are drawn in about 1 ms, against 18 ms with `make_problem` and the tokenizer,
so that a GPU does not wait for data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from recipe import ASSISTANT, EOS, PAD, USER, Recipe, words

from internal_policy.data.arithmetic import LETTERS, MAX_LEVEL, MODULUS, OPERATIONS

Ids = npt.NDArray[np.int64]

STEPS_A_BLOCK = 50
"""Steps whose problems are drawn together."""
IGNORED = -100
"""The label of a position that predicts no response token."""
_ID = {word: index for index, word in enumerate(words(LETTERS))}
_ABSENT = -1


@dataclass(frozen=True)
class Candidate:
    """One way to train a start.

    Attributes:
        name: Its name in the tables.
        levels: The weight of each level among the training problems.
        constants: Whether statements that need no step are added to a prompt.
        architecture: A key of `recipe.ARCHITECTURES`.
        recipe: Sizes, initial scales, seed, batch and learning rates; ``clean_steps`` is the longest training.
    """

    name: str
    levels: dict[int, float]
    constants: bool = True
    architecture: str = "qwen3"
    recipe: Recipe = field(default_factory=lambda: start_recipe())


def start_recipe(**numbers: float) -> Recipe:
    """The recipe of the embedded models with 16 layers and one stage, and other ``numbers`` where given.

    The smaller embedding and the higher rate are those at which the curve of an embedded model's FFN turned early, as
    the model card says.
    """
    defaults = {"layers": 16, "batch": 64, "clean_steps": 3000, "restart_steps": 0, "slip_steps": 0}
    return Recipe(**{**defaults, "embedding_std": 0.05, "matrix_lr": 0.012, **numbers})  # type: ignore[arg-type]


_SHORT = {1: 1.0, 2: 2.0, 3: 3.0}


def with_long(share: float, levels: tuple[int, ...] = (4, 5, 6, 7, 8)) -> dict[int, float]:
    """Weights of levels 1 to 3 with a share of higher levels, each of which is equally likely."""
    return {**_SHORT, **dict.fromkeys(levels, share / (1 - share) * sum(_SHORT.values()) / len(levels))}


CANDIDATES = {
    candidate.name: candidate
    for candidate in (
        Candidate("mixed-5", with_long(0.05)),
        Candidate("constants", _SHORT),
        Candidate("llama-5", with_long(0.05), architecture="llama", recipe=start_recipe(embedding_std=0.1)),
        Candidate("all-levels", dict.fromkeys(range(1, MAX_LEVEL + 1), 1.0), constants=False),
        Candidate("mixed-1", with_long(0.01)),
        Candidate("mixed-5-large-embedding", with_long(0.05), recipe=start_recipe(embedding_std=0.1, matrix_lr=0.01)),
        Candidate("mixed-5-fast", with_long(0.05), recipe=start_recipe(matrix_lr=0.02)),
        Candidate("mixed-20", with_long(0.2)),
        Candidate("windows-5", with_long(0.05), constants=False),
        Candidate("mixed-5-slow", with_long(0.05), recipe=start_recipe(matrix_lr=0.006)),
        Candidate(
            "mixed-5-wide", with_long(0.05), recipe=start_recipe(hidden_size=128, head_dim=32, ffn_size=256, heads=4)
        ),
        Candidate("windows", _SHORT, constants=False),
    )
}
"""The candidates, in the order in which they are tried."""


def draw_batch(candidate: Candidate, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the problems of one step; they depend only on the arguments.

    Args:
        candidate: The levels, the seed and the batch size.
        step: The step, counted from 1.

    Returns:
        Ids and labels, each [B, T], padded on the right: the label of a position is the response token that it
        predicts, or `IGNORED`.
    """
    return Block(candidate, (step - 1) // STEPS_A_BLOCK).batch(step)


class Block:
    """The problems of some consecutive steps.

    Args:
        candidate: The levels, the seed and the batch size.
        number: Which block, from 0.
        device: Where its tensors are put, all at once.
    """

    def __init__(self, candidate: Candidate, number: int, device: str = "cpu") -> None:
        self.number = number
        self._batch = candidate.recipe.batch
        n = self._batch * STEPS_A_BLOCK
        ids_nt, labels_nt, self._length_n = _draw(candidate, n, np.random.default_rng((candidate.recipe.seed, number)))
        self._ids_nt, self._labels_nt = (torch.from_numpy(each).to(device) for each in (ids_nt, labels_nt))

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids and labels of one of its steps; see `draw_batch`."""
        start = (step - 1) % STEPS_A_BLOCK * self._batch
        rows = slice(start, start + self._batch)
        width = int(self._length_n[rows].max())
        return self._ids_nt[rows, :width], self._labels_nt[rows, :width]


def _draw(candidate: Candidate, n: int, rng: np.random.Generator) -> tuple[Ids, Ids, Ids]:
    # Names end in the shape: n problems, s places for statements, t tokens. Each problem has room for every statement
    # and step there can be; what it lacks is `_ABSENT`, and is closed up at the end.
    weights = np.array(list(candidate.levels.values()))
    level_n = rng.choice(list(candidate.levels), size=n, p=weights / weights.sum())
    constants_n = rng.integers(0, MAX_LEVEL - level_n + 1) if candidate.constants else np.zeros(n, dtype=np.int64)
    count_n = 1 + level_n + constants_n
    first_n = rng.integers(0, len(LETTERS) - count_n + 1)
    place_s = np.arange(len(LETTERS))
    last_ns, present_ns = place_s == count_n[:, None] - 1, place_s < count_n[:, None]

    # The first statement gives a number and the last is worked out; the other steps fall anywhere between.
    order_ns = rng.random((n, len(LETTERS)))
    order_ns[:, 0] = 2
    order_ns[~present_ns] = 2
    order_ns[last_ns] = -1
    derived_ns = order_ns.argsort(axis=1).argsort(axis=1) < level_n[:, None]

    source_ns = (rng.random((n, len(LETTERS))) * place_s).astype(np.int64)
    symbols = list(OPERATIONS)
    symbol_ns = rng.integers(0, len(symbols), (n, len(LETTERS)))
    number_ns = rng.integers(0, MODULUS, (n, len(LETTERS)))
    value_ns, read_ns = number_ns.copy(), np.zeros_like(number_ns)
    for place in place_s[1:]:
        read_ns[:, place] = np.take_along_axis(value_ns, source_ns[:, place, None], axis=1)[:, 0]
        arrays: Any = read_ns[:, place], number_ns[:, place]
        results = [operation(*arrays) for operation in OPERATIONS.values()]
        result_n = np.choose(symbol_ns[:, place], results)
        value_ns[:, place] = np.where(derived_ns[:, place], result_n, number_ns[:, place])

    number_id, letter_id = _ID["0"], _ID[LETTERS[0]]
    symbol_id_ns = np.array([_ID[symbol] for symbol in symbols])[symbol_ns]
    name_ns = letter_id + first_n[:, None] + place_s
    equals_ns, end_ns = np.full_like(name_ns, _ID["="]), np.full_like(name_ns, _ID[";"])
    given = (name_ns - place_s + source_ns, symbol_id_ns)
    prompt = [name_ns, equals_ns, *(np.where(derived_ns, ids, _ABSENT) for ids in given), number_id + number_ns]
    prompt.append(np.where(last_ns, _ID[";"], _ID[","]))
    step = [name_ns, equals_ns, number_id + read_ns, symbol_id_ns, number_id + number_ns, equals_ns]
    step += [number_id + value_ns, end_ns]

    def one(word: str) -> Ids:
        return np.full((n, 1), _ID[word])

    last_name_n1, last_value_n1 = name_ns[last_ns][:, None], number_id + value_ns[last_ns][:, None]
    question = [one(USER), _laid_out(prompt, present_ns), last_name_n1, one("?"), one(ASSISTANT)]
    answer = [_laid_out(step, derived_ns), one("\\boxed{"), last_value_n1, one("}"), one(EOS)]
    ids_nt = np.concatenate(question + answer, axis=1)
    in_response_nt = np.arange(ids_nt.shape[1]) >= sum(part.shape[1] for part in question)
    return _closed_up(ids_nt, np.broadcast_to(in_response_nt, ids_nt.shape))


def _laid_out(parts: list[Ids], kept_ns: npt.NDArray[np.bool_]) -> Ids:
    """One statement after another, [n, s * parts], with the parts of those not kept absent."""
    stacked_nsp = np.where(kept_ns[:, :, None], np.stack(parts, axis=2), _ABSENT)
    return stacked_nsp.reshape(len(stacked_nsp), -1)


def _closed_up(ids_nt: Ids, in_response_nt: npt.NDArray[np.bool_]) -> tuple[Ids, Ids, Ids]:
    """Ids without gaps, their labels, and the lengths."""
    absent_nt = ids_nt == _ABSENT
    order_nt = absent_nt.argsort(axis=1, kind="stable")
    length_n = (~absent_nt).sum(axis=1)
    ids_nt = np.take_along_axis(np.where(absent_nt, _ID[PAD], ids_nt), order_nt, axis=1)
    wanted_nt = np.take_along_axis(in_response_nt & ~absent_nt, order_nt, axis=1)
    labels_nt = np.full_like(ids_nt, IGNORED)
    labels_nt[:, :-1] = np.where(wanted_nt[:, 1:], ids_nt[:, 1:], IGNORED)
    return ids_nt, labels_nt, length_n
