"""Channel reassembly from calibration to the packed model: one norm, one linear, quantized activations."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from plquant.nn.activation_quantizer import ActivationQuantizer
from plquant.nn.fake_quant_linear import FakeQuantLinear
from plquant.nn.online import attach_online_
from plquant.nn.packed_linear import PackedLinear
from plquant.nn.transformed_norm import TransformedNorm
from plquant.quant.grid import IntGrid
from plquant.transforms.reassembly import ChannelReassembly
from plquant.transforms.reassembly_plan import ReassemblyPlan
from plquant.transforms.scale_shift import ScaleShift

PLAN = ReassemblyPlan.build(16, torch.tensor([3, 7, 3]), drops=torch.tensor([0]), merges=torch.tensor([[1, 5], [9, 5]]))


def x() -> Tensor:
    return torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_packed_model_does_what_was_calibrated(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm, linear = nn.RMSNorm(16).to(dtype), FakeQuantLinear(nn.Linear(16, 8, dtype=dtype), IntGrid(4, 8))
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    scale, reassembly = ScaleShift(16), ChannelReassembly(PLAN)
    nn.init.normal_(scale.log_scale)
    source = TransformedNorm(norm, gain_offset=0.0)
    for transform in (scale, reassembly):
        source.transforms.append(transform)
        linear.add_read(transform)
    linear.inputs = ActivationQuantizer(4, offset=PLAN.offset)
    with torch.no_grad():
        calibrated = linear(source(x().to(dtype)))
    packed = PackedLinear(linear.quantize(), linear.transformed_bias(dtype))
    packed.inputs = linear.inputs
    folded, op = source.fold_(), reassembly.online_op()
    assert op is not None
    attach_online_(folded, [op])
    torch.testing.assert_close(packed(folded(x().to(dtype))), calibrated)
    packed.inputs = ActivationQuantizer(4)  # without offsets it is another model
    assert not torch.allclose(packed(folded(x().to(dtype))), calibrated, atol=1e-2)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_of_copies_add_up_where_none_is_clipped(bits: int, symmetric: bool) -> None:
    grid, plan = IntGrid(bits, None, symmetric), ReassemblyPlan.build(16, torch.tensor([3] * 4 + [7]))
    channels = x() * (1 + 5 * (torch.arange(16) == 3) + (torch.arange(16) == 7))
    read = ChannelReassembly(plan).online(channels * plan.coefficient.float())
    found = ActivationQuantizer(bits, symmetric, plan.offset).codes(read)
    zero_point = 0 if found.zero_point is None else found.zero_point.int()
    inside = (found.codes > grid.qmin) & (found.codes < grid.qmax)
    for channel in (3, 7):
        copies = plan.index == channel
        whole = (channels[..., channel] / found.scale[..., 0]).round()
        added_up = (found.codes.int() - zero_point)[..., copies].sum(-1)
        clear = inside[..., copies].all(-1)
        assert clear.float().mean() > 0.2
        assert torch.equal(added_up[clear], whole[clear].int())


def test_whoever_loads_a_model_knows_the_gather() -> None:
    entry = {"ops": [{"kind": "gather", "config": {"width": 4, "adds": 0}}]}
    code = f"from plquant.nn.online import make_ops; make_ops({entry})"
    subprocess.run([sys.executable, "-c", code], check=True)
