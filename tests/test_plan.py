"""From a sweep to its jobs: which there are, what names them, what they share, what cannot be."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from jobs.errors import DataError, ModelError, PrunefleetError, SpecError
from jobs.spec import DatasetSpec, JobSpec, ModelSpec
from jobs.sweep import parse_sweep, read_sweep
from orchestrator.estimate import estimate, stored_gib
from orchestrator.plan import make_plan, model_facts, shared_stages
from orchestrator.progress import describe, described
from tests.families import make_tiny
from workers.data import Sample, Split, load_dataset
from workers.keys import StageKeys
from workers.locate import locate

LORA = "{method: sparse_lora, num_steps: 2, batch_size: 2}"
SWEEPS = Path(__file__).parents[1] / "jobs" / "sweeps"
DEFAULTS = {
    "name": "s",
    "model": "demo",
    "calibration": "{dataset: easy-vqa, num_samples: 4}",
    "grid": "{method: wanda, sparsity: 0.5}",
    "evaluate": "{dataset: easy-vqa, num_items: 8}",
}


def planned(base: Path = Path("/nowhere"), **changes: object) -> list[JobSpec]:
    """The jobs of a sweep that differs from `DEFAULTS` in some keys."""
    lines = [f"{key}: {value}" for key, value in (DEFAULTS | changes).items()]
    return make_plan(parse_sweep("\n".join(lines), "s.yaml", base=base))


def only(jobs: list[JobSpec]) -> JobSpec:
    """The one job that is not the dense model's."""
    [job] = [job for job in jobs if job.prune is not None]
    return job


