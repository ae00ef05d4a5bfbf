"""CUDA graphs of an encoder for a few batch sizes, for serving with low latency."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fusedformer._internal import checks
from fusedformer.nn import TransformerEncoder
from fusedformer.nn.stacks import is_batch_first

Size = tuple[int, int]  # batch, length

_WARM_UPS = 3  # the first compiles kernels; in later ones libraries settle their choices


def graphed(
    module: nn.Module,
    shapes: Iterable[Size],
    *,
    fallback: bool = False,
    copy_output: bool = True,
) -> Graphed:
    """Capture ``module``, in evaluation, as CUDA graphs for batches of a few sizes.

    A call pads its batch to the smallest bucket that holds it, copies it to where the graph reads,
    replays the graph, and returns what belongs to the batch. The host then launches one graph
    instead of a hundred kernels. Of each bucket there are two graphs: one with a padding mask, and
    one without for batches that fill the bucket. All are captured here, largest first, in one pool
    of memory; that takes seconds, most of them for kernels that were never compiled before.

    Args:
        module: on a GPU, in evaluation mode. A :class:`fusedformer.nn.TransformerEncoder`, or a
            module whose forward takes ``input_ids`` and ``attention_mask``:
            :class:`fusedformer.models.BertEncoderModel`, a fused Hugging Face BERT and its kin, or
            one that holds such a model and goes on with what it returns. Padding is packed with
            ``static_shapes`` inside.
        shapes: the buckets, ``(batch, length)`` each.
        fallback: whether a batch that fits no bucket is computed eagerly, and counted in
            ``fallbacks``; else it raises.
        copy_output: whether a call returns tensors of its own; else views of memory that the next
            call of any bucket writes to.

    Returns:
        A callable with the arguments of the module, see :class:`Graphed`.

    Raises:
        RuntimeError: ``module`` is not on a GPU; it cannot be captured, because it asks the device
            for numbers, say.
        TypeError: ``module`` is not of these kinds; ``shapes`` are not pairs of integers.
        ValueError: ``module`` is in training mode or has no parameters; no shapes, or sizes that
            are not positive; outputs that are neither ``[batch, length, width]``, ``[batch,
            width]`` nor ``[batch]``.
    """
    return Graphed(module, shapes, fallback=fallback, copy_output=copy_output)


class _Form(NamedTuple):
    """Names and dtypes of a module's arguments, all ``[batch, length]`` but for a token's width."""

    tokens: str
    mask: str
    dtypes: dict[str, torch.dtype]
    width: tuple[int, ...]
    padding: int  # the mask's value at padding; at a token it is 1 - padding
    mask_is_needed: bool = False
    batch_first: bool = True


class _Captured(NamedTuple):
    """A graph, views of the memory that it reads, and the output that it writes."""

    replay: Callable[[], None]
    inputs: dict[str, Tensor]
    output: Any


class Graphed:
    """A module that is computed by CUDA graphs; made by :func:`graphed`.

    Called with the arguments of the module: ``src`` and ``src_key_padding_mask`` (boolean, True =
    padding), or ``input_ids``, ``attention_mask`` (1 or True = token) and, where the module takes
    them, ``token_type_ids``; all but the first by name. Without a mask every position is a token.
    No gradient is computed. Calls from several threads and streams take turns.

    Graphs repeat the kernels that they captured: hooks and other Python of the module do
    not run again. Weights that are changed in place, by ``load_state_dict`` or an optimizer, are
    seen. Where a parameter, a buffer or a child was replaced since, a call raises; :meth:`capture`
    captures anew.

    Attributes:
        module: what was captured.
        buckets: ``(batch, length)``, smallest first.
        replays: how many calls each bucket served.
        fallbacks: how many calls were computed eagerly.
        nbytes: memory on the device: of the graphs' pool and of their inputs.
    """

    def __init__(
        self, module: nn.Module, shapes: Iterable[Size], *, fallback: bool, copy_output: bool
    ) -> None:
        self.module = module
        self.fallback, self.copy_output = fallback, copy_output
        self._form = _form_of(module)
        self.buckets = _buckets(shapes)
        self._device = _device_of(module)
        kind = self._device.type
        self._autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self.replays = dict.fromkeys(self.buckets, 0)
        self.fallbacks = 0
        self._lock = threading.Lock()
        self.capture()

    def capture(self) -> None:
        """Capture all graphs again, from the module as it is now.

        Raises:
            RuntimeError, ValueError: as :func:`graphed`.
        """
        if any(part.training for part in self.module.modules()):
            raise ValueError(
                "graphed(): expected 'module' to be in evaluation mode; call its eval() first"
            )
        with self._lock:
            self._captured: dict[tuple[Size, bool], _Captured] = {}  # frees the graphs before
            captured: dict[tuple[Size, bool], _Captured] = {}
            self._graphs = _CudaGraphs(self._device)
            self._read = _ReadByGraphs(self.module)
            form, largest = self._form, max(batch * length for batch, length in self.buckets)
            rows = {n: form.width if n == form.tokens else () for n in form.dtypes}
            self._memory = {
                name: torch.full((largest, *rows[name]), 0, dtype=dtype, device=self._device)
                for name, dtype in form.dtypes.items()
            }
            self._memory[form.mask].fill_(1 - form.padding)
            self._written: set[str] = set()  # optional inputs whose memory is not all zeros
            for bucket in reversed(self.buckets):
                for masked in (True,) if form.mask_is_needed else (True, False):
                    captured[bucket, masked] = self._capture(bucket, masked)
            self._captured = captured

    def _capture(self, bucket: Size, masked: bool) -> _Captured:
        form, (batch, length) = self._form, bucket
        inputs = {
            name: torch.unflatten(memory[: batch * length], 0, bucket)
            for name, memory in self._memory.items()
            if masked or name != form.mask
        }
        given = {name: self._swap_unless_batch_first(view, name) for name, view in inputs.items()}
        enabled, dtype = self._autocast

        def run() -> Any:
            # Without the cache: a cast made before the capture would be missing in the graph.
            autocast = torch.autocast(self._device.type, dtype, enabled, cache_enabled=False)
            with torch.no_grad(), autocast, _static_shapes(self.module):
                found = self.module(**given)
            return found if form.batch_first else found.transpose(0, 1)

        try:
            replay, output = self._graphs.capture(run)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise RuntimeError(
                f"graphed(): the bucket {bucket} could not be captured: {reason} (a module that "
                f"asks the device for numbers, or copies from the host, cannot be)"
            ) from error
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and not _can_be_cut(tensor, batch, length):
                raise ValueError(
                    f"graphed(): expected outputs of shape [batch, length, width], [batch, width] "
                    f"or [batch], but for the bucket {bucket} got {tuple(tensor.shape)}"
                )
        return _Captured(replay, inputs, output)

    def __call__(self, tokens: Tensor | None = None, /, **others: Tensor | None) -> Any:
        """Compute what the module returns for the batch; see the class.

        Raises:
            TypeError: an argument that the module does not have; wrong dtypes.
            ValueError: wrong shapes or devices; a batch that fits no bucket, without ``fallback``;
                an input that requires a gradient.
            RuntimeError: the module was put in training mode, or a tensor or child of it replaced.
        """
        if self.module.training:
            raise RuntimeError(
                "Graphed(): the module is in training mode, which its graphs do not compute"
            )
        given = self._checked(tokens, others)
        form = self._form
        size: Any = tuple(given[form.tokens].shape[:2])
        bucket = next((b for b in self.buckets if size[0] <= b[0] and size[1] <= b[1]), None)
        if bucket is None:
            return self._eager(given, size)

        def cut(tensor: Tensor) -> Tensor:
            part = tensor[: size[0], : size[1]] if tensor.dim() == 3 else tensor[: size[0]]
            if not form.batch_first:
                part = part.transpose(0, 1)
            contiguous = torch.contiguous_format
            return part.clone(memory_format=contiguous) if self.copy_output else part

        with self._lock, torch.no_grad(), self._graphs.turn():
            masked = form.mask in given or size != bucket or form.mask_is_needed
            captured = self._captured.get((bucket, masked))
            if captured is None:
                raise RuntimeError("Graphed(): it has no graphs, as its last capture() failed")
            self._fill(captured.inputs, given, size, size == bucket)
            captured.replay()
            changed = self._read.changed()  # looked up here, while the device is busy
            if changed is not None:
                raise RuntimeError(
                    f"Graphed(): {changed!r} of the module was replaced after its graphs were "
                    f"captured; call capture()"
                )
            self.replays[bucket] += 1
            return tree_map_only(Tensor, cut, captured.output)

    def _checked(
        self, tokens: Tensor | None, others: dict[str, Tensor | None]
    ) -> dict[str, Tensor]:
        """Check the inputs; return those that are given by name, batch first."""
        function, form = "Graphed", self._form
        given = {name: value for name, value in others.items() if value is not None}
        if tokens is not None:
            given[form.tokens] = tokens
        unknown = given.keys() - form.dtypes.keys()
        if unknown or form.tokens not in given:
            raise TypeError(
                f"{function}(): expected {form.tokens!r}, and besides only "
                f"{', '.join(n for n in form.dtypes if n != form.tokens)}, but got "
                f"{', '.join(sorted(given)) or 'nothing'}"
            )
        first = given[form.tokens]
        checks.check_tensor(function, form.tokens, first)
        if first.is_nested:
            raise TypeError(
                f"{function}(): expected {form.tokens!r} to be padded, but got a nested tensor"
            )
        if first.dim() != 2 + len(form.width) or tuple(first.shape[2:]) != form.width:
            expected = ["batch", "length", *map(str, form.width)]
            if not form.batch_first:
                expected[:2] = expected[1::-1]
            raise ValueError(
                f"{function}(): expected {form.tokens!r} of shape [{', '.join(expected)}], "
                f"but got {tuple(first.shape)}"
            )
        given[form.tokens] = first = self._swap_unless_batch_first(first, form.tokens)
        for name, value in given.items():
            wanted = form.dtypes[name]
            checks.check_tensor(function, name, value)
            whole = not (value.is_floating_point() or value.is_complex())
            if value.dtype != wanted and not (wanted == torch.int64 and whole):
                raise TypeError(
                    f"{function}(): expected {name!r} to have the dtype {wanted}, "
                    f"but got {value.dtype}"
                )
            if name != form.tokens:
                checks.check_shape(function, name, value, first.shape[:2], "batch, length")
            if value.device != self._device:
                raise ValueError(
                    f"{function}(): expected {name!r} on {self._device}, where the module is, "
                    f"but got it on {value.device}"
                )
            if value.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"{function}(): expected {name!r} to require no gradient, which graphs do not "
                    f"compute; detach it, or call under torch.no_grad()"
                )
        return given

    def _eager(self, given: dict[str, Tensor], size: Size) -> Any:
        if not self.fallback:
            raise ValueError(
                f"Graphed(): no bucket holds a batch of {size[0]} sequences of length {size[1]}; "
                f"the largest (batch, length) is {self.buckets[-1]}"
            )
        self.fallbacks += 1
        arguments = {
            name: self._swap_unless_batch_first(value, name) for name, value in given.items()
        }
        with torch.no_grad():
            return self.module(**arguments)

    def _fill(
        self, inputs: dict[str, Tensor], given: dict[str, Tensor], size: Size, whole: bool
    ) -> None:
        """Copy ``given`` to the memory ``inputs`` of a graph, and write padding around it."""
        form = self._form
        for name, memory in inputs.items():
            value = given.get(name)
            if name == form.mask:
                if not whole:
                    memory.fill_(form.padding)
                part = memory[: size[0], : size[1]]
                part.fill_(1 - form.padding) if value is None else part.copy_(value)
            elif value is not None:
                if not whole:  # an earlier batch may have left infinities
                    memory.zero_()
                memory[: size[0], : size[1]].copy_(value)
                self._written.add(name)
            elif name in self._written:
                self._memory[name].zero_()
                self._written.remove(name)

    def _swap_unless_batch_first(self, tensor: Tensor, name: str) -> Tensor:
        """Swap batch and length, between the module's order and batch first."""
        turn = name == self._form.tokens and not self._form.batch_first
        return tensor.transpose(0, 1) if turn else tensor

    @property
    def nbytes(self) -> int:
        return self._graphs.nbytes() + sum(memory.nbytes for memory in self._memory.values())

    def __repr__(self) -> str:
        lines = [f"  {bucket}: {count} replays" for bucket, count in self.replays.items()]
        head = f"Graphed({type(self.module).__name__}, {self.nbytes / 2**20:.1f} MiB"
        return "\n".join([f"{head}, {self.fallbacks} fallbacks", *lines, ")"])


