"""Write the draft directory of an MTP head: a config and an index over links to the model's own shards.

Both engines open every shard that the index names and yield all of its tensors, listed or not (in vLLM 0.32 and SGLang
0.5.23 ``filter_duplicate_safetensors_files`` filters files): a model class keeps those that `MtpHead.locate` places.
Neither engine reads a tokenizer from a draft directory: both use the target's.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from fourfold.common.errors import FourfoldError
from fourfold.common.mtp.engines import (
    ARCHITECTURE,
    SGLANG_MLA,
    WORDS,
    Engine,
    has_vocabulary,
    launch_flags,
    serving_class,
)
from fourfold.common.mtp.formats import NVFP4, PLAIN, without_expert
from fourfold.common.mtp.head import BLOCK, KEY
from fourfold.common.mtp.reader import Reading, quantization_config, read_head
from fourfold.common.tensor_index import INDEX

_SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


def extract(model: Path, out: Path, engine: Engine) -> Reading:
    """Write the draft directory of ``model``'s MTP head for ``engine`` to ``out``.

    Raises:
        FourfoldError: what `read_head` raises; a head that the generic class does not compute; formats that one config
            cannot declare; ``out`` exists or cannot be written. Then there is no ``out``.
    """
    reading = read_head(model)
    if reading.head.limits:
        flags = [
            f"{e}: {launch_flags(reading, e, model, own=True)}" for e in get_args(Engine) if serving_class(reading, e)
        ]
        own = f"; serve it with the engine's own class, {', '.join(flags)}" if flags else ""
        raise FourfoldError(
            f"{ARCHITECTURE} does not compute the head of {model} ({reading.family.name}): {reading.head.limits}{own}"
        )
    config = draft_config(reading, engine)
    if os.path.lexists(out):
        raise FourfoldError(f"{out} exists; give a directory that does not exist yet")
    weight_map = {name: entry.shard for name, entry in reading.tensors.items()}
    size = sum(_bytes(entry.dtype, entry.shape) for entry in reading.tensors.values())
    parent = out.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=parent))
        try:
            part.chmod(0o777 & ~_umask())
            _write_json(part / "config.json", config)
            _write_json(part / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
            for shard in sorted(set(weight_map.values())):
                (part / shard).symlink_to(os.path.relpath((model / shard).resolve(), parent.resolve() / part.name))
            if engine == "sglang" and has_vocabulary(reading):
                _write_words(part / WORDS, model, reading)
            part.rename(out)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    except OSError as error:
        raise FourfoldError(f"{out} cannot be written: {error}") from None
    return reading


def draft_config(reading: Reading, engine: Engine) -> dict[str, Any]:
    """The ``config.json`` of a draft directory for ``engine``.

    Raises:
        FourfoldError: the head's layers are quantised in more than one format.
    """
    config, head = dict(reading.config), reading.head
    for key in ("dtype", "torch_dtype", "tie_word_embeddings"):
        if key in reading.index.config:
            config.setdefault(key, reading.index.config[key])
    config |= {"target_architecture": reading.architecture, "target_model_type": config.get("model_type")}
    mla, architectures = config.get("kv_lora_rank") is not None, [ARCHITECTURE]
    if engine == "vllm":  # it tells MLA by the model_type
        config["model_type"] = "deepseek_mtp" if mla else "mtp"
    elif mla:  # the first name is the class
        architectures.append(SGLANG_MLA)
    count = len(head.modules)
    config |= {"architectures": architectures, "n_predict": count, "num_nextn_predict_layers": count}
    config[KEY] = head.to_config()
    config.pop("quantization_config", None)
    quantization = _quantization(reading)
    return config | ({"quantization_config": quantization} if quantization else {})


def _quantization(reading: Reading) -> Mapping[str, Any] | None:
    """What the head's tensors are, in a vocabulary that both engines read; None where they are not quantised."""
    found = sorted({layer.format for layer in reading.stored.values()} - set(PLAIN.values()))
    if not found:
        return None
    if len(found) > 1:
        raise FourfoldError(f"the head's layers are {' and '.join(found)}; an engine takes one format for a draft")
    ignore = _plain_layers(reading)
    activations = any(name.endswith(".input_scale") for name in reading.tensors)
    if found[0] in ("fp8_block", "fp8_tensor"):
        block = {"weight_block_size": list(reading.declared.block)} if found[0] == "fp8_block" else {}
        scheme = "static" if activations and not block else "dynamic"
        return {"quant_method": "fp8", "activation_scheme": scheme, "modules_to_not_convert": ignore, **block}
    if found[0] == NVFP4[0]:
        algorithm = "NVFP4" if activations else "W4A16_NVFP4"
        return {"quant_method": "modelopt", "quant_algo": algorithm, "group_size": 16, "ignore": ignore}
    own = quantization_config(reading.index)
    if own and own.get("config_groups") and found[0] in {format for _, format in reading.declared.groups}:
        return {**own, "ignore": ignore}
    raise FourfoldError(f"the head's layers are {found[0]}, which no config that both engines read can say")


def _plain_layers(reading: Reading) -> list[str]:
    """The head's unquantised layers as the generic class names them."""
    head, names = reading.head, {"lm_head"}
    for name, layer in reading.stored.items():
        if layer.format in PLAIN.values():
            for i, role, rest in head.locate(f"{name}."):
                own = f"model.layers.{head.target_layers + i}.{rest[:-1] if role == BLOCK else role}"
                names |= {own, without_expert(own).partition(".*")[0]}  # engines name the experts as one module
    return sorted(names)


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    size = _SIZES.get(dtype, 1)
    for length in shape:
        size *= length
    return size


def _write_words(path: Path, model: Path, reading: Reading) -> None:
    """Write the draft vocabulary as a list of token ids, which SGLang's ``--speculative-token-map`` loads."""
    import torch
    from safetensors import safe_open

    from fourfold.common.mtp.vocabulary import check_words

    name = f"{reading.head.modules[0].roles['vocabulary']}.weight"
    with safe_open(model / reading.tensors[name].shard, "pt") as shard:
        words = shard.get_tensor(name)
    check_words(words)
    torch.save(words.tolist(), path)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
