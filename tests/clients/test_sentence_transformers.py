"""fuse() on the models of sentence-transformers, by their own calls."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from tests.clients.small_clients import (
    ALL_MODES,
    MOST_TOKENS,
    PAIRS,
    TEXTS,
    M,
    S,
    assert_same,
    dense_model,
    gradients,
    late_model,
    saved,
    sparse_model,
    three,
)

import fusedformer
from fusedformer import functional
from fusedformer.fusion.sentences import packs
from fusedformer_kernels.cpu import build


@pytest.fixture
def _nothing_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("something padded was made")

    monkeypatch.setattr(functional, "unpack", refuse)


@pytest.mark.usefixtures("_nothing_is_unpacked")
@pytest.mark.parametrize(
    ("backbone", "side"),
    [
        ("bert", "right"), ("bert", "left"), ("modernbert", "right"), ("distilbert", "right"),
        ("mpnet", "right"), ("deberta", "right"), ("qwen3", "left"),
    ],
)  # fmt: skip
def test_encode_pools_packed_tokens(tmp_path: Path, backbone: str, side: str) -> None:
    """By all modes; prompts may be left out; each text's vector is the same alone."""
    both = three(dense_model(tmp_path, backbone, ALL_MODES, M.Normalize()))
    for model in both:
        model.tokenizer.padding_side = side
    assert_same("encode", *(m.encode(TEXTS, batch_size=4) for m in both))
    for model in both:
        model[1].include_prompt = False
    found = [m.encode(TEXTS, prompt_name="query") for m in both]
    assert_same("without the prompt", *found)
    assert not np.allclose(found[0], both.fused.encode(TEXTS), atol=1e-3)
    assert found[0].dtype == np.float32 and len(both.fused.encode([])) == 0
    if side == "right":  # else BERT's positions go by the padding before a text
        alone = both.fused.encode(TEXTS[0], prompt_name="query")
        np.testing.assert_allclose(alone, found[0][0], rtol=0, atol=1e-6)


def test_encode_takes_stocks_arguments(tmp_path: Path) -> None:
    both = three(dense_model(tmp_path, "bert", "mean", M.Dense(32, 16)))
    for settings in (
        dict(truncate_dim=8, normalize_embeddings=True),
        dict(convert_to_tensor=True),
        dict(prompt="document : "),
    ):
        assert_same(str(settings), *(m.encode(TEXTS, **settings) for m in both))
    vectors = [m.encode(TEXTS) for m in both]
    assert_same("similarity", *(m.similarity(v, v) for m, v in zip(both, vectors, strict=True)))
    single = both.fused.encode("cat", convert_to_numpy=False)
    assert isinstance(single, torch.Tensor) and single.shape == (16,)


def test_a_compiled_model_encodes(tmp_path: Path) -> None:
    """Traced whole by its own ``compile``; what is traced unpacks tokens before pooling."""
    both = three(dense_model(tmp_path, "bert", "mean", M.Normalize()))
    both.fused.compile(backend="eager", dynamic=True)
    assert_same("encode", *(m.encode(TEXTS) for m in both))


