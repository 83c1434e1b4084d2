"""`encode` and `info` as a user runs them."""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from io import BytesIO
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc import code_pb2, status_pb2
from PIL import Image, UnidentifiedImageError
from safetensors import safe_open

from sidecar.commands import encode, info
from sidecar.pb import encoder_pb2 as pb
from sidecar.vision.dtypes import DType, float32_to_bfloat16
from sidecar.vision.grid import Grid

PHOTOS = Path(__file__).parents[2] / "export" / "photos"
ASTRONAUT, CAT, COFFEE = (PHOTOS / name for name in ("astronaut-512x512.jpg", "cat-451x300.png", "coffee-600x400.webp"))
WIDTH = 6


def run(*arguments):
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    for command in (encode, info):
        command.add_parser(subparsers)
    options = parser.parse_args([str(argument) for argument in arguments])
    return options.run(options)


def rows_of(data):
    """Grid and embedding for a photo's bytes: the mean colour of every 28 × 28 pixels, and where they are."""
    photo = Image.open(BytesIO(data)).convert("RGB")
    columns, rows = photo.width // 28, photo.height // 28
    colours = np.asarray(photo.resize((columns, rows), Image.Resampling.BOX), np.float32).reshape(-1, 3)
    places = np.mgrid[:rows, :columns].reshape(2, -1).T.astype(np.float32)
    embedding = np.concatenate([colours, places, np.ones((len(places), 1), np.float32)], axis=1)
    return Grid(1, 2 * rows, 2 * columns), float32_to_bfloat16(embedding)


@pytest.fixture
def server(serve, parts):
    def script(request, context):
        try:
            grid, rows = rows_of(request.items[0].image)
        except UnidentifiedImageError:
            status = status_pb2.Status(code=code_pb2.INVALID_ARGUMENT, message="these bytes are\nno image")
            yield pb.EncodeResponse(index=0, error=status)
        else:
            yield from parts(0, rows, grid, DType.BFLOAT16, chunk_bytes=1000)

    return serve(script)


@pytest.fixture
def no_image(tmp_path):
    path = tmp_path / "no-image.jpg"
    path.write_bytes(b"these are words")
    return path


def tensors_of(path):
    from safetensors.torch import load_file

    return load_file(path)


def test_each_photo_gets_a_line(server, capsys):
    assert run("encode", ASTRONAUT, CAT, "--server", server.address, "--min-pixels", 784, "--max-pixels", 999999) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("astronaut-512x512.jpg: grid 1×36×36, 324 tokens × 6 bfloat16, ")
    assert first.endswith(" ms (decode 0.0, preprocess 1.5, queue 2.5, run 3.5) on openvino/CPU/int8")
    assert second.startswith("cat-451x300.png: grid 1×20×32, 160 tokens")
    assert [(r.items[0].min_pixels, r.items[0].max_pixels) for r in server.requests] == [(784, 999999)] * 2


def test_json_has_a_line_for_each_photo_failed_ones_too(server, no_image, capsys):
    assert run("encode", no_image, CAT, "--server", server.address, "--json") == 1
    bad, cat = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert bad["error"]["code"] == "INVALID_ARGUMENT"
    assert (cat["name"], cat["grid_thw"], cat["tokens"], cat["dtype"]) == (
        "cat-451x300.png",
        [1, 20, 32],
        160,
        "bfloat16",
    )
    assert (cat["runtime"], cat["device"], cat["precision"], cat["fingerprint"]) == ("openvino", "CPU", "int8", "f1")
    assert cat["round_trip_ms"] > 0


def test_saved_embeddings_load_as_they_came(server, tmp_path):
    out = tmp_path / "photos.safetensors"
    out.write_bytes(b"old")
    with out.open("rb") as reader:
        assert run("encode", CAT, COFFEE, "--server", server.address, "--out", out) == 0
        assert reader.read() == b"old"  # the new file took the old one's place and did not run into it
    tensors = tensors_of(out)
    assert len(tensors) == 4
    for photo in (CAT, COFFEE):
        grid, rows = rows_of(photo.read_bytes())
        tensor, grid_thw = tensors[photo.name], tensors[f"{photo.name}.grid_thw"]
        assert (str(tensor.dtype), str(grid_thw.dtype)) == ("torch.bfloat16", "torch.int64")
        assert tensor.float().numpy().tobytes() == (rows.astype(np.uint32) << 16).tobytes()
        assert tensor.shape == rows.shape
        assert grid_thw.tolist() == list(grid)
    with safe_open(out, "np") as file:
        assert file.metadata()["fingerprint"] == "f1"


