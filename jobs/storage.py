"""Everything stored goes through here: local disk, NFS, S3, GCS and memory, by fsspec URL.

Two promises carry the rest of the system. A file is there whole or not at all, and of several
processes that create the same file exactly one wins (`put_if_absent`). A folder of files gets
both by way of its marker, `DONE.json`, which names every file with its size and SHA-256.

    local     a temporary sibling, fsync, then link(2) (a file) or rename(2) (a folder)
    elsewhere one conditional create; a folder's files go first and its marker last

Names that start with `_tmp` or `.` are in the making, or left over from a kill: never listed.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from jobs.crash import crash_point
from jobs.errors import CorruptError, StorageError

DONE = "DONE.json"
SEAL_BYTES = 32
CLAIM_PATIENCE_S = 60.0
"""How long a claim may stand on a disk without links before its owner is taken for dead."""

MAX_JSON_BYTES = 64 * 2**20
"""Nothing that we store as JSON comes near it: a larger one is damage, or somebody's trap."""

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_memory_lock = threading.Lock()


@dataclass(frozen=True)
class StoredFile:
    """What a listing says of a file."""

    version: str
    """Changes when the file is replaced."""
    size: int
    """In bytes."""
    modified: float
    """When it was written, in seconds since 1970 by the storage's own clock."""


