"""A chat model of a page: what it says depends on the prompt alone, and is as good and as bad as replies are."""

import random
import re

NOUNS = [
    "garden",
    "bridge",
    "kettle",
    "letter",
    "window",
    "harbor",
    "ladder",
    "mirror",
    "carpet",
    "engine",
    "forest",
    "candle",
    "tunnel",
    "violin",
    "saddle",
]
VERBS = [
    "Describe",
    "Compare",
    "Summarize",
    "Rename",
    "Classify",
    "Explain",
    "Shorten",
    "Translate",
    "Rank",
    "Praise",
    "Review",
    "Sort",
]
ZH_NOUNS = [
    "花园",
    "桥梁",
    "茶壶",
    "书信",
    "窗户",
    "港口",
    "梯子",
    "镜子",
    "地毯",
    "发动机",
    "森林",
    "蜡烛",
    "隧道",
    "提琴",
    "马鞍",
]
ZH_VERBS = ["描述", "比较", "概括", "改写", "分类", "解释", "缩写", "翻译", "排列", "称赞", "点评", "整理"]
BAD = [
    *("Go on.", "Draw a graph of the rain in April for us", "Write a program that sorts the list of names"),
    *(
        "(a) Say what the weather is like today",
        "Écris une lettre au maire de la ville",
        "Say \ufffd what this text is about",
    ),
    *("写一首诗", "把这张图片里的内容描述出来吧", "编写一个程序计算平均数是多少", "《春晓》这首诗的作者是哪一位？"),
]


def reply(prompt: str) -> tuple[str, str]:
    chance = random.Random(prompt)
    is_zh = re.match(r"[\u4e00-\u9fff]", prompt) is not None
    if found := re.search(r"numbered (\d+) to (\d+)|编号从 (\d+) 到 (\d+)", prompt):
        first, last = (int(number) for number in found.groups() if number)
        if "###" in prompt:
            return _whole(chance, is_zh, first, last), "length" if chance.random() < 0.2 else "stop"
        lines = [f"{number}. {_instruction(chance, is_zh)}" for number in range(first, last + 1)]
        text = "I cannot do that." if chance.random() < 0.1 else "\n".join(["Sure:", *lines])
        return text, "length" if chance.random() < 0.2 else "stop"
    if prompt.endswith(("Classification:", "分类任务：")):
        return chance.choice(["Yes", "No.", "是", "否", "Perhaps"]), "stop"
    names = ("类别：", "输入：") if "先写类别" in prompt else ("Class label: ", "Input: ")
    if "class label first" in prompt or "先写类别" in prompt:
        pairs = [
            f"{names[0]}{chance.choice('ABC')}\n{names[1]}{_some(chance, is_zh)}" for _ in range(chance.randint(0, 7))
        ]
    else:
        names = ("输入：", "输出：") if is_zh else ("Input: ", "Output: ")
        pairs = [
            f"{'示例' if is_zh else 'Example'} {n}\n{names[0]}{_some(chance, is_zh)}\n{names[1]}{_some(chance, is_zh)}"
            for n in range(1, chance.randint(1, 7))
        ]
    return "\n".join(pairs), "length" if chance.random() < 0.2 else "stop"


def _instruction(chance: random.Random, is_zh: bool) -> str:
    if chance.random() < 0.2:
        return chance.choice(BAD)
    if is_zh:
        return f"{chance.choice(ZH_VERBS)}{chance.choice(ZH_NOUNS)}与{chance.choice(ZH_NOUNS)}之间的{chance.choice(ZH_NOUNS)}"
    nouns = chance.sample(NOUNS, 4)
    return f"{chance.choice(VERBS)} the {nouns[0]} of a {nouns[1]} near {nouns[2]} and {nouns[3]}"


def _some(chance: random.Random, is_zh: bool) -> str:
    special = chance.random()
    if special < 0.1:
        return ""
    if special < 0.2:
        return "as follows:"
    return " ".join(chance.sample(ZH_NOUNS if is_zh else NOUNS, 2)) if special < 0.8 else "the same"


def _whole(chance: random.Random, is_zh: bool, first: int, last: int) -> str:
    names = ("指令：", "输入：", "输出：") if is_zh else ("Instruction: ", "Input: ", "Output: ")
    blocks = []
    for number in range(first, last + 1):
        values = (_instruction(chance, is_zh), _some(chance, is_zh) or "<noinput>", _some(chance, is_zh))
        blocks.append("\n".join(f"{number}. {name}{value}" for name, value in zip(names, values, strict=True)))
    return "\n###\n".join(blocks)
