"""Language models of transformers once they are fused: as encoders of text, and as writers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from tests.fusion.models import (
    DECODER,
    EXPERTS,
    GPT2,
    LENGTHS,
    MASK,
    inputs_of,
    model_of,
    perturbed,
    run,
)
from tests.fusion.test_families import near, rows_of_products
from tests.fusion.test_huggingface import faults
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers.pytorch_utils import Conv1D

import fusedformer
from fusedformer import backend
from fusedformer.fusion import _attention
from fusedformer.fusion._attention import attention
from fusedformer.fusion._forms import Finder
from fusedformer.fusion._layers import FusedLayer

T: Any = pytest.importorskip("transformers")

LEFT = MASK.flip(1)
WINDOW: dict[str, Any] = dict(sliding_window=8)
BY_TYPE: dict[str, Any] = dict(WINDOW, layer_types=["sliding_attention", "full_attention"])
SCALED: dict[str, Any] = dict(residual_multiplier=0.4, attention_multiplier=0.7)
HALF: dict[str, Any] = dict(partial_rotary_factor=0.5)
GROWING: dict[str, Any] = dict(
    rope_type="yarn", rope_theta=1e4, factor=2.0, original_max_position_embeddings=4,
    llama_4_scaling_beta=0.3, max_position_embeddings=40,
)  # fmt: skip
# Names of classes, and what besides DECODER is in their configurations.
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {}, "Mistral": WINDOW, "Ministral3": dict(WINDOW, rope_parameters=GROWING),
    "Qwen2": dict(BY_TYPE, use_sliding_window=True), "Gemma": dict(head_dim=8),
    "Gemma2": dict(BY_TYPE, head_dim=8, attn_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "Granite": dict(SCALED, embedding_multiplier=2.0), "HyperCLOVAX": dict(SCALED),
    "SmolLM3": dict(BY_TYPE, use_sliding_window=True, no_rope_layers=[0, 1]), "Olmo2": {},
    "Olmo3": BY_TYPE, "Exaone4": BY_TYPE, "Cwm": dict(BY_TYPE, head_dim=8),
    "SeedOss": dict(head_dim=8, attention_out_bias=True), "Arcee": {}, "Apertus": {},
    "Starcoder2": WINDOW, "Phi3": dict(WINDOW, **HALF), "Phi": HALF,
    "StableLm": dict(HALF, use_parallel_residual=True), "Helium": dict(head_dim=8),
    "Ernie4_5": dict(head_dim=8), "Glm": dict(HALF, head_dim=8), "Glm4": dict(HALF, head_dim=8),
    "GPTNeoX": dict(HALF, use_parallel_residual=True), "Jais2": {},
    "VaultGemma": dict(BY_TYPE, head_dim=8, attn_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "Persimmon": dict(HALF, qk_layernorm=True), "BioGpt": {}, "OPT": dict(ffn_dim=48, dropout=0.0),
    "GPTBigCode": dict(n_embd=32, n_head=4, n_layer=2, n_positions=40, multi_query=True),
    "Cohere": {}, "Cohere2": dict(BY_TYPE, head_dim=8), "Mixtral": dict(EXPERTS, **WINDOW),
    "Qwen2Moe": dict(EXPERTS, **BY_TYPE, use_sliding_window=True, mlp_only_layers=[1]),
    "Olmoe": EXPERTS, "GraniteMoe": dict(EXPERTS, **SCALED), "MiniMaxM2": EXPERTS,
    "ExaoneMoe": dict(EXPERTS, **BY_TYPE, head_dim=8, first_k_dense_replace=1, n_group=1),
    "Dots1": dict(EXPERTS, **BY_TYPE, n_routed_experts=4, n_shared_experts=1),
    "Qwen3Moe": dict(EXPERTS, head_dim=8), "FlexOlmo": EXPERTS, "Ernie4_5_Moe": EXPERTS,
    "Glm4Moe": dict(EXPERTS, **HALF, n_routed_experts=4, n_shared_experts=1, use_qk_norm=True),
    "SolarOpen": dict(EXPERTS, head_dim=8, n_routed_experts=4, n_shared_experts=1),
    "GptOss": dict(EXPERTS, **BY_TYPE, head_dim=8),
}  # fmt: skip


def writer(kind: str, **settings: Any) -> Any:
    """A small model with a head that generates, in evaluation mode."""
    if kind == "GPT2":
        config = T.GPT2Config(**{**GPT2, "use_cache": True})
        return perturbed(T.GPT2LMHeadModel(config), 0).eval()
    config = getattr(T, f"{kind}Config")(**{**DECODER, **KINDS[kind], **settings})
    return perturbed(getattr(T, f"{kind}ForCausalLM")(config), 0).eval()


def fused_and_stock(model: Any, **settings: Any) -> tuple[Any, Any]:
    stock = copy.deepcopy(model)
    fusedformer.fuse(model, **settings)
    return model, stock


@pytest.mark.parametrize("kind", [*KINDS, "GPT2"])
def test_it_trains_and_writes_as_stock(kind: str) -> None:
    """Packed, with a loss and all gradients; with a cache, the same tokens, padded left."""
    model, stock = fused_and_stock(writer(kind))
    inputs = inputs_of("llama")
    for one in (model, stock):
        one.config.use_cache = False
    labels = inputs["input_ids"].masked_fill(~MASK, -100)
    assert faults(model, stock, {**inputs, "labels": labels}) == []
    assert max(rows_of_products(model.base_model, inputs)) == MASK.sum()  # experts have fewer
    settings = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=True)
    left = {**inputs, "attention_mask": LEFT.long()}
    wanted = stock.generate(**left, **settings)
    assert torch.equal(model.generate(**left, **settings), wanted)
    with torch.no_grad():
        again, cached = (one(**left, use_cache=True) for one in (model, stock))
        assert torch.allclose(again.logits[LEFT], cached.logits[LEFT], atol=1e-4)
        assert again.past_key_values.get_seq_length() == MASK.shape[1]


@pytest.mark.parametrize("kind", [*KINDS, "GPT2"])
def test_layers_that_are_changed_run_by_themselves(kind: str) -> None:
    """On packed rows, but where a family hands nothing on to its attention."""
    model, stock = fused_and_stock(writer(kind).base_model)
    for one in (model, stock):
        product = next(m for m in one.modules() if isinstance(m, (nn.Linear, Conv1D)))
        product.__class__ = type(
            "Product", (type(product),), {"__module__": "peft.tuners.lora.layer"}
        )
    inputs = inputs_of("llama")
    with torch.no_grad():
        assert near(model(**inputs)[0][MASK], stock(**inputs)[0][MASK])
        if kind == "GPT2":
            return
        packs = max(rows_of_products(model, inputs)) == MASK.sum()
    assert packs == (kind != "StableLm")


FAULTS: dict[str, dict[str, Any]] = {
    "Mistral": {"window": None}, "Gemma2": {"softcap": None}, "Granite": {"scale2": None},
    "HyperCLOVAX": {"block_norm": None}, "Olmo2": {"norm1": "post_attention_layernorm"},
    "SmolLM3": {"turns": None}, "Exaone4": {"turns": None}, "Ministral3": {"query_scale": None},
    "Phi3": {"is_gated": False}, "Phi": {"parallel": False, "norm2": "input_layernorm"},
    "StableLm": {"parallel": False, "norm2": "input_layernorm"}, "Glm": {"interleaved": False},
    "GPTNeoX": {"by_head": False}, "GPT2": {"scaling": "head_dim"}, "Arcee": {"activation": F.gelu},
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_in_the_table_are_seen(kind: str) -> None:
    model, stock = fused_and_stock(writer(kind).base_model)
    cls: Any = next(type(m) for m in model.modules() if isinstance(m, FusedLayer))
    wrong = dataclasses.replace(cls._form, **FAULTS[kind])
    inputs = inputs_of("llama")
    with (
        mock.patch.object(cls, "_form", wrong),
        mock.patch.object(cls, "_finder", Finder(wrong)),
        contextlib.suppress(RuntimeError),  # of shapes that do not fit
        torch.no_grad(),
    ):
        assert not near(model(**inputs)[0][MASK], stock(**inputs)[0][MASK])


ROPES: dict[str, dict[str, Any]] = {
    "llama3": dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0),
    "yarn": dict(factor=4.0), "linear": dict(factor=2.0), "dynamic": dict(factor=2.0),
    "longrope": dict(factor=2.0, short_factor=[1.0, 1.5, 2.0, 3.0],
                     long_factor=[2.0, 3.0, 4.0, 5.0]),
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
def test_scaled_angles_are_those_of_stock(rope: str) -> None:
    """Also where they depend on the longest row of a batch, padding included: then padded."""
    given = dict(rope_type=rope, rope_theta=1e4, **ROPES[rope])
    for limit in (6, 11, 40):
        given["original_max_position_embeddings"] = limit
        settings = {**DECODER, "max_position_embeddings": limit, "rope_parameters": {**given}}
        model, stock = fused_and_stock(perturbed(T.LlamaModel(T.LlamaConfig(**settings)), 0).eval())
        mask = MASK.clone()
        mask[:, 5:] = False  # the last columns are padding
        inputs = {**inputs_of("llama"), "attention_mask": mask.long()}
        with torch.no_grad():
            assert near(model(**inputs)[0][mask], stock(**inputs)[0][mask])
        packs = rope not in ("dynamic", "longrope") or limit == 40
        assert (rows_of_products(model, inputs) == {int(mask.sum())}) == packs


def attend_fully(model: nn.Module) -> None:
    each: Any
    for each in model.modules():
        if hasattr(each, "is_causal"):
            each.is_causal = False


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("where", ["configuration", "call", "attention"])
def test_used_in_both_directions(name: str, where: str) -> None:
    """By a setting, it packs, but for windows; where attention alone says so, as stock does."""
    model, inputs = model_of(name).eval(), inputs_of(name)
    call: dict[str, Any] = {"is_causal": False} if where == "call" else {}
    causal = model(**inputs)[0]
    if where == "configuration":
        model.config.is_causal = False
    if where == "attention":
        attend_fully(model)
    model, stock = fused_and_stock(model)
    assert not torch.allclose(stock(**{**inputs, "attention_mask": None}, **call)[0], causal)
    for mask in (MASK, LEFT, torch.ones_like(MASK)):
        given = {**inputs, "attention_mask": mask.long(), **call}
        with torch.no_grad():
            found, wanted = model(**given)[0], stock(**given)[0]
        assert near(found[mask], wanted[mask])
    packs = rows_of_products(model, {**call, **inputs}) - {MASK.numel()} == {int(MASK.sum())}
    assert packs == (where != "attention" and name != "mistral")


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_masks_of_the_caller(name: str) -> None:
    """Of four dimensions, boolean or added; by blocks they are for flex_attention."""
    model, stock = fused_and_stock(model_of(name).eval())
    ids, length = inputs_of(name)["input_ids"], MASK.shape[1]
    seen = torch.ones(length, length).tril().bool()
    seen[3:, 2] = False
    boolean = seen.expand(3, 1, length, length)
    added = torch.zeros(boolean.shape).masked_fill(~boolean, torch.finfo(torch.float32).min)
    with torch.no_grad():
        wanted = stock(input_ids=ids, attention_mask=boolean)[0]
        for given in (boolean, added):
            assert near(model(input_ids=ids, attention_mask=given)[0], wanted)
        blocks = create_block_mask(
            lambda b, h, q, k: seen[q, k], 3, None, length, length, device="cpu"
        )
        called: list[Any] = []

        def flex(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **others: Any) -> Any:
            called.append((mask, others["scaling"]))
            return attention(module, q, k, v, boolean, **others)

        with mock.patch.object(_attention, "ALL_ATTENTION_FUNCTIONS", {"flex_attention": flex}):
            assert near(model(input_ids=ids, attention_mask=blocks)[0], wanted)
        assert called == [(blocks, model.layers[0].self_attn.scaling)] * 2


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_what_it_goes_on_doing(name: str) -> None:
    """States and weights, checkpoints, compiled, embedded, positions, a cache that goes on."""
    model, inputs = model_of(name).eval(), inputs_of(name)
    model.set_attn_implementation("eager")
    model, stock = fused_and_stock(model)
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        found, wanted = model(**inputs, **asked), stock(**inputs, **asked)
        for ours, theirs in zip(found.hidden_states, wanted.hidden_states, strict=True):
            assert near(ours[MASK], theirs[MASK])
        for ours, theirs in zip(found.attentions, wanted.attentions, strict=True):
            assert near(ours.transpose(1, 2)[MASK], theirs.transpose(1, 2)[MASK])
        if name == "gpt2":  # whose weights are transposed
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            assert near(compiled(**inputs)[0][MASK], wanted[0][MASK])
        whole = inputs["input_ids"][:, :8]
        first = {"input_ids": whole[:, :5], "use_cache": True}
        caches = [one(**first).past_key_values for one in (model, stock)]
        rest = [
            one(input_ids=whole[:, 5:], past_key_values=cache, use_cache=True)[0]
            for one, cache in zip((model, stock), caches, strict=True)
        ]
        assert near(*rest) and near(rest[0], stock(input_ids=whole)[0][:, 5:])
    plain = run(model.train(), inputs)
    model.gradient_checkpointing_enable()
    again = run(model, inputs)
    assert plain.keys() == again.keys()
    assert all(torch.allclose(plain[n], again[n], atol=1e-4, rtol=1e-4) for n in plain)


# Settings of configurations that are probabilities, by kind.
DROPOUTS = {
    "Phi3": ["resid_pdrop"], "Phi": ["resid_pdrop"], "GPTNeoX": ["hidden_dropout"],
    "StableLm": ["hidden_dropout"], "Starcoder2": ["residual_dropout"],
    "SeedOss": ["residual_dropout"], "Llama": ["attention_dropout"],
}  # fmt: skip


@pytest.mark.parametrize("kind", DROPOUTS)
def test_dropouts_are_where_stock_has_them(kind: str) -> None:
    """With a probability of 1 they leave nothing to chance; half of it does something else."""
    found: list[Tensor] = []
    for p in (0.0, 0.5, 1.0):
        settings = {"attention_dropout": 0.0, **dict.fromkeys(DROPOUTS[kind], p)}
        model, stock = fused_and_stock(writer(kind, use_cache=False, **settings).train())
        found.append(model(**inputs_of("llama")).logits[MASK])
        if p != 0.5:
            assert near(found[-1], stock(**inputs_of("llama")).logits[MASK])
    assert not any(torch.allclose(found[i], found[i - 1], atol=1e-3) for i in range(3))


OTHERWISE: dict[str, dict[str, Any]] = {
    "Phi": dict(qk_layernorm=True), "StableLm": dict(use_parallel_residual=False),
    "GPTNeoX": dict(use_parallel_residual=False), "GPTBigCode": dict(multi_query=False),
    "OPT": dict(do_layer_norm_before=False), "Phi3": dict(HALF),
    "Persimmon": dict(qk_layernorm=False),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERWISE)
def test_settings_that_change_a_layer(kind: str) -> None:
    model, stock = fused_and_stock(writer(kind, **OTHERWISE[kind]).base_model, strict=True)
    assert faults(model, stock, inputs_of("llama")) == []


def test_stablelm_with_norms_of_heads_is_left_to_itself() -> None:
    """Each head has a norm of its own, which is no part of a form."""
    model = writer("StableLm", qk_layernorm=True).base_model
    stock = copy.deepcopy(model)
    left = fusedformer.fuse(model).left
    assert sum("qk_layernorm is set" in one.reason for one in left) == 2
    with torch.no_grad():
        found, wanted = model(**inputs_of("llama"))[0], stock(**inputs_of("llama"))[0]
    assert near(found[MASK], wanted[MASK])


def test_positions_of_images_in_a_text_are_packed() -> None:
    """Qwen2.5-VL's, of time, rows and columns."""
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
    config = T.Qwen2_5_VLTextConfig(**{**DECODER, "rope_parameters": rope, "use_cache": False})
    module = T.models.qwen2_5_vl.modeling_qwen2_5_vl
    model = perturbed(module.Qwen2_5_VLTextModel(config), 0).eval()
    model, stock = fused_and_stock(model, strict=True)
    positions = torch.randint(0, 9, (3, *MASK.shape))
    inputs = {**inputs_of("llama"), "position_ids": positions}
    with torch.no_grad():
        found, wanted = model(**inputs)[0], stock(**inputs)[0]
        assert near(found[MASK], wanted[MASK])
        assert not near(found[MASK], stock(**inputs_of("llama"))[0][MASK])
    assert rows_of_products(model, inputs) == {int(MASK.sum())}
    begin_anew = torch.cat([torch.arange(n) for n in LENGTHS])[None]  # of one kind: no sequences
    alone = {"input_ids": torch.randint(3, 97, begin_anew.shape), "position_ids": begin_anew}
    with torch.no_grad():
        assert near(model(**alone)[0], stock(**alone)[0])


