"""A layer as one node of autograd: the bits of its steps, and when they are called."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusedformer import backend, nn
from fusedformer.functional import Packing, pack
from fusedformer.nn import layers

pytest.importorskip("triton")

E, HEADS, F, N, S = 32, 2, 48, 2, 7
KINDS = "encoder", "decoder"


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with backend("triton"):
        yield


@contextmanager
def step_by_step() -> Iterator[None]:
    with mock.patch.object(layers, "encoder_layer_is_one_node", return_value=False):
        yield


class DecoderLayer(nn.TransformerDecoderLayer):
    """A decoder's layer that takes what an encoder's does; its memory is a parameter."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        like = self.linear1.weight
        memory = torch.empty(N, S + 2, E, device=like.device, dtype=like.dtype)
        self.memory = torch.nn.Parameter(memory)

    def forward(self, x: Tensor, **masks: Any) -> Tensor:  # type: ignore[override]
        named = {name.replace("src", "tgt"): mask for name, mask in masks.items()}
        if "is_causal" in named:
            named["tgt_is_causal"] = named.pop("is_causal")
        return super().forward(x, self.memory, **named)


def make(device: str = "cpu", kind: str = "encoder", **settings: Any) -> Any:
    settings = {"batch_first": True, "dropout": 0.25, "activation": "gelu", **settings}
    cls: Any = nn.TransformerEncoderLayer if kind == "encoder" else DecoderLayer
    layer = cls(E, HEADS, F, device=device, **settings)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return layer


