"""CUDA graphs: every op captures and replays, what is drawn or given anew is seen by each replay.

Without a GPU, nothing on the way of a capture may ask for numbers or bring some from the host.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedformer
from fusedformer import backend, graphed, nn
from fusedformer import functional as F
from fusedformer._internal import attention_checks
from fusedformer.functional import _cross_entropy, _embedding
from fusedformer.models import BertConfig, BertEncoderModel
from fusedformer.parity.cases import Case, all_cases
from fusedformer.testing import compare
from fusedformer_kernels.attention import schedule as attention_schedule
from fusedformer_kernels.runtime.launch import recorded_launches

HAS_GPU = torch.cuda.is_available()
gpu = pytest.mark.skipif(not HAS_GPU, reason="captures need a GPU")
N, S, D, H = 3, 8, 16, 2
LENGTHS = [5, 8, 2]
# Their cases ask how many tokens there are; packing with static shapes is tested in the encoder.
CASES = [case for case in all_cases() if case.op.name not in ("pack", "unpack")]


@pytest.fixture(autouse=True)
def _poisoned() -> None:
    """Not here: torch's deterministic mode takes other algorithms than serving does."""


def padding_of(lengths: list[int], device: str) -> Tensor:
    return torch.arange(S, device=device) >= torch.tensor(lengths, device=device)[:, None]


def encoder(dropout: float = 0.0, **settings: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(D, H, 24, dropout, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(D), static_shapes=True)


def bert(dropout: float = 0.0) -> BertEncoderModel:
    config = BertConfig(
        40, D, 2, H, 24, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        max_position_embeddings=S,
    )  # fmt: skip
    model = BertEncoderModel(config)
    model.encoder.static_shapes = True
    return model


class Padded(torch.nn.Module):
    """An encoder of tensors by position, as ``make_graphed_callables`` takes them."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, src: Tensor, padding: Tensor) -> Tensor:
        output: Tensor = self.encoder(src, src_key_padding_mask=padding)
        return output


# Without a GPU


class NoDataDependence(TorchDispatchMode):
    """Raises for operators that wait for the device, or bring numbers from the host.

    It sees what the library calls, not what is called within a registered op.
    """

    NAMES = (
        "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2",
        "unique_dim", "unique_consecutive", "lift_fresh",
    )  # fmt: skip

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        counted = name == "repeat_interleave" and func._overloadname == "Tensor"
        if name in self.NAMES or by_mask or counted:
            raise AssertionError(f"{name} cannot be captured")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_host_reads() -> Iterator[None]:
    """Raises where numbers become Python's, in launchers too; on the CPU that is no operator."""

    def read(self: Tensor, *args: Any) -> None:
        raise AssertionError("what is read on the host cannot be captured")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, read)
        yield


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that are looked at on the CPU alone, or not during a capture, are not."""
    monkeypatch.setattr(_embedding, "_check_range", lambda *args: None)
    monkeypatch.setattr(_cross_entropy, "_check_range", lambda *args: None)
    loss = sys.modules["fusedformer.ops.linear_cross_entropy"]
    monkeypatch.setattr(loss, "_rows_that_count", lambda *args: None)
    monkeypatch.setattr(attention_checks, "_check_starts", lambda *args: None)


def inputs_of(case: Case, device: str, seed: int) -> dict[str, Tensor]:
    """Tensors of a case, on the device."""
    made = case.make(torch.Generator().manual_seed(seed))
    return {name: tensor.to(device) for name, tensor in made.items()}


def results_of(call: Callable[[], Any], leaves: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients."""
    found = call()
    outputs = [found] if isinstance(found, Tensor) else list(found)
    learned = [output for output in outputs if output.requires_grad]
    back = torch.autograd.grad(learned, leaves, grads, allow_unused=True)
    return [*(output.detach() for output in outputs), *(g for g in back if g is not None)]


@pytest.mark.skipif(HAS_GPU, reason="there captures themselves are tested")
@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.quick], ids=lambda c: f"{c.op.name} {c.name}"
)
def test_no_op_reads_on_the_host(case: Case) -> None:
    given = inputs_of(case, "cpu", 1)
    leaves = [t.requires_grad_() for t in given.values() if t.is_floating_point()]
    with backend("triton"), no_host_reads(), NoDataDependence():
        found = case.op.candidate(**given, **case.settings)
        outputs = [found] if isinstance(found, Tensor) else list(found)
        learned = [output for output in outputs if output.requires_grad]
        torch.autograd.grad(learned, leaves, list(map(torch.randn_like, learned)))


