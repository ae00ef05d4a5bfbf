"""What each family of encoders does once it is fused, beside its outputs and gradients."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from typing import Any
from unittest import mock

import pytest
import torch
from tests.fusion.models import (
    MASK,
    PACKED,
    QWEN3,
    TEXT,
    TOKENS,
    inputs_of,
    model_of,
    perturbed,
    run,
)
from tests.fusion.test_huggingface import faults
from torch import Tensor, nn

import fusedformer
from fusedformer.fusion import _families, _forms, _layers, _norms, _tower_families
from fusedformer.fusion._seen import SEEN

T: Any = pytest.importorskip("transformers")

# LayoutLMv3 takes no embedded texts; test_layoutlmv3.py has its forms of input.
FAMILIES = sorted(PACKED - {"bert, pre-training", "layoutlmv3"})
HOLE = MASK.clone()
HOLE[0, 3:6] = HOLE[2, 2] = False


def close(found: Any, wanted: Any, mask: Tensor) -> bool:
    """Whether results are of one kind, and equal where tokens are real but for rounding."""
    assert type(found) is type(wanted)
    assert len(found) == len(wanted)
    if not torch.allclose(found[0][mask], wanted[0][mask], atol=3e-5, rtol=1e-4):
        return False
    pooled = [i for i in range(1, len(wanted)) if isinstance(wanted[i], Tensor)]
    return all(torch.allclose(found[i], wanted[i], atol=3e-5, rtol=1e-4) for i in pooled)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_form_of_input(name: str) -> None:
    """Embedded, with positions and kinds of tokens, as a tuple, with a hole, without a mask."""
    model, inputs = model_of(name).eval(), inputs_of(name)
    ids = inputs["input_ids"]
    embedded = torch.randn(*MASK.shape, model.get_input_embeddings().embedding_dim)
    others = {n: x for n, x in inputs.items() if n == "attention_mask" or name != "roc-bert"}
    others.pop("input_ids", None)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    calls: list[tuple[Tensor, dict[str, Any]]] = [
        (MASK, {**others, "inputs_embeds": embedded}),
        (MASK, {**inputs, "position_ids": torch.arange(2, 13).flip(0)[None]}),
        (MASK, {**inputs, "return_dict": False}),
        (HOLE, {**inputs, "attention_mask": HOLE.long()}),
        (torch.ones_like(MASK), {n: x for n, x in inputs.items() if n != "attention_mask"}),
    ]
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:  # ESM-C's
        calls = calls[1:]
    if getattr(model.config, "type_vocab_size", 0) > 1:
        calls.append((MASK, {**inputs, "token_type_ids": ids % 2}))
    fused = copy.deepcopy(model)
    fusedformer.fuse(fused, strict=True)
    with torch.no_grad():
        for mask, call in calls:
            found = fused(**call)
            assert close(found, model(**call), mask)
            assert not found[0][~mask].any()
            assert found[0][mask].any()


class Adapted(nn.Module):
    """A product with an adapter beside it, as peft makes them."""

    __module__ = "peft.tuners.lora.layer"

    def __init__(self, product: nn.Linear) -> None:
        super().__init__()
        self.product = product
        self.down = nn.Linear(product.in_features, 2, bias=False)
        self.up = nn.Linear(2, product.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.product.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x) + self.up(self.down(x))


def adapt(model: nn.Module) -> None:
    torch.manual_seed(5)
    for path, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and "pooler" not in path:
                setattr(module, name, Adapted(child))


def rows_of_products(model: Any, inputs: dict[str, Tensor]) -> set[int]:
    """How many rows the products of a call have, but for those of a pooler."""
    rows, linear = set(), nn.functional.linear

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows.add(x.shape[:-1].numel())
        return linear(x, weight, bias)

    with torch.no_grad(), mock.patch.object(nn.functional, "linear", spy):
        model(**inputs)
    return rows - {1, len(MASK)}


@pytest.mark.parametrize("name", ["mpnet", "t5", "layoutlm", "gte", "qwen3"])
def test_adapters_on_all_products_keep_packing(name: str) -> None:
    """Put on afterwards; and the report tells of those that were there before."""
    model, inputs = model_of(name).train(), inputs_of(name)
    stock = copy.deepcopy(model)
    fusedformer.fuse(model)
    for one in (model, stock):
        adapt(one)
    wanted, found = run(stock, inputs), run(model, inputs)
    for key, value in wanted.items():
        scale = value.abs().max().item()
        assert torch.allclose(found[key], value, atol=2e-5 * scale + 1e-5), key
    assert rows_of_products(model, inputs) == {int(MASK.sum())}
    left = fusedformer.fuse(stock).left
    assert len(left) == 2 and all("replaced or hooked" in one.reason for one in left)


T5_FIRST = "encoder.block.0.layer.0"
MORE_THAN_CALLS = {
    "mpnet": ["layer.0.attention.attn.dropout", "layer.1.attention.dropout",
              "relative_attention_bias"],
    "rembert": ["layer.1.attention.self.dropout", "layer.0.output.dropout"],
    "megatron-bert": ["layer.0.attention.self.dropout"],
    "roformer": ["layer.1.attention.self.dropout"],
    "umt5": [f"{T5_FIRST}.SelfAttention.relative_attention_bias", f"{T5_FIRST}.dropout",
             "encoder.block.1.layer.1.DenseReluDense.dropout"],
}  # fmt: skip


class Scaled(nn.Module):
    """A module of one's own in place of another."""

    def __init__(self, before: nn.Module) -> None:
        super().__init__()
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        return 1.2 * self.before(x)


