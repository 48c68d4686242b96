"""What the fused kernel is compiled to, which the interpreter does not show, and how its work is divided."""

from __future__ import annotations

import math
import os
import re
import subprocess
from importlib.util import find_spec

import pytest

from internal_policy.entropy.tiles import Blocks, choices, slices_of_vocabulary

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is for Linux only")

# What the kernel is compiled with when it is given states and E_u alone.
NOTHING_ELSE = {"HAS_BIAS": False, "HAS_SOFTCAP": False, "HAS_TARGET": False}


def compiled(blocks, capability, dtype="bf16", other=None, precision="ieee", **flags):
    """PTX of the kernel, made without a GPU."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from internal_policy.entropy.triton_source import online_sums

    names = online_sums.arg_names
    constants = {"HAS_BIAS": True, "HAS_SOFTCAP": True, "HAS_TARGET": True, "EVEN_K": True, "WIDEN": other is not None}
    constants |= (
        {"HAS_LENGTHS": False, "PRECISION": precision, "GROUP": 16, "x_col": 1, "e_col": 1} | blocks.meta() | flags
    )
    types = {"x_ptr": f"*{dtype}", "e_ptr": f"*{other or dtype}", "bias_ptr": f"*{other or dtype}"}
    types |= {
        "lengths_ptr": "*fp32",
        "target_ptr": "*i64",
        "sums_ptr": "*fp32",
        "chosen_ptr": "*fp32",
        "scale": "fp32",
        "softcap": "fp32",
    }
    types |= dict.fromkeys(constants, "constexpr")
    aligned = [name for name in names if name.endswith("_ptr") or name in ("d", "vocab", "x_row", "e_row")]
    source = ASTSource(
        online_sums,
        {name: types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


def spilled(ptx, capability):
    """Bytes that a thread stores outside of its registers, according to NVIDIA's assembler."""
    from triton import knobs

    architecture = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    command = [knobs.nvidia.ptxas.path, "--verbose", f"--gpu-name={architecture}", "--output-file", os.devnull, "-"]
    written = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    (stores,) = re.findall(r"(\d+) bytes spill stores", written)
    return int(stores)


@pytest.mark.parametrize("lengths", [False, True])
def test_kernel_compiles_to_tensor_core_instructions_without_a_gpu(lengths):
    ptx = compiled(Blocks(64, 64, 64, stages=2), 90, HAS_LENGTHS=lengths)
    assert ptx.count("wgmma.mma_async") == 4, "a product of 64 widths takes four instructions, at two lengths too"
    assert spilled(ptx, 90) == 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("n", [64, 4096])
@pytest.mark.parametrize("lengths", [False, True])
def test_all_16_bit_block_sizes_compile(capability, n, lengths):
    instruction = {80: "mma.sync", 90: "wgmma.mma_async"}[capability]
    for blocks in choices(n, half=True, tf32=False, lengths=lengths):
        assert instruction in compiled(blocks, capability, "fp16", EVEN_K=False, HAS_LENGTHS=lengths)
        assert instruction in compiled(blocks, capability, HAS_LENGTHS=lengths, **NOTHING_ELSE)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("n", [64, 4096])
def test_the_sums_of_two_lengths_stay_in_registers(capability, n):
    # With two lengths, as with one, tiles of 128 x 256 fill Hopper's registers and overflow Ampere's.
    for blocks in choices(n, half=True, tf32=False, lengths=True):
        if capability == 90 or blocks.rows * blocks.vocab < 128 * 256:
            assert spilled(compiled(blocks, capability, HAS_LENGTHS=True, **NOTHING_ELSE), capability) == 0
        if blocks.rows * blocks.vocab < 128 * 256:
            flags = NOTHING_ELSE | {"HAS_SOFTCAP": True}
            assert spilled(compiled(blocks, capability, HAS_LENGTHS=True, **flags), capability) == 0


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [False, True])
def test_all_float32_block_sizes_compile(lengths):
    for blocks in choices(64, half=False, tf32=True, lengths=lengths):
        assert "tf32" in compiled(blocks, 90, "fp32", precision="tf32", HAS_LENGTHS=lengths)
    for blocks in choices(64, half=False, tf32=False, lengths=lengths):
        assert "mma" not in compiled(blocks, 90, "fp32", HAS_LENGTHS=lengths)
        assert "mma" not in compiled(blocks, 90, "fp32", "bf16", HAS_LENGTHS=lengths)


# How the work is divided.


@pytest.mark.parametrize("n", [1, 100, 1024, 4096, 8192, 65_536])
@pytest.mark.parametrize("processors", [108, 132])
def test_vocabulary_slices_occupy_all_multiprocessors(n, processors):
    blocks = choices(n, half=True, tf32=False)[0]
    slices = slices_of_vocabulary(n, 151_936, processors, blocks, 128 * 2**20)
    programs, tiles = math.ceil(n / blocks.rows) * slices, math.ceil(151_936 / blocks.vocab)
    assert programs >= 0.85 * processors
    # The busiest multiprocessor relative to an even share of all tiles.
    busiest = math.ceil(programs / processors) * math.ceil(tiles / slices)
    assert busiest <= 1.15 * math.ceil(n / blocks.rows) * tiles / processors


def test_slices_respect_the_memory_budget_and_tile_size():
    blocks = choices(4096, half=True, tf32=False)[0]
    assert slices_of_vocabulary(4096, 151_936, 132, blocks, 24 * 4096 * 3) <= 3
    assert slices_of_vocabulary(4096, 151_936, 132, blocks, 1) == 1
    assert slices_of_vocabulary(4, 300, 132, blocks, 2**20) <= 2
