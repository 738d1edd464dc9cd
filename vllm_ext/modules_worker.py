"""``--worker-cls fourfold.vllm_ext.modules_worker.ModulesWorker``: each drafted token by its own module of an MTP head.

For vLLM's V1 model runner, the one of CPUs, which drafts all tokens with the first module; the V2 runner needs no
worker for it. A step runs every module once, over the tokens that it verified, on the states of the module before. The
last positions of a run read tokens that were drafted, and the module's KV cache keeps them where they were rejected.

    vllm serve MODEL --worker-cls fourfold.vllm_ext.modules_worker.ModulesWorker
        --speculative-config '{"method": "mtp", "model": DRAFT_DIRECTORY, "num_speculative_tokens": 2}'
"""

from __future__ import annotations

from typing import Any

from fourfold.vllm_ext.platform_worker import Worker  # the first of vLLM

# isort: split

import torch
from torch import Tensor
from vllm.v1.spec_decode.eagle import EagleProposer

from fourfold.common.errors import FourfoldError
from fourfold.common.mtp.engines import ARCHITECTURE


class ModulesProposer(EagleProposer):
    """vLLM's drafter, which drafts one token with each module."""

    _states: Tensor  # what the last run of a module returned, of all tokens

    def load_model(self, target_model: Any) -> None:
        super().load_model(target_model)
        self.model.register_forward_hook(self._keep)

    def _keep(self, model: Any, inputs: Any, states: Tensor) -> None:
        self._states = states

    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: Tensor,
        target_positions: Tensor,
        target_hidden_states: Tensor,
        next_token_ids: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """[requests, num_speculative_tokens]; modules of tokens that are not asked for run too, for their caches."""
        head: Any = self.model
        drafts, probs = [], []
        tokens, states, follow = target_token_ids, target_hidden_states, next_token_ids
        for step in range(head.count):
            head.step = step
            draft = super().propose(1, tokens, target_positions, states, follow, *args, **kwargs)
            drafts.append(draft)
            probs.append(self._last_draft_probs)
            # vLLM moves the tokens on by one, and puts these at the ends of the requests.
            tokens, states = self.input_ids[: len(tokens)].clone(), self._states[: len(tokens)]
            follow = draft[:, 0].to(follow.dtype)
        head.step, self.num_speculative_tokens = 0, num_speculative_tokens
        self._last_draft_probs = None
        if probs[0] is not None:
            self._last_draft_probs = torch.cat(probs, 1)[:, :num_speculative_tokens].contiguous()
        return torch.cat(drafts, 1)[:, :num_speculative_tokens].contiguous()


class ModulesWorker(Worker):
    """The platform's worker, with `ModulesProposer`."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        _check(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)

    def init_device(self) -> None:
        super().init_device()
        runner = self.model_runner
        if hasattr(runner, "drafter"):  # the last pipeline stage drafts
            runner.drafter = ModulesProposer(runner.vllm_config, runner.device, runner)


def _check(vllm_config: Any) -> None:
    if vllm_config.use_v2_model_runner:
        raise FourfoldError("ModulesWorker: the V2 model runner uses all modules itself; leave out --worker-cls")
    speculative = vllm_config.speculative_config
    draft = getattr(speculative, "draft_model_config", None)
    if draft is None or draft.architecture != ARCHITECTURE:
        raise FourfoldError(
            "ModulesWorker needs a draft directory: `fourfold mtp extract` writes one; pass it as model of "
            "--speculative-config"
        )
    count, asked = draft.hf_config.num_nextn_predict_layers, speculative.num_speculative_tokens
    if asked > count:
        raise FourfoldError(f"ModulesWorker: num_speculative_tokens {asked}: expected at most the {count} modules")
