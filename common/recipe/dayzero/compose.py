"""From a model's traits to a model card and a recipe, as the mappings that their files hold."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.dayzero.confirming import Model, confirmations, how
from fourfold.common.recipe.dayzero.drafting import Drafting, drafting
from fourfold.common.recipe.dayzero.layout import Demand, Layout, layouts
from fourfold.common.recipe.dayzero.source import Found
from fourfold.common.recipe.dayzero.vocabulary import SIZES, printable, shortened, unknown_traits
from fourfold.common.recipe.loading import FOLDERS, parse
from fourfold.common.recipe.schema import HardwareSheet, ModelCard, Recipe
from fourfold.common.recipe.sizing.cache import V4_STATE_BLOCK, CacheFormat
from fourfold.common.recipe.sizing.fit import cases_of, fit
from fourfold.common.recipe.sizing.quantisation import Formats
from fourfold.common.recipe.sizing.sharding import DRAFTS
from fourfold.common.recipe.sizing.traits import Traits, read_traits
from fourfold.common.recipe.sizing.weights import weights

VERSIONS = {"vllm": ">=0.32,<0.34", "sglang": "==0.5.23"}
# Prompt and answer, longest request, requests that must fit on a rank, most of a rank, tokens of a step.
WORKLOADS = {
    "fixed": Demand(8192, 1024, 16384, 16, 512, 8192, throughput=True),
    "chat": Demand(2048, 512, 32768, 16, 256, 8192, throughput=False),
    "agentic": Demand(32768, 1024, 262144, 4, 64, 8192, throughput=False),
}
CARD_PARTS: dict[str, str] = {"MTP": "mtp", "DSpark draft": "draft", "vision encoder": "vision"}
SLOW = 100e9  # bytes of a checkpoint whose first start takes longer than vLLM waits, ten minutes
LARGEST = 1 << 33  # of any size in a config; more is a mistake
COUNTS = {"num_hidden_layers": 4096, "n_layer": 4096} | dict.fromkeys(
    ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "n_mtp_layers"), 64
)
T = TypeVar("T")


@dataclass(frozen=True)
class Composed:
    """What `compose` chose.

    Attributes:
        card, recipe: what their files hold.
        layout: of the ranks; the same for both engines.
        unknown: traits that were not understood, a line each.
        confirm: what only the engine or the hardware can tell, a line each.
    """

    name: str
    card: dict[str, Any]
    recipe: dict[str, Any]
    layout: Layout
    unknown: tuple[str, ...]
    confirm: tuple[str, ...]


def compose(
    found: Found,
    sheet: HardwareSheet,
    workload: str,
    name: str,
    repo: str | None = None,
    nvfp4: bool = False,
    concurrency: int | None = None,
) -> Composed:
    """Choose everything by traits.

    Args:
        name: of the card.
        repo: repository or folder that the engines load; None: not known.
        nvfp4: quantise 16-bit weights with fourfold while loading.

    Raises:
        FourfoldError: a size is missing from the config, or no layout of this hardware holds the model.
    """
    model = _sized(found, lambda: _model(found, sheet, name, nvfp4))
    demand = replace(WORKLOADS[workload], concurrency=concurrency)
    demand = demand.within(max(2, model.traits.max_length)) if model.traits.max_length else demand
    card = _card(model, name, repo)
    drafts = Drafting()
    if sheet.compute_capability:
        drafts = _sized(found, lambda: drafting(found, model.traits, workload, name))
    if not drafts.method:
        model = replace(model, parts=[part for part in model.parts if part.part not in DRAFTS])
    layout, recipe, drafts = _sized(found, lambda: _fitting(model, card, sheet, workload, demand, drafts))
    unknown = tuple(printable(line, 400) for line in (*model.traits.unknown, *unknown_traits(found.config)))
    confirm = tuple(printable(line, 2000) for line in confirmations(model, sheet, layout, drafts, unknown))
    notes = (how(sheet, layout, demand, workload), *drafts.notes, *confirm)
    recipe["notes"] = [printable(note, 2000) for note in notes]
    return Composed(name, card, recipe, layout, unknown, confirm)


def _model(found: Found, sheet: HardwareSheet, name: str, nvfp4: bool) -> Model:
    for key, most in ({key: LARGEST for key in SIZES} | COUNTS).items():
        value = found.config.get(key)
        if isinstance(value, (int, float)) and not abs(value) <= most:
            raise FourfoldError(f"{found.path}: {key}: {shortened(value)}; expected at most {most}")
    traits = read_traits(found.config, str(found.path))
    stored = weights(traits, Formats(found.config, source=str(found.path)))
    parts = weights(traits, Formats(found.config, load="nvfp4", source=str(found.path))) if nvfp4 else stored
    if nvfp4 and all(a.format == b.format for a, b in zip(parts, stored, strict=True)):
        raise FourfoldError(f"--nvfp4: {found.path.parent} has no 16-bit linear weights to quantise while loading")
    kv = "fp8" if _kv(traits, found) else "auto"
    cache = CacheFormat(kv=kv, indexer=_indexer(traits, sheet), state=_state(traits))
    return Model(found, name, traits, stored, parts, cache, nvfp4)


def _fitting(
    model: Model, card: dict[str, Any], sheet: HardwareSheet, workload: str, demand: Demand, drafts: Drafting
) -> tuple[Layout, dict[str, Any], Drafting]:
    """The first layout with which `fit` agrees on both engines; with fewer requests where that is enough."""
    parsed, refused = parse(ModelCard, card, f"card of {model.found.path}"), ""
    try:
        for layout in layouts(model.traits, model.parts, sheet, demand, model.cache, model.scale, drafts.tokens):
            told = drafts
            if layout.parallel.pipeline > 1 and drafts.method:
                told = Drafting(notes=("stages of a pipeline: no speculation, which engines do not combine with them",))
            recipe = _recipe(model, sheet, workload, demand, layout, told)
            whole = parse(Recipe, recipe, f"recipe for {model.found.path}")
            cases = [case for e in whole.engines for case in cases_of(whole, e, parsed, model.traits, sheet)]
            tried = layout.sequences
            while tried >= (layout.sequences if demand.concurrency else demand.least):
                results = [fit(replace(case, options=case.options.with_(sequences=tried))) for case in cases]
                refused = next((result.reasons[0] for result in results if result.reasons), "")
                if not refused:
                    layout = replace(layout, sequences=tried)
                    return layout, _recipe(model, sheet, workload, demand, layout, told), told
                tried //= 2
    except FourfoldError as error:
        raise FourfoldError(f"{error}; of one that holds the weights: {refused}" if refused else str(error)) from None
    raise AssertionError("layouts ends with an error")


def _sized(found: Found, work: Callable[[], T]) -> T:
    """Sizes of a config that may hold anything."""
    try:
        return work()
    except FourfoldError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise FourfoldError(f"{found.path}: a key has a value of another kind than its name says: {error}") from None


def _kv(traits: Traits, found: Found) -> bool:
    """Whether the cache is FP8: the checkpoint was calibrated for it, or its sparse attention has kernels for it."""
    quant = found.config.get("quantization_config")
    quant = quant if isinstance(quant, dict) else {}
    scheme = quant.get("kv_cache_scheme")
    calibrated = quant.get("kv_cache_quant_algo") == "FP8" or (isinstance(scheme, dict) and scheme.get("num_bits") == 8)
    sparse = any(layer.mixer == "v4" or (layer.mixer == "mla" and layer.indexer) for layer in traits.layers)
    return calibrated or sparse


def _compressed(traits: Traits) -> bool:
    return any(layer.mixer == "v4" and layer.ratio for layer in traits.layers)


def _blackwell(sheet: HardwareSheet) -> bool:
    return (sheet.compute_capability or "").startswith("10.")


def _indexer(traits: Traits, sheet: HardwareSheet) -> str:
    return "mxfp4" if _compressed(traits) and _blackwell(sheet) else "fp8"


def _state(traits: Traits) -> str:
    said = str(traits.get("mamba_ssm_cache_dtype", "") or traits.get("mamba_ssm_dtype", ""))
    return "bf16" if said == "bfloat16" else "fp32"


def _card(model: Model, name: str, repo: str | None) -> dict[str, Any]:
    found, traits, parts = model.found, model.traits, model.stored
    bytes_: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for part in parts:
        if part.part not in ("norms", "residual", "state_weights"):
            kind = CARD_PARTS[part.part] if part.part in CARD_PARTS else part.part
            bytes_[kind][part.format] += part.bytes
    card = {
        "schema": "fourfold/model/1",
        "id": name,
        "repo": repo or f"local/{name}",
        "license": found.license or "not stated in the files; read the model's own",
        "config": f"{name}.json",
        "config_source": {"what": "config.json of the model directory that fourfold recipe new was given"},
        "total_parameters": _rounded(sum(part.parameters for part in parts) / 1e9),
        "active_parameters": _rounded(sum(part.parameters * part.active for part in parts) / 1e9),
        "draft": "dspark" if traits.dspark else "mtp" if traits.draft_layers else "none",
        "formats": {part: max((size, format) for format, size in of.items())[1] for part, of in bytes_.items()},
        "sources": [{"what": "computed from config.json by fourfold recipe new; nobody has published or measured it"}],
    }
    if found.bytes:
        card["published_bytes"] = found.bytes
    if found.quantised_apart:
        card["notes"] = ["The quantisation is that of hf_quant_config.json; here both are in one file."]
    return card


def _rounded(value: float) -> float:
    return float(f"{value:.4g}") or 1e-6


def _recipe(
    model: Model, sheet: HardwareSheet, workload: str, demand: Demand, layout: Layout, drafts: Drafting
) -> dict[str, Any]:
    name = model.name
    sizes = {key: size for key, size in layout.parallel.model_dump().items() if size > 1}
    role = {"parallel": sizes} if sizes else {}
    recipe: dict[str, Any] = {
        "schema": "fourfold/recipe/1",
        "id": f"{name}/{sheet.id}-{workload}",
        "title": f"{name} on {sheet.gpu if sheet.compute_capability else 'a processor'}, chosen by its traits; confirm",
        "model": name,
        "hardware": sheet.id,
        "workload": {
            "kind": workload,
            "input_tokens": demand.prompt,
            "output_tokens": demand.answer,
            "concurrency": layout.sequences * layout.parallel.data,
        },
        "engines": {},
    }
    for engine, arguments in (("vllm", _vllm), ("sglang", _sglang)):
        args, env = arguments(model, sheet, layout, demand)
        if model.nvfp4:
            args["quantization"] = "fourfold_nvfp4"
        args |= drafts.engines.get(engine, {})
        part: dict[str, Any] = {"versions": VERSIONS[engine], "args": args}
        recipe["engines"][engine] = part | ({"env": env} if env else {}) | {"roles": {"aggregated": role}}
    if drafts.method:
        recipe["speculation"] = {"method": drafts.method, "tokens": drafts.tokens}
        if drafts.draft:
            recipe["speculation"]["draft_model"] = drafts.draft
    return recipe


def _vllm(model: Model, sheet: HardwareSheet, layout: Layout, demand: Demand) -> tuple[dict[str, Any], dict[str, Any]]:
    traits, cache = model.traits, model.cache
    args: dict[str, Any] = {"max-model-len": layout.length, "max-num-seqs": layout.sequences}
    if not sheet.compute_capability:
        space = max(1, min(4, int((layout.budget - layout.weights) / 2**30)))
        return args | {"dtype": "bfloat16", "enforce-eager": True}, {"VLLM_CPU_KVCACHE_SPACE": space}
    args |= {"max-num-batched-tokens": demand.batched, "gpu-memory-utilization": 0.9}
    if cache.kv == "fp8":
        args["kv-cache-dtype"] = "fp8"
    if _compressed(traits):
        if any(layer.ratio in V4_STATE_BLOCK for layer in traits.layers):
            args["block-size"] = 256
        if not demand.throughput:  # prefixes recur; windows of which no checkpoint is kept are computed again
            args["prefix-cache-retention-interval"] = 32768 if "block-size" in args else 1024
        if cache.indexer == "mxfp4":
            args["attention-config"] = {"indexer_kv_dtype": "mxfp4"}
    if any(layer.mixer == "mamba2" for layer in traits.layers) and cache.state == "fp32":
        args["mamba-ssm-cache-dtype"] = "float32"
    return args, {"VLLM_ENGINE_READY_TIMEOUT_S": 3600} if layout.weights * layout.parallel.world > SLOW else {}


def _sglang(
    model: Model, sheet: HardwareSheet, layout: Layout, demand: Demand
) -> tuple[dict[str, Any], dict[str, Any]]:
    traits, cache = model.traits, model.cache
    data = layout.parallel.data
    running = layout.sequences * data  # SGLang shares this number, and that of a chunk, among the data-parallel ranks
    args: dict[str, Any] = {"context-length": layout.length, "max-running-requests": running}
    if not sheet.compute_capability:
        cpu = {"device": "cpu", "disable-overlap-schedule": True, "attention-backend": "torch_native"}
        tokens = min(65536, layout.length * layout.sequences)
        return args | {"dtype": "bfloat16", **cpu, "max-total-tokens": tokens}, {"SGLANG_PLATFORM": "fourfold_cpu"}
    args |= {"mem-fraction-static": 0.85, "chunked-prefill-size": demand.batched * data, "enable-metrics": True}
    args["cuda-graph-max-bs-decode"] = layout.sequences
    if cache.kv == "fp8":
        args["kv-cache-dtype"] = "fp8_e4m3"
    if _compressed(traits):
        args["page-size"] = 256
    if data > 1 and layout.parallel.tensor == 1:
        args |= {"enable-dp-lm-head": True, "moe-dense-tp-size": 1}
    stored = {part.format for part in model.parts if part.part == "experts"}
    quant = traits.get("quantization_config", {})
    if (
        "nvfp4" in stored
        and str(quant.get("quant_method")).startswith("modelopt")
        and quant.get("quant_algo") == "NVFP4"
    ):
        args["quantization"] = "modelopt_fp4"
        if _blackwell(sheet) and traits.gated:
            args["moe-runner-backend"] = "flashinfer_trtllm"
    if any(layer.mixer == "mamba2" for layer in traits.layers):
        args["mamba-ssm-dtype"] = "float32" if cache.state == "fp32" else "bfloat16"
    return args, {}


def name_of(found: Found, given: str | None) -> str:
    """A card's name: as given, else from the directory's, else from the kind of model.

    Raises:
        FourfoldError: none can be made.
    """
    folder = found.path.resolve().parent.name if found.path.name == "config.json" else found.path.stem
    text = given if given is not None else folder
    name = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:60]
    if not name or name in FOLDERS or (given is not None and name != given):
        raise FourfoldError(
            f"--name {printable(text)!r}: expected lower-case letters, digits, dots and dashes, and no folder's name"
        )
    return name