class Storage:
    """One place to store things, named by URL. Paths are relative to it and use `/`.

    A URL without protocol is a local path, made absolute here, since workers run elsewhere.
    """

    def __init__(self, url: str) -> None:
        if not url:
            raise StorageError("the storage URL is empty: give a folder, or s3://bucket/folder")
        try:
            self.filesystem, root = fsspec.url_to_fs(url, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise StorageError(f"storage {url!r} cannot be opened: {error}") from error
        self.root = root.rstrip("/")
        self.is_local = isinstance(self.filesystem, LocalFileSystem)
        self.url = self.root if self.is_local else url.rstrip("/")

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def __reduce__(self) -> tuple[type["Storage"], tuple[str]]:
        return Storage, (self.url,)

    def exists(self, path: str) -> bool:
        with self._explained("look for", path):
            return bool(self.filesystem.exists(self._full(path)))

    def read_bytes(self, path: str, *, at_most: int | None = None) -> bytes:
        """A whole file.

        Raises:
            FileNotFoundError: there is none.
            StorageError: it has more than `at_most` bytes; no more than that were read.
        """
        with self._explained("read", path):
            full = self._full(path)
            if at_most is None:
                return bytes(self.filesystem.cat_file(full))
            data = self._first_bytes(full, at_most + 1)
        if len(data) > at_most:
            raise StorageError(f"{self._name(path)} has more than {at_most} bytes: none of ours")
        return data

    def read_json(self, path: str) -> Any:
        """Raises FileNotFoundError where there is no such file, StorageError if it is no JSON."""
        data = self.read_bytes(path, at_most=MAX_JSON_BYTES)
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise StorageError(f"{self._name(path)} is not JSON: {error}") from error

    def list(self, folder: str = "") -> list[str]:
        """Every file below `folder`, in order. A folder that is not there has none."""
        return sorted(self.versions(folder))

    def versions(self, folder: str = "") -> dict[str, str]:
        """Every file below `folder` with a mark that changes when the file is replaced."""
        return {path: file.version for path, file in self.files(folder).items()}

    def files(self, folder: str = "", *, hidden: bool = False) -> dict[str, StoredFile]:
        """Every file below `folder`; with `hidden`, also what is in the making or left over."""
        with self._explained("list", folder):
            root = self._full(folder) if folder else self.root
            found = _local_files(root) if self.is_local else self._remote_files(root)
            below = f"{folder}/" if folder else ""
            return {below + name: file for name, file in found if hidden or not _is_hidden(name)}

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Create a file whole. True: ours is visible. False: there was one, and it stays."""
        full = self._full(path)
        with self._explained("write", path):
            if self.is_local:
                return _create_locally(Path(full), data)
            with _memory_lock if self._is_memory else contextlib.nullcontext():
                return self._create_remotely(full, data)

    def put(self, path: str, data: bytes) -> None:
        """Write a file whole, in place of the one that may be there."""
        full = self._full(path)
        with self._explained("write", path):
            if self.is_local:
                with _written_beside(Path(full), data) as temporary:
                    os.replace(temporary, full)
                    _sync(Path(full).parent)
            else:
                self.filesystem.pipe_file(full, data)

    def put_sealed(self, path: str, data: bytes) -> None:
        """Write a file with its SHA-256 in front: for what no DONE.json vouches for."""
        self.put(path, hashlib.sha256(data).digest() + data)

    def read_sealed(self, path: str) -> bytes:
        """What `put_sealed` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            CorruptError: it has other bytes than were written.
        """
        content = self.read_bytes(path)
        seal, data = content[:SEAL_BYTES], content[SEAL_BYTES:]
        if hashlib.sha256(data).digest() != seal:
            raise CorruptError(f"{self._name(path)} is damaged (SHA-256 differs)")
        return data

    def delete(self, path: str) -> None:
        """Delete a file. One that is not there is as good as deleted."""
        with self._explained("delete", path), contextlib.suppress(FileNotFoundError):
            self.filesystem.rm_file(self._full(path))

    def clock(self) -> float:
        """What time the storage thinks it is, in seconds since 1970. Writes a file to find out."""
        path = f"_tmp-clock-{uuid.uuid4().hex}"
        try:
            self.put(path, b"")
            with self._explained("look at", path):
                modified: datetime = self.filesystem.modified(self._full(path))
            return modified.timestamp()
        finally:
            self.delete(path)

    def probe_put_if_absent(self) -> bool:
        """Whether creating a file is exclusive here. Without it, two results may overwrite."""
        path = f"_tmp-probe-{uuid.uuid4().hex}"
        try:
            first, second = self.put_if_absent(path, b"first"), self.put_if_absent(path, b"second")
            return first and not second and self.read_bytes(path) == b"first"
        finally:
            with contextlib.suppress(StorageError):  # what kept us from writing is told already
                self.delete(path)

    def publish_folder(self, local_dir: str | Path, path: str, marker: dict[str, Any]) -> bool:
        """Make the files of `local_dir` visible at `path`, all at once.

        On the same local disk the files are linked, not copied: leave them alone afterwards.
        Elsewhere they lie one folder deeper, named by their content, so that publishers who race
        cannot mix their files; `fetch_folder` gives them their plain names.

        Args:
            marker: what DONE.json says beside `files`.

        Returns:
            True: ours is visible. False: there was one. A folder with a broken DONE.json, or
            none, counts as not there and is replaced.
        """
        source = Path(local_dir)
        with self._explained("publish", path):
            if self.is_published(path):
                return False
            files = _describe(source)
            done = _with_seal({**marker, "files": files})
            publish = self._publish_locally if self.is_local else self._publish_remotely
            return publish(source, path, files, done)

    def is_published(self, path: str) -> bool:
        return self.read_marker(path) is not None

    def read_marker(self, path: str) -> dict[str, Any] | None:
        """What a published folder's DONE.json says; None where there is no (sound) one."""
        data = self._marker_bytes(path)
        try:
            done = json.loads(data)
        except (ValueError, RecursionError):
            return None
        is_sound = isinstance(done, dict) and _are_sound(done.get("files"))
        return done if is_sound and done.pop("seal", None) == _seal(done) else None

    def _marker_bytes(self, path: str) -> bytes:
        """Empty where there is no marker, or one too large to be ours."""
        try:
            with self._explained("read", path):
                data = self._first_bytes(self._full(f"{path}/{DONE}"), MAX_JSON_BYTES + 1)
        except FileNotFoundError:
            return b""
        return data if len(data) <= MAX_JSON_BYTES else b""

    def fetch_folder(self, path: str, cache_dir: str | Path, *, verify: bool = False) -> Path:
        """A published folder as a local one: itself if local, else downloaded once and verified.

        Args:
            verify: compare every SHA-256 also where comparing sizes would do.

        Raises:
            StorageError: not published, or there lies what nobody published: a link, a file.
            CorruptError: a file is missing or damaged.
        """
        done = self.read_marker(path)
        if done is None:
            raise StorageError(f"{self._name(path)} has no sound {DONE}: it was never published")
        with self._explained("fetch", path):
            if self.is_local:
                folder = Path(self._full(path))
                self._check_names(path, folder, done["files"])
            else:
                folder = Path(cache_dir) / path / _content_name(done["files"])
                if not folder.exists():
                    self._download(path, done["files"], folder)
            self._check_files(path, folder, done["files"], verify=verify)
            return folder

    def remove_folder(self, path: str) -> None:
        """Remove a folder, its marker first, so that it is never seen in part."""
        self.delete(f"{path}/{DONE}")
        with self._explained("remove", path), contextlib.suppress(FileNotFoundError):
            self.filesystem.rm(self._full(path), recursive=True)

    @property
    def _is_memory(self) -> bool:
        return isinstance(self.filesystem, MemoryFileSystem)

    def _full(self, path: str) -> str:
        parts = path.split("/")
        if {"", ".", ".."} & set(parts) or "\\" in path or "\0" in path:
            raise StorageError(
                f"path {path!r} must lead from {self.url} downwards: names and single slashes only"
            )
        return f"{self.root}/{path}"

    def _name(self, path: str) -> str:
        return f"{self.url}/{path}" if path else self.url

    @contextlib.contextmanager
    def _explained(self, action: str, path: str) -> Iterator[None]:
        """Turn what the storage raises into a StorageError; a missing file stays itself."""
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            if isinstance(error, FileNotFoundError) and action != "write":
                raise
            reason = error.strerror or str(error) or type(error).__name__
            raise StorageError(f"{self._name(path)}: cannot {action}: {reason}") from error
        except Exception as error:
            if self.is_local:  # no disk raises this: the mistake is ours
                raise
            reason = f"{type(error).__name__}: {error}"  # clients of clouds share no base class
            raise StorageError(f"{self._name(path)}: cannot {action}: {reason}") from error

    def _first_bytes(self, full: str, count: int) -> bytes:
        if self.is_local:
            with open(full, "rb") as file:
                return file.read(count)
        try:
            return bytes(self.filesystem.cat_file(full, start=0, end=count))
        except FileNotFoundError:
            raise
        except OSError:
            if self.filesystem.size(full) == 0:  # S3 refuses a range of an empty file
                return b""
            raise

    def _remote_files(self, root: str) -> Iterator[tuple[str, StoredFile]]:
        for full, info in self.filesystem.find(root, detail=True).items():
            marks = (info.get(name) for name in ("ETag", "etag", "generation", "created", "size"))
            yield (
                full.removeprefix(f"{root}/"),
                StoredFile(
                    " ".join(str(mark) for mark in marks), int(info["size"]), _modified(info)
                ),
            )

    def _create_remotely(self, full: str, data: bytes) -> bool:
        try:
            self.filesystem.pipe_file(full, data, mode="create")
        except FileExistsError:
            return False
        except OSError:
            if self.filesystem.exists(full):  # some S3 look-alikes say "invalid argument" instead
                return False
            raise
        return True

    def _publish_locally(self, source: Path, path: str, files: dict[str, Any], done: bytes) -> bool:
        final = Path(self._full(path))
        temporary = _temporary_beside(final)
        try:
            _link_files(source, temporary, files)
            _write_durably(temporary / DONE, done)
            crash_point("before publish")
            while not _rename_exclusively(temporary, final):
                if self.is_published(path):
                    return False
                self._set_aside_broken(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        crash_point("after publish")
        return True

    def _set_aside_broken(self, final: Path) -> None:
        """Clear the place of a folder without a sound marker.

        Between our look and our rename another process may have mended it: then it goes back.
        """
        aside = _temporary_beside(final)
        with contextlib.suppress(FileNotFoundError):
            os.rename(final, aside)
        name_aside = aside.relative_to(self.root).as_posix()
        if not (self.is_published(name_aside) and _rename_exclusively(aside, final)):
            shutil.rmtree(aside, ignore_errors=True)

    def _publish_remotely(
        self, source: Path, path: str, files: dict[str, Any], done: bytes
    ) -> bool:
        for name, facts in files.items():
            full = self._full(f"{path}/{_content_name(files)}/{name}")
            if not self._has_size(full, facts["size"]):
                self.filesystem.put_file(str(source / name), full)
        crash_point("before publish")
        if self.put_if_absent(f"{path}/{DONE}", done):
            return True
        if self.is_published(path):
            return False
        self.put(f"{path}/{DONE}", done)  # the one there was broken
        return True

    def _has_size(self, full: str, size: int) -> bool:
        try:
            return bool(self.filesystem.size(full) == size)
        except FileNotFoundError:
            return False

    def _download(self, path: str, files: dict[str, Any], folder: Path) -> None:
        temporary = _temporary_beside(folder)
        try:
            for name in files:
                full = self._full(f"{path}/{_content_name(files)}/{name}")
                target = temporary / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):  # the check below names the file
                    self.filesystem.get_file(full, str(target))
            self._check_files(path, temporary, files, verify=True)
            _rename_exclusively(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _check_names(self, path: str, folder: Path, files: dict[str, Any]) -> None:
        """A loader reads whatever lies in a folder: so nothing may lie there but what we put."""
        found = set()
        for parent, folders, names in os.walk(folder):
            for name in folders + names:
                each = Path(parent, name)
                if each.is_symlink():
                    raise StorageError(
                        f"{self._name(path)}: {each.relative_to(folder)} is a symbolic link, and "
                        "we make none. Find out who did, and delete the folder"
                    )
            found |= {Path(parent, name).relative_to(folder).as_posix() for name in names}
        unknown = sorted(name for name in found - files.keys() - {DONE} if not _is_hidden(name))
        if folder.is_symlink() or unknown:
            what = f"holds {unknown[0]!r}, which" if unknown else "is a symbolic link, which"
            raise StorageError(
                f"{self._name(path)} {what} nobody published. Find out who put it there, and "
                "delete the folder to have it made again"
            )

    def _check_files(self, path: str, folder: Path, files: dict[str, Any], *, verify: bool) -> None:
        for name, facts in files.items():
            file = folder / name
            if not file.is_file():
                damage = "is missing"
            elif file.stat().st_size != facts["size"]:
                damage = f"has {file.stat().st_size} bytes instead of {facts['size']}"
            elif verify and sha256_of(file) != facts["sha256"]:
                damage = f"has other bytes than {DONE} says (SHA-256 differs)"
            else:
                continue
            raise CorruptError(
                f"{self._name(path)}: {name} {damage}. Delete the folder to have it made again"
                + ("" if self.is_local else f", and its copy {folder}")
            )


def _with_seal(marker: dict[str, Any]) -> bytes:
    """The scores of an evaluation stand in its marker: a flipped bit must not become a result."""
    return json.dumps({**marker, "seal": _seal(marker)}, indent=1).encode()


def _seal(marker: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(marker, sort_keys=True).encode()).hexdigest()


def _is_hidden(name: str) -> bool:
    return any(part.startswith(("_tmp", ".")) for part in name.split("/"))


def _are_sound(files: Any) -> bool:
    """Whether it says of each file what we say. Its names are put to use as paths later on."""
    return isinstance(files, dict) and all(
        isinstance(facts, dict)
        and isinstance(facts.get("size"), int)
        and isinstance(facts.get("sha256"), str)
        and not {"", ".", ".."} & set(name.split("/"))
        and "\\" not in name
        and "\0" not in name
        for name, facts in files.items()
    )


def _modified(info: dict[str, Any]) -> float:
    """Every fsspec filesystem has its own name for it. Unknown: now, which is never old."""
    for name in ("LastModified", "mtime", "updated", "created", "last_modified"):
        value = info.get(name)
        with contextlib.suppress(ValueError):
            moment = datetime.fromisoformat(value) if isinstance(value, str) else value
            if isinstance(moment, datetime):
                return moment.timestamp()
            if isinstance(moment, int | float):
                return float(moment)
    return time.time()


def _local_files(root: str) -> Iterator[tuple[str, StoredFile]]:
    def tolerate_gone(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for folder, _, names in os.walk(root, onerror=tolerate_gone):
        below = folder[len(root) + 1 :]
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                stat = os.stat(f"{folder}/{name}")
                version = f"{stat.st_ino} {stat.st_mtime_ns} {stat.st_size}"
                path = f"{below}/{name}" if below else name
                yield path, StoredFile(version, stat.st_size, stat.st_mtime)


def _temporary_beside(final: Path) -> Path:
    final.parent.mkdir(parents=True, exist_ok=True)
    return final.with_name(f"_tmp-{uuid.uuid4().hex}")


@contextlib.contextmanager
def _written_beside(final: Path, data: bytes) -> Iterator[Path]:
    """The data, safe on disk under a temporary name that is gone afterwards."""
    temporary = _temporary_beside(final)
    try:
        _write_durably(temporary, data)
        crash_point("after temporary write")
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _write_durably(file: Path, data: bytes) -> None:
    with file.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _create_locally(final: Path, data: bytes) -> bool:
    if final.exists():
        return False
    with _written_beside(final, data) as temporary:
        try:
            os.link(temporary, final)
            is_ours = True
        except FileExistsError:
            # An NFS server that answers a repeated request says so of our own link, too.
            is_ours = os.path.samefile(temporary, final)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            is_ours = _create_without_links(temporary, final)
        _sync(final.parent)
        crash_point("after publish")
        return is_ours


def _create_without_links(temporary: Path, final: Path) -> bool:
    """Rename under a claim, for disks without links. A claim whose owner died is taken over."""
    claim = final.with_name(f"_tmp-claim-{final.name}")
    deadline = time.monotonic() + CLAIM_PATIENCE_S
    while not final.exists():
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            if time.monotonic() > deadline:
                claim.unlink(missing_ok=True)
            time.sleep(0.02)
            continue
        try:
            if final.exists():
                return False
            os.replace(temporary, final)
            return True
        finally:
            claim.unlink(missing_ok=True)
    return False


def _rename_exclusively(temporary: Path, final: Path) -> bool:
    """Rename a folder unless there is one already. rename(2) refuses a target with files in it."""
    try:
        os.rename(temporary, final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return False
        raise
    _sync(final.parent)
    return True


def _link_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Give every file a second name under `target`; copy where the disk does not do that."""
    target.mkdir()
    for name in names:
        twin = target / name
        twin.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link((source / name).resolve(), twin)
        except OSError as error:
            if error.errno not in {errno.EXDEV, *_NO_LINKS}:
                raise
            shutil.copyfile(source / name, twin)
        _sync(twin)


def _describe(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file of a folder by its name there, with its size in bytes and its SHA-256."""
    if not folder.is_dir():
        raise StorageError(f"{folder} is no folder, there is nothing to publish")
    return {
        file.relative_to(folder).as_posix(): {
            "size": file.stat().st_size,
            "sha256": sha256_of(file),
        }
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != folder / DONE
    }


def sha256_of(file: Path) -> str:
    """Hash of a local file, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _content_name(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]