def points(jobs: list[JobSpec]) -> list[tuple[str, str, dict[str, float], bool]]:
    return [
        (job.prune.method.name, job.prune.pattern, dict(job.prune.sparsity), job.repair is not None)
        for job in jobs
        if job.prune is not None
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llava-clip", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


# ---- which jobs there are ----


def test_a_pattern_is_not_multiplied_with_sparsities() -> None:
    """2:4 is half, whatever stands beside it: 1 + 2 jobs and not 4."""
    jobs = planned(grid="{method: wanda, pattern: [2:4, unstructured], sparsity: [0.5, 0.7]}")

    each = [{"vision": value, "language": value} for value in (0.5, 0.5, 0.7)]
    assert points(jobs) == [
        ("wanda", "2:4", each[0], False),
        ("wanda", "unstructured", each[1], False),
        ("wanda", "unstructured", each[2], False),
    ]


def test_one_of_four_is_a_sparsity_of_three_quarters() -> None:
    assert only(planned(grid="{method: wanda, pattern: 1:4, towers: language}")).prune.sparsity == {  # type: ignore[union-attr]
        "language": 0.75
    }


def test_towers_with_a_sparsity_each_are_not_multiplied_either() -> None:
    jobs = planned(
        grid="{method: wanda, sparsity: [0.5, 0.7], "
        "towers: [language, {vision: 0.4, language: 0.6}, {language: 0.6, vision: 0}]}"
    )

    assert [sparsity for _, _, sparsity, _ in points(jobs)] == [
        {"language": 0.5},
        {"language": 0.7},
        {"vision": 0.4, "language": 0.6},
        {"language": 0.6},
    ]


def test_a_pattern_with_a_sparsity_for_each_tower_contradicts_itself() -> None:
    """And an exclude of the pair is a way out."""
    grid = "{method: wanda, pattern: [2:4, unstructured], towers: {vision: 0.4}}"

    with pytest.raises(SpecError, match=r"fixes the sparsity at 0\.5"):
        planned(grid=grid)

    jobs = planned(grid=grid, exclude="{pattern: 2:4, towers: {vision: 0.4}}")
    assert points(jobs) == [("wanda", "unstructured", {"vision": 0.4}, False)]


def test_a_pattern_allocates_nothing() -> None:
    """Every layer has its sparsity. An exclude of the pair, as the error tells it, is a way out."""
    grid = (
        "{method: wanda, pattern: [2:4, unstructured], sparsity: 0.5, allocation: [uniform, owl]}"
    )

    with pytest.raises(SpecError, match=r"pattern 2:4 with allocation owl: the pattern gives") as e:
        planned(grid=grid)

    jobs = planned(grid=grid, exclude=e.value.message[e.value.message.index("{pattern") :])
    left = [(job.prune.pattern, job.prune.allocation.name) for job in jobs if job.prune]
    assert left == [("2:4", "uniform"), ("unstructured", "uniform"), ("unstructured", "owl")]
    assert [describe(job) for job in jobs[2:]] == [
        "wanda unstructured vision+language 0.5",
        "wanda unstructured vision+language 0.5 owl",
    ]


def test_an_unstructured_grid_needs_a_sparsity() -> None:
    with pytest.raises(SpecError, match="`sparsity` is missing, and pattern unstructured needs"):
        planned(grid="{method: wanda}")


def test_at_sparsity_0_there_is_nothing_to_repair() -> None:
    """The first point of a curve, and a law: it changes no bit."""
    grid = "{method: wanda, sparsity: [0, 0.5]}"

    with pytest.raises(SpecError, match="at sparsity 0 no layer is pruned"):
        planned(grid=grid, repair=f"[none, {LORA}]")

    jobs = planned(
        grid=grid, repair=f"[none, {LORA}]", exclude="{sparsity: 0, repair: sparse_lora}"
    )
    assert [(sparsity.get("vision"), repaired) for _, _, sparsity, repaired in points(jobs)] == [
        (None, False),
        (0.5, False),
        (0.5, True),
    ]
    assert describe(jobs[1]) == "wanda unstructured 0"


def test_exclude_leaves_out_what_matches_all_it_names() -> None:
    jobs = planned(
        grid="{method: [magnitude, wanda], sparsity: [0.5, 0.7]}",
        repair=f"[none, {LORA}]",
        exclude="[{method: magnitude, repair: sparse_lora}, {method: wanda, sparsity: 0.7}]",
    )

    left = [
        (method, sparsity["vision"], repaired) for method, _, sparsity, repaired in points(jobs)
    ]
    assert left == [
        ("magnitude", 0.5, False),
        ("magnitude", 0.7, False),
        ("wanda", 0.5, False),
        ("wanda", 0.5, True),
    ]


@pytest.mark.parametrize("exclude", ["{method: sparsegpt}", "{method: wanda, sparsity: 0.51}"])
def test_an_exclude_that_matches_nothing_is_an_error(exclude: str) -> None:
    """It was meant to save a night of GPU time, and has a typing mistake."""
    with pytest.raises(SpecError, match=r"exclude\[1\] matches no point of the grid"):
        planned(
            grid="{method: [wanda, magnitude], sparsity: 0.5}",
            exclude=f"[{{method: magnitude}}, {exclude}]",
        )


def test_the_dense_model_is_one_job_however_often_it_is_asked_for() -> None:
    """Seeds, calibrations and `method: dense` make no difference to it."""
    jobs = planned(
        grid="{method: [dense, wanda], sparsity: [0.5, 0.7]}",
        seed="[0, 1]",
        calibration="[{num_samples: 4}, {num_samples: 8}]",
    )

    assert [job.prune is None for job in jobs] == [True] + [False] * 8


def test_what_has_no_effect_makes_no_second_job() -> None:
    """Magnitude looks at no data; a repair draws its samples by the seed."""
    jobs = planned(
        grid="{method: magnitude, sparsity: 0.5}",
        repair=f"[none, {LORA}]",
        seed="[0, 1]",
        calibration="[{num_samples: 4}, {num_samples: 8}]",
    )

    assert [(job.repair is not None, job.seed) for job in jobs[1:]] == [
        (False, 0),
        (True, 0),
        (True, 1),
    ]


def test_grids_that_overlap_are_added_up_and_not_doubled() -> None:
    jobs = planned(
        grid="[{method: wanda, sparsity: [0.5, 0.6]}, {method: wanda, sparsity: [0.6, 0.7]}]"
    )

    assert [sparsity["vision"] for _, _, sparsity, _ in points(jobs)] == [0.5, 0.6, 0.7]


def test_jobs_run_in_the_order_in_which_they_need_each_other(tiny: Path) -> None:
    """Dense models, then pruned, then repaired: whoever comes later finds a stage finished."""
    jobs = planned(
        model=f"[demo, {tiny}]",
        grid="{method: [wanda, magnitude], sparsity: 0.5}",
        repair=f"[{LORA}, none]",
    )

    kinds = [(job.prune is not None) + (job.repair is not None) for job in jobs]
    assert kinds == [0] * 2 + [1] * 4 + [2] * 4
    methods = [method for method, _, _, _ in points(jobs)]
    assert methods == ["wanda", "magnitude"] * 4


# ---- what names a job ----


def test_a_key_is_the_same_in_every_process(tiny: Path) -> None:
    """Hash randomisation reorders sets: a key that depended on one would run every job again."""
    program = (
        "import sys; from pathlib import Path; from jobs.sweep import parse_sweep, read_sweep;"
        "from orchestrator.plan import make_plan;"
        "print([j.key for j in make_plan(parse_sweep(sys.argv[1], 's', base=Path('/')))])"
    )
    changes = {"grid": "{method: [wanda, magnitude], sparsity: 0.5}", "repair": f"[none, {LORA}]"}
    text = "\n".join(f"{k}: {v}" for k, v in (DEFAULTS | changes | {"model": tiny}).items())

    printed = {
        subprocess.run(
            [sys.executable, "-c", program, text],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }

    assert printed == {f"{[job.key for job in planned(model=tiny, **changes)]}\n"}


def test_a_key_does_not_depend_on_where_things_lie(tiny: Path, tmp_path: Path) -> None:
    """A model copied elsewhere, annotations copied elsewhere: the same job on another machine."""
    keys = []
    for place in ("here", "there"):
        folder = tmp_path / place
        shutil.copytree(tiny, folder / "model")
        record = {"question": "is it?", "answer": "yes"}
        (folder / "data.json").write_text(json.dumps([record] * 4))
        data = "{format: vqa, path: data.json}"
        jobs = planned(
            folder,
            model="model",
            calibration=f"{{dataset: {data}, num_samples: 4}}",
            repair=f"[none, {LORA}]",
        )
        keys.append([job.key for job in jobs])

    assert keys[0] == keys[1]
    assert len(set(keys[0])) == 3


@pytest.mark.parametrize("change", [{"name": "other"}, {"resources": "{cpus_per_worker: 2}"}])
def test_a_key_does_not_depend_on_what_changes_no_number(change: dict[str, str]) -> None:
    """So two sweeps share their jobs, and a larger machine keeps its rows."""
    assert [job.key for job in planned(**change)] == [job.key for job in planned()]


NUMBERS = [
    {"seed": "1"},
    {"calibration": "{num_samples: 5}"},
    {"calibration": "{num_samples: 4, propagate: dense}"},
    {"calibration": "{num_samples: 4, visual_weight: 0.5}"},
    {"grid": "{method: sparsegpt, sparsity: 0.5}"},
    {"grid": "{method: {name: wanda, compare: layer}, sparsity: 0.5}"},
    {"grid": "{method: {name: wanda, reconstruct: pcg}, sparsity: 0.5}"},
    {"grid": "{method: wanda, sparsity: 0.6}"},
    {"grid": "{method: wanda, pattern: 2:4}"},
    {"grid": "{method: wanda, pattern: 4:8}"},
    {"grid": "{method: wanda, sparsity: 0.5, allocation: owl}"},
    {"grid": "{method: wanda, sparsity: 0.5, allocation: {name: owl, spread: 0.1}}"},
    {"grid": "{method: wanda, sparsity: 0.5, allocation: {name: owl, budget: model}}"},
    {"grid": "{method: wanda, sparsity: 0.5, allocation: ecoflap}"},
    {"grid": "{method: wanda, sparsity: 0.5, allocation: {name: ecoflap, noise: 0.01}}"},
    {"grid": "{method: wanda, sparsity: 0.5, allocation: {name: atp, slope: 0.01}}"},
    {"grid": "{method: wanda, sparsity: 0.5, towers: language}"},
    {"repair": LORA},
    {"repair": "{num_steps: 2, batch_size: 2, learning_rate: 0.1}"},
    {"repair": "{num_steps: 2, batch_size: 2, distill: 0}"},
    {"evaluate": "{dataset: easy-vqa, num_items: 9}"},
    {"evaluate": "[{dataset: easy-vqa, num_items: 8}, python-docs]"},
]


def test_a_key_changes_with_every_setting_that_changes_a_number(tiny: Path) -> None:
    """One key for two of them would be one's result under the other's name."""
    jobs = [only(planned(**change)) for change in [{}, *NUMBERS, {"model": str(tiny)}]]

    assert Counter(job.key for job in jobs).most_common(1)[0][1] == 1


def test_a_key_changes_with_the_weights_and_with_the_tokenizer(tiny: Path, tmp_path: Path) -> None:
    """The same path, other bytes in it."""
    keys = [only(planned(model=tiny)).key]
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja", "tokenizer.model"):
        folder = shutil.copytree(tiny, tmp_path / name / "tiny")
        (folder / "tokenizer.model").touch()
        data = bytearray((folder / name).read_bytes())
        data[-1:] = b" " if name != "model.safetensors" else bytes([data[-1] ^ 1])
        (folder / name).write_bytes(data)
        keys.append(only(planned(model=folder)).key)

    assert len(set(keys)) == 5


# ---- what cannot be ----


def refused(error: type[PrunefleetError], match: str, **changes: object) -> None:
    with pytest.raises(error, match=match):
        planned(**changes)


@pytest.mark.parametrize(
    ("family", "pattern", "width"), [("llama", "4:8", 68), ("llava-clip", "2:4", 13)]
)
def test_a_pattern_that_does_not_fit_names_the_layer(
    family: str, pattern: str, width: int, tmp_path: Path
) -> None:
    """Found from the file's header, before a process is started; 68 is 8 * 8 + 4."""
    folder = make_tiny(family, tmp_path / "m", intermediate_size=width)
    grid = f"{{method: magnitude, pattern: {pattern}}}"
    benchmark = "{dataset: python-docs, num_items: 1}"

    refused(
        ModelError,
        rf"down_proj.*: pattern {pattern} needs .* and this layer has {width}\. Prune it unstruc",
        model=folder,
        grid=grid,
        evaluate=benchmark,
    )
    if family == "llava-clip":  # its vision tower has no layer of that width
        assert only(planned(model=folder, grid=grid.replace("}", ", towers: vision}")))


def test_a_tower_that_a_model_does_not_have_is_named_with_those_it_has(text_model: Path) -> None:
    refused(
        SpecError,
        "has no vision tower. It has: language",
        model=text_model,
        grid="{method: magnitude, sparsity: 0.5, towers: vision}",
        evaluate="python-docs",
    )


def test_all_towers_of_a_text_model_are_its_one(text_model: Path) -> None:
    job = only(
        planned(
            model=text_model,
            calibration="{dataset: python-docs, num_samples: 4}",
            evaluate="python-docs",
        )
    )

    assert job.prune is not None
    assert job.prune.sparsity == {"language": 0.5}


def test_more_samples_than_there_are_is_an_error() -> None:
    refused(
        DataError,
        "calibration.num_samples is 40000, and easy-vqa has 38575 samples",
        calibration="{num_samples: 40000}",
    )
    refused(
        DataError,
        "evaluate: num_items is 10000, and easy-vqa has 9673 items",
        evaluate="{dataset: easy-vqa, num_items: 10000}",
    )


def test_a_vision_tower_is_not_calibrated_on_text(text_model: Path) -> None:
    """The language tower may be, and magnitude looks at nothing."""
    docs = "{dataset: python-docs, num_samples: 4}"

    refused(SpecError, "python-docs has no images, and the vision tower", calibration=docs)

    assert planned(calibration=docs, grid="{method: wanda, sparsity: 0.5, towers: language}")
    assert planned(calibration=docs, grid="{method: magnitude, sparsity: 0.5}")


def test_a_text_model_is_not_asked_about_images(text_model: Path) -> None:
    refused(
        SpecError,
        "easy-vqa asks about images, and .*llama has no vision tower",
        model=text_model,
        calibration="{dataset: python-docs, num_samples: 4}",
    )


def test_a_repair_that_cannot_be_is_refused() -> None:
    refused(
        SpecError,
        "repair.dataset: python-docs is plain text",
        repair="{num_steps: 2, dataset: python-docs}",
    )
    refused(
        SpecError,
        "repair.batch_size is 8 and does not divide evenly among 3 workers",
        repair="{num_steps: 2, batch_size: 8, num_workers: 3}",
    )


def test_a_pruned_tower_needs_a_rank_where_ranks_are_named() -> None:
    one = "{num_steps: 2, rank: {language: 4}}"
    refused(SpecError, "the vision tower is pruned, and has no rank", repair=one)

    job = only(planned(grid="{method: wanda, sparsity: 0.5, towers: language}", repair=one))

    assert job.repair is not None
    assert job.repair.rank_of("language") == 4


def test_local_reconstruction_needs_activations_to_run_on() -> None:
    refused(
        SpecError,
        "with calibration.propagate: dense there are none",
        calibration="{num_samples: 4, propagate: dense}",
        grid="{method: magnitude, sparsity: 0.5, refine: block}",
    )


def test_refinement_multiplies_the_grid_and_makes_magnitude_look_at_data() -> None:
    jobs = planned(
        grid="{method: magnitude, sparsity: 0.5, refine: [none, block, {unit: submodule}]}",
        exclude="{refine: submodule}",
    )

    plain, refined = jobs[1:]
    assert (plain.is_calibrated, refined.is_calibrated) == (False, True)
    assert StageKeys.of(plain).prune != StageKeys.of(refined).prune
    assert StageKeys.of(refined).statistics is None


def test_a_dataset_that_is_not_there_is_found_by_the_plan() -> None:
    refused(
        DataError,
        "dataset path /nowhere/none.json does not exist",
        repair="{num_steps: 2, dataset: {format: llava, path: none.json}}",
    )


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def a_pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7391184\n"
    (folder / "model.safetensors").write_text(text)


def half_a_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (no_config, "has no config.json: not a model folder"),
        (no_weights, r"has no \*\.safetensors; other weight formats are not read"),
        (a_pointer, "model.safetensors is not a safetensors file"),
        (half_a_header, "model.safetensors is not a safetensors file"),
        (a_list, "is not a model folder"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_model_folder_is_said_to_be_broken(
    damage: object, expected: str, tiny: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "broken")
    assert callable(damage)
    damage(folder)

    refused(ModelError, expected, model=folder)


@pytest.mark.parametrize("name", ["demmo", "/no/such/folder", "./models/none", "a/b/c"])
def test_a_model_that_is_nowhere_is_said_so_without_asking_the_hub(name: str) -> None:
    refused(ModelError, "no such folder, and not a hub name .* Shipped models: demo", model=name)


# ---- models of the hub ----


@pytest.fixture
def hub(tiny: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a machine without network that has once fetched `org/tiny`."""
    cached = tmp_path / "hf" / "hub" / "models--org--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(tiny, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    return os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}


def located(name: str, environment: dict[str, str]) -> str:
    """What a fresh process says: the hub's client reads its settings when it is imported."""
    program = (
        "import sys; from jobs.errors import ModelError; from jobs.spec import ModelSpec;"
        "from workers.locate import locate, fingerprint_model\n"
        "try: print(fingerprint_model(locate(ModelSpec(name=sys.argv[1]))))\n"
        "except ModelError as error: print(error.message)"
    )
    child = subprocess.run(
        [sys.executable, "-c", program, name],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return child.stdout.strip()


def test_a_hub_model_is_found_in_the_cache_without_network(hub: dict[str, str], tiny: Path) -> None:
    """With the fingerprint of the folder it was copied from: the same model, the same jobs."""
    job = only(planned(model=tiny))

    assert located("org/tiny", hub) == job.model.fingerprint


def test_a_hub_model_that_cannot_be_had_is_said_so(hub: dict[str, str]) -> None:
    said = located("org/other", hub)

    assert said.startswith("model 'org/other': no such folder, and the hub could not give it: ")


def test_the_shipped_model_is_there() -> None:
    assert (locate(ModelSpec(name="demo")) / "model.safetensors").is_file()


# ---- what jobs share ----


def test_two_repairs_share_one_pruned_model_and_one_teacher() -> None:
    """Eight learning rates on a 7B model: one pruning and one pass of the dense model."""
    jobs = planned(repair=f"[{LORA}, {LORA.replace('}', ', learning_rate: 0.1}')}]")

    counts = Counter(shared_stages(jobs).values())
    one, two = (StageKeys.of(job) for job in jobs[1:])

    assert (one.prune, one.teacher) == (two.prune, two.teacher)
    assert one.repair != two.repair
    assert counts == {3: 1, 2: 3, 1: 4}  # dense scores; prune, teacher, pruned scores; repairs


def test_the_teacher_is_one_for_all_pruned_models() -> None:
    jobs = planned(grid="{method: [wanda, magnitude], sparsity: [0.5, 0.7]}", repair=LORA)

    assert len({StageKeys.of(job).teacher for job in jobs if job.repair}) == 1


def test_a_repair_that_does_not_distil_has_no_teacher() -> None:
    job = only(planned(repair="{num_steps: 2, batch_size: 2, distill: 0}"))

    assert StageKeys.of(job).teacher is None


@pytest.mark.parametrize("setting", ["teacher: live", "distill_hidden: 1", "ressa_compat: true"])
def test_a_teacher_that_runs_beside_the_repair_is_no_stage(setting: str) -> None:
    job = only(planned(repair=f"{{num_steps: 2, batch_size: 2, {setting}}}"))

    assert StageKeys.of(job).teacher is None


def test_dense_statistics_are_one_for_methods_sparsities_and_modality_mixes() -> None:
    """With `propagate: pruned` each job calibrates on what its own pruned blocks give."""
    changes = {
        "grid": "{method: [magnitude, wanda, sparsegpt], pattern: [unstructured, 2:4], "
        "sparsity: [0.5, 0.7]}",
    }
    dense = "[{num_samples: 4, propagate: dense}, "
    dense += "{num_samples: 4, propagate: dense, visual_weight: 0.5}]"

    shared = planned(calibration=dense, **changes)
    apart = planned(**changes)

    keys = [StageKeys.of(job) for job in shared if job.is_calibrated]
    assert len(keys) == 2 * 3 * 2
    assert len({key.statistics for key in keys}) == 1
    assert len({key.prune for key in keys}) == len(keys)
    assert {StageKeys.of(job).statistics for job in apart} == {None}


def test_dense_statistics_are_not_shared_by_other_samples() -> None:
    jobs = planned(
        calibration="[{num_samples: 4, propagate: dense}, {num_samples: 5, propagate: dense}]",
        seed="[0, 1]",
    )

    assert len({StageKeys.of(job).statistics for job in jobs[1:]}) == 4


def test_scores_are_one_for_all_sparsities_and_allocations_for_all_methods() -> None:
    """The costly part of a grid of allocations is paid once, whatever calibration propagates."""
    jobs = planned(
        calibration="[{num_samples: 4}, {num_samples: 4, propagate: dense}]",
        grid="{method: [magnitude, wanda], sparsity: [0.5, 0.7], "
        "allocation: [owl, {name: owl, spread: 0.1}, {name: ecoflap, cap: 0.2}, ecoflap]}",
    )

    keys = [StageKeys.of(job) for job in jobs[1:]]
    assert len(keys) == 2 * 2 * 2 * 4
    assert len({key.score for key in keys}) == 2
    assert len({key.allocate for key in keys}) == 2 * 4
    assert len({key.prune for key in keys}) == len(keys)
    assert len({key.statistics for key in keys} - {None}) == 1


def test_scores_are_not_shared_by_other_layers_samples_or_seeds() -> None:
    jobs = planned(
        calibration="[{num_samples: 4}, {num_samples: 5}]",
        grid="{method: wanda, sparsity: 0.5, towers: [all, language], allocation: ecoflap}",
        seed="[0, 1]",
    )

    assert len({StageKeys.of(job).score for job in jobs[1:]}) == 2 * 2 * 2


def test_a_slope_that_is_given_needs_no_data() -> None:
    """With magnitude then nothing does: the seed makes no second job."""
    grid = "{method: magnitude, sparsity: 0.5, allocation: {name: atp, slope: 0.01}}"

    job = only(planned(grid=grid))

    assert not job.is_calibrated
    assert StageKeys.of(job).statistics is None
    assert len(planned(grid=grid, seed="[0, 1]")) == 2


def test_a_shared_stage_is_the_shared_stage_of_another_sweep() -> None:
    """A second study, other benchmarks, later: its pruned model is there."""
    first, second = only(planned()), only(planned(name="t", evaluate="python-docs"))

    assert first.key != second.key
    assert StageKeys.of(first).prune == StageKeys.of(second).prune


# ---- what it costs ----


def test_a_dataset_is_read_once_and_not_once_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLaVA's own has 665,000 records, and a plan may have a thousand jobs."""
    (tmp_path / "data.json").write_text(json.dumps([{"question": "is it?", "answer": "yes"}] * 8))
    read = []

    def counted(spec: DatasetSpec, split: Split) -> list[Sample]:
        read.append(split)
        return load_dataset(spec, split)

    monkeypatch.setattr("orchestrator.plan.load_dataset", counted)
    data = "{format: vqa, path: data.json}"

    planned(
        tmp_path,
        grid="{method: [magnitude, wanda], sparsity: [0.5, 0.6]}",
        calibration=f"{{dataset: {data}, num_samples: 4}}",
        evaluate=f"{{dataset: {data}}}",
        repair=f"[none, {LORA}]",
    )

    assert sorted(read) == ["test", "train"]


def test_a_finished_stage_costs_nothing_more() -> None:
    job = only(planned(repair=LORA))
    stages = set(StageKeys.of(job).all())

    fresh, half, finished = (
        estimate(job, done).seconds for done in (set(), set(list(stages)[:3]), stages)
    )

    assert fresh > half > finished > 0


@pytest.mark.parametrize(
    "sweep", ["repair_recipes", "who_competes", "slimllava_search", "calibration"]
)
def test_no_two_jobs_of_a_plan_read_alike(sweep: str) -> None:
    jobs = make_plan(read_sweep(SWEEPS / f"{sweep}.yaml"))

    words = described(jobs)

    assert len(set(words.values())) == len(jobs)
    assert words[jobs[0].key] == "demo dense"


def test_a_stage_that_jobs_share_is_stored_once() -> None:
    """Two pruned models and one repaired one, of 7.4 MB and masks; nothing of what is there."""
    dense, pruned, other, *repaired = planned(
        grid="{method: magnitude, sparsity: [0.5, 0.6]}", repair=f"[none, {LORA}]"
    )
    model = model_facts(ModelSpec(name="demo")).num_bytes / 2**30

    assert stored_gib([dense], set()) == 0
    assert 1 < stored_gib([pruned], set()) / model < 1.1
    assert 2 < stored_gib([pruned, other], set()) / model < 2.2
    assert 4 < stored_gib([pruned, other, *repaired], set()) / model < 4.2
    assert stored_gib([pruned], set(StageKeys.of(pruned).all())) == 0


def test_a_calibrated_job_needs_more_memory_than_magnitude() -> None:
    magnitude, wanda = planned(grid="{method: [magnitude, wanda], sparsity: 0.5}")[1:]

    assert estimate(wanda, set()).memory_gib > estimate(magnitude, set()).memory_gib > 0


def test_a_slope_that_leaves_the_range_is_refused_with_the_steepest_that_does_not() -> None:
    """A tower of demo has 4 blocks."""
    grid = "{method: wanda, sparsity: 0.7, allocation: {name: atp, slope: %s}}"

    with pytest.raises(SpecError, match=r"slope -0\.25 .* 4 blocks .* at most 0\.2 "):
        planned(grid=grid % -0.25)
    assert planned(grid=grid % 0.19)


def test_a_plan_imports_nothing_heavy() -> None:
    """torch takes seconds, and about six processes of a run import the planner."""
    program = (
        "import sys; import orchestrator.cli; from pathlib import Path;"
        "from jobs.sweep import parse_sweep, read_sweep; from orchestrator.plan import make_plan;"
        "make_plan(parse_sweep(sys.argv[1], 's', base=Path('/')));"
        "print(sorted({'torch', 'ray', 'transformers', 'deepspeed', 'peft'} & set(sys.modules)))"
    )
    text = "\n".join(f"{key}: {value}" for key, value in DEFAULTS.items())

    printed = subprocess.run(
        [sys.executable, "-c", program, text], capture_output=True, text=True, check=True
    ).stdout

    assert printed == "[]\n"
