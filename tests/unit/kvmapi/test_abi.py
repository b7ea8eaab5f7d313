"""Constants and structures agree with the kernel's header, which is compiled for comparison."""

import ctypes
import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vmd.kvmapi import abi

# Structures without a name in C, which are checked as fields of the structures around them.
NAMELESS = ("kvm_vcpu_events_", "kvm_irqchip_chip", "kvm_irq_routing_u", "kvm_run_", "kvm_msr_index")
# Fields with another name in C, or that C does not have: unions that Python flattens or names.
ONLY_HERE = {("kvm_run", "exit"), ("kvm_run", "padding")}
# Structures that are longer in C: they have a flexible array, or parts that we do not read.
LONGER_IN_C = {"kvm_run"}


def named_structs() -> dict[str, type[ctypes.Structure]]:
    """Return the structures of abi.py that have the same name in the header."""
    return {
        name: struct
        for name, struct in vars(abi).items()
        if isinstance(struct, type)
        and issubclass(struct, ctypes.Structure)
        and name.startswith("kvm_")
        and not name.startswith(NAMELESS)
    }


def constants() -> dict[str, int]:
    """Return all numbers of abi.py with names of the kernel, including requests."""
    return {name: value for name, value in vars(abi).items() if name.startswith("KVM_")}


def offsets(
    struct: type[ctypes.Structure | ctypes.Union], path: str = "", base: int = 0
) -> dict[str, tuple[int, int]]:
    """Return (offset, size) of every field.  Nested fields have dotted paths."""
    found: dict[str, tuple[int, int]] = {}
    for name, kind, *_ in struct._fields_:
        field = getattr(struct, name)
        nameless = name in getattr(struct, "_anonymous_", ())
        dotted = path if nameless else f"{path}{name}"
        if not nameless:
            found[dotted] = (base + field.offset, field.size)
        if issubclass(kind, (ctypes.Structure, ctypes.Union)):
            found |= offsets(kind, dotted if nameless else dotted + ".", base + field.offset)
    return found


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Return the values that a compiled C program prints for `NAME`, `sizeof S`, `S.field` and `sizeof S.field`."""
    if shutil.which("gcc") is None or not Path("/usr/include/linux/kvm.h").exists():
        pytest.skip("gcc and <linux/kvm.h> are needed to compare numbers with the kernel's")
    lines = [f'N("{name}", {name})' for name in constants()]
    for name, struct in named_structs().items():
        lines.append(f'N("sizeof {name}", sizeof(struct {name}))')
        for path in offsets(struct):
            if (name, path.split(".")[0]) in ONLY_HERE:
                continue
            lines.append(f'N("{name}.{path}", offsetof(struct {name}, {path}))')
            lines.append(f'N("sizeof {name}.{path}", sizeof(((struct {name} *)0)->{path}))')
    program = "#include <stddef.h>\n#include <stdio.h>\n#include <asm/kvm.h>\n#include <linux/kvm.h>\n"
    program += '#define N(name, value) printf("%s=%llu\\n", name, (unsigned long long)(value));\n'
    program += "int main(void) {\n" + "\n".join(lines) + "\nreturn 0;\n}\n"
    directory = tmp_path_factory.mktemp("abi")
    (directory / "abi.c").write_text(program)
    subprocess.run(["gcc", "-o", directory / "abi", directory / "abi.c"], check=True)
    output = subprocess.run([directory / "abi"], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split("=") for line in output.splitlines())}


def test_every_number_is_the_kernels(header: dict[str, int]) -> None:
    """The numbers are requests, exits, flags and capabilities."""
    ours = constants()

    assert {name: header[name] for name in ours} == {name: int(value) for name, value in ours.items()}
    assert len(ours) > 80


def test_every_structure_has_the_kernels_size(header: dict[str, int]) -> None:
    """Each structure has the size as in C, except those whose end we do not read."""
    for name, struct in named_structs().items():
        if name in LONGER_IN_C:
            assert ctypes.sizeof(struct) < header[f"sizeof {name}"], name
        else:
            assert ctypes.sizeof(struct) == header[f"sizeof {name}"], name
    assert len(named_structs()) > 30


def test_every_field_has_the_kernels_place(header: dict[str, int]) -> None:
    """Offset and size of every field agree, also of nested ones."""
    compared = 0
    for name, struct in named_structs().items():
        for path, (offset, size) in offsets(struct).items():
            if f"{name}.{path}" in header:
                assert (offset, size) == (header[f"{name}.{path}"], header[f"sizeof {name}.{path}"]), path
                compared += 1
    assert compared > 200


def test_every_request_has_one_name() -> None:
    """System call filters are made from REQUESTS, so no two names may have the same number."""
    names = [name for name, value in vars(abi).items() if isinstance(value, abi.Request)]

    assert sorted(abi.REQUESTS.values()) == sorted(names)
    assert abi.REQUESTS[0xAE80] == "KVM_RUN"


def test_a_refused_request_names_itself_and_keeps_the_errno() -> None:
    """This holds for both ways of calling.  The exception has Python's class for that errno."""
    with pytest.raises(OSError, match=r"\[Errno 9\] KVM_CREATE_VM: Bad file descriptor") as by_fcntl:
        abi.ioctl(-1 & 0xFFFF, abi.KVM_CREATE_VM)
    with pytest.raises(OSError, match="KVM_SET_TSS_ADDR: Bad file descriptor") as by_libc:
        abi.ioctl_ulong(-1, abi.KVM_SET_TSS_ADDR, 0xFEFFD000)

    assert by_fcntl.value.errno == by_libc.value.errno == errno.EBADF


def test_a_file_that_is_not_kvm_is_refused() -> None:
    """The error is ENOTTY, with the name of the first request."""
    with open(os.devnull, "rb") as null, pytest.raises(OSError, match="KVM_GET_API_VERSION") as refused:
        abi.ioctl(null.fileno(), abi.KVM_GET_API_VERSION)

    assert refused.value.errno == errno.ENOTTY


def test_state_bytes_of_another_size_are_refused() -> None:
    """A structure from a stream must not be cut or padded silently."""
    with pytest.raises(ValueError, match="kvm_regs of 143 bytes, not 144"):
        abi.write_struct(-1, abi.KVM_SET_REGS, abi.kvm_regs, bytes(143))
