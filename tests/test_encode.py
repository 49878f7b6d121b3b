"""From samples to tensors: which tokens are learnt, how batches are padded, what a seed chooses."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from jobs.errors import DataError, ModelError
from jobs.spec import DatasetSpec
from tests.families import make_tiny
from workers.data import Sample
from workers.encode import IGNORED_LABEL, Encoded, Encoder, collate, text_windows
from workers.models import VisionLanguageModel, load_model

NUM_PATCHES = 16
CPU = torch.device("cpu")
EASY = DatasetSpec(format="easy-vqa")
DOCS = DatasetSpec(format="python-docs")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    return load_model(make_tiny("llava-clip", tmp_path_factory.mktemp("m") / "tiny"), device=CPU)


@pytest.fixture
def encoder(model: VisionLanguageModel) -> Encoder:
    return Encoder(model)


@pytest.fixture
def untemplated(tmp_path: Path) -> Encoder:
    """Of a model that comes without a chat template, as the first LLaVAs did."""
    folder = make_tiny("llava-clip", tmp_path / "old")
    (folder / "chat_template.jinja").unlink()
    return Encoder(load_model(folder, device=CPU))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64), (255, 0, 0)).save(tmp_path / "red.png")
    return tmp_path / "red.png"


def learnt(encoder: Encoder, sample: dict[str, Tensor]) -> list[str]:
    """The stretches of tokens that have labels, as text."""
    stretches: list[list[int]] = []
    was_learnt = False
    for token, label in zip(sample["input_ids"].tolist(), sample["labels"].tolist(), strict=True):
        if label != IGNORED_LABEL:
            assert label == token
            if not was_learnt:
                stretches.append([])
            stretches[-1].append(token)
        was_learnt = label != IGNORED_LABEL
    return [encoder.tokenizer.decode(stretch) for stretch in stretches]


ONE_TURN = (("what color is the shape?", "red"),)
THREE_TURNS = (
    ("what color is the shape?", "red"),
    ("is there a circle?", "yes there is"),
    ("is it blue?", "no"),
)


def test_the_answer_and_its_end_are_learnt_and_nothing_else(encoder: Encoder, image: Path) -> None:
    """Without the end-of-sequence token among them a model would never stop answering."""
    sample = encoder.supervised(Sample(image=image, turns=ONE_TURN))

    assert learnt(encoder, sample) == ["red <eos>"]
    assert set(sample) == {"input_ids", "attention_mask", "labels", "pixel_values"}
    assert int((sample["input_ids"] == encoder.processor.image_token_id).sum()) == NUM_PATCHES
    assert sample["pixel_values"].shape == (3, 64, 64)


def test_every_answer_of_a_conversation_is_learnt(encoder: Encoder, image: Path) -> None:
    """LLaVA's conversations have five turns on average; the last one alone is a fifth of them."""
    sample = encoder.supervised(Sample(image=image, turns=THREE_TURNS))

    assert learnt(encoder, sample) == ["red <eos>", "yes there is <eos>", "no <eos>"]
    assert int((sample["input_ids"] == encoder.processor.image_token_id).sum()) == NUM_PATCHES


def test_a_sample_without_an_image_has_no_pixels(encoder: Encoder) -> None:
    sample = encoder.supervised(Sample(turns=ONE_TURN))

    assert learnt(encoder, sample) == ["red <eos>"]
    assert set(sample) == {"input_ids", "attention_mask", "labels"}
    assert not (sample["input_ids"] == encoder.processor.image_token_id).any()


@pytest.mark.parametrize("turns", [ONE_TURN, THREE_TURNS])
def test_a_prompt_is_what_training_showed_before_the_last_answer(
    encoder: Encoder, image: Path, turns: tuple[tuple[str, str], ...]
) -> None:
    """A space more or less at the seam, and the model is asked what it was never taught."""
    sample = Sample(image=image, turns=turns)

    prompt = encoder.prompts([sample])["input_ids"][0]

    whole = encoder.supervised(sample)
    last = len(turns[-1][1].split()) + 1
    assert torch.equal(prompt, whole["input_ids"][:-last])
    assert (whole["labels"][:-last][-1] == IGNORED_LABEL).all()


