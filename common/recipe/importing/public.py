"""The public collections of recipes, fetched at a pinned commit and measured.

A fetched collection is a plain folder below the cache, named after its commit. It appears there whole or not at all.
Nothing of it is run, and its links become files.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold.common.errors import FourfoldError
from fourfold.common.settings import cache_dir

PATIENCE = 60.0  # seconds without a word from git
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """A public repository at one commit.

    Attributes:
        repository: owner and name on GitHub.
        commit: the 40 digits of a commit.
    """

    repository: str
    commit: str

    @property
    def url(self) -> str:
        return f"https://github.com/{self.repository}.git"

    @property
    def folder(self) -> str:
        """Name of a folder for it, as ``owner+name``."""
        return self.repository.replace("/", "+")


COLLECTIONS = (
    Source("SemiAnalysisAI/InferenceX", "843c6254ff69b567f772f6a5fd97675af3d04431"),
    Source("NVIDIA/srt-slurm", "c88ef731636890ff6385a783e152c1790e15b194"),
    Source("vllm-project/recipes", "8959cf64189c71d36e11c6a30335f923f261b1f7"),
)


def collections_dir() -> Path:
    """Where fetched collections are kept."""
    return cache_dir() / "collections"


def fetched(
    source: Source,
    folder: Path,
    progress: Progress = lambda line: None,
    url: str | None = None,
    paths: Sequence[str] = (),
    patience: float = PATIENCE,
) -> Path:
    """The files of a repository at its commit, from ``folder`` where they are there already, else fetched with git.

    Args:
        progress: is told each line that git says.
        url: where git finds the repository; default: GitHub.
        paths: only these files; default: all.
        patience: seconds without a word from git after which it is given up.

    Raises:
        FourfoldError: git is missing or fails, or nothing comes; the message has the repository and what git said.
    """
    if not re.fullmatch("[0-9a-f]{40}", source.commit):
        raise FourfoldError(f"{source.repository}: commit {source.commit!r}: expected the 40 digits of one commit")
    whole = folder / f"{source.folder}@{source.commit[:12]}"
    if whole.is_dir():
        return whole
    part = folder / f".{whole.name}.part"
    with _locked(folder, whole.name):
        if whole.is_dir():
            return whole
        shutil.rmtree(part, ignore_errors=True)  # what a killed run left
        part.mkdir()
        try:
            _checkout(source, part, progress, url or source.url, paths, patience)
            os.replace(part, whole)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return whole


def _checkout(source: Source, part: Path, progress: Progress, url: str, paths: Sequence[str], patience: float) -> None:
    def git(*arguments: str) -> None:
        try:
            _git(part, arguments, progress, patience)
        except (OSError, RuntimeError) as error:
            raise FourfoldError(
                f"{source.repository} at {source.commit[:12]}: cannot be fetched from {url}: {error}; give a folder "
                f"that holds {source.folder} with --from DIR, or see to the network and run it again"
            ) from None

    few = ("--filter=blob:none",) if paths else ()
    git("init", "--quiet", "--template=")
    git("remote", "add", "origin", url)
    git("fetch", "--depth=1", "--no-tags", "--no-recurse-submodules", "--progress", *few, "origin", source.commit)
    git("checkout", "--quiet", "--force", source.commit, "--", *(paths or (".",)))
    shutil.rmtree(part / ".git")


def _git(folder: Path, arguments: Sequence[str], progress: Progress, patience: float) -> None:
    """Run git without anything of the user's repository, hooks, filters or prompts.

    Raises:
        OSError: git is not there.
        RuntimeError: it failed or said nothing for too long; the message is what it said last.
    """
    settings = ("core.hooksPath=/dev/null", "core.symlinks=false", "core.autocrlf=false", "gc.auto=0")
    command = ["git", *(word for setting in settings for word in ("-c", setting)), *arguments]
    env = {
        name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    }
    env |= {"GIT_TERMINAL_PROMPT": "0", "GIT_LFS_SKIP_SMUDGE": "1", "LC_ALL": "C"}
    process = subprocess.Popen(
        command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    said: list[str] = []
    try:
        for line in _lines(process, patience):
            said.append(line)
            progress(line)
        if process.wait():
            errors = [line for line in said if line.startswith(("fatal:", "error:"))]
            raise RuntimeError(f"git {arguments[0]}: {' '.join(errors or said[-1:]) or f'exit {process.returncode}'}")
    finally:
        if process.poll() is None:  # with the programs that it started
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _lines(process: subprocess.Popen[bytes], patience: float) -> Iterator[str]:
    """What a process says, a line at a time; a progress bar's states are lines too."""
    assert process.stderr is not None
    rest = b""
    with process.stderr as pipe:
        while True:
            if not select.select([pipe], [], [], patience)[0]:
                raise RuntimeError(f"no word from git for {patience:g} seconds")
            block = os.read(pipe.fileno(), 4096)
            *lines, rest = re.split(rb"[\r\n]+", rest + block) if block else [rest, b""]
            yield from (text for line in lines if (text := line.decode(errors="replace").strip()))
            if not block:
                return


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """One fetch of a repository at a time; a second one waits."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f".{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise FourfoldError(f"{folder}: {error.strerror or error}; FOURFOLD_CACHE names another folder") from None


def local(source: Source, folder: Path) -> Path:
    """The collection below a folder of the user's: ``owner+name``, ``owner/name``, ``name``, or as fetched.

    Raises:
        FourfoldError: it is not there.
    """
    _, _, name = source.repository.partition("/")
    names = (source.folder, source.repository, name, f"{source.folder}@{source.commit[:12]}")
    for candidate in names:
        if (folder / candidate).is_dir():
            return folder / candidate
    raise FourfoldError(f"--from {folder}: holds none of {', '.join(names)}; clone {source.url} there")


def row(counts: dict[str, dict[str, int]]) -> dict[str, Any]:
    """One collection's line of the table.

    Args:
        counts: as ``Collection.counts`` gives them, by engine.

    Returns:
        ``sglang`` and ``vllm``: files that a version of the engine refuses as published, and files, or None where there
        are none; ``old``: recipes with old names, and recipes; ``repaired`` and ``left``: recipes.
    """
    out: dict[str, Any] = {}
    for engine in ("sglang", "vllm"):
        of = counts.get(engine)
        out[engine] = (of["files_refused"], of["files"]) if of else None
    rows = counts.values()
    out["old"] = (sum(of["rotten"] for of in rows), sum(of["recipes"] for of in rows))
    return out | {key: sum(of[key] for of in rows) for key in ("repaired", "left")}
