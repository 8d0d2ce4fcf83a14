"""The corpus pipeline: stages become passes over the documents, which an executor of datatrove's runs task by task.

    settings = Settings(input=[Path("crawl")], output=Path("corpus"), stages=("exact", "minhash"))
    run(settings)

A pass reads what the one before it wrote. A task marks its end, so a run that was killed goes on at the tasks that had not come
to theirs; they write their files anew. The output folder gets its contents, by renaming, when all is done.
"""

import dataclasses
import inspect
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.pipeline.base import PipelineStep

from ...hub.saving import write_json
from ..owned_folder import owned_folder
from ..records import MAX_LINE_BYTES, SHARD_BYTES, Piece, Shard, plan_shards
from . import statistics
from .duplicates import exact_duplicates, near_duplicates, repeated_paragraphs, repeated_sentences
from .embeddings import semantic_duplicates
from .executors import EXECUTORS, LOGS, WORKERS, wait_for_workers
from .filters import decontamination, heuristics, languages, personal_data, sentence_quality
from .steps import Measure, Mix, RecordReader, RecordWriter
from .tokens import TOKENS, pack_tokens

WORK, DOCUMENTS = "work", "documents"
NO_LIMIT = 1 << 62
MAY_DIFFER = {"executor", "executor_options", "workers"}  # between a run and the one that goes on with it

OUR_OPTIONS = {"pipeline", "tasks", "workers", "logging_dir", "depends", "job_name"}  # of executors

RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("shard_bytes", "max_line_bytes", "decontamination_ngrams", "sequence_length"), (1, NO_LIMIT)),
    **dict.fromkeys(("jaccard", "embedding_threshold", "language_threshold", "quality_threshold"), (0, 1)),
    "weights": (0, 1000),
}


@dataclasses.dataclass
class Settings:
    """What a corpus is made of, and how. Paths of files are read by all tasks, so on a cluster they must be on a shared disk."""

    input: Sequence[Path]
    output: Path
    stages: Sequence[str] = ("exact", "minhash")
    executor: str = "local"
    executor_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    workers: int = 1
    shard_bytes: int = SHARD_BYTES
    max_line_bytes: int = MAX_LINE_BYTES
    jaccard: float = 0.6
    min_paragraph_words: int = 5
    embedder: str | None = None
    embedding_threshold: float = 0.95
    languages: Sequence[str] = ("zh", "en")
    language_model: str | None = None
    language_threshold: float = 0.5
    min_words: int = 50
    quality_good: list[Path] = dataclasses.field(default_factory=list)
    quality_bad: list[Path] = dataclasses.field(default_factory=list)
    quality_model: str | None = None
    quality_threshold: float = 0.5
    decontaminate: list[Path] = dataclasses.field(default_factory=list)
    decontamination_ngrams: int = 12
    weights: Sequence[float] = ()
    tokenizer: str | None = None
    sequence_length: int = 4096


class Pass(NamedTuple):
    """One run of an executor."""

    name: str
    pipeline: list[PipelineStep]
    tasks: int
    documents: Path | None  # the folder of the documents that it writes or reads


class Job:
    """Collects the passes of a run. A stage adds those that look at the documents as they are so far, and gives the steps that
    change them; these join the next pass that writes."""

    def __init__(self, settings: Settings, shards: Sequence[Shard], work: Path) -> None:
        self.settings, self.shards, self.work = settings, shards, work
        self.passes: list[Pass] = []
        self.stage = "input"
        self.written: Path | None = None  # the folder of the documents as they are so far
        self._steps = self._named([self._reader(), Measure()])

    def folder(self, name: str) -> str:
        """Where a stage keeps what its passes hand on."""
        return str(self.work / self.stage / name)

    def add_pass(self, pipeline: list[PipelineStep], tasks: int | None = None) -> None:
        """Adds a pass of one task for each shard, or of `tasks`."""
        name = f"{len(self.passes):02d}-{self.stage}"
        self.passes.append(Pass(name, self._named(pipeline), tasks or len(self.shards), self.written))

    def add_stage(self, name: str) -> None:
        self.stage = name
        steps = self._named([*STAGES[name](self), Measure()])
        self._steps = [*(self._steps or [self._reader()]), *steps]

    def documents(self) -> RecordReader:
        """A reader of the documents after all stages so far."""
        if (self.written is None and len(self._steps) > 2) or (self.written and self._steps):
            steps, self._steps = self._steps, []
            self.written = self.work / f"{len(self.passes):02d}-{DOCUMENTS}"
            self.add_pass([*steps, RecordWriter(str(self.written))])
        return self._reader()

    def _reader(self) -> RecordReader:
        if self.written is None:
            return RecordReader(self.shards, self.settings.max_line_bytes)
        paths = [str(self.written / f"{task:05d}.jsonl") for task in range(len(self.shards))]
        shards = [Shard(shard.source, (Piece(path, path),)) for shard, path in zip(self.shards, paths, strict=True)]
        return RecordReader(shards, NO_LIMIT, missing_ok=True)

    def _named(self, steps: list[PipelineStep]) -> list[PipelineStep]:
        """Has the steps' counts told by stage."""
        for step in steps:
            if "/" not in step.stats.name:
                step.stats.name = f"{self.stage}/{step.name}"
        return steps


def mixing(job: Job) -> list[PipelineStep]:
    weights = job.settings.weights
    if len(weights) != len(job.settings.input) or min(weights, default=0) < 0:
        raise ValueError(
            f"the stage mix needs --weights, none negative, one for each --input: {len(job.settings.input)}"
        )
    return [Mix([weights[shard.source] for shard in job.shards])]


