"""``fourfold bench quality``: what each way to choose NVFP4 block scales costs a model.

Every row quantises the linear layers of one model, evaluates it in float32 (`fourfold.common.bench.evaluation`), and
compares with the unquantised model of the same run. The share is that of the rise which plain absmax causes.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourfold.common.bench import evaluation
from fourfold.common.errors import FourfoldError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Method:
    """One way to quantise: a name of SCALE_METHODS, the statistics that weight it, and GPTQ on top or not."""

    label: str
    scales: str
    calibration: str | None = None
    gptq: bool = False


METHODS = (
    Method("absmax", "absmax"),
    Method("four_over_six", "four_over_six"),
    Method("sweep", "sweep"),
    Method("sweep, random tokens", "sweep", "random"),
    Method("sweep, other-domain text", "sweep", "other"),
    Method("sweep, in-domain text", "sweep", "same"),
    Method("sweep + GPTQ, other-domain text", "sweep", "other", gptq=True),
    Method("sweep + GPTQ, in-domain text", "sweep", "same", gptq=True),
)


@dataclass
class Row:
    """One line of the table: metrics as `Evaluation.measure` has them; seconds are those of quantising."""

    method: str
    scheme: str
    metrics: dict[str, float]
    share: float | None
    seconds: float


@contextmanager
def _a4(layers: dict[str, nn.Linear]) -> Iterator[None]:
    """Quantise the inputs of every layer, with one global scale a token, as W4A4 does."""
    from fourfold.common.quant.activations import fake_quantize

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        return (fake_quantize(x.reshape(-1, x.shape[-1]), None).view_as(x), *inputs[1:])

    handles = [layer.register_forward_pre_hook(hook) for layer in layers.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hessians(model: nn.Module, layers: dict[str, nn.Linear], tokens: Tensor) -> dict[str, Tensor]:
    """Mean of ``x x^T`` of each layer's input, float32 ``[K, K]``; layers that share an input share the tensor."""
    import torch

    found: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    latest: tuple[Tensor, str] | None = None

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal latest
            if latest is not None and latest[0] is inputs[0]:
                owner[name] = latest[1]
                return
            latest = inputs[0], name
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            found[name] = found.get(name, torch.zeros(())) + x.t() @ x / tokens.numel()

        return add

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    with torch.inference_mode():
        for row in tokens:
            model.base_model(row[None])  # type: ignore[operator]
    for handle in handles:
        handle.remove()
    return {name: found[owner.get(name, name)] for name in layers}


def _prepare(
    path: Path, tokens: int, calibration_tokens: int, length: int
) -> tuple[Any, evaluation.Evaluation, dict[str, Tensor]]:
    """The model, its evaluation, and the calibration tokens by name: ``same``, ``other``, ``random``."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    from fourfold.common.quant import importance

    config = AutoConfig.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    encoder = config.model_type == "bert"
    model = (AutoModel if encoder else AutoModelForCausalLM).from_pretrained(path, dtype=torch.float32).eval()
    if encoder:
        length = min(length, 64)  # a sentence or two: the mean over a page hides what becomes of one
    first = tokenizer.cls_token_id if encoder else config.bos_token_id
    source = evaluation.texts()
    rows = {
        kind: evaluation.sequences(tokenizer, source[kind], count, length, first)
        for kind, count in (("eval", tokens), ("same", calibration_tokens), ("other", calibration_tokens))
    }
    rows["random"] = importance.random_tokens(config.vocab_size, first)
    chosen = evaluation.SentenceEncoder if encoder else evaluation.LanguageModel
    return model, chosen(model, rows.pop("eval")), rows


def quality(
    model: Annotated[str, typer.Argument(help="Model directory, 'smollm2', or 'minilm' (a sentence encoder).")] = (
        "smollm2"
    ),
    tokens: Annotated[int, typer.Option(help="Tokens to evaluate.")] = 8192,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens of calibration text.")] = 4096,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    rows: Annotated[str, typer.Option(help="Regular expression: the methods to measure beside absmax.")] = "",
    a4: Annotated[bool, typer.Option(help="Add W4A4.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What every scale method costs a model: perplexity, KL divergence and top-1 agreement with it unquantised."""
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from fourfold.common.bench import machine
    from fourfold.common.demo.model import resolve
    from fourfold.common.quant import importance, quantizer
    from fourfold.common.quant.gptq import quantize_gptq

    try:
        methods = [m for m in METHODS if m.label == "absmax" or re.search(rows, m.label)]
    except re.error as error:
        raise FourfoldError(f"--rows {rows!r} is not a regular expression: {error}") from None
    path = resolve(model)
    loaded, judge, calibration = _prepare(path, tokens, calibration_tokens, length)
    layers = judge.layers()
    original = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    schemes = ["w4a16", "w4a4"] if a4 else ["w4a16"]
    unquantised = judge.measure()
    first = next(iter(unquantised))
    found = [Row("unquantised", "", unquantised, None, 0.0)]
    rises: dict[str, float] = {}
    with Progress(console=Console(stderr=True)) as progress:
        job = progress.add_task("", total=len(methods) * len(schemes))
        for method in methods:
            progress.update(job, description=method.label)
            start = time.perf_counter()
            sample = calibration[method.calibration] if method.calibration else None
            statistics = importance.statistics_of(loaded, layers, sample) if sample is not None else {}
            hessians = _hessians(loaded, layers, sample) if method.gptq and sample is not None else {}
            for name, layer in layers.items():
                arguments: dict[str, Any] = {"name": name, "method": method.scales, "importance": statistics.get(name)}
                if method.gptq:
                    packed = quantize_gptq(original[name], hessians[name], **arguments)
                else:
                    packed = quantizer.quantize_weight(original[name], **arguments)
                layer.weight.data = packed.dequantize()
            seconds = time.perf_counter() - start
            for scheme in schemes:
                if scheme == "w4a4":
                    with _a4(layers):
                        metrics = judge.measure()
                else:
                    metrics = judge.measure()
                rise = metrics[first] - unquantised[first]
                share = rise / rises.setdefault(scheme, rise)
                found.append(Row(method.label, scheme, metrics, share, seconds))
                progress.advance(job)
            for name, layer in layers.items():
                layer.weight.data = original[name]
    if as_json:
        result: dict[str, Any] = {"machine": machine.describe(), "model": path.name, "tokens": judge.tokens.numel()}
        typer.echo(json.dumps(result | {"rows": [asdict(row) for row in found]}, indent=1))
        return
    count, size = judge.tokens.numel(), judge.tokens.shape[1]
    table = Table(title=f"{path.name}, {count} tokens of Python's help topics (PSF licence), sequences of {size}")
    for column in ("method", "scheme", *unquantised, "share of absmax's rise", "seconds"):
        table.add_column(column, justify="left" if column in ("method", "scheme") else "right")
    for row in sorted(found, key=lambda r: r.scheme):
        share_text = "" if row.share is None else f"{row.share:.0%}"
        figures = (f"{value:.3f}" if value >= 2 else f"{value:.4f}" for value in row.metrics.values())
        table.add_row(row.method, row.scheme, *figures, share_text, f"{row.seconds:.1f}")
    out = Console()
    out.print(machine.describe())
    out.print(table)
    out.print("seconds are those of statistics and quantising together")