def test_tokens_and_features_are_stocks(tmp_path: Path) -> None:
    """Padded, and under the same names; a hook on the pooling sees them so."""
    both = three(dense_model(tmp_path))
    for one in zip(*(m.encode(TEXTS, output_value="token_embeddings") for m in both), strict=True):
        assert_same("token_embeddings", *one)
    everything = [m.encode(TEXTS[:3], output_value=None) for m in both]
    features = [m(m.preprocess(TEXTS[:3])) for m in both]
    for fused, stock, truth in (features, *zip(*everything, strict=True)):
        assert fused.keys() == stock.keys()
        keep = stock["attention_mask"].bool()
        assert_same("tokens", *(x["token_embeddings"][keep] for x in (fused, stock, truth)))
    seen = []
    both.fused[1].register_forward_pre_hook(lambda m, args: seen.append(dict(args[0])))
    both.fused.encode(TEXTS[:3])
    assert seen[0]["token_embeddings"].shape[:2] == seen[0]["attention_mask"].shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_pooled_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    """Arrays have vectors of length 1 to float32's rounding; tensors keep the model's dtype."""
    both = three(dense_model(tmp_path, "bert", ALL_MODES, M.Normalize()), dtype)
    found, stock, truth = (m.encode(TEXTS) for m in both)
    result = fusedformer.testing.compare_tensors(
        "encode", *(torch.as_tensor(x) for x in (found, stock, truth))
    )
    assert result.error <= 2 * result.stock_error, result
    lengths = np.linalg.norm(found.astype(np.float64), axis=1)
    np.testing.assert_allclose(lengths, 1.0, atol=1e-6)
    assert both.fused.encode(TEXTS, convert_to_tensor=True).dtype == dtype
    narrow = dense_model(tmp_path, "bert", "mean", M.Dense(32, 16)).to(
        dtype
    )  # weights of that dtype
    fusedformer.fuse(narrow)
    assert narrow.encode(TEXTS).shape == (len(TEXTS), 16)


@pytest.mark.usefixtures("_nothing_is_unpacked")
def test_autocast_is_nearer_than_a_bfloat16_model(tmp_path: Path) -> None:
    """Embeddings, norms and sums stay float32, and tokens packed, in encode and in embed."""
    both = three(dense_model(tmp_path, "bert", "mean", M.Normalize()))
    half = copy.deepcopy(both.fused).bfloat16().encode(TEXTS[:6])
    truth = both.truth.encode(TEXTS[:6])
    with torch.autocast("cpu", torch.bfloat16):
        stock, *found = (m.encode(TEXTS[:6]) for m in (both.stock, both.fused))
        found.append(fusedformer.embed(both.fused, TEXTS[:6]))
    for one in found:
        assert one.dtype == np.float32
        assert_same("autocast", one, stock, truth)
        assert 0 < np.linalg.norm(one - truth) < 0.8 * np.linalg.norm(half - truth)


def test_a_saved_fused_model_loads_as_stock(tmp_path: Path) -> None:
    """Copies and pickles are fused; unfuse gives stock's bits back."""
    fused, stock, _ = three(dense_model(tmp_path / "a", "bert", "mean", M.Normalize()))
    wanted = fused.encode(TEXTS)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert np.array_equal(twin.encode(TEXTS), wanted)
        assert not fusedformer.fuse(twin).replaced
    worker = pickle.loads(pickle.dumps(type(fused)._multi_process_worker))  # of a pool
    settings = dict.fromkeys(("prompt", "show_progress_bar", "normalize_embeddings"))
    settings |= dict(batch_size=4, output_value="sentence_embedding", save_to_cpu=True,
                     truncate_dim=None)  # fmt: skip
    given, results = Mock(), Mock()
    given.get.side_effect = [(3, TEXTS, settings), EOFError]
    with pytest.raises(EOFError):
        worker("cpu", fused, given, results)
    ((chunk, found),) = results.put.call_args.args
    assert chunk == 3
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    fused.save_pretrained(str(tmp_path / "saved"))
    loaded = S.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert [type(m) for m in loaded] == [type(m) for m in stock]
    assert np.array_equal(loaded.encode(TEXTS), stock.encode(TEXTS))
    assert fusedformer.unfuse(fused) > 0
    assert type(fused) is type(stock)
    assert np.array_equal(fused.encode(TEXTS), stock.encode(TEXTS))


def python_calls(run: Callable[[], Any]) -> int:
    """Count the functions in Python that one call of ``run`` calls."""
    found = 0

    def count(frame: Any, event: str, _: Any) -> None:
        nonlocal found
        found += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(before)
    return found


