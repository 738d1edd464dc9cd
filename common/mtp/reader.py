"""Find the MTP head of a checkpoint and describe it, from the headers of its files; no weight is read."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fourfold.common.errors import FourfoldError
from fourfold.common.mtp import formats, matching
from fourfold.common.mtp.formats import Declared, Stored
from fourfold.common.mtp.head import BLOCK, KEY, Formula, Module, MtpHead
from fourfold.common.mtp.layouts import Family
from fourfold.common.mtp.matching import Match, Named, is_after, is_marked, listed
from fourfold.common.tensor_index import FLOATS, Entry, TensorIndex, read_header, read_json

MODELOPT_FILE = "hf_quant_config.json"
_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "num_mtp_layers")


@dataclass(frozen=True)
class Reading:
    """What was found in a checkpoint.

    Attributes:
        index: its tensors.
        config: the text model's config.
        architecture: of the target.
        family: the layout.
        head: the description.
        tensors: the head's own tensors.
        stored: the head's linear layers, under their checkpoint names.
        declared: what the checkpoint says about its quantisation.
        contradictions: where the tensors are not what the checkpoint declares (`formats.contradictions`), a line each.
        findings: other doubts, a line each.
    """

    index: TensorIndex
    config: Mapping[str, Any]
    architecture: str
    family: Family
    head: MtpHead
    tensors: Mapping[str, Entry]
    stored: Mapping[str, Stored]
    declared: Declared
    contradictions: tuple[str, ...]
    findings: tuple[str, ...]


def read_head(path: Path) -> Reading:
    """Read the MTP head of the model directory ``path``.

    Raises:
        FourfoldError: defects of the files (`TensorIndex`) or of the config; no MTP tensors or an unknown layout
            (`matching.find`), DSpark stages instead of a head; a tensor of another shape, or in no known format.
    """
    index = TensorIndex(path)
    config = text_config(index.config)
    layers, hidden = (_number(config, key) for key in ("num_hidden_layers", "hidden_size"))
    architecture = _architecture(index.config)
    counts = {key: _number(config, key, least=0) for key in _COUNTS if config.get(key) is not None}
    _refuse_dspark(index)
    findings = _add_stray_files(index, layers)
    written = index.config.get(KEY)
    match = matching.find(
        Named(
            *(path, list(index.entries), layers, architecture),
            written.get("family") if isinstance(written, dict) else None,
            tuple(f"{key} = {count}" for key, count in counts.items() if count),
        )
    )
    family = match.family
    modules = tuple(_module(match, n, index) for n in range(match.modules))
    head = MtpHead(family.name, _formula(family, config), modules, layers, hidden, family.limits)
    tensors = {name: entry for name, entry in index.entries.items() if next(head.locate(name), None)}
    extra = [name for name in index.entries if name not in tensors and is_marked(name)]
    if extra:
        raise FourfoldError(f"{path}: the layout is {family.name}, which has no role for {listed(extra)}")
    declared = formats.read_declared(quantization_config(index))
    if config.get("expert_dtype") == "fp4":  # DeepSeek V4 says so outside quantization_config
        declared = replace(declared, groups=((("re:.*[.]experts[.]",), "mxfp4"), *declared.groups))
    stored = formats.stored_layers(tensors, declared.block)
    _check_shapes(head, tensors, stored, _number(config, "vocab_size"))
    wrong = formats.contradictions(
        {n: s for n, s in stored.items() if n not in _unquantised(family, modules)}, declared
    )
    trained = "vocabulary" in modules[0].roles  # by fourfold
    if architecture not in family.architectures and written is None and not trained:
        findings.append(f"nobody has checked that a {architecture} computes its head as {family.name} does")
    findings += [
        f"config.json says {key} = {count}, the tensors are of {match.modules}"
        for key, count in counts.items()
        if count != match.modules
    ]
    if not family.limits:
        findings += _layer_findings(head, index)
    head = replace(head, modules=tuple(replace(m, formats=_formats(head, i, stored)) for i, m in enumerate(modules)))
    return Reading(index, config, architecture, family, head, tensors, stored, declared, tuple(wrong), tuple(findings))


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text model; that of a multimodal model has it inside."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) and "hidden_size" in inner else config


def quantization_config(index: TensorIndex) -> Any:
    """The ``quantization_config`` of the model, which older ModelOpt checkpoints keep in a file of its own."""
    for config in (index.config, text_config(index.config)):
        if config.get("quantization_config") is not None:
            return config["quantization_config"]
    return read_json(index.path / MODELOPT_FILE) if (index.path / MODELOPT_FILE).is_file() else None


def _number(config: Mapping[str, Any], key: str, least: int = 1) -> int:
    value = config.get(key)
    if type(value) is not int or value < least:
        raise FourfoldError(f"config.json: {key}: expected a number of at least {least}, got {value!r}")
    return value


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise FourfoldError(f"config.json: architectures: expected a list with a class name, got {names!r}")
    return names[0]


def _refuse_dspark(index: TensorIndex) -> None:
    stages = [name for name in index.entries if re.match(r"mtp\.\d+\.(main_proj|main_norm|markov_head)\.", name)]
    heads = [name for name in index.entries if re.match(r"mtp\.\d+\.(enorm|hnorm)\.", name)]
    if index.config.get("model_type") == "deepseek_v41" or (stages and not heads):
        raise FourfoldError(
            f"{index.path} ships DSpark stages under mtp.* and no MTP head; use the engine's DSpark: vLLM "
            """--speculative-config '{"method": "dspark"}', SGLang --speculative-algorithm DSPARK"""
        )


def _add_stray_files(index: TensorIndex, layers: int) -> list[str]:
    """Take MTP tensors from files that the index forgot, where it names none."""
    if any(is_marked(name) for name in index.entries):
        return []
    findings = []
    for file in sorted(index.path.glob("*.safetensors")):
        if file.name in index.shards:
            continue
        names = {name: place for name, place in read_header(file).items() if name not in index.entries}
        found = {name: place for name, place in names.items() if is_marked(name) or is_after(name, layers)}
        index.entries.update({name: Entry(file.name, *place) for name, place in found.items()})
        if found:
            findings.append(
                f"the index does not name {file.name}, which holds MTP tensors: vLLM does not load it, SGLang only for "
                "GLM-4-MoE"
            )
    return findings


def _module(match: Match, n: int, index: TensorIndex) -> Module:
    names = {role: match.name(template, n) for role, template in match.family.roles.items()}
    parameters = [f".{parameter}" for parameter in formats.WEIGHTS]
    roles = {role: name for role, name in names.items() if any(name + p in index.entries for p in parameters)}
    for role in set(names) - set(roles) - set(match.family.optional):
        raise FourfoldError(f"{names[role]} ({role} of the MTP head) has no weight")
    return Module(roles, match.name(match.family.block, n), {})


def _unquantised(family: Family, modules: Sequence[Module]) -> set[str]:
    """Layers that engines do not quantise by the config."""
    roles = {"head", "embedding", *(["eh_proj"] if family.plain_projection else [])}
    return {name for module in modules for role, name in module.roles.items() if role in roles}


def _formula(family: Family, config: Mapping[str, Any]) -> Formula:
    """The family's formula, with what the keys of a config say that transformers reads."""
    formula = family.formula
    if isinstance(config.get("mtp_hidden_states_first"), bool):
        formula = replace(formula, embedding_first=not config["mtp_hidden_states_first"])
    if config.get("use_embed_norm") is False:
        formula = replace(formula, target_embedding_norm=False)
    return formula


