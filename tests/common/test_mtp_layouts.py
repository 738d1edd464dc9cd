"""Reading MTP heads: every family, every format, what contradicts a config, what transformers reads."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mtp_checkpoints import (
    BY_NAME,
    HIDDEN,
    LAYERS,
    Tensors,
    architecture,
    decoder,
    head,
    model,
    target,
    write_file,
    write_model,
)

from fourfold.common.compat import source_root
from fourfold.common.errors import FourfoldError
from fourfold.common.mtp.head import BLOCK, KEY, MtpHead
from fourfold.common.mtp.layouts import FAMILIES, IN_TREE, Family
from fourfold.common.mtp.reader import read_head

EVERY = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def whole(family: Family, prefix: str = "", **options: Any) -> Tensors:
    return target() | head(family, prefix or family.prefixes[0], **options)


def write(path: Path, family: Family, tensors: Tensors, **config: Any) -> Path:
    return write_model(path, tensors, {"architectures": [architecture(family)], **config})


@pytest.mark.parametrize("modules", [1, 3])
@EVERY
def test_a_head_of_every_family(family: Family, modules: int, tmp_path: Path) -> None:
    for i, prefix in enumerate(family.prefixes):
        own = head(family, prefix, modules)
        found = read_head(write(tmp_path / str(i), family, target() | own))
        assert found.family is family and found.head.limits == family.limits and len(found.head.modules) == modules
        assert set(found.tensors) == set(own)
        assert found.head.formula == family.formula and found.head.target_layers == LAYERS
        for n, module in enumerate(found.head.modules):
            assert set(module.roles) == set(family.roles)
            for role, name in module.roles.items():
                assert (n, role, "weight") in list(found.head.locate(f"{name}.weight"))
            q_proj = f"{module.block}.self_attn.q_proj.weight"
            assert list(found.head.locate(q_proj)) == [(n, BLOCK, "self_attn.q_proj.weight")]
            assert set(module.formats.values()) == {"bf16"} and "mlp.experts.*.up_proj" in module.formats
        assert not list(found.head.locate("model.norm.weight"))
        assert MtpHead.from_config(json.loads(json.dumps(found.head.to_config()))) == found.head
        known = architecture(family) in family.architectures
        assert found.contradictions == () and len(found.findings) == (0 if known else 1), found.findings


@EVERY
def test_optional_roles_may_be_absent_and_required_ones_may_not(family: Family, tmp_path: Path) -> None:
    optional = [role for role in family.roles if role in family.optional]
    found = read_head(write(tmp_path / "few", family, whole(family, without=optional)))
    assert found.family is family and not set(optional) & set(found.head.modules[0].roles)
    for role in set(family.roles) - set(optional):
        with pytest.raises(FourfoldError) as caught:
            read_head(write(tmp_path / role, family, whole(family, without=[role])))
        missing = family.prefixes[0] + family.roles[role].format(n=0, layer=LAYERS)
        assert "follow no layout that is known" in str(caught.value)
        if family.architectures:  # else another family with one role less is as near
            assert f"the nearest is {family.name}, which also has {missing}" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "counts"),
    [
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers = 2"),
        ({"num_mtp_modules": 0}, "num_mtp_modules = 0"),
    ],
)
def test_the_number_of_modules_is_that_of_the_tensors(config: dict[str, int], counts: str, tmp_path: Path) -> None:
    (finding,) = read_head(model(tmp_path / "m", "deepseek_v3", **config)).findings
    assert finding == f"config.json says {counts}, the tensors are of 1"


def test_a_decoder_layer_that_lacks_or_has_tensors_is_reported(tmp_path: Path) -> None:
    family = BY_NAME["glm4_moe"]
    tensors = whole(family)
    del tensors["model.layers.2.self_attn.o_proj.weight"]
    tensors["model.layers.2.self_attn.sinks"] = ("F32", (4,))
    (finding,) = read_head(write(tmp_path / "m", family, tensors)).findings
    assert "lacks self_attn.o_proj and has self_attn.sinks" in finding and "beside model.layers.0 it" in finding
    alone = {name: place for name, place in tensors.items() if name.startswith("model.layers.2.")}
    assert read_head(write(tmp_path / "alone", family, alone)).findings == ()


def test_a_module_in_between_is_missed(tmp_path: Path) -> None:
    tensors = {name: p for name, p in whole(BY_NAME["mimo"], modules=3).items() if ".mtp_layers.1." not in name}
    with pytest.raises(FourfoldError, match=r"which also has model\.mtp_layers\.1\.token_layernorm"):
        read_head(write(tmp_path / "m", BY_NAME["mimo"], tensors))


def test_config_keys_of_transformers_change_the_formula(tmp_path: Path) -> None:
    found = read_head(model(tmp_path / "a", "transformers", mtp_hidden_states_first=True)).head.formula
    assert found == replace(BY_NAME["transformers"].formula, embedding_first=False)
    found = read_head(model(tmp_path / "b", "inkling", use_embed_norm=False)).head.formula
    assert not found.target_embedding_norm and not found.embedding_first


def test_a_text_model_inside_a_multimodal_one(tmp_path: Path) -> None:
    family = BY_NAME["glm4_moe"]
    text = {"num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "vocab_size": 256, "num_nextn_predict_layers": 1}
    tensors = {n.replace("model.", "model.language_model.", 1): p for n, p in whole(family).items()}
    path = write(tmp_path / "m", family, tensors, text_config=text, hidden_size=1, num_hidden_layers=1)
    found = read_head(path)
    assert found.findings == () and found.head.modules[0].block == f"model.language_model.layers.{LAYERS}"


def test_no_mtp_tensors(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", target(), {"architectures": ["A"], "num_nextn_predict_layers": 1})
    with pytest.raises(FourfoldError) as caught:
        read_head(path)
    text = str(caught.value)
    assert "has no MTP tensors; looked for" in text and "num_nextn_predict_layers = 1, so an export dropped" in text
    for name in ("model.layers.2.enorm", "mtp.pre_fc_norm_embedding", "model.mtp_layers.0.token_layernorm"):
        assert name in text


@pytest.mark.parametrize(
    ("names", "nearest"),
    [
        (["mtp.0.layer.self_attn.q_proj.weight", "mtp.0.layer.w_emb.weight"], ""),
        (["model.mtp.layers.0.proj_in.weight", "model.mtp.layers.0.transformer_layer.mlp.weight"], "minimax_m3"),
        (["mtp.layers.0.mlp.up_proj.weight", "mtp.pre_norm.weight"], "qwen3_next"),
        (["model.layers.2.mtp_block.self_attn.q_proj.weight"], ""),
        (["nextn.0.enormous.weight", "nextn.0.proj.weight"], ""),
    ],
    ids=str,
)
def test_unknown_layouts_are_refused_with_their_tensors(names: list[str], nearest: str, tmp_path: Path) -> None:
    tensors = target() | {name: ("BF16", (HIDDEN, HIDDEN)) for name in names}
    with pytest.raises(FourfoldError) as caught:
        read_head(write_model(tmp_path / "m", tensors, {"architectures": ["NemotronHForCausalLM"]}))
    text = str(caught.value)
    assert "follow no layout that is known; the nearest is " + nearest in text and all(name in text for name in names)
    assert "served by vLLM's NemotronHMTPModel and SGLang's NemotronHForCausalLMMTP without fourfold" in text


@pytest.mark.parametrize("extra", ["mtp.gate.weight", "mtp.hc_head_fn", "mtp.norm2.weight", "model.mtp_scale"])
def test_a_tensor_without_a_role_is_refused(extra: str, tmp_path: Path) -> None:
    family = BY_NAME["qwen3_next"]
    tensors = whole(family) | {extra: ("F32", (HIDDEN,))}
    if extra == "model.mtp_scale":
        tensors["model.mtp_scale.weight"] = tensors.pop(extra)
    with pytest.raises(FourfoldError, match=f"layout is qwen3_next, which has no role for {re.escape(extra)}"):
        read_head(write(tmp_path / "m", family, tensors))


def test_dspark_is_no_mtp_head(tmp_path: Path) -> None:
    names = ("mtp.0.main_proj", "mtp.0.main_norm", "mtp.2.markov_head.embed", "mtp.2.norm", "mtp.1.attn.wq_a")
    tensors = target() | {f"{name}.weight": ("BF16", (HIDDEN, HIDDEN)) for name in names}
    by_names = write_model(tmp_path / "a", tensors, {"architectures": ["A"]})
    by_type = write_model(tmp_path / "b", target(), {"architectures": ["A"], "model_type": "deepseek_v41"})
    for path in (by_names, by_type):
        with pytest.raises(
            FourfoldError, match="ships DSpark stages under mtp.* and no MTP head; use the engine's DSp"
        ):
            read_head(path)
    both = target() | head(BY_NAME["deepseek_v4"], "mtp.") | {"mtp.0.main_proj.weight": ("BF16", (HIDDEN, HIDDEN))}
    assert read_head(write_model(tmp_path / "c", both, {"architectures": ["A"]})).family.name == "deepseek_v4"


def test_mtp_tensors_in_a_file_that_the_index_forgot(tmp_path: Path) -> None:
    family = BY_NAME["glm4_moe"]
    path = write_model(tmp_path / "m", target(), {"architectures": ["Glm4MoeForCausalLM"]}, shards=2)
    write_file(path / "mtp.safetensors", head(family, "model."))
    found = read_head(path)
    assert "the index does not name mtp.safetensors" in found.findings[0] and len(found.findings) == 1
    assert {entry.shard for entry in found.tensors.values()} == {"mtp.safetensors"}


def test_only_headers_are_read(tmp_path: Path) -> None:
    path = model(tmp_path / "m", "deepseek_v3")
    tensors = {"model.layers.0.huge.weight": ("F32", (1 << 20, 1 << 16))} | whole(BY_NAME["deepseek_v3"])
    write_file(path / "model.safetensors", tensors)
    assert (path / "model.safetensors").stat().st_size > 1 << 37
    begin = time.process_time()
    assert read_head(path).family.name == "deepseek_v3"
    assert time.process_time() - begin < 2


ROOTS = {engine: source_root(engine) for engine in ("vllm", "sglang")}  # also finds tests/vllm and tests/sglang
INSTALLED = {
    engine: root / engine for engine, root in ROOTS.items() if root and (root / engine / "version.py").is_file()
}


def test_an_engine_is_installed() -> None:
    assert INSTALLED


@pytest.mark.parametrize("engine", INSTALLED)
@pytest.mark.parametrize("architecture", IN_TREE)
def test_engines_have_the_classes_of_the_table(engine: str, architecture: str) -> None:
    vllm, sglang = IN_TREE[architecture]
    root = INSTALLED[engine]
    if engine == "vllm":
        registry = (root / "model_executor" / "models" / "registry.py").read_text()
        rewritten = (root / "config" / "speculative.py").read_text()
        assert not vllm or (f'"{vllm}": (' in registry and f'"{architecture}": (' in registry)
        assert not vllm or f'"{vllm}"' in rewritten
        assert vllm or architecture not in rewritten
    else:
        rewritten = (root / "srt" / "configs" / "model_config.py").read_text()
        models = "".join(file.read_text() for file in (root / "srt" / "models").glob("*.py"))
        assert not sglang or (f'"{sglang}"' in rewritten and f'"{architecture}"' in rewritten)
        assert not sglang or f"class {sglang}(" in models
        assert sglang or f'architectures[0] == "{architecture}"' not in rewritten


def test_from_config_refuses_what_to_config_does_not_write(tmp_path: Path) -> None:
    good = read_head(model(tmp_path / "m", "mimo")).head.to_config()
    module, formula = good["modules"][0], good["formula"]
    bad: list[Any] = [None, [], "x", {}, {**good, "extra": 1}, {**good, "hidden_size": "64"}, {**good, "modules": []}]
    bad += [{**good, "target_layers": True}, {**good, "formula": None}, {**good, "modules": module}]
    bad += [{**good, "formula": {**formula, **change}} for change in ({"feedback": "no"}, {"embedding_first": 1})]
    changes = ({"block": 3}, {"roles": {"enorm": 3}}, {"roles": {"w": "x"}}, {"formats": None}, {"more": 1})
    bad += [{**good, "modules": [{**module, **change}]} for change in changes]
    bad += [{key: value for key, value in good.items() if key != lost} for lost in good]
    for data in bad:
        with pytest.raises(FourfoldError, match=KEY):
            MtpHead.from_config(data)


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_transformers_loads_the_layout(name: str, tmp_path: Path) -> None:
    """transformers' MtpModel finds every weight under our names, in the place of the role, and none is left over."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM
    from transformers.modeling_layers import MtpModel

    shape: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4}
    shape |= {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    if name == "deepseek_v3":
        sizes = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
        main: Any = DeepseekV3ForCausalLM(DeepseekV3Config(**shape, **sizes))
    else:
        main = Glm4MoeForCausalLM(Glm4MoeConfig(**shape, head_dim=8))
    main.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for key in [key for key in tensors if key.startswith("model.layers.1.")]:
        tensors[key.replace(".1.", ".2.", 1)] = torch.randn(tensors[key].shape, generator=generator)
    sizes = {"eh_proj": (32, 64), "embedding": (64, 32), "head": (64, 32)}
    roles = {role: "model." + template.format(layer=2) for role, template in BY_NAME[name].roles.items()}
    roles.pop("vocabulary", None)  # fourfold's own
    for role, key in roles.items():
        tensors[f"{key}.weight"] = torch.randn(sizes.get(role, (32,)), generator=generator)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))

    found = read_head(tmp_path)
    assert found.family.name == name and dict(found.head.modules[0].roles) == roles and found.findings == ()
    main = type(main).from_pretrained(tmp_path)
    main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.2.*"]  # the class names the published depths only
    mtp: Any = MtpModel.from_pretrained(main)
    places = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "norm": "post_norm"}
    for role, attribute in places.items():
        assert torch.equal(getattr(mtp.layers[0], attribute).weight, tensors[f"{roles[role]}.weight"])
    assert torch.equal(
        mtp.layers[0].mtp_block.self_attn.o_proj.weight, tensors["model.layers.2.self_attn.o_proj.weight"]
    )
    assert not getattr(mtp.config, "mtp_hidden_states_first", False) and found.head.formula.embedding_first
    assert mtp.use_post_norm and found.head.formula.feedback == "post_norm"


def test_decoder_layers_are_compared_by_layer_not_by_format(tmp_path: Path) -> None:
    family = BY_NAME["deepseek_v3"]
    quantised = {"quantization_config": {"quant_method": "fp8", "modules_to_not_convert": [f"layers.{LAYERS}"]}}
    tensors = target("fp8_tensor") | head(family, "model.")
    found = read_head(write(tmp_path / "m", family, tensors, **quantised))
    assert found.findings == found.contradictions == ()
    assert decoder("x", "fp8_tensor").keys() != decoder("x").keys()
