"""Models on SGLang's own classes: a small checkpoint in the published layout loads whole, a damaged one does not.

SGLang warns of a tensor that it does not know and of a parameter that gets none, and serves.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from published_damage import RENAMED, damaged, load_damaged

from fourfold.common.recipe.launch import engine_of
from fourfold.common.recipe.loading import Catalogue
from fourfold.common.recipe.rehearsing.loading import Loaded, chosen, load_checkpoint
from fourfold.common.recipe.rehearsing.published import Published, write_published

RECIPE = "deepseek-v4-pro/gb300-disagg-throughput"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return write_published(tmp_path_factory.mktemp("pro") / "model", Catalogue().config("deepseek-v4-pro"))


def _load(checkpoint: Published, folder: Path) -> Loaded:
    """As the recipe's decode role would."""
    known = Catalogue()
    recipe = known.recipe(RECIPE)
    given = chosen("sglang", engine_of(recipe, "sglang"), "decode")
    return load_checkpoint("sglang", checkpoint, given, known.hardware(recipe.hardware), {}, folder)


def test_every_tensor_finds_its_parameter(checkpoint: Published, tmp_path: Path) -> None:
    loaded = _load(checkpoint, tmp_path)
    assert loaded.ok and loaded.unable is None, loaded
    assert loaded.classes == ["DeepseekV4ForCausalLM", "DeepseekV4ForCausalLMNextN"] and loaded.simulated == "GB300"
    assert loaded.tensors > 600 and "all placed" in loaded.detail
    target = [layer for layer in loaded.layers if layer["model"] == "DeepseekV4ForCausalLM"]
    assert [("self_attn.indexer" in layer["parts"]) for layer in target] == [False, True, False, True]
    assert [layer["own"] for layer in target] == [
        *([["mlp.topk.tid2eid"]] * 2),
        *([["mlp.gate.e_score_correction_bias"]] * 2),
    ]
    assert any("layers for CUDA" in line for line in loaded.not_rehearsed)


def test_a_damaged_checkpoint_is_named(checkpoint: Published, tmp_path: Path) -> None:
    loaded = _load(damaged(checkpoint, tmp_path / "damaged"), tmp_path)
    assert not loaded.ok and loaded.unable is None
    assert [*loaded.refused, *loaded.unused] == [RENAMED]
    assert sorted(loaded.missing) == [
        "model.layers.1.self_attn.indexer.wq_b.weight",
        "model.layers.3.mlp.experts.w2_weight",
    ]
    assert loaded.missing["model.layers.3.mlp.experts.w2_weight"].endswith("in expert 5")


@pytest.mark.parametrize(
    ("name", "classes", "damage", "missing"),
    [
        pytest.param(
            "deepseek-v3.2/gb200",
            ["DeepseekV32ForCausalLM", "DeepseekV3ForCausalLMNextN"],
            {
                "original": "model.layers.1.self_attn.indexer.wq_b.weight",
                "renamed": "model.layers.1.self_attn.indexer.wq_bb.weight",
                "left_out": "model.layers.2.mlp.experts.5.down_proj.weight",
            },
            {
                "model.layers.1.self_attn.indexer.wq_b.weight": "2097152 of 2097152 elements",
                "model.decoder.mlp.experts.w2_weight": "131072 of 2097152 elements, in expert 5",
            },
            id="deepseek-v3.2",
        ),
        pytest.param(
            "qwen3.5/gb300",
            ["Qwen3_5MoeForConditionalGeneration", "Qwen3_5ForCausalLMMTP"],
            {
                "original": "model.visual.merger.linear_fc2.weight",
                "renamed": "model.visual.merger.linear_fc3.weight",
                "left_out": "mtp.layers.0.mlp.experts.5.down_proj.weight",
            },
            {
                "visual.merger.linear_fc2.weight": "524288 of 524288 elements",
                "model.layers.0.mlp.experts.w2_weight": "131072 of 2097152 elements, in expert 5",
            },
            id="qwen3.5",
        ),
        pytest.param(
            "kimi-k3/gb300",
            ["KimiK3ForConditionalGeneration", "DSparkDraftModel"],
            {
                "original": "language_model.model.layers.1.self_attn.f_a_proj.weight",
                "renamed": "language_model.model.layers.1.self_attn.f_c_proj.weight",
                "left_out": "language_model.model.layers.2.block_sparse_moe.experts.5.w2.weight_packed",
            },
            {
                "language_model.model.layers.1.self_attn.f_a_proj.weight": "all of it",  # part of a merged one
                "language_model.model.layers.2.mlp.experts.w2_weight": "32768 of 524288 elements, in expert 5",
            },
            id="kimi-k3",
        ),
        pytest.param(
            "minimax-m3/gb300",
            ["MiniMaxM3SparseForConditionalGeneration"],
            {
                "original": "language_model.model.layers.1.self_attn.index_k_proj.weight",
                "renamed": "language_model.model.layers.1.self_attn.index_z_proj.weight",
                "left_out": "language_model.model.layers.1.block_sparse_moe.experts.5.w2.weight",
            },
            {
                "model.layers.1.self_attn.index_qkv_proj.weight": "65536 of 327680 elements",
                "model.layers.1.mlp.experts.w2_weight": "131072 of 2097152 elements, in expert 5",
            },
            id="minimax-m3",
        ),
    ],
)
def test_another_family_loads_but_for_its_damage(
    tmp_path: Path, name: str, classes: list[str], damage: dict[str, str], missing: dict[str, str]
) -> None:
    loaded = load_damaged("sglang", Catalogue(), name, tmp_path, damage)
    assert loaded.unable is None and loaded.classes == classes, loaded
    assert [*loaded.refused, *loaded.unused] == [damage["renamed"]]
    assert loaded.missing == missing
