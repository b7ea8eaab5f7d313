"""Runs the boot of cloud-init as a guest with a seed does.  `cloudinit.py` starts it with Debian's Python.

It is pid 1 of namespaces of its own, with throw-away copies of /etc, /var and /usr/sbin, and an empty /home, /root,
/run and /dev.  Everything else is read-only.  It reads its request as JSON from standard input and writes its answer
as JSON to standard output.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

# Mounts discs where the kernel has no ISO 9660.
HELPER = """#!/bin/sh
set -e
mount -t tmpfs seed "$2"
exec xorriso -osirrox on -indev "stdio:$1" -extract / "$2" >&2
"""
NODES = ("null", "zero", "full", "random", "urandom", "tty")
KINDS = {"eni": "debian", "netplan": "ubuntu", "networkd": "arch", "sysconfig": "rhel", "network-manager": "fedora"}
MOUNTS = "/proc/self/mountinfo"
CLOUD = Path("/etc/cloud")
INSTANCE = Path("/var/lib/cloud/instance")
HOST_KEY = Path("/etc/ssh/ssh_host_ed25519_key")
LOG = Path("/var/log/cloud-init.log")


def run(*command: str) -> str:
    """Run a program to its end; return its output."""
    done = subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    return done.stdout


def prepare(work: str, tree: str, loops: list[str]) -> None:
    """Make private copies of what cloud-init changes and the rest read-only; bind cloud-init to `work`/tree."""
    of_host = [line.split()[4].encode().decode("unicode_escape") for line in Path(MOUNTS).read_text().splitlines()]
    run("mount", "--make-rprivate", "/")
    run("mount", "-t", "tmpfs", "work", work)
    Path(work, "tree").mkdir()
    run("mount", "--bind", tree, f"{work}/tree")
    dev, discs = Path(work, "dev"), Path(work, "discs")
    for folder, paths in (dev, [f"/dev/{name}" for name in NODES]), (discs, loops):
        folder.mkdir()
        for path in paths:
            node = folder / Path(path).name
            node.touch()
            run("mount", "--bind", path, str(node))
    for place in ("/etc", "/var", "/usr/sbin"):
        upper, scratch = (Path(work, place[1:].replace("/", "-") + end) for end in ("", "-work"))
        upper.mkdir()
        scratch.mkdir()
        run("mount", "-t", "overlay", "-o", f"lowerdir={place},upperdir={upper},workdir={scratch}", "overlay", place)
    for place in of_host:
        # Fails for mounts that later ones hide.  They cannot be reached anyway.
        subprocess.run(["mount", "-o", "remount,bind,ro", place], check=False, capture_output=True)
    for place in ("/home", "/root", "/run"):
        run("mount", "-t", "tmpfs", "-o", "mode=755", "empty", place)
    assert not any(os.access(place, os.W_OK) for place in ("/", "/usr", "/usr/local", "/opt", "/srv", "/boot", tree))
    run("mount", "-t", "sysfs", "sysfs", "/sys")
    run("mount", "--rbind", str(dev), "/dev")
    if "iso9660" not in Path("/proc/filesystems").read_text():
        helper = Path("/usr/sbin/mount.iso9660")
        helper.write_text(HELPER)
        helper.chmod(0o755)


def configure(work: str, config: str) -> None:
    """Install the package's files of /etc with our settings; remove everything from earlier boots."""
    shutil.rmtree(CLOUD, ignore_errors=True)
    shutil.copytree(Path(work, "tree/etc/cloud"), CLOUD)
    Path(CLOUD, "cloud.cfg").write_text(config)
    shutil.rmtree("/var/lib/cloud", ignore_errors=True)
    LOG.unlink(missing_ok=True)
    HOST_KEY.parent.mkdir(exist_ok=True)
    HOST_KEY.touch()  # so that cloud-init makes none


def interfaces(addresses: dict[str, str]) -> None:
    """Create interfaces with these names and Ethernet addresses, and remove all others."""
    for link in json.loads(run("ip", "-json", "link", "show", "type", "veth")):
        if not link.get("ifname", "-end").endswith("-end"):
            run("ip", "link", "delete", link["ifname"])
    for name, address in addresses.items():
        run("ip", "link", "add", name, "address", address, "type", "veth", "peer", "name", f"{name}-end")


