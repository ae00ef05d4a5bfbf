"""``fully_shard``: packed training steps are those of one process, whatever is sharded."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tests.distributed.ranks import RankError, Ranks
from tests.distributed.steps import (
    TINY,
    Case,
    Tensors,
    joined,
    judge,
    part,
    reset_parameters,
    step,
    unread,
    whole,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import fusedformer
from fusedformer import backend

PLAIN = Case()
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def shard(model: Any, mesh: DeviceMesh, **settings: Any) -> None:
    """Each layer, and what is left."""
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **settings)
    fully_shard(model, mesh=mesh, **settings)


def trained(mesh: DeviceMesh, case: Case, name: Any, how: str) -> Tensors:
    """A step of one rank on its part of the batch."""
    model: Any = case.model(nn if how in ("fuse", "stock") else fusedformer.nn)
    model.load_state_dict(case.weights())
    if how == "fuse":
        assert fusedformer.fuse(model)
    inputs = part(case.batch(), mesh.get_local_rank(), mesh.size())
    if how in ("hook", "child"):
        if how == "hook":
            shapes: list[Any] = []
            model.layers[0].register_forward_hook(lambda *seen: shapes.append(seen[2].shape))
        else:
            fully_shard(model.layers[0].linear1, mesh=mesh)
    elif how != "stock":
        inputs = unread(inputs)
    settings: dict[str, Any] = {}
    if how in ("bfloat16", "stock"):
        settings["mp_policy"] = BFLOAT16
    if how == "keep":
        settings["reshard_after_forward"] = False
    shard(model, mesh, **settings)
    with backend(name):
        result = step(model, inputs, times=mesh.size(), whole=whole)
    assert how != "hook" or shapes == [inputs["src"].shape]
    return result


@pytest.mark.parametrize(
    ("size", "case", "name", "how"),
    [
        (4, PLAIN, "torch", ""),
        (2, PLAIN._replace(norm_first=True), "torch", "keep"),
        (2, TINY._replace(norm_first=True), "triton", ""),
        (2, PLAIN._replace(norm_first=True), "torch", "fuse"),
        (2, PLAIN._replace(padding=False), "torch", ""),
        (2, PLAIN._replace(stack="decoder"), "torch", ""),
        (2, PLAIN._replace(stack="decoder", norm_first=True), "torch", ""),
        (2, PLAIN, "torch", "hook"),
        (2, PLAIN, "torch", "child"),
    ],
    ids=[
        "4 ranks", "pre", "kernels", "fused", "whole", "decoder", "pre decoder",
        "with a hook, which sees the batch", "with a sharded child",
    ],
)  # fmt: skip
def test_a_step(ranks: Ranks, size: int, case: Case, name: Any, how: str) -> None:
    judge(case, lambda drawn: joined(ranks.run(trained, drawn, name, how, size=size)))


@pytest.mark.parametrize(
    ("case", "name"),
    [(PLAIN._replace(norm_first=True, layers=1), "torch"), (TINY, "triton"),
     (PLAIN._replace(stack="decoder", layers=1), "torch")],
    ids=["encoder", "kernels", "decoder"],
)  # fmt: skip
def test_parameters_in_bfloat16_and_gradients_in_float32(
    ranks: Ranks, case: Case, name: Any
) -> None:
    """Beside torch's modules under the same policy; the step that follows is in float32."""

    def run(drawn: Case, how: str) -> list[Tensors]:
        results = joined(ranks.run(trained, drawn, name, how, size=2))
        assert results[0]["grad of layers.0.linear1.bias"].dtype == torch.float32
        kept = "output", "grad"
        return [{n: t for n, t in one.items() if n.startswith(kept)} for one in results]

    judge(case, lambda drawn: run(drawn, "bfloat16"), lambda drawn: run(drawn, "stock")[0])


def initialized(mesh: DeviceMesh, case: Case) -> tuple[Tensors, Tensors]:
    """What a model that was made on "meta" is like before and after it gets its weights."""
    model = case.model(device="meta")
    shard(model, mesh)
    model.to_empty(device="cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "DTensor random operators")
        reset_parameters(model)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    before: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    weights: dict[str, Any] = {**case.weights()} if mesh.get_local_rank() == 0 else {}
    set_model_state_dict(model, weights, options=options)
    inputs = part(unread(case.batch()), mesh.get_local_rank(), mesh.size())
    with backend("torch"):
        return before, step(model, inputs, times=mesh.size(), whole=whole)


def is_constant(tensor: Tensor) -> bool:
    return bool((tensor == tensor.flatten()[0]).all())


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_model_made_on_meta(ranks: Ranks, stack: str) -> None:
    """Memory of ``to_empty`` is NaN here: all of it is initialized, as the constructor does."""
    case = PLAIN._replace(stack=stack, norm_first=True)
    answers = ranks.run(initialized, case)
    (before, _), made = answers[0], case.model().state_dict()
    assert list(before) == list(made)
    for name, tensor in before.items():
        assert tensor.isfinite().all(), name
        assert is_constant(tensor) == is_constant(made[name]), name
        assert 0.5 < (1 + tensor.std()) / (1 + made[name].std()) < 2.0
    judge(case, lambda drawn: joined([step for _, step in ranks.run(initialized, drawn)]))


def fused_too_late(mesh: DeviceMesh) -> None:
    model = PLAIN.model(nn)
    shard(model, mesh)
    fusedformer.fuse(model)


def test_fuse_comes_before(ranks: Ranks) -> None:
    with pytest.raises(RankError, match="ValueError: fuse\\(\\): 'model' is sharded by FSDP"):
        ranks.run(fused_too_late, size=2)


def packed_bert(mesh: DeviceMesh) -> tuple[Tensor, Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    model = transformers.BertModel(config).eval()
    fusedformer.fuse(model)
    ids, keep = torch.randint(0, 40, (2, 6)), (torch.arange(6) < torch.tensor([[6], [3]])).long()
    with backend("torch"), torch.no_grad():
        want = model(ids, attention_mask=keep).last_hidden_state
        for layer in model.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return want, model(ids, attention_mask=keep).last_hidden_state


def test_a_fused_hugging_face_bert_is_packed(ranks: Ranks) -> None:
    """One rank has all that changes the modules, and is the only one that imports transformers."""
    pytest.importorskip("transformers")
    want, got = ranks.run(packed_bert, size=1)[0]
    assert torch.equal(got, want)
    assert not got[1, 3:].any()  # what is padded is 0, where it is not computed
    assert got[1, :3].all()
