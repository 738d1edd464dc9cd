"""``fourfold doctor --probe URL``: does the head of a running server draft what the model accepts?

A wrong head costs no correct token, so nothing shows it but its acceptance. The probe sends `PROMPTS` greedily, several
at once, and counts what the server itself counts: vLLM's counters in ``/metrics`` before and after, which include
whatever else the server answers meanwhile; on SGLang, whose metrics hold no count by position, the counts that come
with each answer of ``/generate``. By draft source (`metrics`), the counters of both.

The acceptance of a position is the share of all verified drafts in which it was accepted; the mean acceptance length is
1 + accepted tokens / verified drafts. Collapse is less than half of a known model's accepted tokens (`golden`), or,
where the model is not known, a first position below `LEAST_FIRST`.
"""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fourfold.common.errors import FourfoldError
from fourfold.common.mtp import golden
from fourfold.common.mtp.prompts import PROMPTS
from fourfold.common.settings import api_key

# Heads that work have 0.8 to 0.91; those read under a wrong format 0.002 to 0.018 (vLLM's issues 43455 and 41789), and
# one that drafts at random less.
LEAST_FIRST = 0.1
LEAST_STEPS = 20  # verified drafts; fewer do not tell
TOKENS = 64  # of each answer
AT_ONCE = 8
CAUSES = (
    "usual causes: a quantised head read under the wrong format, or a draft directory of another model; "
    "`fourfold mtp inspect {model}` tells"
)

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@dataclass(frozen=True)
class Server:
    """A server that speculates.

    Attributes:
        engine: vllm or sglang.
        version: of the engine.
        model: the served name.
        root: the path or name that the model was loaded from.
        k: longest draft, in tokens.
    """

    url: str
    engine: str
    version: str
    model: str
    root: str
    k: int


@dataclass(frozen=True)
class Source:
    """Drafts of one source: how many were verified, tokens in them, accepted tokens by position."""

    drafts: int
    drafted: int
    accepted: tuple[int, ...]


@dataclass(frozen=True)
class Measured:
    """What a probe counted.

    Attributes:
        prompts: answered.
        tokens: generated.
        seconds: taken.
        drafts: verified drafts.
        accepted: [k] drafts in which position i was accepted.
        sources: the same by draft source, where the server counts it.
    """

    prompts: int
    tokens: int
    seconds: float
    drafts: int
    accepted: tuple[int, ...]
    sources: dict[str, Source] = field(default_factory=dict)

    @property
    def acceptance(self) -> list[float]:
        """[k] by position, a share of all drafts."""
        return [accepted / self.drafts for accepted in self.accepted]

    @property
    def length(self) -> float:
        """Mean acceptance length."""
        return 1 + sum(self.accepted) / self.drafts


@dataclass(frozen=True)
class Verdict:
    """Whether the head works, and what it was held to.

    Attributes:
        ok: whether it does.
        text: one line: measured and expected, and the usual causes where it does not.
        least: least mean acceptance length; None: the first position was judged.
        golden: the known lengths of this model and draft length, by mode.
        source: who measured them.
    """

    ok: bool
    text: str
    least: float | None
    golden: dict[str, float]
    source: str


def connect(url: str, model: str | None = None) -> Server:
    """Find out what answers at ``url``.

    Args:
        model: the served name to ask for; None: the first.

    Raises:
        FourfoldError: nobody answers, it is no engine, it does not speculate, or does not count.
    """
    url = url.rstrip("/")
    served = {entry["id"]: entry.get("root") or entry["id"] for entry in _get(url, "/v1/models").get("data", [])}
    name = model or next(iter(served), None)
    if name is None or name not in served:
        raise FourfoldError(f"--model {name!r}: {url} serves {', '.join(served) or 'no model'}")
    info = _get(url, "/server_info", missing={})
    if "speculative_algorithm" in info:
        if not info["speculative_algorithm"]:
            raise FourfoldError(
                f"{url} (SGLang) does not speculate: start it with --speculative-algorithm EAGLE "
                "--speculative-draft-model-path DRAFT; `fourfold mtp inspect MODEL` prints all flags"
            )
        k = info.get("speculative_num_steps") or info["speculative_num_draft_tokens"] - 1
        return Server(url, "sglang", str(info.get("version", "")), name, str(info.get("model_path", name)), k)
    samples = read_metrics(url)
    if not any(metric.startswith("vllm:") for metric, _ in samples):
        raise FourfoldError(
            f"{url}/metrics has none of vLLM's metrics: give the address of the engine itself, not of a router, and "
            "start vLLM without --disable-log-stats"
        )
    k = len(_positions(samples, _PER_POSITION))
    if not k:
        raise FourfoldError(
            f"{url} (vLLM) does not speculate: start it with --speculative-config "
            '\'{"method": "mtp", "num_speculative_tokens": K}\'; `fourfold mtp inspect MODEL` prints all flags'
        )
    version = _get(url, "/version", missing={}).get("version", "")
    return Server(url, "vllm", str(version), name, str(served[name]), k)


