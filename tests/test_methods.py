"""One contract for all pruning methods, and the laws that SparseGPT's fast path has to keep.

Shape letters: O output features, I input features, T tokens.
"""

from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch.utils._python_dispatch import TorchDispatchMode

from jobs.errors import NumericError
from jobs.methods import (
    ADMMSpec,
    DenseSpec,
    DSnoTSpec,
    MagnitudeSpec,
    MethodSpec,
    RIASpec,
    SparseGPTSpec,
    SparseSwapsSpec,
    WandaSpec,
)
from jobs.pattern import Pattern, Target
from tests.reference import (
    admm_loop,
    best_swap,
    drop_loop,
    dsnot_loop,
    inverse_factor,
    masked_least_squares,
    sparsegpt_loop,
    squared_output_change,
)
from workers.methods import prune, prune_shared, swaps_numba
from workers.methods.common import tf32
from workers.methods.dsnot import moments
from workers.methods.hessian import factor_hessian
from workers.methods.reconstruct import conjugate_gradients
from workers.methods.sparseswaps import swap_in_torch
from workers.methods.wanda import wanda_saliency
from workers.statistics import Statistics

NUM_INPUTS = 48
METHODS = {
    "magnitude": MagnitudeSpec(),
    "magnitude, by row": MagnitudeSpec(compare="row"),
    "wanda": WandaSpec(),
    "sparsegpt": SparseGPTSpec(),
    "sparsegpt, equal panels": SparseGPTSpec(block_size=16, budget="panel"),
    "sparsegpt, several panels": SparseGPTSpec(block_size=16, damping_rule="reference"),
    "sparsegpt, reconstructed": SparseGPTSpec(reconstruct="pcg"),
    "wanda, reconstructed": WandaSpec(reconstruct="pcg"),
    "ria": RIASpec(),
    "dsnot": DSnoTSpec(),
    "dsnot, from magnitude": DSnoTSpec(initial="magnitude", same_sign=False),
    "dsnot, from ria": DSnoTSpec(initial="ria"),
    "dsnot, from sparsegpt": DSnoTSpec(initial="sparsegpt"),
    "dsnot, from admm": DSnoTSpec(initial="admm"),
    "dsnot, from sparseswaps": DSnoTSpec(initial="sparseswaps"),
    "admm": ADMMSpec(),
    "admm, by row": ADMMSpec(compare="row"),
    "sparseswaps": SparseSwapsSpec(),
}
TARGETS = {
    "50%": Target(0.5),
    "a third": Target(1 / 3),
    "2:4": Target(0.5, Pattern(2, 4)),
    "1:4": Target(0.75, Pattern(1, 4)),
    "2:3": Target(1 / 3, Pattern(2, 3)),
    "4:8": Target(0.5, Pattern(4, 8)),
}
PER_ROW = [
    "magnitude, by row",
    "wanda",
    "admm, by row",
    "sparseswaps",
    "dsnot",
]
LOOKING_AT_INPUTS = [name for name, method in METHODS.items() if method.needs_statistics]

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
REFERENCE_PATTERNS = [None, (2, 4), (4, 8)]


def a_layer(num_outputs=10, num_inputs=NUM_INPUTS, *, num_tokens=200, seed=0, dead=()):
    """A weight, and the statistics of correlated inputs of unequal loudness."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(num_outputs, num_inputs, generator=generator)
    blend_II = torch.eye(num_inputs) + 0.3 * torch.randn(
        num_inputs, num_inputs, generator=generator
    ) / num_inputs**0.5 * torch.linspace(1, 4, num_inputs)
    x_TI = torch.randn(num_tokens, num_inputs, generator=generator) @ blend_II
    x_TI[:, list(dead)] = 0
    statistics = Statistics.empty(num_inputs)
    statistics.update(x_TI, num_sequences=4)
    return weight_OI, statistics


def target_for(kept_of, sparsity=0.5):
    return Target(1 - kept_of[0] / kept_of[1], Pattern(*kept_of)) if kept_of else Target(sparsity)


def threads_around_a_kernel() -> tuple[int, int]:
    torch.set_num_threads(1)
    prune(*a_layer(), Target(0.5), SparseGPTSpec())
    return 1, torch.get_num_threads()


def test_a_compiled_kernel_leaves_torch_its_number_of_threads():
    """More than a worker asked for would be in its neighbours' way, and add up in another order.

    In a process of its own: it happens where the first kernel of all starts the threads.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        asked, left = pool.submit(threads_around_a_kernel).result()

    assert left == asked


