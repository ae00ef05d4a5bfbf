"""Match pairs of texts: by one tower for both sides, and by counts of words as a baseline."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedformer.models import CLIPTextConfig
from fusedformer.models.clip import CLIPTextTower
from fusedformer.nn import ContrastiveLoss
from fusedformer.tools.training import stock
from fusedformer.tools.training.settings import Settings
from fusedformer.tools.training.text import SEP

# Splits names too: getLineNumber and line_number have "line" and "number".
WORDS = r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+"


class PairEncoder(nn.Module):
    """CLIP's text tower and its projection on both sides, and the contrastive loss.

    Args:
        settings: sizes.
        vocab_size: of the tokenizer.
        of_torch: whether tower and loss are of torch's modules; parameters are named alike.
    """

    def __init__(self, settings: Settings, vocab_size: int, of_torch: bool = False) -> None:
        super().__init__()
        config = CLIPTextConfig(
            vocab_size, settings.width, 4 * settings.width, settings.layers, settings.heads,
            settings.length, hidden_act="gelu", attention_dropout=settings.dropout,
            eos_token_id=SEP,
        )  # fmt: skip
        self.tower: nn.Module = (
            stock.StockTextTower(config) if of_torch else CLIPTextTower(config, {})
        )
        self.projection = nn.Linear(settings.width, settings.width, bias=False)
        self.contrast: nn.Module = stock.StockContrastive() if of_torch else ContrastiveLoss()
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return features ``[B, width]`` of length 1."""
        hidden = self.tower(input_ids, attention_mask)
        return F.normalize(self.projection(hidden), dim=-1)

    def loss(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the loss of a batch whose first half matches its second, row by row."""
        a, b = self.features(input_ids, attention_mask).chunk(2)
        loss: Tensor = self.contrast(a, b)
        return loss


def words(text: str) -> list[str]:
    """Split a text into words, in lower case."""
    return [word.lower() for word in re.findall(WORDS, text)]


def tfidf_retrieval(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Return how often a text finds its partner among all, by cosines of TF-IDF vectors."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    first, second = zip(*pairs, strict=True)
    vectorizer: Any = TfidfVectorizer(analyzer=words, sublinear_tf=True)
    b = vectorizer.fit_transform(second)
    scores = torch.from_numpy((vectorizer.transform(first) @ b.T).toarray())
    own = scores.diagonal()[:, None]
    # Half of the ties count as ahead.
    places = (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2
    return {f"top-{n}": float((places < n).double().mean()) for n in (1, 5)}
