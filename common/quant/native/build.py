"""Compile the C++ sources of ``csrc/`` at first use and load them.

One library for each instruction set, cached below `settings.cache_dir` under a hash of sources, flags and compiler,
and renamed into place when it is whole. It links the OpenMP runtime that torch has loaded, so that both share one
pool of threads, pinned as the engine pinned it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

from fourfold.common.errors import FourfoldError
from fourfold.common.log import get_logger
from fourfold.common.settings import cache_dir, cpu_isa, cxx

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-w")
# In order of preference: the processor's flags that it needs, and the compiler's.
ISAS: dict[str, tuple[frozenset[str], tuple[str, ...]]] = {
    "avx512_vnni": (
        frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "f16c", "fma"}),
        ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mf16c", "-mfma", "-mavx2"),
    ),
    "avx2": (frozenset({"avx2", "f16c", "fma"}), ("-mavx2", "-mf16c", "-mfma")),
    "portable": (frozenset(), ()),
}


class NativeUnavailable(FourfoldError):
    """The kernels cannot be compiled or loaded here; the message says why and what to install."""


@cache
def available_isas() -> tuple[str, ...]:
    """The instruction sets of `ISAS` that this processor has, best first."""
    flags: set[str] = set()
    if platform.machine() in ("x86_64", "AMD64"):
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
        except OSError:
            lines = []
        flags = next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())
    return tuple(name for name, (needed, _) in ISAS.items() if needed <= flags)


def chosen_isa() -> str:
    """The instruction set to use: ``FOURFOLD_CPU_ISA``, else the best there is.

    Raises:
        NativeUnavailable: the one asked for is unknown, or this processor lacks it.
    """
    wanted, found = cpu_isa(), available_isas()
    if wanted is None:
        return found[0]
    if wanted not in found:
        raise NativeUnavailable(f"FOURFOLD_CPU_ISA={wanted!r}: this processor has {', '.join(found)}")
    return wanted


@cache
def load(stem: str, isa: str) -> ctypes.CDLL:
    """Return the library of ``csrc/<stem>.cpp`` for an instruction set of `available_isas`.

    Raises:
        NativeUnavailable: no compiler, or it failed; the message has the fix or the compiler's words.
    """
    compiler = cxx() or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NativeUnavailable("no C++ compiler: install g++ (or set CXX) to have the cpu backend's kernels")
    extra = ISAS[isa][1]
    sources = sorted(SOURCES.iterdir())
    key = hashlib.sha256()
    for part in (compiler, platform.machine(), torch.__version__, *FLAGS, *extra):
        key.update(part.encode())
    for source in sources:
        key.update(source.read_bytes())
    target = cache_dir() / "native" / f"{stem}-{isa}-{key.hexdigest()[:16]}.so"
    if not target.exists():
        _compile(compiler, stem, isa, extra, target)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise NativeUnavailable(f"{target} cannot be loaded: {error}; delete it to compile it again") from None


def _compile(compiler: str, stem: str, isa: str, extra: tuple[str, ...], target: Path) -> None:
    get_logger(__name__).info("fourfold: compiling %s for %s with %s (once)", stem, isa, compiler)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(f".partial-{os.getpid()}")
    command = [compiler, *FLAGS, *extra, f"-DFOURFOLD_{isa.upper()}", str(SOURCES / f"{stem}.cpp"), "-o", str(part)]
    runtime = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    if runtime.exists():
        command += ["-Wl,--no-as-needed", str(runtime)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise NativeUnavailable(f"the compiler {compiler} cannot be run: {error}; install g++ or set CXX") from None
    if done.returncode:
        part.unlink(missing_ok=True)
        words = "\n".join((done.stderr or done.stdout).strip().splitlines()[:8])
        raise NativeUnavailable(f"{compiler} failed on {stem}.cpp for {isa}:\n{words}")
    part.rename(target)
