import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plquant.kernels.layout import PLANES, pack, unpack, why_not


@given(
    st.sampled_from(sorted(PLANES)),
    st.sampled_from(["in", "out"]),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from([32, 64, 96, None]),
    st.booleans(),
)
def test_unpacking_gives_back_what_was_packed(
    bits: int, axis: str, rows: int, columns: int, group_size: int | None, symmetric: bool
) -> None:
    generator = torch.Generator().manual_seed(bits + rows + columns)
    if group_size is None:  # one scale per channel: any width will do
        shape = (24 * rows, 40 * columns)
        group_size = shape[1] if axis == "in" else shape[0]
    else:
        shape = (24 * rows, group_size * columns) if axis == "in" else (group_size * rows, 40 * columns)
    groups = (shape[0], shape[1] // group_size) if axis == "in" else (shape[0] // group_size, shape[1])
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)
    scale = torch.rand(groups, generator=generator)
    zeros = None if symmetric else torch.randint(0, 1 << bits, groups, dtype=torch.uint8, generator=generator)
    packed = pack(codes, scale, zeros, bits, group_size, axis)  # type: ignore[arg-type]
    found_codes, found_scale, found_zeros = unpack(packed)
    assert torch.equal(found_codes, codes)
    assert torch.equal(found_scale, scale)
    assert found_zeros is None if zeros is None else torch.equal(found_zeros, zeros.float())


def test_signed_codes_are_those_of_symmetric_grids() -> None:
    codes = torch.arange(-4, 4, dtype=torch.int8).repeat(32, 16)
    packed = pack(codes, torch.ones(32, 1), None, bits=3, group_size=128)
    assert torch.equal(unpack(packed)[0], (codes + 4).to(torch.uint8))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_code_takes_its_bits_and_no_more(bits: int) -> None:
    codes = torch.zeros(64, 256, dtype=torch.uint8)
    packed = pack(codes, torch.ones(64, 2, dtype=torch.float16), None, bits, 128)
    assert packed.nbytes == codes.numel() * bits // 8 + 64 * 2 * 2


def test_packing_is_a_matter_of_loading() -> None:
    codes = torch.randint(0, 8, (4096, 4096), dtype=torch.uint8)
    start = time.thread_time()
    pack(codes, torch.ones(4096, 32), None, bits=3, group_size=128)
    assert time.thread_time() - start < 1  # 0.18 s measured, the slowest width


def test_refusals_say_why() -> None:
    assert why_not((64, 96), 4, 32, "in") is None
    assert why_not((100, 90), 4, 90, "in") is None
    assert "9" in str(why_not((64, 96), 9, 32, "in"))
    assert "does not divide" in str(why_not((64, 96), 4, 64, "in"))
    assert "multiple of 32" in str(why_not((64, 96), 4, 16, "in"))
    with pytest.raises(ValueError, match="multiple of 32"):
        pack(torch.zeros(64, 96, dtype=torch.uint8), torch.ones(64, 6), None, 4, 16)
