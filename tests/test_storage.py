"""One suite over a local disk, memory and S3, then what only a disk or only S3 has."""

import errno
import json
import os
import pickle
import subprocess
import sys
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from jobs import storage as storage_module
from jobs.crash import CRASH_EXIT_CODE
from jobs.errors import StorageError
from jobs.storage import DONE, Storage
from tests.s3 import S3Server


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A stage's output folder: two files, one of them in a subfolder."""
    folder = tmp_path / "output"
    (folder / "shards").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "shards" / "1.bin").write_bytes(b"weights")
    return folder


def temporaries(storage: Storage) -> list[Path]:
    return [file for file in Path(storage.root).rglob("*") if file.name.startswith("_tmp")]


def damage(storage: Storage, path: str, name: str, data: bytes) -> None:
    """Overwrite one file of a published folder, wherever the storage keeps it."""
    below = storage.list(path)
    storage.put(next(file for file in below if file.endswith(name)), data)


def test_what_is_put_is_read(storage: Storage):
    storage.put("a/b.json", b'{"x": 1}')

    assert storage.exists("a/b.json")
    assert storage.read_bytes("a/b.json") == b'{"x": 1}'
    assert storage.read_json("a/b.json") == {"x": 1}


def test_put_replaces(storage: Storage):
    storage.put("a", b"old and long")
    storage.put("a", b"new")

    assert storage.read_bytes("a") == b"new"


def test_the_first_to_create_a_file_keeps_it(storage: Storage):
    assert storage.put_if_absent("a/b", b"first")
    assert not storage.put_if_absent("a/b", b"second")
    assert storage.read_bytes("a/b") == b"first"


def test_of_many_threads_that_create_a_file_one_wins(storage: Storage):
    with ThreadPoolExecutor(8) as pool:
        wins = list(pool.map(lambda i: storage.put_if_absent("a", b"%d" % i), range(40)))

    assert sum(wins) == 1
    assert storage.read_bytes("a") == b"%d" % wins.index(True)


def test_the_probe_finds_creation_exclusive_and_leaves_nothing(storage: Storage):
    assert storage.probe_put_if_absent()
    assert storage.filesystem.find(storage.root) == []


def test_a_missing_file_is_a_file_not_found(storage: Storage):
    """Readers of a folder that others clean up have to tell gone from broken."""
    assert not storage.exists("a")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("a")


def test_a_broken_json_file_is_named(storage: Storage):
    storage.put("a/b.json", b"{")

    with pytest.raises(StorageError, match=r"a/b\.json is not JSON"):
        storage.read_json("a/b.json")


def test_deleting_twice_is_deleting(storage: Storage):
    storage.put("a", b"")

    storage.delete("a")
    storage.delete("a")

    assert not storage.exists("a")


def test_listing_goes_deep_and_skips_what_is_in_the_making(storage: Storage):
    for path in ["x/2", "x/y/1", "x/_tmp-1", "x/.hidden/3", "x/y/_tmp-dir/4", "other"]:
        storage.put(path, b"")

    assert storage.list("x") == ["x/2", "x/y/1"]
    assert storage.list() == ["other", "x/2", "x/y/1"]
    assert storage.list("nowhere") == []


def test_a_version_changes_when_the_file_is_replaced(storage: Storage):
    storage.put("a", b"old")
    storage.put("b", b"same")
    before = storage.versions()
    storage.put("a", b"new")
    after = storage.versions()

    assert before["a"] != after["a"]
    assert before["b"] == after["b"]


@pytest.mark.parametrize("path", ["../a", "a/../../b", "/etc/passwd", "a//b", "", ".", "a\\b"])
def test_a_path_cannot_leave_the_storage(storage: Storage, path: str):
    with pytest.raises(StorageError, match="must lead from"):
        storage.put(path, b"")


def test_a_storage_travels_between_processes_as_its_url(storage: Storage):
    storage.put("a", b"here")

    twin = pickle.loads(pickle.dumps(storage))

    assert twin.url == storage.url
    assert twin.read_bytes("a") == b"here"


@pytest.mark.parametrize("url", ["", "nosuchprotocol://a"])
def test_a_storage_that_cannot_be_is_refused_with_its_url(url: str):
    with pytest.raises(StorageError, match=r"storage"):
        Storage(url)


