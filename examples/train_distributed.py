"""Train a packed encoder to fill in masked words, on as many processes as torchrun starts.

    torchrun --nproc-per-node 2 examples/train_distributed.py --steps 20
    python examples/train_distributed.py --steps 20

The text is docstrings of Python's standard library. Each step gives every process a batch of about
as many tokens, packed without padding. The loss is divided by the number of predictions of all
processes, so that the gradient is the one that one process would compute of the whole step. With
``--checkpoint FILE`` it is saved, and with ``--resume`` it goes on from there, on any number of
processes of which ``--accumulate`` makes the same product.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from fusedformer import nn
from fusedformer.distributed import LengthBalancedSampler
from fusedformer.tools.report.corpus import stdlib_passages

UNKNOWN, MASK = 0, 1
LONGEST = 256


class Batch(NamedTuple):
    """Sequences one after another."""

    ids: Tensor  # [tokens]
    positions: Tensor  # [tokens], within the sequence
    starts: Tensor  # [sequences + 1]
    masked: Tensor  # [predictions], rows of ids
    targets: Tensor  # [predictions]

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))

    @staticmethod
    def of(samples: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Batch:
        ids, masked, targets = zip(*samples, strict=True)
        lengths = torch.tensor([len(one) for one in ids])
        starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        rows = [one + start for one, start in zip(masked, starts.tolist(), strict=False)]
        positions = torch.cat([torch.arange(len(one)) for one in ids])
        return Batch(torch.cat(ids), positions, starts, torch.cat(rows), torch.cat(targets))


class Docstrings(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Ids with words masked, which ones, and what they were: by seed, epoch and sample alone."""

    def __init__(self, passages: int, words: int, seed: int) -> None:
        texts = [re.findall(r"\w+|[^\w\s]", p.text.lower()) for p in stdlib_passages(passages)]
        common = Counter(word for text in texts for word in text).most_common(words - 2)
        numbers = {word: i for i, (word, _) in enumerate(common, MASK + 1)}
        self.texts = [
            torch.tensor([numbers.get(word, UNKNOWN) for word in text[:LONGEST]]) for text in texts
        ]
        self.lengths = [len(text) for text in self.texts]
        self.seed, self.epoch = seed, 0

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        text = self.texts[index]
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch, index)))
        masked = torch.randperm(len(text), generator=generator)[: max(1, len(text) // 7)]
        return text.index_fill(0, masked, MASK), masked, text[masked]


class MaskedWords(torch.nn.Module):
    """Scores of all words at the masked positions."""

    def __init__(self, words: int, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.words = nn.TokenEmbedding(words, width)
        self.positions = torch.nn.Embedding(LONGEST, width)
        layer = nn.TransformerEncoderLayer(
            width,
            max(1, width // 32),
            4 * width,
            dropout,
            "gelu",
            norm_first=True,
            batch_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width))
        self.scores = torch.nn.Linear(width, words)

    def forward(self, batch: Batch) -> Tensor:
        x = self.words(batch.ids) + self.positions(batch.positions)
        packed = torch.nested.nested_tensor_from_jagged(x, batch.starts)
        hidden: Tensor = self.encoder(packed).values()
        scores: Tensor = self.scores(hidden[batch.masked])
        return scores


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=20, help="of the optimizer, in all")
    parser.add_argument("--max-tokens", type=int, default=2048, help="in a batch of a process")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a process in a step")
    parser.add_argument("--passages", type=int, default=1000, help="docstrings to train on")
    parser.add_argument("--words", type=int, default=4000, help="of the vocabulary")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="file to save to, at the end")
    parser.add_argument("--save-every", type=int, default=0, help="and every so many steps")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=found)
    parser.add_argument("--timeout", type=float, default=300, help="seconds to wait for a process")
    return parser.parse_args(argv)


