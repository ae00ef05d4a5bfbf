"""PyTorch's own samples of its modules and functions, run through ours; and gradcheck.

In float64 on the torch backend, forward and all gradients beside stock. PyTorch ships the samples
for its own tests in ``torch.testing._internal``, which need the package expecttest.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer import backend, functional, nn

pytest.importorskip("expecttest")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

MODULES = {m.module_cls.__name__: m for m in module_db if hasattr(nn, m.module_cls.__name__)}
MODULES.pop("Embedding", None)
FUNCTIONS = {
    f"{op.name.removeprefix('nn.functional.')}, {op.variant_test_name}": op
    for op in op_db
    if op.name.removeprefix("nn.functional.") in functional.__all__
}
WIDE = {"device": "cpu", "dtype": torch.float64, "requires_grad": True}


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    with backend("torch"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tensors(value: Any) -> list[Tensor]:
    parts = value if isinstance(value, (tuple, list)) else [value]
    return [part for part in parts if isinstance(part, Tensor)]


def run(
    call: Any, args: Any, kwargs: Any, leaves: list[Tensor], hidden: Tensor | None
) -> list[Tensor | None]:
    """Outputs, with zeros where ``hidden``, and the gradients of ``leaves``."""
    torch.manual_seed(1)
    outputs = tensors(call(*args, **kwargs))
    if hidden is not None:
        outputs = [output.masked_fill(hidden, 0.0) for output in outputs]
    reached = [output for output in outputs if output.requires_grad]
    generator = torch.Generator().manual_seed(0)
    dys = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in reached]
    grads = torch.autograd.grad(reached, leaves, dys, allow_unused=True) if reached else []
    return [*outputs, *grads]


def same(ours: list[Tensor | None], stock: list[Tensor | None]) -> bool:
    return len(ours) == len(stock) and all(
        a is b
        if a is None or b is None
        else a.dtype == b.dtype
        and a.shape == b.shape
        and torch.allclose(a, b, atol=1e-9, equal_nan=True)
        for a, b in zip(ours, stock, strict=True)
    )


def padded_positions(module: torch.nn.Module, kwargs: dict[str, Any]) -> Tensor | None:
    """Where ours says zeros and torch leaves the output to its choice of path."""
    names = {"TransformerEncoder": "src_key_padding_mask", "Transformer": "tgt_key_padding_mask"}
    mask: Tensor | None = kwargs.get(names.get(type(module).__name__, ""))
    if mask is None:
        return None
    if mask.dim() == 2:
        stack: Any = getattr(module, "encoder", module)
        mask = mask if stack.layers[0].self_attn.batch_first else mask.T
    return mask[..., None]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str, training: bool) -> None:
    info = MODULES[name]
    if not training and not info.train_and_eval_differ:
        return
    count = 0
    for sample in info.module_inputs_func(info, **WIDE, training=training):
        made = sample.constructor_input
        if made.kwargs.get("out_features"):  # one projection has one dimension of classes here
            continue
        modules = []
        for cls in (getattr(nn, name), info.module_cls):
            torch.manual_seed(0)
            modules.append(cls(*made.args, **made.kwargs).double().train(training))
        ours, stock = modules
        pairs = zip(ours.state_dict().items(), stock.state_dict().items(), strict=True)
        assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
        args, kwargs = sample.forward_input.args, dict(sample.forward_input.kwargs)
        if kwargs.get("src_key_padding_mask") is not None and name == "Transformer":
            # What torch's encoder leaves at padded positions, its decoder is not to see.
            kwargs["memory_key_padding_mask"] = kwargs["src_key_padding_mask"]
        hidden, found = padded_positions(stock, kwargs), []
        for module in modules:
            inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            leaves = [t for t in (*inputs, *module.parameters()) if t.requires_grad]
            found.append(run(module, args, kwargs, leaves, hidden))
        assert same(*found), f"sample {count}: {sample.desc}"
        count += 1
    assert count


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    op = FUNCTIONS[name]
    ours = getattr(functional, name.split(",")[0])
    count = 0
    for sample in op.sample_inputs(**WIDE):
        args = (sample.input, *sample.args)
        kwargs = dict(sample.kwargs)
        if kwargs.get("dropout_p"):  # another mask for the same seed
            kwargs["dropout_p"] = 0.0
        kwargs.pop("options", None)  # how torch chunks, which ours decides by itself
        if name.startswith("linear_cross_entropy") and args[1].dim() > 2:
            continue
        inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        leaves = [t for t in inputs if t.requires_grad]
        found = [run(call, args, kwargs, leaves, None) for call in (ours, op.op)]
        assert same(*found), f"sample {count}: {args} {kwargs}"
        count += 1
    assert count


GRADCHECKED: dict[str, Any] = {
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(4, 2, 6, 0.0, "gelu", batch_first=True, norm_first=True), 2
    ),
    "decoder": lambda: nn.TransformerDecoder(
        nn.TransformerDecoderLayer(4, 2, 6, 0.0, "gelu", batch_first=True), 1
    ),
    "attention": lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    "layer norm": lambda: nn.LayerNorm(4),
    "rms norm": lambda: nn.RMSNorm(4),
    "softmax": lambda: nn.Softmax(-1),
    "log softmax": lambda: nn.LogSoftmax(1),
}


@pytest.mark.parametrize("name", GRADCHECKED)
def test_gradcheck(name: str) -> None:
    """Against finite differences, second derivatives too; packed where there is padding."""
    torch.manual_seed(0)
    module = GRADCHECKED[name]().double()
    padding = torch.tensor([[False, False, False], [False, True, True]])
    inputs: tuple[Tensor, ...] = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True),)
    calls: dict[str, Any] = {
        "encoder": lambda x: module(x, src_key_padding_mask=padding),
        "decoder": lambda x, y: module(
            x, y, tgt_key_padding_mask=padding, memory_key_padding_mask=padding
        ),
        "attention": lambda x: module(x, x, x, need_weights=True),
    }
    if name == "decoder":
        inputs = (*inputs, torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True))
    call = calls.get(name, module)
    assert torch.autograd.gradcheck(call, inputs)
    if name in ("layer norm", "rms norm", "softmax", "log softmax"):
        assert torch.autograd.gradgradcheck(call, inputs)