# The contract


@every_method
@every_target
def test_the_count_is_exact_and_what_is_dropped_is_zero(method, target):
    weight_OI, statistics = a_layer()

    pruned = prune(weight_OI, statistics, target, method)

    drop_OI = ~pruned.keep_OI
    assert drop_OI.sum() == round(target.sparsity * weight_OI.numel())
    assert torch.equal(pruned.weight_OI == 0, drop_OI)
    if target.pattern.group:
        per_group = drop_OI.reshape(-1, target.pattern.group).sum(dim=1)
        assert per_group.unique().tolist() == [target.pattern.group - target.pattern.kept]


@pytest.mark.parametrize("name", PER_ROW)
def test_methods_that_rank_by_row_drop_as_much_from_every_row(name):
    weight_OI, statistics = a_layer()

    pruned = prune(weight_OI, statistics, Target(0.29), METHODS[name])

    assert (~pruned.keep_OI).sum(dim=1).unique().tolist() == [14]  # 13.92


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_type_and_the_argument_are_left_alone(method, dtype):
    weight_OI, statistics = a_layer()
    weight_OI = weight_OI.to(dtype)
    before_OI, gram_II = weight_OI.clone(), statistics.gram_II.clone()

    pruned = prune(weight_OI, statistics, Target(0.5), method)

    assert pruned.weight_OI.dtype == dtype
    assert pruned.weight_OI.shape == weight_OI.shape
    assert torch.equal(weight_OI, before_OI)
    assert torch.equal(statistics.gram_II, gram_II)


@every_method
@pytest.mark.parametrize("pattern", [Pattern(), Pattern(2, 4)])
def test_sparsity_0_changes_no_bit(method, pattern):
    weight_OI, statistics = a_layer(dead=[3])

    pruned = prune(weight_OI, statistics, Target(0.0, pattern), method)

    assert torch.equal(pruned.weight_OI, weight_OI)
    assert pruned.keep_OI.all()


def test_dense_prunes_nothing_whatever_the_target():
    weight_OI, _ = a_layer()

    assert torch.equal(prune(weight_OI, None, Target(0.5), DenseSpec()).weight_OI, weight_OI)


@every_method
@pytest.mark.parametrize("target", [Target(0.5), Target(0.5, Pattern(2, 4))])
def test_the_same_input_gives_the_same_bits(method, target):
    first, second = (prune(*a_layer(), target, method) for _ in range(2))

    assert torch.equal(first.weight_OI, second.weight_OI)
    assert torch.equal(first.keep_OI, second.keep_OI)


@every_method
def test_a_nan_is_an_error_that_names_the_layer(method):
    weight_OI, statistics = a_layer()
    weight_OI[1, 2] = float("nan")

    with pytest.raises(NumericError, match=r"vision\.3\.fc1: 1 of 480 weights"):
        prune(weight_OI, statistics, Target(0.5), method, where="vision.3.fc1")


@every_method
def test_a_nan_in_the_statistics_is_an_error(method):
    weight_OI, statistics = a_layer()
    statistics.gram_II[1, 2] = float("nan")

    with pytest.raises(NumericError, match="1 of 2304 entries of the input gram"):
        prune(weight_OI, statistics, Target(0.5), method)


@every_method
def test_groups_that_do_not_fill_the_inputs_are_refused(method):
    with pytest.raises(ValueError, match="divisible by 5"):
        prune(*a_layer(), Target(0.4, Pattern(3, 5)), method)


@pytest.mark.parametrize("name", LOOKING_AT_INPUTS)
@every_target
def test_weights_on_a_dead_input_go_first(name, target):
    weight_OI, statistics = a_layer(dead=[5, 40])

    pruned = prune(weight_OI, statistics, target, METHODS[name])

    assert not pruned.keep_OI[:, [5, 40]].any()
    assert not pruned.weight_OI[:, [5, 40]].any()


