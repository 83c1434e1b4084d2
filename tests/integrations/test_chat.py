"""A chat request goes in with pictures and comes out with their embeddings, or with their names in the store."""

from __future__ import annotations

import asyncio
import base64
import copy
import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import TEXT, VIDEO, chat, content, data_url, image, png
from safetensors.numpy import load_file
from servers import ROOT, Server

from sidecar.client import AsyncEncoderClient, Embedding, EncoderClient
from sidecar.integrations.chat import (
    ChatImageError,
    HeldRequest,
    inline_embeds,
    inline_embeds_async,
    metadata_only,
    metadata_only_async,
)


def values(part: dict[str, Any]) -> Any:
    return np.load(io.BytesIO(base64.b64decode(part["image_embeds"]["image_embeds"], validate=True)))


class Chat:
    """Both faces of the module, called as if they were blocking; each call has a client of its own."""

    def __init__(self, kind: str, address: str, store: Path) -> None:
        self.kind, self.address, self.store = kind, address, store

    def inline(self, request: Any) -> dict[str, Any]:
        return self._call(inline_embeds, inline_embeds_async, request, None)

    def metadata(self, request: Any) -> HeldRequest:
        return self._call(metadata_only, metadata_only_async, request, self.store)

    def _call(self, blocking: Any, asynchronous: Any, request: Any, store: Path | None) -> Any:
        if self.kind == "blocking":
            with EncoderClient(self.address, store=store) as client:
                return blocking(client, request, 30)

        async def run() -> Any:
            async with AsyncEncoderClient(self.address, store=store) as client:
                return await asynchronous(client, request, 30)

        return asyncio.run(run())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shm") / "store"


@pytest.fixture(scope="module")
def storing(start_server: Callable[..., Server], store: Path) -> Server:
    return start_server(
        "--store", str(store), "--drain-seconds", "1", "--precision", "f32", "--embedding-dtype", "float32"
    )


@pytest.fixture(params=["blocking", "asyncio"])
def face(request: pytest.FixtureRequest, storing: Server, store: Path) -> Chat:
    return Chat(request.param, storing.address, store)


@pytest.fixture
def client(storing: Server, store: Path) -> Iterator[EncoderClient]:
    with EncoderClient(storing.address, store=store) as client:
        yield client


def test_an_image_becomes_its_embedding_and_all_else_stays(face: Chat, client: EncoderClient) -> None:
    request = {
        "model": "toy",
        "temperature": 0,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [TEXT, image(1), VIDEO], "name": "Ada"},
            {"role": "tool", "content": [image(2, uuid="seen-2")], "tool_call_id": "7"},
        ],
    }
    before = copy.deepcopy(request)
    answer = face.inline(request)
    assert request == before
    one, two = content(answer, 1)[1], content(answer, 2)[0]
    for part, seed in ((one, 1), (two, 2)):
        embedding = client.encode_image(png(seed))
        assert part["type"] == "image_embeds" and part["image_embeds"]["image_grid_thw"] == list(embedding.grid)
        assert np.array_equal(values(part), embedding.data)
    assert "uuid" not in one and two["uuid"] == "seen-2"
    content(before, 1)[1] = one
    content(before, 2)[0] = two
    assert answer == before
    json.dumps(answer)


def test_a_request_with_only_names_says_where_vllm_finds_the_embeddings(face: Chat, store: Path) -> None:
    request = chat(image(1, uuid="my-cat"), VIDEO, TEXT, image(3), image(1, uuid="my-cat"))
    before = copy.deepcopy(request)
    held = face.metadata(request)
    assert request == before
    cat, video, text, other, again = content(held.request)
    grid = {"image_grid_thw": [1, 4, 6]}
    assert cat == again == {"type": "image_embeds", "image_embeds": grid, "uuid": cat["uuid"]}
    # Not the caller's own name, which may be given to another picture before vLLM reads.
    assert re.fullmatch("keyed-[0-9a-f]{64}", cat["uuid"]) and cat["uuid"] != other["uuid"]
    assert (video, text) == (VIDEO, TEXT)
    assert held.request["ec_transfer_params"] == {
        cat["uuid"]: {"item_indices": [0, 3], "metadata": grid},
        other["uuid"]: {"item_indices": [2], "metadata": grid},
    }
    # What ECExampleConnector opens, by the name alone.
    for name in (cat["uuid"], other["uuid"]):
        assert load_file(store / name / "encoder_cache.safetensors")["ec_cache"].shape == (6, 128)
    assert len(held.leases) == 2


