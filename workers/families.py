"""Where a model keeps its towers: the table that makes a model family data. Free of torch.

To add a family, add a row here and a tiny config to `tests/families.py`; the contract suite does
the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs.errors import ModelError
from jobs.spec import Tower


@dataclass(frozen=True)
class Family:
    """Module paths inside the `transformers` model."""

    towers: Mapping[Tower, str]
    """Tower to the path of its module; the language tower is there in every model."""
    projector: str | None = None


FAMILIES: Mapping[str, Family] = {
    "llava": Family(
        towers={"vision": "model.vision_tower", "language": "model.language_model"},
        projector="model.multi_modal_projector",
    ),
    **{
        causal: Family(towers={"language": "model"})
        for causal in ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "olmo2", "phi")
    },
}
"""By the config's `model_type`."""

BLOCKS: Mapping[str, str] = {
    "clip_vision_model": "encoder.layers",
    "siglip_vision_model": "encoder.layers",
    "dinov2": "encoder.layer",
    **{
        causal: "layers"
        for causal in ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "olmo2", "phi")
    },
}
"""By a tower's own `model_type`: the path of its list of blocks."""


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family of a `config.json`.

    Raises:
        ModelError: a `model_type` that is not in the table.
    """
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise ModelError(
            f"{where}: model_type {model_type!r} is not supported yet. "
            f"Known: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def blocks_path(config: Mapping[str, Any], tower: Tower, where: str) -> str:
    """Where a tower's module keeps its list of blocks, by the tower's own `model_type`.

    Raises:
        ModelError: a type that is not in the table.
    """
    model_type = str(tower_config(config, tower).get("model_type"))
    if model_type not in BLOCKS:
        raise ModelError(
            f"{where}: {tower} tower of type {model_type!r} is not supported yet. "
            f"Known: {', '.join(sorted(BLOCKS))}"
        )
    return BLOCKS[model_type]


def tower_config(config: Mapping[str, Any], tower: Tower) -> Mapping[str, Any]:
    """The part of a `config.json` that describes one tower."""
    nested = {"vision": "vision_config", "language": "text_config"}[tower]
    part: Mapping[str, Any] = config.get(nested, config)
    return part
