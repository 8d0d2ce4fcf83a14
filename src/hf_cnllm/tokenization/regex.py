"""Regular expressions that both Python and Oniguruma (`tokenizers.Regex`) read."""

import re
from collections.abc import Iterable


def any_of(texts: Iterable[str]) -> str:
    """A regular expression (Oniguruma and Python) for the longest of `texts`, as a prefix tree so that thousands of
    alternatives cost one step a character."""
    root: dict = {}
    for text in texts:
        node = root
        for char in text:
            node = node.setdefault(char, {})
        node[""] = {}

    def pattern(node: dict) -> str:
        branches = [re.escape(char) + pattern(child) for char, child in sorted(node.items()) if char]
        if not branches:
            return ""
        joined = branches[0] if len(branches) == 1 and "" not in node else f"(?:{'|'.join(branches)})"
        return joined + "?" if "" in node else joined

    return pattern(root)
