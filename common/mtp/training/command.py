"""``fourfold mtp train``."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fourfold.common.mtp.training.run import Run


def train(
    model: Annotated[Path, typer.Argument(help="Directory of the model to train a head for.")],
    out: Annotated[Path, typer.Argument(help="Directory to create, with the head alone.")],
    tokens: Annotated[int, typer.Option(min=1000, help="Tokens of answers that the model writes to be trained on.")] = (
        300_000
    ),
    single_epochs: Annotated[int, typer.Option(min=0, help="Passes over the text to learn the next token alone.")] = 6,
    epochs: Annotated[int, typer.Option(min=1, help="Passes after these, to learn all tokens of a draft.")] = 2,
    steps: Annotated[
        int, typer.Option(min=1, max=8, help="Tokens that the head learns to draft, one after another.")
    ] = 3,
    vocabulary: Annotated[int, typer.Option(min=2, help="Words that the head drafts: the most frequent ones.")] = 8192,
    answer_tokens: Annotated[int, typer.Option(min=8, help="Longest answer.")] = 320,
    concurrent: Annotated[int, typer.Option(min=1, help="Dialogues that the engine writes at once.")] = 64,
    text: Annotated[
        Path | None, typer.Option(help="Train on this instead: JSON lines with lists of token ids, prompt and answer.")
    ] = None,
    begin: Annotated[Path | None, typer.Option(help="Go on from this head, which an earlier run wrote.")] = None,
) -> None:
    """Train an MTP head on text that the model writes itself, served by the engine of this environment.

    One module in DeepSeek-V3's form, used again for each further token. Hours on a CPU, minutes on a GPU. A run that
    was stopped goes on when the command is repeated; what it keeps lies in .OUT.training beside OUT.
    """
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from safetensors.torch import load_file

    from fourfold.common.mtp.training import fit
    from fourfold.common.mtp.training.head import TrainedHead
    from fourfold.common.mtp.training.run import Options, Run, frequent, load_target, report

    given = (str(path.resolve()) if path else "" for path in (text, begin))
    passes = (steps, single_epochs, epochs)
    options = Options(str(model.resolve()), next(given), tokens, answer_tokens, vocabulary, *passes, next(given))
    run = Run(out, options)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        if text is None:
            task = progress.add_task("text", total=tokens, note="starting the engine")
            _write_text(
                run,
                concurrent,
                lambda answered, dialogues: progress.update(
                    task, completed=answered, note=f"{answered} tokens, {dialogues} dialogues"
                ),
            )
        dialogues, training, held_out = run.dialogues()
        words, coverage = frequent(dialogues, vocabulary)
        target = load_target(model)
        states = run.states(dialogues, target.config.hidden_size)
        if not states.complete:
            task = progress.add_task("states", total=None, note="")
            states.compute(
                target, lambda done, all: progress.update(task, completed=done, total=all, note=f"{done} of {all}")
            )
        states.load()
        torch.manual_seed(0)
        head = TrainedHead(target, words.to(target.device))
        if begin:
            head.load(load_file(begin / "model.safetensors"))
        count = target.config.vocab_size
        del target
        task = progress.add_task("head", total=None, note="")

        def tick(done: int, all: int, loss: float, right: list[float]) -> None:
            shares = " ".join(f"{share:.3f}" for share in right)
            progress.update(task, completed=done, total=all, note=f"loss {loss:.3f}, right by position {shares}")
            if done % (all // (single_epochs + epochs)) == 0 and done < all:
                console.print(f"{done} of {all} batches: {_told(acceptance())}")

        def acceptance() -> list[float]:
            return fit.evaluate(head, fit.word_index(words, count), states, held_out, steps)

        plan = fit.Plan(*passes)
        fit.fit(head, states, training, plan, count, run.checkpoint, tick)
        found = acceptance()
    run.write(head, report(options, dialogues, coverage, found))
    typer.echo(f"wrote {out}: {sum(p.numel() for p in head.parameters()) / 1e6:.1f} million parameters")
    typer.echo(f"the {vocabulary} drafted words make {coverage:.1%} of the text; {_told(found)}")
    typer.echo(f"next: fourfold mtp extract {out} DRAFT --engine vllm (or sglang)")


def _write_text(run: Run, concurrent: int, tick: Callable[[int, int], None]) -> None:
    """Have the engine write what is missing of the run's text."""
    import torch
    from transformers import AutoTokenizer

    from fourfold.common.mtp.training.text import REQUEST_TOKENS, Writer, generate, read
    from fourfold.common.serving import EngineServer, installed_engine, termination_raises

    options = run.options
    written = read(run.text) if run.text.exists() else []
    if sum(len(dialogue.answer) for dialogue in written) >= options.tokens:
        return
    writer = Writer(AutoTokenizer.from_pretrained(options.model), options.answer_tokens)
    longest = str(2 * REQUEST_TOKENS + options.answer_tokens + len(writer.opening or ()))
    engine, _ = installed_engine()
    if engine == "vllm":  # a seed of its own, or a resumed run would sample the same requests
        args = ["--max-model-len", longest, "--max-num-seqs", str(concurrent), "--seed", str(len(written))]
    else:
        args = ["--context-length", longest, "--max-running-requests", str(concurrent)]
        args += ["--random-seed", str(len(written) + 1)]
    env = {"VLLM_CPU_KVCACHE_SPACE": "4"}
    log, gpu = run.folder / "engine.log", torch.cuda.is_available()
    server = EngineServer(engine, options.model, log, ["--dtype", "bfloat16", *args], env, cpu=not gpu)
    with termination_raises(SystemExit(128 + signal.SIGTERM)), server:
        generate(run.text, server, writer, options.tokens, concurrent, tick)


def _told(acceptance: list[float]) -> str:
    shares = " ".join(f"{share:.3f}" for share in acceptance[:-1])
    return f"held-out acceptance by position {shares}, mean acceptance length {acceptance[-1]:.2f}"
