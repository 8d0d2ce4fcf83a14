"""The page of `hf-cnllm chat --web`, in a real browser. The lane `nox -s web` installs what it takes."""

import shutil
import signal
import subprocess
import sys

import pytest

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")

pytestmark = pytest.mark.slow

TAGS = "<b>粗</b> <script>document.title='run'</script> a<b &lt; *好*"


@pytest.fixture(scope="module")
def page(tiny):
    command = [sys.executable, "-m", "hf_cnllm", "chat", str(tiny("baichuan")), "--web", "--port", "7893"]
    options = ["--greedy", "--repetition-penalty", "1", "--max-new-tokens", "2000"]
    server = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    address = next(line.split()[0] for line in server.stdout if line.startswith("http"))
    with sync_api.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 800})
        page.requested = []
        page.on("request", lambda request: page.requested.append(request.url))
        page.goto(address)
        page.locator("textarea").first.wait_for()
        yield page
        browser.close()
    server.send_signal(signal.SIGINT)
    assert server.wait(20) == 0


def ask(page, text):
    page.locator("textarea").first.fill(text)
    page.locator("textarea").first.press("Enter")


def test_an_answer_streams_and_stops(page):
    ask(page, TAGS)
    answer = page.locator(".bot.message").first
    sync_api.expect(answer).to_contain_text("内", timeout=30_000)
    shorter = answer.inner_text()
    page.wait_for_function(
        "length => document.querySelector('.bot.message').innerText.length > length", arg=len(shorter)
    )
    page.locator("button.stop-button").click()
    page.locator("button.submit-button").wait_for()
    stopped = answer.inner_text()
    page.wait_for_timeout(1500)
    assert answer.inner_text() == stopped != shorter


def test_tags_are_text_and_markdown_is_drawn(page):
    question = page.locator(".user.message").first
    assert question.inner_text().strip() == TAGS.replace("*好*", "好")
    assert question.locator("em").inner_text() == "好" and page.title() != "run"


def test_the_history_comes_back_and_the_settings_count(page):
    page.get_by_text("设置 Settings").click()
    page.get_by_label("系统提示 System message").fill("只用诗回答")
    page.get_by_label("number input for 最大长度 Max new tokens").fill("5")
    ask(page, "再说一次")
    sync_api.expect(page.locator(".bot.message")).to_have_count(2, timeout=30_000)
    page.get_by_text("cut at the length allowed").wait_for(timeout=30_000)
    assert len(page.locator(".bot.message").last.inner_text()) < 60


def test_nothing_is_fetched_from_elsewhere(page):
    assert len(page.requested) > 10
    assert all(url.startswith(("http://127.0.0.1", "data:", "blob:")) for url in page.requested)


def test_the_chat_is_cleared(page):
    page.get_by_label("Clear").first.click()
    sync_api.expect(page.locator(".bot.message")).to_have_count(0)
