"""Numerics of the decode kernel, in the interpreter."""

from typing import Any, Literal

import pytest
import torch

from plquant.kernels import decode
from plquant.kernels.decode import Config
from tests.kernels.quantized import error_ratio, inputs, quantized

pytestmark = pytest.mark.usefixtures("interpreted")

HALF, BRAIN = torch.float16, torch.bfloat16
MODES = [(HALF, True), (HALF, False), (BRAIN, False)]  # dtype and whether fields are subnormal numbers
# The product's error over that of dequantizing first. Along the output the scale rounds x instead of the weight, which
# costs the same, but weights of two and three bits, whose codes are few scales away from zero, hardly need rounding.
LIMIT = {"in": dict.fromkeys(range(2, 9), 1.1), "out": {2: 1.5, 3: 1.25} | dict.fromkeys(range(4, 9), 1.15)}


def check(
    bits: int,
    shape: tuple[int, int],
    group_size: int,
    axis: Literal["in", "out"],
    rows: int,
    mode: tuple[torch.dtype, bool] = MODES[0],
    config: Config | None = None,
    symmetric: bool = False,
    limit: float = 1.1,
) -> torch.Tensor:
    dtype, subnormal = mode
    packed, weight = quantized(bits, shape, group_size, axis, dtype, symmetric)
    x = inputs(rows, shape[1], dtype)
    out = decode.linear(x, packed, config=config, subnormal=subnormal)
    assert out.shape == (rows, shape[0]) and out.dtype == dtype
    assert error_ratio(out, x, weight) <= limit
    return out


@pytest.mark.parametrize("mode", MODES, ids=["subnormal", "offset", "bf16"])
@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_as_exact_as_dequantizing_first(bits: int, axis: Literal["in", "out"], mode: tuple[torch.dtype, bool]) -> None:
    check(bits, (64, 512), 64, axis, rows=16, mode=mode, limit=LIMIT[axis][bits])


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize(("bits", "mode"), [(2, MODES[2]), (3, MODES[0]), (4, MODES[1]), (7, MODES[0]), (8, MODES[2])])
def test_symmetric_with_one_scale_for_each_channel(
    bits: int, axis: Literal["in", "out"], mode: tuple[torch.dtype, bool]
) -> None:
    check(
        bits, (64, 512), 512 if axis == "in" else 64, axis, rows=16, mode=mode, symmetric=True, limit=LIMIT[axis][bits]
    )


@pytest.mark.parametrize(
    ("bits", "shape", "group_size", "axis", "rows"),
    [
        (4, (40, 96), 32, "in", 1),  # rows are padded to 64, a tile is 32 inputs
        (3, (72, 192), 96, "in", 16),  # inputs are padded to 256, groups are no power of two
        (2, (96, 320), 64, "in", 9),
        (6, (64, 160), 32, "out", 2),
        (4, (80, 90), 90, "in", 3),  # x cannot be read 16 bytes at a time
        (5, (33, 77), 33, "out", 11),
        (8, (96, 576), 96, "out", 7),
    ],
)
@pytest.mark.parametrize("mode", MODES, ids=["subnormal", "offset", "bf16"])
def test_shapes_that_do_not_fill_tiles(
    bits: int, shape: tuple[int, int], group_size: int, axis: Any, rows: int, mode: tuple[torch.dtype, bool]
) -> None:
    # few roundings of x are shared by all outputs: their mean is not that of many
    check(bits, shape, group_size, axis, rows, mode, limit=1.1 if axis == "in" else 1.5)


@pytest.mark.parametrize(
    "config", [Config(32, 32, 1, 1), Config(64, 128, 2, 2), Config(64, 64, 8, 1), Config(32, 64, 2, 3)]
)
@pytest.mark.parametrize("group_size", [32, 64, 128, 512])
def test_every_split_of_the_inputs(config: Config, group_size: int) -> None:
    check(4, (64, 512), group_size, "in", rows=2, config=config)


def test_the_same_bits_again() -> None:
    config = Config(64, 64, 4, 2)
    assert torch.equal(*(check(4, (64, 512), 64, "in", rows=2, config=config) for _ in range(2)))


def test_a_view_of_x_is_as_good() -> None:
    packed, _ = quantized(4, (64, 256), 128)
    x = inputs(4, 512)
    for view in (x[:, 256:], x.T[:256, :].T, x[::2, :256], x[:, ::2]):
        expected = decode.linear(view.contiguous(), packed, subnormal=True)
        assert torch.equal(decode.linear(view, packed, subnormal=True), expected)


def test_small_inputs_do_not_underflow() -> None:
    """x times a scale of 0.01 would be a subnormal number of few bits."""
    packed, weight = quantized(4, (64, 512), 64, "out")
    x = inputs(16, 512) * 1e-3
    assert error_ratio(decode.linear(x, packed, subnormal=True), x, weight) <= LIMIT["out"][4]


def test_a_wrong_zero_point_shows() -> None:
    packed, weight = quantized(4, (64, 256), 64)
    assert packed.zero_point is not None
    packed.zero_point[0, 0] += 1
    x = inputs(5, 256)
    assert error_ratio(decode.linear(x, packed, subnormal=True), x, weight) > 5


def test_the_device_is_asked_whether_subnormals_survive() -> None:
    decode.subnormals_survive.cache_clear()
    assert decode.subnormals_survive(torch.device("cpu"))


def test_a_device_that_flushes_subnormals_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "linear", lambda x, packed, **options: x.new_zeros(16, 32))
    decode.subnormals_survive.cache_clear()
    assert not decode.subnormals_survive(torch.device("cpu"))
    decode.subnormals_survive.cache_clear()


def test_refusals_say_what_was_given() -> None:
    packed, _ = quantized(4, (64, 256), 64)
    for x, words in [
        (torch.zeros(17, 256, dtype=HALF), "17"),
        (torch.zeros(2, 64, dtype=HALF), "256"),
        (torch.zeros(2, 256), "float32"),
    ]:
        with pytest.raises(ValueError, match=words):
            decode.linear(x, packed, subnormal=True)


@pytest.mark.parametrize("rows", [1, 8, 16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_sums_of_splits_stay_a_small_part_of_the_traffic(bits: int, rows: int) -> None:
    for shape in [(4096, 4096), (1024, 4096), (11008, 4096), (576, 1536), (576, 576)]:
        packed, _ = quantized(bits, (32, shape[1]), shape[1])
        words = packed.words.expand(-(-shape[0] // 32), -1, -1)
        high = None if packed.high is None else packed.high.expand(len(words), -1, -1)
        wide = decode.PackedWeight(words, high, packed.scale, None, bits, shape[1], "in", *shape)
        config = decode.configure(wide, rows, processors=108)
        assert config.splits == 1 or config.splits * rows * shape[0] * 8 <= 0.03 * wide.nbytes
        assert wide.padded_in_features % config.inputs == 0
