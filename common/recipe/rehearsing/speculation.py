"""Speculation of a rehearsal: what drafts in the replica, in place of what the recipe names."""

from __future__ import annotations

import json
from typing import Any

from fourfold.common.recipe.rehearsing.replica import Replica
from fourfold.common.recipe.rehearsing.substitutions import OF_FAMILY, Substitution

MOST = 8  # drafted tokens
TEXT = ("ngram", "suffix", "ngram_gpu")  # drafts from the request's own text, which need no head
SGLANG_KEPT = ("EAGLE", "NEXTN", "FOURFOLD_MTP")


def asked(engine: str, options: dict[str, Any]) -> str | None:
    """The method that the options speculate with; None: they do not."""
    if engine == "vllm":
        config = options.get("speculative-config")
        return str(config.get("method", "unknown")) if isinstance(config, dict) else None
    algorithm = options.get("speculative-algorithm")
    return str(algorithm) if algorithm else None


def needs_head(engine: str, options: dict[str, Any]) -> bool:
    """Whether the replica has to have a head."""
    method = asked(engine, options)
    return method is not None and method.lower() not in TEXT


def without(options: dict[str, Any]) -> dict[str, Any]:
    """The same options without speculation; workers and schedulers that only draft go too."""
    drafting = ("speculative-config", "worker-cls", "scheduler-cls")
    return {n: v for n, v in options.items() if n not in drafting and not n.startswith("speculative-")}


def with_replica(engine: str, options: dict[str, Any], replica: Replica) -> tuple[dict[str, Any], list[Substitution]]:
    """The options with the replica's head, and what was changed for it."""
    if not needs_head(engine, options):
        return options, []
    return (_vllm if engine == "vllm" else _sglang)(dict(options), replica)


def _vllm(options: dict[str, Any], replica: Replica) -> tuple[dict[str, Any], list[Substitution]]:
    given = options["speculative-config"]
    used: dict[str, Any] = {
        "method": "mtp",
        "num_speculative_tokens": min(int(given.get("num_speculative_tokens", 1)), MOST),
    }
    if replica.draft is not None:
        used["model"] = str(replica.draft)
    if "num_speculative_tokens_per_batch_size" in given:
        used["num_speculative_tokens_per_batch_size"] = given["num_speculative_tokens_per_batch_size"]
    backend = OF_FAMILY.get(("vllm", replica.traits.family), {}).get("attention-backend")
    if backend is not None:
        used["attention_backend"] = backend
    if given.get("use_local_argmax_reduction") and replica.draft is not None:
        used["use_local_argmax_reduction"] = True
    options["speculative-config"] = used
    shown = json.loads(json.dumps(used).replace(str(replica.draft), "the replica's head"))
    return options, [] if given == shown else [Substitution("speculative-config", given, shown, _why(given["method"]))]


def _sglang(options: dict[str, Any], replica: Replica) -> tuple[dict[str, Any], list[Substitution]]:
    given = {name: value for name, value in options.items() if name.startswith("speculative-")}
    algorithm = str(given["speculative-algorithm"])
    tokens = given.get("speculative-num-steps", given.get("speculative-dspark-block-size"))  # DSpark drafts its block
    if tokens is None:
        tokens = given.get("speculative-num-draft-tokens", 4) - 1
    steps = max(1, min(int(tokens), MOST))
    used: dict[str, Any] = {
        "speculative-algorithm": algorithm if algorithm in SGLANG_KEPT else "EAGLE",
        "speculative-draft-model-path": str(replica.draft),
        "speculative-num-steps": steps,
    }
    if used["speculative-algorithm"] != "FOURFOLD_MTP":
        used |= {"speculative-eagle-topk": 1, "speculative-num-draft-tokens": steps + 1}
    else:
        kept = ("speculative-eagle-topk", "speculative-num-draft-tokens")
        used |= {name: given[name] for name in kept if name in given}
    options = {name: value for name, value in options.items() if name not in given} | used
    shown = used | {"speculative-draft-model-path": "the replica's head"}
    changed = {name: (given.get(name), shown.get(name)) for name in {**given, **shown}}
    return options, [
        Substitution(name, before, after, _why(algorithm))
        for name, (before, after) in changed.items()
        if before != after
    ]


def _why(method: str) -> str:
    if method.lower() in ("mtp", "eagle", "nextn", "fourfold_mtp", "deepseek_mtp"):
        return "the replica's own MTP head drafts"
    return f"no small head of {method} is made: an MTP head drafts"
