"""What a recipe, a model card, a hardware sheet and a price sheet may say.

Files hold data only. One recipe is one deployment point: a model on a kind of hardware for one workload, for one or
both engines. Parallelism is said once, engine-neutrally (`Parallel`); the flags for it follow (`launch`) and may not be
given as arguments. Arguments are a mapping from canonical long option names, without dashes in front, to native values.
Proof levels are not part of a recipe: the command writes them beside it.
"""

from __future__ import annotations

import datetime
import re
from typing import Annotated, Any, Literal

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from pydantic import Field, field_validator, model_validator

from fourfold.common.settings import Settings
from fourfold.common.strict import Strict

EngineName = Literal["vllm", "sglang"]
RoleName = Literal["prefill", "decode", "aggregated"]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", max_length=80)]  # also a file's name
RecipeId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*/[a-z0-9][a-z0-9.-]*$", max_length=160)]
Text = Annotated[str, Field(min_length=1, max_length=2000)]
Count = Annotated[int, Field(ge=1, le=1 << 24)]
OPTION = re.compile(r"^[a-z0-9][A-Za-z0-9._-]*$")
VARIABLE = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
# What `Parallel`, the address of a node or fourfold's own keys say, by engine; never an argument of a recipe.
DERIVED: dict[str, frozenset[str]] = {
    "vllm": frozenset(
        "model host port tensor-parallel-size pipeline-parallel-size data-parallel-size decode-context-parallel-size "
        "enable-expert-parallel data-parallel-size-local data-parallel-start-rank data-parallel-address "
        "data-parallel-rpc-port nnodes node-rank master-addr master-port headless additional-config".split()
    ),
    "sglang": frozenset(
        "model model-path host port tp-size tensor-parallel-size pp-size pipeline-parallel-size attn-dp-size dp-size "
        "data-parallel-size enable-dp-attention ep-size expert-parallel-size dcp-size nnodes node-rank "
        "dist-init-addr disaggregation-mode".split()
    ),
}


class Source(Strict):
    """Where a figure or a rule is from."""

    what: Text = Field(description="title, pull request or file")
    url: str | None = Field(default=None, pattern=r"^https://[^\s]+$")
    date: datetime.date | None = None


class Slo(Strict):
    """Service level that the deployment is for."""

    tokens_per_second_user: float | None = Field(default=None, gt=0)
    ttft_seconds: float | None = Field(default=None, gt=0, description="time to first token")


class Workload(Strict):
    """What is asked of the deployment."""

    kind: Literal["fixed", "chat", "agentic"]
    input_tokens: Count
    output_tokens: Count
    concurrency: Count | None = Field(default=None, description="requests in flight over the whole deployment")
    slo: Slo = Field(default_factory=Slo)


class Parallel(Strict):
    """Ranks of one replica. Its world is ``tensor * data * pipeline`` GPUs."""

    tensor: Count = Field(default=1, description="ranks that share one attention layer")
    data: Count = Field(default=1, description="ranks with requests of their own (attention data parallelism)")
    expert: Count = Field(default=1, description="ranks that share the experts of a layer; 1: no expert parallelism")
    pipeline: Count = 1
    context: Count = Field(default=1, description="ranks that share the KV cache of a sequence while decoding")

    @property
    def world(self) -> int:
        """GPUs of one replica."""
        return self.tensor * self.data * self.pipeline

    @model_validator(mode="after")
    def _possible(self) -> Parallel:
        if self.expert not in (1, self.tensor * self.data):
            raise ValueError(
                f"expert: {self.expert} ranks share experts; expected 1 or tensor * data = {self.tensor * self.data}"
            )
        if self.tensor % self.context:
            raise ValueError(f"context: {self.context}; expected a divisor of tensor, {self.tensor}")
        return self


def _arguments(given: dict[str, Any]) -> dict[str, Any]:
    for name, value in given.items():
        if not OPTION.match(name):
            raise ValueError(f"option {name!r}: expected a long option's name without dashes in front")
        _plain(value, name)
    return given


