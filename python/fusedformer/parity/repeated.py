"""Check that results repeat: from run to run, and in batches of other sequences."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedformer._internal.text import table
from fusedformer.parity import calls
from fusedformer.parity.calls import Arguments
from fusedformer.parity.criterion import Function
from fusedformer.parity.measure import measured
from fusedformer.parity.tables import SHOWN

Packed = Callable[[dict[str, Any], Tensor, int], Any]


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from the same one computed in another way.

    Attributes:
        name: of the output or gradient.
        way: the other way: "run 2", or "alone", "packed" and the like.
        elements, of: how many elements differ in their bits, of how many.
        max_difference, max_ulp: the largest difference, and in units in the last place.
    """

    name: str
    way: str
    elements: int
    of: int
    max_difference: float
    max_ulp: float

    @property
    def equal(self) -> bool:
        """Whether all bits are the same."""
        return self.elements == 0


class SamenessReport:
    """The result of :func:`determinism` or :func:`batch_invariance`; ``str()`` is a table.

    Attributes:
        title: what was compared.
        rows: a :class:`Difference` for each tensor and way.
    """

    def __init__(self, title: str, rows: Sequence[Difference]) -> None:
        self.title = title
        self.rows = tuple(rows)

    @property
    def passed(self) -> bool:
        """Whether every tensor has the same bits in every way."""
        return all(row.equal for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON takes it."""
        return {
            "schema": 1, "torch": torch.__version__, "title": self.title, "passed": self.passed,
            "rows": [asdict(row) for row in self.rows],
        }  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write all figures as JSON."""
        Path(path).write_text(json.dumps(self.as_dict(), indent=1) + "\n")

    def __str__(self) -> str:
        body = [
            [
                row.name,
                row.way,
                f"{row.elements} of {row.of}",
                f"{row.max_difference:.2e}",
                f"{row.max_ulp:.3g}",
                "same" if row.equal else "differs",
            ]
            for row in sorted(self.rows, key=lambda row: row.equal)[:SHOWN]
        ]
        head = ("tensor", "", "elements that differ", "largest", "ULP", "bits")
        same = sum(row.equal for row in self.rows)
        verdict = f"{'PASS' if self.passed else 'FAIL'}: {self.title}: {same} of {len(self.rows)}"
        return table(head, body, (2, 3, 4)) + f"\n\n{verdict} have the same bits"

    __repr__ = __str__


def determinism(
    function: Function, inputs: Any, *, runs: int = 3, gradients: bool = True, seed: int = 0
) -> SamenessReport:
    """Check that outputs and gradients have the same bits in every run.

    Args:
        function: a function or a module, in training with dropout too: the generator is seeded
            before each run.
        inputs: a tensor, a sequence of positional or a mapping of keyword arguments.
        runs: how many, at least two.
        gradients: also those of inputs that require one, and of parameters.
        seed: of the generator, and of the random gradients of the outputs.

    Raises:
        TypeError: ``function`` cannot be called, or ``inputs`` cannot be passed.
        ValueError: fewer than two ``runs``.
    """
    calls.check_callable("determinism", function=function)
    if runs < 2:
        raise ValueError(f"determinism(): expected 'runs' to be at least 2, but got {runs}")
    given = Arguments.of("determinism", inputs)
    first, *others = [
        _outputs_and_gradients(function, given.copied(), gradients, seed) for _ in range(runs)
    ]
    rows = [
        difference(name, f"run {number}", other[name], tensor)
        for number, other in enumerate(others, 2)
        for name, tensor in first.items()
    ]
    return SamenessReport("run to run", rows)


def batch_invariance(
    function: Function,
    inputs: Any,
    lengths: Sequence[int],
    *,
    packed: Packed | None = None,
    batch_first: bool = True,
) -> SamenessReport:
    """Check that a sequence has the same bits whatever is computed with it.

    Each sequence of a padded batch is computed again alone, without padding; alone, padded; and in
    the reversed batch; with ``packed`` also in a packed batch. Matrix products choose their
    algorithm by the number of rows, so a module that contains some may fail where attention,
    softmax and norms by themselves do not; the columns say by how much.

    Args:
        function: a function or a module, without dropout.
        inputs: a tensor, a sequence of positional or a mapping of keyword arguments. Tensors
            ``[N, S, *]`` (masks included) and ``[N]`` are split by sequence, others passed as
            they are.
        lengths: of the ``N`` sequences.
        packed: called with the arguments by name (``"argument 0"`` for positional ones), tensors
            packed to ``[tokens, *]``; with ``cu_seqlens``, int32 ``[N + 1]``; and with the largest
            length. It returns ``[tokens, *]``.
        batch_first: False for ``[S, N, *]``.

    Raises:
        TypeError: ``function`` cannot be called, or ``inputs`` cannot be passed.
        ValueError: no input has ``N`` sequences of the largest length; ``function`` draws random
            numbers; a length is not positive.
    """
    calls.check_callable("batch_invariance", function=function)
    given = Arguments.of("batch_invariance", inputs)
    count, longest = len(lengths), max(lengths, default=0)
    if min(lengths, default=0) < 1:
        raise ValueError(
            f"batch_invariance(): expected 'lengths' to be positive, but got {list(lengths)}"
        )
    batch = _Batch(count, longest, batch_first)
    if not any(batch.has_sequences(x) for x in given.named().values()):
        raise ValueError(
            f"batch_invariance(): expected an input of {count} sequences of length {longest}, but "
            f"none has this shape"
        )
    calls.check_deterministic("batch_invariance", "function", function, given)
    rows: list[Difference] = []

    def run_one(which: int, length: int) -> dict[str, Tensor]:
        return calls.call(function, given.mapped(lambda x: batch.one(x, which, length)))

    with torch.no_grad():
        whole = calls.call(function, given.copied())
        in_reverse = calls.call(function, given.mapped(batch.reversed))
        for i, length in enumerate(lengths):
            ways = {"alone": run_one(i, length), "alone, padded": run_one(i, longest)}
            for name, tensor in whole.items():
                if not batch.has_sequences(tensor):
                    continue
                own = batch.rows(tensor, i, length)
                found = {way: batch.rows(one[name], 0, length) for way, one in ways.items()}
                found["reversed batch"] = batch.rows(in_reverse[name], count - 1 - i, length)
                rows += [
                    difference(f"{name}, sequence {i} of length {length}", way, other, own)
                    for way, other in found.items()
                ]
        if packed is not None:
            rows += list(_packed_differences(packed, given, whole, batch, lengths))
    return SamenessReport("alone, padded, packed", rows)


@dataclass(frozen=True)
class _Batch:
    """The shape of the batch: which tensors hold its sequences, and how to take them out."""

    count: int
    longest: int
    batch_first: bool

    def has_sequences(self, value: Any) -> bool:
        """Whether ``value`` holds the sequences, as ``[N, S, *]`` or ``[S, N, *]``."""
        shape = (self.count, self.longest) if self.batch_first else (self.longest, self.count)
        # Padding masks are always batch first.
        shapes = shape, (self.count, self.longest)
        return isinstance(value, Tensor) and tuple(value.shape[:2]) in shapes

    def one(self, value: Any, which: int, length: int) -> Any:
        """Return a batch of one sequence, cut to ``length``."""
        if isinstance(value, Tensor) and tuple(value.shape) == (self.count,):
            return value[which : which + 1]
        if not self.has_sequences(value):
            return value
        return self._laid_out_as(value, self._as_batch_first(value)[which : which + 1, :length])

    def reversed(self, value: Any) -> Any:
        """Return the batch, last sequence first."""
        if isinstance(value, Tensor) and tuple(value.shape) == (self.count,):
            return value.flip(0)
        if not self.has_sequences(value):
            return value
        return self._laid_out_as(value, self._as_batch_first(value).flip(0))

    def _laid_out_as(self, value: Tensor, rows: Tensor) -> Tensor:
        """Order the dimensions of batch-first ``rows`` as those of ``value``."""
        return (rows if self._is_batch_first(value) else rows.transpose(0, 1)).contiguous()

    def rows(self, output: Tensor, which: int, length: int) -> Tensor:
        """Return the ``[length, *]`` of one sequence of an output."""
        return (output if self.batch_first else output.transpose(0, 1))[which, :length]

    def _is_batch_first(self, value: Tensor) -> bool:
        return self.batch_first or value.dim() == 2

    def _as_batch_first(self, value: Tensor) -> Tensor:
        return value if self._is_batch_first(value) else value.transpose(0, 1)

    def packed(self, value: Any, lengths: Sequence[int]) -> Any:
        """Return the real rows of all sequences, ``[tokens, *]``."""
        if not self.has_sequences(value):
            return value
        rows = self._as_batch_first(value)
        return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])


