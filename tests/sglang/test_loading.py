"""SGLang: every way to load, tensor parallelism, bias, fused scales, what is refused, and what changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import engine_checks
import pytest

from fourfold.common import compat
from fourfold.common.errors import FourfoldError
from fourfold.common.quant.backends import Scheme
from fourfold.common.quant.checkpoint.convert import Options, convert
from fourfold.common.serving import EngineServer

ARGUMENTS = ["--dtype", "bfloat16", "--context-length", "128", "--max-total-tokens", "1024"]
FLAG = ["--quantization", "fourfold_nvfp4"]
FEW = engine_checks.QUESTIONS[:5]


def start(model: Path, tmp_path: Path, *arguments: str, env: dict[str, str] | None = None) -> EngineServer:
    return EngineServer("sglang", str(model), tmp_path / "log", [*ARGUMENTS, *arguments], env or {})


def test_seams() -> None:
    root = compat.source_root("sglang")
    assert root is not None and compat.check("sglang", root) == {}


def test_quantises_while_loading_over_two_ranks_with_bias(tiny_bias: Path, tmp_path: Path) -> None:
    two = ("--tp-size", "2")
    with start(tiny_bias, tmp_path, *FLAG, *two, env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}) as server:
        answers = engine_checks.ask(server, tiny_bias, FEW, 16)
        lines = engine_checks.fourfold_lines(server)
    engine_checks.check(answers, engine_checks.quantised_while_loading(tiny_bias))
    served = [line for line in lines if line.startswith("fourfold: nvfp4")]
    assert len(served) == 2 and "for 8 layers" in served[0]


def test_w4a4_checkpoint_of_modelopt_layout(cut: Path, tmp_path: Path) -> None:
    convert(cut, tmp_path / "made", Options(format="modelopt", scheme=Scheme.W4A4))
    engine_checks.saturate(tmp_path / "made")
    with start(tmp_path / "made", tmp_path, *FLAG) as server:
        answers = engine_checks.ask(server, cut, FEW, 16)
        lines = engine_checks.fourfold_lines(server)
    engine_checks.check_w4a4(answers, tmp_path / "made", cut)
    assert any(line.startswith("fourfold: nvfp4 w4a4, backend cpu") for line in lines)


def test_a_checkpoint_that_names_fourfold_needs_no_flag_and_splits_over_ranks(tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "made", Options(format="fourfold"))
    two = ("--tp-size", "2")
    with start(tmp_path / "made", tmp_path, *two, env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}) as server:
        answers = engine_checks.ask(server, tiny, FEW, 16)
    engine_checks.check(answers, engine_checks.reference_model(tmp_path / "made", tiny))


def test_fused_shards_keep_their_global_scales_where_the_stock_rule_is_wrong(tiny: Path, tmp_path: Path) -> None:
    made = engine_checks.own_scales(tiny, tmp_path / "made")
    with start(made, tmp_path, *FLAG) as server:
        answers = engine_checks.ask(server, tiny, FEW, 16)
    engine_checks.check(answers, engine_checks.reference_model(made, tiny))
    stock = engine_checks.collapse(engine_checks.reference_model(made, tiny), made)
    with pytest.raises(AssertionError):
        engine_checks.check(answers, stock)


def test_bad_settings_stop_the_engine_with_a_clear_line(cut: Path, tmp_path: Path) -> None:
    server = start(cut, tmp_path, *FLAG, env={"FOURFOLD_CONFIG": json.dumps({"quant": {"scale": "sweep"}})})
    with pytest.raises(FourfoldError, match="sglang ended with status"), server:
        pass
    assert "FOURFOLD_CONFIG: quant: unknown key 'scale'; did you mean 'scales'?" in server.log.read_text()


def test_platform_refuses_what_it_cannot_run(cut: Path, tmp_path: Path) -> None:
    server = start(cut, tmp_path, "--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "4")
    with pytest.raises(FourfoldError, match="sglang ended with status"), server:
        pass
    assert "--speculative-algorithm NGRAM does not run on fourfold_cpu" in server.log.read_text()


def test_installed_but_unused_changes_nothing(cut: Path, tmp_path: Path) -> None:
    """The platform is fourfold's in both runs, for SGLang runs on no other here; the plugin is on and off."""
    found = []
    for number, plugins in enumerate(("fourfold", "none")):
        (tmp_path / str(number)).mkdir()
        with start(cut, tmp_path / str(number), env={"SGLANG_PLUGINS": plugins}) as server:
            answers = engine_checks.ask(server, cut, FEW, 16)
            assert not [line for line in engine_checks.fourfold_lines(server) if "nvfp4 w4" in line]
        found.append([(answer.tokens, answer.logprobs) for answer in answers])
    assert found[0] == found[1]


REPORT = """
import logging
lines = []
class Keep(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
logger = logging.getLogger("fourfold")
logger.setLevel(logging.INFO)
logger.addHandler(Keep())
from fourfold.sglang_ext.plugin import register
print("RESULT", [register(), register()], len(lines), lines)
"""


def outcome(prepare: str) -> str:
    done = subprocess.run([sys.executable, "-c", prepare + REPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))


def test_registers_once_and_leaves_others_alone() -> None:
    check = """
import atexit
from sglang.srt.layers import quantization
from sglang.srt.arg_groups import choices
before = list(quantization.QUANTIZATION_METHODS)
def after():
    now = list(quantization.QUANTIZATION_METHODS)
    print("LISTS", now == ["fourfold_nvfp4", *before], choices.QUANTIZATION_CHOICES.count("fourfold_nvfp4"))
atexit.register(after)
"""
    done = subprocess.run([sys.executable, "-c", check + REPORT], capture_output=True, text=True)
    assert "RESULT [True, True] 1 ['fourfold: registered --quantization fourfold_nvfp4']" in done.stdout, done.stderr
    assert "LISTS True 1" in done.stdout


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        ("import sys; sys.modules['sglang'] = None\n", "is not a package"),
        (
            "from sglang.srt.layers import quantization as q; del q.QUANTIZATION_METHODS\n",
            "has no attribute 'QUANTIZATION_METHODS'",
        ),
        ("import os; os.environ['FOURFOLD_DISABLE'] = 'maybe'\n", "expected 1 (off) or 0 (on)"),
    ],
)
def test_a_missing_engine_or_seam_is_one_line_a_call(prepare: str, words: str) -> None:
    found = outcome(prepare)
    assert found.startswith("RESULT [False, False] 2 [")
    assert "fourfold is off, SGLang goes on without it: " in found
    assert words in found and "`fourfold doctor` shows which SGLang versions fit" in found


def test_disabled_is_silent() -> None:
    assert outcome("import os; os.environ['FOURFOLD_DISABLE'] = '1'\n") == "RESULT [False, False] 0 []"
