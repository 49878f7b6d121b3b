"""Train the embedded default model: a small LLaVA, from random weights, on easy-VQA's train split.

    python -m workers.zoo.train_demo --out DIR --seed 0

Two stages, because plain language-model loss stalls on what the question alone gives away. The
vision tower first learns to name shapes and colours; then it is frozen, and the projector and the
language tower learn to answer, with hints. All labels come from the train questions and answers;
the test split is read by `evaluate` alone.

Shape letters: B images, K questions packed per image, S tokens of one question and answer,
T tokens of a packed row, H and W pixels, C colour channels.
"""

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import easy_vqa
import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

DATA = Path(easy_vqa.__file__).parent / "data"
IMAGE_PX, PATCH_PX = 64, 8
SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>"]
IGNORED = -100  # cross entropy passes over these labels

# Rendered, a question reads "<bos>user: <image>\nwhat shape is present?\nassistant:" and its
# answer appends " circle<eos>". The tokenizer adds nothing: the template is the only way in.
CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}{{ message['role'] }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<eos>' if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


class Question(NamedTuple):
    text: str
    answer: str
    image: int


@dataclass(frozen=True)
class Split:
    """One split of easy-VQA. `images_BCHW` is float in [-1, 1], as the image processor makes it."""

    images_BCHW: Tensor
    questions: list[Question]


@dataclass(frozen=True)
class Stage:
    """How long and how fast one stage trains. `batch` counts images."""

    steps: int
    batch: int
    lr: float


def load_questions(split: Literal["train", "test"]) -> list[Question]:
    return [Question(*row) for row in json.loads((DATA / split / "questions.json").read_text())]


def load_split(name: Literal["train", "test"]) -> Split:
    questions = load_questions(name)
    num_images = 1 + max(question.image for question in questions)
    pixels = [np.asarray(open_image(name, index)) for index in range(num_images)]
    images_BCHW = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return Split(images_BCHW / 127.5 - 1, questions)


def open_image(split: str, index: int) -> Image.Image:
    return Image.open(DATA / split / "images" / f"{index}.png").convert("RGB")


LossesOf = Callable[[Tensor], dict[str, Tensor]]


class Log:
    """Lines on the terminal and in a file, each with the minutes since the start."""

    def __init__(self, path: Path):
        self.path, self.start_s = path, time.monotonic()

    def __call__(self, line: str) -> None:
        stamped = f"[{(time.monotonic() - self.start_s) / 60:5.1f} min] {line}"
        print(stamped, flush=True)
        with self.path.open("a") as file:
            file.write(stamped + "\n")


# The model folder: tokenizer, processor, random weights --------------------------------------


def build_processor(questions: list[Question]) -> LlavaProcessor:
    """A word-level tokenizer of the train questions and answers, and CLIP's image processor."""
    split_words = pre_tokenizers.Whitespace()
    texts = [f"{question.text} {question.answer}" for question in questions]
    words = {word for text in texts for word, _ in split_words.pre_tokenize_str(text)}
    vocabulary = SPECIAL_TOKENS + sorted(words | {"user", "assistant", ":"})
    tokens = {word: index for index, word in enumerate(vocabulary)}
    words_to_ids = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    words_to_ids.normalizer = normalizers.Lowercase()
    words_to_ids.pre_tokenizer = split_words
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words_to_ids,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",  # a batch of prompts ends where generation starts
        model_max_length=256,
    )
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_PX},
            crop_size={"height": IMAGE_PX, "width": IMAGE_PX},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_PX,
        vision_feature_select_strategy="default",  # the class token is dropped: 64 image tokens
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """Random weights. Every linear's input is a multiple of 64, so 2:4 and 4:8 pruning fit."""
    tokenizer = processor.tokenizer
    token_ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=IMAGE_PX,
        patch_size=PATCH_PX,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=256,
        **token_ids,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_PX // PATCH_PX) ** 2,
        vision_feature_layer=-1,  # the usual -2 would leave the last block with nothing to do
        vision_feature_select_strategy="default",
        **token_ids,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=4, **token_ids)
    return model


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Weights as bfloat16, whatever they were trained in; the model itself is left as it was."""
    weights = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)


# New images from the train images ------------------------------------------------------------


class Redraw:
    """Moves, rescales and mirrors the shape of a train image and swaps its plain background.

    The shape stays whole and keeps its colour and proportions, so every answer stays true. Half
    the draws move by whole pixels at the original size: their edges stay as sharp as in the data.
    """

    def __init__(self, images_BCHW: Tensor):
        corners = images_BCHW[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
        self.background_BC11 = corners.median(dim=2).values[:, :, None, None]
        distance = (images_BCHW - self.background_BC11).abs().amax(dim=1, keepdim=True)
        inside = (distance > 0.02).float()
        self.layer = torch.cat([images_BCHW * inside, inside], dim=1)
        x_centre, x_half = _extent(inside[:, 0].amax(dim=1))
        y_centre, y_half = _extent(inside[:, 0].amax(dim=2))
        self.centre = torch.stack([x_centre, y_centre], dim=1)
        self.half = torch.stack([x_half, y_half], dim=1)

    def __call__(self, chosen: Tensor) -> Tensor:
        """New images of the train images at these indices, (B, C, H, W)."""
        num, centre, half = len(chosen), self.centre[chosen], self.half[chosen]
        longest = half.amax(dim=1, keepdim=True)
        sharp = torch.rand(num, 1) < 0.5
        # In the data the longest side spans 10 to 35 of 64 pixels; 8 to 48 leaves a margin.
        wanted = (longest * torch.exp(0.35 * torch.randn(num, 1))).clamp(0.13, 0.75)
        scale = torch.where(sharp, 1.0, wanted / longest)
        moved = (2 * torch.rand(num, 2) - 1) * (1 - scale * half).clamp(min=0)
        pixel = 2 / IMAGE_PX
        moved = torch.where(sharp, centre + ((moved - centre) / pixel).round() * pixel, moved)
        mirror = torch.ones(num, 2)
        mirror[torch.rand(num) < 0.5, 0] = -1
        zoom = mirror / scale
        affine = torch.cat([torch.diag_embed(zoom), (centre - moved * zoom)[:, :, None]], dim=2)
        grid = functional.affine_grid(affine, [num, 4, IMAGE_PX, IMAGE_PX], align_corners=False)
        drawn = functional.grid_sample(self.layer[chosen], grid, align_corners=False)
        background = self.background_BC11[torch.randint(len(self.layer), (num,))]
        return drawn[:, :3] + (1 - drawn[:, 3:]) * background


def _extent(occupied_BW: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and half length of each row's occupied stretch, in [-1, 1] coordinates."""
    size = occupied_BW.shape[1]
    edges = torch.arange(size + 1) / size * 2 - 1
    low = torch.where(occupied_BW > 0, edges[:-1], 1.0).amin(dim=1)
    high = torch.where(occupied_BW > 0, edges[1:], -1.0).amax(dim=1)
    return (low + high) / 2, (high - low) / 2


