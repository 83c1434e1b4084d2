"""What vLLM's scheduler is told, and until when files stay: against a fetcher and files that a test plays."""

from __future__ import annotations

import logging

import pytest
from scheduler_fakes import LARGE, SMALL, TOKEN_BYTES, Half, Picture, request


def test_a_request_waits_until_all_its_embeddings_are_there() -> None:
    half = Half()
    both = request("r", "a", "b")
    assert not half.ensure_cache_available(both, 0)
    assert half.sidecars.started == ["a", "b"]
    half.sidecars.succeed(half.sidecars.under_way[1])
    assert not half.ensure_cache_available(both, 0)
    assert half.has_cache_item("b") and not half.has_cache_item("a")
    half.sidecars.succeed_all()
    assert half.ensure_cache_available(both, 0)
    loads = half.schedule((both, 0), (both, 1))
    assert set(loads) == {"a", "b"} and {file.name for file in loads.values()} == half.sidecars.files


def test_a_request_of_text_or_with_its_own_embeddings_never_waits() -> None:
    half = Half()
    assert half.ensure_cache_available(request("text"), 0)
    assert half.ensure_cache_available(request("inline", Picture("a", brings="embeds")), 0)
    assert half.sidecars.started == [] and not half.has_cache_item("a")


def test_what_the_prefix_cache_has_is_not_asked_for() -> None:
    half = Half()
    both = request("r", "a", "b")
    assert not half.ensure_cache_available(both, 1)
    assert half.sidecars.started == ["b"]
    assert half.ensure_cache_available(both, 2)


def test_a_picture_that_two_requests_or_one_twice_show_is_asked_for_once() -> None:
    half = Half()
    twice, once = request("twice", "a", "a"), request("once", "a")
    assert not half.ensure_cache_available(twice, 0)
    assert not half.ensure_cache_available(once, 0)
    assert half.sidecars.started == ["a"]
    half.sidecars.succeed_all()
    assert half.ensure_cache_available(twice, 0) and half.ensure_cache_available(once, 0)


def test_a_failure_leaves_the_item_to_vllms_own_tower() -> None:
    half = Half()
    one = request("r", "a")
    half.ensure_cache_available(one, 0)
    half.sidecars.fail_all()
    assert half.ensure_cache_available(one, 0)
    assert not half.has_cache_item("a")
    assert half.schedule((one, 0)) == {}
    assert half.take_unavailable_requests() == set()
    assert half.items() == {"encoded_locally": 1}


def test_without_a_tower_that_request_fails_alone() -> None:
    half = Half(local=False)
    bad, good = request("bad", "a"), request("good", "b")
    half.ensure_cache_available(bad, 0)
    half.ensure_cache_available(good, 0)
    half.sidecars.fail(half.sidecars.under_way[0])
    half.sidecars.succeed_all()
    assert not half.ensure_cache_available(bad, 0)
    assert half.ensure_cache_available(good, 0)
    assert half.take_unavailable_requests() == {"bad"}
    assert not half.ensure_cache_available(bad, 0)
    assert half.take_unavailable_requests() == set()
    assert half.items() == {"failed": 1}


def test_a_metadata_only_item_fails_even_beside_a_tower() -> None:
    half = Half()
    known = request("r", Picture("uuid", brings="nothing"))
    half.ensure_cache_available(known, 0)
    half.sidecars.fail_all()
    assert not half.ensure_cache_available(known, 0)
    assert half.take_unavailable_requests() == {"r"}


def test_what_no_sidecar_can_encode_is_left_to_the_tower_or_fails() -> None:
    lora = request("r", "a")
    lora.mm_features[0].mm_hash = "another"
    local, towerless = Half(), Half(local=False)
    assert local.ensure_cache_available(lora, 0)
    assert not towerless.ensure_cache_available(lora, 0)
    assert towerless.take_unavailable_requests() == {"r"}
    assert local.sidecars.started == towerless.sidecars.started == []


def test_somebody_elses_failure_is_not_the_next_ones() -> None:
    half = Half(local=False)
    first, second = request("first", "a"), request("second", "a")
    half.ensure_cache_available(first, 0)
    half.sidecars.fail_all()
    half.ensure_cache_available(first, 0)
    assert not half.ensure_cache_available(second, 0)
    half.sidecars.succeed_all()
    assert half.ensure_cache_available(second, 0)
    assert half.take_unavailable_requests() == {"first"}