def _check_shapes(head: MtpHead, tensors: Mapping[str, Entry], stored: Mapping[str, Stored], vocabulary: int) -> None:
    size = head.hidden_size
    shapes: dict[str, tuple[int, ...]] = {role: (size,) for role in ("enorm", "hnorm", "norm")}
    shapes |= {"eh_proj": (size, 2 * size), "e_proj": (size, size), "h_proj": (size, size)}
    for module in head.modules:
        for role, name in module.roles.items():
            vector = tensors.get(f"{name}.weight")
            if role == "vocabulary":
                if vector is None or vector.dtype not in ("I32", "I64") or len(vector.shape) != 1:
                    raise FourfoldError(f"{name}: expected a list of token ids, found {vector}")
                continue
            if name not in stored and (vector is None or vector.dtype not in FLOATS):
                raise FourfoldError(f"{name}: expected a weight in floating point, found {vector and vector.dtype}")
            found = stored[name].shape if name in stored else vector.shape if vector else ()
            if role in shapes and found != shapes[role]:
                raise FourfoldError(f"{name}: expected {list(shapes[role])} (hidden_size {size}), found {list(found)}")
            # A vocabulary may be padded.
            if role not in shapes and (len(found) != 2 or found[1] != size or found[0] < vocabulary):
                raise FourfoldError(
                    f"{name}: expected {[vocabulary, size]} (vocab_size, hidden_size), found {list(found)}"
                )
    filled = {i for name in tensors for i, role, _ in head.locate(name) if role == BLOCK}
    for i, module in enumerate(head.modules):
        if i not in filled:
            raise FourfoldError(f"{module.block} holds no decoder layer; found only {', '.join(module.roles)}")


