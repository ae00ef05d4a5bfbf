"""Whole encoder stacks on sequences of mixed length and of one: inference, and a training step."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harness import counting
from harness.case import REFERENCE, Case, Inputs, NotApplicable, Program, Provider, Sizes, Suite
from harness.encoder_peers import hugging_face
from harness.providers import compiled, present

# name: (layers, width, heads, feed-forward width, longest sequence)
STACKS = {
    "MiniLM": (6, 384, 12, 1536, 256), "BERT-base": (12, 768, 12, 3072, 512),
    "BERT-large": (24, 1024, 16, 4096, 512),
}  # fmt: skip
DROPOUT = 0.1


def natural_lengths(count: int, longest: int) -> list[int]:
    """Draw ``count`` log-normal lengths up to ``longest``, which one has; about half is padding."""
    draw = random.Random(0)
    lengths = [longest]
    while len(lengths) < count:
        drawn = round(0.4 * longest * draw.lognormvariate(0.0, 0.5))
        lengths.append(min(max(drawn, 4), longest))
    return lengths


def passage_lengths(count: int, longest: int) -> list[int]:
    """Count the words and signs of the report's passages, up to ``longest``."""
    from fusedformer.tools.report.corpus import stdlib_passages

    words = (re.findall(r"\w+|[^\w\s]", p.text) for p in stdlib_passages(count))
    return [min(len(found) + 2, longest) for found in words]  # and the tokens around a passage


