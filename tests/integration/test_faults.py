"""A sidecar that answers wrongly costs the one request that it was asked for, at most; vLLM serves the next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_sidecar import Fault, FaultySidecar
from servers import Server
from vllm_servers import VllmServer, noise_png, vllm_server

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

FAULTS = (
    Fault.ROWS_SHORT,
    Fault.ROWS_MERGED,
    Fault.WIDTH_WRONG,
    Fault.NAN,
    Fault.OTHER_FINGERPRINT,
    Fault.OTHER_GRID,
    Fault.FILE_CUT_SHORT,
    Fault.INTERNAL,
    Fault.BUSY,
    Fault.HANG,
)
ITEMS = "vllm:ec_sidecar_items_total"


@pytest.fixture(scope="module")
def sidecar(start_server: Callable[..., Server]) -> Server:
    return start_server("--precision", "f32", "--embedding-dtype", "float32", "--warm-up-seconds", "0")


@pytest.mark.parametrize("store", ["auto", "off"])
def test_where_it_is_to_fail_that_request_fails_and_the_next_is_answered(
    store: str, toy_checkpoint: Path, sidecar: Server, tmp_path: Path
) -> None:
    with FaultySidecar(sidecar.address) as faulty:
        options = {"address": faulty.address, "on_failure": "fail", "timeout_s": 3.0, "attempts": 2, "store": store}
        with vllm_server(toy_checkpoint, tmp_path / "vllm.log", connector=options) as server:
            assert server.ask("warm?", noise_png(1)).ok
            for number, fault in enumerate(FAULTS):
                faulty.always = fault
                failed = server.ask("wrong?", noise_png(100 + number))
                assert failed.status == 500, (fault, failed)
                faulty.always = None
                answered = server.ask("right?", noise_png(100 + number))
                assert answered.ok and answered.tokens, (fault, answered)
            assert server.metric(ITEMS, outcome="failed") == len(FAULTS)
            outcome = "linked" if store == "auto" else "sent"
            assert server.metric(ITEMS, outcome=outcome) == len(FAULTS) + 1
            spared(server, faulty)


def spared(server: VllmServer, faulty: FaultySidecar) -> None:
    """Neighbours in the same batch, and text, are not touched by one that fails."""
    faulty.always = None
    faulty.answer(Fault.NAN, Fault.NAN)
    assert {server.ask("two", noise_png(number), noise_png(number + 1)).status for number in (300, 302)} <= {200, 500}
    assert server.ask("and text alone").ok


def test_where_vllm_has_its_tower_it_answers_all_the_same(
    toy_checkpoint: Path, sidecar: Server, tmp_path: Path
) -> None:
    with FaultySidecar(sidecar.address) as faulty:
        options = {"address": faulty.address, "timeout_s": 3.0, "attempts": 2}
        with vllm_server(toy_checkpoint, tmp_path / "vllm.log", connector=options) as server:
            for number, fault in enumerate(FAULTS):
                faulty.always = fault
                # Another question, so that the answers are not told apart by what vLLM has cached of the prompt.
                local = server.ask("what?", noise_png(100 + number))
                assert local.ok, (fault, local)
                assert server.metric(ITEMS, outcome="encoded_locally") == number + 1
            faulty.always = None
            assert server.metric(ITEMS, outcome="failed") == 0
            assert server.ask("right?", noise_png(1)).ok
            assert server.metric(ITEMS, outcome="linked") == 1
