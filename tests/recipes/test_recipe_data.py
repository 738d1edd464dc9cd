"""What the shipped recipes, cards and sheets say: complete, consistent with each other, and with sources."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

from fourfold.common.recipe.launch import starts
from fourfold.common.recipe.loading import Catalogue, read_yaml
from fourfold.common.recipe.schema import EngineRecipe, Recipe, Role
from fourfold.common.recipe.sizing.drafts import draft_traits, draft_weights
from fourfold.common.recipe.sizing.quantisation import Formats
from fourfold.common.recipe.sizing.traits import flat, read_traits
from fourfold.common.recipe.sizing.weights import Weight, weights

CATALOGUE = Catalogue()
RECIPES = list(CATALOGUE.recipe_paths)
CARDS = CATALOGUE.names("models")
DRAFTS = {card.id: card for card in CATALOGUE.draft_models()}
WHOLE = [name for name in CARDS if name not in DRAFTS]
# SHA-256 of the published config.json at the card's revision (V4.1: at dba1be0), as OpenTallas recorded them.
PUBLISHED = {
    "deepseek-v4-flash-0731": "6c8f3d2d3b48707541b88f32f22ef3f0f8a6b57d8523281e2b8d3cdb0ae9a023",
    "deepseek-v4-pro-0813": "9dd2a89255469e120b333668ef5a169b7ae46c00f6bbab786bf0be457546aec0",
    "deepseek-v4.1-flash": "8be45ce0476004a3f529fd896115a4a2e800a129ad2d3ec05b16050f52e21879",
}
BOTH, VLLM, SGLANG = {"vllm", "sglang"}, {"vllm"}, {"sglang"}
# The twelve deployments, R1 to R12, and the engines that each is published or resolved for.
TWELVE = {
    "R1": {"deepseek-v4-pro/gb300-disagg-throughput": BOTH, "deepseek-v4-pro/gb300-disagg-interactive": SGLANG},
    "R2": {"deepseek-v4-pro/gb200-disagg": BOTH},
    "R3": {"deepseek-v4-pro/gb200-disagg-latency": VLLM, "deepseek-v4-pro/gb300-latency": SGLANG},
    "R4": {"deepseek-v4-pro-0813/gb300-agentic": VLLM, "deepseek-v4-pro-0813/gb300-disagg-agentic": BOTH},
    "R5": {"deepseek-v4-pro-nvfp4/gb300-latency": VLLM, "deepseek-v4-pro-nvfp4/gb300-throughput": BOTH},
    "R6": {"deepseek-v4-flash/gb200": BOTH, "deepseek-v4-flash-0731/gb200": VLLM},
    "R7": {"deepseek-v4.1-flash/gb200-disagg-agentic": VLLM, "deepseek-v4.1-flash/gb200-agentic": SGLANG},
    "R8": {"kimi-k3/gb300": BOTH},
    "R9": {"glm-5.3/gb300": BOTH},
    "R10": {"qwen3.8/gb300-latency": VLLM, "qwen3.8/gb300-throughput": VLLM, "qwen3.5/gb300": SGLANG},
    "R11": {"minimax-m3/gb300": BOTH},
    "R12": {"nemotron-3-ultra/gb300": VLLM, "gpt-oss/gb200": VLLM, "deepseek-v3.2/gb200": BOTH},
}
STOCK = {name: engines for point in TWELVE.values() for name, engines in point.items()}


@pytest.fixture(scope="module")
def recipes() -> dict[str, Recipe]:
    return {name: CATALOGUE.recipe(name) for name in RECIPES}


def arguments(plan: EngineRecipe, role: Role) -> dict[str, Any]:
    return {**plan.args, **role.args}


def test_every_published_deployment_is_there_for_the_engines_it_is_given_for(recipes: dict[str, Recipe]) -> None:
    assert {name: set(recipes[name].engines) for name in STOCK} == STOCK
    others = set(recipes) - set(STOCK)
    assert all(name.startswith("cpu/") or recipes[name].extends in STOCK for name in others), others


@pytest.mark.parametrize("name", RECIPES)
def test_every_process_can_be_started(recipes: dict[str, Recipe], name: str) -> None:
    recipe = recipes[name]
    card, sheet = CATALOGUE.model(recipe.model), CATALOGUE.hardware(recipe.hardware)
    for engine, plan in recipe.engines.items():
        started = starts(recipe, engine, card, sheet)
        assert {start.role for start in started} == set(plan.roles)
        gpus = sum(role.replicas * role.parallel.world for role in plan.roles.values())
        assert sum(start.gpus for start in started) == gpus
        assert gpus <= max(sheet.nvlink_domain, sheet.gpus_per_node), f"{gpus} GPUs are not in one NVLink domain"
        assert not any(value is None for start in started for value in start.options.values())


@pytest.mark.parametrize("name", RECIPES)
def test_versions_are_those_in_scope(recipes: dict[str, Recipe], name: str) -> None:
    for engine, plan in recipes[name].engines.items():
        inside = [version for version in ("0.32.0", "0.33.0", "0.5.23") if version in SpecifierSet(plan.versions)]
        assert inside == (["0.32.0", "0.33.0"] if engine == "vllm" else ["0.5.23"])


@pytest.mark.parametrize("name", RECIPES)
def test_speculation_is_what_the_engines_are_told(recipes: dict[str, Recipe], name: str) -> None:
    """The tokens of ``speculation`` are those of one engine; another engine's count is in the notes."""
    recipe, told = recipes[name], []
    for engine, plan in recipe.engines.items():
        for role_name, role in plan.roles.items():
            args = arguments(plan, role)
            if role_name == "prefill" and engine == "sglang":
                continue
            if engine == "vllm":
                config = args.get("speculative-config")
                told += [(config["method"], config["num_speculative_tokens"])] if config else []
            elif "speculative-algorithm" in args:
                method = {"DSPARK": "dspark"}.get(args["speculative-algorithm"], "mtp")
                count = args.get("speculative-num-steps") or args["speculative-dspark-block-size"]
                told.append((method, count))
                assert method == "dspark" or args["speculative-num-draft-tokens"] == count + 1
                assert "max-running-requests" in args, "SGLang takes 48 requests without it"
    if recipe.speculation is None:
        assert not told
        return
    assert (recipe.speculation.method, recipe.speculation.tokens) in told
    assert {method for method, _ in told} == {recipe.speculation.method}
    drafts = {count for _, count in told}
    words = " ".join(recipe.notes)
    assert all(str(count) in words for count in drafts - {recipe.speculation.tokens}), drafts