class _CudaGraphs:
    """CUDA graphs that share one pool of memory and one stream."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise RuntimeError(
                f"graphed(): CUDA graphs need a GPU, but the parameters of 'module' are on {device}"
            )
        self._device = device
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._last = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Capture ``function``; return its replay, and its output, which replays overwrite."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    function()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads may use the device meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, "thread_local"):
                output = function()
        return graph.replay, output

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Let the current stream wait for the last call's work, and record its own at the end."""
        with torch.cuda.device(self._device):
            self._last.wait()
            try:
                yield
            finally:
                self._last.record()

    def nbytes(self) -> int:
        """Return the size of the pool."""
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        return sum(
            segment["total_size"]
            for segment in segments
            if tuple(segment["segment_pool_id"]) == tuple(self._pool)
        )


class _ReadByGraphs:
    """Tensors that graphs read, which it keeps alive, and the modules that hold them."""

    def __init__(self, module: nn.Module) -> None:
        self._tensors: list[tuple[dict[str, Any], str, str, int, Tensor]] = []
        self._children: list[tuple[dict[str, Any], str, str, nn.Module]] = []
        for path, part in module.named_modules():
            start = f"{path}." if path else ""
            for holder in (part._parameters, part._buffers):
                self._tensors += [
                    (holder, name, start + name, tensor.data_ptr(), tensor.detach())
                    for name, tensor in holder.items()
                    if tensor is not None
                ]
            self._children += [
                (part._modules, name, start + name, child)
                for name, child in part._modules.items()
                if child is not None
            ]

    def changed(self) -> str | None:
        """Return the path of the first tensor or child that was replaced, or None."""
        for holder, name, path, child in self._children:
            if holder.get(name) is not child:
                return path
        for holder, name, path, address, _ in self._tensors:
            tensor = holder.get(name)
            if tensor is None or tensor.data_ptr() != address:
                return path
        return None


