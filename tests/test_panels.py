"""The walks through a panel: each compiled one against plain torch, and that against the paper.

Shape letters: O output features, P inputs of a panel.
"""

import importlib
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from jobs.methods import SparseGPTSpec
from jobs.pattern import Pattern, Target
from tests.reference import sparsegpt_loop
from tests.test_methods import a_layer
from workers.methods import panel_numba, panel_torch, prune, sparsegpt

TRITON = "workers.methods.panel_triton"
COMPILERS = ["numba", "triton"]
GROUPS = {"unstructured": (0, 0), "2:4": (4, 2), "4:8": (8, 4), "2:3": (3, 1)}


@pytest.fixture
def interpreted():
    """Triton's kernel, run by its interpreter (see conftest.py): on the CPU, with numpy, slowly."""
    return importlib.import_module(TRITON)


@pytest.fixture(params=COMPILERS)
def compiled(request):
    return panel_numba if request.param == "numba" else request.getfixturevalue("interpreted")


def a_panel(num_columns, num_outputs, dtype):
    generator = torch.Generator().manual_seed(num_columns)
    noise_PP = torch.randn(num_columns, num_columns, generator=generator) / num_columns**0.5
    inverse_PP = noise_PP.triu(1) + torch.diag(torch.linspace(1, 3, num_columns))
    current_PO = torch.randn(num_columns, num_outputs, generator=generator)
    drop_PO = torch.rand(num_columns, num_outputs, generator=generator) < 0.5
    return current_PO.to(dtype), inverse_PP.to(dtype), drop_PO


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_compiled_walk_equals_plain_torch(compiled, group, dtype):
    """24 columns are no power of two, and the outputs are a few more than one block."""
    current_PO, inverse_PP, drop_PO = a_panel(24, compiled.BLOCK + 4, dtype)
    if group[0]:
        drop_PO.fill_(True)  # is written, not read
    results = []
    for module in (panel_torch, compiled):
        pruned_PO, dropped_PO = current_PO.clone(), drop_PO.clone()
        module.walk_panel(pruned_PO, inverse_PP, dropped_PO, *group)
        results.append((pruned_PO, dropped_PO))

    (expected_PO, expected_drop_PO), (found_PO, found_drop_PO) = results
    assert torch.equal(found_drop_PO, expected_drop_PO)
    assert not found_PO[found_drop_PO].any()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    assert torch.allclose(found_PO, expected_PO, rtol=0, atol=tolerance)


def test_a_walk_without_a_group_may_have_any_number_of_columns(compiled):
    current_PO, inverse_PP, drop_PO = a_panel(13, 3, torch.float64)
    expected_PO = current_PO.clone()
    panel_torch.walk_panel(expected_PO, inverse_PP, drop_PO, 0, 0)

    compiled.walk_panel(current_PO, inverse_PP, drop_PO, 0, 0)

    assert torch.allclose(current_PO, expected_PO, rtol=0, atol=1e-13)


def test_among_equals_in_a_group_the_first_goes(compiled):
    current_PO = torch.ones(4, 1)
    drop_PO = torch.empty(4, 1, dtype=torch.bool)

    compiled.walk_panel(current_PO, torch.eye(4), drop_PO, 4, 2)

    assert drop_PO[:, 0].tolist() == [True, True, False, False]


@pytest.mark.parametrize("kept_of", [None, (2, 4)])
@pytest.mark.parametrize("compiler", ["torch", *COMPILERS])
def test_every_walk_gives_the_published_result(monkeypatch, request, kept_of, compiler):
    """And its losses: the squares of its columns' errors sum to the change of the output."""
    modules = {"torch": panel_torch, "numba": panel_numba}
    module = modules.get(compiler) or request.getfixturevalue("interpreted")
    monkeypatch.setattr(sparsegpt, "panel_walker", lambda device: module.walk_panel)
    weight_OI, statistics = a_layer(20, 56, num_tokens=200)
    weight_OI, gram_II = weight_OI.double(), statistics.gram_II.double()
    expected_OI, drop_OI, loss = sparsegpt_loop(
        weight_OI, gram_II, 4, 0.5, kept_of=kept_of, block_size=24
    )

    target = Target(0.5, Pattern(*kept_of) if kept_of else Pattern())
    options = SparseGPTSpec(mode="reference", block_size=24)
    pruned = prune(weight_OI, statistics, target, options)

    assert torch.equal(~pruned.keep_OI, drop_OI)
    assert torch.allclose(pruned.weight_OI, expected_OI, rtol=0, atol=1e-11)
    hessian_II = gram_II / 2
    hessian_II.diagonal().add_(0.01 * hessian_II.diagonal().mean())
    change_OI = pruned.weight_OI - weight_OI
    assert ((change_OI @ hessian_II) * change_OI).sum() == pytest.approx(loss, rel=1e-4)


def compile_for_gpus(group: int, num_dropped: int) -> list[str]:
    """PTX for A100, and for H100 and H200. It also becomes machine code; no GPU is needed."""
    os.environ.pop("TRITON_INTERPRET", None)
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    module = importlib.import_module(TRITON)
    signature = {f"{name}_ptr": "*fp32" for name in ("current", "drop", "push", "cost")}
    signature["drop_ptr"] = "*i1"
    signature |= {"num_columns": "i32", "num_outputs": "i32"}
    constants = {"PADDED": 128, "GROUP": group or 1, "NUM_DROPPED": num_dropped}
    constants["BLOCK"] = module.BLOCK
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(module._walk, signature=signature, constexprs=constants)
    kernels = [compile(source, target=GPUTarget("cuda", sm, 32)) for sm in (80, 90)]
    assert all(kernel.asm["cubin"] for kernel in kernels)
    return [kernel.asm["ptx"] for kernel in kernels]


def test_the_triton_kernel_compiles_for_gpus():
    """In a process of its own: the interpreter leaves its mark on Triton."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        codes = [
            code
            for group in ((0, 0), (4, 2))
            for code in pool.submit(compile_for_gpus, *group).result()
        ]

    assert len(codes) == 4
    assert all(".local" not in code for code in codes)  # nothing spills out of the registers
