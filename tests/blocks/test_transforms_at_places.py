"""The transforms that will be learned at the places found there leave the block as it was, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from plquant.blocks.sites import QuerySite
from plquant.quant.scaled_weight import ScaledWeight
from plquant.transforms.affine_matrix import AffineMatrix
from plquant.transforms.base import Transform
from plquant.transforms.query_key import QueryKey
from plquant.transforms.query_key_matrix import QueryKeyMatrix
from plquant.transforms.rotary_pairs import RotaryPairs
from tests.blocks.prepared import places_of, proof_of
from tests.families import FAMILIES


def randomize_(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for p in module.double().parameters():
        p.data.uniform_(-1, 1, generator=generator)


@torch.no_grad()
def write_(parameters: dict[str, Tensor], name: str, transform: Transform, rows: slice, gain_offset: float) -> None:
    """Let a norm or linear write through a transform."""
    weight, bias = parameters[f"{name}.weight"], parameters.get(f"{name}.bias")
    if weight.ndim == 1:
        parameters[f"{name}.weight"], bias = transform.write_norm(weight, bias, gain_offset)
    else:
        parameters[f"{name}.weight"] = transform.write_weight(ScaledWeight(weight), rows).dense()
        if bias is not None:
            start, stop, _ = rows.indices(len(bias))
            bias = torch.cat([bias[:start], transform.write_bias(bias[start:stop]), bias[stop:]])
    if bias is not None:
        parameters[f"{name}.bias"] = bias


def move_by(family: str, site: QuerySite, transform: QueryKey) -> float:
    randomize_(transform)
    proof = proof_of(family)
    parameters = {name: p.detach() for name, p in proof.block.named_parameters()}
    query, key = transform.sides()
    write_(parameters, site.query, query, site.query_rows, site.gain_offset)
    write_(parameters, site.key, key, site.key_rows, site.gain_offset)
    return proof.move(parameters)


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_pairs_at_query_sites(family: str, rotate: bool) -> None:
    (site,) = places_of(family)[0].query_sites
    shape = site.heads, site.kv_heads, site.head_dim
    rotate = rotate and site.kind == "linear"
    assert move_by(family, site, RotaryPairs(*shape, site.pairs, site.free, site.kind, rotate)) < 1e-13
    if len(site.pairs):
        assert move_by(family, site, RotaryPairs(*shape, site.pairs.roll(1, 0), site.free, site.kind, rotate)) < 1e-13
        wrong = site.pairs.flatten().roll(1).view(-1, 2)  # negative control: pair what RoPE does not
        assert move_by(family, site, RotaryPairs(*shape, wrong, site.free, site.kind, rotate)) > 1e-3


def test_a_matrix_at_query_sites_without_rope_only() -> None:
    for family, equivalent in (("opt", True), ("llama_mha", False)):
        (site,) = places_of(family)[0].query_sites
        error = move_by(family, site, QueryKeyMatrix(site.heads, site.kv_heads, site.head_dim))
        assert error < 1e-13 if equivalent else error > 1e-3
        assert (len(site.free) == site.head_dim) == equivalent


@pytest.mark.parametrize("family", FAMILIES)
def test_a_matrix_for_each_value_head(family: str) -> None:
    (site,) = (site for site in places_of(family)[0].sites if site.head_dim is not None)
    proof = proof_of(family)
    width = proof.num_channels(site.source, site.rows)
    transform = AffineMatrix(width, width // site.head_dim, site.channel, shift=site.admits_shift)
    randomize_(transform)
    parameters = {name: p.detach() for name, p in proof.block.named_parameters()}
    write_(parameters, site.source, transform, site.rows, 0.0)
    assert proof.move(parameters) > 1e-3  # nobody reads through it yet
    with torch.no_grad():
        for name in site.consumers:
            weight, bias = parameters[f"{name}.weight"], parameters.get(f"{name}.bias")
            parameters[f"{name}.weight"] = transform.read_weight(ScaledWeight(weight)).dense()
            if bias is not None:
                parameters[f"{name}.bias"] = transform.read_bias(weight, bias)
    assert proof.move(parameters) < 1e-13
