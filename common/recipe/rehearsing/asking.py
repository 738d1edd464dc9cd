"""What a rehearsal asks of a running server, and what its answers say."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fourfold.common.recipe.rehearsing.replica import prompts
from fourfold.common.serving import EngineServer

PROMPTS, TOKENS, AT_ONCE = 6, 40, 3
LIKELIEST = 5  # tokens whose log-probabilities are asked for, at every step


@dataclass(frozen=True)
class Answers:
    """What a server said.

    Attributes:
        texts: greedy continuations of `prompts`.
        chat: the content of a chat answer; None: it was null.
        steps: for each text and each of its tokens, the log-probabilities of the likeliest tokens by their ids.
        drafts: verified drafts, ``drafted`` tokens in them and ``accepted`` ones; None: not counted.
        sources: verified drafts of fourfold by where they come from: ``suffix`` (the text) or ``mtp``.
    """

    texts: list[str]
    chat: str | None
    steps: list[list[dict[int, float]]] = field(default_factory=list, repr=False)
    drafts: int | None = None
    drafted: int | None = None
    accepted: int | None = None
    sources: dict[str, int] = field(default_factory=dict)


def ask(server: EngineServer, speculates: bool, drafting: EngineServer | None = None) -> Answers:
    """The answers of a running server to `prompts`, several at once, and what was counted meanwhile.

    Args:
        drafting: the server that counts drafts, where ``server`` is the router before it.
    """
    counting = drafting or server
    before = _vllm_counts(counting) if speculates and server.engine == "vllm" else {}
    complete = _vllm if server.engine == "vllm" else _sglang
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(lambda text: complete(server, text), prompts(PROMPTS)))
    counts: dict[str, int] = {}
    if speculates and server.engine == "vllm":
        counts = {name: value - before[name] for name, value in _vllm_counts(counting).items()}
    elif speculates:
        counts = {name: sum(one[name] for _, _, one in found) for name in ("drafts", "drafted", "accepted")}
    sources = _sources(counting) if speculates else {}
    messages = [{"role": "user", "content": prompts(1)[0]}]
    body = {"model": server.model, "messages": messages, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    chat = server.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    return Answers([text for text, _, _ in found], chat, [steps for _, steps, _ in found], **counts, sources=sources)


Answer = tuple[str, list[dict[int, float]], dict[str, int]]  # text, log-probabilities, counts


def _vllm(server: EngineServer, text: str) -> Answer:
    body = {"model": server.model, "prompt": text, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    choice: Any = server.post("/v1/completions", body | {"logprobs": LIKELIEST})["choices"][0]
    steps = [
        {ord(letter) - 0x100: value for letter, value in top.items() if len(letter) == 1}
        for top in choice["logprobs"]["top_logprobs"]
    ]
    return str(choice["text"]), steps, {}


def _sglang(server: EngineServer, text: str) -> Answer:
    """Through its own route, since its metrics are not on by default: each answer there carries the counts."""
    parameters = {"max_new_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    body = {"text": text, "sampling_params": parameters, "return_logprob": True, "top_logprobs_num": LIKELIEST}
    answer: Any = server.post("/generate", body)
    meta = answer["meta_info"]
    names = {"drafts": "verify_ct", "drafted": "num_proposed_drafts", "accepted": "num_correct_drafts"}
    counts = {name: int(meta.get(f"spec_{key}", 0)) for name, key in names.items()}
    steps = [{int(token): value for value, token, _ in top} for top in meta["output_top_logprobs"]]
    return str(answer["text"]), steps, counts


def _sources(server: EngineServer) -> dict[str, int]:
    from fourfold.common.mtp.probe import read_metrics

    samples = read_metrics(server.url, needed=False)
    counted = {labels: value for (name, labels), value in samples.items() if name == "fourfold:spec_drafts_total"}
    return {dict(labels)["source"]: int(value) for labels, value in counted.items()}


def _vllm_counts(server: EngineServer) -> dict[str, int]:
    from fourfold.common.mtp.probe import read_metrics, total

    names = {"drafts": "drafts", "drafted": "draft_tokens", "accepted": "accepted_tokens"}
    samples = read_metrics(server.url)
    return {short: int(total(samples, f"vllm:spec_decode_num_{name}_total")) for short, name in names.items()}
