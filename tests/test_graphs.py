"""What stands around the capture of CUDA graphs, without a GPU: a stand-in runs the call again."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fusedformer
from fusedformer import Graphed, backend, graphed, nn
from fusedformer.models import BertConfig, BertEncoderModel, sentence_embeddings
from fusedformer.serving import graphs as _graphs
from fusedformer.testing import compare_tensors

D, H = 16, 2
VOCABULARY = 40


class RunAgain:
    """In place of :class:`_graphs._CudaGraphs`: a replay calls again, on the memory captured."""

    def __init__(self, device: torch.device) -> None:
        self.captured = 0

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.captured += 1
        output = function()

        def replay() -> None:
            for old, new in zip(tree_leaves(output), tree_leaves(function()), strict=True):
                old.copy_(new)

        return replay, output

    def turn(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def nbytes(self) -> int:
        return 3 * 2**20


@pytest.fixture
def _no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_graphs, "_CudaGraphs", RunAgain)


stand_in = pytest.mark.usefixtures("_no_capture")


def encoder(layers: int = 2, **settings: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(D, H, 24, **{"batch_first": True, **settings})
    stack = nn.TransformerEncoder(layer, layers).eval()
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return stack


class Sentences(torch.nn.Module):
    """Token ids to a vector for each sequence, and to hidden states; the mask must be given."""

    def __init__(self) -> None:
        super().__init__()
        self.model = bert()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        hidden = self.model(input_ids, attention_mask)
        return {"hidden": hidden, "vectors": sentence_embeddings(hidden, attention_mask)}


def bert() -> BertEncoderModel:
    config = BertConfig(VOCABULARY, D, 1, H, 24, max_position_embeddings=12)
    return BertEncoderModel(config).eval()


def hugging_face() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        num_hidden_layers=1,
        num_attention_heads=H,
        intermediate_size=24,
        max_position_embeddings=12,
    )
    model: torch.nn.Module = transformers.BertModel(config).eval()
    fusedformer.fuse(model)
    return model


def ids_of(batch: int, lengths: list[int]) -> dict[str, Tensor]:
    length = max(lengths)
    keep = torch.arange(length) < torch.tensor(lengths)[:, None]
    ids = torch.randint(0, VOCABULARY, (batch, length))
    return {"input_ids": ids, "attention_mask": keep.long()}


# Lengths, and the bucket that they are to be served by.
BUCKETS = [(1, 4), (3, 7), (2, 12)]
SERVED = {
    (1,): (1, 4), (4,): (1, 4), (5,): (3, 7), (2, 3): (3, 7), (7, 1, 5): (3, 7), (9,): (2, 12),
    (12, 12): (2, 12),
}  # fmt: skip


@stand_in
@pytest.mark.parametrize("name", [pytest.param("triton", marks=pytest.mark.interpreter), "torch"])
def test_all_lengths_are_as_the_eager_encoder_computes_them(name: Any) -> None:
    """By the criterion, of real tokens; zeros at padding; after NaN in an earlier request."""
    layers = 2 if name == "torch" else 1
    stack = encoder(layers)
    truth = copy.deepcopy(stack).double()
    layer = torch.nn.TransformerEncoderLayer(D, H, 24, batch_first=True)
    stock = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()
    stock.load_state_dict(stack.state_dict())
    served_by = SERVED if name == "torch" else {(2, 3): (2, 4), (4, 4): (2, 4)}
    with backend(name):
        served = graphed(stack, BUCKETS if name == "torch" else [(2, 4)])
        for lengths, bucket in served_by.items():
            served(torch.full((*bucket, D), torch.nan))
            src = torch.randn(len(lengths), max(lengths), D)
            padding = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
            given = {"src": src}
            if padding.any():
                given["src_key_padding_mask"] = padding
            before = served.replays[bucket]
            output = served(**given)
            assert served.replays[bucket] == before + 1
            assert output.shape == src.shape and not output.requires_grad
            assert (output[padding] == 0).all()
            with torch.no_grad(), backend("torch"):
                found = [m(**wide(given, m))[~padding] for m in (stock, truth)]
            compared = compare_tensors("output", output[~padding], *found)
            assert compared.passed, compared.fault


def wide(given: dict[str, Tensor], module: torch.nn.Module) -> dict[str, Tensor]:
    """In the dtype of the module."""
    dtype = next(module.parameters()).dtype
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in given.items()}


@stand_in
def test_sequence_first_and_holes_in_the_padding() -> None:
    stack = encoder(batch_first=False)
    src, padding = torch.randn(5, 2, D), torch.rand(2, 5) > 0.5
    with backend("torch"):
        served = graphed(stack, [(3, 8)])
        output = served(src, src_key_padding_mask=padding)
        want = stack(src, src_key_padding_mask=padding)
    assert torch.allclose(output, want, atol=1e-6) and output.shape == src.shape
    with pytest.raises(ValueError, match=r"'src' of shape \[length, batch, 16\].*\(5, 2, 8\)"):
        served(src[..., :8])


@stand_in
@pytest.mark.parametrize("make", [bert, hugging_face, Sentences])
def test_models_of_token_ids(make: Callable[[], torch.nn.Module]) -> None:
    model = make().eval()
    with backend("torch"):
        served = graphed(model, [(2, 5), (3, 12)])
        for given in (ids_of(2, [4, 2]), ids_of(3, [9, 1, 4]), ids_of(2, [5, 5])):
            keep = given["attention_mask"] > 0
            with torch.no_grad():
                found, want = served(**given), model(**given)
            assert type(found) is type(want)
            for mine, other in zip(tree_leaves(found), tree_leaves(want), strict=True):
                assert mine.shape == other.shape
                real = keep if mine.dim() == 3 else ...
                assert torch.allclose(mine[real], other[real], atol=1e-5)


@stand_in
def test_token_types_are_zeros_again_when_they_are_left_out() -> None:
    model, given = bert(), ids_of(2, [4, 2])
    types = torch.ones_like(given["input_ids"])
    with backend("torch"), torch.no_grad():
        served = graphed(model, [(2, 4), (2, 5)])
        without = served(**given)
        other = served(given["input_ids"].int(), attention_mask=given["attention_mask"] > 0,
                       token_type_ids=types)  # fmt: skip
        assert torch.allclose(other, model(**given, token_type_ids=types), atol=1e-6)
        assert not torch.allclose(other, without, atol=1e-3)
        assert torch.equal(served(**given), without)


@stand_in
def test_a_full_bucket_without_a_mask_has_a_graph_without_one() -> None:
    """Nothing is packed in it."""
    stack = encoder()
    seen: list[Any] = []
    forward = stack.forward
    stack.forward = lambda **given: seen.append(set(given)) or forward(**given)  # type: ignore
    with backend("torch"):
        served = graphed(stack, [(2, 4)])
        seen.clear()
        served(torch.randn(2, 4, D))
        served(torch.randn(2, 3, D))
        served(torch.randn(2, 4, D), src_key_padding_mask=torch.zeros(2, 4, dtype=torch.bool))
    both = {"src", "src_key_padding_mask"}
    assert seen == [{"src"}, both, both]


@stand_in
def test_what_packs_does_so_statically_while_it_is_captured() -> None:
    for module in (encoder(), bert(), hugging_face()):
        stacks: list[Any] = [m for m in module.modules() if hasattr(m, "static_shapes")]
        assert stacks
        seen: list[bool] = []
        module.register_forward_pre_hook(
            lambda *_, stacks=stacks, seen=seen: seen.extend(s.static_shapes for s in stacks)
        )
        with backend("torch"):
            graphed(module, [(1, 4)])
        assert seen and all(seen)
        assert not any(stack.static_shapes for stack in stacks)


@stand_in
def test_results_are_copies_unless_views_are_asked_for() -> None:
    stack, first, second = encoder(), torch.randn(1, 4, D), torch.randn(1, 3, D)
    with backend("torch"):
        for copy_output in (True, False):
            served = graphed(stack, [(1, 4)], copy_output=copy_output)
            output = served(second)
            before = output.clone()
            served(first[:, :2])
            assert torch.equal(output, before) == copy_output


@stand_in
def test_weights_in_place_are_seen_and_replaced_ones_refused() -> None:
    stack, src = encoder(), torch.randn(1, 4, D)
    with backend("torch"):
        served = graphed(stack, [(1, 4)])
        first = served(src)
        stack.load_state_dict({n: 1.5 * t for n, t in stack.state_dict().items()})
        assert not torch.allclose(served(src), first, atol=1e-3)
        changes: dict[str, Callable[[], Any]] = {
            "layers.1.linear1.weight": lambda: setattr(
                stack.layers[1].linear1, "weight", torch.nn.Parameter(torch.randn(24, D))
            ),
            "layers.0": lambda: stack.layers.__setitem__(0, copy.deepcopy(stack.layers[0])),
            "layers.0.self_attn.in_proj_weight": lambda: stack.to(torch.float64).float(),
        }
        for path, change in changes.items():
            change()
            with pytest.raises(RuntimeError, match=rf"'{path}' of the module was replaced"):
                served(src)
            served.capture()
            with torch.no_grad():  # as there
                assert torch.allclose(served(src), stack(src), atol=1e-6)
    stack.train()
    with pytest.raises(RuntimeError, match="training mode"):
        served(src)
    with pytest.raises(ValueError, match="evaluation mode"):
        served.capture()


@stand_in
def test_what_fits_no_bucket_raises_or_is_computed_and_counted() -> None:
    stack, src = encoder(), torch.randn(2, 9, D)
    with backend("torch"):
        served = graphed(stack, [(4, 8), (1, 12)])
        wanted = r"batch of 2 sequences of length 9; the largest \(batch, length\) is \(4, 8\)"
        with pytest.raises(ValueError, match=wanted):
            served(src)
        loose = graphed(stack, [(4, 8), (1, 12)], fallback=True)
        output = loose(src)
        with torch.no_grad():  # as there
            assert torch.equal(output, stack(src))
        assert not output.requires_grad
    assert (loose.fallbacks, served.fallbacks) == (1, 0)
    assert sum(loose.replays.values()) == 0


@stand_in
def test_it_shows_buckets_memory_and_replays() -> None:
    with backend("torch"):
        served = graphed(encoder(), [(2, 8), (1, 8), (2, 8)])
        served(torch.randn(1, 5, D))
    assert served.buckets == ((1, 8), (2, 8))
    inputs = 16 * D * 4 + 16
    assert served.nbytes == 3 * 2**20 + inputs
    assert repr(served).splitlines() == [
        "Graphed(TransformerEncoder, 3.0 MiB, 0 fallbacks", "  (1, 8): 1 replays",
        "  (2, 8): 0 replays", ")",
    ]  # fmt: skip


@stand_in
def test_empty_batches() -> None:
    with backend("torch"):
        served = graphed(encoder(), [(2, 4)])
        assert served(torch.randn(0, 3, D)).shape == (0, 3, D)
        assert served(torch.randn(2, 0, D)).shape == (2, 0, D)


SRC = torch.zeros(1, 4, D)
CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "nothing": ({}, TypeError, "expected 'src', and besides only src_key_padding_mask.*nothing"),
    "an unknown argument": ({"src": SRC, "mask": SRC}, TypeError, "but got mask, src"),
    "no tensor": ({"src": [1.0]}, TypeError, "'src' must be Tensor, not list"),
    "a nested tensor": (
        {"src": torch.nested.nested_tensor([torch.zeros(2, D)], layout=torch.jagged)}, TypeError,
        "'src' to be padded",
    ),
    "two dimensions": ({"src": SRC[0]}, ValueError, r"\[batch, length, 16\].*\(4, 16\)"),
    "another dtype": ({"src": SRC.half()}, TypeError, "dtype torch.float32.*torch.float16"),
    "another device": ({"src": SRC.to("meta")}, ValueError, "'src' on cpu.*got it on meta"),
    "a gradient": ({"src": SRC.clone().requires_grad_()}, ValueError, "require no gradient"),
    "a floating mask": (
        {"src": SRC, "src_key_padding_mask": torch.zeros(1, 4)}, TypeError, "dtype torch.bool",
    ),
    "a mask of another length": (
        {"src": SRC, "src_key_padding_mask": torch.zeros(1, 5).bool()}, ValueError,
        r"\(1, 4\) \(batch, length\), but got \(1, 5\)",
    ),
}  # fmt: skip


@stand_in
@pytest.mark.parametrize("what", CALLS)
def test_a_bad_call(what: str) -> None:
    given, error, message = CALLS[what]
    with backend("torch"):
        served = graphed(encoder(), [(2, 8)])
        with pytest.raises(error, match=rf"Graphed\(\).*{message}"):
            served(**given)
    assert not any(served.replays.values())


class Odd(torch.nn.Module):
    """Returns what ``make`` gives of the ids."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.weight, self.make = torch.nn.Parameter(torch.zeros(1)), make

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.make(input_ids)


