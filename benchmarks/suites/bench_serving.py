"""Text turned into unit vectors: tokenizer, encoder, mean pooling and normalization.

Texts are docstrings of mixed length, in batches of texts sorted by length unless a case says
otherwise. On a busy machine, by ``run.py --busy``, it shows who waits for whom.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness import counting
from harness.case import REFERENCE, Case, NotApplicable, Program, Provider, Sizes, Suite
from harness.serving_peers import Hidden, openvino, sentence_transformer
from suites.bench_encoder import natural_lengths

BATCH = 32
# name: (layers, width, heads, feed-forward width)
MODELS = {
    "MiniLM": (6, 384, 12, 1536), "BERT-base": (12, 768, 12, 3072), "tiny": (2, 64, 4, 128),
}  # fmt: skip


def cases(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """List numbers of texts, and two orders; pretrained weights where they are installed."""
    if importlib.util.find_spec("transformers") is None:
        return []
    if sizes.name == "tiny":
        return [_case("tiny", 4, dtype, client=None, headline=True)]
    from fusedformer.tools.report.minilm import MiniLM, MissingExtra

    try:
        client = MiniLM()
    except MissingExtra:
        return []
    more = 8 if sizes.name == "full" else 1
    return [
        _case("MiniLM", 128 * more, dtype, client, headline=True),
        _case("MiniLM", 128 * more, dtype, client, by_length=False),
        *(_case("MiniLM", count, dtype, client) for count in (1, 8, 32, 256 * more)),
        _case("BERT-base", 32 * more, dtype, client),
    ]


def _case(
    name: str,
    count: int,
    dtype: torch.dtype,
    client: Any,
    *,
    by_length: bool = True,
    headline: bool = False,
) -> Case:
    """Make a case of ``count`` texts, or of random tokens where there is no tokenizer."""
    texts: list[str] = []
    if client is None:
        ids = [torch.randint(10, 100, (n,)).tolist() for n in natural_lengths(count, 16)]
    else:
        from fusedformer.tools.report.corpus import stdlib_passages

        texts = [passage.text for passage in stdlib_passages(count)]
        ids = client.tokenize(texts)
    lengths = [len(each) for each in ids]
    costs = counting.encoder(lengths, *MODELS[name], dtype.itemsize)
    order = "" if by_length else ", in order of arrival"
    make: Any = lambda device: {}
    return Case(
        "serving",
        f"{name}, {count} texts of {sum(lengths) / count:.0f} tokens{order}",
        dtype,
        make,
        {"forward": costs["forward"]},
        {"model": name, "client": client, "texts": texts, "ids": ids, "by_length": by_length},
        headline,
        tokens=sum(lengths),
    )


def _stock(case: Case, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Make transformers' BertModel, with pretrained weights where the case has them."""
    if case.options["model"] == "MiniLM":
        pretrained: nn.Module = case.options["client"].stock(dtype, device)
        return pretrained
    from transformers import BertConfig, BertModel

    layers, width, heads, feedforward = MODELS[case.options["model"]]
    torch.manual_seed(1)  # the same weights in every provider
    settings: dict[str, Any] = {
        "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
        "intermediate_size": feedforward, "attn_implementation": "sdpa",
    }  # fmt: skip
    model: Any = BertModel(BertConfig(**settings), add_pooling_layer=False)
    ready: nn.Module = model.to(device, dtype).eval()
    return ready


def _program(case: Case, hidden: Hidden, device: torch.device) -> Program:
    """Embed the texts by the hidden states of one of the models."""
    from fusedformer.models import sentence_embeddings
    from fusedformer.tools.report.minilm import padded_batches

    o = case.options

    def embed() -> Tensor:
        ids = o["client"].tokenize(o["texts"]) if o["texts"] else o["ids"]
        batches = padded_batches(ids, BATCH, device, by_length=o["by_length"])
        with torch.inference_mode():
            found = [
                sentence_embeddings(hidden(b.input_ids, b.attention_mask), b.attention_mask)
                for b in batches
            ]
        back = torch.tensor([i for b in batches for i in b.index]).argsort()
        return torch.cat(found)[back.to(device)]

    return Program(embed)


def _of_model(model: nn.Module) -> Hidden:
    def hidden(ids: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = model(ids, attention_mask=mask).last_hidden_state
        return found

    return hidden


def _fused(case: Case, device: torch.device) -> Program:
    import fusedformer

    model = _stock(case, case.dtype, device)
    fusedformer.fuse(model)
    return _program(case, _of_model(model), device)


def _sentence_transformer(case: Case) -> Program:
    """Call sentence-transformers, which sorts by itself, with the pretrained files."""
    if case.options["model"] != "MiniLM" or not case.options["by_length"]:
        raise NotApplicable
    from fusedformer.tools.report.minilm import WEIGHTS_PACKAGE

    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    assert spec is not None and spec.origin is not None
    encode = sentence_transformer(Path(spec.origin).parent / "model", case.dtype, BATCH)
    return Program(lambda: encode(case.options["texts"]))


def truth(case: Case, device: torch.device) -> Program:
    """Compute the stock model in float64, its weights rounded to the case's dtype first."""
    model = _stock(case, case.dtype, device).double()
    return _program(case, _of_model(model), device)


def providers(device: torch.device, compile: str) -> dict[str, Provider]:
    """List who embeds here; others on the CPU alone, where they are the ones to beat."""

    def peer(build: Any) -> Provider:
        stock = torch.float32
        return lambda case: _program(case, build(_stock(case, stock, device), case.dtype), device)

    found: dict[str, Provider] = {
        "fusedformer": lambda case: _fused(case, device),
        REFERENCE: lambda case: _program(case, _of_model(_stock(case, case.dtype, device)), device),
    }
    if device.type == "cpu":
        found["sentence-transformers"] = _sentence_transformer
        found["OpenVINO"] = peer(openvino)
    return found


SUITE = Suite("serving", cases, providers, truth, clock="latency")


def test_serving(benchmark: Any, contest: Any) -> None:
    """Time one provider of one case in one direction; see conftest.py."""
    contest(benchmark)
