"""What ``fourfold bench mtp`` measures, and how each configuration is started: the engines' flags and variables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold.common.bench.mtp_rows import ADAPTIVE, ENGINE, HYBRID, NONE, STOCK, target_of
from fourfold.common.bench.prompts import PROMPTS
from fourfold.common.mtp.engines import WORDS
from fourfold.common.settings import ALGORITHM, METHOD

SCHEDULER = "fourfold.vllm_ext.mtp_scheduler.AdaptiveScheduler"
ADAPTIVE_WORKER = "fourfold.vllm_ext.adaptive_worker.AdaptiveWorker"
WORKER = "fourfold.vllm_ext.hybrid_worker.HybridWorker"
PROMPT_TOKENS = 400  # the longest prompt, with its template
BLOCK = 32  # tokens of vLLM's cached blocks; the default of CPUs, 128, would cache no prompt of a chat
CACHE = 4096  # tokens that SGLang caches beyond those of running requests: all prompts


@dataclass(frozen=True)
class Configuration:
    """One server: whose weights, and what drafts."""

    weights: str
    name: str

    @property
    def label(self) -> str:
        return f"{self.weights} {self.name}"


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        engine: vllm or sglang.
        draft: directory that `fourfold mtp extract` wrote for it.
        lengths: fixed draft lengths; the learned one goes up to the largest.
        hybrid: longest draft from the text, and of the head where the text has none.
        requests: answered in a turn beyond those in flight; None: as many as are in flight, 7 at least.
        eager: vLLM without compilation.
    """

    engine: str
    model: Path
    draft: Path
    batches: Sequence[int]
    kinds: Sequence[str]
    lengths: Sequence[int]
    hybrid: tuple[int, int]
    tokens: int
    rounds: int
    requests: int | None
    eager: bool

    def count(self, batch: int) -> int:
        """Requests of a turn."""
        return batch + (max(7, batch) if self.requests is None else self.requests)

    def prompts(self) -> list[str]:
        """All that the turns ask."""
        used = max(self.rounds * self.count(batch) for batch in self.batches)
        return [prompt for kind in self.kinds for prompt in PROMPTS[kind][:used]]

    @property
    def _longest(self) -> int:
        return PROMPT_TOKENS + self.tokens + max(*self.hybrid, *self.lengths) + 1

    def arguments(self, configuration: Configuration) -> list[str]:
        """The engine's, as on its command line."""
        return self._sglang(configuration) if self.engine == "sglang" else self._vllm(configuration)

    def environment(self, configuration: Configuration) -> dict[str, str]:
        """Variables of the server."""
        if configuration.name == STOCK:
            return {"FOURFOLD_DISABLE": "1"}
        if self.engine == "vllm":
            return {}
        settings = {ADAPTIVE: {"enabled": False}, HYBRID: self._hybrid}.get(configuration.name)
        return {"FOURFOLD_CONFIG": json.dumps({"mtp": {"hybrid": settings}})} if settings else {}

    @property
    def _hybrid(self) -> dict[str, Any]:
        text, head = self.hybrid
        return {"max_draft": text, "head_tokens": head}

    def _vllm(self, configuration: Configuration) -> list[str]:
        slots = max(self.batches)
        args = ["--dtype", "bfloat16", "--max-model-len", str(self._longest), "--max-num-seqs", str(slots)]
        args += ["--max-num-batched-tokens", "1024", "--enable-prefix-caching", "--block-size", str(BLOCK)]
        if self.eager:
            args.append("--enforce-eager")
        if target_of(configuration.weights) == "nvfp4":
            args += ["--quantization", METHOD]
        name = configuration.name
        if name in (NONE, STOCK):
            return args
        speculative: dict[str, Any] = {"method": "mtp", "model": str(self.draft), "use_local_argmax_reduction": True}
        # Else vLLM reads the last cached block of each prompt again, which a chat's prompts have one of.
        speculative["disable_eagle_block_drop"] = True
        if configuration.weights == "nvfp4":  # a draft directory does not inherit the target's
            speculative["quantization"] = METHOD
        if name == HYBRID:
            speculative["num_speculative_tokens"] = max(self.hybrid)
            options = {"fourfold": {"mtp": {"hybrid": self._hybrid}}}
            args += ["--worker-cls", WORKER, "--no-async-scheduling", "--additional-config", json.dumps(options)]
        elif name == ADAPTIVE:
            speculative["num_speculative_tokens"] = k = max(self.lengths)
            speculative["num_speculative_tokens_per_batch_size"] = [[1, slots, k]]
            args += ["--scheduler-cls", SCHEDULER, "--worker-cls", ADAPTIVE_WORKER]
        else:
            speculative["num_speculative_tokens"] = int(name.removeprefix("k="))
        return [*args, "--speculative-config", json.dumps(speculative)]

    def _sglang(self, configuration: Configuration) -> list[str]:
        slots = max(self.batches)
        args = ["--dtype", "bfloat16", "--context-length", str(self._longest), "--max-running-requests", str(slots)]
        args += ["--max-total-tokens", str(slots * self._longest + CACHE), "--enable-metrics"]
        if target_of(configuration.weights) == "nvfp4":
            args += ["--quantization", METHOD]
        name = configuration.name
        if name == NONE:
            return args
        steps = {ADAPTIVE: max(self.lengths), HYBRID: max(self.hybrid)}.get(name)
        args += ["--speculative-algorithm", ALGORITHM if steps else "EAGLE", "--speculative-eagle-topk", "1"]
        args += ["--speculative-draft-model-path", str(self.draft)]
        if (self.draft / WORDS).exists():
            args += ["--speculative-token-map", str(self.draft / WORDS)]
        # A draft directory does not inherit the target's.
        if configuration.weights == "nvfp4":
            args += ["--speculative-draft-model-quantization", METHOD]
        if name == ENGINE:  # with SGLang's own lengths and their start
            return [*args, "--speculative-adaptive"]
        steps = steps or int(name.removeprefix("k="))
        return [*args, "--speculative-num-steps", str(steps), "--speculative-num-draft-tokens", str(steps + 1)]