def test_embeddings_are_held_until_they_are_released(face: Chat, client: EncoderClient) -> None:
    held = face.metadata(chat(image(4), image(5)))
    assert client.release(held.leases) == 2
    assert client.release(held.leases) == 0


def test_equal_images_are_encoded_once_and_all_in_one_call(
    client: EncoderClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    encode = client.encode

    def counted(items: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(len(items))
        return encode(items, *arguments, **named)

    monkeypatch.setattr(client, "encode", counted)
    answer = inline_embeds(client, chat(image(6), image(7), image(6)))
    assert calls == [2]
    first, other, again = content(answer)
    assert first == again != other


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": data_url(png(8))},
        {"type": "input_image", "image_url": data_url(png(8))},
        {"image_url": data_url(png(8))},
        {"type": "image_url", "image_url": {"url": data_url(png(8)), "detail": "low"}},
        {"type": "image_url", "image_url": {"url": data_url(png(8)).replace("data:image/png", "DATA:Image/PNG;a=b")}},
    ],
)
def test_every_form_of_an_image_that_vllm_takes_is_taken(client: EncoderClient, part: dict[str, Any]) -> None:
    assert content(inline_embeds(client, chat(part))) == content(inline_embeds(client, chat(image(8))))


@pytest.mark.parametrize("uuid", ["a/b", "../../etc", "Katze ü", "x" * 200, "content-" + "0" * 64])
def test_a_uuid_never_becomes_a_file_name(client: EncoderClient, uuid: str) -> None:
    (part,) = content(metadata_only(client, chat(image(9, uuid=uuid))).request)
    assert re.fullmatch("keyed-[0-9a-f]{64}", part["uuid"])
    by_name, direct = client.fetch([part["uuid"]])[0], client.encode_image(png(9))
    assert isinstance(by_name, Embedding) and np.array_equal(by_name.data, direct.data)


@pytest.mark.parametrize("options", [{"max_pixels": 3136}, {"size": {"longest_edge": 3136, "shortest_edge": 784}}])
def test_bounds_are_applied_here_and_are_part_of_the_name(face: Chat, options: dict[str, Any]) -> None:
    plain, bounded = chat(image(10, uuid="b")), chat(image(10, uuid="b"), mm_processor_kwargs=options)
    (whole,), (small,) = content(face.metadata(plain).request), content(face.metadata(bounded).request)
    assert whole["image_embeds"] == {"image_grid_thw": [1, 4, 6]} and whole["uuid"] != "b"
    assert small["image_embeds"] == {"image_grid_thw": [1, 2, 4]} and small["uuid"] not in ("b", whole["uuid"])
    inline = face.inline(bounded)
    assert "mm_processor_kwargs" not in inline and "mm_processor_kwargs" not in face.metadata(bounded).request
    # vLLM hashes what has no uuid: under "b" it may know the whole picture.
    assert "uuid" not in content(inline)[0] and values(content(inline)[0]).shape == (2, 128)


def test_options_of_videos_and_other_transfers_are_handed_on(client: EncoderClient) -> None:
    more = {"mm_processor_kwargs": {"videos_kwargs": {"fps": 2}, "max_pixels": 3136}, "ec_transfer_params": {"x": 1}}
    answer = metadata_only(client, chat(image(11), **more)).request
    assert answer["mm_processor_kwargs"] == {"videos_kwargs": {"fps": 2}}
    assert answer["ec_transfer_params"]["x"] == 1 and len(answer["ec_transfer_params"]) == 2


