"""The judgement of a probe, and the table of known heads; probes of real servers are beside the engines' tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fourfold.common.mtp.golden import GOLDEN, find
from fourfold.common.mtp.probe import Measured, Server, judge
from fourfold.common.mtp.prompts import PROMPTS


def server(name: str, k: int = 3, root: str = "models/it") -> Server:
    return Server("http://127.0.0.1:8000", "vllm", "0.32.0", name, root, k)


def measured(*accepted: int) -> Measured:
    return Measured(64, 4096, 10.0, 1000, accepted)


def test_prompts_are_many_and_different() -> None:
    assert len(PROMPTS) == len(set(PROMPTS)) == 64 and all(10 < len(prompt) < 200 for prompt in PROMPTS)


@pytest.mark.parametrize(
    ("names", "model"),
    [
        (["deepseek-ai/DeepSeek-V4-Pro"], "DeepSeek-V4-Pro"),
        (["ds", "/models/deepseek_v4_pro-NVFP4"], "DeepSeek-V4-Pro"),
        (["deepseek-v4-pro-0813-fp4"], "DeepSeek-V4-Pro-0813"),
        (["zai-org/GLM-5.2-FP8"], "GLM-5.2"),
        (["Qwen/Qwen3.8-27B-FP8"], "Qwen3.8-27B"),
        (["Qwen/Qwen3.8-270B"], None),
        (["smollm2"], None),
    ],
)
def test_known_models_are_found_by_name(names: list[str], model: str | None) -> None:
    found = find(names)
    assert (found.model if found else None) == model


def test_the_table_is_plausible() -> None:
    assert len({golden.model for golden in GOLDEN}) == len(GOLDEN)
    for golden in GOLDEN:
        assert (golden.thinking_on or golden.thinking_off) and golden.source
        for by_k in (golden.thinking_on, golden.thinking_off):
            assert all(1 < length <= k + 1 for k, length in by_k.items())


def test_a_known_model_is_held_to_half_its_accepted_tokens() -> None:
    # 2.49 with thinking, 2.97 without: the lower one counts, (2.49 - 1) / 2 accepted tokens.
    good, bad = measured(400, 200, 146), measured(400, 200, 144)
    verdict = judge(server("DeepSeek-V4-Pro"), good)
    assert verdict.ok and verdict.least == pytest.approx(1.745)
    assert verdict.golden == {"thinking on": 2.49, "thinking off": 2.97}
    assert "mean acceptance length 1.75" in verdict.text and "2.49 (thinking on)" in verdict.text
    verdict = judge(server("x", root="/models/DeepSeek-V4-Pro"), bad)
    assert not verdict.ok and verdict.text.startswith("acceptance collapsed: ")
    assert "`fourfold mtp inspect /models/DeepSeek-V4-Pro`" in verdict.text and "\n" not in verdict.text


def test_another_model_or_length_is_held_to_the_first_position() -> None:
    for name, k in (("mine", 3), ("DeepSeek-V4-Pro", 12)):
        rest = [0] * (k - 1)
        assert judge(server(name, k), measured(100, *rest)).ok
        verdict = judge(server(name, k), measured(99, *rest))
        assert not verdict.ok and verdict.least is None
        assert "position 0 accepted in 9.9%" in verdict.text and "expected position 0 in 10% or more" in verdict.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["http://127.0.0.1:9"], "Connection refused; expected the address of a running vLLM or SGLang server")],
)
def test_what_cannot_be_probed_is_another_exit_status(arguments: list[str], words: str) -> None:
    command = [Path(sys.executable).parent / "fourfold", "doctor", "--probe", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