# Training ------------------------------------------------------------------------------------


def named_attributes(questions: list[Question]) -> tuple[list[str], list[str]]:
    """The colours and the shapes: what the train split answers to "what color" and "what shape"."""

    def answers_to(start: str) -> list[str]:
        return sorted({q.answer for q in questions if q.text.startswith(start)})

    return answers_to("what color"), answers_to("what shape")


def attribute_labels(questions: list[Question], names: list[str], num_images: int) -> Tensor:
    """Which of `names` each image shows, as far as open answers say; IGNORED elsewhere.

    "what color is the circle?" names the circle too, so a word counts in either place.
    """
    labels = torch.full((num_images,), IGNORED)
    for question in questions:
        if question.answer in ("yes", "no"):
            continue
        for word in [*question.text.rstrip("?").split(), question.answer]:
            if word in names:
                labels[question.image] = names.index(word)
    return labels


def optimise(parameters: list[nn.Parameter], stage: Stage, losses_of: LossesOf, log: Log) -> None:
    """AdamW over random train images: 50 steps of warm-up, then a cosine to zero.

    `losses_of` takes the indices of a batch of images; its losses are summed, and logged apart.
    """
    optimiser = torch.optim.AdamW(parameters, lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.05)
    images = _shuffled_batches(4000, stage.batch)
    recent: list[dict[str, float]] = []
    for step in range(stage.steps):
        cosine = (1 + math.cos(math.pi * step / stage.steps)) / 2
        for group in optimiser.param_groups:
            group["lr"] = stage.lr * min((step + 1) / 50, 1.0) * cosine
        losses = losses_of(next(images))
        loss = torch.stack(list(losses.values())).sum()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        recent.append({name: part.item() for name, part in losses.items()})
        if (step + 1) % 50 == 0:
            means = {name: sum(row[name] for row in recent) / len(recent) for name in losses}
            parts = ", ".join(f"{name} {mean:.4f}" for name, mean in means.items())
            log(f"step {step + 1:5d} of {stage.steps}: loss {parts}")
            recent.clear()


