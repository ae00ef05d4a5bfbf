"""Models of sentence-transformers: sentences are pooled from packed tokens.

``encode`` says that only one vector of each text is wanted. Then the encoder's rows stay packed
until they are pooled, in float32. A call of the model, as in training, gives all features as stock
does, padded.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from sentence_transformers import (
    CrossEncoder,
    MultiVectorEncoder,
    SentenceTransformer,
    SparseEncoder,
)
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, Pooling
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import Tensor, nn
from transformers import PreTrainedModel

from fusedformer.fusion._classes import Plan, combined
from fusedformer.fusion._hooks import is_untouched
from fusedformer.fusion._kept_rows import padding_computed, rows_kept
from fusedformer.fusion._packed_encoder import PackedEncoder
from fusedformer.fusion._packed_model import PackedModel
from fusedformer.fusion._pooled_rows import PackedSequences

_PACKING = "fusedformer_packing"  # of packed token embeddings, between two modules
_PACKED = PackedEncoder, PackedModel
_READ_SENTENCES_ONLY = Dense, Normalize, LayerNorm, Dropout
_EXPANDED = "query_expansion_positions"


class Wanted(NamedTuple):
    """Vectors of sentences, and nothing else; in float32 for models in half precision?"""

    wide: bool


_wanted: ContextVar[Wanted | None] = ContextVar("wanted", default=None)


@contextmanager
def only_sentences(model: nn.Module, wide: bool) -> Iterator[None]:
    """Promise that of what ``model`` returns only the vectors of sentences are read.

    Args:
        wide: whether they may be float32 where the model is bfloat16 or float16.
    """
    rest = [*model.children()][2:]
    wide = wide and all(isinstance(one, Normalize) for one in rest)
    token = _wanted.set(Wanted(wide) if _can_stay_packed(model) else None)
    try:
        yield
    finally:
        _wanted.reset(token)


class InferringModel:
    """A base of models that, asked to infer, look at each of their modules once.

    Stock's walks over them, for devices and to set their mode, take as long as a short text.
    """

    def train(self: Any, mode: bool = True) -> Any:
        """Set the mode, which is done where all modules are in evaluation mode already."""
        if not mode and _sets_mode_as_torch(type(self)._made_of[1]) and _are_evaluated(self):
            return self
        return super().train(mode)  # type: ignore[misc]

    def _resolve_inference_device(self: Any, device: Any) -> torch.device:
        """Return where inputs go; nothing is to be moved where all tensors are there already."""
        if device is None and not self._placement_is_delegated:
            found: torch.device = self.device
            if _are_on(self, found):
                return found
        found = super()._resolve_inference_device(device)  # type: ignore[misc]
        return found

    @staticmethod
    def _multi_process_worker(device: str, model: Any, *queues: Any) -> None:
        """Infer in a process of a pool, to which a method of a class made here can't be sent."""
        stock = type(model)._made_of[1]
        stock._multi_process_worker(device, model, *queues)


class SentenceModel(InferringModel):
    """A base of models whose ``encode`` pools packed tokens."""

    def _inference(self: Any, inputs: list[Any], **settings: Any) -> Any:
        """Compute what ``encode`` returns."""
        if settings.get("output_value", "sentence_embedding") != "sentence_embedding":
            return super()._inference(inputs, **settings)  # type: ignore[misc]
        # Arrays are float32 anyway; tensors have the model's dtype.
        with only_sentences(self, wide=settings.get("save_to_cpu", False)):
            return super()._inference(inputs, **settings)  # type: ignore[misc]


class _Part(ABC):  # noqa: B024
    """A base for parts of a model; ABC, as theirs is, or no object could change its class."""


