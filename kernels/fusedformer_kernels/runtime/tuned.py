"""Tables of tuned configs, which take the place of the defaults in ``configs.py``.

``python -m fusedformer tune`` writes them. A shipped one, ``tuned/sm_90.json``, serves all devices
of an architecture; a user's own in the cache directory, one device by its name. Nothing is ever
tuned unasked, and ``FUSEDFORMER_TUNED=off`` leaves all tables out.

``{"schema": 1, "target", "device", "triton", ..., "entries": {KEY: {"config": {FIELD: VALUE}}}}``,
where KEY is the words of a choice ("attention_forward half 64 plain full") and a field that is not
named stays as in the default. An entry's ``"predicted": {"config": ...}`` is a config that nobody
has timed and that a model puts before the measured one: it is used, unless
``FUSEDFORMER_TUNED=measured``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from fusedformer_kernels.runtime.targets import LaunchConfig, Target

    C = TypeVar("C", bound=LaunchConfig)

Key = tuple[str | int, ...]
Fields = Mapping[str, int | bool]

SCHEMA = 1
SHIPPED = Path(__file__).parents[1] / "tuned"


@dataclasses.dataclass(frozen=True)
class Entry:
    """The fields that a table gives to a key, the table, and whether they were never timed."""

    fields: Fields
    table: Path
    predicted: bool = False


_forced: dict[Key, Fields] = {}
_caches: list[Any] = []
_told: list[Callable[[], None]] = []

F = TypeVar("F", bound=Callable[..., Any])


def cached_config(config: F) -> F:
    """A function that gives a config, called once for the same arguments unless one is forced."""
    cached = functools.lru_cache(1024)(config)
    _caches.append(cached)

    @functools.wraps(config)
    def run(*args: Any) -> Any:
        return config(*args) if _forced else cached(*args)

    return run  # type: ignore[return-value]


def clear_caches() -> None:
    """Read the tables again when they are next asked."""
    for cached in (_table, *_caches):
        cached.cache_clear()
    for forget in _told:
        forget()


def when_cleared(forget: Callable[[], None]) -> None:
    """Have :func:`clear_caches` call ``forget`` too."""
    _told.append(forget)


def tuned_config(key: Key, target: Target, default: C) -> C:
    """``default``, with what the tables for ``target`` say of ``key``."""
    fields = _forced.get(key) if _forced else None
    if fields is None:
        entry = _table(target).get(key)
        fields = None if entry is None else entry.fields
    return default if fields is None else _with(default, fields)


def entries_in_use(target: Target) -> dict[str, Entry]:
    """List what the tables say for ``target``, by the words of the key."""
    return {" ".join(map(str, key)): entry for key, entry in _table(target).items()}


@contextlib.contextmanager
def forced(key: Key, fields: Fields) -> Iterator[None]:
    """Use these fields for ``key``, whatever the tables say."""
    previous = dict(_forced)
    _forced[key] = fields
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(previous)


def cache_file(device_name: str) -> Path:
    """Where a user's own table for a device is.

    ``FUSEDFORMER_TUNED_TABLE`` names the file, or ``FUSEDFORMER_CACHE_DIR`` the folder it is in.
    """
    named = os.environ.get("FUSEDFORMER_TUNED_TABLE")
    if named:
        return Path(named)
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return cache_folder() / "tuned" / f"{slug}.json"


def cache_folder() -> Path:
    """Where what is made on a machine is kept for it."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FUSEDFORMER_CACHE_DIR") or Path(home) / "fusedformer")


def read(path: Path, *, predicted: bool = True) -> dict[Key, Entry]:
    """The entries of a table; ``predicted`` ones take the place of measured ones if wanted.

    Raises:
        ValueError: it is none.
    """
    entries: dict[Key, Entry] = {}
    try:
        document = json.loads(path.read_text())
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema {document['schema']}, expected {SCHEMA}")
        for name, entry in document["entries"].items():
            is_predicted = predicted and "predicted" in entry
            fields = dict((entry["predicted"] if is_predicted else entry)["config"])
            if any(not isinstance(v, int) or v < 0 for v in fields.values()):
                raise ValueError(f"config {fields}")
            key = tuple(int(w) if w.isdigit() else w for w in name.split())
            entries[key] = Entry(fields, path, is_predicted)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a table of tuned configs ({type(error).__name__}: {error}); delete it, "
            f"or write it again with: python -m fusedformer tune"
        ) from error
    return entries


@functools.cache
def _table(target: Target) -> dict[Key, Entry]:
    wanted = _wanted()
    if wanted == "off":
        return {}
    found: list[Path] = []
    name = f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
    shipped = SHIPPED / f"{name}.json"
    if not target.interpreted and shipped.exists():
        found.append(shipped)
    if target.device_name:
        own = cache_file(target.device_name)
        if own.exists() and _is_of_this_triton(own):
            found.append(own)
    entries: dict[Key, Entry] = {}
    for path in found:
        entries |= read(path, predicted=wanted == "on")
    return entries


def _wanted() -> str:
    """Which entries are used, "on" for all: what ``FUSEDFORMER_TUNED`` says."""
    said = os.environ.get("FUSEDFORMER_TUNED", "on")
    if said not in ("on", "measured", "off"):
        raise ValueError(
            f"FUSEDFORMER_TUNED: expected 'on', 'measured' or 'off', but got {said!r}"
        )
    return said


def _is_of_this_triton(path: Path) -> bool:
    """Registers and spills are those of a compiler: a table of another one is left out."""
    import triton

    read(path)  # that it is a table
    found = str(json.loads(path.read_text()).get("triton"))
    same = found.split(".")[:2] == triton.__version__.split(".")[:2]
    if not same:
        warnings.warn(
            f"{path} was tuned with triton {found}, this is {triton.__version__}: it is not used; "
            f"write it again with: python -m fusedformer tune",
            stacklevel=2,
        )
    return same


def _with(default: C, fields: Fields) -> C:
    known = {field.name for field in dataclasses.fields(default)}
    if not set(fields) <= known:
        raise ValueError(
            f"a tuned config has fields {sorted(set(fields) - known)}, but "
            f"{type(default).__name__} has {sorted(known)}; tune again"
        )
    changes: dict[str, Any] = dict(fields)
    return dataclasses.replace(default, **changes)
