#!/usr/bin/python3
"""The module vmd.vmd.vmd_vm."""

from __future__ import annotations

DOCUMENTATION = """
module: vmd_vm
short_description: Start, stop or pause a VM of vmd
description:
  - The VM has to be one of vm.conf(5), see M(vmd.vmd.vmd_config).
  - Do not use this module for a VM that a cluster manages.
options:
  name:
    description: The name of the VM.
    type: str
    required: true
  state:
    description:
      - V(running) starts the VM, or unpauses it.
      - V(stopped) asks its guest to shut down, and waits for that.  After two minutes vmd kills the VM.
      - V(paused) pauses a running VM, and fails for a VM that does not run.
    type: str
    choices: [running, stopped, paused]
    default: running
  force:
    description: Stop the VM without asking its guest.
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
- vmd.vmd.vmd_vm:
    name: web
    state: running
"""

RETURN = """
vm:
  description: The row of the VM in vmctl status --json, after the change.
  returned: success
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vmd.vmd.plugins.module_utils.vmctl import COMMON, Vmctl, VmctlError

# For each wanted state: the command for a VM, by its present state.  None: nothing to do.
STEPS: dict[str, dict[str, list[str] | None]] = {
    "running": {"running": None, "starting": None, "waiting": None, "paused": ["unpause"], "stopped": ["start"]},
    "stopped": {"stopped": None, "running": ["stop", "-w"], "paused": ["stop", "-w"], "waiting": ["stop", "-w"],
                "starting": ["stop", "-w"], "stopping": ["wait"]},
    "paused": {"paused": None, "running": ["pause"]},
}  # fmt: skip


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": list(STEPS), "default": "running"},
            "force": {"type": "bool", "default": False},
            **COMMON,
        },
        supports_check_mode=True,
    )
    name, wanted = module.params["name"], module.params["state"]
    vmctl = Vmctl(module)
    try:
        row = vmctl.find(name)
        if row is None:
            module.fail_json(msg=f"vm {name} is not known to vmd")
        step = STEPS[wanted].get(row["state"], [])
        if step == []:
            module.fail_json(msg=f"vm {name} is {row['state']}, and cannot become {wanted} now", vm=row)
        if step is not None and not module.check_mode:
            command, *options = step
            if command == "stop" and module.params["force"]:
                options.append("-f")
            vmctl.call(command, *options, name)
            row = vmctl.find(name)
        module.exit_json(changed=step is not None, vm=row)
    except VmctlError as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
