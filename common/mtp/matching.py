"""Which family the MTP tensors of a checkpoint follow, by their names alone; a layout that fits none is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold.common.errors import FourfoldError
from fourfold.common.mtp.formats import without_expert
from fourfold.common.mtp.layouts import FAMILIES, IN_TREE, Family

MODULES = 32  # more than any checkpoint has
_MARKS = {"mtp", "mtp_layers", "mtp_block", "nextn", "nextn_layers", "enorm", "hnorm", "eh_proj", "e_proj", "h_proj"}


@dataclass(frozen=True)
class Match:
    """A family, the prefix under which a checkpoint has it, the target's number of layers and that of modules."""

    family: Family
    prefix: str
    layers: int
    modules: int = 0

    def name(self, template: str, n: int) -> str:
        """A name of module ``n`` in the checkpoint."""
        return self.prefix + template.format(n=n, layer=self.layers + n)


@dataclass(frozen=True)
class Named:
    """What decides about the family.

    Attributes:
        path: the model, for messages.
        names: its tensors.
        layers: decoder layers of the target.
        architecture: of the target.
        family: the family that a draft directory says it has.
        claims: what the config says about MTP modules.
    """

    path: Path
    names: Sequence[str]
    layers: int
    architecture: str
    family: Any = None
    claims: tuple[str, ...] = ()


def is_marked(name: str) -> bool:
    """Whether a tensor's name says that it belongs to an MTP head."""
    return bool(_MARKS & set(name.split("."))) or re.search(r"(^|\.)mtp_\w+\.", name) is not None


def is_after(name: str, layers: int) -> bool:
    """Whether a tensor belongs to a decoder layer that comes after the target's ``layers``."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return found is not None and int(found[1]) >= layers


def find(named: Named) -> Match:
    """The family of a head.

    Raises:
        FourfoldError: no MTP tensors (names what was looked for), or none of the families (names the tensors, the
            nearest family and what is missing for it).
    """
    prefixes = _prefixes(named.names)
    whole: list[tuple[bool, int, int, Match]] = []
    partial: list[tuple[int, bool, Match, list[str]]] = []
    for order, family in enumerate(FAMILIES):
        known = family.name == named.family or named.architecture in family.architectures
        required = [template for role, template in family.roles.items() if role not in family.optional]
        for prefix in family.prefixes:
            match = Match(family, prefix, named.layers)
            numbered = [t for t in (*family.roles.values(), family.block) if "{" in t]
            present = [n for n in range(MODULES) if any(match.name(t, n) in prefixes for t in numbered)]
            count = max(present, default=0) + 1
            names = dict.fromkeys(match.name(t, n) for n in range(count) for t in (*required, family.block))
            missing = [name for name in names if name not in prefixes]
            roles = {match.name(t, n) for t in required for n in range(count)} & prefixes
            if not missing:
                whole.append((known, family.block.count("."), -order, Match(family, prefix, named.layers, count)))
            elif roles:
                partial.append((len(roles), known, match, missing))
    if whole:
        return max(whole, key=lambda item: item[:3])[3]
    raise FourfoldError(_refusal(named, partial))


def _prefixes(names: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for name in names:
        while (name := name.rpartition(".")[0]) and name not in found:
            found.add(name)
    return found


def _refusal(named: Named, partial: Sequence[tuple[int, bool, Match, list[str]]]) -> str:
    found = (name for name in named.names if is_marked(name) or is_after(name, named.layers))
    suspects = sorted(dict.fromkeys(without_expert(name) for name in found), key=lambda name: not is_marked(name))
    if not suspects:
        looked = sorted({f.prefixes[0] + f.roles["enorm"].format(n=0, layer=named.layers) for f in FAMILIES})
        told = f"; config.json says {', '.join(named.claims)}, so an export dropped them" if named.claims else ""
        return f"{named.path} has no MTP tensors; looked for {', '.join(looked)}{told}"
    vllm, sglang = IN_TREE.get(named.architecture, ("", ""))
    classes = [f"{engine}'s {c}" for engine, c in (("vLLM", vllm), ("SGLang", sglang)) if c]
    served = f"; {named.architecture} is served by {' and '.join(classes)} without fourfold" if classes else ""
    nearest, missing = _nearest(suspects, named.layers), ""
    if partial:
        _, _, match, lost = max(partial, key=lambda item: item[:2])
        nearest, missing = match.family.name, f", which also has {listed(lost)}"
    return (
        f"{named.path}: the MTP tensors follow no layout that is known; the nearest is {nearest}{missing}; "
        f"found {listed(suspects)}{served}"
    )


def _nearest(suspects: Sequence[str], layers: int) -> str:
    def words(names: Iterable[str]) -> set[str]:
        return {word for name in names for word in name.split(".") if not word.isdigit()}

    found = words(suspects)

    def likeness(family: Family) -> float:
        match = Match(family, family.prefixes[0], layers)
        own = words(match.name(template, 0) for template in (*family.roles.values(), family.block))
        return len(own & found) / len(own | found)

    return max(FAMILIES, key=likeness).name


def listed(names: Sequence[str], most: int = 12) -> str:
    """The first ``most`` of ``names``, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
