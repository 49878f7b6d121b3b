"""Tiny models with random weights, one per family and vision tower: for contracts of shape alone.

They borrow the tokenizer and the image processor of the demo model.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from jobs.spec import ModelSpec
from workers.locate import locate

DEMO = locate(ModelSpec(name="demo"))
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig, "dinov2": Dinov2Config}
CAUSAL = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
FAMILIES = [f"llava-{vision}" for vision in VISION] + list(CAUSAL)


def make_tiny(family: str, folder: Path, *, seed: int = 0, **sizes: int) -> Path:
    """Write a model of a family with random weights to `folder`, in stock Hugging Face layout.

    Args:
        sizes: of the language tower, where they are to differ from `SIZES`.
    """
    torch.manual_seed(seed)
    demo = AutoConfig.from_pretrained(DEMO)
    shutil.copytree(
        DEMO, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.md", "__pycache__")
    )
    text_sizes = SIZES | {"num_key_value_heads": 1, "vocab_size": demo.text_config.vocab_size}
    if not family.startswith("llava"):
        config = CAUSAL[family](**(text_sizes | sizes))
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        (folder / "processor_config.json").unlink()
        return folder
    vision = VISION[family.removeprefix("llava-")]
    has_class_token = vision is not SiglipVisionConfig
    side = {"image_size": demo.vision_config.image_size, "patch_size": 16}
    config = LlavaConfig(
        vision_config=vision(**SIZES, **side, mlp_ratio=2)
        if vision is Dinov2Config
        else vision(**SIZES, **side),
        text_config=LlamaConfig(**(text_sizes | sizes)),
        image_token_index=demo.image_token_index,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default" if has_class_token else "full",
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    _set_processor(folder, patch_size=16, num_additional_image_tokens=int(has_class_token))
    return folder


def _set_processor(folder: Path, **values: Any) -> None:
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())
    strategy = "default" if values["num_additional_image_tokens"] else "full"
    settings |= values | {"vision_feature_select_strategy": strategy}
    file.write_text(json.dumps(settings))


__all__ = ["DEMO", "FAMILIES", "PreTrainedConfig", "make_tiny"]
