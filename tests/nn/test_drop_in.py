"""What makes a module a drop-in for torch's of the same name, whatever it computes."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusedformer import nn

Make = Callable[[Any], torch.nn.Module]


def stack(library: Any) -> torch.nn.Module:
    layer = library.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    module: torch.nn.Module = library.TransformerEncoder(layer, 2, library.LayerNorm(8))
    return module


MAKES: dict[str, Make] = {
    "Softmax": lambda library: library.Softmax(-1),
    "LogSoftmax": lambda library: library.LogSoftmax(dim=1),
    "LayerNorm": lambda library: library.LayerNorm([3, 5], eps=1e-3),
    "LayerNorm without bias": lambda library: library.LayerNorm(5, bias=False),
    "LayerNorm without parameters": lambda library: library.LayerNorm(5, elementwise_affine=False),
    "RMSNorm": lambda library: library.RMSNorm(5),
    "CrossEntropyLoss": lambda library: library.CrossEntropyLoss(torch.ones(3), ignore_index=2),
    "MultiheadAttention": lambda library: library.MultiheadAttention(8, 2, 0.1),
    "MultiheadAttention kdim": lambda library: library.MultiheadAttention(8, 2, kdim=3, vdim=5),
    "MultiheadAttention appended": lambda library: library.MultiheadAttention(
        8, 2, bias=False, add_bias_kv=True, add_zero_attn=True
    ),
    "TransformerEncoderLayer": lambda library: library.TransformerEncoderLayer(8, 2, 12),
    "TransformerEncoderLayer float64": lambda library: library.TransformerEncoderLayer(
        8, 2, 12, activation="gelu", norm_first=True, bias=False, dtype=torch.float64
    ),
    "TransformerEncoderLayer module": lambda library: library.TransformerEncoderLayer(
        8, 2, 12, activation=torch.nn.GELU()
    ),
    "TransformerEncoder": stack,
    "TransformerDecoderLayer": lambda library: library.TransformerDecoderLayer(8, 2, 12),
    "TransformerDecoderLayer float64": lambda library: library.TransformerDecoderLayer(
        8, 2, 12, activation="gelu", norm_first=True, bias=False, dtype=torch.float64
    ),
    "TransformerDecoder": lambda library: library.TransformerDecoder(
        library.TransformerDecoderLayer(8, 2, 12, batch_first=True), 2, library.LayerNorm(8)
    ),
    "Transformer": lambda library: library.Transformer(8, 2, 1, 2, 12, norm_first=True),
}
EACH = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())


def pair(make: Make) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and stock's, made from the same seed."""
    torch.manual_seed(5)
    ours = make(nn)
    after_ours = torch.rand(1)
    torch.manual_seed(5)
    stock = make(torch.nn)
    assert torch.equal(after_ours, torch.rand(1)), "as many random numbers are drawn"
    return ours, stock


def same_state(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(map(torch.equal, first.values(), second.values()))


@EACH
def test_it_is_an_instance_and_has_the_same_constructor(make: Make) -> None:
    ours, stock = pair(make)
    assert isinstance(ours, type(stock)) and type(ours).__name__ == type(stock).__name__

    def arguments(function: Any) -> list[tuple[str, Any, Any]]:
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    for method in ("__init__", "forward"):
        found, wanted = (arguments(getattr(type(m), method)) for m in (ours, stock))
        assert found[: len(wanted)] == wanted
        # What ours has besides is by keyword, and off unless it is asked for.
        assert all(
            kind is inspect.Parameter.KEYWORD_ONLY and not default
            for _, kind, default in found[len(wanted) :]
        )


@EACH
def test_initialization_has_the_same_bits_names_and_order(make: Make) -> None:
    ours, stock = pair(make)
    assert same_state(ours, stock)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in stock.named_parameters()]
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in stock.named_modules()]


