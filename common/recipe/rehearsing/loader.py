"""Load a checkpoint with an engine's own classes: ``python -m fourfold...rehearsing.loader REQUEST ANSWER``.

Runs in the engine's interpreter. The engine's adapter (``recipe_load.py`` of ``vllm_ext`` or ``sglang_ext``) builds the
models; their own ``load_weights`` reads the checkpoint under the eyes of `placement`, a draft's its own where it has
one, of whose tensors the names begin with ``draft: ``. The answer is one JSON object: ``models``, and ``unable``, why a
class could not be built. Contract of both: `loading`.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

LAYER = re.compile(r"(?:.*\.)?(?:layers|stages)\.(\d+)|(?:.*\.)?(?:decoder)()")


def main(request_path: str, answer_path: str) -> None:
    """Answer a request."""
    request = json.loads(Path(request_path).read_text())
    models: list[dict[str, Any]] = []
    answer: dict[str, Any] = {"models": models, "unable": None}
    try:
        from fourfold.common.recipe.rehearsing.placement import place

        adapter = importlib.import_module(f"fourfold.{request['engine']}_ext.recipe_load")
        own = request["draft_model"] != request["model"]
        read = {"target": _tensors(Path(request["model"]))}
        read["draft"] = _tensors(Path(request["draft_model"])) if own else read["target"]
        every = set(read["target"])
        for role, model, shared in adapter.models(request):
            parameters = dict(model.named_parameters())
            placed = place(parameters, model.load_weights, read[role])
            mark = "draft: " if own and role == "draft" else ""
            every |= {mark + name for name in read[role]}
            unfilled = {name: what for name, what in placed.unfilled.items() if not _among(name, shared)}
            models.append(
                {
                    "role": role,
                    "class": type(model).__name__,
                    "module": type(model).__module__,
                    "parameters": placed.parameters,
                    "taken": sorted(mark + name for name in placed.taken),
                    "unfilled": unfilled,
                    "shared": sorted(set(placed.unfilled) - set(unfilled)),
                    "refused": {mark + name: why for name, why in placed.refused.items()},
                    "unfinished": placed.unfinished,
                    "layers": layers(model),
                }
            )
        answer["tensors"] = sorted(every)
        answer["ignored"] = [name for name in sorted(every) if adapter.IGNORED.fullmatch(name)]
    except BaseException as error:  # engines end with SystemExit, too
        traceback.print_exc()
        answer["unable"] = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
    Path(answer_path).write_text(json.dumps(answer))


def layers(model: nn.Module) -> list[dict[str, Any]]:
    """Which classes serve each decoder layer, and how its weights are quantised; equal layers together.

    ``own`` are parameters of parts that every layer has, which not every layer has (a table of routes, a bias).
    """
    found = {
        match[1] or "0": _own(module) for name, module in model.named_modules() if (match := LAYER.fullmatch(name))
    }
    everywhere = _common([set(modules) for modules in found.values()])
    shared = _common([set(_parameters(modules)) for modules in found.values()])
    out: dict[str, dict[str, Any]] = {}
    for number, modules in found.items():
        parts = {
            name: type(part).__name__
            for name, part in modules.items()
            if name and _says_much(part) and not type(part).__module__.startswith("torch.")
        }
        methods = Counter(
            type(part.quant_method).__name__
            for part in modules.values()
            if getattr(part, "quant_method", None) is not None and any(True for _ in part.parameters(recurse=False))
        )
        own = sorted(name for name in set(_parameters(modules)) - shared if name.rpartition(".")[0] in everywhere)
        layer = {
            "class": type(modules[""]).__name__,
            "parts": parts,
            "own": own,
            "methods": {name: methods[name] for name in sorted(methods)},
        }
        out.setdefault(json.dumps(layer), layer | {"layers": []})["layers"].append(number)
    return list(out.values())


def _says_much(part: nn.Module) -> bool:
    """Whether a part has parts, or holds experts."""
    return any(True for _ in part.children()) or any(p.dim() == 3 for p in part.parameters(recurse=False))


def _own(layer: nn.Module) -> dict[str, nn.Module]:
    """The modules of a layer by name, without those of another layer that it holds on to."""
    modules = dict(layer.named_modules())
    others = tuple(f"{name}." for name, module in modules.items() if name and type(module) is type(layer))
    return {name: module for name, module in modules.items() if not f"{name}.".startswith(others)}


def _parameters(modules: dict[str, nn.Module]) -> list[str]:
    return [
        f"{name}.{own}" if name else own
        for name, part in modules.items()
        for own, _ in part.named_parameters(recurse=False)
    ]


def _common(sets: list[set[str]]) -> set[str]:
    return set.intersection(*sets) if sets else set()


def _among(name: str, shared: tuple[str, ...]) -> bool:
    return any(f".{part}." in f".{name}." for part in shared)


def _tensors(model: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    out = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            out |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    return out


if __name__ == "__main__":
    main(*sys.argv[1:3])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # engines leave threads behind
