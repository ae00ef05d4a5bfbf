"""fusedformer.embed and its command, beside ``encode``."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from tests.clients.small_clients import (
    ALL_MODES,
    TEXTS,
    M,
    S,
    assert_same,
    dense_model,
    saved,
    sparse_model,
    three,
)
from torch import nn

import fusedformer
from fusedformer import embedding
from fusedformer.__main__ import main

LONG = ".*1 of 7 'texts' fill the model's 32 tokens"


def classes(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


@pytest.mark.filterwarnings("ignore:embed")
@pytest.mark.parametrize("backbone", ["bert", "modernbert", "gpt2", "codegen"])
def test_it_returns_what_encode_returns(tmp_path: Path, backbone: str) -> None:
    """For any budget; the model is fused for the call alone; codegen is computed padded."""
    both = three(dense_model(tmp_path, backbone, ALL_MODES, M.Normalize()))
    before = classes(both.stock)
    truth, stock = both.truth.encode(TEXTS), both.stock.encode(TEXTS)
    for model, most in ((both.fused, 4096), (both.stock, 1), (both.stock, 40)):
        found = fusedformer.embed(model, TEXTS, batch_tokens=most)
        assert isinstance(found, np.ndarray) and found.dtype == np.float32
        assert_same(f"{most} tokens", found, stock, truth)
    assert classes(both.stock) == before and "packed" not in str(fusedformer.fuse(both.fused))
    one = fusedformer.embed(both.fused, TEXTS[0], convert_to_tensor=True)
    assert isinstance(one, torch.Tensor) and one.shape == truth[0].shape
    assert_same("one text", one, stock[0], truth[0])


@pytest.mark.filterwarnings("ignore:embed")
def test_it_takes_what_encode_takes(tmp_path: Path) -> None:
    both = three(dense_model(tmp_path))
    for settings in (
        dict(prompt_name="query"), dict(prompt="document : ", truncate_dim=8),
        dict(normalize_embeddings=True, truncate_dim=16), dict(convert_to_tensor=True),
        dict(truncate_dim=64),
    ):  # fmt: skip
        stock, truth = (m.encode(TEXTS, **settings) for m in both[1:])
        assert_same(str(settings), fusedformer.embed(both.fused, TEXTS, **settings), stock, truth)
    many = [TEXTS[i % len(TEXTS)] for i in range(embedding._TOKENIZED_AT_ONCE + 3)]
    found, rows = fusedformer.embed(both.fused, many), fusedformer.embed(both.fused, TEXTS)
    np.testing.assert_allclose(found[-3:], rows[[i % 7 for i in range(len(many) - 3, len(many))]],
                               atol=1e-6)  # fmt: skip


@pytest.mark.filterwarnings("ignore:embed")
def test_a_router_chooses_by_task(tmp_path: Path) -> None:
    """And what is computed in float64 is returned so, as by encode."""
    first = M.Transformer(saved(tmp_path, "bert"))
    routes = [first, M.Pooling(32, "mean")], [first, M.Pooling(32, "cls")]
    router = M.Router.for_query_document(*routes)
    both = three(S.SentenceTransformer(modules=[router], device="cpu"))
    for task in ("query", "document"):
        stock, truth = (m.encode(TEXTS, task=task) for m in both[1:])
        assert_same(task, fusedformer.embed(both.fused, TEXTS, task=task), stock, truth)
        found = fusedformer.embed(both.truth, TEXTS, task=task, convert_to_tensor=True)
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.numpy(), truth, rtol=0, atol=1e-12)


def test_a_model_keeps_its_mode_and_classes(tmp_path: Path) -> None:
    """Also parts that are in another mode than the model, and where the call is interrupted."""
    model = dense_model(tmp_path)
    wanted = model.encode(TEXTS[:3])
    model.train()[1].eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    modes, kinds = [m.training for m in model.modules()], classes(model)
    np.testing.assert_allclose(fusedformer.embed(model, TEXTS[:3]), wanted, atol=1e-5)
    assert [m.training for m in model.modules()] == modes and classes(model) == kinds
    model[1].forward = mock.Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        fusedformer.embed(model, TEXTS[:3])
    assert [m.training for m in model.modules()] == modes and classes(model) == kinds


def test_batches_have_as_many_tokens_as_fit(tmp_path: Path) -> None:
    """Longest texts first; real tokens are counted where padding is not computed."""
    sizes = [30, 20, 20, 9, 1]
    order = [0, 1, 2, 3, 4]
    assert [*embedding._cut(order, sizes, 40, False)] == [[0], [1, 2], [3, 4]]
    assert [*embedding._cut(order, sizes, 60, True)] == [[0, 1], [2, 3, 4]]
    assert [*embedding._cut(order, sizes, 1, True)] == [[0], [1], [2], [3], [4]]
    model = dense_model(tmp_path)
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda m, args: seen.append(int(args[0]["attention_mask"].sum()))
    )
    with pytest.warns(UserWarning, match=LONG):
        fusedformer.embed(model, TEXTS, batch_tokens=40)
    assert seen[0] == 32 and max(seen) <= 40 and len(seen) < len(TEXTS)


def test_what_is_cut_or_computed_padded_is_said(tmp_path: Path) -> None:
    model = dense_model(tmp_path / "bert")
    with pytest.warns(UserWarning, match=LONG):
        fusedformer.embed(model, TEXTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to say
        assert fusedformer.embed(model, ["", "cat"]).shape == (2, 32)
        assert fusedformer.embed(model, []).shape == (0, 32)
        assert fusedformer.embed(model, [], truncate_dim=8).shape == (0, 8)
    with pytest.warns(UserWarning, match="padding: '0.model.h.0.attn' and 1 more: it computes"):
        fusedformer.embed(dense_model(tmp_path / "codegen", "codegen"), ["cat"])
    fusedformer.fuse(model, pack=False)
    with pytest.warns(UserWarning, match="computes padding: it was fused so"):
        fusedformer.embed(model, ["cat"])


@pytest.mark.filterwarnings("ignore:embed")
@pytest.mark.parametrize("backbone", ["bert", "modernbert"])
def test_texts_without_any_token(tmp_path: Path, backbone: str) -> None:
    """Where the tokenizer adds none to an empty text, its mean is 0, beside others and alone."""
    first = M.Transformer(
        saved(tmp_path, backbone), processing_kwargs={"text": {"add_special_tokens": False}}
    )
    model = S.SentenceTransformer(modules=[first, M.Pooling(32, "mean")], device="cpu")
    found = fusedformer.embed(model, TEXTS)
    np.testing.assert_allclose(found, model.encode(TEXTS), atol=1e-5)
    assert not found[TEXTS.index("")].any() and found[0].any()
    assert not fusedformer.embed(model, ["", ""]).any()


def test_a_model_without_tokens_is_computed(tmp_path: Path) -> None:
    """A table of words, say: its features are no batch of tokens."""
    tokenizer = dense_model(tmp_path).tokenizer.backend_tokenizer
    model = S.SentenceTransformer(
        modules=[M.StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu"
    )
    with pytest.warns(UserWarning, match="computes padding: nothing in it has a packed form"):
        found = fusedformer.embed(model, TEXTS)
    np.testing.assert_allclose(found, model.encode(TEXTS), atol=1e-6)


def test_a_folder_is_loaded_in_a_dtype(tmp_path: Path) -> None:
    folder, texts = saved(tmp_path, "bert"), TEXTS[:4]
    wanted = S.SentenceTransformer(folder, device="cpu").encode(texts)
    np.testing.assert_allclose(fusedformer.embed(folder, texts, device="cpu"), wanted, atol=1e-5)
    half = fusedformer.embed(tmp_path, texts, dtype="bfloat16", device="cpu")
    error = np.abs(half - wanted).max()
    assert half.dtype == np.float32 and 1e-4 < error < 0.1 * np.abs(wanted).max()


embed: Any = fusedformer.embed
BAD: list[tuple[type[Exception], str, Callable[[Any, Path], Any]]] = [
    (TypeError, "'texts' to be a str or several of them, but got int", lambda m, f: embed(m, 3)),
    (TypeError, "'texts' to have only str, .* int at index 1", lambda m, f: embed(m, ["cat", 3])),
    (ValueError, "'batch_tokens' to be a positive int, but got 0",
     lambda m, f: embed(m, ["cat"], batch_tokens=np.int64(0))),
    (TypeError, "'batch_tokens' to be an int, but got bool",
     lambda m, f: embed(m, ["cat"], batch_tokens=True)),
    (FileNotFoundError, "'model_or_path' to be a folder or a name, .* no folder /none",
     lambda m, f: embed("/none", ["cat"])),
    (TypeError, "'model_or_path' to be a SentenceTransformer, .* int", lambda m, f: embed(3, [])),
    (TypeError, "'model_or_path' to be .* but got SparseEncoder",
     lambda m, f: embed(sparse_model(f / "sparse"), [])),
    (ValueError, "no 'dtype' with a model that is loaded",
     lambda m, f: embed(m, [], dtype="bfloat16")),
    (ValueError, "no 'device' with a model that is loaded",
     lambda m, f: embed(m, [], device="cpu")),
    (ValueError, "'dtype' to be one of float32, .*, but got 'float8_e4m3fn'",
     lambda m, f: embed(str(f), [], dtype="float8_e4m3fn")),
    (ValueError, "'dtype' to be one that this CPU multiplies in, float32 or float64, .*float16",
     lambda m, f: embed(str(f), [], dtype="float16", device="cpu")),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=[one[1] for one in BAD])
def test_bad_input_is_named(
    tmp_path: Path,
    error: type[Exception],
    message: str,
    call: Callable[[Any, Path], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("bf16", "fp16"):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: False)
    with pytest.raises(error, match=rf"^embed\(\): expected .*{message}"):
        call(dense_model(tmp_path), tmp_path)


def test_an_older_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No part of it is known: fuse leaves its models alone and says so, and strict is an error."""
    model = dense_model(tmp_path)
    wanted = model.encode(TEXTS)
    monkeypatch.setattr(S, "__version__", "5.3.0")
    why = "sentence-transformers 5.3.0 is older than 6.2"
    with pytest.raises(ImportError, match=rf"^embed\(\): {why}: pip install"):
        fusedformer.embed(model, TEXTS)
    with pytest.raises(ValueError, match=why):
        fusedformer.fuse(copy.deepcopy(model), strict=True)
    report = fusedformer.fuse(model)
    assert [(one.path, one.reason) for one in report.left] == [("", why)]
    assert "packed: real tokens only" in str(report) and type(model) is S.SentenceTransformer
    np.testing.assert_allclose(model.encode(TEXTS), wanted, atol=1e-5)
    fusedformer.unfuse(model)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.3.0")
    report = fusedformer.fuse(model)
    known = "0.model", "transformers 5.3.0 is older than 5.17"
    assert [(one.path, one.reason) for one in report.left] == [known, ("", why)]
    assert {one.after for one in report.replaced} == {"fusedformer.nn.LayerNorm"}
    np.testing.assert_allclose(model.encode(TEXTS), wanted, atol=1e-5)


