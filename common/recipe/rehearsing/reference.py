"""The replica's probabilities by transformers, on which a replica's text alone would say little.

Its next token hardly depends on attention and experts, the probabilities of all others do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

WITHIN = 0.01  # nats, in float32; a layer left out or attention to a wrong token moves them by more


def reference(model: Path, given: list[str], continued: list[str]) -> list[Tensor]:
    """Log-probabilities, float32 ``[tokens, vocabulary]``, at every token of each continuation."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    computed = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    out = []
    with torch.no_grad():
        for text, more in zip(given, continued, strict=True):
            ids = torch.tensor([[ord(letter) - 0x100 for letter in text + more]])
            logits = computed(ids, use_cache=False).logits[0, len(text) - 1 : -1]
            out.append(logits.float().log_softmax(-1))
    return out


def furthest(steps: list[list[dict[int, float]]], expected: list[Tensor]) -> float:
    """The largest difference in nats of a server's log-probabilities from the expected ones; infinite: some lack."""
    most = 0.0
    for found, wanted in zip(steps, expected, strict=True):
        if len(found) != len(wanted):
            return float("inf")
        for top, row in zip(found, wanted.tolist(), strict=True):
            if not top:
                return float("inf")
            most = max(most, *(abs(value - row[token]) for token, value in top.items()))
    return most
