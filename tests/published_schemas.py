"""Schemas that others published of what ``fourfold recipe render`` writes, as JSON schemas that refuse unknown fields.

Kubernetes' own types are committed (recipes/schemas, whose README says from where). Custom resources are fetched with
git at a pinned commit where the cache has them or GitHub answers; without them `manifest_schemas` is what there is.
An API server drops a field that a resource's schema does not name, so a mapping of named fields is closed here.
``python tests/published_schemas.py DEFINITIONS`` writes the committed file anew.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from referencing import Registry, Resource

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.importing.public import COLLECTIONS, Source, collections_dir, fetched
from fourfold.common.settings import cache_dir

Schema = dict[str, Any]
KUBERNETES = Path(__file__).parent / "recipes" / "schemas" / "kubernetes.json"
ROOTS = (
    "io.k8s.api.apps.v1.Deployment",
    "io.k8s.api.core.v1.PodTemplateSpec",
    "io.k8s.api.core.v1.Service",
)
NOTICE = (
    "Types of Kubernetes 1.37.0, Copyright The Kubernetes Authors, Apache License 2.0, from the strict JSON schemas of "
    "kubernetes-validate 1.37.0. Changed: parts that no test needs, descriptions, extensions and null are left out."
)
LWS = Source("kubernetes-sigs/lws", "060ab4da17eea1f0865fcbd3236bb1075e2cea32")
DRA = Source("NVIDIA/k8s-dra-driver-gpu", "22407113785e78c7763b4637689a201eb39c6199")
POOL = Source("kubernetes-sigs/gateway-api-inference-extension", "84436a96b9e6ce2b59ddacd3d04c31b4fbd442de")
DYNAMO = Source("ai-dynamo/dynamo", "29a131e8e8f2fb69e2d137bc229b36c34ca44a90")
SRTCTL = next(source for source in COLLECTIONS if source.repository == "NVIDIA/srt-slurm")
SRTCTL_FILES = ("src/srtctl/core/schema.py", "src/srtctl/backends/vllm.py", "src/srtctl/backends/sglang.py")
BASES = "config/crd/bases"


@dataclass(frozen=True)
class Published:
    """Where the definition of a custom resource is."""

    source: Source
    path: str


RESOURCES = {
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): Published(
        LWS, f"{BASES}/leaderworkerset.x-k8s.io_leaderworkersets.yaml"
    ),
    ("disaggregatedset.x-k8s.io/v1", "DisaggregatedSet"): Published(
        LWS, f"{BASES}/disaggregatedset.x-k8s.io_disaggregatedsets.yaml"
    ),
    ("resource.nvidia.com/v1beta1", "ComputeDomain"): Published(
        DRA, "deployments/helm/dra-driver-nvidia-gpu/crds/resource.nvidia.com_computedomains.yaml"
    ),
    ("inference.networking.k8s.io/v1", "InferencePool"): Published(
        POOL, f"{BASES}/inference.networking.k8s.io_inferencepools.yaml"
    ),
    ("nvidia.com/v1alpha1", "DynamoGraphDeployment"): Published(
        DYNAMO, f"deploy/operator/{BASES}/nvidia.com_dynamographdeployments.yaml"
    ),
}


def core(name: str) -> Schema:
    """One of Kubernetes' own types, such as ``io.k8s.api.core.v1.PodTemplateSpec``."""
    return {"$ref": f"kubernetes.json#/$defs/{name}"}


@cache
def kubernetes() -> Schema:
    """The committed types."""
    return json.loads(KUBERNETES.read_text())


@cache
def _registry() -> Any:
    from referencing.jsonschema import DRAFT202012

    return Registry().with_resource("kubernetes.json", Resource.from_contents(kubernetes(), DRAFT202012))


def problems(schema: Schema, document: Any) -> list[str]:
    """What a schema refuses, with its place."""
    found = jsonschema.Draft202012Validator(schema, registry=_registry()).iter_errors(document)
    return [f"{error.json_path}: {error.message[:300]}" for error in found]


@cache
def custom_resource(key: tuple[str, str]) -> Schema | None:
    """The published schema of a custom resource by ``apiVersion`` and ``kind``; None: it cannot be had here now."""
    text = _text(RESOURCES[key].source, RESOURCES[key].path)
    if text is None:
        return None
    versions = yaml.load(text, Loader=yaml.CSafeLoader)["spec"]["versions"]
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == key[0].rpartition("/")[2])
    out = closed(schema)
    out["properties"]["metadata"] = {}  # Kubernetes' own, which a definition only names
    return out


