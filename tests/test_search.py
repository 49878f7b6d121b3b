"""The policy of the SlimLLaVA search, on candidates whose worth is known by hand."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from jobs.allocation import SlimLLaVASpec
from workers.search import Gene, Genome, Part, SearchSpace, State, ratio_grid, search


def gene(name: str, size: int, *, group: str = "language", depth: float = 0.5) -> Gene:
    grid = ratio_grid(0.5, 0.1, 0.2)
    return Gene(name, (f"{name}.linear",), size, grid, 0.5, "language", group, depth)


SAME_SIZE = SearchSpace(tuple(gene(f"block{i}", 1000, depth=i / 5) for i in range(6)))
MIXED = SearchSpace(
    tuple(gene(f"layer{i}", size) for i, size in enumerate([70, 110, 300, 1000] * 2))
)
SPEC = SlimLLaVASpec(
    num_samples=8,
    early_samples=2,
    step=0.1,
    reach=0.2,
    population=12,
    survivors=4,
    generations=12,
    projector_every=0,
    eta=0,
)


class Table:
    """A judge that looks losses up. A tuning of the projector takes `gain` off every loss."""

    def __init__(
        self,
        loss: Callable[[Genome], float],
        *,
        first: Callable[[Genome], float] | None = None,
        norm: Callable[[Genome], float] = lambda genome: 1.0,
        gain: float = 0.0,
    ) -> None:
        self.per_token: Mapping[Part, Callable[[Genome], float]]
        self.per_token = {"first": first or loss, "rest": loss}
        self.num_tokens: Mapping[Part, int] = {"first": 2, "rest": 6}
        self.norm = norm
        self.gain = gain
        self.offset = 0.0
        self.judged: list[tuple[Genome, Part]] = []
        self.tuned_for: list[Sequence[Genome]] = []

    def losses(self, genomes: Sequence[Genome], part: Part) -> list[float]:
        self.judged += [(genome, part) for genome in genomes]
        return [
            (self.per_token[part](genome) + self.offset) * self.num_tokens[part]
            for genome in genomes
        ]

    def tune(self, genomes: Sequence[Genome]) -> None:
        self.tuned_for.append(genomes)
        self.offset -= self.gain

    def untune(self) -> None:
        self.offset += self.gain


def first_blocks_matter(genome: Genome) -> float:
    """Best where the first three lose 0.3 and the others 0.7; the uniform one loses 1.2."""
    return 0.1 * sum(genome[:3]) - 0.1 * sum(genome[3:]) + 1.2


def test_the_grid_lies_whole_steps_from_what_was_asked() -> None:
    """A ratio of 1 would empty a layer, and one below 0 means nothing."""
    assert ratio_grid(0.9, 0.05, 0.2) == pytest.approx([0.7, 0.75, 0.8, 0.85, 0.9, 0.95])
    assert ratio_grid(0.1, 0.1, 0.3) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert 1 / 3 in ratio_grid(1 / 3, 0.05, 0.2), "uniform is on the grid, to the last bit"


def test_genes_of_one_size_meet_the_budget_exactly() -> None:
    """Two moves make up for each other, so no candidate needs a tolerance."""
    rng = random.Random(0)
    for _ in range(200):
        wanted = [rng.uniform(0.2, 0.8) for _ in SAME_SIZE.genes]

        genome = SAME_SIZE.nearest(wanted, rng)

        assert SAME_SIZE.surplus(genome)["language"] == pytest.approx(0, abs=1e-6)


def test_no_candidate_keeps_more_than_the_budget() -> None:
    """Genes of 70 to 1000 weights: over by less than a step of the smallest that can give back."""
    rng = random.Random(0)
    for _ in range(500):
        wanted = [rng.uniform(0.2, 0.8) for _ in MIXED.genes]

        genome = MIXED.nearest(wanted, rng)

        over = MIXED.surplus(genome)["language"]
        can_give = [g.size for g, index in zip(MIXED.genes, genome, strict=True) if index > 0]
        assert -1e-6 <= over < 0.1 * min(can_give)
        assert MIXED.excess(genome) == pytest.approx(over / 2960)


def test_the_nearest_genome_moves_who_is_furthest_from_what_was_wanted() -> None:
    """0.56 and 0.54 round to 0.6 and 0.5; the others are where they want to be."""
    genome = SAME_SIZE.nearest([0.56, 0.54, 0.4, 0.4, 0.5, 0.6], random.Random(0))

    assert SAME_SIZE.wanted(genome) == pytest.approx([0.6, 0.5, 0.4, 0.4, 0.5, 0.6])
    short = SAME_SIZE.nearest([0.54, 0.5, 0.5, 0.5, 0.5, 0.42], random.Random(0))
    assert SAME_SIZE.wanted(short) == pytest.approx([0.6, 0.5, 0.5, 0.5, 0.5, 0.4])


def test_each_group_meets_its_own_budget() -> None:
    """A vision tower that wants to keep everything must not do so at the language tower's cost."""
    vision = [gene(f"v{i}", 400, group="vision") for i in range(3)]
    space = SearchSpace((*vision, *SAME_SIZE.genes))

    genome = space.nearest([0.3] * 3 + [0.7] * 6, random.Random(0))

    assert space.surplus(genome) == pytest.approx({"vision": 0, "language": 0}, abs=1e-6)


