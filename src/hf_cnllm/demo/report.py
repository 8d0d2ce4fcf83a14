"""What a run leaves: the summary of what it measured, on the terminal, as JSON, as a loss curve and as the model card."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..hub.model_card import fine_tuned_model_card
from ..hub.saving import check_new_folder, write_json
from ..training.curves import draw_curves

SUMMARY_FILE = "summary.json"  # written last; it marks a folder as one of ours
LOSS_CURVE_FILE = "loss.png"


@dataclass
class Sample:
    """A question, the reply in the data, and the model's replies by stage."""

    question: str
    expected: str
    replies: dict[str, str] = field(default_factory=dict)

    def told(self) -> dict[str, str]:
        """Question and replies on one short line each; untrained models do not stop by themselves."""
        replies = {stage: " ".join(reply.split()) for stage, reply in self.replies.items()}
        shortened = {stage: line if len(line) <= 72 else line[:71] + "…" for stage, line in replies.items()}
        return {"question": " ".join(self.question.split()), **shortened}


@dataclass
class Summary:
    """Everything that one run measured."""

    checkpoint: str  # where the weights came from
    conversations: dict[str, int]  # use -> how many
    samples: list[Sample]
    family: str = ""  # the line of models, as model cards name it
    parameters: int = 0  # of the model, without the adapter
    # Stage -> use -> mean loss over the replies' tokens in nats (with the max-z term, if the family has one).
    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    # Stage -> share of training questions answered exactly as in the data.
    word_for_word: dict[str, float] = field(default_factory=dict)
    # Stage -> share of replies with the behavior the adapter was to learn, on questions that it never saw; empty for data
    # that defines no such behavior.
    signed_off: dict[str, float] = field(default_factory=dict)
    merge_difference: float = float("nan")  # largest of a logit, between the adapter and the merged weights
    checks: dict[str, bool] = field(default_factory=dict)  # what has to hold
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # training -> (step, loss)
    seconds: dict[str, float] = field(default_factory=dict)  # stage -> how long it took

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        return all(self.checks.values())

    def results(self) -> dict[str, str]:
        """What was measured, name and value, ready to be shown."""
        rows = {}
        for stage, losses in self.losses.items():
            rows[f"loss {stage}"] = ", ".join(f"{use.replace('_', ' ')} {loss:.3f}" for use, loss in losses.items())
        for what, shares in (
            ("training questions answered word for word", self.word_for_word),
            ("replies with the adapter's sign-off", self.signed_off),
        ):
            rows |= {f"{what} {stage}": f"{share:.0%}" for stage, share in shares.items()}
        rows["largest difference of a logit, merged against adapter"] = f"{self.merge_difference:.1e}"
        return rows | {claim: "yes" if held else "NO" for claim, held in self.checks.items()}

    def as_text(self, output: Path) -> str:
        """Lines for the terminal."""
        lines = ["", "Samples"]
        for question, *replies in (sample.told().items() for sample in self.samples):
            lines += [f"  {question[1]}", *(f"    {stage + ':':<24} {reply}" for stage, reply in replies)]
        results = self.results()
        width = max(map(len, results))
        lines += ["", "What was measured", *(f"  {name:<{width}}  {value}" for name, value in results.items())]
        return "\n".join([*lines, "", f"Took {sum(self.seconds.values()):.0f} s. Everything is in {output}"])

    def write(self, folder: Path, **card: Any) -> None:
        """Writes the loss curve, the model card and, last, the summary.

        Args:
            card: for `fine_tuned_model_card`.
        """
        draw_curves(folder / LOSS_CURVE_FILE, self.curves, "training loss (nats)", from_zero=True)
        fine_tuned_model_card(
            f"{self.family}, fine-tuned",
            self.family,
            model_path="finetuned",
            results=self.results(),
            samples=[sample.told() for sample in self.samples],
            loss_curve=LOSS_CURVE_FILE,
            **card,
        ).save(folder / "README.md")
        write_json(folder / SUMMARY_FILE, {**asdict(self), "passed": self.passed})


def check_output(output: Path, overwrite: bool) -> None:
    """Says before any work starts whether `output` may be written.

    Raises:
        FileExistsError: it is a file, or a folder with something in it that must not be replaced.
    """
    is_ours = not output.is_symlink() and (output / SUMMARY_FILE).is_file()
    if not (overwrite and is_ours):
        unknown = f"it holds no {SUMMARY_FILE}, so no earlier run wrote it; it is not replaced"
        check_new_folder(output, unknown if overwrite else "choose another folder or add --overwrite")
