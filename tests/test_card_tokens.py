"""Tokens that a model has read, as cards of the hub say it: each the wording of a family's card."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from btx.model_files import card_tokens as card_module
from btx.model_files.card_tokens import card_tokens
from btx.model_files.hub import model_card
from btx.planning.plan import plan
from tests.hub_fake import hub_here
from tests.pico_models import llama
from tests.pico_run import pico_recipe

GEMMA_3 = (
    "The 27B model was trained with 14 trillion tokens, the 12B model was trained with 12 trillion\ntokens, 4B model "
    "was trained with 4 trillion tokens, the 1B with 2 trillion tokens, and the 270M\nwith 6 trillion tokens. "
    "Total input context of 128K tokens for the 4B, 12B, and 27B sizes."
)
OLMO_2 = """
| Size | Training Tokens | Layers | Context Length |
|---|---|---|---|
| [OLMo 2-7B](https://hub/7B) | 4 Trillion | 32 | 4096 |
| [OLMo 2-13B](https://hub/13B) | 5 Trillion | 40 | 4096 |

revision="stage1-step140000-tokens294B"

|  | **OLMo 2 7B** | **OLMo 2 13B** |
|---|---|---|
| Pretraining Stage 1 | 4 trillion tokens<br>(1 epoch) | 5 trillion tokens<br>(1.2 epochs) |
| Pretraining Stage 2 | 50B tokens (3 runs) | 100B tokens (3 runs)<br>300B tokens (1 run) |
"""
PYTHIA = (
    "Each model saw **299,892,736,000 tokens** during training, and 143 checkpoints for each model are saved every "
    "2,097,152,000 tokens. All Pythia models trained for 143000 steps at a batch size of 2M (2,097,152 tokens)."
)
SMOLLM = """- **Pretraining steps:** 600k
- **Pretraining tokens:** 600B
- **Datasets:** Cosmopedia v2 (28B tokens), FineWeb-Edu-dedup (220B tokens)"""
LLAMA_2 = """||Training Data|Params|Content Length|GQA|Tokens|LR|
|---|---|---|---|---|---|---|
|Llama 2|*A new mix of data*|7B|4k|&#10007;|2.0T|3.0 x 10<sup>-4</sup>|"""


@pytest.mark.parametrize(("card", "parameters", "tokens"), [
    ("It was pretrained on 2 trillion tokens of text.", 1e9, 2e12), ("trained on up to 9T tokens", 1e9, 9e12),
    ("**36 trillion** tokens", 1e9, 3.6e13), ("on ~15 trillion tokens. | 8B | 128k | 15T+ |", 8e9, 1.5e13),
    ("135M parameters, 600B tokens, then 1.5B more tokens", 135e6, 6e11), ("a nice model", 1e9, 0),
    ("has 7B parameters and 32k tokens of context", 7e9, 0), ("11 trillion high-quality tokens", 1e9, 1.1e13),
    ("a context of 131,072 tokens, up to 1M tokens with YaRN", 7e9, 0), ("on 2-4 trillion tokens", 1e9, 4e12),
    ("Falcon-7B is a 7B model trained on 1,500B tokens of RefinedWeb", 7e9, 1.5e12), (PYTHIA, 1.4e8, 299892736000),
    ("a 15 trillion-token corpus", 8e9, 1.5e13), ("300bn tokens", 1e9, 3e11), ("14 Teratokens of web", 7e9, 1.4e13),
    ("a 1.1B Llama on 3 trillion\ntokens", 1.1e9, 3e12), ("<b>2 trillion</b> tokens", 1e9, 2e12), (SMOLLM, 135e6, 6e11),
    (LLAMA_2, 6.7e9, 2e12), ("| | |\n|---|---|\n| Pretraining tokens | 3+ trillion |", 1e9, 3e12),
    *((GEMMA_3, size, tokens) for size, tokens in ((27.4e9, 1.4e13), (4.3e9, 4e12), (1e9, 2e12), (268e6, 6e12))),
    (OLMO_2, 7.3e9, 4e12), (OLMO_2, 13.7e9, 5e12), ("4T tokens for the 1B model, 8T tokens for the 9B", 1.2e9, 4e12),
    ("Fine-tuned from a Llama on 1.5B tokens of chats.", 1e9, 0), ("continually pre-trained on 50B tokens", 9e9, 0),
    ("The instruct model, fine-tuned on 1B tokens. Pretrained on 4T tokens.", 1e9, 4e12), ("3B tokens per day", 1e9, 0),
    ("trained on 2T tokens, not 1e400 tokens or 9e99 tokens", 1e9, 2e12), ("15 trillions of tokens", 1e9, 1.5e13),
    ("over two trillion tokens", 7e9, 2e12), ("half a trillion tokens", 7e9, 5e11), ("1.5 × 10^13 tokens", 1e9, 1.5e13),
    ("5 x 10<sup>11</sup> tokens", 1e9, 5e11), ("10¹² tokens", 1e9, 1e12), ("300_000_000_000 tokens", 1e9, 3e11),
    ("2 trillion (2T) tokens", 1e9, 2e12), ("15T + tokens", 1e9, 1.5e13), ("15tn tokens", 1e9, 1.5e13),
    ("on 15 trillion high quality and diverse tokens", 8e9, 1.5e13), ("4.1T tokens", 1e9, 4_100_000_000_000),
    ("- Tokens: 15T", 1e9, 1.5e13), ("Total tokens: 2T", 1e9, 2e12), ("Number of tokens: 3T", 1e9, 3e12),
    ("Pretraining tokens: approximately 2T", 1e9, 2e12), ("Training Tokens 1T", 1e9, 1e12),
    ("continued training on additional 2T tokens", 1e9, 0), ("15 TB of text, 5 trillion words", 1e9, 0),
    ("1 trillion parameters and 15.5T tokens", 1e12, 1.55e13), ("a dollar per 1B tokens", 1e9, 0),
    ("one million tokens of context, one of two billion-parameter models on 300B tokens", 2e9, 3e11),
])  # fmt: skip
def test_a_card_says_how_many_tokens_were_read(card: str, parameters: float, tokens: float) -> None:
    assert card_tokens(card, parameters)[0] == tokens


@pytest.mark.parametrize(("card", "tokens"), [
    ("This model was trained on 2 million tokens of text.\nTraining tokens: 2,000,000", 2e6), ("it saw 5M tokens", 5e6),
    ("Pretraining tokens: 50M", 5e7), ("trained for only 500 tokens", 500), ("It has seen over 3,000 tokens.", 3000),
    ("---\ntraining_tokens: 300000000000\n---\n", 3e11), ("---\ntokens_seen: 3e11\n---\n", 3e11),
    ("num-training-tokens: 5e6", 5e6), ("| Training tokens | 4,096 |", 4096), ("training_tokens_per_step: 524288", 0),
    ("trained on 4096 tokens of context", 0), ("trained on 8k tokens windows", 0), ("It can read 4096 tokens", 0),
    ("trained on 4096-token sequences", 0), ("trained with batches of 4M tokens", 0),
    ("trained on 1M tokens per step", 0),
    ("Tokens: 4096", 0), ("token count: 4096", 0), ("trained on 0 tokens", 0), ("trained on 4096 tokens at a time", 0),
])  # fmt: skip
def test_few_tokens_count_where_a_card_says_that_they_were_read(card: str, tokens: float) -> None:
    assert card_tokens(card, 1e4)[0] == tokens


def test_a_size_is_looked_for_once_in_every_cell_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    size = card_module._size

    def counted(text: str) -> float | None:
        asked.append(text)
        return size(text)

    monkeypatch.setattr(card_module, "_size", counted)
    assert card_tokens("|1B" * 500 + "|2T tokens|\n" * 3, 1e9)[0] == 2e12
    assert len(asked) == 503


def test_a_card_of_other_sizes_alone_names_them_all() -> None:
    assert card_tokens("The 27B read 13 trillion tokens, the 9B 8 trillion tokens.", 2e9) == (1.3e13, [8e12, 1.3e13])


def seed_of(path: str, tmp_path: Path, *more: str) -> tuple[float, str]:
    """Tokens that a plan takes a seed model to have read, and where from."""
    overrides = [f"seed_model={{path: '{path}'}}", "data.sequence_length=32", *more]
    prediction = plan(pico_recipe(tmp_path, "run", *overrides))["prediction"]
    return (prediction["seed_tokens"], prediction["source"]) if prediction else (0.0, "")


def test_plan_reads_the_card_of_a_folder_and_says_where_it_had_to_choose(tmp_path: Path) -> None:
    model = llama(tmp_path / "model", 0)
    assert seed_of(str(model), tmp_path) == (0.0, "")
    (model / "README.md").write_text("Pretrained on 2T tokens", "utf-8")
    assert seed_of(str(model), tmp_path) == (2e12, f"the card of {model}")
    (model / "README.md").write_text("The 9B model read 8 trillion tokens, the 27B 13 trillion tokens", "utf-8")
    assert seed_of(str(model), tmp_path) == (
        1.3e13, f"the card of {model}, the most of 8T, 13T there; seed_model.pretrained_tokens says which"
    )  # fmt: skip
    assert seed_of(str(model), tmp_path, "seed_model.pretrained_tokens=8e12")[1] == "seed_model.pretrained_tokens"


def test_plan_reads_the_card_of_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = llama(tmp_path / "made", 0)
    (made / "README.md").write_text("Pretrained on 2T tokens", "utf-8")
    with hub_here(tmp_path / "cache", monkeypatch) as hub:
        hub.put("org/seed", made)
        assert seed_of("hf:org/seed", tmp_path) == (2e12, "the card of org/seed")
        hub.put("org/none", llama(tmp_path / "none", 1))
        assert seed_of("org/none", tmp_path) == (0.0, "")
        hub.refuse["resolve"] = 503
        assert model_card("org/none") == ""
        asked = len(hub.asked)
        assert model_card("org/seed", may_fetch=False) == "Pretrained on 2T tokens"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert model_card("org/seed") == "Pretrained on 2T tokens"
        assert len(hub.asked) == asked
