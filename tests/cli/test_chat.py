"""`hf-cnllm chat`: what is answered, what is kept, and what the terminal does. The page is in test_chat_web."""

import argparse
import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from itertools import pairwise

import peft
import pytest
import torch
import transformers

from hf_cnllm.cli import USER_ERROR, chat, main
from hf_cnllm.cli.chat import terminal, web
from hf_cnllm.cli.chat.model import ChatModel, Reply
from hf_cnllm.cli.chat.terminal import Terminal, printable
from hf_cnllm.cli.chat.tools import calculate, call

CHATTING = ("baichuan", "qwen", "chatglm", "chatglm2", "chatglm3")
QUESTION = [{"role": "user", "content": "为什么天空是蓝色的？"}]


def parsed(*words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--debug", action="store_true")
    chat.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


@pytest.fixture(scope="module")
def load(tiny):
    loaded = {}

    def get(family, *options):
        if (family, options) not in loaded:
            loaded[family, options] = ChatModel.load(parsed(tiny(family), *options))
        return loaded[family, options]

    return get


GREEDY = ("--greedy", "--max-new-tokens", "12", "--repetition-penalty", "1")


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CHATTING)
def test_answers_are_the_models_own(family, load):
    it = load(family, *GREEDY)
    options = {"do_sample": False, "max_new_tokens": 12, "repetition_penalty": 1.0, "temperature": None}
    lengths = []
    for question in ("为什么天空是蓝色的？", "How are you, 你好", "写一首诗"):
        messages = [{"role": "user", "content": question}]
        replies = list(it.answer(messages))
        if family.startswith("chatglm"):
            expected, _ = it.model.chat(it.tokenizer, question, **options)
        else:
            inputs = it.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
            ids = it.model.generate(**inputs, **options, top_p=None, top_k=None, eos_token_id=sorted(it.ends))
            ids = ids[0, inputs["input_ids"].shape[1] :]
            expected = it.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert replies[-1].text == replies[-1].turns[-1]["content"] == expected
        for now, then in pairwise(replies):
            assert then.text.startswith(now.text)
        lengths.append(len(replies))
    assert max(lengths) > 5


@pytest.mark.parametrize("family", CHATTING)
def test_what_a_user_types_is_never_a_control_token(family, load):
    it = load(family, *GREEDY)
    marks = ["</s>", "<|im_end|>", "<|im_start|>system", "<reserved_107>", "[gMASK]<sop>", "<|assistant|>", "<eop>"]
    control = set(it.tokenizer.all_special_ids) | it.ends
    counts = [
        [sum(index in control for index in it._prompt([{"role": "user", "content": text}], 8)[0])]
        for text in ("问题", "".join(marks))
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("family", CHATTING)
def test_a_system_message_changes_the_prompt(family, load):
    it = load(family, *GREEDY)
    with_system, _ = it._prompt([*it.opening("只用诗回答"), *QUESTION], 8)
    assert "只用诗回答" in it.tokenizer.decode(with_system)


def test_the_oldest_rounds_make_room_and_what_is_too_long_is_refused(load):
    it = load("qwen", *GREEDY)
    turn = [{"role": "user", "content": "问" * 300}, {"role": "assistant", "content": "答" * 300}]
    prompt, left_out = it._prompt([*it.opening("系统"), *turn * 40, *QUESTION], 500)
    assert 0 < left_out < 40 and len(prompt) <= it.room - 500
    assert it.tokenizer.decode(prompt).startswith("<|im_start|>system\n系统") and QUESTION[0]["content"] in (
        it.tokenizer.decode(prompt)
    )
    with pytest.raises(ValueError, match="shorten it"):
        it._prompt([{"role": "user", "content": "问" * 20_000}], 8)


def test_an_answer_that_was_cut_says_so(load):
    assert list(load("baichuan", *GREEDY).answer(QUESTION))[-1].is_cut


def test_raw_goes_on_with_the_text(load):
    it = load("baichuan", "--raw", *GREEDY)
    *_, reply = it.answer([{"role": "user", "content": "</s>今天"}])
    ids = it.tokenizer.encode_message("</s>今天")
    assert it.tokenizer.eos_token_id not in ids
    output = it.model.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=12, temperature=None, top_p=None, top_k=None,
        repetition_penalty=1.0,
    )  # fmt: skip
    assert reply.text == it.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True) != ""