@pytest.mark.parametrize("where", ["call", "config"])
def test_what_routers_say_is_of_the_batch(where: str) -> None:
    """A loss that balances experts reads it with the mask; and a router may want noise."""
    asked: dict[str, Any] = dict(output_router_logits=True)
    model, stock = fused_and_stock(writer("Mixtral", **(asked if where == "config" else {})))
    inputs = {
        **inputs_of("llama"),
        "labels": inputs_of("llama")["input_ids"].masked_fill(~MASK, -100),
    }
    call = {**inputs, **(asked if where == "call" else {}), "use_cache": False}
    found, wanted = model(**call), stock(**call)
    assert len(found.router_logits) == 2 and found.router_logits[0].shape == (MASK.numel(), 4)
    assert torch.allclose(found.loss, wanted.loss, atol=1e-5)
    assert torch.allclose(found.aux_loss, wanted.aux_loss, atol=1e-6)
    noisy = writer("Mixtral", router_jitter_noise=0.1)
    assert "its jitter_noise is set" in {one.reason for one in fusedformer.fuse(noisy).left}


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Mistral"])
def test_a_text_is_classified_by_a_position_that_may_be_padding(kind: str) -> None:
    """Which without ids is the last; then the batch is computed padded, and else packed."""
    settings = GPT2 if kind == "GPT2" else {**DECODER, **KINDS[kind]}
    config = getattr(T, f"{kind}Config")(**{**settings, "pad_token_id": 1, "num_labels": 3})
    model = perturbed(getattr(T, f"{kind}ForSequenceClassification")(config), 0).eval()
    model, stock = fused_and_stock(model, strict=True)
    ids, total = inputs_of("llama")["input_ids"].masked_fill(~MASK, 1), int(MASK.sum())
    embedded = torch.randn(*MASK.shape, 32)
    calls: list[tuple[Tensor, dict[str, Tensor], bool]] = [
        (MASK, {"inputs_embeds": embedded}, False),
        (LEFT, {"inputs_embeds": embedded}, True),
        (MASK, {"input_ids": ids}, True),
        (MASK, {"input_ids": ids.masked_fill(~MASK, 5)}, False),  # not the id of padding
        (LEFT, {"input_ids": ids.flip(1)}, True),
    ]
    for mask, given, packs in calls:
        call = {**given, "attention_mask": mask.long()}
        assert near(model(**call).logits, stock(**call).logits)
        assert (total in rows_of_products(model, call)) == packs
    labels = torch.tensor([0, 2, 1])
    given = {"inputs_embeds": embedded, "attention_mask": MASK.long(), "labels": labels}
    found, wanted = run(model, given), run(stock, given)
    for key, value in wanted.items():
        assert torch.allclose(found[key], value, atol=2e-5 * value.abs().max().item() + 1e-5), key