def test_photos_that_share_a_name_are_named_by_their_paths(server, tmp_path, monkeypatch):
    for folder, photo in (("a", CAT), ("b", COFFEE)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "one.jpg").write_bytes(photo.read_bytes())
    monkeypatch.chdir(tmp_path)
    photos = ("a/one.jpg", "b/one.jpg", "./a/one.jpg", CAT)
    assert run("encode", *photos, "--server", server.address, "--out", "o.safetensors", "--picture", tmp_path) == 0
    assert len(server.requests) == 3
    names = {"a/one.jpg", "b/one.jpg", "cat-451x300.png"}
    assert set(tensors_of("o.safetensors")) == names | {f"{name}.grid_thw" for name in names}
    assert {path.name for path in tmp_path.glob("*.png")} == {"a_one.jpg.png", "b_one.jpg.png", "cat-451x300.png.png"}


def test_names_that_would_overwrite_each_other_are_refused(server, tmp_path, capsys):
    assert run("encode", "x.jpg", "x.jpg.grid_thw", "--server", server.address) == 2
    assert run("encode", "a_b.jpg", "d/a_b.jpg", "d_a_b.jpg", "--server", server.address, "--picture", tmp_path) == 2
    assert server.requests == []
    assert "two tensors would be named" in capsys.readouterr().err


def test_bad_photos_lose_nothing_of_the_others(server, no_image, tmp_path, capsys):
    out = tmp_path / "photos.safetensors"
    missing, empty = tmp_path / "missing.png", tmp_path / "empty.png"
    empty.write_bytes(b"")
    assert run("encode", missing, CAT, no_image, empty, COFFEE, "--server", server.address, "--out", out) == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2
    assert captured.err.splitlines() == [
        f"{missing}: UNREADABLE: No such file or directory",
        f"{no_image}: INVALID_ARGUMENT: these bytes are no image",
        f"{empty}: BAD_PHOTO: an encoded image must have at least one byte",
    ]
    assert {CAT.name, COFFEE.name} < set(tensors_of(out))


def test_a_server_that_goes_away_later_loses_nothing_of_before(serve, parts, tmp_path, capsys):
    asked = []

    def script(request, context):
        asked.append(request)
        if len(asked) == 2:
            context.abort(grpc.StatusCode.UNAVAILABLE, "draining")
        return parts(0, np.zeros((4, 3), np.float32), Grid(1, 4, 4))

    out = tmp_path / "out.safetensors"
    assert run("encode", ASTRONAUT, CAT, COFFEE, "--server", serve(script).address, "--out", out) == 1
    assert capsys.readouterr().err == f"{CAT}: UNAVAILABLE: draining\n"
    assert {ASTRONAUT.name, COFFEE.name} < set(tensors_of(out))


def test_embeddings_of_different_models_are_not_saved_together(serve, parts, tmp_path, capsys):
    fingerprints = iter(("f1", "f2"))

    def script(request, context):
        header, *chunks = parts(0, np.zeros((4, 3), np.float32), Grid(1, 4, 4))
        header.embedding.fingerprint = next(fingerprints)
        return [header, *chunks]

    out = tmp_path / "out.safetensors"
    assert run("encode", CAT, COFFEE, "--server", serve(script).address, "--out", out) == 1
    assert "different models (f1, f2)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(server, tmp_path, monkeypatch, capsys):
    def fail(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise OSError("no space left")

    out = tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    monkeypatch.setattr(encode, "serialize_file", fail)
    assert run("encode", CAT, "--server", server.address, "--out", out) == 1
    assert "no space left" in capsys.readouterr().err
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("option", ["--out", "--picture"])
def test_a_target_that_cannot_be_is_found_out_before_anything_is_encoded(server, tmp_path, option, capsys):
    assert run("encode", CAT, "--server", server.address, option, tmp_path / "none" / "file") == 2
    assert "there is no directory" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--out", "--picture"])
def test_a_target_that_is_no_regular_file_stays_as_it_is(server, tmp_path, option, capsys):
    target = tmp_path / "pipe"
    os.mkfifo(target)
    reading = os.open(target, os.O_RDONLY | os.O_NONBLOCK)  # so that writing into it would not wait
    assert run("encode", CAT, "--server", server.address, option, target) == 2
    os.close(reading)
    assert f"{target} is not a regular file" in capsys.readouterr().err
    assert target.is_fifo()
    assert server.requests == []


def test_pictures_show_photo_and_embedding(server, tmp_path):
    assert run("encode", CAT, "--server", server.address, "--picture", tmp_path / "one.png") == 0
    assert run("encode", CAT, COFFEE, "--server", server.address, "--picture", tmp_path / "two.png") == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "one.png",
        "two-cat-451x300.png.png",
        "two-coffee-600x400.webp.png",
    }
    picture = Image.open(tmp_path / "one.png")
    assert picture.size == (2 * 451 + 8, 300)
    left = np.asarray(picture)[:, :451]
    assert np.array_equal(left, np.asarray(Image.open(CAT).convert("RGB")))


@pytest.mark.parametrize("command", [("info",), ("encode", CAT, COFFEE)])
def test_a_server_that_is_not_there_is_one_clear_line(command, tmp_path, capsys, monkeypatch):
    address = f"unix:{tmp_path / 'nobody.sock'}"
    monkeypatch.setenv("EPD_SERVER", address)
    assert run(*command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"no encoder sidecar answers at {address}: ")


