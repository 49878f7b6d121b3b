"""Evolve how much each part of a model loses, at an equal budget. The policy alone, free of torch.

The automatic search of SlimLLaVA / EfficientLLaVA, arXiv:2503.15369. The paper says what is
searched (pruning ratios, from 64 samples), what for (the loss plus a generalization term from
structural risk minimization) and that the projector is optimized on the way. It does not give the
term's form and weight, what a candidate is, how children come about, nor any schedule. Here they
are our reading:

    minimize   loss(p) + eta * sum over layers |W_pruned(p)|_F / sum over layers |W|_F
    genes      a ratio per block (or per layer), from a grid around the asked sparsity
    budget     every candidate drops the asked number of weights, or by less than one grid step of
               its smallest gene more: only equals are compared, so that the norm term cannot
               just reward sparsity
    children   two parents of the best k mixed gene by gene, or one parent; then some genes move
               by a grid step, and others move back until the budget is met
    rejection  a candidate is first tried on some of the samples; the worse half goes no further
    projector  every few generations it is trained for the best k at once, and they are judged again

Every random choice of a generation follows from the seed and the generation's number, so that a
search that was killed goes on as it would have.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, Literal, Protocol

from jobs.allocation import SlimLLaVASpec

Genome = tuple[int, ...]
"""For each gene the index of its ratio."""

Part = Literal["first", "rest"]
"""Of the samples: those that every candidate is tried on, and the others."""

HALF_A_WEIGHT = 0.5
"""Sums of weights are whole numbers; a difference below this is rounding."""

ATTEMPTS_PER_CHILD = 50
"""Before a search space is taken to have no genome left that was not tried."""


@dataclass(frozen=True)
class Gene:
    """A block or a layer: what loses one ratio of its weights."""

    name: str
    layers: tuple[str, ...]
    size: int
    """Weights in it."""
    ratios: tuple[float, ...]
    """The grid, ascending."""
    asked: float
    """The sparsity that the job asks of it: its ratio under `uniform`."""
    tower: str
    group: str
    """Whose budget it counts towards: its tower's, or the model's."""
    depth: float = 0.0
    """Where in its tower, from 0 at the first block to 1 at the last."""


@dataclass(frozen=True)
class SearchSpace:
    """The genes, and how many zeros each group of them has to have."""

    genes: tuple[Gene, ...]

    @property
    def budgets(self) -> dict[str, float]:
        """Zeros by group."""
        budgets: dict[str, float] = {}
        for gene in self.genes:
            budgets[gene.group] = budgets.get(gene.group, 0.0) + gene.size * gene.asked
        return budgets

    def surplus(self, genome: Genome) -> dict[str, float]:
        """Zeros by group beyond the budget."""
        surplus = {group: -budget for group, budget in self.budgets.items()}
        for gene, index in zip(self.genes, genome, strict=True):
            surplus[gene.group] += gene.size * gene.ratios[index]
        return surplus

    def excess(self, genome: Genome) -> float:
        """The largest share of a group's weights by which a genome is over its budget."""
        sizes: dict[str, int] = {}
        for gene in self.genes:
            sizes[gene.group] = sizes.get(gene.group, 0) + gene.size
        return max(over / sizes[group] for group, over in self.surplus(genome).items())

    def sparsity(self, genome: Genome) -> dict[str, float]:
        """What a genome asks of every layer."""
        return {
            layer: gene.ratios[index]
            for gene, index in zip(self.genes, genome, strict=True)
            for layer in gene.layers
        }

    def nearest(self, wanted: Sequence[float], rng: random.Random) -> Genome:
        """The grid point near `wanted`, a ratio for each gene, that meets every budget.

        Rounds, then moves one gene at a time by a step: the gene whom a step brings nearest to what
        was wanted, among equals at random in proportion to size. Ends when the zeros asked for are
        there and no gene can give a step back.
        """
        pairs = zip(self.genes, wanted, strict=True)
        indices = [_nearest_index(gene.ratios, value) for gene, value in pairs]
        surplus = self.surplus(tuple(indices))
        for group in surplus:
            while surplus[group] < -HALF_A_WEIGHT:
                surplus[group] += self._step(indices, wanted, group, +1, float("inf"), rng)
            while moved := self._step(indices, wanted, group, -1, surplus[group], rng):
                surplus[group] += moved
        return tuple(indices)

    def _step(
        self,
        indices: list[int],
        wanted: Sequence[float],
        group: str,
        direction: Literal[1, -1],
        at_most: float,
        rng: random.Random,
    ) -> float:
        """Move one gene of the group. Zeros gained, negative where lost; 0 where none can move."""
        choices: list[tuple[int, float, float]] = []
        for number, gene in enumerate(self.genes):
            after = indices[number] + direction
            if gene.group != group or not 0 <= after < len(gene.ratios):
                continue
            gained = gene.size * (gene.ratios[after] - gene.ratios[indices[number]])
            if abs(gained) <= at_most + HALF_A_WEIGHT:
                behind = direction * (wanted[number] - gene.ratios[indices[number]])
                choices.append((number, round(behind, 6), gained))
        if not choices:
            return 0.0
        furthest = max(behind for _, behind, _ in choices)
        equals = [choice for choice in choices if choice[1] == furthest]
        sizes = [self.genes[number].size for number, _, _ in equals]
        number, _, gained = rng.choices(equals, weights=sizes)[0]
        indices[number] += direction
        return gained

    def crossover(self, a: Genome, b: Genome, rng: random.Random) -> Genome:
        """Each gene from either parent. May miss the budget."""
        return tuple(rng.choice(pair) for pair in zip(a, b, strict=True))

    def mutate(self, genome: Genome, chance: float, rng: random.Random) -> Genome:
        """Each gene one step up or down with this chance, one at least. May miss the budget."""
        chosen = [number for number in range(len(genome)) if rng.random() < chance]
        mutated = list(genome)
        for number in chosen or [rng.randrange(len(genome))]:
            after = mutated[number] + rng.choice((-1, 1))
            mutated[number] = min(max(after, 0), len(self.genes[number].ratios) - 1)
        return tuple(mutated)

    def wanted(self, genome: Genome) -> list[float]:
        """The ratios of a genome's genes."""
        return [gene.ratios[index] for gene, index in zip(self.genes, genome, strict=True)]


