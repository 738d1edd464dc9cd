"""Every manifest of every shipped recipe, by published schemas and by what an API server and controllers check besides.

Kubernetes' own types are always there; those of custom resources and of srtctl are where the cache or GitHub has them.
What they were held to is printed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from manifest_schemas import KINDS, SRTCTL, beyond
from published_schemas import RESOURCES, custom_resource, kubernetes, problems, srtctl_fields

from fourfold.common.recipe.loading import Catalogue
from fourfold.common.recipe.rendering.command import _maker, rendered
from fourfold.common.recipe.rendering.layout import Layout, layout

CATALOGUE = Catalogue([Path(__file__).parent / "golden" / "catalogue"])
Document = dict[str, Any]
WORKERS = "leaderworkerset.sigs.k8s.io"


def parsed(files: dict[str, str]) -> list[Document]:
    (text,) = (text for name, text in files.items() if name.endswith(".yaml"))
    assert "&id" not in text and "!!" not in text
    return list(yaml.load_all(text, Loader=yaml.CSafeLoader))


@pytest.fixture(scope="module")
def everything() -> dict[tuple[str, str, str], list[Document]]:
    """The documents by recipe, engine and target."""
    out: dict[tuple[str, str, str], list[Document]] = {}
    for name in CATALOGUE.recipe_paths:
        for engine in CATALOGUE.recipe(name).engines:
            for target in ("lws", "dynamo", "llm-d", "srtctl"):
                out[name, engine, target] = parsed(rendered(CATALOGUE, name, engine, target).files)
    assert len(out) > 100
    return out


def manifests(everything: dict[tuple[str, str, str], list[Document]]) -> Iterator[tuple[str, list[Document]]]:
    for at, documents in everything.items():
        if at[2] != "srtctl":
            yield " ".join(at), documents


def key(document: Document) -> tuple[str, str]:
    return document["apiVersion"], document["kind"]


def test_every_manifest_has_its_schema(everything: dict, capsys: pytest.CaptureFixture[str]) -> None:
    """All documents of one deployment at once: one that is alike is looked at once."""
    published = {k: custom_resource(k) for k in RESOURCES}
    seen: set[str] = set()
    kinds: set[tuple[str, str]] = set()
    for at, documents in manifests(everything):
        for document in documents:
            kinds.add(key(document))
            if repr(document) in seen:
                continue
            seen.add(repr(document))
            schemas = [KINDS[key(document)], published.get(key(document))]
            assert [p for schema in schemas if schema for p in problems(schema, document)] == [], at
    assert kinds == set(KINDS)
    had = ", ".join(kind for (_, kind), schema in published.items() if schema) or "none"
    with capsys.disabled():
        print(f"\n{len(seen)} documents held to Kubernetes' types; custom resources' published schemas: {had}")


@pytest.mark.parametrize("kind", RESOURCES)
def test_our_fields_are_published(kind: tuple[str, str]) -> None:
    """What we take for a custom resource's fields, by its definition where that can be had; a gap would be seen."""
    ours, published = KINDS[kind], custom_resource(kind)
    if published is not None:
        assert beyond(ours, published) == []
    other = {**ours, "properties": {k: v for k, v in ours["properties"].items() if k != "spec"}, "required": ["status"]}
    assert beyond(ours, other) == [".spec: unknown", ".status: required"]


def test_schemas_refuse_what_an_api_server_drops(everything: dict) -> None:
    """Each schema really refuses: a field that nobody knows, a value of another type, a field left out."""
    found = {key(document): document for _, documents in manifests(everything) for document in documents}
    assert set(found) == set(KINDS)
    for kind, document in found.items():
        for schema in filter(None, (KINDS[kind], custom_resource(kind) if kind in RESOURCES else None)):
            assert problems(schema, document) == []
            assert problems(schema, {**document, "spec": {**document["spec"], "extra": 1}})
            assert problems(schema, {**document, "spec": []})
    container = {"name": "x", "startupProbe": {"httpGet": {"port": 1, "uri": "/"}}}
    assert problems({"$ref": "kubernetes.json#/$defs/io.k8s.api.core.v1.Container"}, container)
    assert problems(KINDS["v1", "Service"], {"spec": {"ports": [{"port": "http"}]}})
    assert {"description"} & set(kubernetes()["$defs"]["io.k8s.api.core.v1.Container"]) == set()


# --- what schemas do not say


