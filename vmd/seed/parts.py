"""What the seed of a VM is made of: what vm.conf and `vmctl start -C` say, and the files that they name.

A seed is a small disk with the label `cidata`, which cloud-init and others read at the first boot of an image
(cloud-init's NoCloud).  Whoever names a file reads it; `documents.py` makes the texts of the seed, `iso.py` the disk.
"""

from vmd.errors import VmdError
from vmd.record import Part, Record

LABEL = "cidata"
# Bytes.  A cloud gives 16 KiB to 64 KiB of user data; all of a seed is in memory several times while it is made.
FILE_MAX = 1 << 20
PARTS_MAX = 4 << 20  # packed
KEY_FILES_MAX = 64
INTERFACES_MAX = 16
ADDRESSES_MAX = 16  # of each kind, of an interface
HASHED = "$"  # with which the hash of a password begins; anything else is the path of a file that has one


class SeedError(VmdError):
    """A seed cannot be made; says what of it is wrong.  No text of a file nor a password is in it."""


class SeedFile(Record):
    """A file that somebody has named: its name, for messages, and what it holds."""

    name: str
    data: bytes


class Interface(Record):
    """An interface of the guest; without `addresses` it asks for them by DHCP.

    `addresses` have a prefix length each (`192.0.2.5/24`), `gateways` are one of each family at most.
    """

    lladdr: bytes
    addresses: tuple[str, ...] = ()
    gateways: tuple[str, ...] = ()
    name_servers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()  # domains


class SeedParts(Part):
    """All that a seed is made of.

    `instance_id` says whether the guest is the same as at its last boot: with another one cloud-init does the work of a
    first boot again.  `user` is made, and has the keys and the password, in place of the user that the image would
    make.  A `user_data` of somebody's own goes to the guest unchanged; what `user` says is in `vendor-data` then.
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
    network: bool = True  # else the seed says nothing of the network, and the guest does as it likes
    interfaces: tuple[Interface, ...] = ()
