"""What a recipe, a model card, a hardware sheet and a price sheet may say.

Files hold data only. One recipe is one deployment point: a model on a kind of hardware for one workload, for one or
both engines. Parallelism is said once, engine-neutrally (`Parallel`); the flags for it follow (`launch`) and may not be
given as arguments. Arguments are a mapping from canonical long option names, without dashes in front, to native values.
Proof levels are not part of a recipe: the command writes them beside it.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from pydantic import Field, field_validator, model_validator

from fourfold.common.recipe.values import check_arguments, check_variables, derived
from fourfold.common.settings import Settings
from fourfold.common.strict import Strict

EngineName = Literal["vllm", "sglang"]
RoleName = Literal["prefill", "decode", "aggregated"]
REPOSITORY = r"^[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*$"
NAME = r"^[a-z0-9][a-z0-9.-]*$"  # also a file's name
Name = Annotated[str, Field(pattern=NAME, max_length=80)]
RECIPE_ID = r"^[a-z0-9][a-z0-9.-]*/[a-z0-9][a-z0-9.-]*$"
RecipeId = Annotated[str, Field(pattern=RECIPE_ID, max_length=160)]
Text = Annotated[str, Field(min_length=1, max_length=2000)]
Count = Annotated[int, Field(ge=1, le=1 << 24)]
Positive = Annotated[float, Field(gt=0)]
MOST_GPUS = 8192  # of one engine's deployment; each becomes a process or a part of one


class Source(Strict):
    """Where a figure or a rule is from."""

    what: Text = Field(description="title, pull request or file")
    url: str | None = Field(default=None, pattern=r"^https://[^\s]+$", max_length=1000, description="https only")
    date: datetime.date | None = Field(default=None, description="of publication or measurement")


class Slo(Strict):
    """Service level that the deployment is for."""

    tokens_per_second_user: float | None = Field(default=None, gt=0, description="of one request while decoding")
    ttft_seconds: float | None = Field(default=None, gt=0, description="time to first token")


class Workload(Strict):
    """What is asked of the deployment."""

    kind: Literal["fixed", "chat", "agentic"] = Field(
        description="fixed: equal lengths, as benchmarks send; agentic: long shared prefixes"
    )
    input_tokens: Count = Field(description="mean tokens of a prompt")
    output_tokens: Count = Field(description="mean tokens of an answer")
    concurrency: Count | None = Field(default=None, description="requests in flight over the whole deployment")
    slo: Slo = Field(default_factory=Slo, description="service level that it is for")


class Parallel(Strict):
    """Ranks of one replica. Its world is ``tensor * data * pipeline`` GPUs."""

    tensor: Count = Field(default=1, description="ranks that share one attention layer")
    data: Count = Field(default=1, description="ranks with requests of their own (attention data parallelism)")
    expert: Count = Field(default=1, description="ranks that share the experts of a layer; 1: no expert parallelism")
    pipeline: Count = Field(default=1, description="stages that share the layers")
    context: Count = Field(default=1, description="ranks that share the KV cache of a sequence while decoding")

    @property
    def world(self) -> int:
        """GPUs of one replica."""
        return self.tensor * self.data * self.pipeline

    @model_validator(mode="after")
    def _possible(self) -> Parallel:
        if self.world > MOST_GPUS:
            raise ValueError(f"tensor * data * pipeline: {self.world} GPUs; expected at most {MOST_GPUS}")
        if self.expert not in (1, self.tensor * self.data):
            raise ValueError(
                f"expert: {self.expert} ranks share experts; expected 1 or tensor * data = {self.tensor * self.data}"
            )
        if self.tensor % self.context:
            raise ValueError(f"context: {self.context}; expected a divisor of tensor, {self.tensor}")
        return self


class _Start(Strict):
    args: dict[str, Any] = Field(default_factory=dict, description="engine options by canonical long name")
    env: dict[str, Any] = Field(default_factory=dict, description="environment variables")

    _check_args = field_validator("args")(check_arguments)
    _check_env = field_validator("env")(check_variables)


class Role(_Start):
    """One kind of server of a deployment."""

    replicas: Count = Field(default=1, description="equal servers, each with a world of GPUs")
    parallel: Parallel = Field(default_factory=Parallel, description="ranks of one replica")


class Router(Strict):
    """What stands before the servers."""

    kind: Literal["vllm-router", "sglang-router", "dynamo", "llm-d", "none"] = Field(description="which one")
    args: dict[str, Any] = Field(default_factory=dict, description="its options by canonical long name")

    _check_args = field_validator("args")(check_arguments)


class EngineRecipe(_Start):
    """How one engine serves it. ``args`` and ``env`` are of all roles; a role's own go on top."""

    versions: str = Field(description="versions that it is for, such as '>=0.32,<0.34'")
    image: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_./:@-]*$", max_length=400, description="container image"
    )
    roles: dict[RoleName, Role] = Field(description="aggregated alone, or prefill and decode")
    router: Router | None = Field(default=None, description="what stands before the servers")
    fourfold: Settings | None = Field(default=None, description="fourfold's settings; absent: the stock engine")

    @field_validator("versions")
    @classmethod
    def _specifier(cls, text: str) -> str:
        try:
            if not list(SpecifierSet(text)):
                raise InvalidSpecifier
        except InvalidSpecifier:
            raise ValueError("expected a version specifier such as '>=0.32,<0.34'") from None
        return text

    @field_validator("roles")
    @classmethod
    def _whole(cls, roles: dict[RoleName, Role]) -> dict[RoleName, Role]:
        if set(roles) not in ({"aggregated"}, {"prefill", "decode"}):
            raise ValueError(f"roles {', '.join(roles) or 'none'}: expected aggregated alone, or prefill and decode")
        gpus = sum(role.replicas * role.parallel.world for role in roles.values())
        if gpus > MOST_GPUS:
            raise ValueError(f"replicas: {gpus} GPUs in all; expected at most {MOST_GPUS}")
        return roles

    @property
    def disaggregated(self) -> bool:
        return "prefill" in self.roles


