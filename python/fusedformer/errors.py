"""What is raised for bad arguments, caught as what it is and as what torch raises in its place.

Torch answers most bad arguments by ``RuntimeError``, and those of its attention modules by
``AssertionError``. Here they are ``ValueError`` or ``TypeError``, by what is wrong. So that code
which catches the one or the other keeps working, each of these classes is all of them; an
``IndexError`` is one in both libraries.
"""

from __future__ import annotations

__all__ = ["ArgumentError", "BadTypeError", "BadValueError"]


class ArgumentError(RuntimeError, AssertionError):
    """An argument that cannot be computed with; the message names function and argument."""


class BadValueError(ArgumentError, ValueError):
    """Shapes, values or devices that do not fit."""


class BadTypeError(ArgumentError, TypeError):
    """Types, dtypes or layouts that do not fit."""
