"""Encoders whose sequence is spread over ranks train as on one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.distributed.ranks import Ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fusedformer
from fusedformer import backend, nn
from fusedformer.distributed import (
    context_parallel,
    join_sequence,
    split_sequence,
    sum_gradients,
)
from fusedformer.testing import compare_tensors

N, S, E = 2, 16, 16
Results = dict[str, Tensor]


def stock_stack(norm_first: bool, layers: int = 2) -> torch.nn.Module:
    torch.manual_seed(7)
    layer = torch.nn.TransformerEncoderLayer(E, 2, 24, 0.0, batch_first=True, norm_first=norm_first)
    norm = torch.nn.LayerNorm(E) if norm_first else None
    stack = torch.nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=False)
    for parameter in stack.parameters():  # layers that differ, biases and norms that do something
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return stack


def made(padded: bool) -> dict[str, Tensor]:
    """Input, output gradient and padding, that of the second sequence the last half and more."""
    padding = torch.arange(S) >= torch.tensor([S, S // 2 - 1])[:, None]
    padding &= padded
    dy = torch.randn(N, S, E).masked_fill(padding[..., None], 0.0)
    return {"src": torch.randn(N, S, E), "dy": dy, "padding": padding}


def step(
    stack: torch.nn.Module, inputs: dict[str, Tensor], causal: bool, group: Any = None
) -> Results:
    """Output, gradients, and what a step of the optimizer makes of the parameters."""
    optimizer = torch.optim.SGD(stack.parameters(), 0.1, weight_decay=0.1)
    src = inputs["src"].detach().requires_grad_()
    length = src.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).triu(1) if causal else None
    output = stack(src, mask=mask, src_key_padding_mask=inputs["padding"], is_causal=causal)
    output.backward(inputs["dy"])
    if group is not None:
        sum_gradients(stack.parameters(), group)
    optimizer.step()
    assert src.grad is not None
    found = {"output": output.detach(), "grad of src": src.grad}
    for name, parameter in getattr(stack, "module", stack).named_parameters():
        assert parameter.grad is not None
        found |= {f"grad of {name}": parameter.grad, f"new {name}": parameter.detach()}
    return found


def on_ranks(
    mesh: DeviceMesh, name: Any, norm_first: bool, inputs: dict[str, Tensor], settings: Any
) -> Results:
    group, causal = mesh.get_group(), settings["is_causal"]
    order = {"load_balance": settings["load_balance"]}
    stack = stock_stack(norm_first, settings["layers"])
    fusedformer.fuse(stack)
    context_parallel(stack, group, **order)
    own = {k: split_sequence(t, group, **order) for k, t in inputs.items()}
    stack = copy.deepcopy(stack)
    with backend(name):
        if settings.get("ddp"):
            own["dy"] *= mesh.size()
            stack = DistributedDataParallel(stack, process_group=group)
            found = step(stack, own, causal)
            found["grad of src"] /= mesh.size()
        else:
            found = step(stack, own, causal, group)
    for key in ("output", "grad of src"):
        found[key] = join_sequence(found[key], group, **order)
    return found


@pytest.mark.parametrize(
    ("name", "size", "norm_first", "settings"),
    [
        ("torch", 2, False, {"is_causal": False, "load_balance": False, "layers": 2}),
        ("torch", 4, False, {"is_causal": True, "load_balance": True, "layers": 2}),
        ("torch", 4, True, {"is_causal": False, "load_balance": False, "layers": 2}),
        ("torch", 2, True, {"is_causal": True, "load_balance": True, "layers": 1, "ddp": True}),
        ("triton", 2, True, {"is_causal": True, "load_balance": False, "layers": 1}),
    ],
    ids=lambda value: str(value),
)
def test_a_training_step_is_that_of_one_process(
    ranks: Ranks, name: str, size: int, norm_first: bool, settings: dict[str, Any]
) -> None:
    causal = settings["is_causal"]
    inputs = made(padded=not causal)
    stock = step(stock_stack(norm_first, settings["layers"]), inputs, causal)
    wide = {k: t if t.dtype == torch.bool else t.double() for k, t in inputs.items()}
    truth = step(stock_stack(norm_first, settings["layers"]).double(), wide, causal)
    everyone = ranks.run(on_ranks, name, norm_first, inputs, settings, size=size)
    real = ~inputs["padding"]
    faults = []
    for key in truth:
        tensors = [results[key] for results in (everyone[0], stock, truth)]
        if key == "output":  # torch leaves numbers at padding
            tensors = [t[real] for t in tensors]
        faults.append(compare_tensors(key, *tensors).fault)
    assert not any(faults), "\n".join(filter(None, faults))
    for other in everyone[1:]:
        assert all(torch.equal(other[key], everyone[0][key]) for key in truth)


def other_ways(mesh: DeviceMesh) -> list[bool]:
    """Whether compiled and checkpointed encoders have the bits of the plain one."""
    group = mesh.get_group()
    stack = stock_stack(norm_first=True, layers=1)
    fusedformer.fuse(stack)
    context_parallel(stack, group)
    x, dy = split_sequence(torch.randn(2, N, S, E), group, 2)

    def differentiated(call: Any) -> list[Tensor]:
        output = call(x)
        return [output, *torch.autograd.grad(output, list(stack.parameters()), dy)]

    def checkpointed(x: Tensor) -> Any:
        return checkpoint(stack, x, use_reentrant=False)

    compiled = torch.compile(stack, backend="eager")
    with backend("torch"):
        want, *others = (differentiated(call) for call in (stack, checkpointed, compiled))
    return [all(map(torch.equal, want, found)) for found in others]


def test_compiled_and_checkpointed_encoders_have_the_same_bits(ranks: Ranks) -> None:
    assert ranks.run(other_ways, size=2) == [[True, True]] * 2


def autocast(mesh: DeviceMesh, x: Tensor) -> Tensor:
    group, stack = mesh.get_group(), stock_stack(norm_first=False, layers=1)
    fusedformer.fuse(stack)
    own = x if mesh.size() == 1 else split_sequence(x, group)
    if mesh.size() > 1:
        context_parallel(stack, group)
    with backend("torch"), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = stack(own)
    return output if mesh.size() == 1 else join_sequence(output, group)


def test_under_autocast_it_is_as_close_to_the_truth_as_one_process(ranks: Ranks) -> None:
    x = torch.randn(N, S, E)
    truth = stock_stack(norm_first=False, layers=1).double()(x.double()).detach()
    found, stock = (ranks.run(autocast, x, size=size)[0] for size in (2, 1))
    comparison = compare_tensors("output", found, stock, truth)
    assert comparison.passed, comparison.fault


def messages_of(calls: list[Any]) -> list[str]:
    found = []
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        found.append(str(error.value))
    return found


def misuse(mesh: DeviceMesh) -> list[str]:
    """What is said where attention over a group has no meaning."""
    group, x = mesh.get_group(), torch.randn(1, 4, E)
    one = context_parallel(nn.MultiheadAttention(E, 2, batch_first=True), group)
    stack: Any = stock_stack(False)
    fusedformer.fuse(stack)
    context_parallel(stack, group)
    lonely = torch.nn.Linear(2, 2)
    lonely.weight.grad = torch.zeros(2, 2) if mesh.get_local_rank() else None
    packing = fusedformer.functional.Packing.of(torch.ones(1, 4, dtype=torch.bool))
    return messages_of(
        [
            lambda: context_parallel(torch.nn.Linear(2, 2), group),
            lambda: context_parallel(stock_stack(False), group),
            lambda: context_parallel(nn.MultiheadAttention(E, 2, add_zero_attn=True), group),
            lambda: one(x, x, x),
            lambda: stack(x, torch.zeros(4, 4)),
            lambda: stack.forward_packed(x[0], packing),
            lambda: sum_gradients(lonely.parameters(), group),
        ]
    )


def test_misuse(ranks: Ranks) -> None:
    wanted = [
        "expected a module with a fusedformer.nn.MultiheadAttention in it, but got Linear",
        "layers.0.self_attn is a torch.nn.MultiheadAttention; call fusedformer.fuse()",
        "the module appends keys",
        "no place for attention weights",
        "no place for a mask of queries and keys",
        "needs layers and a norm of this library",
        "sum_gradients(): expected all ranks of the group to be called alike",
    ]
    for said in ranks.run(misuse, size=2):
        assert all(part in text for part, text in zip(wanted, said, strict=True)), said
