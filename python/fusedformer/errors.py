"""Define the errors for bad arguments, which are also those that torch raises for them.

Torch answers most bad arguments with ``RuntimeError``, and those of its attention modules with
``AssertionError``. Here they are ``ValueError`` or ``TypeError``, by what is wrong. Each class here
is a subclass of torch's too, so that code which catches those keeps working; an ``IndexError`` is
one in both libraries.
"""

from __future__ import annotations

__all__ = ["ArgumentError", "BadTypeError", "BadValueError"]


class ArgumentError(RuntimeError, AssertionError):
    """An argument that cannot be computed with; the message names function and argument."""


class BadValueError(ArgumentError, ValueError):
    """Shapes, values or devices that do not fit."""


class BadTypeError(ArgumentError, TypeError):
    """Types, dtypes or layouts that do not fit."""
