"""Show that nothing changed: candidates beside baselines, against float64.

For any two functions, or modules of the same parameters, this library's or not:

- :func:`compare`: outputs, gradients and submodules, and where an error starts to grow;
- :func:`assert_parity`, and the pytest fixture of that name in :mod:`fusedformer.parity.fixtures`;
- :func:`training`: optimizer steps of both from the same state;
- :func:`determinism`: the same bits run to run;
- :func:`batch_invariance`: the same bits alone, padded and packed.

``python -m fusedformer parity`` runs this library's ops, or with ``--model`` a Hugging Face model
fused and as it was. The criterion is that of :mod:`fusedformer.parity.criterion`.
"""

from fusedformer.parity.command import main
from fusedformer.parity.compared import ParityReport, assert_parity, compare
from fusedformer.parity.measure import Measured
from fusedformer.parity.repeated import (
    Difference,
    SamenessReport,
    batch_invariance,
    determinism,
)
from fusedformer.parity.run import Record, run_all, run_case, share_of_limit, worst_of
from fusedformer.parity.trained import TrainingReport, training

__all__ = [
    "Difference", "Measured", "ParityReport", "Record", "SamenessReport", "TrainingReport",
    "assert_parity", "batch_invariance", "compare", "determinism", "main", "run_all", "run_case",
    "share_of_limit", "training", "worst_of",
]  # fmt: skip
