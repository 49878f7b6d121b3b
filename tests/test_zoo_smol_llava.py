"""smol-llava without its downloads: the names, the checksum, the projector and the packing."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from jobs.errors import ModelError
from workers.zoo import smol_llava
from workers.zoo.train_smol_projector import Asked, Packed, save_projector


def exported_graph(bias_first: bool) -> Any:
    """y = x @ W + b, and the three things the exporter took the names from."""
    onnx = pytest.importorskip("onnx", reason="assembling needs the zoo extra")
    weights = {
        "backbone.layernorm.weight": np.ones(2),
        "backbone.fc1.bias": np.array([5.0, 6.0, 7.0]),
        "decoder.final_conv.bias": np.zeros(1),
        "onnx::MatMul_7": np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
        "onnx::Reshape_2": np.full((1, 4, 2), 9.0),
        "onnx::Concat_1": np.full((1, 1, 2), 8.0),
    }
    added = ["backbone.fc1.bias", "product"] if bias_first else ["product", "backbone.fc1.bias"]
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["product"]),
        onnx.helper.make_node("Add", added, ["y"]),
        onnx.helper.make_node("MatMul", ["y", "y"], ["attention"]),
    ]
    initializers = [
        onnx.numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items()
    ]
    return onnx.helper.make_graph(nodes, "fake", [], [], initializers)


@pytest.mark.parametrize("bias_first", [True, False])
def test_an_anonymous_matmul_gets_its_name_from_the_bias_and_is_transposed(bias_first: bool):
    """ONNX multiplies x @ W, torch keeps W transposed; the exporter writes Add either way round."""
    state = smol_llava.vision_state(exported_graph(bias_first))

    assert state["fc1.weight"].tolist() == [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]
    assert state["fc1.bias"].tolist() == [5.0, 6.0, 7.0]


def test_the_class_position_stands_before_the_patch_positions():
    """The graph lists them in no order that means anything."""
    state = smol_llava.vision_state(exported_graph(bias_first=True))

    assert state["embeddings.position_embeddings"][0, :, 0].tolist() == [8.0, 9.0, 9.0, 9.0, 9.0]


def test_the_decoder_of_the_package_is_left_out():
    """Its saliency head is no part of DINOv2; from_pretrained would call it unexpected."""
    state = smol_llava.vision_state(exported_graph(bias_first=True))

    assert set(state) == {
        "layernorm.weight", "fc1.weight", "fc1.bias", "embeddings.position_embeddings",
    }  # fmt: skip


def test_a_file_that_is_not_the_pinned_one_is_refused(tmp_path: Path):
    """Weights from a replaced package would be wrong results under a known name."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"something else")

    with pytest.raises(ModelError, match=r"model\.gguf: SHA-256 is [0-9a-f]{64}, we pinned 00"):
        smol_llava.check_sha256(path, "00" * 32)


def test_pins_are_exact_versions_and_whole_checksums():
    for part in (smol_llava.LANGUAGE, smol_llava.VISION):
        assert re.fullmatch(r"[\w-]+==[\d.]+", part.requirement)
        assert re.fullmatch(r"[0-9a-f]{64}", part.sha256)


def test_the_committed_projector_fits_between_the_towers():
    """384 features of DINOv2-S in, 576 of SmolLM2 out, small enough to live in the repository."""
    state = load_file(smol_llava.PROJECTOR)

    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "linear_1.weight": (576, 384),
        "linear_1.bias": (576,),
        "linear_2.weight": (576, 576),
        "linear_2.bias": (576,),
    }
    assert all(tensor.dtype == torch.bfloat16 for tensor in state.values())
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert smol_llava.PROJECTOR.stat().st_size < 1_200_000


def test_a_folder_in_use_is_not_overwritten(tmp_path: Path):
    """And nothing is downloaded before that is known."""
    (tmp_path / "config.json").write_text("{}")

    with pytest.raises(ModelError, match="not empty"):
        smol_llava.assemble(tmp_path)


def test_a_failed_assembly_leaves_nothing_behind(tmp_path: Path):
    def interrupted() -> None:
        with smol_llava.whole(tmp_path / "model") as partial:
            (partial / "config.json").write_text("{}")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()

    assert list(tmp_path.iterdir()) == []


def rendered(messages: list[dict[str, object]], *, asks: bool) -> str:
    import jinja2

    template = jinja2.Environment().from_string(smol_llava.CHAT_TEMPLATE)
    return template.render(messages=messages, add_generation_prompt=asks)


def test_a_prompt_is_the_beginning_of_the_conversation_it_asks_for():
    """Repair masks the prompt out of the loss by its length."""
    content = [{"type": "image"}, {"type": "text", "text": "what color is the shape?"}]
    user = {"role": "user", "content": content}
    assistant = {"role": "assistant", "content": [{"type": "text", "text": "teal"}]}

    prompt = rendered([user], asks=True)
    whole = rendered([user, assistant], asks=False)

    assert prompt == (
        "<|im_start|>user\n<image>\nwhat color is the shape?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert whole == prompt + "teal<|im_end|>\n"


def test_packed_questions_see_the_image_and_not_one_another():
    """Seeing an earlier answer would give the next one away: `blue shape?` after `blue`."""
    one_row = torch.tensor([[0, 0, 1, 1, 2, 2, -1]])
    packed = Packed(one_row, one_row, one_row, one_row)

    seen_TT = packed.mask(torch.float32)[0, 0] == 0

    assert seen_TT.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 1, 0],
        [1, 1, 0, 0, 0, 0, 1],
    ]


class Projector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(nn.functional.gelu(self.linear_1(features)))


def test_the_saved_projector_takes_features_as_the_tower_gives_them(tmp_path: Path):
    """Training standardizes; a stock LLaVA has nowhere to do so. A mean of 100 shows a slip."""
    torch.manual_seed(0)
    trained, mean, std = (
        Projector(),
        torch.tensor([100.0, -3.0, 0.0]),
        torch.tensor([9.0, 1.0, 0.1]),
    )
    raw = mean + std * torch.randn(16, 3)

    save_projector(trained, mean, std, tmp_path / "p.safetensors")
    saved = Projector()
    saved.load_state_dict({n: t.float() for n, t in load_file(tmp_path / "p.safetensors").items()})

    assert torch.allclose(saved(raw), trained((raw - mean) / std), atol=0.1)


def test_questions_are_sorted_by_what_answers_them():
    kinds = [Asked("?", answer, 0).kind for answer in ("teal", "circle", "no")]

    assert kinds == ["colour", "shape", "yes/no"]
