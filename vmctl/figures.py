"""Figures of VMs as `vmctl metrics --json` prints them."""

from vmctl.output import clean
from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.ipc.messages.figures import VmFigures

# Fields that have another name in documents.
KEYS = {"vmid": "id", "since_s": "since", "started_s": "started", "nics": "interfaces"}
NOT_YET = ("since_s", "started_s", "pid")  # 0 stands for no value


def as_json(vm: "VmFigures") -> dict[str, object]:
    """Return all figures of a VM.  A value is null if it does not apply, or if this host does not provide it."""
    document = {}
    for field in type(vm).fields:
        value = getattr(vm, field)
        document[KEYS.get(field, field)] = None if field in NOT_YET and not value else plain(value)
    if vm.ended is not None:
        document["ended"] = {"at": vm.ended.at_s, "how": clean(vm.ended.how), "text": clean(vm.ended.text)}
    return document


def plain(value: object) -> object:
    """Return a value for JSON; empty text is null."""
    if isinstance(value, str):
        return clean(value) or None
    if isinstance(value, bytes):
        return value.hex(":")
    if isinstance(value, tuple):
        return [plain(each) for each in value]
    if isinstance(value, Record):
        return {field: plain(each) for field, each in value.as_dict().items()}
    return value
