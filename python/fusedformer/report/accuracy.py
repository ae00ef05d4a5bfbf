"""Errors of two models against a third in float64: by layer, in gradients, in embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedformer.models import BertEncoderModel, sentence_embeddings
from fusedformer.report.minilm import Batch, hidden_states, layers
from fusedformer.report.neighbours import compare_rankings, similarities
from fusedformer.testing import Comparison, compare

Models = dict[str, nn.Module]  # "stock" and "fused"


def embedding(model: nn.Module, batch: Batch) -> Tensor:
    """Sentence embeddings ``[B, d]``: mean pooling in at least float32, scaled to length 1."""
    return sentence_embeddings(hidden_states(model, batch), batch.attention_mask)


@torch.no_grad()
def embed(
    model: nn.Module, batches: Sequence[Batch], advance: Callable[[], None] = lambda: None
) -> Tensor:
    """Embeddings of all passages ``[N, d]``, on the CPU, in the order of the passages."""
    rows: list[Tensor] = []
    for batch in batches:
        rows.append(embedding(model, batch).cpu())
        advance()
    return in_order(rows, batches)


def in_order(rows: Sequence[Tensor], batches: Sequence[Batch]) -> Tensor:
    """The rows of all batches together, each at the place of its passage."""
    together = torch.cat(list(rows))
    place = torch.tensor([i for batch in batches for i in batch.index])
    return torch.empty_like(together).index_copy_(0, place, together)


def embedding_report(embeddings: dict[str, Tensor], truth: Tensor) -> dict[str, Any]:
    """Errors, cosines with truth and nearest neighbours of ``stock`` and ``fused``, ``[N, d]``."""
    right = similarities(truth)
    found = {name: similarities(rows) for name, rows in embeddings.items()}
    moved = compare("similarities", found["fused"], found["stock"], right)
    # Twice what the criterion lets one similarity move: two may move towards each other.
    tie = 2 * moved.limit
    return {
        "errors": compare(
            "embeddings", embeddings["fused"], embeddings["stock"], truth
        ).as_dict(),
        "similarities": moved.as_dict(),
        "cosine_loss": {
            name: _cosine_loss(rows.double(), truth).tolist() for name, rows in embeddings.items()
        },
        "neighbours": {
            name: dataclasses.asdict(compare_rankings(matrix, right, tie))
            for name, matrix in found.items()
        },
        "neighbours_like_stock": dataclasses.asdict(
            compare_rankings(found["fused"], found["stock"], tie)
        ),
    }


def _cosine_loss(rows: Tensor, truth: Tensor) -> Tensor:
    """``1 - cosine`` of each pair of rows, without the cancellation: half the squared chord."""
    chord = F.normalize(rows, dim=-1) - F.normalize(truth, dim=-1)
    return 0.5 * (chord * chord).sum(-1)


@torch.no_grad()
def layer_report(
    models: Models, truth: nn.Module, batches: Sequence[Batch]
) -> list[dict[str, Any]]:
    """Error of the hidden states of real tokens after the embeddings and after each layer."""
    found = {name: _traced(model, batches) for name, model in models.items()}
    right = _traced(truth, batches)
    names = ["embeddings", *(f"layer {i}" for i in range(1, len(right)))]
    return [
        compare(name, fused, stock, true).as_dict()
        for name, fused, stock, true in zip(
            names, found["fused"], found["stock"], right, strict=True
        )
    ]


def _traced(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    """For each depth the hidden states of all real tokens ``[tokens, d]``."""
    depths = layers(model)
    states: list[list[Tensor]] = [[] for _ in depths]

    def keep(depth: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            states[depth].append(output if isinstance(output, Tensor) else output[0])

        return hook

    handles = [module.register_forward_hook(keep(i)) for i, module in enumerate(depths)]
    try:
        for batch in batches:
            hidden_states(model, batch)
            real = batch.attention_mask != 0
            for kept in states:
                kept[-1] = kept[-1][real]
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(kept) for kept in states]


def gradient_report(models: Models, truth: nn.Module, batch: Batch) -> list[dict[str, Any]]:
    """Error of every parameter's gradient, for a random gradient of the embeddings."""
    shape = (len(batch.index), truth.get_submodule("embeddings").word_embeddings.embedding_dim)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(shape, generator=generator).to(batch.input_ids.device)
    found = {name: _gradients(model, batch, grad) for name, model in models.items()}
    right = _gradients(truth, batch, grad)
    return [
        _judged(compare(name, found["fused"][name], found["stock"][name], true))
        for name, true in right.items()
    ]


def _judged(found: Comparison) -> dict[str, Any]:
    """As JSON. The bias of the keys has no gradient, since it shifts all scores of a query alike:

    what is computed for it is rounding alone, in stock as in ours, and there is nothing to judge.
    """
    if found.largest <= found.limit:
        return {**found.as_dict(), "judged": False, "passed": found.error <= found.limit}
    return {**found.as_dict(), "judged": True}


def _gradients(model: nn.Module, batch: Batch, grad: Tensor) -> dict[str, Tensor]:
    """Gradients by Hugging Face's names."""
    model.zero_grad(set_to_none=True)
    output = embedding(model, batch)
    output.backward(grad.to(output.dtype))
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    if isinstance(model, BertEncoderModel):
        named = model.to_huggingface_layout(named)
    model.zero_grad(set_to_none=True)
    return named
