"""Generation with the cache: what recomputing from scratch gives, and what transformers gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models.judge import perturbed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedformer import backend
from fusedformer.models import GPTConfig, GPTDecoderModel, next_token

CONFIG = GPTConfig(
    vocab_size=61, n_positions=40, n_embd=32, n_layer=2, n_head=4, n_inner=48, eos_token_id=None
)
LENGTHS = (5, 1, 3)
RIGHT = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
LEFT = RIGHT.flip(1)


def model_of(config: GPTConfig = CONFIG) -> GPTDecoderModel:
    """With logits that are far apart."""
    torch.manual_seed(0)
    found: GPTDecoderModel = perturbed(GPTDecoderModel(config).eval(), 0.3)
    return found


def prompts(keep: Tensor) -> Tensor:
    """The same tokens whatever side padding is on."""
    ids = torch.full(keep.shape, 7)
    generator = torch.Generator().manual_seed(1)
    ids[keep] = torch.randint(0, 60, (sum(LENGTHS),), generator=generator)
    return ids


def from_scratch(model: GPTDecoderModel, count: int) -> Tensor:
    """Each sequence alone, all of it computed again for every token."""
    found = []
    for row, length in zip(prompts(RIGHT), LENGTHS, strict=True):
        ids = row[None, :length]
        with torch.no_grad():
            for _ in range(count):
                token = model.logits(model(ids)[:, -1]).argmax(-1)
                ids = torch.cat([ids, token[:, None]], 1)
        found.append(ids[0, length:])
    return torch.stack(found)


@pytest.mark.parametrize("keep", [LEFT, RIGHT], ids=["left", "right"])
def test_cached_tokens_are_those_computed_from_scratch(keep: Tensor) -> None:
    model = model_of()
    with backend("torch"):
        found = model.generate(prompts(keep), keep, max_new_tokens=12)
        wanted = from_scratch(model, 12)
    assert torch.equal(found, wanted)
    assert len(wanted.unique()) > 6, "the model repeats itself, so that this shows nothing"


@pytest.mark.parametrize("static_shapes", [False, True])
def test_rows_behind_the_last_token_are_no_keys(static_shapes: bool) -> None:
    """Large batches are packed into a multiple of 16 rows, statically into as many as there are."""
    model = model_of()
    ids = prompts(LEFT).repeat(70, 1)
    with backend("torch"):
        wanted = model.generate(prompts(LEFT), LEFT, max_new_tokens=4)
        model.encoder.static_shapes = static_shapes
        found = model.generate(ids, LEFT.repeat(70, 1), max_new_tokens=4)
    assert sum(LENGTHS) * 70 % 16 and ids.numel() >= 1024
    assert torch.equal(found, wanted.repeat(70, 1))


def test_kernels_give_the_same_tokens(device: str) -> None:
    config = GPTConfig(**{**vars(CONFIG), "n_layer": 1, "n_head": 2})
    model = model_of(config).to(device)
    given = prompts(LEFT).to(device), LEFT.to(device)
    with backend("torch"):
        wanted = model.generate(*given, max_new_tokens=3)
    with backend("triton"):
        assert torch.equal(model.generate(*given, max_new_tokens=3), wanted)


def test_greedy_tokens_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = {**vars(CONFIG), "eos_token_id": 60}
    torch.manual_seed(0)
    stock = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    stock = perturbed(stock, 0.3)
    ours = GPTDecoderModel.from_huggingface(stock.state_dict(), GPTConfig(**config))
    ids, mask = prompts(LEFT), LEFT.long()
    settings: dict[str, Any] = dict(max_new_tokens=12, do_sample=False, pad_token_id=7)
    plain = stock.generate(ids, attention_mask=mask, **settings)[:, 5:]
    eos = int(plain[0, 3])  # a token that ends a sequence before the others
    wanted = stock.generate(ids, attention_mask=mask, eos_token_id=eos, **settings)[:, 5:]
    assert (wanted == eos).any(1).any()
    with backend("torch"):
        first = ours.generate(ids, mask, max_new_tokens=12, pad_token_id=7)
        found = ours.generate(ids, mask, max_new_tokens=12, pad_token_id=7, eos_token_id=eos)
    assert torch.equal(first, plain)
    assert torch.equal(found, wanted)


def test_generation_ends_with_the_last_sequence() -> None:
    """Whether all have ended is looked at every 8 tokens; what comes after is cut off."""
    model = model_of()
    with backend("torch"):
        whole = model.generate(prompts(LEFT)[:1], LEFT[:1], max_new_tokens=20)
        eos = int(whole[0, 9])
        end = whole[0].tolist().index(eos)
        found = model.generate(prompts(LEFT)[:1], LEFT[:1], max_new_tokens=20, eos_token_id=eos)
    assert found.tolist() == whole[:, : end + 1].tolist()


def test_several_tokens_at_once_are_the_same_as_one_by_one() -> None:
    """Each sees itself and those before it, whatever the length of its sequence."""
    model = model_of()
    more = torch.randint(0, 60, (3, 4), generator=torch.Generator().manual_seed(2))
    with backend("torch"), torch.no_grad():
        _, cache = model.prefill(prompts(RIGHT), RIGHT, 4)
        at_once = model.decode(more, cache)
        assert cache.lengths.tolist() == [n + 4 for n in LENGTHS]
        _, cache = model.prefill(prompts(RIGHT), RIGHT, 4)
        one_by_one = [model.decode(more[:, i : i + 1], cache) for i in range(4)]
        ids = torch.cat([prompts(RIGHT)[2:, :3], more[2:]], 1)
        from_scratch = model(ids)[:, 3:]
        with pytest.raises(ValueError, match="at most 0 tokens"):
            model.decode(more, cache)
    torch.testing.assert_close(at_once, torch.cat(one_by_one, 1))
    torch.testing.assert_close(at_once[2:], from_scratch)


class Asked(TorchDispatchMode):
    """Calls whose result the host waits for, or whose shape depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls += 1
        if func.name().split(".")[0] in ("aten::_local_scalar_dense", "aten::nonzero"):
            self.waits.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_nothing_and_keeps_its_shapes(device: str) -> None:
    from fusedformer_kernels.runtime.launch import recorded_launches

    config = GPTConfig(**{**vars(CONFIG), "n_layer": 1, "n_positions": 600})
    model = model_of(config).to(device)
    token = torch.ones(3, 1, dtype=torch.int64, device=device)
    with backend("triton"), torch.no_grad():
        _, cache = model.prefill(prompts(RIGHT).to(device), RIGHT.to(device), 595)
        where = cache.keys.data_ptr()
        steps = []
        for _ in range(2):
            with Asked() as asked, recorded_launches(run=False) as launches:
                next_token(model.logits(model.decode(token, cache)[:, 0]), temperature=1.0)
            steps.append([(one.name, one.grid) for one in launches])
            assert asked.calls and asked.waits == []
    assert steps[0] == steps[1] and cache.keys.data_ptr() == where
    names = [name for name, _ in steps[0]]
    # With room for more than 512 keys, programs share one query's keys and their parts are merged.
    assert "_merge_splits" in names