@pytest.mark.parametrize("is_hook", [True, False], ids=["hooked", "replaced"])
@pytest.mark.parametrize(
    ("name", "path"), [(name, path) for name, paths in MORE_THAN_CALLS.items() for path in paths]
)
def test_dropouts_and_biases_that_do_more_are_called(name: str, path: str, is_hook: bool) -> None:
    """Where layers attend by themselves, or have biases by distance; maps of attention, say."""
    model, inputs = model_of(name).eval(), inputs_of(name)
    fused = copy.deepcopy(model)
    fusedformer.fuse(fused)
    whole = next(one for one, _ in model.named_modules() if one.endswith(path))
    for one in (model, fused):
        child = one.get_submodule(whole)
        if is_hook:
            child.register_forward_hook(lambda module, args, output: 1.2 * output)
        else:
            one.set_submodule(whole, Scaled(child))
    with torch.no_grad():
        found, wanted = fused(**inputs), model(**inputs)
        assert close(found, wanted, MASK)
        assert not close(found, model_of(name).eval()(**inputs), MASK)


FAULTS: dict[str, dict[str, Any]] = {
    "deberta": {"by_head": False},
    "gte": {"gate": "mlp.up_proj", "linear1": "mlp.gate_proj"},
    "esm": {"scaling": "scaling"},
    "esmc": {"divisor": None},
    "embedding-gemma2": {"value_norm": None},
    "align text": {"is_causal": None},
    "markuplm": {"norm1": "output.LayerNorm"},
    "xmod": {"adapter": None},
    "xmod, norms first": {"norms_first": False},
    "megatron-bert": {"norms_first": False},
    "nomic-bert": {"norm1": "post_mlp_layernorm", "norm2": "post_attention_layernorm"},
    "gemma3": {"out_norm": None},
    "qwen3": {"query_norm": None, "key_norm": None},
    "cohere": {"angles": "twice"},
    "gpt-oss": {"sinks": None},
    "t5": {"buckets": None},
    "t5gemma": {"window": "sliding_window"},
    "t5gemma2": {"window": "sliding_window"},
    "vit": {"norm1": "layernorm_after", "norm2": "layernorm_before"},
    "clip": {"scaling": "head_dim"},
    "dinov2": {"scale1": "layer_scale2.lambda1"},
    "dinov2-registers": {"scale2": None},
    "dinov3": {"rotary": None},
    "beit": {"position_bias": None},
    "videomae": {"norms_first": False},
    "yolos": {"norms_first": False},
    "timesformer": {"norm1": "temporal_layernorm"},
    "timesformer, joint": {"norms_first": False},
    "blip vision": {"scaling": "head_dim"},
    "blip-2 vision": {"by_head": True},
    "janus vision": {"norm1": "layer_norm2", "norm2": "layer_norm1"},
    "internvl vision": {"query_norm": None, "key_norm": None},
    "mlcd": {"rotary": None},
    "aimv2 vision": {"gate": "ffn.up_proj", "linear1": "ffn.gate_proj"},
    "data2vec-vision": {"scale1": "lambda_2"},
    "swin": {"norm1": "layernorm_after", "norm2": "layernorm_before"},
    "swinv2": {"logit_scale": None},
    "wavlm": {"max_distance": "num_buckets"},
    "layoutlmv3": {"position_bias": None},
    "donut-swin": {"scaling": "attention_head_size"},
    "whisper": {"scaling": "head_dim"},
    "wav2vec2": {"norm1": "final_layer_norm", "norm2": "layer_norm"},
}