def test_ctrl_c_ends_without_a_stack_trace(serve):
    asked, release = threading.Event(), threading.Event()

    def script(request, context):
        asked.set()
        release.wait(15)
        yield from ()

    code = (
        "import argparse, signal, sys; from sidecar.commands import encode\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs start with it ignored
        "parser = argparse.ArgumentParser(); encode.add_parser(parser.add_subparsers())\n"
        "options = parser.parse_args(); sys.exit(options.run(options))"
    )
    command = [sys.executable, "-c", code, "encode", CAT, "--server", serve(script).address]
    with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=PHOTOS.parents[1], text=True) as process:
        try:
            assert asked.wait(15)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60)[1] == "interrupted\n"
        finally:
            release.set()
            process.kill()
    assert process.returncode == 130


INFO = pb.InfoResponse(
    version="0.1.0",
    fingerprint="f1",
    checkpoint=pb.Checkpoint(source="Qwen/Qwen2.5-VL-3B-Instruct", dtype="bfloat16"),
    tower=pb.TowerSpec(depth=32, hidden_size=1280, out_hidden_size=2048, patch_size=14, spatial_merge_size=2),
    pixels=pb.PixelSpec(min_pixels=3136, max_pixels=1003520),
    embedding_dtype=pb.BFLOAT16,
    lanes=[pb.Lane(runtime="openvino", device="CPU", precision="int8"), pb.Lane(runtime="torch", device="cuda:0")],
    limits=pb.Limits(message_bytes=64 << 20, items=64),
    accuracy=[pb.Accuracy(runtime="openvino", precision="int8", cosine_mean=0.9991, cosine_min=0.9978)],
)


def test_info_is_readable(serve, capsys):
    assert run("info", "--server", serve(info=INFO).address) == 0
    out = capsys.readouterr().out
    for line in (
        "checkpoint   Qwen/Qwen2.5-VL-3B-Instruct, bfloat16\n",
        "embedding    2048 × bfloat16 for each token\n",
        "image        3136 to 1003520 pixels after resizing\n",
        "lanes        openvino on CPU, int8: cosine to float32 0.99910 on average, 0.99780 at worst, ",
        "\n             torch on cuda:0",
        "limits       64 items and 64 MiB a request\n",
    ):
        assert line in out
    assert "RANDOM" not in out
    random = pb.InfoResponse(checkpoint=pb.Checkpoint(random_weights=True))
    assert run("info", "--server", serve(info=random).address) == 0
    assert "RANDOM WEIGHTS" in capsys.readouterr().out


def test_info_as_json_is_the_contracts_message(serve, capsys):
    from google.protobuf import json_format

    assert run("info", "--server", serve(info=INFO).address, "--json") == 0
    out = capsys.readouterr().out
    assert json_format.Parse(out, pb.InfoResponse()) == INFO
    assert json.loads(out)["checkpoint"]["random_weights"] is False


def test_info_of_several_shows_each(serve, capsys):
    first, second = serve(info=INFO).address, serve(info=INFO).address
    assert run("info", "--server", f"{first},{second}") == 0
    out = capsys.readouterr().out
    assert out.count("checkpoint   Qwen/Qwen2.5-VL-3B-Instruct, bfloat16\n") == 2
    assert f"server       {first}\n" in out and f"\n\nserver       {max(first, second)}\n" in out
    assert run("info", "--server", f"{first},{second}", "--json") == 0
    assert {each["fingerprint"] for each in json.loads(capsys.readouterr().out).values()} == {"f1"}


def test_info_of_several_tells_which_does_not_answer(serve, capsys):
    living = serve(info=INFO).address
    assert run("info", "--server", f"{living},127.0.0.1:1") == 1
    captured = capsys.readouterr()
    assert f"server       {living}\n" in captured.out
    assert captured.err.startswith("no encoder sidecar answers at 127.0.0.1:1: ")
    assert run("info", "--server", "127.0.0.1:1,127.0.0.2:1") == 2


def test_info_of_several_tells_when_they_hold_different_models(serve, capsys):
    other = pb.InfoResponse(fingerprint="f2")
    assert run("info", "--server", f"{serve(info=INFO).address},{serve(info=other).address}") == 1
    assert capsys.readouterr().err == "the sidecars hold different models: their fingerprints differ\n"


def test_one_of_several_sidecars_is_enough(server, capsys):
    assert run("encode", CAT, "--server", f"127.0.0.1:1,{server.address}") == 0
    assert capsys.readouterr().out.startswith("cat-451x300.png: grid 1×")


@pytest.mark.parametrize("command", [("info",), ("encode", CAT)], ids=["info", "encode"])
def test_a_list_that_is_none_is_told_in_a_line(command, capsys):
    assert run(*command, "--server", "127.0.0.1:1,elsewhere") == 2
    assert capsys.readouterr().err.startswith("'elsewhere' is not host:port; ")
