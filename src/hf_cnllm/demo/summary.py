"""What one run of the demo measured."""

from dataclasses import asdict, dataclass, field
from typing import Any

Curve = list[tuple[int, float]]


@dataclass
class Sample:
    """A question, the reply in the data, and the model's replies by stage."""

    question: str
    expected: str
    replies: dict[str, str] = field(default_factory=dict)


@dataclass
class Summary:
    """Everything that one run measured.

    Attributes:
        family: which of the families.
        checkpoint: where the weights came from.
        parameters: of the model, without the adapter.
        conversations: how many, by use.
        losses: stage -> use -> mean loss over the replies' tokens in nats (with the max-z term, if the family has one).
        word_for_word: stage -> share of training questions answered exactly as in the data.
        signed_off: stage -> share of replies with the behaviour the adapter was to learn, on questions that it never
            saw; empty for data that defines no such behaviour.
        merge_difference: largest difference of a logit between the adapter and the merged weights.
        checks: what has to hold.
        curves: training -> (step, loss).
        seconds: stage -> how long it took.
    """

    family: str
    checkpoint: str
    parameters: int
    conversations: dict[str, int]
    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    word_for_word: dict[str, float] = field(default_factory=dict)
    signed_off: dict[str, float] = field(default_factory=dict)
    merge_difference: float = float("nan")
    samples: list[Sample] = field(default_factory=list)
    checks: dict[str, bool] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        return all(self.checks.values())

    def results(self) -> dict[str, str]:
        """What was measured, name and value, ready to be shown."""
        rows = {}
        for stage, by_use in self.losses.items():
            rows[f"loss {stage}"] = ", ".join(f"{use.replace('_', ' ')} {value:.3f}" for use, value in by_use.items())
        for stage, share in self.word_for_word.items():
            rows[f"training questions answered word for word {stage}"] = f"{share:.0%}"
        for stage, share in self.signed_off.items():
            rows[f"replies with the adapter's sign-off {stage}"] = f"{share:.0%}"
        rows["largest difference of a logit, merged against adapter"] = f"{self.merge_difference:.1e}"
        for check, held in self.checks.items():
            rows[check] = "yes" if held else "NO"
        return rows

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}
