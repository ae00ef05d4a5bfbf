"""fuse() on blocks of timm's ViT and EVA, and of open_clip, beside stock."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.fusion.towers import open_clip_transformer, torchvision
from torch import Tensor, nn

import fusedformer
from fusedformer.fusion import _blocks, _timm
from fusedformer.testing import compare_tensors

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def timm() -> Iterator[Any]:
    with torchvision():
        yield pytest.importorskip("timm.models")


@pytest.fixture(scope="module")
def clip() -> Any:
    return open_clip_transformer()


def perturbed(model: nn.Module) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def vit(timm: Any, **changes: Any) -> Any:
    cls = timm.vision_transformer.VisionTransformer
    return perturbed(cls(**SIZES, num_classes=5, **changes))


def eva(timm: Any, **changes: Any) -> Any:
    return perturbed(timm.eva.Eva(**SIZES, num_classes=5, **changes))


def run(model: Any, x: Tensor, seed: int, **given: Any) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of all parameters."""
    x = x.clone().requires_grad_()
    y = model(x, **given)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y)
    # A bias of all keys cancels in softmax: its gradient is rounding alone.
    named = {
        n: p for n, p in model.named_parameters() if not n.endswith(("k_norm.bias", "k_proj.bias"))
    }
    grads = torch.autograd.grad(y, [x, *named.values()], dy)
    return {"output": y, **dict(zip(["input", *named], grads, strict=True))}


def faults(model: Any, stock: Any, x: Tensor, **given: Any) -> list[str]:
    """What is farther from float64 than the criterion allows; stock is lucky now and then."""
    found: list[str] = []
    wide = {
        n: one.double() if isinstance(one, Tensor) and one.is_floating_point() else one
        for n, one in given.items()
    }
    for seed in (1, 2, 3):
        truth = run(copy.deepcopy(stock).double(), x.double(), seed, **wide)
        ours, baseline = run(model, x, seed, **given), run(stock, x, seed, **given)
        assert ours.keys() == baseline.keys()
        compared = [compare_tensors(n, ours[n], baseline[n], truth[n]) for n in truth]
        found = [c.fault for c in compared if not c.passed]
        if not found:
            break
    return found


def angles(*shape: int) -> Tensor:
    """Sines and then cosines as timm's tables have them, twice for the columns of a pair."""
    angle = torch.randn(shape).repeat_interleave(2, -1)
    return torch.cat((angle.sin(), angle.cos()), -1)


def fused(model: Any, blocks: int = 2) -> Any:
    """A fused copy, all of whose blocks are."""
    twin = copy.deepcopy(model)
    report = fusedformer.fuse(twin, strict=True)
    assert sum(one.after.startswith("fused steps, norms") for one in report.replaced) == blocks
    return twin


def layers_of(timm: Any) -> Any:
    return sys.modules["timm.layers"]


