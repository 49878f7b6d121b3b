"""Masks: exact counts, ties, groups."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jobs.errors import NumericError
from jobs.pattern import Pattern, Target
from tests.reference import drop_loop
from workers.masks import drop_smallest, keep_mask, kth_smallest

HALF = Target(0.5)


def test_rows_are_ranked_each_for_itself():
    """Over the whole layer the first row would lose everything."""
    saliency_OI = torch.tensor([[1.0, 2.0], [3.0, 4.0]])

    assert keep_mask(saliency_OI, HALF).tolist() == [[False, True], [False, True]]
    assert keep_mask(saliency_OI, HALF, compare="layer").tolist() == [[False] * 2, [True] * 2]


def test_equal_saliencies_do_not_cost_extra_weights():
    """Dropping everything at or below a threshold would empty these rows."""
    assert keep_mask(torch.ones(3, 8), HALF).sum(dim=1).tolist() == [4, 4, 4]


def test_among_equals_the_leftmost_goes():
    saliency_OI = torch.tensor([[5.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 9.0]])

    keep_OI = keep_mask(saliency_OI, HALF)

    assert keep_OI.int().tolist() == [[1, 0, 0, 0, 0, 1, 1, 1]]


def test_a_count_is_rounded_not_cut():
    """0.29 * 100 is 28.999999999999996 in floating point."""
    assert int((~keep_mask(torch.rand(1, 100), Target(0.29))).sum()) == 29


def test_two_of_four_keeps_the_two_best_of_each_group():
    saliency_OI = torch.tensor([[1.0, 2.0, 3.0, 4.0, 9.0, 8.0, 7.0, 6.0]])

    keep_OI = keep_mask(saliency_OI, Target(0.5, Pattern(2, 4)))

    assert keep_OI.int().tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_saliency_without_a_rank_is_refused(bad):
    with pytest.raises(NumericError, match="1 of 4 saliencies"):
        keep_mask(torch.tensor([[1.0, bad], [2.0, 3.0]]), HALF)


@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from([None, (2, 4), (1, 4), (3, 5), (4, 8)]),
    st.floats(0.01, 0.99),
    st.integers(0, 2**31),
)
def test_the_mask_is_that_of_a_sort(num_rows, num_groups, kept_of, sparsity, seed):
    """Saliencies of few values, so that most of them tie."""
    num_inputs = num_groups * (kept_of[1] if kept_of else 7)
    generator = torch.Generator().manual_seed(seed)
    saliency_OI = torch.randint(0, 4, (num_rows, num_inputs), generator=generator).float()
    target = Target(1 - kept_of[0] / kept_of[1], Pattern(*kept_of)) if kept_of else Target(sparsity)

    keep_OI = keep_mask(saliency_OI, target)

    assert torch.equal(~keep_OI, drop_loop(saliency_OI, sparsity, kept_of))


def test_selection_is_the_same_in_half_precision_where_numpy_is_not_used():
    saliency_GM = torch.randint(0, 50, (3, 100)).bfloat16()

    assert torch.equal(kth_smallest(saliency_GM, 30).float(), kth_smallest(saliency_GM.float(), 30))
    assert torch.equal(drop_smallest(saliency_GM, 30), drop_smallest(saliency_GM.float(), 30))
