"""vmctl on a host, for the modules of this collection: run a command, and return its JSON document."""

from __future__ import annotations

import json
from typing import Any

NO_SUCH_VM = 4  # an exit status of vmctl
COMMON = {
    "vmctl": {"type": "str", "default": "vmctl"},
    "socket": {"type": "path", "default": "/run/vmd.sock"},
}


class VmctlError(Exception):
    """A command has failed: its message, and its exit status."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class Vmctl:
    """Calls vmctl for a module."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.program = module.get_bin_path(module.params["vmctl"], required=True)
        self.socket = module.params["socket"]

    def call(self, command: str, *arguments: str) -> dict[str, Any]:
        """Return the document of a command.  Raises VmctlError."""
        status, out, err = self.module.run_command([self.program, "-s", self.socket, command, "--json", *arguments])
        try:
            document: dict[str, Any] = json.loads(out)
        except ValueError:
            document = {}
        if status:
            said = err.strip() or f"vmctl {command} ended with status {status}"
            raise VmctlError(document.get("error") or said, status)
        return document

    def find(self, name: str) -> dict[str, Any] | None:
        """Return a VM's row; None if there is no such VM.  Raises VmctlError."""
        try:
            return self.rows(name)[0]
        except VmctlError as error:
            if error.status == NO_SUCH_VM:
                return None
            raise

    def rows(self, *arguments: str) -> list[dict[str, Any]]:
        """Return the rows of vmctl status.  Raises VmctlError."""
        rows: list[dict[str, Any]] = self.call("status", *arguments)["vms"]
        return rows