VIT: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled layers, dropout that is off": {"init_values": 0.5, "drop_path_rate": 0.5},
    "SwiGLU, packed": {"mlp_layer": "SwiGLUPacked", "init_values": 0.5},
    "SwiGLU": {"mlp_layer": "SwiGLU"},
    "GLU by the second half, unknown": {"mlp_layer": "GluMlp", "act_layer": nn.Tanh},
    "GLU by the second half": {"mlp_layer": "GluMlp", "act_layer": nn.SiLU},
    "norm in the block": {"scale_mlp_norm": True, "act_layer": nn.Tanh},
    "norms last": {"block_fn": "ResPostBlock"},
}
EVA: dict[str, dict[str, Any]] = {
    "EVA-02": {"swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False, "use_rot_pos_emb": True},
    "scaled layers": {"init_values": 0.3, "qk_norm": True, "use_rot_pos_emb": True},
    "DINOv3": {
        "rope_type": "dinov3", "rope_rotate_half": True, "use_rot_pos_emb": True, "init_values": 1,
        "qkv_bias": False, "num_reg_tokens": 2, "swiglu_mlp": True, "swiglu_align_to": 8,
    },
    "grouped": {
        "attn_type": "rope", "num_kv_heads": 1, "qkv_fused": False, "use_rot_pos_emb": True,
        "rope_type": "cat", "swiglu_mlp": True, "scale_attn_inner": True,
    },
    "angles of each head": {"rope_type": "mixed", "attn_type": "rope", "use_rot_pos_emb": True},
    "norms last": {"use_post_norm": True, "use_rot_pos_emb": True, "drop_path_rate": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("variant", VIT)
def test_vit(timm: Any, variant: str) -> None:
    settings = dict(VIT[variant])
    if "mlp_layer" in settings:
        settings["mlp_layer"] = getattr(layers_of(timm), settings["mlp_layer"])
    if "block_fn" in settings:
        settings["block_fn"] = getattr(timm.vision_transformer, settings["block_fn"])
    model = vit(timm, **settings).eval()
    assert faults(fused(model), model, torch.randn(3, 3, 16, 16)) == []


@pytest.mark.parametrize("variant", EVA)
def test_eva(timm: Any, variant: str) -> None:
    model = eva(timm, **EVA[variant]).eval()
    x, twin = torch.randn(3, 3, 16, 16), fused(model)
    assert faults(twin, model, x) == []
    assert fusedformer.unfuse(twin) > 0
    assert torch.equal(twin(x), model(x))


def test_gate_of_attention_and_a_table_for_each_image(timm: Any) -> None:
    """As where patches were dropped, and angles go with those that are left."""
    block = timm.eva.EvaBlock(32, 2, gated_attn=True, init_values=0.5, swiglu_mlp=True)
    model = perturbed(block).eval()
    x, rope = torch.randn(3, 7, 32), angles(3, 1, 6, 8)
    mask = torch.rand(3, 1, 7, 7) < 0.7
    for given in ({"rope": rope, "attn_mask": mask}, {"rope": rope[0, 0], "is_causal": True}):
        assert faults(fused(model, 1), model, x, **given) == []


@pytest.mark.parametrize("kind", ["plain", "scaled, quick", "in float32"])
def test_open_clip(clip: Any, kind: str) -> None:
    changes: dict[str, Any] = {
        "plain": {}, "scaled, quick": {"ls_init_value": 0.3, "act_layer": clip.QuickGELU},
        "in float32": {"norm_layer": clip.LayerNormFp32, "batch_first": False},
    }[kind]  # fmt: skip
    tower = clip.Transformer(32, 2, 2, **changes)
    model, x = perturbed(tower).eval(), torch.randn(3, 5, 32)
    causal = torch.full((5, 5), -torch.inf).triu(1)
    twin = fused(model)
    if kind != "in float32":  # these take no float64
        assert faults(twin, model, x) == []
        assert faults(twin, model, x, attn_mask=causal) == []
    assert torch.allclose(twin(x), model(x), atol=2e-5)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = twin(x), model(x)
    assert found.dtype == wanted.dtype and torch.allclose(found, wanted, atol=0.1)


def test_open_clip_that_attends_to_another_sequence(clip: Any) -> None:
    block = perturbed(clip.ResidualAttentionBlock(32, 2, is_cross_attention=True)).eval()
    x, memory = torch.randn(3, 5, 32), torch.randn(3, 4, 32)
    assert faults(fused(block, 1), block, x, k_x=memory, v_x=memory) == []


@pytest.mark.interpreter
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_depth_drops_what_stock_drops(timm: Any, backend: Any) -> None:
    """Whole images in either half, drawn as stock draws them, with scales and without."""
    settings = {"drop_path": 0.5, "mlp_ratio": 1}
    blocks = [timm.vision_transformer.Block(16, 1, init_values=0.5, **settings)]
    if backend == "torch":
        blocks += [timm.vision_transformer.Block(16, 1, **settings)]
        blocks += [timm.eva.EvaBlockPostNorm(16, 1, **settings)]
    for block in blocks:
        model = perturbed(block.train())
        twin, x = fused(model, 1), torch.randn(6, 3, 16)
        torch.manual_seed(3)
        wanted = run(model, x, 1)
        torch.manual_seed(3)
        with fusedformer.backend(backend):
            found = run(twin, x, 1)
        for name, value in wanted.items():
            assert torch.allclose(found[name], value, atol=5e-5, rtol=1e-4), name
        assert not torch.allclose(wanted["output"], model.eval()(x), atol=0.1)


class Twice(nn.Linear):
    """An adapter's place: a subclass that does more."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "path", ["attn", "attn.proj", "attn.proj_drop", "mlp", "mlp.act", "mlp.fc1", "mlp.drop1",
             "mlp.fc2", "mlp.drop2", "norm1", "norm2", "ls1", "drop_path2"],
)  # fmt: skip
def test_children_that_do_more_are_called(timm: Any, path: str) -> None:
    block = timm.vision_transformer.Block(32, 2, init_values=0.5, drop_path=0.1)
    model = perturbed(block).eval()
    twin, x = fused(model, 1), torch.randn(3, 5, 32)
    before = model(x)
    for one in (model, twin):
        child = one.get_submodule(path)
        if isinstance(child, nn.Linear):
            child.__class__ = Twice
        else:
            child.register_forward_hook(lambda module, args, output: 2 * output)
    assert torch.allclose(twin(x), model(x), atol=2e-5)
    assert not torch.allclose(model(x), before, atol=0.1)


@pytest.mark.interpreter
def test_on_the_kernels(timm: Any) -> None:
    """Each kind of feed-forward block, rotation with norms of heads, biases left for the sums."""
    cases: list[tuple[Any, dict[str, Any]]] = [
        (timm.vision_transformer.Block(16, 1, init_values=0.5, mlp_ratio=1), {}),
        (timm.eva.EvaBlock(16, 1, mlp_ratio=1, qk_norm=True, swiglu_mlp=True, init_values=0.5),
         {"rope": angles(4, 8)}),
        (timm.eva.EvaBlock(16, 1, mlp_ratio=1, swiglu_mlp=True, swiglu_align_to=8), {}),
    ]  # fmt: skip
    for block, given in cases:
        assert_same_on_kernels(block, **given)


@pytest.mark.interpreter
def test_open_clip_on_the_kernels(clip: Any) -> None:
    assert_same_on_kernels(clip.ResidualAttentionBlock(16, 1, mlp_ratio=1, ls_init_value=0.5))


def assert_same_on_kernels(block: nn.Module, **given: Any) -> None:
    """Outputs and gradients as stock's, but for rounding."""
    model, x = perturbed(block).eval(), torch.randn(1, 5, 16)
    twin = fused(model, 1)
    with fusedformer.backend("triton"):
        found = run(twin, x, 1, **given)
    for name, wanted in run(model, x, 1, **given).items():
        assert torch.allclose(found[name], wanted, atol=1e-4, rtol=1e-4), name


FAULTS: dict[str, Any] = {
    "scales": (_blocks.Block, "_scales", ("ls2", "ls1")),
    "norms": (_blocks.Block, "_second_norm", "norm1"),
    "halves": (
        _blocks,
        "_of_halves",
        lambda mlp: _blocks._of_timm(mlp)._replace(activates="second"),
    ),
    "no norm of heads": (_timm, "_norms_of_heads", lambda *norms: {"norm": None}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_seen(timm: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the tables, by the tests above."""
    if name == "no norm of heads":
        model = eva(timm, **EVA["scaled layers"])
    else:
        packed = layers_of(timm).SwiGLUPacked
        model = vit(timm, mlp_layer=packed, init_values=0.5)
    twin, x = fused(model), torch.randn(2, 3, 16, 16)
    assert torch.allclose(twin(x), model(x), atol=1e-4)
    holder, attribute, value = FAULTS[name]
    monkeypatch.setattr(holder, attribute, value)
    if name == "halves":
        monkeypatch.setitem(_blocks._FEED_FORWARD, "timm.layers.mlp.GluMlp", value)
    assert not torch.allclose(twin(x), model(x), atol=1e-2)


def test_a_fused_model_is_compiled_pickled_and_checkpointed(timm: Any) -> None:
    model = eva(timm, **EVA["EVA-02"], init_values=0.5).eval()
    twin, x = fused(model), torch.randn(2, 3, 16, 16)
    wanted = model(x)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    again = pickle.loads(pickle.dumps(twin))
    assert all(torch.allclose(one(x), wanted, atol=2e-5) for one in (compiled, again))
    assert type(again.blocks[0]) is type(twin.blocks[0])
    plain = run(twin.train(), x, 1)
    twin.set_grad_checkpointing()
    checkpointed = run(twin, x, 1)
    assert all(torch.allclose(plain[n], checkpointed[n], atol=1e-5) for n in plain)
