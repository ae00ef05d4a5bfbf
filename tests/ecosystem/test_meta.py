"""The meta device and fake tensors: shapes, strides and dtypes of everything, without numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest
import torch
from tests.conftest import INTERPRETED
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from fusedformer import backend, models, nn
from fusedformer.parity.cases import Case, all_cases

# How many tokens there are decides the shape that pack and unpack give: that is not known here.
CASES = [case for case in all_cases() if case.op.name not in ("pack", "unpack")]
D, H, N, S = 16, 2, 2, 7


def described(tensors: list[Any], *, strides: bool) -> list[Any]:
    """Shape, dtype and the strides that matter, of outputs and gradients."""
    return [
        None if t is None else (
            tuple(t.shape), t.dtype,
            [step for size, step in zip(t.shape, t.stride(), strict=True) if size > 1] * strides,
        )
        for t in tensors
    ]  # fmt: skip


def results(case: Case, tensors: Mapping[str, Tensor]) -> list[Any]:
    given = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
    outputs = tree_leaves(case.op.candidate(**given, **case.settings))
    leaves = [t for t in given.values() if t.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, leaves, list(map(torch.ones_like, outputs)))]


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.quick], ids=lambda c: f"{c.op.name} {c.name}"
)
def test_every_op(case: Case, name: Any, device: str) -> None:
    """Strides where they are this library's: ATen chooses its own by device."""
    strides = name == "triton"
    made = case.make(torch.Generator().manual_seed(1))
    tensors = {n: t.to(device) for n, t in made.items()}
    with backend(name):
        want = described(results(case, tensors), strides=strides)
        if takes_meta(name):
            on_meta = {n: t.to("meta") for n, t in tensors.items()}
            assert described(results(case, on_meta), strides=strides) == want
        with FakeTensorMode() as mode:
            fakes = {n: mode.from_tensor(t) for n, t in tensors.items()}
            assert described(results(case, fakes), strides=strides) == want


def takes_meta(name: str) -> bool:
    """Compiled kernels are for a GPU's tensors alone."""
    return name == "torch" or INTERPRETED


def encoder(**settings: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(D, H, 24, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(D))


def bert() -> models.BertEncoderModel:
    config = models.BertConfig(61, D, 2, H, 40, max_position_embeddings=S)
    return models.BertEncoderModel(config)


def decoder() -> nn.TransformerDecoder:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(D, H, 24, batch_first=True), 2)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


def half() -> Tensor:
    """Padding: half of the second sequence."""
    return torch.arange(S) >= torch.tensor([[S], [3]])


def three() -> dict[str, Tensor]:
    return {name: randn(N, S, D) for name in ("query", "key", "value")}


def classes() -> Tensor:
    return torch.zeros(N, dtype=torch.int64)


