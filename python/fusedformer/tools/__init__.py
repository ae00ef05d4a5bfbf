"""Run the commands of ``python -m fusedformer``; the library imports none of this."""
