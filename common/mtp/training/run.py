"""A training run in a folder beside its result: text, the target's states, a head, each kept so that a run resumes.

The result is a directory with the head alone, in DeepSeek-V3's layout, as ``fourfold mtp inspect`` and ``extract`` read
it. It appears under its name when it is complete.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fourfold.common.bench.machine import multiplies_bf16
from fourfold.common.errors import FourfoldError
from fourfold.common.mtp.training import text
from fourfold.common.mtp.training.head import TrainedHead
from fourfold.common.mtp.training.states import States
from fourfold.common.mtp.training.text import Dialogue
from fourfold.common.tensor_index import read_json

HELD_OUT = 16  # one dialogue of so many is not trained on
REPORT = "training.json"


@dataclass(frozen=True)
class Options:
    """What makes two runs the same.

    Attributes:
        model: directory of the target.
        text: file of dialogues to use instead of the model's own, or an empty string.
        tokens: of answers that the model writes.
        answer_tokens: longest answer.
        vocabulary: words that the head drafts.
        steps: tokens that it learns to draft.
        single_epochs: passes over the text in which it learns the first of them alone.
        epochs: passes after these.
        begin: head to begin from, or an empty string.
    """

    model: str
    text: str
    tokens: int
    answer_tokens: int
    vocabulary: int
    steps: int
    single_epochs: int
    epochs: int
    begin: str


class Run:
    """The folder of a run.

    Raises:
        FourfoldError: ``out`` exists, or the folder is that of a run with other options.
    """

    def __init__(self, out: Path, options: Options) -> None:
        if out.exists():
            raise FourfoldError(f"{out} exists; give a directory that does not exist yet")
        self.out, self.options = out, options
        self.folder = out.with_name(f".{out.name}.training")
        told = self.folder / "options.json"
        if told.exists():
            before = read_json(told)
            wrong = {key: value for key, value in asdict(options).items() if before.get(key) != value}
            if wrong:
                key, value = next(iter(wrong.items()))
                raise FourfoldError(
                    f"{self.folder} is of a run with {key} = {before.get(key)!r}, not {value!r}; repeat its options, "
                    "or remove it"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        told.write_text(json.dumps(asdict(options)))

    @property
    def text(self) -> Path:
        return Path(self.options.text) if self.options.text else self.folder / "text.jsonl"

    def dialogues(self) -> tuple[list[Dialogue], list[int], list[int]]:
        """The dialogues, and the numbers of those to train on and of those held out.

        Raises:
            FourfoldError: there are too few.
        """
        found = [dialogue for dialogue in text.read(self.text) if len(dialogue.answer) > 1 and dialogue.prompt]
        if len(found) < 2 * HELD_OUT:
            raise FourfoldError(f"{self.text} has {len(found)} dialogues; training needs {2 * HELD_OUT} or more")
        held = [i for i in range(len(found)) if i % HELD_OUT == HELD_OUT - 1]
        return found, [i for i in range(len(found)) if i % HELD_OUT != HELD_OUT - 1], held

    def states(self, dialogues: Sequence[Dialogue], hidden: int) -> States:
        return States(self.folder / "states.bin", dialogues, hidden)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "head.pt"

    def write(self, head: TrainedHead, report: Mapping[str, Any]) -> None:
        """Write the result and remove the folder's large files."""
        from safetensors.torch import save

        config = read_json(Path(self.options.model) / "config.json") | {"num_nextn_predict_layers": 1}
        part = self.folder / "result"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        data = save({n: t.cpu() for n, t in head.tensors().items()}, {"format": "pt"})
        (part / "model.safetensors").write_bytes(data)  # with the permissions of a new file
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (part / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        part.rename(self.out)
        shutil.rmtree(self.folder)


def frequent(dialogues: Sequence[Dialogue], count: int) -> tuple[torch.Tensor, float]:
    """The ``count`` most frequent words, in order of their ids, and the share of the answers that they make."""
    counted = Counter(token for dialogue in dialogues for token in dialogue.answer)
    known = counted + Counter(token for dialogue in dialogues for token in dialogue.prompt)
    chosen = sorted(known, key=lambda word: (-known[word], word))[:count]
    return torch.tensor(sorted(chosen)), sum(counted[word] for word in chosen) / counted.total()


def load_target(model: Path) -> Any:
    """The target in BF16, on a GPU where there is one; in FP32 on a processor that is slow with BF16.

    Raises:
        FourfoldError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if torch.cuda.is_available() or multiplies_bf16() else torch.float32
    try:
        target: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise FourfoldError(f"{model} cannot be loaded by transformers: {error}") from None
    return target.requires_grad_(False).eval().to("cuda" if torch.cuda.is_available() else "cpu")


def report(
    options: Options, dialogues: Sequence[Dialogue], coverage: float, acceptance: Sequence[float]
) -> dict[str, Any]:
    """What is worth knowing about a head, `REPORT`."""
    return {
        "model": Path(options.model).name,
        "dialogues": len(dialogues),
        "answer_tokens": sum(len(dialogue.answer) for dialogue in dialogues),
        "single_epochs": options.single_epochs,
        "epochs": options.epochs,
        "begun_from": options.begin and read_json(Path(options.begin) / REPORT),
        "draft_vocabulary": options.vocabulary,
        "draft_vocabulary_share": round(coverage, 4),
        "held_out_acceptance_by_position": [round(share, 4) for share in acceptance[:-1]],
        "held_out_mean_acceptance_length": round(acceptance[-1], 3),
    }
