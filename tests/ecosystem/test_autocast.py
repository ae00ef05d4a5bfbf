"""torch.autocast and GradScaler: dtypes are torch's own, values as near the truth as stock's.

CUDA's rules are looked at without a GPU in two ways: on fake CUDA tensors, where torch's real rules
apply and nothing is computed; and on CPU tensors, once CPU's autocast is given CUDA's rules.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from tests.conftest import HAS_GPU, INTERPRETED
from tests.ecosystem.autocast_cases import (
    BF16,
    F16,
    F32,
    F64,
    FUNCTIONS,
    VALUES,
    WIDENED,
    WITHOUT,
    D,
    Given,
    H,
    N,
    S,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fusedformer
from fusedformer import backend, nn, parity
from fusedformer import functional as F
from fusedformer._internal import autocast as _autocast
from fusedformer.testing import assert_function_parity, compare_tensors


@contextlib.contextmanager
def cast_to(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast, also of a device that is not there, which ``torch.autocast`` would turn off."""
    if dtype is None:
        yield
        return
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
        torch.clear_autocast_cache()


def dtypes_of(function: Callable[[Given], Any], given: Given, refusal: Any) -> Any:
    """Those of the results, or that they are refused with this error."""
    try:
        found = function(given)
    except refusal:
        return "refused"
    return [t.dtype for t in (found if isinstance(found, tuple) else (found,))]


def check_dtypes(name: str, device: str, dtypes: Any, kinds: Any) -> None:
    ours, torchs = FUNCTIONS[name]
    refusals: Any = (TypeError, RuntimeError) if "mixed" in name else ((), ())
    for dtype in dtypes:
        for kind in kinds:
            given = Given(device, kind)
            with cast_to(device, dtype):
                found, expected = map(dtypes_of, (ours, torchs), (given, given), refusals)
            assert found == expected, (dtype, kind)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_dtypes_on_the_cpu(name: str) -> None:
    with backend("torch"):
        check_dtypes(name, "cpu", (None, BF16, F16), (BF16, F16, F32, F64))
    if INTERPRETED:
        with backend("triton"):
            check_dtypes(name, "cpu", (BF16,), (BF16, F32))


# Packed rows are taken by indices, which a build without CUDA does not do on its tensors.
FAKE = FUNCTIONS if HAS_GPU else [name for name in FUNCTIONS if "packed" not in name]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", FAKE)
def test_dtypes_on_cuda(name: str) -> None:
    """By torch's rules for CUDA; without a GPU on tensors that have no memory."""
    with contextlib.nullcontext() if HAS_GPU else FakeTensorMode(), torch.no_grad():
        check_dtypes(name, "cuda", (None, BF16, F16), (BF16, F16, F32))


@pytest.mark.parametrize("op", WIDENED)
def test_the_rules_are_those_of_the_torch_that_is_installed(op: Any) -> None:
    with FakeTensorMode():
        x = torch.empty(3, 4, dtype=BF16, device="cuda")
        other = torch.empty(3, 4, dtype=F64, device="cuda")
        with cast_to("cuda", F16):
            expected = getattr(torch, op)(x, [4] if "norm" in op else -1).dtype
            assert (_autocast.autocast_dtype(op, x) or x.dtype) == expected
            assert _autocast.autocast_dtype("linear", x) == F16
            assert _autocast.autocast_dtype(op, x, other) is None
        assert _autocast.autocast_dtype("linear", x) is None


def test_what_autocast_cannot_cast_is_refused() -> None:
    query, wide = torch.randn(N, H, S, D), torch.randn(N, H, S, D, dtype=F64)
    norm, layer = nn.LayerNorm(D), nn.TransformerEncoderLayer(D, H, 24)
    with torch.autocast("cpu", BF16):
        with pytest.raises(TypeError, match="'query', 'key' and 'value' to have the same dtype"):
            F.scaled_dot_product_attention(query, wide, wide)
        for src in (wide[0], query[0].int()):
            with pytest.raises(TypeError, match="'src' to have the dtype of the parameters"):
                layer(src)
        with pytest.raises(TypeError, match="'input' must be Tensor"):
            F.layer_norm(None, (D,))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="'query' must be Tensor"):
            F.scaled_dot_product_attention(None, query, query)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="'src' to have the dtype of the parameters"):
        layer(query[0].to(BF16))
    assert norm(query.to(BF16)).dtype == BF16


# Values. Without a GPU CPU's autocast takes on CUDA's rules, for stock torch and for this library.


