"""Importance statistics: the mean square of each input channel of each linear layer (the diagonal of its Hessian).

They weight the block-scale search of `fourfold.common.quant.scales`. `Collector` gathers them from a model that runs;
`save_importance` and `load_importance` keep them in one safetensors file, ``<module>.mean_square`` and
``<module>.amax`` (float32 ``[K]``), which lies beside a checkpoint as `FILE`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fourfold.common.errors import FourfoldError

FILE = "fourfold_importance.stats"  # safetensors inside; engines load every *.safetensors as weights
RANDOM_SEQUENCES, RANDOM_LENGTH, RANDOM_SEED = 16, 128, 0


@dataclass(frozen=True)
class Importance:
    """Statistics of one model.

    Attributes:
        mean_square: float32 ``[K]`` by module name.
        amax: float32 ``[K]`` by module name: largest magnitude, for static activation scales.
        origin: where the activations came from, for logs.
    """

    mean_square: Mapping[str, Tensor]
    amax: Mapping[str, Tensor]
    origin: str


def random_tokens(vocabulary: int, bos: int | None, seed: int = RANDOM_SEED) -> Tensor:
    """Token ids drawn evenly from the vocabulary: int64 ``[16, 128]``, each row beginning with ``bos``."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (RANDOM_SEQUENCES, RANDOM_LENGTH), generator=generator)
    if bos is not None:
        tokens[:, 0] = bos
    return tokens


class Collector:
    """Sums the squares of what reaches each layer, by forward hooks; a context manager.

    Args:
        layers: linear layers by module name.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = layers
        self.square: dict[str, Tensor] = {}
        self.largest: dict[str, Tensor] = {}
        self.count: dict[str, int] = {}

    def __enter__(self) -> Collector:
        self._handles = [m.register_forward_pre_hook(self._hook(name)) for name, m in self.layers.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str):  # noqa: ANN202
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            if not len(x):
                return
            square, largest = x.square().sum(0), x.abs().amax(0)
            if name in self.square:
                self.square[name] += square
                self.largest[name] = torch.maximum(self.largest[name], largest)
            else:
                self.square[name], self.largest[name] = square, largest
            self.count[name] = self.count.get(name, 0) + len(x)

        return add

    def result(self, origin: str) -> tuple[Importance, list[str]]:
        """Return the statistics, and the layers that saw no token.

        Such a layer (an expert that the router never chose) takes the mean over its siblings: the layers whose names
        differ only in a number.
        """
        mean = {name: self.square[name] / self.count[name] for name in self.square}
        amax = dict(self.largest)
        unseen = [name for name in self.layers if name not in mean]
        for name in unseen:
            siblings = [other for other in self.square if _siblings(name, other)]
            if siblings:
                mean[name] = torch.stack([mean[s] for s in siblings]).mean(0)
                amax[name] = torch.stack([amax[s] for s in siblings]).amax(0)
        return Importance(mean, amax, origin), unseen


def _siblings(first: str, second: str) -> bool:
    a, b = first.split("."), second.split(".")
    if len(a) != len(b):
        return False
    different = [(x, y) for x, y in zip(a, b, strict=True) if x != y]
    at_layer = [i for i, part in enumerate(a) if part.isdigit()]
    # The last number of the name is the expert's; the layer's number must agree.
    return (
        len(different) == 1 and different[0][0].isdigit() and len(at_layer) > 1 and a[at_layer[-1]] != b[at_layer[-1]]
    )


def statistics_of(model: nn.Module, layers: Mapping[str, nn.Module], tokens: Iterable[Tensor]) -> dict[str, Tensor]:
    """Run token rows ``[L]`` through the body of a transformers model and return ``mean_square`` by name."""
    with Collector(layers) as collector, torch.inference_mode():
        for row in tokens:
            model.base_model(row[None], use_cache=False)  # type: ignore[operator]
    return dict(collector.result("")[0].mean_square)


def save_importance(path: Path, importance: Importance) -> None:
    """Write the statistics; the file appears when it is whole."""
    tensors = {f"{name}.mean_square": t.contiguous() for name, t in importance.mean_square.items()}
    tensors |= {f"{name}.amax": t.contiguous() for name, t in importance.amax.items()}
    write_tensors(path, tensors, {"fourfold": json.dumps({"origin": importance.origin})})


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file that appears when it is whole, with the mode of any other new file."""
    part = path.with_name(path.name + ".writing")
    part.touch()  # safetensors would create it for its owner alone
    mode = part.stat().st_mode
    save_file(tensors, part, metadata)
    part.chmod(mode)
    part.rename(path)


def load_importance(path: Path) -> Importance:
    """Read statistics.

    Raises:
        FourfoldError: the file is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise FourfoldError(f"importance statistics {str(path)!r} do not exist; `fourfold quantize` writes them")
    mean: dict[str, Tensor] = {}
    amax: dict[str, Tensor] = {}
    try:
        with safe_open(path, "pt") as tensors:
            metadata = tensors.metadata() or {}
            for key in tensors.keys():  # noqa: SIM118
                name, _, kind = key.rpartition(".")
                if kind in ("mean_square", "amax"):
                    (mean if kind == "mean_square" else amax)[name] = tensors.get_tensor(key).float()
    except (SafetensorError, OSError) as error:
        raise FourfoldError(f"importance statistics {str(path)!r} cannot be read: {error}") from None
    if not mean:
        raise FourfoldError(f"{str(path)!r} has no <layer>.mean_square; it holds no importance statistics")
    try:
        origin = str(json.loads(metadata.get("fourfold", "{}")).get("origin", path.name))
    except (json.JSONDecodeError, AttributeError):
        origin = path.name
    return Importance(mean, amax, origin)


def find_beside(model: str | Path) -> Path | None:
    """The statistics file that lies in the model's directory, if there is one."""
    path = Path(model) / FILE
    return path if path.is_file() else None
