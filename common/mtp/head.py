"""What an MTP head is: which checkpoint tensors play which role, and how one draft step computes.

Plain data that goes into the ``config.json`` of a draft directory and comes back out of it.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from fourfold.common.errors import FourfoldError

Feedback = Literal["pre_norm", "post_norm"]
KEY = "fourfold_mtp"  # the key of a draft directory's config.json

# The parts of a module beside its decoder layer, as every family is described. `e_proj` and `h_proj` replace `eh_proj`
# where the two halves of the projection are two tensors; `norm`, `head` and `embedding` may be absent. `vocabulary` is
# a list of token ids (`vocabulary.DraftVocabulary`), which only heads that fourfold trained have.
ROLES = ("enorm", "hnorm", "eh_proj", "e_proj", "h_proj", "norm", "head", "embedding", "vocabulary")
BLOCK = "block"  # the decoder layer, in `MtpHead.locate`


@dataclass(frozen=True)
class Formula:
    """How one draft step computes: ``block(eh_proj([enorm(embedding) ; hnorm(hidden)]))``, then ``norm`` and the head.

    Attributes:
        embedding_first: the projection's input is [enorm(embedding) ; hnorm(hidden)]; else hidden comes first.
        mask_first_position: the embedding at position 0 is zeroed before ``enorm``.
        feedback: the hidden state that the next draft step gets, before or after ``norm``.
        unit_offset_norm: the norms multiply by ``1 + weight``.
        target_embedding_norm: the target's own norm of its embeddings comes before ``enorm``.
    """

    embedding_first: bool = True
    mask_first_position: bool = False
    feedback: Feedback = "post_norm"
    unit_offset_norm: bool = False
    target_embedding_norm: bool = False

    def text(self, roles: Container[str]) -> str:
        """The formula of a module that has ``roles``, as one line."""
        embedding = "target_embedding_norm(embedding)" if self.target_embedding_norm else "embedding"
        parts = [f"enorm({embedding}{' where position > 0' if self.mask_first_position else ''})", "hnorm(hidden)"]
        joined = f"eh_proj([{' ; '.join(parts if self.embedding_first else parts[::-1])}])"
        if "e_proj" in roles:
            joined = f"e_proj({parts[0]}) + h_proj({parts[1]})"
        normed = "norm(h)" if "norm" in roles else "h"
        fed = normed if self.feedback == "post_norm" else "h"
        norms = "; norms multiply by 1 + weight" if self.unit_offset_norm else ""
        return f"h = block({joined}); logits = head({normed}); the next step gets {fed}{norms}"


@dataclass(frozen=True)
class Module:
    """One MTP module, which predicts one depth.

    Attributes:
        roles: role (`ROLES`) to checkpoint name without ``.weight``. Modules may share a name. No ``head`` or
            ``embedding``: the target's is used.
        block: checkpoint prefix of the decoder layer; its tensors keep the sub-names that the target's layers have,
            except those that are a role.
        formats: sub-module name (relative to ``block``, or a role) to format (`formats.Format`), linear layers only.
    """

    roles: Mapping[str, str]
    block: str
    formats: Mapping[str, str]


@dataclass(frozen=True)
class MtpHead:
    """The MTP modules of one checkpoint.

    Attributes:
        family: name in `layouts.FAMILIES`.
        formula: how a step computes.
        modules: by depth.
        target_layers: decoder layers of the target; module i is layer ``target_layers + i`` of an engine.
        hidden_size: columns of the hidden state.
        limits: what of this head the generic classes do not compute; empty where they compute all of it.
    """

    family: str
    formula: Formula
    modules: tuple[Module, ...]
    target_layers: int
    hidden_size: int
    limits: str = ""

    def locate(self, name: str) -> Iterator[tuple[int, str, str]]:
        """Where the checkpoint tensor ``name`` belongs: (module, role or `BLOCK`, rest of the name).

        Nothing for a tensor that is no part of the head; several places for one that modules share.
        """
        for i, module in enumerate(self.modules):
            for role, prefix in module.roles.items():
                if name.startswith(f"{prefix}."):
                    yield i, role, name[len(prefix) + 1 :]
                    break
            else:
                if name.startswith(f"{module.block}."):
                    yield i, BLOCK, name[len(module.block) + 1 :]

    def to_config(self) -> dict[str, Any]:
        """The head as JSON."""
        return asdict(self) | {"modules": [_module_config(module) for module in self.modules]}

    @staticmethod
    def from_config(data: Any) -> MtpHead:
        """Read what `to_config` wrote.

        Raises:
            FourfoldError: a key is unknown, missing, or of another type; names it.
        """
        where = KEY
        _keys(data, MtpHead, where)
        formula, modules = data["formula"], data["modules"]
        _keys(formula, Formula, f"{where}.formula")
        if formula["feedback"] not in get_args(Feedback):
            raise FourfoldError(f"{where}.formula.feedback: {formula['feedback']!r} is none of {get_args(Feedback)}")
        if not isinstance(modules, list) or not modules:
            raise FourfoldError(f"{where}.modules: expected a list of modules, got {modules!r}")
        read = []
        for i, module in enumerate(modules):
            _keys(module, Module, f"{where}.modules[{i}]")
            for key in ("roles", "formats"):
                if not all(isinstance(value, str) for value in module[key].values()):
                    raise FourfoldError(f"{where}.modules[{i}].{key}: expected strings, got {module[key]!r}")
            unknown = sorted(set(module["roles"]) - set(ROLES))
            if unknown:
                raise FourfoldError(f"{where}.modules[{i}].roles: unknown {unknown[0]!r}; roles are {', '.join(ROLES)}")
            read.append(Module(dict(module["roles"]), module["block"], dict(module["formats"])))
        return MtpHead(**{**data, "formula": Formula(**formula), "modules": tuple(read)})


def _module_config(module: Module) -> dict[str, Any]:
    return {"roles": dict(module.roles), "block": module.block, "formats": dict(module.formats)}


_TYPES: dict[str, type] = {"bool": bool, "str": str, "int": int, "Feedback": str, "Formula": dict}


def _keys(data: Any, cls: type, where: str) -> None:
    if not isinstance(data, dict):
        raise FourfoldError(f"{where}: expected an object, got {data!r}; write the draft directory again")
    names = {field.name: str(field.type) for field in fields(cls)}
    wrong = sorted(set(names) ^ set(data))
    if wrong:
        state = "missing" if wrong[0] in names else "unknown"
        raise FourfoldError(f"{where}: {wrong[0]!r} is {state}; write the draft directory again")
    for name, kind in names.items():
        expected = _TYPES.get(kind, dict if kind.startswith("Mapping") else list)
        if type(data[name]) is not expected:
            raise FourfoldError(f"{where}.{name}: expected {expected.__name__}, got {data[name]!r}")
