"""ChatGLM3's tool calls in an answer's token ids. Nothing here needs vLLM.

A call is the answer's last turn, whose first line names a tool, ended by the token `<|observation|>`; turns are parted by the
token `<|assistant|>`. The same characters written as text are other ids, and make neither a turn nor a call.
"""

import json
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from ..models.chatglm.tool_calls import ASSISTANT, ToolCallError, parse_fenced_call

OBSERVATION = "<|observation|>"


class Call(NamedTuple):
    name: str
    arguments: str  # JSON
    before: str  # what the answer says before it


class ToolTurns:
    """Reads answers with `tools`, the names that a request declares."""

    def __init__(self, tokenizer: Any, tools: Collection[str]):
        self.tokenizer = tokenizer
        self.tools = frozenset(tools)
        self._assistant, self._observation = map(tokenizer.get_command, (ASSISTANT, OBSERVATION))
        self._controls = {tokenizer.eos_token_id, *tokenizer.get_added_vocab().values()}

    def call(self, ids: Sequence[int]) -> Call | None:
        """The call that a whole answer ends in; None if it ends in none, or in a malformed one, which is text."""
        if not ids or ids[-1] != self._observation:
            return None
        start = self._last_turn(ids)
        name, _, content = self._text(ids[start:-1]).partition("\n")
        if name.strip() not in self.tools:
            return None
        try:
            arguments = json.dumps(parse_fenced_call(content), ensure_ascii=False)
        except (ToolCallError, TypeError, ValueError):  # no literals, or none that JSON has
            return None
        return Call(name.strip(), arguments, self._text(ids[: max(start - 1, 0)]).strip())

    def begins_turn(self, ids: Sequence[int]) -> bool:
        """Whether another turn begins within these ids."""
        return self._assistant in ids

    def may_become_call(self, ids: Sequence[int]) -> bool:
        """Whether more tokens can make a call of the answer's last turn so far."""
        turn = ids[self._last_turn(ids) :]
        if any(index in self._controls for index in turn):
            return False
        name, newline, _ = self._text(turn).partition("\n")
        if newline:
            return name.strip() in self.tools
        return any(tool.startswith(name.strip()) for tool in self.tools)

    def _last_turn(self, ids: Sequence[int]) -> int:
        """Where the last turn begins."""
        return max((place for place, index in enumerate(ids, 1) if index == self._assistant), default=0)

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)
