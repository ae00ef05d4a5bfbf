"""Vectors of texts by a model of sentence-transformers, in batches of as many tokens as fit.

Texts are sorted by length, longest first, so that what does not fit into memory fails at once. A
batch has as many texts as its tokens allow: few long ones, or many short ones.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedformer.errors import BadTypeError, BadValueError
from fusedformer.fusion import FusionReport, fuse, is_fused, unfuse
from fusedformer.fusion.clients import outdated

__all__ = ["embed"]

_TOKENIZED_AT_ONCE = 1024  # texts
_TEXTS_IN_A_BATCH = 32  # as in encode, where tokens cannot be counted
_DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "float64": torch.float64,
}  # fmt: skip


def embed(
    model_or_path: Any,
    texts: str | Iterable[str],
    *,
    batch_tokens: int = 4096,
    prompt_name: str | None = None,
    prompt: str | None = None,
    normalize_embeddings: bool = False,
    truncate_dim: int | None = None,
    task: str | None = None,
    convert_to_tensor: bool = False,
    show_progress_bar: bool | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Any:
    """Compute what ``SentenceTransformer.encode`` returns, for texts of any lengths.

    A text that is longer than the model is cut as the model cuts it, and a warning says how many
    were. A model none of whose encoders can be packed computes padding, which a warning says too.

    Args:
        model_or_path: a ``SentenceTransformer``, or what one is loaded from: a folder, or a name.
            A model that is not fused is fused for the call, and then what it was; so is one that
            is in training mode, which is computed in evaluation mode.
        texts: one text, or several; a text may be empty.
        batch_tokens: the largest number of tokens in a batch, padding included if it is computed;
            a batch has at least one text.
        prompt_name, prompt, normalize_embeddings, truncate_dim: as ``encode`` takes them.
        task: by which a model with a ``Router`` chooses its modules, as ``encode`` takes it:
            ``"query"`` and ``"document"`` are those of ``encode_query`` and ``encode_document``.
        convert_to_tensor: return a tensor on the model's device.
        show_progress_bar: None shows one if standard error is a terminal.
        dtype: in which a model is loaded, by name or as torch's; only with a path.
        device: on which a model is loaded, only with a path; None leaves it to
            sentence-transformers.

    Returns:
        An array ``[texts, width]`` in the order of ``texts``, ``[width]`` for one text; a tensor if
        asked for. It is float32, float64 for models in float64; models in half precision are pooled
        and normalized in float32.

    Raises:
        TypeError: ``model_or_path`` is another kind of model, or ``texts`` has something else than
            str; ``batch_tokens`` is no int.
        ValueError: ``batch_tokens`` is not positive; ``dtype`` is unknown, or one that this CPU
            has no products in; ``dtype`` or ``device`` with a model that is loaded.
        FileNotFoundError: ``model_or_path`` is a folder that does not exist.
        ImportError: sentence-transformers is not installed, or too old.
    """
    listed = _checked_texts(texts)
    most = _checked_batch_tokens(batch_tokens)
    model = loaded(model_or_path, dtype, device)
    run = _Run(model, most, model._resolve_prompt(prompt, prompt_name), truncate_dim, task)
    shown = _progress_bar(len(listed), show_progress_bar)
    with _evaluated(model), _fused(model) as reason, shown as bar:
        if reason and listed:
            _warn(f"'model_or_path' computes padding: {reason}")
        vectors = run.vectors(listed, reason, bar)
    if run.cut:
        _warn(
            f"{run.cut} of {len(listed)} 'texts' fill the model's {model.max_seq_length} tokens "
            f"(max_seq_length); what is longer was cut"
        )
    if normalize_embeddings:
        vectors = torch.nn.functional.normalize(vectors, dim=-1)
    if not convert_to_tensor:
        vectors = vectors.cpu()
    vectors = vectors[0] if isinstance(texts, str) else vectors
    return vectors if convert_to_tensor else vectors.numpy()


class _Run:
    """A model in one call, and how it is to be used."""

    def __init__(
        self,
        model: Any,
        batch_tokens: int,
        prompt: str | None,
        truncate_dim: int | None,
        task: str | None,
    ) -> None:
        self.model = model
        self.batch_tokens = batch_tokens
        self.prompt = prompt
        self.task: dict[str, str] = {} if task is None else {"task": task}
        self.truncate_dim = model.truncate_dim if truncate_dim is None else truncate_dim
        self.cut = 0  # texts that fill the model

    @torch.inference_mode()
    def vectors(self, texts: list[str], padded: str, bar: Any) -> Tensor:
        """Compute the vectors of all texts, in their order."""
        found: Any = None
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        for start in range(0, len(order), _TOKENIZED_AT_ONCE):
            index = order[start : start + _TOKENIZED_AT_ONCE]
            for rows, batch in self._batches([texts[i] for i in index], bool(padded)):
                vectors = self._vectors_of_batch(batch)
                if found is None:
                    found = vectors.new_empty(len(texts), vectors.shape[1])
                found[[index[i] for i in rows]] = vectors
                bar.update(len(rows))
        return self._no_vectors() if found is None else found

    def _no_vectors(self) -> Tensor:
        sizes = self.truncate_dim, self.model.get_embedding_dimension()
        return torch.empty(0, min(filter(None, sizes), default=0), device=self.model.device)

    def _batches(
        self, texts: list[str], padded: bool
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Make batches of ``texts``: the indices of theirs, and their features."""
        count = len(texts)
        features = self.model.preprocess(texts, prompt=self.prompt, **self.task)
        mask = features.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.shape[:1] != (count,) or mask.dim() != 2:
            for start in range(0, count, _TEXTS_IN_A_BATCH):  # features that nobody could split
                rows = [*range(start, min(start + _TEXTS_IN_A_BATCH, count))]
                part = [texts[i] for i in rows]
                yield rows, self.model.preprocess(part, prompt=self.prompt, **self.task)
            return
        if not mask.shape[1]:  # none has a token: encoders need a place to see that
            features = {name: _widened(value, mask) for name, value in features.items()}
            mask = features["attention_mask"]
        sizes = mask.sum(1).tolist()
        self.cut += sum(size >= (self.model.max_seq_length or torch.inf) for size in sizes)
        order = sorted(range(count), key=lambda i: -sizes[i])
        for rows in _cut(order, sizes, self.batch_tokens, padded):
            columns = mask[rows].any(0).nonzero().flatten()
            used = slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else slice(0, 1)
            yield rows, {name: _part(value, rows, used, mask) for name, value in features.items()}

    def _vectors_of_batch(self, features: dict[str, Any]) -> Tensor:
        from fusedformer.fusion.sentences import only_sentences

        device = self.model.device
        placed = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in features.items()}
        with only_sentences(self.model, wide=True):
            vectors: Tensor = self.model(placed, **self.task)["sentence_embedding"]
        wide = torch.promote_types(vectors.dtype, torch.float32)
        return vectors[:, : self.truncate_dim].to(wide)


