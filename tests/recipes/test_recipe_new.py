"""fourfold recipe new: configs of many architectures, none known by name, become recipes that check.

The configs are those of the shipped model cards under names that no engine and no card has.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from unseen_models import DENSE, MTP_LAYER, SHIPPED, args_of, compose_at, index_of, model_at

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.check import checking, rules, snapshots
from fourfold.common.recipe.dayzero import writing
from fourfold.common.recipe.dayzero.compose import WORKLOADS, Composed
from fourfold.common.recipe.dayzero.source import read_model
from fourfold.common.recipe.dayzero.vocabulary import unknown_traits
from fourfold.common.recipe.loading import Catalogue
from fourfold.common.recipe.schema import ModelCard, Recipe
from fourfold.common.recipe.sizing.fit import cases_of, fit
from fourfold.common.recipe.sizing.traits import flat, read_traits

MODELS = (
    "deepseek-v3.2-nvfp4 deepseek-v4-flash deepseek-v4-pro deepseek-v4-pro-0813 deepseek-v4-pro-nvfp4 "
    "deepseek-v4.1-flash glm-5.3-nvfp4 gpt-oss-120b kimi-k3 minimax-m3-nvfp4 nemotron-3-ultra-nvfp4 "
    "qwen3.5-397b-nvfp4 qwen3.8-2.4t-nvfp4 smollm2-135m-instruct"
).split()


@pytest.fixture(scope="module")
def unseen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The cards' configs; the model is called unseen-N, its class and type are of no engine."""
    root = tmp_path_factory.mktemp("unseen")
    out = {}
    for i, name in enumerate(MODELS):
        config = SHIPPED.config(name)
        out[name] = model_at(
            root / f"unseen-{i}", config | {"architectures": ["UnseenForCausalLM"], "model_type": "unseen"}
        )
    return out


@pytest.fixture(scope="module")
def chosen(unseen: dict[str, Path]) -> dict[tuple[str, str, str], Composed]:
    """What is chosen for each, on three machines and for three workloads."""
    out = {}
    for name, path in unseen.items():
        for hardware in ("gb300-nvl72", "gb200-nvl72", "h200"):
            for workload in WORKLOADS:
                out[name, hardware, workload] = compose_at(path, hardware, workload)
    return out


def test_all_pass_the_rules(chosen: dict[tuple[str, str, str], Composed]) -> None:
    for (_, hardware, _), composed in chosen.items():
        recipe, card = Recipe.model_validate(composed.recipe), ModelCard.model_validate(composed.card)
        for engine, version in (("vllm", "0.32.0"), ("vllm", "0.33.0"), ("sglang", "0.5.23")):
            found = rules.findings(recipe, engine, version, card, SHIPPED.hardware(hardware))
            assert not [f for f in found if f.severity in ("error", "warning")], (recipe.id, engine, version)


def test_all_fit(chosen: dict[tuple[str, str, str], Composed]) -> None:
    """By fourfold recipe fit, on both engines, with as many requests as the recipe takes."""
    for (_, hardware, workload), composed in chosen.items():
        if workload == "chat" and hardware != "gb200-nvl72":
            recipe, card = Recipe.model_validate(composed.recipe), ModelCard.model_validate(composed.card)
            traits = read_traits(flat(SHIPPED.config(MODELS[int(composed.name.split("-")[1])])))
            for engine in recipe.engines:
                for case in cases_of(recipe, engine, card, traits, SHIPPED.hardware(hardware)):
                    assert fit(case).verdict == "fits", (composed.name, hardware, engine)
                    assert case.wanted >= WORKLOADS[workload].least


def test_all_pass_parsers_and_variables(unseen: dict[str, Path], tmp_path: Path) -> None:
    targets = snapshots.shipped()
    assert {(t.engine, t.version) for t in targets} >= {("vllm", "0.32.0"), ("vllm", "0.33.0"), ("sglang", "0.5.23")}
    for path in unseen.values():
        for hardware, workload in (("gb300-nvl72", "fixed"), ("h200", "agentic")):
            found = read_model(path)
            writing.write(tmp_path / "out", found, compose_at(path, hardware, workload), True, [])
    catalogue = Catalogue([tmp_path / "out"])
    recipes = [catalogue.recipe(name) for name in catalogue.recipe_paths if name.startswith("unseen-")]
    assert len(recipes) == 2 * len(MODELS)
    checks = checking.check(recipes, catalogue, targets)
    assert len(checks) == 3 * len(recipes)
    low = [(c.recipe, c.label, c.findings) for c in checks if c.level < 2]
    assert not low


