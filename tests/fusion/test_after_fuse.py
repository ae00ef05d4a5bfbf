"""What a working model of transformers goes on doing after fuse()."""

from __future__ import annotations

import copy
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fusion.models import (
    BART,
    MASK,
    TEXT,
    TOKENS,
    inputs_of,
    model_of,
    perturbed,
)
from torch import Tensor, nn

import fusedformer
from fusedformer import backend

T: Any = pytest.importorskip("transformers")

BERT = dict(TEXT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
LLAMA = dict(TEXT, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LEFT, HOLE = MASK.flip(1), MASK.clone()
HOLE[0, 3:6] = HOLE[2, 2] = False


def same(found: Any, wanted: Any, mask: Tensor = MASK, atol: float = 2e-5) -> bool:
    """Whether hidden states are equal at real positions but for rounding."""
    return torch.allclose(found[0][mask], wanted[0][mask], atol=atol)


# -- in another process ----------------------------------------------------------------------------

_CHILD = """
import sys, torch
for path in sys.argv[1:]:
    model, inputs = torch.load(path, weights_only=False)
    with torch.no_grad():
        torch.save(model(**inputs)[0], path)
"""


def test_a_pickled_model_computes_the_same_in_another_process(tmp_path: Path) -> None:
    """Which has imported neither this library nor transformers."""
    wanted: dict[Path, Tensor] = {}
    for name in ("bert", "modernbert", "gpt2", "vit", "llama"):
        model = llama() if name == "llama" else model_of(name).eval()
        inputs = inputs_of(name)
        fusedformer.fuse(model)
        with torch.no_grad():
            wanted[tmp_path / name] = model(**inputs)[0]
        torch.save((model, inputs), tmp_path / name)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _CHILD, *map(str, wanted)]
    subprocess.run(command, check=True, timeout=300, env=environment)
    for path, output in wanted.items():
        real = MASK if output.shape[:2] == MASK.shape else ...
        assert torch.allclose(torch.load(path)[real], output[real], atol=1e-5), path.name


def llama() -> Any:
    """A causal model."""
    return perturbed(T.LlamaModel(T.LlamaConfig(**LLAMA))).eval()


# -- masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "mask", [MASK, LEFT, HOLE, torch.ones_like(MASK)], ids=["right", "left", "hole", "none"]
)
def test_causality_is_the_masks(mask: Tensor, before: str) -> None:
    """Of text towers whose attention says that it is not causal.

    But without padding, where stock goes by what attention says with ``sdpa``.
    """
    config = T.Aimv2TextConfig(**TEXT, **TOKENS, attn_implementation=before)
    model = perturbed(T.Aimv2TextModel(config)).eval()
    inputs = {**inputs_of("bert"), "attention_mask": mask.long()}
    with torch.no_grad():
        wanted = model(**inputs)
        fusedformer.fuse(model)
        assert same(model(**inputs), wanted, mask)


@pytest.mark.parametrize("name", ["bert", "modernbert", "gpt2", "llama"])
@pytest.mark.parametrize("mask", [LEFT, HOLE], ids=["left", "hole"])
def test_padding_anywhere(name: str, mask: Tensor) -> None:
    """The windows of local layers count positions, those of padding too."""
    model = llama() if name == "llama" else model_of(name).eval()
    inputs = {**inputs_of(name), "attention_mask": mask.long()}
    with torch.no_grad():
        wanted = model(**inputs)
        fusedformer.fuse(model)
        found = model(**inputs)
        assert same(found, wanted, mask)
        if name in ("bert", "modernbert"):
            assert not found[0][~mask].any()


@pytest.mark.parametrize("mask", [MASK, HOLE], ids=["right", "hole"])
@pytest.mark.parametrize("static_shapes", [False, True])
def test_modernbert_on_the_kernels(mask: Tensor, static_shapes: bool, device: str) -> None:
    model = model_of("modernbert").eval().to(device)
    inputs = {"input_ids": inputs_of("bert")["input_ids"].to(device)}
    inputs["attention_mask"] = mask.long().to(device)
    with torch.no_grad():
        wanted = model(**inputs)
        fusedformer.fuse(model)
        model.static_shapes = static_shapes
        with backend("triton"):
            found = model(**inputs)
    assert torch.allclose(found[0][mask], wanted[0][mask], atol=1e-4)
    assert not found[0][~mask].any()


def test_a_hole_is_zero_whatever_was_computed_there() -> None:
    model, inputs = model_of("modernbert").eval(), inputs_of("modernbert")
    fusedformer.fuse(model)
    with torch.no_grad():
        model.final_norm.weight.fill_(torch.inf)
        found = model(**{**inputs, "attention_mask": HOLE.long()})[0]
    assert not found[~HOLE].any() and found[HOLE].isinf().any()