def inputs(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(N, S, E, device=device, dtype=dtype, requires_grad=True)


def results(call: Callable[[], Tensor], leaves: list[Tensor], **how: Any) -> list[Tensor]:
    """The output and all gradients, of the same random numbers each time."""
    torch.manual_seed(5)
    output = call()
    grad = torch.randn(output.shape, device=output.device).to(output.dtype)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = torch.autograd.grad(output, wanted, grad, allow_unused=True, **how)
    return [output.detach(), *(g for g in found if g is not None)]


def check(call: Callable[[], Tensor], leaves: list[Tensor], **how: Any) -> list[Tensor]:
    """The bits of one node are those of the steps: recorded, and planned."""
    with step_by_step():
        want = results(call, leaves, **how)
    for _ in range(3):
        got = results(call, leaves, **how)
        assert len(got) == len(want)
        for have, wanted in zip(got, want, strict=True):
            assert have.isfinite().all()
            assert torch.equal(have, wanted)
    assert all(one.any() for one in want)
    return want


def is_one_node(output: Tensor) -> bool:
    return "EncoderLayer" in type(output.grad_fn).__name__


MASKS: dict[str, Callable[[str], dict[str, Any]]] = {
    "nothing": lambda device: {},
    "padding": lambda device: {
        "src_key_padding_mask": torch.arange(S).to(device) >= torch.tensor([[S], [4]]).to(device)
    },
    "causal": lambda device: {
        "src_mask": torch.ones(S, S, dtype=torch.bool, device=device).triu(1), "is_causal": True,
    },
    "added": lambda device: {"src_mask": torch.randn(S, S, device=device)},
    "boolean": lambda device: {"src_mask": torch.rand(S, S, device=device) > 0.7},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("masks", MASKS)
def test_masks(masks: str, norm_first: bool, kind: str, device: str) -> None:
    layer, x = make(device, kind, norm_first=norm_first), inputs(device)
    given = MASKS[masks](device)
    call = lambda: layer(x, **given)
    check(call, [x, *layer.parameters()])
    assert norm_first or is_one_node(call())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_without_biases_in_training_and_not(
    dtype: torch.dtype, norm_first: bool, kind: str, device: str
) -> None:
    for training in (True, False):
        layer = make(device, kind, dtype=dtype, norm_first=norm_first, bias=False).train(training)
        x = inputs(device, dtype)
        check(partial(layer, x), [x, *layer.parameters()])
        with torch.no_grad():
            assert torch.equal(*(results_without(layer, x) for _ in range(2)))


def results_without(layer: Any, x: Tensor) -> Tensor:
    torch.manual_seed(5)
    output: Tensor = layer(x)
    return output


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_packed_stacks(norm_first: bool, device: str) -> None:
    layer = make(device, norm_first=norm_first, checkpoint_activation=True)
    encoder = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(E, device=device))
    x, keep = inputs(device), torch.rand(N, S, device=device) > 0.3
    packing = Packing.of(keep)
    call = lambda: encoder.forward_packed(pack(x, packing), packing)
    check(call, [x, *encoder.parameters()])


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_packed_decoders(norm_first: bool, device: str) -> None:
    """The gradient of the memory is added up over the layers, with an empty sequence among them."""
    one = nn.TransformerDecoderLayer(E, HEADS, F, 0.25, norm_first=norm_first, batch_first=True)
    decoder = nn.TransformerDecoder(one.to(device), 3, norm=nn.LayerNorm(E, device=device))
    keep = torch.rand(N, S, device=device) > 0.3
    keep[0] = False
    packings = Packing.of(torch.ones_like(keep)), Packing.of(keep)
    x, memory = inputs(device), inputs(device)
    rows = lambda: [pack(each, how) for each, how in zip((x, memory), packings, strict=True)]
    call = lambda: decoder.forward_packed(
        rows()[0], packings[0], rows()[1], packings[1], tgt_is_causal=True
    )
    check(call, [x, memory, *decoder.parameters()])


FROZEN = {
    "encoder": (
        "x", "in_proj", "out_proj", "norm1", "norm2", "linear1", "linear2", "weight", "bias",
        "self_attn", "linear", "norm",
    ),
    "decoder": ("x", "memory", "self_attn", "multihead_attn", "norm2", "norm3", "linear", "bias"),
}  # fmt: skip


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("only", [False, True], ids=["frozen", "only trained"])
@pytest.mark.parametrize(("kind", "name"), [(k, name) for k in KINDS for name in FROZEN[k]])
def test_frozen_parameters(kind: str, name: str, only: bool, norm_first: bool, device: str) -> None:
    layer, x = make(device, kind, norm_first=norm_first), inputs(device)
    for key, leaf in [("x", x), *layer.named_parameters()]:
        chosen = name in key if name != "x" else key == "x"
        leaf.requires_grad_(chosen is only)
    check(lambda: layer(x), [x, *layer.parameters()])


def test_no_gradient_is_computed_that_is_not_asked_for(device: str) -> None:
    layer, x = make(device), inputs(device)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("norm2" in name)
    x.requires_grad_(False)
    output = layer(x)
    from fusedformer_kernels.runtime.launch import recorded_launches

    with recorded_launches(run=True) as found:
        output.backward(torch.randn_like(output))
    assert {one.name for one in found} == {"_norm_backward", "_sum_partials"}


@pytest.mark.parametrize("kind", KINDS)
def test_two_backwards_of_one_forward(kind: str, device: str) -> None:
    layer, x = make(device, kind), inputs(device)
    leaves = [x, *layer.parameters()]
    output = layer(x)
    grad = torch.randn_like(output)
    first = torch.autograd.grad(output, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(output, leaves, grad)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_accumulate_over_forwards(kind: str, device: str) -> None:
    layer = make(device, kind, dropout=0.0)
    found = []
    for steps in (False, True):
        layer.zero_grad()
        torch.manual_seed(3)
        for _ in range(2):
            x = inputs(device)
            with step_by_step() if steps else mock.MagicMock():
                output = layer(x)
            output.backward(torch.randn_like(output))
        found.append([parameter.grad.clone() for parameter in layer.parameters()])
    assert all(map(torch.equal, *found))


def test_under_anomaly_detection(device: str) -> None:
    layer, x = make(device), inputs(device)
    with torch.autograd.detect_anomaly(check_nan=True):
        check(lambda: layer(x), [x, *layer.parameters()])


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients(kind: str, device: str) -> None:
    layer, x = make(device, kind), inputs(device)
    with step_by_step():
        want = results_without(layer, x).detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            for _ in range(2):
                assert torch.equal(results_without(layer, x), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_under_autocast(norm_first: bool, kind: str, device: str) -> None:
    layer, x = make(device, kind, norm_first=norm_first), inputs(device)

    def call() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            output: Tensor = layer(x)
            return output

    check(call, [x, *layer.parameters()])


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_changed_between_forward_and_backward_is_torchs_error(
    kind: str, device: str
) -> None:
    layer, x = make(device, kind), inputs(device)
    output = layer(x)
    with torch.no_grad():
        layer.linear1.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward(torch.randn_like(output))


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_a_layer_of_its_own(kind: str, device: str) -> None:
    layer, x = make(device, kind, dropout=0.0), inputs(device)
    before = layer(x)
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        copied.linear2.weight.zero_()
    assert is_one_node(copied(x))
    assert not torch.equal(copied(x), before)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_added_after_a_call_fire(kind: str, device: str) -> None:
    layer, x = make(device, kind, dropout=0.0), inputs(device)
    before = layer(x)
    seen: list[Any] = []
    handle = layer.linear1.register_forward_hook(lambda *args: seen.append(args))
    with torch.no_grad():
        layer(x)
    assert len(seen) == 1
    handle.remove()
    assert torch.equal(layer(x), before)
    assert len(seen) == 1
    everywhere = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(module)
    )
    try:
        layer(x)
    finally:
        everywhere.remove()
    assert layer.linear1 in seen


@pytest.mark.parametrize("kind", KINDS)
def test_a_child_that_is_replaced_or_changed_after_a_call_is_called(kind: str, device: str) -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * super().forward(x)

    layer, x = make(device, kind, dropout=0.0), inputs(device)
    before = layer(x)
    doubled = Doubled(E, F, device=device)
    doubled.load_state_dict(layer.linear1.state_dict())
    own, layer.linear1 = layer.linear1, doubled
    assert not torch.allclose(layer(x), before)
    layer.linear1 = own
    assert torch.equal(layer(x), before)
    layer.self_attn.out_proj.forward = lambda x: 0.0 * x
    assert not torch.allclose(layer(x), before)
    del layer.self_attn.out_proj.forward
    assert torch.equal(layer(x), before)


def test_saved_tensors_that_come_back_otherwise(device: str) -> None:
    """Other strides and another address, as from a file, or from a transposed copy."""
    layer, x = make(device), inputs(device)
    layer(x)

    def unpack(kept: Tensor) -> Tensor:
        if kept.dim() < 2:
            return kept.clone()
        return kept.transpose(-1, -2).contiguous().transpose(-1, -2)

    def call() -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, unpack):
            output: Tensor = layer(x)
            return output

    torch.manual_seed(5)
    want = results(lambda: layer(x), [x, *layer.parameters()])
    got = results(call, [x, *layer.parameters()])
    for have, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(have, wanted)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool, device: str) -> None:
    layer, x = make(device), inputs(device)
    want = results(lambda: layer(x), [x, *layer.parameters()])
    call = lambda: checkpoint(layer, x, use_reentrant=use_reentrant)
    torch.manual_seed(5)
    output = call()
    output.backward(torch.randn(output.shape, device=output.device))
    found = [output.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]
    assert all(map(torch.equal, found, want))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_gradients(kind: str, device: str) -> None:
    layer, x = make(device, kind), inputs(device)
    leaves = [x, *layer.parameters()]
    output = layer(x)
    grads = torch.randn(3, *output.shape, device=device)
    found = torch.autograd.grad(output, leaves, grads, is_grads_batched=True, retain_graph=True)
    for index in range(3):
        one = torch.autograd.grad(output, leaves, grads[index], retain_graph=True)
        for have, want in zip(found, one, strict=True):
            torch.testing.assert_close(have[index], want)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_gradient_is_refused(kind: str, device: str) -> None:
    layer, x = make(device, kind), inputs(device)
    output = layer(x)
    with pytest.raises(RuntimeError, match="double backward through an encoder layer"):
        torch.autograd.grad(output, x, torch.randn_like(output), create_graph=True)