@pytest.mark.parametrize("kind", [*KINDS, "GPT2"])
def test_rows_that_the_caller_packed(kind: str) -> None:
    """By positions that begin anew, as TRL's; by the arguments of flash attention too."""
    settings = {} if kind == "GPTBigCode" else {"max_position_embeddings": 40}
    model, stock = fused_and_stock(writer(kind, **settings).base_model)
    for one in (model, stock):
        one.config.use_cache = False
    starts = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int()
    most = max(LENGTHS)
    given: dict[str, Any] = {
        "input_ids": torch.randint(3, 97, (1, sum(LENGTHS))),
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
    }
    told = dict(cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=most, max_length_k=most)
    splits = kind not in ("OPT", "BioGpt", "GptOss")  # whose masks do not look at positions
    wanted = run(stock, given)
    for call in (given, {**given, **told}) if splits else (given,):
        own: Any = vars(_attention)["sdpa_mask"]
        with mock.patch.object(_attention, "sdpa_mask", side_effect=own) as masks:
            found = run(model, call)
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert torch.allclose(found[key], value, atol=2e-5 * value.abs().max().item() + 1e-5)
        if call is given and kind != "GptOss":  # which windows the row
            assert not masks.called, "a mask of all pairs was made"
    with torch.no_grad():
        first = stock(**{n: x[:, : LENGTHS[0]] for n, x in given.items()})[0]
        last = stock(**{n: x[:, -LENGTHS[-1] :] for n, x in given.items()})[0]
        assert near(wanted["last_hidden_state"][:, : LENGTHS[0]], first)
        assert near(wanted["last_hidden_state"][:, -LENGTHS[-1] :], last) == splits
        cached = [one(**given, use_cache=True)[0] for one in (model, stock)]
        assert near(*cached)  # with a cache, stock takes them for one sequence
        wrong = {**given, "position_ids": given["position_ids"] * 0 + 3}
        assert near(*[one(**wrong)[0] for one in (model, stock)])


