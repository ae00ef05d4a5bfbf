"""fuse() on models of transformers with attention sinks, beside their own "eager" attention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedformer
from fusedformer import backend

transformers = pytest.importorskip("transformers")
T: Any = transformers

TEXT = dict(
    vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
EXPERTS = dict(num_experts_per_tok=2)
LAYERS = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"])
DEEPSEEK = dict(
    q_lora_rank=16, o_lora_rank=8, o_groups=2, moe_intermediate_size=16, n_routed_experts=4,
    num_local_experts=4, sliding_window=4, index_topk=2, index_n_heads=2, index_head_dim=8,
    head_dim=8, layer_types=["compressed_sparse_attention", "heavily_compressed_attention"],
    compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
)  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "gpt_oss": lambda: T.GptOssForCausalLM(
        T.GptOssConfig(**TEXT, **LAYERS, **EXPERTS, head_dim=8, num_local_experts=4)
    ),
    "granite_swa": lambda: T.GraniteSWAForCausalLM(T.GraniteSWAConfig(**TEXT, **LAYERS)),
    "granitemoe_swa": lambda: T.GraniteMoeSWAForCausalLM(
        T.GraniteMoeSWAConfig(**TEXT, **LAYERS, **EXPERTS, num_local_experts=4)
    ),
    "flint": lambda: T.FlintForCausalLM(
        T.FlintConfig(
            **TEXT, **LAYERS, **EXPERTS, head_dim=8, num_experts=4, moe_intermediate_size=16
        )
    ),
    "openai_privacy_filter": lambda: T.OpenAIPrivacyFilterForTokenClassification(
        T.OpenAIPrivacyFilterConfig(
            **TEXT, **EXPERTS, head_dim=8, sliding_window=2, num_local_experts=4
        )
    ),
    "mimo_v2_flash": lambda: T.MiMoV2FlashForCausalLM(
        T.MiMoV2FlashConfig(**TEXT, **LAYERS, head_dim=8)
    ),
    # Its layers put what they have compressed behind the keys, and its mask behind the mask.
    "deepseek_v4": lambda: T.DeepseekV4ForCausalLM(
        T.DeepseekV4Config(**{**TEXT, **EXPERTS, **DEEPSEEK, "num_key_value_heads": 1})
    ),
}
LENGTHS = (11, 4, 7)
REAL = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
PADDING = {"none": None, "right": REAL, "left": REAL.flip(1)}


def stock_and_fused(name: str) -> tuple[Any, Any]:
    """With weights of a size at which attention is not uniform, and sinks take their part."""
    torch.manual_seed(0)
    try:
        stock = MODELS[name]().eval()
    except AttributeError:
        pytest.skip("not in this transformers")
    stock.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for path, parameter in stock.named_parameters():
            if path.endswith("sinks"):
                parameter.copy_(torch.randn_like(parameter))
    fused = copy.deepcopy(stock)
    fusedformer.fuse(fused)
    return stock, fused


def run(model: Any, padding: Tensor | None, **options: Any) -> tuple[dict[str, Tensor], Any]:
    """Logits of real tokens and the gradients of all parameters; and all outputs."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 99, REAL.shape, generator=generator).to(model.device)
    mask = {} if padding is None else {"attention_mask": padding.long().to(model.device)}
    outputs = model(input_ids=ids, **mask, **options)
    logits = outputs.logits if padding is None else outputs.logits[padding.to(model.device)]
    parameters = dict(model.named_parameters())
    dy = torch.randn(logits.shape, generator=generator).to(logits)
    grads = torch.autograd.grad(logits, list(parameters.values()), dy, allow_unused=True)
    found = {n: g for n, g in zip(parameters, grads, strict=True) if g is not None}
    return {"logits": logits, **found}, outputs


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert any(name.endswith("sinks") for name in ours)
    for name, want in theirs.items():
        # Gradients that cancel, of routers that are sure, are rounding.
        largest = max(want.abs().max().item(), 0.1)
        apart = (ours[name] - want).abs().max().item()
        assert apart <= 1e-4 * largest, (name, apart, largest)
        assert not name.endswith("sinks") or want.abs().max() > 0.1


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name: str, padding: str) -> None:
    stock, fused = stock_and_fused(name)
    assert_alike(run(fused, PADDING[padding])[0], run(stock, PADDING[padding])[0])


def test_on_the_kernels(device: str) -> None:
    stock, fused = (model.to(device) for model in stock_and_fused("gpt_oss"))
    with backend("triton"):
        ours, _ = run(fused, REAL)
    assert_alike(ours, run(stock, REAL)[0])


@pytest.mark.parametrize("name", [name for name in MODELS if "filter" not in name])
def test_generation_with_a_cache(name: str) -> None:
    """Beyond the window, of a batch that is padded on the left."""
    stock, fused = stock_and_fused(name)
    ids = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])
    ours, theirs = (
        model.generate(
            ids,
            attention_mask=(ids > 0).long(),
            max_new_tokens=12,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for model in (fused, stock)
    )
    assert torch.equal(ours.sequences, theirs.sequences)
    for step, want in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(step, want, atol=1e-4, rtol=1e-4)


def test_weights_that_are_returned() -> None:
    stock, fused = stock_and_fused("gpt_oss")
    ours, theirs = (
        run(model, REAL, output_attentions=True)[1].attentions for model in (fused, stock)
    )
    for own, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.transpose(1, 2)[REAL], want.transpose(1, 2)[REAL])


def test_in_bfloat16_and_unfused_to_the_bit() -> None:
    """Sinks are of the model's dtype, or are kept in float32."""
    for name in ("gpt_oss", "flint"):
        stock, fused = stock_and_fused(name)
        want = run(stock, REAL)[0]["logits"]
        fusedformer.unfuse(fused)
        assert torch.equal(run(fused, REAL)[0]["logits"], want)
        fusedformer.fuse(fused)
        ours = run(fused.bfloat16(), REAL)[0]["logits"].float()
        theirs = run(stock.bfloat16(), REAL)[0]["logits"].float()
        ours_error, error = ((got - want).square().mean().sqrt() for got in (ours, theirs))
        assert ours_error <= 1.5 * error
