"""The site builds without a warning and stands on its own: `nox -s docs` has what this needs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="`nox -s docs` has it")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_every_page_is_there_in_both_languages(site):
    pages = {path.relative_to(site) for path in site.rglob("index.html")}
    english = {page for page in pages if page.parts[0] != "zh"}
    assert english == {page.relative_to("zh") for page in pages - english} and len(english) >= 20
    assert '<html lang="zh"' in (site / "zh" / "index.html").read_text(encoding="utf-8")


def test_nothing_is_fetched_from_elsewhere(site):
    """No fonts, scripts, styles or pictures of other servers: the site works behind every firewall, and tells nobody."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"<(?:script|img|iframe)[^>]+src=[\"']?https?:", text), page
        assert not re.search(r"<link[^>]+rel=[\"']?(?:stylesheet|preconnect)[\"']?[^>]+href=[\"']?https?:", text), page


def test_lines_of_chinese_are_joined_without_a_space(site):
    for page in (site / "zh").rglob("index.html"):
        text = re.sub(r"<(pre|script|style)\b.*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.S)
        assert not re.search(r"[\u4e00-\u9fff，。；]\n *[\u4e00-\u9fff]", text), page


def test_the_reference_has_the_public_names(site):
    text = "".join(page.read_text(encoding="utf-8") for page in (site / "api").rglob("index.html"))
    for name in ("BaichuanForCausalLM", "QWenLMHeadModel", "ChatGLMConfig", "infill", "DataCollatorForBlankInfilling"):
        assert re.search(rf'id="hf_cnllm\.[\w.]+\.{name}"', text), name
