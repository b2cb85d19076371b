"""Packed linears and whole models on a GPU: pytest -m gpu tests/kernels."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

import plquant as pq
from plquant.generation import generate
from plquant.nn.online import attach_online_
from plquant.nn.packed_linear import PackedLinear
from plquant.quant.grid import ActivationGrid, IntGrid
from tests.kernels.quantized import error_ratio
from tests.kernels.test_run_time import CASES, activations, exact, made, rotation, whole_numbers
from tests.kernels.test_token_norm import inputs, with_readers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_every_width_axis_and_number_of_rows(bits: int, dtype: torch.dtype) -> None:
    for grid in (IntGrid(bits, 64), IntGrid(bits, None, symmetric=True), IntGrid(bits, 64, axis="out")):
        linear = made(grid, None, dtype, (1024, 1536))
        linear.prepare_()
        linear.cuda()
        wide, _ = exact(linear, torch.zeros(1, device="cuda"))
        linear.bias = None
        for rows in (1, 7, 16, 17, 100, 256, 300):
            x = activations(rows, 1536, dtype=dtype).cuda()
            limit = {2: 1.5, 3: 1.25}.get(bits, 1.15) if grid.axis == "out" else 1.1
            assert error_ratio(linear(x), x, wide) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case, (_, x_bits, _) in CASES.items() if x_bits is not None])
def test_quantized_activations(case: str, dtype: torch.dtype) -> None:
    grid, x_bits, kind = CASES[case]
    linear = made(grid, x_bits, dtype, (512, 768))
    linear.prepare_()
    linear.cuda()
    assert isinstance(linear.prepared, kind)
    linear.bias = None
    for rows in (1, 20, 300):
        x = activations(rows, 768, dtype=dtype).cuda()
        wide, inputs = exact(linear, x)
        sums = inputs.double() @ wide.t()
        bound = {torch.float16: 8e-4, torch.bfloat16: 6e-3}[dtype]
        assert (linear(x).double() - sums).norm() <= bound * sums.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["W4A4", "W4A8 g32"])
def test_kronecker_products_in_front(case: str, dtype: torch.dtype) -> None:
    linear, op = made(*CASES[case][:2], dtype), rotation(dtype)
    assert linear.inputs is not None
    linear.inputs.clip = None
    linear.prepare_()
    linear.cuda()
    expected = {rows: linear(op(whole_numbers(rows, dtype)).cuda()) for rows in (1, 20, 300)}
    attach_online_(linear, [op.cuda()])
    for rows, product in expected.items():
        assert torch.equal(linear(whole_numbers(rows, dtype).cuda()), product)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["", "gather", "rotation"])
def test_norms_hand_tokens_on(name: str, dtype: torch.dtype) -> None:
    norm, readers = with_readers(name, False, dtype)
    for module in (norm, *readers):
        module.cuda()
    for rows in (1, 20, 300):
        x = inputs(rows, dtype=dtype).cuda()
        tokens = norm(x)  # compiles
        y = norm.normed(x)
        for op in norm.online or ():
            y = op(y)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = norm(x)
        graph.replay()
        assert tokens.dtype == torch.int8 and torch.equal(again[:, :-4], tokens[:, :-4])  # the last four are nothing
        for reader in readers:  # squares are added in another order: a rare code is its neighbour
            found, expected = reader(tokens).double(), reader(y).double()
            assert (found - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.parametrize("case", CASES)
def test_graphs_and_the_compiler(case: str) -> None:
    linear = made(*CASES[case][:2], torch.float16)
    linear.prepare_()
    linear.cuda()
    for rows in (1, 20, 300):
        x = activations(rows, 160, dtype=torch.float16).cuda()
        expected = linear(x)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = linear(x)
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
        run = torch.compile(lambda x: torch.relu(linear(x)), fullgraph=True)
        assert torch.equal(run(x), torch.relu(expected))


@pytest.mark.parametrize("grid", [IntGrid(3, 128), IntGrid(4, 128, axis="out"), IntGrid(8, None)], ids=str)
def test_laying_out_takes_under_a_second(grid: IntGrid) -> None:
    linear = made(grid, None, torch.bfloat16, (4096, 4096)).cuda()
    torch.cuda.synchronize()
    start = time.perf_counter()
    linear.prepare_()
    torch.cuda.synchronize()
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("activations", [None, ActivationGrid(8, kv=8)], ids=["W3A16", "W3A8KV8"])
def test_a_whole_model(activations: ActivationGrid | None, tmp_path: Path) -> None:
    from tests.test_packed_model import IDS, by_name, packed, save

    folder = save(packed(grid_of=by_name, activations=activations, dtype=torch.float16), tmp_path / "out", activations)
    exact = pq.load(folder, dtype=torch.float32, kernels=False)(IDS, use_cache=False).logits
    ours = pq.load(folder).to("cuda")
    assert all(m.prepared is not None for m in ours.modules() if isinstance(m, PackedLinear))
    plain = pq.load(folder, kernels=False).to("cuda")
    errors = [(lm(IDS.cuda(), use_cache=False).logits.cpu().float() - exact).norm() for lm in (ours, plain)]
    assert errors[0] <= 1.5 * errors[1]
    ids = IDS[:, :5].cuda()
    found = torch.stack([*generate(ours, ids, torch.ones_like(ids), 8)], 1)
    assert found.shape == (1, 8) and found.device.type == "cuda"
