"""Formats of an MTP head's layers, told from the tensors, and what contradicts the checkpoint's config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mtp_checkpoints import (
    BY_NAME,
    FORMATS,
    HIDDEN,
    LAYERS,
    MATRICES,
    Tensors,
    architecture,
    head,
    layer,
    target,
    write_model,
)

from fourfold.common.errors import FourfoldError
from fourfold.common.mtp.formats import contradictions, read_declared, stored_layers
from fourfold.common.mtp.layouts import FAMILIES, Family
from fourfold.common.mtp.reader import read_head
from fourfold.common.tensor_index import Entry

EVERY = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def whole(family: Family, **options: Any) -> Tensors:
    return target() | head(family, family.prefixes[0], **options)


def write(path: Path, family: Family, tensors: Tensors, **config: Any) -> Path:
    return write_model(path, tensors, {"architectures": [architecture(family)], **config})


@pytest.mark.parametrize("format", FORMATS)
@EVERY
def test_formats_are_told_from_the_tensors(family: Family, format: str, tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    path = write(tmp_path / "m", family, whole(family, format=format), **(config if format == "fp8_block" else {}))
    found = read_head(path)
    formats = found.head.modules[0].formats
    assert formats["self_attn.o_proj"] == formats["mlp.experts.*.down_proj"] == format
    assert formats["mlp.gate"] == "bf16"
    assert found.stored[f"{found.head.modules[0].block}.self_attn.q_proj"].shape == (HIDDEN, HIDDEN)


CONFIGS: dict[str, dict[str, Any]] = {
    "fp8_block": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "fp8_tensor": {"quant_method": "fp8"},
    "nvfp4_modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "nvfp4_compressed": {
        "quant_method": "compressed-tensors",
        "config_groups": {"g": {"weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group"}}},
    },
    "mxfp4": {"quant_method": "mxfp4"},
    "mxfp8": {"quantization": {"quant_algo": "MXFP8"}},
    "fp8_channel": {"quantization": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}},
}


@pytest.mark.parametrize("declared", CONFIGS)
@pytest.mark.parametrize("stored", FORMATS)
def test_contradictions_with_the_config(declared: str, stored: str, tmp_path: Path) -> None:
    family = BY_NAME["deepseek_v3"]
    config = CONFIGS[declared]
    path = write(tmp_path / "m", family, whole(family, format=stored), quantization_config=config)
    found = read_head(path).contradictions
    if stored == declared or {stored, declared} == {"nvfp4_modelopt", "nvfp4_compressed"}:
        assert found == ()
    else:
        assert len(found) == 1
        assert f"10 layers are stored as {stored}, but quantization_config declares {declared}" in found[0]
        assert "model.layers.2.self_attn.q_proj" in found[0]


def test_a_quantised_head_that_the_config_ignores_or_does_not_know(tmp_path: Path) -> None:
    family = BY_NAME["qwen3_next"]
    tensors = whole(family, format="nvfp4_modelopt")
    ignoring = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["mtp*"]}
    for i, config in enumerate(({"quantization_config": ignoring}, {})):
        (finding,) = read_head(write(tmp_path / str(i), family, tensors, **config)).contradictions
        assert "10 layers are stored as nvfp4_modelopt, but quantization_config declares the model's dtype" in finding
    (tmp_path / "1" / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    (finding,) = read_head(tmp_path / "1").contradictions
    assert finding == "1 layer is stored as bf16, but quantization_config declares nvfp4_modelopt: mtp.fc"
    mixed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"mtp.*": {"quant_algo": "FP8"}}}
    (finding,) = read_head(write(tmp_path / "mixed", family, tensors, quantization_config=mixed)).contradictions[:1]
    assert "10 layers are stored as nvfp4_modelopt, but quantization_config declares fp8_tensor" in finding


def test_the_experts_of_deepseek_v4_are_declared_beside_the_config(tmp_path: Path) -> None:
    family = BY_NAME["deepseek_v4"]
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}, "expert_dtype": "fp4"}
    own = head(family, "mtp.", format="fp8_block")
    for name in ("e_proj", "h_proj"):
        own.pop(f"mtp.0.{name}.weight")
        own |= layer(f"mtp.0.{name}", (HIDDEN, HIDDEN), "fp8_block")
    for name in [name for name in own if ".experts." in name]:
        del own[name]
    for name, shape in MATRICES.items():
        own |= layer(f"mtp.0.{name}", shape, "mxfp4") if ".experts." in name else {}
    found = read_head(write(tmp_path / "m", family, target() | own, **config))
    assert found.contradictions == () and found.head.modules[0].formats["mlp.experts.*.up_proj"] == "mxfp4"


def test_methods_that_are_not_read_are_named(tmp_path: Path) -> None:
    family = BY_NAME["deepseek_v3"]
    for method in ("awq", "gptq", None):
        path = write(tmp_path / str(method), family, whole(family), quantization_config={"quant_method": method})
        (finding,) = read_head(path).contradictions
        assert finding.endswith(f"of method {method or 'none'} is not read; the tensors are not quantised")


def test_experts_of_two_formats_are_named_apart(tmp_path: Path) -> None:
    family = BY_NAME["deepseek_v3"]
    tensors = whole(family)
    name = f"model.layers.{LAYERS}.mlp.experts.1.up_proj"
    del tensors[f"{name}.weight"]
    tensors |= layer(name, (128, HIDDEN), "fp8_channel")
    formats = read_head(write(tmp_path / "m", family, tensors)).head.modules[0].formats
    assert formats["mlp.experts.0.up_proj"] == "bf16" and formats["mlp.experts.1.up_proj"] == "fp8_channel"
    assert formats["mlp.experts.*.down_proj"] == "bf16"


def test_fused_experts_are_a_layer() -> None:
    tensors = {"experts.gate_up_proj": Entry("f", "BF16", (4, 64, 32)), "A_log": Entry("f", "F32", (4,))}
    assert {name: found.format for name, found in stored_layers(tensors).items()} == {"experts.gate_up_proj": "bf16"}


def test_the_block_size_of_fp8_is_the_declared_one() -> None:
    tensors = {"q.weight": Entry("f", "F8_E4M3", (64, 64)), "q.weight_scale_inv": Entry("f", "F32", (2, 4))}
    with pytest.raises(FourfoldError, match="no format that is known"):
        stored_layers(tensors)
    declared = read_declared({"quant_method": "fp8", "weight_block_size": [32, 16]})
    found = stored_layers(tensors, declared.block)
    assert found["q"].format == "fp8_block" and contradictions(found, declared) == []


def test_patterns_of_compressed_tensors_choose_layers() -> None:
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    group = {"weights": weights, "targets": ["re:.*mlp.*"]}
    declared = read_declared({"config_groups": {"a": group}, "ignore": ["re:.*down_proj"]})
    names = ("m.mlp.up_proj", "m.mlp.down_proj", "m.self_attn.q_proj")
    assert [declared.format_of(name) for name in names] == ["fp8_tensor", None, None]
