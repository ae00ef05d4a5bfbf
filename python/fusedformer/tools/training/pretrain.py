"""Pretrain a small model on text that is here: ``python -m fusedformer pretrain``.

The objectives are BERT's, GPT's, or CLIP's on pairs of a function's signature and its docstring.
The folder of the run gets the checkpoint for ``--resume``, ``metrics.json``, ``loss.svg``, and the
model as transformers loads it. On the same machine, with the same number of threads, a run that
was stopped or killed, and then resumed, ends with the bits of one that was not.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fusedformer.tools.training import commands
from fusedformer.tools.training import settings as options
from fusedformer.tools.training.settings import Settings

CHECKPOINT = "checkpoint.pt"
_EVALUATIONS = 10  # times in a run


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; return 0, 1 if stock's loss curve differs, 2 for wrong usage, 130 if stopped."""
    return commands.run(_parser(), _pretrain, argv)


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect signals that ask to stop, so that a step is finished first; a second one stops it."""
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    wanted = [signal.SIGINT, signal.SIGTERM]
    if threading.current_thread() is not threading.main_thread():  # the only one that gets signals
        wanted = []
    before = {number: signal.signal(number, note) for number in wanted}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fusedformer pretrain",
        description="Pretrain a small BERT, GPT or text-to-text CLIP on text that is here.",
    )
    options.add_options(parser)
    commands.common_options(parser, "pretrained")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS",
                        help="steps from one checkpoint to the next (default: 100)")  # fmt: skip
    return parser


def _pretrain(given: argparse.Namespace) -> int:
    # Imported here because they need the extras.
    from rich.console import Console

    from fusedformer.tools.training import results, terminal
    from fusedformer.tools.training.trainer import OURS, Trainer

    if given.save_every < 1:
        raise ValueError(f"expected --save-every to be positive, but got {given.save_every}")
    console, device = Console(), commands.device_of(given.device)
    path = given.out / CHECKPOINT
    state = _state(path, given)
    given.out.mkdir(parents=True, exist_ok=True)  # fails, if at all, before the work
    named = options.given_settings(given)
    settings = options.resumed(state["settings"], named) if state else options.new(named)
    task, source, tokenizer = load_task(settings, state)
    terminal.say(
        console,
        f"{source['passages']} passages, {source['held_out']} held out: {source['source']}",
    )
    baselines = task.baselines()
    for name, value in baselines.items():
        terminal.say(console, f"{name}: {value:.4g}")
    trainer = Trainer(task, device)
    if state:
        trainer.load(state)

    def save() -> None:
        trainer.save(path, tokenizer=tokenizer, text=source)

    every = -(-settings.steps // _EVALUATIONS)
    bar = terminal.progress(console, settings.objective, settings.steps, trainer.steps_done)
    with bar as advance, stop_requests() as stop:
        while trainer.steps_done < settings.steps and not stop:
            loss = trainer.step()
            done = trainer.steps_done
            said = f"loss {loss:.3f}  {task.chance} {baselines[task.chance]:.3f}"
            for name, run in trainer.runs.items():
                if name != OURS:
                    said += f"  {name} {run.losses[-1]:.3f}"
            advance(f"{said}  {trainer.tokens[-1] / trainer.runs[OURS].seconds[-1]:.0f} tokens/s")
            if done % every == 0 or done == settings.steps:
                trainer.evaluate()
            trainer.check_finite()
            if done % given.save_every == 0 or done == settings.steps:
                save()
        if trainer.steps_done < settings.steps:
            save()
    if trainer.steps_done < settings.steps:
        print(
            f"stopped after step {trainer.steps_done}; go on with\n    python -m fusedformer "
            f"pretrain --out {given.out} --resume",
            file=sys.stderr,
        )
        return 130
    trainer.model.eval()
    found = results.figures(trainer, source, baselines, task.examples(trainer.model))
    files = [path, results.write_figures(given.out, found), given.out / "loss.svg"]
    results.draw(found, task.chance, files[-1])
    files += results.export(given.out, trainer.model, task)
    terminal.print_table(
        console, settings.objective, ("", "value"), results.rows(found, task.chance)
    )
    for example in found["examples"]:
        terminal.say(console, example)
    report = trainer.report()
    if report is not None:
        terminal.say(console, str(report).split("\n\n")[-1])
    terminal.say(console, "wrote " + ", ".join(map(str, files)))
    return 0 if report is None or report.passed else 1


def _state(path: Path, given: argparse.Namespace) -> dict[str, Any] | None:
    """Read the state of the run to resume, if one is to be resumed."""
    if not given.resume:
        if path.exists():
            raise ValueError(
                f"{path} is there already: go on with it by --resume, or name another --out"
            )
        return None
    from fusedformer.tools.training.trainer import read_checkpoint

    return read_checkpoint(path)


def load_task(
    settings: Settings, state: dict[str, Any] | None = None
) -> tuple[Any, dict[str, Any], str]:
    """Make (task, description of its text, tokenizer as JSON), from ``state`` if resumed.

    Raises:
        ValueError: the text is not that of the checkpoint.
    """
    from tokenizers import Tokenizer

    from fusedformer.tools.training.tasks import TASKS
    from fusedformer.tools.training.text import read_corpus, train_tokenizer

    corpus = read_corpus(Path(settings.text) if settings.text else None)
    kind = TASKS[settings.objective]
    source = {
        "source": corpus.source, "passages": len(corpus.train) + len(corpus.held_out),
        "held_out": len(corpus.held_out), "digest": corpus.digest,
    }  # fmt: skip
    if state is None:
        tokenizer = train_tokenizer(map(kind.text, corpus.train), settings.vocab_size)
    else:
        if state["text"]["digest"] != corpus.digest:
            raise ValueError(
                f"the text has changed since the run began: {corpus.source}; bring it back, or "
                f"begin a run with another --out"
            )
        tokenizer = Tokenizer.from_str(state["tokenizer"])
    return kind(settings, corpus, tokenizer), source, tokenizer.to_str()
