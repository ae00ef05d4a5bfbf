"""Training parts of a model: frozen layers, a head; prompts and prefixes against joined ones."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from tests.models.judge import perturbed
from torch import Tensor

from fusedformer import backend
from fusedformer.finetuning import SequenceClassifier, freeze, prefix_tuning, prompt_tuning
from fusedformer.models import (
    BertConfig,
    BertEncoderModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    GPTConfig,
    GPTDecoderModel,
)
from fusedformer.testing import compare_tensors

BERT = BertConfig(
    vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=48, max_position_embeddings=19, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)  # fmt: skip
GPT = GPTConfig(
    vocab_size=61, n_positions=24, n_embd=32, n_layer=2, n_head=4, n_inner=48, eos_token_id=None
)
TINY_IMAGES = CLIPVisionConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8,
    patch_size=4,
)  # fmt: skip
LENGTHS = (7, 1, 4)
MASK = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
LEFT = MASK.flip(1)
P = 3
BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.interpreter)]


def ids_of(seed: int) -> Tensor:
    return torch.randint(0, 61, MASK.shape, generator=torch.Generator().manual_seed(seed))


def stock_gpt() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(**vars(GPT), attn_implementation="sdpa")
    return perturbed(transformers.GPT2LMHeadModel(config).eval())


def stock_bert() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(**vars(BERT), attn_implementation="sdpa", num_labels=3)
    return perturbed(transformers.BertForSequenceClassification(config).eval())


# Freezing


def counted(layers: int, frozen: int, device: str) -> tuple[Counter[str], int, list[str]]:
    """Launches of the backward, bytes kept for it, and what was trained."""
    from fusedformer_kernels.runtime.launch import recorded_launches

    torch.manual_seed(0)
    config = BertConfig(**{**vars(BERT), "num_hidden_layers": layers})
    model = BertEncoderModel(config).to(device)
    names = freeze(model, layers=frozen)
    kept: dict[int, int] = {}
    parameters = {p.data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with backend("triton"):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output = model(ids_of(1).to(device), MASK.to(device))
        with recorded_launches(run=True) as launches:
            output.backward(torch.randn_like(output))
    got = [name for name, p in model.named_parameters() if p.grad is not None]
    assert got == names
    return Counter(launch.name for launch in launches), sum(kept.values()), names


def test_the_backward_stops_at_the_first_trained_layer(device: str) -> None:
    """However many layers are frozen, one trained layer has the kernels of one, and its memory."""
    one, kept_one, names = counted(1, 0, device)
    three, kept_three, _ = counted(3, 2, device)
    assert one == three and kept_one == kept_three
    assert one["_norm_backward"] == 2 and one["_attention_backward_keys"] == 1
    assert not any("embedding" in name for name in one)
    assert names and all(name.startswith("encoder.layers.0.") for name in names)


def test_what_freezing_leaves_to_train() -> None:
    model = GPTDecoderModel(GPT)
    assert freeze(model, layers=2) == ["encoder.norm.weight", "encoder.norm.bias"]
    assert {name.split(".")[2] for name in freeze(model, layers=1)[:-2]} == {"1"}
    every = freeze(model.encoder, layers=0)
    assert len(every) == len(list(model.encoder.parameters()))
    with pytest.raises(ValueError, match="from 0 to 2"):
        freeze(model, layers=3)
    with pytest.raises(TypeError, match="'encoder' with 'layers'"):
        freeze(torch.nn.Linear(2, 2), layers=1)


# Classification


def test_bert_classifies_as_transformers_does() -> None:
    stock = stock_bert()
    heads = ("pooler",)
    config = stock.config.to_dict()
    inner = BertEncoderModel.from_huggingface(stock.state_dict(), config, heads=heads)
    ours = SequenceClassifier(inner, 3).eval()
    ours.classifier.load_state_dict(stock.classifier.state_dict())
    labels = torch.tensor([2, 0, 1])
    faults: dict[str, str] | None = None
    for seed in (1, 2, 3):  # as faults_of: luck ends with the draw
        for model in (ours, stock):
            model.zero_grad()
        with backend("torch"):
            loss = ours.loss(labels, ids_of(seed), attention_mask=MASK)
            loss.backward()
        found = {"loss": loss, **gradients(ours, "classifier"), **gradients(ours.model)}
        runs = []
        for model in (stock, copy.deepcopy(stock).double()):
            theirs = model(ids_of(seed), attention_mask=MASK.long(), labels=labels).loss
            theirs.backward()
            grads = {n: p.grad for n, p in model.named_parameters()}
            runs.append({"loss": theirs, **{n.removeprefix("bert."): g for n, g in grads.items()}})
        assert found.keys() == runs[0].keys()
        compared = [
            compare_tensors(n, found[n], runs[0][n], runs[1][n])
            for n in found
            if not n.endswith("key.bias")
        ]
        own = {one.name: str(one.fault) for one in compared if not one.passed}
        faults = {n: own[n] for n in (own if faults is None else faults) if n in own}
    assert not faults, faults


def gradients(model: Any, only: str = "") -> dict[str, Tensor]:
    """Of parameters, by Hugging Face's names where the model has them."""
    grads = {n: p.grad for n, p in model.named_parameters() if n.startswith(only)}
    layout = getattr(model, "to_huggingface_layout", dict)
    return {n: g for n, g in layout(grads).items() if g is not None}


