"""Call torch for matrix products with a bias, and with an activation where that is free."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer._internal.tracing import may_be_batched
from fusedformer.ops.activation import activate_aten

# Products of fewer multiplications take less time than their setup in oneDNN, some 10 us.
_WORTH_ONEDNN = 2**20
# Elements of a slice, where a product is added to a wider sum: 32 MiB of float32.
_SLICE = 2**23
# Rows that oneDNN sums over at once for the gradient of a weight, one after another: with
# 2,048 and more the error is 2.2 times that of MKL, with these 1.6 times, in no more time.
_ROWS_AT_ONCE = 1024
_POST_OPS = {
    "relu": ("relu", ""), "silu": ("swish", ""), "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}  # fmt: skip


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``x @ weight.T + bias``; not differentiable.

    float32 products of some size on the CPU go to oneDNN by the operator that torch.compile uses:
    MKL, which ``F.linear`` takes, is slower there on AMD's processors. In bfloat16 ``F.linear``
    takes oneDNN too, with more around it, and an activation is a pass of its own.
    """
    if _prefers_onednn(x, weight, bias):
        return _onednn(x, weight, bias, "none", "")
    return F.linear(x, weight, bias)


def product_activation(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Compute ``activation(x @ weight.T + bias)``, in oneDNN in one pass; not differentiable."""
    if activation in _POST_OPS and _prefers_onednn(x, weight, bias):
        return _onednn(x, weight, bias, *_POST_OPS[activation])
    return activate_aten(product(x, weight, bias), activation)


def product_add(x: Tensor, weight: Tensor, addend: Tensor | None) -> Tensor:
    """Compute ``x @ weight + addend``, over ``addend`` if possible; not differentiable."""
    if addend is not None and addend.dtype != weight.dtype:
        return addend + x @ weight
    if _prefers_onednn(x, weight, addend):
        turned = weight.t()
        if addend is None:
            return _onednn(x, turned, None, "none", "")
        return _onednn_add(x, turned, addend)
    if addend is None:
        return x @ weight
    if not addend.is_contiguous() or not addend.numel():
        return addend + x @ weight
    addend.view(-1, weight.shape[1]).addmm_(x.flatten(0, -2), weight)
    return addend


def input_gradient(grad: Tensor, weight: Tensor, through: Tensor | None) -> Tensor:
    """Compute the gradient of a product's input; add ``through``, that of all after it.

    ``through`` came by way of the residual, and is used up unless somebody maps or differentiates.
    """
    if not torch.is_grad_enabled() and not may_be_batched():
        return product_add(grad, weight, through)
    return grad @ weight if through is None else through + grad @ weight


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Compute the gradient of a product's weight."""
    grad, x = _rows(grad), _rows(x)
    seen = torch.is_grad_enabled() or may_be_batched()
    if seen or x.dtype != torch.float32 or not _prefers_onednn(grad.t(), x.t(), None):
        return grad.t() @ x
    grads, rows = (torch.split(t, _ROWS_AT_ONCE) for t in (grad, x))
    total = _onednn(grads[0].t(), rows[0].t(), None, "none", "")
    for part, others in zip(grads[1:], rows[1:], strict=True):
        total = _onednn_add(part.t(), others.t(), total)
    return total


def bias_gradient(grad: Tensor) -> Tensor:
    """Compute the gradient of a product's bias."""
    return _rows(grad).sum(0)


def _rows(x: Tensor) -> Tensor:
    if x.dim() == 2:
        return x
    # Not by flatten, which batches of gradients do not know.
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, post_op: str, form: str) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, post_op, [], form)
    return found


def _onednn_add(x: Tensor, weight: Tensor, addend: Tensor) -> Tensor:
    add = torch.ops.mkldnn._linear_pointwise.binary
    found: Tensor = add(x, addend, weight, None, "add")
    return found


def _prefers_onednn(x: Tensor, weight: Tensor, addend: Tensor | None) -> bool:
    # Spelled out, since each product of a single text comes by.
    if not x.is_cpu or x.numel() // max(x.shape[-1], 1) * weight.numel() < _WORTH_ONEDNN:
        return False
    dtype = x.dtype
    return (
        _ONEDNN_IS_THERE
        and (dtype is torch.float32 or (dtype is torch.bfloat16 and _multiplies_bfloat16()))
        and type(x) in _PLAIN
        and _is_plain(weight, dtype)
        and (addend is None or _is_plain(addend, dtype))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch._C._get_mkldnn_enabled()
    )


_PLAIN = Tensor, torch.nn.Parameter
_ONEDNN_IS_THERE = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype is dtype and tensor.is_cpu and type(tensor) in _PLAIN


@cache
def _multiplies_bfloat16() -> bool:
    """Whether oneDNN takes bfloat16 on this processor."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to ``total``, accumulating in its dtype, which may be wider than theirs."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    # In slices that a GPU's L2 cache holds, so that products are added without going to memory.
    rows = max(_SLICE // b.shape[1], 1)
    for start in range(0, a.shape[0], rows):
        part = a[start : start + rows]
        # Only CUDA has products of half precision with a wider result.
        found = torch.mm(part, b, out_dtype=total.dtype) if a.is_cuda else part @ b
        total[start : start + rows] += found
