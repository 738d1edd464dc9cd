"""`fourfold recipe rehearse` and `run` on vLLM: two rehearsals and one run of a small random model, and their parts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from forked_server import forked

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.launch import engine_of
from fourfold.common.recipe.loading import Catalogue
from fourfold.common.recipe.rehearsing import speculation
from fourfold.common.recipe.rehearsing.asking import PROMPTS, TOKENS, Answers, ask
from fourfold.common.recipe.rehearsing.reference import WITHIN, furthest, reference
from fourfold.common.recipe.rehearsing.rehearse import Rehearsed, Result, proof, rehearse
from fourfold.common.recipe.rehearsing.replica import LAYERS, Replica, continuation, prompts, write_replica
from fourfold.common.recipe.rehearsing.substitutions import substituted
from fourfold.common.recipe.rehearsing.traits import ARCHITECTURES, read_traits
from fourfold.common.recipe.rendering.layout import layout
from fourfold.common.recipe.run import check_machine, deployment, with_own_drafts
from fourfold.common.serving import EngineServer, free_port


@pytest.fixture(scope="module")
def known() -> Catalogue:
    return Catalogue()


@pytest.fixture(scope="module")
def aggregated(known: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return rehearse(known, "cpu/smollm2", "vllm", tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="module")
def mtp(known: Catalogue, aggregated: Result, tmp_path_factory: pytest.TempPathFactory) -> Result:
    with forked("rehearse"):
        return rehearse(known, "cpu/smollm2-mtp", "vllm", tmp_path_factory.mktemp("logs"), aggregated.without)


def test_an_aggregated_recipe(aggregated: Result) -> None:
    assert aggregated.ok, aggregated.checks
    assert [check.name for check in aggregated.checks] == ["answers", "content", "probabilities"]
    assert aggregated.replica["exact"] and aggregated.replica["architecture"] == "LlamaForCausalLM"
    assert any("NVLink" in line for line in aggregated.not_rehearsed)
    assert proof(aggregated)["level"] == 5


def test_a_recipe_with_mtp(mtp: Result, aggregated: Result) -> None:
    assert mtp.ok, mtp.checks
    assert [check.name for check in mtp.checks] == [
        "answers",
        "speculation",
        "drafts",
        "acceptance",
        "content",
        "probabilities",
    ]
    assert mtp.without is aggregated.without
    (change,) = [change for change in mtp.substitutions if change.what == "speculative-config"]
    assert change.requested["model"].startswith("fourfold/") and change.used["model"] == "the replica's head"
    drafts, drafted, accepted = (int(word) for word in _numbers(mtp, "acceptance"))
    assert drafted == 3 * drafts
    assert 0.5 * drafted < accepted < 0.95 * drafted  # a fifth of the drafts are wrong, and those after them


def _numbers(result: Result, name: str) -> tuple[str, str, str]:
    words = next(check.detail for check in result.checks if check.name == name).split()
    return words[0], words[5], words[3]


def test_run_serves_and_leaves_nothing(known: Catalogue, tmp_path: Path) -> None:
    card = known.model("smollm2-135m-instruct")
    config = json.loads(known.model_path(card.id).with_name(card.config).read_text())
    model = write_replica(tmp_path / "replica", read_traits(config), "vllm", False).model
    port = free_port()
    fourfold = "from fourfold.common.cli import main; main()"
    command = [sys.executable, "-c", fourfold, "recipe", "run", "golden/served", "--engine", "vllm"]
    command += ["--catalogue", str(Path(__file__).parents[1] / "recipes" / "golden" / "catalogue")]
    command += ["--model", str(model), "--port", str(port), "--logs", str(tmp_path / "logs"), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    facts = json.loads(process.stdout.readline())
    assert facts["endpoint"] == f"http://127.0.0.1:{port}/v1"
    assert facts["metrics"] == [f"http://127.0.0.1:{port}/metrics"]
    running = EngineServer("vllm", facts["model"], tmp_path / "log", port=port)
    assert ask(running, False).texts == [continuation(text, TOKENS) for text in prompts(PROMPTS)]
    assert len(started_with(str(model))) > 1
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    deadline = time.monotonic() + 10
    while started_with(str(model)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not started_with(str(model))


def started_with(text: str) -> list[int]:
    """Processes whose command line has ``text``, this one apart."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if text in (folder / "cmdline").read_text(errors="replace"):
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


# --- parts


def test_run_refuses_what_this_machine_is_not(known: Catalogue) -> None:
    for name in known.recipe_paths:
        recipe = known.recipe(name)
        sheet = known.hardware(recipe.hardware)
        for engine in recipe.engines:
            of = layout(recipe, engine, known.model(recipe.model), sheet)
            if sheet.id == "cpu":
                check_machine(of)
            else:
                with pytest.raises(FourfoldError, match=r"needs \d+ (machines|GPUs)"):
                    check_machine(of)