class Acceptance(Strict):
    """Expected acceptance of drafts."""

    length: float = Field(ge=1, description="mean acceptance length, the token of the target included")
    dataset: Text = Field(description="text that it was measured on")
    mode: Text | None = Field(default=None, description="such as 'thinking on'")
    source: Source = Field(description="where the figure is from")
    synthetic: bool = Field(default=False, description="acceptance was simulated, not measured")


class Speculation(Strict):
    """What drafts, and what is expected of it."""

    method: Literal["mtp", "dspark", "eagle3", "dflash", "ngram"] = Field(description="what drafts")
    tokens: Count = Field(description="draft tokens of a step")
    draft_model: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9/][A-Za-z0-9_./-]*$",
        max_length=400,
        description="repository or folder of a draft model of its own",
    )
    acceptance: Acceptance | None = Field(default=None, description="what is expected of the drafts")


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
    ] = Field(description="what was measured; GPUs of every role count")
    value: Positive = Field(description="in the metric's unit")
    engine: Text | None = Field(default=None, description="engine and version or image, as published")
    at: Text = Field(description="conditions: workload, interactivity, concurrency, topology")
    source: Source = Field(description="who published it, where and when")
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

    id: Name = Field(description="short name")
    what: Text = Field(description="what goes wrong, and where")
    workaround: Text | None = Field(default=None, description="what to do")
    source: Source = Field(description="who saw it")


class Rehearsal(Strict):
    """What a run on a CPU replaces."""

    proxy: Name | None = Field(default=None, description="model card whose architecture stands in for the model's")
    substitutions: dict[str, Any] = Field(
        default_factory=dict, description="option to the value used on a CPU; null leaves the option out"
    )
    reason: Text | None = Field(default=None, description="why these")

    _check_substitutions = field_validator("substitutions")(check_arguments)


