"""Whether a role fits its GPUs: bytes by part, what is left for the KV cache, and what to change where it does not.

The verdict is ``fits``, ``tight`` (only without the layout factor and with the smallest reserves, that is, within this
model's own error) or ``does not fit``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from fourfold.common.recipe.launch import engine_of
from fourfold.common.recipe.schema import HardwareSheet, ModelCard, Parallel, Recipe, Workload
from fourfold.common.recipe.sizing.cache import Cache, cache_of
from fourfold.common.recipe.sizing.drafts import draft_traits, draft_weights, with_draft
from fourfold.common.recipe.sizing.options import Options, options_of
from fourfold.common.recipe.sizing.quantisation import Formats
from fourfold.common.recipe.sizing.reserves import Reserve, reserves
from fourfold.common.recipe.sizing.sharding import DRAFTS, layout_factor, per_rank
from fourfold.common.recipe.sizing.traits import Traits
from fourfold.common.recipe.sizing.weights import Weight, weights

Verdict = Literal["fits", "tight", "does not fit"]
WINDOW_PAGE = 256  # SGLang's page of V4
ERROR = 0.08  # of this model on what was observed; tests/recipes/test_recipe_fit.py holds it to that


@dataclass(frozen=True)
class Part:
    """Weights of one part on one rank; ``copied``: each rank holds all of it."""

    part: str
    format: str
    copied: bool
    bytes: float


@dataclass(frozen=True)
class Case:
    """One role of one engine, to be sized."""

    traits: Traits
    weights: tuple[Weight, ...]
    sheet: HardwareSheet
    options: Options
    parallel: Parallel
    workload: Workload
    role: str = "aggregated"
    replicas: int = 1
    notes: tuple[str, ...] = ()
    draft: Traits | None = None  # of a draft model of its own

    @cached_property
    def parts(self) -> list[Part]:
        kept = [w for w in self.weights if self.options.draft or w.part not in DRAFTS]
        kept = [w for w in kept if self.options.vision or w.part != "vision encoder"]
        kept = [w for w in kept if not (self.options.engram_offloaded and w.part == "Engram")]
        found = per_rank(
            kept, self.parallel, self.traits, self.options.redundant_experts, self.options.tables_over_data
        )
        return [Part(p, f, copied, size) for (p, f, copied), size in found.items()]

    @cached_property
    def cache(self) -> Cache:
        o = self.options
        own = cache_of(self.traits, self.parallel, o.cache, o.engine, o.block, o.draft_tokens)
        return own if self.draft is None else with_draft(own, self.draft, self.parallel, o.cache)

    @cached_property
    def reserves(self) -> list[Reserve]:
        return reserves(self.traits, self.parallel, self.options, self.sheet)

    @property
    def length(self) -> int:
        """Tokens of the workload's sequence in this role."""
        w = self.workload
        return w.input_tokens + (1 if self.role == "prefill" else w.output_tokens)

    @property
    def wanted(self) -> int:
        """Sequences that one data-parallel rank must hold at once."""
        o, w = self.options, self.workload
        if self.role == "prefill":
            return max(1, min(o.sequences, o.batched // max(1, w.input_tokens)))
        if w.concurrency is None:
            return 1
        return max(1, min(o.sequences, -(-w.concurrency // (self.replicas * self.parallel.data))))


@dataclass(frozen=True)
class Space:
    """Memory of one rank under one set of assumptions, bytes."""

    weights: float
    reserves: float
    cache: float
    sequences: int
    tokens: int
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Fit:
    """The result for one role."""

    case: Case
    factor: float
    budget: float
    space: Space
    verdict: Verdict
    reasons: tuple[str, ...]
    advice: tuple[str, ...] = ()

    @property
    def placed(self) -> float:
        return sum(part.bytes for part in self.case.parts)


def cases_of(
    recipe: Recipe,
    engine: str,
    card: ModelCard,
    traits: Traits,
    sheet: HardwareSheet,
    drafts: Mapping[str, tuple[ModelCard, Mapping[str, Any]]] | None = None,
) -> list[Case]:
    """What there is to size of a recipe on one engine.

    Args:
        drafts: repository to card and config.json, for draft models that a recipe names.
    """
    plan = engine_of(recipe, engine)
    out = []
    for name, role in plan.roles.items():
        options = options_of(plan, name, engine, sheet, traits)
        formats = Formats(traits.config, card.formats, options.load_format, f"model card {card.id}")
        found, notes = weights(traits, formats), [f"unknown trait: {text}" for text in traits.unknown]
        own = None
        if options.draft_model:
            draft = (drafts or {}).get(options.draft_model)
            if draft is None:
                notes.append(f"draft model {options.draft_model}: no model card names it; its weights are not counted")
            else:
                own = draft_traits(*draft)
                found += draft_weights(*draft, own)
        tables = sum(w.bytes for w in found if w.part == "Engram")
        if tables and options.engram_offloaded:
            notes.append(f"Engram tables, {gb(tables)}, are in the host's memory, not in the GPUs'")
        if options.cache.kv == "auto" and traits.count("mla") + traits.count("gqa"):
            notes.append("KV cache in 16 bits: neither the recipe nor the checkpoint says another dtype")
        out.append(
            Case(
                traits,
                tuple(found),
                sheet,
                options,
                role.parallel,
                recipe.workload,
                name,
                role.replicas,
                tuple(notes),
                own,
            )
        )
    return out


def fit(case: Case) -> Fit:
    """Size one role."""
    factor = layout_factor() if case.sheet.compute_capability is not None else 1.0
    usual, least = _space(case, factor, False), _space(case, 1.0, True)
    verdict: Verdict = "fits" if not usual.problems else "tight" if not least.problems else "does not fit"
    budget = case.sheet.memory_bytes * (case.options.utilisation if case.sheet.compute_capability else 1.0)
    return Fit(case, factor, budget, usual, verdict, usual.problems)


def _space(case: Case, factor: float, least: bool) -> Space:
    options, sheet = case.options, case.sheet
    memory = sheet.memory_bytes
    held = sum(part.bytes for part in case.parts) * factor
    beside = sum(r.least if least else r.bytes for r in case.reserves)
    problems = []
    if sheet.compute_capability is None:
        left = memory - held - beside
    elif options.engine == "vllm":
        left = memory * options.utilisation - held - beside
    else:  # mem-fraction-static holds weights and cache alone
        left = memory * options.utilisation - held
        room = memory * (1 - options.utilisation)
        if beside > room:
            problems.append(
                f"{gb(beside)} beside weights and cache; mem-fraction-static {options.utilisation:g} leaves {gb(room)}"
            )
    if options.cache_bytes is not None:
        if options.cache_bytes > left:
            problems.append(f"the recipe fixes {gb(options.cache_bytes)} of KV cache; {gb(max(0, left))} are left")
        left = min(left, options.cache_bytes)
    if left <= 0:
        problems.append(f"weights and reserves take {gb(held + beside)}; nothing is left for the KV cache")
        return Space(held, beside, left, 0, 0, tuple(problems))
    sequences, needed = (_sglang_v4 if _pooled(case) else _held)(case, left)
    if options.engine == "vllm":
        start = case.cache.sequence(options.max_length, options.in_flight)
        if case.cache.blocks is None:
            start += case.cache.in_flight(min(options.in_flight, options.max_length), options.max_length)
        if start > left:
            problems.append(
                f"vLLM starts only if one sequence of {options.max_length} tokens (max-model-len) fits with the state "
                f"of {options.in_flight} tokens in flight: {gb(start)}; {gb(left)} are left"
            )
    elif case.length > options.max_length:
        problems.append(f"context-length {options.max_length}; the workload's sequences have {case.length} tokens")
    if sequences < case.wanted * (1 - ERROR if least else 1):
        problems.append(
            f"{case.wanted} sequences of {case.length} tokens a rank need {gb(needed)}; {gb(left)} are left, "
            f"for {sequences}"
        )
    return Space(held, beside, left, sequences, sequences * case.length, tuple(problems))


def _held(case: Case, left: float) -> tuple[int, float]:
    """Sequences that fit, and the bytes that the wanted ones need."""
    options, cache = case.options, case.cache
    each = cache.sequence(case.length, 1 + options.draft_tokens)
    shared = cache.in_flight(options.in_flight, case.length)
    if options.cache_tokens:
        return options.cache_tokens // case.length, case.wanted * each
    fitting = int(max(0.0, left - shared) // each) if each else options.sequences
    return min(fitting, 1 << 24), shared + case.wanted * each


def _pooled(case: Case) -> bool:
    return case.options.engine == "sglang" and case.cache.window_token > 0


def _sglang_v4(case: Case, left: float) -> tuple[int, float]:
    """SGLang's pools for V4: one for all tokens, one for windows, and state for each request that may run."""
    options, cache = case.options, case.cache
    layers = len(case.traits.layers)
    drafts = (layers + case.traits.draft_layers) / layers if options.draft else 1.0
    token = (cache.token_bytes + options.window_ratio * cache.window_token) * drafts
    fixed = (options.sequences + 1) * cache.compressed_state
    tokens = max(0.0, left - fixed) / token
    if options.cache_tokens:
        tokens = min(tokens, options.cache_tokens)
    window = case.traits.number("sliding_window") + WINDOW_PAGE
    by_window = tokens * options.window_ratio / window
    needed = fixed + case.wanted * max(case.length, window / max(options.window_ratio, 1e-9)) * token
    return int(min(tokens / case.length, by_window)), needed


def with_advice(case: Case) -> Fit:
    """Size one role; where it does not simply fit, say which single change would make it."""
    found = fit(case)
    if found.verdict == "fits":
        return found
    return replace(found, advice=tuple(_advice(case)))


def _advice(case: Case) -> list[str]:
    out = []
    for text, changed in _changes(case):
        result = fit(changed)
        if result.verdict == "fits":
            room = f"leaves {gb(result.space.cache)} for the KV cache, {result.space.sequences} sequences a rank"
            out.append(f"{text}: {room}")
    return out or ["no single change is enough: combine more ranks with fewer batched tokens and sequences"]


def _changes(case: Case) -> Sequence[tuple[str, Case]]:
    options, parallel, out = case.options, case.parallel, []
    for factor in (2, 4, 8):
        more = _wider(parallel, factor)
        if more.world <= max(case.sheet.nvlink_domain, case.sheet.gpus_per_node) and _splits(case, more):
            text = f"more ranks: {parallel.world} to {more.world} GPUs a replica"
            out.append((text, replace(case, parallel=more)))
    name = "max-num-batched-tokens" if options.engine == "vllm" else "chunked-prefill-size"
    for tokens in (options.batched // 2, options.batched // 4, 1024, 512, 256):
        if 0 < tokens < options.batched:
            shown = tokens if options.engine == "vllm" else tokens * parallel.data
            mega = min(options.mega_tokens, tokens)
            changed = options.with_(batched=tokens, mega_tokens=mega)
            out.append((f"smaller steps: {name} {shown}", replace(case, options=changed)))
    if options.engine == "vllm" and options.concurrent_batches > parallel.pipeline:
        changed = options.with_(concurrent_batches=parallel.pipeline)
        out.append(("async-scheduling false: one batch less in flight", replace(case, options=changed)))
    name = "gpu-memory-utilization" if options.engine == "vllm" else "mem-fraction-static"
    for share in (0.94, 0.9, 0.85, 0.8):
        if abs(share - options.utilisation) > 0.005 and case.sheet.compute_capability is not None:
            out.append((f"{name} {share:g}", replace(case, options=options.with_(utilisation=share))))
    for format in ("nvfp4", "mxfp4"):
        wide = [w for w in case.weights if "experts" in w.name and w.format not in ("nvfp4", "mxfp4", "int4")]
        if wide:
            swapped = tuple(replace(w, format=format) if w in wide else w for w in case.weights)
            out.append((f"experts in {format} instead of {wide[0].format}", replace(case, weights=swapped)))
    sequences = fit(case).space.sequences
    if 0 < sequences < case.wanted:
        name = "max-num-seqs" if options.engine == "vllm" else "max-running-requests"
        shown = sequences if options.engine == "vllm" else sequences * parallel.data
        out.append((f"fewer at once: {name} {shown}", replace(case, options=options.with_(sequences=sequences))))
    if options.max_length > 2 * case.length and options.engine == "vllm":
        changed = options.with_(max_length=case.length + 256)
        out.append((f"max-model-len {changed.max_length}", replace(case, options=changed)))
    return _first_of_each(case, out)


def _first_of_each(case: Case, changes: list[tuple[str, Case]]) -> list[tuple[str, Case]]:
    """Of each kind of change, the smallest that fits."""
    kept: dict[str, tuple[str, Case]] = {}
    for text, changed in changes:
        kind = text.split(":")[0].rstrip("0123456789. ")
        if kind not in kept and fit(changed).verdict == "fits":
            kept[kind] = (text, changed)
    return list(kept.values())


def _wider(parallel: Parallel, factor: int) -> Parallel:
    tensor, data = parallel.tensor, parallel.data
    if data > 1:
        data *= factor
    else:
        tensor *= factor
    expert = tensor * data if parallel.expert > 1 else 1
    return Parallel(tensor=tensor, data=data, expert=expert, pipeline=parallel.pipeline, context=parallel.context)


def _splits(case: Case, parallel: Parallel) -> bool:
    traits = case.traits
    if traits.heads % parallel.tensor:
        return False
    return parallel.expert == 1 or not traits.experts or traits.experts % parallel.expert == 0


def gb(size: float) -> str:
    """Bytes in GB and GiB."""
    return f"{size / 1e9:.1f} GB ({size / 2**30:.1f} GiB)"
