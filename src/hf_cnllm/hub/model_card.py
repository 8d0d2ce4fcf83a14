"""Model cards for models that were fine-tuned from a checkpoint of one of the families."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from huggingface_hub import ModelCard, ModelCardData


@dataclass(frozen=True)
class Origin:
    """What a card says about the family a model was fine-tuned from.

    Attributes:
        name: of the original model line.
        licence: the original weights' licence, by name; fine-tuned weights remain under it.
        paper: arXiv identifier of the report that describes the line.
    """

    name: str
    licence: str
    paper: str


ORIGINS = {
    "baichuan": Origin("Baichuan", "Baichuan-7B License or Community License for Baichuan-13B Model", "2309.10305"),
    "baichuan2": Origin("Baichuan 2", "Community License for Baichuan2 Model", "2309.10305"),
    "qwen": Origin("Qwen", "Tongyi Qianwen License Agreement", "2309.16609"),
    "chatglm": Origin("ChatGLM-6B", "ChatGLM-6B License", "2406.12793"),
    "chatglm2": Origin("ChatGLM2-6B", "ChatGLM2-6B License", "2406.12793"),
    "chatglm3": Origin("ChatGLM3-6B", "ChatGLM3-6B License", "2406.12793"),
    "glm": Origin("GLM", "the licence stated with the original checkpoint", "2103.10360"),
}


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
    """Render the card of a fine-tuned model; `card.save(path)` writes it and `card.push_to_hub(repo_id)` sends it.

    Args:
        title: the card's heading.
        origin: a key of `ORIGINS`.
        base_model: Hub name or path of the checkpoint that was fine-tuned; its licence is then named and kept. None
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
        ValueError: `origin` is not a known family.
    """
    if origin not in ORIGINS:
        raise ValueError(f"origin must be one of {', '.join(ORIGINS)}; got {origin!r}")
    metadata = ModelCardData(
        language=list(languages),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hf_cnllm", origin],
        base_model=base_model if base_model is not None and _is_hub_name(base_model) else None,
        license="apache-2.0" if base_model is None else "other",
        license_name=None if base_model is None else _slug(ORIGINS[origin].licence),
    )
    return ModelCard.from_template(
        metadata,
        template_str=files("hf_cnllm.hub").joinpath("fine_tuned_model_card.md").read_text(encoding="utf-8"),
        title=title,
        origin=ORIGINS[origin],
        base=base_model,
        auto_class=auto_class,
        tokenizer_class=tokenizer_class,
        model_path=model_path,
        training=_cells(training or {}),
        results=_cells(results or {}),
        sample_columns=list(samples[0]) if samples else [],
        samples=[[_cell(value) for value in sample.values()] for sample in samples],
        loss_curve=loss_curve,
    )


def _cells(values: Mapping[str, object]) -> dict[str, str]:
    return {_cell(name): _cell(value) for name, value in values.items()}


def _cell(value: object) -> str:
    """Text that stays inside one cell of a Markdown table and shows as typed."""
    text = " ".join(str(value).split())
    for character in "\\|<>`*_[]":
        text = text.replace(character, "\\" + character)
    return text


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _slug(name: str) -> str:
    return "-".join(name.lower().split())