@pytest.mark.parametrize("text", ["今天[MASK]很好", "今天"])
def test_glm_fills_blanks(text, load):
    (reply,) = load("glm", *GREEDY).answer([{"role": "user", "content": text}])
    assert (
        reply.text.startswith("今天") and len(reply.text) > len(text.replace("[MASK]", "")) and "[" not in reply.text
    )


def test_sampling_is_the_authors_own_unless_the_user_says_otherwise(load):
    assert load("chatglm3").options == {"do_sample": True, "top_p": 0.8, "temperature": 0.8, "max_new_tokens": 1024}
    baichuan = load("baichuan").options
    assert (baichuan["temperature"], baichuan["top_k"], baichuan["max_new_tokens"]) == (0.3, 5, 2048)
    hot = load("glm", "--temperature", "2").options
    assert hot["do_sample"] and hot["temperature"] == 2


def test_a_seed_repeats_the_answers(tiny):
    def texts(seed):
        it = ChatModel.load(parsed(tiny("qwen"), "--seed", seed, "--temperature", 3, "--max-new-tokens", 8))
        return [list(it.answer(QUESTION))[-1].text for _ in range(2)]

    first = texts(5)
    assert first == texts(5) != texts(6) and first[0] != first[1]


def test_an_adapters_folder_brings_its_base(tiny, tmp_path, capsys):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny("qwen"))
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    for words in ([tmp_path / "adapter"], [tiny("qwen"), "--adapter", tmp_path / "adapter"]):
        it = ChatModel.load(parsed(*words, *GREEDY))
        *_, reply = it.answer(QUESTION)
        assert f"adapter {tmp_path / 'adapter'} on " in capsys.readouterr().out
        ids = torch.tensor([it._prompt(QUESTION, 8)[0]])
        assert torch.allclose(it.model(ids).logits, adapted.eval()(ids).logits, atol=1e-5)
        assert reply.text
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert main(["chat", str(tmp_path / "adapter")]) == USER_ERROR
    assert "there is no such folder. Give the checkpoint and, with --adapter" in capsys.readouterr().err


# --- tools ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [("6*7", "42"), ("(3 + 4) * 2.5", "17.5"), ("2**10 // 3", "341"), ("-7 % 3", "2"), ("1/3", "0.333333333333333")],
)
def test_the_calculator(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["__import__('os')", "9**9**9", "2**0.5**-99", "(-8)**0.5", "1/0", "1+", "'a'*9", "[1]", "a", "1e30*10", "True",
     "(" * 150, "1+" * 101 + "1"],
)  # fmt: skip
def test_the_calculator_runs_nothing_else(expression):
    with pytest.raises(ValueError):
        calculate(expression)
    assert call("calculate", {"expression": expression}).startswith("The call failed: ")


def test_wrong_calls_are_answered():
    assert call("rm", {}) == "There is no tool rm."
    assert "The call failed" in call("calculate", {"formula": "1"}) and "The call failed" in call(
        "calculate", {"expression": 3}
    )


@pytest.fixture
def calling(load, monkeypatch):
    """ChatGLM3 in a terminal, that calls the calculator and then says 好; `yes` answers its questions."""
    it = load("chatglm3", "--tools-demo", *GREEDY)
    answers = ["calculate\n```python\ntool_call(expression='6*7')\n```", "\n好"]
    prompts = []

    def scripted(model, prompt, ends, **options):
        prompts.append(it.tokenizer.decode(prompt))
        ids = it.tokenizer.encode(answers[len(prompts) - 1], add_special_tokens=False)
        yield from (ids[:end] for end in range(1, len(ids) + 1))

    monkeypatch.setattr("hf_cnllm.cli.chat.model.iterate_tokens", scripted)
    return Terminal(it, parsed("x", "--tools-demo")), prompts