def test_a_published_folder_comes_back_whole(storage: Storage, output: Path, tmp_path: Path):
    assert not storage.is_published("stages/k")
    assert storage.publish_folder(output, "stages/k", {"stage": "prune"})

    folder = storage.fetch_folder("stages/k", tmp_path / "cache", verify=True)

    assert storage.is_published("stages/k")
    assert (folder / "config.json").read_text() == "{}"
    assert (folder / "shards" / "1.bin").read_bytes() == b"weights"
    done = storage.read_json(f"stages/k/{DONE}")
    assert done["stage"] == "prune"
    assert done["files"]["shards/1.bin"]["size"] == 7


def test_the_first_to_publish_a_folder_keeps_it(storage: Storage, output: Path, tmp_path: Path):
    storage.publish_folder(output, "k", {})
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("[]")

    assert not storage.publish_folder(other, "k", {})
    folder = storage.fetch_folder("k", tmp_path / "cache")
    assert (folder / "config.json").read_text() == "{}"


def test_of_many_that_publish_a_folder_one_wins_and_files_never_mix(
    storage: Storage, tmp_path: Path
):
    def publish(i: int) -> bool:
        folder = tmp_path / str(i)
        folder.mkdir()
        for name in ["a", "b", "c"]:
            (folder / name).write_text(str(i))
        return storage.publish_folder(folder, "k", {"by": i})

    with ThreadPoolExecutor(8) as pool:
        wins = list(pool.map(publish, range(16)))

    assert sum(wins) == 1
    folder = storage.fetch_folder("k", tmp_path / "cache", verify=True)
    assert {(folder / name).read_text() for name in "abc"} == {str(wins.index(True))}


@pytest.mark.parametrize("garbage", [b"", b'{"files": {"a"', b"[]", b"\xff\xfe", b"{}"])
def test_a_folder_with_a_broken_marker_is_not_there_and_is_replaced(
    storage: Storage, output: Path, tmp_path: Path, garbage: bytes
):
    """A disk that lost power must cost one stage again, not a crash in every job that needs it."""
    storage.put(f"k/{DONE}", garbage)
    storage.put("k/stale", b"")

    assert not storage.is_published("k")
    assert storage.publish_folder(output, "k", {})
    assert storage.fetch_folder("k", tmp_path / "cache", verify=True)


def test_a_file_of_another_size_is_found_and_named(storage: Storage, output: Path, tmp_path: Path):
    storage.publish_folder(output, "k", {})
    damage(storage, "k", "1.bin", b"weigh")

    with pytest.raises(StorageError, match=r"k: shards/1\.bin has 5 bytes instead of 7. Delete"):
        storage.fetch_folder("k", tmp_path / "cache")


def test_a_flipped_bit_is_found_on_verification(storage: Storage, output: Path, tmp_path: Path):
    storage.publish_folder(output, "k", {})
    damage(storage, "k", "1.bin", b"weighTs")

    with pytest.raises(StorageError, match=r"1\.bin has other bytes"):
        storage.fetch_folder("k", tmp_path / "cache", verify=True)


def test_a_missing_file_of_a_folder_is_named(storage: Storage, output: Path, tmp_path: Path):
    storage.publish_folder(output, "k", {})
    storage.delete(next(path for path in storage.list("k") if path.endswith("1.bin")))

    with pytest.raises(StorageError, match=r"shards/1\.bin is missing"):
        storage.fetch_folder("k", tmp_path / "cache")


def test_an_unpublished_folder_cannot_be_fetched(storage: Storage, tmp_path: Path):
    with pytest.raises(StorageError, match="never published"):
        storage.fetch_folder("k", tmp_path / "cache")


def test_a_removed_folder_is_gone_and_can_be_published_again(storage: Storage, output: Path):
    storage.publish_folder(output, "k", {})

    storage.remove_folder("k")

    assert storage.list() == []
    storage.remove_folder("k")
    assert storage.publish_folder(output, "k", {})


def test_a_remote_folder_is_downloaded_once(output: Path, tmp_path: Path):
    storage = Storage(f"memory://{uuid.uuid4().hex}")
    storage.publish_folder(output, "k", {})
    first = storage.fetch_folder("k", tmp_path / "cache")
    storage.delete(next(path for path in storage.list("k") if path.endswith("1.bin")))

    assert storage.fetch_folder("k", tmp_path / "cache") == first


