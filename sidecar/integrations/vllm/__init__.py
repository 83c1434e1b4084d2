"""vLLM prefill workers that take their image embeddings from sidecars, with an unmodified vLLM.

    vllm serve MODEL --ec-transfer-config '{"ec_connector": "EncoderSidecarConnector", "ec_role": "ec_consumer",
      "ec_connector_extra_config": {"address": "encoder:50051"}}'

The name is registered by the entry point `vllm.general_plugins`; where this package is only on the PYTHONPATH, add
`"ec_connector_module_path": "sidecar.integrations.vllm"`. docs/vllm.md has every option.

    connector.py         vLLM's interface, for the two halves, which live in different processes
    scheduler_half.py    what each request needs, and what to tell vLLM's scheduler
    fetcher.py           asks sidecars in the background, until the embedding lies in a file of ours, checked
    worker_half.py       from the file to the device
    features.py          what vLLM's scheduler knows of an image or video, as the contract's item
    identity.py          whether a sidecar holds the weights that this vLLM has loaded
    files.py             the files, and who removes them
    pause.py             rest while all there is to do is to wait
    options.py           `ec_connector_extra_config`
    tally.py metrics.py  what is counted; vLLM's connector stats
    towerless.py         a vLLM without the tower's weights
    compatibility.py     the versions that this was tested with

Only `connector.py`, `metrics.py` and `towerless.py` import vllm, and only when vLLM asks for them.
"""

from __future__ import annotations

import os
from typing import Any

NAME = "EncoderSidecarConnector"


def __getattr__(name: str) -> Any:
    if name == NAME:
        from sidecar.integrations.vllm.connector import EncoderSidecarConnector

        return EncoderSidecarConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """The entry point: vLLM calls it in each of its processes, before anything else of it runs."""
    from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory

    # vLLM may load its plugins more than once in a process.
    if NAME not in ECConnectorFactory._registry:
        ECConnectorFactory.register_connector(NAME, "sidecar.integrations.vllm.connector", NAME)
    if os.environ.get("EPD_VLLM_LOAD_TOWER", "").lower() in ("0", "false", "no"):
        from sidecar.integrations.vllm.towerless import leave_out_towers

        leave_out_towers()
