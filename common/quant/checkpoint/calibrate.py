"""Run a checkpoint over calibration tokens and collect `Importance`, one tensor in memory at a time.

The model is built without weights; each module takes its own from the checkpoint just before it runs and drops them
after, so a model larger than memory costs the activations of the calibration tokens and its largest layer. Where
transformers names the weights differently from the checkpoint, the model is loaded whole instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fourfold.common.errors import FourfoldError
from fourfold.common.quant.checkpoint.reader import Checkpoint
from fourfold.common.quant.importance import Collector, Importance, random_tokens
from fourfold.common.tensor_index import FLOATS, FP8

TEXT_TOKENS, TEXT_LENGTH = 4096, 512
Note = Callable[[str], None]
Visit = Callable[[str, Tensor], None]


def calibration_tokens(checkpoint: Checkpoint, text: Path | None) -> tuple[Tensor, str]:
    """Return token rows int64 ``[S, L]`` and their origin: random ids, or the beginning of a text file.

    Raises:
        FourfoldError: the text cannot be read or is too short, or the model has no tokenizer.
    """
    config = checkpoint.config
    settings = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    vocabulary = (settings or {}).get("vocab_size")
    if not isinstance(vocabulary, int) or vocabulary < 1:
        raise FourfoldError(f"{checkpoint.path / 'config.json'}: vocab_size {vocabulary!r}: expected a positive number")
    start = config.get("bos_token_id")
    bos = start if isinstance(start, int) and 0 <= start < vocabulary else None
    if text is None:
        return random_tokens(vocabulary, bos), "random tokens"
    try:
        content = text.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise FourfoldError(f"--calibration {str(text)!r} cannot be read as text: {error}") from None
    tokenizer = _transformers().AutoTokenizer.from_pretrained(checkpoint.path)
    ids = tokenizer(content, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0][:TEXT_TOKENS]
    body = min(TEXT_LENGTH, len(ids)) - (bos is not None)
    if body < 32:
        raise FourfoldError(f"--calibration {str(text)!r} has {len(ids)} tokens, expected at least 64; give more text")
    rows = ids[: len(ids) // body * body].view(-1, body)
    if bos is not None:
        rows = torch.cat([torch.full((len(rows), 1), bos), rows], dim=1)
    return rows, f"text {text.name}, {rows.numel()} tokens"


def collect(
    checkpoint: Checkpoint,
    layers: Sequence[str],
    tokens: Tensor,
    origin: str,
    block: tuple[int, int] | None = None,
    note: Note = lambda text: None,
    visit: Visit | None = None,
) -> tuple[Importance, list[str]]:
    """Run the model over ``tokens`` and return the statistics of ``layers``, and those that saw no token.

    Args:
        block: of FP8 block scales in the checkpoint.
        note: told what runs.
        visit: told each of ``layers`` as it runs, with its input, float32 ``[tokens, K]``.

    Raises:
        FourfoldError: transformers is missing or does not know the architecture.
    """
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.path)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with _parameters_on_meta():
            model = transformers.AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, OSError, AttributeError, TypeError) as error:
        raise FourfoldError(
            f"transformers {transformers.__version__} cannot build {checkpoint.config.get('architectures')}: {error}. "
            "Quantise without statistics (--importance none) or give a file of them"
        ) from None
    body = model.base_model
    prefix = next((name for name, module in model.named_modules() if module is body), "")
    wanted = {f"{prefix}.{name}" if prefix else name for name, _ in body.named_parameters()}
    if not wanted <= checkpoint.entries.keys():
        note("loading the whole model: its weights have other names in transformers")
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.bfloat16)
        body = model.base_model
    else:
        _stream(model, body, prefix, checkpoint, block, note)
    modules = dict(model.named_modules())
    observed = {name: modules[name] for name in layers if isinstance(modules.get(name), nn.Linear)}
    for name, module in observed.items():
        if visit is not None:
            module.register_forward_pre_hook(lambda _, x, name=name: visit(name, x[0].flatten(0, -2).float()))
    with torch.inference_mode(), Collector(observed) as collector:
        body.eval()(tokens, use_cache=False)
    return collector.result(origin)


def _stream(
    model: Any, body: nn.Module, prefix: str, checkpoint: Checkpoint, block: tuple[int, int] | None, note: Note
) -> None:
    """Let every module of ``body`` that has parameters of its own load them when it runs, in float32."""

    def own(module: nn.Module) -> list[str]:
        return [key for key, parameter in module._parameters.items() if parameter is not None]

    def load(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, *_: Any) -> None:
            for key in own(module):
                full = f"{name}.{key}"
                fp8 = checkpoint.entries[full].dtype == FP8
                tensor = checkpoint.weight(name, block) if fp8 else checkpoint.tensor(full)
                module._parameters[key] = nn.Parameter(tensor.float(), requires_grad=False)
            note(name)

        return hook

    def drop(module: nn.Module, *_: Any) -> None:
        for key in own(module):
            module._parameters[key] = nn.Parameter(module._parameters[key].to("meta"), requires_grad=False)  # type: ignore

    for name, module in body.named_modules(prefix=prefix):
        if own(module):
            for key in own(module):
                dtype = checkpoint.entries[f"{name}.{key}"].dtype
                if dtype not in FLOATS and dtype != FP8:
                    raise FourfoldError(f"{name}.{key} has dtype {dtype}, which no calibration can run")
            module.register_forward_pre_hook(load(name))
            module.register_forward_hook(drop)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Create modules whose parameters have no storage; buffers keep theirs."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        original(self, name, param)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = original


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise FourfoldError(
            f"statistics need transformers, which both engines bring ({error}); run this in an engine's environment, "
            "or quantise with --importance none"
        ) from None
    return transformers
