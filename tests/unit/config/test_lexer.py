"""Words, numbers, quoting, continued lines, macros and include files (hostile 59)."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.config.conftest import Loader
from vmd.config.check import ConfigErrors, load
from vmd.config.lexer import ERRORS_MAX, RESERVED, TOKENS, Lexer
from vmd.errors import VmdError


def tokens(tmp_path: Path, text: str, **macros: str) -> list[object]:
    """Return the values of a text's tokens, without the final newline."""
    path = tmp_path / "tokens.conf"
    path.write_text(text)
    lexer = Lexer(macros)
    lexer.open(str(path))
    found: list[object] = []
    while token := lexer.token():
        found.append(token.value)
    assert lexer.errors == []
    return found[:-1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a bc", ["a", "bc"]),
        ("/a/b-c.d_e", ["/a/b-c.d_e"]),
        (":group", [":group"]),
        ("a;b'c\"d$e", ["a;b'c\"d$e"]),
        ("a{b}", ["a", "{", "b", "}"]),
        ("a=b", ["a", "=", "b"]),
        ("a,b", ["a", ",", "b"]),
        ("512", [512]),
        ("-5", [-5]),
        ("007", [7]),
        ("1G", ["1G"]),
        ("1.5G", ["1.5G"]),
        ("512}", [512, "}"]),
        ("512,", [512, ","]),
        ("10/8", [10, "/8"]),
        ("5=", [5, "="]),
        ("5)", [5, ")"]),
        ("5#", ["5"]),
        ("00:11:22:33:44:55", ["00:11:22:33:44:55"]),
        ("9223372036854775807", [(1 << 63) - 1]),
        ("-9223372036854775808", [-(1 << 63)]),
        ("0" * 4000 + "1", [1]),
        ("'a b'", ["a b"]),
        ('"a b"', ["a b"]),
        ("'a\"b'", ['a"b']),
        ('"a\\"b"', ['a"b']),
        ('"a\\ b\\\tc"', ["a b\tc"]),
        ('"a\\nb"', ["a\\nb"]),
        ('"a\\\nb"', ["ab"]),
        ('"a\nb"', ["ab"]),
        ('""', [""]),
        ("a#b", ["a"]),
        ("a # b {", ["a"]),
        ("a # b \\\n c", ["a"]),
        ("a # b \\\\\n c", ["a", "\n", "c"]),
        ("a \\\n b", ["a", "b"]),
        ("a\\\nb", ["ab"]),
        ("a\\b", ["ab"]),
        ("\\\n\\\na", ["a"]),
        ("a\\", ["a"]),
        ("\ta  b\t", ["a", "b"]),
        ('"é"', ["é"]),
    ],
)
def test_tokens(tmp_path: Path, text: str, expected: list[object]) -> None:
    """The rules of cat. 2.1, one by one."""
    assert tokens(tmp_path, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$m/db1.qcow2", ["/srv/vm/db1.qcow2"]),
        ("$m", ["/srv/vm"]),
        ("'$m'", ["$m"]),
        ("x$m", ["x$m"]),
        ("$m $m", ["/srv/vm", "/srv/vm"]),
        ("$m{", ["/srv/vm", "{"]),
        ("$two", ["a", "b"]),
        ("$empty a", ["a"]),
        ("$n", [512]),
        ("$n}", [512, "}"]),
        ("$quoted", ["a b"]),
        ("$open b'", ["a b"]),
        ("$bomb", ["$", "m"]),
        ("$cut a\nb", ["\n", "b"]),
    ],
)
def test_macros_are_pushed_back_onto_the_input(tmp_path: Path, text: str, expected: list[object]) -> None:
    """A value is read in place of the macro, but `$` in it is an ordinary character."""
    macros = {"m": "/srv/vm", "two": "a b", "empty": "", "n": "512", "quoted": "'a b'", "open": "'a"}
    assert tokens(tmp_path, text, bomb="$m", cut="#", **macros) == expected


