"""``fourfold recipe import --public``: fetch, pin, interruption, table by a repository made here; the real collections.

Those are measured where the cache has them or GitHub answers within seconds, and held to the README's table; elsewhere
the committed samples are. Which of the two it was is printed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from published_schemas import obtained
from typer.testing import CliRunner

from fourfold.common.cli import app
from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.importing import public
from fourfold.common.recipe.importing.collection import import_folder
from fourfold.common.recipe.importing.public import Source, fetched, local, row
from fourfold.common.recipe.loading import Catalogue

SAMPLES = Path(__file__).parent / "samples"
README = Path(__file__).parents[2] / "README.md"
ROW_OF_SAMPLES = {"sglang": (2, 2), "vllm": (2, 2), "old": (9, 9), "repaired": 9, "left": 0}


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def origin(tmp_path: Path) -> tuple[Path, Source]:
    """A repository whose first commit is pinned and whose second one differs."""
    folder = tmp_path / "origin"
    shutil.copytree(SAMPLES, folder / "deep")
    git(folder, "init", "--quiet")
    (folder / "link").symlink_to("/etc/hosts")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "-m", "first")
    commit = git(folder, "rev-parse", "HEAD")
    shutil.rmtree(folder / "deep")
    (folder / "later.yaml").write_text("name: x\n")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "-m", "second")
    return folder, Source("someone/collection", commit)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name[-5:] != ".lock")


def test_fetched_whole_at_the_pin_and_once(origin: tuple[Path, Source], tmp_path: Path) -> None:
    folder, source = origin
    lines: list[str] = []
    made = fetched(source, tmp_path / "cache", lines.append, folder.as_uri())
    assert made == tmp_path / "cache" / f"someone+collection@{source.commit[:12]}"
    samples = sorted(path.name for path in SAMPLES.iterdir())
    assert files(tmp_path / "cache") == sorted(
        [made.name, f"{made.name}/deep", f"{made.name}/link", *(f"{made.name}/deep/{name}" for name in samples)]
    )
    assert not (made / "link").is_symlink() and (made / "link").read_text() == "/etc/hosts"
    assert any("objects" in line for line in lines)
    assert fetched(source, tmp_path / "cache", url="file:///nowhere") == made
    few = fetched(source, tmp_path / "few", url=folder.as_uri(), paths=[f"deep/{samples[0]}"])
    assert [path.name for path in few.rglob("*") if path.is_file()] == [samples[0]]


@pytest.mark.parametrize(
    ("commit", "url", "says"),
    [
        ("0" * 40, None, "not our ref 0000"),
        (None, "file:///nowhere/at/all", "does not appear to be a git repository"),
        ("main", None, "expected the 40 digits"),
    ],
)
def test_what_cannot_be_fetched(
    origin: tuple[Path, Source], tmp_path: Path, commit: str | None, url: str | None, says: str
) -> None:
    folder, source = origin
    with pytest.raises(FourfoldError, match=says) as error:
        fetched(Source(source.repository, commit or source.commit), tmp_path / "cache", url=url or folder.as_uri())
    assert "someone/collection" in str(error.value) and "\n" not in str(error.value)
    assert commit == "main" or "--from DIR" in str(error.value)
    assert not (tmp_path / "cache").exists() or files(tmp_path / "cache") == []


SLOW = """\
#!/bin/bash
"{git}" "$@" || exit
case " $* " in *" checkout "*)
  touch "{there}"
  while kill -0 "$PPID" 2>/dev/null; do sleep 0.05; done