@pytest.mark.parametrize("name", RECIPES)
def test_evidence_keeps_its_conditions(recipes: dict[str, Recipe], name: str) -> None:
    recipe = recipes[name]
    for evidence in recipe.evidence:
        assert evidence.source.url or evidence.source.date or evidence.source.what.startswith("fourfold bench")
        if "agentic" in evidence.at:
            assert evidence.synthetic_acceptance, "InferenceX simulates acceptance in its agentic figures"
        if evidence.metric == "ratio" and evidence.value >= 2:
            assert evidence.mixes, f"{evidence.value}: a ratio this large is never of one change"
        if evidence.prices is not None:
            assert recipe.hardware in CATALOGUE.prices(evidence.prices).gpu_hour


def test_the_large_claims_say_what_they_mix(recipes: dict[str, Recipe]) -> None:
    claims = {e.value: e.mixes for recipe in recipes.values() for e in recipe.evidence if e.metric == "ratio"}
    assert len(claims[20]) == 4 and len(claims[5]) == 3 and claims[15]
    assert any("MTP" in change for change in claims[5]) and any("MTP" in change for change in claims[20])


def test_a_published_cost_is_that_of_its_price_sheet(recipes: dict[str, Recipe]) -> None:
    """Dollars per million tokens = price of a GPU hour / tokens that it makes, within the figures' rounding."""
    found = 0
    for recipe in recipes.values():
        for cost in (e for e in recipe.evidence if e.metric == "dollars_per_million_total_tokens"):
            rates = [e for e in recipe.evidence if e.metric == "total_tokens_per_second_gpu"]
            rate = next(e.value for e in rates if e.at.startswith(cost.at))
            hour = CATALOGUE.prices(cost.prices or "").gpu_hour[recipe.hardware]
            assert cost.value == pytest.approx(hour * 1e6 / (3600 * rate), rel=0.01)
            found += 1
    assert found >= 2


@pytest.mark.parametrize("name", list(STOCK))
def test_every_recipe_has_a_variant_with_fourfold_or_says_why_not(recipes: dict[str, Recipe], name: str) -> None:
    variant, notes = f"{name}-fourfold", " ".join(recipes[name].notes)
    assert (variant in recipes) != ("No variant with fourfold" in notes)
    if variant in recipes:
        assert recipes[variant].extends == name
        assert "fourfold." in str(recipes[variant].engines)
        assert not recipes[variant].evidence, "what is published is of the stock engine"
    assert "fourfold." not in str(recipes[name].engines)


