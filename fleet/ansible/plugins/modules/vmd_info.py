#!/usr/bin/python3
"""The module vmd.vmd.vmd_info."""

from __future__ import annotations

DOCUMENTATION = """
module: vmd_info
short_description: Return the VMs of a host
description:
  - Returns the output of C(vmctl status --json) and C(vmctl version --json), which vmctl.schema.json describes.
options:
  name:
    description: Only this VM.
    type: str
  details:
    description: Add figures, counters of interfaces, and problems of devices.
    type: bool
    default: false
  vmctl:
    description: The program vmctl(8).
    type: str
    default: vmctl
  socket:
    description: The control socket of the daemon.
    type: path
    default: /run/vmd.sock
attributes:
  check_mode:
    support: full
author: The vmd authors
"""

EXAMPLES = """
- vmd.vmd.vmd_info:
  register: host
"""

RETURN = """
vms:
  description: A dict for each VM; empty if there is no VM of that name.
  returned: success
  type: list
version:
  description: The version of the daemon.
  returned: success
  type: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vmd.vmd.plugins.module_utils.vmctl import (
    COMMON,
    NO_SUCH_VM,
    Vmctl,
    VmctlError,
)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={"name": {"type": "str"}, "details": {"type": "bool", "default": False}, **COMMON},
        supports_check_mode=True,
    )
    vmctl, name = Vmctl(module), module.params["name"]
    arguments = [*(["-v"] if module.params["details"] else []), *([name] if name else [])]
    try:
        try:
            rows = vmctl.rows(*arguments)
        except VmctlError as error:
            if error.status != NO_SUCH_VM:
                raise
            rows = []
        module.exit_json(changed=False, vms=rows, version=vmctl.call("version")["vmd"])
    except VmctlError as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
