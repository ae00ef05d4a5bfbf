"""The functions on DTensors: sharded over batch, heads or rows, nothing is communicated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from tests.distributed.ranks import Ranks
from tests.distributed.steps import whole
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import fusedformer.distributed  # noqa: F401  which is what registers the rules
from fusedformer import backend, reference
from fusedformer import functional as F
from fusedformer.functional.steps import self_attention
from fusedformer.nn.masks import AttentionMasks
from fusedformer.testing import compare_tensors

WHOLE = Replicate()
ROWS, COLUMNS = Shard(0), Shard(2)
BATCH, HEADS = Shard(0), Shard(1)


class Call(NamedTuple):
    """A function and its settings; where its tensors, and the first one's output, are."""

    name: str
    places: dict[str, Placement]
    settings: dict[str, Any]
    output: Placement


def attention(place: Placement, returned: dict[str, Any], **others: Placement) -> Call:
    places = {"query": place, "key": place, "value": place, **others}
    return Call("scaled_dot_product_attention", places, returned, place)


def norm(name: str, place: Placement, **settings: Any) -> Call:
    places = {"input": place, "weight": WHOLE}
    if name.endswith("layer_norm"):
        places["bias"] = WHOLE
    if name.startswith("dropout"):
        places |= {"residual": place, "input_bias": WHOLE}
    return Call(name, places, {"normalized_shape": (8,), **settings}, place)


def softmax(place: Placement, **settings: Any) -> Call:
    settings |= {"dim": -1, "scale": 0.5}
    return Call("softmax", {"input": place, "mask": place}, settings, place)


def activation(place: Placement, bias: Placement) -> Call:
    return Call("bias_activation", {"input": place, "bias": bias}, {"activation": "gelu"}, place)


def gated(place: Placement) -> Call:
    settings = {"activation": "silu", "activates": "second"}
    return Call("gated_activation", {"input": place, "bias": WHOLE}, settings, place)


def scaled(place: Placement, **others: Placement) -> Call:
    places = {**dict.fromkeys(("input", "residual"), place), "scale": WHOLE, "input_bias": WHOLE}
    return Call("dropout_scale_add", {**places, **others}, {}, place)


ATTENTION = {
    "batch": attention(BATCH, {"return_lse": True}),
    "heads": attention(HEADS, {"return_lse": True}, attn_mask=HEADS),
    "batch, averaged weights": attention(BATCH, {"return_weights": "averaged"}, attn_mask=WHOLE),
    "heads, weights, slopes, gated table, sinks": attention(
        HEADS,
        {"return_weights": "per_head"},
        alibi_slopes=Shard(0),
        relative_bias=Shard(0),
        relative_bias_gate=HEADS,
        sinks=Shard(0),
    ),
    "batch, slopes, gated table, sinks, lengths": attention(
        BATCH,
        {},
        alibi_slopes=WHOLE,
        relative_bias=WHOLE,
        relative_bias_gate=BATCH,
        sinks=WHOLE,
        key_lengths=BATCH,
    ),
    "merged": Call(
        "merge_attention_states",
        dict.fromkeys(("output1", "lse1", "output2", "lse2"), HEADS),
        {},
        HEADS,
    ),
}
OTHERS = {
    "layer_norm": norm("layer_norm", ROWS),
    "rms_norm of inner rows": norm("rms_norm", Shard(1)),
    "dropout_add_layer_norm": norm("dropout_add_layer_norm", ROWS, p=0.0, return_sum=True),
    "dropout_add_rms_norm": norm("dropout_add_rms_norm", Shard(1), p=0.0),
    "scaled sum of samples": scaled(ROWS, sample_scale=ROWS),
    "scaled sum of inner rows": scaled(Shard(1)),
    "softmax": softmax(ROWS),
    "causal softmax": softmax(ROWS, is_causal=True),
    "activation of rows": activation(Shard(1), WHOLE),
    "gated activation of rows": gated(ROWS),
    "gated activation of inner rows": gated(Shard(1)),
    "activation of columns": activation(COLUMNS, Shard(0)),
}


CALLS = ATTENTION.items(), OTHERS.items()


