"""A training step of BERT by masked language modelling: tokens a second, and the peak of memory."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harness import counting
from harness.case import REFERENCE, Case, Inputs, Program, Provider, Sizes, Suite
from harness.providers import compiled, present
from suites.bench_encoder import natural_lengths
from suites.bench_huggingface import without_key_biases

# name: (width, heads, feed-forward width, vocabulary)
MODELS = {"BERT-base": (768, 12, 3072, 30522), "tiny": (64, 4, 128, 500)}
SHARE, MASK, SPECIAL, IGNORED = 0.15, 103, 110, -100  # ids below SPECIAL are no words
TRUTH_SEQUENCES = 8  # at once in float64


def cases(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """List BERT-base on about 32k real tokens, 1k on CPU; also float32 weights under autocast."""
    if importlib.util.find_spec("transformers") is None:
        return []
    name, layers, lengths = {
        "full": ("BERT-base", 12, natural_lengths(136, 512)),
        "cpu": ("BERT-base", 2, natural_lengths(8, 256)),
        "tiny": ("tiny", 2, natural_lengths(4, 32)),
    }[sizes.name]
    return [
        _case(name, layers, lengths, dtype, autocast)
        for autocast in (False, True)
        if not autocast or dtype != torch.float32
    ]


def _case(
    name: str, layers: int, lengths: Sequence[int], dtype: torch.dtype, autocast: bool
) -> Case:
    width, heads, feedforward, vocabulary = MODELS[name]
    inputs = _masked_batch(lengths, vocabulary)
    labelled = (inputs["labels"] != IGNORED).sum(1).tolist()
    batch, longest = inputs["labels"].shape
    weights = ", float32 weights under autocast" if autocast else ""
    return Case(
        "pretraining",
        f"{name} {layers} layers, B={batch} S={longest} "
        f"mean/max={sum(lengths) / batch / longest:.2f}{weights}",
        dtype,
        lambda device: {key: tensor.to(device) for key, tensor in inputs.items()},
        counting.masked_lm(
            lengths, labelled, layers, width, heads, feedforward, vocabulary, dtype.itemsize
        ),
        {"model": name, "layers": layers, "autocast": autocast},
        headline=not autocast,
        tokens=sum(lengths),
    )


def _masked_batch(lengths: Sequence[int], vocabulary: int) -> Inputs:
    """Make the same batch for each device: the costs depend on how many tokens have a label."""
    from fusedformer.objectives import mask_tokens

    draw = torch.Generator().manual_seed(0)
    shape = len(lengths), max(lengths)
    real = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    words = torch.randint(SPECIAL, vocabulary, shape, generator=draw)
    ids, labels = mask_tokens(words, MASK, vocabulary, ~real, SHARE, draw)
    return {"input_ids": ids.where(real, 0), "attention_mask": real.long(), "labels": labels}


def _stock(case: Case, device: torch.device) -> Any:
    import transformers

    width, heads, feedforward, vocabulary = MODELS[case.options["model"]]
    settings: dict[str, Any] = dict(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=case.options["layers"],
        num_attention_heads=heads, intermediate_size=feedforward, attn_implementation="sdpa",
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,  # so that steps can be compared
    )  # fmt: skip
    torch.manual_seed(1)  # the same weights in every provider
    with device, torch.no_grad():
        model: Any = transformers.BertForMaskedLM(transformers.BertConfig(**settings))
        for parameter in model.parameters():  # biases and gains that can be told apart
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.to(torch.float32 if case.options["autocast"] else case.dtype)


def _program(
    case: Case,
    device: torch.device,
    module: nn.Module,
    loss: Callable[..., Tensor],
    names: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> Program:
    def function(**inputs: Tensor) -> Tensor:
        with torch.autocast(device.type, case.dtype, case.options["autocast"]):
            return loss(**inputs)

    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True)
    return Program(
        function, module, optimizer, merged=lambda found: without_key_biases(names(found))
    )


def _hugging_face(case: Case, device: torch.device, model: Any) -> Program:
    """Call the loss of transformers' model, which projects every position to the vocabulary."""

    def loss(**inputs: Tensor) -> Tensor:
        found: Tensor = model(**inputs).loss
        return found

    return _program(case, device, model, loss)


def _fused(case: Case, device: torch.device) -> Program:
    """Call the library's model, with stock's weights."""
    from fusedformer.models import BertEncoderModel

    stock = _stock(case, device)
    model = BertEncoderModel.from_huggingface(
        stock.state_dict(), stock.config.to_dict(), heads=["mlm"]
    ).to(device)
    return _program(case, device, model, model.loss, model.to_huggingface_layout)


def _fuse(case: Case, device: torch.device) -> Program:
    """Call transformers' model after ``fuse``."""
    import fusedformer

    model = _stock(case, device)
    fusedformer.fuse(model)
    return _hugging_face(case, device, model)


def truth(case: Case, device: torch.device) -> Program:
    """Compute the stock model in float64, some sequences at a time: all would not fit."""
    model = copy.deepcopy(_stock(case, device)).double()

    def part(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        logits = model(input_ids, attention_mask).logits.flatten(0, 1)
        return nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")

    def loss(**inputs: Tensor) -> Tensor:
        parts = zip(*(tensor.split(TRUTH_SEQUENCES) for tensor in inputs.values()), strict=True)
        total: Tensor = sum(checkpoint(part, *one, use_reentrant=False) for one in parts)
        return total / (inputs["labels"] != IGNORED).sum()

    return Program(loss, model, merged=without_key_biases)


def providers(device: torch.device, compile: str) -> dict[str, Provider]:
    """List who computes it, those that are here."""
    stock: Provider = lambda case: _hugging_face(case, device, _stock(case, device))
    found: dict[str, Provider] = {
        "fusedformer": lambda case: _fused(case, device),
        "fusedformer fuse": lambda case: _fuse(case, device),
        REFERENCE: stock,
        "torch.compile": lambda case: compiled(stock(case)),
    }
    return present(found, device, compile)


SUITE = Suite("pretraining", cases, providers, truth)


def test_pretraining(benchmark: Any, contest: Any) -> None:
    """Time one provider of one case in one direction; see conftest.py."""
    contest(benchmark)
