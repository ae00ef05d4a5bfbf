"""Dropouts and stochastic depth of layers that are fused: each where stock has it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from tests.fusion.models import (
    IMAGE,
    MASK,
    WINDOWS,
    inputs_of,
    model_of,
    perturbed,
    run,
)
from tests.fusion.test_families import near
from torch import Tensor, nn

import fusedformer
from fusedformer.fusion import _residual

T: Any = pytest.importorskip("transformers")


def depth_differs(name: str, kind: str, sizes: Any) -> list[bool]:
    """Whether a fused model that drops images does otherwise than stock: training, evaluation."""
    config = getattr(T, f"{kind}Config")(**{**sizes, "drop_path_rate": 0.5})
    model = perturbed(getattr(T, f"{kind}Model")(config), 0)
    twin, inputs = copy.deepcopy(model), inputs_of(name)
    fusedformer.fuse(model, strict=True)
    differ = []
    for mode in (True, False):
        found = []
        for one in (model.train(mode), twin.train(mode)):
            torch.manual_seed(4)
            found.append(run(one, inputs))
        ours, wanted = found
        limits = {key: 2e-5 * value.abs().max().item() + 2e-5 for key, value in wanted.items()}
        near = (torch.allclose(ours[k], wanted[k], atol=limit) for k, limit in limits.items())
        differ.append(not all(near))
    assert not torch.allclose(run(twin.train(), inputs)["pooler_output"], wanted["pooler_output"])
    return differ


DINOV2 = "dinov2", "Dinov2", IMAGE


@pytest.mark.parametrize(
    ("name", "kind", "sizes"),
    [DINOV2, ("swin", "Swin", WINDOWS), ("swinv2", "Swinv2", WINDOWS)],
)
def test_stochastic_depth_drops_what_stock_drops(name: str, kind: str, sizes: Any) -> None:
    """Whole images in either half of a layer, drawn as stock draws them; nothing in evaluation."""
    assert depth_differs(name, kind, sizes) == [False, False]


DEPTH_FAULTS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "nothing is dropped": lambda s, x, residual: x * s.scale + residual,
    "the residual is dropped too": lambda s, x, residual: s.depth(x * s.scale + residual),
    "what is kept has no scale": lambda s, x, residual: s.depth(x) + residual,
    "each token is dropped by itself": lambda s, x, residual: (
        s.depth((x * s.scale).flatten(0, 1)).view_as(x) + residual
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", DEPTH_FAULTS)
def test_faults_in_stochastic_depth_are_seen(fault: str) -> None:
    right = _residual.Scaled.added

    def added(scaled: Any) -> Tensor:
        x, bias, _, residual = scaled.pending
        if scaled.depth is None:
            return right(scaled)
        return DEPTH_FAULTS[fault](scaled, x if bias is None else x + bias, residual)

    with mock.patch.object(_residual.Scaled, "added", added):
        assert depth_differs(*DINOV2) == [True, False]


@pytest.mark.parametrize(
    "name",
    [
        "data2vec-vision",
        "swin",
        "swinv2",
        "yolos",
        "janus vision",
        "internvl vision",
        "timesformer",
    ],
)
def test_each_dropout_is_where_stock_has_it(name: str) -> None:
    """With a probability of 1 it leaves nothing to chance."""
    model, inputs = model_of(name).train(), inputs_of(name)
    twin = copy.deepcopy(model)
    fusedformer.fuse(model, strict=True)
    dropouts = {n for n, m in model.named_modules() if isinstance(m, nn.Dropout)}
    dropouts = {n for n in dropouts if any(part.isdigit() for part in n.split("."))}
    if name == "data2vec-vision":  # its attention by ``sdpa`` reads the configuration instead
        dropouts = {n for n in dropouts if not n.endswith("attention.attention.dropout")}
    if name == "swin":
        dropouts |= {n for n, m in model.named_modules() if hasattr(m, "attention_dropout")}
    before, seen = twin(**inputs)[0], 0
    for path in dropouts:
        for one in (model, twin):
            child = one.get_submodule(path)
            setattr(child, "p" if isinstance(child, nn.Dropout) else "attention_dropout", 1.0)
        wanted = twin(**inputs)[0]
        assert near(model(**inputs)[0], wanted), path
        seen += not near(wanted, before)
        before = wanted
    assert seen >= len(dropouts) // 2 > 0


MONTE_CARLO = "beit", "swin", "yolos", "timesformer", "wavlm", "deberta-v3", "gpt2"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("data2vec-vision", "eager"), *((n, "sdpa") for n in ("data2vec-vision", *MONTE_CARLO))],
)
def test_dropouts_that_train_in_a_model_that_does_not(name: str, kind: str) -> None:
    """As Monte Carlo dropout has them; with a probability of 1, each by itself."""
    model, inputs = model_of(name), inputs_of(name)
    if kind == "eager":  # another class, which calls its dropout
        config = copy.deepcopy(model.config)
        config._attn_implementation = "eager"
        eager = type(model)(config)
        eager.load_state_dict(model.state_dict())
        model = eager
    twin = copy.deepcopy(model.eval())
    fusedformer.fuse(model)
    dropouts = [n for n, m in twin.named_modules() if isinstance(m, nn.Dropout)]
    differ = 0
    with torch.no_grad():
        before = twin(**inputs)[0]
        real = MASK if before.shape[:2] == MASK.shape else ...
        for path in dropouts:
            for one in (model, twin):
                one.get_submodule(path).p = 1.0
                one.get_submodule(path).train()
            wanted = twin(**inputs)[0]
            assert near(model(**inputs)[0][real], wanted[real]), path
            differ += not near(wanted[real], before[real])
            for one in (model, twin):
                one.get_submodule(path).eval()
    assert differ >= len(dropouts) // 2 > 0