@pytest.mark.parametrize("keep", [MASK, LEFT], ids=["right", "left"])
def test_gpt_pools_its_last_token(keep: Tensor) -> None:
    model = perturbed(GPTDecoderModel(GPT).eval())
    with backend("torch"), torch.no_grad():
        hidden = model(ids_of(1), keep)
        last = [row.nonzero().max() for row in keep]
        torch.testing.assert_close(model.pooled(ids_of(1), keep), hidden[range(3), last])
        assert SequenceClassifier(model, 5)(ids_of(1), keep).shape == (3, 5)


def test_towers_of_clip_can_be_classified() -> None:
    text = CLIPTextConfig(vocab_size=61, eos_token_id=60, num_hidden_layers=1)
    image = CLIPModel(CLIPConfig(text, TINY_IMAGES, 12)).image
    classifier = SequenceClassifier(image, 5)
    assert not any("embeddings" in name for name in freeze(image, layers=1))
    with backend("torch"):
        classifier.loss(torch.tensor([1, 4]), torch.randn(2, 3, 8, 8)).backward()
    assert image.encoder.layers[0].linear1.weight.grad is None
    assert image.encoder.layers[1].linear1.weight.grad is not None


# Prompts


def extended(stock: Any, prompt: Tensor, ids: Tensor, labels: bool) -> Any:
    """What transformers' GPT-2 makes of prompt and tokens joined as embeddings."""
    embedded = torch.cat([prompt.expand(3, -1, -1), stock.transformer.wte(ids)], 1)
    keep = torch.nn.functional.pad(MASK, (P, 0), value=True)
    targets = torch.nn.functional.pad(ids.masked_fill(~MASK, -100), (P, 0), value=-100)
    return stock(
        inputs_embeds=embedded, attention_mask=keep.long(), labels=targets if labels else None,
        position_ids=(keep.cumsum(1) - 1),
    )  # fmt: skip


@pytest.mark.parametrize("name", BACKENDS)
def test_a_prompt_is_trained_as_if_joined_with_the_tokens(name: Any) -> None:
    stock = stock_gpt()
    ours = GPTDecoderModel.from_huggingface(stock.state_dict(), stock.config.to_dict())
    prompt = prompt_tuning(ours, P)
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == ["prompt.weight"]
    with torch.no_grad():
        prompt.weight.mul_(30)  # as far from 0 as tokens are
    runs = []
    for model in (stock, copy.deepcopy(stock).double()):
        weight = prompt.weight.detach().to(model.dtype).requires_grad_()
        loss = extended(model, weight, ids_of(1), True).loss
        loss.backward()
        runs.append((loss, weight.grad))
    with backend(name):
        loss = ours.loss(ids_of(1), attention_mask=MASK)
        loss.backward()
        assert prompt.weight.grad is not None
        hidden = ours.logits(ours(ids_of(1), MASK))
    judge_pairs((loss, prompt.weight.grad), *runs)
    wanted = extended(stock, prompt.weight, ids_of(1), False).logits[:, P:]
    torch.testing.assert_close(hidden[MASK], wanted[MASK], rtol=1e-4, atol=1e-5)


def judge_pairs(found: Any, stock: Any, truth: Any) -> None:
    compared = [compare_tensors("", *three) for three in zip(found, stock, truth, strict=True)]
    assert [one.fault for one in compared if not one.passed] == []


def test_a_prompt_moves_tokens_and_rows_of_bert() -> None:
    stock = stock_bert().bert
    ours = BertEncoderModel.from_huggingface(stock.state_dict(), BERT, heads=["pooler"])
    prompt = prompt_tuning(ours, P, start_ids=torch.tensor([5, 6, 7]))
    assert torch.equal(prompt.weight, ours.embeddings.word.weight[5:8])
    types = torch.ones_like(ids_of(1))
    # Started from tokens, a prompt is these tokens.
    joined = torch.cat([torch.tensor([5, 6, 7]).expand(3, -1), ids_of(1)], 1)
    keep = torch.nn.functional.pad(MASK, (P, 0), value=True)
    with backend("torch"), torch.no_grad():
        given = dict(attention_mask=MASK, token_type_ids=types)
        hidden = ours(ids_of(1), **given)
        padded_types = torch.nn.functional.pad(types, (P, 0))
        wanted = stock(joined, keep.long(), padded_types).last_hidden_state[:, P:]
        torch.testing.assert_close(hidden[MASK], wanted[MASK])
        positions = torch.arange(7)
        torch.testing.assert_close(ours(ids_of(1), **given, position_ids=positions), hidden)
        rows = ours(ids_of(1), **given, output_rows=MASK)
        torch.testing.assert_close(rows, hidden[MASK])
        columns = torch.tensor([[6, 0], [0, 0], [3, 1]])
        picked = ours(ids_of(1), **given, output_rows=columns)
        torch.testing.assert_close(picked, hidden.take_along_dim(columns[..., None], 1))
        with pytest.raises(ValueError, match="behind a prompt of 3"):
            ours(torch.zeros(1, 17, dtype=torch.int64))


