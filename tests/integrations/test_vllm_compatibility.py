"""The versions of vLLM that the connector says it was tested with."""

from __future__ import annotations

import logging

import pytest

from sidecar.integrations.vllm.compatibility import check_version


@pytest.mark.parametrize("version", ["0.31.0", "0.32.0+cpu", "0.32.1rc1"])
def test_a_tested_version_passes_in_silence(version: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert check_version(version)
    assert not caplog.records


@pytest.mark.parametrize("version", ["0.3.2", "0.33.0", "0.310.0", "1.0", "dev", ""])
def test_an_unknown_version_is_warned_of_by_name(version: str, caplog: pytest.LogCaptureFixture) -> None:
    assert not check_version(version)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"vLLM {version} is not among the versions" in record.message and "0.31, 0.32" in record.message