@pytest.mark.parametrize("name", LOOKING_AT_INPUTS)
def test_a_method_that_needs_statistics_says_so(name):
    assert METHODS[name].needs_statistics
    with pytest.raises(ValueError, match="needs calibration statistics"):
        prune(a_layer()[0], None, Target(0.5), METHODS[name])


@every_method
def test_fewer_tokens_than_inputs_are_enough(method):
    """The Gram has rank 12 of 48; damping mends it, and the result says how much it took."""
    weight_OI, statistics = a_layer(num_tokens=12)

    pruned = prune(weight_OI, statistics, Target(0.5), method)

    assert pruned.weight_OI.isfinite().all()
    assert pruned.damping_used == (0.01 if method.solves_for_weights else None)


def test_the_options_come_from_yaml_by_name():
    spec = TypeAdapter(MethodSpec).validate_python({"name": "sparsegpt", "damping": 0.1})

    assert spec == SparseGPTSpec(damping=0.1)
    with pytest.raises(ValidationError, match="percdamp"):
        TypeAdapter(MethodSpec).validate_python({"name": "sparsegpt", "percdamp": 0.1})


# Magnitude and Wanda


def test_magnitude_ranks_the_whole_layer():
    weight_OI = torch.tensor([[1.0, -2.0], [3.0, -4.0]])

    assert prune(weight_OI, None, Target(0.5), MagnitudeSpec()).weight_OI.tolist() == [
        [0.0, 0.0],
        [3.0, -4.0],
    ]


def test_wanda_keeps_a_small_weight_on_a_loud_input():
    """Magnitude keeps the 3 and the 4. Their inputs are quiet: the products are 3, 50, 8, 2."""
    statistics = Statistics.empty(4)
    statistics.update(torch.diag(torch.tensor([1.0, 50.0, 4.0, 0.5])), num_sequences=1)

    pruned = prune(torch.tensor([[3.0, -1.0, 2.0, 4.0]]), statistics, Target(0.5), WandaSpec())

    assert pruned.weight_OI.tolist() == [[0.0, -1.0, 2.0, 0.0]]


@pytest.mark.parametrize("kept_of", REFERENCE_PATTERNS)
def test_wanda_equals_its_slow_loop(kept_of):
    weight_OI, statistics = a_layer()

    pruned = prune(weight_OI, statistics, target_for(kept_of, 0.6), WandaSpec())

    saliency_OI = wanda_saliency(weight_OI, statistics.input_norm_I)
    assert torch.equal(~pruned.keep_OI, drop_loop(saliency_OI, 0.6, kept_of))


# SparseGPT


@pytest.mark.parametrize("panel", [7, 16, 48, 128])
def test_the_factor_is_the_published_one_inverted(panel):
    _, statistics = a_layer()
    _, upper_II, _ = inverse_factor(statistics.gram_II, 4, damping=0.01)

    factor, _ = factor_hessian(statistics, 0.01, normalised=False, panel=panel)

    on_diagonal_II = torch.block_diag(*(inverse.inverse() for inverse in factor.inverses))
    in_panels_II = torch.block_diag(*(torch.ones_like(inverse) for inverse in factor.inverses))
    factor_II = on_diagonal_II + (factor.above_II * (1 - in_panels_II)).triu()
    assert torch.allclose(factor_II @ upper_II, torch.eye(NUM_INPUTS), atol=1e-5)


