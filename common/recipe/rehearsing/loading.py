"""Load a recipe's architecture with the engine's own classes, where a stand-in runs in the model's place.

A small checkpoint in the published layout (`published`), the recipe's options that choose a class or a kernel of it, a
machine of the recipe's hardware that is simulated, and the engine's own ``load_weights``: every tensor has to reach a
parameter, and every element of every parameter has to get a value. Nothing is computed with them. The other side is
`loader`, in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fourfold.common.recipe.launch import flags
from fourfold.common.recipe.rehearsing import drafts
from fourfold.common.recipe.rehearsing.published import Published
from fourfold.common.recipe.schema import EngineRecipe, HardwareSheet, RoleName
from fourfold.common.settings import cache_dir

LIMIT = 300.0  # seconds
SHOWN = 12  # names in a line
# Options of a recipe that choose a class, or how a class holds its weights.
KEPT: dict[str, frozenset[str]] = {
    "vllm": frozenset(
        "quantization kv-cache-dtype attention-config attention-backend linear-backend moe-backend block-size "
        "enable-expert-parallel hf-overrides dtype".split()
    ),
    "sglang": frozenset(
        "quantization kv-cache-dtype attention-backend moe-runner-backend fp8-gemm-backend fp4-gemm-backend "
        "page-size dtype enable-deepseek-v4-fp4-indexer".split()
    ),
}
BACKENDS = {"vllm": ("moe-backend",), "sglang": ("moe-runner-backend",)}  # can need more ranks than one
OWN: dict[str, dict[str, Any]] = {
    "vllm": {
        "skip-tokenizer-init": True,
        "enforce-eager": True,
        "max-model-len": 1024,
        "max-num-seqs": 4,
        "max-num-batched-tokens": 1024,
    },
    "sglang": {"skip-tokenizer-init": True, "context-length": 1024, "max-running-requests": 4},
}
ONE_TOKEN = {"speculative-num-steps": 1, "speculative-eagle-topk": 1, "speculative-num-draft-tokens": 2}
SGLANG_DRAFTS: dict[str, dict[str, Any]] = {
    "mtp": {"speculative-algorithm": "EAGLE", **ONE_TOKEN},
    "dspark": {"speculative-algorithm": "DSPARK"},
    "eagle3": {"speculative-algorithm": "EAGLE3", **ONE_TOKEN},
}
SIMULATED: dict[str, tuple[str, ...]] = {  # what a simulated machine does not have
    "vllm": (),
    "sglang": (
        "SGLang's layers for CUDA: without it SGLang builds those of other platforms, with the same parameters",
    ),
}


@dataclass(frozen=True)
class Loaded:
    """What loading showed.

    Attributes:
        engine: vllm or sglang.
        classes: of the target and of its draft, as the engine names them.
        source: of the checkpoint's names.
        tensors: of the checkpoint; ``parameters``: of all classes.
        missing: parameters of which elements got no value, and how many.
        unused: tensors that no parameter took; ``refused``: those at which a loader raised, and what it raised.
        ignored: tensors that an engine reads in other settings alone.
        shared: parameters that need no tensor: the target's in a draft, scales with a default, what is never used.
        unfinished: what a loader raised after the last tensor, by its class.
        layers: which classes serve which layers, and how their weights are quantised; ``of``: the model's numbers of
            the checkpoint's layers.
        unable: why a class could not be built; None: all were.
        simulated: the machine; None: this one.
        options: of the engine; ``left_out``: those with which no class could be built, and why.
    """

    engine: str
    classes: list[str]
    source: str
    tensors: int
    parameters: int
    missing: dict[str, str]
    unused: list[str]
    refused: dict[str, str]
    ignored: list[str]
    shared: list[str]
    unfinished: dict[str, str]
    layers: list[dict[str, Any]]
    of: list[int]
    unable: str | None
    simulated: str | None
    options: list[str]
    left_out: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether nothing lacked and nothing was left over, of the classes that could be built."""
        return not (self.missing or self.unused or self.refused)

    @property
    def detail(self) -> str:
        """One clause."""
        if not self.classes:
            return f"not on the real classes: {self.unable}"
        counted = f"{' and '.join(self.classes)}: {self.parameters} parameters, {self.tensors} tensors"
        found = {
            "no weight for": [f"{name} ({what})" for name, what in self.missing.items()],
            "no parameter took": self.unused,
            "refused": [f"{name} ({why})" for name, why in self.refused.items()],
        }
        parts = [counted, *(f"{what} {_some(names)}" for what, names in found.items() if names)]
        if self.unable:
            parts.append(f"another class was not built: {self.unable}")
        return "; ".join(parts) if len(parts) > 1 else f"{counted}, all placed"

    @property
    def where(self) -> str:
        """The machine."""
        return "this processor" if self.simulated is None else f"a {self.simulated} that is simulated"

    @property
    def not_rehearsed(self) -> list[str]:
        """What loading left out."""
        without = [f"{option} on the real classes: {why}" for option, why in self.left_out.items()]
        out = [f"the model's tensors on the engine's own classes: {self.unable}"] if self.unable else []
        out += [f"the forward of {name}: it was loaded, and nothing computed" for name in self.classes]
        out += [f"{name}: an engine reads it in other settings alone" for name in self.ignored]
        out += SIMULATED[self.engine] if self.simulated else ()
        out += [f"what {name} makes of its weights then: {why}" for name, why in self.unfinished.items()]
        return out + without

    def lines(self) -> list[str]:
        """Layer by layer, for people."""
        out = []
        for layer in self.layers:
            numbers = ", ".join(layer["layers"])
            if layer["model"] == self.classes[0]:
                numbers += f" (the model's {', '.join(str(self.of[int(number)]) for number in layer['layers'])})"
            parts = ", ".join(f"{name} {kind}" for name, kind in layer["parts"].items())
            methods = ", ".join(f"{count} {name}" for name, count in layer["methods"].items())
            own = f", with {', '.join(layer['own'])}" if layer["own"] else ""
            out.append(f"{layer['model']} layer {numbers}: {layer['class']} ({parts}{own}); {methods}")
        return out

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"ok": self.ok}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def chosen(engine: str, plan: EngineRecipe, role: RoleName) -> dict[str, Any]:
    """Options of a role that matter here; experts in parallel are so on one rank, too: classes ask whether."""
    given = {**plan.args, **plan.roles[role].args}
    if engine == "vllm" and plan.roles[role].parallel.expert > 1:
        given["enable-expert-parallel"] = True
    return given


