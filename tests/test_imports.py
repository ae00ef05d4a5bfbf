"""Which package may import which: ``nn -> functional -> ops -> fusedformer_kernels``, and others.

No file imports another in a circle. Triton is lazy, and optional.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "python" / "fusedformer"
KERNELS = ROOT / "kernels" / "fusedformer_kernels"
STANDARD = {*sys.stdlib_module_names, "torch"}
# Of the kernels, what imports no triton: the objects that the library shares with them, and C++.
WITHOUT_TRITON = (
    "fusedformer_kernels.attention.terms", "fusedformer_kernels.runtime.steps",
    "fusedformer_kernels.cpu",
)  # fmt: skip
# What each layer may import besides torch, the standard library and the errors, by the start of
# its name.
_SHARED = ("fusedformer._internal",)
ALLOWED = {
    "reference": ("fusedformer.reference",),
    "distributed": (
        "fusedformer.distributed", "fusedformer.nn", "fusedformer.functional", "fusedformer.ops",
        *_SHARED,
    ),
    "nn": ("fusedformer.nn", "fusedformer.functional", *_SHARED),
    "functional": ("fusedformer.functional", "fusedformer.ops", *_SHARED),
    "ops": ("fusedformer.ops", "fusedformer_kernels", *_SHARED),
    "models": (
        "fusedformer.models", "fusedformer.nn", "fusedformer.functional", "fusedformer.objectives",
        *_SHARED,
    ),
    "objectives": ("fusedformer.functional", *_SHARED),
    "finetuning": ("fusedformer.models", "fusedformer.functional", *_SHARED),
    "fusion": (
        "fusedformer.fusion", "fusedformer.nn", "fusedformer.functional", "transformers",
        "sentence_transformers", *_SHARED,
    ),
    "parity": (
        "fusedformer.parity", "fusedformer.functional", "fusedformer.fusion",
        "fusedformer.reference", "fusedformer.backend", "transformers",
        "matplotlib", "safetensors", "triton", "pytest", *_SHARED,
    ),
    "embedding": ("fusedformer.fusion", "sentence_transformers", "tqdm"),
    "testing": ("fusedformer.parity",),
    "serving": ("fusedformer.serving", "fusedformer.nn", *_SHARED),
    "_internal": (*_SHARED, "fusedformer_kernels.runtime", "matplotlib"),
    "_version": (),
    "errors": (),
}  # fmt: skip


def files_of(layer: str) -> list[Path]:
    package = LIBRARY / layer
    return sorted(package.rglob("*.py")) if package.is_dir() else [LIBRARY / f"{layer}.py"]


def imports_of(source: str, *, at_import_time: bool = False) -> Iterator[str]:
    """Full names of all that ``source`` imports: module, or module and member for ``from``."""
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if not (at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            waiting += ast.iter_child_nodes(node)


def within(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == start or name.startswith(start + ".") for start in allowed)


def forbidden(source: str, layer: str) -> list[str]:
    return [
        name
        for name in imports_of(source)
        if name.split(".")[0] not in STANDARD
        and not within(name, ("fusedformer.errors", *ALLOWED[layer]))
    ]


@pytest.mark.parametrize("layer", ALLOWED)
def test_a_layer_imports_only_what_is_below_it(layer: str) -> None:
    files = files_of(layer)
    assert files
    found = {path.name: forbidden(path.read_text(), layer) for path in files}
    assert not any(found.values()), found


# What commands are made of, under its name and its old ones; the library does without.
TOOLS = ("tools", "__main__", "report", "training", "tune", "compile_report", "bench")


def test_the_library_does_not_import_its_tools() -> None:
    tools = tuple(f"fusedformer.{name}" for name in TOOLS)
    inside = {path for tool in TOOLS for path in files_of(tool)}
    for path in sorted({*LIBRARY.rglob("*.py")} - inside):
        assert not [name for name in imports_of(path.read_text()) if within(name, tools)], path


@pytest.mark.parametrize("root", [LIBRARY, KERNELS], ids=lambda root: root.name)
def test_no_package_imports_what_another_keeps_to_itself(root: Path) -> None:
    """A module or member whose name begins with ``_`` is its folder's; ``_internal`` is shared."""
    for path in sorted(root.rglob("*.py")):
        folder = ".".join((root.name, *path.parent.relative_to(root).parts))
        for name in imports_of(path.read_text()):
            above, _, private = name.partition("._")
            if private and above.startswith(root.name) and above != root.name:
                assert within(folder, (above,)), f"{path}: {name}"


