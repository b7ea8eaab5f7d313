"""Tokens of vm.conf: quoting, continued lines, macros and include files (*cat. 2.1*).

The lexer is written by hand.  Regular expressions, from which lexers are usually made, cannot put a macro's value in
front of the input, join continued lines or switch files.  The parser needs only the method `token()`.

The lexer also keeps track of lines and braces.  So `skip_line` can continue after a syntax error at the right place,
and the rest of the block causes no further errors.
"""

import codecs
import os
import stat
from collections.abc import Callable, Mapping

from vmd.config.rules import shown
from vmd.errors import ConfigError, VmdError, sentence
from vmd.nearest import meant

INPUT_MAX = 16 << 20  # bytes of all files and macros together, counted each time that one is read
INCLUDE_MAX = 16  # nested include files
TOKEN_MAX = 8095  # characters
ERRORS_MAX = 100  # a file with more must not fill memory or the log
INT64 = range(-(1 << 63), 1 << 63)


def kind_of(word: str) -> str:
    """Return the kind of token for a keyword."""
    return word.upper().replace("-", "_")


def keyword_of(kind: str) -> str:
    """Return the keyword for a kind of token."""
    return kind.lower().replace("_", "-")


RESERVED = frozenset({
    "add", "agentx", "allow", "boot", "cdrom", "context", "delay", "device", "disable", "disk", "down",
    "enable", "format", "group", "id", "include", "inet6", "instance", "interface", "interfaces",
    "lladdr", "local", "locked", "memory", "net", "owner", "parallel", "path", "prefix", "rdomain",
    "sev", "seves", "size", "socket", "staggered", "start", "switch", "up", "vm",
})  # fmt: skip

SEED_WORDS = frozenset({
    "hostname", "user", "ssh-key", "password-hash", "user-data", "vendor-data", "network-config", "instance-id",
})  # fmt: skip

# Where vmd(8) takes a word, our own keywords are plain words, so that upstream's files keep their meaning.
# Inside a block they are keywords only where no string can stand: not after a token of STRING_FOLLOWS.
BLOCK_WORDS = frozenset({
    "vcpus", "virtio", "initrd", "cmdline", "serial", "console", "log", "keep", "limit", "cpu", "weight", "iops",
    "rate", "address", "dns", "forward", "hostname", "seed", "vhost",
}) | SEED_WORDS  # fmt: skip
NIC_WORDS = frozenset({"address", "dns", "forward", "hostname", "limit", "vhost"})
# Exception: after one of these words, the keywords in its set end a sequence of strings.
ENDING_WORDS = {
    "boot": frozenset({"initrd", "cmdline"}),
    "disk": frozenset({"serial", "limit"}),
    "log": frozenset({"size", "keep"}),
    "limit": frozenset({"iops", "rate", "serial"}) | NIC_WORDS,  # of a disk or an interface
    "memory": frozenset({"cpu", "weight"}),  # in a block of limits
    "cpu": frozenset({"weight"}),
    **dict.fromkeys(("interface", "switch", "group", "lladdr", *NIC_WORDS - {"limit"}), NIC_WORDS),
    **dict.fromkeys(SEED_WORDS, SEED_WORDS),
    "hostname": NIC_WORDS | SEED_WORDS,
}
STRING_FOLLOWS = frozenset({
    "ADDRESS", "BOOT", "CDROM", "CMDLINE", "DISK", "DNS", "FORMAT", "FORWARD", "GROUP", "HOSTNAME", "INITRD",
    "INTERFACE", "LLADDR", "LOG", "MEMORY", "OWNER", "SERIAL", "SIZE", "STRING", "SWITCH", "VIRTIO",
    *map(kind_of, SEED_WORDS),
})  # fmt: skip
# Outside blocks our keywords are `dns` and `nat` after `local`, LINE_WORDS at the beginning of a line, LIMITED_WORDS
# after `limit`, and `listen` after `metrics`.
LOCAL_WORDS = frozenset({"dns", "nat"})
LINE_WORDS = frozenset({"ids", "limit", "metrics"})
LIMITED_WORDS = frozenset({"vcpus", "vms"})  # besides `memory`
METRICS_WORDS = frozenset({"listen"})

TOKENS = (
    *(word.upper() for word in sorted(RESERVED - {"add", "id"})),  # upstream reserves these two without using them
    *(kind_of(word) for word in sorted(BLOCK_WORDS)),
    "IDS", "LISTEN", "METRICS", "NAT", "NL", "NUMBER", "STRING", "VMS",
)  # fmt: skip
LITERALS = "{},="

