"""Parametrizations put on and removed before and after fuse() and unfuse(), beside stock's."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fusedformer

E, H = 8, 2


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


class Norm(nn.LayerNorm):
    """A subclass, which gets a class made of it and of ours."""


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(E, H, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.attend(x, x, x)[0]
        return output


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(E, H, 12, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


PLACES: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "LayerNorm": (lambda: nn.Sequential(nn.LayerNorm(E)), "0", "weight"),
    "a subclass of LayerNorm": (lambda: nn.Sequential(Norm(E)), "0", "weight"),
    "MultiheadAttention": (Attention, "attend", "in_proj_weight"),
    "a layer's attention": (encoder, "layers.0.self_attn", "in_proj_weight"),
    "a layer's norm": (encoder, "layers.0.norm1", "weight"),
    "a layer's Linear": (encoder, "layers.0.linear1", "weight"),
    "a layer's output projection": (encoder, "layers.0.self_attn.out_proj", "weight"),
}
KINDS: dict[str, Callable[[nn.Module, str], object]] = {
    "parametrize": lambda module, name: parametrize.register_parametrization(module, name, Half()),
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
}
CASES = [  # a norm's weight is of one dimension, which has no norm to speak of
    (place, kind) for place in PLACES for kind in KINDS
    if kind == "parametrize" or "orm" not in place
]  # fmt: skip
ORDERS = [
    order for order in itertools.permutations(("put", "remove", "fuse", "unfuse"))
    if order.index("put") < order.index("remove") and order.index("fuse") < order.index("unfuse")
]  # fmt: skip
ORDERS += [("put", "fuse", "unfuse"), ("fuse", "put", "copy", "unfuse"), ("fuse", "put", "fuse")]


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
@pytest.mark.parametrize(("place", "kind"), CASES)
def test_every_order(place: str, kind: str, order: tuple[str, ...]) -> None:
    make, path, name = PLACES[place]
    ours = make().eval()  # in training spectral_norm changes the weight whenever it is read
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    stock, x = copy.deepcopy(ours), torch.randn(3, 4, E)
    for step in order:
        if step in ("put", "remove"):
            for model in (ours, stock):
                module = model.get_submodule(path)
                torch.manual_seed(1)
                if step == "put":
                    KINDS[kind](module, name)
                else:
                    parametrize.remove_parametrizations(module, name)
        elif step == "copy":
            ours = copy.deepcopy(ours)
        else:
            getattr(fusedformer, step)(ours)
        torch.testing.assert_close(ours(x), stock(x))
        dy = torch.randn(3, 4, E)
        grads = [
            torch.autograd.grad(model(x), list(model.parameters()), dy) for model in (ours, stock)
        ]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    if order[-1] == "fuse":
        return
    for own, theirs in zip(ours.modules(), stock.modules(), strict=True):
        bare = [parametrize.type_before_parametrizations(module) for module in (own, theirs)]
        assert bare[0] is bare[1]
        assert parametrize.is_parametrized(own) == parametrize.is_parametrized(theirs)
        assert not any(key.startswith("_fusedformer") for key in own.__dict__)
