"""The factor of each query on attention's relative biases, as WavLM has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.ops.judge import grad
from torch import Tensor

from fusedformer import backend, reference
from fusedformer import functional as F
from fusedformer.testing import assert_function_parity

attention: Any = F.scaled_dot_product_attention
varlen_attention: Any = F.varlen_attention


def inputs_of(lengths: tuple[int, ...], device: str) -> dict[str, Tensor]:
    """Packed tokens of two heads, a table whose ends are within a sequence, and gates."""
    inputs = {name: grad(sum(lengths), 2, 16, device=device) for name in ("query", "key", "value")}
    inputs["relative_bias"] = grad(2, 41, device=device)
    inputs["relative_bias_gate"] = grad(sum(lengths), 2, device=device)
    return inputs


def packed(inputs: dict[str, Tensor], lengths: tuple[int, ...]) -> Tensor:
    starts = torch.tensor([0, *lengths], device=inputs["query"].device).cumsum(0)
    found: Tensor = varlen_attention(
        **inputs, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=max(lengths),
        max_seqlen_k=max(lengths),
    )  # fmt: skip
    return found


def test_alone_and_packed_are_the_same_bits(device: str) -> None:
    """Outputs and the gradients of rows; gates are read by their strides."""
    lengths = 9, 70
    inputs = inputs_of(lengths, device)
    names = [name for name in inputs if name != "relative_bias"]
    output, dy = packed(inputs, lengths), torch.randn(79, 2, 16, device=device)
    together = [output, *torch.autograd.grad(output, [inputs[n] for n in names], dy)]
    for rows in (slice(9), slice(9, 79)):
        own = {n: inputs[n].detach()[rows].transpose(0, 1)[None].requires_grad_() for n in names}
        alone = attention(**own, relative_bias=inputs["relative_bias"])
        dy_own = dy[rows].transpose(0, 1)[None]
        grads = torch.autograd.grad(alone, list(own.values()), dy_own)
        for one, whole in zip((alone, *grads), together, strict=True):
            assert torch.equal(one[0].transpose(0, 1), whole[rows])


def test_a_gate_of_one_changes_no_bit(device: str) -> None:
    inputs = inputs_of((40,), device)
    gate = torch.ones_like(inputs.pop("relative_bias_gate"))
    plain, gated = packed(inputs, (40,)), packed({**inputs, "relative_bias_gate": gate}, (40,))
    assert torch.equal(plain, gated) and plain.abs().max() > 0.1
    dy = torch.randn_like(plain)
    found = [torch.autograd.grad(each, list(inputs.values()), dy) for each in (plain, gated)]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_biases_and_gates_of_few_dimensions(dtype: torch.dtype, device: str) -> None:
    """Of one head, in 2-D; scores that all but choose one key for each query."""
    inputs = {name: grad(45, 16, device=device) for name in ("query", "key", "value")}
    inputs["relative_bias"] = (8 * grad(1, 31, device=device)).detach().requires_grad_()
    inputs["relative_bias_gate"] = grad(45, device=device)

    def stock(relative_bias: Tensor, relative_bias_gate: Tensor, **heads: Any) -> Any:
        at = torch.arange(45, device=device)
        bias = relative_bias[0, 15 + (at - at[:, None]).clamp(-15, 15)]
        return torch.nn.functional.scaled_dot_product_attention(
            **heads, attn_mask=relative_bias_gate[:, None] * bias
        )

    assert_function_parity(
        attention, stock, lambda **given: reference.scaled_dot_product_attention(**given)[0],
        inputs, dtype=dtype,
    )  # fmt: skip


def test_second_derivatives_on_the_torch_backend() -> None:
    inputs = {n: grad(5, 1, 2).detach().double() for n in ("query", "key", "value")}
    inputs["relative_bias"] = torch.randn(1, 5, dtype=torch.float64)
    inputs["relative_bias_gate"] = torch.randn(5, 1, dtype=torch.float64)
    names, values = list(inputs), [t.requires_grad_() for t in inputs.values()]
    with backend("torch"):
        assert torch.autograd.gradgradcheck(
            lambda *given: packed(dict(zip(names, given, strict=True)), (2, 3)), values
        )


def test_tables_are_spread_over_all_distances(device: str) -> None:
    """In float32, whatever their strides; tiles read some places beyond the sequences."""
    pytest.importorskip("triton")
    from fusedformer_kernels.attention.spread_table import spread_table

    for dtype in (torch.float32, torch.bfloat16):
        table = torch.randn(9, 3, dtype=dtype).t()
        spread, middle = spread_table(table.to(device), 5, 700)
        distances = torch.arange(spread.shape[1]) - middle
        assert distances[0] < -705 - 128
        assert distances[-1] > 705 + 128
        assert torch.equal(spread.cpu(), table[:, distances.clamp(-4, 4) + 4].float())


def test_calls_without_a_gate_get_no_argument_more(device: str) -> None:
    """So that their kernels are compiled as if there were no gates."""
    pytest.importorskip("triton")
    from fusedformer_kernels.attention.arguments import attention_arguments
    from fusedformer_kernels.attention.terms import AttentionTerms

    query, table = torch.randn(1, 2, 5, 16, device=device), torch.randn(2, 9, device=device)
    scores = attention_arguments(query, query, 16, AttentionTerms(table=table)).scores
    fields = scores._asdict()
    assert all(fields[name] is None for name in fields if name.startswith("gate"))
    assert scores.table is not None
