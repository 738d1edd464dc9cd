"""Hybrid drafts in vLLM, to the token: which source drafts, what is accepted of it, and output that stays the target's.

The model's text and its head's drafts are known (`oracle`), so `expected` counts what the engine should. A head whose
KV cache missed the tokens that its text drafted would be wrong from then on.
"""

from __future__ import annotations

import os
from collections.abc import Container
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import engine_runs
import pytest
from oracle import BAD, ORDER, SIZE, character, chi_square, continuation, prompt, write_oracle

from fourfold.common.mtp.extract import extract
from fourfold.common.mtp.hybrid import HybridDrafts
from fourfold.common.settings import HybridSettings

LIMIT, HEAD, TOKENS = 8, 3, 60
WORKER = "fourfold.vllm_ext.hybrid_worker.HybridWorker"
EVERY = frozenset(range(SIZE))

COPY = ORDER[:40] + ORDER[:10]  # goes on as before for 30 tokens
CYCLE = ORDER + ORDER[:4]  # goes on as before for ever
NEW = prompt(ORDER[60], 8)
EDIT = ORDER[:12] + ORDER[100:110] + ORDER[:10]  # goes on as before for 2 tokens
FALSE = ORDER[:11] + ORDER[100:110] + ORDER[:10]  # its first draft is wrong at once
SCALE = 0.4  # of the output head: the following token has probability 0.70


@dataclass
class Case:
    """Texts that are continued, and how.

    Attributes:
        kind: of the head, as `write_oracle` takes it.
        wrong: tokens after which it is wrong, three places before the drafted one.
        texts: prompts.
        hybrid: settings.
        options: of the engine.
    """

    kind: str = "right"
    wrong: Container[int] = ()
    texts: list[list[int]] = field(default_factory=lambda: [COPY])
    hybrid: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def expected(self) -> dict[str, Any]:
        """What the worker should count."""
        drafts = HybridDrafts(HybridSettings(**self.hybrid, head_tokens=HEAD))
        for request, text in enumerate(self.texts):
            text, produced = [*text, *continuation(text[-1], TOKENS + 2 * LIMIT)], 1
            while produced < TOKENS:
                at = len(self.texts[request]) + produced
                drafts.observe(request, text[:at])
                proposed = drafts.propose(request, LIMIT)
                good, most = 0, len(proposed) or HEAD
                while good < most:
                    right = text[at + good] == proposed[good] if proposed else text[at + good - 3] not in self.wrong
                    if not right:
                        break
                    good += 1
                drafts.verified(request, most, good)
                produced += good + 1
        return {source: asdict(totals) for source, totals in drafts.totals().items()}


CASES = {
    "a copy": Case(),
    "a copy, useless head": Case("swapped", EVERY),
    "a cycle, useless head": Case("swapped", EVERY, [CYCLE]),
    "copies among new text": Case("bad", BAD, [COPY, NEW, CYCLE, EDIT, prompt(ORDER[150], 5)]),
    "padded batches off": Case("bad", BAD, [COPY, NEW, EDIT]),
    "short drafts": Case("right", (), [CYCLE, NEW], {"min_match": 2, "max_draft": 4, "draft_per_match": 0.5}),
    "long matches only": Case("right", (), [COPY, CYCLE], {"min_match": 30}),
    # The head looks back at a position that it read in a step without drafting.
    "a false match": Case(texts=[FALSE]),
    "read in chunks": Case("right", (), [COPY, CYCLE, NEW], {}, {"max_num_batched_tokens": 48}),
}
# A learned length: what the head drafts, and the seconds of a step by that.
MIXED = [COPY, NEW, CYCLE, EDIT, FALSE, prompt(ORDER[150], 5)]
CHEAP, DEAR = [1.0, 1.05, 1.1, 1.15], [1.0, 2.1, 3.2, 4.3]
LEARN, LONG = {"learn_head": True}, 300
LEARNED = {
    "learned, right and cheap": (Case(texts=MIXED, hybrid=LEARN, options={"max_model_len": 1024}), CHEAP),
    "learned, right and dear": (Case(texts=MIXED, hybrid=LEARN, options={"max_model_len": 1024}), DEAR),
    "learned, useless": (Case("swapped", EVERY, MIXED, LEARN, {"max_model_len": 1024}), CHEAP),
}
CROWD = [ORDER[30 * i : 30 * i + 60] + ORDER[30 * i : 30 * i + 30] for i in range(6)]
SAMPLED = [(ORDER * 2)[7 * i : 7 * i + SIZE + 4] for i in range(32)]


