"""``python -m fusedformer parity --model``, and the pages of the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fusedformer
from fusedformer import parity

transformers: Any = pytest.importorskip("transformers")

SIZES = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
)  # fmt: skip
TEXT = dict(**SIZES, vocab_size=99, max_position_embeddings=80)


def _config(folder: Path, model_type: str, **settings: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": model_type, **settings}))
    return str(path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_configuration(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _config(tmp_path, "bert", **TEXT)
    files = ["--json", str(tmp_path / "out.json"), "--html", str(tmp_path / "out.html")]
    assert parity.main(["--model", source, "--dtype", dtype, *files]) == 0
    said = capsys.readouterr().out
    assert "packed: real tokens only" in said and "PASS: " in said and "fused" in said
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["names"] == ["fused", "stock"] and saved["passed"]
    gradients = {r["name"].partition(" (")[0] for r in saved["rows"] if r["kind"] == "gradient"}
    assert "encoder.layer.1.output.dense.weight" in gradients
    assert "PASS" in (tmp_path / "out.html").read_text()


@pytest.mark.parametrize("name", ["vit", "clip", "bart"])
def test_images_and_two_towers(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = dict(**SIZES, image_size=16, patch_size=4)
    tokens = dict(bos_token_id=97, eos_token_id=98, pad_token_id=1)
    settings: dict[str, dict[str, Any]] = {
        "vit": image,
        "clip": dict(text_config={**TEXT, **tokens}, vision_config=image, **tokens),
        "bart": dict(
            vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48,
            encoder_attention_heads=4, decoder_attention_heads=4, decoder_ffn_dim=48,
            max_position_embeddings=80,
        ),
    }  # fmt: skip
    assert parity.main(["--model", _config(tmp_path, name, **settings[name])]) == 0
    assert "PASS: " in capsys.readouterr().out


def test_saved_weights_are_those_that_are_compared(tmp_path: Path) -> None:
    from fusedformer.parity import models

    model = transformers.BertModel(transformers.BertConfig(**TEXT))
    model.save_pretrained(tmp_path)
    loaded = models.load(str(tmp_path))
    assert loaded.embeddings.word_embeddings.weight.equal(model.embeddings.word_embeddings.weight)
    small = models.load(_config(tmp_path / "..", "bert", **TEXT), layers=1)
    assert len(small.encoder.layer) == 1


def test_a_fused_model_with_a_fault_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fuse = fusedformer.fuse

    def faulty(model: Any) -> Any:
        report = fuse(model)
        model.encoder.layer[1].attention.self.scaling *= 1.01
        return report

    monkeypatch.setattr("fusedformer.parity.models.fuse", faulty)
    assert parity.main(["--model", _config(tmp_path, "bert", **TEXT)]) == 1
    said = capsys.readouterr().out
    assert "faster than stock: encoder.layer.1.attention.self" in said and "FAIL" in said


def test_what_is_no_model_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main(["--model", "no-such-thing"]) == 2
    assert "model type such as 'bert', but got 'no-such-thing'" in capsys.readouterr().err
