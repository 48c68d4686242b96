"""The presets of a cross-model study: their models, each with its template and the figures that show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

Preset = Literal["paper", "small", "testbed"]

OF_ANY_MODEL = (2, 3, 12)
"""Default figures of a model: entropy flow, entropy change, residual cosine."""


@dataclass(frozen=True)
class StudyModel:
    """One model of a study."""

    model: str
    """Hub id, or an embedded model."""
    template: str
    """One of ``prompts.TEMPLATES``."""
    figures: Mapping[int, int] = field(default_factory=lambda: dict.fromkeys(OF_ANY_MODEL, 0))
    """Position in each of figures 2, 3, 12, 13 and 14 that shows it; equal positions keep the table's order."""
    max_new_tokens: int | None = None
    """Maximum number of tokens per response, unless the study sets one."""


# Of arXiv 2512.19673v3: the models of table 4, the templates of appendix A.2, which has the non-thinking one for every
# Qwen3, and the panels of figures 2, 3, 12, 13 and 14 from left to right. A family whose template the paper does not
# give takes its tokenizer's own (`chat`), which is plain text where there is none.
#
# All models have the same limit of 7168 tokens, so that no panel is cut off earlier than another: a limit does not
# lengthen what a model writes, and the paper's 3072 for the Llama family is one of training. The two models with a
# context of 4096 stop at 3072, which leaves 1024 for the prompt.
STUDIES: Mapping[Preset, tuple[StudyModel, ...]] = MappingProxyType(
    {
        "paper": (
            StudyModel("meta-llama/Llama-3.2-3B-Instruct", "chat", {2: 1, 3: 4}, 7168),
            StudyModel("meta-llama/Llama-3.1-8B-Instruct", "chat", {2: 2, 14: 8}, 7168),
            StudyModel("Qwen/Qwen2.5-Math-7B", "qwen-math", {2: 3, 3: 1, 12: 1}, 3072),
            StudyModel("Qwen/Qwen3-4B", "qwen3", {2: 4, 3: 2, 12: 2}, 7168),
            StudyModel("Qwen/Qwen3-8B", "qwen3", {2: 5, 3: 3, 12: 4}, 7168),
            StudyModel("Qwen/Qwen3-14B", "qwen3", {2: 6, 14: 7}, 7168),
            StudyModel("Qwen/Qwen3-4B-Base", "qwen3", {12: 3, 13: 1, 14: 1}, 7168),
            StudyModel("Qwen/Qwen3-4B-Instruct-2507", "qwen3", {13: 2, 14: 2}, 7168),
            StudyModel("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "chat", {13: 3, 14: 3}, 7168),
            StudyModel("OctoThinker/OctoThinker-3B-Long-Base", "octothinker", {13: 4, 14: 4}, 7168),
            StudyModel("OctoThinker/OctoThinker-8B-Long-Base", "octothinker", {13: 5, 14: 5}, 7168),
            StudyModel("deepseek-ai/deepseek-math-7b-base", "chat", {13: 6, 14: 6}, 3072),
        ),
        # As in the paper, figures 13 and 14 show base models and others than the chat models of figures 2 and 3.
        "small": (
            StudyModel("meta-llama/Llama-3.2-1B-Instruct", "chat", {2: 1, 3: 3}),
            StudyModel("Qwen/Qwen3-0.6B", "qwen3", {2: 2, 3: 1, 12: 1}),
            StudyModel("Qwen/Qwen3-1.7B", "qwen3", {2: 3, 3: 2, 12: 3}),
            StudyModel("Qwen/Qwen3-0.6B-Base", "qwen3", {12: 2, 13: 1, 14: 1}),
            StudyModel("Qwen/Qwen3-1.7B-Base", "qwen3", {12: 4, 13: 2, 14: 2}),
        ),
        "testbed": (StudyModel("testbed/qwen3", "chat"), StudyModel("testbed/llama", "chat")),
    }
)
"""``paper``: the twelve of arXiv 2512.19673v3, table 4; ``small``: for one small GPU; ``testbed``: needs no network."""
