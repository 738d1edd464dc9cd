"""Target ``dynamo``: a DynamoGraphDeployment and, where NVLink joins machines, a ComputeDomain.

Fields: nvidia.com/v1alpha1 (github.com/ai-dynamo/dynamo, deploy/operator/config/crd/bases); newer operators convert it
to v1beta1. The operator adds addresses and ranks of the nodes of a replica, so they are left out here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fourfold.common.recipe.rendering import kubernetes as k8s
from fourfold.common.recipe.rendering.layout import BOOT_SECONDS, Layout, Process, Rendered, fourfold_notes

VERSION = "1.6.1"  # of ai-dynamo's runtime images
SYSTEM_PORT = 9090  # where a worker of Dynamo answers its health check
# What the operator or Dynamo's own worker sets.
OPERATORS = frozenset(
    "host port nnodes node-rank master-addr master-port headless dist-init-addr data-parallel-size-local "
    "data-parallel-address data-parallel-rpc-port data-parallel-start-rank".split()
)
# Grove, below the operator, takes 45 characters for the names of graph, service and service-ldr together. Newer
# operators cut the graph's name to fit; older ones refuse it.
NAME = 45 - len("prefill") - len("prefill-ldr")
OWN_ENV = frozenset({"VLLM_NIXL_SIDE_CHANNEL_HOST"})  # the operator's, from the pod's address


def dynamo(of: Layout) -> Rendered:
    """Manifests for kubectl."""
    image = f"nvcr.io/nvidia/ai-dynamo/{of.engine}-runtime:{VERSION}"
    services: dict[str, Any] = {
        "Frontend": {
            "componentType": "frontend",
            "replicas": 1,
            "extraPodSpec": {"mainContainer": {"image": image}},
        }
    }
    for role in of.plan.roles:
        services["worker" if role == "aggregated" else role] = _service(of, role, image)
    graph = {
        "apiVersion": "nvidia.com/v1alpha1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": of.short(NAME)},
        "spec": {"backendFramework": of.engine, "services": services},
    }
    notes = [f"{image} brings its own {of.engine}: see that its version is in {of.plan.versions}"]
    notes += [note for note in k8s.notes(of) if not note.startswith("the recipe names no image")]
    if any(process.start.nodes > 1 for process in of.processes):
        notes.append(
            "the operator adds addresses and ranks of a replica's nodes; some of its versions do so in a shell"
        )
    notes += [note.replace(of.image, image) for note in fourfold_notes(of)]
    return Rendered({f"{of.name}.yaml": k8s.dump([*k8s.compute_domain(of), graph], of.title)}, notes)


def _service(of: Layout, role: str, image: str) -> dict[str, Any]:
    process = of.serving(role)[0]
    start = process.start
    made = k8s.container(of, process, {"host": "POD_IP"}, _command(of, process))
    for own in ("name", "resources", "ports", "volumeMounts", "livenessProbe", "readinessProbe"):
        made.pop(own, None)  # the operator's
    made["image"] = image
    made["command"], made["args"] = made["command"][:3], made["command"][3:]
    made["env"] = [variable for variable in made["env"] if variable["name"] not in OWN_ENV]
    made["startupProbe"] = {
        "httpGet": {"path": "/health", "port": SYSTEM_PORT},
        "periodSeconds": 10,
        "timeoutSeconds": 10,
        "failureThreshold": BOOT_SECONDS // 10,
    }
    extra: dict[str, Any] = {"mainContainer": made}
    near = k8s.affinity(of, process)
    if near:
        extra["affinity"] = near
    out: dict[str, Any] = {"componentType": "worker"}
    if role != "aggregated":
        out["subComponentType"] = role
    out["replicas"] = of.role(role).replicas
    if start.nodes > 1:
        out["multinode"] = {"nodeCount": start.nodes}
    out["extraPodMetadata"] = {"labels": k8s.labels(of, role)}
    resources: dict[str, Any] = {"limits": {"gpu": str(start.gpus)}}
    if of.gpu:
        out["resources"] = resources
        extra["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    if k8s.domain(of):
        resources["claims"] = [{"name": k8s.CHANNEL}]
        extra["resourceClaims"] = [{"name": k8s.CHANNEL, "resourceClaimTemplateName": f"{of.name}-channel"}]
    out["sharedMemory"] = {"size": "64Gi"}
    out["extraPodSpec"] = extra
    return out


def _command(of: Layout, process: Process) -> list[str]:
    start = process.start
    options = {name: value for name, value in start.options.items() if name not in OPERATORS}
    if start.engine == "vllm" and start.role != "aggregated":
        options = {"disaggregation-mode": start.role, **options}
    module = ["python3", "-m", f"dynamo.{of.engine}", "--model" if of.engine == "vllm" else "--model-path", of.model]
    served = [] if "served-model-name" in options else ["--served-model-name", of.model]
    arguments = replace(start, options=options).arguments
    return [k8s.text(word, {}) for word in [*module, *served, *arguments]]