# -- what needs the batch --------------------------------------------------------------------------


class WantsBatch(nn.Linear):
    """A product to which each sequence adds what stands first in another."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + 0.5 * y.flip(0)[:, :1]


def write_a_row(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    output = output.clone()
    output[:, 2] = 0.5
    return output


def own_forward(module: nn.Module) -> None:
    """As accelerate puts its hooks on."""
    stock = module.forward
    module.forward = lambda *args, **kwargs: stock(*args, **kwargs)


def product(model: Any) -> nn.Linear:
    """The last one of the last layer."""
    modern = hasattr(model, "layers")
    found: nn.Linear = model.layers[1].mlp.Wo if modern else model.encoder.layer[1].output.dense
    return found


NEEDS: dict[str, Callable[[Any], Any]] = {
    "a hook": lambda m: product(m).register_forward_hook(write_a_row),
    "a replaced forward": lambda m: own_forward(product(m)),
    "a class of the user's": lambda m: setattr(product(m), "__class__", WantsBatch),
}


@pytest.mark.parametrize("name", ["bert", "modernbert"])
@pytest.mark.parametrize("need", NEEDS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_needs_the_batch_gets_it(name: str, need: str, when: str) -> None:
    """And the report says so."""
    stock, inputs = model_of(name).eval(), inputs_of(name)
    model = copy.deepcopy(stock)
    NEEDS[need](stock)
    report = None
    if when == "before":
        NEEDS[need](model)
        report = fusedformer.fuse(model)
        assert any("computed padded" in one.reason for one in report.left)
    else:
        fusedformer.fuse(model)
        NEEDS[need](model)
    with torch.no_grad():
        assert same(model(**inputs), stock(**inputs))


def test_a_replaced_forward_is_reported() -> None:
    """Of a layer and of the stack, as accelerate's forced hooks are put on."""
    model, inputs = model_of("bert").eval(), inputs_of("bert")
    with torch.no_grad():
        wanted = model(**inputs)
    own_forward(model.encoder.layer[0])
    own_forward(model.encoder)
    report = fusedformer.fuse(model)
    left = {one.path: one.reason for one in report.left}
    assert {p for p, r in left.items() if "replaced on the instance" in r} == {
        "encoder", "encoder.layer.0"
    }  # fmt: skip
    with torch.no_grad():
        assert same(model(**inputs), wanted)


# -- heads that read padding -----------------------------------------------------------------------


def test_a_head_that_reads_padding_is_not_packed_unless_asked() -> None:
    model = perturbed(T.BertForQuestionAnswering(T.BertConfig(**BERT))).eval()
    first, last = torch.tensor([1, 2, 0]), torch.tensor([2, 3, 1])
    positions = {"start_positions": first, "end_positions": last}
    inputs = {**inputs_of("bert"), **positions}
    with torch.no_grad():
        wanted = model(**inputs)
        with pytest.raises(ValueError, match=r"reads padded positions.*pack=True packs"):
            fusedformer.fuse(model, strict=True)
        assert fusedformer.fuse(model).left[0].path == "bert.encoder"
        assert model(**inputs).loss == pytest.approx(wanted.loss.item(), rel=1e-5)
        assert torch.allclose(model(**inputs).start_logits, wanted.start_logits, atol=1e-4)
        fusedformer.unfuse(model)
        fusedformer.fuse(model, strict=True, pack=False)
        assert model(**inputs).loss == pytest.approx(wanted.loss.item(), rel=1e-5)
        fusedformer.unfuse(model)
        assert any("packed" in one.after for one in fusedformer.fuse(model, pack=True).replaced)
        assert same([model(**inputs).start_logits], [wanted.start_logits])


@pytest.mark.parametrize("kind", ["last", "mean", "cls_index", "first"])
def test_a_summary_of_padded_positions_is_stocks(kind: str) -> None:
    """RoFormer's head of multiple choice reads the last position; of the first alone it packs."""
    config = T.RoFormerConfig(**BERT, embedding_size=16, summary_type=kind)
    model = perturbed(T.RoFormerForMultipleChoice(config), 0).eval()
    inputs = {n: x[None] for n, x in inputs_of("bert").items()}
    with torch.no_grad():
        wanted = model(**inputs).logits
        left = fusedformer.fuse(model).left
        torch.testing.assert_close(model(**inputs).logits, wanted)
    assert [one.path for one in left] == ([] if kind == "first" else ["roformer"])


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_unpacked_hidden_states_are_those_of_stock_at_padding_too(name: str) -> None:
    model, inputs = model_of(name).eval(), inputs_of(name)
    with torch.no_grad():
        wanted = model(**inputs)[0]
        fusedformer.fuse(model, pack=False)
        assert torch.allclose(model(**inputs)[0], wanted, atol=2e-5)


