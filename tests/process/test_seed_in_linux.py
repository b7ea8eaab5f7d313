"""The disc of a seed, read by Linux in an emulated machine, because the kernel of this host may lack ISO 9660."""

import hashlib
import subprocess
from pathlib import Path

import pytest

from tests.support.seeds import FILES
from tools.debian_kernel import cache_dir, fetch
from tools.initramfs import build
from vmd.seed.iso import image

pytestmark = pytest.mark.deep

INIT = Path(__file__).parents[1] / "support/seed-init"
LIMIT_S = 600  # a watchdog: on an idle host the guest takes seconds
OWNER_ONLY, ANYBODY = "400 0 0", "555 0 0"  # with Rock Ridge, and Linux's default without it
PLAIN = {name: name.replace("-", "_") for name in FILES}


def lines(options: str, mode: str, names: dict[str, str]) -> set[str]:
    """Return the lines that the guest prints for a disc with these file names."""
    return {
        f"found {options} {mode} /mnt/{name} {hashlib.sha256(FILES[file]).hexdigest()}  -"
        for file, name in names.items()
    }


def test_linux_reads_all_directory_trees(tmp_path: Path) -> None:
    """With Rock Ridge, with Joliet, and with neither, Linux reads the same files."""
    kernel = fetch("cloud-amd64", cache_dir())
    (tmp_path / "initrd").write_bytes(build(INIT, kernel, ("virtio_pci", "virtio_blk", "isofs")))
    (tmp_path / "seed.iso").write_bytes(image("cidata", FILES))

    done = subprocess.run(
        [
            "qemu-system-x86_64", "-accel", "tcg", "-m", "256", "-nodefaults", "-display", "none", "-serial", "stdio",
            "-no-reboot", "-kernel", kernel.image, "-initrd", tmp_path / "initrd", "-append", "console=ttyS0 quiet",
            "-drive", f"file={tmp_path}/seed.iso,if=virtio,format=raw,readonly=on",
        ],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=LIMIT_S, check=True,
    )  # fmt: skip

    same = dict(zip(FILES, FILES, strict=True))
    found = {line.strip() for line in done.stdout.splitlines() if line.startswith("found ")}
    assert found == {
        "found all",
        *lines("ro", OWNER_ONLY, same),
        *lines("ro,norock", ANYBODY, same),
        *lines("ro,nojoliet", OWNER_ONLY, same),
        *lines("ro,norock,nojoliet", ANYBODY, PLAIN),
    }