MODULES: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "TransformerEncoder": (encoder, lambda: {"src": randn(N, S, D)}),
    "TransformerEncoder, padding": (
        lambda: encoder(norm_first=True),
        lambda: {"src": randn(N, S, D), "src_key_padding_mask": half()},
    ),
    "TransformerEncoder, mask": (
        encoder, lambda: {"src": randn(N, S, D), "mask": torch.eye(S).bool()},
    ),
    "TransformerEncoder, rows": (encoder, lambda: {
        "src": randn(N, S, D), "src_key_padding_mask": half(),
        "output_rows": torch.zeros(N, 1, dtype=torch.int64),
    }),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(D, H, 24), lambda: {"src": randn(S, N, D)},
    ),
    "TransformerDecoder": (decoder, lambda: {
        "tgt": randn(N, S, D), "memory": randn(N, S, D), "tgt_key_padding_mask": half(),
        "memory_key_padding_mask": half(),
    }),
    "TransformerDecoderLayer": (
        lambda: nn.TransformerDecoderLayer(D, H, 24),
        lambda: {"tgt": randn(S, N, D), "memory": randn(5, N, D)},
    ),
    "Transformer": (
        lambda: nn.Transformer(D, H, 1, 1, 24),
        lambda: {"src": randn(S, N, D), "tgt": randn(5, N, D)},
    ),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(D, H, 0.1, batch_first=True), three),
    "ScaledDotProductAttention": (
        nn.ScaledDotProductAttention, lambda: {n: t[:, None] for n, t in three().items()},
    ),
    "LayerNorm": (lambda: nn.LayerNorm(D), lambda: {"input": randn(N, S, D)}),
    "RMSNorm": (lambda: nn.RMSNorm(D), lambda: {"x": randn(N, S, D)}),
    "QuickGELU": (nn.QuickGELU, lambda: {"input": randn(N, S)}),
    "Softmax": (lambda: nn.Softmax(-1), lambda: {"input": randn(N, S)}),
    "LogSoftmax": (lambda: nn.LogSoftmax(-1), lambda: {"input": randn(N, S)}),
    "CrossEntropyLoss": (nn.CrossEntropyLoss, lambda: {"input": randn(N, S), "target": classes()}),
    "LinearCrossEntropyLoss": (  # otherwise how many rows count decides shapes
        lambda: nn.LinearCrossEntropyLoss(D, S, static_shapes=True),
        lambda: {"input": randn(N, D), "target": classes()},
    ),
    "ContrastiveLoss": (nn.ContrastiveLoss, lambda: {"a": randn(N, D), "b": randn(N, D)}),
    "SigmoidContrastiveLoss": (
        nn.SigmoidContrastiveLoss, lambda: {"a": randn(N, D), "b": randn(N, D)},
    ),
    "SinusoidalPositionalEncoding": (
        lambda: nn.SinusoidalPositionalEncoding(D), lambda: {"input": randn(N, S, D)},
    ),
    "LearnedPositionalEncoding": (
        lambda: nn.LearnedPositionalEncoding(D, S), lambda: {"input": randn(N, S, D)},
    ),
    "TokenEmbedding": (
        lambda: nn.TokenEmbedding(20, D), lambda: {"input": torch.zeros(N, S, dtype=torch.int64)},
    ),
    "BertEncoderModel": (bert, lambda: {
        "input_ids": torch.zeros(N, S, dtype=torch.int64), "attention_mask": (~half()).long(),
    }),
}  # fmt: skip


def learned(module: torch.nn.Module, given: dict[str, Tensor]) -> list[Any]:
    """Outputs, and gradients of all parameters."""
    outputs = [output for output in tree_leaves(module(**given)) if output is not None]
    parameters = list(module.parameters())
    if not parameters:
        return outputs
    grads = list(map(torch.ones_like, outputs))
    return [*outputs, *torch.autograd.grad(outputs, parameters, grads, allow_unused=True)]


@pytest.mark.parametrize("what", MODULES)
def test_every_module(what: str, device: str) -> None:
    """Made on meta without memory, run there, then loaded; and run on fakes, in training."""
    make, inputs = MODULES[what]
    real = make().to(device)
    given = {n: t.to(device) for n, t in inputs().items()}
    with torch.device("meta"):
        made = make()
    assert all(tensor.is_meta for tensor in made.state_dict().values())
    mode = FakeTensorMode()
    fake = faked(real, mode)
    with backend("torch"):
        want = described(learned(real, given), strides=False)
    for name in ("torch", "triton"):
        with backend(name):
            if takes_meta(name):
                found = learned(made, {n: t.to("meta") for n, t in given.items()})
                assert described(found, strides=False) == want
            with mode:
                found = learned(fake, {n: mode.from_tensor(t) for n, t in given.items()})
            assert described(found, strides=False) == want
    loaded = made.to_empty(device=device)
    for part in loaded.modules():  # what is in no state_dict is computed, not loaded
        if isinstance(part, nn.SinusoidalPositionalEncoding):
            part.reset_parameters()
    loaded.load_state_dict(real.state_dict())
    with backend("torch"):
        outputs = [tree_leaves(module.eval()(**given)) for module in (loaded, real)]
    for one, other in zip(*outputs, strict=True):
        assert one is other is None or torch.equal(one, other)


def faked(module: torch.nn.Module, mode: FakeTensorMode) -> torch.nn.Module:
    """A copy whose parameters and buffers are fakes."""
    found = copy.deepcopy(module)
    for part in found.modules():
        for held in cast(list[dict[str, Tensor | None]], [part._parameters, part._buffers]):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = mode.from_tensor(tensor)
    return found


def test_no_module_is_left_out() -> None:
    public = {*nn.__all__, "BertEncoderModel"}
    assert public == {what.split(",")[0] for what in MODULES}
