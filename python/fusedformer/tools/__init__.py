"""What the commands of ``python -m fusedformer`` are made of; the library imports none of it."""