def hugging_face() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=D, num_hidden_layers=1, num_attention_heads=H,
        intermediate_size=24, max_position_embeddings=S,
    )
    model: Any = transformers.BertModel(config, add_pooling_layer=False)
    fusedformer.fuse(model)
    model.encoder.static_shapes = True
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "encoder": lambda: encoder(0.1),
    "pre-norm encoder": lambda: encoder(0.1, norm_first=True),
    "BERT": lambda: bert(0.1),
    "Hugging Face's BERT, fused": hugging_face,
}


def arguments(name: str) -> dict[str, Tensor]:
    """Half of one sequence is padding."""
    padding = padding_of([S, 3], "cpu")
    if "encoder" in name:
        return {"src": torch.randn(2, S, D), "src_key_padding_mask": padding}
    ids = {"input_ids": torch.zeros(2, S, dtype=torch.int64), "attention_mask": (~padding).long()}
    return ids if "Face" in name else {**ids, "output_rows": ids["input_ids"][:, :1]}


@pytest.mark.skipif(HAS_GPU, reason="there captures themselves are tested")
@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("name", MODELS)
def test_no_encoder_with_static_shapes_reads_on_the_host(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusedformer.functional._selection.check_output_rows", lambda *a: None)
    monkeypatch.setattr("fusedformer.models._text.check_output_rows", lambda *a: None)
    module, given = MODELS[name](), arguments(name)
    with backend("triton"):
        with no_host_reads(), NoDataDependence():
            found = module(**given)
            output = found if isinstance(found, Tensor) else found.last_hidden_state
            learned = [p for p in module.parameters() if p.requires_grad]
            torch.autograd.grad(output, learned, torch.randn_like(output), allow_unused=True)
        for part in module.modules():
            if hasattr(part, "static_shapes"):
                part.static_shapes = False
        given.pop("output_rows", None)
        with pytest.raises(AssertionError, match="read on the host"), no_host_reads():
            module(**given)


def test_work_lists_are_not_shared_across_the_border_of_a_graph(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    query = torch.randn(9, H, 8, device=device)
    capturing = False
    monkeypatch.setattr(attention_schedule, "_is_capturing", lambda starts: capturing)

    def lists_made(starts: Tensor) -> int:
        with backend("triton"), recorded_launches(run=True) as launches:
            F.varlen_attention(query, query, query, starts, starts, 6, 6)
        return sum(launch.name == "_list_work" for launch in launches)

    keep = torch.arange(6, device=device) < torch.tensor([[6], [3]], device=device)
    outside, inside = (F.Packing.of(keep, [6, 3]).cu_seqlens for _ in range(2))
    inside.fusedformer_work_lists["by_graph"] = True  # type: ignore[attr-defined]
    assert [lists_made(outside) for _ in range(2)] == [1, 0]
    assert lists_made(inside) == 1  # what a replay wrote last is not for others
    capturing = True
    assert [lists_made(inside) for _ in range(2)] == [1, 0]
    assert [lists_made(outside) for _ in range(2)] == [1, 1]
    capturing = False
    assert [lists_made(inside), lists_made(outside)] == [1, 0]


# With a GPU


def captured(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """What replays ``function``, and what it returned, which each replay writes to."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()
    return graph.replay, output


@gpu
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op.name} {c.name}")
def test_every_op_replays_with_eager_bits(case: Case) -> None:
    """Forward and backward, of other numbers than it was captured with."""
    given = inputs_of(case, "cuda", 1)
    leaves = [t.requires_grad_() for t in given.values() if t.is_floating_point()]
    run = lambda: case.op.candidate(**given, **case.settings)
    found = run()
    outputs = [found] if isinstance(found, Tensor) else list(found)
    grads = [torch.randn_like(output) for output in outputs if output.requires_grad]
    replay, static = captured(lambda: results_of(run, leaves, grads))
    for seed in (2, 3):
        with torch.no_grad():
            for name, tensor in inputs_of(case, "cuda", seed).items():
                given[name].copy_(tensor)
            for grad in grads:
                grad.normal_()
        replay()
        found = [tensor.clone() for tensor in static]
        pairs = zip(found, results_of(run, leaves, grads), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


DROPPING: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout_add": lambda x: F.dropout_add(x, torch.zeros_like(x), p=0.5),
    "bias_activation": lambda x: F.bias_activation(x, None, "relu", p=0.5),
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
        assert all(torch.equal(*pair) for pair in zip(a, b, strict=True))
    outputs = [output for output, _ in (*first, *other)]
    assert all(
        not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[i + 1 :]
    )
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
    one = compare(name, found.detach(), eager.detach(), truth.detach())
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
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


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
        found = [tensor.clone() for tensor in static]
        assert all(torch.equal(a, b) for a, b in zip(found, attend(), strict=True))


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