def pods(document: Document) -> Iterator[tuple[dict[str, str], Document]]:
    """Labels and specification of each pod template, with labels that controllers add."""

    def of_group(group: Document, added: dict[str, str]) -> Iterator[tuple[dict[str, str], Document]]:
        template = group["leaderWorkerTemplate"]
        leader = template.get("leaderTemplate", template["workerTemplate"])
        yield labels(leader, {**added, f"{WORKERS}/worker-index": "0", f"{WORKERS}/group-index": "0"}), leader["spec"]
        if "leaderTemplate" in template:
            yield labels(template["workerTemplate"], added), template["workerTemplate"]["spec"]

    def labels(template: Document, added: dict[str, str]) -> dict[str, str]:
        return template.get("metadata", {}).get("labels", {}) | added

    spec = document["spec"]
    if document["kind"] == "LeaderWorkerSet":
        yield from of_group(spec, {f"{WORKERS}/name": document["metadata"]["name"]})
    elif document["kind"] == "DisaggregatedSet":
        for role in spec["roles"]:
            yield from of_group(role["spec"], {f"{WORKERS}/name": "of the controller"})
    elif document["kind"] == "Deployment":
        yield labels(spec["template"], {}), spec["template"]["spec"]
    elif document["kind"] == "DynamoGraphDeployment":
        for service in spec["services"].values():
            extra = dict(service["extraPodSpec"])
            main = {**extra.pop("mainContainer"), "resources": service.get("resources", {})}
            yield service.get("extraPodMetadata", {}).get("labels", {}), {**extra, "containers": [main]}


def test_what_is_referred_to_is_there(everything: dict) -> None:
    """Volumes, claims and their templates, labels that Services, pools and affinities select, ports of probes."""
    for at, documents in manifests(everything):
        every = [pod for document in documents for pod in pods(document)]
        made = {
            d["spec"]["channel"]["resourceClaimTemplate"]["name"] for d in documents if d["kind"] == "ComputeDomain"
        }
        wanted = {c["resourceClaimTemplateName"] for _, spec in every for c in spec.get("resourceClaims", [])}
        assert wanted == made, at
        for labels, spec in every:
            claims = {claim["name"] for claim in spec.get("resourceClaims", [])}
            volumes = {volume["name"] for volume in spec.get("volumes", [])}
            for container in spec["containers"] + spec.get("initContainers", []):
                names = [variable["name"] for variable in container.get("env", [])]
                assert len(names) == len(set(names)), (at, names)
                assert {m["name"] for m in container.get("volumeMounts", [])} <= volumes, at
                assert {c["name"] for c in container.get("resources", {}).get("claims", [])} <= claims, at
                ports = {port["containerPort"] for port in container.get("ports", [])}
                probed = {v["httpGet"]["port"] for name, v in container.items() if name.endswith("Probe")}
                assert probed <= ports or not ports, at  # Dynamo's operator adds its own
            assert affinity_holds(spec, labels), at
        for document in documents:
            if document["kind"] in ("Service", "InferencePool"):
                selector = document["spec"]["selector"]
                selector = dict(selector.get("matchLabels", selector))
                selector.pop(f"{WORKERS}/group-index", None)
                assert any(selector.items() <= labels.items() for labels, _ in every), (at, selector)
            if document["kind"] == "Deployment":
                selector = document["spec"]["selector"]["matchLabels"]
                assert selector.items() <= document["spec"]["template"]["metadata"]["labels"].items(), at


def affinity_holds(spec: Document, labels: dict[str, str]) -> bool:
    """A pod that has to be near its like is like itself, else the first one would never start."""
    terms = spec.get("affinity", {}).get("podAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution", [])
    wants = [want for term in terms for want in term["labelSelector"]["matchExpressions"]]
    return all(labels.get(want["key"]) in want["values"] for want in wants)