@contextlib.contextmanager
def _static_shapes(module: nn.Module) -> Iterator[None]:
    """Let all of ``module`` pack with static shapes, which needs no wait, while inside."""
    stacks: list[Any] = [part for part in module.modules() if hasattr(part, "static_shapes")]
    before = [stack.static_shapes for stack in stacks]
    for stack in stacks:
        stack.static_shapes = True
    try:
        yield
    finally:
        for stack, value in zip(stacks, before, strict=True):
            stack.static_shapes = value


def _can_be_cut(output: Tensor, batch: int, length: int) -> bool:
    """Return whether the shape of ``output`` tells the batch's part from padding."""
    leading = (batch, length) if output.dim() == 3 else (batch,)
    return 1 <= output.dim() <= 3 and tuple(output.shape[: len(leading)]) == leading


def _form_of(module: Any) -> _Form:
    if isinstance(module, TransformerEncoder) and len(module.layers):
        first: Any = module.layers[0]
        mask = "src_key_padding_mask"
        dtypes = {"src": first.self_attn.out_proj.weight.dtype, mask: torch.bool}
        width = (first.self_attn.embed_dim,)
        return _Form("src", mask, dtypes, width, 1, batch_first=is_batch_first(module))
    if isinstance(module, nn.Module):
        for kind in type(module).__mro__:  # one may take (*args, **kwargs)
            if "forward" in vars(kind):
                parameters = inspect.signature(vars(kind)["forward"]).parameters
                if {"input_ids", "attention_mask"} <= parameters.keys():
                    return _form_of_ids(parameters)
    raise TypeError(
        f"graphed(): expected 'module' to be a fusedformer.nn.TransformerEncoder with layers, or a "
        f"Module whose forward takes input_ids and attention_mask, but got {type(module).__name__}"
    )


