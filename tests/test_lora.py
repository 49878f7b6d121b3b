"""SparseLoRA: the hand-written gradients, what is stored, and the zeros after a merge."""

import copy

import pytest
import torch
from torch import Tensor, nn

from jobs.errors import ModelError
from workers.lora import (
    SparseLoraLinear,
    add_sparse_lora,
    apply_mask,
    merge_sparse_lora,
    pack_mask,
)

NUM_INPUTS, NUM_OUTPUTS = 19, 11  # no multiple of 8: the packed mask has padding


def layer_with_adapter(
    dtype: torch.dtype = torch.float64, num_outputs: int = NUM_OUTPUTS
) -> tuple[SparseLoraLinear, Tensor]:
    """A layer whose B is not zero any more, as after some training, and its mask."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(NUM_INPUTS, num_outputs)).to(dtype)
    mask_OI = torch.rand(num_outputs, NUM_INPUTS) < 0.5
    add_sparse_lora(model, {"0": mask_OI}, ranks={"0": 3}, alpha=6.0, seed=0)
    layer = model[0]
    assert isinstance(layer, SparseLoraLinear)
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer, mask_OI


def by_autograd(layer: SparseLoraLinear, mask_OI: Tensor, x: Tensor) -> Tensor:
    """The definition, (W + s B A) * M with s = 6 / 3, left to autograd."""
    low_rank_OI = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    return x @ ((layer.base_layer.weight + 2.0 * low_rank_OI) * mask_OI).T + layer.base_layer.bias


@pytest.mark.parametrize("num_outputs", [5, 11, 16])
def test_gradients_equal_autograd(num_outputs: int):
    """The mask comes in eighths: five of 1 row; five of 2 and one of 1; eight of 2."""
    layer, mask_OI = layer_with_adapter(num_outputs=num_outputs)
    x = torch.randn(2, 5, NUM_INPUTS, dtype=torch.float64, requires_grad=True)
    wanted = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    upstream = torch.randn(2, 5, num_outputs, dtype=torch.float64)

    output, expected = layer(x), by_autograd(layer, mask_OI, x)
    gradients = torch.autograd.grad(output, wanted, upstream)
    expected_gradients = torch.autograd.grad(expected, wanted, upstream)

    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


def test_bfloat16_gradients_are_those_of_float64_within_its_precision():
    layer, mask_OI = layer_with_adapter(torch.bfloat16)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(64, NUM_INPUTS, dtype=torch.bfloat16)

    layer(x).float().square().sum().backward()
    by_autograd(exact, mask_OI, x.double()).square().sum().backward()

    for side in ("lora_A", "lora_B"):
        gradient = getattr(layer, side)["default"].weight.grad
        expected = getattr(exact, side)["default"].weight.grad
        assert gradient.dtype == torch.bfloat16
        assert (gradient.double() - expected).norm() < 0.03 * expected.norm()


def test_nothing_of_the_weights_size_is_stored_for_backward():
    """W_eff and BA would be a second model. x (4 rows) and the adapter (rank 3) are small."""
    layer, _ = layer_with_adapter()
    x = torch.randn(4, NUM_INPUTS, dtype=torch.float64, requires_grad=True)
    stored: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        stored.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)

    assert sorted(stored) == [3 * NUM_OUTPUTS, 3 * NUM_INPUTS, 4 * NUM_INPUTS]
    assert max(stored) < NUM_OUTPUTS * NUM_INPUTS


def test_a_fresh_adapter_changes_nothing_but_applies_the_mask():
    """B starts at zero. The base weight here is dense: the mask alone makes the zeros."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(NUM_INPUTS, NUM_OUTPUTS))
    mask_OI = torch.rand(NUM_OUTPUTS, NUM_INPUTS) < 0.5
    weight_OI = model[0].weight.detach().clone()
    x = torch.randn(4, NUM_INPUTS)

    add_sparse_lora(model, {"0": mask_OI}, ranks={"0": 3}, alpha=6.0, seed=0)

    expected = nn.functional.linear(x, weight_OI * mask_OI, model[0].base_layer.bias)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_keeps_every_zero_and_every_bit_of_the_output(dtype: torch.dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(NUM_INPUTS, NUM_OUTPUTS), nn.ReLU(), nn.Linear(NUM_OUTPUTS, 4))
    model.to(dtype)
    mask_OI = torch.rand(NUM_OUTPUTS, NUM_INPUTS) < 0.5
    wrapped = add_sparse_lora(model, {"0": mask_OI}, ranks={"0": 3}, alpha=6.0, seed=0)
    nn.init.normal_(model[0].lora_B["default"].weight)
    x = torch.randn(4, NUM_INPUTS, dtype=dtype)
    before = model(x)
    exact = by_autograd(copy.deepcopy(model[0]).double(), mask_OI, x.double())

    merged = merge_sparse_lora(wrapped)

    assert merged is model
    assert type(model[0]) is nn.Linear
    assert model[0].weight.dtype == dtype
    assert torch.equal(model[0].weight != 0, mask_OI)
    assert not model[0].weight[~mask_OI].signbit().any()  # 0.0, not -0.0
    assert torch.equal(model(x), before)
    assert (model[0](x) - exact).norm() < 2 * torch.finfo(dtype).eps * exact.norm()


