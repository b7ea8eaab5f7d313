"""The parts of a VM's seed: the settings in vm.conf or of `vmctl start -C`, and the files that they name.

A seed is a small disk with the label `cidata`, which cloud-init and others read at the first boot of an image
(cloud-init's NoCloud).  A file is read as the user who names it.  `documents.py` makes the texts of the seed, `iso.py`
the disk.
"""

from vmd.errors import VmdError
from vmd.record import Part, Record

LABEL = "cidata"
# Bytes.  Clouds permit 16 KiB to 64 KiB of user data.  Several copies of a seed are in memory while it is made.
FILE_MAX = 1 << 20
PARTS_MAX = 4 << 20  # packed
KEY_FILES_MAX = 64
INTERFACES_MAX = 16
ADDRESSES_MAX = 16  # of each kind, of an interface
HASHED = "$"  # a password hash begins with it; other words are paths of files with a hash


class SeedError(VmdError):
    """Says why a seed cannot be made.  It shows no text of a file and no password."""


class SeedFile(Record):
    """A file that the user has named: its name, for messages, and its contents."""

    name: str
    data: bytes


class Interface(Record):
    """An interface of the guest.  Without `addresses` the guest uses DHCP.

    Each of `addresses` has a prefix length (`192.0.2.5/24`).  There is at most one gateway of each family.
    """

    lladdr: bytes
    addresses: tuple[str, ...] = ()
    gateways: tuple[str, ...] = ()
    name_servers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()  # domains


class SeedParts(Part):
    """All parts of a seed.

    With an `instance_id` other than at the last boot, cloud-init does the work of a first boot again.  `user` replaces
    the default user of the image, and gets the keys and the password.  The user's own `user_data` goes to the guest
    unchanged; then `user` is in `vendor-data`.
    """

    vm: str  # name
    instance_id: str = ""  # "": made from the name
    hostname: str = ""  # with or without a domain; "": the guest keeps its own
    user: str = ""  # "": the image's own
    password_hash: str = ""  # of crypt(5); "": no password
    keys: tuple[SeedFile, ...] = ()  # each in the form of authorized_keys
    user_data: SeedFile | None = None
    vendor_data: SeedFile | None = None
    network_config: SeedFile | None = None  # None: made from `interfaces`
    network: bool = True  # False: no network-config, so the guest's own default counts
    interfaces: tuple[Interface, ...] = ()
