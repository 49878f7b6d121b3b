"""A picture of a search: its objective over the generations, and the sparsity that it found."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.plot import empty_canvas


def draw_history(history: Mapping[str, Any], to: Path) -> None:
    """Draw a search's `history.json`, as PNG or SVG by the name's ending.

    Left, by generation: the best objective, its loss, and the mean objective of the survivors; a
    dotted line where a tuned projector was kept. Right, by depth in the tower: what each gene was
    given, and what uniform would have given it.

    Raises:
        SpecError: another ending, or matplotlib is not installed.
    """
    figure = empty_canvas(to, width=10)
    left, right = figure.subplots(1, 2)
    _draw_generations(left, history)
    _draw_sparsity(right, history)
    figure.savefig(to)


def _draw_generations(axes: Any, history: Mapping[str, Any]) -> None:
    records = history["generations"]
    numbers = [record["generation"] for record in records]
    for name, label in (
        ("mean_objective", "objective, mean of survivors"),
        ("best_objective", "objective, best"),
        ("best_loss", "its loss, nats per answer token"),
    ):
        axes.plot(numbers, [record[name] for record in records], marker="o", label=label)
    for record in records:
        if record["projector"] and record["projector"]["kept"]:
            axes.axvline(record["generation"], color="grey", linestyle=":")
    axes.set(xlabel="generation", title=f"search (eta {history['eta']:.3g})")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_sparsity(axes: Any, history: Mapping[str, Any]) -> None:
    genes = history["genes"].values()
    for tower in dict.fromkeys(gene["tower"] for gene in genes):
        its = [gene for gene in genes if gene["tower"] == tower]
        depths = [gene["depth"] for gene in its]
        (found,) = axes.plot(depths, [gene["found"] for gene in its], "o", label=tower)
        asked = [gene["asked"] for gene in its]
        axes.plot(depths, asked, linestyle="--", linewidth=1, color=found.get_color())
    axes.set(xlabel="depth in the tower", ylabel="sparsity", title="found (dashed: uniform)")
    axes.grid(alpha=0.3)
    axes.legend()
