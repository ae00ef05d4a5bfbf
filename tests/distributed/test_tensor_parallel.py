"""Heads and hidden features over ranks: training steps are those of one process."""

from __future__ import annotations

import contextlib
import re
import warnings
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from tests.distributed.ranks import RankError, Ranks
from tests.distributed.steps import (
    TINY,
    Case,
    Tensors,
    joined,
    judge,
    part,
    reset_parameters,
    single,
    step,
    unread,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

import fusedformer
from fusedformer import backend
from fusedformer.distributed import TransformerParallel, tensor_parallel_plan
from fusedformer.distributed._region import Region
from fusedformer.testing import compare_tensors

PLAIN = Case()
PRE = PLAIN._replace(norm_first=True)
DECODER = PLAIN._replace(stack="decoder")
FULL = StateDictOptions(full_state_dict=True)


def whole(tensor: Any) -> Tensor:
    """As torch has it: the three parts of a projection in one dimension."""
    full: Tensor = tensor.full_tensor()
    three = full.dim() > 1 and full.shape[0] == 3
    return full.flatten(0, 1) if three else full


def whole_state(model: nn.Module) -> dict[str, Any]:
    """Return the state_dict with all parameters gathered."""
    return get_model_state_dict(model, options=FULL)


def parallel(case: Case, mesh: DeviceMesh, rows: bool = False, fused: bool = False) -> Any:
    model = case.model(nn if fused else fusedformer.nn)
    model.load_state_dict(case.weights())
    if fused:
        fusedformer.fuse(model)
    plan = tensor_parallel_plan(model, sequence_parallel=rows)
    return parallelize_module(model, mesh, plan)


def trained(mesh: DeviceMesh, case: Case, name: Any, rows: bool, fused: bool) -> Tensors:
    model = parallel(case, mesh, rows, fused)
    with backend(name):
        return step(model, unread(case.batch()), whole=whole)


@pytest.mark.parametrize("rows", [False, True], ids=["heads", "heads and rows"])
@pytest.mark.parametrize(
    ("size", "case", "name", "fused"),
    [
        (4, PLAIN, "torch", False),
        (2, PRE, "torch", True),
        (2, TINY, "triton", False),
        (2, PRE._replace(padding=False), "torch", False),
        (2, PRE._replace(mask=True), "torch", False),
        (2, DECODER, "torch", False),
        (4, DECODER._replace(norm_first=True), "torch", False),
        (2, DECODER._replace(mask=True, norm_first=True), "torch", False),
    ],
    ids=[
        "4 ranks", "pre, fused", "kernels", "whole", "masked", "decoder", "pre decoder",
        "masked decoder",
    ],
)  # fmt: skip
def test_a_step(ranks: Ranks, size: int, case: Case, name: Any, fused: bool, rows: bool) -> None:
    judge(case, lambda drawn: ranks.run(trained, drawn, name, rows, fused, size=size))


def trained_in_2d(mesh: DeviceMesh, case: Case, rows: bool) -> Tensors:
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "heads"))
    model = parallel(case, both["heads"], rows)
    for layer in model.layers:
        fully_shard(layer, mesh=both["data"])
    fully_shard(model, mesh=both["data"])
    inputs = part(unread(case.batch()), both["data"].get_local_rank(), 2)
    with backend("torch"):
        return step(model, inputs, times=2, whole=whole)


@pytest.mark.parametrize("case", [PRE, DECODER], ids=["encoder", "decoder"])
def test_a_step_with_the_parameters_sharded_over_other_ranks(ranks: Ranks, case: Case) -> None:
    def run(drawn: Case) -> list[Tensors]:
        first, second, third, fourth = ranks.run(trained_in_2d, drawn, True)
        return [*joined([first, third]), *joined([second, fourth])]

    judge(case, run)