def _nearest_index(ratios: Sequence[float], value: float) -> int:
    return min(range(len(ratios)), key=lambda index: abs(ratios[index] - value))


def ratio_grid(asked: float, step: float, reach: float) -> tuple[float, ...]:
    """`asked` and what lies whole steps from it, up to `reach` away, from 0 up to but not 1."""
    count = int(reach / step + 1e-9)
    around = (
        round(asked + number * step, 10) if number else asked for number in range(-count, count + 1)
    )
    return tuple(ratio for ratio in around if 0 <= ratio < 1)


class Judge(Protocol):
    """Who knows what a candidate is worth: a model with a bank of pruned layers, or a test."""

    @property
    def num_tokens(self) -> Mapping[Part, int]:
        """Answer tokens in each part of the samples."""
        ...

    def losses(self, genomes: Sequence[Genome], part: Part) -> list[float]:
        """Cross-entropy of each candidate, in nats, summed over the answer tokens of the part."""
        ...

    def norm(self, genome: Genome) -> float:
        """The generalization term without its weight."""
        ...

    def tune(self, genomes: Sequence[Genome]) -> None:
        """Train the projector on the mean loss of these candidates."""
        ...

    def untune(self) -> None:
        """Put the projector back to what it was before the last `tune`."""
        ...


@dataclass(frozen=True)
class Candidate:
    """A genome that was tried on all samples."""

    genome: Genome
    objective: float
    loss: float
    """Mean cross-entropy per answer token, nats."""
    norm: float


