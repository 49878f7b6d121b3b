"""Reading datasets: each format, its splits, and what is said of a file that is not right."""

import json
import pydoc_data.topics
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jobs.errors import DataError
from jobs.spec import DatasetSpec
from workers.data import Sample, Split, evenly_spaced, fingerprint_dataset, load_dataset

RED = (255, 0, 0)
SPLITS: tuple[Split, Split] = ("train", "test")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one red image."""
    Image.new("RGB", (8, 8), RED).save(tmp_path / "red.png")
    return tmp_path


def written(file: Path, records: Any) -> str:
    """Write JSON, and give the path as a person writes it."""
    file.write_text(json.dumps(records))
    return str(file)


def llava(folder: Path, *values: Any, **fields: Any) -> DatasetSpec:
    """A LLaVA file with one conversation, its turns alternating human and gpt."""
    turns = [
        {"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)
    ]
    record = {"image": "red.png", "conversations": turns} | fields
    return DatasetSpec(format="llava", path=written(folder / "llava.json", [record]))


def vqa(folder: Path, record: Any) -> DatasetSpec:
    return DatasetSpec(format="vqa", path=written(folder / "vqa.json", [record]))


QUESTION = {"image": "red.png", "question": "what color?", "answer": "red"}


def test_easy_vqa_is_all_there() -> None:
    """As many as its authors say: 38,575 and 9,673, of which the first is known."""
    spec = DatasetSpec(format="easy-vqa")

    train, test = load_dataset(spec, "train"), load_dataset(spec, "test")

    assert (len(train), len(test)) == (38_575, 9_673)
    assert train[0].image is not None
    assert train[0].image.is_file()
    open_questions = load_dataset(DatasetSpec(format="easy-vqa-open"), "test")
    assert len(open_questions) == 2_537
    assert not {"yes", "no"} & {sample.turns[0][1] for sample in open_questions}
    image = train[0].load_image()
    assert image is not None
    assert (image.mode, image.size) == ("RGB", (64, 64))
    assert all(len(sample.turns) == 1 and all(sample.turns[0]) for sample in test)


def test_a_conversation_keeps_its_turns_and_loses_its_placeholder(folder: Path) -> None:
    """The chat template writes the placeholder; a second one would want a second image."""
    spec = llava(folder, "<image>\nwhat color?", "red", "and the shape?", " a square ")

    samples = load_dataset(spec, "train")

    assert samples == [
        Sample(
            image=folder / "red.png",
            turns=(("what color?", "red"), ("and the shape?", "a square")),
        )
    ]


def test_a_conversation_needs_no_image(folder: Path) -> None:
    """LLaVA's own mix has 40,000 such."""
    [sample] = load_dataset(llava(folder, "who?", "me", image=None), "train")

    assert sample.image is None
    assert sample.load_image() is None


def test_images_may_lie_in_a_folder_of_their_own(folder: Path) -> None:
    (folder / "annotations").mkdir()
    spec = vqa(folder / "annotations", QUESTION)

    [sample] = load_dataset(spec.model_copy(update={"images": str(folder)}), "test")

    assert sample.image == folder / "red.png"
    with pytest.raises(DataError, match=r"record 0: image .*annotations/red\.png does not exist"):
        load_dataset(spec, "test")


def test_a_list_and_lines_of_json_are_the_same(folder: Path) -> None:
    """Blank lines between records are common, and harmless."""
    lines = folder / "vqa.jsonl"
    lines.write_text(f"{json.dumps(QUESTION)}\n\n{json.dumps(QUESTION)}\n")

    samples = load_dataset(DatasetSpec(format="vqa", path=str(lines)), "train")

    assert samples == load_dataset(vqa(folder, QUESTION), "train") * 2


def test_a_file_of_annotations_is_used_whole_whatever_asks(folder: Path) -> None:
    spec = vqa(folder, QUESTION)

    assert load_dataset(spec, "train") == load_dataset(spec, "test")


def test_text_is_split_nine_to_one(tmp_path: Path) -> None:
    """Perplexity on text that was calibrated on would flatter."""
    (tmp_path / "t.txt").write_text("abcdefghij" * 10)
    spec = DatasetSpec(format="text", path=str(tmp_path / "t.txt"))

    train, test = load_dataset(spec, "train"), load_dataset(spec, "test")

    assert [sample.text for sample in train + test] == ["abcdefghij" * 9, "abcdefghij"]


