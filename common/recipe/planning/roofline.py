"""Time of one step of a model on one layout: memory and compute roofs, collectives, and a latency for each layer.

A step reads the rank's weights once (of experts, those that any token of the group meets), reads what attention looks
at, multiplies, exchanges tokens, and pays a fixed time for each layer. Three efficiencies are calibrated (`calibrate`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from fourfold.common.recipe.schema import HardwareSheet, Parallel
from fourfold.common.recipe.sizing.cache import CacheFormat, cache_of
from fourfold.common.recipe.sizing.formats import COMPUTE
from fourfold.common.recipe.sizing.sharding import DRAFTS, share
from fourfold.common.recipe.sizing.traits import Traits
from fourfold.common.recipe.sizing.weights import Weight

FALLBACK = {"fp4": ("fp4", "fp8", "bf16"), "fp8": ("fp8", "bf16"), "bf16": ("bf16",)}
DISPATCH, COMBINE = 1, 2  # bytes of a value sent to an expert (FP8) and back (BF16)


@dataclass(frozen=True)
class Calibration:
    """Attributes:
    latency: seconds of a layer that neither roof explains.
    bandwidth: share of a memory's or a link's peak that is reached.
    compute: share of the peak of matrix units that is reached.
    """

    latency: float
    bandwidth: float
    compute: float


@dataclass(frozen=True)
class Load:
    """What one rank does of a part in a step: bytes of weights, and operations for one token by dtype."""

    bytes: float
    operations: dict[str, float]


class Machine:
    """A model on a layout of one kind of hardware."""

    def __init__(
        self, traits: Traits, weights: Sequence[Weight], parallel: Parallel, sheet: HardwareSheet, engine: str = "vllm"
    ) -> None:
        self.traits, self.parallel, self.sheet = traits, parallel, sheet
        self.main = [w for w in weights if w.part not in (*DRAFTS, "vision encoder", "embeddings", "Engram")]
        self.draft = [w for w in weights if w.part in DRAFTS]
        kv = "fp8" if sheet.compute_capability else "auto"
        self.cache = cache_of(traits, parallel, CacheFormat(kv, "mxfp4" if traits.count("v4") else "fp8"), engine)

    @cached_property
    def _loads(self) -> dict[str, Load]:
        return {"dense": self._load(False, self.main), "experts": self._load(True, self.main)}

    @cached_property
    def _draft_loads(self) -> dict[str, Load]:
        return {"dense": self._load(False, self.draft), "experts": self._load(True, self.draft)}

    def _load(self, experts: bool, weights: Sequence[Weight]) -> Load:
        bytes_, operations = 0.0, defaultdict(float)
        for weight in weights:
            if (weight.shard == "experts") != experts:
                continue
            part = share(weight, self.parallel, self.traits)
            bytes_ += weight.bytes * part
            # A token's experts are anywhere in the group: a rank computes its share of all tokens of the group.
            ranks = self.parallel.tensor * self.parallel.data
            mine = 1 / ranks if experts else part
            operations[COMPUTE.get(weight.format, "bf16")] += 2 * weight.parameters * weight.active * mine
        return Load(bytes_, dict(operations))

    def step(self, by: Calibration, tokens: float, sequences: float, context: float, draft: bool = False) -> float:
        """Seconds of a step with ``tokens`` tokens of ``sequences`` sequences on each data-parallel rank."""
        t, loads = self.traits, self._draft_loads if draft else self._loads
        layers = max(1, t.draft_layers) if draft and t.dspark else 1 if draft else len(t.layers)
        group = tokens * self.parallel.data
        met = 1.0
        count = t.draft_experts if draft else t.experts
        if count:
            met = 1 - (1 - min(1.0, t.top_k / count)) ** group
        dense, experts = loads["dense"], loads["experts"]
        seconds = max(self._read(by, dense.bytes), self._compute(by, dense.operations, tokens))
        seconds += max(self._read(by, experts.bytes * met), self._compute(by, experts.operations, group))
        if not draft:
            seconds += max(
                self._read(by, sequences * self._attended(context)),
                tokens * self._attention_operations(context) / (self._peak("bf16") * by.compute),
            )
        seconds += layers * (self._exchange(by, tokens) + by.latency)
        return seconds

    def _read(self, by: Calibration, size: float) -> float:
        return size / (self.sheet.memory_bandwidth * by.bandwidth)

    def _peak(self, dtype: str) -> float:
        peaks = {str(name): rate for name, rate in self.sheet.peak_flops.items()}
        return next((peaks[name] for name in FALLBACK[dtype] if name in peaks), min(peaks.values()))

    def _compute(self, by: Calibration, operations: dict[str, float], tokens: float) -> float:
        return sum(tokens * count / (self._peak(dtype) * by.compute) for dtype, count in operations.items())

    def _link(self, ranks: int) -> float:
        inside = ranks <= max(self.sheet.nvlink_domain, 1) and self.sheet.nvlink_bandwidth > 0
        return self.sheet.nvlink_bandwidth if inside else self.sheet.network_bandwidth

    def _exchange(self, by: Calibration, tokens: float) -> float:
        """Collectives of one layer: two all-reduces over tensor ranks, or dispatch and combine over expert ranks."""
        t, p = self.traits, self.parallel
        seconds = 0.0
        if p.tensor > 1:
            sent = 2 * 2 * tokens * t.hidden * 2 * (p.tensor - 1) / p.tensor
            seconds += sent / (self._link(p.tensor) * by.bandwidth)
        if p.data > 1 and t.experts:
            ranks = p.tensor * p.data
            away = min(t.top_k, ranks) * (ranks - 1) / ranks
            sent = tokens / p.tensor * away * t.expert_hidden * (DISPATCH + COMBINE)
            seconds += sent / (self._link(ranks) * by.bandwidth)
        return seconds

    def _attended(self, context: float) -> float:
        """Bytes of cache that one sequence's step reads."""
        t = self.traits
        selected = t.number("index_topk")
        reads = self.cache.sequence_bytes
        for part, size in self.cache.per_token.items():
            sparse = selected and ("compressed by 4" in part or "latents" in part)
            reads += size * (min(context, selected * (4 if "by 4" in part else 1)) if sparse else context)
        return reads

    def _attention_operations(self, context: float) -> float:
        """Operations of attention itself for one token at ``context`` tokens, on one rank."""
        t, total = self.traits, 0.0
        heads = t.heads / self.parallel.tensor
        selected = t.number("index_topk")
        for layer in t.layers:
            if layer.mixer == "v4":
                seen = layer.window + (context / layer.ratio if layer.ratio else 0)
                if layer.indexer and selected:
                    seen = min(seen, layer.window + selected)
                total += 4 * heads * t.head_dim * seen
            elif layer.mixer == "mla":
                seen = min(context, selected) if selected else context
                width = t.number("qk_nope_head_dim", 128) + t.number("qk_rope_head_dim") + t.number("v_head_dim")
                total += 2 * heads * width * seen
            elif layer.mixer == "gqa":
                total += 4 * heads * t.head_dim * min(context, layer.window or context)
            if layer.indexer and selected:
                total += 2 * t.number("index_n_heads") * t.number("index_head_dim") * context / max(layer.ratio, 1)
        return total