class Recipe(Strict):
    """One deployment point."""

    schema_: Literal["fourfold/recipe/1"] = Field(alias="schema", description="kind and version of this file")
    id: RecipeId = Field(description="folder/name, as the file is called")
    title: Text = Field(description="one line: model, machine, what it is best at")
    extends: RecipeId | None = Field(default=None, description="recipe whose values hold where this one has none")
    model: Name = Field(description="model card")
    hardware: Name = Field(description="hardware sheet")
    workload: Workload = Field(description="what is asked of the deployment")
    engines: dict[EngineName, EngineRecipe] = Field(min_length=1, description="how each engine serves it")
    speculation: Speculation | None = Field(default=None, description="what drafts")
    evidence: list[Evidence] = Field(default_factory=list, description="published or measured figures")
    known_issues: list[KnownIssue] = Field(default_factory=list, description="what goes wrong, and what to do")
    rehearsal: Rehearsal | None = Field(default=None, description="what a run on a CPU replaces")
    notes: list[Text] = Field(default_factory=list, description="what a reader should know")

    @model_validator(mode="after")
    def _underived(self) -> Recipe:
        for engine, recipe in self.engines.items():
            starts = {"": recipe, **{f".roles.{name}": role for name, role in recipe.roles.items()}}
            for where, start in starts.items():
                for option in start.args:
                    known = derived(engine, option)
                    if known is not None:
                        raise ValueError(
                            f"engines.{engine}{where}.args.{option}: {known} follows from parallel, the role, the "
                            "node's address or fourfold; say it there"
                        )
        return self


class ModelCard(Strict):
    """A model: what is published about it. Architecture facts are in its ``config.json``, which the card names."""

    schema_: Literal["fourfold/model/1"] = Field(alias="schema")
    id: Name
    repo: str = Field(pattern=REPOSITORY, max_length=200, description="repository of the weights")
    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{7,40}$", description="commit of the repository")
    released: datetime.date | None = None
    license: Text = Field(description="of the weights")
    config: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*\.json$", max_length=120, description="file beside the card"
    )
    config_source: Source
    total_parameters: float = Field(gt=0, description="billions")
    active_parameters: float = Field(gt=0, description="billions, for each token")
    published_bytes: int | None = Field(default=None, gt=0, description="size of the checkpoint")
    draft: Literal["mtp", "dspark", "none"] = Field(description="what drafts in the checkpoint itself")
    drafts_for: Name | None = Field(default=None, description="model card that it is a draft model of; absent: none")
    formats: dict[Text, Text] = Field(description="part (experts, attention, shared, embeddings, ...) to dtype")
    sources: list[Source] = Field(min_length=1)
    notes: list[Text] = Field(default_factory=list)


class HardwareSheet(Strict):
    """A kind of machine. Rates are peaks of one GPU as the vendor gives them."""

    schema_: Literal["fourfold/hardware/1"] = Field(alias="schema")
    id: Name
    gpu: Text
    compute_capability: str | None = Field(default=None, pattern=r"^\d+\.\d$", description="None: not CUDA")
    gpus_per_node: Count = Field(description="GPUs under one operating system")
    nvlink_domain: Count = Field(description="GPUs that reach each other over NVLink; 1: none")
    memory_bytes: int = Field(gt=0, description="of one GPU, as its driver reports it")
    memory_bandwidth: float = Field(gt=0, description="bytes a second")
    peak_flops: dict[Literal["fp4", "fp8", "bf16"], Positive] = Field(description="dense operations a second, by dtype")
    nvlink_bandwidth: float = Field(ge=0, description="bytes a second in one direction")
    network_bandwidth: float = Field(ge=0, description="bytes a second and GPU in one direction, between nodes")
    power_kilowatts: float | None = Field(default=None, gt=0, description="of one GPU with its share of the rest")
    sources: list[Source] = Field(min_length=1)


class PriceSheet(Strict):
    """Dollars for an hour of one GPU."""

    schema_: Literal["fourfold/prices/1"] = Field(alias="schema")
    id: Name
    what: Text = Field(description="what the price holds: ownership, rent, contract")
    gpu_hour: dict[Name, Positive] = Field(min_length=1, description="hardware sheet to dollars")
    sources: list[Source] = Field(min_length=1)
