"""SmolLM2 and the head that was trained for it in vLLM: acceptance as trained, and the same output as without."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import engine_runs
import pytest
import real_head
from real_head import K

from fourfold.common.mtp.extract import extract
from fourfold.common.quant.checkpoint.convert import Options, convert

TOKENS, FEW = 32, 40
COMMON = {"max_num_seqs": 40, "enable_prefix_caching": False}


@pytest.fixture(scope="module")
def runs(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of all cases, and the prompts under ``prompts``."""
    folder = tmp_path_factory.mktemp("real")
    extract(real_head.HEAD, folder / "draft", "vllm")
    convert(real_head.HEAD, folder / "quantised", Options(importance="none"))
    extract(folder / "quantised", folder / "quantised-draft", "vllm")
    asked = real_head.prompts(smollm2)
    cases = {}
    for name, dtype, draft in (
        ("float32", "float32", None),
        ("float32 MTP", "float32", "draft"),
        ("BF16", "bfloat16", None),
        ("BF16 MTP", "bfloat16", "draft"),
        ("BF16, NVFP4 head", "bfloat16", "quantised-draft"),
    ):
        options: dict[str, Any] = {**COMMON, "dtype": dtype}
        if draft:
            speculative = {"method": "mtp", "model": str(folder / draft), "num_speculative_tokens": K}
            options["speculative_config"] = speculative | {"use_local_argmax_reduction": True}
            if draft != "draft":
                options["speculative_config"]["quantization"] = "fourfold_nvfp4"
        count = 100 if dtype == "float32" else FEW
        requests = [{"prompt": list(prompt), "temperature": 0, "max_tokens": TOKENS} for prompt in asked[:count]]
        cases[name] = {"model": str(smollm2), "options": options, "requests": requests}
    results = engine_runs.run_all(folder, cases, ",".join(map(str, sorted(os.sched_getaffinity(0)))), timeout=1500)
    results.pop("log")
    assert not any("error" in result for result in results.values()), results
    return results | {"prompts": asked}


def length(result: dict[str, Any]) -> float:
    """The mean acceptance length."""
    return 1 + sum(result["accepted"]) / result["steps"]


def test_a_hundred_answers_are_those_without_speculation(runs: dict[str, Any]) -> None:
    assert len(runs["prompts"]) == 100
    assert real_head.differing(runs["float32"]["tokens"], runs["float32 MTP"]["tokens"]) == []


@pytest.fixture(scope="module")
def target(smollm2: Path) -> Any:
    return real_head.target(smollm2)


def test_answers_in_bf16_part_at_near_ties_only(runs: dict[str, Any], target: Any) -> None:
    for name in ("BF16 MTP", "BF16, NVFP4 head"):
        parted = real_head.assert_near_ties(target, runs["prompts"], runs["BF16"]["tokens"], runs[name]["tokens"])
        print(f"{name}: {parted} of {FEW} answers part at a near-tie")
        assert parted < 0.75 * FEW  # most with AMX, whose products depend on the number of rows


def test_the_head_drafts_what_it_drafts_in_pytorch(runs: dict[str, Any], target: Any) -> None:
    result = runs["float32 MTP"]
    expected = real_head.counted(target, runs["prompts"], result["tokens"])
    real_head.assert_counted([*result["accepted"], result["steps"]], expected, 100)


def test_acceptance_survives_nvfp4(runs: dict[str, Any]) -> None:
    plain, quantised = runs["BF16 MTP"], runs["BF16, NVFP4 head"]
    for name, result in (("BF16", plain), ("NVFP4", quantised)):
        shares = " ".join(f"{count / result['steps']:.3f}" for count in result["accepted"])
        print(f"{name} head: acceptance by position {shares}, mean acceptance length {length(result):.2f}")
    assert abs(plain["accepted"][0] / plain["steps"] - quantised["accepted"][0] / quantised["steps"]) < 0.03
