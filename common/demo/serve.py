"""``make serve``: SmolLM2 in NVFP4 through the real engine of this environment, and its speed against BF16.

Runs in an environment that `fourfold.common.demo.environment` made: ``python -m fourfold.common.demo.serve``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from fourfold.common.bench.engine import decode_speed
from fourfold.common.demo.model import resolve, say
from fourfold.common.errors import FourfoldError
from fourfold.common.serving import EngineServer, free_port, installed_engine
from fourfold.common.settings import cache_dir

QUESTION = "Name three colours of the rainbow."
TOKENS = 64
ARGUMENTS = {
    "vllm": ["--dtype", "bfloat16", "--max-model-len", "1024", "--enforce-eager", "--no-enable-prefix-caching"],
    "sglang": [
        "--dtype",
        "bfloat16",
        "--context-length",
        "1024",
        "--max-total-tokens",
        "4096",
        "--disable-radix-cache",
    ],
}


def quantised(model: Path) -> Path:
    """The NVFP4 checkpoint of ``model`` in the cache, made the first time."""
    from fourfold.common.quant.checkpoint.convert import Options, convert

    out = cache_dir() / "models" / f"{model.name}-nvfp4"
    if out.exists():
        say(f"{out} is there already")
    else:
        say("quantising to NVFP4 (scales sweep, weighted by the activations of random tokens)")
        convert(model, out, Options())
    return out


def _started(server: EngineServer, label: str) -> EngineServer:
    say(f"starting {server.engine} with {label}: {' '.join(server.command())}")
    begin = time.monotonic()

    def tick(line: str) -> None:
        if sys.stderr.isatty():
            seconds = time.monotonic() - begin
            print(f"\r\033[K{seconds:4.0f} s  {line[:110]}", end="", file=sys.stderr, flush=True)

    server.start()
    server.wait(tick=tick)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return server


def main() -> int:
    """Serve until Ctrl-C; 0 on success."""
    parser = argparse.ArgumentParser(description="Serve SmolLM2-135M-Instruct in NVFP4 and show that it works.")
    parser.add_argument("--port", type=int, default=8000, help="port to serve on (another where it is taken)")
    parser.add_argument("--once", action="store_true", help="stop after the answer instead of serving on")
    options = parser.parse_args()
    try:
        engine, version = installed_engine()
        model = resolve("smollm2")
        checkpoint = quantised(model)
        before = _speed_in_bf16(engine, model)
        arguments = [*ARGUMENTS[engine], "--quantization", "fourfold_nvfp4"]
        log = cache_dir() / "logs" / f"{engine}-nvfp4.log"
        server = EngineServer(engine, str(checkpoint), log, arguments, port=free_port(options.port))
        try:
            _started(server, "NVFP4")
            _show(server, version, before)
            while not options.once:
                time.sleep(1)
                if server.process is not None and server.process.poll() is not None:
                    raise FourfoldError(f"{engine} ended\n{server.tail()}")
        finally:
            server.stop()
    except FourfoldError as error:
        print(f"fourfold: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
    return 0


def _speed_in_bf16(engine: str, model: Path) -> float:
    server = EngineServer(engine, str(model), cache_dir() / "logs" / f"{engine}-bf16.log", ARGUMENTS[engine])
    try:
        return _speed(_started(server, "BF16, to compare"))
    finally:
        server.stop()


def _speed(server: EngineServer) -> float:
    decode_speed(server, 1, 8, 0)
    return decode_speed(server, 1, TOKENS, 2)


def _show(server: EngineServer, version: str, before: float) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    body = {"model": server.model, "messages": messages, "max_tokens": TOKENS, "temperature": 0}
    answer = server.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    after = _speed(server)
    lines = server.log.read_text(errors="replace").splitlines()
    served = next((line[line.index("fourfold: nvfp4") :] for line in lines if "fourfold: nvfp4" in line), None)
    if served is None:
        raise FourfoldError(f"{server.engine} serves, but fourfold's line is missing from {server.log}")
    print(f"\nQ: {QUESTION}\nA: {answer}\n")
    print(f"{server.engine} {version}: {after:.1f} tokens/s in NVFP4, {before:.1f} in BF16: {after / before:.2f} times")
    print(served)
    print(f"serving {server.model} at {server.url}/v1, log {server.log}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
