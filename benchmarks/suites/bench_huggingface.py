"""Models of Hugging Face's transformers as they are and after ``fusedformer.fuse``."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from harness import counting
from harness.case import REFERENCE, Case, Inputs, Program, Provider, Sizes, Suite
from harness.providers import compiled, present
from suites.bench_encoder import natural_lengths

PATCH, LOCAL = 16, 128  # of ViT; keys that ModernBERT's local layers see
_NO_IDS = dict.fromkeys(
    ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0
)


@dataclass(frozen=True)
class Family:
    """A model of transformers: ``NAMEConfig`` and ``NAMEModel``, and its size as it is published.

    ``counted`` are further arguments of :func:`counting.encoder`.
    """

    name: str
    layers: int
    width: int
    heads: int
    feedforward: int
    longest: int = 512
    settings: dict[str, Any] = field(default_factory=dict)
    counted: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)  # of the model


_NO_POOLER = {"add_pooling_layer": False}
MODELS = {
    "BERT-base": Family("Bert", 12, 768, 12, 3072, arguments=_NO_POOLER),
    "ModernBERT-base": Family(
        "ModernBert", 22, 768, 12, 1152, 1024, _NO_IDS, {"gated": True, "local": LOCAL // 2}
    ),
    "MPNet-base": Family("MPNet", 12, 768, 12, 3072, arguments=_NO_POOLER),
    "DeBERTa-v3-base": Family(  # its products of positions are not counted
        "DebertaV2", 12, 768, 12, 3072, settings={
            "relative_attention": True, "position_buckets": 256, "share_att_key": True,
            "pos_att_type": "p2c|c2p", "norm_rel_ebd": "layer_norm", "position_biased_input": False,
        },
    ),
    "NomicBERT": Family(
        "NomicBert", 12, 768, 12, 3072, settings={"pad_token_id": 0}, counted={"gated": True},
        arguments=_NO_POOLER,
    ),
    "Qwen3-Embedding-0.6B": Family(
        "Qwen3", 28, 1024, 16, 3072, settings={
            "num_key_value_heads": 8, "head_dim": 128, "use_cache": False,
        },
        counted={"gated": True, "causal": True, "head_dim": 128, "key_heads": 8},
    ),
    "ESM-2 150M": Family(
        "Esm", 30, 640, 20, 2560, settings={
            "position_embedding_type": "rotary", "token_dropout": True, "mask_token_id": 3,
            "pad_token_id": 1, "emb_layer_norm_before": False,
        },
        arguments=_NO_POOLER,
    ),
    "ViT-base": Family("ViT", 12, 768, 12, 3072, 197, {"image_size": 224, "patch_size": PATCH},
                       arguments=_NO_POOLER),
    "tiny": Family("Bert", 2, 64, 4, 128, 16, arguments=_NO_POOLER),
}  # fmt: skip
# Measured with as many layers of each: a GPU too has little time for so many models.
ENCODERS = tuple(name for name in MODELS if name not in ("BERT-base", "ViT-base", "tiny"))
FEW_LAYERS = 3
ONLY_EAGER = "DebertaV2", "MPNet"  # take no other attention
SENTENCES = "MiniLM sentence pipeline"


def cases(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """List texts of natural lengths, images, and sentences if the pretrained weights are here."""
    if importlib.util.find_spec("transformers") is None:
        return []
    if sizes.name == "tiny":
        return [_text("tiny", natural_lengths(4, 16), dtype, headline=True)]
    on_gpu = sizes.name == "full"
    layers, batch, texts = (None, 64, 64) if on_gpu else (FEW_LAYERS, 8, 20)

    def lengths(name: str) -> list[int]:
        return natural_lengths(texts, MODELS[name].longest if on_gpu else 256)

    found = [_text("BERT-base", lengths("BERT-base"), dtype, layers, headline=True)]
    if on_gpu:
        found.append(_text("ModernBERT-base", lengths("ModernBERT-base"), dtype))
    found += [_text(name, lengths(name), dtype, FEW_LAYERS) for name in ENCODERS]
    if not on_gpu:  # of which the peak of memory is asked for
        found.append(_text("DeBERTa-v3-base", natural_lengths(4, 512), dtype, FEW_LAYERS))
    return [*found, _images(batch, dtype, layers), *_sentences(4 * batch, 8 * batch, dtype)]


def _text(
    name: str,
    lengths: Sequence[int],
    dtype: torch.dtype,
    layers: int | None = None,
    headline: bool = False,
) -> Case:
    family = MODELS[name]
    layers = layers or family.layers
    batch, longest = len(lengths), max(lengths)

    def make(device: torch.device) -> Inputs:
        ends = torch.tensor(lengths, device=device)[:, None]
        return {
            "input_ids": torch.randint(10, 1000, (batch, longest), device=device),
            "attention_mask": (torch.arange(longest, device=device) < ends).long(),
        }

    costs = _costs(family, lengths, layers, dtype)
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


def _costs(
    family: Family, lengths: Sequence[int], layers: int, dtype: torch.dtype
) -> counting.Costs:
    counted = dict(family.counted)
    local = counted.pop("local", None)
    windows = [local if i % 3 else None for i in range(layers)]
    sizes = family.width, family.heads, family.feedforward
    return counting.encoder(lengths, layers, *sizes, dtype.itemsize, windows=windows, **counted)


def _images(batch: int, dtype: torch.dtype, layers: int | None) -> Case:
    family = MODELS["ViT-base"]
    layers, length = layers or family.layers, family.longest

    def make(device: torch.device) -> Inputs:
        return {"pixel_values": torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)}

    return Case(
        "huggingface",
        f"ViT-base {layers} layers, B={batch} S={length}",
        dtype,
        make,
        _costs(family, [length] * batch, layers, dtype),
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

    family = MODELS[case.options["model"]]
    shape: Any = {
        "num_hidden_layers": case.options["layers"], "hidden_size": family.width,
        "num_attention_heads": family.heads, "intermediate_size": family.feedforward,
        "attn_implementation": "eager" if family.name in ONLY_EAGER else "sdpa",
        "vocab_size": 1000,
    }  # fmt: skip
    torch.manual_seed(1)  # the same weights in every provider
    config: Any = getattr(transformers, f"{family.name}Config")(**{**shape, **family.settings})
    model: Any = getattr(transformers, f"{family.name}Model")(config, **family.arguments)
    if family.name == "Esm":  # its parameters get no gradient
        model.contact_head = None
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
    biases = "key.bias", "k_proj.bias", ".k.bias"
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
