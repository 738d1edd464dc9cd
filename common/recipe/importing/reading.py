"""Read YAML that others wrote: anchors, merge keys and keys given twice happen there, bombs and objects are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fourfold.common.errors import FourfoldError

LARGEST = 256 << 10  # bytes of a file
MOST = 20_000  # values once every alias is written out
DEEPEST = 40


class _Loader(yaml.SafeLoader):
    """Plain values; of a key given twice the last counts, as in their own tools."""

    twice: list[str]

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        out: dict[Any, Any] = {}
        own: set[int] = set()
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key that is not text", problem_mark=key_node.start_mark)
            key = key_node.value
            if key in out and id(key_node) not in own:
                self.twice.append(f"line {key_node.start_mark.line + 1}: {key}")
            own.add(id(key_node))
            out[key] = self.construct_object(value_node, deep=True)
        return out

    def flatten_mapping(self, node: Any) -> None:
        merged = any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value)
        own = {key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)}
        super().flatten_mapping(node)
        if len(node.value) > MOST:
            raise yaml.MarkedYAMLError(problem="merge keys that multiply", problem_mark=node.start_mark)
        if merged and own != {"<<"}:  # what a merge brings and the mapping has itself is no key given twice
            seen = [str(key.value) for key, _ in node.value]
            node.value = [
                pair for i, pair in enumerate(node.value) if seen[i] not in own or seen[i] not in seen[i + 1 :]
            ]

    def construct_yaml_map(self, node: Any) -> Any:
        data: dict[Any, Any] = {}
        yield data
        data.update(self.construct_mapping(node))


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_yaml_map)


def read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The mapping that a file holds, and the keys that it gives twice.

    Raises:
        FourfoldError: not readable, too large, not YAML of plain values, or one that grows when it is written out.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise FourfoldError(f"{path}: {error.strerror or error}") from None
    if len(data) > LARGEST:
        raise FourfoldError(f"{path}: larger than {LARGEST >> 10} KiB; a recipe is a short text")
    try:
        loader = _Loader(data.decode("utf-8"))
        loader.twice = []
        value = loader.get_single_data()
        _size(value, {}, 0)
    except UnicodeDecodeError as error:
        raise FourfoldError(f"{path}: not UTF-8 text ({error})") from None
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise FourfoldError(f"{path}:{line} {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FourfoldError(f"{path}: not YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(value, dict):
        raise FourfoldError(f"{path}: expected a mapping, got {type(value).__name__}")
    return _copy(value), loader.twice


def _size(value: Any, known: dict[int, int], depth: int) -> int:
    """Values of a tree whose aliases are written out, without writing them out."""
    if not isinstance(value, (dict, list)):
        return 1
    if depth > DEEPEST:
        raise ValueError(f"nested beyond {DEEPEST} levels")
    if id(value) not in known:
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(item, known, depth + 1) for item in inner)
    if known[id(value)] > MOST:
        raise ValueError(f"more than {MOST} values once its aliases are written out")
    return known[id(value)]


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
