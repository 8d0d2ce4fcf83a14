"""Stages that look at one document at a time: heuristics, language, quality, personal data, decontamination."""

import ipaddress
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import regex
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result
from datatrove.pipeline.formatters.base import BaseFormatter
from datatrove.utils.hashing import create_hash_func
from datatrove.utils.text import ngrams, simplify_text

from ..languages import LanguageRule, language_by_script, load_fasttext
from ..records import find_files, read_texts
from .duplicates import NORMALIZED
from .quality import SentenceClassifier, train_classifier
from .texts import ScriptTokenizer

if TYPE_CHECKING:
    from .pipeline import Job

LEAST_TO_REPEAT = 50  # words: in shorter texts, n-grams that occur once are a share that Gopher calls repetition
# What Gopher's rules say about English, said about Chinese, where a word is a character here.
CHINESE_RULES: dict[str, Any] = {
    "min_avg_word_length": 1,
    "max_non_alpha_words_ratio": 0.65,
    "stop_words": list("的了是在和有不我这一他也就人都与为"),
}


class Heuristics(BaseFilter):
    """Gopher's rules on quality and repetition (Rae et al. 2021, table A1), as datatrove has them, by the script of a text."""

    name = "Gopher, by script"

    def __init__(self, min_words: int) -> None:
        super().__init__()
        self.words = ScriptTokenizer()
        self.repetition = GopherRepetitionFilter(language=self.words)
        rules = {"min_doc_words": min_words, "language": self.words}
        self.quality = {"zh": GopherQualityFilter(**rules, **CHINESE_RULES), "en": GopherQualityFilter(**rules)}

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        rules = self.quality["zh" if language_by_script(doc.text)[0] in ("zh", "ja") else "en"]
        passes, reason = get_filter_result(rules.filter(doc))
        if passes and len(self.words.word_tokenize(doc.text)) >= LEAST_TO_REPEAT:
            passes, reason = get_filter_result(self.repetition.filter(doc))
        return passes or (False, reason)


class Language(BaseFilter):
    """Keeps documents of some languages, as `LanguageRule` tells them."""

    name = "language"

    def __init__(self, rule: LanguageRule) -> None:
        super().__init__()
        self.rule = rule

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        reason = self.rule.reason_against(doc.text)
        return reason is None or (False, reason)


def languages(job: "Job") -> list[PipelineStep]:
    settings = job.settings
    if settings.language_model is not None:
        load_fasttext(settings.language_model)
    return [Language(LanguageRule(settings.languages, settings.language_model, settings.language_threshold))]


class TrainQuality(PipelineStep):
    """Trains the classifier of sentences on examples."""

    type, name = "🎓 - TRAIN", "quality"

    def __init__(self, good: list[Path], bad: list[Path], output: str) -> None:
        super().__init__()
        self.examples = {True: good, False: bad}
        self.output = output

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        labeled = [
            (sentence, label)
            for label, places in self.examples.items()
            for text in read_texts(places)
            for sentence in ScriptTokenizer().sent_tokenize(text)
        ]
        train_classifier(labeled).save(Path(self.output))


class SentenceQuality(BaseFilter):
    """Takes sentences out that are probably bad, and documents of which less than half of the characters remain.

    Args:
        model: a folder of `SentenceClassifier.save`.
        threshold: least probability of being good.
    """

    name = "sentence quality"

    def __init__(self, model: str, threshold: float) -> None:
        super().__init__()
        self.model, self.threshold = model, threshold
        self._loaded: SentenceClassifier | None = None

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if self._loaded is None:
            self._loaded = SentenceClassifier.load(Path(self.model))
        spans = ScriptTokenizer().span_tokenize(doc.text)
        scores = self._loaded.score([doc.text[start:end] for start, end in spans])
        kept = [
            doc.text[start:end] for (start, end), score in zip(spans, scores, strict=True) if score >= self.threshold
        ]
        self.stat_update("removed_sentences", value=len(spans) - len(kept))
        text = "".join(kept).strip()
        if len(text) < len(doc.text) / 2:
            return False, "bad_sentences"
        if len(kept) < len(spans):
            doc.text = text
        return True


def sentence_quality(job: "Job") -> list[PipelineStep]:
    settings = job.settings
    model = settings.quality_model
    if model is None:
        if not (settings.quality_good and settings.quality_bad):
            raise ValueError("the stage quality needs --quality-good and --quality-bad examples, or a --quality-model")
        for place in (*settings.quality_good, *settings.quality_bad):
            find_files(place)
        model = job.folder("model")
        job.add_pass([TrainQuality(settings.quality_good, settings.quality_bad, model)], tasks=1)
    else:
        SentenceClassifier.load(Path(model))
    return [SentenceQuality(str(model), settings.quality_threshold)]


def heuristics(job: "Job") -> list[PipelineStep]:
    return [Heuristics(job.settings.min_words)]


# ---- personal data ----


