"""``fourfold bench quality``: what each way to choose NVFP4 block scales costs a model, on text with a known licence.

Every row quantises the linear layers of one model, evaluates it on the same tokens in float32, and compares with
the unquantised model of the same run: perplexity, the share of plain absmax's perplexity rise, KL divergence and top-1
agreement. The text is that of Python's own ``pydoc_data.topics`` (PSF licence): topics in even places calibrate
in-domain, those in odd places are evaluated. The other domain is the text of the Apache licence. Every sequence starts
with the model's BOS token.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourfold.common.errors import FourfoldError

if TYPE_CHECKING:
    from torch import Tensor, nn

CHUNK = 128  # positions whose logits are held at once


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
    """One line of the table; `share` is the part of absmax's perplexity rise, seconds are those of quantising."""

    method: str
    scheme: str
    perplexity: float
    share: float | None
    kl: float
    top1: float
    seconds: float


def texts() -> dict[str, str]:
    """The texts: ``eval``, ``same`` (domain) and ``other`` (domain).

    Raises:
        FourfoldError: the installed distribution carries no licence file.
    """
    from pydoc_data import topics

    ordered = [topics.topics[name] for name in sorted(topics.topics)]
    for file in metadata.files("fourfold") or []:
        if file.name == "LICENSE":
            licence = file.read_text()
            return {"eval": "\n".join(ordered[1::2]), "same": "\n".join(ordered[0::2]), "other": licence}
    raise FourfoldError("the installed fourfold has no LICENSE file; install it again")


