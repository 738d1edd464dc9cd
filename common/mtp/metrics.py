"""Drafts by source and position as Prometheus counters, in the ``/metrics`` of the engine itself.

- ``fourfold:spec_drafts_total{source}``: verified drafts of at least one token;
- ``fourfold:spec_draft_tokens_total{source}``: tokens in them;
- ``fourfold:spec_accepted_tokens_total{source,position}``: drafts in which the token at that position was accepted.

A worker process counts, the API server's process answers: neither engine carries counts by source between them. They
share files of prometheus_client's own multi-process format, which prometheus_client sums at every scrape:

- SGLang with ``--enable-metrics``, and vLLM with several API servers, set ``PROMETHEUS_MULTIPROC_DIR`` for all their
  processes and serve that directory. `enable` writes there; nothing else is needed.
- vLLM with one API server serves its process's registry. There `serve`, called as the plugin loads, registers a
  collector of a directory of fourfold's own, and names it in ``FOURFOLD_METRICS_DIR`` for the processes started after.
  (A plugin of vLLM's group ``vllm.stat_logger_plugins`` gets what its scheduler counts, which knows no sources, and
  turns statistics on for a server started with ``--disable-log-stats``.)

Counted are the workers on the API server's machine that descend from it: not those of other nodes, nor Ray's.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from fourfold.common.settings import metrics_dir

_DRAFTS = "fourfold:spec_drafts", "Verified drafts of at least one token."
_TOKENS = "fourfold:spec_draft_tokens", "Tokens in verified drafts."
_ACCEPTED = "fourfold:spec_accepted_tokens", "Drafts in which the token at this position was accepted."


class Totals(Protocol):
    """What the drafts of one source came to since the process started; see `hybrid.SourceTotals`."""

    drafts: int
    drafted: int
    accepted_by_position: list[int]


class _Counters:
    """The counters of this process, in a file."""

    def __init__(self, folder: Path) -> None:
        from prometheus_client.mmap_dict import MmapedDict

        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Told apart from the file that prometheus_client may have for this process; the type comes first.
        self.pid = os.getpid()
        self._file: Any = MmapedDict(str(folder / f"counter_fourfold{uuid.uuid4().hex}_{self.pid}.db"))
        self._written: dict[str, list[int]] = {}  # by source: drafts, tokens, accepted by position
        self._keys: dict[tuple[str, int], str] = {}

    def write(self, source: str, totals: Totals) -> None:
        values = [totals.drafts, totals.drafted, *totals.accepted_by_position]
        written = self._written.get(source, [])
        for i, value in enumerate(values):
            if i >= len(written) or value != written[i]:
                self._file.write_value(self._key(source, i), value, time.time())
        self._written[source] = values

    def _key(self, source: str, i: int) -> str:
        from prometheus_client.mmap_dict import mmap_key

        key = self._keys.get((source, i))
        if key is None:
            name, text = (_DRAFTS, _TOKENS, _ACCEPTED)[min(i, 2)]
            labels = {"source": source} | ({"position": str(i - 2)} if i >= 2 else {})
            key = self._keys[source, i] = mmap_key(name, f"{name}_total", list(labels), list(labels.values()), text)
        return key


_counters: _Counters | None = None


class _Collector:
    """What all processes counted, for the registry of the process that answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def collect(self) -> Iterable[Any]:
        from prometheus_client.multiprocess import MultiProcessCollector

        return MultiProcessCollector(None, str(self.folder)).collect() if self.folder.is_dir() else ()


def serve() -> None:
    """Show the counters of this process and of those it will start in prometheus_client's registry.

    In a process that another started with multiprocessing, they are shown there already.
    """
    from prometheus_client import REGISTRY

    # A value that a program inherits from its shell or parent is that one's; only children of a server share its own.
    if multiprocessing.parent_process() is not None:
        return
    folder = Path(tempfile.gettempdir()) / f"fourfold-metrics-{uuid.uuid4().hex}"
    os.environ["FOURFOLD_METRICS_DIR"] = str(folder)
    REGISTRY.register(_Collector(folder))  # type: ignore[arg-type]
    atexit.register(_remove, folder, os.getpid())


def _remove(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # not in processes that were forked
        shutil.rmtree(folder, ignore_errors=True)


def enable() -> bool:
    """Let `publish` of this process publish; returns whether anything shows it.

    For one worker among those that verify the same drafts: the first rank of a tensor-parallel group.
    """
    global _counters
    folder = metrics_dir()
    if folder is not None and (_counters is None or _counters.pid != os.getpid()):
        _counters = _Counters(Path(folder))
    return folder is not None


def publish(totals: Mapping[str, Totals]) -> None:
    """Publish the counts by source, once a step: a few writes to a mapped file. Without `enable`, nothing happens."""
    if _counters is not None:
        for source, counts in totals.items():
            _counters.write(source, counts)
