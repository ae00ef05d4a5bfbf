"""Prompt a decoder with examples of a toy task: ``python -m fusedformer fewshot``.

Each kind of words (animals, colours, ...) has a letter that is drawn again for every prompt: the
answer to "cat B, red D, owl B, blue" is "D". Only the examples in the prompt tell the letters, so
accuracy rises with their number although no weight changes. Prompts are judged with assignments of
letters that training has never had.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedformer.models import GPTConfig, GPTDecoderModel
from fusedformer.tools.training import commands

KINDS = {
    "animals": "cat dog owl bee cow hen ant fox pig bat elk yak",
    "colours": "red blue green black white pink brown grey gold teal mauve beige",
    "tools": "saw axe drill file awl vice plane lathe rasp wrench chisel mallet",
    "foods": "bread rice soup cake egg ham pie bean corn fig plum jam",
}
LETTERS = "ABCD"
SHOTS = (0, 1, 2, 4, 8, 16)
HELD_OUT = 2  # of the 6 Latin squares of assignments, in which each kind has every letter once
_BATCH, _RATE, _HEADS = 64, 3e-3, 4
_PROMPTS = 2000  # for each accuracy


class Task:
    """Prompts as token ids: one for each word and letter, and 0 for the beginning."""

    def __init__(self, seed: int) -> None:
        self.words = [(kind, word) for kind in KINDS for word in KINDS[kind].split()]
        self.tokens = ["", *LETTERS, *(word for _, word in self.words)]
        count = len(LETTERS)
        squares = [
            [[(letter + by) % count for letter in (0, *rest)] for by in range(count)]
            for rest in itertools.permutations(range(1, count))
        ]
        random.Random(seed).shuffle(squares)
        kinds = list(KINDS)
        self.kind = torch.tensor([kinds.index(kind) for kind, _ in self.words])
        self.unseen, self.seen = (
            torch.tensor(part).flatten(0, 1) for part in (squares[:HELD_OUT], squares[HELD_OUT:])
        )

    def prompts(
        self, count: int, shots: int, assignments: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw prompts ``[count, 2 + 2 * shots]``, which end in a word; and that word's letters."""
        order = torch.rand(count, len(self.words), generator=generator).argsort(1)
        words = order[:, : shots + 1]
        drawn = torch.randint(len(assignments), (count, 1), generator=generator)
        letters = 1 + assignments[drawn.squeeze(1)].gather(1, self.kind[words])
        rows = torch.stack((1 + len(LETTERS) + words, letters), 2).flatten(1)
        begin = torch.zeros(count, 1, dtype=torch.int64)
        return torch.cat((begin, rows[:, :-1]), 1), letters[:, -1]

    def text(self, ids: Tensor) -> str:
        """Write a prompt as text."""
        return " ".join(self.tokens[i] for i in ids.tolist()).strip()

    @staticmethod
    def best(shots: int) -> float:
        """Compute the accuracy of knowing the kinds, for examples drawn from all other words.

        The letter of a kind among the examples is known; else the letters left are equally likely.
        """
        kinds, each = len(KINDS), len(next(iter(KINDS.values())).split())
        total = math.comb(kinds * each - 1, shots)
        right = 0.0
        # Sum over how many other kinds are among the examples, and whether the word's own is.
        for others in range(kinds):
            for own in (0, 1):
                ways = math.comb(kinds - 1, others) * _covering(others, own, each, shots)
                right += ways / total * (1.0 if own else 1.0 / (kinds - others))
        return right