def test_a_folder_of_text_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name, text in {"b.txt": "second", "a.txt": "first", "deep/c.txt": "third"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "notes.md").write_text("not read")
    spec = DatasetSpec(format="text", path=str(tmp_path))

    whole = "".join(load_dataset(spec, split)[0].text for split in SPLITS)

    assert whole == "first\n\nsecond\n\nthird"


def test_every_character_of_python_docs_is_in_one_split() -> None:
    topics = pydoc_data.topics.topics

    [train], [test] = (load_dataset(DatasetSpec(format="python-docs"), s) for s in SPLITS)

    assert train.text + test.text == "\n\n".join(topics[name] for name in sorted(topics))
    assert len(train.text) > 8 * len(test.text) > 0


def test_evenly_spaced_items_are_spread_over_the_whole() -> None:
    """The first three of ten would all be of one kind where a file is sorted."""
    samples = [Sample(text=str(number)) for number in range(10)]

    assert [s.text for s in evenly_spaced(samples, 3, "here")] == ["0", "3", "6"]
    assert evenly_spaced(samples, None, "here") == samples
    with pytest.raises(DataError, match="here has 10 samples, 11 were asked for"):
        evenly_spaced(samples, 11, "here")


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(folder: Path) -> None:
    """The same file and images elsewhere are the same data; other images under its names not."""
    (folder / "elsewhere").mkdir()
    shutil.copy(folder / "red.png", folder / "elsewhere")
    here, there = vqa(folder, QUESTION), vqa(folder / "elsewhere", QUESTION)
    other = vqa(folder / "elsewhere", QUESTION | {"answer": "blue"})

    assert other.path == there.path
    prints = [fingerprint_dataset(spec) for spec in (here, there)]
    assert prints[0] != prints[1]  # `there` now holds what `other` wrote

    vqa(folder / "elsewhere", QUESTION)
    assert fingerprint_dataset(there) == prints[0]

    Image.new("RGB", (80, 80), RED).save(folder / "elsewhere" / "red.png")
    assert fingerprint_dataset(there) != prints[0]


def bad_utf8(folder: Path) -> DatasetSpec:
    (folder / "bad").write_bytes(b"caf\xe9")
    return DatasetSpec(format="text", path=str(folder / "bad"))


def bad_json(folder: Path) -> DatasetSpec:
    (folder / "bad").write_text('[{"question": "what color?", ')
    return DatasetSpec(format="vqa", path=str(folder / "bad"))


def bad_json_bytes(folder: Path) -> DatasetSpec:
    (folder / "bad").write_bytes(b'[{"question": "caf\xe9"}]')
    return DatasetSpec(format="llava", path=str(folder / "bad"))


def emptied(spec: DatasetSpec, text: str) -> DatasetSpec:
    assert spec.path is not None
    Path(spec.path).write_text(text)
    return spec


