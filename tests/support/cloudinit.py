"""Debian's cloud-init, unpacked instead of installed: installed, it would change this host at its next boot."""

import contextlib
import hashlib
import json
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.debian import ENVIRONMENT, LIMIT_S, run
from tools.debian_image import made_once
from tools.debian_kernel import cache_dir

INSIDE = Path(__file__).with_name("cloudinit_inside.py")
PYTHON = "/usr/bin/python3"  # the Python that the packaged modules are for
PACKAGES = (
    "cloud-init",
    "python3-attr",
    "python3-configobj",
    "python3-json-pointer",
    "python3-jsonpatch",
    "python3-jsonschema",
    "python3-netifaces",
    "python3-pyrsistent",
    "python3-serial",
)  # fmt: skip - and, of ansible-core, jinja2, oauthlib, requests and yaml
MODULES = "usr/lib/python3/dist-packages"
# Without the modules that change a guest's disks and services.  The image's default user is called debian.
CONFIG = """\
datasource_list: [NoCloud, None]
disable_root: true
ssh_deletekeys: false
ssh_genkeytypes: [ed25519]
users: [default]
cloud_init_modules: [set_hostname, update_hostname, update_etc_hosts, users-groups, ssh]
cloud_config_modules: []
cloud_final_modules: []
def_log_file: /var/log/cloud-init.log
system_info:
  distro: debian
  network: {renderers: [networkd]}
  default_user:
    name: debian
    lock_passwd: true
    groups: [adm, sudo]
    sudo: ["ALL=(ALL) NOPASSWD:ALL"]
    shell: /bin/bash
  paths: {cloud_dir: /var/lib/cloud/, templates_dir: /etc/cloud/templates/}
"""


@cache
def unpacked() -> Path:
    """Return the folder of the unpacked cloud-init.  Raises DebianError."""
    tree = cache_dir() / f"cloud-init-{hashlib.sha256(repr(PACKAGES).encode()).hexdigest()[:12]}"
    with made_once(tree) as fresh:
        if fresh:
            with tempfile.TemporaryDirectory(dir=fresh.parent) as scratch:
                run("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *PACKAGES, cwd=Path(scratch))
                for archive in Path(scratch).glob("*.deb"):
                    run("dpkg", "-x", archive, fresh)
    return tree


@contextlib.contextmanager
def loops(discs: Iterable[Path]) -> Iterator[list[str]]:
    """Attach a loop device to each disc while the context lasts."""
    with contextlib.ExitStack() as stack:
        found = []
        for disc in discs:
            done = subprocess.run(["losetup", "-r", "-f", "--show", disc], check=True, capture_output=True, text=True)
            found.append(done.stdout.strip())
            stack.callback(subprocess.run, ["losetup", "-d", found[-1]], check=True)
        yield found


def ask(wanted: dict[str, Any]) -> dict[str, Any]:
    """Run `cloudinit_inside.py` with a request, in namespaces of its own; return its answer."""
    tree = unpacked()
    apart = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--net", "--uts", "--ipc"]
    done = subprocess.run(
        ["timeout", "--kill-after=5", str(LIMIT_S), *apart, PYTHON, "-I", str(INSIDE)],
        input=json.dumps({**wanted, "tree": str(tree), "modules": MODULES, "config": CONFIG}),
        env=ENVIRONMENT, capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def booted(
    guests: Sequence[Sequence[tuple[Path, dict[str, Any]]]],
    work: Path,
    *,
    documents: Sequence[bytes] = (),
    networks: Sequence[tuple[dict[str, str], bytes]] = (),
) -> dict[str, Any]:
    """Boot guests one after the other, each once for every pair of a disc and a request.

    A request may have `interfaces` (names and Ethernet addresses), `show` (files to return), `commands` (for sh; their
    output is returned), and `remove` (files to delete before the boot).  In the answer, `boots` has the result of every
    boot, `schema` the errors of each document, and `rendered` the files that each network-config becomes on a host with
    the given interfaces, by kind.
    """
    discs = sorted({disc for guest in guests for disc, _ in guest})
    usual: dict[str, Any] = {"interfaces": {}, "show": [], "commands": []}
    with loops(discs) as found:
        at = dict(zip(discs, found, strict=True))
        return ask(
            {
                "boots": [[{**usual, **wish, "loop": at[disc]} for disc, wish in guest] for guest in guests],
                "work": str(work),
                "documents": [document.decode() for document in documents],
                "networks": [(interfaces, document.decode()) for interfaces, document in networks],
            }
        )