def inputs_of(call: Call, uneven: bool) -> dict[str, Tensor]:
    """By name; ``uneven`` has three sequences for two ranks."""
    batch = 3 if uneven else 2
    generator = torch.Generator().manual_seed(1)
    heads, length, dim = 2, 3, 4
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("query", "key", "value"), (batch, heads, length, dim)
    )
    shapes |= dict.fromkeys(("output1", "output2"), (batch, heads, length, dim))
    shapes |= dict.fromkeys(("lse1", "lse2"), (batch, heads, length))
    shapes |= dict.fromkeys(("input", "residual"), (batch, 4, 8))
    shapes |= dict.fromkeys(("weight", "bias", "input_bias", "scale"), (8,))
    shapes |= {"alibi_slopes": (heads,), "relative_bias": (heads, 2 * length - 1)}
    shapes |= {"relative_bias_gate": (batch, heads, length), "sinks": (heads,)}
    shapes |= {
        "attn_mask": (1, heads if call.output == HEADS else 1, length, length),
        "mask": (batch, 4, 8),
    }
    made = {
        name: torch.randn(shapes[name], generator=generator).requires_grad_()
        for name in call.places if name in shapes
    }  # fmt: skip
    if "sample_scale" in call.places:
        made["sample_scale"] = torch.arange(batch) + 0.5
    if "key_lengths" in call.places:
        made["key_lengths"] = torch.tensor([2, 3, 1][:batch], dtype=torch.int32)
    return made


def outputs_of(function: Callable[..., Any], inputs: dict[str, Any], call: Call) -> list[Any]:
    found = function(**inputs, **call.settings)
    return [found] if isinstance(found, Tensor) else list(found)


def gradients_of(like: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(t.shape, generator=generator) for t in like]


def spread(
    mesh: DeviceMesh, call: Call, uneven: bool, name: Any
) -> tuple[dict[str, Tensor], int, bool]:
    """Outputs and gradients, whole; communications until then; whether outputs are where inputs."""
    given = {
        n: distribute_tensor(t.detach(), mesh, [call.places[n]]).requires_grad_(t.requires_grad)
        for n, t in inputs_of(call, uneven).items()
    }
    with backend(name), CommDebugMode() as communication:
        outputs = outputs_of(getattr(F, call.name), given, call)
        dys = [
            distribute_tensor(dy, mesh, [call.output], src_data_rank=None)
            for dy in gradients_of(outputs)
        ]
        torch.autograd.backward(outputs, dys)
    results = {f"output {i}": output.detach().full_tensor() for i, output in enumerate(outputs)}
    learned = {n: t for n, t in given.items() if t.requires_grad}
    results |= {f"grad of {n}": whole(t.grad) for n, t in learned.items()}
    alike = all(output.placements == (call.output,) for output in outputs)
    return results, communication.get_total_counts(), alike


def single(call: Call, uneven: bool, dtype: torch.dtype, function: Any) -> dict[str, Tensor]:
    given = {
        n: t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for n, t in inputs_of(call, uneven).items()
    }
    outputs = outputs_of(function, given, call)
    dys = [dy.to(dtype) for dy in gradients_of(outputs)]
    torch.autograd.backward(outputs, dys)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return results | {f"grad of {n}": t.grad for n, t in given.items() if t.grad is not None}


def truth_of(call: Call) -> Callable[..., Any]:
    """The reference, which returns more than the function may have been asked for."""

    def function(**arguments: Any) -> Any:
        weights = arguments.pop("return_weights", None)
        asked = [arguments.pop(n, False) for n in ("return_sum", "return_lse")]
        found = getattr(reference, call.name)(**arguments)
        if weights is not None:
            del arguments["value"]
            average = weights == "averaged"
            return found[0], reference.attention_weights(**arguments, average=average)
        all_of_it = any(asked) or isinstance(found, Tensor) or call.name.startswith("merge")
        return found if all_of_it else found[0]

    return function


@pytest.mark.parametrize(
    ("call", "name", "uneven"),
    [
        *(pytest.param(call, "triton", False, id=f"attention: {n}") for n, call in CALLS[0]),
        *(pytest.param(call, "triton", False, id=n) for n, call in CALLS[1]),
        *(
            pytest.param(call, "torch", False, id=f"{n}, ATen")
            for n, call in CALLS[1]
            if "is_causal" not in call.settings
        ),
        pytest.param(ATTENTION["batch"], "triton", True, id="attention: uneven batch"),
        pytest.param(OTHERS["dropout_add_layer_norm"], "triton", True, id="uneven rows"),
    ],
)
def test_nothing_is_communicated(ranks: Ranks, call: Call, name: Any, uneven: bool) -> None:
    with backend("torch"):
        stock = single(call, uneven, torch.float32, getattr(F, call.name))
    truth = single(call, uneven, torch.float64, truth_of(call))
    for results, count, alike in ranks.run(spread, call, uneven, name, size=2):
        assert count == 0
        assert alike
        assert set(results) == set(truth)
        found = [compare_tensors(n, results[n], stock[n], truth[n]) for n in truth]
        assert [one.fault for one in found if one.fault] == []