def _shuffled_batches(num_images: int, batch: int) -> Iterator[Tensor]:
    while True:
        order = torch.randperm(num_images)
        for start in range(0, num_images - batch + 1, batch):
            yield order[start : start + batch]


def train_vision(
    model: LlavaForConditionalGeneration, train: Split, redraw: Redraw, stage: Stage, log: Log
) -> None:
    """Teach the vision tower to name colour and shape with two heads that are thrown away."""
    tower = model.model.vision_tower
    names = named_attributes(train.questions)
    labels = [attribute_labels(train.questions, group, len(train.images_BCHW)) for group in names]
    width = tower.config.hidden_size
    heads = nn.ModuleList(nn.Linear(width, len(group)) for group in names)
    norm = nn.LayerNorm(width)

    def losses_of(chosen: Tensor) -> dict[str, Tensor]:
        patches = tower(redraw(chosen)).last_hidden_state[:, 1:]
        pooled = norm(patches).mean(dim=1)
        parts = zip(("colour", "shape"), heads, labels, strict=True)
        return {
            name: functional.cross_entropy(head(pooled), label[chosen])
            for name, head, label in parts
        }

    log(f"vision tower: colours {' '.join(names[0])}; shapes {' '.join(names[1])}")
    optimise([*tower.parameters(), *heads.parameters(), *norm.parameters()], stage, losses_of, log)


class Packed:
    """Several questions behind one image: the image's tokens are computed once for all of them.

    A row is [prompt up to the image's last token] [question, answer, <eos>] x K. The mask hides the
    questions from each other and each restarts the positions behind the image, so every question
    sees exactly the tokens and positions it meets alone at inference.
    """

    def __init__(self, train: Split, processor: LlavaProcessor, num_packed: int):
        self.num_packed = num_packed
        pad = processor.tokenizer.pad_token_id
        distinct = {question[:2] for question in train.questions}  # 273 of 38,575
        tokens = {pair: _tokenise(processor, *pair) for pair in distinct}
        rows = [tokens[question[:2]] for question in train.questions]
        self.prefix = rows[0][0]
        longest = max(len(segment) for _, segment, _ in rows)
        self.segments = torch.full((len(rows), longest), pad)
        self.labels = torch.full((len(rows), longest), IGNORED)
        for index, (_, segment, num_answer) in enumerate(rows):
            end = len(segment)
            self.segments[index, :end] = torch.tensor(segment)
            answer = slice(end - num_answer, end)
            self.labels[index, answer] = self.segments[index, answer]
        self.mask_TT, self.positions_T = self._layout(longest)
        # Most colours are absent from most images: draw a question's rare answer as often as
        # its common one, or "no" to every "is there a red shape?" is nearly free.
        seen = Counter((q.text, q.answer) for q in train.questions)
        weight = [1 / seen[q.text, q.answer] for q in train.questions]
        self.of_image: list[tuple[Tensor, Tensor]] = []
        by_image: list[list[int]] = [[] for _ in train.images_BCHW]
        for index, question in enumerate(train.questions):
            by_image[question.image].append(index)
        for mine in by_image:
            self.of_image.append((torch.tensor(mine), torch.tensor([weight[i] for i in mine])))

    def _layout(self, longest: int) -> tuple[Tensor, Tensor]:
        num_prefix, num_segments = len(self.prefix), self.num_packed
        block = torch.cat(
            [torch.full((num_prefix,), -1), torch.arange(num_segments).repeat_interleave(longest)]
        )
        sees = (block[:, None] == block) | (block == -1)
        positions = [torch.arange(num_prefix)]
        positions += [num_prefix + torch.arange(longest)] * num_segments
        return sees.tril(), torch.cat(positions)

    def draw(self, chosen: Tensor) -> Tensor:
        """Indices of K questions about each of these images, (B, K)."""
        return torch.stack([self._draw_questions(image) for image in chosen.tolist()])

    def _draw_questions(self, image: int) -> Tensor:
        mine, weight = self.of_image[image]
        few = len(mine) < self.num_packed
        return mine[torch.multinomial(weight, self.num_packed, replacement=few)]

    def batch(self, questions_BK: Tensor) -> dict[str, Tensor]:
        """Model inputs but the pixels."""
        num_rows = len(questions_BK)
        prefix = torch.tensor(self.prefix).expand(num_rows, -1)
        unlabelled = torch.full_like(prefix, IGNORED)
        return {
            "input_ids": torch.cat([prefix, self.segments[questions_BK].flatten(1)], dim=1),
            "labels": torch.cat([unlabelled, self.labels[questions_BK].flatten(1)], dim=1),
            "attention_mask": self.mask_TT.expand(num_rows, 1, -1, -1),
            "position_ids": self.positions_T.expand(num_rows, -1),
        }


