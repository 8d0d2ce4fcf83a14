"""Why a task or an instance is not taken: the heuristics of Self-Instruct (section 2.2, "filtering and postprocessing", and
the authors' code), said for Chinese too. The first reason counts."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from ..languages import WORD, language_of

Instance = tuple[str, str]  # input, output
SHORTEST, LONGEST = {"en": 4, "zh": 5}, {"en": 150, "zh": 300}  # words of an instruction; in Chinese, characters
# What a model of texts cannot see or make.
FORBIDDEN = re.compile(
    r"\b(?:images?|graphs?|pictures?|files?|maps?|draw|plot|go to|videos?|audio)\b"
    r"|图片|图像|图表|图形|照片|截图|文件|地图|绘制|画一|画出|视频|音频|链接",
    re.I,
)
PROGRAM = re.compile(r"write a program\b|(?:请)?(?:帮我)?(?:编写|写)一?[个段]?程序", re.I)
BROKEN = re.compile(r"[\ufffd\ud800-\udfff\x00-\x08\x0e-\x1f]")  # halves of characters, and control characters


def _length(text: str) -> int:
    return sum(word[0].isalnum() for word in WORD.findall(text))


def _begins_with(category: str) -> Callable[[str], bool]:
    return lambda text: unicodedata.category(text[0])[0] in category


INSTRUCTION_RULES: tuple[tuple[str, Callable[[str], object]], ...] = (
    ("blank", lambda text: not text.strip()),
    ("broken_characters", BROKEN.search),
    ("begins_with_punctuation", _begins_with("PSZC")),
    ("begins_with_another_script", lambda text: not (text[0].isascii() or language_of(text[0]) == "zh")),
    ("too_short", lambda text: _length(text) < SHORTEST[language_of(text)]),
    ("too_long", lambda text: _length(text) > LONGEST[language_of(text)]),
    ("forbidden_word", FORBIDDEN.search),
    ("write_a_program", PROGRAM.match),
)
INSTANCE_RULES: tuple[tuple[str, Callable[[str, str], object]], ...] = (
    ("broken_characters", lambda given, output: BROKEN.search(given + output)),
    ("output_blank", lambda given, output: not output.strip()),
    ("output_equals_input", lambda given, output: given.strip() == output.strip()),
    ("ends_with_colon", lambda given, output: given.rstrip().endswith((":", "：")) or output.endswith((":", "："))),
)


def against_instruction(text: str) -> str | None:
    """The reason not to take it."""
    return next((reason for reason, applies in INSTRUCTION_RULES if applies(text)), None)


def against_instances(instances: Sequence[Instance], most: int) -> list[str | None]:
    """The reason not to take each instance of a task: by itself, or because of the others.

    Args:
        most: to take; those behind are `too_many`.
    """
    reasons = [next((reason for reason, applies in INSTANCE_RULES if applies(*pair)), None) for pair in instances]
    outputs = Counter(
        given for given, _ in {pair for pair, why in zip(instances, reasons, strict=True) if why is None}
    )
    taken: set[Instance] = set()
    for index, (given, output) in enumerate(instances):
        if reasons[index] is not None:
            continue
        if given and outputs[given] > 1:
            reasons[index] = "same_input_other_output"
        elif (given, output) in taken:
            reasons[index] = "double"
        elif len(taken) == most:
            reasons[index] = "too_many"
        else:
            taken.add((given, output))
    return reasons
