"""The inventory plugin vmd.vmd.vmd."""

from __future__ import annotations

DOCUMENTATION = """
name: vmd
short_description: VMs of vmd as hosts of the inventory
description:
  - Runs C(vmctl status --json) on each host.
  - Each VM is in the group C(vmd), in C(vmd_STATE), such as C(vmd_running), and in C(vmd_on_HOST).
  - The variable C(vmd) of a VM is its row, see vmctl.schema.json, and C(vmd_host) is its host.  C(ansible_host) is the
    address of its first C(local interface), if there is one.
  - A VM that several hosts have, for example the hosts of a cluster, belongs to the host on which it runs.
options:
  plugin:
    description: V(vmd.vmd.vmd)
    type: str
    required: true
    choices: [vmd.vmd.vmd]
  hosts:
    description: The hosts to ask; for V(localhost) no shell is used.
    type: list
    elements: str
    default: [localhost]
  shell:
    description: The command that runs another one at a host.
    type: str
    default: ssh
"""

EXAMPLES = """
plugin: vmd.vmd.vmd
hosts: [n1, n2, n3]
"""

import json
import re
import shlex
import subprocess
from typing import Any

from ansible.errors import AnsibleParserError
from ansible.plugins.inventory import BaseInventoryPlugin

TIMEOUT_S = 60.0
COMMAND = ["vmctl", "status", "--json"]


class InventoryModule(BaseInventoryPlugin):  # type: ignore[misc]
    """The plugin class that Ansible loads."""

    NAME = "vmd.vmd.vmd"

    def verify_file(self, path: str) -> bool:
        """Return whether the name of a file is one for this plugin."""
        return bool(super().verify_file(path)) and path.endswith(("vmd.yml", "vmd.yaml"))

    def parse(self, inventory: Any, loader: Any, path: str, cache: bool = True) -> None:
        """Add the VMs."""
        super().parse(inventory, loader, path, cache)
        self._read_config_data(path)
        rows: dict[str, tuple[str, dict[str, Any]]] = {}
        for host in self.get_option("hosts"):
            for row in ask(host, shlex.split(self.get_option("shell"))):
                if row["name"] not in rows or row["state"] != "stopped":
                    rows[row["name"]] = (host, row)
        for name, (host, row) in rows.items():
            for group in ("vmd", f"vmd_{word(row['state'])}", f"vmd_on_{word(host)}"):
                inventory.add_group(group)
                inventory.add_host(name, group=group)
            inventory.set_variable(name, "vmd", row)
            inventory.set_variable(name, "vmd_host", host)
            addresses = [nic["guest4"] for nic in row["interfaces"] if nic["guest4"]]
            if addresses:
                inventory.set_variable(name, "ansible_host", addresses[0])


def ask(host: str, shell: list[str]) -> list[dict[str, Any]]:
    """Return the rows of a host.  Raises AnsibleParserError."""
    command = COMMAND if host == "localhost" else [*shell, host, *COMMAND]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
        document = json.loads(ran.stdout)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AnsibleParserError(f"{host}: {error}") from error
    except ValueError:
        raise AnsibleParserError(f"{host}: {ran.stderr.strip() or 'vmctl has printed no document'}") from None
    if "error" in document:
        raise AnsibleParserError(f"{host}: {document['error']}")
    rows: list[dict[str, Any]] = document["vms"]
    return rows


def word(text: str) -> str:
    """Return a text in a form that the name of a group may have."""
    return re.sub(r"\W", "_", text)
