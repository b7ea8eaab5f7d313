"""Distinguishes a guest that the emulator broke from a guest that a defect of ours broke.

The SVM emulation of QEMU has two defects.  On an exit it saves the guest's interrupt shadow, but on the next entry it
forgets it.  And sometimes a guest that has run well faults at its next instruction.  Guests that change their stacks
with interrupts on, as firmware and boot loaders do, suffer most: one of ten starts of iPXE's CD under QEMU's own KVM
machine ended in a triple fault, and some under vmd, too.  So a test that fails with a triple fault proves nothing.  It
runs once more in a new machine, and the summary says so.  A defect of ours would show again.
"""

import subprocess
from pathlib import Path

TRACING = Path("/sys/kernel/tracing")
KVM_EXIT = TRACING / "events/kvm/kvm_exit"
SVM_EXIT_SHUTDOWN = 0x7F  # AMD64 Architecture Programmer's Manual, volume 2, appendix C


class TripleFaults:
    """Counts the triple faults of all guests, with the kernel's trace of KVM exits."""

    def __init__(self) -> None:
        if not KVM_EXIT.exists():
            subprocess.run(["mount", "-t", "tracefs", "tracefs", TRACING], check=True)
        (KVM_EXIT / "filter").write_text(f"exit_reason == {SVM_EXIT_SHUTDOWN:#x}")
        (KVM_EXIT / "enable").write_text("1")

    def count(self) -> int:
        """Return the number of triple faults up to now."""
        return (TRACING / "trace").read_text().count(" kvm_exit: ")
