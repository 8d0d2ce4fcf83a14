"""The chat on a page in the browser."""

import argparse
import html
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import chain, pairwise
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from .. import one_line

if TYPE_CHECKING:
    from .model import ChatModel

FONTS = ("system-ui", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif")
MONOSPACE = ("ui-monospace", "Noto Sans Mono CJK SC", "monospace")
CSS = "footer {display: none !important}"


def check_address(host: str, port: int) -> None:
    """Refuses a port that is in use, or an address that is not this machine's.

    Raises:
        OSError: naming it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if os.name != "nt":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(
                f"{host}:{port} cannot be served on ({error.strerror or error}): choose another --port or --host"
            ) from error


def talk(model: "ChatModel", args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported: it reports nothing
    import gradio as gr

    page = make_page(model, Path(args.model).name or args.model, args.system)
    page.launch(
        server_name=args.host,
        server_port=args.port,
        theme=gr.themes.Default(font=list(FONTS), font_mono=list(MONOSPACE)),  # the usual fonts come from elsewhere
        css=CSS,
        footer_links=[],
        share=False,
        quiet=True,
        ssr_mode=False,
        prevent_thread_lock=True,
    )
    print(f"http://{args.host}:{args.port}  (Ctrl-C ends)", flush=True)
    try:
        Event().wait()
    except KeyboardInterrupt:
        print()
    finally:
        page.close(verbose=False)
    return 0


def make_page(model: "ChatModel", title: str, system: str) -> Any:
    """The page: a chat with buttons to stop, retry, undo and clear, and how answers are generated beside it.

    The chat itself stays with the browser and comes back with each question, one answer is made at a time.
    """
    import gradio as gr

    def respond(text: str, history: list[dict], *settings: Any) -> Iterator[str]:
        values = dict(zip(controls, settings, strict=True))
        messages = [*model.opening((values.pop("system", "") or "").strip()), *_answered(history)]
        reply = None
        try:
            with closing(
                model.answer([*messages, {"role": "user", "content": text}], **_as_options(values))
            ) as replies:
                for reply in replies:
                    yield reply.text
        except Exception as error:  # raised, it would cover the chat
            gr.Warning(one_line(error))
        if reply is not None and reply.left_out:
            gr.Info(f"The oldest {reply.left_out} rounds have no room in the model any more and were left out.")
        if reply is not None and reply.is_cut:
            gr.Info("The answer was cut at the length allowed.")

    controls = {name: component(model) for name, component in CONTROLS.items()}
    if model.keeps_history:
        controls = {"system": gr.Textbox(system, label="系统提示 System message", lines=2, render=False), **controls}
    return gr.ChatInterface(
        respond,
        title=title,
        chatbot=_chatbot(model),
        additional_inputs=list(controls.values()),
        additional_inputs_accordion=gr.Accordion("设置 Settings", open=False),
        analytics_enabled=False,
        api_visibility="private",
        concurrency_limit=1,
        fill_height=True,
    )


def _chatbot(model: "ChatModel") -> Any:
    """Gradio's chat, which draws Markdown, with tags and entities shown as the text that they are."""
    import gradio as gr

    chatbot = gr.Chatbot(
        show_label=False, placeholder=model.hint, height="70vh", latex_delimiters=[], buttons=["copy"]
    )
    # On this one chat, as a class of our own would have Gradio write a stub file beside this module.
    read, show = chatbot.preprocess, chatbot.postprocess
    chatbot.preprocess = lambda payload: _with_texts(with_tags_read, read(payload))
    chatbot.postprocess = lambda value: show(_with_texts(with_tags_shown, value))
    return chatbot


def _with_texts(change: Callable[[str], str], messages: Any) -> list[dict[str, Any]]:
    return [{**message, "content": change(_text_of(message))} for message in messages or []]


CODE = re.compile(r"(```[\s\S]*?(?:```|\Z)|`[^`\n]+`)")  # where Markdown itself shows tags as text


def with_tags_shown(text: str) -> str:
    """The text as Markdown that shows its tags and entities."""
    return "".join(
        part if index % 2 else html.escape(part, quote=False) for index, part in enumerate(CODE.split(text))
    )


def with_tags_read(text: str) -> str:
    """The inverse of `with_tags_shown`."""
    return "".join(part if index % 2 else html.unescape(part) for index, part in enumerate(CODE.split(text)))


def _text_of(message: dict[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") == "text")
    return content


def _answered(history: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The questions that were answered, with their answers."""
    messages = [{"role": message["role"], "content": _text_of(message)} for message in history]
    pairs = [pair for pair in pairwise(messages) if [m["role"] for m in pair] == ["user", "assistant"]]
    return list(chain.from_iterable(pairs))


def _slider(label: str, name: str, low: float, high: float, step: float, off: float) -> Callable[["ChatModel"], Any]:
    def make(model: "ChatModel") -> Any:
        import gradio as gr

        value = model.options.get(name, getattr(model.model.generation_config, name, None))
        if name == "temperature" and not model.options["do_sample"]:
            value = 0
        return gr.Slider(low, high, off if value is None else value, step=step, label=label, render=False)

    return make


CONTROLS = {
    "max_new_tokens": _slider("最大长度 Max new tokens", "max_new_tokens", 1, 4096, 1, 512),
    "temperature": _slider("温度 Temperature (0: greedy)", "temperature", 0, 2, 0.05, 1),
    "top_p": _slider("Top-p", "top_p", 0.05, 1, 0.05, 1),
    "top_k": _slider("Top-k (0: off)", "top_k", 0, 100, 1, 0),
    "repetition_penalty": _slider("重复惩罚 Repetition penalty", "repetition_penalty", 0.5, 2, 0.01, 1),
}


def _as_options(values: dict[str, Any]) -> dict[str, Any]:
    """The settings as arguments of `generate`."""
    if not values["temperature"]:
        greedy = {name: values[name] for name in ("max_new_tokens", "repetition_penalty")}
        return {**greedy, "do_sample": False}
    return {**values, "do_sample": True}