@pytest.mark.parametrize(("said", "result"), [("y", "42"), ("是", "42"), ("", "The user does not allow this call.")])
def test_a_tool_is_called_when_the_user_agrees(calling, said, result, monkeypatch, capsys):
    terminal_, prompts = calling
    questions = []
    monkeypatch.setattr(terminal, "_line", lambda prompt: questions.append(prompt) or said)
    terminal_._ask("六乘七？")
    assert questions == ["run calculate(expression='6*7')? [y/N] "]
    roles = [(message["role"], message.get("metadata"), message["content"]) for message in terminal_.messages]
    assert roles[0] == ("user", None, "六乘七？") and roles[1][:2] == ("assistant", "calculate")
    assert roles[2:] == [("observation", None, result), ("assistant", "", "好")]
    assert '"name": "calculate"' in prompts[0] and result in prompts[1]
    assert "好" in capsys.readouterr().out


def test_ctrl_c_at_the_question_about_a_tool_takes_the_turn_back(calling, monkeypatch):
    terminal_, _ = calling

    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "_line", interrupted)
    with pytest.raises(KeyboardInterrupt):
        terminal_._ask("六乘七？")
    assert terminal_.messages == []


# --- the terminal -----------------------------------------------------------------------------------------------------


class Scripted:
    """A model that answers with the replies it is given; an exception among them is raised."""

    keeps_history, hint, room = True, "Ask something.", 100

    def __init__(self, *answers):
        self.answers, self.asked = iter(answers), []

    def opening(self, system, has_tools=False):
        return [{"role": "system", "content": system}] if system else []

    def answer(self, messages):
        self.asked.append([message["content"] for message in messages])
        for step in next(self.answers):
            if isinstance(step, BaseException):
                raise step
            yield Reply(step, [{"role": "assistant", "content": step}])


def run(monkeypatch, answers, lines):
    given = iter(lines)

    def line(prompt):
        said = next(given, None)
        if isinstance(said, BaseException):
            raise said
        return said

    monkeypatch.setattr(terminal, "_line", line)
    model = Scripted(*answers)
    it = Terminal(model, parsed("x"))
    assert it.run() == 0
    return it, model


def test_history_undo_clear_and_system(monkeypatch, capsys):
    answers = [["一"], ["二"], ["三"], ["四"]]
    lines = [
        "a",
        "b",
        "/undo",
        "c",
        "/system 诗人",
        "/clear",
        "/undo",
        "d",
        "/system",
        "/nothing",
        "/help",
        "/exit",
        "e",
    ]
    _, model = run(monkeypatch, answers, lines)
    assert model.asked == [["a"], ["a", "一", "b"], ["a", "一", "c"], ["诗人", "d"]]
    out = capsys.readouterr().out
    assert "(taken back: b)" in out and "(nothing to take back)" in out and "(no system message)" in out
    assert "there is no command /nothing" in out and "/save FILE" in out


def test_several_lines_and_a_message_that_begins_with_a_slash(monkeypatch):
    lines = ['"""第一行', "", '第三行"""', '"""', "a", '"""', "//exit 是什么", '"""never closed']
    _, model = run(monkeypatch, [["一"]] * 4, lines)
    assert [asked[-1] for asked in model.asked] == ["第一行\n\n第三行", "a", "/exit 是什么", "never closed"]


def test_a_stopped_answer_is_kept_as_it_was_shown(monkeypatch, capsys):
    stop = KeyboardInterrupt()
    _, model = run(monkeypatch, [["你", "你好", stop], [stop], ["后"]], ["a", "b", "c"])
    assert model.asked == [["a"], ["a", "你好", "b"], ["a", "你好", "c"]]
    assert capsys.readouterr().out.count("(stopped)") == 2


