"""Every backend on every instruction set this machine has, against the reference."""

from __future__ import annotations

import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fourfold.common.errors import FourfoldError
from fourfold.common.quant import backends
from fourfold.common.quant.backends import BACKENDS, LayerSpec, Scheme, cpu, select
from fourfold.common.quant.linear import NvFp4Linear
from fourfold.common.quant.native import build
from fourfold.common.quant.quantizer import quantize_weight

# Error of the outputs against the reference in float32, relative to the outputs' size if no term cancelled: int8
# activations in blocks of 16 have steps of amax / 127, int16 of amax / 32767, NVFP4 activations are exact; beyond
# 64 rows all are exact.
TOLERANCE = {("cpu", "w4a16"): 8e-3, ("cpu_int16", "w4a16"): 4e-5, ("cpu", "w4a4"): 1e-6, ("cpu_int16", "w4a4"): 1e-6}
BF16_STEP = 2**-8


def layer(shards: tuple[int, ...], columns: int, static: bool = False) -> NvFp4Linear:
    torch.manual_seed(columns)
    parts = [quantize_weight(torch.randn(n, columns) * 3**i, name="w") for i, n in enumerate(shards)]
    inputs = torch.tensor([0.0011, 0.0013, 0.0017])[: len(shards)] if static else None
    return NvFp4Linear.from_shards(parts, inputs)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def error(found: torch.Tensor, expected: torch.Tensor, x: torch.Tensor, linear: NvFp4Linear) -> float:
    size = x.double().square() @ linear.dequantize(torch.float64).square().t()
    size = size.sum() + expected.double().square().sum()  # a bias may be larger than the products
    return float(((found.double() - expected.double()).square().sum() / size).sqrt())