def are_seen(fused: Any, stock: Any, inputs: dict[str, Tensor]) -> bool:
    """Whether the criterion fails, or parameters have no gradient that should have one."""
    try:
        return faults(fused, stock, inputs) != []
    except AssertionError:
        return True


@pytest.mark.parametrize("name", FAULTS)
def test_faults_in_a_table_are_seen(name: str) -> None:
    model, inputs = model_of(name), inputs_of(name)
    twin = copy.deepcopy(model)
    fusedformer.fuse(model)
    cls: Any = next(type(m) for m in model.modules() if isinstance(m, _layers.FusedLayer))
    wrong = dataclasses.replace(cls._form, **FAULTS[name])
    assert not are_seen(model, twin, inputs)
    with (
        mock.patch.object(cls, "_form", wrong),
        mock.patch.object(cls, "_finder", _forms.Finder(wrong)),
    ):
        for module in model.modules():  # what was found by the right table
            module.__dict__.pop(SEEN, None)
        assert are_seen(model, twin, inputs)


def near(found: Any, wanted: Any) -> bool:
    return found.shape == wanted.shape and torch.allclose(found, wanted, atol=3e-5, rtol=1e-4)


def same_when_asked(model: Any, twin: Any, inputs: dict[str, Tensor]) -> Any:
    """States and weights of attention are those of ``twin``, whose outputs are returned."""
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        wanted, found = twin(**inputs, **asked), model(**inputs, **asked)
        for kind in ("hidden_states", "attentions"):
            assert len(found[kind]) == len(wanted[kind]) > 1
            assert all(map(near, found[kind], wanted[kind]))
    return wanted


@pytest.mark.parametrize("name", ["dinov2", "beit", "swin"])
def test_what_a_tower_goes_on_doing(name: str) -> None:
    """Compiled, checkpointed, asked for states and weights, with a hook, with adapters."""
    model, inputs = model_of(name).eval(), inputs_of(name)
    model.set_attn_implementation("eager")
    twin = copy.deepcopy(model)
    fusedformer.fuse(model, strict=True)
    wanted = same_when_asked(model, twin, inputs)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert near(compiled(**inputs)[0], wanted[0])
    plain = run(model.train(), inputs)
    model.gradient_checkpointing_enable()
    again = run(model, inputs)
    assert plain.keys() == again.keys()
    assert all(torch.allclose(plain[n], again[n], atol=1e-5) for n in plain)
    for one in (model, twin):
        product = next(m for n, m in one.named_modules() if n.endswith("mlp.fc2"))
        product.register_forward_hook(lambda *a: a[2] * 2)
    hooked = twin.train()(**inputs)[0]
    assert near(model(**inputs)[0], hooked) and not near(hooked, wanted[0])
    for one in (model, twin):
        adapt(one)
    ours, theirs = run(model, inputs), run(twin, inputs)
    assert ours.keys() == theirs.keys() and any("grad of" in n and "up.weight" in n for n in ours)
    for key, value in theirs.items():
        assert torch.allclose(ours[key], value, atol=2e-5 * value.abs().max().item() + 2e-5), key
    layers = sum(isinstance(module, _layers.FusedLayer) for module in model.modules())
    left = fusedformer.fuse(twin).left
    assert len(left) == layers and all("its own forward runs" in one.reason for one in left)


@pytest.mark.parametrize("name", ["mpnet", "gemma3", "roberta"])
def test_faults_in_the_table_of_models_are_seen(name: str) -> None:
    model, inputs = model_of(name), inputs_of(name)
    twin = copy.deepcopy(model)
    fusedformer.fuse(model)
    own = type(model)._model
    changes: dict[str, Any] = {"behind_padding": False, "caches": False}
    if name == "mpnet":
        changes["composed"] = dataclasses.replace(own.composed, buckets=None)
    elif name == "gemma3":  # whose windows would see no key
        changes["is_causal"] = True
    with mock.patch.object(type(model), "_model", dataclasses.replace(own, **changes)):
        assert are_seen(model, twin, inputs)


def test_no_bias_of_all_pairs_is_made() -> None:
    """Neither MPNet nor T5 makes one; a table by distance reaches attention instead."""
    for name in ("mpnet", "t5"):
        model = model_of(name).eval()
        fusedformer.fuse(model)
        seen: list[Any] = []
        own = fusedformer.functional.varlen_attention

        def spy(*args: Any, own: Any = own, seen: list[Any] = seen, **settings: Any) -> Any:
            seen.append(settings)
            return own(*args, **settings)

        with torch.no_grad(), mock.patch.object(fusedformer.functional, "varlen_attention", spy):
            model(**inputs_of(name))
        assert len(seen) == 2
        for settings in seen:
            assert settings["relative_bias"].shape == (4, 257)
            assert settings["attn_mask"] is None


