"""Which bands are open when."""

from fractions import Fraction

import pytest
import torch

from plquant.transforms.gradual_mask import gradual_mask, share_of_run


@pytest.mark.parametrize("n", [1, 4, 96, 768, 2048, 4096, 5120])
def test_the_diagonal_first_and_everything_last(n: int) -> None:
    assert torch.equal(gradual_mask(n, 0), torch.eye(n, dtype=torch.bool))
    assert gradual_mask(n, 1).all() and gradual_mask(n, 1.0).all()


@pytest.mark.parametrize("n", [4, 96, 768])
def test_the_last_epoch_has_the_whole_matrix_however_many_there_are(n: int) -> None:
    for epochs in range(1, 41):
        assert share_of_run(epochs - 1, epochs) == 1 and (epochs == 1 or share_of_run(0, epochs) == 0)  # for any n
        assert gradual_mask(n, share_of_run(epochs - 1, epochs)).all()
        assert epochs == 1 or gradual_mask(n, share_of_run(0, epochs)).sum() == n


def test_the_released_formula_falls_short_where_this_one_does_not() -> None:
    epochs, n = 20, 4096
    released = [int((n - 1) / (epochs - 1) * epoch) + 1 for epoch in range(epochs)]  # |i - j| < K
    ours = [int(gradual_mask(n, share_of_run(epoch, epochs))[0].sum()) for epoch in range(epochs)]
    assert released[-1] == n - 1 and ours[-1] == n
    assert ours[:-1] == released[:-1]


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 20])
def test_bands_only_open(epochs: int) -> None:
    masks = [gradual_mask(13, share_of_run(epoch, epochs)) for epoch in range(epochs)]
    for earlier, later in zip(masks, masks[1:], strict=False):
        assert (later | ~earlier).all()
    for epoch, mask in enumerate(masks):
        band = 12 if epochs == 1 else 12 * epoch // (epochs - 1)
        assert all(bool(mask[i, j]) == (abs(i - j) <= band) for i in range(13) for j in range(13))


def test_a_fraction_is_exact_where_a_float_is_not() -> None:
    assert int(gradual_mask(50, Fraction(1, 49))[0].sum()) == 2
    assert int(gradual_mask(50, 1 / 49)[0].sum()) == 1  # the float lies below: what is given is taken exactly


@pytest.mark.parametrize("share", [-0.1, 1.1, Fraction(3, 2)])
def test_progress_outside_the_run_is_refused(share: Fraction | float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        gradual_mask(4, share)