def test_a_prompt_of_clips_text_tower() -> None:
    """The token that ends a text is found and pooled behind the prompt."""
    config = CLIPTextConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=12, eos_token_id=60,
    )  # fmt: skip
    tower = perturbed(CLIPModel(CLIPConfig(config, TINY_IMAGES, 12)).text.eval(), 0.3)
    ids = ids_of(1).clamp(max=59)
    ids[range(3), [n - 1 for n in LENGTHS]] = 60
    start = torch.tensor([5, 6, 7])
    with backend("torch"), torch.no_grad():
        joined = tower(torch.cat([start.expand(3, -1), ids], 1))
        prompt_tuning(tower, P, start_ids=start)
        torch.testing.assert_close(tower(ids), joined)


# Prefixes


def with_past(stock: Any, prefix: Any, ids: Tensor, labels: Tensor | None) -> Any:
    """What transformers' GPT-2 makes of the prefix as a past of every sequence."""
    from transformers import DynamicCache

    past = DynamicCache()
    for layer, (key, value) in enumerate(zip(*prefix, strict=True)):
        past.update(key.expand(3, -1, -1, -1), value.expand(3, -1, -1, -1), layer)
    keep = torch.nn.functional.pad(MASK, (P, 0), value=True)
    return stock(
        ids, attention_mask=keep.long(), past_key_values=past, labels=labels,
        position_ids=(MASK.cumsum(1) - 1).clamp(min=0),
    )  # fmt: skip


@pytest.mark.parametrize("name", BACKENDS)
def test_a_prefix_is_trained_as_if_it_were_the_past(name: Any) -> None:
    stock = stock_gpt()
    ours = GPTDecoderModel.from_huggingface(stock.state_dict(), stock.config.to_dict())
    prefix = prefix_tuning(ours, P)
    names = [n for n, p in ours.named_parameters() if p.requires_grad]
    assert names == ["prefix.key", "prefix.value"]
    with torch.no_grad():
        for parameter in prefix.parameters():
            parameter.mul_(50)
    labels = ids_of(1).masked_fill(~MASK, -100)
    runs = []
    for model in (stock, copy.deepcopy(stock).double()):
        own = [p.detach().to(model.dtype).requires_grad_() for p in prefix.parameters()]
        loss = with_past(model, own, ids_of(1), labels).loss
        loss.backward()
        runs.append((loss, *(p.grad for p in own)))
    with backend(name):
        loss = ours.loss(ids_of(1), labels, MASK)
        loss.backward()
    judge_pairs((loss, prefix.key.grad, prefix.value.grad), *runs)
    assert all(p.grad is None for n, p in ours.named_parameters() if not n.startswith("prefix"))


def test_kernels_read_the_prefix_where_it_is(device: str) -> None:
    """It is neither joined with a sequence's keys nor copied for each, nor for any layer."""
    from fusedformer_kernels.runtime.launch import recorded_launches

    model = BertEncoderModel(BERT).eval().to(device)
    prefix = prefix_tuning(model, P)
    with backend("triton"), recorded_launches(run=True) as launches:
        model(ids_of(1).to(device), MASK.to(device))
    read = [
        {t.untyped_storage().data_ptr() for t in one.arguments.values() if isinstance(t, Tensor)}
        for one in launches
        if one.name == "_attention_forward"
    ]
    parts = {p.untyped_storage().data_ptr() for p in prefix.parameters()}
    assert [parts & found for found in read] == [set(), parts] * BERT.num_hidden_layers


def test_generation_behind_a_prompt_and_a_prefix() -> None:
    model = perturbed(GPTDecoderModel(GPT).eval(), 0.3)
    prompt, prefix = prompt_tuning(model, P), prefix_tuning(model, 2)
    with torch.no_grad():
        for parameter in (*prompt.parameters(), *prefix.parameters()):
            parameter.mul_(40)
    ids = ids_of(1)
    with backend("torch"), torch.no_grad():
        found = model.generate(ids, LEFT, max_new_tokens=8)
        for row, length in enumerate(LENGTHS):
            own = ids[row : row + 1, -length:]
            for _ in range(8):
                token = model.logits(model(own)[:, -1]).argmax(-1)
                own = torch.cat([own, token[:, None]], 1)
            assert torch.equal(found[row], own[0, length:])
        model.prefix = None
        assert not torch.equal(model.generate(ids, LEFT, max_new_tokens=8), found)
    assert len(found.unique()) > 4
    with pytest.raises(ValueError, match="at most 24 positions"):
        model.generate(ids, LEFT, max_new_tokens=16)


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="a text model"):
        prefix_tuning(torch.nn.Linear(2, 2), 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'length' to be positive"):
        prompt_tuning(GPTDecoderModel(GPT), 0)
    with pytest.raises(ValueError, match="'start_ids' to have shape"):
        prompt_tuning(GPTDecoderModel(GPT), 2, start_ids=torch.zeros(3, dtype=torch.int64))
