"""Checkpoints on the hub: what is transferred, what is kept, and what is said when something is wrong.

A real huggingface_hub talks to a real HTTP server; see `hub_mirror.py`.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha1
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants, hf_hub_download
from safetensors.torch import load, save_file

from export.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from export.files import pack_header
from export.synthetic import Layout, make_checkpoint
from sidecar.vision.checkpoint_files import read_header
from sidecar.vision.spec import VISION_PREFIXES
from tests.export.hub_mirror import COMMIT, REPO, Mirror, hub_mirror


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    """A mirror of a sharded toy checkpoint. huggingface_hub reads HF_ENDPOINT when it is imported, so what it then sets
    is set here; `test_environment_variables_choose_the_hub` goes through the variables."""
    make_checkpoint("toy", tmp_path / "repo", layout=Layout(files="sharded"))
    with hub_mirror(tmp_path / "repo") as mirror:
        point_at(mirror.url, monkeypatch)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(time, "sleep", lambda _: None)  # huggingface_hub's pauses between attempts
        yield mirror


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def remake(hub: Mirror, files: str) -> None:
    for path in hub.directory.iterdir():
        path.unlink()
    make_checkpoint("toy", hub.directory, layout=Layout(files=files))  # type: ignore[arg-type]


def open_from(hub: Mirror, tmp_path: Path) -> Checkpoint:
    return open_checkpoint(REPO, cache_dir=tmp_path / "cache")


def vision_tensors(shard: Path) -> list[tuple[int, int]]:
    return [(t.start, t.end) for t in read_header(shard, shard.name) if t.name.startswith(VISION_PREFIXES)]


def header_bytes(shard: Path) -> int:
    return 8 + int.from_bytes(shard.read_bytes()[:8], "little")


def assert_same(opened: Checkpoint, directory: Path) -> None:
    local = open_checkpoint(str(directory))
    assert opened.names == local.names
    assert all(torch.equal(tensor, local.tensor(name)) for name, tensor in opened)


def shuffle(path: Path) -> None:
    """Save a safetensors file anew, vision and language tensors mixed."""
    tensors = sorted(load(path.read_bytes()).items(), key=lambda entry: sha1(entry[0].encode()).digest())
    header = pack_header((name, "F32", tuple(tensor.shape), tensor.nbytes) for name, tensor in tensors)
    path.write_bytes(header + b"".join(tensor.numpy().tobytes() for _, tensor in tensors))


@pytest.mark.parametrize("files", ["single", "shuffled", "sharded"])
def test_exactly_the_vision_bytes_leave_the_hub(hub: Mirror, tmp_path: Path, files: str) -> None:
    remake(hub, "single" if files == "shuffled" else files)
    if files == "shuffled":
        shuffle(hub.directory / "model.safetensors")
    opened = open_from(hub, tmp_path)

    assert_same(opened, hub.directory)
    shards = sorted(hub.directory.glob("*.safetensors"))
    mixed = [shard for shard in shards if 0 < len(vision_tensors(shard)) < len(read_header(shard, shard.name))]
    language_only = [shard for shard in shards if not vision_tensors(shard)]
    assert mixed and bool(language_only) == (files == "sharded")  # else this test would not show much
    for shard in shards:
        wanted = {byte for start, end in vision_tensors(shard) for byte in range(start, end)}
        assert hub.sent(shard.name) == (wanted | set(range(header_bytes(shard))) if wanted else set())
    asked = {request.file for request in hub.requests}
    assert not asked & {shard.name for shard in language_only}
    assert not asked & {"tokenizer.json", "tokenizer_config.json", "chat_template.json", "generation_config.json"}


def test_a_commit_is_named_and_no_path(hub: Mirror, tmp_path: Path) -> None:
    assert open_from(hub, tmp_path).source == f"{REPO}@{COMMIT}"


def test_progress_ends_at_the_vision_towers_size(hub: Mirror, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    opened = open_checkpoint(
        REPO, cache_dir=tmp_path / "cache", progress=lambda done, total: seen.append((done, total))
    )
    total = sum(tensor.nbytes for _, tensor in opened)
    assert seen == sorted(seen) and seen[-1] == (total, total)


def test_a_second_time_nothing_is_transferred(hub: Mirror, tmp_path: Path) -> None:
    open_from(hub, tmp_path)
    hub.requests.clear()
    assert_same(open_from(hub, tmp_path), hub.directory)
    assert [(request.method, request.file) for request in hub.requests] == [
        ("HEAD", "config.json")
    ]  # is main the same?


def test_offline_what_was_fetched_still_opens(hub: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_from(hub, tmp_path)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same(open_from(hub, tmp_path), hub.directory)
    assert not hub.requests


def test_offline_with_only_configuration_in_the_cache_is_explained(
    hub: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_hub_download(REPO, "config.json", cache_dir=tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set and the cache has no model\.safetensors"):
        open_from(hub, tmp_path)
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set and the cache has no config\.json"):
        open_checkpoint(REPO, cache_dir=tmp_path / "empty")


def test_a_shard_that_the_cache_holds_whole_is_not_fetched_again(hub: Mirror, tmp_path: Path) -> None:
    for shard in hub.directory.glob("*.safetensors"):
        hf_hub_download(REPO, shard.name, cache_dir=tmp_path / "cache")
    hub.requests.clear()
    assert_same(open_from(hub, tmp_path), hub.directory)
    assert not hub.stored()


def test_a_cut_shard_does_not_pass_for_the_whole_one(hub: Mirror, tmp_path: Path) -> None:
    open_from(hub, tmp_path)
    for shard in hub.directory.glob("*.safetensors"):
        whole = hf_hub_download(REPO, shard.name, cache_dir=tmp_path / "cache")
        assert Path(whole).read_bytes() == shard.read_bytes()


def test_the_token_goes_to_the_hub_and_never_to_the_storage_host(
    hub: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_secret"
    with pytest.raises(CheckpointError, match=f"shows no model {REPO}: check the name, and set HF_TOKEN"):
        open_from(hub, tmp_path)
    hub.requests.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    open_from(hub, tmp_path)
    assert {request.token for request in hub.requests if request.host == "hub"} == {"hf_secret"}
    assert {request.token for request in hub.stored()} == {None}


def test_a_broken_connection_is_taken_up_where_it_broke(hub: Mirror, tmp_path: Path) -> None:
    remake(hub, "single")
    hub.drops_after = 100_000
    opened = open_from(hub, tmp_path)
    assert_same(opened, hub.directory)
    *_, broken, resumed = hub.stored()
    assert broken.sent == 100_000 and broken.first is not None
    assert resumed.first == broken.first + broken.sent
    assert not list(tmp_path.rglob("*.part"))


def test_a_server_without_ranges_sends_the_shards_with_vision_whole(
    hub: Mirror, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.serves_ranges = False
    with caplog.at_level(logging.WARNING):
        assert_same(open_from(hub, tmp_path), hub.directory)
    assert "does not serve byte ranges" in caplog.text
    needed = {shard.name for shard in hub.directory.glob("*.safetensors") if vision_tensors(shard)}
    assert {request.file for request in hub.stored()} == needed


def test_a_server_that_confuses_ranges_is_not_believed(hub: Mirror, tmp_path: Path) -> None:
    hub.confuses_ranges = True
    with pytest.raises(CheckpointError, match="served other bytes of model-00001"):
        open_from(hub, tmp_path)


def test_a_quantised_tower_is_refused_before_its_weights_are_transferred(hub: Mirror, tmp_path: Path) -> None:
    remake(hub, "single")
    path = hub.directory / "model.safetensors"
    tensors = load(path.read_bytes())
    tensors["visual.blocks.0.mlp.up_proj.qweight"] = torch.zeros(8, 8, dtype=torch.int32)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="quantised"):
        open_from(hub, tmp_path)
    assert hub.sent(path.name) == set(range(header_bytes(path)))


def test_what_the_hub_refuses_is_explained(hub: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="shows no model acme/other"):
        open_checkpoint("acme/other", cache_dir=tmp_path / "cache")
    with pytest.raises(CheckpointError, match="has no revision 'v9'"):
        open_checkpoint(REPO, revision="v9", cache_dir=tmp_path / "cache")
    with pytest.raises(CheckpointError, match="neither a directory here nor a hub id"):
        open_checkpoint("not a model!", cache_dir=tmp_path / "cache")
    hub.gated = True
    with pytest.raises(CheckpointError, match="is gated: accept its licence"):
        open_from(hub, tmp_path)
    hub.gated, hub.fails_with = False, 403
    with pytest.raises(CheckpointError, match=r"refuses config.json .* \(403\): set HF_TOKEN"):
        open_from(hub, tmp_path)
    hub.fails_with = 503
    with pytest.raises(CheckpointError, match=r"answered 503 for config.json"):
        open_from(hub, tmp_path)
    point_at("http://127.0.0.1:9", monkeypatch)  # "discard": nothing listens
    with pytest.raises(CheckpointError, match=r"could not be reached .* check the network and HF_ENDPOINT"):
        open_from(hub, tmp_path)


def test_damaged_repositories_are_explained(hub: Mirror, tmp_path: Path) -> None:
    shard = hub.directory / "model-00001-of-00004.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"model-00001.* is truncated"):
        open_checkpoint(REPO, cache_dir=tmp_path / "1")
    shard.write_bytes(whole[:500])
    with pytest.raises(CheckpointError, match=r"model-00001.* is truncated: it has 500 bytes"):
        open_checkpoint(REPO, cache_dir=tmp_path / "1")
    shard.write_bytes(b"x" * 1000)
    with pytest.raises(CheckpointError, match=r"model-00001.* is no safetensors file"):
        open_checkpoint(REPO, cache_dir=tmp_path / "2")
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00001.*, which its index lists"):
        open_checkpoint(REPO, cache_dir=tmp_path / "3")
    (hub.directory / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks vision tensors that its config\.json calls for"):
        open_checkpoint(REPO, cache_dir=tmp_path / "4")
    for shard in hub.directory.glob("*.safetensors"):
        shard.unlink()
    (hub.directory / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin \(pickle\).* give a checkpoint in safetensors"):
        open_checkpoint(REPO, cache_dir=tmp_path / "4")
    (hub.directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        open_checkpoint(REPO, cache_dir=tmp_path / "5")


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_a_cache_without_room_is_told_before_the_download(
    hub: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.hub.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"take \d+ MB, and the hub's cache has 0 MB free: .* HF_HOME"):
        open_checkpoint(REPO, cache_dir=tmp_path)


def test_shards_without_an_index_are_found_also_offline(
    hub: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = len(open_checkpoint(REPO, cache_dir=tmp_path / "indexed"))
    (hub.directory / "model.safetensors.index.json").unlink()
    assert len(open_checkpoint(REPO, cache_dir=tmp_path / "cache")) == expected
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(open_checkpoint(REPO, cache_dir=tmp_path / "cache")) == expected


def test_environment_variables_choose_the_hub(hub: Mirror, tmp_path: Path) -> None:
    hub.token = "hf_secret"
    script = f"from export.checkpoint import open_checkpoint; print(open_checkpoint({REPO!r}).source)"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path / "home")}
    for offline in ("0", "1"):
        run = subprocess.run(
            [sys.executable, "-c", script],
            env={**environment, "HF_HUB_OFFLINE": offline},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (run.returncode, run.stdout.strip()) == (0, f"{REPO}@{COMMIT}"), run.stderr
        assert bool(hub.requests) == (offline == "0")
        hub.requests.clear()
