"""Rehearse a recipe: its flags on the real engine on a processor, with a small random model in the published layout.

One rank of one server stands for the deployment, or of prefill and decode one rank of each, with the KV cache moved
between them and a router before them. The answers have to be the ones that the replica is known to give, those with
drafts, or of servers apart, equal to those of one server without, the probabilities of other tokens transformers', and
the engine's own counters have to show that it drafted and what it moved. Where another architecture stands for the
model, the engine's own classes of it load a small checkpoint (`loading`). What was not rehearsed is part of the result.
"""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.installed import installed_version
from fourfold.common.recipe.launch import engine_of, flags, give_settings
from fourfold.common.recipe.loading import Catalogue
from fourfold.common.recipe.rehearsing import drafts, speculation
from fourfold.common.recipe.rehearsing.apart import Pair, answers_apart, pair
from fourfold.common.recipe.rehearsing.asking import LIKELIEST, PROMPTS, TOKENS, Answers, ask
from fourfold.common.recipe.rehearsing.loading import Loaded, chosen, load
from fourfold.common.recipe.rehearsing.moved import Moved
from fourfold.common.recipe.rehearsing.published import known as layout_known
from fourfold.common.recipe.rehearsing.reference import WITHIN, furthest, reference
from fourfold.common.recipe.rehearsing.replica import Replica, continuation, prompts, write_replica
from fourfold.common.recipe.rehearsing.substitutions import Substitution, substituted
from fourfold.common.recipe.rehearsing.traits import read_traits
from fourfold.common.recipe.schema import EngineRecipe, Recipe, RoleName
from fourfold.common.serving import EngineServer
from fourfold.common.settings import ALGORITHM

NEVER = (
    "the kernels that a GPU runs: attention, experts, quantised products, graphs, compilation",
    "NVLink, networks, and ranks that work together",
    "memory: what fits, and for how many requests",
    "speed",
    "the model's own weights, tokenizer and chat template",
)


