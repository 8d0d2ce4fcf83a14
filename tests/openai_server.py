"""`hf-cnllm run transformers serve`, or `transformers serve` alone, in a process of its own."""

import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

WITH_PACKAGE = ("-m", "hf_cnllm", "run", "transformers")
ALONE = ("-c", "from transformers.cli.transformers import main; main()")


def start_server(
    port: int, *arguments: str, python: str | Path = sys.executable, program: Sequence[str] = WITH_PACKAGE, **kwargs
) -> subprocess.Popen:
    command = [str(python), *program, "serve", "--device", "cpu", "--port", str(port)]
    return subprocess.Popen([*command, *arguments], text=True, **kwargs)


@contextmanager
def running_server(*arguments: str, **kwargs) -> Iterator[str]:
    """The address of a server that answers. Ctrl-C ends it."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:

        def said() -> str:
            log.seek(0)
            return log.read()

        with start_server(port, *arguments, stdout=log, stderr=subprocess.STDOUT, **kwargs) as process:
            try:
                while not _answers(port):
                    assert process.poll() is None, said()
                    time.sleep(0.2)
                yield f"http://localhost:{port}/v1"
            finally:
                process.send_signal(signal.SIGINT)
                process.wait(60)
        assert "Finished server process" in said()  # the signal was the tool's


def _answers(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://localhost:{port}/health").status == 200
    except OSError:
        return False