def test_prompts_are_padded_on_the_left(encoder: Encoder, image: Path) -> None:
    """Generation goes on at the right end, which must be the prompt's."""
    long = Sample(image=image, turns=(("is there a red circle in the image?", "no"),))
    short = Sample(image=image, turns=(("is there?", "no"),))

    batch = encoder.prompts([long, short])

    alone = encoder.prompts([short])["input_ids"][0]
    padding = batch["input_ids"].shape[1] - len(alone)
    assert padding == 6
    assert batch["attention_mask"].tolist()[1] == [0] * padding + [1] * len(alone)
    assert batch["input_ids"].tolist()[1] == [encoder.pad_id] * padding + alone.tolist()
    assert batch["pixel_values"].shape == (2, 3, 64, 64)


def test_prompts_without_images_are_padded_too(encoder: Encoder) -> None:
    batch = encoder.prompts([Sample(turns=(("is there?", "no"),)), Sample(turns=ONE_TURN)])

    assert "pixel_values" not in batch
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]
    assert batch["attention_mask"][0, 0] == 0


def test_a_tokenizer_without_a_padding_token_pads_with_its_end(tmp_path: Path) -> None:
    """Llama's has none. What pads is masked, so any token does."""
    model = load_model(make_tiny("llama", tmp_path / "m"), device=CPU)
    model.tokenizer.pad_token = None
    encoder = Encoder(model)

    batch = encoder.prompts([Sample(turns=(("is there?", "no"),)), Sample(turns=ONE_TURN)])

    assert encoder.pad_id == model.tokenizer.eos_token_id
    assert batch["attention_mask"].sum(dim=1).tolist() == [
        len(encoder.prompts([Sample(turns=turns)])["input_ids"][0])
        for turns in ((("is there?", "no"),), ONE_TURN)
    ]


def test_a_model_without_a_template_gets_the_form_of_llava_1_5(
    untemplated: Encoder, image: Path
) -> None:
    """As in its conversation `v1`: USER, ASSISTANT, an end after every answer."""
    sample = Sample(image=image, turns=THREE_TURNS[:2])

    assert untemplated.render(sample, num_answers=0) == (
        "USER: <image>\nwhat color is the shape? ASSISTANT:"
    )
    assert untemplated.render(sample, num_answers=1) == (
        "USER: <image>\nwhat color is the shape? ASSISTANT: red<eos>"
        "USER: is there a circle? ASSISTANT:"
    )
    assert untemplated.render(sample, num_answers=2) == (
        "USER: <image>\nwhat color is the shape? ASSISTANT: red<eos>"
        "USER: is there a circle? ASSISTANT: yes there is<eos>"
    )


def test_a_model_without_a_template_learns_the_same_answers(
    untemplated: Encoder, image: Path
) -> None:
    sample = untemplated.supervised(Sample(image=image, turns=THREE_TURNS))

    assert learnt(untemplated, sample) == ["red <eos>", "yes there is <eos>", "no <eos>"]


