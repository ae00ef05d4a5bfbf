"""fuse() on DeBERTa: what a call may ask for, and what a model may have been given."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.fusion.models import LENGTHS, MASK, inputs_of, model_of
from torch import Tensor

import fusedformer
from fusedformer import functional

T: Any = pytest.importorskip("transformers")


@pytest.fixture
def packed_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that each call of attention was given, or sequences if they are padded."""
    calls: list[int] = []
    original = functional.disentangled_attention

    def spy(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(query.shape[0])
        return original(query, *args, **kwargs)

    monkeypatch.setattr(functional, "disentangled_attention", spy)
    return calls


def fused(name: str) -> tuple[Any, Any]:
    stock = model_of(name).eval()
    model = copy.deepcopy(stock)
    fusedformer.fuse(model, strict=True)
    return model, stock


FORMS: dict[str, dict[str, Any]] = {
    "embedded": {"input_ids": None, "inputs_embeds": torch.randn(*MASK.shape, 32)},
    "positions": {"position_ids": torch.arange(MASK.shape[1]).flip(0)[None]},
    "types": {"token_type_ids": torch.arange(MASK.numel()).view(MASK.shape) % 2},
    "padded on the left": {"attention_mask": MASK.flip(1).long()},
    "hidden states": {"output_hidden_states": True},
    "a tuple": {"output_hidden_states": True, "return_dict": False},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_call_is_packed(form: str, packed_calls: list[int]) -> None:
    model, stock = fused("deberta-v2")
    given = {**inputs_of("deberta-v2"), **FORMS[form]}
    real = given["attention_mask"].bool()
    with torch.no_grad():
        wanted, found = (list(_tensors(one(**given))) for one in (stock, model))
    assert packed_calls == [sum(LENGTHS)] * 2
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-5)
        assert not got[~real].any()


def _tensors(output: Any) -> Any:
    for value in output.values() if isinstance(output, dict) else output:
        yield from [value] if isinstance(value, Tensor) else value


@pytest.mark.parametrize("why", ["attentions", "a hole in the mask"])
def test_what_is_computed_padded(why: str, packed_calls: list[int]) -> None:
    """Distances count positions that are left out, and weights are wanted of the whole batch."""
    model, stock = fused("deberta-v3")
    given: dict[str, Any] = {**inputs_of("deberta-v3"), "output_attentions": why == "attentions"}
    if why != "attentions":
        given["attention_mask"][0, 3] = 0
    real = given["attention_mask"].bool()
    with torch.no_grad():
        found, wanted = model(**given), stock(**given)
    torch.testing.assert_close(found[0][real], wanted[0][real], rtol=1e-4, atol=1e-5)
    if why == "attentions":  # by stock
        assert not packed_calls
        for got, want in zip(found.attentions, wanted.attentions, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    else:
        assert packed_calls == [len(MASK)] * 2 and not found[0][~real].any()


class Adapted(torch.nn.Linear):
    """A child that is not plain, of a package whose modules are known to see tokens one by one."""

    __module__ = "peft.tuners.lora.layer"

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.5


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("how", ["an adapter", "checkpoints"])
def test_gradients_of_changed_models(how: str, packed_calls: list[int]) -> None:
    """Still packed; a layer whose child was replaced calls its children."""
    stock = model_of("deberta-v3").train()
    if how == "an adapter":
        for layer in stock.encoder.layer:
            layer.attention.self.value_proj.__class__ = Adapted
    else:
        stock.gradient_checkpointing_enable()
    model = copy.deepcopy(stock)
    fusedformer.fuse(model)
    given = inputs_of("deberta-v3")
    weights = torch.randn(*MASK.shape, 32) * MASK[..., None]
    for one in (stock, model):
        (one(**given).last_hidden_state * weights).sum().backward()
    assert set(packed_calls) == {sum(LENGTHS)}
    for got, want in zip(model.parameters(), stock.parameters(), strict=True):
        if want.grad is not None:
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-4)


def test_models_that_read_padding_are_left_alone() -> None:
    config = model_of("deberta-v3").config
    model = T.DebertaV2ForQuestionAnswering(config)
    report = fusedformer.fuse(model)
    assert any("reads padded positions" in one.reason for one in report.left)
    assert not any("packed" in one.after for one in report.replaced)
    assert any("packed" in one.after for one in fusedformer.fuse(model, pack=True).replaced)


def test_talking_heads_are_left_to_stock() -> None:
    stock = model_of("deberta").eval()
    config = copy.deepcopy(stock.config)
    config.talking_head = True
    stock = T.DebertaModel(config).eval()
    model, given = copy.deepcopy(stock), inputs_of("deberta")
    report = fusedformer.fuse(model)
    assert sum("heads talk" in one.reason for one in report.left) == 2
    with torch.no_grad():
        wanted = stock(**given)[0]
        torch.testing.assert_close(model(**given)[0], wanted, rtol=1e-4, atol=1e-5)