def messages_for(question: str, answer: str | None = None) -> list[dict[str, Any]]:
    user = [{"type": "image"}, {"type": "text", "text": question}]
    turns: list[dict[str, Any]] = [{"role": "user", "content": user}]
    if answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return turns


def _tokenise(
    processor: LlavaProcessor, question: str, answer: str
) -> tuple[list[int], list[int], int]:
    """Ids up to the image's end, ids behind it, and how many of those are answer and <eos>."""
    image_tokens = (IMAGE_PX // PATCH_PX) ** 2

    def ids_of(messages: list[dict[str, Any]], *, prompt: bool) -> list[int]:
        text = processor.apply_chat_template(messages, add_generation_prompt=prompt)
        text = text.replace("<image>", "<image>" * image_tokens)
        ids: list[int] = processor.tokenizer(text)["input_ids"]
        return ids

    whole = ids_of(messages_for(question, answer), prompt=False)
    asked = ids_of(messages_for(question), prompt=True)
    assert whole[: len(asked)] == asked, "the answer changes how its prompt is tokenised"
    image_end = len(whole) - whole[::-1].index(processor.image_token_id)
    return whole[:image_end], whole[image_end:], len(whole) - len(asked)


class Hints(nn.Module):
    """Extra losses on what a yes/no answer is made of, read where the answer starts.

    "is there not a red shape?" needs the colour in the image, the colour asked about, whether the
    two agree and the negation, and no part lowers the loss before all are there. The two middle
    blocks are asked for the parts by heads that are thrown away.
    """

    def __init__(self, train: Split, width: int):
        super().__init__()
        colours, shapes = named_attributes(train.questions)
        num_images, names = len(train.images_BCHW), colours + shapes
        shown = [
            attribute_labels(train.questions, group, num_images) for group in (colours, shapes)
        ]
        rows = [
            [shown[0][q.image], shown[1][q.image], _asked_about(q, names), _is_present(q)]
            for q in train.questions
        ]
        self.labels = torch.tensor(rows)
        sizes = [len(colours), len(shapes), len(names), 2]
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        self.block_of = {"colour": 2, "shape": 2, "asked": 2, "present": 3}  # counted from 1

    def forward(
        self, hidden: tuple[Tensor, ...], labels_BT: Tensor, questions_BK: Tensor
    ) -> dict[str, Tensor]:
        answered = labels_BT != IGNORED
        before_answer = answered.roll(-1, dims=1) & ~answered
        wanted = self.labels[questions_BK.flatten()].unbind(dim=1)
        losses = {}
        for (name, block), head, label in zip(
            self.block_of.items(), self.heads, wanted, strict=True
        ):
            states = hidden[block][before_answer]
            logits = head(functional.layer_norm(states, states.shape[-1:]))
            losses[name] = functional.cross_entropy(logits.float(), label)
        return losses


def _asked_about(question: Question, names: list[str]) -> int:
    words = question.text.rstrip("?").split()
    return next((names.index(word) for word in words if word in names), IGNORED)


def _is_present(question: Question) -> int:
    """1 if what a yes/no question asks about is in the image: "no" to "is there not a ...?"."""
    if question.answer not in ("yes", "no"):
        return IGNORED
    return int((question.answer == "yes") != _is_negated(question))


def _is_negated(question: Question) -> bool:
    return bool({"no", "not"} & set(question.text.split()))


def train_answers(
    model: LlavaForConditionalGeneration,
    redraw: Redraw,
    packed: Packed,
    hints: Hints,
    stage: Stage,
    log: Log,
) -> None:
    """Language-model loss on answer tokens and <eos>, and the hints; the vision tower is frozen."""
    model.model.vision_tower.requires_grad_(False)
    trained = [weight for weight in model.parameters() if weight.requires_grad]

    def losses_of(chosen: Tensor) -> dict[str, Tensor]:
        questions_BK = packed.draw(chosen)
        inputs = packed.batch(questions_BK)
        inputs["pixel_values"] = redraw(chosen)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # a fifth quicker where there is AMX
            output = model(**inputs, output_hidden_states=True)
            parts = hints(output.hidden_states, inputs["labels"], questions_BK)
        return {"answer": output.loss, **parts}

    optimise([*trained, *hints.parameters()], stage, losses_of, log)
    model.model.vision_tower.requires_grad_(True)


# Evaluation ----------------------------------------------------------------------------------


@torch.inference_mode()
def answer(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    questions: list[str],
    images: list[Image.Image],
) -> list[str]:
    """Greedy answers to a batch of questions, generated to <eos>."""
    prompts = [
        processor.apply_chat_template(messages_for(question), add_generation_prompt=True)
        for question in questions
    ]
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    new_tokens = tokens[:, inputs["input_ids"].shape[1] :]
    texts: list[str] = processor.batch_decode(new_tokens, skip_special_tokens=True)
    return texts


def question_kind(question: Question) -> str:
    """Open colour, open shape, or yes/no with and without a negation."""
    if question.answer not in ("yes", "no"):
        return "what color" if "color" in question.text else "what shape"
    return "yes/no, negated" if _is_negated(question) else "yes/no"


def evaluate(
    folder: Path, *, wrong_image: bool = False, limit: int | None = None, batch: int = 128
) -> dict[str, float]:
    """Exact match per kind of question on the test split, as saved (bfloat16) and run in float32.

    Args:
        wrong_image: show every question another test image, to see what the words alone give.
        limit: only this many questions, evenly spread. None is all 9,673.
    """
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = LlavaProcessor.from_pretrained(folder)
    questions = load_questions("test")
    num_images = 1 + max(question.image for question in questions)
    every = 1 if limit is None else len(questions) // limit
    shift = num_images // 2 if wrong_image else 0
    hits: dict[str, list[bool]] = {}
    chosen = sorted(questions[::every][:limit], key=lambda question: len(question.text.split()))
    for start in range(0, len(chosen), batch):
        part = chosen[start : start + batch]
        images = [open_image("test", (q.image + shift) % num_images) for q in part]
        texts = answer(model, processor, [q.text for q in part], images)
        for question, text in zip(part, texts, strict=True):
            for kind in ("all", question_kind(question)):
                hits.setdefault(kind, []).append(text == question.answer)
    return {kind: sum(found) / len(found) for kind, found in sorted(hits.items())}


# The run -------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; results depend on it")
    parser.add_argument("--stages", type=Path, help="keep each stage here, and continue from here")
    arguments = parser.parse_args()
    out, kept = arguments.out, arguments.stages
    for folder in filter(None, (out, kept)):
        folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    log = Log(out / "training.log")

    train = load_split("train")
    redraw = Redraw(train.images_BCHW)
    processor = build_processor(train.questions)
    packed = Packed(train, processor, num_packed=6)
    model = build_model(processor)
    log(f"{model.num_parameters():,} parameters, {len(processor.tokenizer)} words")
    save(model, processor, out)

    width = model.config.text_config.hidden_size
    stages: dict[str, Callable[[], None]] = {
        "vision": lambda: train_vision(model, train, redraw, Stage(1200, 32, 1e-3), log),
        "language": lambda: train_answers(
            model, redraw, packed, Hints(train, width), Stage(700, 12, 1e-3), log
        ),
    }
    for number, (name, run) in enumerate(stages.items(), start=1):
        # A seed of its own: a stage does not depend on whether the one before was run or loaded.
        torch.manual_seed(arguments.seed + number)
        weights = kept / f"{name}.pt" if kept else None
        if weights and weights.exists():
            model.load_state_dict(torch.load(weights))
            log(f"{name}: loaded")
            continue
        log(name)
        run()
        if weights:
            torch.save(model.state_dict(), weights)
        save(model, processor, out)
    for wrong_image in (False, True):
        found = evaluate(out, wrong_image=wrong_image)
        figures = ", ".join(f"{kind} {score:.2%}" for kind, score in found.items())
        log(f"test, {'wrong' if wrong_image else 'right'} image: {figures}")


if __name__ == "__main__":
    main()