@pytest.mark.parametrize("kind", ["encoder", "cross-encoder"])
def test_one_short_text_takes_fewer_calls_than_stock(tmp_path: Path, kind: str) -> None:
    if build.library() is None:
        pytest.skip("no compiler")
    if kind == "encoder":
        both = three(dense_model(tmp_path))
        fused, stock = (functools.partial(m.encode, ["cat"]) for m in both[:2])
    else:
        both = three(S.CrossEncoder(saved(tmp_path, "classifier"), device="cpu"))
        fused, stock = (functools.partial(m.predict, [("cat", "dog")]) for m in both[:2])
    for run in (fused, stock, fused, stock):
        run()
    assert python_calls(fused) < 0.55 * python_calls(stock)


def test_inferring_sets_the_mode_and_the_device_where_they_are_others(tmp_path: Path) -> None:
    """A walk over the modules tells; modules that set their mode by more are called."""
    model = dense_model(tmp_path, "bert", "mean", M.Dense(32, 16))
    fusedformer.fuse(model)
    wanted = model.encode(TEXTS)
    model[2].train()
    assert np.array_equal(model.encode(TEXTS), wanted)
    assert not any(one.training for one in model.modules())
    own = model[2].linear.train = Mock(wraps=model[2].linear.train)
    model.encode(TEXTS)
    own.assert_called_with(False)
    moved = model.to = Mock(return_value=model)
    model.encode(TEXTS)
    moved.assert_not_called()
    model[0].register_buffer("elsewhere", torch.empty(1, device="meta"))
    model.encode(TEXTS)
    moved.assert_called_with(torch.device("cpu"))


def test_a_cross_encoder_ranks(tmp_path: Path) -> None:
    both = three(S.CrossEncoder(saved(tmp_path, "classifier"), device="cpu"))
    assert packs(both.fused)
    assert_same("predict", *(m.predict(PAIRS) for m in both))
    ranked = [m.rank(TEXTS[0], TEXTS) for m in both]
    scores = [sorted((one["corpus_id"], one["score"]) for one in found) for found in ranked]
    assert_same("rank", *(np.array(found)[:, 1] for found in scores))


@pytest.mark.usefixtures("_nothing_is_unpacked")
def test_a_sparse_encoder_computes_no_logits_of_padding(tmp_path: Path) -> None:
    both = three(sparse_model(tmp_path))
    assert_same("encode", *(m.encode(TEXTS, batch_size=4).to_dense() for m in both))


@pytest.mark.parametrize(("attend", "routed"), [(False, False), (True, False), (False, True)])
def test_late_interaction_expands_queries_and_packs_documents(
    tmp_path: Path, attend: bool, routed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expansion = dict(strategy="fixed", length=12, attend=attend, token=None)
    both = three(late_model(tmp_path, expansion, routed))
    queries = [torch.stack(m.encode_query(TEXTS)) for m in both]
    assert queries[0].shape == (len(TEXTS), 12, 16)
    assert_same("queries", *queries)
    unpack = Mock(side_effect=functional.unpack)
    monkeypatch.setattr(functional, "unpack", unpack)
    documents = [m.encode_document(TEXTS) for m in both]
    assert unpack.called
    for one in zip(*documents, strict=True):
        assert_same("document", *one)
    scores = [m.similarity(q, d) for m, q, d in zip(both, queries, documents, strict=True)]
    assert_same("scores", *scores)


def test_late_interaction_by_a_forward_of_its_own_is_padded(tmp_path: Path) -> None:
    """It could do anything with expanded queries."""

    class Own(M.Transformer):  # type: ignore[misc]
        def forward(self, features: dict[str, Any], **kwargs: Any) -> Any:
            return super().forward(features, **kwargs)

    model = late_model(tmp_path, dict(strategy="fixed", length=12, attend=False, token=None), False)
    assert not fusedformer.fuse(copy.deepcopy(model)).left
    model[0].__class__ = Own
    both = three(model)
    assert "MultiVectorEncoder reads padded positions" in str(fusedformer.fuse(both.fused))
    assert_same("queries", *(torch.stack(m.encode_query(TEXTS)) for m in both))


@pytest.mark.parametrize("cached", [False, True])
def test_gradients_of_contrastive_losses(tmp_path: Path, cached: bool) -> None:
    from sentence_transformers.sentence_transformer import losses

    both = three(dense_model(tmp_path, "bert", "mean", M.Normalize()))
    found: list[dict[str, Any]] = []
    for model in both:
        loss = (
            losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3)
            if cached
            else losses.MultipleNegativesRankingLoss(model)
        )
        columns = [model.preprocess(TEXTS), model.preprocess(TEXTS[::-1])]
        model.train()
        value = loss(columns, labels=None)
        value.backward()
        found.append({"loss": value, **gradients(model)})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 30
    # A key's bias has rounding alone: its truth is 0. The largest error of so few numbers is luck:
    # vectors are judged together, each in units of its own.
    names = [name for name in found[0] if not name.endswith("key.bias")]
    vectors = [name for name in names if found[0][name].dim() == 1]
    units = {name: found[2][name].norm() for name in vectors}
    assert min(units.values()) > 0
    assert_same("vectors", *(torch.cat([one[n] / units[n] for n in vectors]) for one in found))
    for name in set(names) - set(vectors):
        assert_same(name, *(one[name] for one in found))


