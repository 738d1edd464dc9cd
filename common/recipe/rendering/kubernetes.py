"""Parts of Kubernetes manifests that several targets share: a pod, its probes, its place in an NVLink domain.

Kubernetes replaces ``$(NAME)`` in commands and values; a ``$`` of a recipe is doubled, which stands for itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from fourfold.common.recipe.launch import Start
from fourfold.common.recipe.rendering.layout import BOOT_SECONDS, Layout, Process

_MARK = re.compile("\0([a-z]+)\0")
CLIQUE = "nvidia.com/gpu.clique"
CHANNEL = "compute-domain-channel"
DEPLOYMENT = "fourfold.dev/deployment"  # label of all pods of a deployment
ROLE = "fourfold.dev/role"
# Labels of the pods of one replica: LeaderWorkerSet's, and that of Grove, below Dynamo. A pod without one ignores it.
REPLICA = ("leaderworkerset.sigs.k8s.io/group-key", "grove.io/podcliquescalinggroup-replica-index")
GROUP_NAME = "leaderworkerset.sigs.k8s.io/name"
Manifest = dict[str, Any]


class _Dumper(yaml.SafeDumper):
    """Plain YAML: what is said twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def text(value: str, variables: Mapping[str, str]) -> str:
    """``value`` as Kubernetes has to read it; a mark becomes a reference to the variable that ``variables`` names."""
    parts = _MARK.split(value)
    return "".join(f"$({variables[p]})" if i % 2 else p.replace("$", "$$") for i, p in enumerate(parts))


def dump(documents: Sequence[Manifest], comment: str) -> str:
    """YAML documents below a comment."""
    body = yaml.dump_all(
        documents, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=10000, allow_unicode=True
    )
    return f"# {comment}\n{body}"


def environment(start: Start, variables: Mapping[str, str]) -> list[Manifest]:
    """Variables of a container; those of a pod's own address first, since later ones refer to them."""
    out: list[Manifest] = [{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]
    token = {"name": "hf-token", "key": "HF_TOKEN", "optional": True}
    out.append({"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": token}})
    return out + [{"name": name, "value": text(value, variables)} for name, value in start.env.items()]


def probes(port: int) -> Manifest:
    """Probes of a server whose first start may take an hour."""
    get = {"path": "/health", "port": port}
    return {
        "startupProbe": {
            "httpGet": get,
            "periodSeconds": 10,
            "timeoutSeconds": 5,
            "failureThreshold": BOOT_SECONDS // 10,
        },
        "livenessProbe": {"httpGet": dict(get), "periodSeconds": 30, "timeoutSeconds": 10, "failureThreshold": 10},
        "readinessProbe": {"httpGet": dict(get), "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 3},
    }


def container(of: Layout, process: Process, variables: Mapping[str, str], command: Sequence[str]) -> Manifest:
    """The engine's container."""
    start = process.start
    out: Manifest = {"name": of.engine, "image": of.image, "command": list(command)}
    out["env"] = environment(start, variables)
    if start.serves:
        out["ports"] = [{"name": "http", "containerPort": start.port}]
        out |= probes(start.port)
    resources: Manifest = {}
    if of.gpu:
        resources = {"limits": {"nvidia.com/gpu": start.gpus}}
        if domain(of):
            resources["claims"] = [{"name": CHANNEL}]
    if resources:
        out["resources"] = resources
    if of.gpu:
        out["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}, {"name": "weights", "mountPath": "/root/.cache/huggingface"}]
    return out | {"volumeMounts": mounts}


def pod(of: Layout, process: Process, made: Manifest, labels: Mapping[str, str]) -> Manifest:
    """A pod template."""
    spec: Manifest = {"containers": [made]}
    near = affinity(of, process)
    if near:
        spec["affinity"] = near
    if of.gpu:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    if domain(of):
        spec["resourceClaims"] = [{"name": CHANNEL, "resourceClaimTemplateName": f"{of.name}-channel"}]
    spec["terminationGracePeriodSeconds"] = 120
    spec["volumes"] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "64Gi"}},
        {"name": "weights", "emptyDir": {}},
    ]
    return {"metadata": {"labels": dict(labels)}, "spec": spec}


def domain(of: Layout) -> bool:
    """Whether pods need a channel of a ComputeDomain: memory that another machine reaches over NVLink."""
    return of.spans or of.one_domain


def affinity(of: Layout, process: Process) -> Manifest | None:
    """Keeps what talks over NVLink in one clique: the whole deployment where it fits, else each replica."""
    selector = [{"key": DEPLOYMENT, "operator": "In", "values": [of.name]}]
    term: Manifest = {"labelSelector": {"matchExpressions": selector}, "topologyKey": CLIQUE}
    if of.spans and process.start.nodes > 1 and not of.one_domain:
        selector.append({"key": ROLE, "operator": "In", "values": [process.start.role]})
        term["matchLabelKeys"] = list(REPLICA)
    elif not of.one_domain:
        return None
    return {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


def compute_domain(of: Layout) -> list[Manifest]:
    """The ComputeDomain of the deployment (NVIDIA's DRA driver), where one is needed."""
    if not domain(of):
        return []
    channel = {"resourceClaimTemplate": {"name": f"{of.name}-channel"}}
    spec = {"numNodes": of.machines, "channel": channel}
    return [
        {
            "apiVersion": "resource.nvidia.com/v1beta1",
            "kind": "ComputeDomain",
            "metadata": {"name": of.name},
            "spec": spec,
        }
    ]


def labels(of: Layout, role: str) -> dict[str, str]:
    """Labels of the pods of a role."""
    return {DEPLOYMENT: of.name, ROLE: role}


def service(name: str, selector: Mapping[str, str], port: int, target: int) -> Manifest:
    """A Service."""
    ports = [{"name": "http", "port": port, "targetPort": target}]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"selector": dict(selector), "ports": ports},
    }


def notes(of: Layout) -> list[str]:
    """What a cluster has to have."""
    out = ["the weights are downloaded into an emptyDir: put a volume that holds them in its place"]
    if domain(of):
        out.append("ComputeDomain needs NVIDIA's DRA driver, and nodes labelled nvidia.com/gpu.clique")
    if of.image != of.plan.image:
        out.append(f"the recipe names no image: {of.image}")
    return out
