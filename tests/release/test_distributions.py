"""What is released: the sdist and the wheel as they are built, and the numbers and files that go with a version."""

import importlib.util
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings there

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """(wheel, sdist), built from this tree; the wheel from the sdist, as an index would have it."""
    missing = [name for name in ("build", "twine") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: `nox -s release` has them")
    folder = tmp_path_factory.mktemp("dist")
    run("build", "--outdir", folder, ROOT)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def run(module, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names_in_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def names_in_sdist(sdist):
    with tarfile.open(sdist) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def test_the_wheel_is_the_package_and_nothing_else(distributions):
    names = names_in_wheel(distributions[0])
    package = {path.relative_to(SOURCE).as_posix() for path in (SOURCE / "hf_cnllm").rglob("*") if path.is_file()}
    package = {name for name in package if "__pycache__" not in name}
    assert {name for name in names if ".dist-info/" not in name} == package
    assert {"hf_cnllm/py.typed", "hf_cnllm/recipes/sft.py", "hf_cnllm/data/instructions.jsonl"} <= names
    assert {"hf_cnllm/demo/checkpoints/glm/config.json", "hf_cnllm/tokenization/templates/qwen.jinja"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_can_build_and_test_but_has_no_recordings(distributions):
    names = names_in_sdist(distributions[1])
    assert {"pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "mkdocs.yml"} <= names
    assert {"tests/conftest.py", "docs/index.zh.md", "src/hf_cnllm/__init__.py"} <= names
    assert not [name for name in names if name.startswith(("tests/fixtures", "site/", "outputs/"))]
    assert not [name for name in names if name.endswith((".pyc", ".safetensors"))]


def test_both_are_small_and_an_index_takes_them(distributions):
    wheel, sdist = distributions
    assert wheel.stat().st_size < 1_000_000 and sdist.stat().st_size < 2_000_000
    run("twine", "check", "--strict", wheel, sdist)


def test_the_metadata_has_every_extra_and_command(distributions):
    with zipfile.ZipFile(distributions[0]) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        metadata = archive.read(name).decode()
    assert f"\nVersion: {project()['version']}\n" in metadata
    assert set(re.findall(r"^Provides-Extra: (\S+)$", metadata, flags=re.M)) == set(project()["optional-dependencies"])


def test_the_citation_is_valid():
    cffconvert = pytest.importorskip("cffconvert", reason="`nox -s release` has it")
    cffconvert.Citation((ROOT / "CITATION.cff").read_text(encoding="utf-8")).validate()


def test_one_version_everywhere():
    """pyproject.toml, the package, CITATION.cff and the newest heading of the changelog."""
    version = project()["version"]
    package = (SOURCE / "hf_cnllm" / "__init__.py").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f'\n__version__ = "{version}"\n' in package
    assert f"\nversion: {version}\n" in citation
    assert re.search(r"^## (\S+)", changelog, flags=re.M)[1] == version


def test_the_changelog_keeps_its_format():
    """Versions newest first; known kinds of changes, each once; nothing outside of them."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.split(r"^## ", changelog, flags=re.M)[1:]
    numbers = [re.match(r"(\d+)\.(\d+)\.(\d+)( - (\d{4}-\d\d-\d\d|unreleased))?\n", text) for text in versions]
    assert all(numbers)
    assert [number.groups()[:3] for number in numbers] == sorted((n.groups()[:3] for n in numbers), reverse=True)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Known limits"}
    for text in versions:
        headings = re.findall(r"^### (.+)$", text, flags=re.M)
        assert headings and set(headings) <= kinds and len(set(headings)) == len(headings)


def test_bug_reports_ask_for_the_doctor():
    for name in ("bug", "old_script"):
        form = (ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8")
        first = form.split("- type:")[1]
        assert "`hf-cnllm doctor`" in first and "required: true" in first
