"""Models on vLLM's own classes: a small checkpoint in the published layout loads whole, a damaged one does not."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from published_damage import RENAMED, damaged, load_damaged
from torch import Tensor, nn

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.launch import engine_of
from fourfold.common.recipe.loading import Catalogue
from fourfold.common.recipe.rehearsing.deepseek_v41 import engram_rows
from fourfold.common.recipe.rehearsing.loading import Loaded, chosen, load, load_checkpoint
from fourfold.common.recipe.rehearsing.placement import NeedsGPU, place
from fourfold.common.recipe.rehearsing.published import Published, shrunken, write_published

PRO = "deepseek-v4-pro/gb300-disagg-throughput"


@pytest.fixture(scope="module")
def known() -> Catalogue:
    return Catalogue()


@pytest.fixture(scope="module")
def pro(known: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> Published:
    return write_published(tmp_path_factory.mktemp("pro") / "model", known.config("deepseek-v4-pro"))


def _load(known: Catalogue, checkpoint: Published, folder: Path) -> Loaded:
    """As the recipe's decode role would."""
    recipe = known.recipe(PRO)
    plan = engine_of(recipe, "vllm")
    given = chosen("vllm", plan, "decode")
    return load_checkpoint("vllm", checkpoint, given, known.hardware(recipe.hardware), {}, folder)


def test_every_tensor_finds_its_parameter(known: Catalogue, pro: Published, tmp_path: Path) -> None:
    loaded = _load(known, pro, tmp_path)
    assert loaded.ok and loaded.unable is None, loaded
    assert loaded.classes == ["DeepseekV4ForCausalLM", "DeepSeekV4MTP"] and loaded.simulated == "GB300"
    assert loaded.tensors == pro.tensors > 600 and "all placed" in loaded.detail
    assert pro.layers == (0, 2, 3, 4)  # compressed by 128 and by 4, each with routes by token and by score
    target = [layer for layer in loaded.layers if layer["model"] == "DeepseekV4ForCausalLM"]
    assert [layer["layers"] for layer in target] == [["0"], ["1"], ["2"], ["3"]]
    assert [("attn.indexer" in layer["parts"]) for layer in target] == [False, True, False, True]
    assert [layer["own"] for layer in target] == [
        *([["ffn.gate.tid2eid"]] * 2),
        *([["ffn.gate.e_score_correction_bias"]] * 2),
    ]
    assert all(layer["parts"]["ffn.experts"] == "DeepseekV4MegaMoEExperts" for layer in target)
    assert all(layer["methods"]["Fp8LinearMethod"] >= 6 for layer in loaded.layers)
    assert all("embed_tokens" in name or "shared_head.head" in name for name in loaded.shared)
    assert any(line.startswith("DeepseekV4ForCausalLM layer 3 (the model's 4): ") for line in loaded.lines())
    # The recipe's own experts pack their weights with a kernel once they have them.
    assert all("deep_gemm" in why for why in loaded.unfinished.values()) and len(loaded.unfinished) == 2


def test_a_damaged_checkpoint_is_named(known: Catalogue, pro: Published, tmp_path: Path) -> None:
    loaded = _load(known, damaged(pro, tmp_path / "damaged"), tmp_path)
    assert not loaded.ok and loaded.unable is None
    assert list(loaded.refused) == [RENAMED]
    assert {name.split(".", 1)[1]: what for name, what in loaded.missing.items()} == {
        "layers.1.attn.indexer.wq_b.weight": "2097152 of 2097152 elements",
        "layers.3.ffn.experts.w2_weight": "65536 of 1048576 elements, in expert 5",
    }
    assert "wq_bb" in loaded.detail and "in expert 5" in loaded.detail


def test_a_checkpoint_with_dspark(known: Catalogue, tmp_path: Path) -> None:
    recipe = known.recipe("deepseek-v4-flash-0731/gb200")
    plan = engine_of(recipe, "vllm")
    given = chosen("vllm", plan, "aggregated")
    config = known.config(recipe.model)
    loaded = load("vllm", config, given, known.hardware(recipe.hardware), {}, tmp_path)
    assert loaded.ok and loaded.unable is None, loaded
    assert loaded.classes == ["DeepseekV4ForCausalLM", "DSparkDeepseekV4ForCausalLM"]
    assert loaded.layers[-1]["layers"] == ["0", "1", "2"]


