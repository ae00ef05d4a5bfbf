"""Check what ``make wheel`` built: ``python .ci/check_wheel.py DIST`` with SITE on the path.

DIST holds the sdist and the wheel; SITE is where the wheel was unpacked, away from the checkout.
"""

import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path


def main(dist: Path) -> None:
    """Raise AssertionError for what is missing, or does not come from the wheel."""
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "setup.py", "pyproject.toml"} <= held, held
    with zipfile.ZipFile(wheel) as zipped:
        about = {Path(name).name: name for name in zipped.namelist() if ".dist-info/" in name}
        assert "fusedformer/tools/bench.py" in zipped.namelist()  # the commands
        assert "fusedformer_kernels/tuned/sm_90.json" in zipped.namelist()  # measured configs
        assert b"Apache License" in zipped.read(about["LICENSE"])
        for name in ("attention.cpp", "vectors.h"):  # compiled on use
            assert f"fusedformer_kernels/cpu/{name}" in zipped.namelist()
        metadata = message_from_bytes(zipped.read(about["METADATA"]))
    assert metadata["License-Expression"] == "Apache-2.0", metadata.items()
    assert metadata["Author"] == "fusedformer developers", metadata.items()

    import fusedformer
    import fusedformer_kernels

    roots = [Path(module.__path__[0]) for module in (fusedformer, fusedformer_kernels)]
    for root in roots:
        assert dist.parent in root.parents, root
        assert (root / "py.typed").exists(), root
    assert any(name.endswith("py.typed") for name in held)
    assert any(name.endswith("tuned/sm_90.json") for name in held)
    print("wheel", fusedformer.__version__, "imports from", *roots)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
