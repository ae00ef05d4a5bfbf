"""Define the objectives of pretraining: batches, models, and baselines of the loss."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from fusedformer.distributed import LengthBalancedSampler
from fusedformer.models import BertConfig, BertEncoderModel, GPTConfig, GPTDecoderModel
from fusedformer.objectives import IGNORED, mask_tokens
from fusedformer.tools.report.corpus import Passage
from fusedformer.tools.training import stock
from fusedformer.tools.training.pairs import PairEncoder, tfidf_retrieval, words
from fusedformer.tools.training.settings import Settings
from fusedformer.tools.training.text import (
    CLS,
    MASK,
    PAD,
    SEP,
    SPECIAL_TOKENS,
    Corpus,
    encode,
    unigram_loss,
)

Batch = dict[str, Tensor]

_SHORTEST = 5  # tokens; a shorter rest of a passage that was cut is dropped
_SHOWN = 3
_DROPPED = 0.2  # share of a pair's tokens, drawn each time, since pairs are few
_ALIKE = 8  # ranks by length, up and down, among which a wrong second half is chosen


class Task(ABC):
    """An objective on a corpus. All random numbers come from the generator that is given.

    Attributes:
        chance: what ``baselines`` has that the training loss must fall below.
    """

    chance: str

    @staticmethod
    def text(passage: Passage) -> str:
        """Return the text of a passage that is learned."""
        return passage.text

    def __init__(self, settings: Settings, corpus: Corpus, tokenizer: Any) -> None:
        self.settings = settings
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()
        self.read()

    @abstractmethod
    def read(self) -> None:
        """Make samples of both parts of the corpus."""

    @abstractmethod
    def model(self) -> nn.Module:
        """Make this library's model, whose ``loss`` takes a batch as keyword arguments."""

    @abstractmethod
    def stock_model(self) -> nn.Module:
        """Make torch's model, which takes the ``state_dict`` and the batches of ``model``."""

    @abstractmethod
    def encoder_for_classes(self, weights: Mapping[str, Tensor] | None) -> Any:
        """Make the part of ``model`` that has ``pooled``, and load its weights."""

    @abstractmethod
    def batches(self, epoch: int) -> list[list[int]]:
        """Group the samples of an epoch by step."""

    @abstractmethod
    def batch(self, samples: Sequence[int], generator: Generator) -> Batch:
        """Return what ``loss`` takes."""

    @abstractmethod
    def baselines(self) -> dict[str, float]:
        """Compute what is reached without a model."""

    @abstractmethod
    def evaluate(self, model: Any) -> dict[str, float]:
        """Evaluate on unchanged held-out text: ``"loss"`` and other figures."""

    @abstractmethod
    def examples(self, model: Any) -> list[str]:
        """Write a few lines that show what the model does."""


