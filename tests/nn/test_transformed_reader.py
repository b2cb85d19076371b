"""A router takes what the norm before it gives up, in full precision."""

import torch
from torch import nn

from plquant.nn.transformed_reader import TransformedReader
from plquant.transforms.kronecker import KroneckerAffine
from plquant.transforms.scale_shift import ScaleShift


def test_a_reader_undoes_the_transforms_before_and_after_the_fold() -> None:
    generator = torch.Generator().manual_seed(0)
    router = nn.Linear(6, 3).double()
    transforms = [ScaleShift(6, shift=shift).double() for shift in (True, False)]
    reader = TransformedReader(router)
    x = torch.randn(5, 6, dtype=torch.float64, generator=generator)
    expected, written = router(x).detach(), x
    for transform in transforms:
        for p in transform.parameters():
            p.data.uniform_(-1, 1, generator=generator)
        reader.reads.append(transform)
        written = (written if transform.shift is None else written - transform.shift) / transform.scale
    torch.testing.assert_close(reader(written), expected)
    assert not torch.allclose(router(written), expected)  # negative control
    reader.enabled = False
    assert torch.equal(reader(x), expected)
    assert reader.fold_() is router
    torch.testing.assert_close(router(written), expected)


def test_under_autocast_its_weights_are_those_of_the_fold() -> None:
    torch.manual_seed(0)
    reader, transform, x = TransformedReader(nn.Linear(6, 3)), KroneckerAffine(6), torch.randn(5, 6)
    transform.progress_(1)
    for p in transform.parameters():
        nn.init.uniform_(p, -0.3, 0.3)
    reader.reads.append(transform)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        trained = reader(x)
        assert torch.equal(reader.fold_()(x), trained)
