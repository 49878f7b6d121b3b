"""What a repair trains: each method puts its parameters into a pruned model, and merges them.

Shape letters: O output features, I input features.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from jobs.spec import RepairSpec, Tower
from workers.lora import add_sparse_lora, apply_mask, check_fits, merge_sparse_lora, pack_mask
from workers.models import VisionLanguageModel
from workers.spp import add_spp, merge_spp

Masks = Mapping[str, Tensor]
"""Layer name to bool (O, I), True is kept."""


def add_trainable(
    model: VisionLanguageModel, masks: Masks, spec: RepairSpec, *, seed: int
) -> Callable[[], None]:
    """Make exactly what the method trains require a gradient, in place.

    Returns:
        What merges it: afterwards the model's layers are plain again, and have the zeros of their
        masks, except those that plain LoRA (`lora`) filled.

    Raises:
        ModelError: a mask that fits no linear layer of the model.
    """
    module = model.module
    towers: dict[str, Tower] = {layer.name: layer.tower for layer in model.layers()}
    for name, mask_OI in masks.items():
        check_fits(module, name, mask_OI)
    ranks = {name: _there(spec.rank_of(towers[name])) for name in masks}
    projector = _projector(model)
    adapters: dict[str, Tensor | None] = {}
    if spec.method in ("sparse_lora", "lora"):
        adapters |= {name: masks[name] if spec.method == "sparse_lora" else None for name in masks}
    if spec.projector == "lora":
        linears = [name for name, layer in projector.items() if isinstance(layer, nn.Linear)]
        adapters |= dict.fromkeys(linears)
        ranks |= dict.fromkeys(linears, _there(spec.rank_of("projector")))
    merges: list[Callable[[], object]] = []
    if adapters:  # first: PEFT freezes all that is not its own
        wrapped = add_sparse_lora(module, adapters, ranks=ranks, alpha=spec.alpha, seed=seed)
        merges.append(partial(merge_sparse_lora, wrapped))
    if spec.method == "spp":
        spp_ranks = {name: ranks[name] for name in masks}
        add_spp(module, spp_ranks, alpha=spec.alpha, seed=seed)
        merges.append(partial(merge_spp, module, list(masks)))
    if spec.method in ("norms", "full"):
        for tower in {towers[name] for name in masks}:
            _train_norms(module.get_submodule(model.family.towers[tower]))
    if spec.method == "full":
        merges += [_train_kept(module.get_submodule(name), masks[name]) for name in masks]
    if spec.projector == "full":
        for layer in projector.values():
            layer.requires_grad_(True)

    def merge() -> None:
        for each in merges:
            each()

    return merge


def _projector(model: VisionLanguageModel) -> dict[str, nn.Module]:
    """The modules of the projector by name; none of a text model."""
    path = model.family.projector
    if path is None:
        return {}
    return {
        f"{path}.{name}".removesuffix("."): layer
        for name, layer in model.module.get_submodule(path).named_modules()
    }


def _train_norms(tower: nn.Module) -> None:
    """Norms and biases, PERP's choice (arXiv:2312.15230)."""
    for layer in tower.modules():
        if "Norm" in type(layer).__name__:
            layer.requires_grad_(True)
        elif isinstance(bias := getattr(layer, "bias", None), nn.Parameter):
            bias.requires_grad_(True)


def _train_kept(linear: nn.Module, mask_OI: Tensor) -> Callable[[], None]:
    """Train a weight where the mask keeps it. AdamW never moves what has no gradient, at any ZeRO
    stage: its moments stay zero, and decay of zero is zero."""
    assert isinstance(linear, nn.Linear)
    packed_QI = pack_mask(mask_OI.to(linear.weight.device))
    linear.weight.requires_grad_(True)
    weight: Any = linear.weight
    handle = weight.register_hook(lambda grad: apply_mask(grad.clone(), packed_QI))
    return partial(handle.remove)


def _there(rank: int | None) -> int:
    assert rank is not None, "the plan refuses a rank that is missing"
    return rank
