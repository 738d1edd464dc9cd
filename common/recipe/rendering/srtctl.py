"""Target ``srtctl``: one YAML file of NVIDIA's srt-slurm, which allocates nodes and derives addresses and ranks itself.

Fields: github.com/NVIDIA/srt-slurm, src/srtctl/core/schema.py and src/srtctl/backends.
"""

from __future__ import annotations

import json
import re
from typing import Any

from fourfold.common.recipe.rendering import kubernetes as k8s
from fourfold.common.recipe.rendering.dynamo import OPERATORS
from fourfold.common.recipe.rendering.layout import (
    BOOT_SECONDS,
    HOST,
    Layout,
    Rendered,
)

SECTIONS = {"prefill": "prefill", "decode": "decode", "aggregated": "agg"}
SETUP = "fourfold-setup.sh"


def srtctl(of: Layout) -> Rendered:
    """A recipe for srtctl."""
    backend: dict[str, Any] = {"type": of.engine}
    if of.engine == "vllm":
        backend["connector"] = None  # the recipe's own kv-transfer-config holds
    settings: dict[str, Any] = {}
    for role in of.plan.roles:
        start = of.serving(role)[0].start
        env = {name: value for name, value in start.env.items() if HOST not in value}
        env.pop("VLLM_NIXL_SIDE_CHANNEL_PORT", None)
        backend[f"{role}_environment"] = env
        settings[role] = _settings(of.engine, start.options)
    backend[f"{of.engine}_config"] = settings
    document: dict[str, Any] = {
        "name": of.name,
        "model": {"path": _model_path(of.model), "container": of.image, "precision": _precision(of.card.formats)},
        "identity": {"model": _identity(of), "container": {"image": of.image}},
        "resources": _resources(of),
        "frontend": _frontend(of),
        "health_check": {"max_attempts": BOOT_SECONDS // 10, "interval_seconds": 10},
        "backend": backend,
        "benchmark": _benchmark(of),
    }
    files, notes = (
        {},
        [f"{of.image} and {document['model']['path']} are what srtslurm.yaml has to know, or aliases of it"],
    )
    if of.uses_fourfold:
        document["setup_script"] = SETUP
        files[SETUP] = "#!/usr/bin/env bash\nset -euo pipefail\npip install --no-cache-dir fourfold\n"
        notes.append(f"put {SETUP} into srtctl's folder configs")
    files[f"{of.name}.yaml"] = k8s.dump([document], of.title)
    return Rendered(files, notes)


def _settings(engine: str, options: Any) -> dict[str, Any]:
    """Options as srtctl turns them into flags: a mapping is JSON text, and false would say nothing."""
    out: dict[str, Any] = {}
    for name, value in options.items():
        if name in OPERATORS:
            continue
        if value is False:
            out[f"no-{name}"] = True
        else:
            out[name] = json.dumps(value) if isinstance(value, dict) else value
    return out


def _model_path(model: str) -> str:
    """A repository as srtctl names it; a path stays."""
    return f"hf:{model}" if re.fullmatch(r"[\w.-]+/[\w.-]+", model) else model


def _identity(of: Layout) -> dict[str, str]:
    return {"repo": of.card.repo} | ({"revision": of.card.revision} if of.card.revision else {})


def _precision(formats: dict[str, str]) -> str:
    """``fp4``, ``fp8`` or ``bf16``, by the experts or what is most of the model."""
    kind = formats.get("experts") or next(iter(formats.values()), "bf16")
    return next((name for name in ("fp4", "fp8", "fp16") if name in kind), "bf16")


def _resources(of: Layout) -> dict[str, Any]:
    per_node = of.sheet.gpus_per_node
    out: dict[str, Any] = {"gpu_type": of.sheet.gpu.lower(), "gpus_per_node": per_node}
    for role, plan in of.plan.roles.items():
        section, world = SECTIONS[role], plan.parallel.world
        out[f"{section}_nodes"] = max(-(-plan.replicas * world // per_node), of.nodes(role) * (world >= per_node))
        out[f"{section}_workers"] = plan.replicas
        out[f"gpus_per_{section}"] = world
    return out


def _frontend(of: Layout) -> dict[str, Any]:
    """srt-slurm's own vLLM front end takes aggregated deployments only, and one of it."""
    named = of.plan.router.kind if of.plan.router else None
    if named == "dynamo" or (of.engine == "vllm" and of.plan.disaggregated):
        return {"type": "dynamo"}
    return {"type": of.engine} | ({"enable_multiple_frontends": False} if of.engine == "vllm" else {})


def _benchmark(of: Layout) -> dict[str, Any]:
    load = of.recipe.workload
    if load.kind != "fixed":
        return {"type": "manual"}
    out: dict[str, Any] = {"type": "sa-bench", "isl": load.input_tokens, "osl": load.output_tokens}
    return out | {"concurrencies": str(load.concurrency or 1), "req_rate": "inf"}
