"""Two repairs of speculative sampling on CPUs. Greedy decoding, and decoding without speculation, need neither.

vLLM's ``expand`` kernel for CPUs computes into a copy and drops it: temperature, top-k and top-p of the tokens to
verify come from uninitialised memory, and sampled output does not follow the target (vLLM issue 55005). And its top-k
for CPUs fails on no rows, which a step that verifies nothing has, as the first of a request: the engine ends.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.platforms import current_platform


def expand(
    output: Tensor,
    input_val: Tensor,
    cu_num_tokens: Tensor,
    replace_from: Any,
    replace_to: Any,
    MAX_NUM_TOKENS: int = 0,
) -> None:
    """Repeat each request's value for each of its tokens.

    Args:
        output: [T], written.
        input_val: [B], of the same dtype.
        cu_num_tokens: [B] integer, tokens of the requests up to and including each.
        replace_from: value that becomes ``replace_to``.
        MAX_NUM_TOKENS: of the Triton kernel; unused.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    value = torch.where(input_val == replace_from, replace_to, input_val)
    output.copy_(torch.repeat_interleave(value, counts))


def repair() -> None:
    """Put both where vLLM's CPU code looks them up, and shorten greedy verification (`cpu_greedy`).

    Not by ``register_kernels``: each worker registers the platform's kernels after it has loaded the plugins.
    """
    if not current_platform.is_cpu():
        return
    from vllm.utils import cpu_triton_utils
    from vllm.v1.sample.ops import topk_topp_sampler

    from fourfold.vllm_ext.cpu_greedy import shorten

    stock = topk_topp_sampler.apply_top_k_only

    def apply_top_k_only(logits: Tensor, k: Tensor) -> Tensor:
        return stock(logits, k) if len(logits) else logits

    cpu_triton_utils._expand_kernel_impl = expand
    topk_topp_sampler.apply_top_k_only = apply_top_k_only
    shorten()