def cases(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """List the stacks, on each kind of lengths; on CPU two layers, and one in a dry run."""
    if sizes.name == "tiny":
        return [stack_case("MiniLM", "natural", natural_lengths(4, 16), dtype, layers=1)]
    if sizes.name == "cpu":
        return [
            stack_case("BERT-base", "natural", natural_lengths(16, 256), dtype, layers=2),
            stack_case("MiniLM", "natural", natural_lengths(32, 128), dtype, layers=2),
            stack_case("MiniLM", "passages", passage_lengths(64, 256), dtype, layers=2),
            stack_case("MiniLM", "no padding", [128] * 16, dtype, layers=2),
        ]
    found = []
    for name, (*_, longest) in STACKS.items():
        count = 2 * sizes.tokens // longest
        found += [
            stack_case(name, "natural", natural_lengths(count, longest), dtype),
            stack_case(name, "passages", passage_lengths(2 * count, longest), dtype),
            stack_case(name, "no padding", [longest] * (count // 2), dtype),
        ]
    return found


def stack_case(
    name: str, kind: str, lengths: Sequence[int], dtype: torch.dtype, layers: int | None = None
) -> Case:
    all_layers, width, heads, feedforward, _ = STACKS[name]
    layers = layers or all_layers
    batch, real, longest = len(lengths), sum(lengths), max(lengths)
    padded = real < batch * longest

    def make(device: torch.device) -> Inputs:
        src = torch.randn(batch, longest, width, device=device, dtype=dtype)
        if not padded:
            return {"src": src}
        ends = torch.tensor(lengths, device=device)[:, None]
        return {"src": src, "src_key_padding_mask": torch.arange(longest, device=device) >= ends}

    filled = f"mean/max={real / batch / longest:.2f}" if padded else ""
    return Case(
        "encoder",
        f"{name} {layers} layers, {kind}, B={batch} S={longest} {filled}".rstrip(),
        dtype,
        make,
        counting.encoder(lengths, layers, width, heads, feedforward, dtype.itemsize),
        {
            "layers": layers,
            "width": width,
            "heads": heads,
            "feedforward": feedforward,
            "padded": padded,
            "batch": batch,
            "mean": round(real / batch),
            "longest": longest,
        },
        headline=kind == "natural",
    )


def _stack(
    layer: Callable[..., nn.Module],
    encoder: Callable[..., nn.Module],
    case: Case,
    device: torch.device,
) -> nn.Module:
    o = case.options
    # Shapes a pretrained BERT has: post-norm, exact GELU, dropout after every block.
    one = layer(
        o["width"],
        o["heads"],
        o["feedforward"],
        DROPOUT,
        activation="gelu",
        batch_first=True,
        device=device,
        dtype=case.dtype,
    )
    return encoder(one, o["layers"])


def program_of(module: nn.Module) -> Program:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True)
    return Program(module, module, optimizer, checked=_real_tokens(module))


def _real_tokens(module: nn.Module) -> Any:
    def real_tokens(src: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        # What stands at padded positions is nobody's contract.
        if src_key_padding_mask is None:
            whole: Tensor = module(src)
            return whole
        output: Tensor = module(src, src_key_padding_mask=src_key_padding_mask)
        return output.masked_fill(src_key_padding_mask[:, :, None], 0.0)

    return real_tokens


def stock_stack(case: Case, device: torch.device) -> nn.Module:
    torch.manual_seed(1)  # the same weights in every provider
    stack = _stack(nn.TransformerEncoderLayer, nn.TransformerEncoder, case, device)
    with torch.no_grad():  # initialized biases and gains are zeros and ones: nothing to tell apart
        for parameter in stack.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return stack


def fused_stack(case: Case, device: torch.device) -> nn.Module:
    """Make the library's encoder, with stock's weights through its state_dict."""
    from fusedformer import nn as fused_nn

    stack = _stack(fused_nn.TransformerEncoderLayer, fused_nn.TransformerEncoder, case, device)
    stack.load_state_dict(stock_stack(case, device).state_dict())
    return stack


def fused_padded(device: torch.device) -> Provider:
    """Call the library's layers on the padded batch: a mask of -inf is not packed."""

    def build(case: Case) -> Program:
        if not case.options["padded"]:
            raise NotApplicable
        stack = fused_stack(case, device)

        def padded(src: Tensor, src_key_padding_mask: Tensor) -> Tensor:
            mask = torch.zeros_like(src_key_padding_mask, dtype=src.dtype)
            mask = mask.masked_fill_(src_key_padding_mask, -torch.inf)
            found: Tensor = stack(src, src_key_padding_mask=mask)
            return found

        program = program_of(stack)
        program.function = program.checked = padded
        return program

    return build


def fused_unpadded(device: torch.device) -> Provider:
    """Call the library's encoder on as many tokens in sequences of one length.

    Its check runs the case itself; what is timed differs from it in the lengths alone.
    """

    def build(case: Case) -> Program:
        if not case.options["padded"]:
            raise NotApplicable
        o, stack = case.options, fused_stack(case, device)
        src = torch.randn(o["batch"], o["mean"], o["width"], device=device, dtype=case.dtype)
        program = program_of(stack)
        program.function = lambda **inputs: stack(src)
        return program

    return build


def eager(device: torch.device) -> Provider:
    """Call torch's encoder; in inference it takes its own nested-tensor path."""
    return lambda case: program_of(stock_stack(case, device))


def truth(case: Case, device: torch.device) -> Program:
    """Compute torch's encoder with the same weights in float64."""
    stack = copy.deepcopy(stock_stack(case, device)).double()
    return Program(stack, stack, checked=_real_tokens(stack))


def providers(device: torch.device, compile: str) -> dict[str, Provider]:
    """List who computes it, those that are here."""
    stock = eager(device)
    found: dict[str, Any] = {
        "fusedformer": lambda case: program_of(fused_stack(case, device)),
        "fusedformer padded": fused_padded(device),
        "fusedformer, as many tokens unpadded": fused_unpadded(device),
        REFERENCE: stock,
        "Hugging Face sdpa": lambda case: hugging_face(
            stock_stack(case, device), program_of, case.options
        ),
        "torch.compile": lambda case: compiled(stock(case)),
    }
    return present(found, device, compile)


SUITE = Suite("encoder", cases, providers, truth)


def test_encoder(benchmark: Any, contest: Any) -> None:
    """Time one provider of one case in one direction; see conftest.py."""
    contest(benchmark)
