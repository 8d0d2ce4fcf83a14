"""Model cards for models that were fine-tuned from a checkpoint of one of the families."""

from collections.abc import Mapping, Sequence
from importlib.resources import files

from huggingface_hub import ModelCard, ModelCardData

from ..auto import LINES


def fine_tuned_model_card(
    title: str,
    origin: str,
    *,
    base_model: str | None = None,
    auto_class: str = "AutoModelForCausalLM",
    tokenizer_class: str = "AutoTokenizer",
    model_path: str = ".",
    languages: Sequence[str] = ("zh", "en"),
    training: Mapping[str, object] | None = None,
    results: Mapping[str, object] | None = None,
    samples: Sequence[Mapping[str, str]] = (),
    loss_curve: str | None = None,
) -> ModelCard:
    """Renders the card of a fine-tuned model; `card.save(path)` writes it and `card.push_to_hub(repo_id)` sends it.

    Args:
        title: the card's heading.
        origin: the line it is from: `baichuan2`, `qwen`, `chatglm3` …
        base_model: Hub name or path of the checkpoint that was fine-tuned; its license is then named and kept. None
            for weights trained from random values, which are the author's own (Apache-2.0 in the metadata).
        auto_class: the auto class that the usage example loads the model with.
        tokenizer_class: `AutoTokenizer`, or the name of a tokenizer of this package that must be named to be found.
        model_path: Hub name or path in the usage example.
        languages: language codes for the metadata.
        training: name and value of what is worth telling about the training.
        results: name and value of what was measured.
        samples: rows of a table with the same keys each, for example prompt, before and after.
        loss_curve: path, relative to the card, of a picture of the loss.

    Raises:
        ValueError: `origin` is not a known line.
    """
    if origin not in LINES:
        raise ValueError(f"origin must be one of {', '.join(LINES)}; got {origin!r}")
    on_the_hub = base_model is not None and base_model.count("/") == 1 and not base_model.startswith((".", "/", "~"))
    metadata = ModelCardData(
        language=list(languages),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hf_cnllm", origin],
        base_model=base_model if on_the_hub else None,
        license="apache-2.0" if base_model is None else "other",
        license_name=None if base_model is None else "-".join(LINES[origin].license.lower().split()),
    )
    return ModelCard.from_template(
        metadata,
        template_str=files("hf_cnllm.hub").joinpath("fine_tuned_model_card.md").read_text(encoding="utf-8"),
        title=title,
        origin=LINES[origin],
        base=base_model,
        auto_class=auto_class,
        tokenizer_class=tokenizer_class,
        model_path=model_path,
        training=_cells(training or {}),
        results=_cells(results or {}),
        samples=[_cells(sample) for sample in samples],
        loss_curve=loss_curve,
    )


def _cells(values: Mapping[str, object]) -> dict[str, str]:
    """Names and values as texts that stay inside their cells of a Markdown table and show as typed."""
    escape = str.maketrans({character: "\\" + character for character in "\\|<>`*_[]"})
    return {
        " ".join(name.split()).translate(escape): " ".join(str(value).split()).translate(escape)
        for name, value in values.items()
    }


def write_card(folder, subject, repo_id):
    pass
