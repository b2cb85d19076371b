"""Which channels a linear can do without: merged in pairs and clusters, or dropped and compensated.

All orders are greedy, one channel at a time, and need only two Gram matrices, summed in fp64: ``hessian`` = X^T X of
the activations and ``gram`` = W^T W of all consumers' weights. Their first r steps are the choice of r channels, so one
pass serves every candidate of a search. They come on the CPU, like plans.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plquant.transforms.damping import damped_cholesky

# Letters: K channels; x_c [tokens] and w_c [outputs] the activations and the weights of channel c.


def _unprotected(channels: int, protected: Tensor, count: int) -> Tensor:
    """Where the ``protected`` channels are not, bool [K]."""
    free = torch.ones(channels, dtype=torch.bool, device="cpu")
    free[protected.cpu()] = False
    assert count < free.sum(), f"{count} channels to remove, but only {int(free.sum())} of {channels} are not protected"
    return free


def merge_order(hessian: Tensor, gram: Tensor, count: int, protected: Tensor) -> Tensor:
    """Merges into means, the cheapest next, int64 [count, 2]: a channel, and the one it is merged into.

    Averaging the activations of a cluster G and adding up its weights changes the output by

        E_G = sum over c in G of (x_c - mean x) (w_c - mean w)^T

    For a pair this is 1/2 (x_i - x_j)(w_i - w_j)^T, of squared norm 1/4 |x_i - x_j|^2 |w_i - w_j|^2 (QLLM, equation 5;
    the released code takes the sum of the weights in place of their difference, and chooses no better than at
    random). All pairs compete; a third member is judged by what it adds to the true |E_G|^2. Two clusters are never
    joined. Errors of different clusters count as uncorrelated: reckoning with all of them gained 0 to 3% on
    SmolLM2-135M at twenty times the time.

    Args:
        hessian: X^T X, [K, K].
        gram: W^T W over all consumers, [K, K].
        count: Channels to merge away.
        protected: int64: channels that take no part.
    """
    hessian, gram = hessian.double(), gram.double()
    free = _unprotected(len(hessian), protected, count).to(hessian.device)
    cost = _squared_distances(hessian).mul_(_squared_distances(gram)).div_(4)
    cost.fill_diagonal_(math.inf)
    cost[~free], cost[:, ~free] = math.inf, math.inf
    clusters: dict[int, list[int]] = {}  # the channel that stays -> all members
    error: dict[int, float] = {}  # |E_G|^2
    least, partner = cost.min(dim=1)  # of every row; a pair that gets cheaper does so in the row of its cluster
    order = []
    for _ in range(count):
        first = int(least.argmin())
        second = int(partner[first])
        stays, goes = (second, first) if second in clusters else (first, second)
        members = clusters.setdefault(stays, [stays])
        members.append(goes)
        error[stays] = error.get(stays, 0.0) + float(cost[stays, goes])
        order.append((goes, stays))
        free[members] = False
        joined = (_errors_with_each(hessian, gram, members) - error[stays]).masked_fill_(~free, math.inf)
        cost[goes], cost[:, goes] = math.inf, math.inf
        cost[stays] = cost[:, stays] = joined
        stale = (partner == goes) | (partner == stays)
        stale[[goes, stays]] = True
        least[stale], partner[stale] = cost[stale].min(dim=1)
    return torch.tensor(order, dtype=torch.int64, device="cpu").view(-1, 2)


def _squared_distances(gram: Tensor) -> Tensor:
    """|v_i - v_j|^2 of all pairs, from their inner products; [K, K]."""
    norms = gram.diagonal()
    return (norms[:, None] + norms - 2 * gram).clamp_(min=0)


def _errors_with_each(hessian: Tensor, gram: Tensor, members: list[int]) -> Tensor:
    """|E_G|^2 of the cluster G that these members make with each other channel in turn, [K].

    With s = sum x_c and t = sum w_c over the n members of G:  E_G = sum x_c w_c^T - s t^T / n, and so

        |E_G|^2 = sum_cd <x_c, x_d><w_c, w_d> - 2/n sum_c <x_c, s><w_c, t> + |s|^2 |t|^2 / n^2
    """
    n = len(members) + 1
    x, w = hessian[members], gram[members]  # inner products of the members with each channel, [n - 1, K]
    x_own, w_own = x[:, members], w[:, members]
    x_norm, w_norm = hessian.diagonal(), gram.diagonal()
    inner = (x_own * w_own).sum() + 2 * (x * w).sum(0) + x_norm * w_norm
    with_sums = ((x_own.sum(1, True) + x) * (w_own.sum(1, True) + w)).sum(0) + (x.sum(0) + x_norm) * (w.sum(0) + w_norm)
    s, t = x_own.sum() + 2 * x.sum(0) + x_norm, w_own.sum() + 2 * w.sum(0) + w_norm
    return inner - 2 / n * with_sums + s * t / n**2


def drop_order(hessian: Tensor, gram: Tensor, count: int, protected: Tensor, damp: float = 0.01) -> Tensor:
    """Channels to drop, the least needed next, int64 [count].

    Removing channel c and fitting the other weights anew (optimal brain surgeon) costs |w_c|^2 / [H^-1]_cc. After every
    step H^-1 and the weights are those without c: of two channels that can stand in for each other only one goes.

    Args:
        hessian: X^T X, [K, K].
        gram: W^T W over all consumers, [K, K].
        count: Channels to drop.
        protected: int64: channels that stay.
        damp: Added to the diagonal of ``hessian``, as a share of its median (``damped_cholesky``).
    """
    hessian, gram = hessian.double(), gram.double()
    free = _unprotected(len(hessian), protected, count).to(hessian.device)
    inverse = torch.cholesky_inverse(damped_cholesky(hessian, damp))
    # Every drop takes  u u^T  from H^-1  and  p q^T + q p^T  from W^T W. Of both only the diagonal is kept up to date,
    # and the row that is needed is worked out: K r operations a step in place of K^2.
    u, p, q = hessian.new_zeros(3, count, len(hessian))
    inverse_diagonal, norms = inverse.diagonal().clone(), gram.diagonal().clone()
    order = []
    for step in range(count):
        c = int((norms / inverse_diagonal).masked_fill_(~free, math.inf).argmin())
        order.append(c)
        free[c] = False
        row = inverse[c] - u[:, c] @ u
        with_c = gram[c] - p[:, c] @ q - q[:, c] @ p  # inner products of w_c and each column
        u[step], p[step] = row / row[c].sqrt(), row / row[c]  # W -> W - w_c p^T
        q[step] = with_c - with_c[c] / 2 * p[step]
        inverse_diagonal -= u[step].square()
        norms -= 2 * p[step] * q[step]
    return torch.tensor(order, dtype=torch.int64, device="cpu")


def drop_order_without_fit(hessian: Tensor, gram: Tensor, count: int, protected: Tensor) -> Tensor:
    """Channels to drop, the least needed next, where the other weights stay as they are; int64 [count].

    Dropping the channels D changes the output by  sum over c in D of x_c w_c^T,  of squared norm

        sum over c, d in D of <x_c, x_d><w_c, w_d>

    so the first costs |x_c|^2 |w_c|^2, and each later one twice its products with those before it besides.

    Args:
        hessian: X^T X, [K, K].
        gram: W^T W over all consumers, [K, K].
        count: Channels to drop.
        protected: int64: channels that stay.
    """
    hessian, gram = hessian.double(), gram.double()
    free = _unprotected(len(hessian), protected, count).to(hessian.device)
    cost = hessian.diagonal() * gram.diagonal()
    order = []
    for _ in range(count):
        c = int(cost.masked_fill(~free, math.inf).argmin())
        order.append(c)
        free[c] = False
        cost += 2 * hessian[c] * gram[c]
    return torch.tensor(order, dtype=torch.int64, device="cpu")