def join_processes(kind: str, seconds: float) -> torch.device:
    """Join those that torchrun started, or be the only one; the device of this process."""
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    backend = "nccl" if kind == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def steps_of(
    data: Docstrings, args: argparse.Namespace, epoch: int, done: int
) -> Iterator[tuple[int, int, tuple[Batch, ...]]]:
    """Epoch, steps done in it, and the batches of this process, for ever."""
    ranks, rank, share = dist.get_world_size(), dist.get_rank(), args.accumulate
    samplers = [
        LengthBalancedSampler(
            data.lengths,
            args.max_tokens,
            num_replicas=ranks * share,
            rank=rank * share + i,
            seed=args.seed,
            d_model=args.width,
        )
        for i in range(share)
    ]
    while True:
        data.epoch = epoch
        for sampler in samplers:
            sampler.set_epoch(epoch, done)
        loaders = (DataLoader(data, batch_sampler=s, collate_fn=Batch.of) for s in samplers)
        for batches in zip(*loaders, strict=True):
            done += 1
            yield epoch, done, batches
        epoch, done = epoch + 1, 0


def train_step(
    model: DistributedDataParallel, optimizer: torch.optim.Optimizer, batches: Sequence[Batch]
) -> tuple[float, int]:
    """(mean loss, number of tokens) of all processes."""
    device = next(model.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, predictions, tokens
    sums[1] = sum(len(batch.targets) for batch in batches)
    sums[2] = sum(len(batch.ids) for batch in batches)
    dist.all_reduce(sums[1:])
    for number, batch in enumerate(batches, 1):
        batch = batch.to(device)
        with contextlib.nullcontext() if number == len(batches) else model.no_sync():
            loss = cross_entropy(model(batch), batch.targets, reduction="sum")
            sums[0] += loss.detach()
            # DDP takes the mean over processes: times their number, the sum.
            (loss * (dist.get_world_size() / sums[1])).backward()
    dist.all_reduce(sums[:1])
    optimizer.step()
    optimizer.zero_grad()
    total, predictions, tokens = sums.tolist()
    return total / predictions, int(tokens)


def save(path: Path, state: dict[str, Any]) -> None:
    """A file that is whole or not there."""
    torch.save(state, f"{path}.part")
    os.replace(f"{path}.part", path)


def train(args: argparse.Namespace, device: torch.device) -> list[float]:
    """The losses of all steps."""
    torch.manual_seed(args.seed)
    data = Docstrings(args.passages, args.words, args.seed)
    model = MaskedWords(args.words, args.width, args.layers, args.dropout).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, fused=True)
    losses: list[float] = []
    reached = 0, 0  # epoch, steps done in it
    if args.resume:
        state = torch.load(args.checkpoint, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses, reached = state["losses"], state["reached"]
    parallel = DistributedDataParallel(model)
    first = dist.get_rank() == 0
    numbers = range(len(losses) + 1, args.steps + 1)
    steps = steps_of(data, args, *reached)
    for number, (epoch, done, batches) in zip(numbers, steps, strict=False):
        start = time.perf_counter()
        # Other dropout on each process and step, and the same again after a resumption.
        torch.manual_seed(hash((args.seed, number, dist.get_rank())))
        loss, tokens = train_step(parallel, optimizer, batches)
        losses.append(loss)
        if first:
            speed = tokens / (time.perf_counter() - start)
            print(f"step {number:4}  epoch {epoch}  loss {loss:.4f}  {tokens} tokens, "
                  f"{speed:.0f} a second", flush=True)  # fmt: skip
        wanted = number == args.steps or number % (args.save_every or args.steps) == 0
        if first and args.checkpoint and wanted:
            save(args.checkpoint, {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "losses": losses, "reached": (epoch, done),
            })  # fmt: skip
    if first and losses:
        print(f"loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last")
    return losses


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Join the other processes, train, leave; the losses of all steps."""
    args = options(argv)
    losses = train(args, join_processes(args.device, args.timeout))
    # Not before the model is gone: the end of DDP's own hold on the group can wait for ever.
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
