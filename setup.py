"""Package metadata. Two import roots, python/ and kernels/, make one distribution."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = (ROOT / "python/fusedformer/_version.py").read_text().split('"')[1]

REPORT = ["transformers>=5.17", "safetensors", "tokenizers", "matplotlib", "rich", "scikit-learn"]
EMBED = ["sentence-transformers>=6.2"]
TRAINER = [*EMBED, "accelerate", "datasets"]  # the Trainer of sentence-transformers
TEST = ["pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "expecttest", "numpy"]
# `make docs` needs no torch: the API reference is read from the source.
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material", "mkdocstrings[python]", "ruff"]
DEV = [*REPORT, *TEST, *TRAINER, "peft", "torchao", "ruff", "mypy", "build", "pre-commit"]

setup(
    name="fusedformer",
    version=VERSION,
    description="Fused Triton kernels for Transformer encoders, as drop-in torch modules",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="fusedformer developers",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["transformer", "attention", "triton", "torch", "fused kernels"],
    python_requires=">=3.10",
    package_dir={"": "python", "fusedformer_kernels": "kernels/fusedformer_kernels"},
    packages=[*find_packages("python"), *find_packages("kernels")],
    package_data={
        "fusedformer": ["py.typed"],
        "fusedformer_kernels": ["py.typed", "tuned/*.json", "cpu/*.cpp", "cpu/*.h"],
    },
    install_requires=[
        "torch>=2.11",
        # Where triton has no wheel the torch backend is the whole library.
        'triton>=3.6; platform_system == "Linux"',
    ],
    extras_require={"report": REPORT, "embed": EMBED, "test": TEST, "docs": DOCS, "dev": DEV},
    entry_points={"console_scripts": ["fusedformer = fusedformer.__main__:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