class _Windows(Task):
    """Tasks on passages, long ones cut, in batches of about equal numbers of tokens."""

    special: int  # tokens of a sample besides those of the passage

    def read(self) -> None:
        longest = self.settings.length - self.special
        parts = self.corpus.train, self.corpus.held_out
        encoded = (encode(self.tokenizer, list(map(self.text, part))) for part in parts)
        self.windows, self.held_out = (
            [window for ids in part for window in _cut(ids, longest)] for part in encoded
        )
        if min(len(self.windows), len(self.held_out)) < 2:
            raise ValueError(
                f"expected more text, by --text: {len(self.windows)} pieces of at most {longest} "
                f"tokens to train on, and {len(self.held_out)} held out"
            )
        self._sampler = self._sampled(shuffle=True)

    def _part(self, held_out: bool) -> list[list[int]]:
        return self.held_out if held_out else self.windows

    def _sampled(self, shuffle: bool) -> LengthBalancedSampler:
        """Group the samples to train on, in a new order each epoch; or the held-out ones."""
        lengths = [len(window) + self.special for window in self._part(not shuffle)]
        given = self.settings
        return LengthBalancedSampler(
            lengths,
            given.batch_tokens,
            num_replicas=1,
            rank=0,
            shuffle=shuffle,
            seed=given.seed,
            d_model=given.width,
        )

    def batches(self, epoch: int) -> list[list[int]]:
        self._sampler.set_epoch(epoch)
        return list(self._sampler)

    def batch(self, samples: Sequence[int], generator: Generator) -> Batch:
        return self.batch_of(False, samples, generator)

    @abstractmethod
    def batch_of(self, held_out: bool, samples: Sequence[int], generator: Generator) -> Batch:
        """Make a batch of some windows of a part."""

    def held_out_batches(self) -> Iterator[Batch]:
        """Make the held-out batches, the same each time."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        for samples in self._sampled(shuffle=False):
            yield self.batch_of(True, samples, generator)

    def unigram(self, *others: int) -> float:
        """Compute the loss of knowing how often each token is, and that ``others`` end windows."""
        train, held_out = (
            [[*window, *others] for window in part] for part in (self.windows, self.held_out)
        )
        return unigram_loss(train, held_out, self.vocab_size)


class MaskedAndNext(_Windows):
    """BERT's objectives: masked tokens, and whether the second half belongs to the first."""

    chance = "unigram + coin"
    special = 3

    def read(self) -> None:
        tokens = (self.tokenizer.id_to_token(i) for i in range(self.vocab_size))
        self._begins_word = [token.startswith("Ġ") for token in tokens]
        super().read()
        parts = self.windows, self.held_out
        self._halves = [[self._halved(window) for window in part] for part in parts]
        # A wrong half has about the same length, so that lengths do not tell.
        self._orders = [
            sorted(range(len(halves)), key=lambda i: len(halves[i][1])) for halves in self._halves
        ]
        self._ranks = [{i: rank for rank, i in enumerate(order)} for order in self._orders]

    def _halved(self, window: list[int]) -> tuple[list[int], list[int]]:
        middle = self._middle(window)
        return window[:middle], window[middle:]

    def config(self) -> BertConfig:
        """Return the sizes of the model."""
        given = self.settings
        return BertConfig(
            self.vocab_size,
            given.width,
            given.layers,
            given.heads,
            4 * given.width,
            hidden_dropout_prob=given.dropout,
            attention_probs_dropout_prob=given.dropout,
            max_position_embeddings=given.length,
            pad_token_id=PAD,
        )

    def model(self) -> BertEncoderModel:
        return BertEncoderModel(self.config(), heads=["mlm", "nsp"])

    def stock_model(self) -> nn.Module:
        return stock.StockBert(self.config())

    def encoder_for_classes(self, weights: Mapping[str, Tensor] | None) -> Any:
        model = BertEncoderModel(self.config(), heads=["pooler"])
        return _with_weights(model, weights)

    def batch_of(self, held_out: bool, samples: Sequence[int], generator: Generator) -> Batch:
        halves, order = self._halves[held_out], self._orders[held_out]
        ranks = self._ranks[held_out]
        count = len(samples)
        changed = torch.rand(count, generator=generator) < 0.5
        drawn = torch.rand(count, generator=generator)
        rows, types = [], []
        for i, change, share in zip(samples, changed.tolist(), drawn.tolist(), strict=True):
            rank = ranks[i]
            near = [*order[max(0, rank - _ALIKE) : rank], *order[rank + 1 : rank + 1 + _ALIKE]]
            other = near[int(share * len(near))] if change else i
            one = [CLS, *halves[i][0], SEP]
            # Halves of two windows may have a few tokens more than one window.
            room = self.settings.length - len(one) - 1
            two = [*halves[other][1][:room], SEP]
            rows.append(one + two)
            types.append([0] * len(one) + [1] * len(two))
        ids, mask = padded(rows)
        special = ids < len(SPECIAL_TOKENS)
        masked, labels = mask_tokens(ids, MASK, self.vocab_size, special, generator=generator)
        return {
            "input_ids": masked, "labels": labels, "next_sentence_label": changed.long(),
            "attention_mask": mask, "token_type_ids": padded(types)[0],
        }  # fmt: skip

    def _middle(self, window: list[int]) -> int:
        """Find the beginning of the word nearest to the middle."""
        half = len(window) // 2
        starts = [i for i in range(1, len(window)) if self._begins_word[window[i]]]
        return min(starts, key=lambda i: abs(i - half), default=half)

    def baselines(self) -> dict[str, float]:
        unigram = self.unigram()
        return {"unigram": unigram, "coin": math.log(2), self.chance: unigram + math.log(2)}

    @torch.no_grad()
    def evaluate(self, model: Any) -> dict[str, float]:
        # Loss and number of masked tokens; loss, right answers and number of sequences.
        sums = torch.zeros(5, dtype=torch.float64)
        for batch in self.held_out_batches():
            batch = moved(batch, model)
            labels, follows = batch.pop("labels"), batch.pop("next_sentence_label")
            masked, count = int((labels != IGNORED).sum()), len(follows)
            logits = model.nsp(model.pooled(**batch)).float()
            right = (logits.argmax(1) == follows).sum()
            apart = F.cross_entropy(logits, follows)
            loss = model.loss(labels=labels, **batch) if masked else apart.new_zeros(())
            sums += torch.tensor([float(loss) * masked, masked, float(apart) * count, right, count])
        loss, masked, apart, right, count = sums.tolist()
        mlm, nsp = loss / max(1.0, masked), apart / count
        return {"loss": mlm + nsp, "mlm": mlm, "nsp": nsp, "nsp accuracy": right / count}

    @torch.no_grad()
    def examples(self, model: Any) -> list[str]:
        found = []
        for window in [w for w in self.held_out if 12 <= len(w) <= 40][:_SHOWN]:
            ids = torch.tensor([[CLS, *window, SEP]])
            place = 1 + self._middle(window)
            word = self.tokenizer.decode([window[place - 1]])
            ids[0, place] = MASK
            hidden = model(ids.to(next(model.parameters()).device))
            best = model.masked_lm_logits(hidden[0, place]).topk(3).indices.tolist()
            before, after = (self.tokenizer.decode(w)
                             for w in (window[: place - 1], window[place:]))  # fmt: skip
            guesses = ", ".join(repr(self.tokenizer.decode([i])) for i in best)
            found.append(f"{before} [MASK]{after}\n    was {word!r}; most likely: {guesses}")
        return found


