"""A guest's shell on its serial console, driven command by command."""

import re

from tests.support.daemon import Attached
from vmd.virtio import spec

NOTICE = "the power button powers this guest off"  # which comes before or behind the prompt
DEADLINE_S = 60.0  # a watchdog, as everywhere


class Shell:
    """Takes over the shell of `vmdtest=shell`; from here on nothing is echoed, and there is no prompt."""

    def __init__(self, console: Attached, timeout_s: float) -> None:
        self.console = console
        self.count = 0
        console.expect("/ # ", timeout_s)
        if NOTICE not in console.text():
            console.expect(NOTICE, timeout_s)
        # A shell that runs a script edits no lines: on this console each of its cursor movements has its price.
        # (Not `cat | sh`: busybox's cat splices, and what comes from a terminal then arrives one line late.)
        console.answer("stty -echo; exec sh -c 'echo re''ady; exec sh /proc/self/fd/0'", "ready\r\n")

    def run(self, command: str, timeout_s: float = DEADLINE_S) -> str:
        """Run a command; return what it said.  Raises AssertionError, with that, if it fails."""
        output, status = self.tried(command, timeout_s)
        assert status == 0, f"status {status} of {command!r}:\n{output}"
        return output

    def wait_for(self, condition: str) -> None:
        """Wait until it holds; a shell that waited for ever would answer nothing else any more."""
        self.run(f"for i in $(seq 600); do {condition} && break; sleep 0.1; done; {condition}", 2 * DEADLINE_S)

    def tried(self, command: str, timeout_s: float = DEADLINE_S) -> tuple[str, int]:
        """Run a command; return what it said and its exit status."""
        self.count += 1
        mark = f"<{self.count}:"
        # Quoted apart, so that no echo of what is typed looks like the answer.
        self.console.type(f"{{ {command}\n}} 2>&1; echo '<'{self.count}:$?'>'\r")
        output = self.console.expect(mark, timeout_s).removesuffix(mark)
        status = int(self.console.expect(">\r\n", timeout_s).removesuffix(">\r\n"))
        return output.replace("\r\n", "\n"), status


def interrupts(shell: Shell) -> dict[str, str]:
    """Return which kind of interrupt each virtio device or queue has had; those that had none are left out."""
    kinds: dict[str, str] = {}
    for line in shell.run("grep virtio /proc/interrupts").splitlines():
        row = re.fullmatch(r" *\d+:((?: +\d+)+) +(\S+) +\S+ +(.*)", line)
        assert row is not None, line
        if any(int(count) for count in row[1].split()):
            kinds |= dict.fromkeys(row[3].split(", "), row[2])
    return kinds


def version_1(shell: Shell) -> set[str]:
    """Return what the drivers of all virtio devices agreed to: "1" for VERSION_1, "0" for legacy."""
    features = shell.run("cat /sys/bus/virtio/devices/*/features").split()
    return {bits[spec.VIRTIO_F_VERSION_1] for bits in features}
