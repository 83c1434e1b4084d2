"""Compiled models that were changed on disk are not used again."""

from __future__ import annotations

from pathlib import Path

import pytest
from stores import small_file_system

from sidecar.runtimes import cache


def test_what_was_recorded_stays_and_what_changed_or_was_never_recorded_goes(tmp_path: Path) -> None:
    kept, flipped, strange = (tmp_path / f"{name}.blob" for name in ("kept", "flipped", "strange"))
    for path in (kept, flipped):
        path.write_bytes(b"model")
    cache.record(tmp_path)
    flipped.write_bytes(b"modem")
    strange.write_bytes(b"model")
    cache.discard_changed(tmp_path)
    assert kept.read_bytes() == b"model"
    assert not flipped.exists()
    assert not strange.exists()


def test_a_model_compiled_again_is_recorded_anew(tmp_path: Path) -> None:
    blob = tmp_path / "a.blob"
    for content in (b"first", b"second"):
        blob.write_bytes(content)
        cache.record(tmp_path)
        cache.discard_changed(tmp_path)
        assert blob.read_bytes() == content


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\x00", b"0" * 64])
def test_a_model_whose_record_is_damaged_goes(tmp_path: Path, damage: bytes) -> None:
    blob = tmp_path / "a.blob"
    blob.write_bytes(b"model")
    cache.record(tmp_path)
    (tmp_path / "a.blob.sha256").write_bytes(damage)
    cache.discard_changed(tmp_path)
    assert not blob.exists()


def test_a_full_disk_is_warned_of_and_ends_no_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_file_system(tmp_path / "full") as full:
        (full / "a.blob").write_bytes(b"model")
        with pytest.raises(OSError, match="No space left"):
            (full / "rest.tried").write_bytes(bytes(1 << 21))
        cache.record(full)
        assert "compiled again at the next start" in caplog.text
        cache.discard_changed(full)
        assert not (full / "a.blob").exists()
