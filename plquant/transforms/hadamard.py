"""Orthogonal matrices that spread an outlier over all channels, for any width, made when they are asked for.

A Hadamard matrix has entries 1 and -1 and orthogonal rows: one large channel becomes n of equal, small size. They are
built from Sylvester's doubling and Paley's two constructions over the residues modulo a prime (Paley, 1933):

    H_2n = [[H, H], [H, -H]]        q = 3 mod 4: order q + 1        q = 1 mod 4: order 2 (q + 1)

Letters: n a width, n1 n2 its two factors, q a prime.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


@functools.cache
def hadamard(n: int) -> Tensor | None:
    """A Hadamard matrix of order n, int8 [n, n] with ``H H^T = n I``; ``None`` where these constructions have none."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    if n % 4 == 0 and _is_prime(n - 1):  # n - 1 = 3 mod 4
        return _bordered(n - 1, -1) + torch.eye(n, dtype=torch.int8)
    if n % 4 == 0 and _is_prime(n // 2 - 1) and n // 2 % 4 == 2:  # n / 2 - 1 = 1 mod 4
        core, ones = _bordered(n // 2 - 1, 1), torch.eye(n // 2, dtype=torch.int8)
        signs = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8), torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
        return torch.kron(core, signs[0]) + torch.kron(ones, signs[1])
    half = hadamard(n // 2) if n % 2 == 0 else None
    return None if half is None else torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.int8), half)


def orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, fp64 [n, n].

    A Hadamard matrix whose columns have random signs, over sqrt(n); where none is known, one from a QR decomposition.

    Args:
        n: Width.
        generator: On the CPU.
    """
    matrix = hadamard(n)
    if matrix is None:
        q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
        return q * r.diagonal().sign()  # uniform over all orthogonal matrices only with these signs
    signs = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    return matrix.double() * signs / math.sqrt(n)


def near_root(n: int) -> float:
    """The power of two next to sqrt(n): over it, not sqrt(n), entries of a Hadamard matrix are exact in any dtype."""
    return 2.0 ** round(math.log2(n) / 2)


def keeping_mean(n: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix Q that leaves the mean of a row where it is, fp64 [n, n]: ``Q 1 = 1``.

    A rotation of the n - 1 other directions, in a basis whose first vector is ``1 / sqrt(n)``.
    """
    first = torch.full((n,), 1 / math.sqrt(n), dtype=torch.float64)
    mirror = -first
    mirror[0] += 1
    basis = torch.eye(n, dtype=torch.float64)
    if n > 1:
        basis -= 2 * mirror.outer(mirror) / mirror.square().sum()
    return basis @ torch.block_diag(torch.ones(1, 1, dtype=torch.float64), orthogonal(n - 1, generator)) @ basis


def split_width(n: int) -> tuple[int, int]:
    """Two factors of n for a Kronecker product, the smaller first: near each other, and Hadamard orders if they can be.

    576 = 24 x 24, 1536 = 32 x 48, 4864 = 64 x 76; 11008 = 86 x 128, where only the second is one; a prime is 1 x n.
    """
    pairs = [(d, n // d) for d in range(math.isqrt(n), 0, -1) if n % d == 0]
    near = [pair for pair in pairs if sum(pair) <= 1.5 * sum(pairs[0])]  # what a product costs is their sum
    return max(near, key=lambda pair: (_known(*pair), pair[0]))


def _known(*orders: int) -> int:
    """How many of these orders have a Hadamard matrix here."""
    return sum(hadamard(order) is not None for order in orders)


def _bordered(q: int, sign: int) -> Tensor:
    """Paley's conference matrix [q + 1, q + 1]: residues of differences, a border of ones, zeros on the diagonal."""
    residues = {i * i % q for i in range(1, q)}
    character = torch.tensor([0] + [1 if i in residues else -1 for i in range(1, q)], dtype=torch.int8)
    index = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    matrix[0, 1:], matrix[1:, 0] = 1, sign
    matrix[1:, 1:] = character[(index[:, None] - index) % q]
    return matrix


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
