"""SparseGPT's walk through one panel in plain torch: for any device, and to hold the others to.

Shape letters: O output features, P inputs of a panel, L of a leaf.
"""

import torch
from torch import Tensor

from workers.masks import rank_in_groups

LEAF = 8
"""Columns walked one by one between two matrix products, unstructured. Under N:M it is M."""


def walk_panel(
    current_PO: Tensor, inverse_PP: Tensor, drop_PO: Tensor, group: int, num_dropped: int
) -> None:
    """Prune a panel's columns from first to last.

    Updates wait until they make a matrix product: within a panel of leaf, 2, 4 ... columns.

    Args:
        current_PO: transposed, so that a step touches consecutive memory. Becomes the pruned panel.
        inverse_PP: upper triangular, see `Factor`.
        drop_PO: bool, True where dropped. Under N:M it is written, not read.
        group, num_dropped: under N:M, M and M - N; a group's mask is decided when its turn comes,
            among equals the first is dropped. Otherwise 0 and 0.
    """
    num_columns, num_outputs = current_PO.shape
    leaf = group or LEAF
    if num_columns % leaf:
        leaf = 1
    cost_P1 = inverse_PP.diagonal().pow(-2)[:, None]
    push_PP = inverse_PP / -inverse_PP.diagonal()[:, None]  # per unit dropped from each column
    dropped_PO = torch.empty_like(current_PO)
    work_LO, gate_LO = current_PO.new_empty(2, leaf, num_outputs)
    push_LLO = current_PO.new_empty(leaf, leaf, num_outputs)
    # views are made once, and all leaves' in one call: making one takes as long as using it
    steps = [(work_LO[i + 1 :], push_LLO[i, i + 1 :], work_LO[i]) for i in range(leaf - 1)]
    blocks = push_PP.view(-1, leaf, num_columns // leaf, leaf).diagonal(dim1=0, dim2=2)
    leaves = zip(
        range(leaf, num_columns + 1, leaf),
        torch.split(current_PO, leaf),
        torch.split(drop_PO, leaf),
        torch.split(dropped_PO, leaf),
        torch.split(cost_P1, leaf),
        blocks[..., None].unbind(2),
        strict=True,
    )
    for high, current_LO, drop_LO, dropped_LO, cost_L1, push_LL1 in leaves:
        work_LO.copy_(current_LO)
        if num_dropped:
            torch.lt(rank_in_groups(work_LO.square().mul_(cost_L1)), num_dropped, out=drop_LO)
        gate_LO.copy_(drop_LO)
        torch.mul(push_LL1, gate_LO[:, None], out=push_LLO)
        for later_LO, push_LO, column_O in steps:
            later_LO.addcmul_(push_LO, column_O)
        torch.mul(work_LO, gate_LO, out=dropped_LO)
        torch.sub(work_LO, dropped_LO, out=current_LO)
        if high < num_columns:
            leaves_done = high // leaf
            block = leaf * (leaves_done & -leaves_done)  # largest power of 2 that divides them
            back, ahead = slice(high - block, high), slice(high, high + block)
            current_PO[ahead].addmm_(push_PP[back, ahead].T, dropped_PO[back])