def _widened(value: Any, mask: Tensor) -> Any:
    """Return a feature of texts without tokens with a padded place for each."""
    is_of_tokens = isinstance(value, Tensor) and value.shape == mask.shape
    return torch.nn.functional.pad(value, (0, 1)) if is_of_tokens else value


def _part(value: Any, rows: list[int], columns: slice, mask: Tensor) -> Any:
    """Return what ``value``, a feature of texts whose tokens have ``mask``, is for some of them."""
    if not isinstance(value, Tensor) or value.shape[:1] != mask.shape[:1]:
        return value
    return value[rows][:, columns] if value.shape[:2] == mask.shape else value[rows]


def _cut(order: list[int], sizes: list[int], most: int, padded: bool) -> Iterator[list[int]]:
    """Cut ``order``, texts from the longest on, into batches of at most ``most`` tokens."""
    batch: list[int] = []
    tokens = 0
    for text in order:
        added = sizes[batch[0]] if padded and batch else sizes[text]
        if batch and tokens + added > most:
            yield batch
            batch, tokens, added = [], 0, sizes[text]
        batch.append(text)
        tokens += added
    if batch:
        yield batch


@contextmanager
def _evaluated(model: Any) -> Iterator[None]:
    """Put ``model`` into evaluation mode for a while; parts of it may be in that mode anyway."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True


@contextmanager
def _fused(model: Any) -> Iterator[str]:
    """Fuse ``model`` for a while unless it is; say why it computes padding, or nothing."""
    from fusedformer.fusion.sentences import packs

    if is_fused(model):
        yield "" if packs(model) else "it was fused so"
        return
    report = fuse(model)
    try:
        yield "" if packs(model) else _reasons(report) or "nothing in it has a packed form"
    finally:
        unfuse(model)


def _reasons(report: FusionReport) -> str:
    """Say why modules were left alone; each reason once, however many layers it is of."""
    paths: dict[str, list[str]] = {}
    for one in report.left:
        paths.setdefault(one.reason, []).append(f"'{one.path}'")
    return "; ".join(
        f"{found[0]}{f' and {len(found) - 1} more' if found[1:] else ''}: {reason}"
        for reason, found in paths.items()
    )


def loaded(given: Any, dtype: str | torch.dtype | None, device: str | torch.device | None) -> Any:
    """Return the model that :func:`embed` was given, loaded unless it is."""
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "embed(): sentence-transformers is not installed: pip install 'fusedformer[embed]'"
        ) from error
    for library in ("transformers", "sentence_transformers"):
        if reason := outdated(library):
            raise ImportError(f"embed(): {reason}: pip install 'fusedformer[embed]'")
    if isinstance(given, SentenceTransformer):
        for name, value in (("dtype", dtype), ("device", device)):
            if value is not None:
                raise BadValueError(
                    f"embed(): expected no '{name}' with a model that is loaded, but got "
                    f"{value!r}; use model.to({value!r})"
                )
        return given
    if not isinstance(given, str | os.PathLike):
        raise BadTypeError(
            f"embed(): expected 'model_or_path' to be a SentenceTransformer, a folder or a name, "
            f"but got {type(given).__name__}"
        )
    folder = Path(given).expanduser()
    if not folder.is_dir() and (isinstance(given, os.PathLike) or folder.is_absolute()):
        raise FileNotFoundError(
            f"embed(): expected 'model_or_path' to be a folder or a name, but there is no folder "
            f"{folder}"
        )
    settings: dict[str, Any] = {}
    if dtype is not None:
        wanted = _checked_dtype(dtype)
        settings["model_kwargs"] = {"dtype": wanted}
    model = SentenceTransformer(
        os.fspath(given), device=None if device is None else str(device), **settings
    )
    if dtype is not None and model.device.type == "cpu":
        _check_cpu_has(wanted)
    return model.to(wanted) if dtype is not None else model


def _checked_texts(texts: Any) -> list[str]:
    listed = [texts] if isinstance(texts, str) else texts
    if not isinstance(listed, Iterable) or isinstance(listed, bytes | Mapping):
        raise BadTypeError(
            f"embed(): expected 'texts' to be a str or several of them, "
            f"but got {type(texts).__name__}"
        )
    found = [*listed]
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise BadTypeError(
                f"embed(): expected 'texts' to have only str, but got {type(text).__name__} "
                f"at index {i}"
            )
    return found


def _checked_batch_tokens(given: Any) -> int:
    if isinstance(given, bool) or not isinstance(given, Integral):
        raise BadTypeError(
            f"embed(): expected 'batch_tokens' to be an int, but got {type(given).__name__}"
        )
    if given < 1:
        raise BadValueError(
            f"embed(): expected 'batch_tokens' to be a positive int, but got {given}"
        )
    return int(given)


def _checked_dtype(dtype: str | torch.dtype) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise BadValueError(
            f"embed(): expected 'dtype' to be one of {', '.join(_DTYPES)}, but got {dtype!r}"
        )
    return _DTYPES[name]


def _check_cpu_has(dtype: torch.dtype) -> None:
    """Raise unless oneDNN has products in that dtype on this CPU; others are many times slower."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}

    def lacks(one: torch.dtype) -> bool:
        asked = f"_is_mkldnn_{names.get(one)}_supported"  # missing where torch has no oneDNN
        return one in names and not getattr(torch.ops.mkldnn, asked, lambda: True)()

    if lacks(dtype):
        others = [name for name, one in _DTYPES.items() if not lacks(one)]
        raise BadValueError(
            f"embed(): expected 'dtype' to be one that this CPU multiplies in, "
            f"{' or '.join(others)}, but got {dtype}"
        )


def _progress_bar(count: int, shown: bool | None) -> Any:
    from tqdm import tqdm  # sentence-transformers needs it

    disabled = None if shown is None else not shown  # None: unless standard error is a terminal
    return tqdm(total=count, desc="Texts", unit="text", disable=disabled)


def _warn(text: str) -> None:
    warnings.warn(f"embed(): {text}", UserWarning, stacklevel=3)
