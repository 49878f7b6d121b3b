"""Calibration split over workers: two that share the samples out prune as one does."""

import multiprocessing
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from jobs.methods import SparseGPTSpec, WandaSpec
from jobs.spec import CalibrationSpec, DatasetSpec, ModelSpec, PruneSpec
from jobs.storage import Storage
from workers.calibrate import calibration_batches
from workers.context import Context
from workers.locate import locate
from workers.models import load_model
from workers.prune import load_masks, prune_sequentially, save_report

METHODS = {"wanda": WandaSpec(), "sparsegpt": SparseGPTSpec()}


def prune_demo(folder: Path, rank: int, world: int) -> None:
    """Prune the demo model as one of `world` workers; rank 0 writes the masks."""
    torch.set_num_threads(1)
    if world > 1:
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    calibration = CalibrationSpec(dataset=DatasetSpec(format="easy-vqa"), num_samples=32)
    for name, method in METHODS.items():
        place = Storage(str(folder / f"storage-{name}-{world}"))
        ctx = Context(place, "job", folder / f"scratch-{rank}", torch.device("cpu"))
        ctx.rank, ctx.world = rank, world
        model = load_model(locate(ModelSpec(name="demo")), device=ctx.device)
        spec = PruneSpec(method=method, pattern="2:4", sparsity={"vision": 0.5, "language": 0.5})
        batches = calibration_batches(model, calibration, 0, ctx)
        masks, reports = prune_sequentially(model, spec, calibration, batches, ctx, key="k")
        if rank == 0:
            output = folder / f"{name}-{world}"
            output.mkdir()
            save_report(masks, reports, output)
    if world > 1:
        dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over a file store")
def test_two_workers_give_the_mask_of_one(tmp_path: Path) -> None:
    """Sums in another order round differently, so 1 of 10,000 weights may; a lost half may not."""
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=prune_demo, args=(tmp_path, rank, 2)) for rank in range(2)]
    for worker in workers:
        worker.start()

    prune_demo(tmp_path, 0, 1)
    for worker in workers:
        worker.join(timeout=300)

    assert [worker.exitcode for worker in workers] == [0, 0]
    layers = list(load_model(locate(ModelSpec(name="demo")), device=torch.device("cpu")).layers())
    for name in METHODS:
        one, two = (load_masks(tmp_path / f"{name}-{world}", layers) for world in (1, 2))
        equal = sum(int((one[layer] == two[layer]).sum()) for layer in one)
        assert equal / sum(mask.numel() for mask in one.values()) >= 0.9999
