"""SGLang's PyTorch attention, which takes a batch at once where all requests have equally many new tokens.

SGLang's own goes through the requests one by one, and computes verified tokens together with all before them. It still
serves what reads prompts, cross-attention, encoders and pools of sliding windows.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch import Tensor

from fourfold.common.paged_attention import Reach, attend


class BatchAttention(TorchNativeAttnBackend):
    """Decode steps, verified drafts, and prompts of one length whose beginnings are cached."""

    _reach: tuple[Tensor, int | None, Reach] | None = None  # of the last layer: its lengths and window

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        self._reach = None

    def _run_sdpa_forward_extend(
        self,
        query: Tensor,
        output: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        req_to_token: Tensor,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        extend_prefix_lens: Tensor,
        extend_seq_lens: Tensor,
        encoder_lens: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        cache = query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens
        tokens = len(query) // max(len(seq_lens), 1)
        alone = self._is_plain(encoder_lens, options) and options["causal"]
        if alone and bool((extend_seq_lens == tokens).all()) and bool((extend_prefix_lens > 0).all()):
            return self._attend(*cache, tokens, options)
        return super()._run_sdpa_forward_extend(*cache, extend_prefix_lens, extend_seq_lens, encoder_lens, **options)

    def _run_sdpa_forward_decode(
        self,
        query: Tensor,
        output: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        req_to_token: Tensor,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        encoder_lens: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        cache = query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens
        if self._is_plain(encoder_lens, options) and len(seq_lens):
            return self._attend(*cache, 1, options)
        return super()._run_sdpa_forward_decode(*cache, encoder_lens, **options)

    def _is_plain(self, encoder_lens: Tensor | None, options: dict[str, Any]) -> bool:
        return encoder_lens is None and not options["is_cross_attn"] and not self.use_sliding_window_kv_pool

    def _attend(
        self,
        query: Tensor,
        output: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        req_to_token: Tensor,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        tokens: int,
        options: dict[str, Any],
    ) -> Tensor:
        reach = self._seen(req_to_token, req_pool_indices, seq_lens, tokens, options["sliding_window_size"])
        return output.copy_(attend(query, k_cache, v_cache, reach, options["scaling"]))

    def _seen(
        self, req_to_token: Tensor, req_pool_indices: Tensor, seq_lens: Tensor, tokens: int, window: int | None
    ) -> Reach:
        """Layers of one step share it: they are called with the same tensor of lengths."""
        if self._reach is None or self._reach[0] is not seq_lens or self._reach[1] != window:
            slots = req_to_token[:, : int(seq_lens.max())][req_pool_indices]
            self._reach = seq_lens, window, Reach.of(slots, seq_lens, tokens, window)
        return self._reach[2]