DNS = re.compile("[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL = re.compile("([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")


def names_fit(documents: list[Document]) -> list[str]:
    """Names that are too long for what controllers make of them, or that are no names, of one rendering.

    StatefulSet: 52 characters (kubernetes#64023). LeaderWorkerSet makes NAME-GROUP of a group of several pods, and
    DisaggregatedSet NAME-SLICE-REVISION-ROLE (its webhook: revision of 8 digits). Grove: 45 characters for graph,
    service and service-ldr together (its validation of a PodCliqueSet).
    """
    out = []
    for document in documents:
        name, spec = document["metadata"]["name"], document["spec"]
        sets = {}
        if document["kind"] == "LeaderWorkerSet":
            sets[name] = spec
        if document["kind"] == "DisaggregatedSet":
            sets = {f"{name}-0-12345678-{role['name']}": role["spec"] for role in spec["roles"]}
        for made, of in sets.items():
            several = of["leaderWorkerTemplate"]["size"] > 1
            out += [made] if len(f"{made}-{of['replicas'] - 1}" if several else made) > 52 else []
        for service, of in spec.get("services", {}).items():
            whole = name + service + (f"{service}-ldr" if "multinode" in of else "")
            out += [whole] if len(whole) > 45 else []
        out += [name] if not DNS.fullmatch(name) or len(name) > 63 else []
        labels = [
            *document["metadata"].get("labels", {}).values(),
            *(v for of, _ in pods(document) for v in of.values()),
        ]
        out += [
            label
            for label in labels
            if label != "of the controller" and (len(label) > 63 or not LABEL.fullmatch(label))
        ]
    identities = [(document["kind"], document["metadata"]["name"]) for document in documents]
    return out + [f"{kind} {name} twice" for kind, name in identities if identities.count((kind, name)) > 1]


def test_names_fit_what_controllers_make_of_them(everything: dict) -> None:
    names: dict[str, str] = {}
    for at, documents in manifests(everything):
        assert names_fit(documents) == [], at
        for document in documents:
            if document["kind"] != "Service":
                name = f"{document['kind']} {document['metadata']['name']}"
                assert names.setdefault(name, at.rpartition(" ")[0]) == at.rpartition(" ")[0]


def stretched(recipe: str, engine: Any, replicas: int, name: str) -> Layout:
    """A shipped recipe with more prefill replicas, so that it fits no NVLink domain, and another name."""
    found = CATALOGUE.recipe(recipe)
    plan = found.engines[engine]
    roles = {role: of.model_copy(update={"replicas": replicas}) for role, of in plan.roles.items()}
    found = found.model_copy(update={"id": name, "engines": {engine: plan.model_copy(update={"roles": roles})}})
    return layout(found, engine, CATALOGUE.model(found.model), CATALOGUE.hardware(found.hardware), packed=False)


@pytest.mark.parametrize("target", ["lws", "dynamo", "llm-d"])
@pytest.mark.parametrize("name", ["a/b", "a/" + "long-name-" * 9, "9-9/9" + "x" * 200])
@pytest.mark.parametrize("recipe", ["deepseek-v4-pro/gb200-disagg", "golden/aggregated"])
def test_wide_deployments_and_long_names(recipe: str, name: str, target: str) -> None:
    """Replicas that span machines, and more of them than one NVLink domain holds: each replica stays near itself."""
    of = stretched(recipe, "vllm", 40, name)
    assert of.spans and not of.one_domain
    documents = parsed(_maker(target)(of).files)
    assert names_fit(documents) == []
    every = [pod for document in documents for pod in pods(document)]
    near = [spec for labels, spec in every if affinity_holds(spec, labels) and "affinity" in spec]
    assert near and all(affinity_holds(spec, labels) for labels, spec in every)
    for spec in near:
        (term,) = spec["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert f"{WORKERS}/group-key" in term["matchLabelKeys"]
    for document in documents:
        assert problems(KINDS[key(document)], document) == []


# --- srtctl


def test_every_srtctl_file_has_its_schema(everything: dict, capsys: pytest.CaptureFixture[str]) -> None:
    fields = srtctl_fields()
    of = {"model": "ModelConfig", "resources": "ResourceConfig", "frontend": "FrontendConfig"} | {
        "health_check": "HealthCheckConfig", "benchmark": "BenchmarkConfig", "identity": "IdentityConfig"
    }  # fmt: skip
    for (name, engine, target), documents in everything.items():
        if target != "srtctl":
            continue
        (document,) = documents
        jsonschema.validate(document, SRTCTL)
        options = document["backend"][f"{engine}_config"]
        owned = {"nnodes", "node-rank", "headless", "host", "port", "dist-init-addr", "data-parallel-start-rank"}
        assert not any(owned & set(settings) or False in settings.values() for settings in options.values()), name
        if fields is not None:
            assert set(document) <= fields["SrtConfig"], name
            assert all(set(document[part]) <= fields[kind] for part, kind in of.items()), name
            assert set(document["backend"]) <= fields["VLLMProtocol" if engine == "vllm" else "SGLangProtocol"], name
            assert set(options) <= fields["VLLMServerConfig" if engine == "vllm" else "SGLangServerConfig"], name
    with capsys.disabled():
        print(f"\nsrtctl's published fields: {'cannot be had here' if fields is None else 'held to them'}")
