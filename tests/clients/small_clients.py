"""Small random models of sentence-transformers, made here: nothing is downloaded."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from tests.fusion.models import perturbed
from torch import Tensor

import fusedformer
from fusedformer.testing import compare_tensors

T: Any = pytest.importorskip("transformers")
S: Any = pytest.importorskip("sentence_transformers", reason="sentence-transformers is missing")
M: Any = SimpleNamespace()  # the modules of its models
for _kind in ("sparse_encoder", "multi_vector_encoder", "sentence_transformer", "base"):
    vars(M).update(vars(importlib.import_module(f"sentence_transformers.{_kind}.modules")))
VOCABULARY = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "cat", "dog", "sat", "on", "mat",
    "of", "big", "small", "red", "blue", "runs", "fast", "and", "in", "query", "document", ":",
]  # fmt: skip
MOST_TOKENS = 32
TEXTS = [
    "the big red dog runs fast and the small blue cat sat on the mat",
    "cat",
    "the dog sat on a mat in the big red mat of the dog and the cat",
    "a small dog",
    "",
    "the cat sat",
    "blue cat " * 30,  # longer than the model
]
PAIRS = list(zip(TEXTS, reversed(TEXTS), strict=True))
ALL_MODES = "mean", "cls", "max", "lasttoken", "mean_sqrt_len_tokens", "weightedmean"
_SIZES: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=40, vocab_size=len(VOCABULARY),
)  # fmt: skip
_MODERN = T.ModernBertConfig(
    **_SIZES, local_attention=6, cls_token_id=2, sep_token_id=3, pad_token_id=0, bos_token_id=2,
    eos_token_id=3,
)  # fmt: skip
BACKBONES: dict[str, Callable[[], Any]] = {
    "bert": lambda: T.BertModel(T.BertConfig(**_SIZES)),
    "modernbert": lambda: T.ModernBertModel(_MODERN),
    "distilbert": lambda: T.DistilBertModel(
        T.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=len(VOCABULARY))
    ),
    "mpnet": lambda: T.MPNetModel(T.MPNetConfig(**_SIZES)),
    "deberta": lambda: T.DebertaV2Model(
        T.DebertaV2Config(
            **_SIZES,
            relative_attention=True,
            position_buckets=8,
            pos_att_type=["p2c", "c2p"],
            norm_rel_ebd="layer_norm",
            share_att_key=True,
        )
    ),
    "qwen3": lambda: T.Qwen3Model(T.Qwen3Config(**_SIZES, head_dim=8, num_key_value_heads=2)),
    "masked": lambda: T.BertForMaskedLM(T.BertConfig(**_SIZES)),
    "classifier": lambda: T.BertForSequenceClassification(T.BertConfig(**_SIZES, num_labels=1)),
    "tokens": lambda: T.BertForTokenClassification(T.BertConfig(**_SIZES, num_labels=3)),
    "gpt2": lambda: T.GPT2Model(
        T.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=40, vocab_size=len(VOCABULARY))
    ),
    "codegen": lambda: T.CodeGenModel(
        T.CodeGenConfig(
            n_embd=32, n_layer=2, n_head=4, n_positions=40, rotary_dim=4, vocab_size=len(VOCABULARY)
        )
    ),
}


def saved(folder: Path, backbone: str) -> str:
    """Save a model without dropout, with weights at which attention is not uniform."""
    torch.manual_seed(0)
    model = perturbed(BACKBONES[backbone]())
    for name in vars(model.config):
        if "dropout" in name or "pdrop" in name:
            setattr(model.config, name, 0.0)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    tokenizer = T.BertTokenizerFast(
        vocab_file=str(folder / "vocab.txt"), model_max_length=MOST_TOKENS
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


def dense_model(
    folder: Path, backbone: str = "bert", pooling: str | Sequence[str] = "mean", *rest: Any
) -> Any:
    """Make a SentenceTransformer of encoder, pooling and further modules."""
    first = M.Transformer(saved(folder, backbone))
    modules = [first, M.Pooling(32, pooling), *rest]
    return S.SentenceTransformer(modules=modules, device="cpu", prompts={"query": "query : "})


def sparse_model(folder: Path) -> Any:
    """Make a SparseEncoder (SPLADE)."""
    first = M.Transformer(saved(folder, "masked"), transformer_task="fill-mask")
    return S.SparseEncoder(modules=[first, M.SpladePooling("max")], device="cpu")


def late_model(folder: Path, expansion: dict[str, Any], routed: bool) -> Any:
    """Make a MultiVectorEncoder (ColBERT) whose queries are expanded; documents may be routed."""
    first = M.Transformer(saved(folder, "bert"), query_length=12, query_expansion=expansion)
    if routed:
        first = M.Router.for_query_document([first], [M.Transformer(str(folder))])
    rest = [
        M.Dense(32, 16, bias=False, activation_function=torch.nn.Identity(),
              module_input_name="token_embeddings", module_output_name="token_embeddings"),
        M.Normalize("token_embeddings"), M.MultiVectorMask(),
    ]  # fmt: skip
    return S.MultiVectorEncoder(modules=[first, *rest], device="cpu")


class Three(NamedTuple):
    """A fused model, the same model unfused, and in float64."""

    fused: Any
    stock: Any
    truth: Any


def three(model: Any, dtype: torch.dtype = torch.float32) -> Three:
    """Fuse ``model`` in ``dtype``; the truth has weights rounded to it."""
    model = model.to(dtype)
    stock, truth = copy.deepcopy(model), copy.deepcopy(model).double()
    fusedformer.fuse(model)
    return Three(model, stock, truth)


def assert_same(name: str, ours: Any, stock: Any, truth: Any) -> None:
    """Judge arrays or tensors by the criterion."""
    found = compare_tensors(name, *(torch.as_tensor(x) for x in (ours, stock, truth)))
    assert found.passed, found.fault


def gradients(model: Any) -> dict[str, Tensor]:
    """Return the gradients of all parameters that have one."""
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
