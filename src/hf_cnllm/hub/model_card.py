"""Model cards: what a repository on the Hub says of a model that was made with this package, and how it is loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig

from .._compat import training_summary
from ..families import LINES, family_of
from .json_files import read_object

PIPELINE_TAGS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModel": "feature-extraction",
}
AUTOMATIC = "This model card has been automatically generated."  # of transformers' own, which says nothing else
POINTS = 12  # of a curve, as a card shows it
# The tasks of PEFT's adapters, whose auto classes load no adapter of another task, or of none.
PEFT_HEADS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
PEFT_TASKS = PEFT_HEADS | {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}

Curves = Mapping[str, Sequence[tuple[int, float]]]


class Origin(NamedTuple):
    """What a model is, as far as it can be known."""

    line: str  # of which published line of models
    auto_class: str  # what loads it
    base_model: str | None  # name on the Hub of the checkpoint that it comes from
    from_scratch: bool  # made from a configuration
    is_adapter: bool = False
    task: str | None = None  # of the adapter

    @property
    def loader(self) -> str:
        """PEFT's auto class, or transformers', which brings an adapter too."""
        has_own = self.is_adapter and PEFT_TASKS.get(self.task or "") == self.auto_class
        return f"AutoPeft{self.auto_class[4:]}" if has_own else self.auto_class


def create_model_card(
    source: Any,
    *,
    title: str | None = None,
    model_path: str = ".",
    base_model: str | None = None,
    languages: Sequence[str] = ("zh", "en"),
    datasets: Sequence[str] = (),
    training: Mapping[str, object] | None = None,
    results: Mapping[str, object] | None = None,
    evaluated_on: str | None = None,
    curves: Curves | None = None,
    samples: Sequence[Mapping[str, str]] = (),
    loss_curve: str | None = None,
    trainer: Any = None,
    remote_code: bool = False,
) -> ModelCard:
    """The card of a model; `card.save(folder / "README.md")` writes it, `card.push_to_hub(repo_id)` sends it.

    Args:
        source: a model, a PEFT model, or the folder that one of them is saved in. A folder that a Trainer wrote
            (`trainer_state.json`) tells of the training too.
        title: the heading; by default the name in `model_path`, or that of the line of models.
        model_path: what the card loads: the name on the Hub, or a path.
        base_model: name on the Hub of the checkpoint that it comes from; by default the one it was loaded from, or that
            an older card in the folder names. Its license is kept.
        languages: codes for the metadata.
        datasets: names on the Hub of the training data.
        training, results: name and value of how it was trained and what was measured.
        evaluated_on: name on the Hub of the data that the numbers among `results` were measured on: they are metadata then.
        curves: name -> (step, value) of every log; a table of at most a dozen of them.
        samples: rows of a table with the same keys each, for example prompt, before and after.
        loss_curve: path, relative to the card, of a picture of the loss.
        trainer: a Trainer after its training: fills in `training`, `results`, `curves` and `datasets` where they are left out.
        remote_code: whether the folder holds a copy of this package.

    Raises:
        ValueError: it is no model of this package; `base_model` or `evaluated_on` is no name on the Hub; an adapter's base
            cannot be read.
    """
    origin = origin_of(source)
    for argument, name in (("base_model", base_model), ("evaluated_on", evaluated_on)):
        if name is not None and not is_repo_id(name):
            raise ValueError(f"{argument} must be a name on the Hub such as owner/name; got {name!r}")
    if base_model is not None:
        origin = origin._replace(base_model=base_model, from_scratch=False)
    elif origin.base_model == model_path:  # pushed to where it was loaded from
        origin = origin._replace(base_model=None)
    known = _known_of_training(source, trainer)
    line = LINES[origin.line].title
    named = f"`{origin.base_model}` ({line})" if origin.base_model else f"a checkpoint of {line}"
    return _render(
        origin,
        title or (model_path.split("/")[-1] if is_repo_id(model_path) else line),
        base=None if origin.from_scratch else named,
        model_path=model_path,
        languages=languages,
        datasets=[*(datasets or known.get("datasets", ()))],
        training=known.get("training", {}) if training is None else training,
        results=known.get("results", {}) if results is None else results,
        evaluated_on=evaluated_on,
        curves=known.get("curves", {}) if curves is None else curves,
        samples=samples,
        loss_curve=loss_curve,
        remote_code=remote_code,
        # Whoever trained from random weights says under which license they are.
        license=None if origin.from_scratch else "other",
    )


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
    """As [`create_model_card`] where there is no model to ask.

    Args:
        origin: the line it is from: `baichuan2`, `qwen`, `chatglm3` …
        base_model: Hub name or path of the checkpoint that was fine-tuned; its license is then named and kept. None
            for weights trained from random values, which are the author's own (Apache-2.0 in the metadata).
        auto_class: the auto class that the usage example loads the model with.
        tokenizer_class: `AutoTokenizer`, or the name of a tokenizer of this package that must be named to be found.

    Raises:
        ValueError: `origin` is not a known line.
    """
    if origin not in LINES:
        raise ValueError(f"origin must be one of {', '.join(LINES)}; got {origin!r}")
    on_the_hub = base_model if base_model is not None and is_repo_id(base_model) else None
    return _render(
        Origin(origin, auto_class, on_the_hub, base_model is None),
        title,
        base=None if base_model is None else f"`{base_model}` ({LINES[origin].title})",
        tokenizer_class=tokenizer_class,
        model_path=model_path,
        languages=languages,
        training=training or {},
        results=results or {},
        samples=samples,
        loss_curve=loss_curve,
        license="apache-2.0" if base_model is None else "other",
    )


def write_card(folder: Path, model: Any, repo_id: str | None) -> None:
    """Puts a card into a folder that a model is saved in, or completes the one that is about to be uploaded to `repo_id`. What
    somebody wrote stays: only metadata that it lacks is added, and only on the way to the Hub."""
    path = folder / "README.md"
    if path.exists() and repo_id is None:
        return
    card = create_model_card(model, model_path=repo_id or ".", remote_code=model.writes_code)
    if path.exists():
        found = ModelCard.load(path)
        for key, value in card.data.to_dict().items():
            if found.data.get(key) is None:
                found.data[key] = value
        found.data.tags = list(dict.fromkeys([*found.data.tags, *card.data.tags]))
        if AUTOMATIC in found.text:
            found.text = card.text
        card = found
    card.save(path)


def write_tokenizer_card(folder: Path, tokenizer: Any, repo_id: str) -> None:
    """Completes the card that is about to be uploaded to `repo_id` with a tokenizer: how it is loaded, in transformers' own
    automatic card, in whose place that of a model comes with the model."""
    path = folder / "README.md"
    card = ModelCard.load(path)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or ()), "hf_cnllm", tokenizer.model_type]))
    if AUTOMATIC in card.text:
        trust = ", trust_remote_code=True" if tokenizer.writes_code else ""
        needed = "" if trust else "import hf_cnllm  # pip install hf-cnllm\n"
        code = f'{needed}from transformers import AutoTokenizer\n\ntokenizer = AutoTokenizer.from_pretrained("{repo_id}"{trust})'
        card.text = f"\n# {repo_id.split('/')[-1]}\n\nA tokenizer. {AUTOMATIC}\n\n```python\n{code}\n```\n"
    card.save(path)


# --- what is known of a model -------------------------------------------------------------------------------------------


def origin_of(source: Any) -> Origin:
    """What a model or a saved folder comes from.

    Raises:
        ValueError: it is nothing of this package.
    """
    if isinstance(source, str | Path):
        return _origin_of_folder(Path(source))
    if hasattr(source, "peft_config") and hasattr(source, "get_base_model"):
        task = source.active_peft_config.task_type
        return origin_of(source.get_base_model())._replace(is_adapter=True, task=task)
    config = getattr(source, "config", None)
    name = str(getattr(source, "name_or_path", ""))
    if (family := family_of(config)) is None:
        raise ValueError(f"{type(source).__name__} is no model of hf_cnllm, whose cards this writes.")
    is_adapter = bool(getattr(source, "_hf_peft_config_loaded", False))
    task = next((one.task_type for one in getattr(source, "peft_config", {}).values()), None)
    auto_class = _auto_class_of(source, family)
    return Origin(family.line_of(config), auto_class, _name_on_the_hub(name), not name, is_adapter, task)


def _origin_of_folder(folder: Path) -> Origin:
    adapter = folder / "adapter_config.json"
    settings = read_object(adapter) if adapter.is_file() else {}
    base, task = settings.get("base_model_name_or_path"), settings.get("task_type")
    config = AutoConfig.from_pretrained(base or folder)
    family = family_of(config)
    if family is None:
        raise ValueError(f"{folder} holds a model of {type(config).__name__}, which is not of hf_cnllm.")
    of_class = (name for name, kind in family.models.items() if kind.__name__ in (config.architectures or ()))
    auto_class = PEFT_HEADS.get(task) if base else next((name for name in of_class if name != "AutoModel"), None)
    auto_class = auto_class or family.generates_with
    return Origin(family.line_of(config), auto_class, _name_on_the_hub(base or str(folder)), False, bool(base), task)


def _auto_class_of(model: Any, family: Any) -> str:
    names = [name for name, kind in family.models.items() if isinstance(model, kind)]
    return next((name for name in names if name != "AutoModel"), "AutoModel")


def _name_on_the_hub(name: str) -> str | None:
    """A name that is one, or the base model that the card in a folder of that name gives."""
    if not Path(name).is_dir():
        return name if is_repo_id(name) else None
    try:
        recorded = metadata_load(Path(name, "README.md")).get("base_model")
    except Exception:  # no card, or one that cannot be read: no reason not to save a model
        return None
    return recorded if isinstance(recorded, str) and is_repo_id(recorded) else None


def is_repo_id(name: str) -> bool:
    """Whether a text can be `owner/name`, and is no path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def _known_of_training(source: Any, trainer: Any) -> dict[str, Any]:
    if trainer is not None:
        summary = training_summary(trainer)
        datasets = [summary.dataset_tags] if isinstance(summary.dataset_tags, str) else summary.dataset_tags or []
        known = _known_of_logs(trainer.state.log_history)
        return known | {"training": summary.hyperparameters, "datasets": list(filter(is_repo_id, datasets))}
    state_file = Path(source, "trainer_state.json") if isinstance(source, str | Path) else None
    if state_file is None or not state_file.is_file():
        return {}
    state = read_object(state_file)
    names = {"num_train_epochs": "epochs", "train_batch_size": "batch size", "global_step": "steps"}
    return _known_of_logs(state["log_history"]) | {
        "training": {names[key]: state[key] for key in names if key in state}
    }


