"""How far a quantised model is from the same model unquantised, on fixed tokens of text with a known licence.

The text is that of Python's own ``pydoc_data.topics`` (PSF licence): topics in even places calibrate in-domain, those
in odd places are evaluated. The other domain is the text of the Apache licence.
"""

from __future__ import annotations

import math
from importlib import metadata
from typing import TYPE_CHECKING, Any, Protocol

from fourfold.common.errors import FourfoldError

if TYPE_CHECKING:
    from torch import Tensor, nn

CHUNK = 128  # positions whose logits are held at once


def texts() -> dict[str, str]:
    """The texts: ``eval``, ``same`` (domain) and ``other`` (domain).

    Raises:
        FourfoldError: the installed distribution carries no licence file.
    """
    from pydoc_data import topics

    ordered = [topics.topics[name] for name in sorted(topics.topics)]
    for file in metadata.files("fourfold") or []:
        if file.name == "LICENSE":
            licence = file.read_text()
            return {"eval": "\n".join(ordered[1::2]), "same": "\n".join(ordered[0::2]), "other": licence}
    raise FourfoldError("the installed fourfold has no LICENSE file; install it again")


def sequences(tokenizer: Any, text: str, tokens: int, length: int, first: int | None) -> Tensor:
    """Cut ``text`` into sequences: int64 ``[S, length]``, at most ``tokens`` in all, each beginning with ``first``."""
    import torch

    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    body = length - (first is not None)
    count = min(tokens // length, len(ids) // body)
    if count == 0:
        raise FourfoldError(f"the text has {len(ids)} tokens, fewer than one sequence of {body}")
    rows = ids[: count * body].view(count, body)
    if first is not None:
        rows = torch.cat([torch.full((count, 1), first), rows], dim=1)
    return rows


class Evaluation(Protocol):
    """Compares variants of one model with itself unquantised.

    Attributes:
        tokens: int64 ``[S, L]``.
    """

    tokens: Tensor

    def layers(self) -> dict[str, nn.Linear]:
        """The linear layers to quantise, by name."""
        ...

    def measure(self) -> dict[str, float]:
        """The metrics of the model as it is now; the first is what quantisation raises."""
        ...


class LanguageModel:
    """Perplexity, mean KL(unquantised || this) in nats, and top-1 agreement.

    Args:
        model: a transformers causal language model in float32; its head is shared by all variants.
        tokens: int64 ``[S, L]``.
    """

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self.model, self.tokens = model, tokens
        self.base = self._hidden()

    def layers(self) -> dict[str, nn.Linear]:
        """All but the head, as `fourfold quantize` does."""
        from torch import nn

        head = self.model.get_output_embeddings()
        return {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and m is not head}

    def _hidden(self) -> list[Tensor]:
        import torch

        with torch.inference_mode():
            return [self.model.base_model(row[None]).last_hidden_state[0, :-1] for row in self.tokens]

    def _log_probs(self, hidden: Tensor) -> Tensor:
        import torch

        logits = self.model.get_output_embeddings()(hidden).float()
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        if cap:
            logits = torch.tanh(logits / cap) * cap
        return logits.log_softmax(-1)

    def measure(self) -> dict[str, float]:
        import torch

        nll = kl = agree = 0.0
        count = 0
        for row, base, hidden in zip(self.tokens, self.base, self._hidden(), strict=True):
            for start in range(0, len(hidden), CHUNK):
                part = slice(start, start + CHUNK)
                with torch.inference_mode():
                    p, q = self._log_probs(base[part]), self._log_probs(hidden[part])
                    target = row[1:][part, None]
                    nll -= float(q.gather(1, target).sum(dtype=torch.float64))
                    kl += float((p.exp() * (p - q)).sum(dtype=torch.float64))
                    agree += int((p.argmax(-1) == q.argmax(-1)).sum())
                    count += len(target)
        return {"perplexity": math.exp(nll / count), "KL": kl / count, "top-1": agree / count}


class SentenceEncoder:
    """Distance of sentence embeddings (mean over positions): the mean of ``1 - cosine`` to the unquantised ones.

    Args:
        model: a transformers encoder in float32.
        tokens: int64 ``[S, L]``, a sentence a row.
    """

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self.model, self.tokens = model, tokens
        self.base = self._embeddings()

    def layers(self) -> dict[str, nn.Linear]:
        from torch import nn

        return {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and "pooler" not in n}

    def _embeddings(self) -> Tensor:
        import torch

        with torch.inference_mode():
            return torch.cat([self.model(row[None]).last_hidden_state.mean(1) for row in self.tokens])

    def measure(self) -> dict[str, float]:
        import torch

        return {"1 - cosine": float(1 - torch.cosine_similarity(self._embeddings(), self.base).mean())}
