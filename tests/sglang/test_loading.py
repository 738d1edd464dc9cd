"""SGLang: every way to load, tensor parallelism, bias, fused scales, what is refused, and what changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import engine_checks
import pytest
from engine_cases import (  # noqa: F401
    FEW,
    Start,
    test_a_checkpoint_that_names_fourfold_needs_no_flag_and_splits_over_ranks,
    test_bad_settings_stop_the_engine_with_a_clear_line,
    test_fused_shards_keep_their_global_scales_where_the_stock_rule_is_wrong,
    test_quantises_while_loading_over_two_ranks_with_bias,
    test_w4a4_checkpoint_of_modelopt_layout,
)
from forked_server import ForkedServer

from fourfold.common import compat
from fourfold.common.errors import FourfoldError
from fourfold.common.serving import EngineServer

ARGUMENTS = ["--dtype", "bfloat16", "--context-length", "128", "--max-total-tokens", "1024", "--sleep-on-idle"]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    def server(model: Path, *arguments: str, ranks: int = 1, settings: dict[str, object] | None = None) -> EngineServer:
        more = ["--tp-size", str(ranks)] if ranks > 1 else []
        env = {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks)))} if ranks > 1 else {}
        if settings is not None:
            env["FOURFOLD_CONFIG"] = json.dumps(settings)
        return ForkedServer("sglang", str(model), tmp_path / "log", [*ARGUMENTS, *arguments, *more], env)

    return server


def test_seams() -> None:
    root = compat.source_root("sglang")
    assert root is not None and compat.check("sglang", root) == {}


def test_platform_refuses_what_it_cannot_run(start: Start, cut: Path) -> None:
    server = start(cut, "--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "4")
    with pytest.raises(FourfoldError, match="sglang ended with status"), server:
        pass
    assert "--speculative-algorithm NGRAM does not run on fourfold_cpu" in server.log.read_text()


def test_installed_but_unused_changes_nothing(cut: Path, tmp_path: Path) -> None:
    """The platform is fourfold's in both runs, for SGLang runs on no other here; the plugin is on and off.

    With it as a user starts SGLang.
    """
    found = []
    for plugins, kind in (("fourfold", EngineServer), ("none", ForkedServer)):
        server = kind("sglang", str(cut), tmp_path / plugins, ARGUMENTS, {"SGLANG_PLUGINS": plugins})
        with server:
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
