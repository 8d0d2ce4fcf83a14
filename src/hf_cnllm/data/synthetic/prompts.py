"""What a chat model is asked for tasks, in Chinese and English, and how its replies are read.

The steps are those of Self-Instruct (Wang et al., arXiv 2212.10560, section 2.2 and appendix A) and of Alpaca's one call for whole
tasks. The examples in the prompts are the seed tasks, so nothing of the papers' own texts is in them. Readers take either
language, since models answer in either.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .heuristics import Instance
from .seeds import Task

EXAMPLES = 6  # of seed tasks of each kind, where the model is shown how something is done
MOST_INSTANCES = 5  # of a task

TEXTS = {
    "en": {
        "list": "Below is a list of tasks for an assistant that reads and writes text. Continue it with {more} new tasks, "
        "numbered {first} to {last}, one a line. They should differ from these and from each other in topic, verb and form. "
        "Write the tasks alone, without answers.\n\n{listed}",
        "whole": "Write {more} new tasks for an assistant that reads and writes text, each with an input and the right output, in "
        "the form of the tasks below, numbered {first} to {last}, with a line ### before each. They should differ in topic, verb "
        "and form; some are questions, some orders. Where a task needs no input, the input is <noinput>. Inputs are "
        "concrete, not placeholders.\n\n{listed}",
        "classify": "A classification task is one whose answer is one of a few labels that are known beforehand. Is the last "
        "task one? Answer Yes or No, and nothing else.\n\n{listed}\n\nTask: {instruction}\nClassification:",
        "input_first": "Write up to {most} examples of the last task, as those of the tasks before it: the input first, then "
        "its output. Leave the input out if the task needs none; one example is enough then. Write the examples alone.\n\n"
        "{listed}\n\nTask: {instruction}",
        "output_first": "Write up to {most} examples of the last task, as those of the tasks before it: a class label first, "
        "another one each time if there are enough, then an input that belongs to it. Write the examples alone.\n\n{listed}\n\n"
        "Task: {instruction}",
        "task": "Task: ",
        "instruction": "Instruction: ",
        "example": "Example",
        "input": "Input: ",
        "output": "Output: ",
        "label": "Class label: ",
        "classification": "Classification: ",
        "yes": "Yes",
        "no": "No",
    },
    "zh": {
        "list": "下面列出了交给一个文字助手的任务。请接着写 {more} 个新任务，编号从 {first} 到 {last}，每行一个。新任务的话题、动词和"
        "形式要与已有的不同，彼此之间也要不同。只写任务，不写答案。\n\n{listed}",
        "whole": "请仿照下面的格式，为一个文字助手写 {more} 个新任务，每个都有输入和正确的输出，编号从 {first} 到 {last}，每个之前写一行"
        " ###。话题、动词和形式要多样，有的是提问，有的是要求。不需要输入的任务，输入写 <noinput>。输入要具体，不要用占位符。\n\n{listed}",
        "classify": "如果一个任务的答案只能是事先知道的几个标签之一，它就是分类任务。最后一个任务是不是分类任务？只回答“是”或“否”。\n\n"
        "{listed}\n\n任务：{instruction}\n分类任务：",
        "input_first": "请仿照前面各任务的示例，为最后一个任务写至多 {most} 个示例：先写输入，再写输出。任务不需要输入时省去输入，写一个"
        "示例即可。只写示例。\n\n{listed}\n\n任务：{instruction}",
        "output_first": "请仿照前面各任务的示例，为最后一个任务写至多 {most} 个示例：先写类别，尽量每次不同，再写属于这一类的输入。只写"
        "示例。\n\n{listed}\n\n任务：{instruction}",
        "task": "任务：",
        "instruction": "指令：",
        "example": "示例",
        "input": "输入：",
        "output": "输出：",
        "label": "类别：",
        "classification": "分类任务：",
        "yes": "是",
        "no": "否",
    },
}


class Draft(NamedTuple):
    """A task as a reply has it."""

    instruction: str
    instances: Sequence[Instance] = ()


# --- writing ----------------------------------------------------------------------------------------------------------


def ask_for_list(language: str, tasks: Sequence[Task], total: int = 16) -> str:
    """Continue the list of instructions up to `total`."""
    listed = "\n".join(f"{number}. {_one_line(task.instruction)}" for number, task in enumerate(tasks, start=1))
    first = len(tasks) + 1
    return TEXTS[language]["list"].format(more=total - first + 1, first=first, last=total, listed=listed)


def ask_for_whole_tasks(language: str, tasks: Sequence[Task], total: int = 20) -> str:
    """Continue the list of tasks with instances up to `total`, as Alpaca's one call."""
    texts, shown = TEXTS[language], []
    for number, task in enumerate(tasks, start=1):
        given, output = task.instances[0]
        fields = (("instruction", _one_line(task.instruction)), ("input", given or "<noinput>"), ("output", output))
        shown.append("\n".join(["###", *(f"{number}. {texts[name]}{value}" for name, value in fields)]))
    first = len(tasks) + 1
    return texts["whole"].format(more=total - first + 1, first=first, last=total, listed="\n".join(shown))


def ask_for_kind(language: str, seeds: Iterable[Task], instruction: str) -> str:
    """Is it a classification task?"""
    texts, kinds = TEXTS[language], _some_of_each_kind(seeds)
    answers = (texts["yes"], texts["no"])
    shown = [
        f"{texts['task']}{_one_line(task.instruction)}\n{texts['classification']}{answer}"
        for pair in zip(*kinds, strict=False)
        for task, answer in zip(pair, answers, strict=True)
    ]
    return texts["classify"].format(listed="\n\n".join(shown), instruction=instruction)