def is_public_address(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


def passes_luhn(text: str) -> bool:
    """ISO/IEC 7812: the check digit of a payment card's number."""
    digits = [int(char) for char in text if char.isdigit()][::-1]
    return (sum(digits[::2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2])) % 10 == 0


def is_citizen_number(text: str) -> bool:
    """GB 11643-1999: the check character of a Chinese citizen's number."""
    total = sum(int(digit) * (2 ** (17 - place) % 11) for place, digit in enumerate(text[:17]))
    return "10X98765432"[total % 11] == text[17].upper()


_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
# What BLOOM masked (Laurençon et al. 2022, section 2.3), with the numbers that people in China have. All quantifiers are bounded,
# so that no text takes long. The order matters: to Luhn's check, one telephone number in ten is a card's.
PERSONAL_DATA: tuple[tuple[str, str, Callable[[str], bool] | None], ...] = (
    ("EMAIL", r"(?<![\w.+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])", None),
    ("IP_ADDRESS", rf"(?<![\d.])(?:{_OCTET}\.){{3}}{_OCTET}(?![\d]|\.\d)", is_public_address),
    ("IP_ADDRESS", r"(?<![\w:])(?:[0-9A-Fa-f]{1,4}:){2,7}[0-9A-Fa-f:]{1,39}(?![\w:])", is_public_address),
    ("ID_NUMBER", r"(?<![0-9A-Za-z])[1-9]\d{16}[\dXx](?![0-9A-Za-z])", is_citizen_number),
    ("PHONE", r"(?<![\d.-])(?:(?:\+|00)86[ -]?)?1[3-9]\d(?:[ -]?\d{4}){2}(?![\d-])", None),
    ("PHONE", r"(?<![\d.-])0\d{2,3}-\d{7,8}(?![\d-])", None),
    ("PHONE", r"(?<![\w.-])(?:\+1[ .-]?)?(?:\(\d{3}\) ?|\d{3}[.-])\d{3}[.-]\d{4}(?![\w-])", None),
    ("PHONE", r"(?<![\w.-])\+\d{1,3}(?:[ -]\d{2,4}){2,4}(?![\w-])", None),
    ("CARD_NUMBER", r"(?<![\d-])\d(?:[ -]?\d){12,18}(?![\d-])", passes_luhn),
    (
        "KEY",
        r"(?<!\w)(?:sk-[A-Za-z0-9_-]{20,200}|AKIA[0-9A-Z]{16}|gh[pousr]_\w{36,255}|hf_[A-Za-z]{30,40})(?!\w)",
        None,
    ),
)


class PersonalData(BaseFormatter):
    """Puts `<EMAIL>`, `<PHONE>`, `<ID_NUMBER>`, `<CARD_NUMBER>`, `<IP_ADDRESS>` (of public networks) or `<KEY>` in the place of
    each, and counts them. Checks what has a check digit. Names and addresses of people stay: they take a model."""

    name = "personal data"

    def __init__(self) -> None:
        super().__init__()
        self.patterns = [(tag, regex.compile(pattern, regex.A), check) for tag, pattern, check in PERSONAL_DATA]

    def format(self, text: str) -> str:
        for tag, pattern, check in self.patterns:

            def mask(found: Any, tag: str = tag, check: Callable[[str], bool] | None = check) -> str:
                if check is not None and not check(found[0]):
                    return found[0]
                self.stat_update(f"masked_{tag}")
                return f"<{tag}>"

            text = pattern.sub(mask, text)
        return text


def personal_data(job: "Job") -> list[PipelineStep]:
    return [PersonalData()]


# ---- decontamination ----


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


class IndexBenchmarks(PipelineStep):
    """Writes the hashed n-grams of all strings of benchmarks' records, as `NGramsDecontFilter` reads them. (datatrove's own step
    for it needs lighteval and its data sets.)"""

    type, name = "🦠 - DECONT", "index of benchmarks"

    def __init__(self, places: list[Path], output: str, config: NGramsDecontConfig) -> None:
        super().__init__()
        self.places, self.output, self.config = places, output, config

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        Path(self.output).mkdir(parents=True, exist_ok=True)
        hashed, words = create_hash_func(self.config.hash_config), ScriptTokenizer()
        for number, place in enumerate(self.places):
            found = set()
            for line in filter(bytes.strip, place.read_bytes().splitlines()):
                try:
                    record = json.loads(line) if place.suffix in (".jsonl", ".json") else line.decode()
                except ValueError as error:
                    raise ValueError(f"--decontaminate {place}: {error}") from error
                for text in _strings(record):
                    tokens = words.word_tokenize(simplify_text(text, self.config.norm_config))
                    grams = [hashed(" ".join(gram)) for gram in ngrams(tokens, self.config.n_grams)]
                    found.update(grams)
                    self.stat_update("strings" if grams else "strings_too_short")
            np.array(sorted(found), dtype=self.config.hash_config.np_descr).tofile(
                Path(self.output, f"{number}-{place.stem}.index.hashes")
            )


def decontamination(job: "Job") -> list[PipelineStep]:
    """Documents that share an n-gram of words with a benchmark go (GPT-3, appendix C; Baichuan 2 and Qwen do it too)."""
    settings = job.settings
    if not settings.decontaminate:
        raise ValueError("the stage decontamination needs --decontaminate FILE…, the benchmarks to keep out")
    if missing := [str(place) for place in settings.decontaminate if not place.is_file()]:
        raise FileNotFoundError(f"--decontaminate: there is no file {', '.join(missing)}")
    if others := [str(place) for place in settings.decontaminate if place.suffix not in (".jsonl", ".json", ".txt")]:
        raise ValueError(f"--decontaminate {', '.join(others)}: expected files that end in .jsonl or .txt")
    config = NGramsDecontConfig(n_grams=settings.decontamination_ngrams, norm_config=NORMALIZED)
    index = job.folder("index")
    job.add_pass([IndexBenchmarks(settings.decontaminate, index, config)], tasks=1)
    return [NGramsDecontFilter(index, config, language=ScriptTokenizer())]
