"""A guest's shell on its serial console, driven command by command."""

import re

from tests.support.daemon import Attached
from vmd.virtio import spec

NOTICE = "the power button powers this guest off"  # comes before or after the prompt
DEADLINE_S = 200.0  # a watchdog: an emulated machine that has other work may take a minute
LONG_WAIT_TRIES = 20  # a guest on a busy host needs minutes for what takes seconds elsewhere


class Shell:
    """Takes over the shell of `vmdtest=shell`, and turns off echo and prompt."""

    def __init__(self, console: Attached, timeout_s: float) -> None:
        self.console = console
        self.count = 0
        console.expect("/ # ", timeout_s)
        if NOTICE not in console.text():
            console.expect(NOTICE, timeout_s)
        # A shell that runs a script does no line editing, whose cursor movements are slow on this console.
        # (Not `cat | sh`: busybox's cat uses splice, with which input from a terminal arrives one line late.)
        console.answer("stty -echo; exec sh -c 'echo re''ady; exec sh /proc/self/fd/0'", "ready\r\n")

    def run(self, command: str, timeout_s: float = DEADLINE_S) -> str:
        """Run a command; return its output.  Raises AssertionError with the output if the command fails."""
        output, status = self.tried(command, timeout_s)
        assert status == 0, f"status {status} of {command!r}:\n{output}"
        return output

    def wait_for(self, condition: str) -> None:
        """Wait until a shell condition holds.  The shell gives up before we do, and can be used again."""
        tries = f"for i in $(seq 150); do {condition} && break; sleep 0.1; done; {condition}"
        for _ in range(LONG_WAIT_TRIES):
            if self.tried(tries)[1] == 0:
                return
        self.run(condition)

    def tried(self, command: str, timeout_s: float = DEADLINE_S) -> tuple[str, int]:
        """Run a command; return its output and exit status."""
        self.count += 1
        mark = f"<{self.count}:"
        # Quoted in parts, so that an echo of the command does not look like the mark.
        self.console.type(f"{{ {command}\n}} 2>&1; echo '<'{self.count}:$?'>'\r")
        output = self.console.expect(mark, timeout_s).removesuffix(mark)
        status = int(self.console.expect(">\r\n", timeout_s).removesuffix(">\r\n"))
        return output.replace("\r\n", "\n"), status


def interrupts(shell: Shell) -> dict[str, str]:
    """Return the kind of interrupt of each virtio device or queue, without those that had none."""
    kinds: dict[str, str] = {}
    for line in shell.run("grep virtio /proc/interrupts").splitlines():
        row = re.fullmatch(r" *\d+:((?: +\d+)+) +(\S+) +\S+ +(.*)", line)
        assert row is not None, line
        if any(int(count) for count in row[1].split()):
            kinds |= dict.fromkeys(row[3].split(", "), row[2])
    return kinds


def version_1(shell: Shell) -> set[str]:
    """Return the drivers' choice for all virtio devices: "1" for VERSION_1, "0" for legacy."""
    features = shell.run("cat /sys/bus/virtio/devices/*/features").split()
    return {bits[spec.VIRTIO_F_VERSION_1] for bits in features}