BROKEN: dict[str, tuple[Callable[[Path], DatasetSpec], str]] = {
    "no path": (lambda f: DatasetSpec(format="llava"), "format llava needs a `path`"),
    "no text path": (lambda f: DatasetSpec(format="text"), "format text needs a `path`"),
    "no such file": (
        lambda f: DatasetSpec(format="vqa", path=str(f / "none.json")),
        "none.json does not exist",
    ),
    "a folder": (
        lambda f: DatasetSpec(format="vqa", path=str(f)),
        "is a folder; format vqa wants a JSON file",
    ),
    "broken JSON": (bad_json, "bad is neither a JSON list nor JSON lines"),
    "JSON that is not UTF-8": (bad_json_bytes, "bad is neither a JSON list nor JSON lines"),
    "text that is not UTF-8": (bad_utf8, "bad cannot be read as UTF-8"),
    "an empty list": (lambda f: emptied(vqa(f, QUESTION), "[]"), "vqa has no samples in its train"),
    "an empty file": (lambda f: emptied(vqa(f, QUESTION), ""), "vqa has no samples in its train"),
    "blank text": (
        lambda f: emptied(DatasetSpec(format="text", path=str(f / "t.txt")), " \n \n"),
        "t has no samples in its train",
    ),
    "a folder without text": (
        lambda f: DatasetSpec(format="text", path=str(f)),
        "has no samples in its train",
    ),
    "a record that is a word": (lambda f: vqa(f, "red?"), "record 0 is str, a mapping was"),
    "no answer": (
        lambda f: vqa(f, {"question": "q", "image": "red.png"}),
        r"record 0: needs a string 'answer', has \['image', 'question'\]",
    ),
    "an answer that is a number": (
        lambda f: vqa(f, QUESTION | {"answer": 3}),
        "record 0: needs a string 'answer'",
    ),
    "no such image": (
        lambda f: vqa(f, QUESTION | {"image": "blue.png"}),
        "record 0: image .*blue.png does not exist",
    ),
    "an image name too long": (
        lambda f: vqa(f, QUESTION | {"image": "x" * 300}),
        "record 0: image .*xxx.* does not exist",
    ),
    "no conversation": (lambda f: llava(f), "'conversations' must alternate human and gpt"),
    "half a conversation": (lambda f: llava(f, "who?"), "'conversations' must alternate"),
    "a conversation from its end": (
        lambda f: llava(
            f, conversations=[{"from": "gpt", "value": "me"}, {"from": "human", "value": "who?"}]
        ),
        "'conversations' must alternate",
    ),
    "a turn without a value": (
        lambda f: llava(f, conversations=[{"from": "human"}, {"from": "gpt", "value": "me"}]),
        "a turn needs 'from' and 'value'",
    ),
    "a turn that is a word": (
        lambda f: llava(f, conversations=["who?", "me"]),
        "a turn needs 'from' and 'value'",
    ),
    "a turn that is a number": (lambda f: llava(f, "how many?", 3), "a turn needs 'from' and 'va"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_with_a_dataset_is_said_with_file_and_record(case: str, folder: Path) -> None:
    """A plan says it, so that forty jobs are not started first."""
    make, expected = BROKEN[case]

    with pytest.raises(DataError, match=expected):
        load_dataset(make(folder), "train")


def test_a_text_too_short_for_a_test_split_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("abcdefghi ")
    spec = DatasetSpec(format="text", path=str(tmp_path / "t.txt"))

    assert load_dataset(spec, "train")[0].text == "abcdefghi"
    with pytest.raises(DataError, match="t has no samples in its test split"):
        load_dataset(spec, "test")


def damaged_crc(png: bytes) -> bytes:
    return png.replace(b"IHDR", b"IHDX")


@pytest.mark.parametrize(
    "damage",
    [
        lambda png: b"",
        lambda png: b"<html>404</html>",
        lambda png: png[: len(png) // 2],
        lambda png: png[:20],
        lambda png: png[:-30] + b"\xff" * 30,
        damaged_crc,
    ],
    ids=["empty", "a web page", "half", "its head", "its end overwritten", "its header"],
)
def test_a_broken_image_is_named(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    """In the middle of a run, out of thousands: only the name helps."""
    file = tmp_path / "broken.png"
    Image.effect_noise((32, 32), 50).save(file)
    file.write_bytes(damage(file.read_bytes()))

    with pytest.raises(DataError, match=r"image .*broken\.png cannot be read"):
        Sample(image=file).load_image()


def test_an_image_that_unpacks_to_gigabytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow's own limit, whose error is neither an OSError nor a ValueError."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    file = tmp_path / "bomb.png"
    Image.new("RGB", (8, 8)).save(file)

    with pytest.raises(DataError, match=r"image .*bomb\.png cannot be read"):
        Sample(image=file).load_image()


def test_an_image_that_went_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"image .*gone\.png does not exist"):
        Sample(image=tmp_path / "gone.png").load_image()


def test_every_image_becomes_rgb(tmp_path: Path) -> None:
    """Grey, palette and transparent ones are in every scraped dataset."""
    for mode in ("L", "P", "RGBA", "1"):
        Image.new(mode, (4, 4)).save(tmp_path / "i.png")
        image = Sample(image=tmp_path / "i.png").load_image()
        assert image is not None
        assert image.mode == "RGB"
