"""List a grid of cases for every public op: ours, stock torch's composition, the definition."""

from fusedformer.parity.cases.activation import activation_cases
from fusedformer.parity.cases.attention import attention_cases
from fusedformer.parity.cases.case import Case, Op
from fusedformer.parity.cases.contrastive import (
    contrastive_cases,
    stock_contrastive,
    stock_sigmoid_contrastive,
)
from fusedformer.parity.cases.cross_entropy import cross_entropy_cases
from fusedformer.parity.cases.disentangled import disentangled_cases, stock_disentangled
from fusedformer.parity.cases.embedding import embedding_cases, stock_embedding
from fusedformer.parity.cases.norm import norm_cases
from fusedformer.parity.cases.packing import packing_cases
from fusedformer.parity.cases.rotary import rotary_cases
from fusedformer.parity.cases.softmax import softmax_cases

__all__ = [
    "Case", "Op", "all_cases", "stock_contrastive", "stock_disentangled", "stock_embedding",
    "stock_sigmoid_contrastive",
]  # fmt: skip


def all_cases() -> list[Case]:
    """List the grid, small enough for Triton's interpreter; each case takes another way."""
    return [
        *softmax_cases(), *norm_cases(), *activation_cases(), *attention_cases(),
        *packing_cases(), *embedding_cases(), *contrastive_cases(), *cross_entropy_cases(),
        *rotary_cases(), *disentangled_cases(),
    ]  # fmt: skip
