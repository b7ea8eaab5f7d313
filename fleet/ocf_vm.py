#!/usr/bin/python3 -I
"""The resource agent ocf:vmd:vm: a VM of vmd(8) as a resource of Pacemaker.

The cluster runs it with the action as its argument and everything else in the environment (OCF resource agent API
1.1).  It uses vmctl(8) for everything.  vmd-ocf(7) is its manual page.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

SUCCESS, GENERIC, ARGUMENTS, UNIMPLEMENTED, PERMISSION, INSTALLED, CONFIGURED, NOT_RUNNING = range(8)
NO_DAEMON, NO_SUCH_VM = 3, 4  # exit statuses of vmctl
BETWEEN_S = 0.5  # between two checks while we wait for something
FORCE_S = 15.0  # the part of the timeout of a stop that is left for killing the VM
SLACK_S = 2.0  # the part of the timeout of any action that is left for its report
NAME = re.compile(r"(?!\d+$)[A-Za-z0-9][A-Za-z0-9._-]*")  # digits alone would be an id
SERVES = {"running", "paused", "starting", "waiting", "stopping", "sending", "receiving", "saving"}
VMCTL = "vmctl"  # an installation writes its path here

PARAMETERS = (  # name, whether it is unique for each resource, type, default, short and long description
    ("name", 1, "string", "", "Name of the VM", "A VM of vm.conf(5).  The default is the name of the resource."),
    (
        "socket", 0, "string", "/run/vmd.sock", "Control socket",
        "The socket of the daemon, the same at all nodes.",
    ),
    (
        "shell", 0, "string", "ssh", "Remote shell",
        "The command by which a migration runs vmctl at the other node, as vmctl migrate -e.",
    ),
    (
        "host_suffix", 0, "string", "", "Suffix of host names",
        "Appended to the name of a node to get the host of a migration, such as -cluster for another network.",
    ),
    (
        "trust_disks", 0, "boolean", "false", "Disks of both nodes are the same",
        "Migrate although the storage does not carry locks from one node to the other, as vmctl migrate -f.",
    ),
    ("vmctl", 0, "string", VMCTL, "Program vmctl", "Its path, or its name if it is found in PATH."),
)  # fmt: skip
ACTIONS = (  # name, recommended minimum of the timeout in seconds, further attributes
    ("start", 90, ""), ("stop", 180, ""), ("monitor", 30, ' interval="10s" depth="0"'), ("migrate_to", 300, ""),
    ("migrate_from", 60, ""), ("validate-all", 20, ""), ("meta-data", 5, ""),
)  # fmt: skip


class Failed(Exception):
    """The action has failed: an exit status, and a sentence that the cluster shows."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status
        self.why = why