def test_a_model_that_generates_keeps_its_cache() -> None:
    """And is computed padded, as the report says; a bare one packs unless a cache is asked for."""
    inputs = inputs_of("qwen3")
    model = perturbed(T.Qwen3ForCausalLM(T.Qwen3Config(**TEXT, **QWEN3)), 0).eval()
    stock = copy.deepcopy(model)
    report = fusedformer.fuse(model)
    assert [one.path for one in report.left] == ["model"]
    assert "use_cache" in report.left[0].reason
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    left = {**inputs, "attention_mask": MASK.flip(1).long()}
    assert torch.equal(model.generate(**left, **settings), stock.generate(**left, **settings))
    with torch.no_grad():
        assert model(**inputs).past_key_values is not None
        assert model.model.config is model.config
        model.config.use_cache = False
        assert rows_of_products(model.model, inputs) == {int(MASK.sum())}
        bare = model_of("qwen3").eval()
        fusedformer.fuse(bare, strict=True)
        assert bare(**inputs).past_key_values is None
        assert bare(**inputs, use_cache=True).past_key_values is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["t5", "qwen3", "gemma3", "deberta"])
def test_norms_of_other_makers(name: str, dtype: torch.dtype) -> None:
    """Four formulas; the library's is as near to the truth as theirs, or nearer."""
    model = model_of(name)
    norms = [m for m in model.modules() if _norms.norm_of(type(m)) is not None]
    norms = [m for m in norms if m.weight.shape == (32,)]
    assert len(norms) >= 5
    norm, x = norms[0].to(dtype), torch.randn(7, 32).to(dtype)
    wanted = norm(x)
    with torch.no_grad():
        weight = norm.weight.double() + (1 if name == "gemma3" else 0)
        own = x.double(), (32,), weight
        truth = (
            nn.functional.layer_norm(*own, norm.bias.double(), _norms.epsilon(norm))
            if name == "deberta"
            else nn.functional.rms_norm(*own, _norms.epsilon(norm))
        )
    fusedformer.fuse(model)
    found = norm(x)
    kinds = _norms.RMSNorm, _norms.CenteredRMSNorm, _norms.PlainLayerNorm
    assert type(norm)._made_of[0] in kinds
    assert found.dtype == wanted.dtype == dtype
    errors = [(one.double() - truth).abs().max() for one in (found, wanted)]
    assert errors[0] <= 1.01 * errors[1] + 1e-6
    norm.weight.data = norm.weight.data.double()
    assert norm(x).dtype in (torch.float64, dtype)  # by its own forward


def test_a_norm_of_another_formula_is_left_alone() -> None:
    """OLMo's has no weight; and Cohere's of heads is computed by its own forward."""
    report = fusedformer.fuse(T.OlmoModel(T.OlmoConfig(**TEXT, pad_token_id=0)))
    assert sum("a norm that is not torch.nn's" in one.reason for one in report.left) == 5
    model = perturbed(T.CohereModel(T.CohereConfig(**TEXT, **TOKENS, use_qk_norm=True)), 0)
    stock = copy.deepcopy(model)
    left = fusedformer.fuse(model).left
    assert [one.reason for one in left] == ["its use_qk_norm is set"] * 2
    assert near(model(**inputs_of("bert"))[0][MASK], stock(**inputs_of("bert"))[0][MASK])


def test_tables_name_classes_that_there_are() -> None:
    """Of the transformers that is installed; and every model's layers have a form."""
    for name in (
        *_families.LAYERS,
        *_families.ENCODERS,
        *_families.STACKS,
        *_families.MIXED,
        *_families.POOLED_SOUND,
        *_families.SOUND,
        *_families.GATED_SOUND,
        *_families.MODELS,
    ):
        module, _, cls = name.rpartition(".")
        found = getattr(__import__(f"transformers.models.{module}", fromlist=[cls]), cls)
        assert issubclass(found, nn.Module)
    packed = _families.LAYERS.keys() - _tower_families.TOWERS.keys()
    made = {name.partition(".")[0] for name in packed}
    models = {name for name, model in _families.MODELS.items() if model.tower is None}
    models -= {"flava.modeling_flava.FlavaTextModel"}  # its layers are those of its tower
    assert made == {name.partition(".")[0] for name in models} | {"layoutlmv3"}
