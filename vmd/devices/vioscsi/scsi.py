"""A CD-ROM drive's commands (SPC-3, MMC-5; *cat. 6.6*): a command block in, status and data out, no I/O.

The reply to a command that reads the disc is the extent to read.  So the caller can read the disc's bytes directly into
guest memory.
"""

from struct import Struct

from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 2048
READ_MAX = 64 << 20  # bytes of one command; a command for more is refused, as by vmd
CDB_BYTES = 16  # of the longest command here; a shorter block is padded with zeros

GOOD = 0x00
CHECK_CONDITION = 0x02

NO_SENSE = (0x0, 0x00)
NO_MEDIUM = (0x2, 0x3A)
# A real drive reports 3/11.  vmd reports 3/3A, and guests' drivers treat both as a failed read.
READ_ERROR = (0x3, 0x3A)
BAD_OPCODE = (0x5, 0x20)
OUT_OF_RANGE = (0x5, 0x21)
MEDIUM_CHANGED = (0x6, 0x28)  # unit attention: not ready to ready change, medium may have changed
BAD_FIELD = (0x5, 0x24)

SENSE = Struct(">BxB4xB4xBB")  # 70h: current error, fixed format; key; bytes that follow; code, qualifier
SENSE_HEAD = 8  # bytes up to the one that says how many follow
REQUEST_SENSE_BYTES = 18  # the length that drivers expect of REQUEST SENSE; the bytes after the qualifier are zero

LBA32 = Struct(">I")
CAPACITY_10 = Struct(">II")
CAPACITY_16 = Struct(">QI20x")
TOC_HEAD = Struct(">HBB")  # length of the rest, first track, last track
TOC_ROW = Struct(">xBBxI")  # ADR and control, track, address
EVENT_HEAD = Struct(">HBB")  # length of the rest, class, supported classes
EVENT = Struct(">BB2x")  # event, status
FEATURES_HEAD = Struct(">I2xH")  # length of the rest, profile
FEATURE = Struct(">HBB")  # code, version and "current", length of the rest

ADR_CONTROL_DATA = 0x14
LEAD_OUT = 0xAA
MSF_LAST = 255 * 60 * 75 + 59 * 75 + 74  # the last address that fits minute, second and frame, one byte each

NO_EVENT_AVAILABLE = 0x80
POWER_CLASS, MEDIA_CLASS = 2, 4
CLASSES = 1 << POWER_CLASS | 1 << MEDIA_CLASS
POWER_ACTIVE, POWER_IDLE = 1, 2
NO_CHANGE, EJECT_REQUEST, NEW_MEDIA, MEDIA_REMOVAL = range(4)
MEDIA_PRESENT = 2

READ_CAPACITY_16 = 0x10  # service action of 9Eh
PROFILE_NON_CONFORMING = 0xFFFF

INQUIRY_DATA = (
    bytes((
        0x05,  # CD/DVD device
        0x80,  # removable
        0x00,  # no version claimed: drivers then probe each LUN with INQUIRY
        0x02,  # response data format of SCSI-2
        31,  # bytes that follow
        0, 0, 0,
    ))
    + b"OpenBSD " + b"VMM CD-ROM      " + b"001 "
)  # fmt: skip

MEDIUM_TYPE = 0x70
# Commands that a pending unit attention does not make fail (SPC-3, 5.8; MMC-5, 6.7): drivers send these first.
NO_ATTENTION = (0x03, 0x12, 0x46, 0x4A, 0xA0)

MODE_PAGES = {
    0x01: bytes((0x01, 10, 0, 5)) + bytes(8),  # read error recovery: five retries
    0x2A: bytes((0x2A, 30, 0x08)) + bytes(7) + bytes((0, 2)) + bytes(20),  # reads DVD-ROM; two volume levels
}

FEATURES = (
    FEATURE.pack(0x0000, 0x03, 4) + PROFILE_NON_CONFORMING.to_bytes(2, "big") + b"\x01\x00",  # profiles: only this
    FEATURE.pack(0x0001, 0x11, 8) + LBA32.pack(1) + bytes(4),  # core: SCSI family
    FEATURE.pack(0x0002, 0x07, 4) + b"\x02\x00\x00\x00",  # morphing: operational change events
    FEATURE.pack(0x0003, 0x03, 4) + b"\x09\x00\x00\x00",  # removable medium: tray, lockable
    FEATURE.pack(0x0010, 0x03, 8) + LBA32.pack(BLOCK) + b"\x00\x10\x00\x00",  # random read: sixteen blocks
)


