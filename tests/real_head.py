"""SmolLM2 with the head that was trained for it: what both engines are held to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fourfold.common.bench.prompts import PROMPTS
from fourfold.common.demo.model import SMOLLM2_HEAD as HEAD
from fourfold.common.mtp.training import fit
from fourfold.common.mtp.training.head import TrainedHead
from fourfold.common.mtp.training.states import States
from fourfold.common.mtp.training.text import Dialogue

K = 3
NEAR_TIE = 0.5  # nats between two tokens that a kernel's rounding may exchange


def prompts(model: Path) -> list[list[int]]:
    """A hundred prompts as token ids: chat and edits through the template, and the beginnings of the edits' texts.

    Every second edit ends early, too: long prompts cost most of the time, and say little more than the first of them.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    found = []
    for request in PROMPTS["chat"] + PROMPTS["edit"]:
        turns = [{"role": "user", "content": request}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        found.append(tokenizer(text, add_special_tokens=False).input_ids)
    found += [prompt[:40] for prompt in found[-14:]]
    edits = range(len(PROMPTS["chat"]), len(PROMPTS["chat"] + PROMPTS["edit"]))
    for i in edits[::2]:
        found[i] = found[i][:80]
    return found[:100]


def target(model: Path) -> Any:
    """The model in PyTorch, in float32."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return loaded.requires_grad_(False).eval()


@torch.no_grad()
def counted(model: Any, asked: list[list[int]], answers: list[list[int]]) -> list[int]:
    """What PyTorch would accept of the head's drafts for these answers: by position, and the number of steps.

    Args:
        model: the target in float32.
    """
    tensors = load_file(HEAD / "model.safetensors")
    words = next(tensor for name, tensor in tensors.items() if "vocabulary" in name).long()
    head = TrainedHead(model, words)
    head.load(tensors)
    dialogues = [Dialogue(tuple(prompt), tuple(answer)) for prompt, answer in zip(asked, answers, strict=True)]
    states = States(Path(), dialogues, model.config.hidden_size)
    # As the engine has them: a file of states holds BF16, in which a near-tie of two drafts may fall otherwise.
    states._states = torch.cat([model.model(row[None, :-1]).last_hidden_state[0] for row in states.tokens])
    places, counts = fit.word_index(words, model.config.vocab_size), [0] * (K + 1)
    for i, answer in enumerate(answers):
        _, right = fit.chain(head, places, states, [i], K, whole=False)
        counts = [a + b for a, b in zip(counts, fit.accepted(right, [len(answer)]), strict=True)]
    return counts


def assert_counted(found: list[int], expected: list[int], requests: int) -> None:
    """Hold an engine's counts to PyTorch's: at its end, an answer takes fewer tokens than were accepted."""
    print(
        f"accepted by position and steps: {found}, in PyTorch {expected}; length {1 + sum(found[:-1]) / found[-1]:.2f}"
    )
    assert found[-1] == expected[-1] and expected[0] > 0.2 * expected[-1]
    for position, (one, two) in enumerate(zip(found[:-1], expected[:-1], strict=True)):
        assert two <= one <= two + position * requests / 10 + 1


def differing(plain: list[list[int]], speculative: list[list[int]]) -> list[tuple[int, int]]:
    """(request, place) of each first token at which an answer with speculation is another one than without."""
    found = []
    for i, (one, two) in enumerate(zip(plain, speculative, strict=True)):
        place = next((j for j, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)
        if place is not None:
            found.append((i, place))
        else:
            assert len(one) == len(two), f"request {i}: {len(one)} tokens without speculation, {len(two)} with it"
    return found


@torch.no_grad()
def assert_near_ties(model: Any, asked: list[list[int]], plain: list[list[int]], speculative: list[list[int]]) -> int:
    """Show each place where the answers part and hold it to be a near-tie of the float32 model; returns how many."""
    parted = differing(plain, speculative)
    for i, place in parted:
        ids = torch.tensor([asked[i] + plain[i][:place]])
        logprobs = model(ids).logits[0, -1].log_softmax(-1)
        one, two = (float(logprobs[answer[i][place]]) for answer in (plain, speculative))
        print(f"request {i}, token {place}: {plain[i][place]} ({one:.3f}) and {speculative[i][place]} ({two:.3f})")
        assert abs(one - two) < NEAR_TIE and max(one, two) > float(logprobs.max()) - NEAR_TIE
    return len(parted)
