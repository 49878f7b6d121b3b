"""Reading a sweep: the short forms, and for each mistake the line, the place and the remedy."""

from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import jobs
from jobs.allocation import AllocationSpec
from jobs.methods import MagnitudeSpec, MethodSpec, SparseGPTSpec, WandaSpec
from jobs.spec import DatasetSpec, RepairSpec
from jobs.sweep import MAX_FILE_BYTES, SweepError, SweepSpec, parse_sweep, read_sweep

SHIPPED = sorted((Path(jobs.__file__).parent / "sweeps").glob("*.yaml"))

LINES = {
    "name": "name: s",
    "model": "model: demo",
    "grid": "grid: {method: wanda, sparsity: 0.5}",
    "evaluate": "evaluate: easy-vqa",
}
"""A sweep that is right, line by line."""


def text_of(**changes: str) -> str:
    """The sweep with some top-level keys written otherwise; the changed ones come last."""
    lines = {key: line for key, line in LINES.items() if key not in changes}
    return "\n".join([*lines.values(), *(f"{key}: {value}" for key, value in changes.items())])


def parsed(text: str, base: Path = Path("/nowhere")) -> SweepSpec:
    return parse_sweep(text, "s.yaml", base=base)


def told(text: str) -> list[str]:
    """The lines of the error that a text gives."""
    with pytest.raises(SweepError) as caught:
        parsed(text)
    return caught.value.message.splitlines()


def test_bare_words_stand_for_mappings() -> None:
    """What most sweeps say, in four lines."""
    sweep = parsed(text_of(repair="sparse_lora", calibration="{dataset: python-docs}"))

    assert [model.name for model in sweep.model] == ["demo"]
    assert sweep.grid[0].method == [WandaSpec()]
    assert sweep.grid[0].pattern == ["unstructured"]
    assert sweep.grid[0].towers == ["all"]
    assert sweep.repair == [RepairSpec()]
    assert sweep.calibration[0].dataset == DatasetSpec(format="python-docs")
    assert [benchmark.label for benchmark in sweep.evaluate] == ["easy-vqa"]


def test_every_axis_takes_a_list() -> None:
    sweep = parsed(
        text_of(
            grid="{method: [magnitude, {name: sparsegpt, damping: 0.1}], sparsity: [0.5, 0.7]}",
            repair="[none, {rank: 4}]",
            seed="[0, 1]",
        )
    )

    assert sweep.grid[0].method == [MagnitudeSpec(), SparseGPTSpec(damping=0.1)]
    assert sweep.grid[0].sparsity == [0.5, 0.7]
    assert sweep.repair == [None, RepairSpec(rank=4)]
    assert sweep.seed == [0, 1]


def test_an_unquoted_pattern_is_not_a_time_of_day() -> None:
    """YAML 1.1 reads 2:4 as base 60, which is 124."""
    sweep = parsed(text_of(grid="{method: wanda, pattern: [2:4, 4:8]}"))

    assert sweep.grid[0].pattern == ["2:4", "4:8"]