def test_the_trainer_trains_as_stock(tmp_path: Path) -> None:
    """Three steps by its Trainer; the weights went the same way."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    data = datasets.Dataset.from_dict({"anchor": TEXTS * 2, "positive": TEXTS[::-1] * 2})
    fused, stock, _ = three(dense_model(tmp_path / "model"))
    before = {n: p.detach().clone() for n, p in stock.named_parameters()}
    for model in (stock, fused):
        arguments = S.SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=4, seed=1,
            learning_rate=1e-2, optim="sgd", report_to=[], save_strategy="no", use_cpu=True,
            disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = S.SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=data,
            loss=MultipleNegativesRankingLoss(model),
        )  # fmt: skip
        trainer.train()
    after = dict(fused.named_parameters())
    moved = 0.0
    for name, wanted in stock.named_parameters():
        step = (wanted - before[name]).abs().max()
        assert (after[name] - wanted).abs().max() <= 1e-3 * step + 1e-6, name
        moved = max(moved, step.item())
    assert moved > 1e-3
    fused.save_pretrained(str(tmp_path / "trained"))
    loaded = S.SentenceTransformer(str(tmp_path / "trained"), device="cpu")
    np.testing.assert_allclose(loaded.encode(TEXTS), fused.encode(TEXTS), atol=1e-5)
    trained = {n: p.detach().clone() for n, p in after.items()}
    fused.load_state_dict(before)
    trainer._load_from_checkpoint(str(tmp_path / "trained"))  # as it does for the best model
    assert all(torch.equal(p, trained[n]) for n, p in after.items())


def test_the_peer_of_benchmarks_gives_float32_of_a_bfloat16_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As all who are compared give; made without a deprecated argument or module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from harness.serving_peers import sentence_transformer

    dense = dense_model(tmp_path, "bert", "mean", M.Normalize()).bfloat16()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        encode = sentence_transformer(tmp_path, torch.bfloat16, batch=4)
    assert "argument was renamed" not in caplog.text
    texts = TEXTS[:6]  # as many positions as the model has
    found = encode(texts)
    assert found.dtype == torch.float32
    stock = dense.encode(texts, convert_to_tensor=True).float()
    assert_same("peer", found, stock, dense.double().encode(texts, convert_to_tensor=True))


def test_what_cannot_be_packed_is_left(tmp_path: Path) -> None:
    """By pack=False, or because the encoder has no packed form; the module in it stays stock's."""
    model = dense_model(tmp_path)
    fusedformer.fuse(model, pack=False)
    parts = M.Transformer, M.Pooling, S.SentenceTransformer
    assert (*map(type, (*model, model)),) == parts
    decoder = three(dense_model(tmp_path / "codegen", "codegen"))
    assert (*map(type, (*decoder.fused, decoder.fused)),) == parts
    for one in decoder:
        one.tokenizer.padding_side = "right"
    assert decoder.fused.max_seq_length == MOST_TOKENS
    assert_same("encode", *(m.encode(TEXTS) for m in decoder))
