"""torch.export and AOTInductor: one program for any batch and length, as close as eager."""

from __future__ import annotations

import copy
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from fusedformer import backend, nn
from fusedformer.models import BertConfig, BertEncoderModel
from fusedformer.testing import compare_tensors

D, H, S = 16, 2, 9
BATCH, LENGTH = Dim("batch", max=64), Dim("length", min=2, max=S)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(D, H, 24, batch_first=True)
    return nn.TransformerEncoder(layer, 1, nn.LayerNorm(D)).eval()


def bert() -> BertEncoderModel:
    return BertEncoderModel(BertConfig(61, D, 1, H, 24, max_position_embeddings=S)).eval()


def source(lengths: list[int]) -> dict[str, Tensor]:
    return {"src": torch.randn(len(lengths), max(lengths), D)}


def padded(lengths: list[int]) -> dict[str, Tensor]:
    padding = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    return {**source(lengths), "src_key_padding_mask": padding}


def ids(lengths: list[int]) -> dict[str, Tensor]:
    keep = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": torch.randint(0, 61, keep.shape), "attention_mask": keep.long()}


Inputs = Callable[[list[int]], dict[str, Tensor]]
CASES: dict[str, tuple[Callable[[], torch.nn.Module], Inputs]] = {
    "encoder": (encoder, source), "encoder, padding": (encoder, padded), "BERT": (bert, ids),
}  # fmt: skip


def exported(module: torch.nn.Module, given: dict[str, Tensor], strict: bool) -> ExportedProgram:
    """For any batch and length."""
    sizes = {name: {0: BATCH, 1: LENGTH} for name in given}
    return torch.export.export(module, (), given, dynamic_shapes=sizes, strict=strict)


def check(program: Any, module: torch.nn.Module, inputs: Inputs) -> None:
    """By the criterion, eager as the yardstick, for sizes that were not exported."""
    truth = copy.deepcopy(module).double()
    for lengths in ([4, 2, 1, 3], [S]):
        given = inputs(lengths)
        wide = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
        with backend("torch"):
            eager, true = module(**given), truth(**wide)
        compared = compare_tensors(f"lengths {lengths}", program(**given), eager, true)
        assert compared.passed, compared.fault


@pytest.mark.parametrize("case", ["encoder, padding", "BERT"])
def test_strict_export(case: str) -> None:
    make, inputs = CASES[case]
    module = make()
    with backend("torch"):
        program = exported(module, inputs([6, 4]), strict=True)
    check(program.module(), module, inputs)


@pytest.mark.parametrize("case", CASES)
def test_exported_programs_are_saved_loaded_and_decomposed(case: str) -> None:
    make, inputs = CASES[case]
    module = make()
    with backend("torch"):
        program = exported(module, inputs([6, 4]), strict=False)
    check(program.module(), module, inputs)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded, given = torch.export.load(file).module(), inputs([5, 3, 1])
    assert torch.equal(loaded(**given), program.module()(**given))
    check(program.run_decompositions().module(), module, inputs)


@pytest.mark.parametrize("case", ["encoder, padding", "BERT"])
def test_kernels_are_nodes_of_an_exported_program(case: str, device: str) -> None:
    make, inputs = CASES[case]
    module = make().to(device)
    on_device: Inputs = lambda lengths: {n: t.to(device) for n, t in inputs(lengths).items()}
    with backend("triton"):
        program = exported(module, on_device([6, 4]), strict=False)
        found = {str(node.target) for node in program.graph.nodes}
        ops = ["gather_rows", "self_attention", "norm", "bias_activation"]
        ops += ["embedding_norm"] if case == "BERT" else []
        assert {f"fusedformer.{op}.default" for op in ops} <= found
        check(program.module(), module, on_device)


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_aot_inductor_compiles_the_encoder(tmp_path: Path) -> None:
    module = encoder()
    with backend("torch"):
        program = exported(module, padded([6, 4]), strict=False)
    quick = {
        "aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False,
    }  # fmt: skip
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "encoder.pt2"), inductor_configs=quick
    )
    check(torch._inductor.aoti_load_package(package), module, padded)


def transformer() -> nn.Transformer:
    return nn.Transformer(D, H, 1, 1, 24, batch_first=True).eval()


def sources_and_targets(lengths: list[int]) -> dict[str, Tensor]:
    given = padded(lengths)
    padding = given["src_key_padding_mask"]
    return {**given, "tgt": torch.randn(len(lengths), 5, D), "memory_key_padding_mask": padding}


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("strict", [False, True])
def test_a_transformer_for_any_batch(strict: bool, name: Any, device: str) -> None:
    """Targets without padding, memory with some."""
    module = transformer().to(device)
    of = lambda lengths: {n: t.to(device) for n, t in sources_and_targets(lengths).items()}
    given = of([6, 4])
    sizes = {key: {0: BATCH} for key in given}
    with backend(name):
        program = torch.export.export(module, (), given, dynamic_shapes=sizes, strict=strict)
        check(program.module(), module, lambda lengths: of([6, *lengths][: len(lengths)]))
