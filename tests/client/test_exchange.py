"""One call and what follows it: what is mapped, what is fetched after all, and which leases are given back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from google.rpc import code_pb2, status_pb2

from sidecar.client import Embedding, ItemError, ProtocolError, image_item
from sidecar.exchange import Exchange
from sidecar.pb import encoder_pb2 as pb
from sidecar.store_file import FILE_NAME, Description, create
from sidecar.vision.dtypes import DType
from sidecar.vision.grid import Grid

ITEM = image_item(b"photo")
DESCRIPTION = Description(grid=Grid(1, 4, 4), tokens=4, width=3, dtype=DType.FLOAT32, fingerprint="f1")
Good = Callable[[int], list[pb.EncodeResponse]]


def exchange(count: int, store: Path | None, *, hold: bool = False, timeout_s: float | None = None) -> Exchange:
    return Exchange([ITEM] * count, 1 << 20, store, hold=hold, timeout_s=timeout_s)


def stored(good: Good, index: int, store: Path | None = None) -> pb.EncodeResponse:
    """An answer in a file: of our store, or else of one on another host."""
    answer = good(index)[0]
    name = f"name-{index}"
    path = (store or Path("/elsewhere")) / name / FILE_NAME
    answer.embedding.file.CopyFrom(pb.File(path=str(path), name=name, lease=f"lease-{index}", lease_seconds=60))
    if store:
        path.parent.mkdir()
        create(path, DESCRIPTION)[:] = np.full((4, 3), index, "<f4")
    return answer


def feed(into: Exchange, *answers: pb.EncodeResponse) -> dict[int, Embedding | ItemError]:
    return dict(done for answer in answers if (done := into.accept(answer)) is not None)


def missing(index: int) -> pb.EncodeResponse:
    return pb.EncodeResponse(index=index, error=status_pb2.Status(code=code_pb2.NOT_FOUND, message="gone"))


def leases(of: Exchange) -> list[str]:
    request = of.to_release()
    return list(request.leases) if request else []


def test_rows_over_the_wire_need_nothing_more(good: Good) -> None:
    call = exchange(2, None)
    results = feed(call, *good(1), *good(0))
    assert list(results) == [1, 0]
    assert call.finish() is None
    assert call.to_release() is None


def test_what_is_mapped_is_given_back_and_still_readable(tmp_path: Path, good: Good) -> None:
    call = exchange(2, tmp_path)
    results = feed(call, stored(good, 0, tmp_path), stored(good, 1, tmp_path))
    assert call.finish() is None
    assert leases(call) == ["lease-0", "lease-1"]
    for index, result in results.items():
        assert isinstance(result, Embedding)
        assert (result.lease, result.path) == ("", tmp_path / f"name-{index}" / FILE_NAME)
        assert (result.data == index).all()


def test_what_is_to_be_held_is_not_given_back(tmp_path: Path, good: Good) -> None:
    call = exchange(1, tmp_path, hold=True)
    results = feed(call, stored(good, 0, tmp_path))
    assert call.finish() is None
    assert call.to_release() is None
    assert isinstance(results[0], Embedding)
    assert results[0].lease == "lease-0"


@pytest.mark.parametrize("hold", [False, True])
def test_what_lies_elsewhere_is_fetched_by_name_and_answered_under_its_own_index_and_key(
    tmp_path: Path, good: Good, hold: bool
) -> None:
    call = exchange(4, tmp_path, hold=hold)
    results = feed(call, stored(good, 3), *good(2), stored(good, 0, tmp_path), stored(good, 1))
    assert sorted(results) == [0, 2]
    follow_up = call.finish()
    assert follow_up == pb.FetchRequest(keys=["name-3", "name-1"])

    answers = feed(call, *good(1), *good(0))

    assert list(answers) == [1, 3]
    for index, fetched in ((1, 1), (3, 0)):
        result = answers[index]
        assert isinstance(result, Embedding)
        assert (result.key, result.lease, result.path) == (f"key-{index}", "", None)
        assert result.float32()[0, 0] == fetched
    assert call.finish() is None
    # A copy over the wire needs no lease, held or not.
    assert leases(call) == (["lease-3", "lease-1"] if hold else ["lease-3", "lease-0", "lease-1"])


def test_what_went_before_it_was_fetched_is_that_items_error(tmp_path: Path, good: Good) -> None:
    call = exchange(2, tmp_path)
    feed(call, stored(good, 1), stored(good, 0))
    assert call.finish() is not None
    answers = feed(call, missing(0), *good(1))
    assert isinstance(answers[1], ItemError)
    assert answers[1].code == "NOT_FOUND"
    assert isinstance(answers[0], Embedding)
    assert call.finish() is None


def test_the_fetch_is_held_to_the_contract_too(tmp_path: Path, good: Good) -> None:
    def fetching() -> Exchange:
        call = exchange(3, tmp_path)
        feed(call, stored(good, 2), *good(0), *good(1))
        assert call.finish() is not None
        return call

    with pytest.raises(ProtocolError, match="before these items were answered: 0"):
        fetching().finish()
    with pytest.raises(ProtocolError, match="item 1 of a request of 1"):
        feed(fetching(), *good(1))
    # It was asked for inline, and a second time nothing follows.
    with pytest.raises(ProtocolError, match="a file, which nobody asked for"):
        feed(fetching(), stored(good, 0, tmp_path))


def test_a_stream_that_ends_early_is_not_followed_by_a_fetch(tmp_path: Path, good: Good) -> None:
    call = exchange(2, tmp_path)
    feed(call, stored(good, 0))
    with pytest.raises(ProtocolError, match="before these items were answered: 1"):
        call.finish()
    assert leases(call) == ["lease-0"]


def test_an_items_error_passes_through(good: Good) -> None:
    call = exchange(2, None)
    results = feed(call, missing(1), *good(0))
    assert isinstance(results[1], ItemError)
    assert call.finish() is None


def test_both_calls_share_one_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    assert exchange(1, None).timeout_s is None
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    call = exchange(1, None, timeout_s=5.0)
    assert call.timeout_s == 5.0
    now = 103.0
    assert call.timeout_s == 2.0
    now = 200.0
    assert call.timeout_s is not None
    assert 0 < call.timeout_s < 0.01
