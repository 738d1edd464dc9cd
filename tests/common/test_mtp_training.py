"""Training a head: the chain against the reference, counted acceptance, and whole runs on a model of known answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from typer.testing import CliRunner

from fourfold.common.cli import app
from fourfold.common.errors import FourfoldError
from fourfold.common.mtp.head import Formula
from fourfold.common.mtp.reader import read_head
from fourfold.common.mtp.reference import Depth, ReferenceHead
from fourfold.common.mtp.training import fit
from fourfold.common.mtp.training.distil import ROWS, distil
from fourfold.common.mtp.training.head import TrainedHead
from fourfold.common.mtp.training.run import frequent
from fourfold.common.mtp.training.states import States
from fourfold.common.mtp.training.text import Dialogue, read
from tests import oracle
from tests.common.test_mtp_reference import causal

STEPS = 3


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def test_the_chain_computes_what_an_engine_computes_token_by_token() -> None:
    target = small_llama()
    head = TrainedHead(target, torch.arange(96))
    with torch.no_grad():
        for weight in head.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    prefix = "model.layers.2."
    tensors = {name.removeprefix(prefix): t.float() for name, t in head.tensors().items()}
    head.load_state_dict(
        {n: p.bfloat16().float() for n, p in head.state_dict().items()} | {"vocabulary": head.vocabulary}
    )
    layer = LlamaDecoderLayer(target.config, 0)
    layer.load_state_dict({n: tensors[n] for n in layer.state_dict()})
    weights = {role: tensors[f"{role}.weight"] for role in ("enorm", "hnorm", "eh_proj")}
    weights |= {"norm": tensors["shared_head.norm.weight"], "head": target.lm_head.weight}
    weights |= {"embedding": target.model.embed_tokens.weight}
    depth = Depth(weights, causal(layer, target.model.rotary_emb))
    reference = ReferenceHead(Formula(mask_first_position=True), [depth], target.config.rms_norm_eps, None)
    tokens = torch.randint(96, (2, 9))
    with torch.no_grad():
        hidden = target.model(tokens).last_hidden_state
        count = 9 - 1
        padded = torch.cat([tokens[:, 1:], torch.zeros(2, STEPS, dtype=torch.int64)], 1)
        chain = head.states(padded, hidden[:, :count], STEPS)
        for start in range(count - STEPS):
            known = hidden[:, : start + 1]
            for step in range(STEPS):  # teacher-forced: the text's own tokens stand for accepted drafts
                _, feedback = reference.step(0, tokens[:, 1 : start + step + 2], known)
                known = torch.cat([known, feedback[:, -1:]], 1)
                torch.testing.assert_close(chain[step][:, start], feedback[:, -1], atol=1e-4, rtol=1e-4)


def test_accepted_walks_as_an_engine_does() -> None:
    # From start 0 two are accepted and one is the target's own: the next step starts at 3.
    # The last start ends the text.
    right = torch.tensor([[1, 1, 1, 0, 1], [1, 0, 1, 1, 1]], dtype=torch.bool)
    assert fit.accepted(right, [5]) == [1, 1, 2]
    assert fit.accepted(right[:, :4], [2, 2]) == [2, 2, 2]
    assert fit.accepted(torch.zeros(2, 3, dtype=torch.bool), [3]) == [0, 0, 2]


def test_the_loss_and_its_gradient_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    words, count = torch.randn(50, 8), 2 * ROWS + 3  # the last rows are not a full part
    states, target = torch.randn(count, 8, requires_grad=True), torch.randn(count, 8)
    loss, drafts = distil(states, target, words)
    (3 * loss).backward()
    found, states.grad = states.grad, None
    logits = states @ words.T
    wanted = torch.nn.functional.cross_entropy(logits, (target @ words.T).softmax(-1), reduction="sum")
    (3 * wanted).backward()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(found, states.grad, atol=1e-5, rtol=1e-5)
    assert drafts.equal(logits.argmax(-1))


def test_frequent_words() -> None:
    words, share = frequent([Dialogue((7,), (3, 3, 5, 7)), Dialogue((9,), (3, 9))], 2)
    assert words.tolist() == [3, 7] and share == pytest.approx(4 / 6)


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The oracle, and dialogues of its own greedy text."""
    folder = tmp_path_factory.mktemp("walk")
    oracle.write_oracle(folder)
    lines = []
    for start in range(0, 240, 3):
        text = oracle.prompt(oracle.ORDER[start], 4)
        lines.append(json.dumps({"prompt": text, "answer": oracle.continuation(text[-1], 24)}))
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run(walk: Path, out: Path, *more: str) -> str:
    arguments = ["mtp", "train", str(walk / "target"), str(out), "--text", str(walk / "text.jsonl"), *more]
    done = CliRunner().invoke(app, [*arguments, "--vocabulary", "256"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_head_learns_the_walk_and_is_one_that_inspect_and_extract_read(walk: Path, tmp_path: Path) -> None:
    run(walk, tmp_path / "head", "--epochs", "40")
    report = json.loads((tmp_path / "head" / "training.json").read_text())
    assert report["held_out_mean_acceptance_length"] > 3.5  # of 4
    assert not (tmp_path / ".head.training").exists()
    trained = load_file(tmp_path / "head" / "model.safetensors")
    # Where training begins these are zero, and the norms of words one.
    assert all(tensor.any() for tensor in trained.values())
    assert (trained["model.layers.2.enorm.weight"] != 1).any()
    reading = read_head(tmp_path / "head")
    assert reading.head.family == "deepseek_v3" and not reading.findings
    assert CliRunner().invoke(app, ["mtp", "extract", str(tmp_path / "head"), str(tmp_path / "draft")]).exit_code == 0


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(
    walk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(walk, tmp_path / "whole", "--epochs", "4")
    step, taken = fit.Optimiser.step, 0

    def killed(self: fit.Optimiser, number: int) -> None:
        nonlocal taken
        taken += 1
        if taken == 3:
            raise RuntimeError("killed")
        step(self, number)

    monkeypatch.setattr(fit.Optimiser, "step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run(walk, tmp_path / "cut", "--epochs", "4")
    assert not (tmp_path / "cut").exists()
    monkeypatch.undo()
    run(walk, tmp_path / "cut", "--epochs", "4")
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, cut[name]), name


def test_a_run_goes_on_from_an_earlier_head(walk: Path, tmp_path: Path) -> None:
    run(walk, tmp_path / "first", "--epochs", "30")
    run(walk, tmp_path / "second", "--epochs", "4", "--begin", str(tmp_path / "first"))
    first, second = (json.loads((tmp_path / n / "training.json").read_text()) for n in ("first", "second"))
    assert second["begun_from"] == first
    assert second["held_out_mean_acceptance_length"] > 3
    head = TrainedHead(small_llama(), torch.arange(96))
    with pytest.raises(FourfoldError, match="the head to begin from has no model.layers.2.enorm.weight of shape .64."):
        head.load(load_file(tmp_path / "first" / "model.safetensors"))


def test_options_that_do_not_fit_what_is_there(walk: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": [1], "answer": [2, 3]}\n')
    common = ["mtp", "train", str(walk / "target")]
    for arguments, told in (
        ([str(tmp_path / "there")], "exists; give a directory that does not exist yet"),
        ([str(tmp_path / "new"), "--text", str(tmp_path / "none.jsonl")], "none.jsonl cannot be read"),
        ([str(tmp_path / "few"), "--text", str(few)], "few.jsonl has 1 dialogues; training needs 32 or more"),
    ):
        error = CliRunner().invoke(app, [*common, *arguments]).exception
        assert isinstance(error, FourfoldError) and told in str(error)
    error = CliRunner().invoke(app, [*common, str(tmp_path / "few"), "--text", str(few), "--epochs", "9"]).exception
    assert "is of a run with epochs = 2, not 9; repeat its options, or remove it" in str(error)


@pytest.mark.parametrize(
    "line", ['{"prompt": [1]}', "[]", "x", '{"prompt": [1], "answer": ["2"]}', '{"prompt": 1, "answer": 2}']
)
def test_a_line_that_is_no_dialogue(tmp_path: Path, line: str) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(f'{{"prompt": [1], "answer": [2]}}\n{line}\n')
    with pytest.raises(FourfoldError, match=r"text.jsonl, line 2: expected .* found"):
        read(path)


def test_a_last_line_that_was_cut_off_is_none(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"prompt": [1], "answer": [2]}\n{"prompt": [1')
    assert read(path) == [Dialogue((1,), (2,))]


def test_states_are_the_targets(tmp_path: Path) -> None:
    target = small_llama()
    dialogues = [Dialogue((1, 2, 3), (4, 5)), Dialogue((6,), (7, 8, 9, 10, 11, 12))]
    states = States(tmp_path / "states.bin", dialogues, 64)
    assert not states.complete
    states.compute(target.bfloat16())
    assert states.complete
    states.load()
    tokens, hidden, answer = states.batch([1, 0], 2, False)
    assert tokens.shape == answer.shape == (2, 8) and hidden.shape == (2, 6, 64)
    assert tokens[1].tolist() == [2, 3, 4, 5, 0, 0, 0, 0] and answer[1].tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    assert states.batch([0], 2, True)[2].tolist() == [[1, 1, 1, 1, 0, 0]]
    with torch.no_grad():
        alone = target.model(torch.tensor([[1, 2, 3, 4]])).last_hidden_state[0]
    torch.testing.assert_close(hidden[1, :4], alone.float(), atol=0.05, rtol=0.05)