@EACH
def test_state_goes_both_ways(make: Make) -> None:
    ours, stock = pair(make)
    for source, target in ((ours, stock), (stock, ours)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.normal_()
        target.load_state_dict(source.state_dict(), strict=True)
        assert same_state(source, target)


@EACH
def test_children_are_ours_where_there_are_ours(make: Make) -> None:
    ours, stock = pair(make)
    for (name, child), (_, other) in zip(ours.named_modules(), stock.named_modules(), strict=True):
        assert type(child) is getattr(nn, type(other).__name__, type(other)), name


@EACH
def test_repr_and_public_attributes_are_torchs(make: Make) -> None:
    ours, stock = pair(make)
    assert repr(ours) == repr(stock)
    for (name, child), (_, other) in zip(ours.named_modules(), stock.named_modules(), strict=True):
        assert set(vars(child)) == set(vars(other)), name
        for attribute, value in vars(other).items():
            if isinstance(value, (int, float, str, tuple)) and attribute != "use_nested_tensor":
                assert getattr(child, attribute) == value, (name, attribute)


def deepcopied(module: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(module)


def pickled(module: torch.nn.Module) -> torch.nn.Module:
    restored: torch.nn.Module = pickle.loads(pickle.dumps(module))
    return restored


def saved(module: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    restored: torch.nn.Module = torch.load(file, weights_only=False)
    return restored


@EACH
@pytest.mark.parametrize("copied", [deepcopied, pickled, saved])
def test_copies_are_whole_and_independent(
    copied: Callable[[torch.nn.Module], torch.nn.Module], make: Make
) -> None:
    ours, _ = pair(make)
    twin = copied(ours)
    assert type(twin) is type(ours) and repr(twin) == repr(ours) and same_state(twin, ours)
    ids = {id(p) for p in ours.parameters()}
    assert not any(id(p) in ids for p in twin.parameters())
    for child in twin.modules():
        assert type(child).__module__.split(".")[0] in ("torch", "fusedformer")


def test_a_copied_encoder_computes_the_same() -> None:
    ours, _ = pair(stack)
    ours.eval()
    x = torch.randn(2, 4, 8)
    for copied in (deepcopied, pickled, saved):
        assert torch.equal(copied(ours)(x), ours(x))


@EACH
def test_hooks_on_the_module_fire(make: Make) -> None:
    ours, _ = pair(make)
    seen = []
    ours.register_forward_pre_hook(lambda module, args: seen.append("before"))
    ours.register_forward_hook(lambda module, args, output: seen.append("after"))
    x = torch.randn(2, 3, 5) if ours.__class__.__name__.endswith(("max", "Norm", "Loss")) else None
    if x is None:
        width = next(p for p in ours.parameters() if p.dim() > 1).shape[-1]
        x = torch.randn(2, 3, width, dtype=next(ours.parameters()).dtype)
    kwargs: dict[str, Any] = {}
    if isinstance(ours, torch.nn.CrossEntropyLoss):
        kwargs = {"target": torch.zeros(2, 5, dtype=torch.int64)}
    if isinstance(ours, torch.nn.MultiheadAttention):
        kwargs = {"key": torch.randn(2, 3, ours.kdim), "value": torch.randn(2, 3, ours.vdim)}
        x = torch.randn(2, 3, 8)
    if "memory" in inspect.signature(ours.forward).parameters or hasattr(ours, "decoder"):
        kwargs = {"tgt" if hasattr(ours, "decoder") else "memory": x.float()}
    ours.float()(x.float(), **kwargs)  # float64 is not among the kernels' dtypes
    assert seen == ["before", "after"]


def test_parameters_made_on_another_device_stay_there() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in layer.parameters())


def test_every_public_module_is_exported() -> None:
    for name in nn.__all__:
        cls = getattr(nn, name)
        assert issubclass(cls, torch.nn.Module) and cls.__doc__
        assert not hasattr(torch.nn, name) or issubclass(cls, getattr(torch.nn, name))
