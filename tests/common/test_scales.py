"""The choice of block scales: the window holds the optimum of all codes, and the compiled search finds the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.common.errors import FourfoldError
from fourfold.common.quant import e2m1, scales
from fourfold.common.quant.gptq import quantize_gptq
from fourfold.common.quant.nvfp4 import NvFp4Tensor, absmax_block_scales, global_scale_of
from fourfold.common.quant.quantizer import quantize_weight
from fourfold.common.settings import SCALE_METHODS


def errors(w: torch.Tensor, t: NvFp4Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Weighted squared error of each block, float64 [N, K / 16]."""
    e = (w.double() - t.dequantize().double()).square()
    return (e if importance is None else e * importance.double()).view(len(w), -1, 16).sum(-1)


def error_of_code(w: torch.Tensor, code: int, g: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    scale = torch.full((len(w), w.shape[1] // 16), code, dtype=torch.uint8).view(torch.float8_e4m3fn)
    step = (scale.float() * g).unsqueeze(-1)
    blocks = w.view(len(w), -1, 16)
    e = (blocks - e2m1.decode(e2m1.encode(blocks / step)) * step).double().square()
    return (e if importance is None else e * importance.double().view(1, -1, 16)).sum(-1)


@given(st.integers(0, 2**31 - 1), st.sampled_from(["normal", "laplace", "student"]))
@settings(max_examples=25, deadline=None)
def test_unweighted_window_is_the_best_of_all_codes_that_do_not_clip(seed: int, kind: str) -> None:
    torch.manual_seed(seed)
    draw = {
        "normal": lambda: torch.randn(16, 32),
        "laplace": lambda: torch.distributions.Laplace(0.0, 1.0).sample((16, 32)),
        "student": lambda: torch.distributions.StudentT(5.0).sample((16, 32)),
    }[kind]
    w = draw()
    g = global_scale_of(w.abs().max()) * 4  # so that no window is cut off at 448
    t = quantize_weight(w, name="w", global_scale=g, compiled=False)
    nearest = absmax_block_scales(w, g).view(torch.uint8)
    every = torch.stack([error_of_code(w, code, g, None) for code in range(1, 127)], -1)
    clipping = torch.arange(1, 127) < nearest.unsqueeze(-1)
    best = every.masked_fill(clipping, torch.inf).amin(-1)
    assert bool((errors(w, t) <= best * (1 + 1e-5)).all())


@given(st.integers(0, 2**31 - 1))
@settings(max_examples=25, deadline=None)
def test_weighted_window_is_the_best_of_all_127_codes(seed: int) -> None:
    torch.manual_seed(seed)
    w, importance = torch.randn(16, 32), torch.rand(32) * 0.9 + 0.1
    g = global_scale_of(w.abs().max()) * 4
    t = quantize_weight(w, name="w", importance=importance, global_scale=g, compiled=False)
    every = torch.stack([error_of_code(w, code, g, importance) for code in range(1, 127)], -1).amin(-1)
    assert bool((errors(w, t, importance) <= every * (1 + 1e-5)).all())


@pytest.mark.parametrize("method", SCALE_METHODS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(16, 16), (37, 48), (128, 256), (1, 2064)])
def test_compiled_equals_pytorch(method: str, weighted: bool, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    w = torch.randn(shape).mul_(torch.rand(shape[0], 1) * 3).to(dtype)
    w[0, :16] = 0
    importance = torch.rand(shape[1]) + 0.001 if weighted else None
    fast = quantize_weight(w, name="w", method=method, importance=importance, compiled=True)
    slow = quantize_weight(w, name="w", method=method, importance=importance, compiled=False)
    assert fast.packed.dtype == torch.uint8 and fast.block_scales.dtype == torch.float8_e4m3fn
    same = fast.block_scales.view(torch.uint8) == slow.block_scales.view(torch.uint8)
    assert float(same.float().mean()) > 0.999
    if weighted and method == "sweep":
        importance = importance.clamp(min=1e-6)
    else:
        importance = None
    ours, theirs = errors(w.float(), fast, importance), errors(w.float(), slow, importance)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-12)  # where they differ, both are as good
    if bool(same.all()):
        assert torch.equal(fast.packed, slow.packed)


def test_each_method_is_no_worse_than_the_one_before() -> None:
    torch.manual_seed(0)
    w = torch.randn(256, 512)
    totals = [
        float(errors(w, quantize_weight(w, name="w", method=m)).sum()) for m in ("absmax", "four_over_six", "sweep")
    ]
    assert totals[0] > 1.1 * totals[1] > 1.1 * totals[2] * 0.9
    assert totals[2] < 0.8 * totals[0]


def test_global_scale_stays_amax_over_2688() -> None:
    w = torch.randn(32, 64)
    for method in SCALE_METHODS:
        assert float(quantize_weight(w, name="w", method=method).global_scale) == float(w.abs().max() / 2688)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fourfold.common.quant import quantizer

    w = torch.randn(64, 64)
    whole = quantize_weight(w, name="w", compiled=False)
    monkeypatch.setattr(quantizer, "CHUNK", 100)
    parts = quantize_weight(w, name="w", compiled=False)
    assert torch.equal(whole.packed, parts.packed) and torch.equal(
        whole.block_scales.view(torch.uint8), parts.block_scales.view(torch.uint8)
    )


@pytest.mark.parametrize(
    ("importance", "words"),
    [
        (torch.ones(8), r"have shape \[8\], the layer has 32 inputs"),
        (torch.full((32,), -1.0), "negative or non-finite"),
        (torch.full((32,), torch.nan), "negative or non-finite"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(importance: torch.Tensor, words: str) -> None:
    with pytest.raises(FourfoldError, match=f"layer: .*{words}"):
        quantize_weight(torch.randn(4, 32), name="layer", importance=importance)


def test_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(FourfoldError, match="'best' is unknown; expected one of sweep, four_over_six, absmax"):
        quantize_weight(torch.randn(4, 32), name="layer", method="best")


def test_gptq_lowers_the_error_of_the_outputs() -> None:
    torch.manual_seed(0)
    x = torch.randn(2048, 64) @ torch.randn(64, 64)
    w = torch.randn(48, 64)
    hessian = x.t() @ x / len(x)
    importance = hessian.diagonal()
    plain = quantize_weight(w, name="w", importance=importance)
    fed = quantize_gptq(w, hessian, name="w", importance=importance)

    def loss(t: NvFp4Tensor) -> float:
        return float((x @ (w - t.dequantize()).t()).square().mean())

    assert loss(fed) < 0.7 * loss(plain)
    with pytest.raises(FourfoldError, match=r"w: expected a Hessian of \[64, 64\], got \[2, 2\]"):
        quantize_gptq(w, torch.eye(2), name="w")


def test_reference_takes_the_first_of_equal_errors() -> None:
    w = torch.zeros(1, 16)
    w[0, 0] = 6.0
    chosen = scales.choose_block_scales(w, torch.tensor(1.0), "sweep", None)
    assert float(chosen) == 1.0