def fails(ids: Tensor) -> Tensor:
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


MADE: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no module": (
        lambda: graphed(cast(Any, torch.sin), [(1, 4)]), TypeError, "TransformerEncoder.*builtin",
    ),
    "another module": (
        lambda: graphed(torch.nn.Linear(4, 4), [(1, 4)]), TypeError, "input_ids.*Linear",
    ),
    "no layers": (
        lambda: graphed(nn.TransformerEncoder(nn.TransformerEncoderLayer(D, H), 0), [(1, 4)]),
        TypeError, "with layers",
    ),
    "training": (lambda: graphed(encoder().train(), [(1, 4)]), ValueError, "evaluation mode"),
    "no shapes": (lambda: graphed(encoder(), []), ValueError, "at least one"),
    "a length alone": (lambda: graphed(encoder(), cast(Any, [128])), TypeError, r"pairs.*got 128"),
    "no integers": (
        lambda: graphed(encoder(), cast(Any, [(1, 2.0)])), TypeError, r"got \(1, 2.0\)",
    ),
    "an empty bucket": (lambda: graphed(encoder(), [(0, 4)]), ValueError, r"positive.*\(0, 4\)"),
    "a number": (
        lambda: graphed(Odd(lambda ids: ids.float().mean()).eval(), [(1, 4)]), ValueError,
        r"outputs of shape.*bucket \(1, 4\) got \(\)",
    ),
    "weights of attention": (
        lambda: graphed(Odd(lambda ids: ids.new_zeros(1, 2, 4, 4)).eval(), [(1, 4)]), ValueError,
        r"got \(1, 2, 4, 4\)",
    ),
    "what asks the device": (
        lambda: graphed(Odd(fails).eval(), [(1, 4)]), RuntimeError,
        r"\(1, 4\) could not be captured: operation not permitted when stream is capturing \(a",
    ),
    "a length that the model does not have": (
        lambda: graphed(bert(), [(1, 13)]), ValueError, "at most 12 positions",
    ),
}  # fmt: skip


@stand_in
@pytest.mark.parametrize("what", MADE)
def test_what_cannot_be_graphed(what: str) -> None:
    make, error, message = MADE[what]
    with backend("torch"), pytest.raises(error, match=message):
        make()


def test_a_module_on_the_cpu_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"CUDA graphs need a GPU.*'module' are on cpu"):
        graphed(encoder().cpu(), [(1, 4)])


@stand_in
def test_after_a_capture_that_failed_a_call_says_so() -> None:
    module = Odd(lambda ids: ids.float()).eval()
    served: Graphed = graphed(module, [(1, 4)])
    module.make = fails
    with pytest.raises(RuntimeError, match="could not be captured"):
        served.capture()
    with pytest.raises(RuntimeError, match=r"has no graphs.*capture\(\)"):
        served(torch.zeros(1, 4, dtype=torch.int64))
