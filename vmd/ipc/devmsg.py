"""Every message between a VM process and its device processes: fixed layouts, no msgpack, no records.

Device processes import the standard library only and start in milliseconds, so this is plain `struct`.  Each
device has two SOCK_SEQPACKET channels, one packet a message (arch. 3):

    sync   the VM asks, the device answers the same type; one question at a time, 10 s to answer
    async  either side informs; nobody waits

All layouts are little-endian.  A packet of a wrong length or an unknown type ends the device: the VM declares the
device failed, the device exits.

Descriptors that a device process has at start-up (`FD_*`):

    3 sync   4 async   5 the interrupt page (memfd, one page)
    6 resample: readable when the guest has ended an INTx interrupt
    7 .. 7+Q-1      kick of queue 0 .. Q-1: the guest's notification (KVM_IOEVENTFD)
    7+Q .. 7+2Q-1   call of queue 0 .. Q-1: write 1 to interrupt the guest (KVM_IRQFD)

The descriptors of START are guest memory (memfd), the file of figures (see below), then the host resources of the
device: image chain (top first), ISO, or tap (NET_VHOST adds two).  None of them is needed to start a process, so a
process can wait in reserve before there is a VM for it.

The interrupt page holds u32 counters: `raised` of queue q at 4*q, stored only by the thread that owns the
queue; `seen` of queue q at 4*(QUEUES_MAX + q), stored only by the VM process when the guest reads ISR.
An INTx interrupt of queue q is unacknowledged while the two differ.
"""

from struct import Struct

FD_SYNC = 3
FD_ASYNC = 4
FD_INTERRUPTS = 5
FD_RESAMPLE = 6
FD_FIRST_QUEUE = 7

QUEUES_MAX = 8
REGIONS_MAX = 8
RESOURCES_MAX = 8
PACKET_MAX = 4096
CONFIG_MAX = 104  # bytes of configuration space; the legacy registers leave room for no more
ANSWER_TIMEOUT_S = 10.0

TYPE = Struct("<I")  # first word of every packet

# --- figures ---------------------------------------------------------------------------------------------

# Devices store their counters into a memory file, which all devices of a VM share, and which the parent reads.  The
# file has FIGURES_SLOTS slots of FIGURES_SLOT_BYTES.  START assigns a slot to each device, and only that device writes
# to the slot: once for each round of its ring, before it interrupts the guest.  A slot is an array of u64: the place of
# the device's kind in FIGURES_KINDS, counted from 1 (0: the slot is free); the index of the device; the number of
# figures; then the figures in the order of FIGURES.  New figures and new kinds are added at the end, and none is ever
# removed.  (Message 9 once asked for counters; its number is not used again.)
FIGURES_SLOTS = 16
FIGURES_SLOT_BYTES = 512
FIGURES_BYTES = FIGURES_SLOTS * FIGURES_SLOT_BYTES
FIGURES_HEAD = 3  # words before the first figure
# The last bytes of a network interface's slot are the host name that the guest gave when it asked for its address, in
# ASCII, padded with zeroes.  All zeroes: the guest has no lease, or gave no name.
HOST_NAME_BYTES = 64
COUNTER_NAMES = (
    "rx_packets", "rx_bytes",  # to the guest; bytes of frames, without virtio headers
    "rx_no_room",              # frame larger than a buffer; with mergeable buffers, larger than all buffers together
    "rx_filtered",             # `locked`: for another link-layer address
    "rx_malformed",            # shorter than an Ethernet header
    "rx_injected_lost",        # an answer of this process, dropped because the guest takes none
    "tx_packets", "tx_bytes",  # from the guest, handed to the tap
    "tx_short", "tx_long",     # frame shorter than an Ethernet header; longer than MTU or segmentation allow
    "tx_spoofed",              # `locked`: from another link-layer address
    "tx_refused",              # the kernel refused the frame: mostly wrong offsets of offloads
    "tx_link_down",            # no link
    "tx_busy",                 # the tap took nothing for a second
    "tx_answered",             # taken by DHCP or router advertisement
    "dhcp_offers", "dhcp_acks", "dhcp_naks", "dhcp_bootp", "ra_sent",
    "lease_s", "lease_requested",
    # DHCP and BOOTP requests that were not answered, and were passed on to the tap:
    "dhcp_other_server",       # for another server
    "dhcp_other_address",      # about an address that is not the guest's
    "dhcp_other_client",       # from another Ethernet address
    "dhcp_declines",           # DECLINE: the guest has found another user of its address
    "dhcp_releases",           # RELEASE
    "dhcp_no_address",         # INFORM without an address
    "dhcp_unknown_type",       # a type that no client sends
    "dhcp_malformed",          # wrong sums, lengths or options
    "dhcp_relayed",            # came through a relay
    "dhcp_wants_file",         # BOOTP that asks for a boot file by name
    "dhcp_too_long",           # the answer would be longer than the client accepts
    "rx_throttled", "rx_throttled_ns",  # how often, and for how long, frames had to wait for a limit
    "tx_throttled", "tx_throttled_ns",
    "vhost",                   # 1 while the kernel moves the frames; the device then does not count them
)  # fmt: skip
COUNTERS_LEAST = COUNTER_NAMES.index("rx_throttled")  # number of counters that a process of any version has
FIGURES = {
    "viornd": ("requests", "bytes", "delayed"),
    "vionet": COUNTER_NAMES,
    "vioblk": (
        "read_requests", "read_bytes", "read_ns", "write_requests", "write_bytes", "write_ns",
        "flush_requests", "flush_ns", "discard_requests", "discard_bytes", "discard_ns",
        "zero_requests", "zero_bytes", "zero_ns", "errors", "refused", "busy_ns", "in_flight", "size_bytes",
        "throttled", "throttled_ns",
    ),
    "vioscsi": ("commands", "read_requests", "read_bytes", "errors", "busy_ns", "size_bytes"),
}  # fmt: skip
FIGURES_KINDS = tuple(FIGURES)

