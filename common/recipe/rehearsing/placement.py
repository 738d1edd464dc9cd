"""Which parameters of a model a loader fills, element for element, and from which tensors of the checkpoint.

Seen where every loader ends: in the operations that write to a parameter's memory. Tensors are followed through what a
loader makes of them (slices, casts, concatenations). Nothing of the model or of its loader is replaced.
"""

from __future__ import annotations

import concurrent.futures
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MOST_REFUSED = 24
NO_GPU = re.compile(r"NVIDIA driver|not compiled with CUDA")
Load = Callable[[Iterable[tuple[str, Tensor]]], Any]


class NeedsGPU(NotImplementedError):
    """A loader asks for a kernel that a processor does not have; it says nothing about a tensor."""


class Here(TorchFunctionMode):
    """What asks for a GPU's memory gets this machine's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class Nothing:
    """A stream or an event of a GPU, which loading does not use."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass


class AtOnce(Executor):
    """In place of a pool of threads, of which each would have modes of its own."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def submit(self, fn: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        """Run it now; what it raises is raised here."""
        done: Future[Any] = Future()
        done.set_result(fn(*arguments, **named))
        return done


@contextmanager
def _in_this_thread() -> Iterator[None]:
    pool = concurrent.futures.ThreadPoolExecutor
    concurrent.futures.ThreadPoolExecutor = AtOnce  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        concurrent.futures.ThreadPoolExecutor = pool  # type: ignore[misc]


@dataclass(frozen=True)
class Placed:
    """What a loader did.

    Attributes:
        parameters: how many the model has.
        taken: tensor to the parameters that it reached.
        unfilled: parameter to how many of its elements nothing was written to; of experts, to which of them.
        refused: tensor at which the loader raised, to what it raised.
        unfinished: what the loader raised after the last tensor; None: nothing.
    """

    parameters: int
    taken: dict[str, list[str]]
    unfilled: dict[str, str]
    refused: dict[str, str]
    unfinished: str | None


def place(parameters: Mapping[str, Tensor], load: Load, tensors: Mapping[str, Tensor]) -> Placed:
    """Have ``load`` read ``tensors``.

    Where it raises at one of them, it begins anew without that one; where it asks for a GPU, it goes on with those that
    it has not placed.
    """
    refused: dict[str, str] = {}
    watch, unfinished = Watch(parameters), None
    left = dict(tensors)
    while True:
        try:
            with watch, _in_this_thread():
                load(watch.follow(left))
        except Exception as error:  # a loader raises whatever it likes
            message = f"{type(error).__name__}: {error}"
            gpu = isinstance(error, NeedsGPU) or NO_GPU.search(message) is not None
            culprit = None if gpu else watch.culprit(error)
            if culprit is not None and len(refused) < MOST_REFUSED:
                refused[culprit] = message
                watch, unfinished = Watch(parameters), None
                left = {name: tensor for name, tensor in tensors.items() if name not in refused}
                continue
            unfinished = unfinished or message
            rest = {name: tensor for name, tensor in left.items() if name not in watch.reached}
            if gpu and len(rest) < len(left):
                left = rest
                continue
        return Placed(len(parameters), watch.taken(), watch.unfilled(), refused, unfinished)


class Watch(TorchDispatchMode):
    """Follows tensors of a checkpoint into parameters while it is the current mode of its thread."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.current: str | None = None
        self.last: str | None = None
        self.parameters = dict(parameters)
        self.names: dict[int, list[str]] = defaultdict(list)  # of the parameters in a storage
        self.bytes: dict[int, Tensor] = {}  # of a parameter's storage: whether written
        self.marks: dict[str, Tensor] = {}  # of them, those of the parameter
        for name, parameter in self.parameters.items():
            storage = parameter.untyped_storage()
            self.names[storage.data_ptr()].append(name)
            marks = self.bytes.setdefault(storage.data_ptr(), torch.zeros(storage.nbytes(), dtype=torch.bool))
            if not parameter.is_meta:
                self.marks[name] = _region(marks, parameter)
        self.kept = [parameter.data for parameter in self.parameters.values()]  # so that no address is used again
        self.sources: dict[int, set[str]] = {}  # storage to the tensors that are in it
        self.number: set[str] = set()  # tensors that the last number was read from
        self.reached: dict[str, set[str]] = defaultdict(set)

    def follow(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The tensors as a loader is given them."""
        for name, tensor in tensors.items():
            self.current = self.last = name
            self._taint(tensor, {name})
            yield name, tensor
        self.current = None  # what is raised from here on is about no tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        names = set().union(*(self.sources.get(_key(leaf), ()) for leaf in inputs))
        out = func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            self.number = names  # which a loader may fill a parameter with
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                self._write(value, names)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and names and _key(leaf) not in self.bytes:
                self._taint(leaf, names)
        return out

    def culprit(self, error: BaseException) -> str | None:
        """The tensor that a loader had in hand when it raised: the innermost frame's, else the last one given.

        Where it was given all of them, only a name that it does not know is a sign, and the last tensor is none:
        loaders raise of what lacks when they are through.
        """
        if self.current is None and not isinstance(error, KeyError):
            return None
        frames = []
        trace = error.__traceback__
        while trace is not None:
            frames.append(trace.tb_frame)
            trace = trace.tb_next
        for frame in reversed(frames):
            for value in list(frame.f_locals.values()):
                names = self.sources.get(_key(value), set()) if isinstance(value, Tensor) else set()
                if len(names) == 1 and (self.current is not None or names != {self.last}):
                    return next(iter(names))
        return self.current

    def taken(self) -> dict[str, list[str]]:
        """Tensor to parameters."""
        return {name: sorted(found) for name, found in self.reached.items()}

    def unfilled(self) -> dict[str, str]:
        """Parameter to what of it has no value."""
        out = {}
        for name, parameter in self.parameters.items():
            if parameter.numel() == 0 or parameter.is_meta:
                continue
            key = _key(parameter)
            if key not in self.bytes:  # given another storage
                if self.marks[name].all():  # once it was full: merged with others
                    continue
                for source in self.sources.get(key, ()):
                    self.reached[source].add(name)
                if key not in self.sources:
                    out[name] = "all of it"
                continue
            lacking = ~_region(self.bytes[key], parameter)
            missing = int(lacking.sum()) // parameter.element_size()
            if not missing:
                continue
            out[name] = f"{missing} of {parameter.numel()} elements"
            experts = [str(i) for i, part in enumerate(lacking) if part.any()] if parameter.dim() == 3 else []
            if 0 < len(experts) < len(lacking):
                out[name] += f", in expert {', '.join(experts)}"
        return out

    def _write(self, target: Tensor, names: set[str]) -> None:
        key = _key(target)
        if key not in self.bytes:
            if names:
                self._taint(target, names)
            return
        _region(self.bytes[key], target).fill_(True)
        for name in names or self.number:
            self.reached[name].update(self.names[key])
        self.number = set()

    def _taint(self, tensor: Tensor, names: set[str]) -> None:
        self.sources[_key(tensor)] = self.sources.get(_key(tensor), set()) | names
        self.kept.append(tensor)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _region(marks: Tensor, tensor: Tensor) -> Tensor:
    """The part of a storage's bytes that a tensor covers."""
    size = tensor.element_size()
    strides = [stride * size for stride in tensor.stride()]
    return marks.as_strided((*tensor.shape, size), (*strides, 1), tensor.storage_offset() * size)
