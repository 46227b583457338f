"""Crash-safe writing: a reader finds the old file or folder, or the new one, and never a part of either.

    write .NAME.minilora-tmp-PID beside NAME -> manifest.json -> fsync each file -> fsync the folder -> rename -> fsync
    the parent folder

A rename within a file system is atomic; the fsyncs order it after the data. An error removes the temporary files and
leaves the target as it was; what a killed process left behind, the next writer puts right. A full disk, a file-size
limit or a folder that cannot be written to becomes a UserError with the remedy.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from minilora.checkpoint.files import sha256_of
from minilora.checkpoint.json_file import read_json, short, to_json, write_json
from minilora.errors import UserError

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
# What matches is taken for ours and deleted, so it must be no name that a user gives to a backup.
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.minilora-(?P<kind>tmp|old)-(?P<pid>[0-9]{1,9})")
_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EFBIG: "the file would exceed the largest size allowed; raise the limit (ulimit -f) or choose another disk",
    errno.EROFS: "the file system is read-only; choose another folder",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "no permission to write there; choose another folder"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a part of that path is a file; choose another folder"),
}


def place(path: str | Path) -> Path:
    """Where the kernel finds `path`: a link before a `..` is followed first. Its last name may itself be a link."""
    path = Path(path)
    return Path(os.path.realpath(path)) if path.name in ("", "..") else Path(os.path.realpath(path.parent), path.name)


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write one file, replacing what was there. Raises UserError if it cannot be written."""
    path = place(path)
    with _explained(path):
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path}: is a folder, a pipe or a device; name a file")
        sweep_stale(path.parent, path.name)
        temp = _beside(path, "tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temp.write_bytes(data.encode() if isinstance(data, str) else data)
            _fsync(temp)
            temp.replace(path)
        except BaseException:
            temp.unlink(missing_ok=True)
            raise
        _fsync(path.parent)


def atomic_json(path: str | Path, document: dict[str, Any]) -> None:
    """Write one file of JSON as `atomic_write` does."""
    atomic_write(path, to_json(document, indent=1) + "\n")


def atomic_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one file of JSON, a line a row, as `atomic_write` does."""
    atomic_write(path, "".join(to_json(row) + "\n" for row in rows))


@contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield an empty folder to write into, which becomes `path` when the block ends without an error, with a
    manifest.json that has each file's sha256 and size (`verify_manifest`). What killed processes left of an earlier one
    is swept first.

    overwrite: replace what we wrote at `path`; without it, anything but an empty folder there is refused
    needed_bytes: checked against the free space beforehand

    Raises UserError if the target stands, the space is short, or writing fails, in the block as well. One that the
    block raises speaks of `path`, not of the folder that is gone by then.
    """
    path = place(path)
    with _explained(path):
        sweep_stale(path.parent, path.name)
        _refuse_standing(path, overwrite)
        check_space(path.parent, needed_bytes)
        temp = _beside(path, "tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temp.mkdir()
            yield temp
            listed = {f.relative_to(temp).as_posix(): _facts(f) for f in sorted(temp.rglob("*")) if f.is_file()}
            write_json(temp / MANIFEST, {"format_version": MANIFEST_VERSION, "files": listed})
            for file in [*temp.rglob("*"), temp]:
                _fsync(file)
            _swap(temp, path, overwrite)
        except BaseException as error:
            shutil.rmtree(temp, ignore_errors=True)
            if isinstance(error, UserError) and temp.name in str(error):
                raise UserError(str(error).replace(temp.name, path.name)) from None
            raise


def check_target(path: str | Path, overwrite: bool, sources: Iterable[str | Path]) -> None:
    """Raise UserError if a folder of ours must not be written at `path`, before any work goes into it.

    It must not hold one of the `sources` that it is made from. With overwrite it may stand, but only if its manifest
    knows all that lies in it, as it is: then we wrote it.
    """
    if not os.fspath(path):
        raise UserError("the name of the folder to write is empty; give it one")
    path, target = place(path), Path(os.path.realpath(path))
    for source in map(Path, map(os.path.realpath, sources)):
        if source.is_relative_to(target):
            raise UserError(f"{path}: holds {source}, which it would be made from; choose another folder")
    with _explained(path):
        _refuse_standing(path, overwrite)
    if os.path.isfile(target / MANIFEST):
        verify_manifest(target, "move it away, or choose another folder")


def check_new(path: str | Path) -> None:
    """Raise UserError if a file is at `path`, or none can be written there, before any work goes into it."""
    if os.path.lexists(path := place(path)):
        raise UserError(f"{path}: exists already; name another file")
    with _explained(path), TemporaryFile(dir=_nearest(path.parent)):
        pass


def not_ours(folder: Path) -> list[str]:
    """The files in `folder` that its manifest does not list, all where it has none, by their names in it."""
    files = read_json(folder / MANIFEST).get("files") if os.path.isfile(folder / MANIFEST) else None
    listed = {MANIFEST, *files} if isinstance(files, dict) else set[str]()
    return sorted({str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir()} - listed)


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raise UserError if fewer than `needed_bytes` are free where `folder` is or will be."""
    if (free := shutil.disk_usage(_nearest(folder)).free) < needed_bytes:
        found = f"{needed_bytes / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free"
        raise UserError(f"{folder}: {found}; free some or choose another folder")


def sweep_stale(folder: str | Path, name: str | None = None) -> None:
    """Put right what killed processes left in `folder`.

    name: of the one target to look at, where the folder is not ours alone

    A .NAME.minilora-tmp-PID is deleted. A .NAME.minilora-old-PID was set aside for a new NAME: it goes back if NAME
    never came. Leftovers of other processes that are alive on this machine stay.
    """
    for leftover in sorted(Path(folder).iterdir()) if os.path.isdir(folder) else []:
        match = _LEFTOVER.fullmatch(leftover.name)
        if not match or (name is not None and match["name"] != name) or _another_lives(int(match["pid"])):
            continue
        target = leftover.with_name(match["name"])
        if match["kind"] == "old" and not os.path.exists(target):
            leftover.rename(target)
        elif leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def verify_manifest(folder: Path, remedy: str = f"if that was intended, delete {MANIFEST} beside it") -> dict[str, Any]:
    """Hold the files of `folder` against its manifest.json; returns the manifest. remedy: for a file that is altered

    Raises UserError that names the file which is missing or altered. Files that are not listed are not looked at.
    """
    manifest = read_json(own := folder / MANIFEST)
    version, listed = manifest.get("format_version"), manifest.get("files")
    if version != MANIFEST_VERSION:
        raise UserError(f"{own}: format_version is {short(version)}; this minilora knows {MANIFEST_VERSION}")
    if not isinstance(listed, dict):
        raise UserError(f"{own}: files must be an object")
    for name, facts in listed.items():
        file = folder / name
        if {"..", ""} & set(name.split("/")) or Path(name).as_posix() != name or not os.path.isfile(file):
            raise UserError(f"{file}: missing, but {MANIFEST} lists it; the folder is not complete")
        if facts != _facts(file):
            raise UserError(f"{file}: altered since it was written; {remedy}")
    return manifest


def _facts(file: Path) -> dict[str, Any]:
    return {"sha256": sha256_of(file), "bytes": file.stat().st_size}


def _swap(temp: Path, path: Path, overwrite: bool) -> None:
    """Rename `temp` to `path`. With overwrite, a folder that is there is set aside first and deleted last."""
    _refuse_standing(path, overwrite)  # what came while we wrote
    old = _beside(path, "old")
    replaces = overwrite and path.is_dir() and not path.is_symlink() and bool(os.listdir(path))
    if replaces:
        path.rename(old)
    try:
        temp.rename(path)  # fails unless nothing or an empty folder is there
    except BaseException as error:
        if replaces:
            old.rename(path)
        if isinstance(error, OSError):
            _refuse_standing(path, overwrite)  # or just now
        raise
    _fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's list of names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems have no fsync for folders
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an OSError into a UserError that says what to do."""
    try:
        yield
    except OSError as error:
        reason = _REMEDIES.get(error.errno or 0, error.strerror or str(error))
        raise UserError(f"{path}: could not be written: {reason}") from error


def _nearest(folder: Path) -> Path:
    """It, or the lowest above it that is there."""
    return next(parent for parent in (folder, *folder.parents) if os.path.exists(parent))


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.minilora-{kind}-{os.getpid()}")


def _refuse_standing(path: Path, overwrite: bool) -> None:
    """Raise UserError if a new folder must not take the place of what is at `path`."""
    stands = os.path.exists(path)
    if os.path.islink(path) or (stands and not os.path.isdir(path)):
        raise UserError(f"{path}: is a link or a file; choose another name for the folder")
    if not overwrite and stands and os.listdir(path):
        raise UserError(f"{path}: exists already; choose another name, or add --overwrite")
    if stands and (others := not_ours(path)):
        raise UserError(
            f"{path}: holds {others[0]}, which minilora did not write; move it away, or choose another folder"
        )
    if stands and Path.cwd().is_relative_to(os.path.realpath(path)):
        raise UserError(f"{path}: the current folder lies in it, and it would be replaced; choose another name")


def _another_lives(pid: int) -> bool:
    """Whether another process has that number. In a container ours is the same each time."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return pid != os.getpid()
