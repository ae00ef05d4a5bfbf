"""Nothing on the way of a CUDA graph's capture asks for numbers or brings some from the host.

That shows without a GPU; ``test_cuda_graphs.py`` captures on one.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.ecosystem.graph_cases import (
    CASES,
    D,
    H,
    S,
    bert,
    encoder,
    inputs_of,
    padding_of,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedformer
from fusedformer import backend
from fusedformer import functional as F
from fusedformer._internal import attention_checks
from fusedformer.functional import _cross_entropy, _embedding
from fusedformer.parity.cases import Case
from fusedformer_kernels.attention import schedule as attention_schedule
from fusedformer_kernels.runtime.launch import recorded_launches


@pytest.fixture(autouse=True)
def _poisoned() -> None:
    """Not here: torch's deterministic mode takes other algorithms than serving does."""


class NoDataDependence(TorchDispatchMode):
    """Raises for operators that wait for the device, or bring numbers from the host.

    It sees what the library calls, not what is called within a registered op.
    """

    NAMES = (
        "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2",
        "unique_dim", "unique_consecutive", "lift_fresh",
    )  # fmt: skip

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        counted = name == "repeat_interleave" and func._overloadname == "Tensor"
        if name in self.NAMES or by_mask or counted:
            raise AssertionError(f"{name} cannot be captured")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_host_reads() -> Iterator[None]:
    """Raises where numbers become Python's, in launchers too; on the CPU that is no operator."""

    def read(self: Tensor, *args: Any) -> None:
        raise AssertionError("what is read on the host cannot be captured")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, read)
        yield


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that are looked at on the CPU alone, or not during a capture, are not."""
    monkeypatch.setattr(_embedding, "_check_range", lambda *args: None)
    monkeypatch.setattr(_cross_entropy, "_check_range", lambda *args: None)
    loss = sys.modules["fusedformer.ops.linear_cross_entropy"]
    monkeypatch.setattr(loss, "_rows_not_ignored", lambda *args: None)
    monkeypatch.setattr(attention_checks, "_check_starts", lambda *args: None)


@pytest.mark.interpreter  # elsewhere captures themselves are tested
@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.quick], ids=lambda c: f"{c.op.name} {c.name}"
)
def test_no_op_reads_on_the_host(case: Case) -> None:
    given = inputs_of(case, "cpu", 1)
    leaves = [t.requires_grad_() for t in given.values() if t.is_floating_point()]
    with backend("triton"), no_host_reads(), NoDataDependence():
        found = case.op.candidate(**given, **case.settings)
        outputs = [found] if isinstance(found, Tensor) else list(found)
        learned = [output for output in outputs if output.requires_grad]
        torch.autograd.grad(learned, leaves, list(map(torch.randn_like, learned)))


def hugging_face() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=D,
        num_hidden_layers=1,
        num_attention_heads=H,
        intermediate_size=24,
        max_position_embeddings=S,
    )
    model: Any = transformers.BertModel(config, add_pooling_layer=False)
    fusedformer.fuse(model)
    model.encoder.static_shapes = True
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "encoder": lambda: encoder(0.1),
    "pre-norm encoder": lambda: encoder(0.1, norm_first=True),
    "BERT": lambda: bert(0.1),
    "Hugging Face's BERT, fused": hugging_face,
}


def arguments(name: str) -> dict[str, Tensor]:
    """Half of one sequence is padding."""
    padding = padding_of([S, 3], "cpu")
    if "encoder" in name:
        return {"src": torch.randn(2, S, D), "src_key_padding_mask": padding}
    ids = {"input_ids": torch.zeros(2, S, dtype=torch.int64), "attention_mask": (~padding).long()}
    return ids if "Face" in name else {**ids, "output_rows": ids["input_ids"][:, :1]}


@pytest.mark.interpreter  # elsewhere captures themselves are tested
@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("name", MODELS)
def test_no_encoder_with_static_shapes_reads_on_the_host(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusedformer.functional.selection.check_output_rows", lambda *a: None)
    monkeypatch.setattr("fusedformer.models.text.check_output_rows", lambda *a: None)
    module, given = MODELS[name](), arguments(name)
    with backend("triton"):
        with no_host_reads(), NoDataDependence():
            found = module(**given)
            output = found if isinstance(found, Tensor) else found.last_hidden_state
            learned = [p for p in module.parameters() if p.requires_grad]
            torch.autograd.grad(output, learned, torch.randn_like(output), allow_unused=True)
        for part in module.modules():
            if hasattr(part, "static_shapes"):
                part.static_shapes = False
        given.pop("output_rows", None)
        with pytest.raises(AssertionError, match="read on the host"), no_host_reads():
            module(**given)


def test_work_lists_are_not_shared_across_the_border_of_a_graph(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    query = torch.randn(9, H, 8, device=device)
    capturing = False
    monkeypatch.setattr(attention_schedule, "_is_capturing", lambda starts: capturing)

    def lists_made(starts: Tensor) -> int:
        with backend("triton"), recorded_launches(run=True) as launches:
            F.varlen_attention(query, query, query, starts, starts, 6, 6)
        return sum(launch.name == "_list_work" for launch in launches)

    keep = torch.arange(6, device=device) < torch.tensor([[6], [3]], device=device)
    outside = F.Packing.of(keep, [6, 3]).cu_seqlens
    capturing = True
    inside = F.Packing.of(keep, [6, 3]).cu_seqlens
    capturing = False
    assert [lists_made(outside) for _ in range(2)] == [1, 0]
    assert lists_made(inside) == 1  # what a replay wrote last is not for others
    capturing = True
    assert [lists_made(inside) for _ in range(2)] == [1, 0]
    assert [lists_made(outside) for _ in range(2)] == [1, 1]
    capturing = False
    assert [lists_made(inside), lists_made(outside)] == [1, 0]