def serve(case: Case, where: Path, tokens: int = TOKENS, scale: float = 1.0, **sampling: Any) -> dict[str, Any]:
    """The case of an engine."""
    target, model = write_oracle(where, "deepseek_v3", (case.kind,), scale)
    extract(model, where / "draft", "vllm")
    speculative = {"method": "mtp", "model": str(where / "draft"), "num_speculative_tokens": LIMIT}
    options = {
        "speculative_config": speculative,
        "worker_cls": WORKER,
        "additional_config": {
            "fourfold": {"mtp": {"hybrid": {"head_tokens": HEAD, "learn_head": False, **case.hybrid}}}
        },
        **case.options,
    }
    requests = [{"prompt": text, "temperature": 0, "max_tokens": tokens, **sampling} for text in case.texts]
    return {"model": str(target), "options": options, "requests": requests}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of all cases."""
    folder = tmp_path_factory.mktemp("hybrid")
    cases = {name: serve(case, folder / name) for name, case in CASES.items()}
    cases["padded batches off"]["options"]["speculative_config"]["disable_padded_drafter_batch"] = True
    for name, (case, seconds) in LEARNED.items():
        cases[name] = {**serve(case, folder / name, LONG), "step_seconds": seconds}
    crowded = {"block_size": 32, "num_gpu_blocks_override": 20, "max_num_batched_tokens": 64, "max_num_seqs": 6}
    cases["crowded"] = serve(Case(texts=CROWD, options=crowded), folder / "crowded")
    learned = serve(Case(texts=CROWD, hybrid=LEARN, options=crowded), folder / "crowded, learned")
    cases["crowded, learned"] = {**learned, "step_seconds": DEAR}
    cases["grammar"] = serve(Case(texts=[EDIT]), folder / "grammar", 12, regex=f"[^{character(ORDER[100])}]*")
    cases["near the end"] = serve(Case(texts=[CYCLE], options={"max_model_len": 300}), folder / "end", 40)
    sampled = Case("embedding", (), SAMPLED, {"min_match": 1}, {"max_num_seqs": 64})
    cases["sampled"] = serve(sampled, folder / "sampled", 120, SCALE, temperature=1)
    plain = {key: value for key, value in cases["a copy"]["options"].items() if key != "speculative_config"}
    cases["no speculation"] = {**cases["a copy"], "options": plain, "config": {}}
    probabilistic = cases["a copy"]["options"]["speculative_config"] | {"draft_sample_method": "probabilistic"}
    options = cases["a copy"]["options"] | {"speculative_config": probabilistic}
    cases["probabilistic"] = {**cases["a copy"], "options": options, "config": {}}
    cases["asynchronous"] = {**cases["a copy"], "config": {"scheduler_config.async_scheduling": True}}
    cases["data parallel"] = {**cases["a copy"], "config": {"parallel_config.data_parallel_size": 2}}
    scheduler = "fourfold.vllm_ext.mtp_scheduler.AdaptiveScheduler"
    cases["adaptive"] = {**cases["a copy"], "config": {"scheduler_config.scheduler_cls": scheduler}}
    disabled = cases["a copy"]["options"] | {"additional_config": {"fourfold": {"mtp": {"hybrid": {"enabled": False}}}}}
    cases["disabled"] = {**cases["a copy"], "options": disabled, "config": {}}
    cases["V2"] = {**cases["a copy"], "config": {}, "environment": {"VLLM_USE_V2_MODEL_RUNNER": "1"}}
    # These models are too small for two cores.
    return engine_runs.run_all(folder, cases, str(min(os.sched_getaffinity(0))))


def engine_counts(totals: dict[str, Any]) -> tuple[int, int, list[int]]:
    """Both sources together, as vLLM counts."""
    accepted = [0] * LIMIT
    for source in totals.values():
        for position, count in enumerate(source["accepted_by_position"]):
            accepted[position] += count
    return sum(s["drafts"] for s in totals.values()), sum(s["drafted"] for s in totals.values()), accepted


@pytest.mark.parametrize("name", CASES)
def test_counts_by_source_and_output(runs: dict[str, Any], name: str) -> None:
    case, result = CASES[name], runs[name]
    assert result["tokens"] == [continuation(text[-1], TOKENS) for text in case.texts]
    assert result["totals"] == case.expected()
    assert (result["steps"], result["drafted"], result["accepted"]) == engine_counts(result["totals"])


def test_a_copy_counted_by_hand(runs: dict[str, Any]) -> None:
    # After the first token: 8 + 8 + 8 right and 2 of 8, each with the target's own token; 29 tokens by the head.
    suffix = {"drafts": 4, "drafted": 32, "accepted": 26, "accepted_by_position": [4, 4, 3, 3, 3, 3, 3, 3]}
    assert runs["a copy"]["totals"]["suffix"] == suffix == runs["a copy, useless head"]["totals"]["suffix"]
    head = {"drafts": 8, "drafted": 24, "accepted": 24, "accepted_by_position": [8, 8, 8]}
    assert runs["a copy"]["totals"]["mtp"] == head
    useless = {"drafts": 29, "drafted": 87, "accepted": 0, "accepted_by_position": []}
    assert runs["a copy, useless head"]["totals"]["mtp"] == useless
    # Where the text drafts alone, the head is left out; it reads what it missed before it drafts.
    assert [len(step[0]) for step in runs["a copy"]["proposed"]][:3] == [0, HEAD, HEAD]
    assert runs["a cycle, useless head"]["proposed"] == []


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_length_of_the_head(runs: dict[str, Any], name: str) -> None:
    result, totals = runs[name], runs[name]["totals"]
    assert result["tokens"] == [continuation(text[-1], LONG) for text in MIXED]
    assert totals["suffix"]["accepted"] > 300
    drafted, drafts = totals["mtp"]["drafted"], totals["mtp"]["drafts"]
    # Read late or not, what the head drafts of is the text.
    assert totals["mtp"]["accepted"] == (0 if "useless" in name else drafted)
    if "cheap" in name:
        assert drafted > 0.8 * HEAD * drafts
    else:
        assert 0 < drafts < 150


def test_metrics(runs: dict[str, Any]) -> None:
    # The first engine of its process, which serves the counts of all.
    name, totals = next(iter(CASES)), runs[next(iter(CASES))]["totals"]
    served = {key: float(value) for key, value in (line.rsplit(" ", 1) for line in runs[name]["metrics"])}
    for source, counts in totals.items():
        assert served[f'fourfold:spec_drafts_total{{source="{source}"}}'] == counts["drafts"]
        assert served[f'fourfold:spec_draft_tokens_total{{source="{source}"}}'] == counts["drafted"]
        for position, count in enumerate(counts["accepted_by_position"]):
            assert served[f'fourfold:spec_accepted_tokens_total{{position="{position}",source="{source}"}}'] == count


@pytest.mark.parametrize("name", ["crowded", "crowded, learned"])
def test_preempted_requests(runs: dict[str, Any], name: str) -> None:
    result = runs[name]
    assert result["tokens"] == [continuation(text[-1], TOKENS) for text in CROWD]
    assert result["preemptions"] > 0
    totals = result["totals"]
    assert totals["mtp"]["accepted"] == totals["mtp"]["drafted"] > 0 and totals["suffix"]["accepted"] > 0
    assert result["accepted"] == engine_counts(totals)[2]


def test_a_grammar_cuts_drafts(runs: dict[str, Any]) -> None:
    result = runs["grammar"]
    assert result["tokens"] == [continuation(EDIT[-1], 12)]
    # The text's second token is not allowed.
    assert result["totals"]["suffix"] == {"drafts": 1, "drafted": 1, "accepted": 1, "accepted_by_position": [1]}
    assert result["totals"]["mtp"]["accepted"] == result["totals"]["mtp"]["drafted"] == 9


def test_tokens_that_vllm_pads_with_are_no_drafts(runs: dict[str, Any]) -> None:
    # Within `LIMIT` tokens of the longest text vLLM verifies zeros.
    result = runs["near the end"]
    assert result["tokens"] == [continuation(CYCLE[-1], 40)]
    totals = result["totals"]["suffix"]
    assert totals["drafted"] == totals["accepted"] == sum(result["accepted"]) < result["drafted"]


def test_sampled_output_follows_the_target(runs: dict[str, Any]) -> None:
    result = runs["sampled"]
    assert min(totals["accepted"] for totals in result["totals"].values()) > 300
    assert chi_square(SAMPLED, result["tokens"], SCALE) < 88.0


def test_the_log_says_what_drafts(runs: dict[str, Any]) -> None:
    assert (
        "fourfold: hybrid drafts: matches of 2 tokens or more draft up to 4, the MTP head 3 elsewhere; " in runs["log"]
    )
    assert "8, the MTP head up to 3 elsewhere; in steps without its drafts it is left out, and reads" in runs["log"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no speculation", "--speculative-config method is None; expected 'mtp'"),
        ("probabilistic", "draft_sample_method='probabilistic' needs the probabilities of every drafted token"),
        ("asynchronous", "drafts before the host knows the text; add --no-async-scheduling"),
        ("data parallel", "data_parallel_size=2: the ranks' heads must run equally often"),
        ("adaptive", "mtp.hybrid.learn_head learns the head's; leave out --scheduler-cls"),
        ("disabled", "mtp.hybrid.enabled is false; leave out --worker-cls"),
        ("V2", "the V2 model runner drafts on the device; set VLLM_USE_V2_MODEL_RUNNER=0"),
    ],
)
def test_what_cannot_be_served_is_refused(runs: dict[str, Any], name: str, words: str) -> None:
    assert words in runs[name]["error"]