# -- what is true of attention ---------------------------------------------------------------------


def test_attention_that_is_never_looked_up_is_not_reported_as_replaced() -> None:
    """Falcon's attention computes itself."""
    falcon = T.FalconModel(
        T.FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    )
    report = fusedformer.fuse(falcon)
    assert not any("attention" in one.before for one in report.replaced)
    assert sum("computes attention itself" in one.reason for one in report.left) == 2


def test_detr_comes_back_whole() -> None:
    """Its backbone takes no other attention than its own."""
    backbone = T.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"]
    )
    config = T.DetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=backbone, num_queries=5, **{
            n: v for n, v in BART.items() if n not in ("vocab_size", "max_position_embeddings")
        },
    )  # fmt: skip
    model = perturbed(T.DetrModel(config)).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = model(pixel_values=pixels)[0]
        names = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
        fusedformer.fuse(model)
        assert torch.allclose(model(pixel_values=pixels)[0], wanted, atol=1e-4)
        fusedformer.unfuse(model)
        assert torch.equal(model(pixel_values=pixels)[0], wanted)
        again = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
        assert again == names


def test_a_compiled_modernbert_is_one_graph() -> None:
    model, inputs = model_of("modernbert").eval(), inputs_of("modernbert")
    with torch.no_grad():
        wanted = model(**inputs)
        fusedformer.fuse(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert same(compiled(**inputs), wanted)


@pytest.mark.parametrize("rows", [1, 11])
def test_a_mask_of_the_users_says_all(rows: int) -> None:
    """Four boolean dimensions undo a decoder's causality, as in stock; all True too."""
    model, ids = llama(), inputs_of("bert")["input_ids"]
    for keep in (MASK, torch.ones_like(MASK)):
        mask = keep[:, None, None].expand(-1, -1, rows, -1)
        with torch.no_grad():
            wanted = model(input_ids=ids, attention_mask=mask)
            fusedformer.fuse(model)
            assert same(model(input_ids=ids, attention_mask=mask), wanted)
            fusedformer.unfuse(model)


@pytest.mark.parametrize(
    "name", ["bert", "distilbert", "albert", "layoutlm", "splinter", "gpt2", "mpnet"]
)
def test_dropouts_switched_on_by_hand(name: str) -> None:
    """As Monte Carlo dropout does in evaluation: attention may not read the mode of its own."""
    model, inputs = model_of(name).eval(), inputs_of(name)
    fused = copy.deepcopy(model)
    fusedformer.fuse(fused)
    with torch.no_grad(), backend("torch"):
        for path, module in model.named_modules():
            if isinstance(module, nn.Dropout) and ".1." not in path:
                both = module, fused.get_submodule(path)
                for one in both:
                    one.p, before = 1.0, one.p
                    one.train()
                assert same(fused(**inputs), model(**inputs)), path
                for one in both:
                    one.p = before
                    one.eval()


@pytest.mark.parametrize("name", ["bert", "roberta-prelayernorm", "gpt2", "llama"])
def test_norms_taken_out(name: str) -> None:
    model, inputs = model_of(name), inputs_of(name)
    paths = [p for p, m in model.named_modules() if type(m).__name__.endswith("Norm")]
    for path in paths[:3]:
        changed = copy.deepcopy(model)
        changed.set_submodule(path, nn.Identity())
        fused = copy.deepcopy(changed)
        fusedformer.fuse(fused)
        with backend("torch"):  # what is not normed is large, and its rounding too
            assert same(fused(**inputs), changed(**inputs), atol=2e-4), path
            with torch.no_grad():
                assert same(fused.eval()(**inputs), changed.eval()(**inputs), atol=2e-4), path


def arguments(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit", "wav2vec2", "mpnet", "clip text"])
def test_arguments_of_modules_are_looked_up(name: str) -> None:
    """By generation, export, data loaders and adapters."""
    model = model_of(name)
    before = {path: arguments(module) for path, module in model.named_modules()}
    fusedformer.fuse(model)
    assert {path: arguments(module) for path, module in model.named_modules()} == before


def test_export_by_names_of_arguments() -> None:
    model, ids = model_of("bert").eval(), inputs_of("bert")["input_ids"]
    fusedformer.fuse(model)
    rows = torch.export.Dim.AUTO
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shapes = {name: {0: rows} for name in given}
    with backend("torch"):
        found = torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False).module()
        two = {name: one[:2] for name, one in given.items()}
        assert same(found(**two), model(**two), torch.ones_like(MASK)[:2])
