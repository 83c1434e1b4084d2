"""What has run on a machine before, and what a process died of, as the compile cache's directory remembers it."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from sidecar.runtimes import cache
from sidecar.runtimes.base import Load
from sidecar.runtimes.tried import Tried, combination
from sidecar.vision.dtypes import DType
from sidecar.vision.spec import PixelSpec, TowerSpec

TOWER = TowerSpec(
    depth=1, hidden_size=8, num_heads=2, intermediate_size=8, out_hidden_size=4, fullatt_block_indexes=(0,)
)


def load(**changes: object) -> Load:
    known = {"graph": Path("graph.xml"), "precision": "f32", "tower": TOWER, "pixels": PixelSpec()}
    return Load(**{**known, "output_dtype": DType.FLOAT32, "threads": 2, **changes})  # type: ignore[arg-type]


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A root with a /proc and a /sys."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor: 0\nmodel name: A\nflags: sse\ncpu MHz: 1\n\nprocessor: 1\n")
    cpus = tmp_path / "sys/devices/system/cpu"
    cpus.mkdir(parents=True)
    (cpus / "online").write_text("0-3\n")
    return tmp_path


def test_what_a_crash_may_depend_on_makes_another_combination(machine: Path) -> None:
    def name(content: str = "a", **changes: object) -> str:
        return Tried(None, combination("openvino", content, load(**changes), machine)).name

    first = name()
    assert name() == first
    others = [name("b"), name(precision="bf16"), name(threads=3), name(device="ov:GPU"), name(streams=2)]
    (machine / "sys/devices/system/cpu/online").write_text("0,2-3\n")
    others.append(name())
    (machine / "proc/cpuinfo").write_text("processor: 0\nmodel name: A\nflags: sse avx\n")
    others.append(name())
    assert len({first, *others}) == 8


def test_the_speed_that_a_cpu_has_just_now_does_not_matter(machine: Path) -> None:
    before = combination("openvino", "a", load(), machine)
    info = machine / "proc/cpuinfo"
    info.write_text(info.read_text().replace("MHz: 1", "MHz: 2"))
    assert combination("openvino", "a", load(), machine) == before


def test_a_load_that_ended_is_no_crash(tmp_path: Path) -> None:
    tried = Tried(tmp_path, {"a": "b"})
    assert not tried.passed() and not tried.was_cut_short()
    tried.begin()
    assert not Tried(tmp_path, {"a": "b"}).was_cut_short(), "it is being loaded at this moment"
    tried.end()
    assert not tried.was_cut_short()
    tried.pass_()
    assert Tried(tmp_path, {"a": "b"}).passed() and not Tried(tmp_path, {"a": "c"}).passed()


def _die(directory: Path) -> None:
    Tried(directory, {"a": "b"}).begin()
    os._exit(1)


def test_a_process_that_died_while_it_loaded_is_remembered(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_die, args=(tmp_path,))
    process.start()
    process.join()
    tried = Tried(tmp_path, {"a": "b"})
    assert tried.was_cut_short().startswith("20")
    tried.begin()
    tried.end()
    assert not tried.was_cut_short()


def test_the_compile_cache_takes_none_of_it_for_a_model(tmp_path: Path) -> None:
    tried = Tried(tmp_path, {"a": "b"})
    tried.begin()
    tried.pass_()
    cache.discard_changed(tmp_path)
    cache.record(tmp_path)
    assert tried.passed() and not list(tmp_path.glob("*.sha256"))
    tried.end()


def test_without_a_directory_nothing_is_known() -> None:
    tried = Tried(None, {"a": "b"})
    tried.begin()
    tried.pass_()
    tried.end()
    assert not tried.passed() and not tried.was_cut_short()
