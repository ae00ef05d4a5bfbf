"""What commands say of arguments that they cannot use, before they begin."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fusedformer.parity import command as parity
from fusedformer.tools import compile_report, report, tune


@pytest.mark.parametrize(
    ("run", "arguments", "message"),
    [
        (tune.main, ["--dry-run", "--case", "["], "expected a regular expression, but got '\\['"),
        (compile_report.main, ["--case", "("], "expected a regular expression, but got '\\('"),
        (tune.main, ["--dry-run", "--case", "nosuch"], "'nosuch' matches none of .*norm_forward"),
        (compile_report.main, ["--case", "nosuch"], "'nosuch' matches none of .*softmax"),
        (tune.main, ["--dry-run", "--processes", "0"], "expected a positive integer, but got '0'"),
        (report.main, ["--benchmarks", "no.json"], "expected a JSON file, but got 'no.json'"),
    ],
)
def test_bad_arguments(
    run: Callable[[list[str]], int],
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as ended:
        run(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said


def test_a_configuration_that_is_no_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text("{model")
    assert parity.main(["--model", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "expected JSON in" in said and "config.json" in said