def ask_for_instances(language: str, seeds: Iterable[Task], instruction: str, is_classification: bool) -> str:
    """Output-first for classifications, so that not all inputs belong to one label; input-first for others."""
    texts, kinds = TEXTS[language], _some_of_each_kind(seeds)
    shown = []
    for task in kinds[0] if is_classification else kinds[1]:
        lines = [f"{texts['task']}{_one_line(task.instruction)}"]
        for number, (given, output) in enumerate(task.instances, start=1):
            inputs = [texts["input"] + given] if given else []
            lines.append(f"{texts['example']} {number}")
            lines += [texts["label"] + output, *inputs] if is_classification else [*inputs, texts["output"] + output]
        shown.append("\n".join(lines))
    name = "output_first" if is_classification else "input_first"
    return texts[name].format(listed="\n\n".join(shown), instruction=instruction, most=MOST_INSTANCES)


def _some_of_each_kind(seeds: Iterable[Task]) -> tuple[list[Task], list[Task]]:
    classifications: list[Task] = []
    others: list[Task] = []
    for task in seeds:
        (classifications if task.is_classification else others).append(task)
    return classifications[:EXAMPLES], others[:EXAMPLES]


def _one_line(text: str) -> str:
    return " ".join(text.split())


# --- reading ----------------------------------------------------------------------------------------------------------

_MARK = r"[ \t]*(?:[*#>-]+[ \t]*)?"  # of Markdown
_NUMBER = re.compile(rf"^{_MARK}\d{{1,3}}[ \t]*[.．、)）](?!\d)[ \t]*(?:\*\*)?", re.M)


def _marked(names: str) -> re.Pattern[str]:
    return re.compile(
        rf"^{_MARK}(?:\d{{1,3}}[ \t]*[.．、)）][ \t]*)?(?:{names})[ \t]*\d*[ \t]*(?:\*\*)?[ \t]*[:：][ \t]*(?:\*\*)?",
        re.M | re.I,
    )


_INSTRUCTION = _marked("instruction|task|指令|任务")
_INPUT, _OUTPUT = _marked("input|输入"), _marked("output|输出")
_LABEL = _marked("class label|label|类别|标签")
_EXAMPLE = re.compile(
    rf"^{_MARK}(?:example|示例|例子?)[ \t]*(?:\d{{1,3}}[ \t]*(?:\*\*)?[ \t]*[.．:：、]?|[:：](?=[ \t]*$))(?:\*\*)?",
    re.M | re.I,
)
_RULE = re.compile(r"^[ \t]*#{3,}[ \t]*$", re.M)
_NOTHING = re.compile(r"<?no ?input>?|none|n/?a|无|无需输入|（无）|", re.I)


def read_list(reply: str) -> list[Draft]:
    """The instructions of a numbered list; what stands before the first number is none."""
    return [Draft(_one_line(text)) for text in _NUMBER.split(reply)[1:]]


def read_whole_tasks(reply: str) -> list[Draft]:
    """Tasks with their fields, between lines `###`; one without instruction or output has an empty text for it. A block that has
    no field at all is none."""
    drafts = []
    for block in _RULE.split(reply):
        parts = [pattern.split(block, maxsplit=1) for pattern in (_INSTRUCTION, _INPUT, _OUTPUT)]
        if all(len(part) == 1 for part in parts):
            continue
        instruction, given, output = (_before_next_field(part[1]) if len(part) == 2 else "" for part in parts)
        drafts.append(Draft(_one_line(instruction), [(_or_nothing(given), output)]))
    return drafts


def read_kind(reply: str) -> bool | None:
    """None for what is neither yes nor no."""
    found = re.match(r"\W*(?:(yes|是)|(no\b|否|不是))", reply, re.I)
    return None if found is None else found[1] is not None


def read_input_first(reply: str) -> list[Instance]:
    """The (input, output) of examples; one without an output has an empty one."""
    pairs = []
    for text in _examples(reply):
        given, *outputs = _OUTPUT.split(text, maxsplit=1)
        output = _before_next_field(outputs[0]) if outputs else ""
        pairs.append((_or_nothing(_INPUT.sub("", given, count=1)), output))
    return pairs


def read_output_first(reply: str) -> list[Instance]:
    """The (input, label) of examples: a label on a line, and all up to the next one as the input."""
    pairs = []
    for text in _LABEL.split(reply)[1:]:
        label, _, given = text.partition("\n")
        given = _INPUT.sub("", _EXAMPLE.split(given, maxsplit=1)[0], count=1)
        pairs.append((_or_nothing(given), label.strip()))
    return pairs


def _examples(reply: str) -> list[str]:
    parts = _EXAMPLE.split(reply)
    examples = [part for part in parts[1:] if part.strip()]
    # What stands before the first is an example too if it has an output.
    return [part for part in parts[:1] if _OUTPUT.search(part)] + examples


def _before_next_field(text: str) -> str:
    ends = [found.start() for mark in (_INSTRUCTION, _INPUT, _OUTPUT) if (found := mark.search(text))]
    return text[: min(ends, default=len(text))].strip()


def _or_nothing(text: str) -> str:
    text = text.strip()
    return "" if _NOTHING.fullmatch(text) else text
