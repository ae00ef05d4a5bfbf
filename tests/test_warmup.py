"""Compiling ahead what a model will need."""

from __future__ import annotations

import pytest
import torch

from fusedformer import backend, nn, warmup
from fusedformer_kernels.runtime.launch import recorded_launches


def test_it_launches_what_the_model_launches_and_changes_nothing(device: str) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, device=device)
    model = nn.TransformerEncoder(layer, 1)
    state = torch.get_rng_state()
    shapes = [{"src": (2, 6, 16), "src_key_padding_mask": (2, 6)}]
    with backend("triton"), recorded_launches(run=True) as warmed:
        assert len(warmup(model, shapes, backward=True)) == 1
    x = torch.randn(3, 5, 16, device=device)
    padding = torch.zeros(3, 5, dtype=torch.bool, device=device)
    padding[1, 3:] = True
    with backend("triton"), recorded_launches(run=True) as used:
        model(x, src_key_padding_mask=padding).backward(torch.randn_like(x))
    kernels = {one.name for one in used}
    assert len(kernels) > 5 and kernels <= {one.name for one in warmed}
    model.zero_grad()
    torch.set_rng_state(state)
    first = torch.rand(3)
    torch.set_rng_state(state)
    with backend("torch"):
        warmup(model, shapes)
        assert model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.rand(3), first)


def test_shapes_and_tensors_and_what_is_neither() -> None:
    with backend("torch"):
        assert len(warmup(torch.nn.Linear(4, 4), [(2, 4), (1, 4)])) == 2
        norm = torch.nn.BatchNorm1d(4)  # which counts its batches
        warmup(norm, [{"input": torch.ones(2, 4)}], backward=True)
        assert norm.num_batches_tracked == 0
        assert norm.running_mean is not None
        assert not norm.running_mean.any()
        assert len(warmup(torch.nn.Embedding(3, 4), [{"input": torch.zeros(2).long()}])) == 1
    with pytest.raises(TypeError, match="'model' to be a Module, but got builtin"):
        warmup(torch.sin, [(2,)])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'src' to be a shape or a Tensor, but got str"):
        warmup(torch.nn.Linear(4, 4), [{"src": "2x4"}])