@pytest.fixture(scope="module")
def compiled() -> None:
    """The kernels for every instruction set, compiled at once where this machine has none yet."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda isa: build.load("linear", isa), build.available_isas()))


@pytest.fixture(params=build.available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, compiled: None) -> str:
    monkeypatch.setattr(cpu.build, "chosen_isa", lambda: request.param)
    monkeypatch.setattr(cpu, "_library", None)
    yield request.param
    cpu._library = None


@pytest.mark.parametrize(("name", "scheme"), TOLERANCE)
@pytest.mark.parametrize("shards", [(16,), (5,), (40, 24, 17)], ids=str)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_equals_the_reference(isa: str, name: str, scheme: str, shards: tuple[int, ...], static: bool) -> None:
    for columns in (16, 96, 560):
        linear = layer(shards, columns, static)
        reference = BACKENDS["reference"].prepare(linear, Scheme(scheme))
        module = BACKENDS[name].prepare(linear, Scheme(scheme))
        bias = torch.randn(sum(shards))
        for rows in (1, 2, 3, 8, 9, 64, 65, 130):
            x = torch.randn(rows, columns) * torch.rand(rows, 1) * 4
            expected = reference(x, bias)
            assert error(module(x, bias), expected, x, linear) < TOLERANCE[name, scheme], (columns, rows)
            low = x.bfloat16()
            tolerance = TOLERANCE[name, scheme] + BF16_STEP
            expected = reference(low.float(), bias.bfloat16().float())
            assert error(module(low, bias.bfloat16()), expected, low, linear) < tolerance
            assert module(low).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_dimensions_and_empty_batches(isa: str, dtype: torch.dtype) -> None:
    module = BACKENDS["cpu"].prepare(layer((32,), 64), Scheme.W4A16)
    x = torch.randn(2, 3, 64).to(dtype)
    assert module(x).shape == (2, 3, 32) and module(x).dtype == dtype
    assert module(x[:, :0]).shape == (2, 0, 32)
    strided = torch.randn(64, 5).to(dtype).t()
    torch.testing.assert_close(module(strided), module(strided.contiguous()))


def test_not_a_number_reaches_the_output(isa: str) -> None:
    for name, scheme in TOLERANCE:
        module = BACKENDS[name].prepare(layer((32,), 64), Scheme(scheme))
        for bad in (torch.nan, torch.inf):
            x = torch.randn(2, 64)
            x[1, 40] = bad
            y = module(x)
            assert bool(torch.isfinite(y[0]).all()) and not bool(torch.isfinite(y[1]).any()), (name, scheme, bad)


def test_unpacks_exactly(isa: str) -> None:
    linear = layer((40,), 96)
    expected = BACKENDS["reference"].prepare(linear, Scheme.W4A16).weight
    assert torch.equal(cpu.unpack(cpu.pack(linear), 96, 0, 40), expected)
    assert torch.equal(cpu.unpack(cpu.pack(linear), 96, 16, 40), expected[16:])


def test_same_input_gives_the_same_output_in_any_batch(isa: str) -> None:
    module = BACKENDS["cpu"].prepare(layer((64,), 128), Scheme.W4A16)
    x = torch.randn(64, 128)
    whole = module(x)
    for row, count in itertools.product((0, 17), (1, 3, 8, 11)):
        assert torch.equal(module(x[row : row + count]), whole[row : row + count])


def test_compiles_in_one_graph() -> None:
    module = BACKENDS["cpu"].prepare(layer((32, 16), 64), Scheme.W4A16)
    x = torch.randn(4, 64)
    compiled = torch.compile(lambda x: module(x).relu() + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x).relu() + 1)
    torch.library.opcheck(
        torch.ops.fourfold.nvfp4_linear.default,
        (x, module.packed, module.row_scales, None, None, module.shard_rows, module.mode),
    )


def test_memory_is_under_0_6_bytes_a_weight() -> None:
    module = BACKENDS["cpu"].prepare(layer((1024,), 1024), Scheme.W4A16)
    assert sum(b.nbytes for b in module.buffers()) / 1024**2 < 0.6


def test_fused_shards_keep_their_global_scales_and_the_stock_rule_is_wrong() -> None:
    linear = layer((64, 64), 128)  # the second shard is three times larger
    weight = torch.cat([shard.dequantize() for shard in linear.shards()])
    x = torch.randn(4, 128)
    stock = NvFp4Linear(linear.packed, linear.block_scales, linear.global_scales.max().repeat(2), linear.shard_rows)
    for name in BACKENDS:
        ours = BACKENDS[name].prepare(linear, Scheme.W4A16)(x)
        collapsed = BACKENDS[name].prepare(stock, Scheme.W4A16)(x)
        assert relative(ours, x @ weight.t()) < 8e-3
        assert relative(collapsed, x @ weight.t()) > 0.3


def test_selection_and_reasons() -> None:
    spec = LayerSpec(64, 64, torch.bfloat16, torch.device("cpu"), Scheme.W4A16)
    assert select(spec).backend.name == "cpu"
    assert select(spec, "reference").backend.name == "reference"
    meta = LayerSpec(64, 64, torch.bfloat16, torch.device("meta"), Scheme.W4A16)
    selection = select(meta)
    assert selection.backend.name == "reference"
    assert selection.refused["cpu"] == "needs device cpu, the layer is on meta"
    with pytest.raises(FourfoldError, match="'gpu' is unknown; known: auto, cpu, cpu_int16, reference"):
        select(spec, "gpu")
    with pytest.raises(FourfoldError, match="no NVFP4 backend serves 64x60.*multiple of 16 input features"):
        backends.select(LayerSpec(64, 60, torch.bfloat16, torch.device("cpu"), Scheme.W4A16), "cpu")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"CXX": "/nonexistent/c++"}, "the compiler /nonexistent/c++ cannot be run"),
        ({"CXX": "/bin/false"}, "/bin/false failed on linear.cpp"),
        ({"FOURFOLD_CPU_ISA": "sse9"}, "FOURFOLD_CPU_ISA='sse9': this processor has"),
    ],
)
def test_without_a_compiler_the_reference_serves_and_says_why(
    environment: dict[str, str], words: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import torch
from fourfold.common.quant.backends import LayerSpec, Scheme, select
found = select(LayerSpec(64, 64, torch.bfloat16, torch.device("cpu"), Scheme.W4A16))
print(found.backend.name, found.refused["cpu"])
"""
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path))
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reference ") and words in done.stdout
    assert not list(tmp_path.rglob("*.so")) and not list(tmp_path.rglob("*partial*"))