def _plain(value: Any, where: str) -> None:
    """Refuse what neither JSON nor a command line can say."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where}: key {key!r}; expected text")
            _plain(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _plain(inner, f"{where}[{i}]")
    elif isinstance(value, float) and value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{where}: {value!r}; expected a finite number")
    elif isinstance(value, str) and ("\0" in value or "\n" in value):
        raise ValueError(f"{where}: {value!r}; expected one line of text")
    elif not isinstance(value, (bool, int, float, str, type(None))):
        raise ValueError(f"{where}: {value!r}; expected text, a number, true, false, a list or a mapping")


def _variables(given: dict[str, Any]) -> dict[str, Any]:
    for name, value in given.items():
        if not VARIABLE.match(name):
            raise ValueError(f"environment variable {name!r}: expected letters, digits and underscores")
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ValueError(f"{name}: {value!r}; expected text or a number (quote true and false)")
        _plain(value, name)
    return given


class _Start(Strict):
    args: dict[str, Any] = Field(default_factory=dict, description="engine options by canonical long name")
    env: dict[str, Any] = Field(default_factory=dict, description="environment variables")

    _check_args = field_validator("args")(_arguments)
    _check_env = field_validator("env")(_variables)


class Role(_Start):
    """One kind of server of a deployment."""

    replicas: Count = 1
    parallel: Parallel = Field(default_factory=Parallel)


class Router(Strict):
    """What stands before the servers."""

    kind: Literal["vllm-router", "sglang-router", "dynamo", "llm-d", "none"]
    args: dict[str, Any] = Field(default_factory=dict)

    _check_args = field_validator("args")(_arguments)


class EngineRecipe(_Start):
    """How one engine serves it. ``args`` and ``env`` are of all roles; a role's own go on top."""

    versions: str = Field(description="versions that it is for, such as '>=0.32,<0.34'")
    image: str | None = Field(default=None, pattern=r"^[\w./:@-]+$", description="container image")
    roles: dict[RoleName, Role]
    router: Router | None = None
    fourfold: Settings | None = Field(default=None, description="fourfold's settings; absent: the stock engine")

    @field_validator("versions")
    @classmethod
    def _specifier(cls, text: str) -> str:
        try:
            SpecifierSet(text)
        except InvalidSpecifier:
            raise ValueError("expected a version specifier such as '>=0.32,<0.34'") from None
        return text

    @field_validator("roles")
    @classmethod
    def _whole(cls, roles: dict[RoleName, Role]) -> dict[RoleName, Role]:
        if set(roles) not in ({"aggregated"}, {"prefill", "decode"}):
            raise ValueError(f"roles {', '.join(roles) or 'none'}: expected aggregated alone, or prefill and decode")
        return roles

    @property
    def disaggregated(self) -> bool:
        return "prefill" in self.roles


class Acceptance(Strict):
    """Expected acceptance of drafts."""

    length: float = Field(ge=1, description="mean acceptance length, the token of the target included")
    dataset: Text
    mode: str | None = Field(default=None, description="such as 'thinking on'")
    source: Source
    synthetic: bool = Field(default=False, description="acceptance was simulated, not measured")


class Speculation(Strict):
    """What drafts, and what is expected of it."""

    method: Literal["mtp", "dspark", "eagle3", "dflash", "ngram"]
    tokens: Count = Field(description="draft tokens of a step")
    draft_model: str | None = None
    acceptance: Acceptance | None = None


class Evidence(Strict):
    """A published or measured figure, with its conditions."""

    metric: Literal[
        "total_tokens_per_second_gpu",
        "output_tokens_per_second_gpu",
        "tokens_per_second_user",
        "tpot_ms",
        "ttft_seconds",
        "dollars_per_million_total_tokens",
        "ratio",
    ]
    value: float
    engine: str | None = Field(default=None, description="engine and version or image, as published")
    at: Text = Field(description="conditions: workload, interactivity, concurrency, topology")
    source: Source
    prices: Name | None = Field(default=None, description="price sheet of a cost")
    synthetic_acceptance: bool = Field(description="drafts were accepted by a simulation")
    mixes: list[Text] = Field(default_factory=list, description="changes whose gains the figure does not separate")

    @model_validator(mode="after")
    def _priced(self) -> Evidence:
        if self.metric.startswith("dollars") and self.prices is None:
            raise ValueError("prices: a cost needs the price sheet that it was computed with")
        return self