# --- sync: question and answer ---------------------------------------------------------------------------

# START: the first packet.  Answered READY on both channels, or ERROR.
#   verbosity, log form (index into log.FORMS), index of the device in its VM, number of queues,
#   number of resource descriptors, flags (below), number of memory regions, slot of its figures; then a REGION for each
#   memory region; then a RESOURCE for each resource; then NET or SERIAL, if the flags say so; then in UTF-8 the title
#   of the process, a name for each resource, and with NET the guest's host name, with a NUL before each name.
START = 1
START_HEAD = Struct("<IIIIIIIII")
REGION = Struct("<QQQI4x")  # gpa, size, file offset, flags (REGION_READ_ONLY)
REGION_READ_ONLY = 1
START_READ_ONLY = 1  # disk: the guest may not write
START_NET = 2  # network interface: NET follows, and the host name
START_SERIAL = 4  # disk: SERIAL follows; without it the serial number is the name of the device, such as vioblk0
RESOURCE = Struct("<I")  # of an image: RESOURCE_*; of other resources 0
RESOURCE_QCOW2 = 1  # the format is qcow2; without it, raw.  The device process never guesses the format
# The format was guessed from the image's first bytes: neither the user nor the image above it names a format.  Writes
# that would lead to another guess are refused.
RESOURCE_GUESSED = 2
RESOURCE_DISCARD_SHIFT = 8  # from this bit on: discard granularity of a block device in sectors, 0 if unknown
RESOURCE_DISCARD_MAX = (1 << 24) - 1

# NET: of a network interface.  Addresses are in wire order; an address that is not given is all zero.
#   the guest's link-layer address; the tap's link-layer address; flags (NET_*); MTU (0: the guest is told none);
#   of a `local` interface also: the IPv4 addresses of guest and host; the host's link-local IPv6 address (not given: it
#   is made from the tap's link-layer address); the /64 prefix that is announced to the guest; DNS_MAX IPv4 name
#   servers, then DNS_MAX IPv6 name servers (none given: the host); the prefix length of the IPv4 network (0: 31).
NET = Struct("<6s6sHH4s4s16s16s12s48sI")
NET_LOCKED = 1  # `locked lladdr`: the guest sends from its own link-layer address, and sees only frames for it
NET_LOCAL = 2  # `local interface`: this process tells the guest its addresses
NET_ASKS = 8  # the VM is asked for name servers before the guest is answered (ASK_RESOLVERS)
NET_PXE = 4  # the guest boots from this interface: DHCP answers name a boot file
# The kernel may move the frames.  Two more resources follow the tap: /dev/vhost-net, open for reading and writing; and
# a packet socket, bound to the tap, not blocking, with PACKET_VNET_HDR.  The socket has a locked filter: it receives
# only frames of the guest that the process has to know, which are ARP and neighbour advertisements, and on a `local`
# interface DHCP and router solicitations.  Frames that the process sends to the socket go to the guest.  Filters on the
# tap enforce NET_LOCKED.
NET_VHOST = 16
DNS_MAX = 3