def test_a_checkpoint_with_engrams_and_a_tower(known: Catalogue, tmp_path: Path) -> None:
    config = known.config("deepseek-v4.1-flash")
    given = {"enable-expert-parallel": True, "moe-backend": "deep_gemm_mega_moe"}  # which packs before the tower loads
    loaded = load("vllm", config, given, known.hardware("gb200-nvl72"), {}, tmp_path)
    assert loaded.ok and loaded.unable is None, loaded
    assert loaded.classes == ["DeepseekV41ForCausalLM", "DSparkDeepseekV4ForCausalLM"]
    assert loaded.of == [0, 1, 2, 3, 14, 20, 21, 24]
    engrams = [layer["layers"] for layer in loaded.layers if "engram" in layer["parts"]]
    assert engrams == [["1"], ["4"]]


@pytest.mark.parametrize(
    ("name", "classes", "of", "damage", "missing"),
    [
        pytest.param(
            "deepseek-v3.2/gb200",
            ["DeepseekV32ForCausalLM", "DeepseekV32MTP"],
            [0, 3],
            {
                "original": "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",  # a part of a fused projection
                "renamed": "model.layers.1.self_attn.kv_a_proj_with_mqq.weight",
                "left_out": "model.layers.1.mlp.experts.5.down_proj.weight_scale",
            },
            {
                "model.layers.1.self_attn.fused_qkv_a_proj.weight": "294912 of 425984 elements",
                "model.layers.1.mlp.experts.routed_experts.w2_weight_scale": "8192 of 131072 elements, in expert 5",
            },
            id="deepseek-v3.2",
        ),
        pytest.param(
            "nemotron-3-ultra/gb300",
            ["NemotronHForCausalLM", "NemotronHMTP"],
            [0, 1, 7],
            {
                "original": "mtp.layers.0.eh_proj.weight",
                "renamed": "mtp.layers.0.eh_projj.weight",
                "left_out": "backbone.layers.1.mixer.experts.5.up_proj.weight_scale",
            },
            {
                "model.layers.0.eh_proj.weight": "524288 of 524288 elements",
                "model.layers.1.mixer.experts.routed_experts.w13_weight_scale": "4096 of 65536 elements, in expert 5",
            },
            id="nemotron-3-ultra",
        ),
        pytest.param(
            "kimi-k3/gb300",
            ["KimiK3ForConditionalGeneration", "Qwen3DSparkForCausalLM"],
            [0, 1, 3],  # linear attention, dense and with experts, and latent attention
            {
                "original": "language_model.model.layers.1.self_attn.f_a_proj.weight",
                "renamed": "language_model.model.layers.1.self_attn.f_c_proj.weight",
                "left_out": "language_model.model.layers.2.block_sparse_moe.experts.5.w2.weight_packed",
            },
            {
                "language_model.model.layers.1.self_attn.in_proj_qkvgfab.weight": "65536 of 4268032 elements",
                "language_model.model.layers.2.block_sparse_moe.experts.routed_experts.w2_weight": "32768 of 524288 "
                "elements, in expert 5",
            },
            id="kimi-k3",
        ),
        pytest.param(
            "minimax-m3/gb300",
            ["MiniMaxM3SparseForConditionalGeneration", "Eagle3LlamaForCausalLM"],
            [0, 3],
            {
                "original": "language_model.model.layers.1.self_attn.index_k_proj.weight",
                "renamed": "language_model.model.layers.1.self_attn.index_z_proj.weight",
                "left_out": "language_model.model.layers.1.block_sparse_moe.experts.5.w2.weight",
            },
            {
                "language_model.model.layers.1.self_attn.qkv_proj.weight": "65536 of 5046272 elements",
                "language_model.model.layers.1.block_sparse_moe.experts.routed_experts.w2_weight": "131072 of 2097152 "
                "elements, in expert 5",
            },
            id="minimax-m3",
        ),
    ],
)
def test_another_family_loads_but_for_its_damage(
    known: Catalogue,
    tmp_path: Path,
    name: str,
    classes: list[str],
    of: list[int],
    damage: dict[str, str],
    missing: dict[str, str],
) -> None:
    loaded = load_damaged("vllm", known, name, tmp_path, damage)
    assert loaded.unable is None and loaded.classes == classes and loaded.of == of, loaded
    assert [*loaded.refused, *loaded.unused] == [damage["renamed"]]
    assert loaded.missing == missing


