"""How a command line refers to a VM: a number is an id, and any other word is a name (*cat. 3.1*).

Unlike vmd: if a VM has a number as its name, the number means this VM, and not the VM with this id.  `stop -f 2` must
not kill the wrong VM.
"""

from vmctl.errors import ArgumentError
from vmd.config.model import NAME_MAX
from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmd.ipc.messages.clients import VmInfo

ID_MAX = 0xFFFFFFFF


class VmRef(Record):
    """A VM by id or, with id 0, by name.  Both are set if the word can be either."""

    vmid: int = 0
    name: str = ""

    def __str__(self) -> str:
        return self.name or str(self.vmid)

    @property
    def sure_name(self) -> str:
        """The name, unless the word may be an id."""
        return "" if self.vmid else self.name

    def find(self, vms: "Iterable[VmInfo]") -> "VmInfo | None":
        """Return the VM that the daemon would find, or None."""
        found = None
        for vm in vms:
            if self.name and vm.name == self.name:
                return vm
            if self.vmid and vm.vmid == self.vmid:
                found = vm
        return found


def parse_vmref(word: str) -> VmRef:
    """Return what `word` refers to.

    Raises:
        ArgumentError: the word is neither an id nor a name.
    """
    digits = word.lstrip("0")
    if word.isascii() and word.isdigit() and len(digits) <= len(str(ID_MAX)) and int(digits or 0) <= ID_MAX:
        # Unlike vmd, where 0 stands for "no id": 0 is refused, because no VM has it.
        if not digits:
            raise ArgumentError(f"invalid id: {word}")
        return VmRef(vmid=int(digits), name=word)
    if not word or word.startswith("-"):
        raise ArgumentError(f"invalid id: {word}")
    if len(word.encode("utf-8", "surrogateescape")) > NAME_MAX:
        raise ArgumentError(f"name too long: {word}")
    return VmRef(name=word)
