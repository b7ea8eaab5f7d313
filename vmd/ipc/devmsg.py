"""Every message between a VM process and its device processes: fixed layouts, no msgpack, no records.

Device processes import the standard library only and start in milliseconds, so this is plain `struct`.  Each
device has two SOCK_SEQPACKET channels, one packet a message (arch. 3):

    sync   the VM asks, the device answers the same type; one question at a time, 10 s to answer
    async  either side informs; nobody waits

All layouts are little-endian.  A packet of a wrong length or an unknown type is the end of the device: the VM
takes it for failed, the device exits.

Descriptors a device process finds at start-up (`FD_*`):

    3 sync   4 async   5 the interrupt page (memfd, one page)
    6 resample: readable when the guest has ended an INTx interrupt
    7 .. 7+Q-1      kick of queue 0 .. Q-1: the guest's notification (KVM_IOEVENTFD)
    7+Q .. 7+2Q-1   call of queue 0 .. Q-1: write 1 to interrupt the guest (KVM_IRQFD)

With START come guest memory (memfd), the file of figures (see there), then the host resources of the device: image
chain (top first), ISO, tap (and with NET_VHOST two more, see there).  So a process can be started, and wait, before
there is a VM for it.

The interrupt page holds u32 counters: `raised` of queue q at 4*q, stored only by the thread that owns the
queue; `seen` of queue q at 4*(QUEUES_MAX + q), stored only by the VM process when the guest reads ISR.
An INTx interrupt of queue q is unacknowledged while they differ.
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
CONFIG_MAX = 104  # bytes of configuration space, as many as the legacy registers leave room for
ANSWER_TIMEOUT_S = 10.0

TYPE = Struct("<I")  # first word of every packet

# --- figures ---------------------------------------------------------------------------------------------

# What a device counts it leaves in a memory file that all devices of a VM share, and that the parent reads.  The file
# has FIGURES_SLOTS slots of FIGURES_SLOT_BYTES.  START says which slot is whose, and only its device writes to it, once
# for each round of its ring, before the guest hears of that.  A slot is u64: the number of the device's kind in
# FIGURES_KINDS, from 1 on (0: nobody has the slot); the index of the device; the number of figures; and those, in the
# order of FIGURES.  A figure that is added comes last, as does a kind, and none goes.  (Message 9 asked for counters.)
FIGURES_SLOTS = 16
FIGURES_SLOT_BYTES = 512
FIGURES_BYTES = FIGURES_SLOTS * FIGURES_SLOT_BYTES
FIGURES_HEAD = 3  # words before the first figure
# The last bytes of the slot of a network interface are the host name with which the guest has asked for its address,
# in ASCII, zeroes behind it; none: it has no lease, or gave no name.
HOST_NAME_BYTES = 64
COUNTER_NAMES = (
    "rx_packets", "rx_bytes",  # to the guest; bytes of frames, without virtio headers
    "rx_no_room",              # frame larger than a buffer, or than all of them
    "rx_filtered",             # `locked`: for another link-layer address
    "rx_malformed",            # shorter than an Ethernet header
    "rx_injected_lost",        # answer of ours to a guest that takes none
    "tx_packets", "tx_bytes",  # from the guest, handed to the tap
    "tx_short", "tx_long",     # frame shorter than an Ethernet header; longer than MTU or segmentation allow
    "tx_spoofed",              # `locked`: from another link-layer address
    "tx_refused",              # the kernel would not have it: mostly wrong offsets of offloads
    "tx_link_down",            # no link
    "tx_busy",                 # the tap took nothing for a second
    "tx_answered",             # taken by DHCP or router advertisement
    "dhcp_offers", "dhcp_acks", "dhcp_naks", "dhcp_bootp", "ra_sent",
    "lease_s", "lease_requested",
    # requests of DHCP and BOOTP that were not answered, and went on to the tap:
    "dhcp_other_server",       # for another server
    "dhcp_other_address",      # about an address that is not the guest's
    "dhcp_other_client",       # from another Ethernet address
    "dhcp_declines",           # DECLINE: the guest has found somebody else with its address
    "dhcp_releases",           # RELEASE
    "dhcp_no_address",         # INFORM that says no address
    "dhcp_unknown_type",       # of a type that no client sends
    "dhcp_malformed",          # wrong sums, lengths or options
    "dhcp_relayed",            # came through a relay
    "dhcp_wants_file",         # BOOTP for a certain boot file
    "dhcp_too_long",           # the answer would be longer than the client takes
    "rx_throttled", "rx_throttled_ns",  # how often, and for how long, frames had to wait for a limit
    "tx_throttled", "tx_throttled_ns",
    "vhost",                   # 1 while the kernel moves the frames: the device counts none of them then
)  # fmt: skip
COUNTERS_LEAST = COUNTER_NAMES.index("rx_throttled")  # so many, at least, does a process of any version have
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
#   number of resource descriptors, flags (below), number of memory regions, slot of its figures; then REGION each;
#   then RESOURCE for each resource; then NET or SERIAL, if flags say so; then, UTF-8, the title of the process, a name
#   for each resource, and with NET the guest's host name, with a NUL before each name.
START = 1
START_HEAD = Struct("<IIIIIIIII")
REGION = Struct("<QQQI4x")  # gpa, size, file offset, flags (REGION_READ_ONLY)
REGION_READ_ONLY = 1
START_READ_ONLY = 1  # disk: the guest may not write
START_NET = 2  # network interface: NET follows, and the host name
START_SERIAL = 4  # disk: SERIAL follows; without it the serial number is the name of the device, such as vioblk0
RESOURCE = Struct("<I")  # of an image what its user, or the image above it, says (RESOURCE_*); of others 0
RESOURCE_QCOW2 = 1  # else raw; never guessed by the device process
RESOURCE_GUESSED = 2  # nobody said it, only its own first bytes: writes that would change what they say are refused
RESOURCE_DISCARD_SHIFT = 8  # the bits from here on: discard granularity of a block device in sectors, 0 if unknown
RESOURCE_DISCARD_MAX = (1 << 24) - 1

# NET: of a network interface, addresses as they are on the wire, all zero for none:
#   the guest's link-layer address, the tap's; flags (NET_*), MTU (0: the guest is told none); of a `local` one the
#   addresses of guest and host, the host's link-local one (none: made from its link-layer address), the /64 prefix
#   that is announced to the guest, DNS_MAX name servers of either family, behind one another (none: the host), and
#   the length of the network of guest and host (0: 31).
NET = Struct("<6s6sHH4s4s16s16s12s48sI")
NET_LOCKED = 1  # `locked lladdr`: the guest sends from its own link-layer address and sees what is for it
NET_LOCAL = 2  # `local interface`: the guest is given its addresses
NET_ASKS = 8  # the VM is asked for name servers before the guest is answered (ASK_RESOLVERS)
NET_PXE = 4  # it boots from this interface: DHCP names it, and a boot file
# The kernel may move the frames.  Behind the tap come two more resources: /dev/vhost-net, open for both; and a packet
# socket, bound to the tap, not blocking, with PACKET_VNET_HDR.  A locked filter leaves of what the socket hears only
# what the guest sends and the process has to know: ARP, neighbour advertisements, and of a `local` interface DHCP and
# router solicitations.  What the process sends there goes to the guest.  Filters on the tap keep the rules of such an
# interface (NET_LOCKED).
NET_VHOST = 16
DNS_MAX = 3

SERIAL = Struct("<20s")  # of a disk: its serial number, zeroes behind it

# READY (sync and async): device features and configuration space.
READY = 2
READY_HEAD = Struct("<IQI")  # type, device features, length of the configuration space; then its bytes

# ACTIVATE: DRIVER_OK.  Answered ACTIVATE with status 0, or 1 if a ring cannot be used.
ACTIVATE = 3
ACTIVATE_HEAD = Struct("<IQI")  # type, negotiated features, number of queues; then QUEUE each
QUEUE = Struct("<HHIQQQHH4x")  # size, enabled, reserved, desc, avail, used gpa, next avail, next used index

# RESET, PAUSE, RESUME: answered when the device has finished what was in flight and touches no ring any more
# (RESET forgets them); RESUME looks at every queue once.
RESET = 4
PAUSE = 5
RESUME = 6
STATUS = Struct("<II")  # type, status: 0 done, 1 failed

# CONFIG_WRITE: the driver wrote configuration space.  Answered READY, with the space as it is now.
CONFIG_WRITE = 7
CONFIG_WRITE_HEAD = Struct("<III")  # type, offset, length; then the bytes

# EXPORT: state for send/receive, while paused.  Answered EXPORT with QUEUE each (indices are what counts), and behind
#   them bytes of the device's own, which RESTORE gives to its like elsewhere: type, bytes.  Answered with status 0.
EXPORT = 8
EXPORT_HEAD = Struct("<II")  # type, number of queues
RESTORE = 43
OWN_MAX = 64  # of those bytes

# SETTLE: to a disk: is everything that was acknowledged on stable storage?  The first SETTLE after a PAUSE, or after
#   SETTLE_AHEAD, begins to bring it there.  Answered SETTLE with a status; after SETTLED_NOT_YET the VM asks again.
SETTLE = 10
SETTLED, SETTLED_FAILED, SETTLED_NOT_YET = 0, 1, 2

# MARK, UNMARK: mark from now on what the device has changed in guest memory (`guestmem`), or no longer.  Answered with
#   status 0.  What is changed after that is marked before the guest hears of it, and rings at the next PAUSE or RESET.
MARK = 28
UNMARK = 29
# SETTLE_AHEAD: to a disk that goes on, before SETTLE, which then waits for what was acknowledged until now.  Answered
#   with status 0.
SETTLE_AHEAD = 30

# LET_GO: to a disk that stands still and is settled: finish the image and let go of its lock, for the guest may go on
#   elsewhere.  Answered LET_GO with a status, as STATUS has it.
# TAKE_BACK: take the lock again.  Answered TAKE_BACK with TAKEN; in all other cases it is not taken: somebody has the
#   image, or has written to it since it was let go, or it cannot be asked.
LET_GO = 12
TAKE_BACK = 13
#   One that was lost (LOCK_LOST) is taken again by TAKE_BACK, too.  It is taken with TAKEN_WRITTEN if somebody has
#   written to the image meanwhile, and with TAKEN_UNSURE if that is not known.
TAKEN, TAKEN_IN_USE, TAKEN_CHANGED, TAKEN_FAILED, TAKEN_WRITTEN, TAKEN_UNSURE = range(6)
HAVE = (TAKEN, TAKEN_WRITTEN, TAKEN_UNSURE)
# LEND: to a disk: give away its open files.  Answered LEND with a status and, with status 0, the descriptors of its
#   images, the disk itself first.  One that stands still touches them no more until RELOAD.
# RELOAD: to a disk that stands still: somebody else has written to it.  Answered RELOAD with a status: 1 if it cannot
#   be used any more.
LEND, RELOAD = 50, 51

# SIGN: to a disk whose guest has come from another place, and is about to run: write to the image without changing it,
#   and make that last, so that the other place knows if it takes the image back.  Answered SIGN with a status.
SIGN = 15

# DIRECT: to a network device with NET_VHOST: type, 1 if an interrupt of any of its queues needs nothing but its call
#   eventfd (MSI-X), 0 if the interrupt page has to tell of it, as before the first DIRECT.  Answered with status 0.
DIRECT = 53
DIRECT_BODY = Struct("<II")

# ADDRESSES: which addresses has the guest told its neighbours?  Answered ADDRESSES with ANNOUNCED each, as of ANNOUNCE.
ADDRESSES = 14

# --- async -----------------------------------------------------------------------------------------------

# ERROR: device -> VM: type, errno, sentence in UTF-8; the device cannot go on.  Sent on sync too, as the answer to
#   whatever it was asked last.
ERROR = 16
ERROR_HEAD = Struct("<II")
# NEEDS_RESET: device -> VM: type, number of ACTIVATEs so far, sentence; the driver broke a ring that came with the
#   last of them, the device waits for a reset.  (The VM may have begun another life of the device when it reads this.)
NEEDS_RESET = 17
NEEDS_RESET_HEAD = Struct("<II")
CONFIG_CHANGED = 18  # device -> VM: as READY; raise a configuration interrupt
VERBOSITY = 19  # VM -> device: type, verbosity
VERBOSITY_BODY = Struct("<II")
SHUTDOWN = 20  # VM -> device: TYPE; flush and exit 0, as at the end of either channel
HOSTMAC = 21  # VM -> network device: the tap's link-layer address, known or changed after START
HOSTMAC_BODY = Struct("<I6s2x")
# LINK: VM -> network device: link state, 0 down or 1 up, as its operator wants it.  The guest is told, by
#   CONFIG_CHANGED, as it is when the tap itself goes down, comes up or vanishes.
LINK = 22
LINK_BODY = Struct("<II")
# ANNOUNCE: VM -> network device: type, then up to ANNOUNCED_MAX times ANNOUNCED; the guest goes on at another place,
#   let switches and the guest know, and its neighbours that it has these addresses.
ANNOUNCE = 24
ANNOUNCED = Struct("<B16s")  # kind; address, of IPv4 the first four bytes
ANNOUNCED_4, ANNOUNCED_6, ANNOUNCED_ROUTER = 4, 6, 7  # the last: an address of IPv6 of a guest that is a router
ANNOUNCED_MAX = 16
# TROUBLES: device -> VM: type; then everything that is wrong with the device now, as up to TROUBLES_MAX sentences in
#   UTF-8 of up to TROUBLE_MAX bytes, with a NUL between them; none: nothing is.  Sent after READY whenever it changes.
TROUBLES = 23
TROUBLES_MAX = 3
TROUBLE_MAX = 200
# LEASE: network device -> VM: TYPE; the guest has been given its address, for the first time since it began to use the
#   interface.
LEASE = 31
# ASK_RESOLVERS: network device -> VM: TYPE; a guest wants to know name servers.  Answered soon, whatever happens, by
#   RESOLVERS with DNS_MAX name servers of either family (those not needed are zero), or SAME_RESOLVERS (TYPE) if
#   nobody knows more than before.
ASK_RESOLVERS = 25
RESOLVERS = 26
RESOLVERS_BODY = Struct("<I12s48s")
SAME_RESOLVERS = 27
# LOCK_LOST: disk -> VM: type, and a sentence in UTF-8; somebody else may have the image.  The machine is to stand still
#   until TAKE_BACK.  Repeated every some seconds until then.
LOCK_LOST = 45
# RESIZE: VM -> disk: type, bytes that it is to have.  DISC: VM -> drive: type, flags (DISC_*), name in UTF-8; with the
#   disc's descriptor, or without one for no disc.  One of them at a time; each is answered by CHANGED: an errno, or 0
#   when it is done, and a sentence in UTF-8.  A disk that has become larger sends CONFIG_CHANGED first.
RESIZE = 40
RESIZE_BODY = Struct("<I4xQ")
CHANGED = 41
CHANGED_HEAD = Struct("<II")
DISC = 42
DISC_HEAD = Struct("<II")
DISC_FORCE = 1  # though the guest has locked the drive
# LIMIT: VM -> disk or network device: type, requests a second, bytes a second, 0 for no limit; of an interface the
#   former is 0, and the latter counts for each direction.  Sent after START where there is a limit, and later when it
#   changes.
LIMIT = 52
LIMIT_BODY = Struct("<I4xQQ")
