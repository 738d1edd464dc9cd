"""`fourfold recipe rehearse` of prefill and decode apart on vLLM: one that passes, one whose decode takes no cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forked_server import forked

from fourfold.common.recipe.launch import engine_of
from fourfold.common.recipe.loading import Catalogue
from fourfold.common.recipe.rehearsing.apart import ROLES
from fourfold.common.recipe.rehearsing.asking import TOKENS
from fourfold.common.recipe.rehearsing.moved import Moved
from fourfold.common.recipe.rehearsing.reference import WITHIN, furthest, reference
from fourfold.common.recipe.rehearsing.rehearse import Result, proof, rehearse
from fourfold.common.recipe.rehearsing.replica import continuation, prompts, write_replica
from fourfold.common.recipe.rehearsing.traits import ARCHITECTURES, read_traits
from fourfold.common.recipe.rehearsing.transport import transport

RECIPE = "deepseek-v4-pro/gb300-disagg-throughput"
# The same, but that decode has no connector: it computes every prompt again, and answers as well. Prefill, which spins
# as long as it keeps a cache that nobody takes, keeps one for six seconds.
BROKEN = f"""schema: fourfold/recipe/1
id: broken/decode
title: decode takes no KV cache
extends: {RECIPE}
engines:
  vllm:
    args: {{kv-transfer-config: null}}
    roles:
      prefill: {{args: {{kv-transfer-config: {{kv_connector: NixlConnector, kv_role: kv_both,
        kv_connector_extra_config: {{kv_lease_duration: 6}}}}}}}}
  sglang: null
"""


@pytest.fixture(scope="module")
def known() -> Catalogue:
    return Catalogue()


@pytest.fixture(scope="module")
def apart(known: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> Result:
    with forked("rehearse"):  # the one server to compare with; prefill and decode are not
        return rehearse(known, RECIPE, "vllm", tmp_path_factory.mktemp("logs"))


def test_prefill_and_decode_apart(apart: Result) -> None:
    assert apart.ok, apart.checks
    assert [check.name for check in apart.checks] == [
        *("answers", "apart", "transfer", "drafts", "acceptance", "content", "probabilities", "load")
    ]
    proven = proof(apart)["apart"]
    assert "UCX over TCP" in proven["transport"] and proven["router"].startswith("vllm-router ")
    told = {change.what: change for change in apart.substitutions}
    assert told["kv-transfer-config"].used["kv_buffer_device"] == "cpu"
    assert told["UCX_TLS"].requested == "cuda_copy,cuda_ipc,tcp" and told["UCX_TLS"].used == "tcp,self"
    assert told["prefill: max-num-seqs"].requested == 16
    missing = " ".join(apart.not_rehearsed)
    assert all(word in missing for word in ("RDMA and NVLink", "between ranks", "6 of prefill", "kernels"))
    assert "prefill and decode apart" not in missing and "the router (" not in missing


def test_a_decode_server_that_takes_no_cache(known: Catalogue, apart: Result, tmp_path: Path) -> None:
    recipe = tmp_path / "broken" / "decode.yaml"
    recipe.parent.mkdir()
    recipe.write_text(BROKEN)
    with forked("apart"):
        broken = rehearse(known, recipe, "vllm", tmp_path / "logs", apart.without)
    assert [check.name for check in broken.checks if not check.ok] == ["transfer"]
    detail = next(check.detail for check in broken.checks if check.name == "transfer")
    assert detail.startswith("decode took none of ")


# --- parts


def test_what_counts_as_transferred() -> None:
    right = Moved(7, prefilled=130, received=130, computed=7, cached=0, transfers=7, size=9000, failed=0)
    assert right.ok and "took 130 of 137 tokens of 7 prompts" in right.detail
    for wrong in (
        {"received": 0, "computed": 137},
        {"received": 100, "computed": 37},
        {"received": 131},
        {"cached": 1},
        {"transfers": 6},
        {"failed": 1},
    ):
        assert not replace(right, **wrong).ok, wrong


def test_transports_of_shipped_recipes(known: Catalogue) -> None:
    """Every recipe with prefill and decode apart moves over loopback, and says what that replaces."""
    found = 0
    for name in known.recipe_paths:
        recipe = known.recipe(name)
        if "vllm" not in recipe.engines or not recipe.engines["vllm"].disaggregated:
            continue
        plan = engine_of(recipe, "vllm")
        for role in ROLES:
            given = plan.roles[role]
            link = transport("vllm", plan, role, given)
            used = link.options["kv-transfer-config"]
            assert used["kv_connector"] == "NixlConnector" and used["kv_buffer_device"] == "cpu"
            assert link.env["UCX_TLS"] == "tcp,self"
            asked = {**plan.args, **plan.env, **given.args, **given.env}
            changed = {change.what for change in link.changes}
            assert changed == {what for what in ("kv-transfer-config", *link.env) if _differs(what, asked, link)}
            several = asked["kv-transfer-config"]["kv_connector"] == "MultiConnector"
            assert several == any("connectors NixlConnector alone" in change.why for change in link.changes)
        found += 1
    assert found >= 5


def _differs(what: str, asked: dict[str, Any], link: Any) -> bool:
    of_side_channel = what.startswith("VLLM_NIXL_SIDE_CHANNEL")
    return not of_side_channel and asked.get(what) != {**link.options, **link.env}[what]


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_probabilities_tell_a_wrong_cache(family: Any, tmp_path: Path) -> None:
    """A wrong cache moves the probabilities that a rehearsal compares further than it allows."""
    import torch
    from transformers import AutoModelForCausalLM

    config: dict[str, Any] = {"architectures": [ARCHITECTURES[family]], "num_attention_heads": 8}
    if family != "llama":
        config |= {"n_routed_experts": 64, "num_experts_per_tok": 4, "first_k_dense_replace": 1, "n_shared_experts": 1}
    if family == "deepseek_v3":
        config |= {"kv_lora_rank": 512}
    model = write_replica(tmp_path, read_traits(config), "vllm", False).model
    given = prompts(2)[1:]
    continued = [continuation(text, TOKENS) for text in given]
    expected = reference(model, given, continued)
    computed: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def decoded(cached: str, times: float = 1) -> list[list[dict[int, float]]]:
        """The decode role's part: the last token of the prompt and the answer, on the cache of what is before."""
        with torch.no_grad():
            cache = computed(_ids(cached), use_cache=True).past_key_values
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys * times, layer.values * times
            logits = computed(_ids(given[0][-1] + continued[0][:-1]), past_key_values=cache).logits[0]
        return [[dict(enumerate(row)) for row in logits.log_softmax(-1).tolist()]]

    def _ids(text: str) -> Any:
        return torch.tensor([[ord(letter) - 0x100 for letter in text]])

    prompt = given[0][:-1]
    assert furthest(decoded(prompt), expected) < 0.1 * WITHIN
    for wrong in (decoded(prompt[::-1]), decoded(prompt, times=0)):  # of another prompt, and memory never written
        assert furthest(wrong, expected) > 2 * WITHIN
