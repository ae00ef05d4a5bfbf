"""Whole encoder stacks on sequences of naturally mixed length: inference, and a training step."""

from __future__ import annotations

import copy
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from harness import counting
from harness.case import REFERENCE, Case, Inputs, Program, Provider, Sizes, Suite, Unsupported
from harness.providers import compiled, present

# name: (layers, width, heads, feed-forward width, longest sequence)
STACKS = {"MiniLM": (6, 384, 12, 1536, 256), "BERT-base": (12, 768, 12, 3072, 512)}
DROPOUT = 0.1


def natural_lengths(tokens: int, longest: int) -> list[int]:
    """Lengths of sequences with about ``tokens`` real tokens: log-normal, cut at ``longest``.

    A median of a fifth of the longest, and spread as in passages of English: padded to the longest
    of the batch, well over half of it is padding.
    """
    draw = random.Random(0)
    lengths = [longest]  # so that every batch has the same padded length
    while sum(lengths) < tokens:
        lengths.append(min(max(round(longest / 5 * draw.lognormvariate(0.0, 0.7)), 4), longest))
    return lengths


def cases(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """Two stacks; on CPU a few layers of the small one on short text."""
    if sizes.name == "full":
        return [_case(name, *STACKS[name], sizes.tokens, dtype) for name in STACKS]
    _, width, heads, feedforward, _ = STACKS["MiniLM"]
    layers, longest = (1, 16) if sizes.name == "tiny" else (2, 32)
    return [_case("MiniLM", layers, width, heads, feedforward, longest, 2 * longest, dtype)]


def _case(
    name: str, layers: int, width: int, heads: int, feedforward: int, longest: int, tokens: int,
    dtype: torch.dtype,
) -> Case:
    lengths = natural_lengths(tokens, longest)
    batch, real = len(lengths), sum(lengths)

    def make(device: torch.device) -> Inputs:
        ends = torch.tensor(lengths, device=device)[:, None]
        return {
            "src": torch.randn(batch, longest, width, device=device, dtype=dtype),
            "src_key_padding_mask": torch.arange(longest, device=device) >= ends,
        }

    return Case(
        "encoder",
        f"{name} {layers} layers B={batch} S={longest} mean/max={real / batch / longest:.2f}",
        dtype, make,
        counting.encoder(lengths, layers, width, heads, feedforward, dtype.itemsize),
        {"layers": layers, "width": width, "heads": heads, "feedforward": feedforward},
        headline=True,
    )


def _stack(layer: type, encoder: type, case: Case, device: torch.device) -> nn.Module:
    o = case.options
    # Shapes a pretrained BERT has: post-norm, exact GELU, dropout after every block.
    one = layer(
        o["width"], o["heads"], o["feedforward"], DROPOUT, activation="gelu", batch_first=True,
        device=device, dtype=case.dtype,
    )
    return encoder(one, o["layers"])


def _program(module: nn.Module) -> Program:
    def real_tokens(src: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        # What stands at padded positions is nobody's contract.
        output = module(src, src_key_padding_mask=src_key_padding_mask)
        return output.masked_fill(src_key_padding_mask[:, :, None], 0.0)

    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6)
    return Program(module, module, optimizer, checked=real_tokens)


def _stock_stack(case: Case, device: torch.device) -> nn.Module:
    torch.manual_seed(1)  # the same weights in every provider
    stack = _stack(nn.TransformerEncoderLayer, nn.TransformerEncoder, case, device)
    with torch.no_grad():  # initialized biases and gains are zeros and ones: nothing to tell apart
        for parameter in stack.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return stack


def fused(device: torch.device) -> Provider:
    """The library's encoder, with stock's weights through its state_dict."""

    def build(case: Case) -> Program:
        from fusedformer import nn as fused_nn

        if not hasattr(fused_nn, "TransformerEncoder"):
            raise Unsupported("fusedformer.nn has no TransformerEncoder yet")
        stack = _stack(
            fused_nn.TransformerEncoderLayer, fused_nn.TransformerEncoder, case, device
        )
        stack.load_state_dict(_stock_stack(case, device).state_dict())
        return _program(stack)

    return build


def eager(device: torch.device) -> Provider:
    """torch's encoder; in inference it takes its own nested-tensor path."""
    return lambda case: _program(_stock_stack(case, device))


def truth(case: Case, device: torch.device) -> Program:
    """torch's encoder with the same weights in float64."""
    return _program(copy.deepcopy(_stock_stack(case, device)).double())


def providers(device: torch.device, compile: str) -> dict[str, Provider]:
    """Who computes it, those that are here."""
    stock = eager(device)
    found: dict[str, Any] = {
        "fusedformer": fused(device),
        REFERENCE: stock,
        "torch.compile": lambda case: compiled(stock(case)),
    }
    return present(found, device, compile)


SUITE = Suite("encoder", cases, providers, truth)


def test_encoder(benchmark: Any, contest: Any) -> None:
    """One provider of one case in one direction; see conftest.py."""
    contest(benchmark)
