"""Which class serves a head on each engine, and the flags that start it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Literal, get_args

from fourfold.common.errors import FourfoldError
from fourfold.common.mtp.layouts import IN_TREE
from fourfold.common.mtp.reader import Reading

Engine = Literal["vllm", "sglang"]
ENGINES: tuple[str, ...] = get_args(Engine)
ARCHITECTURE = "FourfoldMTP"  # the generic class of both engines
SGLANG_MLA = "DeepseekV3ForCausalLMNextN"  # by a class's name SGLang tells that a draft's attention is MLA
WORDS = "vocabulary.pt"  # a draft vocabulary as SGLang reads it


def serving_class(reading: Reading, engine: Engine) -> str:
    """The engine's own class for the target, else the generic one; empty where neither computes the head."""
    own = IN_TREE.get(reading.architecture, ("", ""))[ENGINES.index(engine)]
    return own or ("" if reading.head.limits else ARCHITECTURE)


def launch_flags(reading: Reading, engine: Engine, draft: Path, own: bool) -> str:
    """The flags for ``engine``, with one draft token for each module.

    Args:
        draft: the model itself for the engine's own class, a draft directory for the generic one.
        own: whether the engine's own class serves.
    """
    count = len(reading.head.modules)
    if engine == "vllm":
        options: dict[str, object] = {"method": "mtp", "num_speculative_tokens": count}
        if not own:
            options["model"] = str(draft)
        if has_vocabulary(reading):  # no logits of the words that are not drafted
            options["use_local_argmax_reduction"] = True
        return f"--speculative-config {shlex.quote(json.dumps(options))}"
    more = f" --speculative-token-map {shlex.quote(str(draft / WORDS))}" if has_vocabulary(reading) else ""
    if count > 1 and not own:  # SGLang adds it itself for the models whose own classes take it
        more += " --enable-multi-layer-eagle"
    return (
        f"--speculative-algorithm EAGLE --speculative-draft-model-path {shlex.quote(str(draft))} "
        f"--speculative-num-steps {count} --speculative-eagle-topk 1 --speculative-num-draft-tokens {count + 1}{more}"
    )


def has_vocabulary(reading: Reading) -> bool:
    """Whether the head drafts from a vocabulary of its own."""
    return "vocabulary" in reading.head.modules[0].roles


def check_engine(name: str) -> Engine:
    """``name`` as an engine.

    Raises:
        FourfoldError: there is no such engine.
    """
    for engine in get_args(Engine):
        if engine == name:
            return engine
    raise FourfoldError(f"--engine {name!r}: expected one of {', '.join(ENGINES)}")
