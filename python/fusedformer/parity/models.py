"""Compare a fused Hugging Face model with the model as it was."""

from __future__ import annotations

import copy
import itertools
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedformer.fusion import FusionReport, fuse
from fusedformer.parity.compared import ParityReport, compare

LENGTHS = (37, 5, 64, 18)  # of the padded batch


def compare_fused(
    source: str, dtype: torch.dtype, device: torch.device, *, layers: int | None = None
) -> tuple[FusionReport, ParityReport]:
    """Fuse a model; return what ``fuse`` did, and its errors beside the stock model's.

    Args:
        source: a folder with weights, a folder or a file with a configuration alone, or the name
            of a model type ("bert"); without weights they are random.
        dtype, device: of the model.
        layers: how many, of a model without weights; None for all.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: ``source`` names no model, or one that takes neither tokens nor images.
    """
    stock = load(source, layers).to(device, dtype).eval()
    inputs, where = example(stock, device, dtype)
    fused = copy.deepcopy(stock)
    done = fuse(fused)
    report = compare(fused, stock, inputs, where=where)
    report.names = "fused", "stock"
    return done, report


def load(source: str, layers: int | None = None) -> Any:
    """Load the model, on the CPU in float32."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    t: Any = transformers
    t.logging.set_verbosity_error()
    path = Path(source)
    weights = ("*.safetensors", "pytorch_model*.bin")
    if path.is_dir() and any(any(path.glob(pattern)) for pattern in weights):
        return t.AutoModel.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        try:
            settings = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"--model: expected JSON in {file}, but got: {error}") from None
        config = t.AutoConfig.for_model(settings.pop("model_type", ""), **settings)
    elif source in t.CONFIG_MAPPING:
        config = t.AutoConfig.for_model(source)
    else:
        raise ValueError(
            f"--model: expected a folder or file with a configuration of transformers, or a model "
            f"type such as 'bert', but got {source!r}"
        )
    if layers is not None:
        text = config.get_text_config()
        for name in ("num_hidden_layers", "n_layer", "n_layers"):
            if hasattr(text, name):
                setattr(text, name, layers)
                if getattr(text, "layer_types", None):
                    text.layer_types = text.layer_types[:layers]
                break
    torch.manual_seed(0)
    model = t.AutoModel.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # else gains are 1 and biases 0, which hides errors in both
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def example(
    model: Any, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Draw what the model takes: images, or a padded batch of random tokens and its mask."""
    name = model.main_input_name
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Tensor] = {}
    where = None
    config = model.config
    vision = getattr(config, "vision_config", config)
    if name == "pixel_values" or hasattr(config, "vision_config"):
        size, channels = vision.image_size, getattr(vision, "num_channels", 3)
        sizes = size if isinstance(size, (list, tuple)) else (size, size)
        pixels = torch.randn(len(LENGTHS), channels, *sizes, generator=generator)
        inputs["pixel_values"] = pixels.to(device, dtype)
    if name == "input_ids":
        text = config.get_text_config()
        limit = getattr(text, "max_position_embeddings", None) or 512
        lengths = torch.tensor([min(n, limit - 4) for n in LENGTHS])
        where = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)
        special = [getattr(text, f"{n}_token_id", None) for n in ("pad", "bos", "eos")]
        low, high = _free_ids(special, text.vocab_size)
        ids = torch.randint(low, high, tuple(where.shape), generator=generator)
        eos = special[2]
        if "pixel_values" in inputs and isinstance(eos, int) and eos < text.vocab_size:
            ids[torch.arange(len(LENGTHS)), lengths - 1] = eos  # CLIP pools its text there
        inputs["input_ids"] = ids.to(device)
        inputs["attention_mask"] = where.long()
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids[:, :16].to(device)
    if not inputs:
        raise ValueError(f"--model: {type(model).__name__} takes '{name}', not tokens or images")
    return inputs, where


def _free_ids(special: list[Any], size: int) -> tuple[int, int]:
    """Return the longest range of token ids without special ones."""
    taken = sorted({-1, size, *(i for i in special if isinstance(i, int) and 0 <= i < size)})
    ranges = [(a + 1, b) for a, b in itertools.pairwise(taken)]
    return max(ranges, key=lambda r: r[1] - r[0])
