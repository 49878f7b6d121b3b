"""Sweeps, models and rows are passed around: reading somebody else's must not harm who reads.

Each attack is refused with a message, in seconds; nothing is run, nothing is written elsewhere.
What a poisoned storage may hold beyond this: `test_storage.py`, `test_leaderboard.py`.
"""

import contextlib
import io
import json
import os
import pickle
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from jobs.errors import ModelError, PrunefleetError
from jobs.result import JobResult, Score
from jobs.spec import ModelSpec
from jobs.storage import Storage
from jobs.sweep import MAX_FILE_BYTES, SweepError, parse_sweep, read_sweep
from orchestrator import leaderboard
from orchestrator.tables import print_leaderboard
from orchestrator.terminal import visible
from tests.families import make_tiny
from tests.test_leaderboard import MANY
from workers.locate import locate, tensor_shapes
from workers.models import load_model

SWEEP = """\
name: {name}
model: {model}
grid: {{method: {method}, sparsity: {sparsity}, pattern: {pattern}}}
repair: {repair}
seed: {seed}
evaluate: {evaluate}
"""
PLAIN = {
    "name": "s",
    "model": "demo",
    "method": "wanda",
    "sparsity": "0.5",
    "pattern": "unstructured",
    "repair": "none",
    "seed": "0",
    "evaluate": "easy-vqa",
}
THOUSAND = "[" + ", ".join(f"0.{i:03}" for i in range(1000)) + "]"
SEEDS = "[" + ", ".join(map(str, range(1000))) + "]"
REPAIRS = "[" + ", ".join(["sparse_lora"] * 1000) + "]"
VALUES = {
    "a tag that makes a folder": ("model", "!!python/object/apply:os.mkdir [trace]", "constructor"),
    "a tag that is a module": ("model", "!!python/module:subprocess", "constructor"),
    "a tag that is a name": ("seed", "!!python/name:os.system", "constructor"),
    "10^9 points": ("sparsity+seed+repair", "", "1000000000 points, more than 10000"),
    "an integer of 4,000 digits": ("seed", "9" * 4000, "an integer beyond 64 bits"),
    "an integer of 500,000 digits": ("seed", "9" * 500_000, "not valid YAML"),
    "a hexadecimal one": ("seed", "0x" + "f" * 10_000, "an integer beyond 64 bits"),
    "an integer in base 60": ("seed", "1" + ":59" * 1000, "seed"),
    "a float beyond all": ("sparsity", "1.0e+999", "sparsity"),
    "no number": ("sparsity", ".nan", "sparsity"),
    "100,000 lists in each other": ("model", "[" * 100_000, "not valid YAML"),
    "100,000 values": ("seed", "[" + "1, " * 100_000 + "1]", "more than 20000 values"),
    "a name that leads out": ("name", "../../etc/cron.d/x", "name"),
    "a name that is a path": ("name", "/etc/passwd", "name"),
    "a name with an end": ("name", r'"s\0.yaml"', "U+0000"),
    "a model that retitles": ("model", r'"\e]0;owned\a"', "U+001B"),
    "a model written backwards": ("model", r'"\u202Eomed"', "U+202E"),
    "half a character": ("model", r'"\uD800"', "s.yaml"),
    "a method with an escape": ("method", r'"\e[2Jwanda"', "U+001B"),
    "a dataset with an end": ("evaluate", r'{dataset: {format: vqa, path: "a\0b"}}', "U+0000"),
    "a device for a dataset": ("evaluate", "{dataset: {format: x, path: /dev/zero}}", "format"),
}