class PackedTokens(_Part):
    """A base of the module that runs the encoder; it leaves its rows packed if it may."""

    def forward(self: Any, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Compute ``token_embeddings``, of expanded queries at padded positions too."""
        if _EXPANDED in features:
            found: dict[str, Any] = self._forward_padded(features, **kwargs)
            return found
        if torch.compiler.is_compiling() or _wanted.get() is None:
            return super().forward(features, **kwargs)  # type: ignore[misc,no-any-return]
        with rows_kept() as kept:
            found = super().forward(features, **kwargs)  # type: ignore[misc]
        if kept.packing is not None:
            found[_PACKING] = kept.packing
        return found

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # its context variable is for eager calls
    def _forward_padded(self: Any, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        with padding_computed():
            return super().forward(features, **kwargs)  # type: ignore[misc,no-any-return]


class PackedPooling(_Part):
    """A base of pooling over tokens that are packed or padded."""

    def forward(self: Any, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Compute ``sentence_embedding`` from ``token_embeddings``."""
        packing = features.pop(_PACKING, None)
        if packing is None:
            return super().forward(features, **kwargs)  # type: ignore[misc,no-any-return]
        rows = features["token_embeddings"][0]
        given = 0 if self.include_prompt else features.get("prompt_length", 0)
        prompt_length = int(given.flatten()[0]) if isinstance(given, Tensor) else int(given)
        sequences = PackedSequences(rows, packing, prompt_length)
        modes = [self.pooling_mode] if isinstance(self.pooling_mode, str) else self.pooling_mode
        pooled = torch.cat([sequences.pooled(mode) for mode in modes], -1)
        wanted = _wanted.get()
        wide = wanted is not None and wanted.wide
        features["sentence_embedding"] = pooled if wide else pooled.to(rows.dtype)
        return features


class PackedSplade(_Part):
    """A base of pooling over the vocabulary; stock's has a form for packed tokens."""

    def forward(self: Any, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Compute ``sentence_embedding`` from logits in ``token_embeddings``."""
        packing = features.pop(_PACKING, None)
        if packing is not None:
            features["cu_seq_lens_q"] = packing.cu_seqlens
        return super().forward(features, **kwargs)  # type: ignore[misc,no-any-return]


def _modules_of(model: nn.Module) -> list[nn.Module]:
    """List all modules, as ``model.modules()`` does in four times the time; some maybe twice."""
    found = [model]
    for module in found:
        inside = module.__dict__["_modules"]
        if inside:
            found += [one for one in inside.values() if one is not None]
    return found


def _are_evaluated(model: nn.Module) -> bool:
    """Return whether all modules are in evaluation mode, and setting it would do nothing more."""
    inside = _modules_of(model)[1:]
    return (
        not model.training
        and not any(one.training or "train" in one.__dict__ for one in inside)
        and all(map(_sets_mode_as_torch, {type(one) for one in inside}))
    )


def _sets_mode_as_torch(cls: Any) -> bool:
    return cls.train in (nn.Module.train, PreTrainedModel.train)


def _are_on(model: nn.Module, device: torch.device) -> bool:
    for module in _modules_of(model):
        own = module.__dict__
        for tensors in (own["_parameters"], own["_buffers"]):
            for tensor in tensors.values():
                if tensor is not None and tensor.device != device:
                    return False
    return True


def _can_stay_packed(model: nn.Module) -> bool:
    """Return whether the modules of ``model`` read tokens only to pool them."""
    modules = [*model.children()]
    if len(modules) < 2 or not all(is_untouched(one) for one in modules[:2]):
        return False
    transformer, pooling = modules[:2]
    if not isinstance(transformer, PackedTokens) or not _hands_rows_on(transformer):
        return False
    if isinstance(pooling, PackedSplade):
        return len(modules) == 2
    if not isinstance(pooling, PackedPooling):
        return False
    return all(isinstance(one, _READ_SENTENCES_ONLY) for one in modules[2:])


def _hands_rows_on(transformer: Any) -> bool:
    """Return whether the model inside computes each token by itself after its encoder."""
    model = transformer.model
    names = {params["method_output_name"] for params in transformer.modality_config.values()}
    inner = [model, *([] if model.base_model is model else [model.base_model])]
    return (
        names <= {"last_hidden_state", "logits"}
        and type(model).__module__.startswith("transformers.models.")
        and type(model).__name__.endswith(("Model", "ForMaskedLM"))
        and all(is_untouched(one) for one in inner)
    )


def packs(model: nn.Module) -> bool:
    """Return whether an encoder in ``model`` computes real tokens only."""
    return any(isinstance(one, _PACKED) for one in model.modules())


def marks_expansions(model: nn.Module) -> bool:
    """Return whether :class:`PackedTokens` gets all queries of ``model``, with their expansions."""
    parts = [one for one in model.modules() if isinstance(one, Transformer)]
    return isinstance(model, MultiVectorEncoder) and all(
        _is_plain(one, Transformer) or isinstance(one, PackedTokens) for one in parts
    )


def plan_sentence_models(plan: Plan, model: nn.Module) -> None:
    """Add to the plan what is to become of the models of sentence-transformers in ``model``.

    What is to become of the encoders in them stands in ``plan`` already.
    """
    for path, module in model.named_modules():
        for stock, (ours, after) in _OURS.items():
            encoders = module if isinstance(module, Transformer | BaseModel) else model
            if _is_plain(module, stock) and _will_pack(plan, encoders):
                plan.give(path, module, combined(ours, type(module)), after)


def _is_plain(module: Any, stock: Any) -> bool:
    """Return whether ``module`` is a ``stock``, with its method that is replaced."""
    name = "_inference" if issubclass(stock, BaseModel) else "forward"
    own = getattr(type(module), name, None)
    return isinstance(module, stock) and own is not None and own is getattr(stock, name, None)


def _will_pack(plan: Plan, model: nn.Module) -> bool:
    classes = map(plan.class_of, model.modules())
    return any(issubclass(cls, _PACKED) for cls in classes)


_OURS: dict[Any, tuple[Any, str]] = {
    Transformer: (PackedTokens, "can leave tokens packed"),
    Pooling: (PackedPooling, "pools packed tokens"),
    SpladePooling: (PackedSplade, "pools packed tokens"),
    SentenceTransformer: (SentenceModel, "encode keeps tokens packed"),
    SparseEncoder: (SentenceModel, "encode keeps tokens packed"),
    CrossEncoder: (InferringModel, "predict looks at its modules once"),
}
