"""Peers that more than one suite names: torch.compile, forced SDPA backends, other libraries."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.case import Case, Program, Provider, Unsupported

PEER_MODULES = ("liger_kernel", "xformers", "flash_attn", "apex", "transformer_engine")

COMPILED = ("torch.compile", "FlexAttention")

SDPA_BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cudnn": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}


def absent_peers(device: torch.device) -> dict[str, str]:
    """The peers that cannot be timed here, and why."""
    absent = {}
    for name in PEER_MODULES:
        if importlib.util.find_spec(name) is None:
            absent[name] = "not installed"
        elif device.type != "cuda":
            absent[name] = "needs a GPU"
        elif name == "transformer_engine":
            absent[name] = "installed, but no suite calls it yet"
    if device.type != "cuda":
        absent["FlexAttention"] = "its compiled kernels need a GPU"
        absent["SDPA cudnn"] = absent["SDPA efficient"] = "needs a GPU"
    return absent


def present(
    providers: dict[str, Provider], device: torch.device, compile: str
) -> dict[str, Provider]:
    """``providers`` without those that are absent, those that compile as ``Options.compile``."""
    found = {}
    absent = absent_peers(device)
    for name, provider in providers.items():
        if name in absent or (name in COMPILED and compile == "none"):
            continue
        found[name] = _on_headlines(provider) if name in COMPILED and compile != "all" else provider
    return found


def _on_headlines(provider: Provider) -> Provider:
    """A provider that takes seconds to compile for each shape, on headline cases only."""

    def build(case: Case) -> Program:
        if not case.headline:
            raise Unsupported("compiles for each shape, so it is timed on headline cases only")
        return provider(case)

    return build


def compiled(program: Program) -> Program:
    """The same program through ``torch.compile`` for its exact shapes."""
    module = program.module
    if module is not None:
        module.compile(dynamic=False)
        return program
    checked = program.checked
    return Program(
        torch.compile(program.function, dynamic=False),
        checked=None if checked is None else torch.compile(checked, dynamic=False),
    )


def sdpa(backend: SDPBackend | None) -> Callable[..., Tensor]:
    """torch's attention on one backend alone, or on the one that torch picks."""
    if backend is None:
        return F.scaled_dot_product_attention

    def forced(*args: Any, **kwargs: Any) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*args, **kwargs)

    return forced


def _plain_attention(case: Case, peer: str) -> None:
    """Raise unless the case is one that flash_attn and xformers take without a mask tensor."""
    if case.options["kind"] in ("key padding", "boolean mask"):
        raise Unsupported(f"{peer} is timed here without masks only")


def flash_attn(case: Case) -> Program:
    """Dao's package; ``[batch, length, heads, dim]``, so the transposes below are views."""
    from flash_attn import flash_attn_func

    _plain_attention(case, "flash_attn")
    causal, p = case.options["is_causal"], case.options["p"]

    def attention(p: float) -> Callable[..., Tensor]:
        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in (query, key, value))
            return flash_attn_func(q, k, v, dropout_p=p, causal=causal).transpose(1, 2)

        return call

    return Program(attention(p), checked=attention(0.0))


def xformers_attention(case: Case) -> Program:
    """``xformers.ops.memory_efficient_attention`` on the backend that it picks."""
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    _plain_attention(case, "xformers")
    bias = LowerTriangularMask() if case.options["is_causal"] else None

    def attention(p: float) -> Callable[..., Tensor]:
        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in (query, key, value))
            return memory_efficient_attention(q, k, v, attn_bias=bias, p=p).transpose(1, 2)

        return call

    return Program(attention(case.options["p"]), checked=attention(0.0))


def flex_attention(case: Case) -> Program:
    """torch's FlexAttention, compiled for the exact shapes, with block masks made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if case.options["p"]:
        raise Unsupported("FlexAttention has no dropout")
    run = torch.compile(flex_attention, dynamic=False)
    masks: dict[int, Any] = {}

    def block_mask(query: Tensor, key_mask: Tensor | None, attn_mask: Tensor | None) -> Any:
        if case.options["is_causal"]:
            visible = lambda b, h, i, j: i >= j
        elif key_mask is not None:
            visible = lambda b, h, i, j: key_mask[b, j]
        elif attn_mask is not None:
            visible = lambda b, h, i, j: attn_mask[0, 0, i, j]
        else:
            return None
        batch, _, length, _ = query.shape
        rows = None if key_mask is None else batch
        return create_block_mask(visible, rows, None, length, length, device=query.device)

    def call(
        query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        given = key_mask if attn_mask is None else attn_mask
        which = 0 if given is None else given.data_ptr()
        if which not in masks:
            masks[which] = block_mask(query, key_mask, attn_mask)
        return run(query, key, value, block_mask=masks[which])

    return Program(call)


def liger(kind: str) -> Provider:
    """liger_kernel's autograd functions for a softmax or a plain norm."""

    def build(case: Case) -> Program:
        if kind == "softmax":
            if case.options.get("masked") or case.options.get("log"):
                raise Unsupported("liger_kernel has the plain softmax only")
            from liger_kernel.ops.softmax import LigerSoftmaxFunction

            return Program(lambda input: LigerSoftmaxFunction.apply(input))
        if case.options["kind"] == "layer_norm":
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction

            return Program(
                lambda input, weight, bias: LigerLayerNormFunction.apply(input, weight, bias, 1e-5)
            )
        if case.options["kind"] == "rms_norm":
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction

            return Program(
                lambda input, weight: LigerRMSNormFunction.apply(input, weight, 1e-5)
            )
        raise Unsupported("liger_kernel has no LayerNorm with the residual fused")

    return build


def apex_layer_norm(case: Case) -> Program:
    """apex's fused LayerNorm."""
    if case.options["kind"] != "layer_norm":
        raise Unsupported("apex is timed here on the plain LayerNorm only")
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return Program(
        lambda input, weight, bias: fused_layer_norm_affine(
            input, weight, bias, weight.shape, 1e-5
        )
    )
