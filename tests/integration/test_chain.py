"""Encode, prefill and decode as three processes behind vLLM's router: they answer, side by side, and end together."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from chains import VLLM_ARGS, EpdChain, all_ended, started
from vllm_servers import noise_png, vllm_server

from deploy.launch.chain import PART_DIED, STOPPED

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

# Neither prefill nor decode loads the vision tower's weights.
WITHOUT_TOWERS = {"EPD_VLLM_LOAD_TOWER": "0", "VLLM_ARGS": f"{VLLM_ARGS} --skip-mm-profiling"}


@pytest.fixture(scope="module")
def chain(toy_checkpoint: Path, toy_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EpdChain]:
    """One for this module, with two encoders; the last test ends it."""
    launched = EpdChain(toy_checkpoint, toy_artifact, tmp_path_factory.mktemp("chain"), ["cpu", "cpu"])
    with started(launched):
        yield launched


def test_text_is_answered_through_the_router(chain: EpdChain) -> None:
    answer = chain.vllm("router").ask("What is a sidecar?")
    assert answer.ok, answer.text
    assert len(answer.tokens) == 4


def test_images_are_answered_with_the_sidecars_embeddings(chain: EpdChain) -> None:
    prefill = chain.vllm("prefill")
    before = prefill.metric("vllm:ec_sidecar_items_total")
    pictures = [noise_png(number) for number in (1, 2)]
    answer = chain.vllm("router").ask("What are these?", *pictures)
    assert answer.ok, answer.text
    assert prefill.metric("vllm:ec_sidecar_items_total") == before + 2
    assert chain.vllm("router").ask("What are these?", *pictures[::-1]).tokens != answer.tokens


def test_decode_gets_the_prompt_by_kv_transfer_and_computes_none_of_it(chain: EpdChain) -> None:
    decode = chain.vllm("decode")
    names = ("vllm:external_prefix_cache_hits_total", "vllm:prompt_tokens_total", "vllm:nixl_bytes_transferred_sum")
    hits, prompt, transferred = (decode.metric(name) for name in names)
    answer = chain.vllm("router").ask("Nobody has asked this before.", noise_png(3, 224, 224))
    assert answer.ok, answer.text
    asked = decode.metric(names[1]) - prompt
    assert asked > 64  # the image alone
    assert decode.metric(names[0]) - hits > asked - 16  # but for a block of a common beginning
    assert decode.metric(names[2]) > transferred
    assert decode.metric("vllm:prompt_tokens_by_source_total", source="local_compute") == 0


def test_tokens_and_logprobs_are_those_of_a_plain_vllm(chain: EpdChain, toy_checkpoint: Path, tmp_path: Path) -> None:
    sizes = ((84, 112), (57, 201), (224, 224), (130, 90), (301, 77), (28, 28), (150, 333), (99, 99))
    pictures = [noise_png(500 + number, *size) for number, size in enumerate(sizes)]
    requests = [
        (f"picture {first}, {count} of them", pictures[first : first + count])
        for first in range(5)
        for count in range(4)
    ]
    through_chain = [chain.vllm("router").ask(text, *images, tokens=6) for text, images in requests]
    with vllm_server(toy_checkpoint, tmp_path / "plain.log") as plain:
        by_itself = [plain.ask(text, *images, tokens=6) for text, images in requests]
    apart = 0.0
    for request, ours, theirs in zip(requests, through_chain, by_itself, strict=True):
        assert ours.ok and theirs.ok and ours.tokens == theirs.tokens, (request[0], ours, theirs)
        apart = max(apart, *(abs(a - b) for a, b in zip(ours.logprobs, theirs.logprobs, strict=True)))
    print(f"\n{len(requests)} answers through the chain: tokens equal, logprobs at most {apart:.1e} apart", end="")
    assert apart <= 1e-3


def test_two_chains_run_side_by_side_and_one_ends_when_a_part_of_it_dies(
    chain: EpdChain, toy_checkpoint: Path, toy_artifact: Path, tmp_path: Path
) -> None:
    other = EpdChain(toy_checkpoint, toy_artifact, tmp_path, ["cpu"], **WITHOUT_TOWERS)
    with started(other):
        answers = [each.vllm("router").ask("Which one are you?", noise_png(4)) for each in (chain, other)]
        assert answers[0].ok and answers[0].tokens == answers[1].tokens
        for name in ("prefill", "decode"):
            assert "the vision tower's weights are left out" in (tmp_path / f"{name}.log").read_text()
        handles = other.handles()
        os.kill(other.process("encoder-0"), signal.SIGKILL)
        assert other.wait_end() == PART_DIED
        assert "encoder-0 was killed by SIGKILL" in other.told
        assert all_ended(handles)
    assert chain.vllm("router").ask("Still there?", noise_png(5)).ok


def test_ctrl_c_leaves_no_process(chain: EpdChain) -> None:
    handles = chain.handles()
    assert len(handles) >= 7  # front, guard, two encoders, prefill, decode, router
    chain.front.send_signal(signal.SIGINT)
    assert chain.wait_end() == STOPPED
    assert all_ended(handles)
