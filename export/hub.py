"""A checkpoint's files on the Hugging Face hub, of which only the vision tower's bytes are transferred.

A checkpoint of 7 to 150 GB holds 1.3 GB of vision tensors. The header of a safetensors file says at which bytes they
lie, and the hub answers HTTP range requests; so the header and those ranges are all that is asked for, also out of a
shard that holds language tensors beside them. The result is a safetensors file of its own, `vision/<commit>/<shard>`
beside `snapshots` in the repository's folder of the hub cache: it never passes for the whole shard, and whoever deletes
the repository from the cache deletes it too.

A shard that the cache already holds whole is used as it is, and where a server ignores ranges, the whole shard is
downloaded.
HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import logging
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# Public, but re-exported lazily, which mypy does not follow.
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff  # type: ignore[attr-defined]

from export.files import pack_header
from sidecar.vision.checkpoint_files import (
    PREAMBLE_BYTES,
    AbsentError,
    CheckpointError,
    StoredTensor,
    header_length,
    parse_header,
    parse_json,
    read_header,
)
from sidecar.vision.digits import apart

logger = logging.getLogger(__name__)

_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")
# Answers in a row that broke off without one new byte, after which a transfer is given up.
_MAX_STALLS = 4


class _RangesIgnoredError(Exception):
    """The server sends whole files whatever is asked for."""


class HubFiles:
    """One commit of a model repository.

    Args:
        repo_id: the hub id, such as "Qwen/Qwen2.5-VL-3B-Instruct".
        revision: branch, tag or commit; None is the default branch. It is resolved once, so that all files
            are of one commit.
        cache_dir: the hub cache; None is huggingface_hub's own.

    Raises:
        CheckpointError: if the repository, the revision or its config.json cannot be had.
    """

    def __init__(self, repo_id: str, *, revision: str | None, cache_dir: str | Path | None) -> None:
        self._repo_id = repo_id
        self._revision = revision
        self._cache_dir = cache_dir
        with self._explained("config.json"):
            try:
                config = Path(hf_hub_download(repo_id, "config.json", revision=revision, cache_dir=cache_dir))
            except LocalEntryNotFoundError:  # unreachable, which is not the same as absent
                raise
            except EntryNotFoundError as error:
                raise CheckpointError(f"{repo_id} has no config.json, so it is no Hugging Face checkpoint") from error
        # The cache's published layout: <repository>/snapshots/<commit>/<file>.
        self._commit = config.parent.name
        self._snapshot = config.parent
        self._vision = config.parents[2] / "vision" / self._commit
        self.source = f"{repo_id}@{self._commit}"

    def json(self, name: str) -> dict[str, Any] | None:
        path = self._download(name)
        return None if path is None else parse_json(path, f"{name} of {self.source}")

    def exists(self, name: str) -> bool:
        if self._at_hand(name):
            return True
        if constants.HF_HUB_OFFLINE:
            return False
        with self._explained(name):
            return HfApi().file_exists(self._repo_id, name, revision=self._commit)

    def shards(self) -> list[str]:
        if constants.HF_HUB_OFFLINE:
            directories = (self._snapshot, self._vision)
            if held := {path.name for directory in directories for path in directory.glob("*.safetensors")}:
                return sorted(held)
            raise CheckpointError(self._explanation(OfflineModeIsEnabled(), "model.safetensors"))
        with self._explained("its list of files"):
            siblings = HfApi().model_info(self._repo_id, revision=self._commit).siblings or []
        names = (sibling.rfilename for sibling in siblings)
        return sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)

    def header(self, shard: str) -> list[StoredTensor]:
        where = f"{shard} of {self.source}"
        path = self._at_hand(shard)
        if path is None:
            received = bytearray()
            try:
                size = self._read(shard, 0, PREAMBLE_BYTES, received.extend)
                length = header_length(bytes(received), where)
                received.clear()
                self._read(shard, PREAMBLE_BYTES, PREAMBLE_BYTES + length, received.extend)
                return parse_header(bytes(received), where, size)
            except _RangesIgnoredError:
                logger.warning("%s does not serve byte ranges: downloading %s whole", constants.ENDPOINT, shard)
                path = self._download(shard)
            if path is None:
                raise AbsentError(f"{self.source} lacks {shard}")
        return read_header(path, where)

    def fetch(self, shard: str, tensors: Iterable[StoredTensor], received: Callable[[int], None]) -> Path:
        path = self._at_hand(shard)
        if path is not None:
            return path
        ordered = sorted(tensors, key=lambda tensor: tensor.start)
        self._vision.mkdir(parents=True, exist_ok=True)
        needed, free = sum(tensor.end - tensor.start for tensor in ordered), shutil.disk_usage(self._vision).free
        if free < needed:
            needed_mb, free_mb = apart(needed / 1e6, free / 1e6)
            raise CheckpointError(
                f"the vision tensors of {shard} take {needed_mb} MB, and the hub's cache has {free_mb} MB free: free some "
                "space there, or set HF_HOME to another place"
            )
        # Under a name of its own until it is whole, so that neither a crash nor a second process leaves half a file.
        part = self._vision / f"{shard}.{uuid.uuid4().hex}.part"
        try:
            with part.open("wb") as file:

                def write(piece: bytes) -> None:
                    file.write(piece)
                    received(len(piece))

                file.write(pack_header((t.name, t.dtype, t.shape, t.end - t.start) for t in ordered))
                for start, end in _runs(ordered):
                    self._read(shard, start, end, write)
            part.replace(self._vision / shard)
        finally:
            part.unlink(missing_ok=True)
        return self._vision / shard

    def _at_hand(self, name: str) -> Path | None:
        """The file in the cache, or our cut of it."""
        cached = try_to_load_from_cache(self._repo_id, name, cache_dir=self._cache_dir, revision=self._commit)
        if isinstance(cached, str):
            return Path(cached)
        cut = self._vision / name
        return cut if cut.is_file() else None

    def _download(self, name: str) -> Path | None:
        """The whole file, None if the repository has no such file."""
        cached = try_to_load_from_cache(self._repo_id, name, cache_dir=self._cache_dir, revision=self._commit)
        if cached is not None:  # a path, or the note that the commit has no such file
            return Path(cached) if isinstance(cached, str) else None
        # A cache that another program filled has no such notes: offline, what is not there counts as not existing.
        if constants.HF_HUB_OFFLINE:
            return None
        with self._explained(name):
            try:
                return Path(hf_hub_download(self._repo_id, name, revision=self._commit, cache_dir=self._cache_dir))
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                return None

    def _read(self, shard: str, start: int, end: int, sink: Callable[[bytes], object]) -> int:
        """Pass bytes start…end of a remote file to `sink`, going on where a broken connection left off. Returns the
        size of the whole file in bytes.

        Raises:
            _RangesIgnoredError: if the server answers with the whole file; nothing of it is read.
            CheckpointError: if the file is absent or shorter, or cannot be read to the end.
        """
        url = hf_hub_url(self._repo_id, shard, revision=self._commit)
        position, stalls = start, 0
        while True:
            before = position
            broken: Exception | None = None
            # The HTTP client drops the token where the hub redirects to a storage host.
            headers = {**build_hf_headers(), "Range": f"bytes={position}-{end - 1}", "Accept-Encoding": "identity"}
            with (
                self._explained(shard),
                http_stream_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response,
            ):
                hf_raise_for_status(response)
                served = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
                if response.status_code != 206 or served is None:
                    raise _RangesIgnoredError
                if int(served[1]) != position:
                    raise CheckpointError(f"{constants.ENDPOINT} served other bytes of {shard} than were asked for")
                file_bytes = int(served[2])
                if file_bytes < end:
                    raise CheckpointError(
                        f"{shard} of {self.source} is truncated: it has {file_bytes} bytes, not {end}"
                    )
                try:
                    for chunk in response.iter_bytes():
                        piece = chunk[: end - position]
                        sink(piece)
                        position += len(piece)
                except OSError:  # our own disk
                    raise
                except Exception as error:  # the HTTP client's, see _explained
                    broken = error
            if position == end:
                return file_bytes
            stalls = stalls + 1 if position == before else 0
            logger.info("%s broke off at byte %d of %d, going on from there (%s)", shard, position, end, broken)
            if stalls > _MAX_STALLS:
                raise CheckpointError(
                    f"{constants.ENDPOINT} keeps breaking off in {shard} at byte {position}"
                ) from broken

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Turn what huggingface_hub raises into a CheckpointError that says what to do."""
        try:
            yield
        except (CheckpointError, _RangesIgnoredError):
            raise
        except LocalEntryNotFoundError as error:
            raise CheckpointError(self._explanation(error, name)) from error
        except EntryNotFoundError as error:
            raise AbsentError(f"{self._repo_id} lacks {name}, which its index lists") from error
        except Exception as error:  # what the HTTP client raises varies with the hub library's version
            if isinstance(error, OSError) and error.errno is not None:  # our own disk
                raise
            raise CheckpointError(self._explanation(error, name)) from error

    def _explanation(self, error: Exception, name: str) -> str:
        repo_id, endpoint = self._repo_id, constants.ENDPOINT
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        if isinstance(cause, HFValidationError):
            return f"{repo_id!r} is neither a directory here nor a hub id such as 'Qwen/Qwen2.5-VL-3B-Instruct'"
        if isinstance(cause, GatedRepoError):
            return f"{repo_id} is gated: accept its licence at {endpoint}/{repo_id} and set HF_TOKEN to your token"
        if isinstance(cause, RevisionNotFoundError):
            return f"{repo_id} has no revision {self._revision!r}: give a branch, a tag or a commit of it"
        if isinstance(cause, RepositoryNotFoundError):
            return f"{endpoint} shows no model {repo_id}: check the name, and set HF_TOKEN if the model is private"
        if isinstance(cause, OfflineModeIsEnabled):
            return (
                f"HF_HUB_OFFLINE is set and the cache has no {name} of {repo_id}: unset it, or give a local directory"
            )
        if status in (401, 403):
            return f"{endpoint} refuses {name} of {repo_id} ({status}): set HF_TOKEN to a token that may read it"
        if status is not None:
            return f"{endpoint} answered {status} for {name} of {repo_id}: try again later"
        return f"{endpoint} could not be reached for {name} of {repo_id} ({cause}): check the network and HF_ENDPOINT"


def _runs(tensors: Iterable[StoredTensor]) -> Iterator[tuple[int, int]]:
    """Byte ranges (start, end) that cover tensors in the order of their positions, neighbours joined."""
    run: tuple[int, int] | None = None
    for tensor in tensors:
        if run is not None and tensor.start == run[1]:
            run = (run[0], tensor.end)
        else:
            if run is not None:
                yield run
            run = (tensor.start, tensor.end)
    if run is not None:
        yield run