class KnownIssue(Strict):
    """What goes wrong, where, and what to do."""

    id: Name
    what: Text
    workaround: Text | None = None
    source: Source


class Rehearsal(Strict):
    """What a run on a CPU replaces."""

    proxy: Name | None = Field(default=None, description="model card whose architecture stands in for the model's")
    substitutions: dict[str, Any] = Field(
        default_factory=dict, description="option to the value used on a CPU; null leaves the option out"
    )
    reason: Text | None = None


class Recipe(Strict):
    """One deployment point."""

    schema_: Literal["fourfold/recipe/1"] = Field(alias="schema")
    id: RecipeId
    title: Text
    extends: RecipeId | None = Field(default=None, description="recipe whose values hold where this one has none")
    model: Name
    hardware: Name
    workload: Workload
    engines: dict[EngineName, EngineRecipe] = Field(min_length=1)
    speculation: Speculation | None = None
    evidence: list[Evidence] = Field(default_factory=list)
    known_issues: list[KnownIssue] = Field(default_factory=list)
    rehearsal: Rehearsal | None = None
    notes: list[Text] = Field(default_factory=list)

    @model_validator(mode="after")
    def _underived(self) -> Recipe:
        for engine, recipe in self.engines.items():
            starts = {"": recipe, **{f".roles.{name}": role for name, role in recipe.roles.items()}}
            for where, start in starts.items():
                for option in start.args:
                    if option.replace("_", "-") in DERIVED[engine]:
                        raise ValueError(
                            f"engines.{engine}{where}.args.{option}: follows from parallel, the node's address or "
                            "fourfold; say it there"
                        )
        return self


class ModelCard(Strict):
    """A model: what is published about it. Architecture facts are in its ``config.json``, which the card names."""

    schema_: Literal["fourfold/model/1"] = Field(alias="schema")
    id: Name
    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="repository of the weights")
    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{7,40}$")
    released: datetime.date | None = None
    license: Text = Field(description="of the weights")
    config: str = Field(pattern=r"^[\w.-]+\.json$", description="file beside the card")
    config_source: Source
    total_parameters: float = Field(gt=0, description="billions")
    active_parameters: float = Field(gt=0, description="billions, for each token")
    published_bytes: int | None = Field(default=None, gt=0, description="size of the checkpoint")
    draft: Literal["mtp", "dspark", "none"] = Field(description="what drafts in the checkpoint itself")
    formats: dict[str, str] = Field(description="part (experts, attention, shared, embeddings, ...) to dtype")
    sources: list[Source] = Field(min_length=1)
    notes: list[Text] = Field(default_factory=list)


class HardwareSheet(Strict):
    """A kind of machine. Rates are peaks of one GPU as the vendor gives them."""

    schema_: Literal["fourfold/hardware/1"] = Field(alias="schema")
    id: Name
    gpu: Text
    compute_capability: str | None = Field(default=None, pattern=r"^\d+\.\d$", description="None: not CUDA")
    gpus_per_node: Count
    nvlink_domain: Count = Field(description="GPUs that reach each other over NVLink; 1: none")
    memory_bytes: int = Field(gt=0, description="of one GPU, as its driver reports it")
    memory_bandwidth: float = Field(gt=0, description="bytes a second")
    peak_flops: dict[Literal["fp4", "fp8", "bf16"], float] = Field(description="dense operations a second, by dtype")
    nvlink_bandwidth: float = Field(ge=0, description="bytes a second in one direction")
    network_bandwidth: float = Field(ge=0, description="bytes a second and GPU in one direction, between nodes")
    power_kilowatts: float | None = Field(default=None, gt=0, description="of one GPU with its share of the rest")
    sources: list[Source] = Field(min_length=1)


class PriceSheet(Strict):
    """Dollars for an hour of one GPU."""

    schema_: Literal["fourfold/prices/1"] = Field(alias="schema")
    id: Name
    what: Text = Field(description="what the price holds: ownership, rent, contract")
    gpu_hour: dict[Name, float] = Field(min_length=1, description="hardware sheet to dollars")
    sources: list[Source] = Field(min_length=1)