def test_run_wants_the_router_of_several_servers(
    known: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm_router", None)  # as where it is not installed
    recipe = known.recipe("cpu/smollm2")
    plan = recipe.engines["vllm"]
    role = plan.roles["aggregated"].model_copy(update={"replicas": 2})
    plan = plan.model_copy(update={"roles": {"aggregated": role}})
    of = layout(
        recipe.model_copy(update={"engines": {"vllm": plan}}),
        "vllm",
        known.model(recipe.model),
        known.hardware(recipe.hardware),
    )
    with pytest.raises(FourfoldError, match="pip install vllm-router"):
        deployment(of, tmp_path)
    assert not list(tmp_path.iterdir())


def test_own_drafts_are_made(tmp_path: Path) -> None:
    options = {"speculative-config": {"model": "fourfold/smollm2-135m-instruct-mtp-vllm", "method": "mtp"}}
    made = with_own_drafts(options, tmp_path)
    draft = Path(made["speculative-config"]["model"])
    assert json.loads((draft / "config.json").read_text())["architectures"] == ["FourfoldMTP"]
    assert with_own_drafts(options, tmp_path) == made
    with pytest.raises(FourfoldError, match="fourfold has no head other"):
        with_own_drafts("fourfold/other-mtp-sglang", tmp_path)


def test_every_shipped_recipe_has_a_replica_and_flags(known: Catalogue, tmp_path: Path) -> None:
    """What a rehearsal would start, without starting it: no option of a GPU is left, and drafts have a head."""
    for name in known.recipe_paths:
        recipe = known.recipe(name)
        card = known.model(recipe.model)
        traits = read_traits(json.loads(known.model_path(card.id).with_name(card.config).read_text()))
        for engine in recipe.engines:
            plan = engine_of(recipe, engine)
            role = "decode" if plan.disaggregated else "aggregated"
            options, env, changes = substituted(recipe, engine, plan, role, traits.family)
            replica = Replica(tmp_path, tmp_path, traits)
            used, more = speculation.with_replica(engine, options, replica)
            assert not any(word in repr((used, env)) for word in ("megamoe", "mega_moe", "Nixl", "NCCL", "trtllm"))
            asked = speculation.asked(engine, {**plan.args, **plan.roles[role].args})
            assert (speculation.asked(engine, used) is None) == (asked is None)
            assert speculation.asked(engine, speculation.without(used)) is None
            changed = {change.what for change in changes + more}
            given = {**plan.args, **plan.roles[role].args}
            assert all(used.get(option) == value or option in changed for option, value in given.items())


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_replicas_are_in_the_published_layout(family: Any, tmp_path: Path) -> None:
    """transformers loads every tensor of the target, and the head is a module after the last layer."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config: dict[str, Any] = {"architectures": [ARCHITECTURES[family]], "num_attention_heads": 8}
    if family != "llama":
        config |= {"n_routed_experts": 64, "num_experts_per_tok": 4, "first_k_dense_replace": 1, "n_shared_experts": 1}
    if family == "deepseek_v3":
        config |= {"kv_lora_rank": 512}
    traits = read_traits(config)
    assert traits.family == family and traits.exact and not traits.missing
    replica = write_replica(tmp_path, traits, "vllm", True)
    assert (replica.draft is not None) == (family == "llama")
    loaded: Any = AutoModelForCausalLM.from_pretrained(replica.model, output_loading_info=True, dtype=torch.float32)
    model, report = loaded
    assert not report["missing_keys"]
    assert all(key.startswith(f"model.layers.{LAYERS}.") for key in report["unexpected_keys"])
    for text in prompts(2):
        ids = torch.tensor([[ord(letter) - 0x100 for letter in text]])
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
        assert "".join(chr(0x100 + int(t)) for t in tokens[ids.shape[1] :]) == continuation(text, 8)
    with safe_open(replica.model / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    names = set(tensors)
    assert any(f".layers.{LAYERS}." in name for name in names) == (family != "llama")

    given = prompts(PROMPTS)
    continued = [continuation(text, TOKENS) for text in given]
    right = reference(replica.model, given, continued)
    part = {"llama": "mlp.up_proj", "glm4_moe": "mlp.experts.3.up_proj", "deepseek_v3": "self_attn.q_b_proj"}[family]
    damaged = f"model.layers.1.{part}.weight"
    save_file(tensors | {damaged: tensors[damaged].roll(1, 0)}, replica.model / "model.safetensors", {"format": "pt"})
    other = reference(replica.model, given, continued)
    top = [[dict(enumerate(row)) for row in rows.tolist()] for rows in right]
    assert furthest(top, right) == 0 and WITHIN < 0.3 * furthest(top, other) < float("inf")
    assert furthest([rows[1:] for rows in top], right) == float("inf")


def test_a_failed_rehearsal_proves_nothing() -> None:
    wrong = Result("a/b", "vllm", "0.32.0", {}, [Rehearsed("answers", False, "")], [], [], Answers([], None))
    with pytest.raises(FourfoldError, match="failed \\(answers\\)"):
        proof(wrong)