def _covering(others: int, own: int, each: int, shots: int) -> int:
    """Count choices of ``shots`` words from all of ``others`` kinds, and from the own or not.

    By inclusion and exclusion; of the own kind one word is the query.
    """
    total = 0
    for missing in range(others + 1):
        left = (others - missing) * each
        with_own = math.comb(left + each - 1, shots) - math.comb(left, shots)
        total += (
            (-1) ** missing
            * math.comb(others, missing)
            * (with_own if own else math.comb(left, shots))
        )
    return total


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 for wrong usage."""
    return commands.run(_parser(), _fewshot, argv, ("matplotlib", "rich"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fusedformer fewshot",
        description="A small decoder learns to do what the examples in its prompt say.",
    )
    parser.add_argument("--steps", type=int, default=2000, help="of training (default: 2000)")
    parser.add_argument("--width", type=int, default=64, help="of the decoder (default: 64)")
    parser.add_argument("--layers", type=int, default=2, help="of the decoder (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: 0)")
    commands.common_options(parser, "fewshot")
    return parser


def _fewshot(given: argparse.Namespace) -> int:
    # Imported here because they need the extras.
    from rich.console import Console

    from fusedformer.tools.environment import describe
    from fusedformer.tools.training import results, terminal

    if given.steps < 1:
        raise ValueError(f"expected --steps to be positive, but got {given.steps}")
    if given.width < 1 or given.width % _HEADS:
        raise ValueError(f"expected --width to be a multiple of {_HEADS}, but got {given.width}")
    if given.layers < 1:
        raise ValueError(f"expected --layers to be positive, but got {given.layers}")
    console, device = Console(), commands.device_of(given.device)
    given.out.mkdir(parents=True, exist_ok=True)  # fails, if at all, before the work
    task = Task(given.seed)
    torch.manual_seed(given.seed)
    config = GPTConfig(
        len(task.tokens), 2 * max(SHOTS) + 3, given.width, given.layers, _HEADS, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, eos_token_id=None,
    )  # fmt: skip
    model = GPTDecoderModel(config).to(device)
    with terminal.progress(console, "few-shot", given.steps) as advance:
        losses = train(model, task, given.steps, given.seed, device, advance)
    model.eval()
    rows = [
        {"shots": shots, "best": task.best(shots)} | accuracies(model, task, shots, device)
        for shots in SHOTS
    ]
    prompt, letter = task.prompts(1, 6, task.unseen, torch.Generator().manual_seed(1))
    answer = model.generate(prompt.to(device), max_new_tokens=1)
    example = f"{task.text(prompt[0])} -> {task.text(answer[0])} (right: {task.text(letter)})"
    found = {
        "schema": 1, **describe(device), "steps": given.steps, "width": given.width,
        "layers": given.layers, "seed": given.seed, "prompts": _PROMPTS, "rows": rows,
        "example": example, "losses": losses,
    }  # fmt: skip
    files = [results.write_figures(given.out, found), given.out / "accuracy.svg"]
    draw(rows, files[1])
    terminal.print_table(console, "accuracy by number of examples in the prompt", HEAD,
                         list(map(cells, rows)))  # fmt: skip
    terminal.say(console, example)
    terminal.say(console, "wrote " + ", ".join(map(str, files)))
    return 0


def train(
    model: GPTDecoderModel, task: Task, steps: int, seed: int, device: torch.device, advance: Any
) -> list[float]:
    """Train on prompts with the letters of seen assignments; return the losses."""
    from fusedformer.tools.training.trainer import adamw, descend, set_rate

    optimizer = adamw(model.parameters(), _RATE)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
        ids, letters = task.prompts(_BATCH, max(SHOTS), task.seen, generator)
        ids = torch.cat((ids, letters[:, None]), 1).to(device)
        labels = ids.masked_fill((ids < 1) | (ids > len(LETTERS)), -100)  # only letters are learned
        set_rate(optimizer, _RATE, step, steps)
        losses.append(descend(optimizer, model.loss(ids, labels)))
        advance(f"loss {losses[-1]:.3f}")
    return losses


def accuracies(
    model: GPTDecoderModel, task: Task, shots: int, device: torch.device
) -> dict[str, float]:
    """Return the shares of right letters, after right examples and after random ones."""
    generator = torch.Generator().manual_seed(shots)
    ids, letters = task.prompts(_PROMPTS, shots, task.unseen, generator)
    lettered = ids.clone()
    lettered[:, 2::2] = torch.randint(1, 1 + len(LETTERS), (_PROMPTS, shots), generator=generator)
    answered = {
        name: model.generate(prompts.to(device), max_new_tokens=1)[:, 0].cpu()
        for name, prompts in (("accuracy", ids), ("random", lettered))
    }
    return {name: float((found == letters).double().mean()) for name, found in answered.items()}


HEAD = ("examples", "accuracy", "best possible", "letters of examples random")


def cells(row: dict[str, Any]) -> list[str]:
    """Write a row of the table."""
    return [str(row["shots"]), *(f"{row[name]:.3f}" for name in ("accuracy", "best", "random"))]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw accuracy by number of examples."""
    from fusedformer._internal.figures import drawn

    lines = {"best": ("best possible", "--"), "accuracy": ("decoder", "-"),
             "random": ("letters of examples random", ":")}  # fmt: skip
    with drawn(path, height=3.2) as axis:
        shots = [str(row["shots"]) for row in rows]
        for name, (label, style) in lines.items():
            axis.plot(shots, [row[name] for row in rows], style, marker="o", label=label)
        axis.set_ylim(0.0, 1.05)
        axis.set_xlabel("examples in the prompt")
        axis.set_ylabel("accuracy")
        axis.legend()
