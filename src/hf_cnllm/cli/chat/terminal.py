"""The chat in the terminal."""

import argparse
import json
import sys
import unicodedata
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .. import one_line
from .tools import call

if TYPE_CHECKING:
    from .model import ChatModel, Message, Reply

BLOCK = '"""'
LONGEST_TOOL_CHAIN = 5
HELP = f"""\
/clear         start over
/undo          take back the last question and its answer
/system TEXT   set the system message; without TEXT there is none
/save FILE     write the chat as a line of JSON, which fine-tuning reads
/exit          end (or Ctrl-D)
{BLOCK}            before and after a message of several lines; // in front of a message that begins with /
Ctrl-C         stops an answer; a second one ends the program"""


def talk(model: "ChatModel", args: argparse.Namespace) -> int:
    """Read, answer, print, until the user ends it."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  # lines can be edited, and pasted as a whole
        print(f"/help lists the commands. {model.hint}")
    return Terminal(model, args).run()


class Terminal:
    """The messages so far, and what is done with each line."""

    def __init__(self, model: "ChatModel", args: argparse.Namespace):
        self.model, self.has_tools, self.debug = model, args.tools_demo, args.debug
        self.system = args.system
        self.messages: list[Message] = []
        self.reply: Reply | None = None  # the last one, or as much as there is of it
        self.was_stopped = False  # by Ctrl-C, just now

    def run(self) -> int:
        while True:
            try:
                text = self._read()
                self.was_stopped = False
                if text is None:
                    return 0
                if text.startswith("/") and not text.startswith("//"):
                    if (said := self._command(text)) is None:
                        return 0
                    print(said)
                elif text:
                    self._ask(text.removeprefix("/"))
            except KeyboardInterrupt:
                print()
                if self.was_stopped:
                    return 0
                self.was_stopped = True
                print("(Ctrl-C again, Ctrl-D or /exit ends)")

    # --- reading ---

    def _read(self) -> str | None:
        """The next message or command; None at the end of the input."""
        text = _line("> ")
        if text is None or not text.startswith(BLOCK):
            return text if text is None else text.strip()
        lines = [text.removeprefix(BLOCK)]
        while not lines[-1].rstrip().endswith(BLOCK):
            if (line := _line("… ")) is None:
                break
            lines.append(line)
        return "\n".join(lines).rstrip().removesuffix(BLOCK).strip()

    def _command(self, text: str) -> str | None:
        name, _, argument = text.partition(" ")
        if (command := COMMANDS.get(name)) is None:
            return f"there is no command {name}; /help lists them"
        return command(self, argument.strip())

    def clear(self, _: str) -> str:
        self.messages = []
        return "(a new chat)"

    def undo(self, _: str) -> str:
        last = max((index for index, message in enumerate(self.messages) if message["role"] == "user"), default=None)
        if last is None:
            return "(nothing to take back)"
        taken = self.messages[last]["content"]
        del self.messages[last:]
        return f"(taken back: {taken[:60]}{'…' if len(taken) > 60 else ''})"

    def set_system(self, text: str) -> str:
        if not self.model.keeps_history:
            return "(this model takes no system message here)"
        self.system = text
        return f"(system message: {text})" if text else "(no system message)"

    def save(self, name: str) -> str:
        if not name:
            return "say where: /save FILE"
        try:
            line = json.dumps({"messages": [*self._opening(), *self.messages]}, ensure_ascii=False)
            with open(Path(name).expanduser(), "x", encoding="utf-8") as file:
                file.write(line + "\n")
        except FileExistsError:
            return f"{name} exists: choose another name"
        except OSError as error:
            return f"{name} cannot be written: {error.strerror}"
        return f"(saved in {name})"

    def _opening(self) -> list["Message"]:
        return self.model.opening(self.system, self.has_tools)

    # --- answering ---

    def _ask(self, text: str) -> None:
        """Prints the answer and keeps both, or neither if there is none."""
        before = list(self.messages) if self.model.keeps_history else []
        self.messages = [*before, {"role": "user", "content": text}]
        try:
            for _ in range(LONGEST_TOOL_CHAIN):
                self._answer()
                if self.was_stopped and self.messages[-1]["role"] != "assistant":
                    self.messages = before
                if self.was_stopped or not self._called_tool():
                    break
        except KeyboardInterrupt:  # of the question about a tool, or while the model stops
            self.messages = before
            raise
        except Exception as error:
            if self.debug:
                raise
            self.messages = before
            print(f"\nerror: {one_line(error)}")

    def _answer(self) -> None:
        """One answer of the model's, or as much of it as was shown when Ctrl-C came."""
        messages, printer = [*self._opening(), *self.messages], Printer()
        self.reply = None
        try:
            with closing(self.model.answer(messages)) as replies:
                for self.reply in replies:
                    printer.show(self.reply.text)
        except KeyboardInterrupt:
            self.was_stopped = True
            if printer.shown:
                self.messages = [*self.messages, {"role": "assistant", "content": printer.shown}]
            printer.end("(stopped)")
            return
        if (reply := self.reply) is None:
            return
        self.messages = [*self.messages, *reply.turns]
        notes = []
        if reply.is_cut:
            notes.append("cut at the length allowed: --max-new-tokens sets it")
        if reply.left_out:
            notes.append(f"the oldest {reply.left_out} rounds have no room in the model any more and were left out")
        printer.end(f"({'; '.join(notes)})" if notes else "")

    def _called_tool(self) -> bool:
        """Whether the model called a tool, whose answer then stands in the messages."""
        if self.reply is None or self.reply.call is None:
            return False
        name, arguments = self.reply.call["name"], self.reply.call["parameters"]
        shown = printable(f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})")
        allowed = (_line(f"run {shown}? [y/N] ") or "").strip().lower() in ("y", "yes", "是")
        result = call(name, arguments) if allowed else "The user does not allow this call."
        print(f"= {result}")
        self.messages = [*self.messages, {"role": "observation", "content": result}]
        return True


COMMANDS: dict[str, Callable[[Terminal, str], str | None]] = {
    "/help": lambda terminal, _: HELP,
    "/clear": Terminal.clear,
    "/undo": Terminal.undo,
    "/system": Terminal.set_system,
    "/save": Terminal.save,
    "/exit": lambda terminal, _: None,
}


class Printer:
    """Prints a text that grows."""

    def __init__(self) -> None:
        self.shown = ""

    def show(self, text: str) -> None:
        # One that was tidied after it had been shown is shown again.
        new = text[len(self.shown) :] if text.startswith(self.shown) else f"\n{text}"
        self.shown = text
        print(printable(new), end="", flush=True)

    def end(self, note: str) -> None:
        print(f"\n{note}" if note else "")


def printable(text: str) -> str:
    """The text without control characters: what a model writes does not steer the terminal."""
    return "".join("\ufffd" if unicodedata.category(char) == "Cc" and char not in "\n\t" else char for char in text)


def _line(prompt: str) -> str | None:
    """A line of the user's; None at the end."""
    try:
        text = input(prompt if sys.stdin.isatty() else "")
    except EOFError:
        if sys.stdin.isatty():
            print()
        return None
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # of a terminal in another encoding
