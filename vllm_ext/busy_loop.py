"""Room on the data stack (`fourfold.common.data_stack`) below the loops in which vLLM's processes run all their steps.

A step of a model of 30 layers calls a function hundreds of times at the depth of its operators. Where that depth is at
a boundary of the data stack depends on the model, on options such as ``--worker-cls``, and on the version of vLLM.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from fourfold.common.data_stack import roomy
from fourfold.vllm_ext.when_imported import when_imported

_LOOPS = {
    "vllm.v1.engine.core": ("EngineCoreProc.run_busy_loop", "DPEngineCoreProc.run_busy_loop"),
    "vllm.v1.executor.multiproc_executor": ("WorkerProc.worker_busy_loop",),
}


def widen() -> None:
    """Wrap the loops of this process and of those it forks, called once."""
    for module, names in _LOOPS.items():
        when_imported(module, partial(_wrap, names))


def _wrap(names: tuple[str, ...], module: Any) -> None:
    for name in names:
        owner, _, method = name.partition(".")
        kind = getattr(module, owner)
        setattr(kind, method, roomy(vars(kind)[method]))
