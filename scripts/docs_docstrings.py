"""For the API pages (mkdocs.yml): transformers' marks in docstrings, [`Class`] and (`int`, *optional*), as Google's style has them."""

import re
from typing import Any

from griffe import Extension, Object

LINK = re.compile(r"\[`~?([\w.]+)`\]")
TYPES = re.compile(r"^( *[\w, ]+) \(([^\n]*?)\):", flags=re.M)


class PlainDocstrings(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            text = LINK.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = TYPES.sub(lambda m: f"{m[1]} ({re.sub('[`*]', '', m[2])}):", text)