def test_an_error_is_one_line_and_the_chat_goes_on(monkeypatch, capsys):
    _, model = run(monkeypatch, [["一"], ["半", RuntimeError("NaN\n logits")], ["三"]], ["a", "b", "c"])
    assert model.asked == [["a"], ["a", "一", "b"], ["a", "一", "c"]]
    assert "error: NaN logits\n" in capsys.readouterr().out


def test_ctrl_c_twice_ends(monkeypatch, capsys):
    stop = KeyboardInterrupt()
    _, model = run(monkeypatch, [["一"], ["二"]], [stop, "a", stop, stop, "b"])
    assert model.asked == [["a"]]
    assert capsys.readouterr().out.count("(Ctrl-C again") == 2
    _, model = run(monkeypatch, [["一", stop]], ["a", stop, "b"])  # stops the answer, then ends
    assert model.asked == [["a"]]


def test_a_saved_chat_is_training_data_and_nothing_is_overwritten(monkeypatch, tmp_path, capsys):
    from hf_cnllm import read_conversations

    file = tmp_path / "chat.jsonl"
    lines = ["/system 诗人", "a", f"/save {file}", f"/save {file}", f"/save {tmp_path}/no/x", "/save"]
    run(monkeypatch, [["一"]], lines)
    (conversation,) = read_conversations(file)
    assert [message["content"] for message in conversation["messages"]] == ["诗人", "a", "一"]
    out = capsys.readouterr().out
    assert "exists: choose another name" in out and "cannot be written: No such file" in out and "say where" in out


def test_what_a_model_writes_does_not_steer_the_terminal():
    assert printable("好\x1b[2J\x07\r\n\t　…\x9b") == "好\ufffd[2J\ufffd\ufffd\n\t　…\ufffd"


@pytest.mark.parametrize(
    ("family", "words", "said"),
    [
        ("qwen", ["--greedy", "--temperature", "1"], "--temperature has no meaning"),
        ("qwen", ["--raw", "--system", "x"], "no place for --system"),
        ("qwen", ["--tools-demo"], "needs a model whose chats have tools"),
        ("qwen", ["--tools-demo", "--web"], "use it in the terminal"),
        ("qwen", ["--adapter", "/nowhere"], "/nowhere is no folder of an adapter"),
        ("glm", ["--system", "x"], "this model fills blanks"),
    ],
)
def test_options_that_do_not_go_together(family, words, said, tiny, capsys):
    assert main(["chat", str(tiny(family)), *words]) == USER_ERROR
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("hf-cnllm chat: error: ") and said in error[-1]


@pytest.mark.parametrize("words", [["--top-p", "0"], ["--top-k", "1.5"], ["--temperature", "hot"], ["--port", "0"]])
def test_numbers_out_of_range_are_usage_errors(words, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["chat", "x", *words])
    assert exit.value.code == USER_ERROR and "must be a" in capsys.readouterr().err


def test_a_missing_gradio_is_named(monkeypatch, capsys):
    monkeypatch.setattr(chat.importlib.util, "find_spec", lambda name: None)
    assert main(["chat", "x", "--web"]) == USER_ERROR
    assert 'pip install "hf-cnllm[web]"' in capsys.readouterr().err


def test_a_port_in_use_is_named_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(chat.importlib.util, "find_spec", lambda name: object())
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert main(["chat", "/nowhere", "--web", "--port", str(port)]) == USER_ERROR
    assert f"127.0.0.1:{port} cannot be served on" in capsys.readouterr().err


def test_tags_are_shown_as_text_and_come_back():
    text = "a<b> &lt; `<i>`\n```html\n<p>&amp;</p>\n```\n<script>"
    shown = web.with_tags_shown(text)
    assert "<b>" not in shown and "<script>" not in shown and "`<i>`" in shown and "<p>&amp;</p>" in shown
    assert web.with_tags_read(shown) == text