def test_what_wants_to_see_the_steps_sees_them(device: str) -> None:
    layer, x = make(device), inputs(device)
    learned = torch.randn(S, S, device=device, requires_grad=True)
    assert not is_one_node(layer(x, src_mask=learned))
    apart = torch.randn(N, E, S, device=device).transpose(1, 2).requires_grad_()
    assert not is_one_node(layer(apart))
    other = make(device, activation=torch.tanh)
    assert not is_one_node(other(x))
    assert not is_one_node(make(device, batch_first=False)(x))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    assert any("fusedformer::norm" in event.key for event in profile.key_averages())


def test_weights_of_another_dtype_are_the_errors_of_the_steps(device: str) -> None:
    layer, x = make(device), inputs(device)
    layer.linear1.half()
    for context in (step_by_step(), nullcontext()):
        with context, torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
            layer(x)


def test_threads_share_a_layer(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedformer_kernels.runtime import launch

    if device == "cpu":  # Triton's interpreter runs one kernel at a time
        lock, original = threading.Lock(), launch.launch

        def one_by_one(*args: Any, **constants: Any) -> None:
            with lock:
                original(*args, **constants)

        for name, module in list(sys.modules.items()):
            if name.startswith("fusedformer_kernels.") and vars(module).get("launch") is original:
                monkeypatch.setattr(module, "launch", one_by_one)
    layer = make(device, dropout=0.0)
    xs = [inputs(device) for _ in range(4)]
    leaves = [[x, *layer.parameters()] for x in xs]
    grad = torch.randn_like(xs[0])
    want = [torch.autograd.grad(layer(x), each, grad) for x, each in zip(xs, leaves, strict=True)]
    got: list[Any] = [None] * 4

    def work(index: int) -> None:
        for _ in range(2):
            got[index] = torch.autograd.grad(layer(xs[index]), leaves[index], grad)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for have, wanted in zip(got, want, strict=True):
        assert all(map(torch.equal, have, wanted))


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("masks", ["nothing", "causal", "added"])
def test_a_stack_that_looks_once_computes_its_layers(
    masks: str, norm_first: bool, device: str
) -> None:
    layer = make(device, norm_first=norm_first, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(E, device=device))
    x, given = inputs(device), MASKS[masks](device)

    def one_by_one() -> Tensor:
        output = x
        for one in encoder.layers:
            output = one(output, **given)
        return encoder.norm(output)  # type: ignore[misc]

    renamed = {name.replace("src_mask", "mask"): mask for name, mask in given.items()}
    leaves = [x, *encoder.parameters()]
    want = results(one_by_one, leaves)
    for _ in range(3):
        got = results(lambda: encoder(x, **renamed), leaves)
        assert all(map(torch.equal, got, want))


def test_a_stack_calls_a_layer_that_got_a_hook(device: str) -> None:
    encoder, x = nn.TransformerEncoder(make(device, dropout=0.0), 3), inputs(device)
    before, seen = encoder(x), []
    for module in (encoder.layers[1], encoder.layers[2].linear2):
        handle = module.register_forward_hook(lambda *args: seen.append(args[0]))
        encoder(x)
        handle.remove()
    assert seen == [encoder.layers[1], encoder.layers[2].linear2]
    encoder.layers[1].forward = lambda x, *args, **masks: 0.0 * x
    assert not torch.allclose(encoder(x), before)
    del encoder.layers[1].forward
    assert torch.equal(encoder(x), before)


def test_a_layer_that_was_called_is_let_go(device: str) -> None:
    layer, x = make(device), inputs(device)
    layer(x).backward(torch.randn_like(x))
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None