@pytest.mark.parametrize("brings", ["pixels", "nothing", "embeds"])
@pytest.mark.parametrize("local", [True, False], ids=["with a tower", "towerless"])
def test_a_uuid_given_to_two_pictures_fails_the_second(brings: str, local: bool) -> None:
    """Rows of the one in the place of the other would end vLLM."""
    half = Half(local=local)
    first, second = request("first", Picture("uuid", SMALL)), request("second", Picture("uuid", LARGE, brings))
    half.ensure_cache_available(first, 0)
    half.sidecars.succeed_all()
    assert half.ensure_cache_available(first, 0)
    assert not half.ensure_cache_available(second, 0)
    assert half.take_unavailable_requests() == {"second"}
    assert half.ensure_cache_available(first, 0)


def test_a_uuid_whose_picture_vllm_encodes_itself_may_not_name_another_meanwhile() -> None:
    half = Half()
    first, second = request("first", Picture("uuid", SMALL)), request("second", Picture("uuid", LARGE))
    half.ensure_cache_available(first, 0)
    half.sidecars.fail_all()
    assert half.ensure_cache_available(first, 0)
    assert not half.ensure_cache_available(second, 0)
    assert half.take_unavailable_requests() == {"second"}
    assert half.ensure_cache_available(first, 0) and not half.has_cache_item("uuid")


def test_a_key_that_nobody_has_does_not_fail_who_brought_the_pixels() -> None:
    """Both wait for the same ask, which was by the key alone; the second one's pixels then serve them both."""
    half = Half(local=False)
    known, brought = request("known", Picture("uuid", brings="nothing")), request("brought", "uuid")
    half.ensure_cache_available(known, 0)
    half.ensure_cache_available(brought, 0)
    half.sidecars.fail_all()
    assert not half.ensure_cache_available(brought, 0)
    half.sidecars.succeed_all()
    assert half.ensure_cache_available(brought, 0) and half.ensure_cache_available(known, 0)
    assert half.take_unavailable_requests() == set()


def test_an_aborted_request_ends_its_fetches_and_nobody_elses() -> None:
    half = Half()
    gone, stays = request("gone", "a", "b"), request("stays", "b")
    half.ensure_cache_available(gone, 0)
    half.ensure_cache_available(stays, 0)
    half.request_finished(gone)
    assert [fetch.wanted.key for fetch in half.sidecars.under_way] == ["b"]
    half.request_finished(stays)
    assert half.sidecars.under_way == []


def test_a_request_that_was_never_polled_may_finish() -> None:
    half = Half()
    half.request_finished(request("r", "a"))
    half.update_state_after_free(request("r", "a"), 0)


def test_a_file_stays_until_the_step_that_loads_it_has_run() -> None:
    """With async scheduling the next step is scheduled before."""
    half = Half()
    one = request("r", "a")
    half.ensure_cache_available(one, 0)
    half.sidecars.succeed_all()
    half.schedule((one, 0))
    half.request_finished(one)
    half.take_loads(["a"])
    assert len(half.sidecars.files) == 1
    half.step_has_run()
    half.step_has_run()
    assert half.sidecars.files == set()


def test_a_file_stays_while_vllms_cache_holds_the_embedding() -> None:
    """So that the next request with the picture need not ask."""
    half = Half()
    first, second = request("first", "a"), request("second", "a")
    half.ensure_cache_available(first, 0)
    half.sidecars.succeed_all()
    half.schedule((first, 0))
    half.step_has_run()
    half.update_state_after_free(first, 0)
    half.request_finished(first)
    assert half.ensure_cache_available(second, 0)
    assert half.has_cache_item("a") and half.sidecars.started == ["a"]
    half.request_finished(second)
    half.take_loads(["a"])
    half.step_has_run()
    assert half.sidecars.files == set()


def test_an_embedding_evicted_before_it_is_used_can_be_loaded_again() -> None:
    half = Half()
    one = request("r", "a")
    half.ensure_cache_available(one, 0)
    half.sidecars.succeed_all()
    half.schedule((one, 0))
    half.take_loads(["a"])
    half.step_has_run()
    half.step_has_run()
    assert half.ensure_cache_available(one, 0) and half.has_cache_item("a")
    assert set(half.schedule((one, 0))) == {"a"}