KEYS = ", ".join(sorted(SweepSpec.model_fields))
METHODS = ", ".join(
    sorted(method.model_fields["name"].default for method in get_args(get_args(MethodSpec)[0]))
)
ALLOCATIONS = ", ".join(
    sorted(spec.model_fields["name"].default for spec in get_args(get_args(AllocationSpec)[0]))
)
WANDA_KEYS = ", ".join(sorted(WandaSpec.model_fields))
DATASETS = "easy-vqa, easy-vqa-open, llava, python-docs, text, vqa"
FRACTION = "a sparsity is a fraction of zeros, from 0 up to but not 1"
MISTAKES = {
    "no tower": (
        {"grid": "{method: wanda, towers: {}}"},
        "grid.towers: names no tower; write all, vision, language, or a sparsity each: "
        "{vision: 0.4}",
    ),
    "a sparsity that no point uses": (
        {"grid": '{method: wanda, pattern: "2:4", sparsity: 0.7}'},
        "grid: sparsity is [0.7], and the pattern 2:4 has a sparsity already",
    ),
    "a sparsity beside sparsities": (
        {"grid": "{method: wanda, sparsity: 0.7, towers: {vision: 0.4}}"},
        "grid: sparsity is [0.7], and towers have a sparsity already",
    ),
    "key": (
        {"modle": "demo"},
        f"modle: unknown key 'modle'. Did you mean 'model'? Known: {KEYS}",
    ),
    "nested key": (
        {"calibration": "{num_sample: 3}"},
        "calibration.num_sample: unknown key 'num_sample'. Did you mean 'num_samples'? "
        "Known: atv_alpha, dataset, num_samples, propagate, sequence_length, text_weight, tokens, "
        "visual_weight",
    ),
    "method": (
        {"grid": "{method: sparse_gpt, sparsity: 0.5}"},
        f"grid.method: unknown method 'sparse_gpt'. Did you mean 'sparsegpt'? Known: {METHODS}",
    ),
    "method option": (
        {"grid": "{method: [magnitude, {name: wanda, compar: row}], sparsity: 0.5}"},
        f"grid.method[1].compar: unknown key 'compar'. Did you mean 'compare'? Known: {WANDA_KEYS}",
    ),
    "option of another method": (
        {"grid": "{method: {name: wanda, damping: 0.1}, sparsity: 0.5}"},
        f"grid.method.damping: unknown key 'damping'. Known: {WANDA_KEYS}",
    ),
    "allocation": (
        {"grid": "{method: wanda, sparsity: 0.5, allocation: [uniform, owls]}"},
        f"grid.allocation[1]: unknown allocation 'owls'. Did you mean 'owl'? Known: {ALLOCATIONS}",
    ),
    "allocation option": (
        {"grid": "{method: wanda, sparsity: 0.5, allocation: {name: owl, lambda: 0.1}}"},
        "grid.allocation.lambda: unknown key 'lambda'. "
        "Known: budget, name, outlier_multiple, spread",
    ),
    "allocation without a name": (
        {"grid": "{method: wanda, sparsity: 0.5, allocation: {slope: 0.1}}"},
        "grid.allocation: got dict; an allocation is a name, or a mapping with `name` and its "
        "options",
    ),
    "method without a name": (
        {"grid": "{method: {damping: 0.1}, sparsity: 0.5}"},
        "grid.method: got dict; a method is a name, or a mapping with `name` and its options",
    ),
    "dataset": (
        {"evaluate": "esy-vqa"},
        f"evaluate: got 'esy-vqa'. Did you mean 'easy-vqa'? Known: {DATASETS}",
    ),
    "dataset in a mapping": (
        {"calibration": "{dataset: {format: lava}}"},
        f"calibration.dataset.format: got 'lava'. Did you mean 'llava'? Known: {DATASETS}",
    ),
    "tower": (
        {"grid": "{method: wanda, sparsity: 0.5, towers: vison}"},
        "grid.towers: got 'vison'. Did you mean 'vision'? Known: all, language, vision",
    ),
    "tower with a sparsity": (
        {"grid": "{method: wanda, towers: {vison: 0.5}}"},
        "grid.towers.vison: got 'vison'. Did you mean 'vision'? Known: language, vision",
    ),
    "type": (
        {"calibration": "{num_samples: many}"},
        "calibration.num_samples: got 'many': input should be a valid integer, "
        "unable to parse string as an integer",
    ),
    "range": (
        {"seed": "[1, -1]"},
        "seed[1]: got -1: input should be greater than or equal to 0",
    ),
    "infinity": (
        {"repair": "{learning_rate: .inf}"},
        "repair.learning_rate: got inf: input should be a finite number",
    ),
    "percent": (
        {"grid": "{method: wanda, sparsity: [0.5, 50]}"},
        f"grid.sparsity[1]: got 50: {FRACTION}; did you mean 0.5?",
    ),
    "sparsity 1": ({"grid": "{method: wanda, sparsity: 1}"}, f"grid.sparsity: got 1: {FRACTION}"),
    "pattern": (
        {"grid": "{method: wanda, pattern: 4:2}"},
        "grid.pattern: pattern keeps 4 of every 2: write 'unstructured', or N:M with 0 < N < M "
        "for N kept of every M, such as 2:4",
    ),
    "empty list": (
        {"grid": "{method: [], sparsity: 0.5}"},
        "grid.method: got list: value should have at least 1 item after validation, not 0",
    ),
    "empty exclude": (
        {"exclude": "[{}]"},
        "exclude[0]: got dict: it names nothing and would leave out everything",
    ),
    "repair": (
        {"repair": "[none, {zero_stage: '2'}]"},
        "repair[1].zero_stage: got '2'. Known: 0, 1, 2, 3",
    ),
    "not a mapping": ({"resources": "[1]"}, "resources: got list; a mapping was expected"),
    "one name for two": (
        {"evaluate": "[easy-vqa, {dataset: easy-vqa, num_items: 8}]"},
        "evaluate: got list: two benchmarks are called easy-vqa; a benchmark has its file's name",
    ),
    "a path that cannot be": (
        {"calibration": "{dataset: {format: text, path: ~nobody-of-this-name/x}}"},
        None,
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_its_place_and_what_is_known(mistake: str) -> None:
    """One line: file, line, path, value, what would be right. Nothing about pydantic."""
    changes, expected = MISTAKES[mistake]
    text = text_of(**changes)
    last_line = len(text.splitlines())

    messages = told(text)

    assert len(messages) == 1
    if expected is not None:
        assert messages == [f"s.yaml:{last_line}: {expected}"]
    else:
        assert messages[0].startswith("s.yaml: a path that cannot be: ")


def test_what_is_missing_is_named() -> None:
    assert told("name: s\nmodel: demo\nevaluate: easy-vqa") == [
        "s.yaml:1: the file: the key 'grid' is missing"
    ]


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file() -> None:
    """Ten lines, four mistakes: one round trip through the editor and not four."""
    text = """\
name: s
model:
  name: demo
  revison: main
grid:
  - method: wanda
    sparsity: 0.5
  - method: wnda
    sparsity: 50
evaluate: [easy-vqa, python-dogs]
"""

    messages = told(text)

    assert [message.split(":")[1:3] for message in messages] == [
        ["4", " model.revison"],
        ["8", " grid[1].method"],
        ["9", " grid[1].sparsity"],
        ["10", " evaluate[1]"],
    ]


NO_SWEEPS = {
    "empty": ("", "s.yaml is empty"),
    "a comment": ("# nothing yet\n", "s.yaml is empty"),
    "a sentence": ("prune it", "s.yaml:1: the file: got 'prune it'; a mapping was expected"),
    "a list": ("- a", "s.yaml:1: the file: got list; a mapping was expected"),
    "doubled key": (
        f"{text_of()}\nseed: 1\nseed: 2",
        "s.yaml:6: the key 'seed' stands twice",
    ),
    "doubled nested key": (
        text_of(grid="{method: wanda, sparsity: 0.5, method: dense}"),
        "s.yaml:4: the key 'method' stands twice",
    ),
    "open bracket": ("name: [", "s.yaml: not valid YAML: "),
    "tab": ("\tname: s", "s.yaml: not valid YAML: "),
    "two documents": (f"{text_of()}\n---\nname: t", "s.yaml: not valid YAML: "),
    "no such date": ("name: 2024-13-99", "s.yaml: not valid YAML: "),
    "deep": (f"name: {'[' * 5000}", "s.yaml: not valid YAML: "),
    "an alias to itself": ("name: &a [*a]", "s.yaml: not valid YAML: more than 20000 values"),
}


@pytest.mark.parametrize("case", NO_SWEEPS)
def test_what_is_no_sweep_at_all_is_said_so(case: str) -> None:
    text, expected = NO_SWEEPS[case]

    assert told(text)[0].startswith(expected)


def test_a_python_tag_runs_nothing(tmp_path: Path) -> None:
    """A sweep is mailed around; reading one must not be running one."""
    trace = tmp_path / "trace"

    messages = told(f"name: !!python/object/apply:os.mkdir ['{trace}']")

    assert messages[0].startswith("s.yaml: not valid YAML: could not determine a constructor")
    assert not trace.exists()


def test_aliases_that_explode_are_refused_before_they_do() -> None:
    """Ten lines of nine aliases each are 9^9 values once written out."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]

    assert told("\n".join(lines)) == [
        "s.yaml: not valid YAML: more than 20000 values once its aliases are expanded"
    ]


def test_aliases_that_do_not_explode_are_fine() -> None:
    sweep = parsed(text_of(calibration="[&c {num_samples: 8}, *c]"))

    assert [spec.num_samples for spec in sweep.calibration] == [8, 8]


def test_a_file_that_is_no_text_or_far_too_large_is_refused(tmp_path: Path) -> None:
    """Somebody points at the model instead of the sweep."""
    binary, large = tmp_path / "model.safetensors", tmp_path / "large.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    large.write_bytes(b"#" * (MAX_FILE_BYTES + 1))

    for path, reason in [
        (binary, "cannot be read"),
        (large, "larger than 1000000 bytes"),
        (tmp_path, "cannot be read"),
        (tmp_path / "none.yaml", "cannot be read"),
    ]:
        with pytest.raises(SweepError, match=reason):
            read_sweep(path)


def test_relative_paths_are_relative_to_the_sweep_file(tmp_path: Path) -> None:
    """So a sweep means the same from every folder. A hub name is no path, and stays."""
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "config.json").write_text("{}")
    dataset = "{format: llava, path: ../data/train.json, images: ../data/images}"
    text = text_of(
        model="[../models/mine, org/model, demo]",
        calibration=f"{{dataset: {dataset}}}",
        evaluate="{dataset: {format: vqa, path: /absolute/test.json}}",
    )
    (tmp_path / "sweeps" / "s.yaml").write_text(text)

    sweep = read_sweep(tmp_path / "sweeps" / "s.yaml")

    assert [model.name for model in sweep.model] == [
        str(tmp_path / "models" / "mine"),
        "org/model",
        "demo",
    ]
    assert sweep.calibration[0].dataset.path == str(tmp_path / "data" / "train.json")
    assert sweep.calibration[0].dataset.images == str(tmp_path / "data" / "images")
    assert sweep.evaluate[0].dataset.path == "/absolute/test.json"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_sweep_reads_and_is_named_like_its_file(path: Path) -> None:
    assert read_sweep(path).name == path.stem


def test_there_are_shipped_sweeps() -> None:
    assert "quickstart" in [path.stem for path in SHIPPED]


KEYS_AND_VALUES = (
    "name model grid evaluate repair calibration exclude seed method pattern sparsity towers "
    "dataset format path wanda none easy-vqa llava 2:4 vision ~nobody rank"
)
WORDS = st.sampled_from(KEYS_AND_VALUES.split())
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS | st.dates() | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | SCALARS, inner, max_size=4),
    max_leaves=8,
)
SWEEPS = st.fixed_dictionaries(
    {"name": st.just("s") | VALUES, "model": st.just("demo") | VALUES},
    optional={
        "grid": st.just({"method": "wanda", "sparsity": 0.5})
        | st.dictionaries(WORDS, VALUES, max_size=3),
        "evaluate": st.just("easy-vqa") | st.fixed_dictionaries({"dataset": VALUES}) | VALUES,
        "calibration": st.dictionaries(WORDS, VALUES, max_size=2),
        "exclude": VALUES,
        "repair": VALUES,
        "seed": VALUES,
    },
)


@settings(max_examples=60, deadline=None)
@given(value=SWEEPS | VALUES)
def test_whatever_a_file_holds_there_is_a_sweep_or_a_sweep_error(value: object) -> None:
    """Anything else would be a traceback in front of somebody who made a typing mistake."""
    text = yaml.safe_dump(value, allow_unicode=True)

    try:
        sweep = parsed(text)
    except SweepError:
        return
    assert sweep.model_dump_json()


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40) | st.text(alphabet="{}[]:,&*!-?#'\"\n abc12<|>%", max_size=40))
def test_text_of_any_kind_is_a_sweep_error(text: str) -> None:
    with pytest.raises(SweepError):
        parsed(text)
