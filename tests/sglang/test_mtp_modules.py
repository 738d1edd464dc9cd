"""Heads of several modules in SGLang on a CPU: each token of a draft is drafted by its own module, and then again.

One server drafts `K` tokens with two modules. Its head is exchanged while it serves; `oracle_modules` says exactly what
each is worth: how modules read each other's states, and what their KV caches keep of drafts that were rejected.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import engine_checks
import oracle
import pytest
from forked_server import ForkedServer
from oracle_modules import expected_drafts
from sglang_answers import SIZES, TOKENS, accepted, exchange, generate

from fourfold.common.mtp.engines import launch_flags
from fourfold.common.mtp.extract import extract
from fourfold.common.serving import EngineServer, free_port

K = 4  # drafted tokens, twice as many as modules
HEADS = {
    "right": ("first", "second"),
    "exchanged": ("second", "first"),
    "first alone": ("first", "first"),
    "wrong after one token in five": ("first bad", "second"),
}
# Of the part of the text in which no token stands for a mark.
PROMPTS = [oracle.prompt(oracle.ORDER[start], length) for start, length in ((0, 12), (45, 9), (90, 30), (140, 13))]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("heads")
    return {name: oracle.write_oracle(path / name, heads=kinds)[1] for name, kinds in HEADS.items()}


@pytest.fixture(scope="module")
def server(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    path = tmp_path_factory.mktemp("server")
    reading = extract(models["right"], path / "draft", "sglang")
    flags = shlex.split(launch_flags(reading, "sglang", path / "draft", own=False))
    assert flags[flags.index("--speculative-num-steps") + 1] == "2" and "--enable-multi-layer-eagle" in flags
    more = ["--speculative-num-steps", str(K), "--speculative-num-draft-tokens", str(K + 1), *SIZES]
    target = models["right"].parent / "target"
    started = ForkedServer(
        "sglang", str(target), path / "log", [*flags, *more], {"OMP_NUM_THREADS": "1"}, free_port(21750)
    )
    with started:
        yield started


@pytest.mark.parametrize("name", HEADS)
def test_each_token_is_drafted_by_its_module(server: EngineServer, models: dict[str, Path], name: str) -> None:
    """One request alone, then several of different lengths at once."""
    exchange(server, models[name])
    total, counted = 0, [0] * K
    for prompt, answer in zip(PROMPTS, generate(server, PROMPTS[:1]) + generate(server, PROMPTS[1:]), strict=True):
        assert answer["output_ids"] == oracle.continuation(prompt[-1], TOKENS)
        steps, by_position = accepted(answer, K)
        assert (steps, by_position) == expected_drafts(prompt, TOKENS, K, HEADS[name])
        total, counted = total + steps, [a + b for a, b in zip(counted, by_position, strict=True)]
    print(total, counted)
    every = {"right": [total] * K, "exchanged": [0] * K, "first alone": [total, *[0] * (K - 1)]}
    if name in every:
        assert counted == every[name]
    else:
        assert total > counted[0] > counted[1] > counted[-1] > 0


def test_the_log_says_which_module_drafts_what(server: EngineServer) -> None:
    lines = [line for line in engine_checks.fourfold_lines(server) if "MTP module" in line]
    assert [line.partition("fourfold: ")[2] for line in lines] == [
        f"MTP module {module} of 2 drafts token {token}" for module, token in ((1, 1), (2, 2), (1, 3), (2, 4))
    ]