class Vm:
    """The VM of this resource."""

    def __init__(self, environment: dict[str, str]) -> None:
        given = {name: environment.get(f"OCF_RESKEY_{name}") or default for name, _, _, default, _, _ in PARAMETERS}
        # An instance of a clone is called name:number.
        self.name = given["name"] or environment.get("OCF_RESOURCE_INSTANCE", "").partition(":")[0]
        self.socket = given["socket"]
        self.shell = given["shell"]
        self.trusts = given["trust_disks"].lower() in {"1", "true", "yes", "on", "y", "t"}
        self.vmctl = given["vmctl"]
        self.target = environment.get("OCF_RESKEY_CRM_meta_migrate_target", "")
        self.host = self.target + given["host_suffix"]
        self.probed = environment.get("OCF_RESKEY_CRM_meta_interval", "0") == "0"
        self.deadline_s = time.monotonic() + max(
            float(environment.get("OCF_RESKEY_CRM_meta_timeout", "20000")) / 1000 - SLACK_S, SLACK_S
        )

    # --- vmctl -------------------------------------------------------------------------------------------------

    def call(self, *arguments: str, timeout_s: float | None = None) -> tuple[int, dict[str, Any]]:
        """Return the exit status of a command of vmctl, and its document.  Raises Failed if it cannot be run.

        After a timeout the status is -1, and the document has an error.
        """
        left_s = max(self.deadline_s - time.monotonic(), SLACK_S)
        command = [self.vmctl, "-s", self.socket, arguments[0], "--json", *arguments[1:]]
        try:
            ran = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=left_s if timeout_s is None else min(timeout_s, left_s),
                check=False,
            )
        except subprocess.TimeoutExpired:
            return -1, {"error": f"vmctl {arguments[0]}: not done in time", "code": errno.ETIMEDOUT}
        except OSError as error:
            raise Failed(INSTALLED, f"{self.vmctl}: {error.strerror}") from None
        try:
            document: dict[str, Any] = json.loads(ran.stdout)
        except ValueError:
            said = ran.stderr.decode(errors="replace").strip().splitlines()
            document = {"error": said[-1] if said else f"vmctl {arguments[0]} ended with status {ran.returncode}"}
        return ran.returncode, document

    def look(self) -> dict[str, Any] | None:
        """Return the VM's row of `vmctl status`; None if there is no such VM, or no daemon and no guests.

        While guests of an earlier daemon run, wait for the next daemon.  Raises Failed.
        """
        while True:
            status, document = self.call("status", self.name)
            if status == 0:
                row: dict[str, Any] = document["vms"][0]
                return row
            if status == NO_SUCH_VM:
                return None
            if status != NO_DAEMON:
                raise Failed(GENERIC, str(document.get("error")))
            if not guests_live(self.socket):
                return None
            if time.monotonic() + BETWEEN_S > self.deadline_s:
                raise Failed(GENERIC, "guests run, but there is no vmd that knows them")
            time.sleep(BETWEEN_S)

    def wait(self, states: set[str], *, unless: set[str] = frozenset()) -> dict[str, Any]:  # type: ignore[assignment]
        """Wait until the VM is in one of these states, and return its row.  Raises Failed."""
        while True:
            row = self.look()
            if row is None:
                raise Failed(GENERIC, f"vm {self.name} is not there")
            if row["state"] in states:
                return row
            if row["state"] in unless or time.monotonic() + BETWEEN_S > self.deadline_s:
                raise Failed(GENERIC, f"vm {self.name} is {row['state']}{reason(row)}")
            time.sleep(BETWEEN_S)

    # --- actions -----------------------------------------------------------------------------------------------

    def monitor(self) -> int:
        """Return whether the VM runs.  Raises Failed if it runs, but has a problem."""
        row = self.look()
        if row is None or row["state"] == "stopped":
            if not self.probed:
                say(f"vm {self.name} does not run{reason(row)}")
            return NOT_RUNNING
        # A VM that an operator has paused has no text.  A VM that was paused because of a disk has one.
        if row["state"] not in SERVES or (row["state"] == "paused" and row["text"]):
            raise Failed(GENERIC, f"vm {self.name} is {row['state']}{reason(row)}")
        return SUCCESS

    def start(self) -> int:
        """Start the VM.  Wait while a disk is in use: storage may keep the locks of a lost node for some time."""
        self.validate()
        while True:
            row = self.look()
            if row is None:
                there = os.path.exists(self.socket)
                raise Failed(INSTALLED, f"vm {self.name} is not in vm.conf" if there else "vmd does not run here")
            if row["state"] in {"running", "paused"}:
                return self.monitor()
            if row["state"] == "stopped":
                status, document = self.call("start", self.name)
                if status == 0:
                    continue
                if document.get("code") != errno.EBUSY or time.monotonic() + BETWEEN_S > self.deadline_s:
                    raise Failed(GENERIC, str(document.get("error")))
            elif time.monotonic() + BETWEEN_S > self.deadline_s:
                raise Failed(GENERIC, f"vm {self.name} is {row['state']}{reason(row)}")
            time.sleep(BETWEEN_S)

    def stop(self) -> int:
        """Ask the guest to shut down.  Kill the VM if that takes too long, or if the guest cannot be asked."""
        row = self.look()
        if row is None or row["state"] == "stopped":
            return SUCCESS
        if row["state"] not in {"sending", "saving", "in doubt"}:
            left_s = self.deadline_s - time.monotonic() - FORCE_S
            status, _ = self.call("stop", "-w", self.name, timeout_s=max(left_s, SLACK_S))
            if status == 0 and self.is_down():
                return SUCCESS
        self.call("stop", "-f", "-w", self.name)
        while not self.is_down():
            if time.monotonic() + BETWEEN_S > self.deadline_s:
                raise Failed(GENERIC, f"vm {self.name} does not end")
            time.sleep(BETWEEN_S)
        return SUCCESS

    def is_down(self) -> bool:
        """Return whether the VM does not run."""
        row = self.look()
        return row is None or row["state"] == "stopped"

    def migrate_to(self) -> int:
        """Move the VM to another node.  On failure it continues here, or is in doubt, which the cluster resolves."""
        if not self.target:
            raise Failed(ARGUMENTS, "the cluster has not said where the vm is to go")
        options = ["-e", self.shell, *(["-f"] if self.trusts else [])]
        status, document = self.call("migrate", *options, self.name, self.host)
        if status:
            raise Failed(GENERIC, str(document.get("error")))
        return SUCCESS

    def migrate_from(self) -> int:
        """Wait until the VM has arrived here."""
        self.wait({"running", "paused"}, unless={"stopped", "in doubt"})
        return self.monitor()

    def validate(self) -> int:
        """Return SUCCESS if the VM can be a resource of this node.  Raises Failed."""
        if not NAME.fullmatch(self.name):
            raise Failed(CONFIGURED, f"invalid name of a vm: {self.name or '(none)'}")
        try:
            shell = shlex.split(self.shell)
        except ValueError as error:
            raise Failed(CONFIGURED, f"invalid shell: {self.shell}: {error}") from None
        if not shell:
            raise Failed(CONFIGURED, "empty shell")
        if shutil.which(self.vmctl) is None:
            raise Failed(INSTALLED, f"{self.vmctl}: no such program")
        status, document = self.call("status", self.name)
        if status == 0 and document["vms"][0]["autostart"]:
            raise Failed(INSTALLED, f"vm {self.name} is started by vmd itself: vm.conf must have it `disable`")
        return SUCCESS


