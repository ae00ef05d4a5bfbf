"""Examine every architecture of transformers that can be built small, fused beside stock.

``architecture_table.py`` looks at all of them, ``test_architectures.py`` at a ninth.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import multiprocessing
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from tests.fusion.fused_beside_stock import (
    RealPositions,
    bits_of,
    compare_all,
    computable_cases,
    differences,
    run,
    same_bits,
    told,
)
from tests.fusion.small_models import runnable
from torch import Tensor, nn
from transformers import PreTrainedConfig

import fusedformer
from fusedformer.fusion import _attention
from fusedformer.fusion._configs import attends, computes_attention
from fusedformer.fusion._padded import around_of

HERE = Path(__file__).parent
BUILDABLE = HERE / "architectures.json"
SECONDS = 90


class Found(NamedTuple):
    """A model type's level of fusion, why no further, what is wrong or could not be examined."""

    level: str
    below: str
    faults: list[str]
    notes: list[str]


def examine(model_type: str, recipe: list[int]) -> Found:
    """Build the model as the recipe says, fuse it, and compare everything with stock."""
    model, inputs = runnable(model_type, recipe)
    notes: list[str] = []
    cases = computable_cases(model, inputs, notes)
    if not cases:
        return Found("-", "stock can't be compared", [], notes)
    stock = copy.deepcopy(model)
    before, kept = _state(model), [bits_of(model, given) for given in cases.values()]
    try:
        report = fusedformer.fuse(model)
    except Exception as error:
        return Found("-", "", [f"fuse: {told(error)}"], notes)
    (level, below), faults = level_of(model, report), []
    faults += _calls(model, report, next(iter(cases.values())))
    for name, given in cases.items():
        faults += _tried(name, functools.partial(differences, model, stock, given, notes))
    first = next(iter(cases.values()))
    faults += _tried("pickle", lambda: _pickled(model, stock, cases, notes))
    left = report.left
    faults += _tried("output_attentions", lambda: _attentions(model, stock, first, left, notes))
    faults += _tried("hook", lambda: _hooked(model, stock, first, notes))
    faults += _tried("unfuse", lambda: _unfused(model, before, kept, cases))
    return Found(level, below, faults, sorted(set(notes)))


def _tried(name: str, check: Callable[[], list[str]]) -> list[str]:
    try:
        return [f"{name}: {fault}" for fault in check()]
    except TimeoutError:
        raise
    except Exception as error:
        return [f"{name}: {told(error)}"]


def level_of(model: Any, report: Any) -> tuple[str, str]:
    """Return how far a fused model went, a key of ``LEVELS``, and why no further.

    The highest is of those all of whose encoders' attention is in layers of fused steps, and which
    are packed, or have nothing to pack. A decoder beside an encoder does not count.
    """

    def some(test: Callable[[Any], bool]) -> bool:
        return any(map(test, report.replaced))

    left = {one.path: one.reason for one in report.left}
    layers = {
        one.path for one in report.replaced if "fused steps" in one.after and one.path not in left
    }
    reason = _below_the_highest(model, layers, left)
    if not reason:
        return "A", ""
    if some(lambda one: one.after.startswith("packed") and one.path not in left):
        return "B", reason
    norms = some(lambda one: "Norm" in one.before)
    attending = some(lambda one: one.before.endswith(" attention") or "with attention" in one.after)
    return ("C" if norms else "D") if attending else "E" if norms else "-", reason


def _below_the_highest(model: Any, layers: set[str], left: dict[str, str]) -> str:
    """Say why a model has not the highest level, by the first place that keeps it from it."""
    all_attending = [
        path for path, module in model.named_modules()
        if attends(type(module)) or computes_attention(module)
    ]  # fmt: skip
    all_places = [*all_attending, *sorted(layers)]
    places = [path for path in all_places if "decoder" not in path] or all_places
    for path in places:
        around = around_of(path)
        told = next((one for one in around if one in left), None)
        if told is not None:
            return f"{type(model.get_submodule(told)).__name__}: {left[told]}"
        if not layers & {*around}:
            return f"{type(model.get_submodule(path)).__name__}: its layer has no form"
    if not places:
        return "no attention that is known"
    return "" if layers else "no layer has a form"


def _calls(model: Any, report: Any, inputs: dict[str, Any]) -> list[str]:
    """Check that attention reported as replaced is called, if its module is called at all."""
    paths = [one.path for one in report.replaced if one.before.endswith(" attention")]
    called: list[Any] = []
    used: list[bool] = []
    with contextlib.ExitStack() as stack:
        for path in paths:
            hook = model.get_submodule(path).register_forward_hook(lambda *_: used.append(True))
            stack.callback(hook.remove)
        for holder, name in (
            (fusedformer.functional, "scaled_dot_product_attention"),
            (fusedformer.functional, "varlen_attention"),
            (_attention, "scaled_attention"),  # which may leave it to the others
        ):
            theirs = getattr(holder, name)

            def spy(*args: Any, own: Any = theirs, **kwargs: Any) -> Any:
                found = own(*args, **kwargs)
                if found is not None:
                    called.append(own)
                return found

            stack.enter_context(mock.patch.object(holder, name, spy))
        with contextlib.suppress(Exception):
            bits_of(model, inputs)
        if used and not called:
            return ["attention is reported as replaced, but never called"]
    return []