def _known_of_logs(logs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    curves = {
        name: [(log["step"], log[key]) for log in logs if key in log]
        for name, key in (("training loss", "loss"), ("evaluation loss", "eval_loss"))
    }
    last: Mapping[str, Any] = next((log for log in reversed(logs) if "eval_loss" in log), {})
    costs = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    results = {key: value for key, value in last.items() if key.startswith("eval_") and key not in costs}
    return {"curves": {name: curve for name, curve in curves.items() if curve}, "results": results}


# --- the text -----------------------------------------------------------------------------------------------------------


def _render(
    origin: Origin,
    title: str,
    *,
    base: str | None,
    license: str | None,
    languages: Sequence[str],
    model_path: str,
    training: Mapping[str, object],
    results: Mapping[str, object],
    samples: Sequence[Mapping[str, str]],
    loss_curve: str | None,
    tokenizer_class: str = "AutoTokenizer",
    datasets: Sequence[str] = (),
    evaluated_on: str | None = None,
    curves: Curves | None = None,
    remote_code: bool = False,
) -> ModelCard:
    line, is_original = LINES[origin.line], license == "other"
    task = PIPELINE_TAGS[origin.auto_class]
    numbers = {name: value for name, value in results.items() if isinstance(value, int | float)}
    metadata = ModelCardData(
        language=list(languages),
        library_name="peft" if origin.is_adapter else "transformers",
        pipeline_tag=task,
        tags=["hf_cnllm", origin.line],
        base_model=origin.base_model,
        datasets=list(datasets) or None,
        license=license,
        license_name=line.license_name if is_original else None,
        license_link=f"https://huggingface.co/{origin.base_model}" if is_original and origin.base_model else None,
        model_name=title if evaluated_on and numbers else None,
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=evaluated_on,
                dataset_name=evaluated_on,
                metric_type=name,
                metric_value=value,
            )
            for name, value in numbers.items()
        ]
        if evaluated_on and numbers
        else None,
    )
    return ModelCard.from_template(
        metadata,
        template_str=Path(__file__).with_name("fine_tuned_model_card.md").read_text(encoding="utf-8"),
        title=title,
        origin=line,
        line=origin.line,
        base=base,
        auto_class=origin.auto_class,
        is_adapter=origin.is_adapter,
        loader=origin.loader,
        tokenizer_class=tokenizer_class,
        model_path=model_path,
        trust=", trust_remote_code=True" if remote_code else "",
        training=_cells(training),
        results=_cells(results),
        curves=_table(curves or {}),
        samples=[_cells(sample) for sample in samples],
        loss_curve=loss_curve,
    )


def _table(curves: Curves) -> list[dict[str, str]]:
    """Rows of step and values, evenly spread over the steps."""
    values = {name: dict(curve) for name, curve in curves.items()}
    steps = sorted(set().union(*values.values()))
    last = len(steps) - 1
    shown = sorted({round(i * last / (POINTS - 1)) for i in range(POINTS)}) if last >= POINTS else range(len(steps))
    return [
        _cells({"step": steps[i], **{name: curve.get(steps[i], "") for name, curve in values.items()}}) for i in shown
    ]


def _cells(values: Mapping[str, object]) -> dict[str, str]:
    """Names and values as texts that stay inside their cells of a Markdown table and show as typed."""
    escape = str.maketrans({character: "\\" + character for character in "\\|<>`*_[]"})
    texts = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    return {
        " ".join(name.split()).translate(escape): " ".join(text.split()).translate(escape)
        for name, text in texts.items()
    }