def test_a_genome_speaks_for_all_layers_of_its_block() -> None:
    """What is asked of a layer is its block's ratio."""
    both = Gene("b", ("b.q", "b.k"), 20, (0.4, 0.5, 0.6), 0.5, "language", "language")
    space = SearchSpace((both, gene("c", 20)))

    assert space.sparsity((2, 1)) == pytest.approx({"b.q": 0.6, "b.k": 0.6, "c.linear": 0.4})


def test_children_take_genes_from_their_parents_and_steps_of_one() -> None:
    """A gene that neither parent has would be a jump, not a step."""
    rng = random.Random(0)
    a, b = (0, 0, 0, 4, 4, 4), (4, 4, 0, 0, 0, 4)

    child = SAME_SIZE.crossover(a, b, rng)
    mutated = SAME_SIZE.mutate((2, 2, 2, 2, 2, 2), 0.3, rng)

    assert all(gene in pair for gene, *pair in zip(child, a, b, strict=True))
    assert {abs(after - 2) for after in mutated} == {0, 1}


def test_the_search_finds_what_uniform_does_not() -> None:
    """The best there is loses 0: three blocks at 0.3 and three at 0.7."""
    last = search(SAME_SIZE, SPEC, Table(first_blocks_matter), seed=0)

    assert last.best[0].loss == pytest.approx(0)
    assert SAME_SIZE.wanted(last.best[0].genome) == pytest.approx([0.3] * 3 + [0.7] * 3)


def test_every_candidate_is_within_budget_and_none_is_tried_twice() -> None:
    """Only equals are compared; trying one twice would waste an evaluation."""
    judge = Table(lambda genome: float(genome[0]))

    search(MIXED, SPEC, judge, seed=3)

    tried = [genome for genome, part in judge.judged if part == "first"]
    assert len(tried) == len(set(tried)) > 12
    assert all(MIXED.surplus(genome)["language"] > -1e-6 for genome in tried)


def test_the_winner_is_never_worse_than_uniform_on_the_search_samples() -> None:
    """Uniform is tried on all samples from the start, so even a hopeless search keeps it."""
    uniform = (2,) * 6
    best = {uniform: 0.0}

    last = search(SAME_SIZE, SPEC, Table(lambda genome: best.get(genome, 9.0)), seed=0)

    assert last.best[0].genome == uniform


def test_starts_are_in_the_first_generation() -> None:
    """OWL's answer is there even if no slope comes near it."""
    judge = Table(lambda genome: 1.0)
    start = [0.3, 0.7, 0.3, 0.7, 0.3, 0.7]

    search(SAME_SIZE, SPEC.model_copy(update={"generations": 0}), judge, seed=0, starts=[start])

    assert (0, 4, 0, 4, 0, 4) in [genome for genome, _ in judge.judged]
    assert (0, 1, 2, 2, 3, 4) in [genome for genome, _ in judge.judged], "a slope as ATP's"


def test_early_rejection_spares_the_worse_half() -> None:
    """Uniform is tried on all; of the 11 others 6 go on, 5 stop after the first samples."""
    judge = Table(first_blocks_matter)

    last = search(SAME_SIZE, SPEC.model_copy(update={"generations": 0}), judge, seed=0)

    assert [part for _, part in judge.judged].count("first") == 12
    assert [part for _, part in judge.judged].count("rest") == 7
    assert last.history[0]["rejected_early"] == 5


def test_early_rejection_keeps_the_winner_where_the_first_samples_rank_alike() -> None:
    """The first samples are harder, but agree on who is better."""
    early = Table(first_blocks_matter, first=lambda genome: 3 + first_blocks_matter(genome))
    late = Table(first_blocks_matter)

    with_rejection = search(SAME_SIZE, SPEC, early, seed=0)
    without = search(SAME_SIZE, SPEC.model_copy(update={"early_samples": 0}), late, seed=0)

    assert with_rejection.best[0].genome == without.best[0].genome


def test_early_rejection_weighs_the_norm_too() -> None:
    """By the loss alone the better half would be those with a 4 in front, of the larger norm."""
    judge = Table(lambda genome: -0.01 * genome[0], norm=lambda genome: float(genome[0]))
    spec = SPEC.model_copy(update={"eta": 1.0, "generations": 0})

    search(SAME_SIZE, spec, judge, seed=0)

    tried = {genome for genome, _ in judge.judged}
    went_on = {genome for genome, part in judge.judged if part == "rest"} - {(2,) * 6}
    assert max(genome[0] for genome in went_on) < max(genome[0] for genome in tried)