def test_layouts_are_those_that_are_published(chosen: dict[tuple[str, str, str], Composed]) -> None:
    """DeepSeek V4 Pro: GB300 holds it in one tray, GB200 in two (InferenceX); H200 in eight GPUs for few streams."""

    def layout(model: str, hardware: str, workload: str) -> dict[str, int]:
        sizes = chosen[model, hardware, workload].layout.parallel.model_dump()
        return {key: size for key, size in sizes.items() if size > 1}

    assert layout("deepseek-v4-pro", "gb300-nvl72", "fixed") == {"data": 4, "expert": 4}
    assert layout("deepseek-v4-pro", "gb300-nvl72", "chat") == {"tensor": 4, "expert": 4}
    assert layout("deepseek-v4-pro", "gb200-nvl72", "fixed") == {"data": 8, "expert": 8}
    assert layout("deepseek-v4-pro", "gb200-nvl72", "chat") == {"tensor": 8, "expert": 8}
    assert layout("deepseek-v4-pro", "h200", "chat") == {"tensor": 8, "expert": 8}
    assert layout("gpt-oss-120b", "gb300-nvl72", "chat") == {}
    assert layout("smollm2-135m-instruct", "h200", "fixed") == {}
    assert layout("kimi-k3", "gb300-nvl72", "agentic") == {"tensor": 8, "expert": 8}


def test_flags_follow_from_traits(chosen: dict[tuple[str, str, str], Composed]) -> None:
    pro = chosen["deepseek-v4-pro", "gb300-nvl72", "agentic"]
    vllm, sglang = args_of(pro, "vllm"), args_of(pro, "sglang")
    assert vllm["kv-cache-dtype"] == "fp8" and vllm["block-size"] == 256
    assert vllm["attention-config"] == {"indexer_kv_dtype": "mxfp4"} and sglang["page-size"] == 256
    assert "attention-config" not in args_of(chosen["deepseek-v4-pro", "h200", "agentic"], "vllm")
    assert "block-size" not in args_of(chosen["deepseek-v4.1-flash", "gb300-nvl72", "chat"], "vllm")
    sparse = args_of(chosen["deepseek-v3.2-nvfp4", "gb300-nvl72", "fixed"], "sglang")
    assert sparse["kv-cache-dtype"] == "fp8_e4m3" and sparse["quantization"] == "modelopt_fp4"
    assert sparse["enable-dp-lm-head"] is True
    assert args_of(chosen["nemotron-3-ultra-nvfp4", "h200", "chat"], "vllm")["mamba-ssm-cache-dtype"] == "float32"
    plain = chosen["smollm2-135m-instruct", "h200", "chat"]
    assert "kv-cache-dtype" not in args_of(plain, "vllm") and "speculation" not in plain.recipe
    assert plain.layout.length == 8192
    dspark = chosen["deepseek-v4-pro-0813", "gb300-nvl72", "chat"]
    assert dspark.recipe["speculation"] == {"method": "dspark", "tokens": 5}
    assert args_of(dspark, "vllm")["speculative-config"]["method"] == "dspark"
    assert args_of(dspark, "sglang")["speculative-algorithm"] == "DSPARK"


@pytest.mark.parametrize("name", ["deepseek-v4-pro", "deepseek-v3.2-nvfp4", "minimax-m3-nvfp4"])
def test_names_change_nothing_but_the_drafter(
    name: str, chosen: dict[tuple[str, str, str], Composed], tmp_path: Path
) -> None:
    """The same config under its published class: only the engines' own MTP classes are known by it."""
    known = compose_at(model_at(tmp_path / "known", SHIPPED.config(name)))
    other = chosen[name, "gb300-nvl72", "chat"]
    assert known.layout.parallel == other.layout.parallel
    assert known.recipe["speculation"] == {"method": "mtp", "tokens": 2} and "speculation" not in other.recipe
    assert any("no engine has a class" in note for note in other.recipe["notes"])
    for engine in ("vllm", "sglang"):
        kept = {key: value for key, value in args_of(known, engine).items() if not key.startswith("speculative")}
        assert set(kept) == set(args_of(other, engine))


def test_mtp_of_a_known_layout_is_served_by_fourfold(tmp_path: Path) -> None:
    names = ["model.embed_tokens.weight", *MTP_LAYER]
    config = DENSE | {"num_nextn_predict_layers": 1}
    path = model_at(tmp_path / "unseen", config, **index_of(names, 16_500_000_000))
    composed = compose_at(path, workload="agentic")
    assert composed.recipe["speculation"] == {"method": "mtp", "tokens": 3, "draft_model": "unseen-mtp"}
    assert args_of(composed, "vllm")["speculative-config"]["model"] == "unseen-mtp"
    assert args_of(composed, "sglang")["speculative-draft-model-path"] == "unseen-mtp"
    assert any("fourfold mtp extract unseen unseen-mtp" in note for note in composed.recipe["notes"])
    dropped = compose_at(model_at(tmp_path / "dropped", config, **index_of(names[:1], 16_000_000_000)))
    assert "speculation" not in dropped.recipe
    assert any("names none of their tensors" in note for note in dropped.recipe["notes"])
    odd = compose_at(model_at(tmp_path / "odd", config, **index_of(["mtp.0.strange.weight"], 16_000_000_000)))
    assert "speculation" not in odd.recipe and any("no known layout" in note for note in odd.recipe["notes"])