@pytest.fixture
def cuda_rules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if HAS_GPU:
        yield
        return
    library = torch.library.Library("aten", "IMPL")

    def wide(value: Any) -> Any:
        return _autocast.cast(value, F32)

    def widened(name: str) -> Callable[..., Tensor]:
        def run(input: Tensor, where: Any, *others: Any) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                if "softmax" in name:
                    dtype = (others[0] if others else None) or wide(input).dtype
                    return getattr(torch, name)(input, where, dtype=dtype)
                return getattr(torch, name)(wide(input), where, *map(wide, others))

        return run

    for op in WIDENED:
        library.impl(_autocast._OVERLOADS[op], widened(op), "AutocastCPU")
    rules = _autocast._RULES | {(op, "cpu") for op in WIDENED}
    monkeypatch.setattr(_autocast, "_RULES", rules)
    yield
    library._destroy()


def on(device: str, inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: t.detach().to(device).requires_grad_(t.requires_grad) for k, t in inputs.items()}


def under(dtype: torch.dtype, device: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(**inputs: Any) -> Any:
        with torch.autocast(device, dtype):
            return function(**inputs)

    return run


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("case", VALUES)
def test_values_under_the_rules_of_cuda(
    case: str, name: Any, device: str, cuda_rules: None
) -> None:
    candidate, stock, make = VALUES[case]
    inputs = on(device, make())
    with backend(name):
        ours, torchs = (under(BF16, device, call) for call in (candidate, stock))
        assert_function_parity(ours, torchs, stock, inputs)


@pytest.mark.parametrize("op", WIDENED)
def test_a_call_remembers_nothing_of_autocast(op: Any, device: str, cuda_rules: None) -> None:
    """Checks are remembered by the kinds of arguments; what autocast says is not among them."""
    x = torch.randn(3, 11, device=device, dtype=BF16)
    for enabled in (True, False, True):
        with torch.autocast(device, BF16, enabled=enabled), backend("torch"):
            found, expected = (
                getattr(library, op)(x, (11,) if "norm" in op else -1) for library in (F, TF)
            )
        assert found.dtype == expected.dtype


@pytest.mark.parametrize("name", [pytest.param("triton", marks=pytest.mark.interpreter), "torch"])
def test_cpu_autocast_rounds_no_scores(name: Any) -> None:
    """The log-sum-exp and a cap are computed in float32, of rounded query and key."""
    q, k, v = (torch.randn(1, H, S, D).mul(3).to(BF16) for _ in range(3))
    settings: dict[str, Any] = {"softcap": 2.0, "return_lse": True, "return_weights": "averaged"}
    with backend(name):
        expected = F.scaled_dot_product_attention(q, k, v, **settings)
        with torch.autocast("cpu", BF16):
            found = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **settings)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [t.dtype for t in found] == [BF16, F32, BF16]


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("case", WITHOUT)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_float32_weights_and_bfloat16_activations(case: str, name: Any, device: str) -> None:
    candidate, stock, make = WITHOUT[case]
    inputs = on(device, make())
    with backend(name):
        compared = assert_function_parity(candidate, stock, stock, inputs)
    assert compared[0].dtype == "bfloat16"


# Modules


def encoder_layer(library: Any, norm_first: bool) -> Any:
    return library.TransformerEncoderLayer(
        D, H, 24, 0.0, "gelu", norm_first=norm_first, batch_first=True
    )


def decoder_layer(library: Any, norm_first: bool) -> Any:
    return library.TransformerDecoderLayer(D, H, 24, 0.0, norm_first=norm_first, batch_first=True)


MODULES: dict[str, tuple[Callable[[Any], Any], Callable[[Tensor], dict[str, Any]]]] = {
    "LayerNorm": (lambda library: library.LayerNorm(D), lambda x: dict(input=x)),
    "attention": (
        lambda library: library.MultiheadAttention(D, H, batch_first=True),
        lambda x: dict(query=x, key=x, value=x, need_weights=False),
    ),
    "attention, weights": (
        lambda library: library.MultiheadAttention(D, H, batch_first=True),
        lambda x: dict(query=x, key=x.flip(1), value=x, need_weights=True),
    ),
    "encoder": (
        lambda library: library.TransformerEncoder(encoder_layer(library, False), 2),
        lambda x: dict(src=x, src_key_padding_mask=padding(x)),
    ),
    "encoder, pre-norm": (
        lambda library: library.TransformerEncoder(
            encoder_layer(library, True), 1, library.LayerNorm(D)
        ),
        lambda x: dict(src=x, src_key_padding_mask=padding(x)),
    ),
    "encoder, padded": (
        lambda library: library.TransformerEncoder(encoder_layer(library, True), 1),
        lambda x: dict(src=x, mask=x[0, :, :S].detach().float()),
    ),
    "decoder": (
        lambda library: library.TransformerDecoder(decoder_layer(library, False), 1),
        lambda x: dict(tgt=x, memory=x.flip(1), memory_key_padding_mask=padding(x)),
    ),
    "decoder, pre-norm": (
        lambda library: library.TransformerDecoder(decoder_layer(library, True), 1),
        lambda x: dict(tgt=x, memory=x.flip(1), memory_key_padding_mask=padding(x)),
    ),
}  # fmt: skip


