"""What a rule looks at, and the list of rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from fourfold.common.recipe.check.renames import WHOLE, as_mapping, value_of
from fourfold.common.recipe.check.result import Severity
from fourfold.common.recipe.launch import Start, engine_of, starts
from fourfold.common.recipe.loading import Catalogue
from fourfold.common.recipe.schema import EngineRecipe, HardwareSheet, ModelCard, Parallel, Recipe

Said = Iterator[tuple[str, str]]  # path in the recipe, message


@dataclass(frozen=True)
class RoleCase:
    """One role: what its first replica starts.

    Attributes:
        starts: a process for each node.
    """

    engine: str
    name: str
    replicas: int
    parallel: Parallel
    starts: Sequence[Start]
    named: frozenset[str]

    @property
    def options(self) -> Mapping[str, Any]:
        """Of the first node."""
        return self.starts[0].options

    @property
    def env(self) -> Mapping[str, str]:
        return self.starts[0].env

    def get(self, option: str, default: Any = None) -> Any:
        """An option's value by ``name`` or ``name.key``."""
        value = value_of(self.options, option)
        return default if value is None else value

    def text(self, option: str) -> str:
        """An option's value as text; empty: it is not set."""
        return str(self.get(option, ""))

    def number(self, option: str, default: int = 0) -> int:
        """An option's whole number; the default where it is not one (an engine's parser says so)."""
        value = self.get(option, default)
        return _whole(value, default)

    def variable(self, name: str, default: int) -> int:
        """A variable's whole number."""
        return _whole(self.env.get(name, ""), default)

    def where(self, what: str = "", kind: str = "args") -> str:
        """The path of an option or variable, or of the role."""
        base = f"engines.{self.engine}"
        if what and what not in self.named:
            return f"{base}.{kind}.{what}" if what in (self.env if kind == "env" else self.options) else self.where()
        return f"{base}.roles.{self.name}" + (f".{kind}.{what}" if what else "")

    @property
    def speculation(self) -> str | None:
        """The method as the engine names it, in small letters."""
        value = self.get("speculative-config.method" if self.engine == "vllm" else "speculative-algorithm")
        return None if value is None else str(value).lower()

    @property
    def draft_tokens(self) -> int:
        """Tokens that one request may hold in a decoding step: 1 without speculation, else drafts and one more."""
        if self.speculation is None:
            return 1
        if self.engine == "vllm":
            return self.number("speculative-config.num_speculative_tokens") + 1
        if self.speculation == "dspark":
            return self.number("speculative-dspark-block-size") + 1
        return max(self.number("speculative-num-draft-tokens"), self.number("speculative-num-steps") + 1)

    @property
    def connectors(self) -> list[str]:
        """vLLM's KV connectors, those inside a MultiConnector too."""
        config = as_mapping(self.get("kv-transfer-config")) or {}
        out = [str(config["kv_connector"])] if "kv_connector" in config else []
        extra = config.get("kv_connector_extra_config")
        inner = extra.get("connectors") if isinstance(extra, dict) else None
        return (
            out + [str(c.get("kv_connector")) for c in inner if isinstance(c, dict)] if isinstance(inner, list) else out
        )


def _whole(value: Any, default: int) -> int:
    text = str(value)
    return int(text) if WHOLE.fullmatch(text) else default


@dataclass(frozen=True)
class Case:
    """An engine's part of a recipe with all that it refers to."""

    recipe: Recipe
    engine: str
    version: Version
    plan: EngineRecipe
    card: ModelCard
    sheet: HardwareSheet
    config: Mapping[str, Any]
    roles: Sequence[RoleCase]

    @cached_property
    def text(self) -> Mapping[str, Any]:
        """The configuration of the text model."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def deepseek_v4(self) -> bool:
        """DeepSeek-V4; V4.1 has layers of its own."""
        return self.model_type == "deepseek_v4"

    @property
    def expert_count(self) -> int:
        """Routed experts of a layer; 0: a dense model, or not known."""
        names = ("n_routed_experts", "num_experts", "num_local_experts")
        return next((int(self.text[n]) for n in names if isinstance(self.text.get(n), int)), 0)

    @property
    def expert_format(self) -> str | None:
        return self.card.formats.get("experts")

    @property
    def cuda(self) -> bool:
        return self.sheet.compute_capability is not None

    @property
    def rack(self) -> bool:
        """NVLink joins nodes."""
        return self.sheet.nvlink_domain > self.sheet.gpus_per_node

    @property
    def decoding(self) -> Sequence[RoleCase]:
        """Roles that generate."""
        return [role for role in self.roles if role.name != "prefill"]

    def pair(self) -> tuple[RoleCase, RoleCase] | None:
        """Prefill and decode, where they are apart."""
        by_name = {role.name: role for role in self.roles}
        return (by_name["prefill"], by_name["decode"]) if "prefill" in by_name else None


@dataclass(frozen=True)
class Rule:
    """One rule. ``versions``: engine to specifier."""

    id: str
    severity: Severity
    versions: Mapping[str, str]
    source: str
    look: Callable[[Case], Said]

    def holds_for(self, engine: str, version: Version) -> bool:
        return engine in self.versions and version in SpecifierSet(self.versions[engine], prereleases=True)


RULES: list[Rule] = []


def rule(
    id: str, severity: Severity, source: str, vllm: str | None = None, sglang: str | None = None
) -> Callable[[Callable[[Case], Said]], Callable[[Case], Said]]:
    """Enter a function into the list, for the versions given."""
    versions = {engine: spec for engine, spec in (("vllm", vllm), ("sglang", sglang)) if spec is not None}

    def enter(look: Callable[[Case], Said]) -> Callable[[Case], Said]:
        RULES.append(Rule(id, severity, versions, source, look))
        return look

    return enter


def case_of(
    recipe: Recipe,
    engine: str,
    version: str,
    card: ModelCard,
    sheet: HardwareSheet,
    config: Mapping[str, Any] | None = None,
) -> Case:
    """The case of an engine; see `rules.findings`."""
    plan = engine_of(recipe, engine)
    started = starts(recipe, engine, card, sheet)
    roles = [
        RoleCase(
            engine,
            name,
            role.replicas,
            role.parallel,
            [start for start in started if start.role == name and start.replica == 0],
            frozenset({*role.args, *role.env}),
        )
        for name, role in plan.roles.items()
    ]
    at = Version(Version(version).base_version)
    return Case(recipe, engine, at, plan, card, sheet, _config(card) if config is None else config, roles)


def _config(card: ModelCard) -> Mapping[str, Any]:
    known = Catalogue()
    return known.config(card.id) if card.id in known.names("models") else {}
