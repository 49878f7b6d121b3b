"""Train the projector of smol-llava on easy-VQA, and score the assembled model.

    python -m workers.zoo.smol_llava DIR
    python -m workers.zoo.train_smol_projector train DIR OUT.safetensors
    python -m workers.zoo.train_smol_projector score DIR

Both towers stay frozen, so the vision features are computed once. The projector first learns to
say the names of colour and shape in the language model's own embeddings, which needs no language
model, then what makes the answers come out. Steps, seed and the scores are in `smol_llava.md`.

Shape letters: N images, P patches of an image, V vision features, B images of a step, T tokens,
D language features, A answer tokens of a step.
"""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import AutoModelForImageTextToText, AutoProcessor

from workers.zoo.smol_llava import IMAGE_TOKEN_ID, NUM_PATCHES, PAD_ID

YES_NO = ("yes", "no")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
NUM_HELD_OUT = 200  # the last training images: what we look at while training


@dataclass(frozen=True)
class Asked:
    """One question about one image of easy-VQA."""

    question: str
    answer: str
    image: int

    @property
    def kind(self) -> str:
        if self.answer in YES_NO:
            return "yes/no"
        return "colour" if self.answer in COLOURS else "shape"


def easy_vqa(split: str) -> tuple[list[Asked], list[Image.Image]]:
    folder = Path(str(files("easy_vqa"))) / "data" / split
    asked = [Asked(*row) for row in json.loads((folder / "questions.json").read_text())]
    num_images = 1 + max(one.image for one in asked)
    images = [Image.open(folder / f"images/{i}.png").convert("RGB") for i in range(num_images)]
    return asked, images