def test_macro_of_the_file(conf: Loader) -> None:
    """An assignment applies from its line on, also to numbers and sizes."""
    config = conf.load('m = "2G"\nn = 3\nvm a { memory $m\n vcpus $n\n}\nm = 4G\nvm b { memory $m }\n')

    assert [(vm.memory_bytes >> 30, vm.vcpus) for vm in config.vms] == [(2, 3), (4, 1)]
    assert conf.warnings == []


def test_macro_is_defined_before_the_next_line_is_read(conf: Loader) -> None:
    """The parser must not look ahead over the end of a line."""
    (vm,) = conf.load('m = "vm"\n$m a { disable }\n').vms

    assert vm.name == "a"


def test_persistent_macro_wins(conf: Loader) -> None:
    """A macro of `-D` overrides the file, as with upstream's vmd."""
    (vm,) = conf.load("m = 2G\nvm a { memory $m }\n", m="1G").vms

    assert vm.memory_bytes == 1 << 30


def test_unused_macros_are_reported(conf: Loader) -> None:
    """Macros of the command line are reported, too."""
    conf.load("a = 1\n", b="2")

    assert conf.warnings == ["warning: macro 'b' not used", "warning: macro 'a' not used"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("vm $x { disable }\n", "1: macro 'x' not defined"),
        ("\nlocal prefix $\n", "2: macro '' not defined"),
        ('"a b" = "c"\n', "1: macro name cannot contain whitespace"),
        ("a = 'b\n\n", "1: reached end of file while parsing quoted string"),
        (f"a = {'b' * 8096}\n", "1: string too long"),
        (f"a = '{'b' * 8096}'\n", "1: string too long"),
        (f"a = {'1' * 8096}x\n", "1: string too long"),
        (f"a = ${'b' * 8096}\n", "1: string too long"),
        ("a = 9223372036854775808\n", '1: "9223372036854775808" invalid number: too large'),
        ("a = -9223372036854775809\n", '1: "-9223372036854775809" invalid number: too small'),
        (f"a = {'1' * 8000}\n", f'1: "{"1" * 77}..." invalid number: too large'),
        ("a = 'b\0c'\n", "1: quoted string contains a NUL byte"),
        ("a = -b\n", '1: syntax error at "-"'),
        ("a = b!\n", '1: syntax error at "!"'),
        ("memory = 1G\n", '1: syntax error at "memory"'),
        ("local prefix é\n", '1: syntax error at "é"'),
        ("a = b\r\r\n", '1: syntax error at "\r"'),
        ("include 'nowhere'\n", "1: failed to include file nowhere: No such file or directory"),
        ("include '/'\n", "1: failed to include file /: not a regular file"),
        ("include '/dev/zero'\n", "1: failed to include file /dev/zero: not a regular file"),
        ("include ''\n", "1: failed to include file : No such file or directory"),
    ],
)
def test_lexical_errors(conf: Loader, text: str, error: str) -> None:
    """Each has its line and its message, and the parser adds no second one."""
    assert conf.errors(text) == [error]


@pytest.mark.parametrize("text", [f"a = {'b' * 8095}\n", f"a = '{'b' * 8095}'\n"])
def test_longest_token(conf: Loader, text: str) -> None:
    """It has one character less than a token that is too long."""
    conf.load(text)


def test_line_numbers_count_continued_and_quoted_newlines(conf: Loader) -> None:
    """An error has the line number in the file."""
    assert conf.errors("a = \\\n\\\n b\nc = 'd\ne'\n# x \\\n y\nfoo\n") == ["8: syntax error at end of line"]


def test_include(conf: Loader, write: Callable[[str, str], str]) -> None:
    """The file's statements replace the include.  Macros pass in both directions."""
    inner = write("inner.conf", 'vm $name { memory $ram }\nname = "outer"')

    config = conf.load(f'ram = 1G\nname = inner\ninclude "{inner}"\nvm $name {{ memory 2G }}')

    assert [(vm.name, vm.memory_bytes >> 30) for vm in config.vms] == [("inner", 1), ("outer", 2)]
    assert [vm.origin for vm in config.vms] == [f"{inner}:1", f"{conf.path}:4"]


