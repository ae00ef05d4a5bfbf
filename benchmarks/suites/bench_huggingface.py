"""Models of Hugging Face's transformers as they are and after ``fusedformer.fuse``."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harness import counting
from harness.case import REFERENCE, Case, Inputs, Program, Provider, Sizes, Suite
from harness.providers import compiled, present
from suites.bench_encoder import natural_lengths

# name: (layers, width, heads, feed-forward width, longest sequence)
MODELS = {
    "BERT-base": (12, 768, 12, 3072, 512), "ModernBERT-base": (22, 768, 12, 1152, 1024),
    "ViT-base": (12, 768, 12, 3072, 197), "tiny": (2, 64, 4, 128, 16),
}  # fmt: skip
SENTENCES = "MiniLM sentence pipeline"
PATCH, LOCAL = 16, 128  # of ViT; keys that ModernBERT's local layers see


def cases(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """List texts of natural lengths, images, and sentences if the pretrained weights are here."""
    if importlib.util.find_spec("transformers") is None:
        return []
    if sizes.name == "tiny":
        return [_text("tiny", natural_lengths(4, 16), dtype, headline=True)]
    on_gpu = sizes.name == "full"
    layers, batch = (None, 64) if on_gpu else (3, 8)
    longest = None if on_gpu else 256
    return [
        _text("BERT-base", natural_lengths(batch, longest or 512), dtype, layers, headline=True),
        _text("ModernBERT-base", natural_lengths(batch, longest or 1024), dtype, layers),
        _images(batch, dtype, layers),
        *_sentences(4 * batch, 8 * batch, dtype),
    ]


def _text(
    name: str,
    lengths: Sequence[int],
    dtype: torch.dtype,
    layers: int | None = None,
    headline: bool = False,
) -> Case:
    all_layers, width, heads, feedforward, _ = MODELS[name]
    layers, modern = layers or all_layers, name.startswith("Modern")
    batch, longest = len(lengths), max(lengths)

    def make(device: torch.device) -> Inputs:
        ends = torch.tensor(lengths, device=device)[:, None]
        return {
            "input_ids": torch.randint(10, 1000, (batch, longest), device=device),
            "attention_mask": (torch.arange(longest, device=device) < ends).long(),
        }

    windows = [LOCAL // 2 if modern and i % 3 else None for i in range(layers)]
    costs = counting.encoder(
        lengths, layers, width, heads, feedforward, dtype.itemsize, gated=modern, windows=windows
    )
    filled = sum(lengths) / batch / longest
    return Case(
        "huggingface",
        f"{name} {layers} layers, B={batch} S={longest} mean/max={filled:.2f}",
        dtype,
        make,
        costs,
        {"model": name, "layers": layers},
        headline,
    )


def _images(batch: int, dtype: torch.dtype, layers: int | None) -> Case:
    all_layers, width, heads, feedforward, length = MODELS["ViT-base"]
    layers = layers or all_layers

    def make(device: torch.device) -> Inputs:
        return {"pixel_values": torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)}

    return Case(
        "huggingface",
        f"ViT-base {layers} layers, B={batch} S={length}",
        dtype,
        make,
        counting.encoder([length] * batch, layers, width, heads, feedforward, dtype.itemsize),
        {"model": "ViT-base", "layers": layers},
    )


def _sentences(batch: int, count: int, dtype: torch.dtype) -> list[Case]:
    """Turn texts into unit vectors in batches: tokenizer, model, mean pooling, normalization."""
    from fusedformer.tools.report.corpus import stdlib_passages
    from fusedformer.tools.report.minilm import MiniLM, MissingExtra

    try:
        client = MiniLM()
    except MissingExtra:
        return []
    texts = [passage.text for passage in stdlib_passages(count)]
    lengths = [len(ids) for ids in client.tokenize(texts)]
    rows = sum(max(lengths[i : i + batch]) * len(lengths[i : i + batch])
               for i in range(0, count, batch))  # fmt: skip
    costs = counting.encoder(lengths, 6, 384, 12, 1536, dtype.itemsize)
    return [
        Case(
            "huggingface",
            f"{SENTENCES}, {count} passages, B={batch} mean/max={sum(lengths) / rows:.2f}",
            dtype,
            lambda device: {},
            {"forward": costs["forward"]},
            {"model": SENTENCES, "client": client, "texts": texts, "batch": batch},
            headline=True,
        )
    ]


def _pipeline(case: Case, model: nn.Module, device: torch.device) -> Program:
    from fusedformer.models import sentence_embeddings
    from fusedformer.tools.report.minilm import hidden_states

    client = case.options["client"]

    def embed() -> Tensor:
        ids = client.tokenize(case.options["texts"])
        batches = client.batches(ids, case.options["batch"], device)
        return torch.cat(
            [sentence_embeddings(hidden_states(model, one), one.attention_mask) for one in batches]
        )

    return Program(embed)


def _stock(case: Case, device: torch.device) -> nn.Module:
    if case.options["model"] == SENTENCES:
        pretrained: nn.Module = case.options["client"].stock(case.dtype, device)
        return pretrained
    import transformers

    _, width, heads, feedforward, _ = MODELS[case.options["model"]]
    shape: Any = {
        "num_hidden_layers": case.options["layers"], "hidden_size": width,
        "num_attention_heads": heads, "intermediate_size": feedforward,
        "attn_implementation": "sdpa",
    }  # fmt: skip
    torch.manual_seed(1)  # the same weights in every provider
    model: Any
    if case.options["model"] == "ViT-base":
        config: Any = transformers.ViTConfig(**shape, image_size=224, patch_size=PATCH)
        model = transformers.ViTModel(config, add_pooling_layer=False)
    elif case.options["model"] == "ModernBERT-base":
        tokens: dict[str, Any] = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id",
                                "cls_token_id", "sep_token_id"), 0)  # fmt: skip
        config = transformers.ModernBertConfig(**shape, **tokens, vocab_size=1000)
        model = transformers.ModernBertModel(config)
    else:
        config = transformers.BertConfig(**shape, vocab_size=1000)
        model = transformers.BertModel(config, add_pooling_layer=False)
    with torch.no_grad():  # initialized biases and gains are zeros and ones: nothing to tell apart
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    result: nn.Module = model.to(device, case.dtype)
    return result


def _program(case: Case, model: nn.Module, device: torch.device) -> Program:
    if case.options["model"] == SENTENCES:
        return _pipeline(case, model, device)

    def forward(**inputs: Tensor) -> Tensor:
        found: Tensor = model(**inputs).last_hidden_state
        return found

    def checked(**inputs: Tensor) -> Tensor:
        output, keep = forward(**inputs), inputs.get("attention_mask")
        # What stands at padded positions is nobody's contract.
        return output if keep is None else output.masked_fill(keep[:, :, None] == 0, 0.0)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    return Program(forward, model, optimizer, checked, merged=without_key_biases)


def without_key_biases(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out gradients of keys' biases: they are 0, and what is computed is rounding."""
    biases = "key.bias", "k_proj.bias"
    return {name: g for name, g in gradients.items() if not name.endswith(biases)}


def _fused(case: Case, device: torch.device) -> Program:
    import fusedformer

    model = _stock(case, device)
    fusedformer.fuse(model)
    return _program(case, model, device)


def truth(case: Case, device: torch.device) -> Program:
    """Compute the stock model, with the same weights in float64."""
    return _program(case, copy.deepcopy(_stock(case, device)).double(), device)


def providers(device: torch.device, compile: str) -> dict[str, Provider]:
    """List who computes it, those that are here."""
    stock: Callable[[Case], Program] = lambda case: _program(case, _stock(case, device), device)
    found: dict[str, Provider] = {
        "fusedformer": lambda case: _fused(case, device),
        REFERENCE: stock,
        "torch.compile": lambda case: compiled(stock(case)),
    }
    return present(found, device, compile)


SUITE = Suite("huggingface", cases, providers, truth)


def test_huggingface(benchmark: Any, contest: Any) -> None:
    """Time one provider of one case in one direction; see conftest.py."""
    contest(benchmark)