def test_a_relative_folder_means_the_same_place_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A Ray worker has another working directory than the person who typed the path."""
    monkeypatch.chdir(tmp_path)
    storage = Storage("results")
    monkeypatch.chdir("/")
    storage.put("a", b"")

    assert (tmp_path / "results" / "a").exists()
    assert Storage(f"file://{tmp_path}/results/").list() == ["a"]


def create_many(url: str, names: list[str]) -> int:
    return sum(Storage(url).put_if_absent(name, b"x" * 1000) for name in names)


def test_of_processes_that_create_the_same_files_each_file_has_one_winner(disk: Storage):
    names = [f"a/{i}" for i in range(50)]
    with get_context("fork").Pool(4) as pool:
        wins = pool.starmap(create_many, [(disk.url, names)] * 4)

    assert sum(wins) == 50
    assert temporaries(disk) == []


def test_a_disk_without_links_still_creates_exclusively(
    disk: Storage, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    with ThreadPoolExecutor(8) as pool:
        wins = list(pool.map(lambda i: disk.put_if_absent("a", b"%d" % i), range(16)))

    assert sum(wins) == 1
    assert disk.read_bytes("a") == b"%d" % wins.index(True)
    assert temporaries(disk) == []


def test_the_claim_of_a_dead_process_is_taken_over(disk: Storage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    monkeypatch.setattr(storage_module, "CLAIM_PATIENCE_S", 0.1)
    disk.put("_tmp-claim-a", b"")

    assert disk.put_if_absent("a", b"mine")


def failing(number: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_full_disk_is_said_in_its_own_words_and_leaves_nothing(
    disk: Storage, output: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))

    with pytest.raises(StorageError, match=r"storage/a/b: cannot write: No space left on device"):
        disk.put_if_absent("a/b", b"data")
    with pytest.raises(StorageError, match=r"storage/k: cannot publish: No space left on device"):
        disk.publish_folder(output, "k", {})
    assert disk.list() == []
    assert temporaries(disk) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_said_in_the_systems_words(disk: Storage):
    disk.put("a/b", b"")
    Path(disk.root, "a").chmod(0o500)

    with pytest.raises(StorageError, match=r"a/c: cannot write: Permission denied"):
        disk.put_if_absent("a/c", b"")


def test_a_file_in_place_of_a_folder_is_a_storage_error(disk: Storage):
    disk.put("a", b"")

    with pytest.raises(StorageError, match=r"Not a directory|File exists"):
        disk.put("a/b", b"")


CREATE = (
    "from jobs.storage import Storage; import sys; Storage(sys.argv[1]).put_if_absent('a', b'1')"
)
PUBLISH = (
    "from jobs.storage import Storage; import sys; "
    "Storage(sys.argv[1]).publish_folder(sys.argv[2], 'k', {})"
)


def killed_at(point: str, code: str, *arguments: str) -> int:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PRUNEFLEET_CRASH_AT": point},
        check=False,
    ).returncode


@pytest.mark.parametrize(
    ("point", "visible"), [("after temporary write", False), ("after publish", True)]
)
def test_a_kill_while_creating_leaves_the_file_whole_or_absent(
    disk: Storage, point: str, visible: bool
):
    assert killed_at(point, CREATE, disk.url) == CRASH_EXIT_CODE

    assert disk.list() == (["a"] if visible else [])
    assert disk.put_if_absent("a", b"1") is not visible
    assert disk.read_bytes("a") == b"1"


@pytest.mark.parametrize(("point", "visible"), [("before publish", False), ("after publish", True)])
def test_a_kill_while_publishing_leaves_the_folder_whole_or_absent(
    disk: Storage, output: Path, tmp_path: Path, point: str, visible: bool
):
    assert killed_at(point, PUBLISH, disk.url, str(output)) == CRASH_EXIT_CODE

    assert disk.is_published("k") is visible
    assert disk.publish_folder(output, "k", {}) is not visible
    assert disk.fetch_folder("k", tmp_path / "cache", verify=True)


def test_a_marker_in_the_output_itself_is_not_taken_for_ours(disk: Storage, output: Path):
    """A stage that starts from a fetched folder may carry the old marker along."""
    (output / DONE).write_text(json.dumps({"files": {}}))

    disk.publish_folder(output, "k", {})

    assert set(disk.read_json(f"k/{DONE}")["files"]) == {"config.json", "shards/1.bin"}


# ---- S3 ----


def test_creating_on_s3_is_a_conditional_write(s3_server: S3Server):
    """Looking first and writing then would lose the race that the condition decides."""
    storage = Storage("s3://studies/conditional")
    before = s3_server.num_conditional_writes

    assert storage.put_if_absent("a", b"first")
    assert not storage.put_if_absent("a", b"second")

    assert s3_server.num_conditional_writes == before + 2


def test_the_probe_finds_out_a_storage_that_ignores_the_condition(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
):
    """Some S3 look-alikes do: of two results of one job, the second would replace the first."""
    monkeypatch.setattr(s3_server, "ignores_conditions", True)

    assert not Storage("s3://studies/overwriting").probe_put_if_absent()


def test_the_probe_finds_out_a_filesystem_that_overwrites(monkeypatch: pytest.MonkeyPatch):
    """As fsspec's own default does with a mode that a filesystem does not know."""
    storage = Storage(f"memory://{uuid.uuid4().hex}")
    pipe = storage.filesystem.pipe_file
    monkeypatch.setattr(
        storage.filesystem, "pipe_file", lambda full, data, mode="overwrite": pipe(full, data)
    )

    assert not storage.probe_put_if_absent()