def sequences(tokenizer: Any, text: str, tokens: int, length: int, bos: int | None) -> Tensor:
    """Cut ``text`` into sequences: int64 ``[S, length]``, at most ``tokens`` in all, each beginning with ``bos``."""
    import torch

    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    body = length - (bos is not None)
    count = min(tokens // length, len(ids) // body)
    if count == 0:
        raise FourfoldError(f"the text has {len(ids)} tokens, fewer than one sequence of {body}")
    rows = ids[: count * body].view(count, body)
    if bos is not None:
        rows = torch.cat([torch.full((count, 1), bos), rows], dim=1)
    return rows


class Evaluation:
    """Compares variants of one model with itself unquantised, on fixed tokens.

    Args:
        model: a transformers causal language model in float32; its head is shared by all variants.
        tokens: int64 ``[S, L]``.
    """

    def __init__(self, model: nn.Module, tokens: Tensor) -> None:
        self.model, self.tokens = model, tokens
        self.base = self._hidden()

    def _hidden(self) -> list[Tensor]:
        import torch

        with torch.inference_mode():
            return [self.model.base_model(row[None]).last_hidden_state[0, :-1] for row in self.tokens]  # type: ignore[operator]

    def _log_probs(self, hidden: Tensor) -> Tensor:
        import torch

        logits = self.model.get_output_embeddings()(hidden).float()  # type: ignore[operator]
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        if cap:
            logits = torch.tanh(logits / cap) * cap
        return logits.log_softmax(-1)

    def measure(self) -> tuple[float, float, float]:
        """Return perplexity, mean KL(unquantised || this) in nats, and top-1 agreement of the model as it is now."""
        import torch

        nll = kl = agree = 0.0
        count = 0
        for row, base, hidden in zip(self.tokens, self.base, self._hidden(), strict=True):
            for start in range(0, len(hidden), CHUNK):
                part = slice(start, start + CHUNK)
                with torch.inference_mode():
                    p, q = self._log_probs(base[part]), self._log_probs(hidden[part])
                    target = row[1:][part, None]
                    nll -= float(q.gather(1, target).sum(dtype=torch.float64))
                    kl += float((p.exp() * (p - q)).sum(dtype=torch.float64))
                    agree += int((p.argmax(-1) == q.argmax(-1)).sum())
                    count += len(target)
        return math.exp(nll / count), kl / count, agree / count


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that `fourfold quantize` quantises, by name: all but the head."""
    from torch import nn

    head = model.get_output_embeddings()  # type: ignore[operator]
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


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


def quality(
    model: Annotated[str, typer.Argument(help="Model directory, or 'smollm2'.")] = "smollm2",
    tokens: Annotated[int, typer.Option(help="Tokens to evaluate.")] = 8192,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens of calibration text.")] = 4096,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    gptq: Annotated[bool, typer.Option(help="Add GPTQ error feedback (the slowest rows).")] = True,
    a4: Annotated[bool, typer.Option(help="Add W4A4.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Perplexity, KL divergence and top-1 agreement of every scale method against the unquantised model."""
    import torch
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fourfold.common.bench import machine
    from fourfold.common.demo.model import resolve
    from fourfold.common.quant import gptq as gptq_module
    from fourfold.common.quant import importance, quantizer

    path = resolve(model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    bos = lm.config.bos_token_id
    source = texts()
    evaluation = Evaluation(lm, sequences(tokenizer, source["eval"], tokens, length, bos))
    layers = linears(lm)
    original = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    calibration: dict[str, Tensor] = {
        kind: sequences(tokenizer, source[kind], calibration_tokens, length, bos) for kind in ("same", "other")
    }
    calibration["random"] = importance.random_tokens(lm.config.vocab_size, bos)
    methods = [m for m in METHODS if gptq or not m.gptq]
    schemes = ["w4a16", "w4a4"] if a4 else ["w4a16"]
    base = evaluation.measure()[0]
    rows: list[Row] = [Row("BF16", "", base, None, 0.0, 1.0, 0.0)]
    rises: dict[str, float] = {}
    with Progress(console=Console(stderr=True)) as progress:
        job = progress.add_task("", total=len(methods) * len(schemes))
        for method in methods:
            progress.update(job, description=method.label)
            start = time.perf_counter()
            statistics = (
                importance.statistics_of(lm, layers, calibration[method.calibration]) if method.calibration else {}
            )
            hessians = _hessians(lm, layers, calibration[method.calibration or ""]) if method.gptq else {}
            for name, layer in layers.items():
                weights = statistics.get(name)
                if method.gptq:
                    packed = gptq_module.quantize_gptq(
                        original[name], hessians.pop(name), name=name, method=method.scales, importance=weights
                    )
                else:
                    packed = quantizer.quantize_weight(
                        original[name], name=name, method=method.scales, importance=weights
                    )
                layer.weight.data = packed.dequantize()
            seconds = time.perf_counter() - start
            for scheme in schemes:
                if scheme == "w4a4":
                    with _a4(layers):
                        perplexity, kl, top1 = evaluation.measure()
                else:
                    perplexity, kl, top1 = evaluation.measure()
                rises.setdefault(scheme, perplexity - base)
                share = (perplexity - base) / rises[scheme]
                rows.append(Row(method.label, scheme, perplexity, share, kl, top1, seconds))
                progress.advance(job)
            for name, layer in layers.items():
                layer.weight.data = original[name]
    if as_json:
        result: dict[str, Any] = {
            "machine": machine.describe(),
            "model": path.name,
            "tokens": evaluation.tokens.numel(),
        }
        typer.echo(json.dumps(result | {"rows": [asdict(row) for row in rows]}, indent=1))
        return
    count = evaluation.tokens.numel()
    table = Table(title=f"{path.name}, {count} tokens of Python's help topics (PSF licence), sequences of {length}")
    for column in ("method", "scheme", "perplexity", "share of absmax's rise", "KL", "top-1", "seconds"):
        table.add_column(column, justify="left" if column in ("method", "scheme") else "right")
    for row in sorted(rows, key=lambda r: r.scheme):
        share_text = "" if row.share is None else f"{row.share:.0%}"
        figures = f"{row.perplexity:.3f}", share_text, f"{row.kl:.4f}", f"{row.top1:.4f}", f"{row.seconds:.1f}"
        table.add_row(row.method, row.scheme, *figures)
    out = Console()
    out.print(machine.describe())
    out.print(table)
    out.print("absmax is the first row of each scheme; seconds are those of statistics and quantising together")