_DIGITS = frozenset("0123456789")
_ALNUM = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz") | _DIGITS
_MACRO_NAME = _ALNUM | {"_"}
_WORD_START = _ALNUM | set(":_/")
_WORD = _ALNUM | set("\"$%&'*+-./:;<>?@[\\]^_`|~")
_NUMBER_END = frozenset(" \t\n\v\f\r),/}=")


class Token:
    """A keyword, word, number or character.  `text` is the token as it is written in the file."""

    def __init__(self, kind: str, value: object, text: str, line: int) -> None:
        self.type = kind
        self.value = value
        self.text = text
        self.line = line
        self.closes = False  # a brace that closes the block around its line


class Source:
    """One open file: its text with a position.  The rest of a macro's value, `expansion`, is read first."""

    def __init__(self, path: str, identity: tuple[int, int], text: str) -> None:
        self.path = path
        self.identity = identity
        self.text = text
        self.at = 0
        self.line = 1
        self.expansion = ""
        self.expansion_at = 0
        self.ended = False

    @property
    def expanding(self) -> bool:
        """Whether the next character is from a macro's value.  `$` has no meaning there, so macros cannot nest."""
        return self.expansion_at < len(self.expansion)

    def raw_peek(self) -> str:
        """Return the next character without interpreting backslashes; "" at the end."""
        if self.expanding:
            return self.expansion[self.expansion_at]
        return self.text[self.at : self.at + 1]

    def raw(self) -> str:
        """Return and consume the next character without interpreting backslashes; "" at the end."""
        c = self.raw_peek()
        if self.expanding:
            self.expansion_at += 1
        else:
            self.at += len(c)
            self.line += c == "\n"
        return c

    def peek(self) -> str:
        """Return the next character outside quotes.  A backslash joins lines; before other characters it is dropped."""
        if self.expanding:
            return self.expansion[self.expansion_at]
        while self.text.startswith("\\\n", self.at):
            self.at += 2
            self.line += 1
        return self.text[self.at : self.at + 2].removeprefix("\\")[:1]

    def advance(self) -> None:
        """Consume what `peek` returned."""
        escape = not self.expanding and self.raw_peek() == "\\"
        self.raw()
        if escape:
            self.raw()

    def take(self, allowed: frozenset[str]) -> str:
        """Consume all characters of the set `allowed` that follow.  Return the first TOKEN_MAX + 1 of them."""
        taken: list[str] = []
        while (c := self.peek()) and c in allowed:
            self.advance()
            if len(taken) <= TOKEN_MAX:
                taken.append(c)
        return "".join(taken)

    def skip_comment(self) -> None:
        """Consume a comment up to its newline.  A newline after a backslash does not end it."""
        self.expansion = ""
        while True:
            end = self.text.find("\n", self.at)
            comment = self.text[self.at : end if end >= 0 else len(self.text)]
            self.at += len(comment)
            if end < 0 or (len(comment) - len(comment.rstrip("\\"))) % 2 == 0:
                return
            self.raw()


def read_regular(path: str, limit: int) -> tuple[tuple[int, int], str]:
    """Return a file's identity (device, inode) and its text.  Bytes that are not UTF-8 become surrogates.

    Raises:
        OSError: the file cannot be opened or read.
        VmdError: it is not a regular file, is longer than `limit` bytes, or is UTF-16.
    """
    # The type is checked before the open: opening a FIFO can block, and opening some devices has effects.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise VmdError("not a regular file")
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise VmdError("not a regular file")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise VmdError(f"more than {INPUT_MAX >> 20} MiB of configuration")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise VmdError("its text is UTF-16; save it as UTF-8")
    # Editors on other systems write a byte order mark, and CR LF at the end of a line.
    text = content.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").decode("utf-8", "surrogateescape")
    return (status.st_dev, status.st_ino), text