def collectives(mesh: DeviceMesh, case: Case, rows: bool) -> dict[str, int]:
    model = parallel(case, mesh, rows)
    inputs = case.batch()
    dy = inputs.pop("dy")
    with backend("torch"), contextlib.ExitStack() as patches:
        seen = {
            name: patches.enter_context(patch.object(dist, name, wraps=getattr(dist, name)))
            for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")
        }
        model(**inputs).backward(dy)
        return {name.split("_")[1]: calls.call_count for name, calls in seen.items()}


def test_what_is_communicated(ranks: Ranks) -> None:
    """Of two layers of two blocks, padded or not; the input needs no gradient."""
    for case in (PLAIN, PLAIN._replace(padding=False)):
        assert ranks.run(collectives, case, False, size=2)[0] == {
            "reduce": 4 + 3, "gather": 0, "scatter": 0
        }  # fmt: skip
        # Two a layer and the output; the gradients of what is replicated are one sum a layer.
        assert ranks.run(collectives, case, True, size=2)[0] == {
            "reduce": 2, "gather": 4 + 4 + 1, "scatter": 4 + 3
        }  # fmt: skip


def hooked(mesh: DeviceMesh, case: Case) -> None:
    model = parallel(case, mesh)
    model.layers[1].linear2.register_forward_hook(print)
    with backend("torch"):
        model(case.batch()["src"])


def test_children_cannot_be_called(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"RuntimeError: .*but 'linear2' has a hook; remove it"):
        ranks.run(hooked, PLAIN, size=2)


def rows_of_the_output(mesh: DeviceMesh, case: Case, rows: bool) -> tuple[Tensor, Tensor]:
    model = parallel(case, mesh, rows).eval()
    inputs = unread(case.batch())
    padding = inputs["src_key_padding_mask"]
    wanted = torch.arange(padding.numel()).view_as(padding) % 3 == 0
    with backend("torch"), torch.no_grad():
        some = model(inputs["src"], src_key_padding_mask=padding, output_rows=wanted)
        return some, model(inputs["src"], src_key_padding_mask=padding)[wanted]


@pytest.mark.parametrize("rows", [False, True])
def test_output_rows(ranks: Ranks, rows: bool) -> None:
    for some, all_of_them in ranks.run(rows_of_the_output, PLAIN, rows, size=2):
        assert torch.allclose(some, all_of_them, atol=1e-5)


def layer_alone(mesh: DeviceMesh, case: Case) -> Tensors:
    layer = case.model().get_submodule("layers.0")
    layer.load_state_dict(layer_weights(case))
    parallelize_module(layer, mesh, TransformerParallel(sequence_parallel=True))
    inputs = case.batch()
    with backend("torch"):
        return step(layer, {"src": inputs["src"], "dy": inputs["dy"]}, whole=whole)


def layer_weights(case: Case) -> Tensors:
    found = {n.removeprefix("layers.0."): t for n, t in case.weights().items()}
    return {n: t for n, t in found.items() if not n.startswith(("layers", "norm."))}


def test_a_layer_by_itself(ranks: Ranks) -> None:
    """It has no rows to spread: what calls it is given all."""
    case = PRE._replace(padding=False, seed=1)
    inputs = {n: case.batch()[n] for n in ("src", "dy")}
    runs = []
    for dtype in (torch.float32, torch.float64):
        layer = case.model(nn).get_submodule("layers.0")
        layer.load_state_dict(layer_weights(case))
        runs.append(step(layer.to(dtype), {n: t.to(dtype) for n, t in inputs.items()}))
    stock, truth = runs
    for result in ranks.run(layer_alone, case, size=2):
        found = [compare_tensors(n, result[n], stock[n], truth[n]) for n in stock]
        assert [one.fault for one in found if one.fault] == []


