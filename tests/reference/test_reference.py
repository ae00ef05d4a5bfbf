"""The definitions against torch.nn.functional in float64, and their gradients by differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer import reference


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


# Called with lists of tensors, whose lengths types do not have.
torch_attention: Callable[..., Any] = F.scaled_dot_product_attention
definition: Callable[..., Any] = reference.scaled_dot_product_attention


def agree(ours: Any, torchs: Any, inputs: list[Tensor]) -> None:
    """The same output and the same gradients, to float64's own rounding (torch's defaults)."""
    torch.testing.assert_close(ours, torchs)
    dy = torch.randn_like(ours)
    grads = [torch.autograd.grad(y, inputs, dy, retain_graph=True) for y in (ours, torchs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def gradcheck(function: Callable[..., Any], *inputs: Tensor) -> None:
    assert torch.autograd.gradcheck(function, inputs)


class TestSoftmax:
    @pytest.mark.parametrize("name", ["softmax", "log_softmax"])
    @pytest.mark.parametrize(
        ("shape", "dim"), [((6,), 0), ((4, 6), 1), ((4, 6), 0), ((2, 3, 2, 4, 2), 2)], ids=str
    )
    def test_equals_torch(self, name: str, shape: tuple[int, ...], dim: int) -> None:
        x = rand(*shape)
        agree(getattr(reference, name)(x, dim), getattr(F, name)(x, dim), [x])

    @pytest.mark.parametrize("name", ["softmax", "log_softmax"])
    @pytest.mark.parametrize("shape", [(4, 6), (6,), (2, 1, 6), (4, 1), (1, 1)], ids=str)
    def test_additive_mask(self, name: str, shape: tuple[int, ...]) -> None:
        x, mask = rand(2, 4, 6), rand(*shape)
        ours = getattr(reference, name)(x, -1, scale=-0.3, mask=mask)
        agree(ours, getattr(F, name)(-0.3 * x + mask, -1), [x, mask])

    @pytest.mark.parametrize("name", ["softmax", "log_softmax"])
    def test_boolean_and_causal_masks(self, name: str) -> None:
        x = rand(2, 4, 6)
        mask = torch.rand(2, 1, 6) > 0.4
        mask[..., 0] = True
        hidden = ~(mask & torch.ones(4, 6, dtype=torch.bool).tril())
        ours = getattr(reference, name)(x, -1, mask=mask, is_causal=True)
        torchs = getattr(F, name)(x.masked_fill(hidden, -torch.inf), -1)
        torch.testing.assert_close(ours, torchs)
        assert (ours[hidden.expand_as(ours)] == (0.0 if name == "softmax" else -torch.inf)).all()

    def test_removed_slices(self) -> None:
        x = rand(3, 5)
        keep = torch.ones(3, 5, dtype=torch.bool)
        keep[1] = False
        additive = torch.zeros(3, 5, dtype=torch.float64).masked_fill(~keep, -torch.inf)
        for mask in (keep, additive):
            y = reference.softmax(x, -1, mask=mask)
            log_y = reference.log_softmax(x, -1, mask=mask)
            assert (y[1] == 0).all()
            assert (log_y[1] == -torch.inf).all()
            (gradient,) = torch.autograd.grad(y, x, torch.randn_like(y))
            (log_gradient,) = torch.autograd.grad(log_y, x, torch.randn_like(y))
            for g in (gradient, log_gradient):
                assert (g[1] == 0).all()
                assert g.isfinite().all()

    def test_row_of_minus_infinity_without_a_mask_is_nan(self) -> None:
        x = torch.full((2,), -torch.inf, dtype=torch.float64)
        assert reference.softmax(x, 0).isnan().all()
        assert reference.log_softmax(x, 0).isnan().all()

    def test_large_scores_do_not_overflow(self) -> None:
        x = rand(3, 7)
        torch.testing.assert_close(reference.softmax(x + 1e4, -1), F.softmax(x, -1))

    def test_dtype_is_cast_to_first(self) -> None:
        assert reference.softmax(torch.arange(3), 0, dtype=torch.float64).dtype == torch.float64

    @pytest.mark.parametrize("name", ["softmax", "log_softmax"])
    def test_gradients_by_differences(self, name: str) -> None:
        function = getattr(reference, name)
        gradcheck(lambda x, m: function(x, 1, scale=0.7, mask=m), rand(2, 3, 4), rand(3, 1))


class TestNorms:
    @pytest.mark.parametrize("dims", [1, 2, 3])
    @pytest.mark.parametrize("weight", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    def test_layer_norm_equals_torch(self, dims: int, weight: bool, bias: bool) -> None:
        x = rand(2, 3, 4)
        shape = x.shape[-dims:]
        w, b = (rand(*shape) if there else None for there in (weight, bias))
        inputs = [t for t in (x, w, b) if t is not None]
        ours = reference.layer_norm(x, shape, w, b, 1e-3)
        agree(ours, F.layer_norm(x, shape, w, b, 1e-3), inputs)

    @pytest.mark.parametrize("dims", [1, 2])
    @pytest.mark.parametrize("weight", [False, True])
    def test_rms_norm_equals_torch(self, dims: int, weight: bool) -> None:
        x = rand(2, 3, 4)
        shape = x.shape[-dims:]
        w = rand(*shape) if weight else None
        inputs = [x] if w is None else [x, w]
        agree(reference.rms_norm(x, shape, w, 0.2), F.rms_norm(x, shape, w, 0.2), inputs)

    def test_rms_norm_default_epsilon_is_that_of_float32(self) -> None:
        x = 1e-4 * rand(3, 8).detach()
        eps = torch.finfo(torch.float32).eps
        torch.testing.assert_close(reference.rms_norm(x, (8,)), F.rms_norm(x, (8,), eps=eps))
        single = F.rms_norm(x.float(), (8,))
        torch.testing.assert_close(reference.rms_norm(x.float(), (8,)), single)

    @pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
    @pytest.mark.parametrize("input_bias", [False, True])
    def test_fused_forms_are_their_parts(self, p: float, input_bias: bool) -> None:
        x, residual, w, b = rand(5, 8), rand(5, 8), rand(8), rand(8)
        extra = rand(8) if input_bias else None
        keep = torch.rand(5, 8) >= p
        biased = x if extra is None else x + extra
        # At p = 1 the factor 1 / (1 - p) has nothing to act on.
        total = residual + biased * keep * (1 / (1 - p) if p < 1 else 0.0)
        given: Any = {"input_bias": extra, "p": p, "keep": keep}
        inputs = [t for t in (x, residual, extra) if t is not None]
        agree(reference.dropout_add(x, residual, **given), total, inputs)
        normed, sums = reference.dropout_add_layer_norm(x, residual, (8,), w, b, **given)
        torch.testing.assert_close(sums, total)
        agree(normed, F.layer_norm(total, (8,), w, b), [*inputs, w, b])
        normed, sums = reference.dropout_add_rms_norm(x, residual, (8,), w, 0.1, **given)
        torch.testing.assert_close(sums, total)
        agree(normed, F.rms_norm(total, (8,), w, 0.1), [*inputs, w])

    def test_gradients_by_differences(self) -> None:
        keep = torch.rand(3, 4) > 0.3
        gradcheck(
            lambda x, r, w, b, e: reference.dropout_add_layer_norm(
                x, r, (4,), w, b, input_bias=e, p=0.3, keep=keep
            ),
            rand(3, 4), rand(3, 4), rand(4), rand(4), rand(4),
        )  # fmt: skip
        gradcheck(lambda x, w: reference.rms_norm(x, (4,), w), rand(3, 4), rand(4))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "quick_gelu": lambda x: F.silu(1.702 * x) / 1.702,
}


class TestActivations:
    @pytest.mark.parametrize("name", ACTIVATIONS)
    @pytest.mark.parametrize("bias", [False, True])
    def test_equals_torch(self, name: str, bias: bool) -> None:
        x, b = 4 * torch.randn(9, 8, dtype=torch.float64), rand(8) if bias else None
        x.requires_grad_()
        inputs = [x] if b is None else [x, b]
        torchs = ACTIVATIONS[name](x if b is None else x + b)
        agree(reference.bias_activation(x, b, name), torchs, inputs)

    @pytest.mark.parametrize("name", ACTIVATIONS)
    def test_dropout_scales_what_it_keeps(self, name: str) -> None:
        x, keep = rand(9, 8), torch.rand(9, 8) > 0.4
        ours = reference.bias_activation(x, None, name, p=0.4, keep=keep)
        agree(ours, ACTIVATIONS[name](x) * keep / 0.6, [x])

    @pytest.mark.parametrize("name", ACTIVATIONS)
    def test_gradients_by_differences(self, name: str) -> None:
        gradcheck(lambda x, b: reference.bias_activation(x, b, name), rand(3, 4), rand(4))


def attention(*args: Any, **kwargs: Any) -> Tensor:
    return reference.scaled_dot_product_attention(*args, **kwargs)[0]


def hidden(hide: Tensor) -> Tensor:
    """Additive mask, -inf where ``hide``."""
    return torch.zeros(hide.shape, dtype=torch.float64).masked_fill(hide, -torch.inf)


class TestAttention:
    @pytest.mark.parametrize(
        "leading", [(), (2,), (2, 3), (2, 2, 3)], ids=["2-D", "3-D", "4-D", "5-D"]
    )
    @pytest.mark.parametrize("causal", [False, True])
    def test_every_rank(self, leading: tuple[int, ...], causal: bool) -> None:
        qkv = [rand(*leading, n, d) for n, d in ((5, 4), (7, 4), (7, 6))]
        ours = attention(*qkv, is_causal=causal, scale=0.3)
        torchs = torch_attention(*qkv, is_causal=causal, scale=0.3)
        agree(ours, torchs, qkv)

    def test_default_scale_and_more_queries_than_keys(self) -> None:
        qkv = [rand(2, 3, n, 4) for n in (7, 5, 5)]
        torchs = torch_attention(*qkv, is_causal=True)
        agree(attention(*qkv, is_causal=True), torchs, qkv)

    @pytest.mark.parametrize(
        "shape", [(2, 3, 5, 7), (5, 7), (3, 1, 7), (2, 1, 5, 1), (7,), (1, 1)], ids=str
    )
    def test_masks_broadcast(self, shape: tuple[int, ...]) -> None:
        qkv = [rand(2, 3, n, 4) for n in (5, 7, 7)]
        mask = rand(*shape)
        full = mask.expand(2, 3, 5, 7)
        torchs = torch_attention(*qkv, full)
        agree(attention(*qkv, mask), torchs, [*qkv, mask])
        keep = mask.detach() > -1
        keep.view(-1)[0] = True
        removed = ~keep.expand(2, 3, 5, 7).any(-1, keepdim=True)
        torchs = torch_attention(*qkv, hidden(~keep.expand(2, 3, 5, 7) & ~removed))
        agree(attention(*qkv, keep), torchs.masked_fill(removed, 0.0), qkv)

    def test_mask_and_causal_combine(self) -> None:
        qkv = [rand(2, 3, n, 4) for n in (5, 7, 7)]
        mask = rand(5, 7)
        future = hidden(torch.ones(5, 7, dtype=torch.bool).triu(1))
        torchs = torch_attention(*qkv, mask + future)
        agree(attention(*qkv, mask, is_causal=True), torchs, [*qkv, mask])

    @pytest.mark.parametrize("leading", [(2,), (2, 3), (2, 2, 3)], ids=["3-D", "4-D", "5-D"])
    def test_key_mask_and_key_lengths(self, leading: tuple[int, ...]) -> None:
        qkv = [rand(*leading, n, 4) for n in (5, 7, 7)]
        batch = leading[:-1] if len(leading) > 1 else leading
        rows = int(torch.tensor(batch).prod())
        lengths = torch.tensor([3, 7, 1, 6])[:rows]
        mask = torch.rand(rows, 7) > 0.4
        mask[:, 0] = True
        within = torch.arange(7) < lengths[:, None]
        for keep, given in (
            (mask, {"key_mask": mask}),
            (within, {"key_lengths": lengths}),
            (mask & within, {"key_mask": mask, "key_lengths": lengths}),
        ):
            # [batch, keys] against [*batch, (heads,) queries, keys]
            spread = keep.view(*batch, *(1,) * (len(leading) - len(batch) + 1), 7)
            torchs = torch_attention(*qkv, spread.expand(*leading, 5, 7))
            agree(attention(*qkv, **given), torchs, qkv)

    @pytest.mark.parametrize("key_heads", [1, 2, 4])
    def test_grouped_heads(self, key_heads: int) -> None:
        q, k, v = rand(2, 4, 5, 4), rand(2, key_heads, 7, 4), rand(2, key_heads, 7, 6)
        torchs = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        agree(attention(q, k, v, enable_gqa=True), torchs, [q, k, v])

    def test_batch_dimensions_broadcast(self) -> None:
        q, k, v = rand(2, 1, 5, 4), rand(1, 3, 7, 4), rand(2, 3, 7, 4)
        wide = [t.expand(2, 3, *t.shape[-2:]) for t in (q, k, v)]
        agree(attention(q, k, v), torch_attention(*wide), [q, k, v])

    def test_log_sum_exp(self) -> None:
        q, k, v = (rand(2, 3, n, 4) for n in (5, 7, 7))
        mask = rand(5, 7)
        _, lse = reference.scaled_dot_product_attention(q, k, v, mask, scale=-0.6)
        agree(lse, torch.logsumexp(-0.6 * q @ k.mT + mask, -1), [q, k, mask])

    def test_dropout(self) -> None:
        q, k, v = (rand(2, 3, n, 4) for n in (5, 7, 7))
        keep = torch.rand(2, 3, 5, 7) > 0.4
        weights = F.softmax(q @ k.mT / 2, -1) * keep / 0.6
        agree(attention(q, k, v, dropout_p=0.4, keep=keep), weights @ v, [q, k, v])
        assert (attention(q, k, v, dropout_p=1.0, keep=keep & False) == 0).all()

    @pytest.mark.parametrize("kind", ["boolean", "additive", "key_mask", "key_lengths"])
    def test_queries_that_see_nothing(self, kind: str) -> None:
        qkv = [rand(2, 3, n, 4) for n in (5, 7, 7)]
        keep = torch.ones(2, 1, 5, 7, dtype=torch.bool)
        keep[0, :, 2] = False
        given: dict[str, Any] = {
            "boolean": {"attn_mask": keep},
            "additive": {"attn_mask": hidden(~keep)},
            "key_mask": {"key_mask": torch.tensor([[False] * 7, [True] * 7])},
            "key_lengths": {"key_lengths": torch.tensor([0, 7])},
        }[kind]
        rows = (0, slice(None), 2) if kind in ("boolean", "additive") else (0,)
        output, lse = definition(*qkv, **given)
        assert (output[rows] == 0).all()
        assert (lse[rows] == -torch.inf).all()
        draws = [torch.randn_like(t) for t in (output, lse)]
        grads = torch.autograd.grad((output, lse), qkv, draws)
        assert all(g.isfinite().all() for g in grads)
        assert (grads[0][rows] == 0).all()
        plain, plain_lse = definition(*qkv)
        assert torch.equal(output[1], plain[1])
        assert torch.equal(lse[1], plain_lse[1])

    def test_no_keys_and_no_queries(self) -> None:
        qkv = rand(2, 5, 4), rand(2, 0, 4), rand(2, 0, 6)
        output, lse = definition(*qkv)
        assert output.shape == (2, 5, 6)
        assert (output == 0).all()
        assert (lse == -torch.inf).all()
        assert attention(rand(2, 0, 4), rand(2, 7, 4), rand(2, 7, 6)).shape == (2, 0, 6)

    @pytest.mark.parametrize("causal", [False, True])
    def test_gradients_by_differences(self, causal: bool) -> None:
        keep = torch.rand(1, 2, 3, 4) > 0.3
        gradcheck(
            lambda q, k, v, m: reference.scaled_dot_product_attention(
                q, k, v, m, 0.3, causal, enable_gqa=True, keep=keep,
                key_lengths=torch.tensor([3]),
            ),
            rand(1, 2, 3, 4), rand(1, 1, 4, 4), rand(1, 1, 4, 2), rand(3, 4),
        )  # fmt: skip


class TestContrastive:
    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    @pytest.mark.parametrize(("columns", "offset"), [(5, 0), (8, 2)])
    def test_softmax_form_is_cross_entropy_both_ways(
        self, columns: int, offset: int, reduction: str
    ) -> None:
        a, b, scale = rand(5, 4), rand(columns, 4), rand()
        logits, labels = scale * a @ b.T, torch.arange(5) + offset
        torchs = (
            F.cross_entropy(logits, labels, reduction=reduction)
            + F.cross_entropy(logits.T[labels], torch.arange(5), reduction=reduction)
        ) / 2
        given: Any = {"label_offset": offset, "reduction": reduction}
        agree(reference.contrastive_loss(a, b, scale, **given), torchs, [a, b, scale])

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize(("columns", "offset"), [(5, 0), (8, 2)])
    def test_sigmoid_form_is_binary_cross_entropy(
        self, columns: int, offset: int, reduction: str
    ) -> None:
        a, b, scale, bias = rand(5, 4), rand(columns, 4), rand(), rand()
        targets = torch.eye(columns, dtype=torch.float64)[offset : offset + 5]
        logits = scale * a @ b.T + bias
        torchs = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        torchs = torchs / (5 if reduction == "mean" else 1)
        given: Any = {"label_offset": offset, "reduction": reduction}
        ours = reference.sigmoid_contrastive_loss(a, b, scale, bias, **given)
        agree(ours, torchs, [a, b, scale, bias])

    def test_gradients_by_differences(self) -> None:
        gradcheck(
            lambda a, b, s: reference.contrastive_loss(a, b, s, label_offset=1),
            rand(2, 3), rand(4, 3), rand(),
        )  # fmt: skip
        gradcheck(reference.sigmoid_contrastive_loss, rand(2, 3), rand(4, 3), rand(), rand())
