"""Quantise a checkpoint to NVFP4 on disk, shard by shard.

The output grows in ``<out>.partial`` and is renamed when it is whole. A run that was killed goes on from the last whole
shard when it is started again with the same arguments. Layers that engines fuse share one global scale, so that the
stock engines, which use only one, serve them exactly; the block scales are chosen under it.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fourfold.common.errors import FourfoldError
from fourfold.common.quant import nvfp4
from fourfold.common.quant.backends.base import Scheme
from fourfold.common.quant.checkpoint import calibrate, vocabulary
from fourfold.common.quant.checkpoint.layers import Choice, choose, fused_with
from fourfold.common.quant.checkpoint.reader import Checkpoint
from fourfold.common.quant.gptq import quantize_gptq
from fourfold.common.quant.importance import FILE, Importance, load_importance, save_importance, write_tensors
from fourfold.common.quant.nvfp4 import NvFp4Tensor
from fourfold.common.quant.plan import MODELOPT_FILE
from fourfold.common.quant.quantizer import quantize_weight
from fourfold.common.quant.source import Layout, Source, read_source
from fourfold.common.settings import SCALE_METHODS
from fourfold.common.tensor_index import FP8, INDEX, read_header, read_json

STATE = "fourfold_state.json"
GPTQ = "gptq"  # folder of layers that error feedback has quantised, a file each
_NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".stats"}
Note = Callable[[str, float], None]


@dataclass(frozen=True)
class Options:
    """What `convert` is asked for.

    Attributes:
        scales: one of `SCALE_METHODS`.
        importance: random, none, or a statistics file.
        calibration: a text file whose activations weight the search, instead of random tokens.
        format: a key of `vocabulary.FORMATS`.
        scheme: w4a16, or w4a4 with static input scales from the same activations.
        ignore: regular expressions of layers to leave alone.
        gptq: feed rounding errors forward, by the Hessian of the same activations.
    """

    scales: str = "sweep"
    importance: str = "random"
    calibration: Path | None = None
    format: str = "compressed-tensors"
    scheme: Scheme = Scheme.W4A16
    ignore: tuple[str, ...] = ()
    gptq: bool = False

    def check(self) -> None:
        """Raise FourfoldError where options are unknown or exclude each other."""
        if self.scales not in SCALE_METHODS:
            raise FourfoldError(f"--scales {self.scales!r}: expected one of {', '.join(SCALE_METHODS)}")
        vocabulary.quantization_config(self.format, self.scheme, ())
        if self.calibration is not None and self.importance != "random":
            raise FourfoldError(f"--calibration makes its own statistics; drop --importance {self.importance}")
        if self.scheme is Scheme.W4A4 and self.importance == "none":
            raise FourfoldError("--scheme w4a4 needs activations for its input scales; drop --importance none")
        if self.gptq and self.calibration is None:
            raise FourfoldError("--gptq needs the activations of real text; give some with --calibration")


@dataclass
class Report:
    """What was done: layers quantised, layers kept with the reason, layers without statistics of their own, layers with
    error feedback."""

    choice: Choice
    unseen: list[str] = field(default_factory=list)
    fed: int = 0
    bytes_before: int = 0
    bytes_after: int = 0


def convert(model: Path, out: Path, options: Options, note: Note = lambda text, done: None) -> Report:
    """Quantise ``model`` into ``out``.

    Args:
        model: directory of safetensors in BF16, FP16, FP32 or FP8 with block scales.
        out: directory to create.
        options: see `Options`.
        note: told what runs and the share done, 0 to 1.

    Raises:
        FourfoldError: bad input or options; nothing is left under ``out``.
    """
    options.check()
    checkpoint = Checkpoint(model)
    source = _source_of(checkpoint)
    choice = choose(checkpoint, source, options.ignore)
    if out.exists():
        raise FourfoldError(f"{out} exists; remove it or give another directory")
    if out.resolve().is_relative_to(model.resolve()):
        raise FourfoldError(f"{out} is inside the model's own directory; give another place")
    part = out.with_name(f"{out.name}.partial")
    try:
        part.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FourfoldError(f"{part} cannot be created: {error}") from None
    report = Report(choice)
    with _locked(part):
        _resume_or_restart(part, checkpoint, options)
        work = _Work(checkpoint, source, choice, options, part / GPTQ)
        work.statistics = _statistics(work, part, report, note)
        try:
            for number, shard in enumerate(checkpoint.shards):
                if not (part / shard).exists():
                    note(f"{shard}", number / len(checkpoint.shards))
                    tensors = work.shard(shard, lambda text, at=number: note(text, at / len(checkpoint.shards)))
                    write_tensors(part / shard, tensors, {"format": "pt"})
            _finish(checkpoint, choice, options, part)
        except (OSError, SafetensorError) as error:
            raise FourfoldError(f"{part}: writing failed: {error}; free some space and run this again") from None
        report.bytes_before = sum((model / shard).stat().st_size for shard in checkpoint.shards)
        report.bytes_after = sum((part / shard).stat().st_size for shard in checkpoint.shards)
        report.fed = len(list((part / GPTQ).glob("*")))
        shutil.rmtree(part / GPTQ, ignore_errors=True)
        (part / STATE).unlink()
        (part / ".lock").unlink()
        part.rename(out)
    return report


def _source_of(checkpoint: Checkpoint) -> Source:
    config = checkpoint.config.get("quantization_config")
    if config is None and (checkpoint.path / MODELOPT_FILE).is_file():
        config = read_json(checkpoint.path / MODELOPT_FILE)
    if config is not None and not isinstance(config, dict):
        raise FourfoldError(
            f"{checkpoint.path / 'config.json'}: quantization_config: expected an object, got {config!r}"
        )
    source = read_source(config)
    if source.is_nvfp4:
        raise FourfoldError(f"{checkpoint.path} is NVFP4 already ({source.layout.value}); serve it as it is")
    return source


@contextmanager
def _locked(part: Path) -> Iterator[None]:
    with (part / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FourfoldError(f"another run is writing {part}; wait for it or stop it") from None
        yield


def _resume_or_restart(part: Path, checkpoint: Checkpoint, options: Options) -> None:
    files = {shard: (checkpoint.path / shard).stat() for shard in checkpoint.shards}
    state: dict[str, Any] = {
        "source": str(checkpoint.path.resolve()),
        "shards": {shard: [stat.st_size, stat.st_mtime_ns] for shard, stat in files.items()},
        "options": {key: str(value) for key, value in vars(options).items()},
    }
    path = part / STATE
    if not (path.is_file() and path.read_text() == json.dumps(state)):
        shutil.rmtree(part / GPTQ, ignore_errors=True)
        for entry in part.iterdir():
            if entry.name != ".lock":
                entry.unlink()
        path.write_text(json.dumps(state))


def _statistics(work: _Work, part: Path, report: Report, note: Note) -> Importance | None:
    options, quantised = work.options, report.choice.quantised
    if options.importance == "none":
        return None
    saved = part / FILE
    if saved.is_file():
        return load_importance(saved)
    if options.importance != "random":
        found = load_importance(Path(options.importance))
    elif options.scales != "sweep" and options.scheme is Scheme.W4A16 and not options.gptq:
        return None  # nothing would use them
    else:
        note("statistics", 0.0)
        tokens, origin = calibrate.calibration_tokens(work.checkpoint, options.calibration)
        visit = work.feed_back if options.gptq else None

        def tell(name: str) -> None:
            note(f"statistics: {name}", 0.0)

        found, report.unseen = calibrate.collect(
            work.checkpoint, quantised, tokens, origin, work.source.block, tell, visit
        )
    missing = [name for name in quantised if name not in found.mean_square]
    if missing and len(missing) == len(quantised):
        raise FourfoldError(
            f"the statistics have no layer of this model ({missing[0]} and all others are missing); an MTP head alone "
            "has none: --importance none"
        )
    if options.scheme is Scheme.W4A4 and any(name not in found.amax for name in quantised):
        lost = next(name for name in quantised if name not in found.amax)
        raise FourfoldError(f"the statistics have no amax of {lost}, which w4a4 needs; collect them again")
    report.unseen = sorted({*report.unseen, *missing})
    save_importance(saved, found)
    return found


class _Work:
    """Turns the tensors of one shard into those of the output."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        source: Source,
        choice: Choice,
        options: Options,
        fed: Path,
    ) -> None:
        self.checkpoint, self.source, self.options, self.fed = checkpoint, source, options, fed
        self.statistics: Importance | None = None
        self.quantised = set(choice.quantised)
        self.layout = vocabulary.FORMATS[options.format][0]
        self._scales: dict[str, Tensor] = {}

    def shard(self, shard: str, note: Callable[[str], None]) -> dict[str, Tensor]:
        """Return the output tensors of ``shard``."""
        tensors: dict[str, Tensor] = {}
        for tensor, entry in self.checkpoint.entries.items():
            name, _, kind = tensor.rpartition(".")
            if entry.shard != shard:
                continue
            if kind == "weight" and name in self.quantised:
                note(name)
                tensors |= self._layer(name)
            elif kind == "weight_scale_inv":
                continue
            elif entry.dtype == FP8 and kind == "weight":
                tensors[tensor] = self.checkpoint.weight(name, self.source.block).to(torch.bfloat16)
            else:
                tensors[tensor] = self.checkpoint.tensor(tensor)
        return tensors

    def feed_back(self, name: str, x: Tensor) -> None:
        """Quantise the layer ``name`` by GPTQ and keep it in a file; ``x`` are its inputs, float32 ``[tokens, K]``."""
        path = self.fed / name
        if path.exists():
            return
        self.fed.mkdir(exist_ok=True)
        hessian = x.t() @ x / len(x)
        weight = quantize_gptq(
            self.checkpoint.weight(name, self.source.block),
            hessian,
            name=name,
            method=self.options.scales,
            importance=hessian.diagonal() if self.options.scales == "sweep" else None,
            global_scale=self._global_scale(name),
        )
        tensors = {"packed": weight.packed, "block_scales": weight.block_scales, "global_scale": weight.global_scale}
        write_tensors(path, tensors, {})

    def _quantised(self, name: str) -> NvFp4Tensor:
        if (self.fed / name).exists():
            return NvFp4Tensor(**load_file(self.fed / name))
        importance = self.statistics.mean_square.get(name) if self.statistics else None
        return quantize_weight(
            self.checkpoint.weight(name, self.source.block),
            name=name,
            method=self.options.scales,
            importance=importance if self.options.scales == "sweep" else None,
            global_scale=self._global_scale(name),
        )

    def _layer(self, name: str) -> dict[str, Tensor]:
        weight = self._quantised(name)
        input_scale = None
        if self.options.scheme is Scheme.W4A4 and self.statistics is not None:
            members = [other for other in fused_with(name) if other in self.statistics.amax]
            amax = torch.stack([self.statistics.amax[other].max() for other in members]).max()
            input_scale = nvfp4.global_scale_of(amax)
        return vocabulary.tensors_of(name, weight, input_scale, self.layout)

    def _global_scale(self, name: str) -> Tensor:
        if name not in self._scales:
            members = [other for other in fused_with(name) if other in self.quantised]
            amax = [nvfp4.check_weight(self.checkpoint.weight(m, self.source.block), m) for m in members]
            self._scales |= dict.fromkeys(members, nvfp4.global_scale_of(torch.stack(amax).max()))
        return self._scales.pop(name)


