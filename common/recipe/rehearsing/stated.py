"""Tensors of a checkpoint as data, where transformers has no class to ask: a `Stated` for each kind of module.

A size is a number, or a sum of products of numbers and keys of the config, as in ``"heads * head_dim + 2 * rank"``;
``.`` leads into a part of the config, and a list is as large as it is long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fourfold.common.recipe.rehearsing.formats import Shapes
from fourfold.common.recipe.rehearsing.traits import EXPERTS

Named = Mapping[str, tuple[tuple[Any, ...], str]]  # name to sizes and tag
Config = Mapping[str, Any]


def _once(config: Config) -> Iterable[int]:
    return (0,)


def every_layer(config: Config) -> Iterable[int]:
    return range(config["num_hidden_layers"])


@dataclass(frozen=True)
class Stated:
    """Tensors of one kind of module.

    Attributes:
        prefix: of their names; ``{n}`` stands for each number that ``of`` gives, ``{e}`` for each expert.
        tensors: name to sizes and tag.
        of: the modules, by the config.
    """

    prefix: str
    tensors: Named
    of: Callable[[Config], Iterable[int]] = _once


def shapes_of(stated: Iterable[Stated], config: Config) -> Shapes:
    """The names of all of them."""
    experts = next((int(config[key]) for key in EXPERTS if config.get(key)), 1)
    out = Shapes()
    for part in stated:
        sized = {name: (tuple(size(one, config) for one in sizes), tag) for name, (sizes, tag) in part.tensors.items()}
        for n in part.of(config):
            for e in range(experts if "{e}" in part.prefix else 1):
                out |= {part.prefix.format(n=n, e=e) + name: spec for name, spec in sized.items()}
    return out


def size(given: Any, config: Config) -> int:
    """A size by the config; of a tuple, the product of its parts."""
    if isinstance(given, int):
        return given
    if isinstance(given, tuple):
        return math.prod(size(part, config) for part in given)
    terms = (term.split("*") for term in str(given).split("+"))
    return sum(math.prod(_factor(factor.strip(), config) for factor in term) for term in terms)


def _factor(given: str, config: Config) -> int:
    if given.isdecimal():
        return int(given)
    found: Any = config
    for key in given.split("."):
        found = found[key]
    return len(found) if isinstance(found, list) else int(found)


def linear(*named: tuple[str, Any, Any], tag: str = "bfloat16") -> Named:
    """Weights of linear layers: name, rows, columns."""
    return {f"{name}.weight": ((rows, columns), tag) for name, rows, columns in named}


def norms(*names: str, width: Any = "hidden_size") -> Named:
    """Weights of norms of one width."""
    return {f"{name}.weight": ((width,), "bfloat16") for name in names}
