"""Wrong catalogues of recipes: each case is files that replace good ones, and what the message must say.

Most are made from one valid file of each kind: every key misspelt, every value of another type, every number out of
its range, everything required taken away.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from recipe_texts import FREE, GOOD, KIND, RECIPE

from fourfold.common.recipe.values import DERIVED

Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class Case:
    """One wrong catalogue.

    Attributes:
        said: what the message must hold, beside the file's name.
        files: name to the text or bytes that replace or join the good files; None: the file is not there.
        at: the file that the message must name.
    """

    name: str
    said: tuple[str, ...]
    files: dict[str, str | bytes | None]
    at: str = "full.yaml"
    options: tuple[str, ...] = field(default=())


def dump(data: Any) -> str:
    """YAML in its flow form, which is JSON with bare dates."""
    text = re.sub(r'"(\d{4}-\d\d-\d\d)"', r"\1", json.dumps(data, ensure_ascii=False))
    return re.sub(r"(?<=[ -])(NaN|Infinity)\b", lambda match: {"NaN": ".nan", "Infinity": ".inf"}[match[1]], text)


def _block(data: Any) -> str:
    """The usual form."""
    return yaml.safe_dump(json.loads(json.dumps(data)), sort_keys=False).replace("'2026-08-01'", "2026-08-01")


def _walk(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _walk(inner, (*path, key))


def _set(data: Any, path: Path_, value: Any) -> Any:
    out = copy.deepcopy(data)
    below = out
    for key in path[:-1]:
        below = below[key]
    if value is ...:
        del below[path[-1]]
    else:
        below[path[-1]] = value
    return out


def _free(path: Path_) -> bool:
    return any(part in FREE for part in path[:-1])


def _dotted(path: Path_) -> str:
    return ".".join(map(str, path))


def _changed(file: str, what: str, path: Path_, value: Any, *said: str) -> Case:
    name = f"{KIND[file]}-{what}-{_dotted(path)}"
    return Case(name, said, {file: dump(_set(GOOD[file], path, value))}, Path(file).name)


def _misspelt() -> Iterator[Case]:
    """Each key of each typed mapping once more, misspelt."""
    for file, data in GOOD.items():
        for path, value in _walk(data):
            if not path or isinstance(path[-1], int) or _free(path) or path[-2:-1] == ("peak_flops",):
                continue
            key = str(path[-1])
            wrong = f"{key}x"
            if path[-2:-1] in (("engines",), ("roles",)):
                yield _changed(file, "key", (*path[:-1], wrong), value, _dotted((*path[:-1], wrong)), f"'{key}'")
            else:
                yield _changed(
                    file, "key", (*path[:-1], wrong), value, f"unknown key {wrong!r}", f"did you mean '{key}'"
                )


def _mistyped() -> Iterator[Case]:
    """Each value replaced with those of other types."""
    for file, data in GOOD.items():
        for path, value in _walk(data):
            if not path or _free(path):
                continue
            others: list[Any] = ["several words"] if not isinstance(value, str) else [7, ["a"]]
            if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value):
                others = ["yesterday", 20260801]
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                others += [True, [value]]
            if isinstance(value, dict):
                others = [["a"], 3]
            for other in others:
                what = type(other).__name__
                yield _changed(file, what, path, other, *_at(path), repr(other) if what != "list" else "[")


def _at(path: Path_) -> tuple[str, ...]:
    """What a message says of a place: all of it, or the key where a rule of the whole file speaks."""
    return (_dotted(path),)


def _out_of_range() -> Iterator[Case]:
    """Numbers that are not counts, sizes or rates."""
    for file, data in GOOD.items():
        for path, value in _walk(data):
            if _free(path[:-1] + ("x",)) and "gpu_hour" not in path:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            for other in [-1, -0.5 if isinstance(value, float) else 1.5, 10**30 if isinstance(value, int) else None]:
                if other is not None and not (
                    other == 10**30 and path[-1] in ("memory_bytes", "published_bytes", "min_match")
                ):
                    yield _changed(file, f"range-{other:g}", path, other, _dotted(path), str(other)[:8])
            if isinstance(value, float):
                for text in (".nan", ".inf"):
                    yield _changed(file, f"range-{text}", path, float(text[1:]), _dotted(path), text[1:])


def _missing() -> Iterator[Case]:
    """All that is required, taken away."""
    required = {
        "r/full.yaml": (
            "schema id title model hardware workload engines workload.kind workload.input_tokens "
            "workload.output_tokens engines.vllm.versions engines.vllm.roles engines.vllm.router.kind "
            "speculation.method speculation.tokens speculation.acceptance.length speculation.acceptance.dataset "
            "speculation.acceptance.source speculation.acceptance.source.what evidence.0.metric evidence.0.value "
            "evidence.0.at evidence.0.source evidence.0.synthetic_acceptance known_issues.0.id known_issues.0.what "
            "known_issues.0.source"
        ),
        "models/m.yaml": (
            "schema id repo license config config_source total_parameters active_parameters draft formats sources"
        ),
        "hardware/h.yaml": (
            "schema id gpu gpus_per_node nvlink_domain memory_bytes memory_bandwidth peak_flops nvlink_bandwidth "
            "network_bandwidth sources"
        ),
        "prices/p.yaml": "schema id what gpu_hour sources",
    }
    for file, names in required.items():
        for name in names.split():
            path = tuple(int(part) if part.isdigit() else part for part in name.split("."))
            yield _changed(file, "missing", path, ..., name, "Field required")


def _derived() -> Iterator[Case]:
    """What follows from parallel, the role, an address or fourfold, given as an argument."""
    places: dict[str, list[Path_]] = {
        "vllm": [("engines", "vllm", "args"), ("engines", "vllm", "roles", "prefill", "args")],
        "sglang": [("engines", "sglang", "args"), ("engines", "sglang", "roles", "aggregated", "args")],
    }
    for engine, names in DERIVED.items():
        for i, name in enumerate(sorted(names)):
            path = (*places[engine][i % 2], name)
            yield _changed("r/full.yaml", "derived", path, 2, _dotted(path), "follows from parallel")
    for engine, name, known in (
        ("vllm", "tensor_parallel_size", "tensor-parallel-size"),
        ("vllm", "tensor-parallel-si", "tensor-parallel-size"),
        ("vllm", "no-enable-expert-parallel", "enable-expert-parallel"),
        ("vllm", "additional-config.fourfold", "additional-config"),
        ("sglang", "attn_dp_size", "attn-dp-size"),
        ("sglang", "disaggregation-mo", "disaggregation-mode"),
    ):
        path = (*places[engine][0], name)
        yield _changed("r/full.yaml", "derived", path, 2, _dotted(path), f"{known} follows from parallel")


def _hostile() -> Iterator[Case]:
    """Names that are paths, values that are options or commands, variables that start programs."""
    tricks = ("../x", "/etc/passwd", "a b", "..", "$(id)", "a;id", "A", "x" * 200, "a\\b", "-m", "", "é", "a\n")
    for file, path in (
        ("r/full.yaml", ("model",)),
        ("r/full.yaml", ("hardware",)),
        ("r/full.yaml", ("evidence", 0, "prices")),
        ("r/full.yaml", ("rehearsal", "proxy")),
        ("r/full.yaml", ("id",)),
        ("r/full.yaml", ("known_issues", 0, "id")),
        ("models/m.yaml", ("config",)),
    ):
        for i, trick in enumerate(tricks):
            if not (path[-1] == "config" and trick == "A"):
                case = _changed(file, f"name{i}", path, trick, _dotted(path), repr(trick)[:60])
                yield case
    for i, trick in enumerate(("../../etc/passwd", "/etc/passwd", "a/../../b", "r", 7, ["a/b"], "x" * 5000)):
        yield _changed("r/full.yaml", f"name{i}", ("extends",), trick, "extends", str(trick)[:20], "folder/name")
    for i, trick in enumerate(("-x/y", "../y", "a/../b", "a/b c", "a", "$(id)/b", "a/`id`", "https://a/b")):
        yield _changed("models/m.yaml", f"name{i}", ("repo",), trick, "repo", repr(trick))
    for i, trick in enumerate(("--privileged", "-v/:/host", "a b", "$(id)", "a;b", "")):
        yield _changed(
            "r/full.yaml", f"name{i}", ("engines", "vllm", "image"), trick, "engines.vllm.image", repr(trick)
        )
    for i, trick in enumerate(("http://a/b", "file:///etc/passwd", "javascript:alert(1)", "https://a b")):
        yield _changed("prices/p.yaml", f"url{i}", ("sources", 0, "url"), trick, "sources.0.url", repr(trick))
    args: Path_ = ("engines", "vllm", "args")
    for i, name in enumerate(("--dtype", "-q", "a b", "a;id", "$(id)", "dtype\n", "", "a=b", "x" * 200, "été")):
        yield _changed("r/full.yaml", f"option{i}", (*args, name), 1, "engines.vllm.args", "option", repr(name)[:40])
    values = ("--trust-remote-code", ["a", "--port"], "a\nb", "a" * 9000, 2**70, float("nan"), float("-inf"))
    for i, value in enumerate(values):
        shown = "--port" if isinstance(value, list) else "bits" if isinstance(value, int) else repr(value)[:20]
        yield _changed("r/full.yaml", f"value{i}", (*args, "dtype"), value, "engines.vllm.args", "dtype", shown)
    yield _changed("r/full.yaml", "date", (*args, "dtype"), "2026-08-01", "engines.vllm.args", "dtype", "quote it")
    nested = {"a": [{"b": float("inf")}]}
    yield _changed("r/full.yaml", "nested", (*args, "kv-x"), nested, "kv-x.a[0].b", "finite")
    env: Path_ = ("engines", "vllm", "env")
    for name in (
        "LD_PRELOAD LD_LIBRARY_PATH PATH PYTHONPATH PYTHONSTARTUP BASH_ENV ENV CC CXX NVCC SHELL GIT_SSH_COMMAND "
        "BASH_FUNC_x%% A-B 1A A=B $(id)"
    ).split():
        yield _changed("r/full.yaml", "env", (*env, name), "x", "engines.vllm.env", repr(name))
    for i, value in enumerate((True, None, ["a"], {"a": 1}, "a\nb", float("inf"))):
        if value is not None:  # null takes a variable away
            yield _changed("r/full.yaml", f"env{i}", (*env, "UCX_TLS"), value, "engines.vllm.env", "UCX_TLS")


def _impossible() -> Iterator[Case]:
    """Parallelism, roles, versions and references that contradict themselves or the machine."""
    decode: Path_ = ("engines", "vllm", "roles", "decode", "parallel")
    for what, parallel, said in (
        ("expert", {"tensor": 4, "expert": 3}, "expected 1 or tensor * data = 4"),
        ("expert-alone", {"expert": 8}, "expected 1 or tensor * data = 1"),
        ("context", {"tensor": 4, "context": 3}, "expected a divisor of tensor, 4"),
        ("half-node", {"tensor": 6}, "a multiple of it"),
        ("odd", {"tensor": 3, "data": 3}, "a multiple of it"),
        ("beyond-nvlink", {"data": 80, "expert": 80}, "joins 72 over NVLink"),
        ("vast", {"tensor": 1 << 20}, "expected at most 8192"),
        ("vast-product", {"tensor": 4096, "data": 4096, "pipeline": 4096}, "expected at most 8192"),
        ("zero", {"tensor": 0}, "greater than or equal to 1"),
        ("negative", {"data": -4}, "greater than or equal to 1"),
    ):
        yield _changed("r/full.yaml", what, decode, parallel, "engines.vllm.roles.decode.parallel", said)
    replicas: Path_ = ("engines", "vllm", "roles", "decode", "replicas")
    yield _changed("r/full.yaml", "vast", replicas, 1 << 24, "engines.vllm.roles", "expected at most 8192")
    roles: Path_ = ("engines", "vllm", "roles")
    for what, value in (
        ("none", {}),
        ("half", {"prefill": {}}),
        ("other-half", {"decode": {}}),
        ("three", {"prefill": {}, "decode": {}, "aggregated": {}}),
    ):
        yield _changed("r/full.yaml", f"roles-{what}", roles, value, "engines.vllm.roles", "expected aggregated alone")
    yield _changed("r/full.yaml", "none", ("engines",), {}, "engines", "at least 1 item")
    for i, text in enumerate(("", "0.32", "new", ">=0.32;<0.34", ">=", "latest", ">=0.32 || ==1")):
        path = ("engines", "vllm", "versions")
        yield _changed(
            "r/full.yaml", f"versions{i}", path, text, "engines.vllm.versions", "version specifier", repr(text)
        )
    yield _changed("r/full.yaml", "cost", ("evidence", 0, "prices"), ..., "evidence.0", "a cost needs the price sheet")
    yield _changed("r/full.yaml", "length", ("speculation", "acceptance", "length"), 0.5, "acceptance.length", "0.5")
    for path in (("model",), ("rehearsal", "proxy")):
        yield _changed("r/full.yaml", "absent", path, "n", _dotted(path), "models/n.yaml; there are")
    yield _changed(
        "r/full.yaml", "absent", ("hardware",), "gb300-nvl27", "hardware: no file", "did you mean gb300-nvl72?"
    )
    yield _changed(
        "r/full.yaml", "absent", ("evidence", 0, "prices"), "q", "evidence.0.prices: no file prices/q.yaml", "there are"
    )
    for kind, file in (("models", "m"), ("hardware", "h"), ("prices", "p")):
        yield Case(f"no-{kind}", (f"no file {kind}/{file}.yaml",), {f"{kind}/{file}.yaml": None})
        other = dump({**GOOD[f"{kind}/{file}.yaml"], "id": "other"})
        yield Case(
            f"other-id-{kind}", ("'other'", f"expected '{file}'"), {f"{kind}/{file}.yaml": other}, f"{file}.yaml"
        )
    yield Case("no-config", ("config", "m.json", "no such file"), {"models/m.json": None}, "m.yaml")
    yield _changed("r/full.yaml", "other", ("id",), "r/other", "r/other", "expected r/full")
    for version in ("fourfold/recipe/2", "recipes/v1", "fourfold/model/1"):
        yield _changed("r/full.yaml", version, ("schema",), version, "schema", "fourfold/recipe/1", version)


def _extending() -> Iterator[Case]:
    """Cycles, long chains, bases that are not there or not valid."""

    def over(name: str, base: str | None) -> str:
        return dump({"id": f"r/{name}"} | ({"extends": base} if base else RECIPE | {"id": f"r/{name}"}))

    yield Case("extends-itself", ("extends", "cycle"), {"r/full.yaml": over("full", "r/full")})
    yield Case("extends-pair", ("cycle",), {"r/full.yaml": over("full", "r/b"), "r/b.yaml": over("b", "r/full")})
    ring = {f"r/c{i}.yaml": over(f"c{i}", f"r/c{(i + 1) % 4}") for i in range(4)}
    yield Case("extends-ring", ("cycle",), ring | {"r/full.yaml": over("full", "r/c0")}, "c0.yaml")
    chain = {f"r/c{i}.yaml": over(f"c{i}", f"r/c{i + 1}") for i in range(12)} | {"r/c12.yaml": over("c12", None)}
    yield Case("extends-deep", ("a chain of more than 8",), chain | {"r/full.yaml": over("full", "r/c0")}, ".yaml")
    yield Case("extends-absent", ("r/ful", "did you mean r/full"), {"r/full.yaml": over("full", "r/ful")})
    yield Case(
        "extends-other-id",
        ("r/b", "expected r/full"),
        {"r/full.yaml": over("b", "r/base"), "r/base.yaml": over("base", None)},
    )
    broken = {"r/base.yaml": "a: [", "r/full.yaml": over("full", "r/base")}
    yield Case("extends-broken", ("expected the node content",), broken, "base.yaml")
    wrong = {"r/base.yaml": dump(RECIPE | {"id": "r/base", "titel": "x"}), "r/full.yaml": over("full", "r/base")}
    yield Case("extends-wrong-key", ("unknown key 'titel'", "'title'"), wrong)
    gone = dump({"id": "r/full", "extends": "r/base", "title": None})
    yield Case("extends-null", ("title", "Field required"), {"r/base.yaml": over("base", None), "r/full.yaml": gone})


def _texts() -> Iterator[Case]:
    """Text that is not plain YAML, whatever it would mean."""
    good = _block(RECIPE)
    vast = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True))
    for name, text, said in (
        ("bomb", vast, "anchors are not allowed"),
        ("anchor", good + "x: &x 1\n", "anchors"),
        ("alias", good.replace("title: all", "title: *x #"), "aliases"),
        ("merge", good + "<<: {a: 1}\n", "merge keys"),
        ("merge-inside", good.replace("    args:\n", "    args:\n      <<: {a: 1}\n", 1), "merge keys"),
        ("python", good + "x: !!python/object/apply:os.system [id]\n", "the tag"),
        ("python-name", "!!python/name:os.system\n", "the tag"),
        ("python-new", good + "x: !!python/object/new:subprocess.Popen [[id]]\n", "the tag"),
        ("binary", good + "x: !!binary aGFsbG8=\n", "the tag"),
        ("set", good + "x: !!set {a}\n", "the tag"),
        ("own-tag", good + "x: !include /etc/passwd\n", "the tag"),
        ("str-tag", good + "x: !!str 1\n", "the tag"),
        ("directive", "%TAG ! tag:example.org,2026:\n---\n" + good + "x: !y 1\n", "the tag"),
        ("version", "%YAML 3.0\n---\n" + good, "version"),
        ("deep-list", good + "x: " + "[" * 3000 + "]" * 3000 + "\n", "nested beyond 20"),
        ("deep-map", good + "x: " + "{a: " * 500 + "1" + "}" * 500 + "\n", "nested beyond 20"),
        ("deep-dashes", "x:\n" + "- " * 400 + "1\n", "nested beyond 20"),
        ("deep-keys", "? " * 300 + "a\n", "nested beyond 20"),
        ("large", "# " + "x" * (300 << 10) + "\n" + good, "larger than 256 KiB"),
        ("twice", good + "title: again\n", "key 'title' twice"),
        ("twice-inside", good.replace("    args:\n", "    args:\n      a: 1\n      a: 2\n", 1), "key 'a' twice"),
        ("list", "- 1\n- 2\n", "expected a mapping, got list"),
        ("text", "just words\n", "expected a mapping, got str"),
        ("number", "12\n", "expected a mapping, got int"),
        ("empty", "", "empty"),
        ("comment", "# nothing\n", "empty"),
        ("null", "null\n", "empty"),
        ("two", good + "---\n" + good, "another document"),
        ("open", "a: [1, 2\n", "expected ',' or ']'"),
        ("quote", 'a: "open\n', "unexpected end of stream"),
        ("colon", "a: b: c\n", "mapping values are not allowed"),
        ("tab", "a:\n\tb: 1\n", "cannot start any token"),
        ("number-key", good + "1: a\n", "key '1'; expected text"),
        ("null-key", good + "null: a\n", "key 'None'; expected text"),
        ("date-key", good + "2026-08-01: a\n", "expected text"),
        ("list-key", good + "? [a, b]\n: 1\n", "expected text"),
        ("no-date", good.replace("2026-08-01", "2026-13-45", 1), "2026-13-45"),
        ("long-number", good + "x: " + "9" * 5000 + "\n", "digits"),
        ("escape", good + 'x: "\\e[2J"\n', "is not allowed"),
        ("surrogate", good + 'x: "\\ud800"\n', "is not allowed"),
        ("direction", good + 'x: "\\u202e"\n', "is not allowed"),
        ("control-key", good + '"a\\x07": 1\n', "is not allowed"),
        ("raw-control", good + "x: \x01\n", "special characters are not allowed"),
        ("nul", good + "x: \0\n", "special characters are not allowed"),
    ):
        yield Case(f"text-{name}", (said,), {"r/full.yaml": text})
    yield Case("text-latin", ("not UTF-8",), {"r/full.yaml": "title: é".encode("latin-1")})
    yield Case("text-utf16", ("not",), {"r/full.yaml": good.encode("utf-16")})
    yield Case("text-gzip", ("not UTF-8",), {"r/full.yaml": b"\x1f\x8b\x08\0\0\xff\xfe"})
    for file, name in (("models/m.yaml", "card"), ("hardware/h.yaml", "sheet"), ("prices/p.yaml", "prices")):
        yield Case(f"text-{name}", ("the tag",), {file: "!!python/name:os.system\n"}, Path(file).name)
        yield Case(f"text-{name}-twice", ("twice",), {file: _block(GOOD[file]) + "id: x\n"}, Path(file).name)


MAKERS = (_misspelt, _mistyped, _out_of_range, _missing, _derived, _hostile, _impossible, _extending, _texts)
CASES = [case for maker in MAKERS for case in maker()]
OF_EACH = [next(iter(maker())) for maker in MAKERS]


GOOD_TEXTS = {file: dump(good) for file, good in GOOD.items()} | {"models/m.json": "{}"}


def write(root: Path, files: dict[str, str | bytes | None]) -> Path:
    """The good files with ``files`` in their place; returns the path of the recipe."""
    for name, data in {**GOOD_TEXTS, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if data is not None:
            path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return root / "r" / "full.yaml"
