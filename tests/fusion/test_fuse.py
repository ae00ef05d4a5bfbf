"""fuse() on modules of torch: what is replaced, what is left alone and why, and the way back."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedformer
from fusedformer import nn as fused

E, H = 16, 2


class Net(nn.Module):
    """Of everything that is replaced, and of something that is not."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, H, 24, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(E))
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(E, H, 24, 0.0, batch_first=True), 1
        )
        self.attention = nn.MultiheadAttention(E, H, batch_first=True)
        self.norm = nn.RMSNorm(E)
        self.head = nn.Linear(E, 5)
        self.probabilities = nn.Softmax(-1)
        self.tied = self.head.weight

    def forward(self, src: Tensor, padding: Tensor) -> Tensor:
        memory = self.encoder(src, src_key_padding_mask=padding)
        out = self.decoder(src, memory, memory_key_padding_mask=padding)
        out = self.norm(out + self.attention(out, memory, memory, padding)[0])
        found: Tensor = self.probabilities(self.head(out))
        return found


def case() -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(0)
    net = Net()
    return net, torch.randn(3, 6, E), torch.arange(6) >= torch.tensor([[6], [2], [4]])


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def test_everything_is_replaced_and_comes_back() -> None:
    net, src, padding = case()
    before, attributes = classes(net), [dict(m.__dict__) for m in net.modules()]
    state, parameters = net.state_dict(), dict(net.named_parameters())
    real = net(src, padding)[~padding]
    report = fusedformer.fuse(net, strict=True)
    assert {one.path for one in report.replaced} >= {
        "encoder", "encoder.layers.0", "encoder.layers.0.self_attn", "encoder.layers.1.norm2",
        "encoder.norm", "decoder", "decoder.layers.0", "decoder.layers.0.multihead_attn",
        "attention", "norm", "probabilities",
    }  # fmt: skip
    assert isinstance(net.encoder, fused.TransformerEncoder) and net.encoder.packs(src)
    assert isinstance(net.decoder, fused.TransformerDecoder) and net.decoder.packs(src)
    assert torch.allclose(net(src, padding)[~padding], real, atol=1e-5)
    assert net.tied is net.head.weight
    assert all(net.get_parameter(name) is p for name, p in parameters.items())
    assert list(net.state_dict()) == list(state)
    assert fusedformer.unfuse(net) == len(report.replaced)
    assert classes(net) == before
    assert all(a == b for a, b in zip(attributes, [m.__dict__ for m in net.modules()], strict=True))
    assert torch.equal(net(src, padding)[~padding], real)
    assert fusedformer.unfuse(net) == 0


def test_gradients_and_optimizer_steps() -> None:
    losses: list[Any] = []
    for is_fused in (False, True):
        net, src, padding = case()
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        if is_fused:
            fusedformer.fuse(net)
        losses.append([])
        for _ in range(4):
            loss = net(src, padding)[~padding][:, 0].log().mul(-1).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][-1] < losses[0][0]


def test_it_is_idempotent_and_leaves_the_library_s_own_modules() -> None:
    net, *_ = case()
    own = fused.LayerNorm(E)
    net.own = own
    report = fusedformer.fuse(net)
    assert "own" not in {one.path for one in report.replaced}
    again = fusedformer.fuse(net)
    assert not again.replaced and not again.left
    fusedformer.unfuse(net)
    assert type(net.own) is fused.LayerNorm


class Quiet(nn.LayerNorm):
    """Leaves the computation alone."""

    def extra_repr(self) -> str:
        return "quiet"


