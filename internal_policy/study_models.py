"""The models of a cross-model study, each with its template and the figures it belongs to, as one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Group = Literal["main", "more"]
"""``main``: figures 2 and 3, ``more``: figures 13 and 14; figure 12 and the comparisons have all."""
Preset = Literal["paper", "small", "testbed"]


@dataclass(frozen=True)
class StudyModel:
    """One model of a study."""

    model: str
    """Hub id, or an embedded model."""
    template: str
    """One of ``prompts.TEMPLATES``."""
    group: Group
    """Which figures show it."""


# The templates of arXiv 2512.19673v3, appendix A.5, for the families that it names. The empty think block of `qwen3`
# turns off a thinking mode that only the hybrid models have; the others of the family take the same prompt without it.
# A family that the paper does not name takes its tokenizer's own (`chat`), which is plain text where there is none.
# `main` are the models that section 3.2 describes one by one.
STUDIES: Mapping[Preset, tuple[StudyModel, ...]] = MappingProxyType(
    {
        "paper": (
            StudyModel("Qwen/Qwen3-4B", "qwen3", "main"),
            StudyModel("Qwen/Qwen2.5-Math-7B", "qwen-math", "main"),
            StudyModel("meta-llama/Llama-3.1-8B-Instruct", "chat", "main"),
            StudyModel("deepseek-ai/deepseek-math-7b-base", "chat", "main"),
            StudyModel("Qwen/Qwen3-8B", "qwen3", "more"),
            StudyModel("Qwen/Qwen3-14B", "qwen3", "more"),
            StudyModel("Qwen/Qwen3-4B-Base", "qwen-math", "more"),
            StudyModel("Qwen/Qwen3-4B-Instruct-2507", "qwen-math", "more"),
            StudyModel("meta-llama/Llama-3.2-3B-Instruct", "chat", "more"),
            StudyModel("OctoThinker/OctoThinker-3B-Long-Base", "octothinker", "more"),
            StudyModel("OctoThinker/OctoThinker-8B-Long-Base", "octothinker", "more"),
            StudyModel("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "chat", "more"),
        ),
        "small": (
            StudyModel("Qwen/Qwen3-0.6B", "qwen3", "main"),
            StudyModel("Qwen/Qwen3-1.7B", "qwen3", "main"),
            StudyModel("meta-llama/Llama-3.2-1B-Instruct", "chat", "main"),
            StudyModel("Qwen/Qwen3-0.6B-Base", "qwen-math", "more"),
            StudyModel("Qwen/Qwen3-1.7B-Base", "qwen-math", "more"),
        ),
        "testbed": (
            StudyModel("testbed/qwen3", "chat", "main"),
            StudyModel("testbed/llama", "chat", "more"),
        ),
    }
)
"""``paper``: the twelve of arXiv 2512.19673v3, table 4; ``small``: for one small GPU; ``testbed``: needs no network."""
