"""Published and observed sizes, each with its source, and what the shipped cards give. GB are 10^9 bytes."""

from __future__ import annotations

from functools import cache

from fourfold.common.recipe.loading import Catalogue
from fourfold.common.recipe.schema import Parallel
from fourfold.common.recipe.sizing.quantisation import Formats
from fourfold.common.recipe.sizing.sharding import per_rank
from fourfold.common.recipe.sizing.traits import Traits, read_config, read_traits
from fourfold.common.recipe.sizing.weights import Weight, weights

GIB = 2**30
TP = {n: Parallel(tensor=n) for n in (1, 4, 8, 16)}
DEP = {n: Parallel(data=n, expert=n) for n in (4, 8, 16, 32)}
HF = "config.json of the repository"
REFERENCE = "published or derived from config.json, August 2026"


# (model, what, parts, published billions, source)
PARAMETERS = [
    ("deepseek-v4-pro", "experts", ("experts",), 1547.4, HF),
    ("deepseek-v4-pro", "attention", ("attention",), 19.5, HF),
    ("deepseek-v4-pro", "shared experts", ("shared",), 4.0, HF),
    ("deepseek-v4-pro", "embeddings and head", ("embeddings", "head"), 1.85, HF),
    ("deepseek-v4-pro", "MTP", ("MTP",), 25.8, HF),
    ("deepseek-v4-pro", "all", None, 1600, "model card: 1.6T parameters"),
    ("deepseek-v4-flash", "MTP", ("MTP",), 6.6, HF),
    ("deepseek-v4-flash", "all", None, 284.3 + 6.6, HF),
    ("deepseek-v4.1-flash", "Engram", ("Engram",), 196.6, "model card of V4.1-Flash"),
    ("deepseek-v4.1-flash", "all", None, 769, "model card of V4.1-Flash"),
    ("glm-5.3-nvfp4", "all", None, 743, "model card"),
    ("kimi-k3", "all", None, 2800, "model card: 2.8T parameters"),
    ("qwen3.8-2.4t-nvfp4", "all", None, 2400, "model card: 2.4T parameters"),
    ("qwen3.5-397b-nvfp4", "all", None, 397, "model card"),
    ("nemotron-3-ultra-nvfp4", "all", None, 550, "model card"),
    ("minimax-m3-nvfp4", "all", None, 427, "model card"),
    ("gpt-oss-120b", "all", None, 117, "model card"),
    ("deepseek-v3.2-nvfp4", "all", None, 685, "model card: 671B and 14B of MTP"),
    ("smollm2-135m-instruct", "all", None, 0.135, "model card"),
]
ACTIVE = [  # billions for each token, published
    ("deepseek-v4-pro", 48.8),
    ("deepseek-v4-flash", 13.3),
    ("deepseek-v4.1-flash", 15.5),
    ("glm-5.3-nvfp4", 39),
    ("kimi-k3", 104),
    ("qwen3.8-2.4t-nvfp4", 95),
    ("qwen3.5-397b-nvfp4", 17),
    ("nemotron-3-ultra-nvfp4", 55),
    ("minimax-m3-nvfp4", 26),
    ("gpt-oss-120b", 5.1),
    ("deepseek-v3.2-nvfp4", 37),
]
CHECKPOINTS = [  # GB of all weights
    ("deepseek-v4-pro", 863.9, REFERENCE),
    ("deepseek-v4-pro", 865, "size of the repository"),
    ("deepseek-v4-pro-nvfp4", 912, REFERENCE),
    ("deepseek-v4-flash", 159.3, REFERENCE),
    ("deepseek-v4-pro-0813", 893, "size of the repository, with the DSpark draft"),
    ("deepseek-v4.1-flash", 511, "size of the repository"),
    ("glm-5.3-nvfp4", 465, "size of the repository"),
    ("kimi-k3", 1590, "1.5 to 1.68 TB published; the middle"),
    ("qwen3.8-2.4t-nvfp4", 1447, "size of the repository"),
    ("gpt-oss-120b", 65.2, "size of the repository's MXFP4 files"),
]
SHARES = [  # (model, layout, GB on a GPU by plain division)
    ("deepseek-v4-pro", TP[4], 216),
    ("deepseek-v4-pro", TP[8], 108),
    ("deepseek-v4-pro", TP[16], 54),
    ("deepseek-v4-pro", DEP[4], 237),
    ("deepseek-v4-pro", DEP[8], 133),
    ("deepseek-v4-pro", DEP[16], 81),
    ("deepseek-v4-pro", DEP[32], 54.5),
    ("deepseek-v4-flash", TP[4], 39.8),
    ("deepseek-v4-flash", TP[8], 19.9),
    ("deepseek-v4-flash", DEP[4], 46.3),
    ("deepseek-v4-flash", DEP[8], 27.5),
    ("deepseek-v4-pro-nvfp4", DEP[4], 249),
]
LOADED = [  # (layout, GB on a GPU as an engine reported it, source)
    (TP[8], 115.9, "vLLM decode role on GB200: 107.98 GiB"),
    (DEP[4], 233, "InferenceX pull request 2226, read as GB"),
    (DEP[4], 233 * GIB / 1e9, "InferenceX pull request 2226, read as GiB"),
]
TOKEN_BYTES = [  # bytes of KV cache a token at steady state
    ("deepseek-v4-pro", "fp8", 5511),
    ("deepseek-v4-pro", "mxfp4", 5031),
    ("deepseek-v4-flash", "fp8", 3850),
    ("deepseek-v4-flash", "mxfp4", 3514),
]


@cache
def model(name: str) -> tuple[Traits, tuple[Weight, ...]]:
    """Traits and weights of a shipped card."""
    known = Catalogue()
    card = known.model(name)
    config = read_config(known.model_path(name).parent / card.config)
    traits = read_traits(config)
    return traits, tuple(weights(traits, Formats(config, card.formats)))


def placed(name: str, parallel: Parallel) -> float:
    traits, found = model(name)
    return sum(per_rank(found, parallel, traits).values())


def total(name: str, of: tuple[str, ...] | None = None, bytes_: bool = False) -> float:
    found = model(name)[1]
    kept = [w for w in found if of is None or w.part in of]
    return float(sum(w.bytes if bytes_ else w.parameters for w in kept))
