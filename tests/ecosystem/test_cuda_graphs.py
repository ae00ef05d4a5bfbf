"""CUDA graphs: every op captures and replays; each replay sees what is drawn or given anew."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.ecosystem.graph_cases import (
    CASES,
    LENGTHS,
    D,
    H,
    N,
    Padded,
    S,
    bert,
    encoder,
    inputs_of,
    padding_of,
    results_of,
)
from torch import Tensor

from fusedformer import backend, graphed
from fusedformer import functional as F
from fusedformer.parity.cases import Case
from fusedformer.testing import compare_tensors

gpu = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _poisoned() -> None:
    """Not here: torch's deterministic mode takes other algorithms than serving does."""


def captured(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """What replays ``function``, and what it returned, which each replay writes to."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = function()
    return graph.replay, output


def gradients_for(run: Callable[[], Any]) -> list[Tensor]:
    """Draw gradients of the outputs of ``run``, of which nothing is left when this returns.

    While a graph of autograd lives, its leaves accumulate on the stream on which it was made: a
    backward that is captured would wait for that stream, which ends the capture.
    """
    found = run()
    outputs = [found] if isinstance(found, Tensor) else list(found)
    return [torch.randn_like(output) for output in outputs if output.requires_grad]


def test_nothing_of_a_run_is_left_before_a_capture() -> None:
    leaf = torch.randn(3, requires_grad=True)
    leaf_of: Any = torch.autograd.graph.get_gradient_edge
    accumulators = lambda: leaf_of(leaf).node.metadata

    def run() -> tuple[Tensor, Tensor]:
        output = leaf * 2
        accumulators()["made by"] = "run"
        return output, leaf.detach() + 1

    kept = run()
    assert accumulators() == {"made by": "run"}
    del kept
    assert accumulators() == {}
    assert [grad.shape for grad in gradients_for(run)] == [(3,)]
    assert accumulators() == {}


def same_bits(found: list[Tensor], wanted: list[Tensor]) -> None:
    pairs = enumerate(zip(found, wanted, strict=True))
    differ = {i: (a - b).abs().max().item() for i, (a, b) in pairs if not torch.equal(a, b)}
    assert not differ, f"largest differences of results by their number: {differ}"


@gpu
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op.name} {c.name}")
def test_every_op_replays_with_eager_bits(case: Case) -> None:
    """Forward and backward, of other numbers than it was captured with."""
    given = inputs_of(case, "cuda", 1)
    leaves = [t.requires_grad_() for t in given.values() if t.is_floating_point()]
    run = lambda: case.op.candidate(**given, **case.settings)
    grads = gradients_for(run)
    replay, static = captured(lambda: results_of(run, leaves, grads))
    for seed in (2, 3):
        with torch.no_grad():
            for name, tensor in inputs_of(case, "cuda", seed).items():
                given[name].copy_(tensor)
            for grad in grads:
                grad.normal_()
        replay()
        found = [tensor.clone() for tensor in static]
        same_bits(found, results_of(run, leaves, grads))


DROPPING: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout_add": lambda x: F.dropout_add(x, torch.zeros_like(x), p=0.5),
    "dropout_scale_add": lambda x: F.dropout_scale_add(x, torch.zeros_like(x), p=0.5),
    "bias_activation": lambda x: F.bias_activation(x, None, "relu", p=0.5),
    "gated_activation": lambda x: F.gated_activation(
        torch.cat((x, x), -1), None, "silu", p=0.5
    ),
    "norm": lambda x: F.dropout_add_layer_norm(
        x, torch.zeros_like(x), (D,), return_sum=True, p=0.5
    )[1],
    "attention": lambda x: F.scaled_dot_product_attention(
        torch.zeros_like(x), torch.zeros_like(x), x, dropout_p=0.5
    ),
}  # fmt: skip


@gpu
@pytest.mark.parametrize("name", DROPPING)
def test_each_replay_draws_dropout_anew_and_by_the_seed(name: str) -> None:
    x = (torch.rand(2, 64, D, device="cuda") + 0.5).requires_grad_()
    dy = torch.randn(2, 64, D, device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        y = DROPPING[name](x)
        (dx,) = torch.autograd.grad(y, x, dy)
        return y.detach(), dx

    replay, static = captured(step)

    def replays(seed: int) -> list[list[Tensor]]:
        torch.manual_seed(seed)
        found = []
        for _ in range(3):
            replay()
            found.append([tensor.detach().clone() for tensor in static])
        return found

    first, again, other = replays(5), replays(5), replays(6)
    for a, b in zip(first, again, strict=True):
        same_bits(a, b)
    outputs = [output for output, _ in (*first, *other)]
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[i + 1 :])
    if name != "attention":
        for output, dx in first:
            assert torch.equal(output != 0, dx != 0)  # the backward drops what the forward did
            share = (output != 0).double().mean().item()
            assert abs(share - 0.5) < 6 * 0.5 / output.numel() ** 0.5  # six sigma


def in_float64(module: torch.nn.Module) -> Callable[..., Tensor]:
    """The truth: ``module`` in float64, which the torch backend computes."""
    wide = copy.deepcopy(module).double()

    def call(tokens: Tensor, *args: Any, **given: Any) -> Tensor:
        tokens = tokens.double() if tokens.is_floating_point() else tokens
        with backend("torch"):
            output: Tensor = wide(tokens, *args, **given)
        return output

    return call


def passes(name: str, found: Tensor, eager: Tensor, truth: Tensor) -> None:
    one = compare_tensors(name, found.detach(), eager.detach(), truth.detach())
    assert one.passed, one.fault


@gpu
@pytest.mark.parametrize("norm_first", [False, True])
def test_make_graphed_callables_trains_the_encoder(norm_first: bool) -> None:
    """A step of other lengths than it was captured with: output and all gradients."""
    eager = Padded(encoder(norm_first=norm_first)).cuda()
    graph, wide = copy.deepcopy(eager), copy.deepcopy(eager).double()
    sample = (torch.randn(N, S, D, device="cuda", requires_grad=True), padding_of([8] * N, "cuda"))
    torch.cuda.make_graphed_callables(graph, sample)
    for lengths in (LENGTHS, [1, 3, 8]):
        src, dy = torch.randn(2, N, S, D, device="cuda")
        padding = padding_of(lengths, "cuda")
        results = []
        for module, dtype in ((graph, src.dtype), (eager, src.dtype), (wide, torch.float64)):
            leaf = src.to(dtype, copy=True).requires_grad_()
            with contextlib.nullcontext() if module is not wide else backend("torch"):
                output = module(leaf, padding)
            module.zero_grad()
            output.backward(dy.to(dtype))
            grads = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
            results.append({"output": output.clone(), "src": leaf.grad, **grads})
        assert results[0].keys() == results[2].keys()
        for name in results[0]:
            passes(name, *(result[name] for result in results))


@gpu
def test_make_graphed_callables_draws_dropout_in_each_step() -> None:
    module = Padded(encoder(0.3)).cuda()
    src, padding = torch.randn(N, S, D, device="cuda"), padding_of(LENGTHS, "cuda")
    torch.cuda.make_graphed_callables(module, (src, padding))

    def step() -> list[Tensor]:
        module.zero_grad()
        output = module(src, padding)
        output.backward(torch.ones_like(output).cumsum(0))
        grads = (p.grad for p in module.parameters())
        return [output.clone(), *(g.clone() for g in grads if g is not None)]

    torch.manual_seed(1)
    first, second = step(), step()
    torch.manual_seed(1)
    again = step()
    assert not torch.equal(first[0], second[0])
    same_bits(first, again)


@gpu
def test_lengths_may_change_between_replays() -> None:
    """Those of keys, and where packed sequences begin, whose work lists are made in the graph."""
    query, key, value = torch.randn(3, N, H, S, 8, device="cuda")
    lengths = torch.tensor(LENGTHS, device="cuda")
    packed = torch.randn(3 * S, H, 8, device="cuda", requires_grad=True)
    dy = torch.randn_like(packed)
    starts = torch.tensor([0, 8, 16, 24], device="cuda", dtype=torch.int32)

    def attend() -> list[Tensor]:
        output = F.varlen_attention(packed, packed, packed, starts, starts, 3 * S, 3 * S)
        (grad,) = torch.autograd.grad(output, packed, dy)
        padded = F.scaled_dot_product_attention(query, key, value, key_lengths=lengths)
        return [output.detach(), grad, padded]

    replay, static = captured(attend)
    for new, begin in (([1, 8, 4], [0, 24, 24, 24]), ([3, 3, 3], [0, 1, 23, 24])):
        lengths.copy_(torch.tensor(new))
        starts.copy_(torch.tensor(begin))
        replay()
        same_bits([tensor.clone() for tensor in static], attend())


@gpu
def test_two_graphs_of_one_packing_need_not_both_be_replayed() -> None:
    stack = encoder().cuda().eval()
    packing, _ = stack.packing(~padding_of(LENGTHS, "cuda"))
    rows = F.pack(torch.randn(N, S, D, device="cuda"), packing)
    with torch.no_grad():
        run = lambda: stack.forward_packed(rows, packing)
        first, second = captured(run), captured(run)
        rows.normal_()
        second[0]()
        assert torch.equal(second[1], run())
        first[0]()
        assert torch.equal(first[1], run())


GRAPHED: dict[str, Callable[[], Any]] = {"encoder": encoder, "BERT": bert}


@gpu
@pytest.mark.parametrize("name", GRAPHED)
def test_graphed_is_as_close_to_the_truth_as_eager(name: str) -> None:
    eager = GRAPHED[name]().cuda().eval()
    truth, served = in_float64(eager), graphed(eager, [(1, 4), (N, S)])
    assert served.nbytes > 0
    for lengths in ([3], [4], LENGTHS, [8, 8, 8], [2, 1]):
        batch, length = len(lengths), max(lengths)
        padding = padding_of(lengths, "cuda")[:, :length]
        tokens = torch.randn(batch, length, D, device="cuda")
        mask = {"src_key_padding_mask": padding}
        if name == "BERT":
            tokens = torch.randint(0, 40, (batch, length), device="cuda")
            mask = {"attention_mask": (~padding).long()}
        for given in (mask, {}):
            with torch.no_grad():
                results = [module(tokens, **given) for module in (served, eager, truth)]
            passes(f"{lengths}", *results)
    assert sum(served.replays.values()) == 10 and all(served.replays.values())


@gpu
def test_graphed_sees_weights_that_change_and_refuses_those_that_are_replaced() -> None:
    stack, src = encoder().cuda().eval(), torch.randn(1, 3, D, device="cuda")
    served = graphed(stack, [(1, 4)])
    for _ in range(2):
        with torch.no_grad():
            passes("output", served(src), stack(src), in_float64(stack)(src))
            for parameter in stack.parameters():
                parameter.mul_(1.5)
    stack.to(torch.float64).to(torch.float32)
    with pytest.raises(RuntimeError, match="was replaced"):
        served(src)
    served.capture()
    with torch.no_grad():
        passes("output", served(src), stack(src), in_float64(stack)(src))


@gpu
def test_graphed_under_autocast_sees_weights_that_change() -> None:
    """Their casts are in the graph."""
    stack, src = encoder().cuda().eval(), torch.randn(1, 4, D, device="cuda")
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        stack(src)  # casts are remembered from here on
        served = graphed(stack, [(1, 4)])
    for _ in range(2):
        with torch.no_grad():
            with torch.autocast("cuda", torch.bfloat16):
                want = stack(src)
            passes("output", served(src), want, in_float64(stack)(src))
            for parameter in stack.parameters():
                parameter.mul_(1.5)


@gpu
def test_graphed_serves_threads_with_streams_of_their_own() -> None:
    stack = encoder().cuda().eval()
    served = graphed(stack, [(1, S), (2, S)])
    sources = [torch.randn(1 + i % 2, 1 + i, D, device="cuda") for i in range(S)]
    with torch.no_grad():
        wanted = [served(src) for src in sources]
    torch.cuda.synchronize()
    faults: list[int] = []

    def serve(turn: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(50):
                index = (turn + i) % S
                output = served(sources[index])
                torch.cuda.current_stream().synchronize()
                if not torch.equal(output, wanted[index]):
                    faults.append(index)

    threads = [threading.Thread(target=serve, args=(turn,)) for turn in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert sum(served.replays.values()) == S + 150
