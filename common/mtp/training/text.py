"""Text to train a head on: dialogues that the model writes itself, as a server of the installed engine.

The model also writes the user's side: a chat model goes on after its own template's opening of a user turn (Magpie,
arXiv 2406.08464), in two of three requests after one of `OPENINGS`: left alone, a small model asks few kinds of
question. Requests are sampled, answers are greedy, because greedy answers are what a head is measured on. A model
without a chat template goes on after its first token. Dialogues are appended to a file one a line, so that a run which
was stopped goes on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fourfold.common.errors import FourfoldError
from fourfold.common.serving import EngineServer

REQUEST_TOKENS = 160
PLAIN_TOKENS = 16
ROUND = 6  # requests in a row for each dialogue in flight
TEMPERATURE = 0.9  # of requests
OPENED = 2 / 3  # share of them that go on from one of OPENINGS
OPENINGS = tuple(  # how people begin requests
    f"{verb} {rest}".strip()
    for verb, rests in {
        "What": "is|are|is the difference between|should I|does|would happen if|are the main|makes a good",
        "How": "do I|does|can I|do you|is|many|should a beginner|would you",
        "Why": "do|is|are|does|should",
        "Explain": "|how|why|the|the difference between|in simple words what",
        "Write": "a|a short|a polite email|a story about|a poem about|a Python function that|a letter|an advertisement",
        "Give": "me|me three|me an example of|five tips for|an overview of",
        "Describe": "|a|the|how",
        "Tell": "me about|me how|me a short story about",
        "Summarize": "the|this text:|the main points of",
        "Can you": "help me|explain|write|recommend|tell me",
        "I": "want to|need|have a|am trying to|would like",
        "List": "|the|some|three",
        "Translate": "the following sentence into|this into",
        "Suggest": "a|some|a name for",
        "Compare": "|the",
        "Correct": "the following text:|this sentence:",
        "Rewrite": "this paragraph:|the following code with",
        "Create": "a|a plan for|a list of|a table of",
        "Who": "is|was|invented",
        "When": "did|should I|was",
        "Where": "can I|is|do",
        "Which": "|is better:|of these",
        "Is": "it|there a|the",
        "Plan": "a",
        "Help": "me",
        "Please": "",
        "Convert": "",
        "Solve": "",
        "Hello": "",
    }.items()
    for rest in rests.split("|")
)
_MARK = "\ue000"  # a private character, to find a turn's place in the template


@dataclass(frozen=True)
class Dialogue:
    """Token ids: what the model was given, and what it answered, with its end token unless it was cut."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class Writer:
    """What to ask the server for, by the model's tokenizer.

    Args:
        tokenizer: transformers' tokenizer of the model.
        answer_tokens: longest answer.
    """

    def __init__(self, tokenizer: Any, answer_tokens: int) -> None:
        self.tokenizer, self.answer_tokens = tokenizer, answer_tokens
        self.end: int = tokenizer.eos_token_id
        self.opening: list[int] | None = None
        if tokenizer.chat_template:
            before, found, after = self._template(_MARK, False).partition(_MARK)
            if not found or not after:
                raise FourfoldError("the chat template does not show the user's text; give text with --text")
            self.opening = self._encode(before)

    def _template(self, request: str, answer: bool) -> str:
        turns = [{"role": "user", "content": request}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def prompt(self, request: str) -> list[int]:
        """The tokens before the answer to ``request``."""
        return self._encode(self._template(request, True)) if self.opening is not None else self._encode(request)

    def request(self, server: EngineServer) -> tuple[int, ...] | None:
        """The tokens before an answer; None where the model wrote no request that ends."""
        if self.opening is None:
            start = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.end
            return (start, *complete(server, [start], PLAIN_TOKENS, TEMPERATURE))
        begun = random.choice(OPENINGS) if random.random() < OPENED else ""
        request = complete(server, self.opening + self._encode(begun), REQUEST_TOKENS, TEMPERATURE)
        text = (begun + self.tokenizer.decode(request, skip_special_tokens=True)).strip()
        return tuple(self.prompt(text)) if text and request[-1] == self.end else None

    def answer(self, server: EngineServer, prompt: tuple[int, ...]) -> Dialogue:
        """The greedy answer to ``prompt``."""
        return Dialogue(prompt, tuple(complete(server, prompt, self.answer_tokens, 0.0)))


def complete(server: EngineServer, prompt: Sequence[int], tokens: int, temperature: float) -> list[int]:
    """The tokens that the server's model writes after ``prompt``, with the end token if it came to one."""
    if server.engine == "sglang":
        sampling = {"max_new_tokens": tokens, "temperature": temperature}
        return server.post("/generate", {"input_ids": list(prompt), "sampling_params": sampling})["output_ids"]
    body = {"model": server.model, "prompt": list(prompt), "max_tokens": tokens, "return_token_ids": True}
    body["temperature"] = temperature
    return server.post("/v1/completions", body)["choices"][0]["token_ids"]


def read(path: Path) -> list[Dialogue]:
    """The dialogues of a file; a last line that was cut off is not one.

    Raises:
        FourfoldError: the file cannot be read, or a line is no dialogue; names it.
    """
    found = []
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise FourfoldError(f"{path} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            data = json.loads(line)
            prompt, answer = (tuple(data[key]) for key in ("prompt", "answer"))
            if not all(type(token) is int for token in prompt + answer):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            expected = '{"prompt": [token ids], "answer": [token ids]}'
            raise FourfoldError(f"{path}, line {number}: expected {expected}, found {line[:60]!r}") from None
        found.append(Dialogue(prompt, answer))
    return found


def generate(
    path: Path,
    server: EngineServer,
    writer: Writer,
    tokens: int,
    concurrent: int,
    tick: Callable[[int, int], None] = lambda answered, dialogues: None,
) -> None:
    """Append dialogues to ``path`` until their answers have ``tokens`` tokens.

    Args:
        concurrent: dialogues in flight. Requests and answers take turns: one sampled request makes an engine sample the
            whole batch, which costs more than the model does where that is small.
        tick: called with the answered tokens and the dialogues so far.

    Raises:
        FourfoldError: the model writes no new requests, or the server fails.
    """
    known = read(path) if path.exists() else []
    answered, prompts = sum(len(d.answer) for d in known), {d.prompt for d in known}
    with path.open("rb+" if path.exists() else "wb+") as out, ThreadPoolExecutor(concurrent) as pool:
        out.truncate(out.read().rfind(b"\n") + 1)  # a line that was cut off would swallow the next one
        out.seek(0, 2)
        tick(answered, len(known))
        dialogues = len(known)
        while answered < tokens:
            requests = pool.map(lambda _: writer.request(server), range(ROUND * concurrent))
            fresh = {request for request in requests if request is not None} - prompts
            if not fresh:
                raise FourfoldError(
                    f"{server.model} wrote no new request in {ROUND * concurrent}; give text with --text"
                )
            prompts |= fresh
            answers = [pool.submit(writer.answer, server, prompt) for prompt in fresh]
            try:
                for future in as_completed(answers):
                    dialogue = future.result()
                    out.write(json.dumps(asdict(dialogue)).encode() + b"\n")
                    out.flush()
                    answered, dialogues = answered + len(dialogue.answer), dialogues + 1
                    tick(answered, dialogues)
            except BaseException:  # whoever interrupts a run shall not wait for what was not begun
                pool.shutdown(wait=False, cancel_futures=True)
                raise