def _form_of_ids(parameters: Any) -> _Form:
    names = ["input_ids", "attention_mask", "token_type_ids"]
    dtypes = {name: torch.int64 for name in names if name in parameters}
    needed = parameters["attention_mask"].default is inspect.Parameter.empty
    return _Form("input_ids", "attention_mask", dtypes, (), 0, mask_is_needed=needed)


def _buckets(shapes: Iterable[Size]) -> tuple[Size, ...]:
    """Check the shapes; return them by number of positions, smallest first."""
    found = set()
    for shape in shapes:
        pair = tuple(shape) if isinstance(shape, (tuple, list)) else ()
        if len(pair) != 2 or not all(type(size) is int for size in pair):
            raise TypeError(
                f"graphed(): expected 'shapes' to be pairs of integers (batch, length), "
                f"but got {shape!r}"
            )
        if min(pair) < 1:
            raise ValueError(f"graphed(): expected 'shapes' to have positive sizes, but got {pair}")
        found.add(pair)
    if not found:
        raise ValueError("graphed(): expected 'shapes' to have at least one (batch, length)")
    return tuple(sorted(found, key=lambda pair: (pair[0] * pair[1], pair)))


def _device_of(module: nn.Module) -> torch.device:
    parameter = next(module.parameters(), None)
    if parameter is None:
        raise ValueError("graphed(): expected 'module' to have parameters, but it has none")
    return parameter.device