def load(
    engine: str,
    config: Mapping[str, Any],
    given: Mapping[str, Any],
    sheet: HardwareSheet,
    env: Mapping[str, str],
    folder: Path,
    draft: Mapping[str, Any] | None = None,
) -> Loaded:
    """Load a small checkpoint of ``config``'s architecture with the classes of the engine of this environment.

    Args:
        given: options of the recipe's role, see `chosen`.
        sheet: the machine that the recipe is for.
        env: variables for the engine.
        folder: for the checkpoint and the engine's log; it exists.
        draft: config of the draft model that the options name; None: they name none, or it has no card.

    Raises:
        FourfoldError: the published layout of the architecture is not known.
    """
    with tempfile.TemporaryDirectory(prefix="fourfold-published-") as scratch:
        checkpoint = drafts.write(Path(scratch) / "model", config, draft)
        return load_checkpoint(engine, checkpoint, given, sheet, env, folder)


def load_checkpoint(
    engine: str,
    checkpoint: Published,
    given: Mapping[str, Any],
    sheet: HardwareSheet,
    env: Mapping[str, str],
    folder: Path,
) -> Loaded:
    """The same with a checkpoint that was written before."""
    options = OWN[engine] | {name: value for name, value in given.items() if name in KEPT[engine]}
    options |= _drafting(engine, checkpoint, given)
    machine, left_out = _machine(sheet), {}
    if checkpoint.draft_path is None and (name := drafts.named(given)):
        left_out[f"the draft model {name}"] = "its published layout is not known"
    answer = _ask(engine, checkpoint, machine, options, env, folder)
    for name in BACKENDS[engine]:
        if answer["unable"] and name in options:
            value = options.pop(name)
            left_out[f"{name} {value}"] = answer["unable"]
            answer = _ask(engine, checkpoint, machine, options, env, folder)
    shown = [flag.replace(str(checkpoint.draft_path), "DRAFT") for flag in flags(engine, options)]
    return _read(engine, answer, checkpoint, machine, shown, left_out)


