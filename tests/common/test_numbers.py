"""E2M1, packing and NVFP4 against compressed-tensors and against exhaustive search."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.nvfp4 import helpers
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.common.errors import FourfoldError
from fourfold.common.quant import activations, e2m1, nvfp4
from fourfold.common.quant.quantizer import quantize_weight

FLOATS = st.floats(min_value=-20, max_value=20, width=32)


def nearest(value: float) -> set[int]:
    """Codes 0 to 7 of the nearest magnitudes by exhaustive search; of a tie only the even code."""
    distance = [abs(abs(value) - m) for m in e2m1.MAGNITUDES]
    best = [code for code, d in enumerate(distance) if d == min(distance)]
    return {best[0]} if len(best) == 1 else {code for code in best if code % 2 == 0}


@given(FLOATS)
@settings(max_examples=500, deadline=None)
def test_rounds_to_the_nearest_magnitude_ties_to_even(value: float) -> None:
    code = int(e2m1.encode(torch.tensor([value])))
    assert code & 7 in nearest(value)
    assert bool(code & 8) == bool(torch.signbit(torch.tensor(value)))


def test_every_tie_and_its_neighbours() -> None:
    ties = {0.25: 0, 0.75: 2, 1.25: 2, 1.75: 4, 2.5: 4, 3.5: 6, 5.0: 6}
    for value, code in ties.items():
        x = torch.tensor([value, -value])
        assert e2m1.encode(x).tolist() == [code, code | 8]
        for neighbour in (torch.nextafter(x[:1], torch.tensor(0.0)), torch.nextafter(x[:1], torch.tensor(9.0))):
            assert int(e2m1.encode(neighbour)) in nearest(float(neighbour))
    assert e2m1.encode(torch.tensor([torch.inf, -torch.inf, 7.0])).tolist() == [7, 15, 7]


@given(st.lists(FLOATS, min_size=32, max_size=32))
@settings(max_examples=100, deadline=None)
def test_rounding_packing_and_unpacking_equal_compressed_tensors(values: list[float]) -> None:
    x = torch.tensor(values).view(2, 16)
    theirs = FP4_E2M1_DATA.cast_to_fp4(x.clone())
    ours = e2m1.decode(e2m1.encode(x))
    assert torch.equal(ours, theirs)
    assert torch.equal(e2m1.pack(e2m1.encode(ours)), helpers.pack_fp4_to_uint8(ours))


def test_all_bytes_unpack_as_in_compressed_tensors() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(16, 16)
    theirs = helpers.unpack_fp4_from_uint8(packed, 16, 32, torch.float32)
    assert torch.equal(e2m1.decode(e2m1.unpack(packed)), theirs)
    assert torch.equal(e2m1.pack(e2m1.unpack(packed)), packed)


def adversarial() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(64, 64, generator=generator)
    w[0] = 0
    w[1, :16] = 0
    w[2] *= 1e-30
    w[3] *= 1e4
    w[4] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 8)
    w[5] = -w[4]
    w[6, 5] = 3e4
    return w


@pytest.mark.parametrize("scale", ["power of two", "any"])
def test_dequantises_as_compressed_tensors(scale: str) -> None:
    w = adversarial()
    g = torch.tensor(2.0**-9) if scale == "power of two" else nvfp4.global_scale_of(w.abs().max())
    t = quantize_weight(w, name="w", global_scale=g, compiled=False)
    values = helpers.unpack_fp4_from_uint8(t.packed, 64, 64, torch.float32)
    theirs = dequantize(values, t.block_scales.float(), global_scale=1 / g, dtype=torch.float32)
    if scale == "power of two":
        assert torch.equal(t.dequantize(), theirs)
    else:  # they divide by the stored reciprocal, which rounds twice more
        torch.testing.assert_close(t.dequantize(), theirs, rtol=3 * 2**-24, atol=0)


def test_packs_as_compressed_tensors_quantises() -> None:
    w = adversarial()
    g = torch.tensor(2.0**-9)
    t = quantize_weight(w, name="w", method="absmax", global_scale=g, compiled=False)
    step = (t.block_scales.float() * g).repeat_interleave(16, 1)
    theirs = helpers.pack_fp4_to_uint8(FP4_E2M1_DATA.cast_to_fp4(w / step))
    # They lose the sign of what rounds to zero; the sign of zero does not count.
    assert torch.equal(e2m1.decode(e2m1.unpack(t.packed)), e2m1.decode(e2m1.unpack(theirs)))


def test_zero_blocks_and_tiny_values_have_valid_scales() -> None:
    t = quantize_weight(adversarial(), name="w")
    scales = t.block_scales.float()
    assert bool(((scales >= 2**-9) & (scales <= 448)).all())
    assert bool((scales[0] == 1).all()) and bool((t.dequantize()[0] == 0).all())
    zeros = quantize_weight(torch.zeros(4, 32), name="w")
    assert float(zeros.global_scale) == 1 and not bool(zeros.dequantize().any())


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.full((2, 16), torch.nan), "32 of 32 values are NaN or infinite"),
        (torch.tensor([[torch.inf] + [0.0] * 15]), "1 of 16 values"),
        (torch.ones(2, 24), "inner dimension 24 is not a positive multiple of 16"),
        (torch.ones(2, 0), "inner dimension 0"),
        (torch.ones(16), r"expected a matrix \[N, K\], got shape \[16\]"),
        (torch.ones(2, 16, dtype=torch.int32), "expected a floating-point tensor, got torch.int32"),
    ],
)
def test_refuses_what_nvfp4_cannot_hold(tensor: torch.Tensor, words: str) -> None:
    with pytest.raises(FourfoldError, match=f"model.layers.3.mlp: .*{words}"):
        quantize_weight(tensor, name="model.layers.3.mlp")


@pytest.mark.parametrize("static", [False, True])
def test_activations_round_trip(static: bool) -> None:
    x = torch.randn(5, 64) * torch.tensor([[1.0], [100.0], [1e-3], [0.0], [7.0]])
    scale = x.abs().max() / 2688 if static else None
    packed, block_scales, global_scale = activations.quantize_activations(x, scale)
    assert packed.shape == (5, 32) and block_scales.shape == (5, 4) and global_scale.shape == (5, 1)
    y = activations.fake_quantize(x, scale)
    row = 1 if static else slice(None)
    assert float((y - x)[row].norm() / x[row].norm()) < 0.12
    assert not bool(y[3].any())