def test_no_file_imports_another_in_a_circle() -> None:
    """At any time; for the sake of types alone they may."""
    roots = {path: root for root in (LIBRARY, KERNELS) for path in root.rglob("*.py")}
    names = {
        ".".join((root.name, *path.relative_to(root).with_suffix("").parts)): path
        for path, root in roots.items()
    }
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    graph = {name: set(_files_imported(path, names)) - {name} for name, path in names.items()}
    while graph:  # files that import nothing more are taken away until none is left
        free = [name for name, imported in graph.items() if not imported & graph.keys()]
        assert free, sorted(graph)
        for name in free:
            del graph[name]


def _files_imported(path: Path, names: dict[str, Path]) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    for name in imports_of(ast.unparse(tree)):
        yield name if name in names else name.rpartition(".")[0]


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("nn", "from fusedformer import ops"),
        ("nn", "def f():\n    import fusedformer_kernels.rows.norm"),
        ("functional", "from fusedformer_kernels.rows.norm import norm_forward"),
        ("nn", "from fusedformer import distributed"),
        ("ops", "from fusedformer import functional"),
        ("reference", "from fusedformer import _checks"),
        ("reference", "import triton"),
    ],
)
def test_a_forbidden_import_is_seen(layer: str, source: str) -> None:
    assert forbidden(source, layer)


@pytest.mark.parametrize("path", files_of("ops"), ids=lambda path: path.name)
def test_ops_import_kernels_only_when_they_run(path: Path) -> None:
    names = imports_of(path.read_text(), at_import_time=True)
    found = [name for name in names if within(name, ("fusedformer_kernels", "triton"))]
    assert not [name for name in found if not within(name, WITHOUT_TRITON)]


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: path.name)
def test_kernels_know_no_library_no_autograd_and_no_modules(path: Path) -> None:
    source = path.read_text()
    banned = ("fusedformer", "torch.nn", "torch.autograd", "torch.library")
    assert not [name for name in imports_of(source) if within(name, banned)]
    used = [ast.unparse(n) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute)]
    assert not [name for name in used if within(name, banned)]


def run_python(code: str, **environment: str) -> str:
    """Standard output of ``code`` in a fresh process that finds the checkout."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(LIBRARY.parent), str(KERNELS.parent)])
    result = subprocess.run(
        [sys.executable, "-c", code], env={**inherited, "PYTHONPATH": path, **environment},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


USE_EVERY_OP = """
import torch
from fusedformer import functional as F, nn
x = torch.randn(2, 5, 8, requires_grad=True)
layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
y = F.log_softmax(F.rms_norm(nn.TransformerEncoder(layer, 2)(x), (8,)), -1)
y.backward(torch.randn_like(y))
assert x.grad.isfinite().all()
"""


def test_importing_loads_no_kernels_and_wakes_no_device() -> None:
    run_python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fusedformer\n"
        "new = set(sys.modules) - before\n"
        "assert not [name for name in new if name.split('.')[0] == 'triton'], new\n"
        "assert 'fusedformer_kernels.runtime.launch' not in new\n"
        "assert not [name for name in new if name.startswith('torch.distributed.')], new\n"
        "assert not torch.cuda.is_initialized()\n"
    )


def test_the_criterion_needs_torch_alone() -> None:
    """Neither what parity's pages, models and fixtures import, nor the kernels."""
    run_python(
        "import sys, fusedformer.testing\n"
        "late = {'matplotlib', 'transformers', 'pytest', 'triton'}\n"
        "assert not late & {name.split('.')[0] for name in sys.modules}\n"
    )


def test_the_torch_backend_loads_no_kernels() -> None:
    run_python(
        USE_EVERY_OP
        + "import sys\nassert 'fusedformer_kernels.runtime.launch' not in sys.modules\n"
    )


@pytest.mark.parametrize("interpret", ["0", "1"], ids=["plain", "interpreter asked for"])
def test_without_triton_everything_runs_on_the_torch_backend(interpret: str) -> None:
    """As where triton has no wheel."""
    run_python(
        "import sys\n"
        "sys.modules['triton'] = None\n"  # neither found nor importable
        + USE_EVERY_OP
        + "import fusedformer\n"
        "try:\n"
        "    with fusedformer.backend('triton'):\n"
        "        raise AssertionError('entered')\n"
        "except RuntimeError as error:\n"
        "    assert 'triton is not installed' in str(error), error\n"
        "late = 'triton.', 'fusedformer_kernels.runtime.launch'\n"
        "assert not [m for m in sys.modules if m.startswith(late)]\n",
        TRITON_INTERPRET=interpret,
    )


def test_the_triton_backend_refuses_cpu_tensors_outside_the_interpreter() -> None:
    run_python(
        "import torch, fusedformer\n"
        "try:\n"
        "    with fusedformer.backend('triton'):\n"
        "        fusedformer.functional.softmax(torch.randn(3), 0)\n"
        "except RuntimeError as error:\n"
        "    assert 'TRITON_INTERPRET=1' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('ran')\n"
    )
