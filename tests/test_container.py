"""What can be held of the image without building it. `make container-proof` builds it and runs it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from deploy.rootfs.context import Context
from deploy.rootfs.dockerfile import Dockerfile, DockerfileError, expand
from sidecar.settings import Settings

ROOT = Path(__file__).parents[1]
DOCKERFILE = Dockerfile.parse((ROOT / "deploy" / "Dockerfile").read_text())
DEFAULT = DOCKERFILE.lineage(DOCKERFILE.stages[-1].name)
CONTEXT = Context(ROOT)


def last(keyword):
    """The instruction that counts in the image that is built without --target."""
    return [instruction for stage in DEFAULT for instruction in stage.all(keyword)][-1]


def environment():
    return {name: value for stage in DEFAULT for each in stage.all("ENV") for name, value in each.pairs().items()}


def pins():
    lines = (ROOT / "deploy" / "constraints.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name.replace("_", "-").lower(): requirement for requirement in pinned}


def test_every_file_that_is_copied_is_there():
    copies = [copy for stage in DOCKERFILE.stages for copy in stage.all("COPY") if copy.flag("from") is None]
    sources = [source for copy in copies for source in copy.text.split()[:-1]]
    assert sources
    for source in sources:
        assert list(CONTEXT.files(source)), f"COPY {source}"


def test_the_context_holds_the_package_and_nothing_else(tmp_path):
    ignore = (ROOT / ".dockerignore").read_text()
    names = ["pyproject.toml", "deploy/constraints.txt", "sidecar/server/app.py", "export/photos/a.jpg"]
    refused = [".env", ".git/config", "artifacts/a/manifest.json", "deploy/Dockerfile", "tests/a.py", "id_rsa"]
    refused += ["sidecar/__pycache__/a.cpython-311.pyc", "export/__pycache__/b.pyc", ".venv/bin/python"]
    for name in (*names, *refused):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".dockerignore").write_text(ignore)
    assert sorted(Context(tmp_path).files("/")) == sorted(names)


def test_the_default_image_is_the_one_without_an_artifact():
    assert [stage.name for stage in DEFAULT[:-1]] == ["base", "serve"]
    assert not DEFAULT[-1].instructions


def test_every_stage_has_debians_python_of_one_base():
    for name in ("dependencies", "package", "serve", "baked"):
        assert DOCKERFILE.lineage(name)[0].name == "base"
    assert re.fullmatch(r"debian:\w+-slim", DOCKERFILE.stage("base").base)


def test_the_user_is_a_number_and_not_root():
    user, _, group = last("USER").text.partition(":")
    assert int(user) > 0
    assert int(group) > 0


def test_signals_reach_the_server_itself():
    assert last("ENTRYPOINT").text.startswith("["), "the shell form would put a shell before the server"
    assert last("CMD").text.startswith("[")
    assert last("STOPSIGNAL").text == "SIGTERM"


def test_the_health_check_fails_with_the_one_code_that_engines_know():
    check = last("HEALTHCHECK")
    nobody = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "EPD_SERVER": "127.0.0.1:1"}
    command = check.command(check.text.removeprefix("CMD").strip())
    answer = subprocess.run(command, cwd=ROOT, env=nobody, capture_output=True, text=True)
    assert (answer.returncode, answer.stdout, answer.stderr[:17]) == (1, "", "no server answers")


def test_the_health_check_ends_by_itself_before_an_engine_ends_it():
    check = last("HEALTHCHECK")
    own_s = re.search(r"health --timeout (\d+)", check.text)
    assert own_s
    assert float(own_s[1]) < float(check.flag("timeout").removesuffix("s"))


def test_ports_are_those_that_are_listened_on():
    listened = {environment()[name].rpartition(":")[2] for name in ("EPD_LISTEN", "EPD_METRICS_LISTEN")}
    assert set(last("EXPOSE").text.split()) == listened


def test_every_variable_is_a_setting():
    known = {f"EPD_{setting.name.upper()}" for setting in fields(Settings)}
    assert {name for name in environment() if name.startswith("EPD_")} <= known


def test_nothing_secret_is_written_into_a_layer():
    for stage in DOCKERFILE.stages:
        for instruction in (*stage.all("ENV"), *stage.all("ARG"), *stage.all("LABEL")):
            assert not re.search(r"(?i)token|password|secret|credential|private|://\S*@", instruction.text), instruction
        for run in stage.all("RUN"):
            assert not re.search(r"(?i)--(extra-)?index-url|--trusted-host|https?://", run.text), run


def test_what_apt_leaves_behind_is_removed_where_it_was_made():
    installs = [run for stage in DOCKERFILE.stages for run in stage.all("RUN") if "apt-get install" in run.text]
    assert installs
    for run in installs:
        assert "apt-get update" in run.text
        assert "--no-install-recommends" in run.text
        assert "rm -rf /var/lib/apt/lists/*" in run.text


def test_pip_has_its_cache_and_takes_a_mirror_as_a_secret():
    pip = [run for stage in DOCKERFILE.stages for run in stage.all("RUN") if "/pip " in run.text]
    assert pip
    for run in pip:
        mounts = [value for name, value in run.flags if name == "mount"]
        assert [dict(option.split("=") for option in mount.split(","))["type"] for mount in mounts] == [
            "cache",
            "secret",
        ]


def test_labels_say_what_it_is():
    named = {name.removeprefix("org.opencontainers.image.") for name in last("LABEL").pairs()}
    assert {"title", "description", "licenses", "version", "revision", "base.name"} <= named


def test_every_dependency_is_pinned_within_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [
        text for name in ("onnx", "otel", "torch", "urls") for text in project["optional-dependencies"].get(name, ())
    ]
    for text in (*project["dependencies"], *extras):
        wanted = Requirement(text)
        (pin,) = pins()[wanted.name.lower()].specifier
        assert pin.operator == "=="
        assert wanted.specifier.contains(pin.version), text


def test_only_an_extra_brings_torch():
    assert expand("${EXTRAS}", DOCKERFILE.stage("dependencies").all("ARG")[0].pairs()) == ""


def test_a_dockerfile_is_read_as_docker_reads_it():
    (stage,) = Dockerfile.parse(
        'ARG TAG=1\nFROM a:${TAG} AS b\n# no\nRUN --mount=type=x one \\\n# no\n  two\nCMD ["c"]'
    ).stages
    run, command = stage.instructions
    assert (stage.name, stage.base, run.line) == ("b", "a:1", 4)
    assert (run.flag("mount"), run.text.split()) == ("type=x", ["one", "two"])
    assert run.command()[:2] == ["/bin/sh", "-c"]
    assert command.command() == ["c"]


@pytest.mark.parametrize("text", ["ADD a b", "FROM a\nSHELL x", "RUN x", "FROM a b c d", "FROM a\nRUN x \\"])
def test_what_the_proof_does_not_know_it_refuses(text):
    with pytest.raises(DockerfileError):
        Dockerfile.parse(text)


def test_variables_have_defaults():
    assert expand("$A-${B}-${C:-c}-${A:-d}", {"A": "a"}) == "a--c-a"