def sense_data(key: int, code: int) -> bytes:
    """Return sense data in fixed format, up to the additional sense code and its qualifier."""
    return SENSE.pack(0x70, key, SENSE.size - SENSE_HEAD, code, 0)


class Refused(Exception):
    """A command ends in CHECK CONDITION.  `sense` is its sense key and additional sense code."""

    def __init__(self, sense: tuple[int, int]) -> None:
        super().__init__(*sense)
        self.sense = sense


class Reply(Record):
    """The result of a command: `data` for the initiator, or else `length` bytes of the disc from `offset`."""

    status: int = GOOD
    sense: bytes = b""  # with CHECK CONDITION only
    data: bytes = b""
    offset: int = 0
    length: int = 0


def check_condition(sense: tuple[int, int]) -> Reply:
    """Return the reply of a command that was refused or failed."""
    return Reply(status=CHECK_CONDITION, sense=sense_data(*sense))


class Drive:
    """A drive with a disc of `size_bytes`, or None for no disc.

    If the disc ends with a part of a block, that block counts as a whole one; the caller pads it with zeroes.
    """

    def __init__(self, size_bytes: int | None) -> None:
        self.blocks = -(-(size_bytes or 0) // BLOCK)
        self.locked = False
        self.attention = False  # unit attention: the next command that is not in NO_ATTENTION reports MEDIUM_CHANGED
        self.event = NO_CHANGE  # the media event that was not reported yet

    def change(self, size_bytes: int | None) -> None:
        """Replace or remove the disc.

        The change is reported as a unit attention and as a media event, since drivers look for either (SPC-3, 6.5;
        MMC-5, 6.7).
        """
        self.blocks = -(-(size_bytes or 0) // BLOCK)
        self.locked = False
        self.attention = size_bytes is not None
        self.event = MEDIA_REMOVAL if size_bytes is None else NEW_MEDIA

    def ask_to_eject(self) -> None:
        """Report an eject request to the driver, which has locked the drive."""
        self.event = EJECT_REQUEST

    def execute(self, cdb: bytes) -> Reply:
        """Carry out a command.  Every command gets a reply."""
        command = self.COMMANDS.get(cdb[0]) if cdb else None
        if command is None:
            return check_condition(BAD_OPCODE)
        if self.attention and cdb[0] not in NO_ATTENTION:
            self.attention = False
            return check_condition(MEDIUM_CHANGED)
        try:
            return command(self, cdb.ljust(CDB_BYTES, b"\0"))
        except Refused as refused:
            return check_condition(refused.sense)

    def require_disc(self) -> None:
        """Raise Refused if there is no disc."""
        if not self.blocks:
            raise Refused(NO_MEDIUM)

    # --- state -----------------------------------------------------------------------------------------------

    def unit_ready(self, _cdb: bytes) -> Reply:
        """00h."""
        self.require_disc()
        return Reply()

    def start_stop(self, _cdb: bytes) -> Reply:
        """1Bh: does nothing; the disc neither spins nor is ejected."""
        return Reply()

    def prevent_allow(self, cdb: bytes) -> Reply:
        """1Eh.  Unlike vmd, which toggles the lock at each command, so that two requests to lock unlock the drive."""
        self.locked = bool(cdb[4] & 1)
        return Reply()

    def request_sense(self, cdb: bytes) -> Reply:
        """03h.  Unlike vmd, which lacks it: SeaBIOS needs it to find out that there is no disc."""
        if cdb[1] & 1:  # descriptor format
            raise Refused(BAD_FIELD)
        state = MEDIUM_CHANGED if self.attention else NO_SENSE if self.blocks else NO_MEDIUM
        self.attention = False
        sense = bytearray(sense_data(*state).ljust(REQUEST_SENSE_BYTES, b"\0"))
        sense[7] = REQUEST_SENSE_BYTES - SENSE_HEAD
        return Reply(data=bytes(sense[: cdb[4]]))

    def mechanism_status(self, cdb: bytes) -> Reply:
        """BDh: no changer, nothing moves."""
        return Reply(data=bytes(8)[: int.from_bytes(cdb[8:10], "big")])

    def event_status(self, cdb: bytes) -> Reply:
        """4Ah: only polled, and only supported classes.  A class that has an event comes first."""
        if not cdb[1] & 1:
            raise Refused(BAD_FIELD)
        wanted = cdb[4] & CLASSES
        if wanted & 1 << MEDIA_CLASS and (self.event or wanted == 1 << MEDIA_CLASS):
            told, event = MEDIA_CLASS, EVENT.pack(self.event, MEDIA_PRESENT if self.blocks else 0)
            self.event = NO_CHANGE
        elif wanted:
            told, event = POWER_CLASS, EVENT.pack(0, POWER_ACTIVE if self.locked else POWER_IDLE)
        else:
            told, event = NO_EVENT_AVAILABLE, b""
        data = EVENT_HEAD.pack(2 + len(event), told, CLASSES) + event
        return Reply(data=data[: int.from_bytes(cdb[7:9], "big")])

    # --- what the drive is -----------------------------------------------------------------------------------

    def inquiry(self, cdb: bytes) -> Reply:
        """12h: the standard data; there are no vital product data pages."""
        if cdb[1] & 1 or cdb[2]:
            raise Refused(BAD_FIELD)
        return Reply(data=INQUIRY_DATA[: int.from_bytes(cdb[3:5], "big")])

    def report_luns(self, cdb: bytes) -> Reply:
        """A0h: LUN 0."""
        allocated = int.from_bytes(cdb[6:10], "big")
        if allocated < 16:
            raise Refused(BAD_FIELD)
        return Reply(data=(LBA32.pack(8) + bytes(12))[:allocated])

    def mode_sense_6(self, cdb: bytes) -> Reply:
        """1Ah."""
        page = self.mode_page(cdb)
        return Reply(data=(bytes((3 + len(page), MEDIUM_TYPE, 0, 0)) + page)[: cdb[4]])

    def mode_sense_10(self, cdb: bytes) -> Reply:
        """5Ah."""
        page = self.mode_page(cdb)
        head = (6 + len(page)).to_bytes(2, "big") + bytes((MEDIUM_TYPE,)) + bytes(5)
        return Reply(data=(head + page)[: int.from_bytes(cdb[7:9], "big")])

    @staticmethod
    def mode_page(cdb: bytes) -> bytes:
        """Return a page's current values; default, changeable and saved ones are not kept."""
        page = MODE_PAGES.get(cdb[2])  # with the page control, which is 0 for current values
        if page is None or cdb[3]:
            raise Refused(BAD_FIELD)
        return page

    def get_configuration(self, cdb: bytes) -> Reply:
        """46h: the features from a code on, or the one with this code.  All features are always current."""
        kind, first = cdb[1] & 3, int.from_bytes(cdb[2:4], "big")
        if kind == 3:
            raise Refused(BAD_FIELD)
        codes = [(int.from_bytes(feature[:2], "big"), feature) for feature in FEATURES]
        chosen = b"".join(feature for code, feature in codes if (code == first if kind == 2 else code >= first))
        data = FEATURES_HEAD.pack(4 + len(chosen), PROFILE_NON_CONFORMING) + chosen
        return Reply(data=data[: int.from_bytes(cdb[7:9], "big")])

    # --- the disc --------------------------------------------------------------------------------------------

    def read_capacity_10(self, _cdb: bytes) -> Reply:
        """25h: ffffffff tells the driver to use READ CAPACITY(16)."""
        self.require_disc()
        return Reply(data=CAPACITY_10.pack(min(self.blocks - 1, 0xFFFFFFFF), BLOCK))

    def service_action_in(self, cdb: bytes) -> Reply:
        """9Eh: READ CAPACITY(16) only."""
        if cdb[1] & 0x1F != READ_CAPACITY_16:
            raise Refused(BAD_FIELD)
        self.require_disc()
        return Reply(data=CAPACITY_16.pack(self.blocks - 1, BLOCK)[: int.from_bytes(cdb[10:14], "big")])

    def read_disc_information(self, _cdb: bytes) -> Reply:
        """51h: refused, as by vmd.  Drivers then assume a finalised disc."""
        raise Refused(BAD_FIELD)

    def read_toc(self, cdb: bytes) -> Reply:
        """43h: one data track and the lead-out.

        Unlike vmd, addresses are given as minutes, seconds and frames if the command asks for that, and format 1
        returns session information instead of a list of tracks.
        """
        self.require_disc()
        msf, first = bool(cdb[1] & 2), cdb[6]
        form = cdb[2] & 0x0F or cdb[9] >> 6  # the latter: its place in SCSI-2, which Linux still uses
        if form > 1 or (form == 0 and first > 1 and first != LEAD_OUT):
            raise Refused(BAD_FIELD)
        rows = TOC_ROW.pack(ADR_CONTROL_DATA, 1, self.address(0, msf)) if form == 1 or first <= 1 else b""
        if form == 0:
            rows += TOC_ROW.pack(ADR_CONTROL_DATA, LEAD_OUT, self.address(self.blocks, msf))
        return Reply(data=(TOC_HEAD.pack(2 + len(rows), 1, 1) + rows)[: int.from_bytes(cdb[7:9], "big")])

    @staticmethod
    def address(lba: int, msf: bool) -> int:
        """Return an address in the form for a table of contents; one that is too large becomes the largest."""
        if not msf:
            return min(lba, 0xFFFFFFFF)
        seconds, frame = divmod(min(lba + 150, MSF_LAST), 75)  # the lead-in is two seconds long
        minute, second = divmod(seconds, 60)
        return minute << 16 | second << 8 | frame

    def read_6(self, cdb: bytes) -> Reply:
        """08h: no blocks means 256."""
        return self.read(int.from_bytes(cdb[1:4], "big") & 0x1FFFFF, cdb[4] or 256)

    def read_10(self, cdb: bytes) -> Reply:
        """28h."""
        return self.read(int.from_bytes(cdb[2:6], "big"), int.from_bytes(cdb[7:9], "big"))

    def read_12(self, cdb: bytes) -> Reply:
        """A8h."""
        return self.read(int.from_bytes(cdb[2:6], "big"), int.from_bytes(cdb[6:10], "big"))

    def read_16(self, cdb: bytes) -> Reply:
        """88h."""
        return self.read(int.from_bytes(cdb[2:10], "big"), int.from_bytes(cdb[10:14], "big"))

    def read(self, lba: int, count: int) -> Reply:
        """Return the extent of `count` blocks.  Unlike vmd, all of them must be on the disc, not just the first."""
        self.require_disc()
        if lba >= self.blocks or count > self.blocks - lba:
            raise Refused(OUT_OF_RANGE)
        if count * BLOCK > READ_MAX:
            raise Refused(BAD_FIELD)
        return Reply(offset=lba * BLOCK, length=count * BLOCK)

    # --- for a stream ------------------------------------------------------------------------------------------

    def state(self) -> bytes:
        """Return the lock, and the changes that were not reported to the driver yet."""
        return bytes((self.locked, self.attention, self.event))

    def restore(self, state: bytes) -> None:
        """Take the state of another drive.  Bytes that another version has added are ignored."""
        locked, attention, event = state.ljust(3, b"\0")[:3]
        self.locked, self.attention = bool(locked), bool(attention)
        self.event = event if event <= MEDIA_REMOVAL else NO_CHANGE

    COMMANDS: "dict[int, Callable[[Drive, bytes], Reply]]" = {
        0x00: unit_ready,
        0x03: request_sense,
        0x08: read_6,
        0x12: inquiry,
        0x1A: mode_sense_6,
        0x1B: start_stop,
        0x1E: prevent_allow,
        0x25: read_capacity_10,
        0x28: read_10,
        0x43: read_toc,
        0x46: get_configuration,
        0x4A: event_status,
        0x51: read_disc_information,
        0x5A: mode_sense_10,
        0x88: read_16,
        0x9E: service_action_in,
        0xA0: report_luns,
        0xA8: read_12,
        0xBD: mechanism_status,
    }
