"""The command: what it writes, that it goes on with the same bits, what it says of wrong usage."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.tools.training.conftest import words

from fusedformer.tools.training import pretrain, settings
from fusedformer.tools.training.tasks import TASKS
from fusedformer.tools.training.trainer import OURS, Trainer, read_checkpoint

SECONDS = 120  # after which a process hangs


def run(folder: Path, source: Path, *more: str, **given: Any) -> int:
    return pretrain.main([f"--out={folder}", f"--text={source}", *words(**given), *more])


def same(first: Path, second: Path) -> None:
    """Weights, optimizers, losses and evaluations, bit by bit."""
    one, two = (read_checkpoint(folder / pretrain.CHECKPOINT) for folder in (first, second))
    for name in ("tokens", "evaluations", "reached", "settings", "tokenizer", "gaps"):
        assert one[name] == two[name]
    for name, state in one["runs"].items():
        other = two["runs"][name]
        assert state["losses"] == other["losses"]
        for key, tensor in state["model"].items():
            assert torch.equal(tensor, other["model"][key]), key
        for index, moments in state["optimizer"]["state"].items():
            for key, value in moments.items():
                assert torch.equal(value, other["optimizer"]["state"][index][key]), (index, key)


@pytest.mark.parametrize("objective", TASKS)
def test_a_stopped_run_goes_on_with_the_same_bits(
    text: Path, tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    number = signal.SIGTERM if objective == "causal" else signal.SIGINT
    given: dict[str, Any] = dict(objective=objective, steps=7, layers=1)
    more = ["--stock"] if objective == "causal" else ["--dropout=0.1"]
    assert run(tmp_path / "whole", text, "--save-every=2", *more, **given) == 0
    step, steps = torch.optim.AdamW.step, 0

    def stopped(self: torch.optim.AdamW) -> None:
        nonlocal steps
        steps += 1
        if steps == (7 if "--stock" in more else 3):  # half way through the third, of three models
            signal.raise_signal(number)
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stopped)
        assert run(tmp_path / "part", text, *more, **given) == 130
    said = capsys.readouterr().err
    assert "stopped after step 3" in said
    assert f"--out {tmp_path / 'part'} --resume" in said
    assert pretrain.main([f"--out={tmp_path / 'part'}", "--resume"]) == 0
    same(tmp_path / "whole", tmp_path / "part")


def test_the_second_signal_ends_a_run_at_once_and_leaves_its_checkpoint(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    step = Trainer.step

    def stopped(self: Trainer) -> float:
        if self.steps_done == 3:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Trainer, "step", stopped)
    before = signal.getsignal(signal.SIGINT)
    assert run(tmp_path, text, "--save-every=2", layers=1) == 130
    assert "interrupted" in capsys.readouterr().err
    assert len(read_checkpoint(tmp_path / pretrain.CHECKPOINT)["tokens"]) == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_loss_that_is_not_finite_is_an_error(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, text, lr=1e30, layers=1) == 2
    assert "try a smaller --lr" in capsys.readouterr().err


def test_a_killed_run_goes_on_with_the_same_bits(
    text: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    command = [sys.executable, "-m", "fusedformer", "pretrain", f"--text={text}"]
    command += words(steps=40, dropout=0.1)
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [*command, f"--out={killed}", "--save-every=1"], env=environment,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + SECONDS
    while not (killed / pretrain.CHECKPOINT).exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(SECONDS) == -signal.SIGKILL
    done = len(read_checkpoint(killed / pretrain.CHECKPOINT)["tokens"])
    assert 0 < done < 40
    whole = tmp_path / "whole"
    resume = [sys.executable, "-m", "fusedformer", "pretrain", f"--out={killed}", "--resume"]
    for one in ([*command, f"--out={whole}"], resume):
        subprocess.run(one, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=SECONDS)
    same(whole, killed)


def test_a_checkpoint_is_whole_or_the_one_before(
    trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, path = trainer(), tmp_path / "checkpoint.pt"
    made.save(path)
    before = path.read_bytes()

    def torn(state: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", torn)
    made.step()
    with pytest.raises(OSError, match="no space"):
        made.save(path)
    assert path.read_bytes() == before


def test_the_folder_of_a_run_beside_stock(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, text, "--stock", steps=5, layers=1) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["parity"]["passed"] and "PASS: 5 steps" in said
    assert found["losses"].keys() == found["ms_per_step"].keys() == {
        "fusedformer", "stock", "stock, nudged"
    }  # fmt: skip
    assert [len(losses) for losses in found["losses"].values()] == [5, 5, 5]
    assert found["evaluations"][-1]["step"] == 5
    assert found["text"]["held_out"] > 20 and len(found["examples"]) == 3
    for word in ("unigram + coin", "ms a step, stock", "tokens/s", "held-out loss", "mlm+nsp 5/5"):
        assert word in said
    assert "<svg" in (tmp_path / "loss.svg").read_text()


@pytest.mark.parametrize(
    ("objective", "loader"),
    [("mlm+nsp", transformers.AutoModelForPreTraining),
     ("causal", transformers.AutoModelForCausalLM)],
)  # fmt: skip
def test_transformers_loads_what_was_trained(
    text: Path, tmp_path: Path, objective: str, loader: Any
) -> None:
    assert run(tmp_path, text, objective=objective) == 0
    state = read_checkpoint(tmp_path / pretrain.CHECKPOINT)
    task, _, _ = pretrain.load_task(settings.Settings(**state["settings"]), state)
    ours: Any = task.model()
    ours.load_state_dict(state["runs"][OURS]["model"])
    theirs = loader.from_pretrained(tmp_path).eval()
    batch = task.batch([0, 1, 2], torch.Generator().manual_seed(0))
    expected = ours.eval().loss(**batch)
    labels = batch.pop("labels").masked_fill(batch["attention_mask"] == 0, -100)
    torch.testing.assert_close(theirs(**batch, labels=labels).loss, expected)
    file = str(tmp_path / "tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file)
    assert tokenizer.decode(tokenizer("The event loop").input_ids) == "The event loop"


def test_wrong_usage_says_what_to_do(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: object, **given: Any) -> str:
        listed = [*map(str, arguments), *words(**given)] if given else [*map(str, arguments)]
        assert pretrain.main(listed) == 2
        return capsys.readouterr().err

    out = f"--out={tmp_path / 'run'}"
    assert "expected a checkpoint, but there is no" in refused(out, "--resume")
    assert "--heads to divide --width 32, but got 3" in refused(out, heads=3)
    assert "--batch-tokens to be at least twice --length" in refused(out, batch_tokens=50)
    assert "--dropout 0 with --stock" in refused(out, "--stock", dropout=0.1)
    assert "--steps to be positive, but got 0" in refused(out, steps=0)
    assert "--lr to be positive" in refused(out, lr=0.0)
    assert "expected a folder of text" in refused(out, "--text=nowhere")
    assert "--vocab-size to be at least 260" in refused(out, vocab_size=100)
    assert "--lr to be positive" in refused(out, lr=float("nan"))
    assert "--device to be cuda or cpu, but got abacus" in refused(out, "--device=abacus")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / pretrain.CHECKPOINT).write_bytes(b"no checkpoint")
    damaged = f"--out={tmp_path / 'damaged'}"
    assert "to be a checkpoint" in refused(damaged, "--resume")
    assert "File exists" in refused(f"--out={tmp_path / 'damaged' / pretrain.CHECKPOINT}")
    assert "--save-every to be positive" in refused(out, "--save-every=0")
    source = tmp_path / "source"
    source.mkdir()
    lines = "\n\n".join(f"This is line number {i} of a text." for i in range(60))
    (source / "a.txt").write_text(lines)
    assert run(tmp_path / "run", source, steps=2) == 0
    capsys.readouterr()
    assert "go on with it by --resume, or name another --out" in refused(out)
    assert "--seed 5 (the run has 0)" in refused(out, "--resume", "--seed=5")
    (source / "a.txt").write_text(lines + "\n\nAnd one line more is there.")
    assert "the text has changed since the run began" in refused(out, "--resume")


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    lacking = lambda name, *rest: None if name == "tokenizers" else find(name, *rest)
    monkeypatch.setattr(importlib.util, "find_spec", lacking)
    assert pretrain.main([]) == 2
    said = capsys.readouterr().err
    assert "this needs tokenizers" in said and "pip install 'fusedformer[report]'" in said
