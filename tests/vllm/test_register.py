"""`register()` never raises, whatever it finds, and says so in one line; stock vLLM loads what fourfold writes."""

from __future__ import annotations

import json
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


TILES = """
import ctypes
bits = ctypes.c_ulong()
ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(bits))  # arch_prctl(ARCH_GET_XCOMP_PERM): bit 18 is the tiles'
print("TILES", bits.value >> 18 & 1)
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def outcome(output: str) -> str:
    return next(line for line in output.splitlines() if line.startswith("RESULT"))


@pytest.fixture(scope="module")
def registered() -> str:
    return run(REPORT + TILES)


def test_registers_once(registered: str) -> None:
    once = "RESULT [True, True] 1 ['fourfold: registered --quantization fourfold_nvfp4']"
    assert outcome(registered).startswith(once)


def test_attention_may_use_amx(registered: str) -> None:
    if not torch.cpu._is_amx_tile_supported():
        pytest.skip("this processor has no AMX")
    assert "TILES 1" in registered


# Preparation, and what vLLM then goes on without.
NVFP4, MTP = "--quantization fourfold_nvfp4", "MTP heads"
OFF = {
    "import vllm.model_executor.layers.quantization as q; del q.register_quantization_config\n": (
        NVFP4,
        "cannot import name 'register_quantization_config'",
    ),
    "import vllm.model_executor.layers.quantization.base_config as b; del b.QuantizationConfig\n": (
        NVFP4,
        "cannot import name 'QuantizationConfig'",
    ),
    "import vllm.model_executor.models as m; del m.ModelRegistry\n": (MTP, "cannot import name 'ModelRegistry'"),
    "import sys; sys.modules['vllm'] = None\n": (f"{NVFP4}, {MTP}", "is not a package"),
    "import os; os.environ['FOURFOLD_DISABLE'] = 'maybe'\n": (
        f"{NVFP4}, {MTP}, counts of drafts by source, changes to vLLM's processes",
        "expected 1 (off) or 0 (on)",
    ),
}
# A process for each seam that is missing, forked from one that has imported vLLM.
FORKS = """
import json, os, sys
import vllm.model_executor.layers.quantization, vllm.model_executor.models
for code in json.loads(sys.argv[1]):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        exec(code)
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def missing() -> dict[str, str]:
    """What is reported after each preparation."""
    seams = [prepare for prepare in OFF if "del " in prepare]
    code = f"import sys\nsys.argv.append({json.dumps([prepare + REPORT for prepare in seams])!r})\n{FORKS}"
    lines = [line for line in run(code).splitlines() if line.startswith("RESULT")]
    found = dict(zip(seams, lines, strict=True))
    return {prepare: found.get(prepare) or outcome(run(prepare + REPORT)) for prepare in OFF}


@pytest.mark.parametrize("prepare", OFF)
def test_a_missing_engine_or_seam_is_one_line_a_call(missing: dict[str, str], prepare: str) -> None:
    off, words = OFF[prepare]
    found = missing[prepare]
    registered = off == MTP  # what is there registers all the same, with its own line
    assert found.startswith(f"RESULT [False, False] {2 + registered} [")
    assert found.count(f"fourfold: {off}: off, vLLM goes on without: ") == 2
    assert words in found and "`fourfold doctor` shows which vLLM versions fit" in found


def test_disabled_is_silent() -> None:
    assert outcome(run("import os; os.environ['FOURFOLD_DISABLE'] = '1'\n" + REPORT)) == "RESULT [False, False] 0 []"


STOCK = """
import sys

if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    for argument in sys.argv[1:]:
        method, model = argument.split("=")
        llm = LLM(model, dtype="bfloat16", enforce_eager=True, max_model_len=64, quantization=method)
        out = llm.generate("The capital of France is", SamplingParams(max_tokens=4, temperature=0))
        print("TOKENS", method, out[0].outputs[0].token_ids)
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
"""


def test_stock_vllm_loads_what_fourfold_writes(cut: Path, tmp_path: Path) -> None:
    # Through vLLM's own method for the format. It has no NVFP4 kernel for CPUs, so its own emulation is registered
    # for them, by its own function; fourfold is off.
    methods = {"compressed-tensors": "compressed-tensors", "modelopt": "modelopt_fp4"}
    for format in methods:
        convert(cut, tmp_path / format, Options(format=format, scheme=Scheme.W4A4))
    plugin = tmp_path / "plugin"
    (plugin / "emulation-1.dist-info").mkdir(parents=True)
    (plugin / "emulation-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: emulation\nVersion: 1\n")
    entry = "[vllm.general_plugins]\nemulation = emulation_plugin:register\n"
    (plugin / "emulation-1.dist-info" / "entry_points.txt").write_text(entry)
    (plugin / "emulation_plugin.py").write_text(EMULATION)
    (tmp_path / "run.py").write_text(STOCK)
    own = {"PYTHONPATH": str(plugin), "FOURFOLD_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "run.py"), *(f"{methods[format]}={tmp_path / format}" for format in methods)],
        capture_output=True,
        text=True,
        env={**os.environ, **vllm_cpu_env(), **own},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert all(f"TOKENS {method} [" in done.stdout for method in methods.values()), done.stdout[-3000:]


EMULATION = """
def register():
    from vllm.model_executor.kernels.linear import register_linear_kernel
    from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
    from vllm.platforms import PlatformEnum
    register_linear_kernel(EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
"""
