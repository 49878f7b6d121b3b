"""From samples to what a model eats: prompts, answers to learn, batches.

A prompt is rendered by the model's own chat template; a model without one gets the form LLaVA-1.5
was trained on.

Shape letters: T tokens, C channels, H height, W width.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from jobs.errors import DataError, ModelError
from jobs.spec import DatasetSpec
from workers.data import Sample, load_dataset
from workers.models import VisionLanguageModel

IGNORED_LABEL = -100


class Encoder:
    """Turns samples into tensors for one model."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self.processor = model.processor
        self.tokenizer = model.tokenizer
        self.has_template = bool(
            getattr(self.processor, "chat_template", None)
            or getattr(self.tokenizer, "chat_template", None)
        )
        self.takes_images = self.processor is not self.tokenizer
        self.pad_id: int = (
            self.tokenizer.pad_token_id
            if self.tokenizer.pad_token_id is not None
            else self.tokenizer.eos_token_id
        )

    def render(self, sample: Sample, *, num_answers: int) -> str:
        """The conversation with its first `num_answers` answers; then the next question, if any."""
        turns = sample.turns[: num_answers + 1]
        asks = len(turns) > num_answers
        if not self.has_template:
            return self._llava_1_5(sample, turns, asks)
        messages: list[dict[str, Any]] = []
        for index, (question, answer) in enumerate(turns):
            content: list[dict[str, str]] = [{"type": "text", "text": question}]
            if index == 0 and sample.image is not None:
                content.insert(0, {"type": "image"})
            messages.append({"role": "user", "content": content if self.takes_images else question})
            if index < num_answers:
                said: Any = [{"type": "text", "text": answer}] if self.takes_images else answer
                messages.append({"role": "assistant", "content": said})
        return str(
            self.processor.apply_chat_template(messages, add_generation_prompt=asks, tokenize=False)
        )

    def _llava_1_5(self, sample: Sample, turns: Sequence[tuple[str, str]], asks: bool) -> str:
        text = ""
        for index, (question, answer) in enumerate(turns):
            picture = "<image>\n" if index == 0 and sample.image is not None else ""
            text += f"USER: {picture}{question} ASSISTANT:"
            if not asks or index < len(turns) - 1:
                text += f" {answer}{self.tokenizer.eos_token}"
        return text

    def prompts(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """The last question of each sample as a left-padded batch, ready to generate from."""
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:  # Llama's; what pads is masked, so any token does
            self.tokenizer.pad_token = self.tokenizer.eos_token
        texts = [self.render(sample, num_answers=len(sample.turns) - 1) for sample in samples]
        return self._process(texts, [sample.load_image() for sample in samples], padding=True)

    def supervised(self, sample: Sample) -> dict[str, Tensor]:
        """One conversation to learn: `labels` holds the answers and is -100 elsewhere.

        Returns:
            input_ids, attention_mask, labels: int64, (T,). pixel_values: float, (C, H, W), if the
            sample has an image.

        Raises:
            ModelError: a chat template that renders a conversation differently once it goes on.
        """
        text = self.render(sample, num_answers=len(sample.turns))
        whole = self._process([text], [sample.load_image()])
        ids = whole["input_ids"][0]
        unexpanded = self._tokens(text)
        num_image_tokens = len(ids) - len(unexpanded)  # beyond the placeholder; all in turn one
        labels = torch.full_like(ids, IGNORED_LABEL)
        for index in range(len(sample.turns)):
            answered = Sample(image=sample.image, turns=sample.turns[: index + 1])
            start, end = (
                num_image_tokens + self._prefix_length(prefix, unexpanded)
                for prefix in (
                    self.render(sample, num_answers=index),
                    self.render(answered, num_answers=index + 1),
                )
            )
            labels[start:end] = ids[start:end]
        single = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        if "pixel_values" in whole:
            single["pixel_values"] = whole["pixel_values"][0]
        return single

    def _prefix_length(self, prefix: str, whole: list[int]) -> int:
        tokens = self._tokens(prefix)
        if tokens != whole[: len(tokens)]:
            raise ModelError(
                "the model's chat template does not render a question the same way before and "
                "after its answer, so the answer's tokens cannot be told apart"
            )
        return len(tokens)

    def _tokens(self, text: str) -> list[int]:
        """As `_process` does it, but with an image's placeholder left as it is."""
        special = not self.has_template
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _process(
        self, texts: list[str], images: Sequence[Any], *, padding: bool = False
    ) -> dict[str, Tensor]:
        options: dict[str, Any] = {"padding": padding, "return_tensors": "pt"}
        if self.has_template:
            options["add_special_tokens"] = False  # the template has written them
        present = [image for image in images if image is not None]
        if self.takes_images:
            return dict(self.processor(images=present or None, text=texts, **options))
        return dict(self.tokenizer(texts, **options))


class Encoded(Sequence[dict[str, Tensor]]):
    """Samples of a dataset, chosen by seed, each encoded when it is asked for.

    Samples with images are large: a training set's would not fit into memory.
    """

    def __init__(
        self,
        encoder: Encoder,
        dataset: DatasetSpec,
        *,
        count: int,
        length: int,
        seed: int,
        unlike: int = 0,
        or_all: bool = False,
    ) -> None:
        """Choose `count` samples of the train split, or windows of `length` tokens of plain text.

        Args:
            unlike: choose from what is left when as many were chosen with this seed before.
            or_all: take what there is where there is less.

        Raises:
            DataError: there is less, or nothing.
        """
        self.encoder = encoder
        samples = load_dataset(dataset, "train")
        everything: Sequence[Sample | Tensor] = (
            text_windows(encoder, samples[0].text, length) if dataset.is_text else samples
        )
        if or_all and everything:
            count = min(count, len(everything))
        if unlike + count > len(everything):
            raise DataError(
                f"{dataset.label} has {len(everything)} "
                f"{'windows of text' if dataset.is_text else 'samples'}, "
                f"{f'{unlike} and then ' if unlike else ''}{count} were asked for"
            )
        indices = range(len(everything))
        others = set(random.Random(seed).sample(indices, unlike))
        left = [index for index in indices if index not in others]
        self.chosen = [everything[index] for index in random.Random(seed).sample(left, count)]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: Any) -> Any:
        one = self.chosen[index]
        if isinstance(one, Tensor):
            return {"input_ids": one, "attention_mask": torch.ones_like(one), "labels": one.clone()}
        return self.encoder.supervised(one)


def text_windows(encoder: Encoder, text: str, length: int) -> list[Tensor]:
    """Non-overlapping windows of `length` tokens, int64, (T,); a shorter rest is left out."""
    ids = encoder.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    return [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]


def in_parts(batch: dict[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """The same samples, at most `size` at a time, as wide as they were together."""
    for start in range(0, len(batch["labels"]), size):
        yield {name: tensor[start : start + size] for name, tensor in batch.items()}


def collate(samples: Sequence[dict[str, Tensor]], pad_id: int) -> dict[str, Tensor]:
    """Pad single samples on the right to one batch: (B, T); images are stacked, (B, C, H, W)."""
    fill = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORED_LABEL}
    batch = {
        name: torch.nn.utils.rnn.pad_sequence(
            [sample[name] for sample in samples], batch_first=True, padding_value=value
        )
        for name, value in fill.items()
    }
    pictures = [sample["pixel_values"] for sample in samples if "pixel_values" in sample]
    if pictures:
        batch["pixel_values"] = torch.stack(pictures)
    return batch