STAGES: dict[str, Callable[[Job], list[PipelineStep]]] = {
    "exact": exact_duplicates,
    "language": languages,
    "heuristics": heuristics,
    "quality": sentence_quality,
    "paragraph": repeated_paragraphs,
    "sentence": repeated_sentences,
    "minhash": near_duplicates,
    "embedding": semantic_duplicates,
    "decontamination": decontamination,
    "pii": personal_data,
    "mix": mixing,
}


class NoRecordError(ValueError):
    """The input holds nothing to make a corpus of."""


class Publish(PipelineStep):
    """Moves the results to their places, and writes the picture and, last, the statistics.

    Args:
        moves: (folder, its place). A folder that has moved already, and one that no document reached, is not there.
    """

    type, name = "📦 - PUBLISH", "results"

    def __init__(self, moves: list[tuple[str, str]], logs: list[str], stages: Sequence[str]) -> None:
        super().__init__()
        self.moves, self.logs, self.stages = moves, logs, stages

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        summary = statistics.summarize(statistics.count(self.logs), self.stages)
        if not summary["input"]["documents"]:
            raise NoRecordError(f"no record with a text in the input: {json.dumps(summary['input'])}")
        for folder, place in self.moves:
            if Path(folder).exists():
                Path(folder).rename(place)
            Path(place).mkdir(exist_ok=True)
        output = Path(self.moves[0][1]).parent
        statistics.draw_funnel(summary, output / statistics.FUNNEL_FILE)
        write_json(output / statistics.STATISTICS_FILE, summary)


def plan(settings: Settings) -> list[Pass]:
    """The passes of a run, in order.

    Raises:
        ValueError, OSError: a stage, an option or the input is not as it must be.
    """
    for name, known in (("stages", STAGES), ("executor", EXECUTORS)):
        value = getattr(settings, name)
        if unknown := sorted({*([value] if isinstance(value, str) else value)} - {*known}):
            raise ValueError(f"--{name} {','.join(unknown)}: choose from {', '.join(known)}")
    if not settings.stages or len(set(settings.stages)) < len(settings.stages):
        raise ValueError("--stages: name at least one stage, and none twice")
    if "mix" in settings.stages and settings.stages[-1] != "mix":
        raise ValueError("--stages: mix repeats documents, so it must be the last")
    if missing := [name for name in EXECUTORS[settings.executor][2] if name not in settings.executor_options]:
        raise ValueError(
            f"--executor {settings.executor} needs --executor-options {' '.join(f'{n}=…' for n in missing)}"
        )
    options = inspect.signature(EXECUTORS[settings.executor][1]).parameters.keys() - OUR_OPTIONS
    if others := sorted(settings.executor_options.keys() - options):
        raise ValueError(f"--executor-options {' '.join(others)}: choose from {', '.join(sorted(options))}")
    for name, (least, most) in RANGES.items():
        values = getattr(settings, name)
        if not all(least <= value <= most for value in (values if isinstance(values, list | tuple) else [values])):
            raise ValueError(f"--{name.replace('_', '-')} must be from {least} to {most}, got {values}")
    if inside := [place for place in settings.input if place.resolve() in settings.output.resolve().parents]:
        raise ValueError(
            f"--output {settings.output} is in --input {inside[0]}, and would be read as input: move it out"
        )
    job = Job(settings, plan_shards(settings.input, settings.shard_bytes), settings.output / WORK)
    for name in settings.stages:
        job.add_stage(name)
    job.documents()
    moves = [(str(job.written), str(settings.output / DOCUMENTS))]
    if settings.tokenizer is not None:
        job.stage = TOKENS
        pack_tokens(job)
        moves.append((str(job.work / TOKENS), str(settings.output / TOKENS)))
    job.stage = "publish"
    job.add_pass([Publish(moves, [str(job.work / LOGS / each.name) for each in job.passes], settings.stages)], tasks=1)
    return job.passes


def run(settings: Settings) -> dict[str, Any] | None:
    """Makes the corpus, or goes on with making it: `documents/`, `tokens/` (with a tokenizer), `funnel.png` and
    `statistics.json` in the output folder, whose contents it returns. On Slurm the passes are only submitted, and None is
    returned.

    Raises:
        FileExistsError: the output folder has something else in it.
        ValueError: it is another run's, or in use; or as `plan`.
        OSError: the disk is full, a file cannot be read. The next run goes on from there.
    """
    output = settings.output
    passes = plan(settings)
    result, work = output / statistics.STATISTICS_FILE, output / WORK
    with owned_folder(output, _identity(settings)):
        if not result.exists():
            wait_for_workers(work)
            how, kind, _ = EXECUTORS[settings.executor]
            try:
                for done in how(kind, passes, work, settings.workers, **settings.executor_options):
                    print(f"{done.name}: done", flush=True)
                    _remove_what_is_used_up(work, done)
            except NoRecordError:  # there is nothing to go on with
                shutil.rmtree(output)
                raise
        if not result.exists():
            return None
        shutil.rmtree(work, ignore_errors=True)
        return json.loads(result.read_text(encoding="utf-8"))


def _remove_what_is_used_up(work: Path, done: Pass) -> None:
    """After a pass that wrote documents, all that was made before."""
    if isinstance(done.pipeline[-1], RecordWriter):
        for path in work.iterdir():
            if path not in (done.documents, work / LOGS, work / WORKERS):
                shutil.rmtree(path)


def _identity(settings: Settings) -> dict[str, Any]:
    """What must be the same for a run to be gone on with."""
    told = {name: value for name, value in dataclasses.asdict(settings).items() if name not in MAY_DIFFER | {"output"}}
    files = {piece.path for shard in plan_shards(settings.input) for piece in shard.pieces}
    stats = {path: os.stat(path) for path in sorted(files)}
    told["files"] = {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}
    return json.loads(json.dumps(told, default=str))
