"""From a model's name to its folder and to the hash of what is in it. Free of torch."""

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from jobs.errors import ModelError
from jobs.spec import ModelSpec

SHIPPED_MODELS = ("demo",)

_KINDS = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py")
"""What a model is made of: config, weights, template, tokenizer and, if trusted, code."""


def locate(spec: ModelSpec) -> Path:
    """The folder of a model: shipped with us, on disk, or fetched from the hub (and cached).

    Raises:
        ModelError: no such folder, no such hub model, or one without safetensors.
    """
    if spec.name in SHIPPED_MODELS:
        return Path(str(files("workers.zoo"))) / spec.name
    folder = Path(spec.name).expanduser()
    if not folder.is_dir():
        folder = _from_hub(spec)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: not a model folder in Hugging Face layout")
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} has no *.safetensors; other weight formats are not read")
    return folder


def fingerprint_model(folder: Path) -> str:
    """Hash of every file that a model is made of, 16 hex digits. Reads every byte."""
    digest = hashlib.sha256()
    for file in sorted(file for kind in _KINDS for file in folder.glob(kind)):
        with file.open("rb") as opened:
            digest.update(file.name.encode())
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in the folder's safetensors, read from the headers alone.

    Raises:
        ModelError: a file that is no safetensors.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _weights(folder):
        try:
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(min(length, 100_000_000)))
            header.pop("__metadata__", None)
            shapes |= {name: tuple(entry["shape"]) for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ModelError(f"{file} is not a safetensors file: {error}") from error
    return shapes


def config_of(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`.

    Raises:
        ModelError: there is none, or it is not JSON.
    """
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{folder} is not a model folder: {error}") from error


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _from_hub(spec: ModelSpec) -> Path:
    if spec.name.count("/") != 1 or spec.name.startswith((".", "/", "~")):
        raise ModelError(
            f"model {spec.name!r}: no such folder, and not a hub name (org/model). A relative path "
            "starts at the sweep's folder; the first lines of a sweep that ships say how its model "
            f"is made. Shipped models: {', '.join(SHIPPED_MODELS)}"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                spec.name,
                revision=spec.revision,
                allow_patterns=list(_KINDS),
            )
        )
    except Exception as error:  # the hub's client raises from several libraries
        raise ModelError(
            f"model {spec.name!r}: no such folder, and the hub could not give it: {error}"
        ) from error