@dataclass(frozen=True)
class Rehearsed:
    """One check: what was found, in one clause."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Result:
    """What a rehearsal showed.

    Attributes:
        version: of the engine.
        replica: architecture, and the model that it stands for.
        apart: transport and router, where prefill and decode ran apart; None: one server ran.
        without: answers of one server without speculation, for further rehearsals of the same replica.
        loaded: by the engine's own classes of the model, where the replica is of another architecture; None: nothing.
    """

    recipe: str
    engine: str
    version: str
    replica: dict[str, Any]
    checks: list[Rehearsed]
    substitutions: list[Substitution]
    not_rehearsed: list[str]
    apart: dict[str, str] | None = None
    without: Answers | None = field(default=None, repr=False)
    loaded: Loaded | None = None

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        out = asdict(self) | {"ok": self.ok}
        out.pop("without")
        return out


def proof(result: Result) -> dict[str, Any]:
    """What a passed rehearsal proves, for a file of proofs (level 5).

    Raises:
        FourfoldError: it did not pass.
    """
    if not result.ok:
        failed = ", ".join(check.name for check in result.checks if not check.ok)
        raise FourfoldError(f"recipe {result.recipe}: the rehearsal failed ({failed}) and proves nothing")
    facts = result.to_json()
    del facts["ok"]
    return {"level": 5, "date": datetime.date.today().isoformat(), **facts}


def rehearse(
    known: Catalogue,
    wanted: str | Path,
    engine: str,
    logs: Path | None = None,
    without: Answers | None = None,
    tick: Callable[[str], None] = lambda line: None,
    together: bool = False,
) -> Result:
    """Rehearse a recipe with the engine of this environment.

    Args:
        logs: folder for the servers' logs; default: a new one.
        without: answers of one server with the same replica and no speculation, from an earlier result; None: a server
            gives them.
        tick: called with a line of progress.
        together: of prefill and decode rehearse the decode role's options, in one server.

    Raises:
        FourfoldError: no such recipe or engine, the engine does not start with these options (the message has the end
            of its log), or what prefill and decode apart need is not installed.
    """
    recipe = known.recipe(wanted)
    plan = engine_of(recipe, engine)
    version = installed_version(recipe, engine)
    role = _role(plan)
    folder = logs or Path(tempfile.mkdtemp(prefix="fourfold-rehearsal-"))
    card = known.model(recipe.rehearsal.proxy if recipe.rehearsal and recipe.rehearsal.proxy else recipe.model)
    traits = read_traits(known.config(card.id))
    options, env, changes = substituted(recipe, engine, plan, role, traits.family)
    speculates = speculation.asked(engine, options) is not None
    both, counted = None, None
    with tempfile.TemporaryDirectory(prefix="fourfold-replica-") as scratch:
        tick("writing the replica")
        replica = write_replica(Path(scratch), traits, engine, speculation.needs_head(engine, options))
        used, more = speculation.with_replica(engine, options, replica)
        give_settings(engine, plan, used, env)
        changes += more
        if plan.disaggregated and not together:
            both = pair(recipe, plan, engine, replica)
            changes, log = both.changes, folder / f"{engine}-decode.log"
            sheet = known.hardware(recipe.hardware)
            answers, counted = answers_apart(both, card, sheet, replica, folder, speculates, tick)
        else:
            log = folder / f"{engine}.log"
            answers = _serve(engine, replica, used, env, log, speculates, tick)
        if (speculates or both) and without is None:
            log_without = folder / f"{engine}-without.log"
            plain = speculation.without(used)
            without = _serve(engine, replica, plain, env, log_without, False, tick)
        plain_answers = without if speculates or both else None
        checks = _checks(answers, plain_answers, speculates, counted)
        if not _quantises(used):
            tick("comparing with transformers")
            checks.append(
                _probabilities(replica, answers, plain_answers, "of one server" if both else "without drafts")
            )
    checks += _fourfold(used, log)
    itself = traits.exact and card.id == recipe.model
    loaded = None if itself else _load(known, recipe, plan, engine, env, folder, tick)
    if loaded is not None and loaded.classes:
        checks.append(Rehearsed("load", loaded.ok, loaded.detail))
    if _reads_drafts(plan, used):
        checks.append(_text(answers))
    return Result(
        recipe.id,
        engine,
        version,
        _described(recipe, card.id, replica),
        checks,
        changes,
        _not_rehearsed(recipe, plan, replica, both, loaded),
        None if both is None else both.ran,
        without or answers,
        loaded,
    )


def _load(
    known: Catalogue,
    recipe: Recipe,
    plan: EngineRecipe,
    engine: str,
    env: dict[str, str],
    folder: Path,
    tick: Callable[[str], None],
) -> Loaded | None:
    """The model's own architecture on the engine's own classes, where its published layout is known."""
    config = known.config(recipe.model)
    if not layout_known(config):
        return None
    tick("loading a small checkpoint of the model's own architecture")
    given = chosen(engine, plan, _role(plan))
    sheet = known.hardware(recipe.hardware)
    return load(engine, config, given, sheet, env, folder, drafts.config_of(known, given))


def _role(plan: EngineRecipe) -> RoleName:
    return "decode" if plan.disaggregated else "aggregated"


def _serve(
    engine: str,
    replica: Replica,
    options: dict[str, Any],
    env: dict[str, str],
    log: Path,
    speculates: bool,
    tick: Callable[[str], None],
) -> Answers:
    """Start a server, ask it everything, and end it."""
    server = EngineServer(engine, str(replica.model), log, flags(engine, options), env)
    try:
        server.start()
        server.wait(tick=lambda line: tick(f"{log.stem}: {line[:100]}"))
        tick(f"{log.stem}: asking")
        return ask(server, speculates)
    finally:
        server.stop()


def _checks(answers: Answers, without: Answers | None, speculates: bool, counted: Moved | None) -> list[Rehearsed]:
    expected = [continuation(text, TOKENS) for text in prompts(PROMPTS)]
    checks = [
        Rehearsed("answers", answers.texts == expected, _agree("the replica's own text", answers.texts, expected))
    ]
    if without is not None:
        same = answers.texts == without.texts
        name, those = ("speculation", "those without drafts") if counted is None else ("apart", "those of one server")
        checks.append(Rehearsed(name, same, _agree(those, answers.texts, without.texts)))
    if counted is not None:
        checks.append(Rehearsed("transfer", counted.ok, counted.detail))
    if speculates:
        share = "" if not answers.drafted else f" of {answers.drafted} tokens"
        detail = f"{answers.drafts} drafts verified, {answers.accepted}{share} accepted"
        checks.append(Rehearsed("drafts", bool(answers.drafts), detail))
        checks.append(Rehearsed("acceptance", bool(answers.accepted), detail))
    content = bool(answers.chat) and all(answers.texts)
    checks.append(Rehearsed("content", content, "no null content" if content else "an answer without content"))
    return checks


def _probabilities(replica: Replica, answers: Answers, without: Answers | None, whose: str) -> Rehearsed:
    """Whether attention and experts compute what they should, with drafts or apart, and without."""
    given = prompts(PROMPTS)
    expected = reference(replica.model, given, [continuation(text, TOKENS) for text in given])
    found = [furthest(one.steps, expected) for one in (answers, without) if one is not None]
    detail = f"the {LIKELIEST} likeliest tokens of every step within {found[0]:.2g} nats of transformers'"
    if without is not None:
        detail += f", {whose} {found[1]:.2g}"
    return Rehearsed("probabilities", found[0] < WITHIN, f"{detail} (expected {WITHIN:g})")


def _quantises(options: dict[str, Any]) -> bool:
    return "fourfold" in str(options.get("quantization", ""))


def _reads_drafts(plan: EngineRecipe, options: dict[str, Any]) -> bool:
    """Whether fourfold drafts from the text too."""
    algorithm = str(options.get("speculative-algorithm", "")).upper()
    there = "HybridWorker" in str(options.get("worker-cls", "")) or algorithm == ALGORITHM
    return there and (plan.fourfold is None or plan.fourfold.mtp.hybrid.enabled)


def _text(answers: Answers) -> Rehearsed:
    read, head = (answers.sources.get(source, 0) for source in ("suffix", "mtp"))
    return Rehearsed("text", read > 0 and head > 0, f"{read} drafts from the text, {head} of the head")


def _agree(what: str, found: Sequence[str], expected: Sequence[str]) -> str:
    other = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    if not other:
        return f"{len(found)} of {len(found)} are {what}"
    first = other[0]
    pairs = zip(found[first], expected[first], strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found[first]), len(expected[first])))
    return f"{len(other)} of {len(found)} are not {what}; answer {first} from token {at}"


def _fourfold(options: dict[str, Any], log: Path) -> list[Rehearsed]:
    """What fourfold says of itself, where the recipe turns it on."""
    if not _quantises(options):
        return []
    lines = [line for line in log.read_text(errors="replace").splitlines() if "fourfold: nvfp4" in line]
    detail = lines[0][lines[0].index("fourfold:") :][:160] if lines else "no line 'fourfold: nvfp4' in the log"
    return [Rehearsed("quantisation", bool(lines), detail)]


def _described(recipe: Recipe, card: str, replica: Replica) -> dict[str, Any]:
    traits = replica.traits
    return {
        "model": recipe.model,
        "proxy": card if card != recipe.model else None,
        "architecture": traits.architecture,
        "family": traits.family,
        "exact": traits.exact and card == recipe.model,
        "head": None if replica.draft is None else "fourfold's FourfoldMTP",
    }


def _not_rehearsed(
    recipe: Recipe, plan: EngineRecipe, replica: Replica, both: Pair | None, loaded: Loaded | None
) -> list[str]:
    traits, out = replica.traits, []
    if recipe.rehearsal and recipe.rehearsal.proxy and recipe.rehearsal.proxy != recipe.model:
        out.append(f"{recipe.model} itself: {recipe.rehearsal.proxy} stands for it ({recipe.rehearsal.reason})")
    if not traits.exact:
        out.append(f"{traits.architecture}: a {traits.family} replica stands for it")
    out += traits.missing
    if loaded is not None:
        out += loaded.not_rehearsed
    if plan.disaggregated and both is None:
        out.append(
            "prefill and decode apart: the decode role ran as one server; transfer of the KV cache, prefill's args"
        )
    if both is not None:
        out += both.not_rehearsed
    elif plan.router is not None and plan.router.kind != "none":
        out.append(f"the router ({plan.router.kind})")
    if _quantises({**plan.args, **plan.roles[_role(plan)].args}):
        out.append("probabilities against transformers', which does not quantise")
    if replica.draft is not None and replica.traits.family != "llama":
        out.append("the engine's own class for the model's MTP head: fourfold's drafted")
    return [*out, *NEVER]
