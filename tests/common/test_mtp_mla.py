"""What of MLA the SGLang binding decides without SGLang."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fourfold.common.errors import FourfoldError
from fourfold.common.mtp.engines import ARCHITECTURE, SGLANG_MLA
from fourfold.sglang_ext import mla

FUSED = "block.self_attn.fused_qkv_a_proj_with_mqa"


@pytest.mark.parametrize("order", [1, -1])
def test_both_halves_are_joined_in_the_layers_order(order: int) -> None:
    halves = mla.Halves(dict.fromkeys((f"{FUSED}.weight", f"{FUSED}.weight_scale", "block.mlp.gate.weight")))
    gate = torch.zeros(2)
    assert halves.join("block.mlp.gate.weight", gate) == ("block.mlp.gate.weight", gate)
    tensors = {"q_a_proj": torch.ones(2, 3), "kv_a_proj_with_mqa": torch.zeros(4, 3)}
    first, second = list(tensors)[::order]
    assert halves.join(f"block.self_attn.{first}.weight", tensors[first]) is None
    assert halves.join(f"block.self_attn.{first}.weight_scale", torch.tensor(0.5)) is None
    place, joined = halves.join(f"block.self_attn.{second}.weight", tensors[second]) or ("", gate)
    assert place == f"{FUSED}.weight" and joined.sum(1).tolist() == [3, 3, 0, 0, 0, 0]
    assert halves.join(f"block.self_attn.{second}.weight_scale", torch.tensor([0.5])) is not None


def test_halves_with_two_scales_are_refused() -> None:
    halves = mla.Halves({f"{FUSED}.weight_scale_2": None})
    halves.join("block.self_attn.q_a_proj.weight_scale_2", torch.tensor(0.5))
    with pytest.raises(FourfoldError, match=r"different weight_scale_2, 0.5 and 0.25; .* store them unquantised"):
        halves.join("block.self_attn.kv_a_proj_with_mqa.weight_scale_2", torch.tensor(0.25))


def test_a_layer_without_the_fused_projection_loads_its_own() -> None:
    place, tensor = "block.self_attn.kv_a_proj_with_mqa.weight", torch.zeros(1)
    assert mla.Halves({place: None}).join(place, tensor) == (place, tensor)


def test_sparse_attention_and_old_draft_directories_are_refused() -> None:
    mla.check(SimpleNamespace(architectures=[ARCHITECTURE]))
    config = SimpleNamespace(kv_lora_rank=8, architectures=[ARCHITECTURE])
    with pytest.raises(FourfoldError, match="write it again with `fourfold mtp extract --engine sglang`"):
        mla.check(config)
    config.architectures.append(SGLANG_MLA)
    mla.check(config)
    config.index_topk = 4
    with pytest.raises(FourfoldError, match="sparse"):
        mla.check(config)


def test_a_packed_kv_b_proj_is_refused() -> None:
    kv_b_proj = SimpleNamespace(weight=torch.zeros(2, 2, dtype=torch.uint8))
    block = SimpleNamespace(self_attn=SimpleNamespace(w_kc=None, kv_b_proj=kv_b_proj))
    with pytest.raises(FourfoldError, match="kv_b_proj of the MTP head has a weight of torch.uint8"):
        mla.absorb(block, None, None)  # type: ignore[arg-type]
