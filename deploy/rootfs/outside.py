"""What the outer machine knows about reaching its package registries, lent to a build for as long as one RUN.

Debian's sources, apt's and pip's settings, proxies and certificates are read from the machine's own tools: none of them is
written down here, and none may be left in an image.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SUITE = "bookworm"

_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
# The rest of pip's settings say how to install, which is the Dockerfile's affair.
_PIP_REGISTRY = ("index-url", "extra-index-url", "trusted-host", "proxy", "timeout", "default-timeout", "retries")
_APT_REGISTRY = re.compile(r"Acquire::(\S*Proxy\S*|Check-\S+|Retries|https?::\S+) ")


@dataclass(frozen=True, slots=True)
class Outside:
    """`place` is where in an image the loan appears."""

    place: str = "/run/outside"

    def lend(self, directory: Path) -> dict[str, str]:
        """Fill a directory with certificates and settings; `pip.conf` is the build secret of that name.

        Returns:
            The variables that make the tools use them from `place`.
        """
        variables = {name: os.environ[name] for name in _PROXIES if name in os.environ}
        certificates = Path(os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE") or _CERTIFICATES)
        lines = [f"{name} = {value}" for name, value in _pip_settings().items()]
        if certificates.is_file():
            shutil.copyfile(certificates, directory / "certificates.pem")
            lines.append(f"cert = {self.place}/certificates.pem")
        (directory / "pip.conf").write_text("\n".join(["[global]", *lines, ""]))
        dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout
        lines = [line for line in dump.splitlines() if _APT_REGISTRY.match(line)]
        (directory / "apt.conf").write_text("\n".join([*lines, ""]))
        return {**variables, "APT_CONFIG": f"{self.place}/apt.conf", "DEBIAN_FRONTEND": "noninteractive"}


def _pip_settings() -> dict[str, str]:
    """Where pip finds packages, less what names files of this machine. The environment's settings come first."""
    listing = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(
        listing, capture_output=True, text=True, check=False
    )  # a machine without pip has no settings
    settings: dict[str, str] = {}
    for line in sorted(listed.stdout.splitlines(), key=lambda line: not line.startswith("global.")):
        key, _, quoted = line.partition("=")
        name = key.rpartition(".")[2]
        value = " ".join(word for word in " ".join(shlex.split(quoted)).split() if not word.startswith(("file:", "/")))
        if name in _PIP_REGISTRY and value:
            settings[name] = value
    return settings


def debian_sources() -> list[str]:
    """Lines of a sources.list for the suite, from the machine's own sources; the first is the one to bootstrap from.

    Raises:
        RuntimeError: if apt has no source of Debian.
    """
    wanted = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(CODENAME) $(COMPONENT)"]
    filters = ["Created-By: Packages", "Origin: Debian"]
    output = subprocess.run([*wanted, *filters], capture_output=True, text=True, check=True).stdout
    rows = sorted({tuple(line.split()) for line in output.splitlines()}, key=lambda row: (len(row[2]), row))
    # Of a machine with another suite, only the place is of use.
    if not any(row[2] == SUITE for row in rows):
        rows = [(row[0], SUITE, SUITE, "main") for row in rows[:1]]
    lines = [f"deb {uri} {release} {component}" for uri, release, _, component in rows if component == "main"]
    if not lines:
        raise RuntimeError("apt has no source of Debian; run apt-get update, or add one")
    return lines


if __name__ == "__main__":
    print("\n".join(debian_sources()))  # noqa: T201
