"""Tensors of a Hugging Face folder, read one by one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lorikeet.errors import InputError
from lorikeet.export.tensors import tensors

WEIGHTS = {
    "a.q_proj.weight": torch.randn(7, 3).bfloat16(),
    "a.bias": torch.randn(5, dtype=torch.float64),
    "a.scale": torch.tensor(3.0),
    "a.empty": torch.zeros(0, 4),
    "a.flags": torch.tensor([[True, False]]),
}


def test_are_read_as_they_were_written(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    found = {tensor.name: tensor for tensor in tensors(tmp_path)}
    assert found.keys() == WEIGHTS.keys()
    for name, wanted in WEIGHTS.items():
        value = found[name].load()
        assert (value.dtype, found[name].shape) == (wanted.dtype, tuple(wanted.shape))
        assert torch.equal(value, wanted)
    rows = found["a.q_proj.weight"]
    assert torch.equal(rows.load(2, 5), WEIGHTS["a.q_proj.weight"][2:5])
    assert torch.equal(rows.load(5, 99), WEIGHTS["a.q_proj.weight"][5:])
    assert (rows.module, rows.merged_kind, rows.merged_bytes) == ("q_proj", "BF16", 42)
    assert (found["a.bias"].merged_kind, found["a.bias"].merged_bytes) == ("BF16", 10)


def test_a_damaged_file_and_an_unknown_type_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(WEIGHTS, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(SafetensorError):
        list(tensors(tmp_path))
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(InputError, match="stored as F8_E4M3; only F64, F32"):
        list(tensors(tmp_path))
    file.write_bytes(whole)
    last = max(tensors(tmp_path), key=lambda tensor: tensor.begin)
    file.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"ends inside"):
        last.load()


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_are_read_where_no_mapping_of_the_file_has_room(tmp_path: Path) -> None:
    rows, columns = 512, 1 << 19
    header = json.dumps({"a": {"dtype": "U8", "shape": [rows, columns], "data_offsets": [0, rows * columns]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + rows * columns)  # 256 MB that take no room on the disk
    code = (
        "import resource, sys; from pathlib import Path; from lorikeet.export.tensors import tensors\n"
        "found, = tensors(Path(sys.argv[1]))\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)\n"
        "print(sum(int(found.load(row, row + 8).sum()) + found.load(row, row + 8).numel() for row in range(0, 512, 8)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(rows * columns)), done.stderr
