"""Threads, forked and spawned processes, and DataLoader workers compute what one process does."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.queues import SimpleQueue
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fusedformer import backend, nn
from fusedformer import functional as F

SECONDS = 60  # a worker that hangs is a failure, not a wait


def encoder() -> torch.nn.Module:
    torch.manual_seed(7)
    layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def gradients(seed: int) -> list[Tensor]:
    """Of an encoder of its own, with padding."""
    stack = encoder()
    generator = torch.Generator().manual_seed(seed)
    src = torch.randn(3, 6, 16, generator=generator)
    padding = torch.arange(6) >= torch.tensor([6, 2 + seed % 3, 4])[:, None]
    output = stack(src, src_key_padding_mask=padding)
    dy = torch.randn(output.shape, generator=generator)
    return list(torch.autograd.grad(output, list(stack.parameters()), dy))


def test_threads() -> None:
    stack = encoder().eval()
    inputs = [torch.randn(2, 5 + i, 16) for i in range(8)]
    paddings = [torch.arange(5 + i) >= torch.tensor([[5 + i], [3]]) for i in range(8)]

    def run(i: int) -> Tensor:
        with torch.no_grad():
            output: Tensor = stack(inputs[i], src_key_padding_mask=paddings[i])
        return output

    with backend("torch"), ThreadPoolExecutor(4) as pool:
        want = [run(i) for i in range(8)]
        for _ in range(5):
            pairs = zip(pool.map(run, range(8)), want, strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def _work(queue: SimpleQueue[list[float]]) -> None:
    torch.set_num_threads(1)
    with backend("torch"):
        queue.put([grad.norm().item() for grad in gradients(3)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_that_are_started_after_the_import(method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    queue: SimpleQueue[list[float]] = context.SimpleQueue()
    process = context.Process(target=_work, args=(queue,))
    process.start()
    process.join(SECONDS)
    alive = process.is_alive()
    process.kill()
    assert not alive, "hangs"
    assert process.exitcode == 0
    with backend("torch"):
        want = [grad.norm().item() for grad in gradients(3)]
    assert queue.get() == pytest.approx(want, abs=1e-5)


class Normed(Dataset[Tensor]):
    """Rows that a worker normalizes."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        with backend("torch"):
            return F.layer_norm(torch.arange(8.0) * (index + 1), (8,))


def test_data_loader_workers() -> None:
    rows = torch.cat(list(DataLoader(Normed(), batch_size=2, num_workers=2, timeout=SECONDS)))
    assert torch.equal(rows, torch.stack([Normed()[i] for i in range(6)]))
