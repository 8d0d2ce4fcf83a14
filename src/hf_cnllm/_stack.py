"""Whether the installed libraries fit each other, by what they say themselves. Imports none of them."""

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

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


def unmet_requirements() -> list[str]:
    """What an installed library asks of another that is installed in another version, a sentence each. An optional
    dependency counts once it is installed."""
    looked_at = {library.replace("-", "_") for library in LIBRARIES}
    unmet: dict[str, None] = {}  # in order, each once
    for asking in ASKING:
        if (own_version := installed_version(asking)) is None:
            continue
        for requirement in map(Requirement, requires(asking) or ()):
            name, found = requirement.name, installed_version(requirement.name)
            if name.replace("-", "_") not in looked_at or found is None or not _applies(requirement):
                continue
            if not requirement.specifier.contains(found, prereleases=True):
                unmet[
                    f"{name} {found} is installed, but {asking} {own_version} needs {name}{requirement.specifier}: "
                    f'pip install "{name}{requirement.specifier}"'
                ] = None
    return list(unmet)


def _applies(requirement: Requirement) -> bool:
    """Without an extra, or with the one that is named after the library itself; those for tests and the like do not."""
    return requirement.marker is None or any(
        requirement.marker.evaluate({"extra": extra}) for extra in ("", requirement.name)
    )
