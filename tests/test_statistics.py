"""Statistics: sums that add up, however the tokens were split."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jobs.errors import NumericError
from workers.statistics import Statistics, mix


def statistics_of(x_TI, num_sequences=1):
    statistics = Statistics.empty(x_TI.shape[1])
    statistics.update(x_TI, num_sequences)
    return statistics


def test_sums_done_by_hand():
    statistics = statistics_of(torch.tensor([[1.0, 2.0], [3.0, -2.0]]), num_sequences=1)

    assert statistics.gram_II.tolist() == [[10.0, -4.0], [-4.0, 8.0]]
    assert statistics.sum_I.tolist() == [4.0, 0.0]
    assert (statistics.num_tokens, statistics.num_sequences) == (2, 1)
    assert torch.allclose(statistics.input_norm_I, torch.tensor([10.0, 8.0]).sqrt())


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 2**31))
def test_batches_split_differently_give_the_same_statistics(lengths, seed):
    """Whole numbers, so that sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randint(-9, 9, (n, 3), generator=generator).float() for n in lengths]
    at_once = statistics_of(torch.cat(batches), num_sequences=len(batches))

    by_workers = statistics_of(batches[0])
    for batch in batches[1:]:
        by_workers = statistics_of(batch) + by_workers

    assert torch.equal(by_workers.gram_II, at_once.gram_II)
    assert torch.equal(by_workers.sum_I, at_once.sum_I)
    assert by_workers.num_tokens == at_once.num_tokens
    assert by_workers.num_sequences == at_once.num_sequences


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_summed_in_single(dtype):
    """300² is 90 000: infinite in fp16, 90 112 in bf16."""
    statistics = statistics_of(torch.full((3, 1), 300.0, dtype=dtype))

    assert statistics.gram_II.item() == 270_000
    assert statistics.sum_I.item() == 900


def test_modalities_of_one_sequence_are_weighted_and_not_counted_twice():
    text = statistics_of(torch.tensor([[1.0]]), num_sequences=4)
    visual = statistics_of(torch.tensor([[2.0], [2.0]]), num_sequences=4)

    mixed = mix({"text": text, "visual": visual}, {"text": 1.0, "visual": 0.5})

    assert mixed.gram_II.item() == 1 + 0.5 * 8
    assert mixed.sum_I.item() == 1 + 0.5 * 4
    assert (mixed.num_tokens, mixed.num_sequences) == (2, 4)


@pytest.mark.parametrize(
    "weights", [{"text": 1.0}, {"text": -1.0, "visual": 1.0}, {"text": 0.0, "visual": 0.0}]
)
def test_weights_that_mean_nothing_are_refused(weights):
    parts = {name: statistics_of(torch.ones(1, 1)) for name in ("text", "visual")}

    with pytest.raises(ValueError, match="weights"):
        mix(parts, weights)


def test_what_is_written_is_read_back_bit_for_bit():
    statistics = statistics_of(torch.randn(5, 3), num_sequences=2).scaled(0.3)

    again = Statistics.from_tensors(statistics.to_tensors())

    assert torch.equal(again.gram_II, statistics.gram_II)
    assert torch.equal(again.sum_I, statistics.sum_I)
    assert (again.num_tokens, again.num_sequences) == (1.5, 2)


def test_an_infinite_activation_is_an_error_that_names_the_layer():
    statistics = statistics_of(torch.tensor([[float("inf"), 1.0]]))

    with pytest.raises(NumericError, match=r"block\.7: 3 of 4 entries of the input gram"):
        statistics.check_finite("block.7")


def test_an_input_that_no_token_reached_is_an_error():
    with pytest.raises(NumericError, match="no token reached"):
        Statistics.empty(3).check_finite("expert.5")


def test_tokens_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"expected \(T, 3\)"):
        Statistics.empty(3).update(torch.ones(2, 5, 3), 2)
