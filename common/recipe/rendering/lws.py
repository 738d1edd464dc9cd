"""Target ``lws``: a LeaderWorkerSet for each role, a Deployment for the router, their Services and a ComputeDomain.

Fields: leaderworkerset.x-k8s.io/v1 (github.com/kubernetes-sigs/lws, config/crd/bases) and resource.nvidia.com/v1beta1
(NVIDIA's DRA driver).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fourfold.common.recipe.rendering import kubernetes as k8s
from fourfold.common.recipe.rendering.layout import (
    ROUTER_PORT,
    Layout,
    Process,
    Rendered,
    fourfold_notes,
    router_command,
    router_notes,
)

VARIABLES = {"head": "LWS_LEADER_ADDRESS", "host": "POD_IP", "rank": "LWS_WORKER_INDEX"}
RANK = "\0rank\0"
# The index times a number, which Kubernetes cannot compute; the words after it are the command, whole.
OFFSET = 'exec "$@" --data-parallel-start-rank "$((LWS_WORKER_INDEX * {local}))"'


def lws(of: Layout) -> Rendered:
    """Manifests for kubectl."""
    documents = k8s.compute_domain(of)
    for role in of.plan.roles:
        documents.append(leader_worker_set(of, role, f"{of.name}-{role}", k8s.labels(of, role)))
        head = of.serving(role)[0]
        documents.append(_service(of, role, head.start.port))
        if of.role(role).replicas > 1:
            documents += [_replica_service(of, role, r, head.start.port) for r in range(of.role(role).replicas)]
    router = router_command(of, lambda process: service_name(of, process))
    if router is not None:
        documents += _router(of, router)
    notes = k8s.notes(of) + fourfold_notes(of) + router_notes(of, "lws")
    return Rendered({f"{of.name}.yaml": k8s.dump(documents, of.title)}, notes)


def leader_worker_set(of: Layout, role: str, name: str, labels: Mapping[str, str]) -> dict[str, Any]:
    """The LeaderWorkerSet of a role: a group of pods for each replica."""
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": name, "labels": dict(labels)},
        "spec": group_spec(of, role, labels),
    }


def group_spec(of: Layout, role: str, labels: Mapping[str, str]) -> dict[str, Any]:
    """``spec`` of a LeaderWorkerSet."""
    processes = [p for p in of.processes if p.start.role == role and p.start.replica == 0]
    template: dict[str, Any] = {"size": len(processes), "restartPolicy": "RecreateGroupOnPodRestart"}
    head = k8s.pod(of, processes[0], k8s.container(of, processes[0], VARIABLES, command(of, processes[0])), labels)
    if len(processes) > 1:
        template["leaderTemplate"] = head
        worker = processes[1]
        made = k8s.container(of, worker, VARIABLES, command(of, worker))
        template["workerTemplate"] = k8s.pod(of, worker, made, labels)
    else:
        template["workerTemplate"] = head
    return {"replicas": of.role(role).replicas, "leaderWorkerTemplate": template}


def command(of: Layout, process: Process) -> list[str]:
    """The container's command; of a worker one that is right for every worker of the group."""
    start = process.start
    options = dict(start.options)
    offset = None
    if start.node:
        if "node-rank" in options:
            options["node-rank"] = RANK
        if "data-parallel-start-rank" in options:
            offset = options.pop("data-parallel-start-rank") // start.node
    words = replace(start, options=options, model=of.model).command
    out = [k8s.text("python3" if i == 0 and word == "python" else word, VARIABLES) for i, word in enumerate(words)]
    return out if offset is None else ["sh", "-c", OFFSET.format(local=offset).replace("$", "$$"), "sh", *out]


def service_name(of: Layout, process: Process) -> str:
    """The Service of one replica."""
    role = process.start.role
    one = of.role(role).replicas == 1
    return f"{of.name}-{role}" if one else f"{of.name}-{role}-{process.start.replica}"


def _service(of: Layout, role: str, port: int) -> dict[str, Any]:
    """All replicas of a role; only the leader of a group answers."""
    selector = {k8s.GROUP_NAME: f"{of.name}-{role}", "leaderworkerset.sigs.k8s.io/worker-index": "0"}
    one = of.role(role).replicas == 1
    return k8s.service(f"{of.name}-{role}" if one else f"{of.name}-{role}-all", selector, port, port)


def _replica_service(of: Layout, role: str, replica: int, port: int) -> dict[str, Any]:
    selector = {
        k8s.GROUP_NAME: f"{of.name}-{role}",
        "leaderworkerset.sigs.k8s.io/group-index": str(replica),
        "leaderworkerset.sigs.k8s.io/worker-index": "0",
    }
    return k8s.service(f"{of.name}-{role}-{replica}", selector, port, port)


def _router(of: Layout, router: list[str]) -> list[dict[str, Any]]:
    """A Deployment and its Service. No image of the router is known to us: the engine's image installs it."""
    package = "vllm-router" if router[0] == "vllm-router" else "sglang-router"
    labels = {"app": f"{of.name}-router"}  # not those of the servers, which look for each other's clique
    words = [k8s.text(word, VARIABLES) for word in router]
    script = f'pip install --quiet {package} && exec "$@"'
    made = {
        "name": "router",
        "image": of.image,
        "command": ["sh", "-c", script.replace("$", "$$"), "sh", *words],
        "ports": [{"name": "http", "containerPort": ROUTER_PORT}],
        **k8s.probes(ROUTER_PORT),
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": f"{of.name}-router", "labels": labels},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [made]}},
        },
    }
    return [deployment, k8s.service(f"{of.name}-router", labels, 80, ROUTER_PORT)]
