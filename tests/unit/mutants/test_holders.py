"""The tests of each module."""

from pathlib import Path

import pytest

from mutants.holders import NAMES, modules, process_tests, unit_tests

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("module", "test"),
    [
        ("vmd/ipc/channel.py", "tests/unit/ipc/test_channel.py"),
        ("vmd/devices/vioblk/device.py", "tests/unit/devices/test_vioblk_ring.py"),
        ("vmd/devices/vionet/receive.py", "tests/unit/devices/test_vionet_ring.py"),
        ("vmd/images/qcow2.py", "tests/unit/images/test_images.py"),
        ("vmctl/commands/status.py", "tests/unit/vmctl/test_status.py"),
        ("vmd/vm/boot/fwcfg.py", "tests/unit/vm/test_numbers.py"),
    ],
)
def test_unit_tests_of_a_module(module: str, test: str) -> None:
    """They are found by their names, by their imports, and by the names that they give to `import_module`."""
    assert any(test in files for files in unit_tests(ROOT, module))


def test_nearest_comes_first() -> None:
    """The test with the module's name comes before others that import the module."""
    nearest, others, *_ = unit_tests(ROOT, "vmd/ipc/channel.py")

    assert nearest == ["tests/unit/ipc/test_channel.py"]
    assert "tests/unit/control/test_answers.py" in others


@pytest.mark.parametrize(
    ("module", "test"),
    [
        ("vmctl/interfaces.py", "tests/unit/vmctl/test_status.py"),
        ("vmctl/terminal.py", "tests/unit/vmctl/test_console.py"),
        ("vmd/config/grammar.py", "tests/unit/config/test_seeds.py"),
    ],
)
def test_the_tests_of_a_folder_come_last(module: str, test: str) -> None:
    """They may reach a module through a command, which is loaded by name, or through several others."""
    *_, nearest_but_one, last = unit_tests(ROOT, module)

    assert test in last
    assert not set(last) & set(nearest_but_one)


@pytest.mark.parametrize(
    ("module", "test"),
    [
        ("vmd/devices/vioblk/device.py", "tests/process/test_vioblk_storage.py"),
        ("vmd/images/qcow2.py", "tests/process/test_images_qemu.py"),
        ("vmd/vm/state.py", "tests/guest/test_transfer.py"),
        ("vmd/ipc/channel.py", "tests/process/test_garbage.py"),
    ],
)
def test_process_tests_of_a_module(module: str, test: str) -> None:
    """They are found by their names."""
    assert test in process_tests(ROOT, module)


def test_names_are_compared_by_whole_words() -> None:
    """For example, `test_privileged.py` would not be a test of priv."""
    assert not any("test_vioblk" in test for test in process_tests(ROOT, "vmd/devices/vionet/device.py"))


def test_every_module_has_a_test() -> None:
    """A module without any test cannot be checked."""
    found = modules(ROOT)

    assert [one for one in found if not unit_tests(ROOT, one) and not process_tests(ROOT, one)] == []


def test_every_name_in_the_table_exists() -> None:
    """The table has no modules or tests that were removed."""
    names = {name for words in NAMES.values() for name in words.split()}
    tests = [test.stem for folder in ("process", "guest") for test in (ROOT / "tests" / folder).glob("test_*.py")]

    assert [one for one in NAMES if not any(module.startswith(one) for module in modules(ROOT))] == []
    assert [name for name in names if not any(f"{test}_".startswith(f"test_{name}_") for test in tests)] == []