def closed(schema: Any) -> Any:
    """A structural schema (Kubernetes' CustomResourceDefinition) as a JSON schema that refuses unknown fields."""
    if not isinstance(schema, dict):
        return schema
    out: Schema = {}
    for key, value in schema.items():
        if key == "properties":
            out[key] = {name: closed(inner) for name, inner in value.items()}
        elif key in ("items", "additionalProperties"):
            out[key] = closed(value)
        elif key not in ("description", "default", "example", "nullable") and not key.startswith("x-"):
            out[key] = value  # inside anyOf, oneOf, not: conditions on values, which name no field
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("anyOf", None)
        out["type"] = ["integer", "string"]
    keeps = schema.get("x-kubernetes-preserve-unknown-fields")
    if "properties" in out and "additionalProperties" not in out and not keeps:
        out["additionalProperties"] = False
    return {"anyOf": [out, {"type": "null"}]} if schema.get("nullable") else out


def _text(source: Source, path: str) -> str | None:
    folder = _folder(source)
    return None if folder is None else (folder / path).read_text()


@cache
def _folder(source: Source) -> Path | None:
    """A fetched repository that has the files that are read of it; the cache is looked at first."""
    paths = [published.path for published in RESOURCES.values() if published.source == source] or list(SRTCTL_FILES)
    schemas = cache_dir() / "schemas"
    for there in (schemas, collections_dir()):
        folder = there / f"{source.folder}@{source.commit[:12]}"
        if all((folder / path).is_file() for path in paths):
            return folder
    return obtained(source, schemas, paths)


def obtained(source: Source, folder: Path, paths: Sequence[str] = ()) -> Path | None:
    """A repository fetched below ``folder``; None, with the reason printed: its host does not answer within seconds."""
    if not _answers(source):
        return None
    try:
        return fetched(source, folder, paths=paths, patience=20)
    except FourfoldError as error:
        print(error)
        return None


SILENT: list[str] = []  # the host that said nothing is not asked again


def _answers(source: Source) -> bool:
    env = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    command = ["git", "ls-remote", "--exit-code", source.url, "HEAD"]
    try:
        return not SILENT and subprocess.run(command, env=env, capture_output=True, timeout=5).returncode == 0
    except (OSError, subprocess.TimeoutExpired) as error:
        SILENT.append(str(error))
        print(f"{source.url}: {error}")
        return False


# --- srtctl, whose schema is dataclasses


def srtctl_fields() -> dict[str, set[str]] | None:
    """Fields of each of srtctl's dataclasses, read from their source and not run; None: it cannot be had here now."""
    out: dict[str, set[str]] = {}
    for path in SRTCTL_FILES:
        text = _text(SRTCTL, path)
        if text is None:
            return None
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
                out[node.name] = {name for item in fields for name in _names(item)} - {"Schema"}
    return out


def _names(field: ast.AnnAssign) -> Iterator[str]:
    """How a field is called in a file: as ``data_key`` says, else by its own name."""
    for word in ast.walk(field):
        if isinstance(word, ast.keyword) and word.arg == "data_key":
            yield str(ast.literal_eval(word.value))
            return
    if isinstance(field.target, ast.Name):
        yield field.target.id


# --- the committed file


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "$ref" and isinstance(inner, str):
                yield inner.rpartition("/")[2]
            else:
                yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)


def _trimmed(value: Any) -> Any:
    """Without descriptions and extensions; null, which stands for a field left out, is not written by us."""
    if isinstance(value, list):
        return [_trimmed(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    out: Schema = {}
    for key, inner in value.items():
        if key == "properties":
            out[key] = {name: _trimmed(of) for name, of in inner.items()}
        elif key == "type" and isinstance(inner, list):
            types = [kind for kind in inner if kind != "null"]
            out[key] = types[0] if len(types) == 1 else types
        elif key not in ("description", "default") and not key.startswith("x-"):
            out[key] = _trimmed(inner)
    return out


def trim(definitions: Path) -> None:
    """Write what `ROOTS` need of a file ``_definitions.json`` of strict JSON schemas of Kubernetes."""
    known = json.loads(definitions.read_text())["$defs"]
    out: dict[str, Schema] = {}
    todo: list[str] = [*ROOTS]
    while todo:
        name = todo.pop()
        if name not in out:
            out[name] = _trimmed(known[name])
            todo += _references(known[name])
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(out[name], sort_keys=True)}" for name in sorted(out))
    head = json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", "$comment": NOTICE})[:-1]
    KUBERNETES.write_text(f'{head}, "$defs": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    trim(Path(sys.argv[1]))
