"""The code of the fused kernel that runs on the device; ``triton_kernel`` says what it does and launches it."""

# The compiler reads annotations as device code, so that arguments of these functions cannot have any but constexpr.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    # From the exponential, which is exact to a few units in the last place but near 0, where 1 - exp(-2x) cancels.
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    x2 = x * x
    near = x * (1.0 + x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0)))
    return tl.where(tl.abs(x) < 0.1, near, far)


@triton.jit
def _logits(z, bias, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    # Of products [BLOCK_N, BLOCK_V], and of bias [BLOCK_V].
    if HAS_BIAS:
        z += bias[None, :]
    z *= scale
    if HAS_SOFTCAP:
        z = softcap * _tanh(z / softcap)
    return z


@triton.jit
def _with_tile(m, s, t, z, entries, vocab):
    # The sums [BLOCK_N] with those of a tile of logits [BLOCK_N, BLOCK_V] added.
    within = entries[None, :] < vocab
    m_new = tl.maximum(m, tl.max(tl.where(within, z, -float("inf")), axis=1))
    # Where all logits are -inf so far, their exponentials are to be 0, and not exp(-inf + inf).
    shift = tl.where(m_new == -float("inf"), 0.0, m_new)
    delta = tl.where(m == -float("inf"), 0.0, m - shift)
    shrink = tl.exp(delta)
    z -= shift[:, None]
    p = tl.where(within, tl.exp(z), 0.0)
    t = (t + delta * s) * shrink + tl.sum(tl.where(within, p * z, 0.0), axis=1)
    s = s * shrink + tl.sum(p, axis=1)
    return m_new, s, t


@triton.jit(do_not_specialize=["n", "slices"])
def online_sums(
    x_ptr,
    e_ptr,
    bias_ptr,
    target_ptr,
    lengths_ptr,
    sums_ptr,
    chosen_ptr,
    n,
    vocab,
    d,
    x_row,
    x_col,
    e_row,
    e_col,
    scale,
    softcap,
    slices,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Write m, s and t of a block of rows over a slice of the vocabulary, and the logits of targets within it.

    With lengths, the same sums follow for the products times these factors, from the same tiles.
    """
    pid = tl.program_id(0)
    row_blocks = tl.cdiv(n, BLOCK_N)
    first_block = pid // (GROUP * slices) * GROUP
    group = tl.minimum(row_blocks - first_block, GROUP)
    inside = pid % (GROUP * slices)
    row_block = first_block + inside % group
    part = inside // group

    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and entries beyond the end read the last one: loads need no mask, and what they give is never used.
    safe_rows = tl.minimum(rows, n - 1).to(tl.int64)
    widths = tl.arange(0, BLOCK_K)
    x_start = x_ptr + safe_rows[:, None] * x_row + widths[None, :] * x_col
    m = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    t = tl.zeros((BLOCK_N,), tl.float32)
    chosen = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_TARGET:
        target = tl.load(target_ptr + safe_rows)
    if HAS_LENGTHS:
        lengths = tl.load(lengths_ptr + safe_rows)
        m_other = tl.full((BLOCK_N,), -float("inf"), tl.float32)
        s_other = tl.zeros((BLOCK_N,), tl.float32)
        t_other = tl.zeros((BLOCK_N,), tl.float32)

    all_tiles = tl.cdiv(vocab, BLOCK_V)
    tiles_a_slice = tl.cdiv(all_tiles, slices)
    first_tile = part * tiles_a_slice
    last_tile = tl.minimum(first_tile + tiles_a_slice, all_tiles)
    for tile in tl.range(first_tile, last_tile):
        entries = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        safe_entries = tl.minimum(entries, vocab - 1).to(tl.int64)
        x_ptrs = x_start
        e_ptrs = e_ptr + safe_entries[None, :] * e_row + widths[:, None] * e_col
        z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for k in tl.range(0, tl.cdiv(d, BLOCK_K)):
            if EVEN_K:
                x = tl.load(x_ptrs)
                e = tl.load(e_ptrs)
            else:
                x = tl.load(x_ptrs, mask=widths[None, :] < d - k * BLOCK_K, other=0.0)
                e = tl.load(e_ptrs, mask=widths[:, None] < d - k * BLOCK_K, other=0.0)
            if WIDEN:
                x = x.to(tl.float32)
                e = e.to(tl.float32)
            z = tl.dot(x, e, z, input_precision=PRECISION)
            x_ptrs += BLOCK_K * x_col
            e_ptrs += BLOCK_K * e_col
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_ptr + safe_entries).to(tl.float32)
        logits = _logits(z, bias, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        if HAS_TARGET:
            # Taken from the same product as the sum, so that rounding never makes a token more than certain.
            chosen += tl.sum(tl.where(entries[None, :] == target[:, None], logits, 0.0), axis=1)
        m, s, t = _with_tile(m, s, t, logits, entries, vocab)
        if HAS_LENGTHS:
            # Bias and soft cap are not linear in the state: they come after the factor.
            logits = _logits(z * lengths[:, None], bias, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
            m_other, s_other, t_other = _with_tile(m_other, s_other, t_other, logits, entries, vocab)

    inside_n = rows < n
    out = sums_ptr + part.to(tl.int64) * n + rows
    plane = slices.to(tl.int64) * n
    tl.store(out, m, mask=inside_n)
    tl.store(out + plane, s, mask=inside_n)
    tl.store(out + 2 * plane, t, mask=inside_n)
    if HAS_LENGTHS:
        tl.store(out + 3 * plane, m_other, mask=inside_n)
        tl.store(out + 4 * plane, s_other, mask=inside_n)
        tl.store(out + 5 * plane, t_other, mask=inside_n)
    if HAS_TARGET:
        here = (target >= first_tile * BLOCK_V) & (target < last_tile * BLOCK_V)
        tl.store(chosen_ptr + rows, chosen, mask=inside_n & here)