def test_an_image_that_was_sent_before_may_be_left_out(client: EncoderClient) -> None:
    known = {"type": "image_url", "image_url": None, "uuid": "sent-before"}
    with pytest.raises(ChatImageError, match=r"^NOT_FOUND: messages\[0\].content\[0\]: .*send the image too"):
        inline_embeds(client, chat(known))
    sent = inline_embeds(client, chat(known, image(12, uuid="sent-before")))
    assert inline_embeds(client, chat(known))["messages"][0]["content"] == content(sent)[:1]


def test_a_bad_image_is_named_and_its_neighbours_are_released(face: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[int] = []
    for kind in (EncoderClient, AsyncEncoderClient):
        _record_releases(monkeypatch, kind, released)
    broken = {"type": "image_url", "image_url": {"url": data_url(b"no picture")}}
    with pytest.raises(ChatImageError, match=r"messages\[1\].content\[2\]") as failure:
        face.metadata({"messages": [{"role": "system"}, {"role": "user", "content": [TEXT, image(13), broken]}]})
    assert failure.value.code == "INVALID_ARGUMENT" and failure.value.place == "messages[1].content[2]"
    assert released == [1]


def _record_releases(monkeypatch: pytest.MonkeyPatch, kind: Any, released: list[int]) -> None:
    release = kind.release

    async def awaited(answer: Any) -> int:
        released.append(await answer)
        return released[-1]

    def recorded(*arguments: Any) -> Any:
        answer = release(*arguments)
        if asyncio.iscoroutine(answer):
            return awaited(answer)
        released.append(answer)
        return answer

    monkeypatch.setattr(kind, "release", recorded)


def test_a_url_that_the_sidecar_does_not_take_is_answered_with_what_to_do(client: EncoderClient) -> None:
    part = {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}
    with pytest.raises(ChatImageError, match=r"content\[0\]: this server takes no URLs; .*--url-input"):
        inline_embeds(client, chat(part))


def test_names_alone_need_a_store_that_both_see(storing: Server, tmp_path: Path) -> None:
    for store in (None, tmp_path):
        with (
            EncoderClient(storing.address, store=store) as client,
            pytest.raises(ChatImageError, match="FAILED_PRECONDITION: .*no store that this client reads"),
        ):
            metadata_only(client, chat(image(14)))


def test_a_request_without_images_asks_nobody() -> None:
    request = chat(TEXT, VIDEO, mm_processor_kwargs={"fps": 2})
    with EncoderClient("unix:/nowhere") as client:
        assert inline_embeds(client, request) == request
        assert metadata_only(client, request) == HeldRequest(request, [])


def test_a_proxy_needs_nothing_of_the_server_to_import_it() -> None:
    code = "import sidecar.integrations.chat, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    heavy = {"torch", "openvino", "vllm", "PIL", "sidecar.engine", "sidecar.server", "sidecar.runtimes"}
    assert not heavy & set(loaded.split())


@pytest.fixture
def vllm() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Stands in for vLLM's HTTP side; its address, and the requests that it gets."""
    came: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            came.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer = json.dumps({"choices": [{"message": {"content": f"seen by {self.path}"}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", came
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("example", ["inline_embeds", "metadata_only"])
def test_the_examples_run(
    example: str, storing: Server, store: Path, vllm: tuple[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    address, came = vllm
    photo = tmp_path / "photo.png"
    photo.write_bytes(png(20))
    more = ["--store", str(store)] if example == "metadata_only" else []
    command = [
        sys.executable,
        str(ROOT / "docs" / "examples" / f"{example}.py"),
        str(photo),
        "--server",
        storing.address,
    ]
    ran = subprocess.run(
        [*command, "--vllm", address, *more],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT), "GRPC_VERBOSITY": "NONE"},
    )
    assert ran.stdout == "seen by /v1/chat/completions\n"
    (request,) = came
    assert content(request)[0]["image_embeds"]["image_grid_thw"] == [1, 4, 6]
    assert ("image_embeds" in content(request)[0]["image_embeds"]) == (example == "inline_embeds")