def test_a_kept_weight_that_is_zero_trains_and_a_dropped_one_does_not():
    """Deriving the mask from W != 0 would freeze it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(NUM_INPUTS, NUM_OUTPUTS))
    mask_OI = torch.ones(NUM_OUTPUTS, NUM_INPUTS, dtype=torch.bool)
    mask_OI[1, 1] = False
    with torch.no_grad():
        model[0].weight[0, 0] = model[0].weight[1, 1] = 0.0
    wrapped = add_sparse_lora(model, {"0": mask_OI}, ranks={"0": 3}, alpha=6.0, seed=0)
    packed = model[0].packed_mask.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)

    for _ in range(2):
        model(torch.randn(8, NUM_INPUTS)).square().sum().backward()
        optimizer.step()

    assert torch.equal(model[0].packed_mask, packed)
    merge_sparse_lora(wrapped)
    assert model[0].weight[0, 0] != 0
    assert model[0].weight[1, 1] == 0


def test_only_the_masked_layers_get_adapters_and_all_else_is_frozen():
    """PEFT matches names by suffix: "fc" must not catch "vision.fc"."""
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "vision": nn.ModuleDict({"fc": nn.Linear(4, 4)})})

    add_sparse_lora(model, {"fc": torch.ones(4, 4) > 0}, ranks={"fc": 2}, alpha=2.0, seed=0)

    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "fc.lora_A.default.weight",
        "fc.lora_B.default.weight",
    }
    assert "fc.packed_mask" not in model.state_dict()


def test_the_same_seed_gives_the_same_adapter_and_leaves_the_global_one_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    starts = []
    for seed in (0, 0, 1):
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(4, 4))
        add_sparse_lora(model, {"0": torch.ones(4, 4) > 0}, ranks={"0": 2}, alpha=2.0, seed=seed)
        starts.append(model[0].lora_A["default"].weight.detach())

    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("num_outputs", [1, 5, 8, 19])
def test_packing_a_mask_loses_nothing(num_outputs: int):
    mask_OI = torch.rand(num_outputs, 7) < 0.5

    packed_QI = pack_mask(mask_OI)

    assert packed_QI.shape == ((num_outputs + 7) // 8, 7)
    assert torch.equal(apply_mask(torch.ones(num_outputs, 7), packed_QI), mask_OI.float())


def test_a_packed_mask_holds_one_bit_per_weight():
    """Rows 0 and 2 of three: bits 0 and 2."""
    assert pack_mask(torch.tensor([[True], [False], [True]])).tolist() == [[0b101]]


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("1", (4, 4), "found ReLU"),
        ("9", (4, 4), "found nothing"),
        ("0", (4, 5), r"needs .*\(4, 4\)"),
    ],
)
def test_a_mask_that_fits_no_layer_is_refused(name: str, shape: tuple[int, int], message: str):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    with pytest.raises(ModelError, match=message):
        add_sparse_lora(model, {name: torch.ones(shape) > 0}, ranks={name: 2}, alpha=2.0, seed=0)