# ---- a poisoned storage ----


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "a//b", "..", ""])
def test_a_marker_whose_names_lead_elsewhere_is_no_marker(
    storage: Storage, tmp_path: Path, name: str
):
    """Downloading would write there."""
    facts = {"size": 4, "sha256": "0" * 64}
    storage.put(f"k/{DONE}", json.dumps({"files": {name: facts}}).encode())

    assert not storage.is_published("k")
    with pytest.raises(StorageError, match="never published"):
        storage.fetch_folder("k", tmp_path / "cache")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "files", ['{"a": 5}', '{"a": {"size": "x", "sha256": 1}}', '{"a": {}}', "[" * 100_000]
)
def test_a_marker_of_another_shape_is_no_marker(storage: Storage, files: str):
    storage.put(f"k/{DONE}", b'{"files": %s}' % files.encode())

    assert not storage.is_published("k")


def test_json_beyond_all_measure_is_not_read(storage: Storage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage_module, "MAX_JSON_BYTES", 1000)
    storage.put("a.json", b'"%s"' % (b"x" * 1000))
    storage.put(f"k/{DONE}", b'{"files": {}, "x": "%s"}' % (b"x" * 1000))

    with pytest.raises(StorageError, match=r"a\.json has more than 1000 bytes"):
        storage.read_json("a.json")
    assert not storage.is_published("k")


def test_an_empty_file_is_no_json(storage: Storage):
    """S3 answers a range of an empty file with an error of its own."""
    storage.put("a.json", b"")

    with pytest.raises(StorageError, match="is not JSON"):
        storage.read_json("a.json")


@pytest.mark.parametrize("name", ["config.json", "shards"])
def test_a_link_in_a_published_folder_is_refused(
    disk: Storage, output: Path, tmp_path: Path, name: str
):
    """It would have a stage read, and a model loader follow, whatever it points to."""
    disk.publish_folder(output, "k", {})
    place = Path(disk.root, "k", name)
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(StorageError, match=f"k: {name} is a symbolic link"):
        disk.fetch_folder("k", tmp_path / "cache")


def test_a_published_folder_that_is_a_link_is_refused(disk: Storage, output: Path, tmp_path: Path):
    disk.publish_folder(output, "k", {})
    Path(disk.root, "k").rename(tmp_path / "elsewhere")
    Path(disk.root, "k").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(StorageError, match="is a symbolic link"):
        disk.fetch_folder("k", tmp_path / "cache")


def test_a_file_that_nobody_published_is_refused(disk: Storage, output: Path, tmp_path: Path):
    """A model loader looks for names: an added pytorch_model.bin is a pickle to run."""
    disk.publish_folder(output, "k", {})
    Path(disk.root, "k", "pytorch_model.bin").write_bytes(b"")

    with pytest.raises(StorageError, match=r"holds 'pytorch_model\.bin', which nobody published"):
        disk.fetch_folder("k", tmp_path / "cache")


def test_removing_a_folder_spares_what_its_links_point_to(
    disk: Storage, output: Path, tmp_path: Path
):
    disk.publish_folder(output, "k", {})
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    Path(disk.root, "k", "link").symlink_to(tmp_path / "precious")

    disk.remove_folder("k")

    assert (tmp_path / "precious" / "file").read_text() == "mine"
    assert not Path(disk.root, "k").exists()


def test_a_listing_knows_sizes_and_times(storage: Storage):
    """By the storage's own clock, which need not agree with ours."""
    storage.put("a/b", b"12345")
    storage.put("a/_tmp-left", b"1")

    assert {name: file.size for name, file in storage.files().items()} == {"a/b": 5}
    everything = storage.files("a", hidden=True)
    assert set(everything) == {"a/b", "a/_tmp-left"}
    assert abs(storage.clock() - everything["a/b"].modified) < 60
