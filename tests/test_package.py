"""The package as a user meets it: version, types, documented functions, torch's signatures."""

import importlib.metadata
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fusedformer
import fusedformer_kernels
from fusedformer import functional, nn, reference

FUNCTIONS = functional.__all__
TORCH_NAMES = [
    "cross_entropy", "layer_norm", "log_softmax", "rms_norm", "scaled_dot_product_attention",
    "softmax",
]  # fmt: skip


def test_the_version_is_one_and_well_formed() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", fusedformer.__version__)
    try:
        installed = importlib.metadata.version("fusedformer")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed; it runs from the checkout")
    assert installed == fusedformer.__version__


def test_the_changelog_knows_the_version(pytestconfig: pytest.Config) -> None:
    changelog = (pytestconfig.rootpath / "CHANGELOG.md").read_text()
    assert f"## [{fusedformer.__version__}]" in changelog


def test_the_licence_is_apache_s_in_full(pytestconfig: pytest.Config) -> None:
    text = (pytestconfig.rootpath / "LICENSE").read_text()
    assert text.split()[:6] == ["Apache", "License", "Version", "2.0,", "January", "2004"]
    assert "END OF TERMS AND CONDITIONS" in text
    assert 'license_expression="Apache-2.0"' in (pytestconfig.rootpath / "setup.py").read_text()


@pytest.mark.parametrize("package", ["torch", "triton", "transformers"])
def test_the_pages_name_the_range_that_is_installed(
    package: str, pytestconfig: pytest.Config
) -> None:
    """The table of requirements, wherever it stands, has the bounds of setup.py."""
    root = pytestconfig.rootpath
    (wanted,) = re.findall(rf"""["']{package}>=([\d.]+)""", (root / "setup.py").read_text())
    pages = "\n".join(p.read_text() for p in (root / "README.md", *root.glob("docs/**/*.md")))
    named = re.findall(rf"(?m)^\| {package}\b[^|]*\| >= ([\d.]+)", pages)
    assert named
    assert set(named) == {wanted}


@pytest.mark.parametrize("package", [fusedformer, fusedformer_kernels], ids=lambda p: p.__name__)
def test_types_are_shipped(package: Any) -> None:
    folder = inspect.getfile(package).rpartition("/")[0]
    with open(f"{folder}/py.typed") as marker:
        assert marker.read() == ""


@pytest.mark.parametrize("module", [fusedformer, functional, nn, reference])
def test_every_public_name_exists_and_is_sorted(module: Any) -> None:
    assert all(hasattr(module, name) for name in module.__all__)
    assert list(module.__all__) == sorted(module.__all__)


def test_every_function_has_a_definition() -> None:
    # The weights, which the function returns on demand, are a definition of their own.
    assert {*FUNCTIONS, "attention_weights"} == set(reference.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_docstring_says_what_goes_in_and_what_can_go_wrong(name: str) -> None:
    """Each parameter by name and the errors, or the function whose they are."""
    function = getattr(functional, name)
    text = inspect.getdoc(function) or ""
    assert len(text) > 100
    others = rf":func:`(?:{'|'.join(set(FUNCTIONS) - {name})})`"
    refers = re.search(rf"(?i)arguments[^.]*{others}", text)
    for parameter in inspect.signature(function).parameters:
        assert refers or re.search(rf"(?m)^ *(\w+, )*{parameter}(, \w+)*: ", text), parameter
    assert "Raises:" in text or re.search(rf"(?i)(errors|raises)[^.]*{others}", text)


@pytest.mark.parametrize("name", nn.__all__)
def test_a_module_is_documented(name: str) -> None:
    cls = getattr(nn, name)
    assert "__doc__" in vars(cls)
    assert len(inspect.getdoc(cls) or "") > 100
    assert inspect.getdoc(cls.forward)


def stock_parameters(name: str) -> list[tuple[str, Any, bool]]:
    """(name, default, keyword only) of torch's function; attention's is written in C++."""
    if name == "scaled_dot_product_attention":
        schema = torch.ops.aten.scaled_dot_product_attention.default._schema
        return [
            (a.name, a.default_value if a.has_default_value() else inspect.Parameter.empty,
             a.kwarg_only)
            for a in schema.arguments
        ]  # fmt: skip
    return parameters(getattr(torch.nn.functional, name))


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any, bool]]:
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.default, p.kind is p.KEYWORD_ONLY) for p in found]


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_signatures_begin_as_torch_s(name: str) -> None:
    """Torch's parameters, order and defaults; what is ours comes after, by keyword, optional."""
    stock, ours = stock_parameters(name), parameters(getattr(functional, name))
    assert len(stock) >= 4
    assert ours[: len(stock)] == stock
    extra = ours[len(stock) :]
    assert all(keyword and default is not inspect.Parameter.empty for _, default, keyword in extra)


@pytest.mark.parametrize("name", [n for n in nn.__all__ if hasattr(torch.nn, n)])
def test_constructors_and_forwards_are_torch_s(name: str) -> None:
    cls, stock = getattr(nn, name), getattr(torch.nn, name)
    assert issubclass(cls, stock)
    for method in ("__init__", "forward"):
        ours, wanted = (parameters(getattr(c, method)) for c in (cls, stock))
        assert ours[: len(wanted)] == wanted, method
        # What ours takes besides is by keyword, and off unless it is asked for.
        assert all(keyword and not default for _, default, keyword in ours[len(wanted) :]), method
