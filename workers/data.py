"""Datasets as lists of samples: what ships, LLaVA's JSON, question-answer files, plain text.

All from local files. Free of torch, so that a plan can check a dataset before anything costly
starts.

Sources: easy-VQA (Victor Zhou, MIT) comes from the PyPI package `easy-vqa`; the text of
`python-docs` is `pydoc_data.topics`, part of Python (PSF licence).
"""

import hashlib
import importlib.util
import json
import os
import pydoc_data.topics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from jobs.errors import DataError
from jobs.spec import DatasetSpec

Split = Literal["train", "test"]

TEXT_TRAIN_FRACTION = 0.9
"""The rest of a text is its test split, so that perplexity is not measured on calibration text."""


_BROKEN_IMAGE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises. A file that is no image is an OSError, a broken chunk a SyntaxError."""


EASY_VQA = ("easy-vqa", "easy-vqa-open")


@dataclass(frozen=True)
class Sample:
    """One image (or none) with a conversation about it, or a stretch of plain text."""

    image: Path | None = None
    turns: tuple[tuple[str, str], ...] = ()
    """(question, answer) pairs, without an image placeholder."""
    text: str = ""
    """Plain text; then there are no turns."""

    def load_image(self) -> Image.Image | None:
        """The image as RGB, or None for a sample without one.

        Raises:
            DataError: the file is missing or is no image.
        """
        if self.image is None:
            return None
        try:
            with Image.open(self.image) as image:
                return image.convert("RGB")
        except FileNotFoundError:
            raise DataError(f"image {self.image} does not exist") from None
        except _BROKEN_IMAGE as error:
            raise DataError(f"image {self.image} cannot be read: {error}") from error


def load_dataset(spec: DatasetSpec, split: Split) -> list[Sample]:
    """Every sample of a split, in the file's order.

    Only easy-vqa and text have splits; an annotation file is used whole for whatever names it.

    Raises:
        DataError: a file that is missing, broken or empty, a record that lacks a field, an image
            that does not exist.
    """
    if spec.format in EASY_VQA:
        samples = _easy_vqa(split, open_only=spec.format == "easy-vqa-open")
    elif spec.is_text:
        samples = _split_text(_read_text(spec), split)
    else:
        samples = _annotations(spec)
    if not samples:
        raise DataError(f"dataset {spec.label} has no samples in its {split} split")
    return samples


def evenly_spaced(samples: Sequence[Sample], count: int | None, where: str) -> list[Sample]:
    """`count` samples spread over the whole sequence, always the same ones.

    Raises:
        DataError: fewer samples than asked for.
    """
    if count is None:
        return list(samples)
    if count > len(samples):
        raise DataError(f"{where} has {len(samples)} samples, {count} were asked for")
    return [samples[i * len(samples) // count] for i in range(count)]


def fingerprint_dataset(spec: DatasetSpec) -> str:
    """Hash of the annotations (or the text), 16 hex digits. Images count by name and size."""
    if spec.is_text:
        return hashlib.sha256(_read_text(spec).encode()).hexdigest()[:16]
    files = (
        [_easy_vqa_folder() / split / "questions.json" for split in ("train", "test")]
        if spec.format in EASY_VQA
        else [_annotation_file(spec)]
    )
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    if spec.format not in EASY_VQA:
        for image in sorted({sample.image for sample in _annotations(spec) if sample.image}):
            digest.update(f"{image.name} {image.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


def _easy_vqa_folder() -> Path:
    found = importlib.util.find_spec("easy_vqa")
    if found is None or found.origin is None:
        raise DataError("dataset easy-vqa needs the package easy-vqa: pip install easy-vqa==1.0")
    return Path(found.origin).parent / "data"


def _easy_vqa(split: Split, *, open_only: bool) -> list[Sample]:
    folder = _easy_vqa_folder() / split
    records = json.loads((folder / "questions.json").read_text())
    images = {i: folder / "images" / f"{i}.png" for i in {record[2] for record in records}}
    return [
        Sample(image=images[image_id], turns=((question, answer),))
        for question, answer, image_id in records
        if not (open_only and answer in ("yes", "no"))
    ]


def _read_text(spec: DatasetSpec) -> str:
    if spec.format == "python-docs":
        topics: Mapping[str, str] = pydoc_data.topics.topics
        return "\n\n".join(topics[name] for name in sorted(topics))
    path = _existing_path(spec)
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    try:
        return "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"text {path} cannot be read as UTF-8: {error}") from error


def _split_text(text: str, split: Split) -> list[Sample]:
    cut = int(len(text) * TEXT_TRAIN_FRACTION)
    part = text[:cut] if split == "train" else text[cut:]
    return [Sample(text=part)] if part.strip() else []


def _existing_path(spec: DatasetSpec) -> Path:
    if spec.path is None:
        raise DataError(f"a dataset of format {spec.format} needs a `path`")
    path = Path(spec.path)
    if not path.exists():
        raise DataError(f"dataset path {path} does not exist")
    return path


def _annotation_file(spec: DatasetSpec) -> Path:
    path = _existing_path(spec)
    if not path.is_file():
        raise DataError(f"dataset path {path} is a folder; format {spec.format} wants a JSON file")
    return path


def _annotations(spec: DatasetSpec) -> list[Sample]:
    file = _annotation_file(spec)
    images = Path(spec.images) if spec.images else file.parent
    to_sample = _llava_sample if spec.format == "llava" else _vqa_sample
    samples = []
    for index, record in enumerate(_read_records(file)):
        where = f"{file}: record {index}"
        if not isinstance(record, dict):
            raise DataError(f"{where} is {type(record).__name__}, a mapping was expected")
        samples.append(to_sample(record, images, where))
    return samples


def _read_records(file: Path) -> list[Any]:
    try:
        content = file.read_text(encoding="utf-8")
        if content.lstrip().startswith("["):
            return list(json.loads(content))
        return [json.loads(line) for line in content.splitlines() if line.strip()]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{file} is neither a JSON list nor JSON lines: {error}") from error


def _image_of(record: Mapping[str, Any], images: Path, where: str) -> Path | None:
    name = record.get("image")
    if name is None:
        return None
    path = images / str(name)
    if not os.path.isfile(path):  # Path.is_file raises for a name too long
        raise DataError(f"{where}: image {path} does not exist")
    return path


def _vqa_sample(record: Mapping[str, Any], images: Path, where: str) -> Sample:
    for needed in ("question", "answer"):
        if not isinstance(record.get(needed), str):
            raise DataError(f"{where}: needs a string {needed!r}, has {sorted(record)}")
    return Sample(
        image=_image_of(record, images, where), turns=((record["question"], record["answer"]),)
    )


def _llava_sample(record: Mapping[str, Any], images: Path, where: str) -> Sample:
    conversation = record.get("conversations")
    if not isinstance(conversation, list) or not conversation or len(conversation) % 2:
        raise DataError(f"{where}: 'conversations' must alternate human and gpt")
    turns = []
    for human, gpt in zip(conversation[::2], conversation[1::2], strict=True):
        try:
            if (human["from"], gpt["from"]) != ("human", "gpt"):
                raise DataError(f"{where}: 'conversations' must alternate human and gpt")
            question, answer = human["value"].replace("<image>", ""), gpt["value"]
            turns.append((question.strip(), answer.strip()))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: a turn needs 'from' and 'value', both text") from error
    return Sample(image=_image_of(record, images, where), turns=tuple(turns))
