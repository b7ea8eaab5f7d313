"""Tells a guest that the emulator broke from one that a defect of ours did.

QEMU's SVM notes on an exit that an interrupt must not part the guest's next two instructions, and forgets it on
the next entry; and at other times a guest that has just run well faults at its next instruction.  Guests that
change their stacks with interrupts on, as firmware and boot loaders do, suffer most: one of ten starts of iPXE's
CD under QEMU's own KVM machine ended in a triple fault, as now and then under ours.  So a test that fails while this
has happened has proved nothing; it is run once more in a fresh machine, and that is said.  A defect of ours would
show again.
"""

import subprocess
from pathlib import Path

TRACING = Path("/sys/kernel/tracing")
KVM_EXIT = TRACING / "events/kvm/kvm_exit"
SVM_EXIT_SHUTDOWN = 0x7F  # AMD64 Architecture Programmer's Manual, volume 2, appendix C


class TripleFaults:
    """Counts the triple faults of all guests, by the kernel's trace of KVM's exits."""

    def __init__(self) -> None:
        if not KVM_EXIT.exists():
            subprocess.run(["mount", "-t", "tracefs", "tracefs", TRACING], check=True)
        (KVM_EXIT / "filter").write_text(f"exit_reason == {SVM_EXIT_SHUTDOWN:#x}")
        (KVM_EXIT / "enable").write_text("1")

    def count(self) -> int:
        """Return how many there have been."""
        return (TRACING / "trace").read_text().count(" kvm_exit: ")
