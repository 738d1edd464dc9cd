"""vLLM: every way to load, tensor parallelism, bias, fused scales, what is refused, and what changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import engine_checks
import pytest
from engine_cases import (  # noqa: F401
    FEW,
    FLAG,
    Start,
    test_a_checkpoint_that_names_fourfold_needs_no_flag_and_splits_over_ranks,
    test_bad_settings_stop_the_engine_with_a_clear_line,
    test_fused_shards_keep_their_global_scales_where_the_stock_rule_is_wrong,
    test_quantises_while_loading_over_two_ranks_with_bias,
    test_w4a4_checkpoint_of_modelopt_layout,
)
from forked_server import ForkedServer
from transformers import AutoModelForCausalLM

from fourfold.common.quant.checkpoint.convert import Options, convert
from fourfold.common.quant.importance import FILE, load_importance
from fourfold.common.serving import EngineServer

ARGUMENTS = ["--dtype", "bfloat16", "--max-model-len", "128", "--max-num-seqs", "4", "--enforce-eager"]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    def server(model: Path, *arguments: str, ranks: int = 1, settings: dict[str, object] | None = None) -> EngineServer:
        more = ["--tensor-parallel-size", str(ranks)] if ranks > 1 else []
        if settings is not None:
            more += ["--additional-config", json.dumps({"fourfold": settings})]
        bind = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks)))} if ranks > 1 else {}
        return ForkedServer("vllm", str(model), tmp_path / "log", [*ARGUMENTS, *arguments, *more], bind)

    return server


def test_statistics_beside_the_model_weight_the_search(start: Start, cut: Path, tmp_path: Path) -> None:
    convert(cut, tmp_path / "made", Options())
    model = tmp_path / "model"
    model.mkdir()
    for file in [*cut.iterdir(), tmp_path / "made" / FILE]:
        (model / file.name).symlink_to(file)
    with start(model, *FLAG, settings={"quant": {"ignore": ["layers\\.1\\.mlp"]}}) as server:
        answers = engine_checks.ask(server, cut, FEW, 16)
        lines = engine_checks.fourfold_lines(server)
    reference = engine_checks.quantised_while_loading(model, dict(load_importance(model / FILE).mean_square))
    reference.model.layers[1].mlp = AutoModelForCausalLM.from_pretrained(cut, dtype="float32").model.layers[1].mlp
    engine_checks.check(answers, reference)
    assert any(f"weighted by {FILE} (random tokens)" in line for line in lines)
    assert any(
        "2 layers keep the model's dtype (gate_up_proj, down_proj): the ignore setting" in line for line in lines
    )


def test_installed_but_unused_changes_nothing(cut: Path, tmp_path: Path) -> None:
    """With fourfold as a user starts it."""
    found = []
    for disabled, kind in (("0", EngineServer), ("1", ForkedServer)):
        server = kind("vllm", str(cut), tmp_path / disabled, ARGUMENTS, {"FOURFOLD_DISABLE": disabled})
        with server:
            answers = engine_checks.ask(server, cut, FEW, 16)
            lines = engine_checks.fourfold_lines(server)
        found.append([(answer.tokens, answer.logprobs) for answer in answers])
        assert set(lines) == (set() if disabled == "1" else {"fourfold: registered --quantization fourfold_nvfp4"})
    assert found[0] == found[1]
