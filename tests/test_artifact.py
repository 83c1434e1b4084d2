"""A sealed artifact: whatever was changed in it is told in one line, and nothing of it is served."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import Server

from sidecar.__main__ import main
from sidecar.artifact import MANIFEST, SEAL, Artifact, ArtifactError, open_artifact
from sidecar.client import Embedding
from sidecar.items import rgb_image_item

Change = Callable[[dict[str, Any]], object]
Refusal = Callable[..., str]

anywhere = st.floats(0, 1, exclude_max=True)
other_byte = st.integers(1, 255)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def artifact(toy_artifact: Path, tmp_path: Path) -> Path:
    """A copy of the toy artifact that a test may spoil."""
    return shutil.copytree(toy_artifact, tmp_path / "artifact")


@pytest.fixture
def refusal(artifact: Path, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """refusal(*flags): what `serve` prints when it refuses the copy."""

    def refuse(*flags: str) -> str:
        always = ["serve", "--artifact", str(artifact), "--listen", "127.0.0.1:0", "--cache-dir", "none"]
        always += ["--store", "none", "--log-level", "warning"]
        # If it serves after all, it is told to stop, and returns 0.
        interrupt = threading.Timer(20, os.kill, [os.getpid(), signal.SIGINT])
        interrupt.start()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            assert main([*always, *flags]) == 2
        finally:
            interrupt.cancel()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        output = capsys.readouterr()
        assert output.out == ""
        assert re.fullmatch(r"sidecar serve: [^\n]+\n", output.err), output.err  # one line, no stack trace
        return output.err

    return refuse


def resealed(artifact: Path, change: Change) -> None:
    """Change the manifest and seal it again, so that only what it says can be wrong."""
    content = json.loads((artifact / MANIFEST).read_bytes())
    change(content)
    seal_again(artifact, json.dumps(content).encode())


def seal_again(artifact: Path, manifest: bytes) -> None:
    (artifact / MANIFEST).write_bytes(manifest)
    (artifact / SEAL).write_text(f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n")


def changed_byte(path: Path, place: float, difference: int) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= difference
    path.write_bytes(data)


def test_what_export_wrote_is_whole(toy_artifact: Path) -> None:
    opened = open_artifact(toy_artifact)
    opened.verify()
    assert {variant.name for variant in opened.manifest.variants} == {"openvino/f32", "openvino/bf16"}
    assert {path.relative_to(toy_artifact).as_posix() for path in toy_artifact.rglob("*") if path.is_file()} == {
        MANIFEST,
        SEAL,
        *opened.hashes,
    }
    # The seal is in sha256sum's form: `sha256sum --check manifest.json.sha256`.
    digest = hashlib.sha256((toy_artifact / MANIFEST).read_bytes()).hexdigest()
    assert (toy_artifact / SEAL).read_text() == f"{digest}  manifest.json\n"


@quick
@given(place=anywhere, difference=other_byte)
def test_any_byte_changed_in_the_manifest_is_noticed(artifact: Path, place: float, difference: int) -> None:
    whole = (artifact / MANIFEST).read_bytes()
    changed_byte(artifact / MANIFEST, place, difference)
    with pytest.raises(ArtifactError, match="was changed after export"):
        open_artifact(artifact)
    (artifact / MANIFEST).write_bytes(whole)


@quick
@given(place=anywhere, difference=other_byte)
def test_any_byte_changed_in_the_seal_is_noticed(artifact: Path, place: float, difference: int) -> None:
    whole = (artifact / SEAL).read_bytes()
    changed_byte(artifact / SEAL, place, difference)
    if (artifact / SEAL).read_bytes().split() != whole.split():  # another kind of white space seals as well
        with pytest.raises(ArtifactError, match=SEAL):
            open_artifact(artifact)
    (artifact / SEAL).write_bytes(whole)


@quick
@given(place=anywhere, difference=other_byte, name=st.sampled_from(["bfloat16.bin", "bfloat16.xml"]))
def test_any_byte_changed_in_a_graph_is_noticed(artifact: Path, place: float, difference: int, name: str) -> None:
    graph = artifact / "openvino" / name
    whole = graph.read_bytes()
    changed_byte(graph, place, difference)
    opened = open_artifact(artifact)
    with pytest.raises(ArtifactError, match=f"openvino/{name} does not match its sha256"):
        opened.verify(opened.manifest.variants[0].files)
    graph.write_bytes(whole)


def test_a_changed_manifest_is_not_served(artifact: Path, refusal: Refusal) -> None:
    changed_byte(artifact / MANIFEST, 0.5, 1)
    assert "manifest.json was changed after export: it does not match manifest.json.sha256" in refusal()


@pytest.mark.parametrize(
    ("name", "place"), [("openvino/bfloat16.bin", 0.5), ("openvino/bfloat16.xml", 0.0), ("openvino/bfloat16.xml", 0.5)]
)
def test_a_changed_graph_is_not_served(artifact: Path, refusal: Refusal, name: str, place: float) -> None:
    changed_byte(artifact / name, place, 0x20)
    assert f"{name} does not match its sha256 in the manifest; export the artifact again" in refusal()


@pytest.mark.parametrize("name", ["openvino/bfloat16.bin", "openvino/bfloat16.xml"])
def test_a_graph_that_was_cut_short_is_not_served(artifact: Path, refusal: Refusal, name: str) -> None:
    data = (artifact / name).read_bytes()
    (artifact / name).write_bytes(data[: len(data) // 2])
    assert f"{name} does not match its sha256" in refusal()


@pytest.mark.parametrize("name", ["openvino/bfloat16.bin", "openvino/bfloat16.xml", SEAL])
def test_a_missing_file_is_named(artifact: Path, refusal: Refusal, name: str) -> None:
    (artifact / name).unlink()
    assert f"{name} is missing; export the artifact again or copy it whole" in refusal()


def test_a_file_that_only_another_variant_needs_may_be_missing(artifact: Path) -> None:
    """Who serves bf16 need not copy the rest; who asks for all of it is told."""
    (artifact / "accuracy.html").unlink()
    opened = open_artifact(artifact)
    opened.verify(opened.manifest.variants[0].files)
    with pytest.raises(ArtifactError, match="accuracy.html is missing"):
        opened.verify()


@pytest.mark.parametrize("seal", [b"", b"\n", b"no hash", b"\xff\xfe", b"0" * 64, b"0" * 63 + b"  manifest.json\n"])
def test_a_garbled_seal_is_told(artifact: Path, refusal: Refusal, seal: bytes) -> None:
    (artifact / SEAL).write_bytes(seal)
    assert "manifest.json.sha256 does not hold a sha256" in refusal()


def test_a_directory_without_a_manifest_is_no_artifact(artifact: Path, refusal: Refusal) -> None:
    (artifact / MANIFEST).unlink()
    assert "there is no manifest.json in the artifact directory; `python -m export --out DIR` writes one" in refusal()
    shutil.rmtree(artifact)
    assert "is not a directory" in refusal()


@pytest.mark.parametrize(("schema", "advice"), [(3, "update the sidecar"), (1, "export the artifact again")])
def test_another_schema_says_what_to_do(artifact: Path, refusal: Refusal, schema: int, advice: str) -> None:
    resealed(artifact, lambda manifest: manifest.update(schema=schema, fingerprint=None, variants="of another shape"))
    assert f"schema {schema}, this sidecar reads schema 2; {advice}" in refusal()


@pytest.mark.parametrize(
    ("manifest", "words"),
    [(b"", "cannot be read"), (b"[]", "cannot be read"), (b"{}", "lacks 'schema'"), (b'{"schema": 2}', "lacks '")],
)
def test_a_manifest_that_says_too_little_is_refused(
    artifact: Path, refusal: Refusal, manifest: bytes, words: str
) -> None:
    seal_again(artifact, manifest)
    assert words in refusal()


OUTSIDE = ["../outside.xml", "/etc/passwd", "openvino/../../outside.xml", "openvino/.."]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("where", ["graph", "files", "hashes"])
def test_a_manifest_cannot_reach_outside_its_directory(artifact: Path, refusal: Refusal, name: str, where: str) -> None:
    """Sealed by whoever wrote it, and the file is there with the hash that it states."""
    outside = artifact.parent / "outside.xml"
    shutil.copy(artifact / "openvino" / "bfloat16.xml", outside)
    entry = {"sha256": hashlib.sha256(outside.read_bytes()).hexdigest(), "bytes": outside.stat().st_size}

    def reach(manifest: dict[str, Any]) -> None:
        if where == "hashes":
            manifest["files"][name] = entry
        elif where == "files":
            manifest["variants"][0]["files"].append(name)
        else:
            manifest["variants"][0]["graph"] = name

    resealed(artifact, reach)
    assert f"names a file outside the artifact: {name}" in refusal()


def test_a_graph_that_no_hash_covers_is_refused(artifact: Path, refusal: Refusal) -> None:
    shutil.copy(artifact / "openvino" / "bfloat16.xml", artifact / "other.xml")
    resealed(artifact, lambda manifest: manifest["variants"][0].update(graph="other.xml"))
    assert "does not list other.xml, the graph of openvino/f32, among its files" in refusal()
    resealed(artifact, lambda manifest: manifest["variants"][0]["files"].append("other.xml"))
    assert "names other.xml as part of a variant but holds no hash of it" in refusal()


def test_what_the_artifact_does_not_hold_is_told_with_what_it_does(refusal: Refusal) -> None:
    assert "the artifact has no onnx; it has openvino/f32, openvino/bf16" in refusal("--runtime", "onnx")
    assert "the artifact has no openvino/int8; it has openvino/f32" in refusal("--precision", "int8")
    assert "the artifact has no torch;" in refusal("--device", "cuda:0")


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        (("--precision", "int8"), "export again with --precision int8"),
        (("--runtime", "onnx"), "export again with --format onnx"),
        (("--runtime", "onnx", "--precision", "int8"), "export again with --format onnx --precision int8"),
        (("--runtime", "optimum"), "export again with --via optimum"),
    ],
)
def test_what_the_artifact_does_not_hold_is_told_with_how_to_export_it(
    refusal: Refusal, flags: tuple[str, ...], advice: str
) -> None:
    assert refusal(*flags).strip().endswith(advice)


def test_a_device_that_is_not_there_is_told_in_one_line(refusal: Refusal) -> None:
    assert "OpenVINO could not load bfloat16.xml on npu" in refusal("--device", "npu")


BELOW = 0.9


def spoil_accuracy(**values: Any) -> Change:
    return lambda manifest: manifest["variants"][0]["accuracy"].update(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (spoil_accuracy(cosine_min=BELOW), "cosine against float32 torch fell to 0.90000, the bar is 0.99999"),
        (spoil_accuracy(finite=False), "some embeddings were not finite"),
        (lambda manifest: manifest["variants"][0].update(accuracy=None), "was never measured"),
    ],
    ids=["below", "not finite", "never measured"],
)
def test_accuracy_below_the_bar_is_not_served(artifact: Path, refusal: Refusal, change: Change, words: str) -> None:
    resealed(artifact, change)
    line = refusal("--precision", "f32")
    assert words in line and "openvino/f32" in line and "--allow-below-bar" in line


def test_accuracy_below_the_bar_is_served_to_who_allows_it(artifact: Path, start_server: Callable[..., Server]) -> None:
    resealed(artifact, spoil_accuracy(cosine_min=BELOW))
    server = start_server("--precision", "f32", "--allow-below-bar", artifact=artifact)
    with server.client() as client:
        (result,) = client.encode([rgb_image_item(np.zeros((56, 56, 3), np.uint8))])
        assert isinstance(result, Embedding)
        assert client.info().accuracy[0].cosine_min == BELOW  # and whoever asks can see it
    assert server.terminate() == 0


def test_another_variant_below_its_bar_is_no_obstacle(artifact: Path) -> None:
    from sidecar.server.loading import choose_variant
    from sidecar.settings import Settings

    resealed(artifact, spoil_accuracy(cosine_min=BELOW))
    opened: Artifact = open_artifact(artifact)
    chosen = choose_variant(opened, "cpu", Settings(artifact=artifact, precision="bf16"))
    assert chosen.name == "openvino/bf16"