class Louder(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class OwnBlock(nn.TransformerEncoderLayer):
    def _ff_block(self, x: Tensor) -> Tensor:
        return super()._ff_block(x) * 2


def replaced_forward() -> nn.Module:
    norm = nn.LayerNorm(E)
    norm.forward = lambda input: input * 2  # type: ignore[method-assign]
    return norm


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "norm": (lambda: Louder(E), "computes otherwise than torch.nn.LayerNorm"),
    "block": (lambda: OwnBlock(E, H, 24, batch_first=True), "computes otherwise"),
    "instance": (replaced_forward, "replaced on the instance"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_computes_otherwise_is_left_and_said(name: str) -> None:
    make, reason = LEFT[name]
    model = nn.ModuleDict({"plain": nn.LayerNorm(E), name: make()}).eval()
    x = torch.randn(2, 3, E)
    before = model[name](x)
    kinds = classes(model)
    with pytest.raises(ValueError, match=rf"(?s)strict=True.*{name}.*{reason}"):
        fusedformer.fuse(model, strict=True)
    assert classes(model) == kinds  # all or nothing
    report = fusedformer.fuse(model)
    (left,) = report.left
    assert left.path == name and reason in left.reason
    assert type(model["plain"]) is fused.LayerNorm
    assert torch.allclose(model[name](x), before, atol=1e-6)


def test_a_subclass_that_leaves_the_computation_alone() -> None:
    model = nn.Sequential(Quiet(E), nn.TransformerEncoderLayer(E, H, 24, batch_first=True)).eval()
    model[1].norm1 = Quiet(E)
    x = torch.randn(2, 3, E)
    before = model(x)
    report = fusedformer.fuse(model, strict=True)
    assert isinstance(model[0], Quiet) and isinstance(model[0], fused.LayerNorm)
    assert "quiet" in repr(model[0]) and type(model[0]) is type(model[1].norm1)
    layer: Any = model[1]
    assert layer._can_pack()  # it counts as the norm that it is
    assert torch.allclose(model(x), before, atol=1e-5)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied[0]) is type(model[0]) and torch.equal(copied(x), model(x))
        assert fusedformer.unfuse(copied) == len(report.replaced)
        assert type(copied[0]) is Quiet
    assert fusedformer.unfuse(model) and type(model[0]) is Quiet


def test_hooks_copies_and_files() -> None:
    net, src, padding = case()
    seen = []
    net.norm.register_forward_hook(lambda *args: seen.append("norm"))
    fusedformer.fuse(net)
    wanted = net(src, padding)
    assert seen == ["norm"]
    net.norm._forward_hooks.clear()
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for copied in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        assert torch.equal(copied(src, padding), wanted)
        assert fusedformer.unfuse(copied)
    fresh, *_ = case()
    fresh.load_state_dict(net.state_dict())


def test_the_report_is_a_table() -> None:
    net, *_ = case()
    net.louder = Louder(E)
    report = fusedformer.fuse(net)
    text = str(report)
    assert "encoder.layers.0.self_attn" in text and "fusedformer.nn.MultiheadAttention" in text
    assert text.endswith(f"{len(report.replaced)} replaced, 1 left alone") and text == repr(report)
    assert report.as_dict()["left"][0]["path"] == "louder"
    alone = fusedformer.fuse(nn.LayerNorm(E))
    assert "(the model)  torch.nn.LayerNorm  fusedformer.nn.LayerNorm" in str(alone)
    assert str(fusedformer.fuse(nn.Linear(2, 2))) == "0 replaced, 0 left alone"


def test_devices_and_dtypes(device: str) -> None:
    net, src, padding = case()
    net.to(device, torch.bfloat16)
    stock = net(src.to(device).bfloat16(), padding.to(device))
    fusedformer.fuse(net)
    found = net(src.to(device).bfloat16(), padding.to(device))
    assert found.dtype == torch.bfloat16
    real = ~padding.to(device)
    assert torch.allclose(found[real].float(), stock[real].float(), atol=0.05)


def test_within_ddp(tmp_path: Any) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        net, src, padding = case()
        wrapped = DistributedDataParallel(net, find_unused_parameters=True)
        real = wrapped(src, padding)[~padding]
        assert fusedformer.fuse(wrapped).replaced[0].path.startswith("module.")
        again = wrapped(src, padding)[~padding]
        assert torch.allclose(again, real, atol=1e-5)
        again.backward(torch.randn_like(again))
        assert all(p.grad is not None for p in net.encoder.parameters())
    finally:
        dist.destroy_process_group()


def test_sharded_and_scripted_models_are_refused(tmp_path: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        net, *_ = case()
        fully_shard(net.encoder, mesh=init_device_mesh("cpu", (1,)))
        kinds = classes(net)
        with pytest.raises(ValueError, match=r"'encoder' is sharded by FSDP.*before it"):
            fusedformer.fuse(net)
        assert classes(net) == kinds
    finally:
        dist.destroy_process_group()
    for function in (fusedformer.fuse, fusedformer.unfuse):
        bad: Any = "net"
        with pytest.raises(TypeError, match="'model' to be a Module, but got str"):
            function(bad)
    with pytest.raises(TypeError, match=r"cannot be scripted: use torch\.export"):
        fusedformer.fuse(torch.jit.script(nn.LayerNorm(4)))


def test_fused_before_sharding_works(tmp_path: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        net, src, padding = case()
        real = net(src, padding)[~padding].detach()
        fusedformer.fuse(net)
        mesh = init_device_mesh("cpu", (1,))
        for layer in net.encoder.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
        found = net(src, padding)[~padding]
        assert torch.allclose(found, real, atol=1e-5)
        found.backward(torch.randn_like(found))
    finally:
        dist.destroy_process_group()


def test_compiled_after_it_was_fused() -> None:
    net, src, padding = case()
    real = net(src, padding)[~padding]
    fusedformer.fuse(net)
    traced = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert torch.allclose(traced(src, padding)[~padding], real, atol=1e-5)


@pytest.mark.parametrize("pack", [None, True, False])
def test_padding_of_torchs_encoder_is_computed_if_asked(pack: bool | None) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model, x = nn.Sequential(nn.TransformerEncoder(layer, 2)), torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 2 + [True] * 3])
    wanted = model[0](x, src_key_padding_mask=padding)
    fusedformer.fuse(model, pack=pack)
    found = model[0](x, src_key_padding_mask=padding)
    assert torch.allclose(found[~padding], wanted[~padding], atol=1e-5)
    at_padding = wanted[padding] if pack is False else torch.zeros(3, 16)
    assert torch.allclose(found[padding], at_padding, atol=1e-5)
    before = set(model[0].__dict__)
    fusedformer.unfuse(model)
    assert before - set(model[0].__dict__) <= {"_fusedformer_before", "compute_padding"}
    assert torch.equal(model[0](x, src_key_padding_mask=padding), wanted)
