"""Patterns and targets: what a person may write, and what is refused."""

import pytest

from jobs.pattern import Pattern, Target


@pytest.mark.parametrize("text", ["unstructured", "2:4", "4:8", "1:4"])
def test_a_pattern_is_written_as_it_was_read(text):
    assert str(Pattern.parse(text)) == text


def test_n_of_m_counts_the_kept_weights():
    """1:4 keeps one of four. Tools that count the dropped would keep three."""
    assert Pattern.parse("1:4").sparsity == 0.75
    assert Pattern.parse("unstructured").sparsity is None


@pytest.mark.parametrize("text", ["4:2", "0:4", "4:4", "banana", "2:4:8", " 2:4", "-1:4", ""])
def test_a_pattern_that_cannot_be_names_the_forms_that_can(text):
    with pytest.raises(ValueError, match="write 'unstructured', or N:M"):
        Pattern.parse(text)


def test_groups_that_do_not_fill_the_inputs_are_refused():
    """A last group of 1 could keep 2 of 1, or 1 of 1: neither is 2:4."""
    Pattern.parse("2:4").check_inputs(12, "mlp")
    Pattern.parse("unstructured").check_inputs(13, "mlp")

    with pytest.raises(ValueError, match=r"mlp: pattern 2:4 .* divisible by 4, and .* has 13"):
        Pattern.parse("2:4").check_inputs(13, "mlp")


def test_a_target_agrees_with_its_pattern():
    Target(0.5, Pattern.parse("2:4"))
    Target(0.0, Pattern.parse("2:4"))  # a layer left out of a 2:4 job

    with pytest.raises(ValueError, match=r"always has 0\.5"):
        Target(0.6, Pattern.parse("2:4"))
    with pytest.raises(ValueError, match="a fraction"):
        Target(50)
