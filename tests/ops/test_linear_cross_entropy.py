"""linear_cross_entropy against its definition: gradients, chunks, memory, what is computed."""

import importlib
from typing import Any

import pytest
import torch
from tests.ops.judge import DTYPES, grad
from torch import Tensor

from fusedformer import backend, reference
from fusedformer import functional as F
from fusedformer.ops import logit_chunks
from fusedformer.testing import assert_function_parity
from fusedformer.tools.measure import peak_memory
from fusedformer_kernels.runtime.launch import recorded_launches

op = importlib.import_module("fusedformer.ops.linear_cross_entropy")  # not the function
BACKENDS = pytest.mark.parametrize("name", ["triton", "torch"])


def naive(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    rows = torch.nn.functional.linear(input, linear_weight, linear_bias).flatten(0, -2)
    target = target.flatten(0, input.dim() - 2)
    loss = torch.nn.functional.cross_entropy(rows, target, **settings)
    return loss.reshape(input.shape[:-1]) if settings.get("reduction") == "none" else loss


def judge(dtype: torch.dtype, static_shapes: bool = False, **inputs: Any) -> None:
    def ours(**given: Any) -> Tensor:
        return F.linear_cross_entropy(**given, static_shapes=static_shapes)

    assert_function_parity(ours, naive, reference.linear_cross_entropy, inputs, dtype=dtype)


def tensors(
    rows: int, classes: int, features: int, device: str, *, kept: float = 0.7
) -> dict[str, Any]:
    target = torch.randint(classes, (rows,), device=device)
    target[torch.rand(rows, device=device) >= kept] = -100
    return dict(
        input=grad(rows, features, device=device), target=target,
        linear_weight=grad(classes, features, device=device),
        linear_bias=grad(classes, device=device),
    )  # fmt: skip


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make tiny cases take several chunks; blocks of classes have at least 64."""
    monkeypatch.setattr(logit_chunks, "_FEWEST_ROWS", 4)


REGIMES = {
    "few rows": (6, 70, 24),  # one chunk in half precision
    "between": (40, 200, 16),  # the backward computes again in bfloat16
    "many rows": (90, 150, 8),  # a float32 sum over chunks
}


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.usefixtures("small_chunks")
def test_regimes(regime: str, reduction: str, dtype: torch.dtype, name: Any, device: str) -> None:
    with backend(name):
        judge(dtype, **tensors(*REGIMES[regime], device), reduction=reduction)


@BACKENDS
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.usefixtures("small_chunks")
def test_settings(smoothing: float, static: bool, reduction: str, name: Any, device: str) -> None:
    given = tensors(90, 150, 8, device)
    given["linear_bias"] = None
    given["weight"] = torch.rand(150, device=device)
    given["target"][given["target"] == -100] = 7
    settings = dict(ignore_index=7, label_smoothing=smoothing, reduction=reduction)
    with backend(name):
        judge(torch.bfloat16, static, **given, **settings)
        judge(torch.float32, static, **given, **settings)


SHAPES: dict[str, tuple[int, ...]] = {
    "one row": (), "batch": (3, 5), "no row": (0,), "three dimensions": (2, 1, 4),
}  # fmt: skip


@BACKENDS
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, reduction: str, name: Any, device: str) -> None:
    positions = SHAPES[shape]
    given: dict[str, Any] = dict(
        input=grad(*positions, 8, device=device), linear_weight=grad(20, 8, device=device),
        target=torch.randint(20, positions, device=device), reduction=reduction,
    )  # fmt: skip

    def truth(**inputs: Any) -> Tensor:
        return reference.linear_cross_entropy(**inputs)

    with backend(name):
        assert_function_parity(F.linear_cross_entropy, truth, truth, given, dtype=torch.float32)


@BACKENDS
def test_probabilities(name: Any, device: str) -> None:
    given = tensors(6, 20, 8, device)
    given["target"] = torch.rand(6, 20, device=device)
    with backend(name):
        judge(torch.float32, **given, reduction="none")


@BACKENDS
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), ()], ids=str)
def test_frozen_parts(wanted: tuple[int, ...], reduction: str, name: Any, device: str) -> None:
    """Each gradient is right alone, and no product is done for one that isn't wanted."""
    given = tensors(30, 70, 8, device, kept=1.0)
    leaves = [given[n] for n in ("input", "linear_weight", "linear_bias")]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in wanted)
    with backend(name):
        judge(torch.float32, **given, reduction=reduction)

        def step() -> None:
            loss = F.linear_cross_entropy(**given, reduction="mean")
            if wanted:
                torch.autograd.grad(loss, [leaves[i] for i in wanted])

        assert len(products(step)) == 1 + (0 in wanted) + (1 in wanted)


