"""`register()` never raises, whatever it finds, and says so in one line; stock vLLM loads what fourfold writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fourfold.common.quant.backends import Scheme
from fourfold.common.quant.checkpoint.convert import Options, convert
from fourfold.common.serving import vllm_cpu_env

REPORT = """
import logging
lines = []
class Keep(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
logger = logging.getLogger("vllm.fourfold")
logger.setLevel(logging.INFO)
logger.addHandler(Keep())
from fourfold.vllm_ext.plugin import register
print("RESULT", [register(), register()], len(lines), lines)
"""


def outcome(prepare: str) -> str:
    done = subprocess.run([sys.executable, "-c", prepare + REPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))


def test_registers_once() -> None:
    assert outcome("").startswith("RESULT [True, True] 1 ['fourfold: registered --quantization fourfold_nvfp4']")


def test_attention_may_use_amx() -> None:
    if not torch.cpu._is_amx_tile_supported():
        pytest.skip("this processor has no AMX")
    # arch_prctl(ARCH_GET_XCOMP_PERM): bit 18 is that of the tiles.
    ask = "import ctypes\nbits = ctypes.c_ulong()\nctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(bits))\n"
    done = subprocess.run(
        [sys.executable, "-c", REPORT + ask + "print('TILES', bits.value >> 18 & 1)"], capture_output=True, text=True
    )
    assert "TILES 1" in done.stdout, done.stdout + done.stderr


NVFP4, MTP = "--quantization fourfold_nvfp4", "MTP heads"
ALL = f"{NVFP4}, {MTP}, counts of drafts by source"


@pytest.mark.parametrize(
    ("prepare", "off", "words"),
    [
        ("import sys; sys.modules['vllm'] = None\n", f"{NVFP4}, {MTP}", "is not a package"),
        (
            "import vllm.model_executor.layers.quantization as q; del q.register_quantization_config\n",
            NVFP4,
            "cannot import name 'register_quantization_config'",
        ),
        (
            "import vllm.model_executor.layers.quantization.base_config as b; del b.QuantizationConfig\n",
            NVFP4,
            "cannot import name 'QuantizationConfig'",
        ),
        (
            "import vllm.model_executor.models as m; del m.ModelRegistry\n",
            MTP,
            "cannot import name 'ModelRegistry'",
        ),
        ("import os; os.environ['FOURFOLD_DISABLE'] = 'maybe'\n", ALL, "expected 1 (off) or 0 (on)"),
    ],
)
def test_a_missing_engine_or_seam_is_one_line_a_call(prepare: str, off: str, words: str) -> None:
    found = outcome(prepare)
    registered = off == MTP  # what is there registers all the same, with its own line
    assert found.startswith(f"RESULT [False, False] {2 + registered} [")
    assert found.count(f"fourfold: {off}: off, vLLM goes on without: ") == 2
    assert words in found and "`fourfold doctor` shows which vLLM versions fit" in found


def test_disabled_is_silent() -> None:
    assert outcome("import os; os.environ['FOURFOLD_DISABLE'] = '1'\n") == "RESULT [False, False] 0 []"


STOCK = """
import sys

if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    llm = LLM(sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=64, quantization=sys.argv[2])
    out = llm.generate("The capital of France is", SamplingParams(max_tokens=4, temperature=0))
    print("TOKENS", out[0].outputs[0].token_ids)
"""


@pytest.mark.parametrize("format", ["compressed-tensors", "modelopt"])
def test_stock_vllm_loads_what_fourfold_writes(cut: Path, tmp_path: Path, format: str) -> None:
    # Through vLLM's own method for the format. It has no NVFP4 kernel for CPUs, so its own emulation is registered
    # for them, by its own function; fourfold is off.
    convert(cut, tmp_path / "made", Options(format=format, scheme=Scheme.W4A4))
    plugin = tmp_path / "plugin"
    (plugin / "emulation-1.dist-info").mkdir(parents=True)
    (plugin / "emulation-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: emulation\nVersion: 1\n")
    entry = "[vllm.general_plugins]\nemulation = emulation_plugin:register\n"
    (plugin / "emulation-1.dist-info" / "entry_points.txt").write_text(entry)
    (plugin / "emulation_plugin.py").write_text(EMULATION)
    (tmp_path / "run.py").write_text(STOCK)
    method = "modelopt_fp4" if format == "modelopt" else format
    done = subprocess.run(
        [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "made"), method],
        capture_output=True,
        text=True,
        env={**os.environ, **vllm_cpu_env(), "PYTHONPATH": str(plugin), "FOURFOLD_DISABLE": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "TOKENS" in done.stdout


EMULATION = """
def register():
    from vllm.model_executor.kernels.linear import register_linear_kernel
    from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
    from vllm.platforms import PlatformEnum
    register_linear_kernel(EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
"""
