"""``fourfold recipe import``."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourfold.common.console import wide_console
from fourfold.common.recipe.options import Json, Roots

if TYPE_CHECKING:
    from fourfold.common.recipe.importing.collection import Choice, Collection
    from fourfold.common.recipe.importing.public import Source
    from fourfold.common.recipe.importing.result import Imported
    from fourfold.common.recipe.loading import Catalogue


def import_(
    source: Annotated[
        Path | None,
        typer.Argument(help="A YAML file of srt-slurm, InferenceX or vllm-project/recipes, or a folder of them."),
    ] = None,
    public: Annotated[
        bool,
        typer.Option("--public", help="Fetch the three public collections at a pinned commit and count what rotted."),
    ] = False,
    from_: Annotated[
        Path | None, typer.Option("--from", help="With --public: folder that holds the collections; none is fetched.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the recipes below this folder, as model/name.yaml; default: only report.")
    ] = None,
    hardware: Annotated[str, typer.Option(help="vllm-project only: gb300, gb200, b300, b200 or h200.")] = "gb300",
    variant: Annotated[str, typer.Option(help="vllm-project only: which of the file's variants.")] = "default",
    feature: Annotated[
        list[str] | None, typer.Option(help="vllm-project only: an opt-in feature, such as spec_decoding; repeatable.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there already.")] = False,
    catalogue: Roots = None,
    as_json: Json = False,
) -> None:
    """Read another project's recipes into ours, give them today's names, and say what rotted.

    Each old name is shown with what the engines do with it (refuse, ignore, warn) and what took its place; what has no
    place in a recipe is listed. Nothing in a file is run. Exit status 1 where an engine still refuses something; with
    --public, which only measures, 0.
    """
    from fourfold.common.errors import FourfoldError
    from fourfold.common.recipe.importing import collection as made
    from fourfold.common.recipe.loading import Catalogue

    known, choice = Catalogue(catalogue), made.Choice(hardware, variant, tuple(feature or ()))
    if public:
        if source or out:
            raise FourfoldError("--public takes no SOURCE and no --out: it measures whole collections; see --from DIR")
        _public(from_, known, choice, as_json)
        return
    if source is None or from_:
        raise FourfoldError("expected SOURCE, a file or folder, or --public, which --from DIR goes with")
    if source.is_dir():
        found = made.import_folder(source, known, choice)
        if not found.imported and not found.failed:
            raise FourfoldError(f"{source}: no recipe of srt-slurm or vllm-project/recipes below it")
    else:
        found = made.Collection(made.import_file(source, known, choice))
    files = made.write(found.imported, out, overwrite) if out else []
    if as_json:
        shown = {
            "files": found.files,
            "counts": found.counts(),
            "recipes": [made.as_json(item) for item in found.imported],
            "failed": found.failed,
            "others": [str(path) for path in found.others],
            "written": [str(path) for path in files],
        }
        typer.echo(json.dumps(shown, indent=1, default=str))
    else:
        if not source.is_dir():
            for item in found.imported:
                _show(item)
        _summary(found)
        for path in files:
            typer.echo(f"wrote {path}")
    raise typer.Exit(1 if any(item.left for item in found.imported) else 0)


def _public(folder: Path | None, known: Catalogue, choice: Choice, as_json: bool) -> None:
    """Fetch or find each public collection, import it and print what was counted."""
    from rich.table import Table

    from fourfold.common.recipe.importing import collection as made
    from fourfold.common.recipe.importing import public
    from fourfold.common.recipe.importing.building import judges

    rows: list[dict[str, Any]] = []
    engines: dict[str, None] = {}
    reasons: Counter[str] = Counter()
    for source in public.COLLECTIONS:
        place = public.local(source, folder) if folder else _fetch(source)
        typer.echo(f"{source.repository}: reading {place}", err=True)
        found = made.import_folder(place, known, choice)
        counts = found.counts()
        engines |= dict.fromkeys(counts)
        reasons.update(line.removeprefix(f"{place}/").partition(": ")[2] for line in found.failed)
        row = public.row(counts) | {"not read": len(found.failed)}
        rows.append({"collection": source.repository, "commit": None if folder else source.commit, **row})
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    titles = ("collection", "SGLang files refused", "vLLM files refused", "recipes with old names", "repaired")
    table = Table(*titles, "still refused", "not read")
    for row in rows:
        pairs = [" of ".join(map(str, row[key])) if row[key] else "" for key in ("sglang", "vllm", "old")]
        table.add_row(row["collection"], *pairs, *(str(row[key]) for key in ("repaired", "left", "not read")))
    wide_console().print(table)
    for reason, count in reasons.most_common(5):
        typer.echo(f"not read: {count}: {reason}")
    where = f"in {folder}, whose commits were not looked at" if folder else "at the commits that fourfold pins"
    typer.echo(f"the collections {where}; refusals judged by {', '.join(judges(sorted(engines)))}")


def _fetch(source: Source) -> Path:
    """Fetch a collection, git's own progress on the terminal."""
    from fourfold.common.recipe.importing import public

    live = sys.stderr.isatty()

    def progress(line: str) -> None:
        if live:
            sys.stderr.write(f"\r\033[K{source.repository}: {line[:100]}")
            sys.stderr.flush()

    typer.echo(f"{source.repository}: commit {source.commit[:12]} from {source.url}", err=True)
    try:
        return public.fetched(source, public.collections_dir(), progress)
    finally:
        if live:
            sys.stderr.write("\r\033[K")


def _show(item: Imported) -> None:
    from fourfold.common.recipe.importing.result import short

    (engine,) = item.data["engines"]
    typer.echo(f"{item.id} ({engine})")
    for roles, rename in item.renames():
        typer.echo(f"  {roles}: {rename.text} [{rename.source}]")
    for refusal in item.left:
        typer.echo(f"  still refused by {refusal.engine}: {refusal.where}: {short(refusal.message, 400)}")
    for line in dict.fromkeys(item.unknown):
        typer.echo(f"  not carried over: {short(line, 400)}")


def _summary(found: Collection) -> None:
    """Counts by engine, the most frequent old names, and what could not be read.

    refused: by a version of the engine as it was published; ignored: a variable that nothing reads any more.
    """
    from rich.table import Table

    from fourfold.common.recipe.importing.building import judges

    console = wide_console()
    table = Table("engine", "files", "refused", "recipes", "old names", "refused", "ignored", "repaired", "left")
    for engine, row in found.counts().items():
        keys = ("files", "files_refused", "recipes", "rotten", "refused", "ignored", "repaired", "left")
        table.add_row(engine, *(str(row[key]) for key in keys))
    console.print(table)
    if found.files > 1:
        old = Table("recipes", "old name", "what became of it")
        for name, text, count in found.names()[:25]:
            old.add_row(str(count), name, text)
        console.print(old)
    for line in found.failed:
        typer.echo(f"not read: {line}", err=True)
    if found.imported:
        typer.echo(f"refusals judged by {', '.join(judges(found.counts()))}")
    rows = found.counts().values()
    repaired, left = sum(row["repaired"] for row in rows), sum(row["left"] for row in rows)
    typer.echo(
        f"{found.files} files, {len(found.imported)} recipes with {sum(len(item.rot) for item in found.imported)} old "
        f"settings: repaired {repaired}, left {left}, "
        f"not read {len(found.failed)}, other files {len(found.others)}"
    )
