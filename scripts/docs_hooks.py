"""For the site (mkdocs.yml): lines of a Chinese paragraph are joined without the space that a line break would leave."""

import re
from typing import Any

CHINESE = r"[\u2018-\u201d\u2026\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]"
BREAK = re.compile(rf"(?<={CHINESE})\n *(?={CHINESE})|(?<=[，。；：、（）！？])\n *(?=[\w`\[(])")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    if not page.file.src_uri.endswith(".zh.md"):
        return markdown
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)  # code keeps its lines
    return "".join(part if part.startswith("```") else BREAK.sub("", part) for part in parts)
