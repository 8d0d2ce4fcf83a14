"""The auto classes give the classes of this package.

After `register()`, `AutoConfig`, `AutoModel*` and `AutoTokenizer` give them for the original checkpoints, whether or not a
script passes `trust_remote_code=True` or `use_fast=False`: transformers prefers registered classes to the checkpoint's code
files, for tokenizers when they are found by their class name. Models are registered by their names, and imported when one is
first used; see `stand_ins.py`.
"""

from dataclasses import dataclass
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from ._compat import name_in_transformers, registered
from .families import FAMILIES, Family
from .models import baichuan, chatglm, glm, glm130b, qwen
from .models.adapter_targets import add_peft_targets
from .stand_ins import put

# Auto classes that scripts try on any model. Of one that a family lacks transformers names its own hundreds of models.
TRIED = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMultipleChoice",
)


def _refusal(family: Family, auto_class: str, config_class: type[PreTrainedConfig]) -> type:
    """Stands for the model class that a family lacks: loading it says which auto classes there are."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        line = family.lines[family.line_of(kwargs.get("config", args[0]))]
        sentence = f"{line.title} has no model for {auto_class}: it has {', '.join(family.model_names)}."
        raise ValueError(family.refusals.get(auto_class, sentence))

    members = dict.fromkeys(("from_pretrained", "_from_config"), staticmethod(refuse))
    return type(f"No{auto_class}", (), {"config_class": config_class, **members})


class TokenizerFoundByName(PreTrainedConfig):
    """The configuration that tokenizers are registered under. No checkpoint has it, so transformers finds them by their
    class name alone. A tokenizer under the configuration of its model would lose to the code files of a checkpoint when
    a script passes `trust_remote_code=True`."""

    model_type = "hf_cnllm_tokenizer"


@dataclass(frozen=True)
class _InAutoClass:
    """A model class's place in an auto class, unless a user has registered another one meanwhile."""

    auto_class: str
    config_class: type[PreTrainedConfig]

    def __call__(self, model_class: Any, in_place_of: Any) -> None:
        auto_class = getattr(transformers, self.auto_class)
        if (
            in_place_of is None
            or in_place_of is model_class
            or registered(auto_class, self.config_class) is in_place_of
        ):
            auto_class.register(self.config_class, model_class, exist_ok=True)


def register() -> None:
    """Registers every family with transformers' auto classes and PEFT's default targets, and its models by their names.
    Idempotent."""
    for family in FAMILIES:
        model_type = family.config.model_type
        AutoConfig.register(model_type, family.config, exist_ok=True)
        for config_class in family.saved_as:
            AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        modules = {family.config: family.module, **family.variants}
        for config_class, module in modules.items():
            for auto_class, name in family.model_names.items():
                put(_InAutoClass(auto_class, config_class), module, name, config_class=config_class)
            for auto_class in (name for name in TRIED if name not in family.model_names):
                refusal = _refusal(family, auto_class, config_class)
                getattr(transformers, auto_class).register(config_class, refusal, exist_ok=True)
        for tokenizer_class in reversed(family.tokenizers):
            AutoTokenizer.register(TokenizerFoundByName, tokenizer_class=tokenizer_class, exist_ok=True)
        add_peft_targets(model_type, family.config.adapter_targets)
    for family, package in zip(FAMILIES, (baichuan, chatglm, glm, glm130b, qwen), strict=True):
        for name in package.__all__:
            if name not in vars(package):  # but in the module of its models
                put(name_in_transformers, family.module, name)