@pytest.mark.parametrize("kept_of", REFERENCE_PATTERNS)
@pytest.mark.parametrize("shape", [(24, 48), (5, 296), (40, 256)])
@pytest.mark.parametrize("dead", [(), (7, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_mode_equals_the_published_loop(kept_of, shape, dead, dtype):
    """Including the weight too many that its `<=` drops from every panel."""
    weight_OI, statistics = a_layer(*shape, num_tokens=2 * shape[1], dead=dead)
    weight_OI = weight_OI.to(dtype)
    gram_II = statistics.gram_II.to(dtype)
    expected_OI, drop_OI, _ = sparsegpt_loop(weight_OI, gram_II, 4, 0.5, kept_of=kept_of)

    pruned = prune(weight_OI, statistics, target_for(kept_of), SparseGPTSpec(mode="reference"))

    assert torch.equal(~pruned.keep_OI, drop_OI)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    assert torch.allclose(pruned.weight_OI, expected_OI, atol=tolerance, rtol=0)


@given(st.integers(2, 40), st.integers(1, 20), st.floats(0.05, 0.95), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_any_panel_and_any_number_of_inputs_equal_the_published_loop(inputs, block, sparsity, seed):
    """Panels that do not divide by two, and last panels that are not full."""
    weight_OI, statistics = a_layer(3, inputs, num_tokens=2 * inputs, seed=seed)
    weight_OI, gram_II = weight_OI.double(), statistics.gram_II.double()
    expected_OI, drop_OI, _ = sparsegpt_loop(weight_OI, gram_II, 4, sparsity, block_size=block)

    options = SparseGPTSpec(mode="reference", block_size=block)
    pruned = prune(weight_OI, statistics, Target(sparsity), options)

    assert torch.equal(~pruned.keep_OI, drop_OI)
    assert torch.allclose(pruned.weight_OI, expected_OI, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kept_of", REFERENCE_PATTERNS)
def test_the_errors_of_the_columns_sum_to_the_change_of_the_output(kept_of):
    """The published loop's own sum, against the weights and the Hessian of ours."""
    weight_OI, statistics = a_layer(24, 296, num_tokens=600)
    hessian_II, _, _ = inverse_factor(statistics.gram_II, 4, damping=0.01)
    _, _, loss = sparsegpt_loop(weight_OI, statistics.gram_II, 4, 0.5, kept_of=kept_of)

    pruned = prune(weight_OI, statistics, target_for(kept_of), SparseGPTSpec(mode="reference"))

    change = squared_output_change(pruned.weight_OI - weight_OI, hessian_II)
    assert change == pytest.approx(loss, rel=1e-4)


def test_normalised_damping_changes_nothing_where_all_inputs_are_equally_loud():
    weight_OI, statistics = a_layer()
    norm_I = statistics.input_norm_I
    statistics.gram_II /= norm_I[:, None] * norm_I

    by_rule = [
        prune(weight_OI, statistics, Target(0.5), SparseGPTSpec(damping_rule=rule)).weight_OI
        for rule in ("normalised", "reference")
    ]

    assert torch.allclose(*by_rule, atol=1e-6)


def test_normalised_damping_does_not_drown_quiet_inputs():
    """One input 1000 times as loud sets the mean energy, and 1% of it exceeds all the others'."""
    weight_OI, statistics = a_layer(num_tokens=2000)
    loudness_I = torch.ones(NUM_INPUTS)
    loudness_I[9] = 1000
    statistics.gram_II *= loudness_I[:, None] * loudness_I
    change = {}
    for rule in ("normalised", "reference"):
        options = SparseGPTSpec(damping_rule=rule)
        pruned_OI = prune(weight_OI, statistics, Target(0.5), options).weight_OI
        change[rule] = squared_output_change(pruned_OI - weight_OI, statistics.gram_II)

    assert change["normalised"] < 0.8 * change["reference"]


def test_the_last_panels_are_spared_because_no_column_makes_up_for_them():
    weight_OI, statistics = a_layer(64, 256, num_tokens=1024)
    change = {}
    for budget in ("layer", "panel"):
        options = SparseGPTSpec(budget=budget, block_size=64)
        pruned = prune(weight_OI, statistics, Target(0.5), options)
        change[budget] = squared_output_change(pruned.weight_OI - weight_OI, statistics.gram_II)
        of_panel = (~pruned.keep_OI).sum(dim=0).reshape(4, 64).sum(dim=1).tolist()
        assert of_panel == ([2048] * 4 if budget == "panel" else sorted(of_panel, reverse=True))

    assert change["layer"] < 0.9 * change["panel"]


def test_sparsegpt_changes_the_output_less_than_wanda_does():
    weight_OI, statistics = a_layer(64, 256, num_tokens=1024)

    sparsegpt, wanda = (
        squared_output_change(
            prune(weight_OI, statistics, Target(0.5), options).weight_OI - weight_OI,
            statistics.gram_II,
        )
        for options in (SparseGPTSpec(), WandaSpec())
    )

    assert sparsegpt < 0.9 * wanda


def test_a_hessian_that_needs_more_damping_says_how_much():
    """Eigenvalues 1 ± 1.05: 0.01 leaves one negative, 0.1 does not."""
    statistics = Statistics(torch.tensor([[1.0, 1.05], [1.05, 1.0]]), torch.zeros(2).double(), 2, 1)

    pruned = prune(torch.tensor([[1.0, 2.0]]), statistics, Target(0.5), SparseGPTSpec())

    assert pruned.damping_used == 0.1


def test_a_hessian_beyond_damping_is_an_error():
    statistics = Statistics(torch.tensor([[1.0, 3.0], [3.0, 1.0]]), torch.zeros(2).double(), 2, 1)

    with pytest.raises(NumericError, match=r"proj: the damped Hessian \(2 x 2\).*0.01, 0.1, 1.0"):
        prune(torch.ones(1, 2), statistics, Target(0.5), SparseGPTSpec(), where="proj")


# Masked conjugate gradients


@pytest.mark.parametrize("target", [Target(0.5), Target(0.5, Pattern(2, 4))])
def test_enough_conjugate_gradients_solve_each_row_exactly(target):
    weight_OI, statistics = a_layer(num_tokens=2000)
    options = WandaSpec(reconstruct="pcg", reconstruct_iterations=48)

    pruned = prune(weight_OI, statistics, target, options)

    damped_II = statistics.gram_II.clone()
    damped_II.diagonal().mul_(1.01)
    exact_OI = masked_least_squares(weight_OI, pruned.keep_OI, damped_II)
    assert torch.allclose(pruned.weight_OI.double(), exact_OI, atol=1e-5)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "admm", "sparseswaps"])
def test_a_step_of_the_polish_never_makes_the_layer_worse(name):
    weight_OI, statistics = a_layer()
    damped_II = statistics.gram_II.clone()
    damped_II.diagonal().mul_(1.01)
    plain_OI = prune(weight_OI, statistics, Target(0.5), METHODS[name]).weight_OI
    changes = [squared_output_change(plain_OI - weight_OI, damped_II)]
    for iterations in (1, 2, 3, 5, 10):
        update = {"reconstruct": "pcg", "reconstruct_iterations": iterations}
        options = METHODS[name].model_copy(update=update)
        pruned_OI = prune(weight_OI, statistics, Target(0.5), options).weight_OI
        changes.append(squared_output_change(pruned_OI - weight_OI, damped_II))

    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(changes))
    assert changes[-1] < changes[0]


def test_a_row_without_error_stays_as_it_is():
    """0 / 0 would be the step's length."""
    keep_OI = torch.ones(1, 2, dtype=torch.bool)

    assert conjugate_gradients(torch.eye(2), torch.zeros(1, 2), keep_OI, 3).tolist() == [[0, 0]]


# RIA, DSnoT, ADMM, SparseSwaps


def test_ria_looks_at_shares_of_rows_and_columns():
    """By size two 1s are equal. The lower is 1/9 of its row, the upper 1/3 of its own."""
    statistics = Statistics.empty(2)
    statistics.update(torch.eye(2), num_sequences=1)

    pruned = prune(torch.tensor([[2.0, 1.0], [8.0, 1.0]]), statistics, Target(0.25), RIASpec())

    assert pruned.keep_OI.tolist() == [[True, True], [True, False]]


def test_ria_keeps_a_weight_that_its_column_needs_though_its_row_does_not():
    """The 2 is 1/5 of its row but 2/3 of its column; the right 1 is 1/2 of its row but 1/9."""
    statistics = Statistics.empty(2)
    statistics.update(torch.eye(2), num_sequences=1)

    pruned = prune(torch.tensor([[2.0, 8.0], [1.0, 1.0]]), statistics, Target(0.25), RIASpec())

    assert pruned.keep_OI.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize(
    ("options", "dropped"),
    [(RIASpec(), [0, 1]), (RIASpec(activation_power=1), [1, 0])],
    ids=["root", "plain"],
)
def test_ria_hears_the_root_of_an_inputs_loudness(options, dropped):
    """The 1 has shares of 1/4 and 1/10, the 3 below of 1/4 and 1/2, or 0.75. Twice as loud the 1
    comes to 0.7, four times as loud to 1.4.
    """
    statistics = Statistics.empty(2)
    statistics.update(torch.diag(torch.tensor([1.0, 4.0])), num_sequences=1)

    pruned = prune(torch.tensor([[3.0, 1.0], [3.0, 9.0]]), statistics, Target(0.25), options)

    assert (~pruned.keep_OI).nonzero().tolist() == [dropped]


def test_dsnot_swaps_until_the_mean_is_right():
    """3 and 2 are dropped, so the output is 5 too low. Taking the 3 for the -4 leaves -2.

    Inputs are 1 and -1 in turn but for their mean: their variance is all the same.
    """
    statistics = Statistics(torch.eye(4) * 20, torch.ones(4).double() * 2, 2, num_sequences=2)
    weight_OI = torch.tensor([[3.0, 2.0, -4.0, 9.0]])

    overshot = prune(weight_OI, statistics, Target(0.5), DSnoTSpec(same_sign=False, max_cycles=1))
    refused = prune(weight_OI, statistics, Target(0.5), DSnoTSpec(max_cycles=1))

    assert overshot.weight_OI.tolist() == [[3.0, 0.0, 0.0, 9.0]]
    assert refused.weight_OI.tolist() == [[0.0, 0.0, -4.0, 9.0]]


@every_target
def test_dsnot_brings_the_mean_of_every_output_nearer(target):
    weight_OI, statistics = a_layer(40)
    statistics.sum_I += 30 * torch.linspace(-1, 1, NUM_INPUTS)
    mean_OI, _ = moments(weight_OI, statistics)
    off = {}
    for options in (WandaSpec(), DSnoTSpec()):
        keep_OI = prune(weight_OI, statistics, target, options).keep_OI
        off[options.name] = mean_OI.masked_fill(keep_OI, 0).sum(dim=1).abs()

    assert (off["dsnot"] <= off["wanda"]).all()
    assert off["dsnot"].mean() < 0.7 * off["wanda"].mean()


@pytest.mark.parametrize("initial", ["magnitude", "ria", "sparsegpt", "admm", "sparseswaps"])
def test_dsnot_starts_from_the_mask_of_another_method(initial):
    """And leaves it as it is where it does not swap."""
    weight_OI, statistics = a_layer(40)
    options = DSnoTSpec(initial=initial, layers="attention")
    by_row = {"ria": RIASpec(compare="row")}
    whose = by_row.get(initial) or METHODS.get(f"{initial}, by row", METHODS[initial])

    kept = prune(weight_OI, statistics, Target(0.5), options.of_layer("blocks.0.mlp.fc1"))
    swapped = prune(weight_OI, statistics, Target(0.5), options.of_layer("blocks.0.self_attn.q"))

    start = prune(weight_OI, statistics, Target(0.5), whose)
    assert torch.equal(kept.keep_OI, start.keep_OI)
    assert torch.equal(kept.weight_OI, weight_OI.masked_fill(~start.keep_OI, 0))
    assert not torch.equal(swapped.keep_OI, start.keep_OI)
    assert torch.equal(swapped.keep_OI.sum(dim=1), start.keep_OI.sum(dim=1))


@pytest.mark.parametrize("kept_of", [None, (2, 4), (4, 8)])
@pytest.mark.parametrize(
    "options",
    [
        DSnoTSpec(),
        DSnoTSpec(same_sign=False, max_cycles=7),
        DSnoTSpec(variance_power=0, stop_below=2.0),
        DSnoTSpec(initial="magnitude"),
    ],
    ids=str,
)
def test_dsnot_equals_a_loop_of_its_paper(kept_of, options):
    """Inputs with means and with unequal variances; the sums it stops at are around 2."""
    weight_OI, statistics = a_layer(12)
    statistics.sum_I += 60 * torch.linspace(-1, 1, NUM_INPUTS)
    target = target_for(kept_of)
    start = MagnitudeSpec(compare="row") if options.initial == "magnitude" else WandaSpec()
    keep_OI = prune(weight_OI, statistics, target, start).keep_OI

    expected_OI = dsnot_loop(weight_OI, statistics, keep_OI, options, target.pattern.group)

    found_OI = prune(weight_OI, statistics, target, options).keep_OI
    assert not torch.equal(expected_OI, keep_OI)
    assert torch.equal(found_OI, expected_OI)


@pytest.mark.parametrize("group", [None, 4])
def test_sparseswaps_makes_the_best_of_all_swaps(group):
    weight_OI, statistics = a_layer(6, 16)
    target = Target(0.5, Pattern(2, 4) if group else Pattern())
    before_OI = prune(weight_OI, statistics, target, WandaSpec()).keep_OI
    pairs = [(p, u) for p in range(16) for u in range(16) if not group or p // 4 == u // 4]

    options = SparseSwapsSpec(max_swaps=1, candidates=16)
    after_OI = prune(weight_OI, statistics, target, options).keep_OI

    for weight_I, before_I, after_I in zip(weight_OI, before_OI, after_OI, strict=True):
        change, dropped, back = best_swap(weight_I, before_I, statistics.gram_II, pairs)
        expected_I = before_I.clone()
        if change < 0:
            expected_I[dropped], expected_I[back] = False, True
        assert torch.equal(after_I, expected_I)


@every_target
def test_compiled_swaps_equal_plain_torch(target, monkeypatch):
    """Which is what runs on a GPU. Two inputs are dead."""
    weight_OI, statistics = a_layer(70, dead=(3, 40))
    compiled = prune(weight_OI, statistics, target, SparseSwapsSpec(candidates=8)).keep_OI
    monkeypatch.setattr(swaps_numba, "swap", swap_in_torch)

    in_torch = prune(weight_OI, statistics, target, SparseSwapsSpec(candidates=8)).keep_OI

    assert torch.equal(compiled, in_torch)


@every_target
def test_every_swap_lowers_the_error_and_keeps_the_rows_count(target):
    weight_OI, statistics = a_layer(40)
    changes = []
    for max_swaps in (1, 2, 4, 8, 100):
        pruned = prune(weight_OI, statistics, target, SparseSwapsSpec(max_swaps=max_swaps))
        assert (~pruned.keep_OI).sum(dim=1).unique().tolist() == [round(target.sparsity * 48)]
        changes.append(squared_output_change(pruned.weight_OI - weight_OI, statistics.gram_II))

    assert all(after <= before for before, after in pairwise(changes))
    assert changes[-1] < changes[0]


@pytest.mark.parametrize("target", [Target(0.7), Target(0.5, Pattern(2, 4))], ids=str)
def test_admm_gains_from_masking_gradually(target: Target):
    """The release masks at the final sparsity from the first iteration on."""
    weight_OI, statistics = a_layer(64, 256, num_tokens=1024)
    change = {}
    for masking_iterations in (1, 15):
        options = ADMMSpec(masking_iterations=masking_iterations)
        pruned_OI = prune(weight_OI, statistics, target, options).weight_OI
        change[masking_iterations] = squared_output_change(
            pruned_OI - weight_OI, statistics.gram_II
        )

    assert change[15] < 0.95 * change[1]


@pytest.mark.parametrize("kept_of", REFERENCE_PATTERNS)
@pytest.mark.parametrize("options", [ADMMSpec(), ADMMSpec(rho=0.3, damping=0.1, iterations=16)])
def test_admm_equals_its_slow_loop(kept_of, options):
    """In float64, or a rounding would now and then choose another weight."""
    weight_OI, statistics = a_layer(24, num_tokens=100)
    weight_OI, statistics.gram_II = weight_OI.double(), statistics.gram_II.double()
    settings = options.model_dump(include={"rho", "damping", "iterations", "masking_iterations"})
    expected_OI, drop_OI = admm_loop(
        weight_OI, statistics.gram_II, 0.5, kept_of=kept_of, **settings
    )

    pruned = prune(weight_OI, statistics, target_for(kept_of), options)

    assert torch.equal(~pruned.keep_OI, drop_OI)
    assert torch.allclose(pruned.weight_OI, expected_OI, atol=1e-10, rtol=0)


def test_admm_cannot_end_before_its_mask_is_final():
    with pytest.raises(ValidationError, match="more than the 10 iterations"):
        ADMMSpec(iterations=10)


# Layers that share an input


@every_method
@pytest.mark.parametrize("pattern", [Pattern(), Pattern(2, 4)])
def test_layers_pruned_together_equal_layers_pruned_alone(method, pattern):
    """Thresholds are each layer's own: k is 100 times smaller and must not lose everything."""
    query_OI, statistics = a_layer(16)
    key_OI = a_layer(8, seed=1)[0] / 100
    value_OI = a_layer(8, seed=2)[0]
    weights = [query_OI, key_OI, value_OI]

    together = prune_shared(weights, statistics, Target(0.5, pattern), method)

    for weight_OI, shared in zip(weights, together, strict=True):
        alone = prune(weight_OI, statistics, Target(0.5, pattern), method)
        assert shared.weight_OI.untyped_storage().nbytes() == 4 * weight_OI.numel()
        assert torch.equal(shared.keep_OI, alone.keep_OI)
        assert torch.allclose(shared.weight_OI, alone.weight_OI, rtol=1e-5, atol=1e-6)


@every_method
def test_layers_that_share_an_input_may_have_targets_of_their_own(method):
    weight_OI, statistics = a_layer()
    targets = [Target(0.25), Target(0.0), Target(0.5, Pattern(2, 4)), Target(0.75)]

    together = prune_shared([weight_OI] * 4, statistics, targets, method)

    assert [int((~each.keep_OI).sum()) for each in together] == [120, 0, 240, 360]


# Matrix products in TF32


class RoundsToTF32(TorchDispatchMode):
    """What a GPU in TF32 does: inputs of matrix products lose 13 of 23 bits, sums stay fp32."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            first = len(args) - 2
            args = (*args[:first], *(self.round(matrix) for matrix in args[first:]))
            self.rounded = True
        return function(*args, **(kwargs or {}))

    @staticmethod
    def round(matrix):
        bits = matrix.contiguous().view(torch.int32)
        half_to_even = 0xFFF + (bits >> 13 & 1)
        return ((bits + half_to_even) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("loudness", [1, 100])
@pytest.mark.parametrize("target", [Target(0.5), Target(0.7), Target(0.5, Pattern(2, 4))])
@pytest.mark.parametrize(
    ("method", "tolerance"),
    [(ADMMSpec(), 2e-2), (WandaSpec(reconstruct="pcg"), 1e-3)],
    ids=["admm", "pcg"],
)
def test_tf32_does_no_harm_to_what_iterates(method, tolerance, target, loudness):
    """Some inputs are loud, and all have a mean: the Hessian is far from diagonal.

    ADMM takes a few other weights, which is better as often as worse, by up to 1 %.
    """
    weight_OI, statistics = a_layer(64, 256, num_tokens=1024)
    loudness_I = torch.ones(256)
    loudness_I[::32] = loudness
    statistics.gram_II += 1024 * 0.25  # a mean of a half
    statistics.gram_II *= loudness_I[:, None] * loudness_I
    in_fp32 = prune(weight_OI, statistics, target, method)

    with RoundsToTF32() as mode:
        in_tf32 = prune(weight_OI, statistics, target, method)

    assert mode.rounded
    assert not torch.equal(in_fp32.weight_OI, in_tf32.weight_OI)
    before, after = (
        squared_output_change(pruned.weight_OI - weight_OI, statistics.gram_II)
        for pruned in (in_fp32, in_tf32)
    )
    assert after == pytest.approx(before, rel=tolerance)


def test_tf32_ends_where_it_was_asked_for():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision

    with pytest.raises(RuntimeError), tf32():
        torch.eye(2) @ torch.eye(3)
    with tf32():
        within = matmul.fp32_precision

    assert (within, matmul.fp32_precision) == ("tf32", before)