def test_a_template_that_rewrites_the_past_is_an_error(
    model: VisionLanguageModel, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some templates mark the newest question; then a prefix is no prefix, and labels would lie."""
    template = "{% if add_generation_prompt %}<bos>{% endif %}{% for m in messages %}a{% endfor %}"
    monkeypatch.setattr(model.processor, "chat_template", template)

    with pytest.raises(ModelError, match="does not render a question the same way"):
        Encoder(model).supervised(Sample(turns=ONE_TURN))


def test_the_seed_chooses_the_samples(encoder: Encoder) -> None:
    """Same seed, same samples in the same order; and one seed is not all seeds."""
    first, again, other = (
        Encoded(encoder, EASY, count=4, length=8, seed=seed) for seed in (0, 0, 1)
    )

    assert first.chosen == again.chosen
    assert first.chosen != other.chosen
    assert len(first) == 4
    for one, two in zip(first, again, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_others_can_be_chosen_than_were_chosen_before(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("red blue green teal gray black")
    spec = DatasetSpec(format="text", path=str(tmp_path / "t.txt"))

    def chosen(count: int, *, unlike: int) -> set[str]:
        windows = Encoded(encoder, spec, count=count, length=1, seed=0, unlike=unlike)
        return {encoder.tokenizer.decode(window) for window in windows.chosen}

    before, others = chosen(4, unlike=0), chosen(2, unlike=4)
    assert (len(before), len(others)) == (4, 2)
    assert before | others == chosen(6, unlike=0)
    assert len(before | others) == 6
    with pytest.raises(DataError, match="6 windows of text, 4 and then 3 were asked for"):
        chosen(3, unlike=4)


def test_text_is_cut_into_windows_of_one_length(encoder: Encoder) -> None:
    """Every token of them is learnt: plain text has no question."""
    windows = Encoded(encoder, DOCS, count=3, length=8, seed=0)

    for window in windows:
        assert window["input_ids"].shape == (8,)
        assert torch.equal(window["labels"], window["input_ids"])
        assert window["attention_mask"].tolist() == [1] * 8


def test_windows_do_not_overlap_and_a_short_rest_is_left_out(encoder: Encoder) -> None:
    windows = text_windows(encoder, "red blue green teal gray black yellow", 3)

    assert [encoder.tokenizer.decode(window) for window in windows] == [
        "red blue green",
        "teal gray black",
    ]


def test_more_samples_than_there_are_is_an_error_unless_all_will_do(
    encoder: Encoder, tmp_path: Path
) -> None:
    """Calibrating on fewer than the row says would be a silent fallback."""
    (tmp_path / "t.txt").write_text("red blue green teal gray black yellow " * 2)
    spec = DatasetSpec(format="text", path=str(tmp_path / "t.txt"))

    with pytest.raises(DataError, match="t has 4 windows of text, 5 were asked for"):
        Encoded(encoder, spec, count=5, length=3, seed=0)
    with pytest.raises(DataError, match="easy-vqa has 38575 samples, 38576 were asked for"):
        Encoded(encoder, EASY, count=38_576, length=3, seed=0)
    assert len(Encoded(encoder, spec, count=5, length=3, seed=0, or_all=True)) == 4


def test_text_shorter_than_a_window_is_an_error_also_where_all_would_do(
    encoder: Encoder, tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_text("red blue green")
    spec = DatasetSpec(format="text", path=str(tmp_path / "t.txt"))

    with pytest.raises(DataError, match="t has 0 windows of text"):
        Encoded(encoder, spec, count=5, length=8, seed=0, or_all=True)


def test_a_batch_is_padded_on_the_right_and_padding_is_not_learnt() -> None:
    """B=2, T=3; the images stacked to (2, 3, 4, 4)."""
    samples = [
        {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.ones(len(ids), dtype=torch.int64),
            "labels": torch.tensor(ids),
            "pixel_values": torch.zeros(3, 4, 4),
        }
        for ids in ([7, 8, 9], [5])
    ]

    batch = collate(samples, pad_id=0)

    assert batch["input_ids"].tolist() == [[7, 8, 9], [5, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[7, 8, 9], [5, -100, -100]]
    assert batch["pixel_values"].shape == (2, 3, 4, 4)


def test_a_batch_may_mix_samples_with_and_without_images(encoder: Encoder, image: Path) -> None:
    """As many pictures as samples have one: the model tells by the placeholders whose is whose."""
    samples = [Sample(turns=ONE_TURN), Sample(image=image, turns=ONE_TURN), Sample(turns=ONE_TURN)]

    batch = collate([encoder.supervised(sample) for sample in samples], encoder.pad_id)

    assert batch["pixel_values"].shape == (1, 3, 64, 64)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
