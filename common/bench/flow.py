"""A constant number of requests in flight: the tokens a second of a server, and what became of its drafts.

As soon as one request is answered the next is sent, and the clock stops when none is left to follow: the batch is of
the same size all the time. Answers end where the model ends them: text after the end token repeats itself, which would
make drafts look better than they are. Tokens and drafts are counted by the server itself, in ``/metrics``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

from fourfold.common.mtp.probe import Samples, read_metrics
from fourfold.common.serving import EngineServer

_TOKENS = ("vllm:generation_tokens_total", "sglang:realtime_tokens_total")  # SGLang's, by what they are for
_DRAFTS = ("vllm:spec_decode_num_drafts_total", "fourfold:spec_drafts_total")  # SGLang's EAGLE counts none
_ACCEPTED = ("vllm:spec_decode_num_accepted_tokens_per_pos_total", "fourfold:spec_accepted_tokens_total")


@dataclass(frozen=True)
class Flow:
    """What a server did.

    Attributes:
        seconds: with all requests in flight.
        tokens: produced in that time.
        drafts: drafts verified in that time.
        accepted: those of them in which position i was accepted; empty without speculation.
    """

    seconds: float
    tokens: int
    drafts: int = 0
    accepted: tuple[int, ...] = ()

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def read(server: EngineServer, prompts: Sequence[str], at_once: int) -> None:
    """Send each prompt for one token: with its prefix cached, `run` measures decoding."""
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda prompt: _ask(server, prompt, 1), prompts))


def run(server: EngineServer, prompts: Sequence[str], batch: int, tokens: int) -> Flow:
    """Answer ``prompts`` greedily, ``batch`` at a time, each with up to ``tokens`` tokens.

    Raises:
        FourfoldError: the server refused a request, or has no metrics.
    """
    waiting, lock = iter(prompts), Lock()
    ended: list[tuple[float, Samples]] = []

    def worker(_: int) -> None:
        while True:
            with lock:
                prompt = next(waiting, None)
                if prompt is None:
                    if not ended:
                        ended.append((time.perf_counter(), read_metrics(server.url)))
                    return
            _ask(server, prompt, tokens)

    before = read_metrics(server.url)
    with ThreadPoolExecutor(batch) as pool:
        start = time.perf_counter()
        list(pool.map(worker, range(batch)))
    end, after = ended[0]
    new = {key: value - before.get(key, 0) for key, value in after.items()}
    accepted: Counter[int] = Counter()
    for (name, labels), count in new.items():
        if name in _ACCEPTED:
            accepted[int(dict(labels)["position"])] += int(count)

    def total(names: tuple[str, ...]) -> int:
        modes = ("decode", None)
        return int(sum(n for (name, labels), n in new.items() if name in names and dict(labels).get("mode") in modes))

    return Flow(end - start, total(_TOKENS), total(_DRAFTS), tuple(accepted[i] for i in sorted(accepted)))


def _ask(server: EngineServer, prompt: str, tokens: int) -> None:
    message = {"role": "user", "content": prompt}
    body = {"model": server.model, "messages": [message], "max_tokens": tokens, "temperature": 0}
    server.post("/v1/chat/completions", body)
