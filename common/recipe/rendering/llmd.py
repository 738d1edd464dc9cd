"""Target ``llm-d``: a DisaggregatedSet, or a LeaderWorkerSet, and the InferencePool that llm-d's router picks from.

Fields: disaggregatedset.x-k8s.io/v1 and leaderworkerset.x-k8s.io/v1 (github.com/kubernetes-sigs/lws), InferencePool of
inference.networking.k8s.io/v1 (Gateway API Inference Extension); labels and sidecar as llm-d's guide wide-ep-lws has
them. The endpoint picker itself comes with llm-d's chart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fourfold.common.recipe.rendering import kubernetes as k8s
from fourfold.common.recipe.rendering.layout import PORT, Layout, Rendered, fourfold_notes
from fourfold.common.recipe.rendering.lws import group_spec, leader_worker_set

SIDECAR = "ghcr.io/llm-d/llm-d-routing-sidecar:v0.7.1"
# The set's LeaderWorkerSets have -0-, 8 digits and the role in their names, and their StatefulSets a group's number.
NAME = 52 - len("-0-12345678-prefill-99")
BEHIND = 8200  # port of a decode server, whose pod answers on `PORT` with the sidecar
CONNECTORS = {"vllm": "nixlv2", "sglang": "sglang"}


def llm_d(of: Layout) -> Rendered:
    """Manifests for kubectl."""
    documents = k8s.compute_domain(of)
    if of.plan.disaggregated:
        documents.append(_disaggregated(of))
    else:
        documents.append(leader_worker_set(of, "aggregated", f"{of.name}-aggregated", _labels(of, "aggregated")))
    documents.append(_pool(of))
    notes = k8s.notes(of) + fourfold_notes(of)
    named = of.plan.router.kind if of.plan.router else "llm-d"
    if named != "llm-d":
        notes.append(f"the recipe's router is {named}; llm-d's endpoint picker chooses here")
    notes.append(f"install llm-d's endpoint picker as the Service {of.name}-epp, and an HTTPRoute to the InferencePool")
    return Rendered({f"{of.name}.yaml": k8s.dump(documents, of.title)}, notes)


def _labels(of: Layout, role: str) -> dict[str, str]:
    serves = {"aggregated": "prefill-decode"}.get(role, role)
    own = {"llm-d.ai/inference-serving": "true", "llm-d.ai/role": serves, "llm-d.ai/model": of.card.id}
    return k8s.labels(of, role) | own


def _disaggregated(of: Layout) -> dict[str, Any]:
    roles = []
    for role in of.plan.roles:
        labels = _labels(of, role)
        spec = _with_sidecar(of, labels) if role == "decode" else group_spec(of, role, labels)
        roles.append({"name": role, "metadata": {"labels": labels}, "spec": spec})
    return {
        "apiVersion": "disaggregatedset.x-k8s.io/v1",
        "kind": "DisaggregatedSet",
        "metadata": {"name": of.short(NAME), "labels": {k8s.DEPLOYMENT: of.name}},
        "spec": {"roles": roles},
    }


def _with_sidecar(of: Layout, labels: Mapping[str, str]) -> dict[str, Any]:
    """The decode role, its servers behind the sidecar that has prefill done elsewhere first."""
    moved = []
    for process in of.processes:
        start = process.start
        if start.role == "decode" and "port" in start.options:
            start = replace(start, options={**start.options, "port": BEHIND}, port=BEHIND)
        moved.append(replace(process, start=start))
    spec = group_spec(replace(of, processes=moved), "decode", labels)
    sidecar = {
        "name": "routing-proxy",
        "image": SIDECAR,
        "args": [
            f"--port={PORT}",
            f"--vllm-port={BEHIND}",
            f"--kv-connector={CONNECTORS[of.engine]}",
            "--secure-proxy=false",
        ],
        "ports": [{"name": "sidecar", "containerPort": PORT}],
        "restartPolicy": "Always",
        "securityContext": {"allowPrivilegeEscalation": False, "runAsNonRoot": True},
    }
    template = spec["leaderWorkerTemplate"]
    leader = template.get("leaderTemplate", template["workerTemplate"])
    leader["spec"]["initContainers"] = [sidecar]
    return spec


def _pool(of: Layout) -> dict[str, Any]:
    """The servers that the endpoint picker chooses from: leaders of all groups."""
    selector = {k8s.DEPLOYMENT: of.name, "leaderworkerset.sigs.k8s.io/worker-index": "0"}
    return {
        "apiVersion": "inference.networking.k8s.io/v1",
        "kind": "InferencePool",
        "metadata": {"name": of.name},
        "spec": {
            "selector": {"matchLabels": selector},
            "targetPorts": [{"number": PORT}],
            "endpointPickerRef": {"name": f"{of.name}-epp", "port": {"number": 9002}},
        },
    }