def dropped(mesh: DeviceMesh, name: Any) -> tuple[Tensor, ...]:
    region = Region(mesh, False)
    x, zeros = torch.ones(2, 4096), torch.zeros(2, 4096)
    drop = fusedformer.functional.dropout_add
    with backend(name):
        alike = drop(x, zeros, p=0.5)
        with region.own_dropout(x, 0.5):
            own = drop(x, zeros, p=0.5)
        with region.own_dropout(x, 0.5):
            again = drop(x, zeros, p=0.5)
        return alike, drop(x, zeros, p=0.5), own, again


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_dropout_is_alike_where_tensors_are_and_else_independent(ranks: Ranks, name: Any) -> None:
    first, second = ranks.run(dropped, name, size=2)
    for place in (0, 1):
        assert torch.equal(first[place], second[place])
    masks = [kept > 0 for kept in (first[0], first[1], *first[2:], *second[2:])]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert 0.45 < (one == other).float().mean() < 0.55


def with_dropout(mesh: DeviceMesh, case: Case, name: Any, rows: bool) -> Tensors:
    model = parallel(case, mesh, rows)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.4
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.4
    with backend(name):
        return step(model, unread(case.batch()), whole=whole)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(("case", "name"), [(PRE, "torch"), (TINY, "triton")])
def test_ranks_agree_with_dropout(ranks: Ranks, case: Case, name: Any, rows: bool) -> None:
    first, second = ranks.run(with_dropout, case, name, rows, size=2)
    assert all(torch.equal(first[n], second[n]) and first[n].isfinite().all() for n in first)
    assert not torch.allclose(first["output"], single(case)["output"], atol=0.1)


def saved_and_loaded(mesh: DeviceMesh, case: Case) -> tuple[Tensors, bool]:
    model = parallel(case, mesh)
    saved = whole_state(model)
    other = parallel(case._replace(seed=9), mesh)
    set_model_state_dict(other, dict(saved), options=FULL)  # it writes to what it gets
    again = whole_state(other)
    same = all(torch.equal(again[n], t) for n, t in saved.items())
    third = parallel(case._replace(seed=9), mesh)
    broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(third, dict(saved) if dist.get_rank() == 0 else {}, options=broadcast)
    again = whole_state(third)
    return saved, same and all(torch.equal(again[n], t) for n, t in saved.items())


def test_the_whole_state_goes_to_one_process_and_back(ranks: Ranks) -> None:
    saved, same = ranks.run(saved_and_loaded, PRE, size=4)[0]
    assert same
    model = PRE.model()
    model.load_state_dict(saved)
    for name, tensor in PRE.weights().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def unfused_too_late(mesh: DeviceMesh, how: str) -> None:
    model: Any = PLAIN.model(nn)
    fusedformer.fuse(model)
    if how == "sharded":
        fully_shard(model.layers[1], mesh=mesh)
    else:
        parallelize_module(model, mesh, tensor_parallel_plan(model))
    fusedformer.unfuse(model)


@pytest.mark.parametrize(("how", "path"), [("sharded", "layers.1"), ("parallel", "model")])
def test_what_is_spread_is_not_unfused(ranks: Ranks, how: str, path: str) -> None:
    with pytest.raises(RankError, match=rf"ValueError: unfuse\(\): '{path}' is spread over ranks"):
        ranks.run(unfused_too_late, how, size=2)