def test_drafts_are_a_number_that_vllm_takes(tmp_path: Path) -> None:
    for modules, tokens in ((1, 3), (2, 2), (3, 3), (7, 3)):
        config = DENSE | {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": modules}
        composed = compose_at(model_at(tmp_path / f"m{modules}", config), workload="agentic")
        assert composed.recipe["speculation"]["tokens"] == tokens


def test_the_index_decides_about_memory(tmp_path: Path) -> None:
    """A checkpoint of ten times what is understood needs more GPUs, and that is said."""
    small = compose_at(model_at(tmp_path / "small", DENSE, **index_of(["a"], 16_100_000_000)))
    large = compose_at(model_at(tmp_path / "large", DENSE, **index_of(["a"], 640_000_000_000)))
    assert small.layout.parallel.world == 1 < large.layout.parallel.world
    assert not any("Confirm the sizes" in note for note in small.confirm)
    assert any("640.00 GB" in note for note in large.confirm)
    assert large.card["published_bytes"] == 640_000_000_000


def test_quantisation_beside_the_config(tmp_path: Path) -> None:
    moe = {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 2048}
    quant = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    path = model_at(tmp_path / "apart", DENSE | moe, hf_quant_config__json=quant)
    composed = compose_at(path)
    assert composed.card["formats"]["experts"] == "nvfp4" and composed.card["formats"]["head"] == "bf16"
    assert args_of(composed, "vllm")["kv-cache-dtype"] == "fp8"
    assert args_of(composed, "sglang")["quantization"] == "modelopt_fp4"
    out = tmp_path / "out"
    files = writing.write(out, read_model(path), composed, False, [])
    assert json.loads(files["config"].read_text())["quantization_config"]["ignore"] == ["lm_head"]
    assert any("no FP4 arithmetic" in note for note in compose_at(path, "h200").confirm)


def test_nvfp4_while_loading(tmp_path: Path) -> None:
    path = model_at(
        tmp_path / "wide",
        DENSE
        | {"num_hidden_layers": 126, "hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128},
    )
    plain, small = compose_at(path), compose_at(path, nvfp4=True)
    assert small.layout.parallel.world < plain.layout.parallel.world
    for engine in ("vllm", "sglang"):
        assert args_of(small, engine)["quantization"] == "fourfold_nvfp4"
        assert "quantization" not in args_of(plain, engine)
    with pytest.raises(FourfoldError, match="no 16-bit linear weights"):
        quantised = DENSE | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
        compose_at(model_at(tmp_path / "q", quantised), nvfp4=True)


def test_unknown_traits_are_named(tmp_path: Path) -> None:
    strange = {"zeta_experts": 16, "num_key_value_headz": 4, "off": False, "rope_theta": 1e6, "eos_token_id": 2}
    lines = unknown_traits(DENSE | strange)
    assert [line.split(":")[0] for line in lines] == ["zeta_experts", "num_key_value_headz"]
    assert "resembles num_key_value_heads" in lines[1]
    composed = compose_at(model_at(tmp_path / "m", DENSE | strange | {"layer_types": ["rwkv_attention"] * 32}))
    assert any("zeta_experts: 16" in note for note in composed.recipe["notes"])
    assert any("rwkv_attention" in note for note in composed.recipe["notes"])
    for name in MODELS:
        assert len(unknown_traits(read_model(SHIPPED.model_path(name).with_suffix(".json")).config)) <= 6, name


def test_a_processor(tmp_path: Path) -> None:
    composed = compose_at(model_at(tmp_path / "tiny", SHIPPED.config("smollm2-135m-instruct")), "cpu")
    assert args_of(composed, "sglang")["device"] == "cpu"
    assert composed.recipe["engines"]["sglang"]["env"] == {"SGLANG_PLATFORM": "fourfold_cpu"}
    assert composed.layout.parallel.world == 1


def test_concurrency(tmp_path: Path) -> None:
    path = model_at(tmp_path / "m", DENSE)
    assert compose_at(path, concurrency=3).recipe["workload"]["concurrency"] == 3
    many = compose_at(path, "h200", concurrency=2000)
    assert many.layout.parallel.world > 1 and many.layout.sequences >= 2000 // many.layout.parallel.data
    with pytest.raises(FourfoldError, match="no layout holds this model; .* requests of 2560 tokens; expected"):
        compose_at(path, "h200", concurrency=1_000_000)
