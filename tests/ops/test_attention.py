"""Scaled dot-product attention against its definition, forward and every gradient."""

from typing import Any

import pytest
import torch
from tests.ops.judge import DTYPES, check, first, grad
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusedformer import backend, reference
from fusedformer import functional as F
from fusedformer.testing import assert_function_parity

NAME = "scaled_dot_product_attention"


def qkv(
    lengths: tuple[int, int] = (20, 30),
    dims: tuple[int, int] = (16, 16),
    *,
    batch: int = 2,
    heads: int = 2,
    key_heads: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    queries, keys = lengths
    key_heads = key_heads or heads
    return {
        "query": grad(batch, heads, queries, dims[0], device=device),
        "key": grad(batch, key_heads, keys, dims[0], device=device),
        "value": grad(batch, key_heads, keys, dims[1], device=device),
    }


LENGTHS = {
    (2, 7): "two queries, the first of which sees one key when causal",
    (64, 64): "whole tiles",
    (65, 129): "just above a tile, both ways",
    (127, 33): "prime, more queries than keys",
    (130, 260): "several tiles with a partial one",
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(lengths: tuple[int, int], causal: bool, dtype: torch.dtype, device: str) -> None:
    inputs = qkv(lengths, batch=1, device=device)
    check(NAME, dtype, only=first, is_causal=causal, **inputs)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", [(1, 1), (5, 1)], ids=str)
def test_one_key(lengths: tuple[int, int], causal: bool, device: str) -> None:
    """Weights are 1, whatever the scores: the output is the value, and only it has a gradient.

    ptxas of Triton 3.6 and 3.7 did not survive one causal token whose lengths were constants.
    """
    inputs = qkv(lengths, device=device)
    output = F.scaled_dot_product_attention(**inputs, is_causal=causal)
    assert torch.equal(output, inputs["value"].expand_as(output))
    dy = torch.randn_like(output)
    dq, dk, dv = torch.autograd.grad(output, tuple(inputs.values()), dy)
    bound = 8 * torch.finfo(torch.float32).eps * dy.abs().max() * inputs["value"].abs().max() * 16
    assert dq.abs().max() <= bound
    assert dk.abs().max() <= 5 * bound
    torch.testing.assert_close(dv, dy.sum(2, keepdim=True))


DIMS = {
    (1, 1): "the least",
    (8, 8): "below what tensor cores take",
    (20, 33): "values wider than keys, neither a power of two",
    (64, 16): "values narrower than keys: wrong on an H200 once, as the next four",
    (64, 32): "a swizzle between",
    (64, 8): "padded to 16",
    (32, 16): "keys that are narrow too",
    (128, 32): "two size classes, of which values have the smallest",
    (72, 72): "padded to 128",
    (128, 64): "two size classes",
    (256, 256): "the largest, gradients of keys and values in a pass each",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_head_dims(dims: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    inputs = qkv((37, 70), dims, batch=1, device=device)
    check(NAME, dtype, only=first, is_causal=True, **inputs)


MASK_SHAPES = {
    "full size": (2, 2, 20, 30),
    "all heads and sequences": (20, 30),
    "by sequence": (2, 1, 20, 30),
    "by head": (2, 20, 30),
    "keys of a sequence": (2, 1, 1, 30),
    "keys": (30,),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MASK_SHAPES)
def test_additive_masks_and_their_gradient(shape: str, dtype: torch.dtype, device: str) -> None:
    mask = torch.randn(MASK_SHAPES[shape], device=device)
    if shape != "keys":
        mask.masked_fill_(torch.rand(mask.shape, device=device) < 0.2, -torch.inf)
    mask.requires_grad_()
    check(NAME, dtype, only=first, attn_mask=mask, **qkv(device=device))


@pytest.mark.parametrize("size", ["one row", "one column"])
def test_mask_of_size_one(size: str, device: str) -> None:
    """A mask that is constant along keys shifts all scores: its gradient is 0, the rest is not."""
    shape = (2, 1, 1, 30) if size == "one row" else (2, 2, 20, 1)
    mask = torch.randn(shape, device=device)
    check(NAME, torch.float32, only=first, attn_mask=mask, is_causal=True, **qkv(device=device))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", MASK_SHAPES)
def test_boolean_masks(shape: str, causal: bool, device: str) -> None:
    mask = torch.rand(MASK_SHAPES[shape], device=device) > 0.3
    inputs = qkv(device=device)
    check(NAME, torch.float32, only=first, attn_mask=mask, is_causal=causal, **inputs)


MODIFIERS: dict[str, dict[str, Any]] = {
    "lengths": {"key_lengths": torch.tensor([13, 30])},
    "int32 lengths": {"key_lengths": torch.tensor([1, 29], dtype=torch.int32)},
    "key mask": {"key_mask": torch.arange(60).reshape(2, 30) % 3 > 0},
    "lengths and key mask": {
        "key_lengths": torch.tensor([13, 30]), "key_mask": torch.arange(60).reshape(2, 30) % 3 > 0,
    },
    "negative scale": {"scale": -0.7},
    "large scale": {"scale": 1.0},
    "zero scale": {"scale": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("extra", ["", "causal", "mask"])
@pytest.mark.parametrize("name", MODIFIERS)
def test_modifiers(name: str, extra: str, device: str) -> None:
    modifiers = {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in MODIFIERS[name].items()
    }
    inputs = qkv(device=device)
    if name == "zero scale":  # queries and keys do not matter then
        inputs = {key: t.detach() if key != "value" else t for key, t in inputs.items()}
    if extra == "mask":
        modifiers["attn_mask"] = torch.randn(20, 30, device=device).requires_grad_()
    check(NAME, torch.float32, only=first, is_causal=extra == "causal", **inputs, **modifiers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_log_sum_exp_and_its_gradient(dtype: torch.dtype, causal: bool, device: str) -> None:
    inputs = qkv((40, 70), device=device)
    check(NAME, dtype, return_lse=True, is_causal=causal, **inputs)


@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_grouped_heads(key_heads: int, causal: bool, device: str) -> None:
    inputs = qkv(heads=4, key_heads=key_heads, device=device)
    check(NAME, torch.float32, only=first, enable_gqa=True, is_causal=causal, **inputs)


def test_grouped_heads_of_one_sequence(device: str) -> None:
    """3-D: the one leading dimension is that of the heads."""
    inputs: dict[str, Any] = {"query": grad(6, 5, 8, device=device)}
    inputs |= {name: grad(2, 7, 8, device=device) for name in ("key", "value")}
    lengths = torch.tensor([4], device=device)
    check(NAME, torch.float32, only=first, enable_gqa=True, **inputs)
    check(NAME, torch.float32, return_lse=True, enable_gqa=True, key_lengths=lengths, **inputs)


def removed_queries(device: str) -> dict[str, dict[str, Any]]:
    keep = torch.ones(20, 30, dtype=torch.bool, device=device)
    keep[3] = False
    return {
        "boolean": {"attn_mask": keep},
        "additive": {"attn_mask": keep.float().log()},
        "lengths": {"key_lengths": torch.tensor([0, 30], device=device)},
        "key mask": {"key_mask": torch.tensor([[False] * 30, [True] * 30], device=device)},
    }


@pytest.mark.parametrize("kind", ["boolean", "additive", "lengths", "key mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_queries_that_see_nothing(kind: str, dtype: torch.dtype, device: str) -> None:
    """Output 0, gradient 0, log-sum-exp -inf; never NaN."""
    inputs = qkv(device=device)
    arguments = removed_queries(device)[kind]
    check(NAME, dtype, return_lse=True, **inputs, **arguments)
    output, lse = F.scaled_dot_product_attention(**inputs, **arguments, return_lse=True)
    removed = (slice(None), slice(None), 3) if kind in ("boolean", "additive") else (0,)
    assert (output[removed] == 0).all()
    assert (lse[removed] == -torch.inf).all()
    (dq,) = torch.autograd.grad(output, inputs["query"], torch.randn_like(output))
    assert (dq[removed] == 0).all()


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)])
def test_no_queries_or_no_keys(lengths: tuple[int, int], device: str) -> None:
    inputs = qkv(lengths, device=device)
    output, lse = F.scaled_dot_product_attention(**inputs, return_lse=True)
    assert output.shape == (2, 2, lengths[0], 16)
    assert (output == 0).all()
    assert (lse == -torch.inf).all()
    grads = torch.autograd.grad(output, tuple(inputs.values()), torch.randn_like(output))
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("shape", [(9, 8), (3, 9, 8), (2, 3, 2, 9, 8)], ids=str)
def test_other_ranks(shape: tuple[int, ...], device: str) -> None:
    inputs = {name: grad(*shape, device=device) for name in ("query", "key", "value")}
    check(NAME, torch.float32, only=first, is_causal=True, **inputs)


def test_batch_dimensions_broadcast(device: str) -> None:
    inputs = qkv(device=device)
    inputs["key"] = grad(1, 2, 30, 16, device=device)
    inputs["value"] = grad(2, 1, 30, 16, device=device)
    check(NAME, torch.float32, only=first, **inputs)


def test_interleaved_projection_is_read_in_place(device: str) -> None:
    """[batch, length, 3, heads, dim], as one product gives it, and the output laid out to match."""
    packed = torch.randn(2, 20, 3, 2, 16, device=device)
    views = [packed[:, :, i].transpose(1, 2).requires_grad_() for i in range(3)]
    assert not views[0].is_contiguous()
    inputs: dict[str, Any] = dict(zip(("query", "key", "value"), views, strict=True))
    check(NAME, torch.float32, only=first, **inputs)
    output = F.scaled_dot_product_attention(**inputs)
    assert output.transpose(1, 2).is_contiguous()


def test_strided_head_dim(device: str) -> None:
    inputs = {
        name: torch.randn(2, 2, 16, 20, device=device).transpose(2, 3).requires_grad_()
        for name in ("query", "key", "value")
    }
    check(NAME, torch.float32, only=first, **inputs)


@pytest.mark.parametrize(
    ("p", "lengths", "causal"),
    [(0.1, (20, 30), False), (0.6, (20, 30), True), (0.3, (40, 140), False)],
    ids=str,
)
def test_dropout_is_the_mask_of_the_seed(
    p: float, lengths: tuple[int, int], causal: bool, device: str
) -> None:
    """In the last case over more than one tile of keys."""
    from fusedformer_kernels.rows.dropout import dropout_mask

    torch.manual_seed(7)
    seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
    keep = dropout_mask(seed, p, 2, *lengths, True).reshape(1, 2, *lengths)
    inputs: dict[str, Any] = dict(qkv(lengths, device=device, batch=1))
    inputs["attn_mask"] = torch.randn(1, 1, lengths[0], lengths[1], device=device).requires_grad_()

    def candidate(**arguments: Any) -> Tensor:
        torch.manual_seed(7)
        return F.scaled_dot_product_attention(dropout_p=p, is_causal=causal, **arguments)

    def truth(**arguments: Any) -> Tensor:
        return first(
            reference.scaled_dot_product_attention(
                dropout_p=p, keep=keep, is_causal=causal, **arguments
            )
        )

    assert_function_parity(candidate, truth, truth, inputs, dtype=torch.float32)


def test_dropout_of_everything(device: str) -> None:
    inputs = qkv(device=device)
    output = F.scaled_dot_product_attention(**inputs, dropout_p=1.0)
    assert (output == 0).all()
    grads = torch.autograd.grad(output, tuple(inputs.values()), torch.randn_like(output))
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_mask(reentrant: bool, device: str) -> None:
    inputs = qkv(device=device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    tensors = tuple(inputs.values())
    torch.manual_seed(3)
    plain = run(*tensors)
    dy = torch.randn_like(plain)
    torch.manual_seed(3)
    again = checkpoint(run, *tensors, use_reentrant=reentrant)
    assert torch.equal(plain, again)
    for direct, redrawn in zip(_grads(plain, tensors, dy), _grads(again, tensors, dy), strict=True):
        assert torch.equal(direct, redrawn)


def _grads(output: Tensor, tensors: tuple[Tensor, ...], dy: Tensor) -> list[Tensor]:
    for tensor in tensors:
        tensor.grad = None
    output.backward(dy)
    return [tensor.grad.clone() for tensor in tensors if tensor.grad is not None]


def test_same_bits_twice(device: str) -> None:
    inputs = qkv((70, 140), batch=1, device=device)
    output = F.scaled_dot_product_attention(**inputs)
    dy = torch.randn_like(output)
    tensors = tuple(inputs.values())
    runs = [torch.autograd.grad(output, tensors, dy, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_result_does_not_depend_on_padding(dtype: torch.dtype, device: str) -> None:
    """A sequence alone and in a padded batch: the same bits, forward and backward."""
    inputs = {k: v.detach().to(dtype) for k, v in qkv((150, 150), device=device).items()}
    lengths = torch.tensor([97, 150], device=device)
    dy = torch.randn(2, 2, 150, 16, device=device, dtype=dtype)
    dy[0, :, 97:] = 0
    padded = [t.clone().requires_grad_() for t in inputs.values()]
    together = F.scaled_dot_product_attention(*padded, key_lengths=lengths)
    together_grads = torch.autograd.grad(together, padded, dy)
    single = [t[:1, :, :97].clone().requires_grad_() for t in inputs.values()]
    alone = F.scaled_dot_product_attention(*single)
    alone_grads = torch.autograd.grad(alone, single, dy[:1, :, :97])
    assert torch.equal(together[:1, :, :97], alone)
    for a, b in zip(together_grads, alone_grads, strict=True):
        assert torch.equal(a[:1, :, :97], b)


def test_only_what_needs_a_gradient_is_computed(device: str) -> None:
    from fusedformer_kernels.runtime.launch import recorded_launches

    inputs = qkv(device=device)
    frozen = {k: v.detach() if k != "query" else v for k, v in inputs.items()}
    output = F.scaled_dot_product_attention(**frozen)
    with recorded_launches(run=True) as launches:
        output.backward(torch.randn_like(output))
    names = [launch.name for launch in launches]
    assert names == ["_attention_delta", "_attention_backward_queries"]


def test_double_backward_is_a_clear_error(device: str) -> None:
    inputs = qkv(device=device)
    output = F.scaled_dot_product_attention(**inputs)
    (dq,) = torch.autograd.grad(
        output, inputs["query"], torch.randn_like(output), create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"double backward.*backend\('torch'\)"):
        dq.backward(torch.randn_like(dq))


def test_float64_is_a_clear_error(device: str) -> None:
    x = torch.randn(1, 1, 4, 8, device=device, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"float64.*backend\('torch'\)"):
        F.scaled_dot_product_attention(x, x, x)
    with backend("torch"):
        assert F.scaled_dot_product_attention(x, x, x).dtype == torch.float64