def _attentions(
    model: Any, stock: Any, inputs: dict[str, Any], left: Any, notes: list[str]
) -> list[str]:
    """Compare attention weights with the eager model's, where those are finite."""
    try:
        eager = copy.deepcopy(stock)
        eager.set_attn_implementation("eager")
        with torch.no_grad():
            wanted = run(eager, inputs, output_attentions=True)
    except TimeoutError:
        raise
    except Exception as error:
        notes.append(f"stock can't return attention's weights: {told(error)}")
        return []
    mask = inputs.get("attention_mask")

    def weights(found: dict[str, Tensor]) -> dict[str, Tensor]:
        picked = {}
        for name, x in found.items():
            if "attentions" in name:
                if mask is not None and x.dim() == 4 and x.shape[2] == mask.shape[1]:
                    x = x.transpose(1, 2)[mask.bool()]
                if x.isfinite().all() or name in finite:
                    picked[name] = x
        return picked

    with torch.no_grad():
        found = run(model, inputs, output_attentions=True)
    finite: set[str] = set()
    wanted = weights(wanted)
    finite |= wanted.keys()
    found = {n: x for n, x in weights(found).items() if n in wanted}
    if any("attention" in one.reason.lower() for one in left):  # what is left returns what it did
        wanted = {n: x for n, x in wanted.items() if n in found}
    if not wanted:
        notes.append("stock returns no weights of attention")
        return []
    return compare_all(found, wanted, None)


def _hooked(model: Any, stock: Any, inputs: dict[str, Any], notes: list[str]) -> list[str]:
    """Check that a hook inside a layer, which doubles the second row, does so in both models."""
    called: list[str] = []
    rows = next(x.shape[0] for x in inputs.values() if isinstance(x, Tensor))
    handles = [
        module.register_forward_hook(
            lambda m, args, out, path=path: called.append(path)
            if isinstance(out, Tensor) and out.dim() == 3 and out.shape[0] == rows else None
        )
        for path, module in stock.named_modules()
        if any(part.isdigit() for part in path.split(".")) and not any(module.children())
        and not path.rsplit(".", 1)[-1].isdigit()
    ]  # fmt: skip
    bits_of(stock, inputs)
    for handle in handles:
        handle.remove()
    if not called:
        notes.append("no module inside a layer to hook")
        return []
    path = called[len(called) // 2]

    def twice(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[1] *= 2
        return changed

    real, results = RealPositions(stock, inputs), []
    for one in (model, stock):
        handle = one.get_submodule(path).register_forward_hook(twice)
        try:
            results.append({n: real(n, x) for n, x in bits_of(one, inputs).items()})
        finally:
            handle.remove()
    ours, theirs = results
    return [f"on {path}, {fault}" for fault in compare_all(ours, theirs, None)]


# ---- in another process


def serve(requests: Any) -> None:
    """Load models that were saved whole, and send their outputs; run in a process of its own."""
    torch.set_num_threads(1)
    quiet()
    while True:
        path, cases = requests.recv()
        try:
            with fusedformer.backend("torch"):
                model = torch.load(path, weights_only=False)
                requests.send({name: bits_of(model, given) for name, given in cases.items()})
        except Exception as error:
            requests.send(told(error))


@functools.cache
def _elsewhere() -> Any:
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    context.Process(target=serve, args=(theirs,), daemon=True).start()
    return ours


def _pickled(model: Any, stock: Any, cases: dict[str, Any], notes: list[str]) -> list[str]:
    """Check that a saved model gives the same bits elsewhere, and still does here."""
    try:
        torch.save(stock, io.BytesIO())
    except Exception as error:
        notes.append(f"stock can't be pickled: {told(error)}")
        return []
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model, f"{folder}/model.pt")
        _elsewhere().send((f"{folder}/model.pt", cases))
        found = _elsewhere().recv()
    if isinstance(found, str):
        return [found]
    return [
        f"{name}, {fault}"
        for name, given in cases.items()
        for fault in compare_all(found[name], bits_of(model, given), None)
    ]


# ---- unfused


def _state(model: Any) -> dict[str, Any]:
    """Return the classes of all modules, and the attention that each configuration names."""
    found: dict[str, Any] = {}

    def walk(where: str, config: Any) -> None:
        found[where] = config.__dict__.get("_attn_implementation_internal")
        for name, value in vars(config).items():
            if isinstance(value, PreTrainedConfig):
                walk(f"{where}.{name}", value)

    for path, module in model.named_modules():
        found[f"{path}: class"] = type(module)
        found[f"{path}: ours"] = [n for n in vars(module) if "fusedformer" in n]
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            walk(f"{path}: config", module.config)
            found[f"{path}: settings"] = module.config.to_dict()
    return found


def _unfused(
    model: Any, before: dict[str, Any], kept: list[dict[str, Tensor]], cases: dict[str, Any]
) -> list[str]:
    fusedformer.unfuse(model)
    after = _state(model)
    changed = [n for n in before if before[n] != after.get(n)]
    faults = [f"{n}: {after.get(n)}, but was {before[n]}"[:160] for n in changed[:2]]
    for (name, given), bits in zip(cases.items(), kept, strict=True):
        if not same_bits(bits_of(model, given), bits):
            faults.append(f"other bits than before, {name}")
    return faults


# ---- how it is run


def quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity(50)
    warnings.filterwarnings("ignore")


@contextlib.contextmanager
def deadline(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


# Whose weights of attention differ, and why.
_SINKS = (
    "as stock; its weights of attention are those that values get, which sum to less than 1, where "
    "`eager` returns those before the sink takes its part"
)
KNOWN = {
    "granite_swa": _SINKS, "granitemoe_swa": _SINKS,
    "phi4_multimodal_vision": "as stock; its weights of attention are those of `sdpa`, which is "
    "causal here where nothing is padded, and not of `eager`, which is not",
}  # fmt: skip
