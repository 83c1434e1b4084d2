"""Where an artifact may go: what will not do is said before the work, and a place that cannot be renamed is filled."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from export import destination, pipeline
from export.destination import ExportError, check, publish, workplace
from export.pipeline import Job, export, run_stages
from sidecar.artifact import open_artifact

QUIET = Console(file=io.StringIO())
Usage = namedtuple("Usage", "total used free")


def job(model: Path, out: Path) -> Job:
    """The quickest export there is."""
    return Job(model=str(model), out=out, formats=("torch",), precisions=("f32",))


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts file systems in memory, where this process may."""
    mounted: list[Path] = []

    def one(size: str, *, read_only: bool = False) -> Path:
        place = tmp_path / "volume"
        place.mkdir()
        option = f"size={size}" + (",ro" if read_only else "")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip("this process may not mount file systems")
        mounted.append(place)
        return place

    yield one
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test as soon as the checkpoint is read."""
    monkeypatch.setattr(pipeline, "open_checkpoint", lambda *_, **__: pytest.fail("the work has begun"))


def test_a_mount_point_is_filled_and_filled_again(toy_artifact: Path, mount: Callable[..., Path]) -> None:
    out = mount("16m")
    (out / "lost+found").mkdir()
    for _ in range(2):
        check(out)
        with workplace(out) as partial:
            shutil.copytree(toy_artifact, partial, dirs_exist_ok=True)
            publish(partial, out)
        open_artifact(out).verify()
        assert {path.name for path in out.iterdir()} == {"lost+found", *(path.name for path in toy_artifact.iterdir())}


def test_a_bind_mount_of_the_same_file_system_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(f"36 35 98:0 /x {tmp_path}/my\\040volume rw,noatime - ext4 /dev/root rw\n")
    monkeypatch.setattr(destination, "_MOUNTS", table)
    assert destination._is_mount_point(tmp_path / "my volume")
    assert not destination._is_mount_point(tmp_path)


def test_what_was_in_a_mount_point_is_there_again_when_filling_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(destination, "_is_mount_point", lambda _: True)
    out = tmp_path / "out"
    out.mkdir()
    for name in ("manifest.json", "manifest.json.sha256", "old.bin"):
        (out / name).write_text("old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "manifest.json.sha256" and self.parent != out and target.parent == out:
            assert sorted(path.name for path in out.iterdir() if path.name[0] != ".") == ["manifest.json", "new.bin"]
            monkeypatch.setattr(Path, "rename", rename)
            raise OSError(errno.EIO, "the disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="the disk is gone"), workplace(out) as partial:
        for name in ("manifest.json", "manifest.json.sha256", "new.bin"):
            (partial / name).write_text("new")
        publish(partial, out)
    assert {path.name: path.read_text() for path in out.iterdir()} == dict.fromkeys(
        ("manifest.json", "manifest.json.sha256", "old.bin"), "old"
    )


@pytest.mark.usefixtures("no_work")
def test_places_that_will_not_do_are_told_before_the_work(toy_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(toy_checkpoint, tmp_path / "models" / "toy")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(checkpoint)
    for out, message in {
        checkpoint: "is the checkpoint itself",
        tmp_path / "link": "is the checkpoint itself",
        checkpoint / "artifact": "lies inside the checkpoint",
        checkpoint.parent: "holds the checkpoint",
        tmp_path / "file": "exists and is not a directory",
        tmp_path / "file" / "artifact": "cannot write to .*: Not a directory; choose another",
        tmp_path / ("n" * 240): "cannot write to .*: File name too long; choose another",
    }.items():
        with pytest.raises(ExportError, match=message):
            export(job(checkpoint, out), QUIET)


@pytest.mark.usefixtures("no_work")
def test_a_read_only_place_is_told_before_the_work(toy_checkpoint: Path, mount: Callable[..., Path]) -> None:
    volume = mount("1m", read_only=True)
    for out in (volume, volume / "artifact", volume / "deep" / "artifact"):
        with pytest.raises(ExportError, match="cannot write to .*: Read-only file system; choose another"):
            export(job(toy_checkpoint, out), QUIET)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.usefixtures("no_work")
def test_a_place_without_permission_is_told_before_the_work(toy_checkpoint: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(ExportError, match="Permission denied"):
        export(job(toy_checkpoint, tmp_path / "artifact"), QUIET)
    tmp_path.chmod(0o755)


def test_an_artifact_of_an_earlier_schema_may_be_replaced(toy_artifact: Path, tmp_path: Path) -> None:
    out = shutil.copytree(toy_artifact, tmp_path / "artifact")
    data = json.dumps({**json.loads((out / "manifest.json").read_text()), "schema": 0}).encode()
    (out / "manifest.json").write_bytes(data)
    with pytest.raises(ExportError, match="holds no artifact"):  # its seal is another's
        check(out)
    (out / "manifest.json.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  manifest.json\n")
    check(out)


def test_no_parent_is_left_of_an_export_that_failed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no directory"):
        export(job(tmp_path / "nowhere", tmp_path / "a" / "b" / "artifact"), QUIET)
    check(tmp_path / "c" / "artifact")
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_told_before_the_work(toy_checkpoint: Path, mount: Callable[..., Path]) -> None:
    volume = mount("300k")

    def no_writing(*_: object) -> pipeline.Written:
        pytest.fail("the work has begun")

    with pytest.raises(ExportError, match=r"takes about \d+\.\d MB, and the file system of .* has 0\.3 MB free"):
        run_stages(job(toy_checkpoint, volume / "artifact"), no_writing, QUIET)
    assert list(volume.iterdir()) == []


def test_a_file_system_that_fills_up_is_named(
    toy_checkpoint: Path, mount: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "check_space", lambda *_: None)
    volume = mount("300k")
    with pytest.raises(ExportError, match=rf"the file system of {volume}/artifact is full; free some space"):
        export(job(toy_checkpoint, volume / "artifact"), QUIET)
    assert list(volume.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "free", "message"),
    [
        (RuntimeError("basic_ios::clear: iostream error"), 0, "is full"),
        (RuntimeError("basic_ios::clear: iostream error"), 10**9, "iostream error"),
        (OSError(errno.ENOSPC, "No space left on device"), 10**9, "is full"),
    ],
)
def test_what_a_library_says_of_a_full_disk_is_put_in_words(
    toy_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, free: int, message: str
) -> None:
    def fail(*_: object) -> pipeline.Written:
        monkeypatch.setattr(destination.shutil, "disk_usage", lambda _: Usage(10**9, 0, free))
        raise error

    with pytest.raises((ExportError, RuntimeError), match=message):
        run_stages(job(toy_checkpoint, tmp_path / "artifact"), fail, QUIET)


def test_without_the_extra_one_line_names_it() -> None:
    script = "import sys; sys.modules['torch'] = None; from export.__main__ import main; sys.exit(main(['--help']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "export failed: it needs the package torch, which is not installed; pip install 'epd-encoder-sidecar[export]'\n"
    )