def guests_live(socket: str) -> bool:
    """Return whether guests of an ended daemon still run.  They lock a file whose name is derived from its socket."""
    digest = hashlib.sha256(os.fsencode(os.path.abspath(socket))).hexdigest()
    try:
        fd = os.open(f"/run/vmd/guests-{digest[:16]}", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise Failed(PERMISSION, f"{error.filename}: {error.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def reason(row: dict[str, Any] | None) -> str:
    """Return the reason for the state of a VM, to be appended to a sentence; "" if there is none."""
    return f": {row['text']}" if row and row.get("text") else ""


def say(why: str) -> None:
    """Give the cluster a reason to show."""
    print(f"ocf-exit-reason:{why}", file=sys.stderr)


def meta_data() -> str:
    """Return the description of the agent for the cluster."""

    def line(name: str, unique: int, kind: str, default: str, short: str, long: str) -> str:
        return f"""<parameter name="{name}" unique="{unique}">
<longdesc lang="en">{long}</longdesc>
<shortdesc lang="en">{short}</shortdesc>
<content type="{kind}" default="{default}"/>
</parameter>"""

    parameters = "\n".join(line(*parameter) for parameter in PARAMETERS)
    actions = "\n".join(f'<action name="{name}" timeout="{seconds}s"{more}/>' for name, seconds, more in ACTIONS)
    return f"""<?xml version="1.0"?>
<!DOCTYPE resource-agent SYSTEM "ra-api-1.dtd">
<resource-agent name="vm" version="1.0">
<version>1.0</version>
<longdesc lang="en">A virtual machine of vmd(8).  Every node runs vmd, and its vm.conf(5) has the VM, `disable`.
The disks are on storage that all nodes share.  See vmd-ocf(7).</longdesc>
<shortdesc lang="en">Virtual machine of vmd</shortdesc>
<parameters>
{parameters}
</parameters>
<actions>
{actions}
</actions>
</resource-agent>"""


ACTS: dict[str, Callable[[Vm], int]] = {
    "start": Vm.start,
    "stop": Vm.stop,
    "monitor": Vm.monitor,
    "status": Vm.monitor,
    "migrate_to": Vm.migrate_to,
    "migrate_from": Vm.migrate_from,
    "validate-all": Vm.validate,
}


def main(arguments: list[str]) -> int:
    """Run the action; return the exit status for the cluster."""
    action = arguments[0] if arguments else ""
    if action == "meta-data":
        print(meta_data())
        return SUCCESS
    if action not in ACTS:
        print(f"usage: {os.path.basename(sys.argv[0])} {'|'.join([*ACTS, 'meta-data'])}", file=sys.stderr)
        return UNIMPLEMENTED
    try:
        return ACTS[action](Vm(dict(os.environ)))
    except Failed as failed:
        say(failed.why)
        return failed.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
