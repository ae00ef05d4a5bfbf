"""Offsets beyond 2**31 elements, where 32-bit arithmetic wraps, on sparse files.

Rows lie so far apart that only their pages of an otherwise empty file are ever touched. The kernels
must give the same bits as on a contiguous copy.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fusedformer import functional as F

FAR = 2**31 + 64  # elements between rows: one step is beyond int32
NEAR = 2**30 + 64  # two steps are beyond it, one is not


class Distant:
    """Tensors whose steps along one dimension are huge; on CPUs kept in sparse files."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder = folder
        self.device = device
        self.count = 0

    def __call__(self, values: Tensor, step: int, dim: int = 0) -> Tensor:
        """``values`` with a stride of ``step`` along ``dim``, contiguous in what is left."""
        inside = values.movedim(dim, 0)
        strides = [step, *inside[0].contiguous().stride()]
        size = (inside.shape[0] - 1) * step + inside[0].numel()
        try:
            flat = self._memory(size, values)
        except (OSError, RuntimeError) as error:
            pytest.skip(f"no {size * values.element_size():.2g} bytes here: {error}")
        view = flat.as_strided(inside.shape, strides)
        view.copy_(inside)
        return view.movedim(0, dim)

    def _memory(self, size: int, like: Tensor) -> Tensor:
        if self.device != "cpu":
            return torch.empty(size, dtype=like.dtype, device=self.device)
        self.count += 1
        path = self.folder / f"{self.count}.bin"
        with path.open("wb") as file:
            file.truncate(size * like.element_size())
        return torch.from_file(str(path), shared=True, size=size, dtype=like.dtype)


@pytest.fixture
def distant(tmp_path: Path, device: str) -> Distant:
    return Distant(tmp_path, device)


def same_bits(function: Callable[..., Tensor], given: list[Tensor], wanted: list[bool]) -> None:
    """Output and gradients equal those on contiguous copies."""
    results = []
    on_gpu = [t.device for t in given if t.is_cuda]
    far = [t.to(on_gpu[0]) for t in given] if on_gpu else given
    for tensors in (far, [t.contiguous() for t in far]):
        own = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        output = function(*own)
        dy = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
        leaves = [t for t in own if t.requires_grad]
        results.append([output, *torch.autograd.grad(output, leaves, dy)])
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all()
        assert a.abs().max() > 0
        assert torch.equal(a, b)


STEPS = {"one step": FAR, "two steps": NEAR}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("mask", [False, True])
def test_softmax(step: str, mask: bool, distant: Distant) -> None:
    x = distant(torch.randn(3, 20).half(), STEPS[step])
    additive = [distant(torch.randn(3, 20).half(), STEPS[step])] if mask else []
    function = lambda x, m=None: F.softmax(x, -1, mask=m)
    same_bits(function, [x, *additive], [True, mask][: 1 + mask])


def test_softmax_over_distant_columns(distant: Distant) -> None:
    x = distant(torch.randn(20, 3).half(), FAR, dim=1)
    same_bits(lambda x: F.softmax(x, -1), [x], [True])


def test_softmax_gradient_far_apart(distant: Distant) -> None:
    x = torch.randn(3, 20).half().to(distant.device).requires_grad_()
    y = F.softmax(x, -1)
    dy = torch.randn(3, 20).half().to(distant.device)
    near, far = (
        torch.autograd.grad(y, x, d, retain_graph=True)[0] for d in (dy, distant(dy, NEAR))
    )
    assert torch.equal(near, far)


@pytest.mark.parametrize("step", STEPS)
def test_layer_norm(step: str, distant: Distant) -> None:
    x = distant(torch.randn(3, 24).half(), STEPS[step])
    weight, bias = torch.randn(2, 24).half()
    same_bits(lambda x, w, b: F.layer_norm(x, (24,), w, b), [x, weight, bias], [True] * 3)


def test_residual_and_dropout(distant: Distant) -> None:
    x, residual = (distant(torch.randn(3, 24).half(), NEAR) for _ in range(2))

    def function(x: Tensor, residual: Tensor) -> Tensor:
        torch.manual_seed(1)
        return F.dropout_add_rms_norm(x, residual, (24,), p=0.3)

    same_bits(function, [x, residual], [True, True])


@pytest.mark.parametrize("step", STEPS)
def test_bias_activation(step: str, distant: Distant) -> None:
    x = distant(torch.randn(3, 40).half(), STEPS[step])
    bias = torch.randn(40).half()
    same_bits(lambda x, b: F.bias_activation(x, b), [x, bias], [True, True])


@pytest.mark.parametrize("dim", [0, 1, 2, 3], ids=["batch", "head", "token", "element"])
def test_attention(dim: int, distant: Distant) -> None:
    q, k, v = (distant(torch.randn(3, 3, 3, 3).half(), NEAR, dim) for _ in range(3))
    same_bits(lambda *qkv: F.scaled_dot_product_attention(*qkv), [q, k, v], [True] * 3)


@pytest.mark.parametrize("dim", [0, 1, 2, 3], ids=["batch", "head", "query", "key"])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_attention_mask(dim: int, kind: str, distant: Distant) -> None:
    q, k, v = torch.randn(3, 3, 3, 3, 8).half().unbind()
    values = torch.randn(3, 3, 3, 3)
    mask = distant(values > -0.5 if kind == "boolean" else values.half(), NEAR, dim)
    function = lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m)
    same_bits(function, [q, k, v, mask], [True] * 3 + [kind == "additive"])


def test_attention_key_mask(distant: Distant) -> None:
    q, k, v = torch.randn(3, 3, 2, 5, 8).half().unbind()
    mask = distant(torch.arange(15).reshape(3, 5) % 3 > 0, NEAR)
    function = lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, key_mask=m)
    same_bits(function, [q, k, v, mask], [True] * 3 + [False])


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["token", "head", "element"])
def test_packed_attention(dim: int, distant: Distant) -> None:
    q, k, v = (distant(torch.randn(5, 2, 3).half(), NEAR, dim) for _ in range(3))
    starts = torch.tensor([0, 2, 5], device=distant.device)
    same_bits(
        lambda q, k, v: F.varlen_attention(q, k, v, starts, starts, 3, 3), [q, k, v], [True] * 3
    )
