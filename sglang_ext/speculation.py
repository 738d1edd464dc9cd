"""EAGLE speculation on the platform ``fourfold_cpu``: chains (topk 1), drafted and verified in PyTorch.

SGLang's workers stay as they are. What they launch as Triton or compiled kernels is replaced, function by function,
when a worker is asked for, so nothing changes in a process that does not speculate on this platform.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.distributed import parallel_state
from sglang.srt.layers import dp_attention
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.sampler import top_p_normalize_probs_torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor import forward_batch_info
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.speculative import eagle_utils
from torch import Tensor

from fourfold.common.mtp.verify import verify_greedy, verify_tokens
from fourfold.sglang_ext.cpu_attention import BatchAttention
from fourfold.sglang_ext.hooks import install


class ChainAttention(BatchAttention):
    """SGLang's PyTorch attention, which also verifies a chain, or is the ``step``-th decode step of a draft."""

    def __init__(self, runner: Any, step: int | None = None) -> None:
        super().__init__(runner)
        self.step = step
        self._whole: tuple[Any, Any] = (None, None)

    def forward_extend(self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, *args: Any, **kw: Any):
        return super().forward_extend(q, k, v, layer, self._extension(forward_batch), *args, **kw)

    def _extension(self, forward_batch: Any) -> Any:
        """A copy that has all lengths of an extension, the same for each layer of a step."""
        if self._whole[0] is not forward_batch:
            whole = copy.copy(forward_batch)
            if whole.forward_mode.is_target_verify():
                # Such a batch has the committed lengths and none of an extension.
                committed, drafted = whole.seq_lens, whole.spec_info.draft_token_num
                whole.extend_prefix_lens = committed
                whole.extend_seq_lens = torch.full_like(committed, drafted)
            # Not so for the requests that pad a batch to the length of another data-parallel rank's.
            whole.seq_lens = whole.extend_prefix_lens + whole.extend_seq_lens
            self._whole = forward_batch, whole
        return self._whole[1]

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        self._whole = None, None

    def forward_decode(self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, *args: Any, **kw: Any):
        if self.step is not None:
            forward_batch = copy.copy(forward_batch)
            forward_batch.seq_lens = forward_batch.seq_lens + self.step + 1
        return super().forward_decode(q, k, v, layer, forward_batch, *args, **kw)

    def get_cpu_graph_seq_len_fill_value(self) -> int:
        """Length of the requests that pad a batch."""
        return 0


class DraftChain(AttentionBackend):
    """The attention of a draft's decode steps, one backend for each."""

    def __init__(self, runner: Any, steps: int) -> None:
        self.attn_backends = [ChainAttention(runner, step) for step in range(steps)]


class ChainPool(MHATokenToKVPool):
    """SGLang's KV pool, without the kernel that moves the accepted branch of a tree."""

    def _init_kv_copy_and_warmup(self) -> None:
        self._kv_copy_config = None


def decode_backend(factory: Any) -> DraftChain | None:
    if factory.speculative_num_steps <= 1:
        return None
    return DraftChain(factory.draft_model_runner, factory.speculative_num_steps - 1)


def extend_backend(factory: Any) -> None:
    """None: the draft's own backend serves."""


def slots(req_to_token: Tensor, req_pool_indices: Tensor, start: Tensor, count: int) -> Tensor:
    """[requests * count] the cache slots of ``count`` tokens of each request from position ``start`` on."""
    columns = start[:, None] + torch.arange(count)
    return req_to_token[req_pool_indices[:, None].long(), columns.long()].flatten().long()


def extend_slots(
    *, req_pool_indices: Tensor, req_to_token: Tensor, start_offset: Tensor, draft_token_num: int, **_: Any
) -> Tensor:
    return slots(req_to_token, req_pool_indices, start_offset, draft_token_num)


def draft_slots(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    seq_lens: Tensor,
    out_cache_loc: Tensor,
    topk: int,
    num_cols: int,
    positions: Tensor | None = None,
    mrope: Tensor | None = None,
) -> None:
    out_cache_loc.copy_(slots(req_to_token, req_pool_indices, seq_lens, topk * num_cols))


def write_slots(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    batch_size: int,
) -> None:
    """Give request i the next slots of ``out_cache_loc`` for its positions ``start_offset[i]`` to ``end_offset[i]``."""
    parts = out_cache_loc.split((end_offset - start_offset).tolist())
    for row, start, end, part in zip(req_pool_indices, start_offset, end_offset, parts, strict=True):
        req_to_token[row, start:end] = part.to(req_to_token.dtype)


def build_chain(
    parent_list: Tensor,
    top_scores_index: Tensor,
    seq_lens: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    topk: int,
    spec_steps: int,
    num_verify_tokens: int,
    tree_mask_mode: int,
) -> None:
    """Number the tokens of each request's chain: positions, and which follows which. `ChainAttention` needs no mask."""
    places = torch.arange(num_verify_tokens)
    positions.copy_((seq_lens[:, None] + places).flatten())
    retrieve_index.copy_(torch.arange(retrieve_index.numel()).view_as(retrieve_index))
    retrieve_next_token[:, :-1] = places[1:]


