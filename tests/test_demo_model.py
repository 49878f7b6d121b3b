"""The embedded demo model: what ships in workers/zoo/demo loads with stock classes and answers.

Everything runs on one thread with 300 of the 9,673 test questions; TRAINING.md has the whole split.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from workers.zoo import train_demo

FOLDER = Path(train_demo.__file__).parent / "demo"
NUM_QUESTIONS = 300


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(FOLDER)


def test_the_folder_loads_with_stock_classes_and_is_small_enough_to_ship(demo):
    """Nobody should need remote code, torchvision or a download to try prunefleet."""
    model, processor = demo

    num_parameters = sum(weight.numel() for weight in model.parameters())

    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"
    assert num_parameters == 3_688_896
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 12e6
    assert not list(FOLDER.glob("*.py"))


def test_every_tower_linear_can_be_pruned_two_to_four_and_four_to_eight(demo):
    """N:M pruning cuts a row into groups of up to 8 inputs; a remainder would be refused."""
    model, _ = demo

    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}

    assert len(linears) == 4 * 6 + 2 + 4 * 7 + 1  # vision blocks, projector, language blocks, head
    assert {name for name, m in linears.items() if m.in_features % 8} == set()


def test_the_chat_template_renders_an_answer_as_the_prompt_continued(demo):
    """Calibration and repair train on question and answer: it must be the prompt of inference."""
    _, processor = demo

    prompt = processor.apply_chat_template(
        train_demo.messages_for("what shape is present?"), add_generation_prompt=True
    )
    whole = processor.apply_chat_template(
        train_demo.messages_for("what shape is present?", "circle")
    )

    assert prompt == "<bos>user: <image>\nwhat shape is present?\nassistant:"
    assert whole == prompt + " circle<eos>"


def test_the_demo_model_answers_nine_in_ten_and_needs_the_image_for_it():
    """The words of a question alone give about two thirds: a model that is blind would pass 0.6."""
    right = train_demo.evaluate(FOLDER, limit=NUM_QUESTIONS)
    wrong = train_demo.evaluate(FOLDER, limit=NUM_QUESTIONS, wrong_image=True)

    assert right["all"] >= 0.9
    assert wrong["all"] <= right["all"] - 0.15


def test_a_batch_answers_as_its_questions_do_alone(demo):
    """Left padding: prompts of unequal length must not change each other's answers."""
    model, processor = demo
    questions = [
        "what shape is present?",
        "is there not a red shape in the image?",
        "is no circle present?",
    ]
    images = [train_demo.open_image("test", index) for index in range(3)]

    together = train_demo.answer(model, processor, questions, images)

    alone = [
        train_demo.answer(model, processor, [question], [image])[0]
        for question, image in zip(questions, images, strict=True)
    ]
    assert together == alone


def test_packed_questions_have_the_loss_they_have_alone(demo):
    """Training packs questions behind one image; a leak in the mask would go unseen otherwise."""
    model, processor = demo
    image = train_demo.open_image("train", 3)
    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    questions = [q._replace(image=0) for q in train_demo.load_questions("train") if q.image == 3][
        :4
    ]
    train = train_demo.Split(pixels, questions)
    packed = train_demo.Packed(train, processor, num_packed=4)

    with torch.no_grad():
        together = model(pixel_values=pixels, **packed.batch(torch.arange(4)[None])).loss

    alone = []
    for question in questions:
        messages = train_demo.messages_for(question.text, question.answer)
        text = processor.apply_chat_template(messages)
        inputs = processor(images=[image], text=[text], return_tensors="pt")
        labels = inputs["input_ids"].clone()
        labels[:, :-2] = train_demo.IGNORED  # the answer and <eos> are left
        with torch.no_grad():
            alone.append(model(**inputs, labels=labels).loss)
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-3, atol=1e-5)