def test_include_is_relative_to_the_including_file(conf: Loader, write: Callable[[str, str], str]) -> None:
    """Each level starts at the directory of its own file."""
    write("sub/one.conf", 'include "two.conf"\n')
    write("sub/two.conf", "vm two { disable }\n")

    assert [vm.name for vm in conf.load("include sub/one.conf\n").vms] == ["two"]


def test_include_is_not_looked_for_elsewhere(
    conf: Loader, write: Callable[[str, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon's current directory at a reload differs from that at its start."""
    monkeypatch.chdir(Path(write("elsewhere/one.conf", "vm one { disable }\n")).parent)

    assert conf.errors("include 'one.conf'\n") == ["1: failed to include file one.conf: No such file or directory"]


def test_error_in_an_included_file_names_that_file(conf: Loader, write: Callable[[str, str], str]) -> None:
    """The line after the include belongs to the outer file again, even if the inner file ends without a newline."""
    inner = write("inner.conf", "\nfoo")

    errors = conf.errors(f"include '{inner}'\nbar\n")

    assert errors == [f"{inner}:2: syntax error at end of line", "2: syntax error at end of line"]


def test_include_of_itself(conf: Loader, write: Callable[[str, str], str]) -> None:
    """A file may include itself directly, through another file, or through a link."""
    other = write("other.conf", f"include '{conf.path}'\n")
    link = conf.directory / "link.conf"
    link.symlink_to(conf.path)

    errors = conf.errors(f"include 'vm.conf'\ninclude '{other}'\ninclude '{link}'\n")

    assert errors == [
        "1: failed to include file vm.conf: it includes itself",
        f"{other}:1: failed to include file {conf.path}: it includes itself",
        f"3: failed to include file {link}: it includes itself",
    ]


def test_include_depth_is_bounded(conf: Loader, write: Callable[[str, str], str]) -> None:
    """Seventeen nested files below the first are one too many."""
    for i in range(20):
        write(f"{i}.conf", f"include '{i + 1}.conf'\n")

    (error,) = conf.errors("include '0.conf'\n")

    assert error.endswith("16.conf: more than 16 files deep")


def test_size_is_bounded(conf: Loader, write: Callable[[str, str], str]) -> None:
    """The limit is for all files together, and a file counts each time it is included."""
    big = write("big.conf", "#" * (6 << 20))

    (error,) = conf.errors(f"include '{big}'\n" * 3)

    assert error == f"3: failed to include file {big}: more than 16 MiB of configuration"


@pytest.mark.parametrize(("more", "errors"), [(0, 0), (1, 1)])
def test_largest_file(conf: Loader, more: int, errors: int) -> None:
    """It has 16 MiB."""
    conf.path.write_bytes(b"#" * ((16 << 20) + more))
    lexer = Lexer({})
    try:
        lexer.open(str(conf.path))
    except VmdError as error:
        lexer.errors.append(error)

    assert len(lexer.errors) == errors


def test_expansion_is_bounded(conf: Loader) -> None:
    """A few kilobytes of macros cannot become gigabytes."""
    (error,) = conf.errors(f"a = '# {'b' * 8000}'\n" + "$a\n" * 3000)

    assert error.endswith(": macros expand to more than 16 MiB")


@pytest.mark.parametrize(("limit", "fits"), [(10, True), (9, False)])
def test_largest_expansion(conf: Loader, monkeypatch: pytest.MonkeyPatch, limit: int, fits: bool) -> None:
    """The limit is for files and macros together.  This file has six bytes, and two macros of two."""
    monkeypatch.setattr("vmd.config.lexer.INPUT_MAX", limit)
    conf.path.write_text("$m $m\n")
    lexer = Lexer({"m": "ab"})
    lexer.open(str(conf.path))

    found = [token.value for token in iter(lexer.token, None)]

    assert found == (["ab", "ab", "\n", "\n"] if fits else ["ab", None])
    assert bool(lexer.errors) is not fits


def test_sparse_file_is_not_read(conf: Loader) -> None:
    """A file of a terabyte takes no memory."""
    with conf.path.open("wb") as file:
        file.truncate(1 << 40)

    with pytest.raises(Exception, match="more than 16 MiB of configuration"):
        Lexer({}).open(str(conf.path))


def test_fifo_does_not_hang(conf: Loader) -> None:
    """No process will ever write to it."""
    os.mkfifo(conf.directory / "fifo")

    assert conf.errors("include fifo\n") == ["1: failed to include file fifo: not a regular file"]


@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
def test_special_files_are_not_opened(conf: Loader, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The open itself may have an effect, such as that of a watchdog or a tape."""
    path = {"fifo": str(conf.directory / "fifo"), "directory": str(conf.directory), "device": "/dev/null"}[kind]
    if kind == "fifo":
        os.mkfifo(path)
    monkeypatch.setattr("vmd.config.lexer.os.open", lambda *_of: pytest.fail("it was opened"))

    with pytest.raises(VmdError, match=r"^not a regular file$"):
        Lexer({}).open(path)


def test_number_of_errors_is_bounded(conf: Loader) -> None:
    """A file that is not a vm.conf does not fill the log."""
    errors = conf.errors("x\n" * 100000)

    assert len(errors) == ERRORS_MAX + 1
    assert errors[-1] == f"{ERRORS_MAX + 1}: too many errors, giving up"


def test_reading_ends_after_too_many_errors(conf: Loader) -> None:
    """The rest of a large file would only take time."""
    conf.path.write_text("a b\n")
    lexer = Lexer({})
    lexer.open(str(conf.path))
    for _ in range(ERRORS_MAX):
        lexer.error("x")
    assert lexer.token() is not None
    lexer.error("x")

    assert lexer.token() is None


def test_every_reserved_word_is_a_token_or_means_nothing() -> None:
    """A word that is added to one list is not forgotten in the other."""
    assert {word.upper() for word in RESERVED} - set(TOKENS) == {"ADD", "ID"}


# marks and line ends of editors


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
def test_ends_of_lines_and_mark(conf: Loader, mark: bytes, end: bytes) -> None:
    """Files of other systems have the same meaning.  Line numbers are those that an editor shows."""
    lines = [b'ram = "1G"  # comment', b"vm a {", b"memory \\", b"$ram", b'cmdline "a', b'b"', b"boot '/k'", b"}", b""]

    (vm,) = conf.load(mark + end.join(lines)).vms

    assert (vm.memory_bytes, vm.cmdline, vm.kernel, vm.origin) == (1 << 30, "ab", "/k", f"{conf.path}:2")


def test_marks_of_included_files(conf: Loader) -> None:
    """Each file may have one at its beginning.  Elsewhere no word can begin with that character."""
    (conf.directory / "inner.conf").write_bytes(b"\xef\xbb\xbfvm a { disable }\r\n")

    assert [vm.name for vm in conf.load("include inner.conf\n").vms] == ["a"]
    assert conf.errors("\n\ufeffvm a { disable }\n") == ['2: syntax error at "\ufeff"']


@pytest.mark.parametrize("coding", ["utf-16-le", "utf-16-be"])
def test_utf16_is_named(conf: Loader, coding: str) -> None:
    """One error names the encoding, instead of an error for each line."""
    text = "\ufeffvm a {\r\n disable\r\n}\r\n".encode(coding)

    with pytest.raises(ConfigErrors, match=r"/vm\.conf: its text is UTF-16; save it as UTF-8$"):
        conf.load(text)


def test_an_error_is_one_line(conf: Loader) -> None:
    """This holds for any file name."""
    path = conf.directory / "a\nb.conf"
    path.write_text("vm a { memory lots }\nfoo\n")

    with pytest.raises(ConfigErrors) as refused:
        load(str(path), warn=conf.warnings.append)

    first, second = str(refused.value).split("\n")
    assert first == f"{conf.directory}/a\\x0ab.conf:1: failed to parse size: lots"
    assert second.startswith(f"{conf.directory}/a\\x0ab.conf:2: syntax error")
    assert refused.value.summary == "2 errors, configuration unchanged"
