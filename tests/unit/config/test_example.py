"""vm.conf.example and the manual are complete and correct."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vmd.config import lexer
from vmd.config.check import load
from vmd.config.model import Config

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "vm.conf.example"
MANUAL = ROOT / "man" / "vm.conf.5"
OURS = lexer.BLOCK_WORDS | lexer.LOCAL_WORDS | lexer.LINE_WORDS | lexer.LIMITED_WORDS | lexer.METRICS_WORDS


def statements(text: str) -> str:
    """Return a file without its comments and quoted strings."""
    return re.sub(r'"[^"\n]*"|#.*', "", text)


@pytest.fixture
def example(tmp_path: Path) -> Config:
    """The example, loaded with an empty file for each file that it names."""
    for name in re.findall(r"\$images/(\S+)", EXAMPLE.read_text()):
        (tmp_path / name).touch()
    warnings: list[str] = []
    config = load(str(EXAMPLE), macros={"images": str(tmp_path)}, warn=warnings.append)
    assert warnings == []
    return config


def test_example_is_a_configuration(example: Config) -> None:
    """Only one of its VMs would be started with the daemon."""
    assert [vm.name for vm in example.vms if vm.enabled] == ["db1"]
    assert len(example.vms) == len(re.findall(r"^vm ", EXAMPLE.read_text(), re.MULTILINE))
    assert len(example.switches) == len(re.findall(r"^switch ", EXAMPLE.read_text(), re.MULTILINE))


def test_example_shows_every_reserved_word() -> None:
    """Words are in statements.  `include`, whose file must exist, and words without a meaning are in comments."""
    text = EXAMPLE.read_text()
    used = set(re.findall(r"[a-z0-9]+(?:-[a-z]+)*", statements(text)))

    assert lexer.RESERVED - used == {"add", "id", "include"}
    assert re.search(r'^# include "', text, re.MULTILINE)
    assert "add, id." in text


def test_example_separates_our_keywords() -> None:
    """All of our keywords are below the heading, and none is above."""
    upstream, ours = EXAMPLE.read_text().split("# ---- Ours: ")
    words = re.compile(r"[a-z0-9]+(?:-[a-z]+)*")

    assert set(words.findall(statements(upstream))).isdisjoint(OURS)
    assert set(words.findall(statements(ours))) >= OURS


def test_manual_explains_every_word() -> None:
    """Each keyword is an item, and each reserved word is mentioned."""
    text = MANUAL.read_text()
    keywords = set(re.findall(r"[a-z0-9]+(?:-[a-z]+)*", " ".join(re.findall(r"\bIc ([^\n]*)", text))))

    assert keywords >= lexer.RESERVED - {"add", "id"} | OURS
    assert all(re.search(rf"\b{word}\b", text) for word in lexer.RESERVED)


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="mandoc is not installed")
def test_manual_is_clean() -> None:
    """mandoc has no complaints."""
    lint = subprocess.run(["mandoc", "-Tlint", "-Wwarning", str(MANUAL)], capture_output=True, text=True, check=False)

    assert (lint.stdout, lint.returncode) == ("", 0)


def test_example_of_the_manual(tmp_path: Path) -> None:
    """It is a valid configuration if its files and its user exist."""
    (text,) = re.findall(r"\.Bd -literal -offset indent\n(images.*?)\.Ed", MANUAL.read_text(), re.DOTALL)
    text = text.replace("\\e\n", "\\\n").replace("anna:operators", "root:root")
    for name in re.findall(r"\$images/(\S+)", text):
        (tmp_path / name).touch()
    (tmp_path / "vm.conf").write_text(text)
    warnings: list[str] = []

    config = load(
        str(tmp_path / "vm.conf"), macros={"images": str(tmp_path)}, warn=warnings.append
    )

    assert warnings == []
    assert [(vm.name, len(vm.nics)) for vm in config.vms] == [("db1", 1), ("build", 2)]
    assert config.vms[1].cmdline == "console=ttyS0 root=/dev/vda1"
