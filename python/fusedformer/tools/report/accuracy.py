"""Measure errors of two models against float64: by layer, in gradients, in embeddings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedformer.models import BertEncoderModel, sentence_embeddings
from fusedformer.testing import Comparison, compare_tensors
from fusedformer.tools.report.minilm import Batch, hidden_states, layers
from fusedformer.tools.report.neighbours import compare_rankings, similarities

VECTOR_DRAWS = 12
Models = dict[str, nn.Module]  # "stock" and "fused"


def embedding(model: nn.Module, batch: Batch) -> Tensor:
    """Compute sentence embeddings ``[B, d]``: mean pooling in at least float32, length 1."""
    return sentence_embeddings(hidden_states(model, batch), batch.attention_mask)


@torch.no_grad()
def embed(
    model: nn.Module, batches: Sequence[Batch], advance: Callable[[], None] = lambda: None
) -> Tensor:
    """Embed all passages ``[N, d]``, on the CPU, in the order of the passages."""
    rows: list[Tensor] = []
    for batch in batches:
        rows.append(embedding(model, batch).cpu())
        advance()
    return in_order(rows, batches)


def in_order(rows: Sequence[Tensor], batches: Sequence[Batch]) -> Tensor:
    """Concatenate the rows of all batches, each at the place of its passage."""
    together = torch.cat(list(rows))
    place = torch.tensor([i for batch in batches for i in batch.index])
    return torch.empty_like(together).index_copy_(0, place, together)


def embedding_report(embeddings: dict[str, Tensor], truth: Tensor) -> dict[str, Any]:
    """Report errors, cosines with the truth and nearest neighbours of embeddings ``[N, d]``."""
    right = similarities(truth)
    found = {name: similarities(rows) for name, rows in embeddings.items()}
    moved = compare_tensors("similarities", found["fused"], found["stock"], right)
    # Twice the criterion's limit for one similarity, since two may move towards each other.
    tie = 2 * moved.limit
    return {
        "errors": compare_tensors(
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
    """Compute ``1 - cosine`` of each pair of rows, as half the squared chord: nothing cancels."""
    chord = F.normalize(rows, dim=-1) - F.normalize(truth, dim=-1)
    return 0.5 * (chord * chord).sum(-1)


@torch.no_grad()
def layer_report(models: Models, truth: nn.Module, batch: Batch) -> list[dict[str, Any]]:
    """Report errors of the hidden states of real tokens, after the embeddings and each layer."""
    found = {name: _traced(model, batch) for name, model in models.items()}
    right = _traced(truth, batch)
    names = ["embeddings", *(f"layer {i}" for i in range(1, len(right)))]
    return [
        compare_tensors(name, fused, stock, true).as_dict()
        for name, fused, stock, true in zip(
            names, found["fused"], found["stock"], right, strict=True
        )
    ]


def _traced(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Return the hidden states of all real tokens ``[tokens, d]`` at each depth."""
    real = batch.attention_mask != 0
    states: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        states.append((output if isinstance(output, Tensor) else output[0])[real])

    handles = [module.register_forward_hook(keep) for module in layers(model)]
    try:
        hidden_states(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return states


def gradient_report(models: Models, truth: nn.Module, batch: Batch) -> list[dict[str, Any]]:
    """Report errors of the gradients, for random gradients of the embeddings.

    Parameters of the same kind are judged together over all layers, and biases and norms over
    several gradients of the embeddings: their largest error is in one or two channels where this
    model's states are extreme, so that a single draw says little.
    """
    found = {name: _gradients(model, batch) for name, model in models.items()}
    right = _gradients(truth, batch)
    return [
        _judged(compare_tensors(kind, found["fused"][kind], found["stock"][kind], true))
        for kind, true in right.items()
    ]


def _gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return gradients by kind, ``[layers * draws, ...]``; matrices have the first draw alone."""
    output = embedding(model, batch)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    vectors = {n: p for n, p in parameters.items() if p.dim() == 1}
    kinds: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    for index in range(VECTOR_DRAWS):
        draw = torch.randn(output.shape, generator=generator).to(output)
        wanted = vectors if index else parameters
        more = index + 1 < VECTOR_DRAWS
        grads = torch.autograd.grad(output, list(wanted.values()), draw, retain_graph=more)
        named = dict(zip(wanted, grads, strict=True))
        if isinstance(model, BertEncoderModel):
            named = model.to_huggingface_layout(named)
        for name, grad in named.items():
            kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(grad)
    return {kind: torch.stack(grads) for kind, grads in kinds.items()}


def _judged(found: Comparison) -> dict[str, Any]:
    """Return a comparison as JSON takes it; the gradient of the keys' bias is not judged.

    That bias shifts all scores of a query alike, so its true gradient is 0, and both models compute
    rounding errors alone.
    """
    if found.largest <= found.limit:
        return {**found.as_dict(), "judged": False, "passed": found.error <= found.limit}
    return {**found.as_dict(), "judged": True}