@pytest.mark.parametrize("name", RECIPES)
def test_fourfold_claims_no_more_than_it_has(recipes: dict[str, Recipe], name: str) -> None:
    recipe = recipes[name]
    card = CATALOGUE.model(recipe.model)
    for plan in recipe.engines.values():
        for role in plan.roles.values():
            args = arguments(plan, role)
            if args.get("quantization") == "fourfold_nvfp4":
                assert "experts" not in card.formats, "experts are not served by fourfold's quantisation"
            hybrid = "HybridWorker" in str(args.get("worker-cls"))
            adaptive = "AdaptiveScheduler" in str(args.get("scheduler-cls"))
            if adaptive:
                table = args["speculative-config"]["num_speculative_tokens_per_batch_size"]
                assert table == [[1, args["max-num-seqs"], args["speculative-config"]["num_speculative_tokens"]]]
                assert args["compilation-config"]["cudagraph_mode"] == "PIECEWISE"
            if hybrid or adaptive or args.get("speculative-algorithm") == "FOURFOLD_MTP":
                assert role.parallel.data == 1 and recipe.speculation and recipe.speculation.method == "mtp"
                assert card.id == "smollm2-135m-instruct" or plan.env.get("VLLM_USE_V2_MODEL_RUNNER") == 0
            if hybrid:
                assert args["async-scheduling"] is False
                assert (
                    plan.fourfold
                    and plan.fourfold.mtp.hybrid.head_tokens <= args["speculative-config"]["num_speculative_tokens"]
                )


def test_cpu_recipes_run_on_both_engines(recipes: dict[str, Recipe]) -> None:
    own = {name: recipe for name, recipe in recipes.items() if recipe.hardware == "cpu"}
    assert {"cpu/smollm2", "cpu/smollm2-nvfp4", "cpu/smollm2-mtp", "cpu/smollm2-mtp-fourfold"} <= set(own)
    for recipe in own.values():
        assert set(recipe.engines) == BOTH or recipe.engines["vllm"].disaggregated
        assert all(p.env["SGLANG_PLATFORM"] == "fourfold_cpu" for e, p in recipe.engines.items() if e == "sglang")


@dataclass(frozen=True)
class Read:
    """What the config of a card says: weights of the model, and of what drafts in its checkpoint."""

    main: list[Weight]
    drafts: list[Weight]
    unknown: tuple[str, ...]
    tied: bool
    dspark: bool

    @property
    def total(self) -> float:
        return sum(w.parameters for w in self.main) / 1e9

    @property
    def active(self) -> float:
        tied = sum(w.parameters for w in self.main if w.part == "embeddings") if self.tied else 0
        return (sum(w.parameters * w.active for w in self.main) + tied) / 1e9


@cache
def read(name: str) -> Read:
    config = flat(CATALOGUE.config(name))
    traits = read_traits(config, name)
    found = weights(traits, Formats(config, CATALOGUE.model(name).formats))
    drafts = [w for w in found if w.part in ("MTP", "DSpark draft")]
    main = [w for w in found if w not in drafts]
    return Read(main, drafts, traits.unknown, bool(config.get("tie_word_embeddings")), traits.dspark)


@pytest.mark.parametrize("name", WHOLE)
def test_a_card_agrees_with_its_config(name: str) -> None:
    card, found = CATALOGUE.model(name), read(name)
    assert found.unknown == ()
    assert found.total == pytest.approx(card.total_parameters, rel=0.03)
    assert found.active == pytest.approx(card.active_parameters, rel=0.06)
    if card.published_bytes is not None:
        assert sum(w.bytes for w in found.main + found.drafts) == pytest.approx(card.published_bytes, rel=0.01)
    if card.draft == "none":
        assert not found.drafts or any("MTP" in note for note in card.notes)
    else:
        assert found.drafts and card.draft == ("dspark" if found.dspark else "mtp")


@pytest.mark.parametrize("name", WHOLE)
def test_the_formats_of_a_card_are_those_of_its_config(name: str) -> None:
    """Of each part, the format of most of its parameters."""
    mamba = ("mixer.in_proj", "mixer.out_proj")
    for part in ("experts", "shared", "attention", "mamba", "dense", "latent", "embeddings", "head"):
        counts: Counter[str] = Counter()
        for weight in read(name).main:
            its = "mamba" if weight.name in mamba else weight.part
            counts[weight.format] += weight.parameters if its == part else 0
        formats = CATALOGUE.model(name).formats
        if counts.total():
            assert formats.get(part, formats.get("all")) == counts.most_common(1)[0][0], part


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_a_published_config_is_the_published_file(name: str) -> None:
    written = CATALOGUE.model_path(name).with_name(CATALOGUE.model(name).config).read_bytes()
    assert hashlib.sha256(written).hexdigest() == PUBLISHED[name]


