"""Crash-safe writing under full disks, size limits, kills and targets that are in the way."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from disks import dead_pid, largest_file

from minilora.checkpoint import write
from minilora.checkpoint.files import copy_file, sha256_of
from minilora.checkpoint.write import (
    atomic_folder,
    atomic_write,
    check_new,
    check_space,
    check_target,
    not_ours,
    sweep_stale,
    verify_manifest,
)
from minilora.errors import UserError


def test_atomic_write_makes_folders_and_replaces(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b.txt"
    atomic_write(file, "one \N{SNOWMAN}")
    atomic_write(file, b"two")
    assert file.read_bytes() == b"two"
    assert os.listdir(file.parent) == ["b.txt"]


def test_atomic_write_replaces_files_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(UserError, match=f"{name}: is a folder, a pipe or a device; name a file"):
            atomic_write(tmp_path / name, "x")
    assert (tmp_path / "pipe").is_fifo()


def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell in it would be left in a folder that is gone."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    for path in (".", tmp_path / "a" / "b", ".."):
        with pytest.raises(UserError, match="the current folder lies in it"), atomic_folder(path, overwrite=True):
            pass


def test_a_folder_above_a_link_is_the_one_that_the_kernel_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """link/../x lies beside what the link leads to, and not beside the link."""
    (tmp_path / "other" / "dir").mkdir(parents=True)
    (tmp_path / "link").symlink_to("other/dir")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis").write_text("precious")
    monkeypatch.chdir(tmp_path)
    atomic_write("link/../file", "new")
    for _ in range(2):
        check_target("link/../folder", True, [])
        with atomic_folder("link/../folder", overwrite=True) as folder:
            (folder / "ours").touch()
    assert sorted(os.listdir("other")) == ["dir", "file", "folder"]
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "thesis").read_text() == "precious"
    (tmp_path / "other" / "folder" / "theirs").touch()
    with pytest.raises(UserError, match=rf"^{tmp_path}/other/folder: holds theirs, which minilora did not write"):
        check_target("link/../folder", True, [])


def test_atomic_write_over_the_size_limit_keeps_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "metrics.json"
    atomic_write(file, "old")
    with largest_file(1000), pytest.raises(UserError, match=rf"{file}: could not be written: .*ulimit -f"):
        atomic_write(file, "x" * 2000)
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_atomic_folder_appears_whole_and_at_once(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "step-1"
    with atomic_folder(target) as folder:
        assert folder.parent == target.parent
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_bytes(b"w")
        assert not target.exists()
    assert (target / "sub" / "weights").read_bytes() == b"w"
    assert os.listdir(target.parent) == ["step-1"]


def test_every_file_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_rename, real_fsync = Path.rename, write._fsync
    monkeypatch.setattr(write, "_fsync", lambda path: (events.append(f"sync {path.name}"), real_fsync(path))[1])
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append("rename"), real_rename(self, to))[1])
    with atomic_folder(tmp_path / "new") as folder:
        (folder / "a").mkdir()
        (folder / "a" / "b").touch()
    assert set(events[:4]) == {"sync a", "sync b", "sync manifest.json", f"sync .new.minilora-tmp-{os.getpid()}"}
    assert events[4:] == ["rename", f"sync {tmp_path.name}"]


def written(folder: Path) -> list[str]:
    """The names in a folder that we wrote."""
    with atomic_folder(folder) as temp:
        (temp / "old").touch()
    return os.listdir(folder)


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), UserError("bad tensor")])
def test_an_error_inside_leaves_nothing_and_passes_through(tmp_path: Path, error: BaseException) -> None:
    before = written(tmp_path / "new")

    def fail_half_way() -> None:
        with atomic_folder(tmp_path / "new", overwrite=True) as folder:
            (folder / "half").touch()
            raise error

    with pytest.raises(type(error)) as caught:
        fail_half_way()
    assert caught.value is error
    assert os.listdir(tmp_path) == ["new"]
    assert os.listdir(tmp_path / "new") == before


def test_an_existing_target_is_refused_unless_asked(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    with atomic_folder(target) as folder:  # empty: nothing to lose
        (folder / "one").touch()
    with pytest.raises(UserError, match=rf"{target}: exists already"), atomic_folder(target):
        pytest.fail("entered")
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "two").touch()
        assert set(os.listdir(target)) == {"one", "manifest.json"}
    assert set(os.listdir(target)) == {"two", "manifest.json"}
    assert os.listdir(tmp_path) == ["adapter"]


def test_what_others_put_there_is_not_replaced(tmp_path: Path) -> None:
    """Neither what was there, nor what comes while we write."""
    before = written(tmp_path / "x")

    def comes_late() -> None:
        with atomic_folder(tmp_path / "x", overwrite=True):
            (tmp_path / "x" / "thesis").touch()

    for _ in range(2):
        with pytest.raises(UserError, match="x: holds thesis, which minilora did not write; move it away, or ch"):
            comes_late()
        assert sorted(os.listdir(tmp_path / "x")) == sorted([*before, "thesis"])
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_or_link_as_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with (
            pytest.raises(UserError, match=rf"{name}: is a link or a file"),
            atomic_folder(tmp_path / name, overwrite=True),
        ):
            pytest.fail("entered")
    assert (tmp_path / "file").read_text() == "precious"


def occupy(path: Path, kind: str) -> None:
    """Put a folder, a file or a link to a folder there, with something precious in it."""
    where = path.with_name("elsewhere") if kind == "link" else path
    if kind == "file":
        path.write_text("precious")
        return
    where.mkdir()
    (where / "precious").write_text("precious")
    if kind == "link":
        path.symlink_to(where)


@pytest.mark.parametrize(
    ("kind", "overwrite"),
    [("folder", False), ("file", False), ("file", True), ("link", False), ("link", True)],
)
def test_what_appears_at_the_target_meanwhile_stays_whole(tmp_path: Path, kind: str, overwrite: bool) -> None:
    target = tmp_path / "x"
    message = "exists already; choose another name" if kind == "folder" else "is a link or a file; choose another name"
    with pytest.raises(UserError, match=rf"^{target}: {message}"), atomic_folder(target, overwrite=overwrite):
        occupy(target, kind)
    precious = target if kind == "file" else target / "precious"
    assert precious.read_text() == "precious"
    assert target.is_symlink() == (kind == "link")
    assert set(os.listdir(tmp_path)) - {"elsewhere"} == {"x"}


def test_an_empty_folder_that_appears_meanwhile_becomes_ours(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "x") as folder:
        (folder / "ours").touch()
        (tmp_path / "x").mkdir()
    assert os.listdir(tmp_path) == ["x"]
    assert set(os.listdir(tmp_path / "x")) == {"ours", "manifest.json"}


def test_a_folder_whose_files_are_altered_is_no_target(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "x") as folder:
        (folder / "notes").write_text("ours")
    check_target(tmp_path / "x", True, [])
    (tmp_path / "x" / "notes").write_text("theirs")
    with pytest.raises(UserError, match=r"x/notes: altered since it was written; move it away, or choose another"):
        check_target(tmp_path / "x", True, [])


def test_an_empty_name_is_no_target() -> None:
    with pytest.raises(UserError, match=r"^the name of the folder to write is empty; give it one$"):
        check_target("", False, ["."])


def test_a_failing_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x"
    before, real_rename = written(target), Path.rename

    def fail(self: Path, to: Path) -> Path:
        if ".minilora-tmp-" in self.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real_rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    with (
        pytest.raises(UserError, match=r"x: could not be written: Input/output error"),
        atomic_folder(target, overwrite=True),
    ):
        pass
    assert os.listdir(tmp_path) == ["x"]
    assert os.listdir(target) == before


def test_size_limit_inside_the_folder(tmp_path: Path) -> None:
    with (
        largest_file(1000),
        pytest.raises(UserError, match=r"new: could not be written: .*ulimit -f"),
        atomic_folder(tmp_path / "new") as folder,
    ):
        (folder / "weights").write_bytes(b"x" * 2000)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only; choose another folder"),
        (errno.EACCES, "no permission to write there; choose another folder"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_errors_of_the_disk_become_one_line(tmp_path: Path, code: int, remedy: str) -> None:
    with pytest.raises(UserError, match=rf"new: could not be written: .*{remedy}"), atomic_folder(tmp_path / "new"):
        raise OSError(code, os.strerror(code))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("disk", ["1m"], indirect=True)
def test_a_full_disk(disk: Path) -> None:
    with atomic_folder(disk / "x") as folder:
        (folder / "old").write_bytes(b"o")
    with (
        pytest.raises(UserError, match="x: could not be written: the disk is full"),
        atomic_folder(disk / "x", overwrite=True) as folder,
    ):
        (folder / "weights").write_bytes(b"x" * 2_000_000)
    with pytest.raises(UserError, match="the disk is full"):
        atomic_write(disk / "metrics", b"x" * 2_000_000)
    with pytest.raises(UserError, match="GB are needed"), atomic_folder(disk / "y", needed_bytes=2_000_000):
        pytest.fail("entered")
    assert os.listdir(disk) == ["x"]
    assert (disk / "x" / "old").read_bytes() == b"o"


def test_space_is_checked_first(tmp_path: Path) -> None:
    check_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(UserError, match=r"yet: 1e\+09 GB are needed, .* GB are free"):
        check_space(tmp_path / "not" / "there" / "yet", 10**18)


def test_a_path_through_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for inside in (tmp_path / "file" / "x", tmp_path / "file" / "x" / "y"):  # EEXIST and ENOTDIR
        message = f"^{inside}: could not be written: a part of that path is a file; choose another folder$"
        with pytest.raises(UserError, match=message):
            atomic_write(inside, "")
        with pytest.raises(UserError, match=message), atomic_folder(inside):
            pytest.fail("entered")


def test_where_no_file_can_be_written_is_known_beforehand(tmp_path: Path) -> None:
    check_new(tmp_path / "not" / "there" / "yet")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match=f"^{tmp_path}/link: exists already; name another file$"):
        check_new(tmp_path / "link")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/x/y: could not be written: a part of that path is a file"):
        check_new(tmp_path / "file" / "x" / "y")
    if Path("/proc/self").exists():  # where not even root can write
        with pytest.raises(UserError, match=r"^/proc/x/y: could not be written: "):
            check_new("/proc/x/y")
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_manifest_finds_what_was_altered_or_lost(tmp_path: Path) -> None:
    target = tmp_path / "new"
    with atomic_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_bytes(b"0123")
        (folder / "note").write_bytes(b"n")
    assert verify_manifest(target)["files"].keys() == {"sub/weights", "note"}
    (target / "extra").touch()
    verify_manifest(target)
    (target / "sub" / "weights").write_bytes(b"0124")  # one bit
    with pytest.raises(UserError, match=r"sub/weights: altered since it was written; if that was intended, delete"):
        verify_manifest(target)
    (target / "sub" / "weights").unlink()
    with pytest.raises(UserError, match=r"sub/weights: missing, but manifest\.json lists it"):
        verify_manifest(target)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"format_version": 2, "files": {}}, "format_version is 2; this minilora knows 1"),
        ({"files": {}}, "format_version is None"),
        ({"format_version": 1}, "files must be an object"),
        ({"format_version": 1, "files": {"../secret": {}}}, "secret: missing"),
        ({"format_version": 1, "files": {"/etc/passwd": {}}}, "passwd: missing"),
        ({"format_version": 1, "files": {"./manifest.json": {}}}, "manifest.json: missing"),  # a name has one form
        ({"format_version": 1, "files": {"x" * 300: {}}}, "xxx: missing"),
    ],
)
def test_a_manifest_that_is_none(tmp_path: Path, manifest: dict[str, object], message: str) -> None:
    (tmp_path / "secret").touch()
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        verify_manifest(folder)


def test_sweep_removes_the_dead_and_keeps_the_living(tmp_path: Path) -> None:
    dead = dead_pid()
    stale = {f".{name}-{dead}" for name in ("a.minilora-tmp", "b.minilora-old", "c.minilora-old")}
    ours = f".h.minilora-tmp-{os.getpid()}"  # a process that had our number, as in a container each has: ours is new
    stale.add(ours)
    kept = {"b", f".d.minilora-tmp-{os.getppid()}", ".e.minilora-tmp-x", "f"}
    users = {f"b.old-{dead}", "b.old-20240501", f"a.tmp-{dead}", f"minilora-tmp-{dead}"}  # backups and the like
    for name in stale | kept | users:
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    (tmp_path / f".g.json.minilora-tmp-{dead}").touch()
    sweep_stale(tmp_path)
    assert set(os.listdir(tmp_path)) == kept | users | {"c"}
    assert (tmp_path / "b" / "content").read_text() == "b"
    assert (tmp_path / "c" / "content").read_text() == f".c.minilora-old-{dead}"  # set aside, and never replaced
    sweep_stale(tmp_path / "nowhere")


def test_what_a_killed_writer_of_our_number_set_aside_comes_back(tmp_path: Path) -> None:
    """Killed between its renames: the new one goes on, and an error of it leaves the old folder."""
    before = written(tmp_path / f".x.minilora-old-{os.getpid()}")
    with pytest.raises(KeyError), atomic_folder(tmp_path / "x", overwrite=True):
        raise KeyError
    assert os.listdir(tmp_path) == ["x"]
    assert os.listdir(tmp_path / "x") == before


def test_a_file_s_leftovers_are_swept_too(tmp_path: Path) -> None:
    dead = dead_pid()
    for name in ("x.json", "y.json"):
        (tmp_path / f".{name}.minilora-tmp-{dead}").touch()
    atomic_write(tmp_path / "x.json", "{}")
    assert set(os.listdir(tmp_path)) == {"x.json", f".y.json.minilora-tmp-{dead}"}


def test_an_error_inside_speaks_of_the_folder_that_was_meant(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^{tmp_path}/x/weights: damaged$"), atomic_folder(tmp_path / "x") as folder:
        raise UserError(f"{folder}/weights: damaged")


def test_a_name_that_is_too_long_is_one_line(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 300)
    check_target(long, True, [])  # which leaves it to the writer
    message = "xxx: could not be written: File name too long$"
    with pytest.raises(UserError, match=message):
        atomic_write(long, "")
    with pytest.raises(UserError, match=message), atomic_folder(long):
        pytest.fail("entered")


@pytest.mark.parametrize("files", [5, ["x"], None])
def test_a_manifest_that_lists_nothing_knows_no_file(tmp_path: Path, files: object) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format_version": 1, "files": files}))
    (tmp_path / "x").touch()
    assert not_ours(tmp_path) == ["manifest.json", "x"]


def test_what_cannot_be_read_is_not_said_to_be_unwritable(tmp_path: Path) -> None:
    """For root, whom no permissions stop, a file of the kernel's that opens, and cannot be read."""
    (tmp_path / "source").symlink_to("/proc/self/mem")
    with (
        pytest.raises(UserError, match=rf"^{tmp_path}/source: cannot be read: Input/output error$"),
        atomic_folder(tmp_path / "x") as folder,
    ):
        copy_file(tmp_path / "source", folder / "copy")
    with pytest.raises(UserError, match=r"source: cannot be read: Input/output error"):
        sha256_of(tmp_path / "source")


WRITER = """
import sys
from minilora.checkpoint.write import atomic_folder
n = 0
while True:
    n += 1
    with atomic_folder(sys.argv[1], overwrite=True) as folder:
        for i in range(4):
            (folder / f"part-{i}").write_bytes(b"%09d" % n * 20_000)
    if n == 1:
        print("ready", flush=True)
"""


def test_killed_at_any_moment_the_folder_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "latest"
    for round_ in range(8):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process, process.stdout:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.003 * round_)
            process.send_signal(signal.SIGKILL)
        sweep_stale(tmp_path)
        assert os.listdir(tmp_path) == ["latest"]
        verify_manifest(target)
        parts = {(target / f"part-{i}").read_bytes() for i in range(4)}
        assert len(parts) == 1