def padding(x: Tensor) -> Tensor:
    return torch.arange(S, device=x.device) >= torch.tensor([[S], [3]], device=x.device)


def module_pair(case: str, device: str) -> tuple[Any, Any]:
    stock = MODULES[case][0](torch.nn).to(device)
    ours = MODULES[case][0](nn).to(device)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def module_parity(case: str, device: str) -> None:
    ours, stock = module_pair(case, device)
    given = MODULES[case][1](torch.randn(N, S, D, device=device))
    given = {
        k: v.detach().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in given.items()
    }
    where = ~padding(torch.empty(0, device=device)) if "src_key_padding_mask" in given else None
    with torch.autocast(device, BF16):
        report = parity.compare(ours, stock, given, where=where, each_submodule=False, draws=4)
    assert report.passed, report


ON_KERNELS = ("attention, weights", "encoder, pre-norm", "decoder")


@pytest.mark.parametrize(
    ("case", "name"),
    [*((case, "torch") for case in MODULES), *((case, "triton") for case in ON_KERNELS)],
)
def test_modules_under_the_rules_of_cuda(
    case: str, name: Any, device: str, cuda_rules: None
) -> None:
    with backend(name):
        module_parity(case, device)


@pytest.mark.parametrize("case", MODULES)
def test_modules_on_the_cpu(case: str) -> None:
    with backend("torch"):
        module_parity(case, "cpu")


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("rules", ["of CUDA", "of CPU"])
@pytest.mark.parametrize("case", MODULES)
def test_dtypes_of_modules(case: str, rules: str, request: pytest.FixtureRequest) -> None:
    """Of results and gradients, for both dtypes of an input."""
    if rules == "of CUDA":
        request.getfixturevalue("cuda_rules")
    device = "cuda" if HAS_GPU and rules == "of CUDA" else "cpu"
    ours, stock = module_pair(case, device)
    for dtype in (BF16, F32):
        x = torch.randn(N, S, D, device=device, dtype=dtype, requires_grad=True)
        results = []
        with torch.autocast(device, BF16), backend("torch" if device == "cpu" else "triton"):
            for module in (ours, stock):
                found = module(**MODULES[case][1](x))
                outputs = found if isinstance(found, tuple) else (found,)
                outputs = tuple(t for t in outputs if t is not None)
                grads = torch.autograd.grad(outputs[0].sum(), [x, *module.parameters()])
                results.append([t.dtype for t in (*outputs, *grads)])
        assert results[0] == results[1], dtype