class Causal(_Windows):
    """GPT's objective: each token from those before it."""

    chance = "unigram"
    special = 2

    def config(self) -> GPTConfig:
        """Return the sizes of the model."""
        given = self.settings
        return GPTConfig(
            self.vocab_size,
            given.length,
            given.width,
            given.layers,
            given.heads,
            resid_pdrop=given.dropout,
            embd_pdrop=given.dropout,
            attn_pdrop=given.dropout,
            eos_token_id=SEP,
        )

    def model(self) -> GPTDecoderModel:
        return GPTDecoderModel(self.config())

    def stock_model(self) -> nn.Module:
        return stock.StockGPT(self.config())

    def encoder_for_classes(self, weights: Mapping[str, Tensor] | None) -> Any:
        return _with_weights(self.model(), weights)

    def batch_of(self, held_out: bool, samples: Sequence[int], generator: Generator) -> Batch:
        ids, mask = padded([[CLS, *self._part(held_out)[i], SEP] for i in samples])
        return {"input_ids": ids, "labels": ids, "attention_mask": mask}

    def baselines(self) -> dict[str, float]:
        return {self.chance: self.unigram(SEP)}

    @torch.no_grad()
    def evaluate(self, model: Any) -> dict[str, float]:
        total, count = 0.0, 0
        for batch in self.held_out_batches():
            predicted = int(batch["attention_mask"][:, 1:].sum())
            total += float(model.loss(**moved(batch, model))) * predicted
            count += predicted
        return {"loss": total / count}

    def examples(self, model: Any) -> list[str]:
        device = next(model.parameters()).device
        generator = torch.Generator(device).manual_seed(self.settings.seed)
        found = []
        for start in ("Return the", "Raise", "This module"):
            ids = torch.tensor([[CLS, *encode(self.tokenizer, [start])[0]]], device=device)
            room = min(30, self.settings.length - ids.shape[1])
            if room < 1:
                continue
            new = model.generate(
                ids, max_new_tokens=room, temperature=0.7, top_p=0.9, generator=generator
            )
            found.append(start + " |" + self.tokenizer.decode(new[0].tolist()))
        return found


