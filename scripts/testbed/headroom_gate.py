r"""The gate of a start with headroom: what must hold before reinforcement learning on it can show anything.

A guess among 23 numbers is right once in 23. A model that writes the form of a solution and guesses the results thus
reaches pass@1 4.3% and Pass@64 94% and could learn nothing from the reward but luck, so that the gate also asks for
answers that were worked out: responses equal to the one right solution, step by step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from headroom_training import MAX_NEW_TOKENS
from measure import respond
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from internal_policy.analysis.pipeline import analyze
from internal_policy.data.arithmetic import Problem, check, problems
from internal_policy.evaluation.metrics import pass_at_k_each

logger = logging.getLogger(__name__)

LEVELS = (5, 6, 7, 8)
HELD_OUT_SEED = 2_000_003
LOSS_OF_THE_FORM = 0.6
"""Above this loss, in nats a token, the form of a solution is not learnt, and nothing is sampled."""
SCREENING = (0.02, 0.30)
"""The pass@1 between which everything else is measured,"""
WORKED_LEAST = 0.005
"""if at least this share of samples is worked out: with less, what is right is luck, and the gate is far."""
BEYOND = 0.40
"""A start whose pass@1 is above this has learnt too much."""

Sampled = list[tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Measured:
    """What was measured of one kept step; None where it was not.

    Attributes:
        pass_at_1: Mean share of samples with the right answer, at temperature 1.
        pass_at_k: Probability that one of ``k`` samples has the right answer, estimated without bias.
        k: Samples per problem.
        worked_at_1: `pass_at_1` of responses that equal the solution.
        worked_at_k: `pass_at_k` of responses that equal the solution.
        greedy: Share of right greedy answers.
        greedy_worked: Share of greedy responses that equal the solution.
        entropy: Mean policy entropy over the tokens of its own samples, in nats.
        boundary_layer: The boundary layer, counted from 1; None too if there is none.
        n_layers: The number of layers L.
        ffn_change: dH_FFN of each layer, in nats.
        worked_by_level: `worked_at_1` of the problems of levels 5, 6, 7 and 8.
        ended: Share of samples that end within the limit.
    """

    pass_at_1: float | None = None
    worked_at_1: float | None = None
    k: int | None = None
    pass_at_k: float | None = None
    worked_at_k: float | None = None
    greedy: float | None = None
    greedy_worked: float | None = None
    entropy: float | None = None
    boundary_layer: int | None = None
    n_layers: int | None = None
    ffn_change: tuple[float, ...] = ()
    worked_by_level: tuple[float, ...] = ()
    ended: float | None = None


@dataclass(frozen=True)
class Gate:
    """The conditions.

    Attributes:
        greedy_below: Upper limit of `Measured.greedy`.
        pass_at_1: The range of `Measured.pass_at_1`.
        pass_at_k_above: Lower limit of `Measured.pass_at_k`.
        worked_at_k_above: Lower limit of `Measured.worked_at_k`, without which the one before can be luck.
        entropy_least: The least `Measured.entropy`, in nats.
        boundary_depth_most: The greatest depth of the boundary layer, as a share of L.
    """

    greedy_below: float = 0.30
    pass_at_1: tuple[float, float] = (0.05, 0.15)
    pass_at_k_above: float = 0.50
    worked_at_k_above: float = 0.50
    entropy_least: float = 0.25
    boundary_depth_most: float = 2 / 3

    def failed(self, measured: Measured) -> list[str]:
        """Name the conditions that do not hold, or whose number is missing.

        Args:
            measured: The numbers.

        Returns:
            The fields of `Measured` that fail, in their order; none if the start passes.
        """
        least, most = self.pass_at_1
        depth = None
        if measured.boundary_layer is not None and measured.n_layers is not None:
            depth = measured.boundary_layer / measured.n_layers
        holds = {
            "pass_at_1": measured.pass_at_1 is not None and least <= measured.pass_at_1 <= most,
            "pass_at_k": measured.pass_at_k is not None and measured.pass_at_k > self.pass_at_k_above,
            "worked_at_k": measured.worked_at_k is not None and measured.worked_at_k > self.worked_at_k_above,
            "greedy": measured.greedy is not None and measured.greedy < self.greedy_below,
            "entropy": measured.entropy is not None and measured.entropy >= self.entropy_least,
            "boundary_layer": depth is not None and depth <= self.boundary_depth_most,
        }
        return [name for name, held in holds.items() if not held]


@dataclass(frozen=True)
class Measurement:
    """How a step is measured.

    Attributes:
        problems_per_level: Held-out problems of each level from 5 to 8.
        k: Samples of each, for everything but the first look.
        screening_samples: Samples of each in the first look, which decides whether the rest is worth its time.
        rows: Responses sampled at a time.
        analysed: Responses for the boundary layer, of different problems.
    """

    problems_per_level: int = 32
    k: int = 64
    screening_samples: int = 4
    rows: int = 4096
    analysed: int = 64

    def look(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, loss: float) -> Measured:
        """Measure as much as is worth its time.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            loss: Its training loss, in nats a token; nan if unknown.

        Returns:
            Nothing where the form is not learnt, pass@1 from a few samples where that is far from the gate, and else
            everything.
        """
        if loss > LOSS_OF_THE_FORM:
            return Measured()
        _, right_pk, worked_pk = self._sample(model, tokenizer, self.screening_samples)
        if SCREENING[0] <= right_pk.mean() <= SCREENING[1] and worked_pk.mean() >= WORKED_LEAST:
            return self.measure(model, tokenizer)
        return Measured(float(right_pk.mean()), float(worked_pk.mean()))

    def measure(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Measured:
        """Measure everything."""
        sampled, right_pk, worked_pk = self._sample(model, tokenizer, self.k)
        _, greedy_pk, greedy_worked_pk = self._sample(model, tokenizer, 1, greedy=True)
        n = np.full(len(right_pk), self.k)
        analysed = np.linspace(0, len(n) - 1, min(self.analysed, len(n)), dtype=int)
        boundary_layer, change = _boundary(model, tokenizer, [sampled[p * self.k] for p in analysed])
        return Measured(
            pass_at_1=float(right_pk.mean()),
            worked_at_1=float(worked_pk.mean()),
            k=self.k,
            pass_at_k=float(pass_at_k_each(n, right_pk.sum(1), self.k).mean()),
            worked_at_k=float(pass_at_k_each(n, worked_pk.sum(1), self.k).mean()),
            greedy=float(greedy_pk.mean()),
            greedy_worked=float(greedy_worked_pk.mean()),
            entropy=policy_entropy(model, sampled[:: max(1, self.k // 8)]),
            boundary_layer=boundary_layer,
            n_layers=model.config.num_hidden_layers,
            ffn_change=change,
            worked_by_level=tuple(float(each.mean()) for each in np.split(worked_pk, len(LEVELS))),
            ended=sum(ids[-1] == tokenizer.eos_token_id for _, ids in sampled) / len(sampled),
        )

    def _problems(self) -> list[Problem]:
        per_level = [problems(self.problems_per_level, HELD_OUT_SEED + level, (level,)) for level in LEVELS]
        return [problem for each in per_level for problem in each]

    def _sample(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, k: int, greedy: bool = False
    ) -> tuple[Sampled, np.ndarray, np.ndarray]:
        each = [problem for problem in self._problems() for _ in range(k)]
        sampled = respond(model, tokenizer, each, greedy=greedy, batch=self.rows, max_new_tokens=MAX_NEW_TOKENS)
        right, worked = judge(tokenizer, each, sampled)
        shape = (len(each) // k, k)
        return sampled, np.array(right).reshape(shape), np.array(worked).reshape(shape)


def _boundary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, sampled: Sampled
) -> tuple[int | None, tuple[float, ...]]:
    responses = [{"input_ids": prompt + ids, "prompt_length": len(prompt)} for prompt, ids in sampled]
    try:
        analysis = analyze(model, tokenizer, responses=responses, batch_size=len(responses), keep_tokens=0, alone=True)
    except Exception:
        # A lent GPU is there for minutes: the other numbers, and the training, must not be lost with this one.
        logger.exception("the boundary layer was not measured")
        return None, ()
    return analysis.boundary_layer, tuple(round(float(x), 3) for x in analysis.curve("ffn"))


def judge(
    tokenizer: PreTrainedTokenizerFast, asked: Sequence[Problem], sampled: Sampled
) -> tuple[list[bool], list[bool]]:
    """Check responses.

    Args:
        tokenizer: The tokenizer.
        asked: The problem of each response.
        sampled: The responses, as `respond` gives them.

    Returns:
        For each whether its answer is right, and whether it is the solution, ended.
    """
    # Few token ids make few texts: a response is decoded word by word without the tokenizer's own cost per call.
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    texts = ["".join(words[i] for i in ids) for _, ids in sampled]
    right = [check(text, problem.answer) for text, problem in zip(texts, asked, strict=True)]
    worked = [text == problem.solution + tokenizer.eos_token for text, problem in zip(texts, asked, strict=True)]
    return right, worked


@torch.no_grad()
def policy_entropy(model: PreTrainedModel, sampled: Sampled, rows: int = 512) -> float:
    """Average the entropy of the policy over the response tokens.

    Args:
        model: The model.
        sampled: Its own responses, as `respond` gives them.
        rows: Responses at a time.

    Returns:
        The mean at temperature 1, in nats.
    """
    total, count = 0.0, 0
    for start in range(0, len(sampled), rows):
        part = sampled[start : start + rows]
        width = max(len(prompt) + len(ids) for prompt, ids in part)
        ids_bt = torch.full((len(part), width), model.config.pad_token_id)
        predicts_bt = torch.zeros(len(part), width, dtype=torch.bool)
        for row, (prompt, ids) in enumerate(part):
            end = len(prompt) + len(ids)
            ids_bt[row, :end] = torch.tensor(prompt + ids)
            predicts_bt[row, len(prompt) - 1 : end - 1] = True
        hidden_btd = model.model(input_ids=ids_bt.to(model.device), use_cache=False).last_hidden_state
        log_p_nv = model.lm_head(hidden_btd[predicts_bt.to(model.device)]).log_softmax(-1)
        total -= float((log_p_nv.exp() * log_p_nv).sum())
        count += int(predicts_bt.sum())
    return total / count


def as_row(measured: Measured) -> dict[str, object]:
    """The numbers as one row of a table, a curve in one field."""
    return {name: _text(value) for name, value in asdict(measured).items()}


def _text(value: object) -> object:
    if isinstance(value, tuple):
        return " ".join(f"{each:.3f}" for each in value)
    return round(value, 4) if isinstance(value, float) else value