class Copies(TorchDispatchMode):
    """Counts casts to float32."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.count += func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == F32
        return func(*args, **kwargs)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_no_product_is_copied_to_float32(norm_first: bool, device: str, cuda_rules: None) -> None:
    layer = encoder_layer(nn, norm_first).to(device)
    src = torch.randn(N, S, D, device=device)
    with torch.no_grad(), torch.autocast(device, BF16), backend("triton"), Copies() as copies:
        assert layer(src).dtype == F32
        F.layer_norm(src.to(BF16), (D,), layer.norm1.weight)
        F.softmax(src.to(BF16), -1)
    assert copies.count == 0


def test_a_fused_hugging_face_bert() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    stock = transformers.BertModel(config, add_pooling_layer=False)
    ours = copy.deepcopy(stock)
    fusedformer.fuse(ours)
    ids, real = torch.randint(0, 40, (N, S)), ~padding(torch.empty(0))
    with backend("torch"), torch.autocast("cpu", BF16):
        report = parity.compare(
            ours,
            stock,
            {"input_ids": ids, "attention_mask": real.long()},
            where=real,
            each_submodule=False,
        )
    assert report.passed, report


@pytest.mark.parametrize("inside", [False, True], ids=["backward", "forward"])
def test_a_backward_under_another_autocast_than_its_forward(inside: bool) -> None:
    """Gradients are computed in the dtypes of the forward."""
    layer, src = encoder_layer(nn, False), torch.randn(N, S, D)
    dy, found = torch.randn(N, S, D), []
    for outside in (inside, not inside):
        with backend("torch"):
            with torch.autocast("cpu", BF16, enabled=inside):
                output = layer(src)
            with torch.autocast("cpu", BF16, enabled=outside):
                found.append(torch.autograd.grad(output, list(layer.parameters()), dy))
    assert all(torch.equal(same, other) for same, other in zip(*found, strict=True))


# torch.compile


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("layer_norm", "triton"),
        ("float32 residual", "torch"),
        ("float32 residual", "triton"),
        ("attention, mixed", "triton"),
    ],
)
def test_compiled_functions(case: str, name: Any, device: str, cuda_rules: None) -> None:
    """Without a graph break, with autocast outside and inside, and with eager's bits.

    The eager norms of the torch backend are C++, which rounds otherwise than ATen.
    """
    torch._dynamo.reset()
    candidate, _, make = VALUES[case]
    inputs = on(device, make())

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    calls = [
        under(BF16, device, candidate),
        under(BF16, device, compiled(candidate)),
        compiled(under(BF16, device, candidate)),
    ]
    results = []
    with backend(name):
        for call in calls:
            output = call(**inputs)
            outputs = output if isinstance(output, tuple) else (output,)
            learned = [t for t in inputs.values() if t.requires_grad]
            grads = torch.autograd.grad(outputs, learned, [torch.ones_like(o) for o in outputs])
            results.append([*outputs, *grads])
    for eager, *traced in zip(*results, strict=True):
        assert all(t.dtype == eager.dtype for t in traced)
        if name == "torch" and case == "float32 residual":
            torch.testing.assert_close(traced, [eager] * 2)
        else:
            assert all(torch.equal(t, eager) for t in traced)


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_a_compiled_encoder(name: Any, device: str, cuda_rules: None) -> None:
    """As near the truth as it is without a compiler."""
    torch._dynamo.reset()
    eager, _ = module_pair("encoder, pre-norm", device)
    compiled, exact = copy.deepcopy(eager), copy.deepcopy(eager).double()
    compiled.compile(fullgraph=True, backend="aot_eager")
    results = []
    for module in (compiled, eager, exact):
        wide = F64 if module is exact else F32
        generator = torch.Generator(device).manual_seed(7)
        src, dy = (
            torch.randn(N, S, D, generator=generator, device=device).to(wide) for _ in range(2)
        )
        on_backend = backend("torch") if module is exact else backend(name)
        with on_backend, torch.autocast(device, BF16):
            output = module(src, src_key_padding_mask=padding(src))
        results.append([output, *torch.autograd.grad(output, list(module.parameters()), dy)])
    assert {t.dtype for t in results[0]} == {F32}
    for number, three in enumerate(zip(*results, strict=True)):
        judged = compare_tensors(str(number), *three)
        assert judged.passed, judged.fault


# GradScaler


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_grad_scaler(dtype: torch.dtype, device: str) -> None:
    layer = nn.TransformerEncoderLayer(D, H, 24, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).to(device)
    src = torch.randn(N, S, D, device=device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**7)
    parameters = list(model.parameters())

    def loss(model: Any, src: Tensor, name: Any) -> Tensor:
        with torch.autocast(device, dtype), backend(name):
            return TF.mse_loss(model(src, src_key_padding_mask=padding(src)), src)

    name = "triton" if HAS_GPU else "torch"
    exact = copy.deepcopy(model).double()
    truth = torch.autograd.grad(loss(exact, src.double(), "torch"), list(exact.parameters()))
    plain = torch.autograd.grad(loss(model, src, name), parameters)
    scaler.scale(loss(model, src, name)).backward()
    scaler.unscale_(optimizer)
    for parameter, *others in zip(parameters, plain, truth, strict=True):
        assert parameter.grad is not None and parameter.grad.dtype == F32
        judged = compare_tensors("unscaled", parameter.grad, *others)
        assert judged.passed, judged.fault
    expected = [p.detach() - 0.1 * p.grad for p in parameters if p.grad is not None]
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.allclose(p, e) for p, e in zip(parameters, expected, strict=True))

    optimizer.zero_grad()
    before = [p.detach().clone() for p in parameters]
    (scaler.scale(loss(model, src, name)) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert scaler.get_scale() == 2.0**6