def verify_chain(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    target_predict: Tensor,
    topk: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy verification. ``candidates`` [requests, 1 + drafted] begins with the last verified token; int32 alone."""
    verified = verify_greedy(target_predict, candidates[:, 1:].long())
    return _accept(verified.tokens, verified.accepted, predicts, accept_index, accept_token_num, retrieve_index)


def verify_sampled(
    *,
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    uniform_samples: Tensor,
    uniform_samples_for_final_sampling: Tensor,
    target_probs: Tensor,
    **_: Any,
) -> None:
    """Lossless verification of greedy drafts where the target samples."""
    uniforms = torch.cat([uniform_samples[:, 1:], uniform_samples_for_final_sampling[:, None]], 1)
    verified = verify_tokens(target_probs, candidates[:, 1:].long(), None, uniforms)
    _accept(verified.tokens, verified.accepted, predicts, accept_index, accept_token_num, retrive_index)


def top_k_renorm(probs: Tensor, top_ks: Tensor) -> Tensor:
    ranked, index = probs.sort(-1, descending=True)
    ranked = ranked.masked_fill(torch.arange(probs.shape[-1]) >= top_ks[:, None], 0)
    return torch.zeros_like(probs).scatter(-1, index, ranked / ranked.sum(-1, keepdim=True))


def _accept(
    tokens: Tensor, accepted: Tensor, predicts: Tensor, accept_index: Tensor, accept_token_num: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Hand an outcome over as the tree kernels do: the token after each node, the nodes of the accepted path."""
    predicts.copy_(tokens.clamp_min(0).flatten())
    accept_index.copy_(index.masked_fill(tokens < 0, -1))
    accept_token_num.copy_(accepted)
    return predicts, accept_index, accept_token_num


def bonus_tokens(accept_tokens: Tensor, accept_lens: Tensor, out: Tensor, accept_stride: int, batch_size: int) -> None:
    out.copy_(accept_tokens.view(batch_size, accept_stride).gather(1, accept_lens[:, None].long() - 1)[:, 0])


def chain_step(original: Callable[..., Any], step: int, *args: Any) -> Any:
    """Every step of a chain is like the first; SGLang compiles the later ones, which takes half a minute on a CPU."""
    return original(0, *args)


def rotate(
    input_ids: Tensor,
    extend_start_loc: Tensor,
    extend_seq_lens: Tensor,
    topk_index: Tensor,
    select_index: Tensor | None = None,
) -> Tensor:
    """Move each request's tokens one place forward and put its next one at ``select_index``, else last; in place."""
    last = extend_start_loc + extend_seq_lens - 1
    for start, end in zip(extend_start_loc.tolist(), last.tolist(), strict=True):
        input_ids[start:end] = input_ids[start + 1 : end + 1].clone()
    places = last if select_index is None else select_index
    input_ids[places.long()] = topk_index.flatten().to(input_ids.dtype)
    return input_ids


HOOKS: dict[str, Callable[..., Any]] = {
    "sglang.kernels.ops.speculative.cache_locs.assign_draft_cache_locs_contiguous_func": draft_slots,
    "sglang.kernels.ops.speculative.spec_tree.build_tree_kernel_efficient_func": build_chain,
    "sglang.kernels.ops.speculative.spec_tree.verify_tree_greedy_func": verify_chain,
    "sglang.kernels.ops.speculative.eagle.fill_bonus_tokens_func": bonus_tokens,
    "sglang.kernels.ops.speculative.multi_layer_eagle.rotate_input_ids": rotate,
    "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func": write_slots,
    "sglang.srt.speculative.draft_utils.DraftBackendFactory.create_decode_backend": decode_backend,
    "sglang.srt.speculative.draft_utils.DraftBackendFactory.create_draft_extend_backend": extend_backend,
}
AROUND: dict[str, Callable[..., Any]] = {"sglang.srt.speculative.spec_utils.select_top_k_tokens": chain_step}
# None on this platform, so that there is nothing to hook.
FILLED: dict[str, Callable[..., Any]] = {
    "tree_speculative_sampling_target_only": verify_sampled,
    "top_k_renorm_prob": top_k_renorm,
    "top_p_renorm_prob": top_p_normalize_probs_torch,
}


def prepare() -> None:
    """Replace what SGLang launches.

    Raises:
        FourfoldError: as `install`.
    """
    register_attention_backend("torch_native")(ChainAttention)
    install(HOOKS, HookType.REPLACE)
    install(AROUND, HookType.AROUND)
    for name, function in FILLED.items():
        setattr(eagle_utils, name, function)
    # Between data-parallel ranks: SGLang's paths for a CPU, which only one with its compiled kernels counts as.
    dp_attention.memcpy_func = dp_attention.memcpy_cpu
    forward_batch_info._is_cpu = parallel_state._is_cpu = True
