"""Which peers are here; torch.compile, and peers of other libraries for softmax and norms."""

from __future__ import annotations

import importlib.util

import torch

from harness.case import Case, Program, Provider, Unsupported

PEER_MODULES = ("liger_kernel", "xformers", "flash_attn", "apex", "transformer_engine")

AUTOTUNED = "torch.compile max-autotune"
GRAPHED, REDUCED = "fusedformer graphed", "torch.compile reduce-overhead"
COMPILED = ("torch.compile", AUTOTUNED, REDUCED, "FlexAttention")

_mode: list[str | None] = [None]  # of torch.compile, while a provider is built


def absent_peers(device: torch.device) -> dict[str, str]:
    """List the peers that cannot be timed here, and why."""
    absent = {}
    for name in PEER_MODULES:
        if importlib.util.find_spec(name) is None:
            absent[name] = "not installed"
        elif device.type != "cuda":
            absent[name] = "needs a GPU"
    if device.type != "cuda":
        absent["FlexAttention"] = "its compiled kernels need a GPU"
        absent["SDPA cudnn"] = absent["SDPA efficient"] = "needs a GPU"
        absent["torch varlen_attn"] = "needs a GPU"
        absent[GRAPHED] = absent[REDUCED] = "CUDA graphs need a GPU"
    elif importlib.util.find_spec("torch.nn.attention.varlen") is None:
        absent["torch varlen_attn"] = "this torch has none"
    return absent


def present(
    providers: dict[str, Provider], device: torch.device, compile: str
) -> dict[str, Provider]:
    """Leave out the providers that are absent, or that compile where nothing shall."""
    found = {}
    absent = absent_peers(device)
    if compile == "thorough" and "torch.compile" in providers:
        providers = {**providers, AUTOTUNED: _autotuned(providers["torch.compile"])}
    for name, provider in providers.items():
        if name in absent or (name in COMPILED and compile == "none"):
            continue
        everywhere = name not in COMPILED or compile in ("all", "thorough")
        found[name] = provider if everywhere else _on_headlines(provider)
    return found


def _on_headlines(provider: Provider) -> Provider:
    """Keep a provider that takes seconds to compile for each shape to headline cases."""

    def build(case: Case) -> Program:
        if not case.headline:
            raise Unsupported("compiles for each shape, so it is timed on headline cases only")
        return provider(case)

    return build


def compiled(program: Program) -> Program:
    """Send the same program through ``torch.compile`` for its exact shapes."""
    module, mode = program.module, _mode[-1]
    if module is not None:
        module.compile(dynamic=False, mode=mode)
        return program
    checked = program.checked
    return Program(
        torch.compile(program.function, dynamic=False, mode=mode),
        checked=None if checked is None else torch.compile(checked, dynamic=False, mode=mode),
    )


def _autotuned(provider: Provider) -> Provider:
    """Let a provider that compiles search for configs as torch does."""

    def build(case: Case) -> Program:
        _mode.append("max-autotune-no-cudagraphs")  # a graph would hide the launches from timing
        try:
            return provider(case)
        finally:
            _mode.pop()

    return build


def liger(kind: str) -> Provider:
    """Call liger_kernel's autograd functions for a softmax or a plain norm."""

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

            return Program(lambda input, weight: LigerRMSNormFunction.apply(input, weight, 1e-5))
        raise Unsupported("liger_kernel has no LayerNorm with the residual fused")

    return build


def apex_layer_norm(case: Case) -> Program:
    """Call apex's fused LayerNorm."""
    if case.options["kind"] != "layer_norm":
        raise Unsupported("apex is timed here on the plain LayerNorm only")
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return Program(
        lambda input, weight, bias: fused_layer_norm_affine(input, weight, bias, weight.shape, 1e-5)
    )


def transformer_engine_norm(case: Case) -> Program:
    """Call transformer_engine's modules, with the case's weights."""
    kind = case.options["kind"]
    if kind not in ("layer_norm", "rms_norm"):
        raise Unsupported("transformer_engine is timed here on plain norms only")
    import transformer_engine.pytorch as te

    made: dict[int, torch.nn.Module] = {}

    def call(input: torch.Tensor, **parameters: torch.Tensor) -> torch.Tensor:
        columns = input.shape[-1]
        if columns not in made:
            norm = te.LayerNorm if kind == "layer_norm" else te.RMSNorm
            made[columns] = norm(columns, eps=1e-5, device=input.device, dtype=input.dtype)
        found: torch.Tensor = torch.func.functional_call(made[columns], parameters, (input,))
        return found

    return Program(call)