def test_kinds_of_layers(known: Catalogue) -> None:
    small, kept = shrunken(known.config("deepseek-v4-flash"))
    assert kept == (0, 2, 3, 4) and small["num_hidden_layers"] == 4
    assert small["compress_ratios"] == [0, 4, 128, 4, 0] and small["num_hash_layers"] == 2
    assert small["head_dim"] == 512 and small["vocab_size"] == 512
    small, kept = shrunken(known.config("kimi-k3"))
    assert kept == (0, 1, 3)  # whose lists are in a part of the config and count from 1
    assert small["text_config"]["linear_attn_config"]["kda_layers"] == [1, 2]
    assert small["text_config"]["linear_attn_config"]["full_attn_layers"] == [3]


def test_rows_of_engrams_are_the_published_ones(known: Catalogue) -> None:
    text = known.config("deepseek-v4.1-flash")["text_config"]
    assert engram_rows(text) == text["engram_num_embeddings"]


def test_an_unknown_layout(known: Catalogue, tmp_path: Path) -> None:
    with pytest.raises(FourfoldError, match="GptOssForCausalLM: no published layout is known"):
        write_published(tmp_path / "model", known.config("gpt-oss-120b"))


class Toy(nn.Module):
    """Two halves in one parameter, filled by a loader with habits of real ones."""

    def __init__(self, quiet: bool = False) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.empty(4, 2, dtype=torch.bfloat16))
        self.byte = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
        self.quiet = quiet

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        held: list[Tensor] = []
        for name, tensor in weights:
            if name == "byte":
                self.byte.data.copy_(tensor.view(torch.uint8))
            elif name in ("first", "second"):
                held.append(tensor.float() * 2)
            elif not self.quiet:
                raise KeyError(name)
        if len(held) == 2:
            self.both.data.copy_(torch.cat(held))
        elif held:
            self.both.data[:2].copy_(held[0])
        if self.quiet:
            raise NeedsGPU("a kernel")


def _toy(names: str, quiet: bool = False) -> tuple[Toy, dict[str, Tensor]]:
    sizes = {"byte": torch.zeros(3, dtype=torch.int8)}
    return Toy(quiet), {name: sizes.get(name, torch.ones(2, 2)) for name in names.split()}


def test_tensors_are_followed_through_a_loader() -> None:
    toy, tensors = _toy("first byte second")
    placed = place(dict(toy.named_parameters()), toy.load_weights, tensors)
    assert placed.taken == {"byte": ["byte"], "first": ["both"], "second": ["both"]}
    assert not placed.unfilled and not placed.refused and placed.unfinished is None


def test_parameters_that_a_loader_merges_once_they_are_full() -> None:
    toy, tensors = _toy("first second byte")

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        toy.load_weights(weights)
        toy.both.data = torch.cat([toy.both.data, toy.both.data])[:4]

    assert not place(dict(toy.named_parameters()), load, tensors).unfilled
    toy, tensors = _toy("first byte")
    assert place(dict(toy.named_parameters()), load, tensors).unfilled == {"both": "all of it"}


def test_what_a_loader_leaves_out_is_seen() -> None:
    toy, tensors = _toy("first third byte")
    placed = place(dict(toy.named_parameters()), toy.load_weights, tensors)
    assert placed.refused == {"third": "KeyError: 'third'"} and placed.unfilled == {"both": "4 of 8 elements"}
    toy, tensors = _toy("first second third", quiet=True)
    placed = place(dict(toy.named_parameters()), toy.load_weights, tensors)
    assert "third" not in placed.taken and not placed.refused
    assert placed.unfilled == {"byte": "3 of 3 elements"} and placed.unfinished == "NeedsGPU: a kernel"
