"""The section of the report on the divergences between the policies of the layers."""

from __future__ import annotations

import numpy as np
import pytest
from test_report import Page, line
from tiny import ragged_responses, tiny_model, tiny_tokenizer

from internal_policy import analyze
from internal_policy.report import analysis_report


@pytest.fixture(scope="module")
def analysis():
    options = {"responses": ragged_responses(3), "lens": "logit-lens", "divergences": True}
    return analyze(tiny_model("llama"), tiny_tokenizer(), **options)


def test_the_section_has_the_numbers_of_the_tables(analysis):
    page = Page(analysis_report(analysis))
    table, matrix = (analysis.additions[name] for name in ("divergences", "divergence_matrix"))
    for row in table.itertuples():
        for text in (f"{row.kl_next:.3f}", f"{row.top1:.1%}", f"[{row.kl_policy_low:.3f}, {row.kl_policy_high:.3f}]"):
            assert text in page.parts["divergence-layers"]
    cells = page.parts["divergence-matrix"]
    assert all(f"{kl:.2f}" in cells for kl in matrix["kl"])
    charts = page.data["charts"]
    kl = line(charts["a1-divergence"], "KL(π^l‖π^(l+1))")
    np.testing.assert_allclose(kl["y"][:-1], table["kl_next"][:-1], atol=1e-6)
    # Under the logit lens the last policy is the final one, and a logarithmic axis has no zero.
    assert kl["y"][-1] is None
    assert charts["a1-divergence"]["layout"]["yaxis"]["type"] == "log"
    np.testing.assert_allclose(line(charts["a1-agreement"], "same top token")["y"], table["top1"], atol=1e-6)


def test_without_the_addition_there_is_no_section():
    plain = analyze(tiny_model("llama"), tiny_tokenizer(), responses=ragged_responses(2))
    page = Page(analysis_report(plain))
    assert "divergence-layers" not in page.parts
    assert not any("divergence" in name for name in page.data["charts"])