SERIAL = Struct("<20s")  # of a disk: its serial number, padded with zeroes

# READY (sync and async): device features and configuration space.
READY = 2
READY_HEAD = Struct("<IQI")  # type, device features, length of the configuration space; then its bytes

# ACTIVATE: DRIVER_OK.  Answered ACTIVATE with status 0, or 1 if a ring cannot be used.
ACTIVATE = 3
ACTIVATE_HEAD = Struct("<IQI")  # type, negotiated features, number of queues; then a QUEUE for each
QUEUE = Struct("<HHIQQQHH4x")  # size, enabled, reserved, desc, avail, used gpa, next avail, next used index

# RESET, PAUSE: answered when the device has finished the requests in flight and touches no ring any more.  RESET also
# forgets the rings.  RESUME: the device goes on, and looks at every queue once.
RESET = 4
PAUSE = 5
RESUME = 6
STATUS = Struct("<II")  # type, status: 0 done, 1 failed

# CONFIG_WRITE: the driver wrote to the configuration space.  Answered READY, with the space as it is now.
CONFIG_WRITE = 7
CONFIG_WRITE_HEAD = Struct("<III")  # type, offset, length; then the bytes

# EXPORT: state for send/receive, while paused.  Answered EXPORT with a QUEUE for each queue (only size and indices
#   count), then up to OWN_MAX bytes of state that only the device understands.
# RESTORE: type, then those bytes, to the same device of the received VM.  Answered with status 0.
EXPORT = 8
EXPORT_HEAD = Struct("<II")  # type, number of queues
RESTORE = 43
OWN_MAX = 64

# SETTLE: to a disk: is every acknowledged write on stable storage?  The first SETTLE after a PAUSE, or after
#   SETTLE_AHEAD, begins a flush.  Answered SETTLE with a status; after SETTLED_NOT_YET the VM asks again.
SETTLE = 10
SETTLED, SETTLED_FAILED, SETTLED_NOT_YET = 0, 1, 2

# MARK: from now on, mark the pages of guest memory that the device changes (`guestmem`).  UNMARK: no longer.  Answered
#   with status 0.  A page is marked before the guest hears of the change; the pages of rings are marked at the next
#   PAUSE or RESET.
MARK = 28
UNMARK = 29
# SETTLE_AHEAD: to a disk that is not paused, before SETTLE: the next SETTLE covers every write that was acknowledged
#   until now.  Answered with status 0.
SETTLE_AHEAD = 30

# LET_GO: to a disk that stands still and is settled: finish the image and let go of its lock, because the guest may go
#   on at another host.  Answered LET_GO with a status (see STATUS).
# TAKE_BACK: take the lock again, after LET_GO or LOCK_LOST.  Answered TAKE_BACK with one of TAKEN_*.  The lock is ours
#   with those in HAVE.  After LET_GO: TAKEN.  After LOCK_LOST: TAKEN, or TAKEN_WRITTEN if somebody else has written to
#   the image meanwhile, or TAKEN_UNSURE if that is not known.  The lock is not taken with TAKEN_IN_USE (somebody else
#   has it), TAKEN_CHANGED (the image was written to since LET_GO) and TAKEN_FAILED (the storage reports an error).
LET_GO = 12
TAKE_BACK = 13
TAKEN, TAKEN_IN_USE, TAKEN_CHANGED, TAKEN_FAILED, TAKEN_WRITTEN, TAKEN_UNSURE = range(6)
HAVE = (TAKEN, TAKEN_WRITTEN, TAKEN_UNSURE)
# LEND: to a disk: send the descriptors of its images.  Answered LEND with a status and, with status 0, the descriptors,
#   the disk itself first.  A disk that stands still does not touch its images again until RELOAD.
# RELOAD: to a disk that stands still: another process has written to its image.  Answered RELOAD with a status: 1 if
#   the disk cannot be used any more.
LEND, RELOAD = 50, 51

