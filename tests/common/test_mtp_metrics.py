"""Counters of drafts: counted in other processes, shown by the registry of the one that serves, as both engines do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SERVE = """
import multiprocessing, os, sys
from pathlib import Path
from prometheus_client import CollectorRegistry, generate_latest, multiprocess, REGISTRY
from fourfold.common.mtp import metrics
from fourfold.common.mtp.hybrid import HybridDrafts
from fourfold.common.settings import HybridSettings

def work(drafts):
    metrics.serve()  # as a plugin does in every process
    found = HybridDrafts(HybridSettings())
    metrics.publish(found.totals())  # not enabled yet
    assert metrics.enable() and metrics.enable()
    for draft in drafts:
        found.record(*draft)
        metrics.publish(found.totals())

if __name__ == "__main__":
    method, shared = sys.argv[1], len(sys.argv) > 2
    if shared:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = sys.argv[2]
    registry = CollectorRegistry() if shared else REGISTRY
    if shared:
        multiprocess.MultiProcessCollector(registry)
    metrics.serve()
    assert b"fourfold:" not in generate_latest(registry)
    context = multiprocessing.get_context(method)
    for drafts in ([("mtp", 3, 2), ("suffix", 8, 8)], [("mtp", 3, 0), ("mtp", 3, 1), ("mtp", 0, 0)]):
        process = context.Process(target=work, args=(drafts,))
        process.start()
        process.join()
        assert process.exitcode == 0
    for line in generate_latest(registry).decode().splitlines():
        if line.startswith("fourfold:"):
            print(line)
    print(os.environ["FOURFOLD_METRICS_DIR"], Path(os.environ["FOURFOLD_METRICS_DIR"]).is_dir())
"""
EXPECTED = {
    'fourfold:spec_drafts_total{source="mtp"}': 3.0,
    'fourfold:spec_drafts_total{source="suffix"}': 1.0,
    'fourfold:spec_draft_tokens_total{source="mtp"}': 9.0,
    'fourfold:spec_draft_tokens_total{source="suffix"}': 8.0,
    'fourfold:spec_accepted_tokens_total{position="0",source="mtp"}': 2.0,
    'fourfold:spec_accepted_tokens_total{position="1",source="mtp"}': 1.0,
    **{f'fourfold:spec_accepted_tokens_total{{position="{i}",source="suffix"}}': 1.0 for i in range(8)},
}


@pytest.mark.parametrize("shared", [False, True], ids=["one API server", "PROMETHEUS_MULTIPROC_DIR"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_what_workers_count_is_served(method: str, shared: bool, tmp_path: Path) -> None:
    script = tmp_path / "serve.py"
    script.write_text(SERVE)
    folder = tmp_path / "prometheus"
    folder.mkdir()
    arguments = [sys.executable, str(script), method, *([str(folder)] if shared else [])]
    # The directory of another server, which this one inherits, is not its own.
    env = {**os.environ, "FOURFOLD_METRICS_DIR": str(tmp_path / "other")}
    done = subprocess.run(arguments, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)} == EXPECTED
    own, there = last.split()
    assert there == str(not shared) and not Path(own).exists() and not (tmp_path / "other").exists()
    assert len(list(folder.iterdir())) == (2 if shared else 0)


def test_nothing_to_count_for() -> None:
    code = (
        "import sys; from fourfold.common.mtp import metrics; print(metrics.enable()); metrics.publish({});"
        "print('prometheus_client' in sys.modules)"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("PROMETHEUS_MULTIPROC_DIR", "FOURFOLD_METRICS_DIR")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.split() == ["False", "False"]
