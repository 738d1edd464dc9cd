"""What the published schemas of manifests require of what ``fourfold recipe render`` writes, as JSON schemas.

Sources are in the modules of the targets.
"""

from __future__ import annotations

from typing import Any


def closed(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """A closed object: Kubernetes drops what it does not know."""
    return {
        "type": "object",
        "required": list(required),
        "properties": required | (optional or {}),
        "additionalProperties": False,
    }


def array(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of, "minItems": 1}


TEXT, NUMBER, ANY = {"type": "string"}, {"type": "integer"}, {}
DNS = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
LABELS = {"type": "object", "additionalProperties": {"type": "string", "maxLength": 63}}
META = closed({"name": DNS}, {"labels": LABELS})
PROBE = closed(
    {"httpGet": closed({"path": TEXT, "port": NUMBER}), "failureThreshold": NUMBER},
    {"periodSeconds": NUMBER, "timeoutSeconds": NUMBER},
)
ENV = array(closed({"name": TEXT}, {"value": TEXT, "valueFrom": ANY}))
CONTAINER = closed(
    {"name": DNS, "image": TEXT},
    {
        "command": array(TEXT),
        "args": array(TEXT),
        "env": ENV,
        "ports": array(closed({"name": DNS, "containerPort": NUMBER})),
        "startupProbe": PROBE,
        "livenessProbe": PROBE,
        "readinessProbe": PROBE,
        "resources": closed({"limits": ANY}, {"claims": array(closed({"name": DNS}))}),
        "securityContext": ANY,
        "volumeMounts": array(closed({"name": DNS, "mountPath": TEXT})),
        "restartPolicy": {"const": "Always"},
    },
)
SELECTOR = closed({"matchExpressions": array(closed({"key": TEXT, "operator": {"const": "In"}, "values": ANY}))})
TERM = closed({"topologyKey": {"const": "nvidia.com/gpu.clique"}, "labelSelector": SELECTOR}, {"matchLabelKeys": ANY})
AFFINITY = closed({"podAffinity": closed({"requiredDuringSchedulingIgnoredDuringExecution": array(TERM)})})
CLAIMS = array(closed({"name": DNS, "resourceClaimTemplateName": DNS}))
POD = closed(
    {
        "spec": closed(
            {"containers": array(CONTAINER)},
            {
                "affinity": AFFINITY,
                "tolerations": ANY,
                "resourceClaims": CLAIMS,
                "terminationGracePeriodSeconds": NUMBER,
                "volumes": ANY,
                "initContainers": array(CONTAINER),
            },
        )
    },
    {"metadata": closed({"labels": LABELS})},
)
GROUP = closed(
    {
        "replicas": NUMBER,
        "leaderWorkerTemplate": closed(
            {"size": NUMBER, "workerTemplate": POD},
            {"leaderTemplate": POD, "restartPolicy": {"const": "RecreateGroupOnPodRestart"}},
        ),
    }
)
DYNAMO = closed(
    {"componentType": {"enum": ["frontend", "worker"]}, "replicas": NUMBER},
    {
        "subComponentType": {"enum": ["prefill", "decode"]},
        "multinode": closed({"nodeCount": {"type": "integer", "minimum": 2}}),
        "extraPodMetadata": closed({"labels": LABELS}),
        "resources": closed({"limits": closed({"gpu": TEXT})}, {"claims": ANY}),
        "sharedMemory": closed({"size": TEXT}),
        "extraPodSpec": closed(
            {"mainContainer": {**CONTAINER, "required": ["image"]}},
            {"affinity": AFFINITY, "tolerations": ANY, "resourceClaims": CLAIMS},
        ),
    },
)
PORT = closed({"name": DNS, "port": NUMBER, "targetPort": NUMBER})
SPECS: dict[tuple[str, str], dict[str, Any]] = {
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): GROUP,
    ("disaggregatedset.x-k8s.io/v1", "DisaggregatedSet"): closed(
        {"roles": array(closed({"name": DNS, "spec": GROUP}, {"metadata": closed({"labels": LABELS})}))}
    ),
    ("apps/v1", "Deployment"): closed({"selector": ANY, "template": POD}, {"replicas": NUMBER}),
    ("v1", "Service"): closed({"selector": LABELS, "ports": array(PORT)}),
    ("resource.nvidia.com/v1beta1", "ComputeDomain"): closed(
        {"numNodes": NUMBER, "channel": closed({"resourceClaimTemplate": closed({"name": DNS})})}
    ),
    ("nvidia.com/v1alpha1", "DynamoGraphDeployment"): closed(
        {"services": {"type": "object", "additionalProperties": DYNAMO}},
        {"backendFramework": {"enum": ["vllm", "sglang"]}},
    ),
    ("inference.networking.k8s.io/v1", "InferencePool"): closed(
        {
            "selector": closed({"matchLabels": LABELS}),
            "targetPorts": array(closed({"number": NUMBER})),
            "endpointPickerRef": closed({"name": DNS, "port": closed({"number": NUMBER})}),
        }
    ),
}
SRTCTL = closed(
    {
        "name": TEXT,
        "model": closed({"path": TEXT, "container": TEXT, "precision": {"enum": ["fp4", "fp8", "fp16", "bf16"]}}),
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
        "frontend": closed(
            {"type": {"enum": ["dynamo", "sglang", "vllm"]}}, {"enable_multiple_frontends": {"const": False}}
        ),
        "health_check": closed({"max_attempts": NUMBER, "interval_seconds": NUMBER}),
        "benchmark": {"type": "object", "required": ["type"]},
        "setup_script": TEXT,
    },
)
