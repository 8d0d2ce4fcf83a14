"""Cards: what is rendered for a fine-tuned model, and the ones that come with the project."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_cnllm.auto import LINES
from hf_cnllm.hub.model_card import fine_tuned_model_card

CARDS = Path(__file__).parents[2] / "model_cards"


def test_a_card_says_what_was_done(tmp_path):
    card = fine_tuned_model_card(
        "My chat model",
        "baichuan2",
        base_model="baichuan-inc/Baichuan2-7B-Base",
        model_path="me/my-model",
        training={"epochs": 3},
        results={"loss": 0.25},
        samples=[{"question": "你好", "reply": "a | b\n<script>"}],
        loss_curve="loss.png",
    )
    card.save(tmp_path / "README.md")
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.base_model == "baichuan-inc/Baichuan2-7B-Base"
    assert (read.data.license, read.data.license_name) == ("other", "baichuan2-community-license")
    assert read.data.tags == ["hf_cnllm", "baichuan2"]
    for part in (
        'from_pretrained("me/my-model")',
        "| epochs | 3 |",
        "| loss | 0.25 |",
        "(loss.png)",
        "Community License",
    ):
        assert part in read.text
    assert "| 你好 | a \\| b \\<script\\> |" in read.text


def test_weights_of_ones_own_are_under_ones_own_license():
    card = fine_tuned_model_card("Tiny", "qwen")
    assert card.data.license == "apache-2.0" and card.data.base_model is None
    assert "## Samples" not in card.text and "## Training" not in card.text


def test_a_local_path_is_not_given_as_a_hub_name():
    assert fine_tuned_model_card("Mine", "glm", base_model="/data/glm").data.base_model is None


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="origin must be one of"):
        fine_tuned_model_card("x", "bloom")


@pytest.mark.parametrize("family", sorted(LINES))
def test_every_family_has_a_card_for_the_hub(family):
    card = ModelCard.load(CARDS / f"{family}.md")
    assert card.data.library_name == "transformers" and family in card.data.tags and card.data.license == "other"
    for part in ("import hf_cnllm", "from_pretrained(path", "## Usage", "What differs", "## License", "## Limits"):
        assert part in card.text
    usage = card.text.split("```python\n")[1].split("```")[0]
    compile(usage, family, "exec")
    assert len([line for line in usage.splitlines() if line.strip()]) <= 11
