"""Whether the installed libraries fit each other, by what they say themselves. Imports none of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Those whose demands are read, and those that are looked at: the ones people upgrade one without the other.
ASKING = ("hf-cnllm", "transformers", "peft", "accelerate", "trl", "datasets")
LIBRARIES = (
    "torch", "transformers", "tokenizers", "accelerate", "peft", "trl", "datasets", "huggingface_hub", "safetensors",
    "sentencepiece", "protobuf", "flash-attn", "vllm",
)  # fmt: skip


def installed_version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def own_version() -> str:
    return installed_version("hf-cnllm") or "(not installed)"


def unmet_requirements() -> list[str]:
    """What an installed library asks of another that is installed in another version, a sentence each. An optional
    dependency counts once it is installed."""
    looked_at = {canonicalize_name(library) for library in LIBRARIES}
    unmet: dict[str, None] = {}  # in order, each once
    for asking in filter(installed_version, ASKING):
        for requirement in map(Requirement, requires(asking) or ()):
            name, found, wanted = requirement.name, installed_version(requirement.name), requirement.specifier
            if canonicalize_name(name) not in looked_at or found is None or not _applies(requirement):
                continue
            if not wanted.contains(found, prereleases=True):
                needs = f"{asking} {installed_version(asking)} needs {name}{wanted}"
                unmet[f'{name} {found} is installed, but {needs}: pip install "{name}{wanted}"'] = None
    return list(unmet)


@contextmanager
def naming_what_does_not_fit() -> Iterator[None]:
    """Around imports: an error also says which of the installed libraries do not fit each other, for half an upgrade is the
    usual reason."""
    try:
        yield
    except Exception as error:
        if unmet := unmet_requirements():
            raise ImportError(f"{error} ({'; '.join(unmet)})") from error
        raise


def _applies(requirement: Requirement) -> bool:
    """Without an extra, or with the one that is named after the library itself; those for tests and the like do not."""
    return requirement.marker is None or any(
        requirement.marker.evaluate({"extra": extra}) for extra in ("", requirement.name)
    )
