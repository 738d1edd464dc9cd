"""What drafts in a new model, by its keys and the names of its tensors, and how each engine is told.

The engines' own classes serve the architectures of `layouts.IN_TREE`; of others, fourfold's generic class serves those
whose tensors follow a layout that it computes, once ``fourfold mtp extract`` has written the draft directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fourfold.common.errors import FourfoldError
from fourfold.common.mtp import matching
from fourfold.common.mtp.layouts import IN_TREE
from fourfold.common.recipe.dayzero.source import Found
from fourfold.common.recipe.sizing.traits import Traits

# Draft tokens of a step. Published acceptance lengths of MTP heads hardly grow beyond three tokens (InferenceX
# golden_al_distribution: DeepSeek V4 2.27, 2.49 and 2.54 for two to four), and each costs throughput where many
# requests share a step. DSpark's grow up to its sixth token.
WANTED = {"fixed": 1, "chat": 2, "agentic": 3}
DSPARK_MOST = 5


@dataclass(frozen=True)
class Drafting:
    """What drafts.

    Attributes:
        method: ``mtp``, ``dspark`` or None.
        tokens: drafted in a step.
        engines: those that can be told, each with its arguments.
        draft: directory of a draft model, where the engines need one.
        notes: why, and what stands in the way.
    """

    method: str | None = None
    tokens: int = 0
    engines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    draft: str | None = None
    notes: tuple[str, ...] = ()


def drafting(found: Found, traits: Traits, workload: str, name: str) -> Drafting:
    """Choose by traits; ``name`` is the model's, for the draft directory."""
    if traits.dspark:
        block = max(0, int(traits.get("dspark_block_size"))) or DSPARK_MOST
        tokens = min(block, DSPARK_MOST)
        vllm = {"method": "dspark", "num_speculative_tokens": tokens, "draft_sample_method": "probabilistic"}
        sglang = {"speculative-algorithm": "DSPARK", "speculative-dspark-block-size": min(block, DSPARK_MOST + 1)}
        return Drafting("dspark", tokens, {"vllm": {"speculative-config": vllm}, "sglang": sglang})
    marked = [n for n in found.names if matching.is_marked(n) or matching.is_after(n, len(traits.layers))]
    if not traits.draft_layers and not marked:
        return Drafting(notes=("config.json and the weights name no MTP layers: no speculation",))
    if found.names and not marked:
        told = f"config.json says {traits.draft_layers} MTP layers, the index of weights names none of their tensors"
        return Drafting(notes=(f"{told}: no speculation",))
    tokens = possible(WANTED[workload], max(traits.draft_layers, 1))
    own = IN_TREE.get(found.architecture)
    if own is not None:
        engines = {
            engine: _flags(engine, tokens, None) for engine, held in zip(("vllm", "sglang"), own, strict=True) if held
        }
        lacks = tuple(
            f"{engine} has no class for the MTP layers of {found.architecture}: no speculation there"
            for engine, held in zip(("vllm", "sglang"), own, strict=True)
            if not held
        )
        return Drafting("mtp", tokens, engines, None, lacks)
    return _generic(found, traits, tokens, name)


def _generic(found: Found, traits: Traits, tokens: int, name: str) -> Drafting:
    """fourfold's class, where it computes the layout."""
    if not found.names:
        return Drafting(
            notes=(
                f"config.json says {traits.draft_layers} MTP layers; no engine has a class for those of "
                f"{found.architecture or 'this model'}, and without an index of weights fourfold's cannot be checked: "
                "no speculation",
            )
        )
    try:
        family = matching.find(
            matching.Named(found.path.parent, found.names, len(traits.layers), found.architecture)
        ).family
    except FourfoldError as error:
        return Drafting(notes=(f"MTP layers of no known layout: no speculation ({str(error)[:600]})",))
    if family.limits:
        return Drafting(notes=(f"MTP layers as {family.name} has them: no speculation; {family.limits}",))
    draft = f"{name}-mtp"
    note = (
        f"the MTP tensors follow the layout of {family.name}, which fourfold's own class serves on both engines; first "
        f"write the draft directory: fourfold mtp extract {found.path.parent.name} {draft}"
    )
    return Drafting("mtp", tokens, {e: _flags(e, tokens, draft) for e in ("vllm", "sglang")}, draft, (note,))


def possible(wanted: int, modules: int) -> int:
    """Draft tokens that vLLM takes with so many modules: at most as many, or a multiple (``config/speculative.py``)."""
    return wanted if wanted <= modules else wanted // modules * modules


def _flags(engine: str, tokens: int, draft: str | None) -> dict[str, Any]:
    if engine == "vllm":
        options: dict[str, Any] = {"method": "mtp", "num_speculative_tokens": tokens}
        return {"speculative-config": options | ({"model": draft} if draft else {})}
    out: dict[str, Any] = {"speculative-algorithm": "EAGLE"}
    if draft:
        out["speculative-draft-model-path"] = draft
    steps = {"speculative-num-steps": tokens, "speculative-eagle-topk": 1, "speculative-num-draft-tokens": tokens + 1}
    return out | steps
