"""From a model's traits to a model card and a recipe, as the mappings that their files hold."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.dayzero.drafting import Drafting, drafting
from fourfold.common.recipe.dayzero.layout import Demand, Layout, choose
from fourfold.common.recipe.dayzero.source import Found
from fourfold.common.recipe.dayzero.vocabulary import SIZES, printable, shortened, unknown_traits
from fourfold.common.recipe.loading import FOLDERS
from fourfold.common.recipe.schema import HardwareSheet
from fourfold.common.recipe.sizing.cache import V4_STATE_BLOCK, CacheFormat
from fourfold.common.recipe.sizing.quantisation import Formats
from fourfold.common.recipe.sizing.traits import Traits, read_traits
from fourfold.common.recipe.sizing.weights import Weight, weights

VERSIONS = {"vllm": ">=0.32,<0.34", "sglang": "==0.5.23"}
# Prompt and answer, longest request, requests that must fit on a rank, most of a rank, tokens of a step.
WORKLOADS = {
    "fixed": Demand(8192, 1024, 16384, 16, 512, 8192, throughput=True),
    "chat": Demand(2048, 512, 32768, 16, 256, 8192, throughput=False),
    "agentic": Demand(32768, 1024, 262144, 4, 64, 8192, throughput=False),
}
CARD_PARTS = {"MTP": "mtp", "DSpark draft": "draft", "vision encoder": "vision"}
SLOW = 100e9  # bytes of a checkpoint whose first start takes longer than vLLM waits, ten minutes
FAR = 0.05  # a difference between the weights' size and what the sizes account for that is worth a line
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
    for key, most in ({key: LARGEST for key in SIZES} | COUNTS).items():
        value = found.config.get(key)
        if isinstance(value, (int, float)) and not abs(value) <= most:
            raise FourfoldError(f"{found.path}: {key}: {shortened(value)}; expected at most {most}")
    traits = _sized(found, lambda: read_traits(found.config, str(found.path)))
    formats = Formats(found.config, load="nvfp4" if nvfp4 else None, source=str(found.path))
    parts = _sized(found, lambda: weights(traits, formats))
    stored = _sized(found, lambda: weights(traits, Formats(found.config, source=str(found.path))))
    if nvfp4 and all(a.format == b.format for a, b in zip(parts, stored, strict=True)):
        raise FourfoldError(f"--nvfp4: {found.path.parent} has no 16-bit linear weights to quantise while loading")
    drafts = _sized(found, lambda: drafting(found, traits, workload, name)) if sheet.compute_capability else Drafting()
    if not drafts.method:
        parts = [part for part in parts if part.part not in ("MTP", "DSpark draft")]
    accounted = sum(part.bytes for part in stored)
    scale = max(1.0, found.bytes / accounted) if found.bytes else 1.0
    cache = CacheFormat(
        kv="fp8" if _kv(traits, found) else "auto", indexer=_indexer(traits, sheet), state=_state(traits)
    )
    demand = replace(WORKLOADS[workload], concurrency=concurrency)
    demand = demand.within(max(2, traits.max_length)) if traits.max_length else demand
    layout = _sized(found, lambda: choose(traits, parts, sheet, demand, cache, scale, drafts.tokens))
    if layout.parallel.pipeline > 1 and drafts.method:
        drafts = Drafting(notes=("stages of a pipeline: no speculation, which engines do not combine with them",))
    unknown = tuple(printable(line, 400) for line in (*traits.unknown, *unknown_traits(found.config)))
    confirm = tuple(
        printable(line, 2000)
        for line in _confirm(found, traits, sheet, layout, drafts, unknown, accounted, cache, nvfp4, parts)
    )
    card = _card(found, traits, stored, name, repo)
    recipe = _recipe(found, traits, parts, sheet, workload, demand, name, layout, drafts, cache, nvfp4)
    recipe["notes"] = [
        printable(note, 2000) for note in (_how(sheet, layout, demand, workload), *drafts.notes, *confirm)
    ]
    return Composed(name, card, recipe, layout, unknown, confirm)


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


def _card(found: Found, traits: Traits, parts: list[Weight], name: str, repo: str | None) -> dict[str, Any]:
    bytes_: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for part in parts:
        if part.part not in ("norms", "residual", "state_weights"):
            bytes_[CARD_PARTS.get(part.part, part.part)][part.format] += part.bytes
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
        "formats": {part: max(of, key=lambda f: of[f]) for part, of in bytes_.items()},
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
    found: Found,
    traits: Traits,
    parts: list[Weight],
    sheet: HardwareSheet,
    workload: str,
    demand: Demand,
    name: str,
    layout: Layout,
    drafts: Drafting,
    cache: CacheFormat,
    nvfp4: bool,
) -> dict[str, Any]:
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
        args, env = arguments(traits, parts, sheet, layout, cache, demand)
        if nvfp4:
            args["quantization"] = "fourfold_nvfp4"
        args |= drafts.engines.get(engine, {})
        part: dict[str, Any] = {"versions": VERSIONS[engine], "args": args}
        recipe["engines"][engine] = part | ({"env": env} if env else {}) | {"roles": {"aggregated": role}}
    if drafts.method:
        recipe["speculation"] = {"method": drafts.method, "tokens": drafts.tokens}
        if drafts.draft:
            recipe["speculation"]["draft_model"] = drafts.draft
    return recipe


def _vllm(
    traits: Traits, parts: list[Weight], sheet: HardwareSheet, layout: Layout, cache: CacheFormat, demand: Demand
) -> tuple[dict[str, Any], dict[str, Any]]:
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
    traits: Traits, parts: list[Weight], sheet: HardwareSheet, layout: Layout, cache: CacheFormat, demand: Demand
) -> tuple[dict[str, Any], dict[str, Any]]:
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
    stored = {part.format for part in parts if part.part == "experts"}
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


def _how(sheet: HardwareSheet, layout: Layout, demand: Demand, workload: str) -> str:
    world = layout.parallel.world
    return (
        f"Chosen by traits: the smallest layout on {sheet.id} that holds the weights ({layout.weights / 1e9:.1f} GB, "
        f"{layout.weights / 2**30:.1f} GiB on each of {world} rank{'s' * (world > 1)}) in "
        f"{layout.budget / 1e9:.0f} GB with {layout.sequences} requests of {demand.tokens} tokens a data rank "
        f"({layout.sequence / 1e6:.0f} MB each). The {workload} workload's lengths are this command's, not measured."
    )


def _confirm(
    found: Found,
    traits: Traits,
    sheet: HardwareSheet,
    layout: Layout,
    drafts: Drafting,
    unknown: tuple[str, ...],
    accounted: float,
    cache: CacheFormat,
    nvfp4: bool,
    parts: list[Weight],
) -> list[str]:
    architecture = found.architecture or "no architecture (config.json names none)"
    out = [f"Confirm that the engines have a class for {architecture}: fourfold recipe check (level L3 asks them)."]
    out += [f"Confirm the unknown trait {line}. It was not read." for line in unknown]
    if found.bytes is None:
        out.append(
            "Confirm the size of the weights: there is no index and no file of them; it follows from config.json."
        )
    elif abs(found.bytes / accounted - 1) > FAR:
        out.append(
            f"Confirm the sizes: the weights hold {found.bytes / 1e9:.2f} GB, what is understood of config.json makes "
            f"{accounted / 1e9:.2f} GB. Layouts were chosen with the larger."
        )
    out.append(
        f"Confirm the memory: {layout.weights / 1e9:.1f} GB of weights a rank is computed; see the engine's log "
        "(fourfold recipe fit shows it by part)."
    )
    if drafts.method:
        out.append(
            f"Confirm the acceptance of {drafts.tokens} {drafts.method} tokens a step: none is published for it "
            "(fourfold mtp probe, or the engine's metrics); fewer where it is low."
        )
    if cache.kv == "fp8":
        out.append("Confirm that answers with the FP8 cache are as good as with a BF16 one (kv-cache-dtype).")
    four_bits = {part.format for part in parts} & {"nvfp4", "mxfp4"}
    if four_bits and "fp4" not in sheet.peak_flops and sheet.compute_capability:
        out.append(
            f"Confirm that there are kernels for {' and '.join(sorted(four_bits))} weights on {sheet.gpu}, which has "
            "no FP4 arithmetic."
        )
    if nvfp4:
        out.append("Confirm that answers with NVFP4 weights are good enough (fourfold bench quality).")
    if traits.experts:
        out.append(
            "Confirm the expert kernels: backends are the engines' automatic choice; compare --moe-backend and "
            "--moe-runner-backend."
        )
    if any(layer.mixer in ("gdn", "kda", "mamba2") for layer in traits.layers):
        out.append("Confirm the recurrent state: prefix caching and speculation depend on how each engine keeps it.")
    if found.raw.get("auto_map"):
        out.append(
            "Confirm that no code of the repository is needed: config.json names some (auto_map), and this recipe "
            "does not trust it. Read it before adding trust-remote-code."
        )
    if found.template is not True:
        out.append("Confirm the chat template: none was found beside config.json.")
    if traits.vision:
        out.append("Confirm the image encoder: only its size was looked at.")
    if sheet.compute_capability:
        out.append("Confirm tool and reasoning parsers: none was chosen.")
        out.append(
            "Confirm the transfer of this cache before prefill and decode are separated; this recipe aggregates."
        )
    return out


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
