"""Distillation targets: exact when nothing is left out, honest about the rest when it is."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from jobs.errors import NumericError, StorageError
from jobs.storage import Storage
from workers import teacher
from workers.context import Context
from workers.teacher import dense_targets, kl_to_teacher, load_targets, rows_of, save_targets

TEMPERATURE = 2.0


def tiny_llama(vocab_size: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def samples(vocab_size: int) -> list[dict[str, Tensor]]:
    """Of 6, 8, 7 tokens; the answers have 2, 4, 3."""
    made = []
    for length in (6, 8, 7):
        ids = torch.arange(length) * 5 % vocab_size
        labels = ids.clone()
        labels[:4] = -100
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def targets_of(model: nn.Module, vocab_size: int, folder: Path, batch_size: int = 2):
    ctx = Context(Storage(str(folder)), "job", folder, torch.device("cpu"))
    return dense_targets(
        model,
        samples(vocab_size),
        pad_id=0,
        temperature=TEMPERATURE,
        batch_size=batch_size,
        ctx=ctx,
    )


def answer_logits_one_by_one(model: nn.Module, vocab_size: int) -> Tensor:
    rows = []
    for sample in samples(vocab_size):
        logits_TV = model(input_ids=sample["input_ids"][None]).logits[0]
        rows.append(logits_TV[3:-1])  # the logits at 3 predict token 4, the first of the answer
    return torch.cat(rows)


def exact_kl(dense: nn.Module, student: nn.Module, vocab_size: int) -> Tensor:
    p = answer_logits_one_by_one(dense, vocab_size).div(TEMPERATURE).log_softmax(1)
    q = answer_logits_one_by_one(student, vocab_size).div(TEMPERATURE).log_softmax(1)
    return TEMPERATURE**2 * nn.functional.kl_div(q, p, log_target=True, reduction="sum")


@torch.no_grad()
def test_a_vocabulary_of_at_most_k_gives_the_exact_divergence(tmp_path: Path):
    dense, student = tiny_llama(50, seed=0), tiny_llama(50, seed=1)

    targets = targets_of(dense, 50, tmp_path)

    rows = rows_of(targets, [0, 1, 2])
    divergence = kl_to_teacher(answer_logits_one_by_one(student, 50), rows, TEMPERATURE)
    torch.testing.assert_close(divergence, exact_kl(dense, student, 50))


@torch.no_grad()
def test_the_rest_counts_as_one_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Merging tokens loses information: the divergence is smaller, but not by much at K = 16."""
    monkeypatch.setattr(teacher, "TOP_K", 16)
    dense, student = tiny_llama(50, seed=0), tiny_llama(50, seed=1)

    rows = rows_of(targets_of(dense, 50, tmp_path), [0, 1, 2])
    divergence = kl_to_teacher(answer_logits_one_by_one(student, 50), rows, TEMPERATURE)

    mass_N = rows["log_prob"].exp().sum(dim=1) + rows["log_rest"].exp()
    torch.testing.assert_close(mass_N, torch.ones(9))
    exact = exact_kl(dense, student, 50)
    assert 0.5 * exact < divergence < exact


@pytest.mark.parametrize("top_k", [16, 64])
def test_the_dense_model_is_at_no_distance_from_itself(
    top_k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The gradient is zero too, and no NaN: with K = V there is no rest, and log 0 is near."""
    monkeypatch.setattr(teacher, "TOP_K", top_k)
    dense = tiny_llama(50, seed=0)
    rows = rows_of(targets_of(dense, 50, tmp_path), [0, 1, 2])
    logits_NV = answer_logits_one_by_one(dense, 50).detach().requires_grad_()

    divergence = kl_to_teacher(logits_NV, rows, TEMPERATURE)
    divergence.backward()

    assert abs(divergence.item()) < 1e-4
    assert float(logits_NV.grad.abs().max()) < 1e-4


def test_rows_follow_the_samples_that_are_asked_for(tmp_path: Path):
    targets = targets_of(tiny_llama(50, seed=0), 50, tmp_path)

    picked = rows_of(targets, [2, 0])

    assert targets["start"].tolist() == [0, 2, 6, 9]
    assert torch.equal(picked["token"], targets["token"][[6, 7, 8, 0, 1]])
    assert len(rows_of(targets, [])["log_rest"]) == 0


def test_batches_split_differently_give_the_same_targets(tmp_path: Path):
    model = tiny_llama(50, seed=0)

    by_two, at_once = (targets_of(model, 50, tmp_path, batch_size=size) for size in (2, 3))

    torch.testing.assert_close(by_two["log_prob"], at_once["log_prob"])


def test_targets_survive_the_file_and_a_damaged_file_says_so(tmp_path: Path):
    targets = targets_of(tiny_llama(50, seed=0), 50, tmp_path)
    path = tmp_path / "targets.safetensors"

    save_targets(targets, path)

    loaded = load_targets(path)
    assert targets.keys() == loaded.keys()
    assert all(torch.equal(targets[name], loaded[name]) for name in targets)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(StorageError, match=r"targets\.safetensors cannot be read"):
        load_targets(path)


def test_a_dense_model_that_gives_nan_is_no_teacher(tmp_path: Path):
    model = tiny_llama(50, seed=0)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan

    with pytest.raises(NumericError, match="teacher"):
        targets_of(model, 50, tmp_path)
