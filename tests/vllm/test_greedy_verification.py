"""Greedy verification on a CPU: tokens equal to those of vLLM's own rejection sampler, on its classes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.platforms import current_platform
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import LogitBiasLogitsProcessor, MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from fourfold.vllm_ext import cpu_greedy
from fourfold.vllm_ext.cpu_sampling import repair

WORDS = 5000
CPU = torch.device("cpu")


def metadata_of(drafts: list[list[int]]) -> SpecDecodeMetadata:
    """With the rows of logits as the model runner lays them: those of a request together."""
    found = SpecDecodeMetadata.make_dummy(drafts, CPU)
    ends = found.cu_num_sampled_tokens
    found.bonus_logits_indices = ends - 1
    rows = torch.arange(int(ends[-1]), dtype=torch.int32)
    found.target_logits_indices = rows[~torch.isin(rows, found.bonus_logits_indices)]
    return found


def sampling(drafts: list[list[int]], *processors: Any) -> SamplingMetadata:
    none = torch.zeros(batch := len(drafts))
    idle = (MinTokensLogitsProcessor(_config(), CPU, False), LogitBiasLogitsProcessor(None, CPU, False))
    return SamplingMetadata(
        temperature=None,
        all_greedy=True,
        all_random=False,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=none,
        presence_penalties=none,
        repetition_penalties=none + 1,
        output_token_ids=[[] for _ in range(batch)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(processors or idle),
        spec_token_ids=drafts,
    )


def _config() -> Any:
    from vllm.config import VllmConfig

    return VllmConfig()


def drawn(seed: int, dtype: torch.dtype) -> tuple[list[list[int]], torch.Tensor]:
    """Drafts of different length that are right for a while, and logits."""
    generator = torch.Generator().manual_seed(seed)

    def number(most: int) -> int:
        return int(torch.randint(most + 1, (), generator=generator))

    counts = [3] * number(4) or [number(4) for _ in range(1 + number(5))]
    logits = torch.randn(sum(counts) + len(counts), WORDS, generator=generator).to(dtype)
    drafts, row = [], 0
    for count in counts:
        best = logits[row : row + count].argmax(-1).tolist()
        drafts.append([token if number(3) else number(WORDS - 1) for token in best])
        row += count + 1
    return drafts, logits


@pytest.fixture(scope="module")
def sampler() -> RejectionSampler:
    repair()
    current_platform.register_triton_kernel_overrides()  # as a worker does, after its plugins
    return RejectionSampler(Sampler())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tokens_are_those_of_vllm(sampler: RejectionSampler, dtype: torch.dtype) -> None:
    stock = RejectionSampler.forward.__wrapped__  # type: ignore[attr-defined]
    lengths = set()
    for seed in range(60):
        drafts, logits = drawn(seed, dtype)
        metadata, chosen = metadata_of(drafts), sampling(drafts)
        assert cpu_greedy.plain(sampler, chosen)
        expected = stock(sampler, metadata, None, logits.clone(), chosen).sampled_token_ids
        found = sampler(metadata, None, logits.clone(), chosen).sampled_token_ids
        assert found.dtype == expected.dtype
        assert found.tolist() == expected.tolist()
        lengths |= set((found >= 0).sum(1).tolist())
    assert lengths == {1, 2, 3, 4, 5}  # none accepted up to all


def changed(name: str, drafts: list[list[int]], best: int) -> SamplingMetadata:
    """Sampling under which ``best`` must not be chosen, or logprobs are wanted."""
    batch = len(drafts)
    chosen = sampling(drafts)
    if name == "bad_words":
        return replace(chosen, bad_words_token_ids={0: [[best]]})
    if name == "allowed":
        return replace(chosen, allowed_token_ids_mask=(torch.arange(WORDS) == best).expand(batch, WORDS))
    if name == "penalties":
        prompts = torch.full((batch, 1), best)
        penalty = torch.full((batch,), 4.0)
        return replace(chosen, no_penalties=False, prompt_token_ids=prompts, repetition_penalties=penalty)
    if name == "min_tokens":
        processor: Any = MinTokensLogitsProcessor(_config(), CPU, False)
        params = SamplingParams(min_tokens=9, stop_token_ids=[best])
    else:
        processor = LogitBiasLogitsProcessor(None, CPU, False)
        params = SamplingParams(logit_bias={best: -100})
    processor.update_state(BatchUpdate(batch, [], [(i, params, None, []) for i in range(batch)], []))
    return sampling(drafts, processor)


@pytest.mark.parametrize("name", ["bad_words", "allowed", "penalties", "min_tokens", "logit_bias"])
def test_what_changes_logits_is_left_to_vllm(sampler: RejectionSampler, name: str) -> None:
    stock = RejectionSampler.forward.__wrapped__  # type: ignore[attr-defined]
    drafts, logits = [[7, 8]], torch.randn(3, WORDS)
    logits[:, 7] = 9
    metadata, chosen = metadata_of(drafts), changed(name, drafts, 7)
    assert not cpu_greedy.plain(sampler, chosen)
    found = sampler(metadata, None, logits.clone(), chosen).sampled_token_ids
    assert found.tolist() == stock(sampler, metadata, None, logits.clone(), chosen).sampled_token_ids.tolist()
    if name != "logit_bias":  # which vLLM does not apply to drafted tokens
        assert found.tolist()[0][0] != 7


def test_logprobs_are_left_to_vllm(sampler: RejectionSampler) -> None:
    drafts, logits = [[7, 8]], torch.randn(3, WORDS)
    chosen = replace(sampling(drafts), max_num_logprobs=1)
    output = sampler(metadata_of(drafts), None, logits, chosen)
    assert output.logprobs_tensors is not None
