"""vLLM's interface for encoder caches (vllm/distributed/ec_transfer/ec_connector/base.py), in scheduler and workers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import vllm
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase, ECConnectorMetadata, ECConnectorRole
from vllm.platforms import current_platform

from sidecar.integrations.vllm.compatibility import check_version
from sidecar.integrations.vllm.fetcher import Fetcher
from sidecar.integrations.vllm.files import LocalFile, LocalFiles
from sidecar.integrations.vllm.identity import Identity
from sidecar.integrations.vllm.metrics import SidecarPromMetrics, SidecarStats
from sidecar.integrations.vllm.options import Options
from sidecar.integrations.vllm.pause import Pause
from sidecar.integrations.vllm.scheduler_half import SchedulerHalf
from sidecar.integrations.vllm.tally import Tally
from sidecar.integrations.vllm.towerless import check_profiling, leave_out_towers
from sidecar.integrations.vllm.worker_half import WorkerHalf
from sidecar.vision.spec import TowerSpec

_ROLE = "ec_consumer"
# Tokens of the longest video that Qwen2.5-VL takes; vLLM's encoder cache has room for any one item.
_LONGEST_ITEM = 24576


@dataclass
class Loads(ECConnectorMetadata):
    """What travels from the scheduler to the workers with a step: files by identifier, never bytes of embeddings."""

    files: dict[str, LocalFile] = field(default_factory=dict)


class EncoderSidecarConnector(ECConnectorBase):
    """See `sidecar.integrations.vllm`."""

    def __init__(self, vllm_config: Any, role: ECConnectorRole) -> None:
        super().__init__(vllm_config=vllm_config, role=role)
        transfer = vllm_config.ec_transfer_config
        if transfer.ec_role != _ROLE:
            raise ValueError(f'EncoderSidecarConnector takes embeddings and gives none: ec_role must be "{_ROLE}"')
        options = Options.from_config(transfer.ec_connector_extra_config)
        model = vllm_config.model_config
        tower = TowerSpec.from_config(model.hf_config.to_dict())
        if model.multimodal_config.mm_processor_cache_type == "shm":
            raise ValueError(
                "--mm-processor-cache-type shm keeps the pixels from vLLM's scheduler, where this connector needs them: use lru"
            )
        if not options.load_tower:
            check_profiling(model)
        if role is ECConnectorRole.WORKER:
            if not options.load_tower:
                leave_out_towers()
            self._worker = WorkerHalf(model.dtype)
            return
        check_version(vllm.__version__)
        loads = vllm_config.load_config.load_format != "dummy"
        self._tally = Tally()
        self._files = LocalFiles(options.directory)
        identity = Identity(tower, model.model, model.revision, options.fingerprint, loads=loads)
        self._fetcher = Fetcher(options, identity, self._files, self._tally)
        kv_transfer = vllm_config.kv_transfer_config
        loads_kv = kv_transfer is not None and kv_transfer.is_kv_consumer
        alone = vllm_config.parallel_config.data_parallel_size == 1 and not loads_kv
        self._pause = Pause(self._fetcher.wait_for_news, alone=alone)
        self._scheduler = SchedulerHalf(
            self._fetcher,
            self._files,
            self._tally,
            tower,
            encodes_locally=options.may_encode_locally,
            ahead_bytes=options.ahead_bytes,
            cached_tokens=2 * max(vllm_config.scheduler_config.encoder_cache_size, _LONGEST_ITEM),
        )

    # In a worker.

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Loads)
        if metadata.files:
            self._worker.load(metadata.files, encoder_cache, _device())

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any) -> None:
        """What vLLM's own tower has encoded is given to nobody."""

    # In the scheduler.

    def ensure_cache_available(self, request: Any, num_computed_tokens: int) -> bool:
        return self._scheduler.ensure_cache_available(request, num_computed_tokens)

    def has_cache_item(self, identifier: str) -> bool:
        return self._scheduler.has_cache_item(identifier)

    def update_state_after_alloc(self, request: Any, index: int) -> None:
        self._scheduler.update_state_after_alloc(request, index)

    def update_state_after_free(self, request: Any, index: int) -> None:
        self._scheduler.update_state_after_free(request, index)

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        loads = Loads(self._scheduler.take_loads(scheduler_output.free_encoder_mm_hashes))
        if not scheduler_output.total_num_scheduled_tokens and self._scheduler.steps_under_way == 1:
            self._pause.rest()
        return loads

    def take_unavailable_requests(self) -> set[str]:
        # vLLM asks once for each step's output, in the order of the steps.
        self._scheduler.step_has_run()
        return self._scheduler.take_unavailable_requests()

    def request_finished(self, request: Any) -> tuple[bool, dict[str, Any] | None]:
        self._scheduler.request_finished(request)
        return False, None

    def get_ec_connector_stats(self) -> SidecarStats | None:
        if self.role is ECConnectorRole.WORKER or not (taken := self._tally.take()):
            return None
        return SidecarStats(taken)

    @classmethod
    def build_ec_connector_stats(cls, data: dict[str, Any] | None = None) -> SidecarStats:
        return SidecarStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> SidecarPromMetrics:
        return SidecarPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        if self.role is ECConnectorRole.SCHEDULER:
            self._fetcher.close()
            self._files.close()


def _device() -> torch.device:
    kind = current_platform.device_type
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device(kind, torch.accelerator.current_device_index())