def _finish(checkpoint: Checkpoint, choice: Choice, options: Options, part: Path) -> None:
    """Write the index and the configs, and copy what else the model has."""
    if (checkpoint.path / INDEX).is_file():
        weight_map = {name: shard for shard in checkpoint.shards for name in read_header(part / shard)}
        total = sum((part / shard).stat().st_size for shard in checkpoint.shards)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (part / INDEX).write_text(json.dumps(index, indent=2))
    ignore = _ignored_layers(choice)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    config["quantization_config"] = vocabulary.quantization_config(options.format, options.scheme, ignore)
    (part / "config.json").write_text(json.dumps(config, indent=2))
    if vocabulary.FORMATS[options.format][0] is Layout.MODELOPT:
        (part / MODELOPT_FILE).write_text(json.dumps(vocabulary.hf_quant_config(options.scheme, ignore), indent=2))
    for file in sorted(checkpoint.path.iterdir()):
        known = file.name in (INDEX, "config.json", MODELOPT_FILE) or file.suffix in _NOT_COPIED
        if file.is_file() and not known and not file.name.startswith("."):
            shutil.copyfile(file, part / file.name)


def _ignored_layers(choice: Choice) -> Sequence[str]:
    """The layers that an engine would take for quantised ones if the config did not name them."""
    named = [name for name, reason in choice.kept.items() if "embedding" not in reason and "norm" not in reason]
    return sorted({*named, "lm_head"})