def made_on_meta(mesh: DeviceMesh) -> Tensors:
    model = DECODER.model(device="meta")
    parallelize_module(model, mesh, tensor_parallel_plan(model))
    model.to_empty(device="cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "DTensor random operators")
        reset_parameters(model)
    return whole_state(model)


def test_a_model_made_on_meta(ranks: Ranks) -> None:
    """Memory of ``to_empty`` is NaN here."""
    found, made = ranks.run(made_on_meta, size=2)[0], DECODER.model().state_dict()
    for name, tensor in found.items():
        assert tensor.isfinite().all(), name
        assert 0.7 <= (0.01 + tensor.abs().max()) / (0.01 + made[name].abs().max()) < 1.4, name


def clipped(mesh: DeviceMesh, case: Case, rows: bool) -> tuple[Tensor, Tensors]:
    model = parallel(case, mesh, rows)
    inputs = case.batch()
    dy = inputs.pop("dy")
    with backend("torch"):
        model(**inputs).backward(dy)
    norm: Any = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return norm.full_tensor(), {n: whole(p.grad) for n, p in model.named_parameters()}


@pytest.mark.parametrize("rows", [False, True])
def test_gradients_are_clipped_by_the_norm_of_all(ranks: Ranks, rows: bool) -> None:
    grads = {n: t for n, t in single(PRE).items() if n.startswith("grad of") and n[8:] != "src"}
    want = torch.stack([grad.norm() for grad in grads.values()]).norm()
    for norm, found in ranks.run(clipped, PRE, rows, size=2):
        assert torch.allclose(norm, want, rtol=1e-4)
        for name, grad in found.items():
            assert torch.allclose(grad, grads[f"grad of {name}"] / want, atol=1e-5), name


def whole_transformer(mesh: DeviceMesh) -> tuple[Tensor, Tensor]:
    settings: Any = {"dim_feedforward": 24, "dropout": 0.0, "bias": False}
    model = fusedformer.nn.Transformer(16, 4, 1, 1, **settings)
    src, tgt = torch.randn(5, 2, 16), torch.randn(3, 2, 16)
    with backend("torch"), torch.no_grad():
        want = model(src, tgt)
        plan = tensor_parallel_plan(model, sequence_parallel=True)
        return want, parallelize_module(model, mesh, plan)(src, tgt)


def test_a_transformer_without_biases(ranks: Ranks) -> None:
    for want, got in ranks.run(whole_transformer, size=2):
        assert torch.allclose(want, got, atol=1e-5)


def refused(mesh: DeviceMesh, how: str) -> str:
    case = PLAIN._replace(heads=2) if how == "heads" else PLAIN
    model: Any = case.model(nn if how == "torch" else fusedformer.nn)
    if how == "hidden":
        model = fusedformer.nn.TransformerEncoderLayer(16, 4, 26)
    if how == "hook":
        model.layers[1].linear1.register_forward_hook(print)
    if how == "sharded":
        fully_shard(model.layers[0], mesh=mesh)
    if how == "mesh":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "heads"))
    before = {name: type(module) for name, module in model.named_modules()}
    style = TransformerParallel()
    if how == "twice":
        parallelize_module(model, mesh, style)
    try:
        parallelize_module(model, mesh, style)
    except (TypeError, ValueError) as error:
        if how != "twice":
            assert before == {name: type(module) for name, module in model.named_modules()}
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("heads", "ValueError: .*'nhead' of .* multiple of the mesh's 4 ranks, but got 2"),
        ("hidden", "ValueError: .*'dim_feedforward' of .* 4 ranks, but got 26"),
        ("hook", "ValueError: .*without hooks"),
        ("sharded", "ValueError: .*not sharded or parallel already"),
        ("twice", "ValueError: .*parallel already; parallelize_module comes before fully_shard"),
        ("mesh", "ValueError: .*expected a 1-D mesh, but got 2 dimensions"),
        ("torch", "TypeError: .*of fusedformer.nn, but got TransformerEncoder"),
    ],
)
def test_what_cannot_be_spread_is_refused_and_left_as_it_was(
    ranks: Ranks, how: str, message: str
) -> None:
    for answer in ranks.run(refused, how):
        assert re.match(message, answer), answer


def test_the_plan_of_a_model_and_of_none() -> None:
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), PLAIN.model())})
    plan = tensor_parallel_plan(model, sequence_parallel=True)
    assert isinstance(plan, dict)
    assert list(plan) == ["body.1"]
    assert plan["body.1"].sequence_parallel  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="Linear has none; fuse"):
        tensor_parallel_plan(nn.Linear(2, 2))
