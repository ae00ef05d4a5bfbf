"""On a machine without a GPU kernels run in Triton's interpreter; every test is seeded, and memory
that a kernel forgets to write is NaN."""

import contextlib
import importlib.util
import os

import torch

HAS_GPU = torch.cuda.is_available()
# Where there is a GPU no kernel is interpreted; with this variable, nowhere (make test-compiled).
COMPILED = HAS_GPU or os.environ.get("FUSEDFORMER_TEST_COMPILED") == "1"
INTERPRETED = not COMPILED and importlib.util.find_spec("triton") is not None
if not COMPILED:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which reads it once

from collections.abc import Iterator  # noqa: E402

import pytest  # noqa: E402
from tests.interpreter import thrifty_interpreter  # noqa: E402

from fusedformer.testing import poisoned_memory  # noqa: E402

try:
    import hypothesis

    hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("suite")
except ImportError:  # a bare GPU machine may lack it; the tests that draw examples skip themselves
    pass

# Files that take longest, which go first, so that no worker begins one when the other is done.
LONGEST = (
    "test_compile_report", "tests/distributed", "test_architectures", "test_gpu_check",
    "test_compile.py", "test_one_node", "tests/emulator/test_suite", "test_library_kernels",
    "as_one_node",
)  # fmt: skip

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before marks are selected by
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort long files to the front; skip what needs a GPU where none is, mark what needs none.

    A test that runs on a GPU where there is one takes the fixture ``device``; all others are marked
    ``cpu``, and ``-m "not cpu"`` leaves them out.
    """
    for name in reversed(LONGEST):
        items.sort(key=lambda item: name not in item.nodeid)
    for item in items:
        if item.get_closest_marker("interpreter") is not None and not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="no kernel is interpreted here"))
        if item.get_closest_marker("gpu") is not None:
            if not HAS_GPU:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        elif "device" not in getattr(item, "fixturenames", ()):
            item.add_marker("cpu")


@pytest.fixture(scope="session")
def device() -> str:
    """The device that kernels run on here."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


@pytest.fixture(autouse=True)
def _launch_plans_hold_everything() -> Iterator[None]:
    """No launcher does what a plan of its launches would leave out."""
    if not INTERPRETED:
        yield
        return
    from fusedformer_kernels.runtime import recording

    with recording.verified():
        yield


@pytest.fixture(autouse=True)
def _interpreter() -> Iterator[None]:
    with thrifty_interpreter() if INTERPRETED else contextlib.nullcontext():
        yield
