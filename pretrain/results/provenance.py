"""Where a number comes from: versions, hardware, commit, hashes; nothing names a host, a user or a path."""

import contextlib
import hashlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.files import read_mapping, sorted_header

# {module: distributions that may provide it} of what can change a number
_PACKAGES = {
    "cv2": ("opencv-python", "opencv-python-headless"),
    "mmcv": ("mmcv", "mmcv-lite"),
    "mmseg": ("mmsegmentation",),
    "PIL": ("pillow",),
    "pretrain": ("posfield",),
} | {
    name: (name.replace("_", "-"),)
    for name in """detectron2 faster_coco_eval fvcore mmengine numpy omegaconf pycocotools safetensors scipy
        timm torch torchvision xformers""".split()
}
_OF_A_NETWORK = (".safetensors", ".bin", ".json")  # in a folder; all else there is about it
# What says where a run reads and writes, or repeats it; `weights_hash` and `seed` say it better.
NOT_HASHED = ("seed", "weights", "output", "output_dir", "work_dir")


def provenance(config: Mapping[str, Any], weights: str | Path | None = None) -> dict[str, Any]:
    """The fields of a `Result` that no run should fill by hand.

    Gives config_hash, weights_hash (None without `weights`), git_commit (of this code), packages, hardware
    and peak_memory_mib.
    """
    return {
        "config_hash": config_hash(config),
        "weights_hash": None if weights is None else file_hash(weights),
        "git_commit": git_commit(Path(__file__).resolve().parents[1]),
        "packages": packages_in_use(),
        "hardware": hardware(),
        "peak_memory_mib": peak_memory_mib(),
    }


def packages_in_use() -> dict[str, str]:
    """{distribution: version} of Python and of the imported packages that can change a number."""
    versions = {"python": platform.python_version()}
    for name in (name for module, names in _PACKAGES.items() if module in sys.modules for name in names):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def hardware() -> dict[str, Any]:
    """cpu (model), cores (that this process may use), memory_gib, gpus (names), processes (of the run)."""
    torch = sys.modules.get("torch")  # a run has imported it; a table need not
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else []
    spread = torch and torch.distributed.is_available() and torch.distributed.is_initialized()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": gpus,
        "processes": torch.distributed.get_world_size() if torch and spread else 1,
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if match := re.search(r"^model name\s*:(.*)", told, re.M):
            return match[1].strip()
    return platform.processor() or platform.machine()


def git_commit(folder: str | Path) -> str | None:
    """The commit of the repository that tracks `folder`, with "+dirty" when tracked files differ from it.

    None outside a repository, without git, before the first commit, and for a folder that merely lies in
    someone else's repository untracked (an installed package).
    """
    if not _git(folder, "ls-files", "--", "."):
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit and commit + ("+dirty" if changed else "")


def _git(folder: str | Path, *arguments: str) -> str | None:
    """What git prints, or None when it fails or is absent."""
    # GIT_DIR and the like are set inside a hook and would point at another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"  # looking must not get in the way of someone's commit
    command = ["git", "-C", str(folder), *arguments]
    try:
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def config_hash(config: Mapping[str, Any], without: tuple[str, ...] = NOT_HASHED) -> str:
    """12 hex digits of the SHA-256 of the canonical JSON of `config`, without keys of any depth in `without`.

    Neither the order of keys matters, nor list or tuple. Raises UserError for what JSON cannot hold.
    """

    def kept(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): kept(item) for key, item in value.items() if key not in without}
        return [kept(item) for item in value] if isinstance(value, list | tuple) else value

    try:
        text = json.dumps(kept(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"the config cannot be hashed: {error}") from error
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def file_hash(path: str | Path, before: str | None = None) -> str:
    """12 hex digits of the SHA-256 of a file's bytes; of a folder, of the files that a network is read from.

    The order of a safetensors file's metadata, which its library leaves to chance, does not count: they are
    taken sorted. Earlier versions hashed the bytes as they are, and what they left is still found by that.

    Args:
        before: what an earlier run called these weights. Where that is the hash of the bytes as they are, or
            the ``result.json`` beside the file calls it so, this is the answer.

    Raises:
        UserError: it cannot be read.
    """
    path = Path(path)
    now, as_it_is = hashes_of(path)
    if as_it_is == now:  # as of every file of another kind
        return now
    return as_it_is if as_it_is in (before, _said_beside(path)) else now


def hashes_of(path: str | Path) -> tuple[str, str]:
    """:func:`file_hash` with sorted metadata, and of the bytes as they are, as earlier versions took it.

    Raises:
        UserError: it cannot be read.
    """
    path = Path(path)
    files = [path]
    try:
        if is_folder := path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix in _OF_A_NETWORK and file.is_file())
        names = json.dumps([file.name for file in files]).encode() if is_folder else b""
        digest, is_sorted = _digest(names, files, as_it_is=False)
        return digest, digest if is_sorted else _digest(names, files, as_it_is=True)[0]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _digest(names: bytes, files: list[Path], *, as_it_is: bool) -> tuple[str, bool]:
    """The hash, and whether the metadata of all files are sorted (or do not count)."""
    digest, is_sorted = hashlib.sha256(names), True
    for each in files:
        with open(each, "rb") as file:
            if header := None if as_it_is else sorted_header(file):
                digest.update(header)
                is_sorted = False
            else:
                file.seek(0)
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:12], is_sorted


def _said_beside(path: Path) -> Any:
    """The ``weights_hash`` in the ``result.json`` beside a file, if there is one."""
    with contextlib.suppress(UserError):
        return read_mapping(path.parent / "result.json", "result").get("weights_hash")
    return None


def peak_memory_mib() -> float:
    """MiB: the most that PyTorch held on one GPU, where this process used one; else the peak resident set."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        peak = max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
        if peak > 0:
            return round(peak / 2**20, 1)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)
