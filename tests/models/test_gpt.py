"""The GPT-2 decoder against transformers' own, from the same random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models.judge import faults_of, perturbed
from torch import Tensor

from fusedformer import backend
from fusedformer.models import GPTConfig, GPTDecoderModel

CONFIG = GPTConfig(
    vocab_size=61, n_positions=24, n_embd=32, n_layer=2, n_head=4, n_inner=48, eos_token_id=60
)
LENGTHS = (9, 1, 6)
RIGHT = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


@pytest.fixture(scope="module")
def stock() -> Any:
    return stock_of(2)


def stock_of(layers: int) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {**vars(CONFIG), "n_layer": layers}
    config = transformers.GPT2Config(**sizes, attn_implementation="sdpa")
    return perturbed(transformers.GPT2LMHeadModel(config).eval())


def ids_of(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, CONFIG.vocab_size, RIGHT.shape, generator=generator)


def ours_of(stock: Any) -> GPTDecoderModel:
    return GPTDecoderModel.from_huggingface(stock.state_dict(), stock.config.to_dict())


def theirs(model: Any, ids: Tensor, keep: Tensor, labels: Tensor | None = None) -> Any:
    return model(
        ids, attention_mask=keep.long(), position_ids=(keep.cumsum(1) - 1).clamp(min=0),
        labels=labels,
    )  # fmt: skip


SIDES = {"no padding": None, "right": RIGHT, "left": RIGHT.flip(1)}


@pytest.mark.parametrize(
    ("side", "dtype"),
    [*((side, torch.float32) for side in SIDES), ("right", torch.bfloat16), ("left", torch.half)],
)
def test_logits_and_all_gradients_are_those_of_transformers(side: str, dtype: torch.dtype) -> None:
    stock = stock_of(2).to(dtype)
    keep = SIDES[side]
    real = torch.ones_like(RIGHT) if keep is None else keep

    def ours(model: Any, seed: int) -> Tensor:
        found: Tensor = model.logits(model(ids_of(seed), keep))[real]
        return found

    def stocks(model: Any, seed: int) -> Tensor:
        logits: Tensor = theirs(model, ids_of(seed), real).logits[real]
        return logits

    assert faults_of(ours_of(stock), ours, stock, stocks) == []


def loss_of_ours(model: Any, seed: int) -> Tensor:
    loss: Tensor = model.loss(ids_of(seed), attention_mask=RIGHT)
    return loss


def loss_of_theirs(model: Any, seed: int) -> Tensor:
    ids = ids_of(seed)
    loss: Tensor = theirs(model, ids, RIGHT, ids.masked_fill(~RIGHT, -100)).loss
    return loss


@pytest.mark.parametrize(
    ("name", "layers"),
    [("torch", 2), pytest.param("triton", 1, marks=pytest.mark.interpreter)],
)
def test_loss_and_all_gradients_are_those_of_transformers(name: Any, layers: int) -> None:
    stock = stock_of(layers)
    assert faults_of(ours_of(stock), loss_of_ours, stock, loss_of_theirs, name) == []


def test_labels_leave_out_what_is_not_to_be_learned(stock: Any) -> None:
    def labels(seed: int) -> Tensor:
        return ids_of(seed).masked_fill(~RIGHT | (torch.arange(9) < 3), -100)

    def ours(model: Any, seed: int) -> Tensor:
        loss: Tensor = model.loss(ids_of(seed), labels(seed), RIGHT)
        return loss

    def stocks(model: Any, seed: int) -> Tensor:
        loss: Tensor = theirs(model, ids_of(seed), RIGHT, labels(seed)).loss
        return loss

    assert faults_of(ours_of(stock), ours, stock, stocks) == []


@pytest.mark.parametrize("fault", ["not causal", "exact GELU", "not shifted", "positions"])
def test_a_planted_fault_is_found(stock: Any, fault: str) -> None:
    ours = ours_of(stock)
    if fault == "not causal":
        ours._is_causal = False  # type: ignore[misc]
    elif fault == "exact GELU":
        for layer in ours.encoder.layers:
            layer.activation = torch.nn.GELU()
    shifted = torch.cat([ids_of(1)[:, 1:], ids_of(1)[:, :1]], 1)

    def loss(model: Any, seed: int) -> Tensor:
        given: dict[str, Tensor] = {}
        if fault == "not shifted":
            given["labels"] = shifted
        if fault == "positions":
            given["position_ids"] = torch.arange(1, 10)
        found: Tensor = model.loss(ids_of(seed), attention_mask=RIGHT, **given)
        return found

    assert faults_of(ours, loss, stock, loss_of_theirs)


def test_loss_and_decoding_compile_without_a_graph_break(stock: Any) -> None:
    ours = ours_of(stock)
    ids, token = ids_of(1), torch.ones(3, 1, dtype=torch.int64)
    with backend("torch"), torch.no_grad():
        caches = [ours.prefill(ids, RIGHT, 2)[1] for _ in range(2)]
        calls: list[Any] = [lambda cache: ours.loss(ids, attention_mask=RIGHT),
                            lambda cache: ours.decode(token, cache)]  # fmt: skip
        for call in calls:
            compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
            # Eager norms without gradients are compiled C++'s, which torch.compile does not see.
            torch.testing.assert_close(compiled(caches[0]), call(caches[1]))
    assert torch.equal(caches[0].lengths, caches[1].lengths)


def test_a_hooked_encoder_computes_the_same_padded(stock: Any) -> None:
    ours = ours_of(stock)
    ids, columns = ids_of(1), torch.tensor([[8], [0], [5]])
    with backend("torch"), torch.no_grad():
        packed = ours(ids, RIGHT), ours(ids, RIGHT, output_rows=columns)
        seen: list[torch.Size] = []
        ours.encoder.layers[0].linear1.register_forward_hook(
            lambda module, args, out: seen.append(out.shape[:-1])
        )
        padded = ours(ids, RIGHT), ours(ids, RIGHT, output_rows=columns)
    assert seen == [RIGHT.shape] * 2
    for one, other in zip(packed, padded, strict=True):
        torch.testing.assert_close(one, other)


def test_weights_go_both_ways_bit_for_bit(stock: Any) -> None:
    given = stock.state_dict()
    back = ours_of(stock).to_huggingface_state_dict()
    assert back.keys() == given.keys()
    assert all(torch.equal(back[name], given[name]) for name in back)
    bare = {f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(2)}
    bare |= {n.removeprefix("transformer."): t for n, t in given.items() if n != "lm_head.weight"}
    assert GPTDecoderModel(CONFIG).load_huggingface_state_dict(bare) == []
    del bare["h.1.ln_2.bias"]
    with pytest.raises(KeyError, match=r"h\.1\.ln_2\.bias"):
        GPTDecoderModel(CONFIG).load_huggingface_state_dict(bare)


def test_initialization_is_gpt2s() -> None:
    torch.manual_seed(0)
    model = GPTDecoderModel(GPTConfig(vocab_size=997, n_embd=96, n_layer=2, n_head=4))
    first: Any = model.encoder.layers[0]
    for weight, wanted in ((model.embeddings.token.weight, 0.02), (first.linear1.weight, 0.02),
                           (first.linear2.weight, 0.01)):  # fmt: skip
        # Standard error of a deviation over n draws: sigma / sqrt(2 n).
        assert abs(weight.std().item() - wanted) < 6 * wanted / (2 * weight.numel()) ** 0.5
    assert first.self_attn.dropout == 0.1 and (first.dropout.p, first.dropout1.p) == (0.0, 0.1)


@pytest.mark.parametrize(
    "change",
    [{"scale_attn_by_inverse_layer_idx": True}, {"add_cross_attention": True}, {"n_head": 5},
     {"activation_function": "mish"}, {"attn_pdrop": 1.5}, {"n_layer": 0}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_bad_config(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        GPTConfig.from_huggingface({**vars(CONFIG), **change})


def test_bad_input() -> None:
    model = GPTDecoderModel(CONFIG)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="24 positions"):
        model(ids.expand(2, 3).repeat(1, 9))
    with pytest.raises(TypeError, match="int32 or int64"):
        model(ids.float())
    with pytest.raises(ValueError, match="'attention_mask' to have shape"):
        model(ids, ids[:, :2])
    with pytest.raises(ValueError, match="'labels' to have shape"):
        model.loss(ids, ids[:, :2])
