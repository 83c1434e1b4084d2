"""What exporting the real 3B size costs."""

from __future__ import annotations

import pytest

from sidecar.artifact import open_artifact
from tests.real_size.conftest import RealExport

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_peak_memory_is_a_small_multiple_of_the_weights(real_export: RealExport) -> None:
    weights = 2 * real_export.checkpoint.tower.parameters
    ratio = (real_export.peak_bytes - real_export.own_bytes) / weights
    print(
        f"export: peak {real_export.peak_bytes / 1e9:.2f} GB, interpreter's own {real_export.own_bytes / 1e9:.2f} GB, "
        f"{ratio:.2f} × the bf16 weights"
    )
    assert ratio <= 2.5


@pytest.mark.parametrize(("precision", "limit"), [("bf16", 2.1), ("int8", 1.15)])
def test_bytes_per_parameter(real_export: RealExport, precision: str, limit: float) -> None:
    artifact = open_artifact(real_export.artifact)
    variant = artifact.manifest.variant("openvino", precision)
    size = sum(artifact.path(name).stat().st_size for name in variant.files)
    per_parameter = size / artifact.manifest.tower.parameters
    print(f"{variant.name}: {per_parameter:.3f} bytes a parameter")
    assert per_parameter <= limit
