"""Numbers that travel in messages: they stay as they are, so that programs of different versions agree."""

import json
from pathlib import Path
from typing import Any

from tests.support.messages import MESSAGES
from tests.unit.ipc.test_imsg import GONE
from vmd.enums import Enum
from vmd.ipc import devmsg, first
from vmd.record import Record, RecordType

GOLDEN = json.loads(Path(__file__, "../../../golden/numbers-1.json").resolve().read_text())
NOTHING = (0, "", b"", (), None, False)
DEFAULTS: dict[str, object] = {  # those that are something
    "ConsoleLog.size_bytes": 10485760, "ConsoleLog.keep": 3, "EventsRequest.wait": True, "Forward.count": 1,
    "Live.still_ms": 300, "Live.rounds": 30, "NicConfig.up": True, "NicInfo.length4": 31, "NicLink.length4": 31,
    "NicLink.asks": True, "NicWanted.up": True, "NicWanted.length4": 31, "OpenFiles.in_conf": True,
    "OpenFiles.patience_s": 0.0, "SeedConfig.network": True, "SwitchRequest.up": True, "VmConfig.enabled": True,
    "VmConfig.memory_bytes": 536870912, "VmConfig.vcpus": 1,
}  # fmt: skip


def types_within(declared: Any) -> set[type]:  # noqa: ANN401 - any declared type
    """Return the records and enumerations of a declared type, also those within records."""
    found: set[type] = set()
    for each in getattr(declared, "__args__", (declared,)):
        if isinstance(each, RecordType):
            found.add(each)
            for field in each.fields.values():
                found |= types_within(field)
        elif isinstance(each, type) and issubclass(each, Enum):
            found.add(each)
        elif each is not declared:
            found |= types_within(each)
    return found


TYPES = {each.__name__: each for info in MESSAGES for each in types_within(info.cls)}
RECORDS = {name: each for name, each in TYPES.items() if issubclass(each, Record)}
ENUMS = {name: each for name, each in TYPES.items() if issubclass(each, Enum)}


def numbers() -> dict[str, Any]:
    """Return all such numbers."""
    return {
        "messages": {info.cls.__name__: info.code for info in MESSAGES},
        "values": {name: {each.name: each.value for each in kind} for name, kind in ENUMS.items()},
        "protocol 1": {"fields": first.FIELDS, "descriptors": first.FDS},
    }


def test_numbers_stay() -> None:
    """Those of messages, of values, and of fields in protocol 1.  A removed message leaves its number to GONE."""
    now = numbers()
    left = {name: code for name, code in GOLDEN["messages"].items() if code not in GONE}
    assert {name: now["messages"].get(name) for name in left} == left
    for name, members in GOLDEN["values"].items():
        assert now["values"][name] == now["values"][name] | members, name
    assert now["protocol 1"] == GOLDEN["protocol 1"]


TYPES_OF_DEVICES = (
    "START", "READY", "ACTIVATE", "RESET", "PAUSE", "RESUME", "CONFIG_WRITE", "EXPORT", "RESTORE", "SETTLE", "MARK",
    "UNMARK", "SETTLE_AHEAD", "LET_GO", "TAKE_BACK", "LEND", "RELOAD", "SIGN", "DIRECT", "ADDRESSES", "ERROR",
    "NEEDS_RESET", "CONFIG_CHANGED", "VERBOSITY", "SHUTDOWN", "ANNOUNCE", "TROUBLES", "LEASE", "ASK_RESOLVERS",
    "RESOLVERS", "SAME_RESOLVERS", "LOCK_LOST", "RESIZE", "CHANGED", "DISC", "LIMIT",
)  # fmt: skip


def test_types_of_messages_of_devices_differ() -> None:
    """A VM and its devices have the same version, but one number for two types would be two meanings."""
    numbers_of = [getattr(devmsg, name) for name in TYPES_OF_DEVICES]
    assert len(set(numbers_of)) == len(numbers_of)


def test_a_field_that_is_left_out_is_nothing() -> None:
    """An earlier version does not send it.  Few fields have another default, which is repeated here on purpose."""
    found = {f"{name}.{field}": each for name, cls in RECORDS.items() for field, each in cls.defaults.items()}
    for name, default in found.items():
        value = default.value if isinstance(default, Enum) else default
        if isinstance(value, Record):
            assert value == type(value)(), name
        elif name in DEFAULTS:
            assert value == DEFAULTS[name], name
        else:
            assert any(type(value) is type(each) and value == each for each in NOTHING), name
    assert DEFAULTS.keys() <= found.keys()
