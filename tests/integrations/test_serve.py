"""`hf-cnllm run transformers serve`, a real server on localhost, and OpenAI's own client: chats of several turns, streamed and
not, on checkpoints in the Hub's layout and saved by this package."""

import shutil
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint
from openai_server import running_server, start_server

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

CHECKPOINTS = ("baichuan", "qwen", "chatglm", "chatglm2", "chatglm3")
NEW_TOKENS = 12
QUESTIONS = ("你好", "one plus one?", "为什么？")


@pytest.fixture(scope="module")
def server():
    with running_server() as address:
        yield address


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


@pytest.mark.parametrize(("family", "end"), [("qwen", "<|im_end|>"), ("chatglm3", "<|user|>")])
def test_a_reply_ends_where_the_template_ends_it(family, end, tmp_path, server):
    """The files of these on the Hub stop elsewhere."""
    folder = tmp_path / family
    write_tiny_checkpoint(family, folder)
    token = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(end)
    config = AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert token not in torch.tensor(config.eos_token_id)
    client = openai.OpenAI(base_url=server, api_key="none")
    completion = client.chat.completions.create(
        model=str(folder),
        messages=[{"role": "user", "content": QUESTIONS[0]}],
        max_tokens=NEW_TOKENS,
        temperature=0,
        logit_bias={str(token): 100.0},
    )
    assert completion.choices[0].finish_reason == "stop" and completion.usage.completion_tokens == 1


@pytest.mark.slow
def test_a_port_in_use_is_said_in_one_line(server):
    port = server.removesuffix("/v1").rpartition(":")[2]
    process = start_server(int(port), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    (line,) = [line for line in output.splitlines() if "address already in use" in line]
    assert port in line and "Traceback" not in output
