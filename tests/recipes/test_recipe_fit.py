"""`fourfold recipe fit` against every observed or published size, and its answers where something does not fit.

Anchors carry their source. GB are 10^9 bytes, GiB 2^30.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from sizing_anchors import (
    ACTIVE,
    CHECKPOINTS,
    DEP,
    GIB,
    LOADED,
    PARAMETERS,
    SHARES,
    TOKEN_BYTES,
    TP,
    model,
    placed,
    total,
)
from typer.testing import CliRunner

from fourfold.common.cli import app
from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.loading import Catalogue
from fourfold.common.recipe.schema import Parallel, Recipe
from fourfold.common.recipe.sizing.cache import CacheFormat, cache_of
from fourfold.common.recipe.sizing.fit import ERROR, Case, cases_of, fit, with_advice
from fourfold.common.recipe.sizing.formats import format_named
from fourfold.common.recipe.sizing.quantisation import Formats
from fourfold.common.recipe.sizing.reserves import mega_moe_bytes
from fourfold.common.recipe.sizing.sharding import DRAFTS, OBSERVED, layout_factor, per_rank
from fourfold.common.recipe.sizing.traits import flat, read_traits
from fourfold.common.recipe.sizing.weights import weights


@pytest.mark.parametrize(("name", "what", "parts", "billions", "source"), PARAMETERS)
def test_parameters_of_each_part_are_the_published_ones(
    name: str, what: str, parts: tuple[str, ...] | None, billions: float, source: str
) -> None:
    assert total(name, parts) / 1e9 == pytest.approx(billions, rel=ERROR), (what, source)


@pytest.mark.parametrize(("name", "billions"), ACTIVE)
def test_active_parameters_are_the_published_ones(name: str, billions: float) -> None:
    found = [w for w in model(name)[1] if w.part not in (*DRAFTS, "vision encoder")]
    assert sum(w.parameters * w.active for w in found) / 1e9 == pytest.approx(billions, rel=ERROR)


@pytest.mark.parametrize(("name", "gigabytes", "source"), CHECKPOINTS)
def test_checkpoints_have_their_published_size(name: str, gigabytes: float, source: str) -> None:
    assert total(name, bytes_=True) / 1e9 == pytest.approx(gigabytes, rel=ERROR), source


def test_a_flash_checkpoint_with_nvfp4_experts_is_larger_than_with_mxfp4() -> None:
    traits, found = model("deepseek-v4-flash")
    swapped = [replace(w, format="nvfp4") if w.part == "experts" else w for w in found]
    assert sum(w.bytes for w in swapped) / 1e9 == pytest.approx(167.9, rel=ERROR)
    assert sum(w.bytes for w in swapped) > sum(w.bytes for w in found)


@pytest.mark.parametrize(
    ("quantised", "gigabytes"), [(None, 4892), ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 2496)]
)
def test_qwen_38_in_other_formats(quantised: dict[str, Any] | None, gigabytes: float) -> None:
    config = {**model("qwen3.8-2.4t-nvfp4")[0].config, "quantization_config": quantised}
    size = sum(w.bytes for w in weights(read_traits(config), Formats(config)))
    assert size / 1e9 == pytest.approx(gigabytes, rel=ERROR)


@pytest.mark.parametrize(("name", "parallel", "gigabytes"), SHARES)
def test_shares_of_a_gpu(name: str, parallel: Parallel, gigabytes: float) -> None:
    assert placed(name, parallel) / 1e9 == pytest.approx(gigabytes, rel=ERROR)


@pytest.mark.parametrize(("parallel", "gigabytes", "source"), LOADED)
def test_loaded_weights_with_the_layout_factor(parallel: Parallel, gigabytes: float, source: str) -> None:
    assert placed("deepseek-v4-pro", parallel) * layout_factor() / 1e9 == pytest.approx(gigabytes, rel=ERROR), source


def test_the_layout_factor_comes_from_what_is_placed_today() -> None:
    assert OBSERVED[0].placed == pytest.approx(placed("deepseek-v4-pro", TP[8]), rel=0.005)
    assert OBSERVED[1].placed == pytest.approx(placed("deepseek-v4-pro", DEP[4]), rel=0.005)
    assert 1 < layout_factor() < 1.08
    assert layout_factor((replace(OBSERVED[0], low=2 * OBSERVED[0].low, high=2 * OBSERVED[0].high),)) == 1.15  # its end


@pytest.mark.parametrize(("name", "indexer", "bytes_"), TOKEN_BYTES)
def test_cached_bytes_of_a_token(name: str, indexer: str, bytes_: int) -> None:
    cache = cache_of(model(name)[0], TP[1], CacheFormat("fp8", indexer))
    assert cache.token_bytes == pytest.approx(bytes_, rel=ERROR)


def test_a_million_tokens_and_an_8k_sequence_of_v4_pro() -> None:
    kept = {f: cache_of(model("deepseek-v4-pro")[0], TP[1], CacheFormat("fp8", f)) for f in ("mxfp4", "fp8")}
    assert kept["mxfp4"].content(1 << 20) == pytest.approx(5.3e9, rel=ERROR)
    assert kept["fp8"].content(1 << 20) == pytest.approx(5.8e9, rel=ERROR)
    assert kept["mxfp4"].token_bytes * 9216 == pytest.approx(46e6, rel=ERROR)
    assert kept["fp8"].token_bytes * 9216 == pytest.approx(51e6, rel=ERROR)
    assert kept["fp8"].sequence_bytes == pytest.approx(4.6e6, rel=ERROR)


def test_blocks_of_v4_flash_are_the_ones_that_vllm_makes() -> None:
    """Groups and pages that github.com/vllm-project/vllm issue 54703 lists, to the byte."""
    blocks = cache_of(model("deepseek-v4-flash")[0], TP[1], CacheFormat("fp8")).blocks
    assert blocks is not None
    assert sorted((g.page, g.tokens) for g in blocks.groups) == sorted(
        [(1002240, 256), (823680, 64), (786240, 64), (870912, 4), (656640, 8)]
    )


@pytest.mark.parametrize(
    ("length", "in_flight", "gibibytes", "source"),
    [
        (30000, 16384, 6.66, "vllm issue 44376: 6.66 GiB needed for max-model-len 30000"),
        (13528, 16384, 5.44, "vllm issue 44376: 5.44 GiB hold 13528 tokens"),
        (912128, 8192, 7.01 * 912128 / 1009661, "vllm issue 51041: 7.01 GiB are 1,009,661 tokens"),
        (121344, 2 * 8192, 7.71 * 121344 / 150992, "vllm issue 51041: 7.71 GiB are 150,992 tokens, batches overlap"),
    ],
)
def test_state_reserved_by_batched_tokens(length: int, in_flight: int, gibibytes: float, source: str) -> None:
    blocks = cache_of(model("deepseek-v4-flash")[0], TP[1], CacheFormat("fp8")).blocks
    assert blocks is not None
    assert blocks.demand(length, in_flight) / GIB == pytest.approx(gibibytes, rel=ERROR), source


def test_compressor_state_of_a_batched_token_and_layer() -> None:
    """float32, two halves, keys and scores: 8 KB for ratio 4 (reference), 4 KB for 128."""
    one = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=64)
    one |= dict(head_dim=512, q_lora_rank=8, o_lora_rank=8, intermediate_size=64, sliding_window=128)
    one |= dict(index_n_heads=2, index_head_dim=128)
    four = cache_of(read_traits({**one, "compress_ratios": [4]}), TP[1], CacheFormat("fp8"))
    assert four.per_batched_token - 584 - 4 * 128 * 4 == 8 * 1024
    deep = cache_of(read_traits({**one, "compress_ratios": [128]}), TP[1], CacheFormat("fp8"))
    assert deep.per_batched_token - 584 == 4 * 1024


def case(name: str, hardware: str, parallel: Parallel, engine: str = "vllm", **args: Any) -> Case:
    """A recipe of one role, sized on another card or sheet."""
    data = {
        "schema": "fourfold/recipe/1",
        "id": "test/one",
        "title": "one role",
        "model": name,
        "hardware": hardware,
        "workload": {"kind": "fixed", "input_tokens": 8192, "output_tokens": 1024, "concurrency": 64},
        "engines": {
            engine: {
                "versions": ">=0",
                "args": args,
                "roles": {"aggregated": {"parallel": parallel.model_dump()}},
            }
        },
    }
    known = Catalogue()
    card, sheet = known.model(name), known.hardware(hardware)
    return cases_of(Recipe.model_validate(data), engine, card, model(name)[0], sheet)[0]


SMALL: dict[str, Any] = {"gpu-memory-utilization": 0.9, "max-num-batched-tokens": 512, "max-model-len": 16384}
SMALL |= {"max-num-seqs": 64, "kv-cache-dtype": "fp8"}


@pytest.mark.parametrize(
    ("hardware", "parallel", "fits"),
    [
        ("gb200-nvl72", TP[4], False),  # out of memory in the field at 182.5 GiB
        ("gb200-nvl72", DEP[4], False),
        ("gb200-nvl72", TP[8], True),
        ("gb200-nvl72", DEP[8], True),
        ("gb300-nvl72", DEP[4], True),
        ("gb300-nvl72", TP[4], True),
    ],
)
def test_where_v4_pro_fits(hardware: str, parallel: Parallel, fits: bool) -> None:
    found = fit(case("deepseek-v4-pro", hardware, parallel, **SMALL))
    assert found.verdict == ("fits" if fits else "does not fit"), found.reasons


def test_room_on_gb300_with_four_gpus() -> None:
    """18 to 31 GB beside weights at 0.9 with MXFP4 experts, 6 to 19 with NVFP4."""
    for name, low, high in (("deepseek-v4-pro", 18, 31), ("deepseek-v4-pro-nvfp4", 6, 19)):
        found = fit(case(name, "gb300-nvl72", DEP[4], **SMALL))
        draft = placed(name, DEP[4]) * found.factor
        assert low * (1 - ERROR) <= (found.budget - draft) / 1e9 <= high * (1 + ERROR)


@pytest.mark.parametrize(
    ("memory", "utilisation", "parallel", "batched", "pool", "source"),
    [
        (95 * GIB, 0.95, Parallel(tensor=2), 8192, 7.01, "vllm issue 51041: H20, 95 GiB, KV pool of 7.01 GiB"),
        (
            97871 << 20,
            0.95,
            Parallel(tensor=2, expert=2),
            16384,
            5.44,
            "vllm issue 44376: GH200, 5.44 GiB for the cache",
        ),
    ],
)
def test_all_that_is_not_cache_as_two_users_saw_it(
    memory: int, utilisation: float, parallel: Parallel, batched: int, pool: float, source: str
) -> None:
    """Weights, activations, graphs and context of V4-Flash together: what utilisation leaves without the pool."""
    args = {"gpu-memory-utilization": utilisation, "max-num-batched-tokens": batched, "max-model-len": 30000}
    found = case("deepseek-v4-flash", "h200", parallel, **args, **{"kv-cache-dtype": "fp8"})
    found = fit(replace(found, sheet=found.sheet.model_copy(update={"memory_bytes": memory})))
    assert (found.space.weights + found.space.reserves) / GIB == pytest.approx(
        memory * utilisation / GIB - pool, rel=ERROR
    ), source


def test_a_dense_model() -> None:
    """Llama-3.1-8B, from its config.json: 8.03 billion parameters, 128 KiB of cache a token in BF16."""
    config = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_hidden_layers=32)
    config |= dict(num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False, torch_dtype="bfloat16")
    traits = read_traits(config)
    found = weights(traits, Formats(config))
    assert sum(w.parameters for w in found) / 1e9 == pytest.approx(8.03, rel=0.002)
    assert cache_of(traits, TP[1]).token_bytes == 128 * 1024
    assert sum(per_rank(found, TP[4], traits).values()) == pytest.approx(8.03e9 * 2 / 4, rel=0.01)


def test_more_batched_tokens_leave_less_for_sequences() -> None:
    few = fit(case("deepseek-v4-flash", "gb200-nvl72", TP[4], **SMALL))
    many = fit(case("deepseek-v4-flash", "gb200-nvl72", TP[4], **{**SMALL, "max-num-batched-tokens": 32768}))
    assert many.space.sequences < few.space.sequences
    assert many.case.cache.in_flight(65536, 65536) > 10 * few.case.cache.in_flight(1024, 65536)


def test_what_does_not_fit_says_what_to_change() -> None:
    found = with_advice(case("deepseek-v4-pro", "gb200-nvl72", DEP[4], **SMALL))
    assert found.verdict == "does not fit"
    assert any(line.startswith("more ranks: 4 to 8 GPUs") and "GB (" in line for line in found.advice)
    starving = {**SMALL, "max-num-batched-tokens": 65536, "max-model-len": 262144, "gpu-memory-utilization": 0.8}
    found = with_advice(case("deepseek-v4-pro", "gb200-nvl72", TP[8], **starving))
    assert found.verdict != "fits" and "max-model-len" in found.reasons[0]
    assert any("max-num-batched-tokens" in line for line in found.advice)


def test_sglang_needs_room_beside_the_static_fraction() -> None:
    role = {"moe-a2a-backend": "megamoe", "chunked-prefill-size": 65536, "max-running-requests": 256}
    roomy = case("deepseek-v4-pro", "gb300-nvl72", DEP[8], "sglang", **{**role, "mem-fraction-static": 0.85})
    assert fit(roomy).verdict == "fits"
    tight = with_advice(replace(roomy, options=roomy.options.with_(utilisation=0.99)))
    assert tight.verdict == "does not fit" and "mem-fraction-static" in tight.reasons[0]
    assert any(line.startswith("mem-fraction-static") for line in tight.advice)


def test_mega_moe_buffers_grow_with_tokens_and_the_ring_has_bounds() -> None:
    traits = model("deepseek-v4-pro")[0]
    most, least = mega_moe_bytes(traits, DEP[8], 1024)
    assert 0 < least < most
    assert mega_moe_bytes(traits, DEP[8], 16384)[1] > 4 * least


def test_pipeline_stages_and_context_ranks_divide() -> None:
    half = Parallel(tensor=4, pipeline=2)
    assert 0.45 < placed("deepseek-v3.2-nvfp4", half) / placed("deepseek-v3.2-nvfp4", TP[4]) < 0.6
    traits = model("deepseek-v3.2-nvfp4")[0]
    whole = cache_of(traits, Parallel(tensor=8), CacheFormat("fp8")).token_bytes
    assert cache_of(traits, Parallel(tensor=8, context=8), CacheFormat("fp8")).token_bytes == pytest.approx(whole / 8)


def test_latents_are_on_every_tensor_rank_and_heads_are_not() -> None:
    mla, gqa = model("deepseek-v3.2-nvfp4")[0], model("gpt-oss-120b")[0]
    assert cache_of(mla, TP[8]).token_bytes == cache_of(mla, TP[1]).token_bytes
    assert cache_of(gqa, TP[8]).token_bytes == cache_of(gqa, TP[1]).token_bytes / 8
    assert cache_of(gqa, TP[16]).token_bytes == cache_of(gqa, TP[8]).token_bytes  # eight key-value heads


def test_recurrent_state_is_kept_for_each_draft_token() -> None:
    traits = model("qwen3.5-397b-nvfp4")[0]
    one = cache_of(traits, TP[4]).sequence_bytes
    assert cache_of(traits, TP[4], speculative=3).sequence_bytes == 4 * one
    assert one * 4 == pytest.approx(cache_of(traits, TP[1]).sequence_bytes)


def test_weights_quantised_while_loading() -> None:
    traits = model("smollm2-135m-instruct")[0]
    plain = sum(w.bytes for w in weights(traits, Formats(traits.config)))
    small = sum(w.bytes for w in weights(traits, Formats(traits.config, load="nvfp4")))
    assert small < 0.6 * plain
    head = {w.part: w.format for w in weights(traits, Formats(traits.config, load="nvfp4"))}
    assert head["dense"] == "nvfp4" and head["embeddings"] == "bf16"


def test_unknown_traits_and_formats_are_named() -> None:
    config = {**model("smollm2-135m-instruct")[0].config, "layer_types": ["hyena_attention"] * 30}
    assert read_traits(config).unknown == ("layer_types: hyena_attention, sized as full attention",)
    with pytest.raises(FourfoldError, match=r"formats.experts: format 'nvpf4'; did you mean nvfp4"):
        Formats({}, {"experts": "nvpf4"}, source="card x")
    with pytest.raises(FourfoldError, match="hidden_size: missing"):
        read_traits({})
    with pytest.raises(FourfoldError, match="vocab_size: '9'; expected a whole number"):
        read_traits({"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": "9"})
    with pytest.raises(FourfoldError, match="is no regular expression"):
        Formats({"quantization_config": {"quant_method": "compressed-tensors", "ignore": ["re:(", "lm_head"]}})
    assert format_named("FP8-E4M3", "here") == "fp8"
    assert flat({"text_config": {"hidden_size": 3}, "hidden_size": None})["hidden_size"] == 3


WHOLE = sorted({*Catalogue().names("models")} - {draft.id for draft in Catalogue().draft_models()})


@pytest.mark.parametrize("name", WHOLE)
def test_every_shipped_card_is_sized_whole(name: str) -> None:
    traits, found = model(name)
    card = Catalogue().model(name)
    assert not traits.unknown
    main = sum(w.parameters for w in found if w.part not in DRAFTS) / 1e9
    drafts = sum(w.parameters for w in found if w.part in DRAFTS) / 1e9
    low, high = main * (1 - ERROR), (main + drafts) * (1 + ERROR)
    assert low <= card.total_parameters <= high
    if card.published_bytes:
        assert total(name, bytes_=True) == pytest.approx(card.published_bytes, rel=ERROR)


def test_draft_models_of_their_own_are_counted_or_named() -> None:
    run = CliRunner()
    own = run.invoke(app, ["recipe", "fit", "cpu/smollm2-mtp", "--json"], catch_exceptions=False)
    for role in json.loads(own.output)["roles"]:
        assert [p["bytes"] for p in role["weights"] if p["part"] == "draft model"] == [pytest.approx(8.4e6)]
    speculates: dict[str, Any] = {
        "speculative-config": {"method": "eagle3", "model": "nobody/draft", "num_speculative_tokens": 2}
    }
    found = case("gpt-oss-120b", "gb200-nvl72", TP[1], "vllm", **speculates)
    assert any("nobody/draft" in note for note in found.notes) and not found.options.draft


def test_command_prints_tables_json_and_exit_codes() -> None:
    run = CliRunner()
    good = run.invoke(app, ["recipe", "fit", "cpu/smollm2"], catch_exceptions=False)
    assert good.exit_code == 0 and "GiB" in good.output and "verdict: fits" in good.output
    name = next(i for i in Catalogue().recipe_paths if i.startswith("deepseek-v4-pro/gb300"))
    wrong = run.invoke(app, ["recipe", "fit", name, "--hardware", "h200", "--json"], catch_exceptions=False)
    assert wrong.exit_code == 1
    roles = json.loads(wrong.output)["roles"]
    assert any(role["verdict"] == "does not fit" and role["reasons"] for role in roles)
    with pytest.raises(FourfoldError, match="expected vllm or sglang"):
        run.invoke(app, ["recipe", "fit", "cpu/smollm2", "--engine", "trt"], catch_exceptions=False)


MUTATED = ["deepseek-v4-flash", "deepseek-v4.1-flash", "nemotron-3-ultra-nvfp4", "minimax-m3-nvfp4"]


@pytest.mark.parametrize("name", MUTATED)
def test_configurations_with_one_wrong_value_are_sized_or_refused(name: str) -> None:
    config, refused = dict(model(name)[0].config), 0
    for key in config:
        for junk in (None, "x", -1, [], {"a": 1}, [0]):
            try:
                traits = read_traits({**config, key: junk})
                found = weights(traits, Formats(traits.config))
                per_rank(found, DEP[4], traits)
                cache_of(traits, TP[4], CacheFormat("fp8"))
            except FourfoldError as error:
                assert "config" in str(error)
                refused += 1
    assert refused > 30


@pytest.mark.parametrize("name", Catalogue().recipe_paths)
def test_every_shipped_recipe_fits_its_hardware(name: str) -> None:
    known = Catalogue()
    recipe = known.recipe(name)
    card, sheet, traits = known.model(recipe.model), known.hardware(recipe.hardware), model(recipe.model)[0]
    for engine in recipe.engines:
        for role in cases_of(recipe, engine, card, traits, sheet):
            found = fit(role)
            assert found.verdict != "does not fit", (engine, role.role, found.reasons)
