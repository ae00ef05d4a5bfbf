"""Docstrings as the API reference reads them: an extension of griffe, which mkdocstrings runs."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Rewrites what the reference would show as it stands in the source."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Drop roles, as in ``:func:`fuse```, and join names of arguments over two lines."""
        if obj.docstring is not None:
            text = re.sub(r":(?:class|func|meth|mod|attr):`", "`", obj.docstring.value)
            names = r"^( *(?:\w+, )*\w+,)\n +(?=(?:\w+, )*\w+: )"
            obj.docstring.value = re.sub(names, r"\1 ", text, flags=re.MULTILINE)