@pytest.mark.parametrize("attack", VALUES)
def test_a_hostile_value_is_refused_at_once(
    attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, value, expected = VALUES[attack]
    values = PLAIN | {place: value}
    if "+" in place:
        values |= {"sparsity": THOUSAND, "seed": SEEDS, "repair": REPAIRS}
    monkeypatch.chdir(tmp_path)
    started = time.process_time()

    with pytest.raises(SweepError) as caught:
        parse_sweep(SWEEP.format(**values), "s.yaml", base=tmp_path)

    assert expected in caught.value.message
    assert len(caught.value.message) < 2_000_000
    assert caught.value.message.encode()
    assert time.process_time() - started < 20
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_100_mb_or_without_an_end_is_not_read(tmp_path: Path) -> None:
    large, pipe = tmp_path / "large.yaml", tmp_path / "pipe.yaml"
    with large.open("wb") as file:
        file.truncate(100 * MAX_FILE_BYTES)
    os.mkfifo(pipe)

    for path, reason in [(large, "larger than"), (pipe, "no file"), ("/dev/zero", "no file")]:
        with pytest.raises(SweepError, match=reason):
            read_sweep(Path(path))


YAML_LIKE = st.text(
    alphabet="{}[]:,&*!-?#'\"\n <>|%@`~0123456789.eEx+_abnul\0\x1b\u202e", max_size=80
)
MIXED = st.builds(
    lambda start, place, text: start[:place] + text + start[place:],
    st.just(SWEEP.format(**PLAIN)),
    st.integers(0, 150),
    YAML_LIKE,
)


@settings(max_examples=MANY, deadline=None)
@given(MIXED)
def test_whatever_is_typed_into_a_sweep_it_is_a_sweep_or_a_sweep_error(text: str) -> None:
    """A sweep that reads is also one whose settings can be written down again."""
    try:
        sweep = parse_sweep(text, "s.yaml", base=Path("/nowhere"))
    except SweepError as error:
        error.message.encode()
        return
    assert sweep.model_dump_json()
    assert "\x1b" not in repr(sweep)


# ---- models ----


class Trap:
    """Unpickled, it leaves a trace. So would anything else it wanted to do."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.trace),)


def test_a_pickle_is_not_read_in_place_of_weights(tmp_path: Path) -> None:
    """Under its own name it is not looked for; under a safetensors name it is none."""
    model, trace = make_tiny("llama", tmp_path / "model"), tmp_path / "trace"
    weights = model / "model.safetensors"
    bad = pickle.dumps(Trap(trace))
    (model / "pytorch_model.bin").write_bytes(bad)
    assert load_model(model, device=torch.device("cpu"))

    weights.write_bytes(bad)
    with pytest.raises(ModelError, match=r"not a safetensors|does not load"):
        tensor_shapes(model)
    with pytest.raises(ModelError, match="does not load"):
        load_model(model, device=torch.device("cpu"))
    weights.unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        locate(ModelSpec(name=str(model)))
    assert not trace.exists()


HEADERS = {
    "a list": b"[]",
    "no shape": b'{"a": {}}',
    "a text for a shape": b'{"a": {"shape": 5}}',
    "deep": b"[" * 100_000,
    "text": b'"x"',
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_weights_file_with_another_header_is_a_model_error(header: str, tmp_path: Path) -> None:
    """The plan reads it before anything is started."""
    data = HEADERS[header]
    (tmp_path / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)

    with pytest.raises(ModelError, match="is not a safetensors file"):
        tensor_shapes(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_not_run(file: str, tmp_path: Path) -> None:
    """`auto_map` names a class in a Python file beside the weights. Only trust_remote_code may."""
    model, trace = make_tiny("llama", tmp_path / "model"), tmp_path / "trace"
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(trace)!r})\n")
    settings_ = json.loads((model / file).read_text())
    settings_["auto_map"] = {
        "AutoConfig": "evil.Config",
        "AutoModelForCausalLM": "evil.Model",
        "AutoTokenizer": ["evil.Tokenizer", None],
    }
    (model / file).write_text(json.dumps(settings_))

    with contextlib.suppress(PrunefleetError):
        load_model(model, device=torch.device("cpu"))  # with the stock classes
    assert not trace.exists()


# ---- what reaches the terminal ----


def test_a_row_cannot_send_the_terminal_commands() -> None:
    """Whoever can write to the storage can write a benchmark's name, or an error."""
    storage = Storage("memory://terminal")
    evil = "\x1b]0;owned\x07\x1b[2J[red]x[/]\r"
    scores = (Score("pruned", evil, "exact_match", 0.5, None, None, 10),)
    leaderboard.publish(storage, {"model": evil}, JobResult("a" * 16, "complete", scores))
    failed = JobResult("b" * 16, "failed", error=evil, error_kind="data")
    leaderboard.publish(storage, {"model": evil}, failed)
    out = io.StringIO()

    print_leaderboard(leaderboard.load(storage), Console(file=out, force_terminal=False))

    assert not {"\x1b", "\x07", "\r"} & set(out.getvalue())
    assert r"\x1b]0;owned\x07\x1b[2J[red]x[/]\r" in out.getvalue()


def test_letters_of_every_script_stay_as_they_are() -> None:
    assert visible("Größe 模型 ±0.5\nok") == "Größe 模型 ±0.5\nok"
    assert visible("a\x00b\u202e") == r"a\x00b\u202e"