@dataclass
class State:
    """A search after a number of generations: all that the next one depends on."""

    generation: int
    """Of the last one that is finished; the first is 0."""
    eta: float
    best: list[Candidate]
    """The best k, best first."""
    tried: set[Genome]
    """With the projector as it is."""
    history: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """`from_json` gives back an equal state: floats read as they were written."""
        return asdict(self) | {"tried": sorted(self.tried)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "State":
        best = [Candidate(**one | {"genome": tuple(one["genome"])}) for one in value["best"]]
        tried = {tuple(genome) for genome in value["tried"]}
        return cls(value["generation"], value["eta"], best, tried, list(value["history"]))


def search(
    space: SearchSpace,
    spec: SlimLLaVASpec,
    judge: Judge,
    *,
    seed: int,
    starts: Sequence[Sequence[float]] = (),
    state: State | None = None,
    finished: Callable[[State], None] = lambda state: None,
) -> State:
    """Evolve `spec.generations` generations beyond the first.

    Args:
        starts: more for the first generation to hold, beside the uniform one and ATP's slopes: a
            wanted ratio for each gene.
        state: where an earlier attempt got to.
        finished: called after every generation, to keep the state.

    Returns:
        The last state; its `best[0]` is the winner. The uniform allocation is tried on all samples,
        so that on them the winner is never worse.
    """
    if state is None:
        state = _first_generation(space, spec, judge, seed, starts)
        finished(state)
    for generation in range(state.generation + 1, spec.generations + 1):
        state = _next_generation(space, spec, judge, seed, state, generation)
        finished(state)
    return state


def _first_generation(
    space: SearchSpace,
    spec: SlimLLaVASpec,
    judge: Judge,
    seed: int,
    starts: Sequence[Sequence[float]],
) -> State:
    rng = _rng(seed, 0)
    uniform = space.nearest([gene.asked for gene in space.genes], rng)
    norm, loss = judge.norm(uniform), _mean_loss(judge, [uniform])[0]
    eta = loss / norm if spec.eta is None else spec.eta
    reference = Candidate(uniform, loss + eta * norm, loss, norm)
    slopes = [_slope(space, tilt) for tilt in _tilts(spec)]
    chosen = dict.fromkeys([uniform])
    for wanted in [*starts, *slopes]:
        if len(chosen) < spec.population:
            chosen[space.nearest(wanted, rng)] = None
    for _ in range(ATTEMPTS_PER_CHILD * spec.population):
        if len(chosen) < spec.population:
            chosen[space.nearest(_random_wanted(space, spec.reach, rng), rng)] = None
    others = [genome for genome in chosen if genome != uniform]
    judged, num_rejected = _judge_all(others, spec, judge, eta)
    state = State(0, eta, _best([reference, *judged], spec), set(chosen))
    state.history.append(_record(state, space, len(chosen), num_rejected, None))
    return state


def _next_generation(
    space: SearchSpace, spec: SlimLLaVASpec, judge: Judge, seed: int, before: State, generation: int
) -> State:
    rng = _rng(seed, generation)
    children = _children(space, spec, before, rng)
    judged, num_rejected = _judge_all(children, spec, judge, before.eta)
    state = State(
        generation,
        before.eta,
        _best([*before.best, *judged], spec),
        before.tried | set(children),
        list(before.history),
    )
    projector = None
    if spec.projector_every and generation % spec.projector_every == 0:
        projector = _tune(state, judge)
    state.history.append(_record(state, space, len(children), num_rejected, projector))
    return state


def _children(
    space: SearchSpace, spec: SlimLLaVASpec, state: State, rng: random.Random
) -> list[Genome]:
    """As many as the population has beside the best k; fewer where all near them were tried."""
    parents = [one.genome for one in state.best]
    wanted_number = spec.population - len(parents)
    children: dict[Genome, None] = {}
    for _ in range(ATTEMPTS_PER_CHILD * wanted_number):
        if len(children) == wanted_number:
            break
        parent = rng.choice(parents)
        if len(parents) > 1 and rng.random() < spec.crossover:
            one, other = rng.sample(parents, 2)
            parent = space.crossover(one, other, rng)
        mutated = space.mutate(parent, spec.mutation, rng)
        child = space.nearest(space.wanted(mutated), rng)
        if child not in state.tried:
            children[child] = None
    return list(children)


def _judge_all(
    genomes: Sequence[Genome], spec: SlimLLaVASpec, judge: Judge, eta: float
) -> tuple[list[Candidate], int]:
    """Try candidates on the first samples, the better half (of an odd number, more) on the rest.

    Returns:
        Those tried on all, and how many were not.
    """
    if not genomes:
        return [], 0
    norms = {genome: judge.norm(genome) for genome in genomes}
    first = dict(zip(genomes, judge.losses(genomes, "first"), strict=True))
    num_first, num_rest = judge.num_tokens["first"], judge.num_tokens["rest"]
    promising = list(genomes)
    if num_rest:
        promising.sort(key=lambda genome: first[genome] / num_first + eta * norms[genome])
        promising = promising[: (len(genomes) + 1) // 2]
    rest = judge.losses(promising, "rest") if num_rest else [0.0] * len(promising)
    judged = []
    for genome, more in zip(promising, rest, strict=True):
        loss = (first[genome] + more) / (num_first + num_rest)
        judged.append(Candidate(genome, loss + eta * norms[genome], loss, norms[genome]))
    return judged, len(genomes) - len(promising)


def _tune(state: State, judge: Judge) -> dict[str, Any]:
    """Train the projector for the best k and judge them again.

    It is kept only if it serves them on average, and the best of them is then no worse than before.
    """
    genomes = [one.genome for one in state.best]
    before = fmean(one.loss for one in state.best)
    judge.tune(genomes)
    losses = _mean_loss(judge, genomes)
    rejudged = [
        Candidate(one.genome, loss + state.eta * one.norm, loss, one.norm)
        for one, loss in zip(state.best, losses, strict=True)
    ]
    rejudged.sort(key=_by_objective)
    serves = fmean(losses) < before and rejudged[0].objective <= state.best[0].objective
    record = {"loss_before": before, "loss_after": fmean(losses), "kept": serves}
    if not serves:
        judge.untune()
        return record
    state.best = rejudged
    state.tried = set(genomes)  # the others may do better with this projector
    return record


def _mean_loss(judge: Judge, genomes: Sequence[Genome]) -> list[float]:
    parts: list[Part] = [part for part in ("first", "rest") if judge.num_tokens[part]]
    losses = zip(*(judge.losses(genomes, part) for part in parts), strict=True)
    return [sum(each) / sum(judge.num_tokens[part] for part in parts) for each in losses]


def _best(candidates: Sequence[Candidate], spec: SlimLLaVASpec) -> list[Candidate]:
    return sorted(candidates, key=_by_objective)[: spec.survivors]


def _by_objective(candidate: Candidate) -> tuple[float, Genome]:
    return candidate.objective, candidate.genome


def _record(
    state: State,
    space: SearchSpace,
    num_tried: int,
    num_rejected: int,
    projector: dict[str, Any] | None,
) -> dict[str, Any]:
    """A generation, for `history.json`."""
    best = state.best[0]
    return {
        "generation": state.generation,
        "tried": num_tried,
        "rejected_early": num_rejected,
        "best_objective": best.objective,
        "best_loss": best.loss,
        "best_norm": best.norm,
        "best_genome": best.genome,
        "best_excess": space.excess(best.genome),
        "mean_objective": fmean(one.objective for one in state.best),
        "projector": projector,
    }


def _tilts(spec: SlimLLaVASpec) -> list[float]:
    """By how much the last block loses more than the average: ATP's slopes, and their mirror."""
    count = int(spec.reach / spec.step + 1e-9)
    return [sign * number * spec.step for number in range(1, count + 1) for sign in (1, -1)]


def _slope(space: SearchSpace, tilt: float) -> list[float]:
    return [gene.asked + tilt * (2 * gene.depth - 1) for gene in space.genes]


def _random_wanted(space: SearchSpace, reach: float, rng: random.Random) -> list[float]:
    """Noise around the asked sparsity, sometimes much, sometimes little."""
    scale = reach * rng.random()
    return [gene.asked + rng.uniform(-scale, scale) for gene in space.genes]


def _rng(seed: int, generation: int) -> random.Random:
    return random.Random(f"{seed}/{generation}")  # text is hashed the same by every process