def prompt(processor: Any, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    message = {"role": "user", "content": content}
    return str(processor.apply_chat_template([message], add_generation_prompt=True))


# ---------------------------------------------------------------------------------- training


@torch.no_grad()
def vision_features(model: Any, processor: Any, images: list[Image.Image]) -> Tensor:
    """What the projector sees: the last block's patches, (N, P, V)."""
    batches = []
    for i in range(0, len(images), 50):
        pixels = processor.image_processor(images[i : i + 50], return_tensors="pt")["pixel_values"]
        seen = model.model.vision_tower(pixels, output_hidden_states=True)
        batches.append(seen.hidden_states[model.config.vision_feature_layer][:, 1:])
    return torch.cat(batches)


def warm_start(projector: nn.Module, features_NPV: Tensor, target_ND: Tensor, steps: int) -> float:
    """Teach every patch to project onto its image's target. Returns the share left unexplained."""
    optimizer = torch.optim.AdamW(projector.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        image = torch.randint(len(target_ND), (256,))
        patch = torch.randint(features_NPV.shape[1], (256,))
        loss = mse_loss(projector(features_NPV[image, patch]), target_ND[image])
        optimizer.zero_grad()
        (loss / target_ND.var()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return loss.item() / target_ND.var().item()


def answer_embeddings(asked: list[Asked], model: Any, tokenizer: Any, num_images: int) -> Tensor:
    """Per image the mean embedding of the answers to its open questions, (N, D)."""
    table = model.get_input_embeddings().weight.float()
    words: list[set[str]] = [set() for _ in range(num_images)]
    for one in asked:
        if one.answer not in YES_NO:
            words[one.image].add(one.answer)
    known = {w: table[tokenizer(f" {w}")["input_ids"]].mean(dim=0) for w in set().union(*words)}
    everything = torch.stack(list(known.values())).mean(dim=0)
    return torch.stack(
        [
            torch.stack([known[w] for w in sorted(ws)]).mean(dim=0) if ws else everything
            for ws in words
        ]
    )


@dataclass(frozen=True)
class Packed:
    """Several images, each once, each followed by several questions that cannot see one another."""

    ids_BT: Tensor
    position_BT: Tensor
    block_BT: Tensor  # 0 image and what stands before it, 1.. the questions, -1 padding
    label_BT: Tensor  # the token that should follow, -100 where nothing is to be learned

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Additive, (B, 1, T, T): a token sees the image's block and the past of its own."""
        T = self.ids_BT.shape[1]
        query, key = self.block_BT[:, :, None], self.block_BT[:, None, :]
        seen = ((key == 0) | (key == query)) & torch.ones(T, T, dtype=torch.bool).tril()
        return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -1e9)[:, None]


def pack(rows: list[list[Asked]], processor: Any) -> Packed:
    tokenizer = processor.tokenizer
    columns: list[list[list[int]]] = [[], [], [], []]
    for asked in rows:
        ids: list[int] = []
        positions: list[int] = []
        blocks: list[int] = []
        labels: list[int] = []
        for number, one in enumerate(asked, start=1):
            head, tail = prompt(processor, one.question).split("<image>")
            if not ids:
                ids = tokenizer(head)["input_ids"] + [IMAGE_TOKEN_ID] * NUM_PATCHES
                num_shared = len(ids)
                positions, blocks = list(range(num_shared)), [0] * num_shared
                labels = [-100] * num_shared
            asking = tokenizer(tail)["input_ids"]
            answer = tokenizer(one.answer)["input_ids"]
            ids += asking + answer
            positions += range(num_shared, num_shared + len(asking) + len(answer))
            blocks += [number] * (len(asking) + len(answer))
            labels += [-100] * (len(asking) - 1) + answer + [tokenizer.eos_token_id]
        for column, values in zip(columns, (ids, positions, blocks, labels), strict=True):
            column.append(values)
    T = max(map(len, columns[0]))
    fills = (PAD_ID, 0, -1, -100)
    return Packed(
        *(
            torch.tensor([values + [fill] * (T - len(values)) for values in column])
            for column, fill in zip(columns, fills, strict=True)
        )
    )


def answer_logits(model: Any, packed: Packed, image_BPD: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (A, vocabulary) and labels (A) of the answer tokens and of the end after them."""
    embeds = model.get_input_embeddings()(packed.ids_BT)
    is_image = (packed.ids_BT == IMAGE_TOKEN_ID)[..., None]
    embeds = embeds.masked_scatter(is_image, image_BPD.to(embeds.dtype))
    hidden_BTD = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=packed.mask(embeds.dtype),
        position_ids=packed.position_BT,
        use_cache=False,
    ).last_hidden_state
    learned = packed.label_BT != -100
    return model.lm_head(hidden_BTD[learned]).float(), packed.label_BT[learned]


def choose(asked: list[Asked], rng: random.Random, num_open: int, num_yes_no: int) -> list[Asked]:
    open_ones = [one for one in asked if one.kind != "yes/no"]
    others = [one for one in asked if one.kind == "yes/no"]
    return rng.sample(open_ones, min(num_open, len(open_ones))) + rng.sample(
        others, min(num_yes_no, len(others))
    )


def steps_of(
    by_image: list[list[Asked]], rng: random.Random, args: argparse.Namespace
) -> Iterator[list[list[Asked]]]:
    """Endless: every image once, in a new order each time round, `args.images` at a time."""
    rows: list[list[Asked]] = []
    while True:
        for i in rng.sample(range(len(by_image)), len(by_image)):
            if row := choose(by_image[i], rng, args.open, args.yes_no):
                rows.append(row)
            if len(rows) == args.images:
                yield rows
                rows = []


@torch.no_grad()
def held_out_accuracy(
    model: Any, processor: Any, rows: list[list[Asked]], image_NPD: Tensor
) -> str:
    """Exact match per kind. Teacher-forced, which is greedy decoding when every token is right."""
    right: dict[str, list[bool]] = {}
    for i in range(0, len(rows), 8):
        packed = pack(rows[i : i + 8], processor)
        shown = torch.stack([image_NPD[row[0].image] for row in rows[i : i + 8]])
        logits, labels = answer_logits(model, packed, shown)
        correct = iter((logits.argmax(dim=-1) == labels).tolist())
        for one in (one for row in rows[i : i + 8] for one in row):
            num_tokens = len(processor.tokenizer(one.answer)["input_ids"]) + 1
            right.setdefault(one.kind, []).append(all([next(correct) for _ in range(num_tokens)]))
    return "  ".join(f"{k} {sum(v) / len(v):.1%} of {len(v)}" for k, v in sorted(right.items()))


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    model = AutoModelForImageTextToText.from_pretrained(args.folder).eval().requires_grad_(False)
    processor = AutoProcessor.from_pretrained(args.folder)
    asked, images = easy_vqa("train")
    by_image: list[list[Asked]] = [[] for _ in images]
    for one in asked:
        by_image[one.image].append(one)
    features_NPV = vision_features(model, processor, images)
    mean_V, std_V = features_NPV.mean(dim=(0, 1)), features_NPV.std(dim=(0, 1))
    features_NPV = (features_NPV - mean_V) / std_V
    num_train = len(images) - NUM_HELD_OUT
    same = random.Random(0)
    held_out = [
        r for row in by_image[num_train:] if (r := choose(row, same, args.open, args.yes_no))
    ]

    projector = model.model.multi_modal_projector.requires_grad_(True)
    for linear in (projector.linear_1, projector.linear_2):  # forget what the folder holds
        nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    target_ND = answer_embeddings(asked, model, processor.tokenizer, len(images))[:num_train]
    left = warm_start(projector, features_NPV, target_ND, steps=600)
    print(f"warm start: {left:.1%} of the variance left", flush=True)
    model.model.language_model.bfloat16()
    model.lm_head.bfloat16()

    optimizer = torch.optim.AdamW(projector.parameters(), lr=args.lr, betas=(0.9, 0.98))
    warm = 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1.0, (s + 1) / warm) * (0.51 + 0.49 * math.cos(math.pi * s / args.steps)),
    )
    started, losses = time.monotonic(), []
    for step, rows in zip(
        range(1, args.steps + 1), steps_of(by_image[:num_train], rng, args), strict=False
    ):
        packed = pack(rows, processor)
        shown = features_NPV[[row[0].image for row in rows]]
        logits, labels = answer_logits(model, packed, projector(shown))
        loss = cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 10 == 0:
            recent = sum(losses[-10:]) / 10
            print(f"{step:5d}  {time.monotonic() - started:6.0f} s  {recent:.4f}", flush=True)
        if step % args.check_every == 0 or step == args.steps:
            save_projector(projector, mean_V, std_V, args.out)
            with torch.no_grad():
                image_NPD = projector(features_NPV)
            few = held_out if step == args.steps else held_out[:64]
            print(f"{step:5d}  {held_out_accuracy(model, processor, few, image_NPD)}", flush=True)


def save_projector(projector: Any, mean_V: Tensor, std_V: Tensor, path: Path) -> None:
    """In bfloat16, with the standardization of the features folded into the first linear."""
    state = {name: tensor.detach().clone() for name, tensor in projector.state_dict().items()}
    state["linear_1.weight"] /= std_V
    state["linear_1.weight"] = state["linear_1.weight"].bfloat16().float()  # the bias mends this
    state["linear_1.bias"] -= state["linear_1.weight"] @ mean_V
    partial = path.with_suffix(".partial")
    save_file({name: tensor.bfloat16() for name, tensor in state.items()}, partial)
    os.replace(partial, path)


# ----------------------------------------------------------------------------------- scoring


@torch.no_grad()
def generated(
    model: Any, processor: Any, asked: list[Asked], images: list[Image.Image], *, shift: int
) -> list[str]:
    """What the model says, greedily and to the end. Image `shift` places on is what it is shown."""
    said = [""] * len(asked)
    prompts = [prompt(processor, one.question) for one in asked]
    by_length = sorted(range(len(asked)), key=lambda i: len(prompts[i]))
    for start in range(0, len(asked), 32):
        batch = by_length[start : start + 32]
        inputs = processor(
            images=[images[(asked[i].image + shift) % len(images)] for i in batch],
            text=[prompts[i] for i in batch],
            padding=True,
            return_tensors="pt",
        ).to(model.dtype)
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        texts = processor.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for i, text in zip(batch, texts, strict=True):
            said[i] = text
    return said


def score(args: argparse.Namespace) -> None:
    model = AutoModelForImageTextToText.from_pretrained(args.folder, dtype=args.dtype).eval()
    processor = AutoProcessor.from_pretrained(args.folder)
    asked, images = easy_vqa("test")
    open_ones = [one for one in asked if one.kind != "yes/no"]
    others = [one for one in asked if one.kind == "yes/no"]
    some = random.Random(0).sample
    runs = [
        ("right image", some(open_ones, min(args.open, len(open_ones))), 0),
        ("wrong image", some(open_ones, min(args.wrong_image, len(open_ones))), len(images) // 2),
        ("yes/no", some(others, min(args.yes_no, len(others))), 0),
    ]
    for name, questions, shift in runs:
        started = time.monotonic()
        said = generated(model, processor, questions, images, shift=shift)
        right: dict[str, list[bool]] = {}
        for one, text in zip(questions, said, strict=True):
            for kind in {one.kind, "all"}:
                right.setdefault(kind, []).append(text == one.answer)
        shares = "  ".join(
            f"{k} {sum(v) / len(v):.2%} of {len(v)}" for k, v in sorted(right.items())
        )
        print(f"{name}: {shares}  ({time.monotonic() - started:.0f} s)", flush=True)
        wrong = [
            (o.question, o.answer, t) for o, t in zip(questions, said, strict=True) if t != o.answer
        ]
        print(f"    {wrong[:: max(1, len(wrong) // 5)][:5]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workers.zoo.train_smol_projector")
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train")
    training.add_argument("folder", type=Path)
    training.add_argument("out", type=Path)
    training.add_argument("--steps", type=int, default=400)
    training.add_argument("--images", type=int, default=6, help="per step")
    training.add_argument("--open", type=int, default=3, help="open questions per image")
    training.add_argument("--yes-no", type=int, default=0, help="yes/no questions per image")
    training.add_argument("--lr", type=float, default=1e-3)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--check-every", type=int, default=50)
    training.set_defaults(run=train)
    scoring = commands.add_parser("score")
    scoring.add_argument("folder", type=Path)
    scoring.add_argument("--open", type=int, default=10_000, help="questions; all there are")
    scoring.add_argument("--wrong-image", type=int, default=1000, help="open questions, drawn")
    scoring.add_argument("--yes-no", type=int, default=500, help="questions, drawn")
    scoring.add_argument("--dtype", default="auto", help="bfloat16 is several times as fast")
    scoring.set_defaults(run=score)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    args.run(args)


if __name__ == "__main__":
    main()
