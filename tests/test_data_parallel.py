"""Calibration split over workers: two that share the samples out prune as one does."""

import multiprocessing
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from jobs.methods import SparseGPTSpec, WandaSpec
from jobs.spec import CalibrationSpec, DatasetSpec, ModelSpec, PruneSpec
from jobs.storage import Storage
from workers.calibrate import calibration_batches
from workers.context import Context
from workers.locate import locate
from workers.models import load_model
from workers.prune import prune_sequentially

WEIGHTS = "model.safetensors"
CASES: dict[str, tuple[WandaSpec | SparseGPTSpec, dict[str, str]]] = {
    "wanda": (WandaSpec(), {}),
    "sparsegpt": (SparseGPTSpec(bias="compensate"), {}),
    "atv": (SparseGPTSpec(), {"tokens": "atv"}),
    "true_sequential": (SparseGPTSpec(bias="compensate"), {"propagate": "true_sequential"}),
}


def prune_demo(folder: Path, rank: int, world: int) -> None:
    """Prune the demo model as one of `world` workers; rank 0 writes the weights."""
    torch.set_num_threads(1)
    if world > 1:
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for name, (method, changes) in CASES.items():
        dataset = DatasetSpec(format="easy-vqa")
        calibration = CalibrationSpec(dataset=dataset, num_samples=16, **changes)
        place = Storage(str(folder / f"storage-{name}-{world}"))
        ctx = Context(place, "job", folder / f"scratch-{rank}", torch.device("cpu"))
        ctx.rank, ctx.world = rank, world
        model = load_model(locate(ModelSpec(name="demo")), device=ctx.device)
        spec = PruneSpec(method=method, pattern="2:4", sparsity={"vision": 0.5, "language": 0.5})
        batches = calibration_batches(model, calibration, 0, ctx)
        prune_sequentially(model, spec, calibration, batches, ctx, key="k")
        if rank == 0:
            output = folder / f"{name}-{world}"
            output.mkdir()
            save_file({n: p.data for n, p in model.module.named_parameters()}, output / WEIGHTS)
    if world > 1:
        dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over a file store")
def test_two_workers_give_the_weights_of_one(tmp_path: Path) -> None:
    """Sums in another order round differently, so 1 of 10,000 weights may; a lost half may not."""
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=prune_demo, args=(tmp_path, rank, 2)) for rank in range(2)]
    for worker in workers:
        worker.start()

    prune_demo(tmp_path, 0, 1)
    for worker in workers:
        worker.join(timeout=300)

    assert [worker.exitcode for worker in workers] == [0, 0]
    for name in CASES:
        one, two = (load_file(tmp_path / f"{name}-{world}" / WEIGHTS) for world in (1, 2))
        equal = sum(int((one[parameter] == two[parameter]).sum()) for parameter in one)
        assert equal / sum(weight.numel() for weight in one.values()) >= 0.9999, name
