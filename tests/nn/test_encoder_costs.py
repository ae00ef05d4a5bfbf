"""What a layer of the packed encoder costs: kernel launches, and numbers kept for the backward."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from fusedformer import backend, nn

E, H, F, N, S = 32, 2, 64, 2, 8
PADDING = torch.arange(S) >= torch.tensor([[S], [3]])
TOKENS = S + 3


class Calls(TorchDispatchMode):
    """Names of all calls that may launch a kernel: no views, no questions, no empty tensors."""

    HOST = ("promote_types", "empty", "new_empty", "detach", "new_empty_strided")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if func.namespace == "aten" and not func.is_view and name not in self.HOST:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def encoder(layers: int, **settings: Any) -> nn.TransformerEncoder:
    given = {"dropout": 0.1, "batch_first": True, "activation": "gelu", **settings}
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, F, **given), layers)


def launches(stack: nn.TransformerEncoder, device: str) -> list[Counter[str]]:
    """Of forward and backward."""
    from fusedformer_kernels.runtime.launch import recorded_launches

    stack = stack.to(device)
    src = torch.randn(N, S, E, device=device, requires_grad=True)
    found = []

    def counted(call: Any) -> Any:
        with recorded_launches(run=True) as ours, Calls() as torchs:
            result = call()
        names = [launch.name for launch in ours]
        ours.clear()  # what it holds would be copied, not taken, as a gradient
        found.append(Counter([*names, *torchs.names]))
        return result

    with backend("triton"):
        output = counted(lambda: stack(src, src_key_padding_mask=PADDING.to(device)))
        counted(lambda: output.backward(torch.ones_like(output)))
    return found


FORWARD = {
    "addmm": 1, "_attention_forward": 1, "mm": 3, "_norm_forward": 2,
    "_bias_activation_forward": 1,
}  # fmt: skip
BACKWARD = {
    "_norm_backward": 2, "_bias_activation_backward": 1, "_sum_partials": 3,
    "_attention_delta": 1, "_attention_backward_keys": 1, "_attention_backward_queries": 1,
    "sum": 1,
}  # fmt: skip


@pytest.mark.parametrize("norm_first", [False, True])
def test_kernel_launches_of_one_layer(norm_first: bool, device: str) -> None:
    """As the README says: 8 forward, 18 backward, and what the whole encoder adds to them.

    Bias gradients are held by the recording, so that autograd copies one; on a machine it is not.
    """
    one, two, three = (launches(encoder(n, norm_first=norm_first), device) for n in (1, 2, 3))
    products = {"mm": 8} if norm_first else {"mm": 6, "addmm_": 2}
    for index, wanted in enumerate((FORWARD, {**BACKWARD, **products})):
        layer = three[index] - two[index]
        layer.pop("copy_", 0)
        assert layer == wanted
        assert (two[index] - one[index]).keys() - {"copy_"} == layer.keys()
        assert layer.total() == (8, 18)[index]
    entry = one[0] - Counter(FORWARD)
    assert entry["_gather_rows"] == 2 and entry["randint"] == 1 and entry["_list_work"] == 1


def test_work_is_planned_once_for_all_layers(device: str) -> None:
    forward, backward = launches(encoder(3), device)
    assert forward["_list_work"] + backward["_list_work"] <= 3


def saved_numbers(stack: torch.nn.Module, name: Any, device: str, dtype: torch.dtype) -> float:
    """Bytes that forward keeps for the backward, a token and layer, parameters left out."""
    stack = stack.to(device, dtype)
    kept: dict[int, int] = {}
    parameters = {p.data_ptr() for p in stack.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and tensor.dtype != torch.int64:  # seeds
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    src = torch.randn(N, S, E, device=device, dtype=dtype, requires_grad=True)
    with backend(name), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = stack(src, src_key_padding_mask=PADDING.to(device))
        assert output.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("checkpoint_activation", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_layer_keeps_for_the_backward(
    dtype: torch.dtype, checkpoint_activation: bool, device: str
) -> None:
    """16 E numbers a token with F = 4 E, 12 E with checkpoint_activation, and statistics."""
    totals = [
        saved_numbers(
            encoder(n, checkpoint_activation=checkpoint_activation), "triton", device, dtype
        )
        for n in (2, 3)
    ]
    activations = 8 * E + (F if checkpoint_activation else 2 * F)
    # float32 mean and rstd of two norms, top and sum of each head
    statistics = 4 * (2 * 2 + 2 * H)
    wanted = TOKENS * (activations * dtype.itemsize + statistics)
    assert totals[1] - totals[0] == wanted


def gradients(stack: nn.TransformerEncoder, src: Tensor, grad: Tensor) -> list[Tensor]:
    torch.manual_seed(5)
    output = stack(src, src_key_padding_mask=PADDING.to(src.device))
    return list(torch.autograd.grad(output, [src, *stack.parameters()], grad))


@pytest.mark.parametrize("activation", ["gelu", "relu", torch.nn.SiLU()])
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_checkpointed_activations_change_no_bit(name: Any, activation: Any, device: str) -> None:
    stack = encoder(2, dropout=0.2, activation=activation).to(device)
    src, grad = (torch.randn(N, S, E, device=device) for _ in range(2))
    src.requires_grad_()
    with backend(name):
        kept = gradients(stack, src, grad)
        for layer in stack.layers:
            layer.checkpoint_activation = True
        again = gradients(stack, src, grad)
    assert all(map(torch.equal, kept, again))


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_frozen_layers_cost_nothing(norm_first: bool, name: Any, device: str) -> None:
    """No weight gradients for frozen parameters, no backward at all below the last trainable."""
    stack = encoder(3, dropout=0.0, norm_first=norm_first).to(device)
    src, grad = (torch.randn(N, S, E, device=device) for _ in range(2))
    with backend(name):
        whole = gradients(stack, src.requires_grad_(), grad)
    stack.layers[:2].requires_grad_(False)
    stack.layers[2].linear1.requires_grad_(False)
    padding = PADDING.to(device)
    with backend(name):
        output = stack(src.detach(), src_key_padding_mask=padding)
        with Calls() as calls:
            output.backward(grad)
    names = dict(stack.named_parameters())
    for (key, parameter), wanted in zip(names.items(), whole[1:], strict=True):
        assert (parameter.grad is not None) == parameter.requires_grad, key
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, wanted), key
    # Input and weight of linear2 and out_proj, weight of in_proj, input of linear1; and where the
    # trainable norm comes first, input of in_proj.
    products = [n for n in calls.names if n in ("mm", "addmm", "addmm_", "_linear_pointwise")]
    assert len(products) == 6 + norm_first


@pytest.mark.parametrize("norm_first", [False, True])
def test_double_backward_on_the_torch_backend(norm_first: bool) -> None:
    # ATen's fused attention has no second derivative.
    with backend("torch"), sdpa_kernel(SDPBackend.MATH):
        _check_double_backward(norm_first)


def _check_double_backward(norm_first: bool) -> None:
    stack = encoder(1, dropout=0.0, norm_first=norm_first).double()
    padding = torch.tensor([[False] * 3, [False, False, True]])
    parameters = [p.detach().requires_grad_() for p in stack.parameters()]
    names = [n for n, _ in stack.named_parameters()]

    def call(src: Tensor, *given: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(
            stack, dict(zip(names, given, strict=True)), (src,), {"src_key_padding_mask": padding}
        )
        return found

    src = torch.randn(2, 3, E, dtype=torch.float64, requires_grad=True)
    output = call(src, *parameters)
    dy = torch.randn_like(output).requires_grad_()
    grads = torch.autograd.grad(output, [src, *parameters], dy, create_graph=True)
    probes = [torch.randn_like(g) for g in grads]
    leaves = [src, *parameters]
    found = torch.autograd.grad(grads, leaves, probes, materialize_grads=True)

    def plain(src: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        """The same by torch.func, which takes the layer as calls of ATen."""
        _, pull, *_ = torch.func.vjp(call, src, *given)
        pulled: tuple[Tensor, ...] = pull(dy.detach())
        return pulled

    _, pull, *_ = torch.func.vjp(plain, src.detach(), *(p.detach() for p in parameters))
    wanted = pull(tuple(probes))
    for got, want in zip(found, wanted, strict=True):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-9)


def test_double_backward_in_kernels_says_so(device: str) -> None:
    stack = encoder(1).to(device)
    src = torch.randn(N, S, E, device=device, requires_grad=True)
    with backend("triton"):
        output = stack(src, src_key_padding_mask=PADDING.to(device))
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(output, src, torch.ones_like(output), create_graph=True)
