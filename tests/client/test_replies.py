"""Replies, good and bad, as both clients put them together."""

import gc
import threading

import numpy as np
import pytest
from google.protobuf.any_pb2 import Any as PackedMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from stores import descriptors, mappings

from sidecar.client import Embedding, EncodeError, ItemError, ProtocolError, image_item, patches_item
from sidecar.pb import encoder_pb2 as pb
from sidecar.replies import Elsewhere, Replies
from sidecar.store_file import FILE_NAME, Description, create
from sidecar.vision.dtypes import DType, from_float32
from sidecar.vision.grid import Grid

ITEM = image_item(b"photo")


def packed(message):
    detail = PackedMessage()
    detail.Pack(message)
    return detail


def error(index, code=code_pb2.INVALID_ARGUMENT, message="no image", details=()):
    return pb.EncodeResponse(index=index, error=status_pb2.Status(code=code, message=message, details=details))


def test_embeddings_arrive_bit_for_bit_and_in_the_items_order(serve, parts, face):
    rng = np.random.default_rng(1)
    grids = [Grid(1, 4, 6), Grid(3, 2, 4), Grid(1, 12, 2)]
    dtypes = [DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16]  # so the first has most bytes, and is finished last
    values = [rng.standard_normal((grid.patches // 4, 5)).astype(np.float32) for grid in grids]
    stored = [from_float32(value, dtype) for value, dtype in zip(values, dtypes, strict=True)]
    queues = [parts(i, stored[i], grids[i], dtypes[i], chunk_bytes=7) for i in (2, 0, 1)]
    # One part of each item in turn, as lanes that finish together would send them.
    turns = [queue[turn] for turn in range(99) for queue in queues if turn < len(queue)]

    results = face.encode(serve(turns).address, [ITEM] * 3)

    for index, result in enumerate(results):
        assert isinstance(result, Embedding)
        assert (result.key, result.grid, result.dtype) == (f"key-{index}", grids[index], dtypes[index])
        assert (result.tokens, result.width, result.spatial_merge_size) == (grids[index].patches // 4, 5, 2)
        assert result.data.dtype == dtypes[index].storage
        assert result.data.tobytes() == stored[index].tobytes()
        np.testing.assert_allclose(result.float32(), values[index], rtol=2**-7)
        assert (result.fingerprint, result.lane.runtime, result.lane.device) == ("f1", "openvino", "CPU")
        assert (result.times.preprocess_ms, result.times.queue_ms, result.times.run_ms) == (1.5, 2.5, 3.5)


def test_a_result_is_there_as_soon_as_its_item_is_finished(serve, good, face):
    seen = threading.Event()
    before_the_next = []

    def script(request, context):
        yield from good(1)
        before_the_next.append(seen.wait(5))
        yield from good(0)

    came, failure = face.stream(serve(script).address, [ITEM] * 2, on_result=seen.set)
    assert before_the_next == [True]
    assert [index for index, _ in came] == [1, 0]
    assert failure is None


def test_one_bad_item_loses_no_neighbour(serve, good, face):
    violation = error_details_pb2.BadRequest.FieldViolation(field="items[1].image", description="cut short")
    details = [packed(error_details_pb2.BadRequest(field_violations=[violation]))]
    server = serve([*good(0), error(1, message="cut short", details=details), *good(2)])

    first, bad, last = face.encode(server.address, [ITEM] * 3)

    assert isinstance(bad, ItemError)
    assert (bad.code, bad.message, bad.retry_delay_s) == ("INVALID_ARGUMENT", "cut short", None)
    assert bad.details[0].field_violations[0].field == "items[1].image"
    assert first.float32()[0].tolist() == [0, 1, 2]
    assert last.float32()[0].tolist() == [2, 3, 4]


def test_an_overloaded_servers_delay_is_read(serve, face):
    delay = packed(error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000)))
    unknown = PackedMessage(type_url="type.googleapis.com/some.Other", value=b"\x00")
    damaged = PackedMessage(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff")
    server = serve([error(0, code_pb2.RESOURCE_EXHAUSTED, "busy", [unknown, damaged, delay]), error(1, 4711)])
    busy, odd = face.encode(server.address, [ITEM] * 2)
    assert (busy.code, busy.retry_delay_s, busy.details[:2]) == ("RESOURCE_EXHAUSTED", 1.5, (unknown, damaged))
    assert odd.code == "UNKNOWN"


def test_encode_image_gives_the_embedding_or_raises(serve, good, face):
    assert face.call(serve(good(0)).address, "encode_image", b"photo", key="k", max_pixels=99).tokens == 4
    with pytest.raises(EncodeError, match="INVALID_ARGUMENT: no image") as caught:
        face.call(serve([error(0)]).address, "encode_image", b"photo")
    assert caught.value.code == "INVALID_ARGUMENT"


def chunk(index, offset, size):
    return pb.EncodeResponse(index=index, chunk=pb.Chunk(offset=offset, data=bytes(size)))


def header(good, grid=None, **fields):
    """The good parts with other fields in the embedding that leads them."""
    first = pb.EncodeResponse.FromString(good[0].SerializeToString())
    first.embedding.grid.CopyFrom(first.embedding.grid if grid is None else grid)
    for name, value in fields.items():
        setattr(first.embedding, name, value)
    return [first, *good[1:]]


# A good item 0 is 4 × 3 float32, 48 bytes, in chunks at 0, 16 and 32; each fault is one change to it.
FAULTS = {
    "a chunk is missing": (lambda good: [*good[:2], good[3]], "a chunk at byte 32, expected at 16"),
    "a chunk overlaps": (lambda good: [*good[:2], chunk(0, 8, 16)], "a chunk at byte 8, expected at 16"),
    "a chunk comes twice": (lambda good: [*good[:2], good[1]], "a chunk at byte 0, expected at 16"),
    "a chunk runs over": (lambda good: [*good[:3], chunk(0, 32, 17)], "17 bytes where 16 are missing"),
    "a chunk is empty": (lambda good: [*good[:3], chunk(0, 32, 0)], "0 bytes where 16 are missing"),
    "a chunk follows the end": (lambda good: [*good, chunk(0, 48, 1)], "item 0 was answered, then"),
    "a chunk comes first": (lambda good: good[1:], "a chunk came before its embedding"),
    "the last chunk never comes": (lambda good: good[:3], r"0 \(32 of 48 bytes\)"),
    "nothing comes": (lambda good: [], r"before these items were answered: 0 \(nothing\)"),
    "an answer comes twice": (lambda good: good + good, r"item 0 was answered, then .* \(embedding\)"),
    "two headers": (lambda good: [good[0], *good], "incomplete, then came another answer"),
    "an error amid chunks": (lambda good: [*good[:2], error(0)], "incomplete, then .* answer .error"),
    "an error after the end": (lambda good: [*good, error(0)], r"answered, then .* \(error\)"),
    "an error that is none": (lambda good: [error(0, 0)], "status OK"),
    "an unknown item": (lambda good: [chunk(9, 0, 1)], "item 9 of a request of 2"),
    "an unknown part": (lambda good: [pb.EncodeResponse(index=0)], "does not know"),
    "a size that is wrong": (lambda good: header(good, size_bytes=47), "size_bytes 47, but 4 × 3 × float32 are 48"),
    "a size that is huge": (lambda good: header(good, size_bytes=2**63), "size_bytes 9223372036854775808, but"),
    "an embedding that is huge": (
        lambda good: header(good, tokens=2**20, width=2**28, grid=pb.Grid(t=1, h=2**11, w=2**11), size_bytes=2**50),
        "an embedding of 1125899906842624 bytes; this client takes 1073741824",
    ),
    "one row too few": (lambda good: header(good, tokens=3, size_bytes=36), "3 tokens cannot come from grid"),
    "more rows than patches": (lambda good: header(good, tokens=17, size_bytes=204), "17 tokens cannot come from grid"),
    "tokens of no square, narrow": (lambda good: header(good, grid=pb.Grid(t=1, h=16, w=1)), "cannot come from grid"),
    "tokens of no square, low": (lambda good: header(good, grid=pb.Grid(t=1, h=1, w=16)), "cannot come from grid"),
    "no rows": (lambda good: header(good, tokens=0, size_bytes=0), "none of these may be 0"),
    "no width": (lambda good: header(good, width=0, size_bytes=0), "none of these may be 0"),
    "no grid": (lambda good: header(good, grid=pb.Grid()), "none of these may be 0"),
    "an unknown dtype": (lambda good: header(good, dtype=99), "unknown dtype 99"),
    "no dtype": (lambda good: header(good, dtype=0), "unknown dtype 0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reply_against_the_contract_is_refused_and_what_came_before_is_kept(serve, good, face, fault):
    change, reason = FAULTS[fault]
    address = serve([*good(1), *change(good(0))]).address

    came, failure = face.stream(address, [ITEM] * 2)
    assert isinstance(failure, ProtocolError)
    assert came[0][0] == 1
    assert came[0][1].float32()[0].tolist() == [1, 2, 3]
    with pytest.raises(ProtocolError, match=reason):
        face.encode(address, [ITEM] * 2)


def test_the_bound_on_an_embedding_can_be_set(serve, good, face):
    address = serve(good(0)).address
    assert len(face.encode(address, [ITEM], max_embedding_bytes=48)) == 1
    with pytest.raises(ProtocolError, match="takes 47"):
        face.encode(address, [ITEM], max_embedding_bytes=47)


def test_patches_answered_with_another_grid_are_refused(serve, good, face):
    def item(grid):
        return patches_item(np.zeros((16, 6), np.uint8), grid, DType.UINT8)

    address = serve(good(0)).address
    assert len(face.encode(address, [item(Grid(1, 4, 4))])) == 1
    with pytest.raises(ProtocolError, match=r"\(1, 2, 8\) were answered as \(1, 4, 4\)"):
        face.encode(address, [item(Grid(1, 2, 8))])


DESCRIPTION = Description(grid=Grid(1, 4, 4), tokens=4, width=3, dtype=DType.FLOAT32, fingerprint="f1")


def left_in(store, good, name="name", index=0, *, written=True, path=None, **fields):
    """The answer of a server that has left its embedding, `index` and up, in a store."""
    if written:
        (store / name).mkdir(parents=True, exist_ok=True)
        create(store / name / FILE_NAME, DESCRIPTION)[:] = np.arange(12, dtype="<f4").reshape(4, 3) + index
    answer = header(good(index), **fields)[0]
    answer.embedding.file.CopyFrom(
        pb.File(path=path or f"{store}/{name}/{FILE_NAME}", name=name, lease="lease", lease_seconds=60)
    )
    return answer


def accepted(answer, store, **bounds):
    index, result = Replies([ITEM] * 2, store=store, **bounds).accept(answer)
    assert index == answer.index
    return result


def test_an_embedding_in_our_store_is_mapped_and_not_to_be_written(tmp_path, good):
    result = accepted(left_in(tmp_path, good, index=1, cached=True), tmp_path)
    assert isinstance(result, Embedding)
    assert (result.key, result.grid, result.tokens, result.width) == ("key-1", Grid(1, 4, 4), 4, 3)
    assert (result.path, result.lease) == (tmp_path / "name" / FILE_NAME, "lease")
    assert (result.cached, result.coalesced, result.lane.device, result.times.run_ms) == (True, False, "CPU", 3.5)
    assert result.float32().tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]
    with pytest.raises(ValueError, match="read-only"):
        result.data[0, 0] = 0
    result.path.unlink()
    assert result.data[3, 2] == 12


def test_mapped_embeddings_hold_nothing_once_nobody_has_them(tmp_path, good):
    gc.collect()
    before = descriptors()
    results = [accepted(left_in(tmp_path, good, f"name-{number}"), tmp_path) for number in range(20)]
    assert len(mappings(tmp_path)) == 20
    del results
    gc.collect()
    assert not mappings(tmp_path) and descriptors() <= before


def test_a_file_is_an_item_answered(tmp_path, good):
    replies = Replies([ITEM], store=tmp_path)
    answer = left_in(tmp_path, good)
    assert replies.accept(answer) is not None
    replies.finish()
    for further in (answer, good(0)[1], error(0)):
        with pytest.raises(ProtocolError, match="item 0 was answered"):
            replies.accept(further)


def test_a_file_that_nobody_asked_for_is_refused(tmp_path, good):
    with pytest.raises(ProtocolError, match="left in a file, which nobody asked for"):
        accepted(left_in(tmp_path, good), None)


def test_a_file_in_the_same_place_that_is_another_embedding_is_refused(tmp_path, good):
    for fields in ({"fingerprint": "f2"}, {"dtype": pb.FLOAT16, "size_bytes": 24}, {"width": 6, "size_bytes": 96}):
        answer = left_in(tmp_path, good, written=not (tmp_path / "name").exists(), **fields)
        with pytest.raises(ProtocolError, match="item 0: a stored embedding is not of the grid, size, type or model"):
            accepted(answer, tmp_path)


@pytest.mark.parametrize("where", ["missing", "of another server", "a link", "unreadable name"])
def test_a_file_that_is_not_in_our_store_is_elsewhere(tmp_path, good, where):
    """On another host, or under another path in a container: the server is asked for it by name."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    answer = left_in(theirs, good, name="x" * 300 if where == "unreadable name" else "name", written=where == "a link")
    if where == "a link":
        (ours / "name").symlink_to(theirs / "name")
    if where == "of another server":
        (ours / "name").mkdir()
        (ours / "name" / FILE_NAME).write_bytes(b"another model's")
    result = accepted(answer, ours)
    assert result == Elsewhere("key-0", answer.embedding.file.name, "lease")


@pytest.mark.parametrize("name", ["", ".", "..", "../theirs/name", "/etc", "a/b", "a\0b", "näme"])
def test_a_name_that_leads_out_of_the_store_opens_nothing(tmp_path, good, name):
    ours = tmp_path / "ours"
    ours.mkdir()
    left_in(tmp_path / "theirs", good)
    told = left_in(tmp_path / "theirs", good, name, written=False)
    assert accepted(told, ours) == Elsewhere("key-0", name, "lease")
    with pytest.raises(ProtocolError, match="must be a plain file name"):
        accepted(left_in(ours, good, name, written=False, path=str(ours / name / FILE_NAME)), ours)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tokens": 3, "size_bytes": 36}, "3 tokens cannot come from grid"),
        ({"size_bytes": 47}, "size_bytes 47"),
        ({"dtype": 99}, "unknown dtype"),
    ],
)
def test_a_file_is_announced_by_the_same_rules(tmp_path, good, fields, reason):
    with pytest.raises(ProtocolError, match=reason):
        accepted(left_in(tmp_path, good, **fields), tmp_path)


def test_a_file_over_the_bound_is_not_mapped(tmp_path, good):
    with pytest.raises(ProtocolError, match="takes 47"):
        accepted(left_in(tmp_path, good), tmp_path, max_embedding_bytes=47)


def test_a_file_for_patches_of_another_grid_is_refused(tmp_path, good):
    item = patches_item(np.zeros((16, 6), np.uint8), Grid(1, 2, 8), DType.UINT8)
    with pytest.raises(ProtocolError, match=r"\(1, 2, 8\) were answered as \(1, 4, 4\)"):
        Replies([item], store=tmp_path).accept(left_in(tmp_path, good))
