"""What the manifests of ``fourfold recipe render`` are held to: Kubernetes' own types, and fields of custom resources.

Pods, Deployments and Services are Kubernetes' published types. Of custom resources these are the fields that we write,
named by us after their definitions: a test holds them to the published ones (`published_schemas`) where it has those.
"""

from __future__ import annotations

from typing import Any

from published_schemas import Schema, core, kubernetes

CORE = "io.k8s.api.core.v1"


def closed_object(required: Schema, optional: Schema | None = None) -> Schema:
    """A closed object: Kubernetes drops what it does not know."""
    return {
        "type": "object",
        "required": list(required),
        "properties": required | (optional or {}),
        "additionalProperties": False,
    }


def array(of: Schema) -> Schema:
    return {"type": "array", "items": of, "minItems": 1}


TEXT, NUMBER, ANY = {"type": "string"}, {"type": "integer"}, {}
POD = core(f"{CORE}.PodTemplateSpec")
LABELS = {"type": "object", "additionalProperties": TEXT}
NAMED = closed_object({"name": TEXT})
META = closed_object({"name": TEXT}, {"labels": LABELS})
GROUP = closed_object(
    {
        "replicas": NUMBER,
        "leaderWorkerTemplate": closed_object(
            {"size": NUMBER, "workerTemplate": POD},
            {"leaderTemplate": POD, "restartPolicy": {"const": "RecreateGroupOnPodRestart"}},
        ),
    }
)


def _properties(name: str) -> Schema:
    """The fields of one of Kubernetes' types, to be used outside its file."""
    return {field: {"$ref": f"kubernetes.json#/$defs/{name}/properties/{field}"} for field in _fields(name)}


def _fields(name: str) -> list[str]:
    return list(kubernetes()["$defs"][name]["properties"])


# A pod's specification whose containers are the operator's, with the one that the user gives beside it, unnamed.
DYNAMO_POD = closed_object(
    {"mainContainer": closed_object({"image": TEXT}, _properties(f"{CORE}.Container"))}, _properties(f"{CORE}.PodSpec")
)
DYNAMO = closed_object(
    {"componentType": {"enum": ["frontend", "worker"]}, "replicas": NUMBER, "extraPodSpec": DYNAMO_POD},
    {
        "subComponentType": {"enum": ["prefill", "decode"]},
        "multinode": closed_object({"nodeCount": {"type": "integer", "minimum": 2}}),
        "extraPodMetadata": closed_object({"labels": LABELS}),
        "resources": closed_object({"limits": closed_object({"gpu": TEXT})}, {"claims": array(NAMED)}),
        "sharedMemory": closed_object({"size": TEXT}),
    },
)
PORT = closed_object({"number": {"type": "integer", "minimum": 1, "maximum": 65535}})
SPECS: dict[tuple[str, str], Schema] = {
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): GROUP,
    ("disaggregatedset.x-k8s.io/v1", "DisaggregatedSet"): closed_object(
        {"roles": array(closed_object({"name": TEXT, "spec": GROUP}, {"metadata": closed_object({"labels": LABELS})}))}
    ),
    ("resource.nvidia.com/v1beta1", "ComputeDomain"): closed_object(
        {"numNodes": NUMBER, "channel": closed_object({"resourceClaimTemplate": NAMED})}
    ),
    ("nvidia.com/v1alpha1", "DynamoGraphDeployment"): closed_object(
        {"services": {"type": "object", "additionalProperties": DYNAMO}},
        {"backendFramework": {"enum": ["vllm", "sglang"]}},
    ),
    ("inference.networking.k8s.io/v1", "InferencePool"): closed_object(
        {
            "selector": closed_object({"matchLabels": LABELS}),
            "targetPorts": array(PORT),
            "endpointPickerRef": closed_object({"name": TEXT, "port": PORT}),
        }
    ),
}
KINDS: dict[tuple[str, str], Schema] = {
    ("apps/v1", "Deployment"): core("io.k8s.api.apps.v1.Deployment"),
    ("v1", "Service"): core(f"{CORE}.Service"),
} | {
    (version, kind): closed_object(
        {"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": META, "spec": spec}
    )
    for (version, kind), spec in SPECS.items()
}


def beyond(ours: Schema, theirs: Schema, at: str = "") -> list[str]:
    """Fields that ours has and theirs does not know, and fields that theirs requires and ours does not."""
    if "$ref" in ours or not theirs:
        return []
    if "anyOf" in theirs:  # a value or null
        theirs = theirs["anyOf"][0]
    out: list[str] = []
    if "properties" in ours:
        known: dict[str, Any] = theirs.get("properties", {})
        for name, inner in ours["properties"].items():
            if name in known:
                out += beyond(inner, known[name], f"{at}.{name}")
            elif "/properties/" not in inner.get("$ref", ""):  # a pod's field may be newer than theirs is
                out.append(f"{at}.{name}: unknown")
        out += [f"{at}.{name}: required" for name in theirs.get("required", []) if name not in ours["required"]]
    for key in ("items", "additionalProperties"):
        if isinstance(ours.get(key), dict) and isinstance(theirs.get(key), dict):
            out += beyond(ours[key], theirs[key], f"{at}[]")
    return out


# --- srtctl

SRTCTL = closed_object(
    {
        "name": TEXT,
        "model": closed_object(
            {"path": TEXT, "container": TEXT, "precision": {"enum": ["fp4", "fp8", "fp16", "bf16"]}}
        ),
        "resources": {
            "type": "object",
            "required": ["gpu_type", "gpus_per_node"],
            "properties": {"gpu_type": TEXT},
            "additionalProperties": NUMBER,
        },
        "backend": {"type": "object", "required": ["type"]},
    },
    {
        "identity": ANY,
        "frontend": closed_object(
            {"type": {"enum": ["dynamo", "sglang", "vllm"]}}, {"enable_multiple_frontends": {"const": False}}
        ),
        "health_check": closed_object({"max_attempts": NUMBER, "interval_seconds": NUMBER}),
        "benchmark": {"type": "object", "required": ["type"]},
        "setup_script": TEXT,
    },
)