class Contrastive(Task):
    """CLIP's objective, on a function's signature and its docstring."""

    chance = "uniform"

    @staticmethod
    def text(passage: Passage) -> str:
        return passage.text.lower()

    def read(self) -> None:
        parts = self.corpus.train, self.corpus.held_out
        self.pairs, self.held_out = (
            [passage for passage in part if passage.signature] for part in parts
        )
        if min(len(self.pairs), len(self.held_out)) < self.settings.pairs:
            raise ValueError(
                f"expected functions with docstrings, {self.settings.pairs} (--pairs) to train on "
                f"and as many held out, but found {len(self.pairs)} and {len(self.held_out)} in "
                f"{self.corpus.source}"
            )
        self._ids = [self._encoded(part) for part in (self.pairs, self.held_out)]

    def _encoded(self, passages: list[Passage]) -> list[tuple[list[int], list[int]]]:
        longest = self.settings.length - 2
        sides = [_signature_words(p.signature) for p in passages], [self.text(p) for p in passages]
        encoded = (encode(self.tokenizer, side) for side in sides)
        cut = ([[CLS, *ids[:longest], SEP] for ids in side] for side in encoded)
        return list(zip(*cut, strict=True))

    def model(self) -> nn.Module:
        return PairEncoder(self.settings, self.vocab_size)

    def stock_model(self) -> nn.Module:
        return PairEncoder(self.settings, self.vocab_size, of_torch=True)

    def encoder_for_classes(self, weights: Mapping[str, Tensor] | None) -> Any:
        return _with_weights(self.model(), weights).tower

    def batches(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.settings.seed + epoch)
        order = torch.randperm(len(self.pairs), generator=generator)
        size = self.settings.pairs  # the rest is part of another epoch
        found: list[list[int]] = order[: len(order) // size * size].view(-1, size).tolist()
        return found

    def batch(self, samples: Sequence[int], generator: Generator) -> Batch:
        sides = _all_sides([self._ids[0][i] for i in samples])
        return _padded_batch([_without_some(side, generator) for side in sides])

    def baselines(self) -> dict[str, float]:
        pairs = [(p.signature, p.text) for p in self.held_out]
        counted = {f"TF-IDF {n}": v for n, v in tfidf_retrieval(pairs).items()}
        chance = {f"uniform top-{n}": n / len(self.held_out) for n in (1, 5)}
        return {self.chance: math.log(self.settings.pairs)} | chance | counted

    @torch.no_grad()
    def evaluate(self, model: Any) -> dict[str, float]:
        a, b = self._features(model)
        size = self.settings.pairs
        parts = [slice(i, i + size) for i in range(0, len(a) - size + 1, size)]
        losses = [float(model.contrast(a[part], b[part])) for part in parts]
        ranks = (a @ b.t()).argsort(1, descending=True)
        places = (ranks == torch.arange(len(a), device=a.device)[:, None]).int().argmax(1)
        hits = {f"top-{n}": float((places < n).double().mean()) for n in (1, 5)}
        return {"loss": sum(losses) / len(losses)} | hits

    @torch.no_grad()
    def examples(self, model: Any) -> list[str]:
        a, b = self._features(model)
        best = (a @ b.t()).argmax(1).tolist()
        found = []
        for i in range(0, len(best), max(1, len(best) // _SHOWN))[:_SHOWN]:
            verdict = "its own" if best[i] == i else "another's"
            found.append(f"{self.held_out[i].signature}\n    nearest, {verdict}: "
                         f"{self.held_out[best[i]].text[:90]}")  # fmt: skip
        return found

    def _features(self, model: Any) -> tuple[Tensor, Tensor]:
        """Compute the features of held-out signatures and docstrings."""
        found = []
        size = self.settings.pairs
        for start in range(0, len(self._ids[1]), size):
            batch = moved(_padded_batch(_all_sides(self._ids[1][start : start + size])), model)
            found.append(model.features(**batch).float().chunk(2))
        a, b = zip(*found, strict=True)
        return torch.cat(a), torch.cat(b)


TASKS: dict[str, type[Task]] = {
    "mlm+nsp": MaskedAndNext, "causal": Causal, "contrastive": Contrastive
}  # fmt: skip


def _with_weights(model: Any, weights: Mapping[str, Tensor] | None) -> Any:
    """Load from ``weights`` all that the model has; others are left out."""
    if weights is not None:
        own = model.state_dict()
        model.load_state_dict({name: weights[name] for name in own})
    return model


def _cut(ids: list[int], longest: int) -> list[list[int]]:
    parts = [ids[i : i + longest] for i in range(0, len(ids), longest)]
    return [part for part in parts if len(part) >= _SHORTEST]


def _signature_words(signature: str) -> str:
    """Split a signature into words, so that names have the tokens of English."""
    return " " + " ".join(words(signature))


def _all_sides(pairs: Sequence[tuple[list[int], list[int]]]) -> list[list[int]]:
    """List all first sides, then all second ones."""
    return [side for sides in zip(*pairs, strict=True) for side in sides]


def _without_some(ids: list[int], generator: Generator) -> list[int]:
    """Drop some tokens, but neither the first nor the last."""
    kept = (torch.rand(len(ids), generator=generator) >= _DROPPED).tolist()
    kept[0] = kept[-1] = True
    return [token for token, keep in zip(ids, kept, strict=True) if keep]


def _padded_batch(rows: Sequence[Sequence[int]]) -> Batch:
    ids, mask = padded(rows)
    return {"input_ids": ids, "attention_mask": mask}


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Pad rows with zeros; return (``[B, L]``, a mask of 1 for real tokens)."""
    tensors = [torch.tensor(row) for row in rows]
    ids = nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=PAD)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def moved(batch: Batch, model: nn.Module) -> Batch:
    """Move a batch to the device of ``model``."""
    device = next(model.parameters()).device
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