esac
"""
RUN = """\
import signal
import sys
from pathlib import Path
from fourfold.common.recipe.importing.public import Source, fetched
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit that it is ignored
repository, commit, folder, url, patience = sys.argv[1:]
fetched(Source(repository, commit), Path(folder), url=url, patience=float(patience))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL, None])
def test_interrupted_leaves_nothing_half_done(
    origin: tuple[Path, Source], tmp_path: Path, how: signal.Signals | None
) -> None:
    """Stopped with every file there already but git not yet done; also where git falls silent."""
    folder, source = origin
    there, cache = tmp_path / "there", tmp_path / "cache"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").write_text(SLOW.format(git=shutil.which("git"), there=there))
    (tmp_path / "bin" / "git").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = [
        sys.executable,
        "-c",
        RUN,
        source.repository,
        source.commit,
        cache,
        folder.as_uri(),
        "60" if how else "1",
    ]
    run = subprocess.Popen([str(word) for word in command], env=env, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not there.exists() and time.monotonic() < end and run.poll() is None:
        time.sleep(0.05)
    assert there.exists()
    if how:
        run.send_signal(how)
    _, errors = run.communicate(timeout=60)
    assert run.returncode
    whole = cache / f"someone+collection@{source.commit[:12]}"
    assert not whole.exists()
    if how != signal.SIGKILL:
        assert files(cache) == []
    if how is None:
        assert "no word from git for 1 seconds" in errors
    assert fetched(source, cache, url=folder.as_uri()) == whole
    assert (whole / "deep").is_dir() and {path.name for path in cache.iterdir()} == {whole.name, f".{whole.name}.lock"}


def redirected(monkeypatch: pytest.MonkeyPatch, source: Source, folder: Path) -> None:
    """Let git find a repository of GitHub on this machine."""
    for name, value in {"COUNT": "1", "KEY_0": f"url.{folder.as_uri()}.insteadOf", "VALUE_0": source.url}.items():
        monkeypatch.setenv(f"GIT_CONFIG_{name}", value)


def test_command(origin: tuple[Path, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, source = origin
    monkeypatch.setattr(public, "COLLECTIONS", (source,))
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))
    redirected(monkeypatch, source, folder)
    run = CliRunner().invoke
    done = run(app, ["recipe", "import", "--public", "--json"])
    assert done.exit_code == 0
    (found,) = json.loads(done.stdout)
    expected = {key: list(value) if isinstance(value, tuple) else value for key, value in ROW_OF_SAMPLES.items()}
    assert found == {"collection": source.repository, "commit": source.commit, **expected, "not read": 0}
    shutil.rmtree(folder)
    done = run(app, ["recipe", "import", "--public"])
    cells = [cell.strip() for cell in next(x for x in done.stdout.splitlines() if "someone" in x).split("│")[1:-1]]
    assert cells == [source.repository, "2 of 2", "2 of 2", "9 of 9", "9", "0", "0"]
    assert "at the commits that fourfold pins" in done.stdout and "snapshot of sglang" in done.stdout
    shutil.copytree(SAMPLES, tmp_path / "mine" / "collection")
    done = run(app, ["recipe", "import", "--public", "--from", str(tmp_path / "mine")])
    assert cells[1:4] == [cell.strip() for cell in done.stdout.split("someone/collection")[1].split("│")[1:4]]
    assert "whose commits were not looked at" in done.stdout
    for arguments in (["--public", "--from", str(tmp_path)], ["--public", str(SAMPLES)], ["--from", str(SAMPLES)], []):
        with pytest.raises(FourfoldError, match="holds none of|takes no SOURCE|expected SOURCE"):
            run(app, ["recipe", "import", *arguments], catch_exceptions=False)


def tabled() -> dict[str, dict[str, object]]:
    """The table of the README, by the name of the repository."""
    out: dict[str, dict[str, object]] = {}
    for source in public.COLLECTIONS:
        names = {source.repository, source.repository.partition("/")[2]}
        (line,) = (x for x in README.read_text().splitlines() if x.strip(" |").split(" | ")[0].strip() in names)
        cells = [tuple(map(int, re.findall(r"\d+", cell))) or None for cell in line.strip(" |").split("|")[1:]]
        repaired, left = cells[3], cells[4]
        assert repaired and left
        row = dict(zip(("sglang", "vllm", "old"), cells, strict=False))
        out[source.repository] = {**row, "repaired": repaired[0], "left": left[0]}
    return out


def available(source: Source) -> Path | None:
    """The collection, from the cache or from GitHub; None: neither has it now."""
    whole = public.collections_dir() / f"{source.folder}@{source.commit[:12]}"
    return whole if whole.is_dir() else obtained(source, public.collections_dir())


def test_the_public_collections(capsys: pytest.CaptureFixture[str]) -> None:
    """As the README says of them; where they cannot be had, what the samples in their formats come to."""
    known, said = Catalogue(), tabled()
    assert list(said) == [source.repository for source in public.COLLECTIONS]
    measured = []
    for source in public.COLLECTIONS:
        folder = available(source)
        if folder is not None:
            assert row(import_folder(folder, known).counts()) == said[source.repository]
            measured.append(f"{source.repository} at {source.commit[:12]}")
    missing = len(public.COLLECTIONS) - len(measured)
    if missing:
        assert row(import_folder(SAMPLES, known).counts()) == ROW_OF_SAMPLES
        measured.append(f"the committed samples, since {missing} collections cannot be had here")
    with capsys.disabled():
        print(f"\nmeasured: {'; '.join(measured)}")


def test_a_folder_of_the_users(tmp_path: Path) -> None:
    source = public.COLLECTIONS[0]
    owner, _, name = source.repository.partition("/")
    for at in (f"{owner}+{name}", f"{owner}/{name}", name):
        (tmp_path / at / "here" / at).mkdir(parents=True)
        assert local(source, tmp_path / at / "here") == tmp_path / at / "here" / at