def on_a_2d_mesh(mesh: DeviceMesh) -> tuple[Tensor, Tensor, int, bool]:
    both = init_device_mesh("cpu", (2, 2))
    qkv = torch.randn(3, 2, 2, 3, 4)
    with backend("torch"):
        want = F.scaled_dot_product_attention(*qkv)
    query, key, value = (distribute_tensor(t, both, [BATCH, HEADS]) for t in qkv)
    with backend("triton"), CommDebugMode() as communication:
        output = F.scaled_dot_product_attention(query, key, value)
    alike = isinstance(output, DTensor) and output.placements == (BATCH, HEADS)
    return whole(output), want, communication.get_total_counts(), alike


def test_batch_and_heads_at_once(ranks: Ranks) -> None:
    for output, want, count, alike in ranks.run(on_a_2d_mesh):
        assert torch.allclose(output, want, atol=1e-5)
        assert count == 0
        assert alike


def not_to_be_spread(mesh: DeviceMesh, how: str) -> tuple[Tensor, Tensor]:
    """What needs more than a rank's part: all of it is gathered."""
    place = lambda t, at: distribute_tensor(t, mesh, [at])
    with backend("triton"):
        if how == "dropout":
            seed = torch.tensor([5])
            drop = torch.ops.fusedformer.bias_activation
            x = torch.randn(2, 64)
            got = drop(place(x, ROWS), None, place(seed, WHOLE), 0.5, "gelu")
            return got.full_tensor(), drop(x, None, seed, 0.5, "gelu")
        if how == "keys":
            query, key = torch.randn(1, 6, 2, 4), torch.randn(1, 3, 3, 4)
            given = place(query, HEADS), place(key, HEADS), place(key, HEADS)
            got = F.scaled_dot_product_attention(*given, enable_gqa=True)
            return whole(got), F.scaled_dot_product_attention(query, key, key, enable_gqa=True)
        x, causal = torch.randn(4, 4), how == "causal rows"
        spread = place(x, Shard(0 if causal else 1))
        F.softmax(spread, -1)  # which is not what is remembered for the next
        got = F.softmax(spread, -1, is_causal=causal)
        return whole(got), F.softmax(x, -1, is_causal=causal)


@pytest.mark.parametrize("how", ["dropout", "keys", "causal rows", "columns"])
def test_what_cannot_be_spread_is_right(ranks: Ranks, how: str) -> None:
    for got, want in ranks.run(not_to_be_spread, how, size=2):
        assert torch.equal(got, want)


def test_which_ops_have_no_rule() -> None:
    """DTensor raises for them; another one is to be a decision."""
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("fusedformer::")}  # fmt: skip
    rules = DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
    ruled = {op._opname for op in rules if op.namespace == "fusedformer"}
    assert {name.removesuffix("_backward") for name in names - ruled} == {
        "chunked_attention",  # of the torch backend, which takes ATen's for a DTensor
        "cross_entropy", "disentangled_attention", "disentangled_attention_aten",
        "embedding_norm", "gather_rows", "linear_cross_entropy",
        "linear_cross_entropy_scaled", "packed_attention_aten", "pairs", "row_and_column_lse",
        "softplus_sums",
    }  # fmt: skip


def on_one_projection(mesh: DeviceMesh, place: Placement) -> tuple[list[Tensor], list[Tensor], int]:
    qkv, dy = torch.randn(2, 3, 3, 2, 4), torch.randn(2, 3, 2, 4)
    terms = AttentionMasks(None, None, True).terms(4, 0.0)
    with backend("triton"):
        leaf = qkv.clone().requires_grad_()
        output = self_attention(leaf, terms)
        want = [output, *torch.autograd.grad(output, leaf, dy)]
        leaf = distribute_tensor(qkv, mesh, [place]).requires_grad_()
        spread_dy = distribute_tensor(dy, mesh, [BATCH if place == BATCH else Shard(2)])
        with CommDebugMode() as communication:
            output = self_attention(leaf, terms)
            grads = torch.autograd.grad(output, leaf, spread_dy)
        got = [whole(t.detach()) for t in (output, *grads)]
    return got, [t.detach() for t in want], communication.get_total_counts()


@pytest.mark.parametrize("place", [BATCH, Shard(3)], ids=["batch", "heads"])
def test_attention_on_one_projection(ranks: Ranks, place: Placement) -> None:
    for got, want, count in ranks.run(on_one_projection, place, size=2):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert count == 0
