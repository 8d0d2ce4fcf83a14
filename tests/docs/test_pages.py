"""Pages that a command makes are up to date."""

import re
from pathlib import Path

import paper_index

ROOT = Path(__file__).parents[2]


def test_lines_of_the_paper_index_are_those_of_the_code():
    page = paper_index.PAGE.read_text(encoding="utf-8")
    assert len(paper_index.ENTRY.findall(page)) == len(re.findall(r"\.py:\d+", page)) >= 20
    assert paper_index.with_lines(page) == page, "run python scripts/paper_index.py"


def test_licenses_are_those_of_all_dependencies_and_none_forbids_use():
    rows = dict(re.findall(r"^\| ([\w.-]+) \| (.+?) \|", (ROOT / "docs" / "licenses.md").read_text(), flags=re.M))
    project = (ROOT / "pyproject.toml").read_text().partition("dependencies = [")[2].partition("flash = ")[0]
    needed = {name.replace("_", "-") for name in re.findall(r'"([\w-]+)>=', project)}
    assert len(needed) >= 12 and needed <= set(rows)
    assert not [name for name, license in rows.items() if "GPL" in license or "not stated" in license]


def test_every_page_is_in_the_navigation():
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    navigation = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M)
    assert {page for page in pages if not page.endswith(".zh.md")} == set(navigation)
    assert {page.replace(".zh.md", ".md") for page in pages} == set(navigation)


def test_what_was_measured_is_the_same_in_both_languages():
    english, chinese = ((ROOT / "docs" / f"quantization{suffix}.md").read_text() for suffix in ("", ".zh"))
    rows = re.findall(r"^\| \w+ \| [\w-]+ \| \d+ of \d+ \|.*$", english, flags=re.M)
    assert len(rows) > 40 and rows == re.findall(r"^\| \w+ \| [\w-]+ \| \d+ of \d+ \|.*$", chinese, flags=re.M)


def test_modules_that_pages_run_are_there():
    for path in [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "README.zh.md"]:
        for name in set(re.findall(r"-m (hf_cnllm(?:\.\w+)+)", path.read_text(encoding="utf-8"))):
            assert ROOT.joinpath("src", *name.split(".")).with_suffix(".py").is_file(), f"{path.name}: {name}"