# --- a real terminal --------------------------------------------------------------------------------------------------


class Pty:
    """A command in a terminal of its own."""

    def __init__(self, *words):
        self.main, worker = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "LC_ALL": "C.UTF-8", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "hf_cnllm", *map(str, words)]
        self.process = subprocess.Popen(
            command, stdin=worker, stdout=worker, stderr=worker, env=environment, start_new_session=True,
            preexec_fn=self._in_front,
        )  # fmt: skip
        os.close(worker)
        self.seen = b""

    @staticmethod
    def _in_front():
        """The terminal is the command's own, and Ctrl-C reaches it, which it does not in a run in the background."""
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def expect(self, pattern, seconds=60):
        """What came up to the pattern, which is then done with."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern.encode(), self.seen)):
            assert time.monotonic() < end, f"{pattern!r} did not come; there is {self.seen.decode(errors='replace')}"
            if select.select([self.main], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.main, 4096)
                except OSError:  # its end
                    assert re.search(pattern.encode(), self.seen), self.seen.decode(errors="replace")
        before, self.seen = self.seen[: found.start()], self.seen[found.end() :]
        return before.decode(errors="replace")

    def send(self, text):
        os.write(self.main, text.encode())

    def send_at_prompt(self, text):
        """Sent once the program reads: a terminal that is not yet in the reader's mode swallows Ctrl-D."""
        self.expect("> ")
        self.send(text)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.main)


def test_in_a_real_terminal_ctrl_c_stops_the_answer_and_then_the_program(tiny, tmp_path):
    options = ("--greedy", "--max-new-tokens", 3500, "--repetition-penalty", 1)
    with Pty("chat", tiny("baichuan"), *options) as it:
        it.send_at_prompt("你好\n")
        it.expect("\n")
        it.expect(r"[^\r\n]{30}")  # some of the answer, while it is written
        it.send("\x03")
        it.expect(r"\(stopped\)")
        it.send_at_prompt("\x1b[200~第一行\n第二行\x1b[201~\n")  # pasted
        it.expect("第二行")
        it.expect(r"[^\r\n]{60}")
        it.send("\x03")
        it.expect(r"\(stopped\)")
        it.send_at_prompt(f"/save {tmp_path}/chat.jsonl\n")
        it.expect(r"\(saved in")
        it.send_at_prompt("\x04")
        assert it.process.wait(60) == 0
    messages = json.loads((tmp_path / "chat.jsonl").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert [message["content"] for message in messages[::2]] == ["你好", "第一行\n第二行"]
    assert all(message["content"] for message in messages)


@pytest.mark.slow
def test_in_a_real_terminal_a_second_ctrl_c_ends(tiny):
    with Pty("chat", tiny("qwen"), "--greedy", "--max-new-tokens", 1500) as it:
        it.send_at_prompt("你好\n")
        it.expect(r"\n[^\r\n]{20}")
        it.send("\x03")
        it.expect(r"\(stopped\)")
        it.send_at_prompt("\x03")
        assert it.process.wait(60) == 0


@pytest.mark.slow
def test_ctrl_c_while_loading_is_one_line(tiny):
    with Pty("chat", tiny("qwen")) as it:
        time.sleep(1)
        it.process.send_signal(signal.SIGINT)
        assert it.process.wait(60) != 0


@pytest.mark.slow
@pytest.mark.parametrize("family", [*CHATTING, "glm"])
def test_lines_from_a_pipe(family, tiny):
    command = [sys.executable, "-m", "hf_cnllm", "chat", str(tiny(family)), *GREEDY]
    done = subprocess.run(command, input="你好\n/undo\n/clear\n", capture_output=True, text=True, check=True)
    assert "(taken back: 你好)\n(a new chat)\n" in done.stdout and "> " not in done.stdout
