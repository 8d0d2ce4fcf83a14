"""An OpenAI-compatible endpoint that answers by a function of the prompt, and goes wrong as real ones do, by chance or always."""

import json
import os
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

JUNK = {  # body, content type, other headers
    "page": (b"<html>502</html>", "text/html", {}),
    "no json": (b'{"choices": [', "application/json", {}),
    "no utf-8": b'{"choices": [{"message": {"content": "\xff"}}]}',
    "no choices": b'{"choices": []}',
    "a number": b'{"choices": 3}',
    "a list": b"[1]",
    "no text": b'{"choices": [{"message": {"content": null}}]}',
    "nothing": b"",
    "no gzip": (b"gzip?", "application/json", {"Content-Encoding": "gzip"}),
    "too short": (b'{"choices": [', "application/json", {"Content-Length": "999"}),
}


@dataclass
class Chat:
    """How it answers, what it does instead, and what it has seen."""

    reply: Callable[[str], tuple[str, str]]  # prompt -> text, finish_reason
    faults: Sequence[str] = ()  # of 500, 429, stall, dribble, reset and JUNK, or a status
    share: float = 0.0  # of requests that meet one
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    seen: Counter = field(default_factory=Counter)  # prompts, and faults
    requests: list[dict] = field(default_factory=list)
    arrived: threading.Condition = field(default_factory=threading.Condition)
    ended: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def wait_for_requests(self, number: int, timeout: float = 300) -> None:
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.requests) >= number, timeout), len(self.requests)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        chat: Chat = self.server.chat
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = asked["messages"][0]["content"]
        with chat.arrived:
            fault = chat.chance.choice(list(chat.faults)) if chat.chance.random() < chat.share else None
            chat.seen.update([prompt, *([fault] if fault else [])])
            chat.requests.append(asked | {"authorization": self.headers["Authorization"]})
            chat.arrived.notify_all()
        if fault is None:
            text, finish = chat.reply(prompt)
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
            self._send(json.dumps({"id": "x", "object": "chat.completion", "choices": [choice]}).encode())
        elif fault == "stall":
            chat.ended.wait()
        elif fault == "dribble":
            self.send_response(200)
            self.send_header("Content-Length", "999999")
            self.end_headers()
            while not chat.ended.wait(0.05):
                try:
                    self.wfile.write(b" ")
                except OSError:
                    return
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
            self.close_connection = True
        elif fault in JUNK:
            junk = JUNK[fault]
            self._send(*(junk if isinstance(junk, tuple) else (junk,)))
        else:
            self._send(b'{"error": "no"}', status=int(fault), headers={"Retry-After-Ms": "1"})

    def _send(self, body, kind="application/json", headers=(), status=200):
        self.send_response(status)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(body))} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = "Content-Length" in dict(headers)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """The client went away, as it should."""


@contextmanager
def chat_endpoint(
    reply: Callable[[str], tuple[str, str]], faults: Sequence[str] = (), share: float = 0.0
) -> Iterator[Chat]:
    chat = Chat(reply, faults, share)
    with Server(("127.0.0.1", 0), Handler) as server:
        server.chat = chat
        chat.url = f"http://127.0.0.1:{server.server_port}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield chat
        finally:
            chat.ended.set()
            server.shutdown()
            thread.join()