def test_the_command_writes_vectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, texts = saved(tmp_path, "bert"), ["the cat", "", "a big red dog"]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    wanted = S.SentenceTransformer(folder, device="cpu").encode(texts)
    found = {}
    for name, words in (("ours", []), ("stock", ["--stock"])):
        out = tmp_path / "vectors" / f"{name}.npy"
        given = ["--model", folder, "--texts", str(tmp_path / "texts.txt"), "--out", str(out)]
        assert main(["embed", *given, *words]) == 0
        found[name] = np.load(out)
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], wanted, atol=1e-5)
    assert "float32 [3, 32]" in capsys.readouterr().out
    assert main(["embed", *given, "--dtype", "float3"]) == 2
    assert "'dtype' to be one of" in capsys.readouterr().err
    given[3] = str(tmp_path / "none.txt")
    assert main(["embed", *given]) == 2
    assert "none.txt" in capsys.readouterr().err
    given[3], given[5] = str(tmp_path / "texts.txt"), str(tmp_path / "texts.txt" / "ours.npy")
    assert main(["embed", *given]) == 2
    assert "texts.txt" in capsys.readouterr().err
    (tmp_path / "texts.txt").write_bytes(b"cat\n\xff\n")
    given[5] = str(tmp_path / "ours.npy")
    assert main(["embed", *given]) == 2
    assert "texts.txt to be UTF-8, but line 2 is not" in capsys.readouterr().err
    (tmp_path / "texts.txt").write_bytes(b"\xef\xbb\xbfcat\n")  # as editors on Windows begin
    assert main(["embed", *given, "--dtype", "float64", "--task", "query"]) == 0
    found = np.load(tmp_path / "ours.npy")
    wanted = S.SentenceTransformer(folder, device="cpu").encode(["cat"])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-5)
