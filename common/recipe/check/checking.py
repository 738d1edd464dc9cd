"""Check recipes at levels L0 to L4, on every engine version that there is.

L1 and L3 are the engine's own words (`asking`), L1 and L2 a snapshot's where the engine is not here (`snapshots`), and
the result says which. A recipe stands at the highest level that it passes together with all below; a level that could
not be asked is not passed, and a finding says why.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.check import environment, snapshots
from fourfold.common.recipe.check.asking import CASE_LIMIT, Answers, Case, ask
from fourfold.common.recipe.check.result import Finding, Rename
from fourfold.common.recipe.check.targets import Target, matches, unique, wanted
from fourfold.common.recipe.launch import Start, engine_of, flags, is_for, starts
from fourfold.common.recipe.loading import Catalogue
from fourfold.common.recipe.schema import HardwareSheet, ModelCard, Recipe

UNRESOLVED = -3  # in place of level 3: one process of a recipe could not be resolved
FROM_THE_START = ("SGLANG_PLATFORM",)  # variables that an engine reads when it is imported


@dataclass
class Check:
    """What one engine's version says of one recipe.

    Attributes:
        level: highest level that is passed, 0 to 4.
        by: ``engine`` or ``snapshot``, who answered at L1.
        resolved: role to option to value, as the engine resolved it.
    """

    recipe: str
    engine: str
    version: str
    by: str
    level: int = 0
    findings: list[Finding] = field(default_factory=list)
    resolved: dict[str, dict[str, Any]] = field(default_factory=dict)
    reached: set[int] = field(default_factory=lambda: {0})

    @property
    def label(self) -> str:
        return f"{self.engine} {self.version}"

    @property
    def errors(self) -> int:
        return sum(finding.severity == "error" for finding in self.findings)

    def settle(self) -> None:
        """Order the findings, each once, and set the level."""
        self.findings = sorted(
            dict.fromkeys(self.findings), key=lambda f: (f.level, ("error", "warning", "note").index(f.severity))
        )
        if UNRESOLVED in self.reached:
            self.reached.discard(3)
        failed = {finding.level for finding in self.findings if finding.severity == "error"}
        self.level = 0
        while self.level < 4 and self.level + 1 in self.reached and not failed & set(range(self.level + 2)):
            self.level += 1


@dataclass(frozen=True)
class _Job:
    """One recipe for one target."""

    recipe: Recipe
    card: ModelCard
    sheet: HardwareSheet
    target: Target
    check: Check
    starts: Sequence[Start]
    config: Mapping[str, Any]


def available(targets: Sequence[Target], asked: Sequence[str] = ()) -> list[Target]:
    """Targets and shipped snapshots, or those of them that are asked for.

    Args:
        asked: such as ``vllm@0.33``; none: all.

    Raises:
        FourfoldError: one that is asked for is neither here nor in a snapshot.
    """
    known = unique([*targets, *snapshots.shipped()])
    if not asked:
        return known
    out = []
    for text in asked:
        engine, version = wanted(text)
        fits = [target for target in known if matches(target, engine, version)]
        if not fits:
            there = ", ".join(f"{t.engine}@{t.version}" for t in known)
            raise FourfoldError(f"--engine {text}: neither installed here nor in a snapshot; there are {there}")
        out += fits
    return unique(out)


def check(
    recipes: Sequence[Recipe],
    catalogue: Catalogue,
    targets: Sequence[Target],
    limit: float = CASE_LIMIT,
    say: Callable[[str], None] = lambda text: None,
) -> list[Check]:
    """Check every recipe on every target that it is for, in order of both.

    Args:
        limit: seconds that an engine may take for one process of a recipe.
        say: told what is going on.
    """
    jobs = [job for recipe in recipes for job in _jobs(recipe, catalogue, targets)]
    groups: dict[tuple[Target, bool, tuple[tuple[str, str], ...]], list[_Job]] = defaultdict(list)
    for job in jobs:
        base = {k: v for start in job.starts for k, v in start.env.items() if k in FROM_THE_START}
        groups[job.target, job.sheet.compute_capability is not None, tuple(sorted(base.items()))].append(job)
    with _configs(catalogue) as folders, ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:

        def run(group: tuple[Any, list[_Job]]) -> None:
            (target, _, base), members = group
            if target.python is None:
                _by_snapshot(members)
                return
            say(f"{target.label}: {len(members)} recipe(s)")
            _by_engine(target, members, folders, dict(base), limit)

        list(pool.map(run, groups.items()))
    for job in jobs:
        _rules(job)
        job.check.settle()
    return [job.check for job in jobs]


def _jobs(recipe: Recipe, catalogue: Catalogue, targets: Sequence[Target]) -> Iterator[_Job]:
    card, sheet = catalogue.model(recipe.model), catalogue.hardware(recipe.hardware)
    for target in targets:
        if not is_for(recipe, target.engine, target.version):
            continue
        by = "snapshot" if target.python is None else "engine"
        check = Check(recipe.id, target.engine, target.version, by)
        try:
            every = starts(recipe, target.engine, card, sheet)
        except FourfoldError as error:
            check.findings.append(Finding(1, "error", f"engines.{target.engine}", str(error), target.label))
            every = []
        first = [s for s in every if s.replica == 0 and s.node < 2]
        yield _Job(recipe, card, sheet, target, check, first, catalogue.config(recipe.model))


@contextmanager
def _configs(catalogue: Catalogue) -> Iterator[dict[str, str]]:
    """A folder with nothing but its config.json for each model; ``card:NAME`` and repository to folder."""
    with tempfile.TemporaryDirectory(prefix="fourfold-models-") as root:
        out = {}
        for name in catalogue.names("models"):
            card = catalogue.model(name)
            folder = Path(root) / name
            folder.mkdir()
            shutil.copyfile(catalogue.model_path(name).with_name(card.config), folder / "config.json")
            out[f"card:{name}"] = str(folder)
            out.setdefault(card.repo, str(folder))
        yield out


def _here(value: Any, folders: Mapping[str, str]) -> Any:
    """A value with repositories that have a card replaced by the folders of their configs."""
    if isinstance(value, dict):
        return {key: _here(inner, folders) for key, inner in value.items()}
    return folders.get(value, value) if isinstance(value, str) else value


def _draft(options: Mapping[str, Any]) -> tuple[str, str] | None:
    """The option that names a draft model, and the model."""
    spec = options.get("speculative-config")
    named = {"speculative-config": spec.get("model") if isinstance(spec, dict) else None}
    named["speculative-draft-model-path"] = options.get("speculative-draft-model-path")
    return next(((option, model) for option, model in named.items() if isinstance(model, str)), None)


def _absent(options: Mapping[str, Any], folders: Mapping[str, str]) -> tuple[str, str] | None:
    """The option that names a draft model without a card, and the model."""
    named = _draft(options)
    return named if named and named[1] not in folders and not Path(named[1]).is_dir() else None


def _by_engine(
    target: Target, jobs: Sequence[_Job], folders: Mapping[str, str], base: Mapping[str, str], limit: float
) -> None:
    cases: list[tuple[_Job, Start, Case]] = []
    for job in jobs:
        for start in job.starts:
            options = {name: _here(value, folders) for name, value in start.options.items()}
            missing = _absent(start.options, folders)
            case = Case(
                id=str(len(cases)),
                model=folders[f"card:{job.card.id}"],
                options={name: flags(target.engine, {name: value}) for name, value in options.items()},
                values=options,
                env=start.env,
                machine=_machine(job.sheet),
            )
            cases.append((job, start, case))
            if missing:
                where = _where(job, start, missing[0])
                text = f"no model card has the repository {missing[1]}: resolved without this draft model"
                job.check.findings.append(Finding(3, "warning", where, text, target.label))
                drafts = [name for name in options if name.startswith("speculative-")]
                without = {name: value for name, value in case.options.items() if name not in drafts}
                values = {name: value for name, value in options.items() if name not in drafts}
                cases[-1] = (job, start, replace(case, resolve=False))
                cases.append((job, start, replace(case, id=str(len(cases)), options=without, values=values)))
    names = sorted({name for _, start, _ in cases for name in start.env})
    answers = ask(target, [case for _, _, case in cases], {"names": names}, base, limit)
    if answers.fatal:
        for job in jobs:
            text = f"{target.label} could not be asked: {answers.fatal}"
            where = f"engines.{target.engine}"
            job.check.findings.append(Finding(1, "warning", where, text, target.label))
            job.check.by = "snapshot"
        _by_snapshot(jobs)
        return
    for job, start, case in cases:
        _read(job, start, case, answers)
    for job in jobs:
        _variables(job, answers.facts)


def _machine(sheet: HardwareSheet) -> dict[str, Any] | None:
    if sheet.compute_capability is None:
        return None
    capability = [int(part) for part in sheet.compute_capability.split(".")]
    return {"name": sheet.gpu, "capability": capability, "memory": sheet.memory_bytes, "count": sheet.gpus_per_node}


def _read(job: _Job, start: Start, case: Case, answers: Answers) -> None:
    """Findings of one case."""
    answer, check, label = answers.cases[case.id], job.check, job.target.label
    place = f"engines.{start.engine}.roles.{start.role}" + (f" (node {start.node})" if start.node else "")
    if "failed" in answer:
        check.findings.append(Finding(1, "error", place, answer["failed"], label, "the engine's process"))
        return
    check.reached.add(1)
    for refusal in answer["refused"]:
        where = _where(job, start, refusal["option"]) if refusal["option"] else place
        check.findings.append(Finding(1, "error", where, refusal["message"], label, "the engine's parser"))
    for short, whole in answer["abbreviated"].items():
        text = f"only an abbreviation of {whole}, which the next version may make ambiguous"
        check.findings.append(Finding(1, "warning", _where(job, start, short), text, label, "the engine's parser"))
    resolution = answer.get("resolution")
    if resolution is None:
        return
    if resolution["state"] == "resolved":
        check.reached.add(3)
        check.resolved.setdefault(start.role, resolution["resolved"])
        for change in resolution["changed"]:
            wanted_, got = json.dumps(change["requested"]), json.dumps(change["resolved"])
            text = f"asked for {wanted_}, the engine resolves {got}"
            where = _where(job, start, change["option"])
            check.findings.append(Finding(3, "warning", where, text, label, "the engine's configuration"))
    elif resolution["state"] == "refused":
        text = resolution["message"]
        check.findings.append(Finding(3, "error", place, text, label, "the engine's configuration"))
    else:
        check.reached.add(UNRESOLVED)
        text = f"not resolved, level 2 at most: the simulated machine falls short ({resolution['message']})"
        check.findings.append(Finding(3, "warning", place, text, label, "fourfold's simulation"))


def _by_snapshot(jobs: Sequence[_Job]) -> None:
    for job in jobs:
        target, check = job.target, job.check
        snapshot = snapshots.load(target.engine, target.version)
        where = f"engines.{target.engine}"
        if snapshot is None:
            text = f"{target.label} is not here and there is no snapshot of it: only the schema was checked"
            check.findings.append(Finding(1, "warning", where, text, target.label))
            continue
        text = "parser and variables by snapshot; configuration not resolved: no such engine here"
        source = f"recipes/snapshots/{target.engine}-{target.version}.json"
        check.findings.append(Finding(3, "note", where, text, target.label, source))
        check.reached.add(1)
        for start in job.starts:
            options = {name: flags(target.engine, {name: value}) for name, value in start.options.items()}
            for refusal in snapshots.refusals(snapshot, options, start.options):
                place = _where(job, start, refusal["option"])
                check.findings.append(Finding(1, "error", place, refusal["message"], target.label, "snapshot"))
            for short, whole in snapshots.abbreviated(snapshot, list(options)).items():
                text = f"only an abbreviation of {whole}, which the next version may make ambiguous"
                check.findings.append(Finding(1, "warning", _where(job, start, short), text, target.label, "snapshot"))
        _variables(job, snapshot)


def _variables(job: _Job, facts: Mapping[str, Any]) -> None:
    plan, engine = engine_of(job.recipe, job.target.engine), job.target.engine
    job.check.reached.add(2)
    places = {name: f"engines.{engine}.env.{name}" for name in plan.env}
    for role, part in plan.roles.items():
        places |= {name: f"engines.{engine}.roles.{role}.env.{name}" for name in part.env}
    job.check.findings += environment.findings(engine, job.target.label, places, facts)


def _where(job: _Job, start: Start, option: str) -> str:
    """Path of an option in the recipe."""
    plan = engine_of(job.recipe, start.engine)
    role = next(part for name, part in plan.roles.items() if name == start.role)
    if option in role.args:
        return f"engines.{start.engine}.roles.{start.role}.args.{option}"
    if option in plan.args:
        return f"engines.{start.engine}.args.{option}"
    return f"engines.{start.engine}.roles.{start.role} (--{option})"


def _rules(job: _Job) -> None:
    """L4, and the renames that mend what L1 and L2 found."""
    from fourfold.common.recipe.check import renames, rules

    target, check = job.target, job.check
    if job.starts:  # else there is nothing to start, which L1 says
        check.findings += rules.findings(job.recipe, target.engine, target.version, job.card, job.sheet, job.config)
        check.reached.add(4)
    plan = engine_of(job.recipe, target.engine)
    parts = [plan, *plan.roles.values()]
    known: dict[str, Rename] = {}
    for part in parts:
        for rename in renames.suggestions(target.engine, target.version, part.args, part.env):
            known.setdefault(rename.old, rename)
    for i, finding in enumerate(check.findings):
        name = finding.where.partition(".env." if finding.level == 2 else ".args.")[2]
        rename = known.get(name) or next((r for old, r in known.items() if name and old.startswith(f"{name}.")), None)
        if rename is not None and finding.rename is None and finding.level in (1, 2):
            check.findings[i] = replace(finding, rename=rename)


def digest_parts(recipe: Recipe, catalogue: Catalogue, engine: str) -> list[Any]:
    """All that a check's outcome rests on, beside the engine and fourfold's rules."""
    card, sheet = catalogue.model(recipe.model), catalogue.hardware(recipe.hardware)
    named: set[str] = set()
    try:
        started = starts(recipe, engine, card, sheet)
        processes: list[Any] = [[s.role, s.node, s.arguments, dict(s.env)] for s in started]
        named = {found[1] for s in started if (found := _draft(s.options))}
    except FourfoldError as error:
        processes = [str(error)]
    drafts = [catalogue.config(d.id) for d in catalogue.draft_models() if d.repo in named] if named else []
    return [
        recipe.model_dump(mode="json", by_alias=True, exclude_unset=True),
        catalogue.config(recipe.model),
        sheet.model_dump(mode="json", by_alias=True, exclude_unset=True),
        processes,
        *drafts,
    ]