class Lexer:
    """Turns a file and the files that it includes into tokens.  Collects the errors of all stages, also the parser's.

    `macros` are from the command line: an assignment in a file does not change them.
    """

    def __init__(self, macros: Mapping[str, str]) -> None:
        self.persistent = frozenset(macros)
        self.macros = dict(macros)
        self.unused = dict.fromkeys(macros)
        self.sources: list[Source] = []
        self.budget = INPUT_MAX
        self.errors: list[VmdError] = []
        self.on_missing: Callable[[str], None] | None = None  # called for a missing included file; None: it is an error
        self.path = ""
        self.line = 0
        self.pending: list[Token] = []
        self.previous = "NL"
        self.ending: frozenset[str] = frozenset()  # keywords that end a sequence of strings in this statement
        self.depth = 0  # open braces
        self.floor = 0  # lowest depth on the current line
        self.spread: tuple[int, int] | None = None  # lines of a quoted string over several lines

    def error(self, what: str, line: int | None = None) -> None:
        """Report an error at the line of the last token, or at another line of the same file."""
        if len(self.errors) == ERRORS_MAX:
            self.errors.append(ConfigError(self.path, self.line, "too many errors, giving up"))
            self.sources.clear()
        if len(self.errors) < ERRORS_MAX:
            self.errors.append(ConfigError(self.path, self.line if line is None else line, what))

    @property
    def where(self) -> str:
        """`path:line` of the last token."""
        return f"{self.path}:{self.line}"

    def open(self, path: str) -> None:
        """Read a file next; after its end, continue in the current one.

        Raises:
            OSError, VmdError: as `read_regular`; VmdError also if the file includes itself, or includes are too deep.
        """
        identity, text = read_regular(path, self.budget)
        if any(source.identity == identity for source in self.sources):
            raise VmdError("it includes itself")
        if len(self.sources) > INCLUDE_MAX:
            raise VmdError(f"more than {INCLUDE_MAX} files deep")
        self.budget -= len(text)
        if not self.sources:
            self.path = path
        self.sources.append(Source(path, identity, text))

    def beside(self, name: str) -> str:
        """Return the path of a file that the current file names.

        A relative name is relative to the directory of the current file.  vmd(8) uses its working directory instead.
        The working directory of a daemon is /, so a reload would not find the files that the start found.
        """
        return os.path.join(os.path.dirname(self.path), name) if name else ""

    def include(self, name: str) -> None:
        """Carry out an `include` statement."""
        try:
            self.open(self.beside(name))
        except OSError as error:
            what = f"failed to include file {shown(name)}: {sentence(error)}"
            if self.on_missing is not None:
                self.on_missing(f"{self.where}: {what}: going on without it")
            else:
                self.error(what)
        except VmdError as error:
            self.error(f"failed to include file {shown(name)}: {error}")

    def define(self, name: str, value: str) -> None:
        """Carry out a macro assignment."""
        if any(c.isspace() for c in name):
            self.error("macro name cannot contain whitespace")
        elif name not in self.persistent:
            self.macros[name] = value
            self.unused[name] = None

    def token(self) -> Token | None:
        """Return the next token; None at the end of the outermost file."""
        if self.previous == "NL":
            self.spread = None
        token = self.pending.pop(0) if self.pending else self.scan()
        if token is not None:
            self.previous = token.type
            if token.type == "NL":
                self.floor = self.depth
        return token

    def skip_line(self, bad: Token) -> None:
        """Skip the rest of the line after a syntax error at `bad`, the last token.  The next token is its end.

        A block that begins on that line is skipped, too.  A brace on that line that closes the block around it is kept
        as a line of its own, so that the following lines are read outside of that block.
        """
        token: Token | None = bad
        while token is not None:
            if token.closes:
                token.closes = False  # a second error at this brace must not return it again
                self.pending = [Token("NL", "\n", "\n", token.line), self.copy(token)]
                break
            if token.type == "NL" and self.depth <= self.floor:
                self.pending = [self.copy(token)]
                break
            token = self.scan()
        bad.type = "ERROR"  # the parser still has this token and must discard it

    @staticmethod
    def copy(token: Token) -> Token:
        """Return a copy of a token, which does not close its block (`closes`) a second time."""
        return Token(token.type, token.value, token.text, token.line)

    def scan(self) -> Token | None:
        """Read one token."""
        while self.sources:
            source = self.sources[-1]
            while (c := source.peek()) in ("\t", " "):
                source.advance()
            if c == "#":
                source.skip_comment()
                c = source.peek()
            self.path, self.line = source.path, source.line
            if not c:
                if not source.ended:
                    # A last line without a newline ends with its file, not in the file that includes it.
                    source.ended = True
                    return Token("NL", "\n", "end of line", source.line)
                self.sources.pop()
                continue
            if c == "$" and not source.expanding:
                source.advance()
                if not self.expand(source):
                    return self.bad()
                continue
            return self.visible(source, c)
        return None

    def bad(self) -> Token:
        """Return a token that no production accepts.  Its error has been reported already."""
        return Token("ERROR", None, "", self.line)

    def expand(self, source: Source) -> bool:
        """Read the name of a macro, and put its value in front of the input.  Return False after an error."""
        name = source.take(_MACRO_NAME)
        if len(name) > TOKEN_MAX:
            self.error("string too long")
            return False
        if name not in self.macros:
            self.error(f"macro '{shown(name)}' not defined{meant(name, self.macros)}")
            return False
        self.unused.pop(name, None)
        self.budget -= len(self.macros[name])
        if self.budget < 0:
            self.error(f"macros expand to more than {INPUT_MAX >> 20} MiB")
            self.sources.clear()
            return False
        source.expansion, source.expansion_at = self.macros[name], 0
        return True

    def visible(self, source: Source, c: str) -> Token:
        """Read a token that starts with `c`."""
        if c in "\"'":
            return self.quoted(source, c)
        if (c in _DIGITS or c == "-") and self.previous != "SERIAL":  # a serial number is a string
            return self.number(source)
        if c in _WORD_START:
            return self.word(source.take(_WORD))
        source.advance()
        if c == "\n":
            return Token("NL", c, "end of line", self.line)
        token = Token(c, c, c, self.line)
        if c == "{":
            self.depth += 1
        elif c == "}" and self.depth:
            self.depth -= 1
            token.closes = self.depth < self.floor
            self.floor = min(self.floor, self.depth)
        return token

    def quoted(self, source: Source, quote: str) -> Token:
        """Read a string that ends with the quote `quote`."""
        source.advance()
        text: list[str] = []
        spread = False
        while (c := source.raw()) != quote:
            spread = spread or c == "\n"
            if c == "\\" and source.raw_peek() in {quote, " ", "\t", "\n"}:
                c = source.raw()
            if not c:
                self.error("reached end of file while parsing quoted string")
                return self.bad()
            if c == "\0":
                self.error("quoted string contains a NUL byte")
                return self.bad()
            if c != "\n" and len(text) <= TOKEN_MAX:
                text.append(c)
        if spread and self.spread is None:
            self.spread = self.line, source.line
        return self.string("".join(text))

    def string(self, text: str) -> Token:
        """Return the token of a string, or report that it is too long."""
        if len(text) > TOKEN_MAX:
            self.error("string too long")
            return self.bad()
        return Token("STRING", text, text, self.line)

    def number(self, source: Source) -> Token:
        """Read a number, or a word that begins with digits: `1G`, `10.0.0.1`, `00:11:22:33:44:55`."""
        sign = ""
        if source.peek() == "-":
            sign = "-"
            source.advance()
        digits = source.take(_DIGITS)
        c = source.peek()
        if not digits:
            return Token(sign, sign, sign, self.line)
        if c and c not in _NUMBER_END:
            if sign:
                # As upstream, the minus is a token of its own here.  It is a syntax error: no production has one.
                return Token(sign, sign, sign + digits, self.line)
            return self.word(digits + source.take(_WORD))
        text = sign + digits
        if len(text) > TOKEN_MAX:
            self.error("string too long")
            return self.bad()
        value = int(digits.lstrip("0")[:20] or "0") * (-1 if sign else 1)
        if value not in INT64:
            reason = "too small" if sign else "too large"
            self.error(f'"{shown(text)}" invalid number: {reason}')
            return self.bad()
        return Token("NUMBER", value, text, self.line)

    def word(self, text: str) -> Token:
        """Return the token of an unquoted word: a keyword if it is one at this place, else a string."""
        kind = "STRING"
        if text in RESERVED:
            kind = text.upper()
        elif self.depth == 0:
            if (
                (text in LOCAL_WORDS and self.previous == "LOCAL")
                or (text in LINE_WORDS and self.previous == "NL")
                or (text in LIMITED_WORDS and self.previous == "LIMIT")
                or (text in METRICS_WORDS and self.previous == "METRICS")
            ):
                kind = text.upper()
        elif text in BLOCK_WORDS and (
            self.previous not in STRING_FOLLOWS
            or (text in self.ending and self.previous == "STRING")
        ):
            kind = kind_of(text)
        if kind == "STRING":
            return self.string(text)
        if text in ENDING_WORDS or (text not in self.ending and text != "format"):  # `format` continues a disk
            self.ending = ENDING_WORDS.get(text, frozenset())
        return Token(kind, text, text, self.line)
