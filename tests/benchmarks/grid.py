"""CPU seconds of a grid of 12 jobs: calibrated once (`propagate: dense`), or each job for itself.

    python -m tests.benchmarks.grid [MODEL] [--samples N] [--length N] [--threads N]
        [--dtype float32|bfloat16]

Calibrating and pruning alone: loading, evaluating and exporting cost every job the same.
"""

from itertools import product
from statistics import median

from tests.benchmarks.calibrate import Study, arguments_of, prune_spec, study_of
from workers.prune import collect_dense_statistics, prune_from_statistics, prune_sequentially

METHODS = ("wanda", "ria", "sparsegpt", "admm")
SPARSITIES = (0.5, 0.6, 0.7)
GRID = tuple(product(METHODS, SPARSITIES))


def dense(study: Study) -> tuple[float, list[float]]:
    """Seconds of the statistics, and of each job that solves from them."""
    model, batches, ctx = study.start()
    folder = study.scratch / "statistics"
    folder.mkdir()
    started = ctx.now()
    collect_dense_statistics(model, study.calibration(model, "dense"), batches, ctx, folder)
    statistics_s = ctx.now() - started
    jobs_s = []
    for method, sparsity in GRID:
        model, _, ctx = study.start()
        spec, calibration = prune_spec(model, method, sparsity), study.calibration(model, "dense")
        started = ctx.now()
        prune_from_statistics(model, spec, calibration, folder, ctx)
        jobs_s.append(ctx.now() - started)
    return statistics_s, jobs_s


def sequential(study: Study, propagate: str) -> list[float]:
    """Seconds of each job."""
    jobs_s = []
    for method, sparsity in GRID:
        model, batches, ctx = study.start()
        spec, calibration = prune_spec(model, method, sparsity), study.calibration(model, propagate)
        started = ctx.now()
        prune_sequentially(model, spec, calibration, batches, ctx, key="k")
        jobs_s.append(ctx.now() - started)
    return jobs_s


def main() -> None:
    with study_of(arguments_of(__doc__).parse_args()) as study:
        statistics_s, dense_s = dense(study)
        rows = {"dense": [statistics_s + dense_s[0], statistics_s + sum(dense_s), median(dense_s)]}
        for propagate in ("pruned", "true_sequential"):
            jobs_s = sequential(study, propagate)
            rows[propagate] = [jobs_s[0], sum(jobs_s), median(jobs_s)]
    print(f"statistics of the dense model: {statistics_s:.2f} s")
    print(f"{'CPU seconds':20}{'first job':>12}{'12 jobs':>10}{'median job':>14}")
    for name, (first, every, middle) in rows.items():
        print(f"{name:20}{first:12.2f}{every:10.2f}{middle:14.2f}")


if __name__ == "__main__":
    main()