def _packed_differences(
    packed: Packed,
    given: Arguments,
    whole: dict[str, Tensor],
    batch: _Batch,
    lengths: Sequence[int],
) -> Iterator[Difference]:
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    values = {name: batch.packed(x, lengths) for name, x in given.named().items()}
    device = next(x.device for x in values.values() if isinstance(x, Tensor))
    result = packed(values, starts.to(device), batch.longest)
    found = calls.call(lambda: result, Arguments((), {}))
    for name, tensor in whole.items():
        if name in found and batch.has_sequences(tensor):
            wanted = batch.packed(tensor, lengths)
            yield difference(name, "packed", found[name], wanted)


def _outputs_and_gradients(
    function: Function, own: Arguments, gradients: bool, seed: int
) -> dict[str, Tensor]:
    leaves = {**calls.parameters(function), **own.leaves()} if gradients else {}
    with torch.random.fork_rng(), torch.set_grad_enabled(gradients):
        torch.manual_seed(seed)
        found = calls.call(function, own)
        roots = {name: x for name, x in found.items() if x.requires_grad}
        if leaves and roots:
            generator = torch.Generator().manual_seed(seed)
            dys = [torch.randn(x.shape, generator=generator).to(x) for x in roots.values()]
            grads = torch.autograd.grad(
                list(roots.values()), list(leaves.values()), dys, allow_unused=True
            )
            named = zip(leaves, grads, strict=True)
            found |= {f"grad of {name}": grad for name, grad in named if grad is not None}
    return {name: x.detach() for name, x in found.items()}


def difference(name: str, way: str, tensor: Tensor, wanted: Tensor) -> Difference:
    """Compare the bits of two tensors; NaN equals NaN."""
    if tensor.shape != wanted.shape:
        nan = float("nan")
        return Difference(name, way, wanted.numel(), wanted.numel(), nan, nan)
    differs = (tensor != wanted) & ~(tensor.isnan() & wanted.isnan())
    found = measured("output", name, tensor, wanted, wanted)
    gap = (tensor.double() - wanted.double()).abs().nan_to_num()
    largest = gap.max().item() if gap.numel() else 0.0
    return Difference(name, way, int(differs.sum()), wanted.numel(), largest, found.max_ulp)