def test_what_is_drawn_is_reproducible_and_follows_the_probabilities() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]])
    rows = logits.expand(4000, 4)
    settings: list[dict[str, Any]] = [
        {}, {"top_k": 2}, {"top_p": 0.7}, {"top_k": 3, "top_p": 0.9}, {"top_k": 9, "top_p": 1.0},
    ]  # fmt: skip
    transformers = pytest.importorskip("transformers")
    for given in settings:
        scores = logits / 0.7
        if "top_k" in given:
            scores = transformers.TopKLogitsWarper(given["top_k"])(None, scores)
        if given.get("top_p", 1.0) < 1.0:
            scores = transformers.TopPLogitsWarper(given["top_p"])(None, scores)
        wanted = scores.softmax(-1)[0]
        draws = [
            next_token(rows, temperature=0.7, generator=torch.Generator().manual_seed(3), **given)
            for _ in range(2)
        ]
        assert torch.equal(*draws)
        found = torch.bincount(draws[0], minlength=4) / 4000
        assert torch.equal(found > 0, wanted > 0)
        assert ((found - wanted).abs() < 5 * (wanted * (1 - wanted) / 4000).sqrt() + 1e-9).all()
    assert torch.equal(next_token(rows), torch.zeros(4000, dtype=torch.int64))


def test_drawn_text_is_reproducible() -> None:
    model = model_of()

    def drawn(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        found: Tensor = model.generate(
            prompts(LEFT), LEFT, max_new_tokens=6, temperature=1.5, top_k=20, generator=generator
        )
        return found

    with backend("torch"):
        assert torch.equal(drawn(1), drawn(1))
        assert not torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 0}, "'max_new_tokens' to be positive"),
        ({"temperature": -1.0}, "'temperature' to be at least 0"),
        ({"top_k": 3}, "a positive 'temperature' with 'top_k'"),
        ({"temperature": 1.0, "top_k": 0}, "'top_k' to be at least 1"),
        ({"temperature": 1.0, "top_p": 1.5}, "'top_p' to be in"),
        ({"max_new_tokens": 37}, "at most 40 positions"),
        ({"attention_mask": torch.zeros(3, 5)}, "a real token in each sequence"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of().generate(prompts(LEFT), **{"max_new_tokens": 2, **given})


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="eval mode"):
        model_of().train().generate(prompts(LEFT), max_new_tokens=2)