def test_every_draft_model_that_a_recipe_names_has_a_card(recipes: dict[str, Recipe]) -> None:
    by_repo = {card.repo: card for card in DRAFTS.values()}
    named = set()
    for recipe in recipes.values():
        for plan in recipe.engines.values():
            for role in plan.roles.values():
                args = arguments(plan, role)
                draft = args.get("speculative-config", {}).get("model") or args.get("speculative-draft-model-path")
                if draft is not None and not str(draft).startswith("/"):
                    assert by_repo[draft].drafts_for == recipe.model
                    named.add(draft)
        if recipe.speculation and recipe.speculation.draft_model:
            assert recipe.speculation.draft_model in by_repo
    assert named >= set(by_repo), "a card of a draft model that no recipe names"


# Layers, projection and Markov head, embeddings and head of a draft model's own, parameters; the rest are norms.
PARTS = {
    "kimi-k3-speculator.dspark": (5 * 411_041_792, 5 * 7168**2 + 2 * 163840 * 256, 2 * 163840 * 7168),
    "kimi-k3-dspark": (5 * 381_681_664, 5 * 7168**2 + 2 * 163840 * 256, 0),
    "minimax-m3-eagle3-gqa": (446_693_376, 3 * 6144**2, 2 * 200064 * 6144 + 6144 * 9216),
}


@pytest.mark.parametrize("name", list(PARTS))
def test_a_draft_model_is_sized_whole(name: str) -> None:
    card, config = DRAFTS[name], CATALOGUE.config(name)
    traits = draft_traits(card, config)
    assert traits is not None and (traits.hidden, traits.vocab) in ((7168, 163840), (6144, 200064))
    found = {weight.shard: weight.parameters for weight in draft_weights(card, config, traits)}
    assert sum(found.values()) == round(card.total_parameters * 1e9)
    for shard, size in zip(("heads", "all", "vocab"), PARTS[name], strict=True):
        assert found.get(shard, 0) == pytest.approx(size, abs=200_000), shard
    if card.published_bytes is not None:
        assert 0 < card.published_bytes - 2 * sum(found.values()) < 30_000, "a header and texts"


@pytest.mark.parametrize("name", CARDS)
def test_a_config_says_where_it_is_from_and_under_which_terms(name: str) -> None:
    card = CATALOGUE.model(name)
    copied = "written" not in card.config_source.what
    open_terms = ("MIT", "Apache-2.0")
    if copied:
        assert card.license.startswith(open_terms), f"{card.license}: write the facts, do not copy the file"
        assert card.config_source.url or name == "smollm2-135m-instruct"
    assert all(source.url or source.what.startswith("heads/") for source in card.sources)


@pytest.mark.parametrize("name", CATALOGUE.names("hardware"))
def test_a_sheet_is_possible(name: str) -> None:
    sheet = CATALOGUE.hardware(name)
    if name == "cpu":
        return
    assert sheet.compute_capability is not None
    assert sheet.nvlink_domain % sheet.gpus_per_node == 0
    rates = [sheet.peak_flops[key] for key in ("fp4", "fp8", "bf16") if key in sheet.peak_flops]
    assert rates == sorted(rates, reverse=True)
    assert ("fp4" in sheet.peak_flops) == (float(sheet.compute_capability) >= 10)
    assert 100 << 30 < sheet.memory_bytes < 300 << 30
    assert all(source.url for source in sheet.sources)


def test_prices_are_for_machines_that_there_are() -> None:
    names = CATALOGUE.names("prices")
    assert len(names) == 4
    for name in names:
        assert set(CATALOGUE.prices(name).gpu_hour) <= set(CATALOGUE.names("hardware"))
    own, rent, listed = (CATALOGUE.prices(n).gpu_hour["gb200-nvl72"] for n in names[1:2] + names[3:] + names[:1])
    assert rent / own == pytest.approx(1.5, abs=0.05) and listed / own == pytest.approx(4.7, abs=0.1)


@pytest.mark.parametrize("engine", sorted(BOTH))
def test_the_card_of_the_trained_head_is_what_extract_writes(engine: str, tmp_path: Path) -> None:
    from fourfold.common.demo.model import SMOLLM2_HEAD
    from fourfold.common.mtp.extract import extract

    extract(SMOLLM2_HEAD, tmp_path / "draft", "vllm" if engine == "vllm" else "sglang")
    written = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert CATALOGUE.config(f"smollm2-135m-instruct-mtp-{engine}") == written


def test_a_variant_writes_nothing_twice() -> None:
    """What a recipe inherits it does not say again."""
    for name, path in CATALOGUE.recipe_paths.items():
        own = read_yaml(path)
        if "extends" in own:
            base = CATALOGUE._resolved(CATALOGUE.recipe_paths[own["extends"]], ())
            assert repeated(base, {**own, "schema": None}, "") == [], name


def repeated(base: Any, over: Any, where: str) -> list[str]:
    if isinstance(base, dict) and isinstance(over, dict):
        return [text for key in over if key in base for text in repeated(base[key], over[key], f"{where}.{key}")]
    return [where] if base == over and over is not None else []
