"""Names of the originals' classes that scripts touch: what they stand for here, or a sentence that says what to use."""

from collections.abc import Callable
from typing import Any


class FromConfig:
    """An attribute that the original copied from its configuration, which alone counts here: from the field of its own name, or
    of another one."""

    def __init__(self, field: str = ""):
        self.field = field

    def __set_name__(self, owner: type, name: str):
        self.field = self.field or name

    def __get__(self, model: Any, owner: type) -> Any:
        return self if model is None else getattr(model.config, self.field)

    def __set__(self, model: Any, value: Any) -> None:
        held = getattr(model.config, self.field)
        if value != held:  # transformers sets `vocab_size` to what it wrote into the configuration
            raise ValueError(
                f"{type(model).__name__} takes `{self.field}` from its configuration, where it is {held!r}, and cannot change "
                f"it to {value!r} now: set it when loading, `from_pretrained(..., {self.field}={value!r})`."
            )


def instead_use(advice: str) -> Callable[..., Any]:
    """A method that is no more: calling it raises a NotImplementedError with the advice."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has this method of the original no more: {advice}")

    return refuse


QUANTIZE_WHILE_LOADING = instead_use(
    "quantize the model while it is loaded, with `from_pretrained(..., quantization_config=BitsAndBytesConfig("
    "load_in_8bit=True), device_map='auto')`, or load_in_4bit=True."
)


NO_CHATS = (
    "GLM has no form for chats, it fills blanks: put `[gMASK]` behind the question and let "
    "hf_cnllm.infill(model, tokenizer, text) or tokenizer.build_inputs_for_generation ask it."
)


class WithoutChats:
    """For models that fill blanks: scripts for ChatGLM ask them to chat."""

    def chat(self, *args: Any, **kwargs: Any) -> Any:
        """Raises a ValueError that says what to use."""
        raise ValueError(NO_CHATS)

    stream_chat = chat


class InnerTokenizer:
    """A part of a tokenizer that scripts know as `tokenizer.tokenizer`. What else is asked of it the whole one answers, as
    `transformers serve` takes whatever has that name for a processor with a tokenizer in it."""

    _whole: Any = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self._whole is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self._whole, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._whole(*args, **kwargs)
