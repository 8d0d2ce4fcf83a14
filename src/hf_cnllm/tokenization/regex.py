"""Regular expressions that both Python and Oniguruma (`tokenizers.Regex`) read."""

import re
from collections.abc import Iterable


def any_of(texts: Iterable[str]) -> str:
    """A regular expression (Oniguruma and Python) for the longest of `texts`, as a prefix tree so that thousands of
    alternatives cost one step a character. Of no texts at all it matches nothing."""
    root: dict = {}
    for text in texts:
        node = root
        for char in text:
            node = node.setdefault(char, {})
        node[""] = {}

    def pattern(node: dict) -> str:
        ends = [char for char, child in sorted(node.items()) if char and child.keys() == {""}]
        branches = [
            re.escape(char) + pattern(child) for char, child in sorted(node.items()) if char and child.keys() != {""}
        ]
        if ends:  # one set costs one step, where as many branches cost one each
            escaped = "".join(map(re.escape, ends))
            branches.append(escaped if len(ends) == 1 else f"[{escaped}]")
        if not branches:
            return ""
        joined = branches[0] if len(branches) == 1 and "" not in node else f"(?:{'|'.join(branches)})"
        return joined + "?" if "" in node else joined

    return pattern(root) if root else "(?!)"