def _layer_findings(head: MtpHead, index: TensorIndex) -> list[str]:
    """Compare each decoder layer of the head with those of the target: one that lacks tensors drafts noise."""
    target: dict[str, set[str]] = defaultdict(set)
    own: list[set[str]] = [set() for _ in head.modules]
    for name in index.entries:
        places = list(head.locate(name))
        for i, role, rest in places:
            if role == BLOCK:
                own[i].add(formats.without_expert(formats.split(rest)[0]))
        found = None if places else re.match(r"((?:\w+\.)*?layers\.\d+)\.(.+)", name)
        if found:
            target[found[1]].add(formats.without_expert(formats.split(found[2])[0]))
    findings = []
    for module, layers in zip(head.modules, own, strict=True):
        if target and layers not in target.values():
            near = min(target, key=lambda name: len(target[name] ^ layers))
            lacks, has = sorted(target[near] - layers), sorted(layers - target[near])
            parts = [f"lacks {listed(lacks)}"] * bool(lacks) + [f"has {listed(has)}"] * bool(has)
            findings.append(f"{module.block} is like no layer of the target: beside {near} it {' and '.join(parts)}")
    return findings


def _formats(head: MtpHead, module: int, stored: Mapping[str, Stored]) -> dict[str, str]:
    """Format of each layer of a module; one entry with ``*`` for experts that are all alike.

    Raises:
        FourfoldError: an expert is missing.
    """
    experts: dict[str, dict[int, str]] = defaultdict(dict)
    result: dict[str, str] = {}
    for name, found in stored.items():
        for i, role, rest in head.locate(f"{name}."):
            layer = rest[:-1] if role == BLOCK else role
            pattern = formats.without_expert(layer)
            if i == module and pattern == layer:
                result[layer] = found.format
            elif i == module:
                experts[pattern][int(layer[pattern.index("*") :].partition(".")[0])] = found.format
    count = max((max(numbers) + 1 for numbers in experts.values()), default=0)
    for pattern, numbers in experts.items():
        for lost in set(range(count)) - set(numbers):
            raise FourfoldError(f"{head.modules[module].block}.{pattern.replace('*', str(lost))} is missing")
        if len(set(numbers.values())) == 1:
            result[pattern] = numbers[0]
        else:
            result |= {pattern.replace("*", str(n)): format for n, format in numbers.items()}
    return result