def test_a_request_preempted_after_its_prefill_asks_again() -> None:
    half = Half()
    one = request("r", "a")
    half.ensure_cache_available(one, 0)
    half.sidecars.succeed_all()
    half.schedule((one, 0))
    half.step_has_run()
    half.update_state_after_free(one, 0)
    half.take_loads(["a"])
    half.step_has_run()
    assert half.sidecars.files == set()
    assert not half.ensure_cache_available(one, 0)
    half.sidecars.succeed_all()
    assert half.ensure_cache_available(one, 0) and half.has_cache_item("a")


def test_requests_beyond_the_bound_wait_for_those_before_them() -> None:
    half = Half(ahead=2 * TOKEN_BYTES)
    first, second, third = request("1", "a"), request("2", "b"), request("3", "c")
    for each in (first, second, third):
        half.ensure_cache_available(each, 0)
    assert half.sidecars.started == ["a", "b"]
    half.sidecars.succeed_all()
    assert half.ensure_cache_available(first, 0)
    half.schedule((first, 0))
    half.update_state_after_free(first, 0)
    assert not half.ensure_cache_available(third, 0)
    assert half.sidecars.started == ["a", "b", "c"]


def test_one_request_larger_than_the_bound_has_its_turn() -> None:
    half = Half(ahead=1)
    assert not half.ensure_cache_available(request("r", "a", "b"), 0)
    assert half.sidecars.started == ["a", "b"]


def test_a_gone_sidecar_costs_a_line_a_second_and_not_one_for_each_request(caplog: pytest.LogCaptureFixture) -> None:
    half = Half()
    with caplog.at_level(logging.WARNING):
        for number in range(50):
            half.ensure_cache_available(each := request(str(number), str(number)), 0)
            half.sidecars.fail_all()
            half.ensure_cache_available(each, 0)
    assert 1 <= len(caplog.records) < 50
    assert "vLLM encodes it itself: UNAVAILABLE: nobody is there" in caplog.records[0].getMessage()


def test_files_of_a_cache_that_vllm_has_reset_do_not_stay_for_good() -> None:
    half = Half(cached_tokens=3)
    for number in range(8):  # vLLM tells of no eviction
        one = request(f"r{number}", f"picture-{number}")
        half.ensure_cache_available(one, 0)
        half.sidecars.succeed_all()
        half.schedule((one, 0))
        half.step_has_run()
        half.request_finished(one)
    assert len(half.sidecars.files) == 3
    assert half.has_cache_item("picture-7") and not half.has_cache_item("picture-0")


@pytest.mark.parametrize("first_brings", ["pixels", "nothing"])
def test_a_uuid_given_to_another_picture_after_vllm_has_reset_its_cache_is_asked_for_anew(first_brings: str) -> None:
    """Of the same size, so that nothing but its content tells it apart."""
    half = Half()
    first, second = (
        request("first", Picture("uuid", brings=first_brings, shows=1)),
        request("second", Picture("uuid", shows=2)),
    )
    half.ensure_cache_available(first, 0)
    half.sidecars.succeed_all()
    (before,) = half.schedule((first, 0)).values()
    half.step_has_run()
    half.update_state_after_free(first, 0)
    half.request_finished(first)
    assert not half.ensure_cache_available(second, 0)
    assert half.sidecars.started == ["uuid", "uuid"]
    half.sidecars.succeed_all()
    assert half.ensure_cache_available(second, 0)
    (after,) = half.schedule((second, 0)).values()
    assert after.name != before.name and half.sidecars.files == {after.name}


def test_a_picture_that_a_session_adds_later_is_waited_for() -> None:
    half = Half()
    session = request("session", "a")
    half.ensure_cache_available(session, 0)
    half.sidecars.succeed_all()
    assert half.ensure_cache_available(session, 0)
    session.mm_features += request("more", "a", "b").mm_features[1:]
    assert not half.ensure_cache_available(session, 1)
    half.sidecars.succeed_all()
    assert half.ensure_cache_available(session, 1) and half.has_cache_item("b")