def products(call: Any) -> list[int]:
    """The rows of the first operand of every matrix product of ``call``."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        call()
    firsts = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}
    events = [e for e in profile.events() or [] if e.name in firsts]
    return [e.input_shapes[firsts[e.name]][0] for e in events]


@BACKENDS
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("static", [False, True], ids=["dropped", "static"])
def test_ignored_rows_are_dropped_before_any_product(
    static: bool, reduction: str, name: Any, device: str
) -> None:
    given = tensors(60, 70, 8, device, kept=0.2)
    kept = int((given["target"] != -100).sum())
    given["input"].data[given["target"] == -100] = 0.0 if static else float("nan")

    def step() -> None:
        loss = F.linear_cross_entropy(**given, reduction=reduction, static_shapes=static)
        grads = torch.autograd.grad(loss.sum(), [given["input"], given["linear_weight"]])
        assert all(t.isfinite().all() for t in (loss, *grads))

    with backend(name):
        rows = products(step)
    classes = {70, 64, 6}  # whose gradient has them as rows; by blocks if it is computed again
    assert 0 < kept < 30 and set(rows) - classes == {60 if static else kept}


@BACKENDS
def test_a_graph_that_is_kept_gives_the_same_gradients_twice(name: Any, device: str) -> None:
    given = tensors(30, 70, 8, device)
    leaves = [given[n] for n in ("input", "linear_weight", "linear_bias")]
    scale = torch.tensor(3.0, device=device)
    with backend(name):
        loss = F.linear_cross_entropy(**given)
        first = torch.autograd.grad(loss, leaves, scale, retain_graph=True)
        second = torch.autograd.grad(loss, leaves, scale)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, leaves, scale)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_of_the_torch_backend_agree_with_its_differentiable_ones(
    create_graph: bool, device: str
) -> None:
    given = tensors(30, 70, 8, device)
    leaf = given["input"]
    with backend("torch"):
        (found,) = torch.autograd.grad(
            F.linear_cross_entropy(**given), leaf, create_graph=create_graph
        )
        (want,) = torch.autograd.grad(naive(**given), leaf, create_graph=True)
    torch.testing.assert_close(found, want)
    if create_graph:
        torch.testing.assert_close(
            *(torch.autograd.grad(g.square().sum(), leaf)[0] for g in (found, want))
        )


@BACKENDS
@pytest.mark.usefixtures("small_chunks")
def test_autocast(name: Any, device: str) -> None:
    """Products in bfloat16; the gradient of a float32 weight is never rounded to it."""
    given = tensors(90, 150, 8, device)
    leaves = [given[n] for n in ("input", "linear_weight", "linear_bias")]
    with torch.autocast(device, torch.bfloat16):
        want = torch.autograd.grad(naive(**given), leaves)
        with backend(name):
            loss = F.linear_cross_entropy(**given)
        found = torch.autograd.grad(loss, leaves)
    truth = torch.autograd.grad(
        reference.linear_cross_entropy(**{
            n: t.double() if t.is_floating_point() else t for n, t in given.items()
        }), leaves,
    )  # fmt: skip
    assert loss.dtype == torch.float32 and {g.dtype for g in found} == {torch.float32}
    assert (found[1] != found[1].bfloat16()).any()
    for ours, stock, true in zip(found, want, truth, strict=True):
        assert (ours - true).abs().max() <= 2 * (stock - true).abs().max()


@BACKENDS
def test_the_sum_over_chunks_is_kept_in_float32(
    name: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many chunks of the same sign: a sum in bfloat16 would stand still."""
    monkeypatch.setattr(op, "rows_at_once", lambda *sizes: 4)
    given: dict[str, Any] = dict(
        input=torch.ones(400, 4, device=device), target=torch.zeros(400, dtype=torch.int64),
        linear_weight=torch.zeros(3, 4, device=device).requires_grad_(), reduction="sum",
    )  # fmt: skip
    given["target"] = given["target"].to(device)
    with backend(name):
        judge(torch.bfloat16, **given)


@BACKENDS
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(1024, 600, 64), (768, 2000, 48)], ids=str)
def test_peak_memory_is_a_third_of_the_naive_form_at_most(
    size: tuple[int, int, int], dtype: torch.dtype, reduction: str, name: Any, device: str
) -> None:
    given = {
        key: value.detach().to(dtype).requires_grad_() if value.is_floating_point() else value
        for key, value in tensors(*size, device, kept=1.0).items()
    }
    leaves = [given[n] for n in ("input", "linear_weight", "linear_bias")]

    def peak(function: Any) -> int:
        grad = torch.randn(size[0] if reduction == "none" else (), device=device).to(dtype)

        def step() -> object:
            return torch.autograd.grad(function(**given, reduction=reduction), leaves, grad)

        if device != "cpu":
            step()  # after which cuBLAS has the workspaces that it keeps
        return peak_memory(step, torch.device(device))

    with backend(name), recorded_launches(run=device != "cpu"):
        assert peak(F.linear_cross_entropy) <= peak(naive) / 3


def test_sizes_of_chunks() -> None:
    half, full = torch.bfloat16, torch.float32
    assert logit_chunks.rows_at_once(8192, 50257, 768, half, "cuda", False) == 2048
    assert logit_chunks.rows_at_once(8192, 50257, 768, half, "cuda", True) == 1024
    assert logit_chunks.rows_at_once(2458, 30522, 768, full, "cpu", True) == 274  # 32 MiB
    assert logit_chunks.rows_at_once(500, 128256, 4096, half, "cuda", False) == 500
    block = logit_chunks.classes_at_once(8192, 128256, half, "cuda", False)
    assert block * 8192 * 2 <= 2**30 // 2
    assert logit_chunks.gradients_in_forward(8192, 768, half, "mean")
    assert not logit_chunks.gradients_in_forward(8192, 4096, half, "mean")
    assert logit_chunks.gradients_in_forward(8192, 4096, full, "sum")
    assert not logit_chunks.gradients_in_forward(8192, 768, torch.float16, "mean")
    assert not logit_chunks.gradients_in_forward(8192, 768, full, "none")


def test_float16_gradients_survive_where_a_loss_scale_is_what_keeps_them(device: str) -> None:
    given = tensors(60, 70, 8, device, kept=1.0)
    leaf = given["input"] = given["input"].detach().half().requires_grad_()
    given["linear_weight"] = (2e-5 * given["linear_weight"]).half()
    given["linear_bias"] = None
    scale = torch.tensor(65504.0, device=device).half()
    (found,) = torch.autograd.grad(F.linear_cross_entropy(**given), leaf, scale)
    (want,) = torch.autograd.grad(naive(**given), leaf, scale)
    assert found.isfinite().all()
    torch.testing.assert_close(found, want, rtol=0.05, atol=float(want.abs().max()) / 100)
