#!/usr/bin/python3
"""The module vmd.vmd.vmd_config."""

from __future__ import annotations

DOCUMENTATION = """
module: vmd_config
short_description: Write vm.conf of a host, and let vmd read it
description:
  - C(vmd -n) checks the file first.  It reports each mistake with its line, and a file with a mistake changes nothing.
  - A running daemon reads the file again if it has changed.  Running VMs stay unchanged, except for their limits.  VMs
    that do not run are started, unless they are C(disable)d.
options:
  content:
    description: The whole content of the file; see vm.conf(5).
    type: str
    required: true
  path:
    description: The file.
    type: path
    default: /etc/vm.conf
  reload:
    description: Let the daemon read the file.
    type: bool
    default: true
  backup:
    description: Keep a copy of the former file.
    type: bool
    default: false
  vmd:
    description: The program vmd(8).
    type: str
    default: vmd
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
  diff_mode:
    support: full
author: The vmd authors
"""

EXAMPLES = """
- vmd.vmd.vmd_config:
    content: "{{ lookup('ansible.builtin.template', 'vm.conf.j2') }}"
"""

RETURN = """
notes:
  description: The warnings of vmd.
  returned: success
  type: list
backup_file:
  description: The copy of the former file.
  returned: if there is one
  type: str
"""

import os
import tempfile

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vmd.vmd.plugins.module_utils.vmctl import COMMON, Vmctl, VmctlError

NO_DAEMON = 3  # an exit status of vmctl
VALID = "configuration OK"


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "content": {"type": "str", "required": True},
            "path": {"type": "path", "default": "/etc/vm.conf"},
            "reload": {"type": "bool", "default": True},
            "backup": {"type": "bool", "default": False},
            "vmd": {"type": "str", "default": "vmd"},
            **COMMON,
        },
        supports_check_mode=True,
    )
    path, content = module.params["path"], module.params["content"]
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            before = file.read()
    except FileNotFoundError:
        before = ""
    except OSError as error:
        module.fail_json(msg=f"{path}: {error.strerror}")
    # The draft is in the directory of the final file, because relative names of included files start there.
    fd, draft = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".vm.conf-")
    module.add_cleanup_file(draft)
    with open(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(content)
    status, _, err = module.run_command([module.get_bin_path(module.params["vmd"], required=True), "-n", "-f", draft])
    said = [line.replace(draft, path) for line in err.splitlines()]
    if status:
        module.fail_json(msg="\n".join(said) or f"{path}: refused", rc=status)
    result = {"changed": before != content, "notes": [line for line in said if not line.endswith(VALID)]}
    if module._diff:
        result["diff"] = {"before": before, "after": content, "before_header": path, "after_header": path}
    if result["changed"] and not module.check_mode:
        if module.params["backup"] and before:
            result["backup_file"] = module.backup_local(path)
        module.atomic_move(draft, path)
        if module.params["reload"]:
            reload(module, result)
    module.exit_json(**result)


def reload(module: AnsibleModule, result: dict[str, object]) -> None:
    """Let the daemon read the file, if there is a daemon."""
    try:
        Vmctl(module).call("reload")
    except VmctlError as error:
        if error.status != NO_DAEMON:
            module.fail_json(msg=str(error), **result)


if __name__ == "__main__":
    main()
