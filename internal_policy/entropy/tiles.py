"""How the fused kernel divides its work into tiles of states by vocabulary, and slices of vocabulary.

Apart from ``triton_kernel``, so that the division can be computed where triton is not installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

# The cost of starting a program, in tiles of work: filling the pipeline, writing sums, merging them.
_PROGRAM_COST = 0.5
_MAX_SLICES = 256
# Bytes of a row and slice: m, s and t, and as much again while slices are merged.
_SLICE_BYTES = 24


@dataclass(frozen=True)
class Blocks:
    """The size of the tiles of a program, and the settings of the compiler."""

    rows: int
    vocab: int
    width: int
    """Residual widths read at a time."""
    warps: int = 4
    stages: int = 3
    """Steps of a product whose operands are on their way at once."""

    def meta(self) -> dict[str, int]:
        """Meta-parameters of the kernel, without those of the compiler."""
        return {"BLOCK_N": self.rows, "BLOCK_V": self.vocab, "BLOCK_K": self.width}


# Few, since each is compiled on first use. Of the tiles whose logits fit the registers, those of 128 x 256 read least
# for a product. Blocks for which a device has too little shared memory are skipped by the autotuner.
_MANY_ROWS = (
    Blocks(128, 256, 64, warps=8, stages=3),
    Blocks(128, 256, 64, warps=8, stages=4),
    Blocks(256, 128, 64, warps=8, stages=3),
    Blocks(128, 128, 64, warps=4, stages=4),
)
_FEW_ROWS = (Blocks(64, 256, 64, warps=4, stages=3), Blocks(64, 128, 64, warps=4, stages=4))
_TF32 = (Blocks(128, 128, 32, warps=4, stages=3), Blocks(128, 256, 32, warps=8, stages=3), Blocks(64, 128, 32))
# Without tensor cores the operands of a tile wait in registers too.
_PLAIN = (Blocks(64, 64, 16, warps=8, stages=2), Blocks(32, 64, 32, warps=4, stages=2))
# Two lengths make two tiles of logits out of one product. Where half as many fit a thread, they do not leave the
# registers; 128 x 256 do on Hopper without bias and soft cap, and are worth a few spills else.
_MANY_ROWS_TWO_LENGTHS = (
    Blocks(128, 256, 64, warps=8, stages=3),
    Blocks(128, 128, 64, warps=8, stages=4),
    Blocks(64, 256, 64, warps=8, stages=3),
)
_FEW_ROWS_TWO_LENGTHS = (Blocks(64, 256, 64, warps=8, stages=3), Blocks(64, 128, 64, warps=4, stages=4))
_TF32_TWO_LENGTHS = (Blocks(128, 128, 32, warps=8), Blocks(128, 256, 32, warps=8), Blocks(64, 128, 32))
INTERPRETED = Blocks(16, 64, 32)
"""For the interpreter, whose time depends on the number of operations."""


def choices(n: int, *, half: bool, tf32: bool, lengths: bool = False) -> tuple[Blocks, ...]:
    """List the two to four blocks among which the fastest is chosen by measurement, the likeliest first.

    ``n`` is the number of rows; ``half`` says whether the operands have 16 bits, and ``tf32`` whether products of
    float32 operands may be rounded to TF32; ``lengths`` whether the sums are kept for a second length.
    """
    if half:
        if n > _FEW_ROWS[0].rows:
            return _MANY_ROWS_TWO_LENGTHS if lengths else _MANY_ROWS
        return _FEW_ROWS_TWO_LENGTHS if lengths else _FEW_ROWS
    if tf32:
        return _TF32_TWO_LENGTHS if lengths else _TF32
    return _PLAIN


@lru_cache(maxsize=256)
def slices_of_vocabulary(n: int, vocab: int, processors: int, blocks: Blocks, memory_budget: int) -> int:
    """Choose into how many slices the vocabulary is cut, so that all processors work until the end.

    The duration of a run is its rounds of programs, one program on each of the device's ``processors`` at a time, times
    the tiles of a program and the cost of starting it. ``memory_budget`` limits the bytes of the sums of all slices.
    """
    row_blocks, tiles = -(-n // blocks.rows), -(-vocab // blocks.vocab)
    most = min(tiles, _MAX_SLICES, memory_budget // (_SLICE_BYTES * n))

    def duration(slices: int) -> float:
        return -(-row_blocks * slices // processors) * (-(-tiles // slices) + _PROGRAM_COST)

    return min(range(1, max(1, most) + 1), key=duration)
