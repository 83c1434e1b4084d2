"""Compiled models that were changed on disk are not used again."""

from __future__ import annotations

from pathlib import Path

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