# SIGN: to a disk whose guest has come from another host, and is about to run: write to the image without changing it,
#   and flush.  So the other host notices if it tries to take the image back.  Answered SIGN with a status.
SIGN = 15

# DIRECT: to a network device with NET_VHOST: type, 1 if an interrupt of each queue needs only its call eventfd (MSI-X),
#   0 if the interrupt page must be stored to first (INTx), as before the first DIRECT.  Answered with status 0.
DIRECT = 53
DIRECT_BODY = Struct("<II")

# ADDRESSES: which addresses has the guest told its neighbours?  Answered ADDRESSES with an ANNOUNCED for each.
ADDRESSES = 14

# --- async -----------------------------------------------------------------------------------------------

# ERROR: device -> VM: type, errno, sentence in UTF-8; the device cannot go on.  If a question is open, ERROR is also
#   sent on sync, as its answer.
ERROR = 16
ERROR_HEAD = Struct("<II")
# NEEDS_RESET: device -> VM: type, number of ACTIVATEs so far, sentence; the driver broke a ring of the last ACTIVATE,
#   and the device waits for a reset.  (The number tells the VM whether it has sent a newer ACTIVATE meanwhile.)
NEEDS_RESET = 17
NEEDS_RESET_HEAD = Struct("<II")
CONFIG_CHANGED = 18  # device -> VM: fields of READY; raise a configuration interrupt
VERBOSITY = 19  # VM -> device: type, verbosity
VERBOSITY_BODY = Struct("<II")
SHUTDOWN = 20  # VM -> device: TYPE; flush and exit 0, as at the end of either channel
# ANNOUNCE: VM -> network device: type, then up to ANNOUNCED_MAX times ANNOUNCED.  The guest goes on at this host after
#   a move: tell the switches and the guest, and tell the neighbours that the guest has these addresses.
ANNOUNCE = 24
ANNOUNCED = Struct("<B16s")  # kind; address (IPv4: in the first four bytes)
ANNOUNCED_4, ANNOUNCED_6, ANNOUNCED_ROUTER = 4, 6, 7  # the last: an IPv6 address of a guest that is a router
ANNOUNCED_MAX = 16
# TROUBLES: device -> VM: type; then everything that is wrong with the device now, as up to TROUBLES_MAX sentences in
#   UTF-8 of up to TROUBLE_MAX bytes, with a NUL between them.  No sentence: nothing is wrong.  Sent after READY, and at
#   each change.
TROUBLES = 23
TROUBLES_MAX = 3
TROUBLE_MAX = 200
# LEASE: network device -> VM: TYPE; the guest has been given its address, for the first time since it began to use the
#   interface.
LEASE = 31
# ASK_RESOLVERS: network device -> VM: TYPE; a guest asks for name servers.  Always answered soon: by RESOLVERS with
#   DNS_MAX IPv4 name servers, then DNS_MAX IPv6 name servers (unused entries are zero), or by SAME_RESOLVERS (TYPE) if
#   no others are known than before.
ASK_RESOLVERS = 25
RESOLVERS = 26
RESOLVERS_BODY = Struct("<I12s48s")
SAME_RESOLVERS = 27
# LOCK_LOST: disk -> VM: type, and a sentence in UTF-8; somebody else may have the image.  The machine has to stand
#   still until TAKE_BACK.  Repeated every few seconds until then.
LOCK_LOST = 45
# RESIZE: VM -> disk: type, new size in bytes.
# DISC: VM -> drive: type, flags (DISC_*), name in UTF-8; with the descriptor of a disc, or without one to remove the
#   disc.
# CHANGED: device -> VM: type, errno, or 0 when it is done, and a sentence in UTF-8.  Answers each RESIZE and DISC, of
#   which only one is open at a time.  A disk that has become larger sends CONFIG_CHANGED first.
RESIZE = 40
RESIZE_BODY = Struct("<I4xQ")
CHANGED = 41
CHANGED_HEAD = Struct("<II")
DISC = 42
DISC_HEAD = Struct("<II")
DISC_FORCE = 1  # even if the guest has locked the drive
# LIMIT: VM -> disk or network device: type, requests a second, bytes a second; 0 is no limit.  An interface has no
#   limit of requests, and its limit of bytes holds for each direction.  Sent after START if there is a limit, and
#   whenever it changes.
LIMIT = 52
LIMIT_BODY = Struct("<I4xQQ")
