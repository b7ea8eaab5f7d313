"""Protocol 1 of the control socket, from before Hello existed: its messages, and the fields of its records.

Programs with protocol 1 refuse a record with more fields, and know no other message.  A client that sends no Hello is
one of them.
"""

from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.record import RecordType

# The number of fields of each record.  They are still the first fields.
FIELDS = {
    "StartRequest": 7, "StopRequest": 5, "WaitRequest": 3, "ListRequest": 1, "LoadRequest": 2, "ReloadRequest": 1,
    "ResetRequest": 3, "LogRequest": 2, "ConsoleRequest": 3, "ConsoleBreak": 3, "PauseRequest": 4, "SendRequest": 4,
    "ReceiveRequest": 3, "NicsRequest": 3,
    "Ok": 1, "Failed": 2, "VmStarted": 4, "StopAccepted": 2, "VmTerminated": 3, "VmInfo": 12, "End": 0,
    "ConsoleOutput": 1, "ConsoleAttached": 3, "VmPaused": 3, "TransferProgress": 2, "VmSent": 3, "VmReceived": 5,
    "NicInfo": 12,
    # records within others
    "Caller": 3, "VmConfig": 23, "DiskConfig": 2, "NicConfig": 8, "AllowInstance": 2, "Owner": 2, "Prefix": 2,
    "Rights": 3,
}  # fmt: skip

# The number of kinds of descriptors of a message, if there are more now.  They are still the first ones.
FDS = {"StartRequest": 2}


def knows(cls: "RecordType") -> bool:
    """Return whether protocol 1 had this message."""
    return cls.__name__ in FIELDS


def unknown_in(message: "Record") -> str:
    """Return what protocol 1 does not know of a message: its name, or the name of a field that is set; or ""."""
    cls = type(message)
    if not knows(cls):
        return cls.__name__
    later = (field for field in cls.fields if field not in fields(cls))
    unknown = next((field for field in later if getattr(message, field) != cls.defaults[field]), "")
    inner = (getattr(message, field) for field in fields(cls))
    return unknown or next(filter(None, (unknown_in(each) for each in inner if isinstance(each, Record))), "")


def fields(cls: "RecordType") -> list[str]:
    """Return the names of the fields that a record had in protocol 1."""
    return [*cls.fields][: FIELDS[cls.__name__]]