def test_all_language_models_of_the_table_are_tried() -> None:
    from fusedformer.fusion import _families

    named = {name for _, name, *_ in _families._CAUSAL}
    of_images = {name for name in named if name.endswith("Text")}
    more = {"Qwen3", *of_images}, {"GPTNeoX", "OPT", "GPTBigCode"}
    assert named - more[0] == KINDS.keys() - more[1]


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_labels_behind_padding(kind: str) -> None:
    """Padding tells the first token of a row behind it, and the tokens of padding."""
    model = writer(kind)
    stock = copy.deepcopy(model)
    fusedformer.fuse(model.base_model)  # first a part of it
    fusedformer.fuse(model)
    model.config.use_cache = stock.config.use_cache = False
    ids = inputs_of("llama")["input_ids"]
    for mask, labels, packs in (
        (LEFT, ids.masked_fill(~LEFT, -100), False),
        (MASK, ids, False),
        (MASK, ids.masked_fill(~MASK, -100), True),
    ):
        given = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
        with backend("torch"):
            found, wanted = model(**given), stock(**given)
        assert near(found.loss, wanted.loss)
        assert bool(found.logits[~mask].any()) != packs
        ours, theirs = (
            torch.autograd.grad(output.loss, list(one.parameters()))
            for output, one in ((found, model), (wanted, stock))
        )
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, atol=1e-5, rtol=1e-3)
