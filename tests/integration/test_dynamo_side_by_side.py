"""Two chains inside Dynamo on one machine: neither finds the other's workers, and one ends without the other."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from chains import all_ended, started
from dynamo_chains import DynamoChain
from vllm_servers import noise_png

from deploy.launch.chain import PART_DIED

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def test_two_chains_answer_side_by_side_and_one_ends_when_a_part_of_it_dies(
    toy_checkpoint: Path, toy_artifact: Path, tmp_path: Path
) -> None:
    logs = [tmp_path / name for name in ("stays", "ends")]
    stays = DynamoChain(toy_checkpoint, toy_artifact, logs[0], ["cpu", "cpu"])
    # One after the other: a worker that is starved for ten seconds drops off Dynamo's list.
    with started(stays):
        ends = DynamoChain(toy_checkpoint, toy_artifact, logs[1], ["cpu"])
        with started(ends):
            pictures = [noise_png(number) for number in range(4)]
            answers = [chain.vllm("frontend").ask("Which one are you?", *pictures) for chain in (stays, ends)]
            assert answers[0].ok, answers[0].text
            assert (answers[0].tokens, answers[0].text) == (answers[1].tokens, answers[1].text)
            handles, scratch = ends.handles(), ends.scratch()
            os.kill(ends.process("encoder-0"), signal.SIGKILL)
            assert ends.wait_end() == PART_DIED
            assert "encoder-0 was killed by SIGKILL" in ends.told
            assert all_ended(handles) and not scratch.exists()
        assert stays.vllm("frontend").ask("Still there?", noise_png(5)).ok