def _ask(
    engine: str,
    checkpoint: Published,
    machine: dict[str, Any] | None,
    options: Mapping[str, Any],
    env: Mapping[str, str],
    folder: Path,
) -> dict[str, Any]:
    """What `loader` says."""
    request = {
        "engine": engine,
        "model": str(checkpoint.path),
        "draft": checkpoint.draft,
        "draft_model": str(checkpoint.draft_path or checkpoint.path),
        "machine": machine,
        "arguments": flags(engine, options),
    }
    asked, answered, log = folder / "load-request.json", folder / "load-answer.json", folder / f"{engine}-load.log"
    asked.write_text(json.dumps(request))
    answered.unlink(missing_ok=True)
    command = [sys.executable, "-m", "fourfold.common.recipe.rehearsing.loader", str(asked), str(answered)]
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # An engine keeps what it learns of a model's class; on a simulated machine that is another class.
    apart = {"VLLM_CACHE_ROOT": str(cache_dir() / "load")}
    with log.open("wb") as output:
        try:
            ended = subprocess.run(
                command,
                stdout=output,
                stderr=output,
                env={**os.environ, **env, **quiet, **apart},
                timeout=LIMIT,
                check=False,
            )
            state = f"ended with status {ended.returncode}"
        except subprocess.TimeoutExpired:
            state = f"no answer in {LIMIT:.0f} s"
    if answered.is_file():
        return json.loads(answered.read_text())
    last = log.read_text(errors="replace").strip().splitlines()[-1:] or [""]
    return {"models": [], "unable": f"{state}: {last[0]}"}


def _drafting(engine: str, checkpoint: Published, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options by which the engine builds the class of the checkpoint's own draft."""
    if checkpoint.draft is None:
        return {}
    own = None if checkpoint.draft_path is None else str(checkpoint.draft_path)
    if engine == "sglang":
        return SGLANG_DRAFTS[checkpoint.draft] | ({"speculative-draft-model-path": own} if own else {})
    asked = given.get("speculative-config") or {}
    tokens = int(asked.get("num_speculative_tokens") or 1)
    model = {"model": own} if own else {}
    return {"speculative-config": {"method": checkpoint.draft, "num_speculative_tokens": tokens, **model}}


def _machine(sheet: HardwareSheet) -> dict[str, Any] | None:
    if sheet.compute_capability is None:
        return None
    capability = [int(part) for part in sheet.compute_capability.split(".")]
    return {"name": sheet.gpu, "capability": capability, "memory": sheet.memory_bytes, "count": sheet.gpus_per_node}


def _read(
    engine: str,
    answer: dict[str, Any],
    checkpoint: Published,
    machine: dict[str, Any] | None,
    options: list[str],
    left_out: dict[str, str],
) -> Loaded:
    models = answer["models"]
    taken = {name for model in models for name in model["taken"]}
    refused = {name: why for model in models for name, why in model["refused"].items()}
    whole = answer["unable"] is None
    return Loaded(
        engine=engine,
        classes=[model["class"] for model in models],
        source=checkpoint.source,
        tensors=checkpoint.tensors,
        parameters=sum(model["parameters"] for model in models),
        missing={name: what for model in models for name, what in model["unfilled"].items()},
        unused=sorted(set(answer["tensors"]) - taken - set(refused) - set(answer["ignored"])) if whole else [],
        refused=refused,
        ignored=[name for name in answer["ignored"] if name not in taken] if whole else [],
        shared=[name for model in models for name in model["shared"]],
        unfinished={model["class"]: model["unfinished"] for model in models if model["unfinished"]},
        layers=[layer | {"model": model["class"]} for model in models for layer in model["layers"]],
        of=list(checkpoint.layers),
        unable=answer["unable"],
        simulated=None if machine is None else str(machine["name"]),
        options=options,
        left_out=left_out,
    )
