"""The modules that PEFT's methods adapt by default, which PEFT knows for transformers' own models."""

import sys
from typing import Any, NamedTuple


class AdapterTargets(NamedTuple):
    """Names of the modules that PEFT adapts where a method's configuration names none (`target_modules=None`)."""

    attention: tuple[str, ...]  # what makes queries, keys and values: LoRA and all that follow it
    feed_forward: tuple[str, ...]  # the last matrix of an MLP: IA³ and OSF, besides
    norms: tuple[str, ...]  # LN tuning

    @property
    def matrices(self) -> tuple[str, ...]:
        return self.attention + self.feed_forward


# Methods that adapt other modules than LoRA does. BEFT is for matrices of values alone, which no family here has.
OTHER_METHODS = {
    "IA3_TARGET": "matrices",
    "IA3_FEEDFORWARD": "feed_forward",
    "OSF_TARGET": "matrices",
    "LNTUNING_TARGET": "norms",
    "BEFT_TARGET": None,
}


def add_peft_targets(model_type: str, targets: AdapterTargets) -> None:
    """Puts the targets into PEFT's mappings from model types to module names, of which every release has more; nothing before
    PEFT is imported. It is not imported for this: with it come all quantization libraries that are installed, and their
    warnings."""
    constants: Any = getattr(sys.modules.get("peft.utils"), "constants", None)
    for name, mapping in vars(constants).items() if constants else ():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING"):
            method = name.removeprefix("TRANSFORMERS_MODELS_TO_").removesuffix("_MODULES_MAPPING")
            kind = OTHER_METHODS.get(method, "attention")
            if kind is not None:
                mapping.setdefault(model_type, list(getattr(targets, kind)))
