"""vLLM: every way to load, tensor parallelism, bias, fused scales, what is refused, and what changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import engine_checks
import pytest
from transformers import AutoModelForCausalLM

from fourfold.common.errors import FourfoldError
from fourfold.common.quant.backends import Scheme
from fourfold.common.quant.checkpoint.convert import Options, convert
from fourfold.common.quant.importance import FILE, load_importance
from fourfold.common.serving import EngineServer

ARGUMENTS = ["--dtype", "bfloat16", "--max-model-len", "128", "--max-num-seqs", "4", "--enforce-eager"]
FLAG = ["--quantization", "fourfold_nvfp4"]
FEW = engine_checks.QUESTIONS[:5]


def start(model: Path, tmp_path: Path, *arguments: str, env: dict[str, str] | None = None) -> EngineServer:
    return EngineServer("vllm", str(model), tmp_path / "log", [*ARGUMENTS, *arguments], env or {})


def test_quantises_while_loading_over_two_ranks_with_bias(tiny_bias: Path, tmp_path: Path) -> None:
    two = ("--tensor-parallel-size", "2")
    with start(tiny_bias, tmp_path, *FLAG, *two, env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"}) as server:
        answers = engine_checks.ask(server, tiny_bias, FEW, 16)
        lines = engine_checks.fourfold_lines(server)
    engine_checks.check(answers, engine_checks.quantised_while_loading(tiny_bias))
    served = [line for line in lines if line.startswith("fourfold: nvfp4")]
    assert len(served) == 2 and "for 8 layers" in served[0]
    assert "quantised while loading, scales sweep, unweighted: `fourfold quantize` keeps more quality" in served[0]


def test_statistics_beside_the_model_weight_the_search(cut: Path, tmp_path: Path) -> None:
    convert(cut, tmp_path / "made", Options())
    model = tmp_path / "model"
    model.mkdir()
    for file in [*cut.iterdir(), tmp_path / "made" / FILE]:
        (model / file.name).symlink_to(file)
    settings = json.dumps({"fourfold": {"quant": {"ignore": ["layers\\.1\\.mlp"]}}})
    with start(model, tmp_path, *FLAG, "--additional-config", settings) as server:
        answers = engine_checks.ask(server, cut, FEW, 16)
        lines = engine_checks.fourfold_lines(server)
    reference = engine_checks.quantised_while_loading(model, dict(load_importance(model / FILE).mean_square))
    reference.model.layers[1].mlp = AutoModelForCausalLM.from_pretrained(cut, dtype="float32").model.layers[1].mlp
    engine_checks.check(answers, reference)
    assert any(f"weighted by {FILE} (random tokens)" in line for line in lines)
    assert any(
        "2 layers keep the model's dtype (gate_up_proj, down_proj): the ignore setting" in line for line in lines
    )


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
    two = ("--tensor-parallel-size", "2")
    with start(tmp_path / "made", tmp_path, *two, env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"}) as server:
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


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"quant": {"scale": "sweep"}},
            "--additional-config fourfold: quant: unknown key 'scale'; did you mean 'scales'?",
        ),
        ({"quant": {"backend": "gpu"}}, "backend 'gpu' is unknown; known: auto, cpu, cpu_int16, reference"),
    ],
)
def test_bad_settings_stop_the_engine_with_a_clear_line(
    cut: Path, tmp_path: Path, settings: dict[str, object], words: str
) -> None:
    server = start(cut, tmp_path, *FLAG, "--additional-config", json.dumps({"fourfold": settings}))
    with pytest.raises(FourfoldError, match="vllm ended with status"), server:
        pass
    assert words in server.log.read_text()


def test_installed_but_unused_changes_nothing(cut: Path, tmp_path: Path) -> None:
    found = []
    for number, disabled in enumerate(("0", "1")):
        (tmp_path / str(number)).mkdir()
        with start(cut, tmp_path / str(number), env={"FOURFOLD_DISABLE": disabled}) as server:
            answers = engine_checks.ask(server, cut, FEW, 16)
            lines = engine_checks.fourfold_lines(server)
        found.append([(answer.tokens, answer.logprobs) for answer in answers])
        assert set(lines) == (set() if disabled == "1" else {"fourfold: registered --quantization fourfold_nvfp4"})
    assert found[0] == found[1]
