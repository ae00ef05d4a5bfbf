"""The pretrained sentence encoder through fuse(), in the sentence pipeline of the report."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch

import fusedformer
from fusedformer.models import sentence_embeddings
from fusedformer.testing import compare_tensors
from fusedformer.tools.report.corpus import stdlib_passages
from fusedformer.tools.report.minilm import EXTRAS, WEIGHTS_PACKAGE, MiniLM, hidden_states

missing = [n for n in (*EXTRAS, WEIGHTS_PACKAGE) if importlib.util.find_spec(n) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"not installed: {missing}")


def test_embeddings_of_real_passages_agree() -> None:
    """By the parity criterion, of passages of mixed length; and equal neighbours."""
    client, cpu = MiniLM(), torch.device("cpu")
    ids = client.tokenize([passage.text for passage in stdlib_passages(24)])
    model = client.stock(torch.float32, cpu)
    twin = copy.deepcopy(model)
    report = fusedformer.fuse(model, strict=True)
    assert sum("four fused steps" in one.after for one in report.replaced) == 6
    found = []
    for one in (model, twin, client.truth(torch.float32, cpu)):
        with torch.no_grad():
            parts = [
                sentence_embeddings(hidden_states(one, batch), batch.attention_mask)
                for batch in client.batches(ids, 12, cpu)
            ]
        found.append(torch.cat(parts))
    result = compare_tensors("embeddings", *found)
    assert result.passed, result.fault
    nearest = [(e @ e.T).fill_diagonal_(-2).argmax(1) for e in found]
    assert torch.equal(nearest[0], nearest[2])
