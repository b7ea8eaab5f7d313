"""Rules for single words of a seed.  A rule returns its value, or raises ValueError with a sentence.

The parent and vmctl load this for vm.conf and `vmctl start -C`.  So it imports little, and reads no user's file.
"""

from vmd.config.rules import DIGITS, LABEL_MAX, LETTERS, path, shown
from vmd.seed.parts import HASHED, KEY_FILES_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.config.model import SeedConfig

HOSTNAME_MAX = 253
USER_MAX = 32  # utmp(5) and useradd(8)
HASH_MAX = 512  # longer than any hash of crypt(5)
INSTANCE_ID_MAX = 128

LABEL_CHARS = LETTERS | DIGITS | {"-"}
SMALL = frozenset("abcdefghijklmnopqrstuvwxyz")
USER_FIRST = SMALL | {"_"}
USER_OTHER = SMALL | DIGITS | set("_-.")
METHOD_CHARS = SMALL | DIGITS | {"-"}
HASH_CHARS = LETTERS | DIGITS | set("./$=,+-")
INSTANCE_ID_CHARS = LETTERS | DIGITS | set("-_.")


def hostname(name: str) -> str:
    """Rule of `hostname`: a name of a host, with or without its domain."""
    labels = name.split(".")
    if not all(map(is_label, labels)) or len(name) > HOSTNAME_MAX:
        form = "labels of letters, digits and hyphens, with dots between them"
        raise ValueError(f"hostname {shown(name)}: no name of a host, which has {form}")
    if DIGITS.issuperset(labels[-1]):
        raise ValueError(f"hostname {shown(name)}: its last label is a number, as if it were an address")
    return name


def is_label(text: str) -> bool:
    """Return whether a text is one label of a host's name."""
    return 0 < len(text) <= LABEL_MAX and LABEL_CHARS.issuperset(text) and text[0] != "-" != text[-1]


def hostname_of(vm: str) -> str:
    """Return the default host name of a VM: its name, with hyphens for characters that a host name cannot have.

    "" if nothing is left of it.
    """
    for marks in ("_", "_."):
        name = "".join("-" if char in marks else char for char in vm)
        try:
            return hostname(".".join(label.strip("-") for label in name.split(".")))
        except ValueError:
            pass
    return ""


def user(name: str) -> str:
    """Rule of `user`."""
    if not 0 < len(name) <= USER_MAX or name[0] not in USER_FIRST or not USER_OTHER.issuperset(name):
        form = "lower-case letters, digits, dots, hyphens and underscores, and begins with a letter or underscore"
        raise ValueError(f"user {shown(name)}: no name of a user, which has up to {USER_MAX} {form}")
    return name


def password_hash(text: str) -> str:
    """Rule of `password-hash`.  The sentence does not show the text, because it may be a password."""
    parts = text.split("$", 2)
    begin, method, rest = parts if len(parts) == 3 else ("?", "", "")
    if begin or not method or not METHOD_CHARS.issuperset(method) or not rest or not HASH_CHARS.issuperset(rest):
        raise ValueError("password-hash: not as crypt(5) has it, such as $6$...; `openssl passwd -6` makes one")
    if len(text) > HASH_MAX:
        raise ValueError(f"password-hash: longer than {HASH_MAX} characters")
    return text


def instance_id(text: str) -> str:
    """Rule of `instance-id`."""
    if not 0 < len(text) <= INSTANCE_ID_MAX or not INSTANCE_ID_CHARS.issuperset(text):
        form = "letters, digits, dots, hyphens and underscores"
        raise ValueError(f"instance-id {shown(text)}: not 1 to {INSTANCE_ID_MAX} {form}")
    return text


def key_files(number: int) -> int:
    """Return a number of files with keys."""
    if number > KEY_FILES_MAX:
        raise ValueError(f"too many ssh-keys: {number} (limit is {KEY_FILES_MAX})")
    return number


def check(seed: "SeedConfig") -> None:
    """Raise ValueError unless the seed of a VM follows all rules."""
    key_files(len(seed.ssh_keys))
    for rule, text in ((hostname, seed.hostname), (user, seed.user), (instance_id, seed.instance_id)):
        if text:
            rule(text)
    if seed.password.startswith(HASHED):
        password_hash(seed.password)
    elif seed.password:
        path("path of a file of the seed", seed.password)
    if seed.password and not seed.user:
        raise ValueError("password-hash: whose it is has to be said with user")
    for name in (*seed.ssh_keys, seed.user_data, seed.vendor_data, seed.network_config):
        path("path of a file of the seed", name)
