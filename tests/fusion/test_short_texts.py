"""Inference by ATen: the bits of a layer's steps, how many calls it takes, and what it holds."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from tests.fusion.models import IMAGE, TEXT, transformers
from torch.utils._python_dispatch import TorchDispatchMode

import fusedformer
from fusedformer.fusion import _layers
from fusedformer.fusion._inference import inferred
from fusedformer.fusion._layers import FusedLayer
from fusedformer.ops import layer_compiled
from fusedformer.testing import compare_tensors
from fusedformer.tools.measure import peak_memory
from fusedformer_kernels.cpu import build, layer

T: Any = transformers
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (T.BertConfig(**TEXT), T.BertModel, {"input_ids": (1, 11)}),
    "roformer": (T.RoFormerConfig(**TEXT), T.RoFormerModel, {"input_ids": (3, 11)}),
    "prelayernorm": (
        T.RobertaPreLayerNormConfig(**TEXT), T.RobertaPreLayerNormModel, {"input_ids": (2, 11)}
    ),
    "vit": (T.ViTConfig(**IMAGE), T.ViTModel, {"pixel_values": (2, 3, 16, 16)}),
}  # fmt: skip


class Names(TorchDispatchMode):
    """Counts operators; it changes nothing, so that calls go as they do without it."""

    only_looks = True

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.found[func.name().partition("::")[2].partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def inputs_of(shapes: dict[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name, shape in shapes.items():
        if name == "input_ids":
            given[name] = torch.randint(5, 99, shape)
            given["attention_mask"] = torch.ones(shape, dtype=torch.long)
        else:
            given[name] = torch.randn(shape)
    return given


@pytest.mark.parametrize("name", MODELS)
def test_bits_are_those_of_the_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen once for a layer, the calls are those that its steps come to one by one."""
    config, cls, shapes = MODELS[name]
    model = cls(config).eval()
    stock = copy.deepcopy(model).double()
    fusedformer.fuse(model)
    given = inputs_of(shapes)
    with fusedformer.backend("torch"), torch.no_grad():
        found = model(**given).last_hidden_state
        steps: list[Any] = []

        def not_here(*call: Any) -> None:
            steps.append(inferred(*call))

        monkeypatch.setattr(_layers, "inferred", not_here)
        assert torch.equal(model(**given).last_hidden_state, found)
        assert len(steps) == 2 and all(one is not None for one in steps)
        wide = {n: x.double() if x.is_floating_point() else x for n, x in given.items()}
        torch.testing.assert_close(
            found.double(), stock(**wide).last_hidden_state, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_many_rows_go_through_a_layer_at_once(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No operator multiplies, activates or norms: three calls of C++ do, for each layer."""
    if not layer.computes(dtype):
        pytest.skip("others multiply faster here")
    monkeypatch.setattr(layer_compiled, "_WORTH", 0)
    config, cls, shapes = MODELS[name]
    model = cls(config).to(dtype).eval()
    stock, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    fusedformer.fuse(model)
    given = {n: cast(x, dtype) for n, x in inputs_of(shapes).items()}
    given = {n: x.repeat(8, *[1] * (x.dim() - 1)) for n, x in given.items()}
    with torch.no_grad():
        found = model(**given).last_hidden_state
        one = next(m for m in model.modules() if isinstance(m, FusedLayer))
        of_layer = counted(one, {"hidden_states": torch.randn(2, 32, 32).to(dtype)})
        judged = compare_tensors(
            "states", found, stock(**given).last_hidden_state,
            wide(**{n: cast(x, torch.float64) for n, x in given.items()}).last_hidden_state,
        )  # fmt: skip
    assert judged.passed, judged
    theirs = {"linear", "addmm", "_linear_pointwise", "gelu", "native_layer_norm", "mm"}
    assert not theirs & of_layer.keys()


def cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if x.is_floating_point() else x


def counted(model: Any, given: dict[str, Any]) -> Counter[str]:
    with fusedformer.backend("torch"), torch.inference_mode(), Names() as names:
        model(**given)
    return names.found


def test_calls_of_a_short_text() -> None:
    """A layer's are few, and a text without padding is not packed: nothing is moved or indexed."""
    if build.library() is None:
        pytest.skip("no compiler")
    one, two = (
        T.BertModel(T.BertConfig(**{**TEXT, "num_hidden_layers": n}), add_pooling_layer=False)
        for n in (1, 2)
    )
    given = inputs_of({"input_ids": (1, 11)})
    for model in (one, two):
        fusedformer.fuse(model.eval())
        counted(model, given)
    alone, both = counted(one, given), counted(two, given)
    assert (both - alone).total() <= 19  # 6 products, 2 sums, 2 norms, an activation, 8 views
    moved = {"index", "index_select", "cumsum", "where", "scatter", "nonzero", "clamp"}
    assert not moved & alone.keys()


@pytest.mark.parametrize("norms_first", [False, True])
def test_what_a_layer_holds_at_most(norms_first: bool) -> None:
    """What its feed-forward block reads and makes; query, key and value are gone by then."""
    if build.library() is None:
        pytest.skip("no compiler")
    text = {**TEXT, "hidden_size": 64, "intermediate_size": 256}
    model: Any = (
        T.RobertaPreLayerNormModel(T.RobertaPreLayerNormConfig(**text))
        if norms_first
        else T.BertModel(T.BertConfig(**text))
    )
    fusedformer.fuse(model.eval())
    layer = model.encoder.layer[0]
    x = torch.randn(2, 512, 64)
    with fusedformer.backend("torch"), torch.inference_mode():
        layer(x)
        peak = peak_memory(lambda: layer(x), torch.device("cpu"))
    # The width, times: what is normed, the block's four, its result; and the sum before.
    assert peak <= (7 + norms_first) * x.nbytes  # one is for what oneDNN takes
