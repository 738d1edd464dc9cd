"""One valid file of each kind that a catalogue holds, with everything that it may say."""

from __future__ import annotations

from typing import Any

SOURCE = {"what": "a page", "url": "https://example.org/page", "date": "2026-08-01"}
RECIPE: dict[str, Any] = {
    "schema": "fourfold/recipe/1",
    "id": "r/full",
    "title": "all that a recipe may say",
    "model": "m",
    "hardware": "h",
    "workload": {
        "kind": "fixed",
        "input_tokens": 8192,
        "output_tokens": 1024,
        "concurrency": 64,
        "slo": {"tokens_per_second_user": 50.0, "ttft_seconds": 2.0},
    },
    "engines": {
        "vllm": {
            "versions": ">=0.32,<0.34",
            "image": "vllm/vllm-openai:v0.32.0",
            "args": {"max-model-len": 16384, "kv-transfer-config": {"kv_connector": "NixlConnector"}},
            "env": {"NCCL_CUMEM_ENABLE": 1},
            "router": {"kind": "vllm-router", "args": {"policy": "cache_aware"}},
            "fourfold": {"quant": {"scales": "sweep"}, "mtp": {"hybrid": {"min_match": 4}}},
            "roles": {
                "prefill": {"replicas": 2, "parallel": {"data": 4, "expert": 4}, "args": {"max-num-seqs": 16}},
                "decode": {
                    "replicas": 1,
                    "parallel": {"tensor": 4, "data": 2, "expert": 8, "pipeline": 1, "context": 2},
                    "env": {"UCX_TLS": "cuda_ipc,tcp"},
                },
            },
        },
        "sglang": {
            "versions": "==0.5.23",
            "args": {"mem-fraction-static": 0.9},
            "roles": {"aggregated": {"parallel": {"tensor": 4}, "args": {"max-running-requests": 256}}},
        },
    },
    "speculation": {
        "method": "mtp",
        "tokens": 2,
        "draft_model": "org/draft",
        "acceptance": {"length": 2.27, "dataset": "coding", "mode": "thinking", "source": SOURCE, "synthetic": False},
    },
    "evidence": [
        {
            "metric": "dollars_per_million_total_tokens",
            "value": 0.12,
            "engine": "vllm 0.32",
            "at": "8k/1k, 27 tokens/s for each user",
            "source": SOURCE,
            "prices": "p",
            "synthetic_acceptance": False,
            "mixes": ["MTP", "kernels"],
        }
    ],
    "known_issues": [{"id": "oom", "what": "no memory", "workaround": "fewer tokens", "source": SOURCE}],
    "rehearsal": {"proxy": "m", "substitutions": {"moe-backend": None, "dtype": "float32"}, "reason": "no GPU"},
    "notes": ["a note"],
}
CARD: dict[str, Any] = {
    "schema": "fourfold/model/1",
    "id": "m",
    "repo": "org/model",
    "revision": "0366e4e",
    "released": "2026-04-24",
    "license": "MIT",
    "config": "m.json",
    "config_source": SOURCE,
    "total_parameters": 1600.0,
    "active_parameters": 48.8,
    "published_bytes": 865000000000,
    "draft": "mtp",
    "formats": {"experts": "mxfp4"},
    "sources": [SOURCE],
    "notes": ["a note"],
}
SHEET: dict[str, Any] = {
    "schema": "fourfold/hardware/1",
    "id": "h",
    "gpu": "GB300",
    "compute_capability": "10.3",
    "gpus_per_node": 4,
    "nvlink_domain": 72,
    "memory_bytes": 298013687808,
    "memory_bandwidth": 8.0e12,
    "peak_flops": {"fp4": 1.5e16, "bf16": 2.5e15},
    "nvlink_bandwidth": 9.0e11,
    "network_bandwidth": 1.0e11,
    "power_kilowatts": 2.1,
    "sources": [SOURCE],
}
PRICES: dict[str, Any] = {
    "schema": "fourfold/prices/1",
    "id": "p",
    "what": "rent",
    "gpu_hour": {"h": 2.652},
    "sources": [SOURCE],
}
GOOD = {"r/full.yaml": RECIPE, "models/m.yaml": CARD, "hardware/h.yaml": SHEET, "prices/p.yaml": PRICES}
KIND = {"r/full.yaml": "recipe", "models/m.yaml": "card", "hardware/h.yaml": "sheet", "prices/p.yaml": "prices"}
# Mappings whose keys are free, and values that any type may be.
FREE = ("args", "env", "substitutions", "formats", "gpu_hour", "kv-transfer-config")
