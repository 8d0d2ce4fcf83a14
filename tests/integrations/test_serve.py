"""`hf-cnllm run transformers serve`, a real server on localhost, and OpenAI's own client: chats of several turns, streamed and
not, on checkpoints in the Hub's layout and saved by this package."""

import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

CHECKPOINTS = ("baichuan", "qwen", "chatglm", "chatglm2", "chatglm3")
NEW_TOKENS = 12
QUESTIONS = ("你好", "one plus one?", "为什么？")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def serve(port: int, *arguments: str, **kwargs) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "hf_cnllm",
        "run",
        "transformers",
        "serve",
        "--device",
        "cpu",
        "--port",
        str(port),
    ]
    return subprocess.Popen([*command, *arguments], text=True, **kwargs)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server, which loads what a request names."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file, serve(port, stdout=file, stderr=subprocess.STDOUT) as process:
        try:
            while not answers(port):
                assert process.poll() is None, log.read_text()
                time.sleep(0.2)
            yield f"http://localhost:{port}/v1"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)
    assert "Finished server process" in log.read_text()  # it got the signal, not us


def answers(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://localhost:{port}/health").status == 200
    except OSError:
        return False


@pytest.fixture(params=CHECKPOINTS)
def folder(request, tmp_path):
    write_tiny_checkpoint(request.param, tmp_path / "hub")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "final_layernorm" in name:  # else ChatGLM-6B, whose head is tied, repeats the last token of the prompt
                parameter.normal_()
    model.save_pretrained(tmp_path / "weights")
    shutil.move(tmp_path / "weights" / "model.safetensors", tmp_path / "hub" / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("layout", ["hub", "saved"])
def test_a_chat_has_the_answers_of_generate(layout, folder, server):
    tokenizer = AutoTokenizer.from_pretrained(folder / "hub")
    model = AutoModelForCausalLM.from_pretrained(folder / "hub", dtype="auto").eval()
    if layout == "saved":
        for saved in (tokenizer, model):
            saved.save_pretrained(folder / "saved")
    client = openai.OpenAI(base_url=server, api_key="none")
    wanted = {"model": str(folder / layout), "max_tokens": NEW_TOKENS, "temperature": 0}
    messages = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        completion = client.chat.completions.create(messages=messages, **wanted)
        assert completion.choices[0].message.content == answer != ""
        assert completion.usage.prompt_tokens == inputs["input_ids"].shape[1]
        chunks = client.chat.completions.create(messages=messages, stream=True, **wanted)
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(pieces) == answer.rstrip("\N{REPLACEMENT CHARACTER}")  # half a character is not streamed
        assert len(list(filter(None, pieces))) > 1
        messages.append({"role": "assistant", "content": answer})


@pytest.mark.slow
def test_a_port_in_use_is_said_in_one_line(server):
    port = server.removesuffix("/v1").rpartition(":")[2]
    process = serve(int(port), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    (line,) = [line for line in output.splitlines() if "address already in use" in line]
    assert port in line and "Traceback" not in output
