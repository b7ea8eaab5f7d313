"""Numbers of RFC 2741, RFC 7666 and SNMPv2, which are repeated here on purpose."""

import pytest

from vmd.agentx import mib, notifications, pdu


def test_object_identifiers() -> None:
    """Those of the MIB and of traps."""
    assert mib.VM_MIB == (1, 3, 6, 1, 2, 1, 236)
    assert notifications.SNMP_TRAP_OID == (1, 3, 6, 1, 6, 3, 1, 1, 4, 1, 0)
    scalars = (mib.HYPERVISOR, mib.PER_VM, mib.BULK, mib.AFFECTED)
    assert [name[7:] for name in scalars] == [(1, 1), (1, 9, 0), (1, 10, 0), (1, 11, 0)]
    columns = (mib.NAME, mib.UUID, mib.OPER_STATE, mib.PERSISTENT)
    assert [name[7:] for name in columns] == [(1, 4, 1, number) for number in (2, 3, 6, 8)]
    entries = (mib.VM_ENTRY, mib.CPU_ENTRY, mib.STORAGE_ENTRY, mib.NETWORK_ENTRY)
    assert [entry[7:] for entry in entries] == [(1, 4, 1), (1, 5, 1), (1, 7, 1), (1, 8, 1)]


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        ("OPEN CLOSE REGISTER UNREGISTER GET GET_NEXT GET_BULK TEST_SET", range(1, 9)),
        ("COMMIT_SET UNDO_SET CLEANUP_SET NOTIFY PING RESPONSE", (9, 10, 11, 12, 13, 18)),
        ("NON_DEFAULT_CONTEXT NETWORK_BYTE_ORDER VERSION SUBIDS_MAX", (8, 16, 1, 128)),
        ("INTEGER OCTET_STRING NULL OBJECT_IDENTIFIER", (2, 4, 5, 6)),
        ("IP_ADDRESS COUNTER32 GAUGE32 TIME_TICKS OPAQUE COUNTER64", (64, 65, 66, 67, 68, 70)),
        ("NO_SUCH_OBJECT NO_SUCH_INSTANCE END_OF_MIB_VIEW", (128, 129, 130)),
        ("GEN_ERR WRONG_TYPE WRONG_VALUE COMMIT_FAILED NOT_WRITABLE", (5, 7, 10, 14, 17)),
        ("NOT_OPEN UNSUPPORTED_CONTEXT PARSE_ERROR SHUTDOWN", (257, 262, 266, 5)),
    ],
)
def test_packets(names: str, numbers: range | tuple[int, ...]) -> None:
    """Types, flags, kinds of values, and errors."""
    assert [getattr(pdu, name) for name in names.split()] == list(numbers)


def test_errors_and_reasons_that_have_words() -> None:
    """RFC 2741, 6.2.16 and 6.2.2."""
    assert set(pdu.ERRORS) == {256, 257, 262, 263, 264, 266, 267, 268}
    assert [pdu.error(number) for number in (257, 265)] == ["not open", "error 265"]
    assert list(pdu.REASONS) == [1, 2, 3, 4, 5, 6]


def test_reserved_bytes_are_zero() -> None:
    """And fields that are left out are nothing."""
    assert pdu.open_session(20, b"vmd").hex() == "14000000" "00000000" "00000003" "766d6400"
    assert pdu.register((1, 3, 6, 1, 2, 1), 9).hex() == "00090000" "01020000" "00000001"
    assert pdu.response(5, 1).hex() == "00000000" "00050001"
    assert pdu.packet(pdu.PING).hex() == "010d1000" + "00" * 16
    assert pdu.Header(kind=1).as_dict() == {
        "kind": 1, "flags": 0, "session": 0, "transaction": 0, "packet": 0, "length": 0,
    }  # fmt: skip
    empty = pdu.Packet(header=pdu.Header(kind=1))
    assert (empty.error, empty.reason, empty.non_repeaters, empty.repetitions) == (0, 0, 0, 0)


def test_states_that_the_operator_wants() -> None:
    """RFC 7666, VirtualMachineAdminState: each state of a VM leads to one."""
    wanted = {1: 3, 3: 1, 4: 1, 5: 2, 7: 1, 8: 3, 9: 1, 10: 4, 11: 4, 12: 4}
    assert wanted == {state: mib.ADMIN_STATES.get(state, mib.ADMIN_SHUTDOWN) for state in wanted}
    assert (mib.INT_MAX, mib.TICKS_MAX, mib.TRUE, mib.FALSE) == ((1 << 31) - 1, (1 << 32) - 1, 1, 2)


def test_limits() -> None:
    """An SnmpAdminString has 255 bytes.  The index of the drive is larger than that of any disk, and stays."""
    assert (mib.TEXT_MAX, mib.DRIVE_INDEX) == (255, 101)