def stage(*arguments: str) -> int:
    """Run cloud-init in a process of its own; return its status."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        os.dup2(2, 1)
        status = importlib.import_module("cloudinit.cmd.main").main(["cloud-init", *arguments])
    except SystemExit as error:
        status = int(error.code or 0)
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status or 0)


def boot(work: str, what: dict[str, Any]) -> dict[str, Any]:
    """Boot once; return the requested files and outputs."""
    for path in what.get("remove", ()):
        Path(path).unlink()
    for folder in ("/run/cloud-init", "/run/blkid"):
        shutil.rmtree(folder, ignore_errors=True)
    os.truncate(LOG, 0) if LOG.exists() else LOG.touch()
    interfaces(what["interfaces"])
    disc = Path(what["loop"])  # the only disc that this guest sees
    disc.touch()
    run("mount", "--bind", str(Path(work, "discs", disc.name)), str(disc))
    statuses = [stage("init", "--local"), stage("init")]
    run("umount", str(disc))
    disc.unlink()
    return {
        "statuses": statuses,
        "instance": Path("/var/lib/cloud/data/instance-id").read_text().strip(),
        "complaints": [line for line in LOG.read_text().splitlines() if "WARNING" in line or "ERROR" in line],
        "hostname": os.uname().nodename,
        "interfaces": {
            name: Path("/sys/class/net", name, "address").read_text().strip()
            for name in os.listdir("/sys/class/net")
            if name != "lo" and not name.endswith("-end")
        },
        "files": {path: text(path) for path in what["show"]},
        "commands": [run("sh", "-c", command) for command in what["commands"]],
    }


def text(path: str) -> str | None:
    """Return the text of a file; None if it does not exist."""
    try:
        return Path(path).read_bytes().decode(errors="backslashreplace")
    except FileNotFoundError:
        return None


def schema(documents: list[str]) -> list[str]:
    """Return the output of `cloud-init schema` for each document."""
    main = importlib.import_module("cloudinit.config.schema")
    yaml = importlib.import_module("yaml")
    wanted, said = main.get_schema(), []
    for document in documents:
        try:
            main.validate_cloudconfig_schema(yaml.safe_load(document), schema=wanted, strict=True)
        except main.SchemaValidationError as error:
            said.append(str(error))
        else:
            said.append("")
    return said


def render(work: str, addresses: dict[str, str], document: str) -> dict[str, dict[str, str | None]]:
    """Return the files of each kind of network configuration that a network-config is rendered to."""
    interfaces(addresses)
    source = Path(work, "network-config")
    source.write_text(document)
    found: dict[str, dict[str, str | None]] = {}
    for kind, system in KINDS.items():
        target = Path(work, kind)
        target.mkdir(exist_ok=True)
        options = ("-p", str(source), "-k", "yaml", "-d", str(target), "-D", system, "-O", kind)
        assert stage("devel", "net-convert", *options) == 0, kind
        paths = [path for path in sorted(target.rglob("*")) if path.is_file()]
        found[kind] = {str(path.relative_to(target)): text(str(path)) for path in paths}
        shutil.rmtree(target)
    return found


def main() -> None:
    """Carry out the request."""
    wanted = json.load(sys.stdin)
    work = wanted["work"]
    prepare(work, wanted["tree"], sorted({each["loop"] for guest in wanted["boots"] for each in guest}))
    sys.path[:0] = [str(Path(work, "tree", wanted["modules"]))]
    importlib.import_module("cloudinit.cmd.main")
    boots = []
    for guest in wanted["boots"]:
        configure(work, wanted["config"])
        boots.append([boot(work, each) for each in guest])
    rendered = [render(work, *network) for network in wanted["networks"]]
    json.dump({"boots": boots, "schema": schema(wanted["documents"]), "rendered": rendered}, sys.stdout)


if __name__ == "__main__":
    main()