def measure(server: Server, prompts: int, tick: Callable[[], None] = lambda: None) -> Measured:
    """Send the first ``prompts`` of `PROMPTS`.

    Args:
        tick: called after each answer, from any thread.

    Raises:
        FourfoldError: the server failed to answer, or drafted too little to tell.
    """
    if not 1 <= prompts <= len(PROMPTS):
        raise FourfoldError(f"--prompts {prompts}: expected 1 to {len(PROMPTS)}")

    def ask(prompt: str) -> tuple[int, list[int]]:
        answer = _ask(server, prompt)
        tick()
        return answer

    # SGLang has a /metrics only with --enable-metrics.
    before = read_metrics(server.url, needed=server.engine == "vllm")
    started = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(ask, PROMPTS[:prompts]))
    seconds = time.perf_counter() - started
    after = read_metrics(server.url, needed=server.engine == "vllm")
    new = {key: value - before.get(key, 0) for key, value in after.items()}
    if server.engine == "vllm":
        drafts = int(total(new, "vllm:spec_decode_num_drafts_total"))
        counted = _positions(new, _PER_POSITION)
        accepted = [counted.get(i, 0) for i in range(server.k)]
    else:
        steps = [0] * (server.k + 1)
        for _, histogram in answers:
            for good, count in enumerate(histogram):
                steps[min(good, server.k)] += count
        drafts, accepted = sum(steps), [sum(steps[i + 1 :]) for i in range(server.k)]
    tokens = sum(count for count, _ in answers)
    if drafts < LEAST_STEPS:
        raise FourfoldError(
            f"{server.url} verified {drafts} drafts while it generated {tokens} tokens, too few to tell (expected "
            f"{LEAST_STEPS} or more): send more with --prompts; a learned or batch-dependent draft length may be 0"
        )
    return Measured(prompts, tokens, seconds, drafts, tuple(accepted), _sources(new))


def judge(server: Server, measured: Measured) -> Verdict:
    """Compare with the known model of that name, or hold the first position to `LEAST_FIRST`."""
    known = golden.find((server.model, server.root))
    lengths = known.lengths(server.k) if known else {}
    first = measured.acceptance[0]
    found = f"mean acceptance length {measured.length:.2f}, position 0 accepted in {first:.1%}"
    if known and lengths:
        least = 1 + (min(lengths.values()) - 1) / 2
        ok = measured.length >= least
        shown = " and ".join(f"{length:.2f} ({mode})" for mode, length in lengths.items())
        expected = f"{least:.2f} or more: half the accepted tokens of {known.model}'s {known.method} at {shown}"
        source = known.source
    else:
        least, source = None, ""
        ok = first >= LEAST_FIRST
        expected = f"position 0 in {LEAST_FIRST:.0%} or more (heads that work: 80 to 91%; misread ones: 0 to 2%)"
    text = f"{found}; expected {expected}"
    if not ok:
        text = f"acceptance collapsed: {text}; {CAUSES.format(model=server.root)}"
    return Verdict(ok, text, least, lengths, source)


def read_metrics(url: str, needed: bool = True) -> Samples:
    """All samples of ``url``/metrics, by name and labels; empty where there is none and it is not ``needed``."""
    text = _get(url, "/metrics", text=True, missing=None if needed else "")
    found: Samples = defaultdict(float)
    for name, labels, value in re.findall(r"^([\w:]+)(?:\{(.*)\})? (\S+)", text, re.MULTILINE):
        found[name, tuple(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels))] += float(value)
    return found


_PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"


def total(samples: Mapping[Any, float], name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    return sum(
        value for (metric, found), value in samples.items() if metric == name and labels.items() <= dict(found).items()
    )


def _positions(samples: Mapping[Any, float], name: str, **labels: str) -> dict[int, int]:
    positions = {int(dict(found)["position"]) for metric, found in samples if metric == name}
    return {position: int(total(samples, name, position=str(position), **labels)) for position in sorted(positions)}


def _sources(new: Mapping[Any, float]) -> dict[str, Source]:
    names = {dict(labels)["source"] for metric, labels in new if metric == "fourfold:spec_drafts_total"}
    return {
        source: Source(
            int(total(new, "fourfold:spec_drafts_total", source=source)),
            int(total(new, "fourfold:spec_draft_tokens_total", source=source)),
            tuple(_positions(new, "fourfold:spec_accepted_tokens_total", source=source).values()),
        )
        for source in sorted(names)
    }


def _ask(server: Server, prompt: str) -> tuple[int, list[int]]:
    """Tokens of the answer, and on SGLang in how many steps 0, 1, ... drafted tokens were accepted."""
    if server.engine == "vllm":
        body = {"model": server.model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        return int(_get(server.url, "/v1/completions", body)["usage"]["completion_tokens"]), []
    parameters = {"max_new_tokens": TOKENS, "temperature": 0}
    meta = _get(server.url, "/generate", {"text": prompt, "sampling_params": parameters})["meta_info"]
    return int(meta["completion_tokens"]), meta.get("spec_correct_drafts_histogram", [])


def _get(url: str, route: str, body: dict[str, Any] | None = None, text: bool = False, missing: Any = None) -> Any:
    """GET, or POST ``body``. ``missing`` is returned where the route is not there."""
    headers = {"Content-Type": "application/json"}
    key = api_key()
    if key:
        headers["Authorization"] = f"Bearer {key}"
    try:
        request = urllib.request.Request(url + route, None if body is None else json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=600) as answer:
            content = answer.read().decode()
        return content if text else json.loads(content)
    except urllib.error.HTTPError as error:
        if error.code == 404 and missing is not None:
            return missing
        raise FourfoldError(
            f"{url}{route} answered {error.code}: {error.read().decode(errors='replace')[:200]}"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise FourfoldError(
            f"{url}{route}: {reason}; expected the address of a running vLLM or SGLang server"
        ) from None
