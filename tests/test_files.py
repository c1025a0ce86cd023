"""What a disk's errors become, paths where nothing can be written, and locks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorikeet.errors import InputError, MachineError
from lorikeet.files import alone, atomic_file, atomic_folder, is_full, write_atomic

from .disk import largest_file


def test_a_full_disk_is_told_by_libraries_in_rust_too(tmp_path: Path) -> None:
    with (
        largest_file(1000),
        pytest.raises(MachineError, match="File too large; what was there is kept") as caught,
        atomic_folder(tmp_path / "out") as folder,
    ):
        save_file({"a": torch.zeros(1000)}, folder / "a.safetensors")
    assert is_full(caught.value.__cause__) and not isinstance(caught.value.__cause__, OSError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["", ".", "folder", "file/below", "x" * 400, "/dev/null/below"])
def test_a_path_where_no_file_can_be_is_refused_in_one_line(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("mine")
    with pytest.raises(InputError, match=r"^cannot write ") as caught:
        write_atomic(Path(place), "text")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_folder_cannot_take_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="no folder can be there"), atomic_folder(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(sys.platform != "linux", reason="/sys is there on Linux alone")
def test_folders_that_may_not_be_made_are_the_machines_fault() -> None:
    for write in (atomic_file, atomic_folder):
        with pytest.raises(MachineError, match=r"^cannot write /sys/lorikeet/out: "), write(Path("/sys/lorikeet/out")):
            pass


def test_an_error_about_something_else_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, atomic_file(tmp_path / "out"):
        (tmp_path / "nothing").read_text()
    assert caught.value.__cause__ is None
    assert list(tmp_path.iterdir()) == []


def test_one_process_at_a_time_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from lorikeet.files import alone\n"
        "with alone(Path(sys.argv[1]), command='tune'): print('in', flush=True); time.sleep(60)\n"
    )
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "in\n"
        with pytest.raises(InputError, match=f"another lorikeet tune is writing {folder}; wait"):
            alone(folder, command="tune").__enter__()
        with alone(folder, command="export"):
            pass
        process.kill()
    with alone(folder, command="tune"):
        pass
