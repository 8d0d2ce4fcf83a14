"""ChatGLM3's tool calls for vLLM: `--enable-auto-tool-choice --tool-call-parser chatglm3`.

What is a call is decided by `ToolTurns` from token ids. Text of a turn that may become one is held back while streaming.
A plain answer loses the white space in front, where ChatGLM3 writes an empty line of metadata, as in its own `chat`.
"""

from collections.abc import Sequence
from typing import Any

from ._compat import (
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
    ToolParser,
)
from .tool_turns import Call, ToolTurns


def as_tool_call(call: Call) -> ToolCall:
    return ToolCall(function=FunctionCall(name=call.name, arguments=call.arguments))


class ChatGLM3ToolParser(ToolParser):
    supports_required_and_named = False  # the model decides; its calls are no JSON

    def __init__(self, tokenizer: Any, tools: list[Any] | None = None):
        super().__init__(tokenizer, tools)
        names = [getattr(tool, "function", tool).name for tool in self.tools]
        self.turns = ToolTurns(tokenizer, names)
        self.output_ids: Sequence[int] | None = None
        # Of a stream: what there is, what the client has, and whether this turn may still become a call.
        self.text = self.sent = ""
        self.is_open = True

    def extract_tool_calls(self, model_output: str, request: Any) -> ExtractedToolCallInformation:
        if self.turns.tools and self.output_ids is None:
            raise RuntimeError(
                "This vLLM gives tool parsers no token ids, which ChatGLM3's need, but while streaming."
            )
        call = self.turns.call(self.output_ids or ())
        if call is None:
            return ExtractedToolCallInformation(tools_called=False, tool_calls=[], content=model_output)
        return ExtractedToolCallInformation(
            tools_called=True, tool_calls=[as_tool_call(call)], content=call.before or None
        )

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: Any,
    ) -> DeltaMessage | None:
        self.text = current_text.lstrip()
        if (call := self.turns.call(current_token_ids)) is not None:
            self.text = call.before if call.before.startswith(self.sent) else self.sent
            delta = self.unsent() or DeltaMessage()
            delta.tool_calls = [DeltaToolCall(index=0, **as_tool_call(call).model_dump())]
            return delta
        self.is_open = self.is_open or self.turns.begins_turn(delta_token_ids)
        self.is_open = self.is_open and self.turns.may_become_call(current_token_ids)
        return None if self.is_open else self.unsent()

    def unsent(self) -> DeltaMessage | None:
        """What the client has not got of the text, if anything."""
        rest, self.sent = self.text[len(self.sent) :], self.text
        return DeltaMessage(content=rest) if rest else None


class WithTokenIds:
    """Stands in front of vLLM's parser: gives the tool parser the ids of a whole answer, lets it finish a stream, and leaves
    out the white space in front of an answer."""

    _tool_parser: ChatGLM3ToolParser
    _has_begun = False

    def parse(self, model_output: str, request: Any, enable_auto_tools: bool = False, model_output_token_ids=()):
        self._tool_parser.output_ids = list(model_output_token_ids)
        reasoning, content, calls = super().parse(model_output, request, enable_auto_tools, model_output_token_ids)
        return reasoning, content and content.lstrip(), calls

    def parse_delta(self, *args: Any, finished: bool, **kwargs: Any) -> DeltaMessage | None:
        delta = super().parse_delta(*args, finished=finished, **kwargs)
        if finished and (rest := self._tool_parser.unsent()) is not None:
            delta = delta or DeltaMessage()
            delta.content = (delta.content or "") + rest.content
        if delta is not None and delta.content and not self._has_begun:
            delta.content = delta.content.lstrip()
            self._has_begun = delta.content != ""
        return delta
