"""What one SparseLoRA layer costs, forward and backward, beside the obvious ways to write it.

    python tests/benchmarks/lora.py [--device cuda]

ours     workers.lora: the masked product by hand, nothing of the weight's size stored
naive    autograd of x ((W + s B A) * M)ᵀ: the same numbers
lora     x Wᵀ + s (x Aᵀ) Bᵀ: cheaper, but merging it would destroy the zeros

`stored` is what autograd keeps from forward to backward beside the parameters and x; a model keeps
it for all its layers at once. `peak` is the most that was allocated at any moment.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from workers.lora import SparseLoraLinear, add_sparse_lora

RANK, ALPHA = 8, 16.0
SHAPES = [(576, 576, 2048), (576, 1536, 2048), (2048, 2048, 2048)]
"""Inputs, outputs, tokens."""

Run = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    print(f"{'in':>5} {'out':>5} {'tokens':>6}  way     ms  stored MiB  peak MiB")
    for num_inputs, num_outputs, num_tokens in SHAPES:
        layer, ways = three_ways(num_inputs, num_outputs, device)
        dtype = layer.base_layer.weight.dtype
        x = torch.randn(num_tokens, num_inputs, device=device, dtype=dtype, requires_grad=True)
        for name, run in ways.items():
            milliseconds = median(time_once(run, x) for _ in range(arguments.repeats)) * 1e3
            print(
                f"{num_inputs:5} {num_outputs:5} {num_tokens:6}  {name:5} {milliseconds:5.1f} "
                f"{stored_mib(run, x, layer):11.2f} {peak_mib(run, x):9.1f}"
            )


def three_ways(
    num_inputs: int, num_outputs: int, device: torch.device
) -> tuple[SparseLoraLinear, dict[str, Run]]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = nn.Sequential(nn.Linear(num_inputs, num_outputs, bias=False)).to(device, dtype)
    mask_OI = torch.rand(num_outputs, num_inputs, device=device) < 0.5
    add_sparse_lora(model, {"0": mask_OI}, ranks={"0": RANK}, alpha=ALPHA, seed=0)
    layer = model[0]
    assert isinstance(layer, SparseLoraLinear)
    W = layer.base_layer.weight
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    scale = ALPHA / RANK
    return layer, {
        "ours": layer,
        "naive": lambda x: x @ ((W + scale * (B @ A)) * mask_OI).T,
        "lora": lambda x: x @ W.T + scale * ((x @ A.T) @ B.T),
    }


def forward_backward(run: Run, x: Tensor) -> None:
    run(x).sum().backward()


def time_once(run: Run, x: Tensor) -> float:
    clock = time.perf_counter if x.is_cuda else time.thread_time  # others may use the machine
    started = clock()
    forward_backward(run, x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return clock() - started


def stored_mib(run: Run, x: Tensor, layer: nn.Module) -> float:
    own = {tensor.untyped_storage().data_ptr() for tensor in [x, *layer.parameters()]}
    stored: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            stored[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = run(x)
    del output
    return sum(stored.values()) / 2**20


def peak_mib(run: Run, x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward(run, x)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        forward_backward(run, x)
    now = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak / 2**20


if __name__ == "__main__":
    main()