def test_the_norm_term_changes_who_wins() -> None:
    """One genome has the least loss, another, hardly worse, a third of its norm."""
    least_loss, least_norm = (0, 1, 2, 2, 3, 4), (4, 3, 2, 2, 1, 0)
    losses = {least_loss: 0.5, least_norm: 0.6}
    judge = Table(
        lambda genome: losses.get(genome, 2.0),
        norm=lambda genome: 0.3 if genome == least_norm else 0.9,
    )

    winners = [
        search(SAME_SIZE, SPEC.model_copy(update={"eta": eta}), judge, seed=0).best[0].genome
        for eta in (0, None)
    ]

    assert winners == [least_loss, least_norm]


def test_eta_makes_both_terms_equal_for_uniform() -> None:
    """Loss 1.2 and norm 0.4: eta 3. It stays what it is for the whole search."""
    last = search(
        SAME_SIZE,
        SPEC.model_copy(update={"eta": None}),
        Table(first_blocks_matter, norm=lambda genome: 0.4),
        seed=0,
    )

    assert last.eta == pytest.approx(3)


def test_a_projector_that_serves_all_but_the_best_is_not_kept() -> None:
    """Uniform loses 1 and all others 9. Tuned, every one of them loses 1.5: less on average."""
    uniform = SAME_SIZE.nearest([0.5] * 6, random.Random(0))

    class Leveller(Table):
        is_tuned = False

        def tune(self, genomes: Sequence[Genome]) -> None:
            self.is_tuned = True

        def untune(self) -> None:
            self.is_tuned = False

    judge = Leveller(lambda genome: 1.5 if judge.is_tuned else 1.0 if genome == uniform else 9.0)
    spec = SPEC.model_copy(update={"projector_every": 4})

    last = search(SAME_SIZE, spec, judge, seed=0)

    assert (last.best[0].genome, last.best[0].loss) == (uniform, 1.0)
    assert not judge.is_tuned
    assert [one["projector"]["kept"] for one in last.history if one["projector"]] == [False] * 3


def test_the_projector_is_tuned_for_the_best_and_they_are_judged_again() -> None:
    """Generations 4, 8 and 12, each taking 0.25 off every loss, which the last state shows."""
    judge = Table(first_blocks_matter, gain=0.25)
    spec = SPEC.model_copy(update={"projector_every": 4})

    last = search(SAME_SIZE, spec, judge, seed=0)

    assert [len(genomes) for genomes in judge.tuned_for] == [4, 4, 4]
    assert last.best[0].loss == pytest.approx(-0.75)
    tuned = [record["generation"] for record in last.history if record["projector"]]
    assert tuned == [4, 8, 12]


def test_a_tuning_that_makes_the_best_worse_is_undone() -> None:
    """A learning rate too high must not spoil the search."""
    judge = Table(first_blocks_matter, gain=-0.25)
    spec = SPEC.model_copy(update={"projector_every": 4})

    last = search(SAME_SIZE, spec, judge, seed=0)

    assert judge.offset == 0
    assert last.best[0].loss == pytest.approx(0)
    assert last.history[4]["projector"]["kept"] is False


@pytest.mark.parametrize("killed_after", range(6))
def test_a_search_goes_on_as_it_would_have(killed_after: int) -> None:
    """The state of every generation, read back from JSON, leads to the same end."""
    spec = SPEC.model_copy(update={"projector_every": 2})
    states: list[Any] = []
    judge = Table(first_blocks_matter, gain=0.01)
    whole = search(
        SAME_SIZE,
        spec,
        judge,
        seed=5,
        finished=lambda state: states.append((json.dumps(state.to_json()), judge.offset)),
    )

    text, offset = states[killed_after]
    again = Table(first_blocks_matter, gain=0.01)
    again.offset = offset
    resumed = search(SAME_SIZE, spec, again, seed=5, state=State.from_json(json.loads(text)))

    assert json.dumps(resumed.to_json()) == json.dumps(whole.to_json())


def test_a_space_that_is_used_up_ends_quietly() -> None:
    """Two genes of one size have five genomes within budget; a population of 12 does not fit."""
    space = SearchSpace(SAME_SIZE.genes[:2])
    judge = Table(lambda genome: float(genome[0]))

    last = search(space, SPEC, judge, seed=0)

    assert len({genome for genome, _ in judge.judged}) in (4, 5)
    assert last.best[0].genome == (0, 4)


@pytest.mark.parametrize(
    "wrong", [{"survivors": 12}, {"early_samples": 8}, {"step": 0.3}, {"eta": -1}]
)
def test_settings_that_make_no_search_are_refused(wrong: dict[str, Any]) -> None:
    """Before anything is computed."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SlimLLaVASpec.model_validate(SPEC.model_dump() | wrong)
