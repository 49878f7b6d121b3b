"""Load a model folder, and find in it what can be pruned.

A model has towers, a tower has blocks, a block has prunable layers: its `nn.Linear`s. Embeddings,
norms, biases, the projector and the head are never pruned (reference implementations agree).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from jobs.errors import ModelError
from jobs.spec import Tower
from workers.families import Family, blocks_path, family_of
from workers.locate import config_of


@dataclass(frozen=True)
class Layer:
    """One prunable linear."""

    name: str
    """Module path in the model."""
    tower: Tower
    block: int
    linear: nn.Linear


@dataclass
class VisionLanguageModel:
    """A loaded model with its family and its processor. A causal language model has one tower."""

    module: nn.Module
    processor: Any
    """An image-text processor, or the tokenizer of a text-only model."""
    family: Family
    config: dict[str, Any]
    folder: Path

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def image_token_id(self) -> int | None:
        return self.config.get("image_token_id", self.config.get("image_token_index"))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def towers(self) -> tuple[Tower, ...]:
        """In the order they run."""
        return tuple(self.family.towers)

    def blocks(self, tower: Tower) -> nn.ModuleList:
        """The blocks of a tower, in the order they run.

        Raises:
            ModelError: a tower whose type is not in `workers.families.BLOCKS`.
        """
        blocks = self.module.get_submodule(self._blocks_path(tower))
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def _blocks_path(self, tower: Tower) -> str:
        inside = blocks_path(self.config, tower, str(self.folder))
        return f"{self.family.towers[tower]}.{inside}"

    def layers(self, tower: Tower | None = None) -> Iterator[Layer]:
        """The prunable layers of a tower (of all towers), block by block."""
        for each in self.towers if tower is None else (tower,):
            for index, block in enumerate(self.blocks(each)):
                for name, module in block.named_modules():
                    if isinstance(module, nn.Linear):
                        path = f"{self._blocks_path(each)}.{index}.{name}"
                        yield Layer(path, each, index, module)


def load_model(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> VisionLanguageModel:
    """Load a model with stock `from_pretrained`.

    Args:
        dtype: default: float32 on a CPU, bfloat16 on a GPU.

    Raises:
        ModelError: a folder without config or safetensors, an unknown family, weights that do not
            match the config.
    """
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
    )
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # one bar a job drowns what we have to say
    config = config_of(folder)
    family = family_of(config, str(folder))
    has_vision = "vision" in family.towers
    auto_model = AutoModelForImageTextToText if has_vision else AutoModelForCausalLM
    auto_processor = AutoProcessor if has_vision else AutoTokenizer
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        module, report = auto_model.from_pretrained(
            folder,
            dtype=dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16),
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        processor = auto_processor.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"{folder} does not load: {error}") from error
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ModelError(
            f"{folder}: weights missing or of another shape than config.json says: "
            f"{sorted(report['missing_keys'])[:5]} {list(report['mismatched_keys'])[:5]}"
        )
    model = VisionLanguageModel(
        module=module.to(device).eval().requires_grad_(False),
        processor=processor,
        family=family,
        config=config,
        folder=folder,
    )
    for tower in model.towers:
        model.blocks(tower)
    return model


def save_model(model: VisionLanguageModel, folder: Path) -> None:
    """Write a folder that stock `from_pretrained` loads, in the dtype of the original file."""
    dtype = getattr(torch, str(model.config.get("dtype") or model.config.get("torch_dtype")), None)
    module: Any = model.module
    state = module.state_dict()
    written: dict[tuple[int, torch.Size], Tensor] = {}
    for name, tensor in state.items():
        if dtype and tensor.is_floating_point():  # tied weights are one tensor, and stay one
            state[name] = written.setdefault((tensor.data_ptr(), tensor.shape), tensor.to(dtype))
    module.save_pretrained(folder, state_dict=state, safe_serialization=True)
    model.processor.save_pretrained(folder)
    saved = config_of(folder)
    saved["dtype"] = str(dtype or module.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(saved, indent=2))


@torch.no_grad()
def count_sparsity(model: VisionLanguageModel) -> dict[str, float]:
    """Fraction of zeros in what was loaded: per tower, over all prunable layers, over everything.

    Returns:
        `sparsity_vision` and `sparsity_language` (of the towers that there are), `sparsity_total`
        over the prunable layers of all towers, `sparsity_all_params` over every parameter.
    """
    zeros = dict.fromkeys(model.towers, 0)
    sizes = dict.fromkeys(model.towers, 0)
    for layer in model.layers():
        weight = layer.linear.weight
        zeros[layer.tower] += weight.numel() - int(weight.count_nonzero())
        sizes[layer.tower] += weight.numel()
    everything = list(model.module.parameters())
    all_zeros = sum(p.numel() - int(p.count_nonzero()) for p in everything)
    return {
        **{f"sparsity_{tower}": zeros[tower] / sizes[tower] for tower in model.towers},
        "sparsity_total": sum(zeros.values()) / sum(sizes.values()),
        "sparsity_all_params": all_zeros / sum(p.numel() for p in everything),
    }
