"""Another runtime and another library that embed text on a CPU, with the weights of a BERT."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.case import Unsupported

Hidden = Callable[[Tensor, Tensor], Tensor]  # of ids and mask ``[B, L]``, the last hidden states


def openvino(model: nn.Module, dtype: torch.dtype) -> Hidden:
    """Compile ``model``, which is in float32, for as many threads as torch has."""
    ov = _found("openvino")
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    converted = ov.convert_model(model, example_input=_example())
    compiled = ov.Core().compile_model(converted, "CPU", settings)

    def hidden(ids: Tensor, mask: Tensor) -> Tensor:
        given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        return torch.from_numpy(compiled(given)[0])

    return hidden


def sentence_transformer(folder: Path, dtype: torch.dtype, batch: int) -> Any:
    """Make ``texts -> embeddings`` of sentence-transformers with the model in ``folder``.

    Its arrays are float32 for every dtype of the model, as the embeddings of the others are.
    """
    model = sentence_model(folder, dtype)
    return lambda texts: torch.from_numpy(
        model.encode(texts, batch_size=batch, show_progress_bar=False)
    )


def sentence_model(folder: Path, dtype: torch.dtype) -> Any:
    """Load the encoder in ``folder`` with mean pooling and normalization."""
    library = _found("sentence_transformers")
    base = _found("sentence_transformers.base.modules")
    dense = _found("sentence_transformers.sentence_transformer.modules")
    words = base.Transformer(str(folder), max_seq_length=256, model_kwargs={"dtype": dtype})
    pooling = dense.Pooling(words.get_embedding_dimension(), "mean")
    return library.SentenceTransformer(modules=[words, pooling, base.Normalize()], device="cpu")


def _found(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unsupported(f"{module} is not installed") from error


def _example() -> dict[str, Tensor]:
    ids = torch.ones(2, 8, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": ids.clone()}
