"""What a model was found to be made of is kept for later calls, until something in it changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.fusion.models import TEXT, perturbed, transformers
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import fusedformer
from fusedformer.fusion._seen import SEEN

T: Any = transformers
IDS = torch.randint(5, 99, (2, 7), generator=torch.Generator().manual_seed(0))
GIVEN = {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}


class Louder(nn.Linear):
    """Computes more than its base."""

    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


class Scaled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 3.0 * weight


def adds_one(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + 1.0


def replace(path: str, make: Callable[[Any], nn.Module]) -> Callable[[Any], Any]:
    def change(model: Any) -> None:
        model.set_submodule(path, make(model.get_submodule(path)))

    return change


def louder(old: nn.Linear) -> nn.Linear:
    new = Louder(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    return new


def set_class(module: Any) -> nn.Module:
    module.__class__ = Louder
    return module


LAYER = "encoder.layer.1"
DENSE = f"{LAYER}.intermediate.dense"
INNER, OUT = f"{LAYER}.intermediate", f"{LAYER}.output"
ACT = "intermediate_act_fn"


def at(path: str, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda model: change(model.get_submodule(path))


def function_for_module(inner: Any) -> None:
    delattr(inner, ACT)
    setattr(inner, ACT, torch.tanh)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "another child": replace(DENSE, louder),
    "another class": at(DENSE, set_class),
    "a forward": at(DENSE, lambda m: m.__dict__.update(forward=lambda x: x.tile(4)[..., :48])),
    "a hook": at(DENSE, lambda m: m.register_forward_hook(adds_one)),
    "a hook of a parent": at(OUT, lambda m: m.register_forward_hook(adds_one)),
    "a hook before": at(
        DENSE, lambda m: m.register_forward_pre_hook(lambda _, given: (-given[0],))
    ),
    "a parametrization": at(
        DENSE, lambda m: nn.utils.parametrize.register_parametrization(m, "weight", Scaled())
    ),
    "an activation": at(INNER, lambda m: setattr(m, ACT, nn.Tanh())),
    "a function": at(INNER, function_for_module),
    "an epsilon": at(f"{OUT}.LayerNorm", lambda m: setattr(m, "eps", 1.0)),
    "another parameter": at(DENSE, lambda m: setattr(m, "bias", nn.Parameter(m.bias + 1.0))),
    "no bias": at(DENSE, lambda m: setattr(m, "bias", None)),
    "values": at(DENSE, lambda m: m.weight.data.mul_(2.0)),
    "a dtype": lambda m: m.double(),
    "chunks": at(LAYER, lambda m: setattr(m, "chunk_size_feed_forward", 1)),
    "attention": lambda m: m.set_attn_implementation("eager"),
}


def outputs(model: Any) -> Tensor:
    with fusedformer.backend("torch"), torch.no_grad():
        found: Tensor = model(**GIVEN).last_hidden_state
    return found[GIVEN["attention_mask"].bool()].double()


@pytest.fixture(scope="module")
def stock() -> Any:
    torch.manual_seed(0)
    model: Any = perturbed(T.BertModel(T.BertConfig(**TEXT), add_pooling_layer=False))
    return model.eval()


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_a_call_is_seen(change: str, stock: Any) -> None:
    both = copy.deepcopy(stock), copy.deepcopy(stock)
    fusedformer.fuse(both[1])
    before = outputs(both[1])
    assert all(both[1].get_submodule(at).__dict__[SEEN] is not None for at in ("", LAYER))
    for model in both:
        CHANGES[change](model)
    wanted = outputs(both[0])
    for _ in range(2):
        torch.testing.assert_close(outputs(both[1]), wanted, rtol=1e-5, atol=2e-5)
    same = change in ("chunks", "attention", "a dtype")
    assert torch.allclose(wanted, before, atol=1e-4) == same


def test_a_hook_on_all_modules_is_seen(stock: Any) -> None:
    model = copy.deepcopy(stock)
    fusedformer.fuse(model)
    outputs(model)
    called: list[str] = []
    handle = register_module_forward_hook(lambda m, *_: called.append(type(m).__name__))
    try:
        outputs(model)
    finally:
        handle.remove()
    assert called.count("Linear") == 12


def test_copies_look_at_their_own_modules(stock: Any) -> None:
    """And neither pickles nor models that are no longer fused keep anything."""
    model = copy.deepcopy(stock)
    fusedformer.fuse(model)
    before = outputs(model)
    assert model.encoder.layer[0].__dict__[SEEN] is not None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.encoder.layer[0].__dict__[SEEN] is None
        twin.get_submodule(DENSE).register_forward_hook(adds_one)
        assert not torch.allclose(outputs(twin), before, atol=1e-3)
        assert torch.equal(outputs(model), before)
    shallow = copy.copy(model.encoder.layer[1])
    shallow._modules = {**shallow._modules, "output": copy.deepcopy(shallow.output)}
    shallow.output.register_forward_hook(adds_one)
    x = torch.randn(1, 5, TEXT["hidden_size"])
    with fusedformer.backend("torch"), torch.no_grad():
        assert not torch.allclose(shallow(x), model.encoder.layer[1](x), atol=1e-3)
    fusedformer.unfuse(model)
    assert not any(SEEN in one.__dict__ for one in model.modules())


def test_training_after_inference(stock: Any) -> None:
    """Modes are read anew: dropout drops, and gradients come."""
    model = copy.deepcopy(stock)
    fusedformer.fuse(model)
    before = outputs(model)
    model.train()
    assert not torch.allclose(outputs(model), before, atol=1e-3)
    with fusedformer.backend("torch"):
        model(**GIVEN).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None for p in model.encoder.parameters())
    assert torch.equal(outputs(model.eval()), before)
