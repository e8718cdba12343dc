"""Files that run code when they are unpickled or opened carelessly, and files that are damaged or far too large."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import runpy
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

BOMB = 2**27  # bytes of zeros that a small file unfolds to


class Planted:
    """Pickles as a call that writes the marker."""

    def __init__(self, marker: Path, way: int) -> None:
        self.marker, self.way = marker, way

    def __reduce__(self) -> tuple[Any, ...]:
        write = f"__import__('pathlib').Path({str(self.marker)!r}).write_text('executed')"
        calls: list[tuple[Any, ...]] = [
            (exec, (write,)),
            (eval, (write,)),
            (os.system, (f"touch {self.marker}",)),
            (subprocess.check_output, (["touch", str(self.marker)],)),
            (Path.write_text, (self.marker, "executed")),
            (open, (str(self.marker), "w")),
            (os.mkdir, (str(self.marker),)),
            (runpy._run_code, (write, {})),  # type: ignore[attr-defined]
            (np.testing._private.utils.runstring, (write, {})),
            (torch.save, (0, str(self.marker))),
            (np.save, (str(self.marker) + ".npy", np.zeros(1))),
        ]
        return calls[self.way % len(calls)]


def weights() -> dict[str, Tensor]:
    """What a reader expects beside the payload."""
    return {"layer1.0.conv1.weight": torch.zeros(4, 4, 3, 3), "delta": torch.zeros(3, 8, 8)}


def _saved(content: Any, zipped: bool = True, protocol: int = 2) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    return file.getvalue()


def _zip(entries: dict[str, bytes], compress: bool = False) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


def _tar(entries: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in entries.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return file.getvalue()


def _numpy(content: Any, save: Callable[..., None] = np.save, **named: Any) -> bytes:
    file = io.BytesIO()
    save(file, *([] if named else [content]), **named)
    return file.getvalue()


def _objects(value: Any) -> Any:
    array = np.empty(1, dtype=object)
    array[0] = value
    return array


def _compiled(planted: Planted) -> bytes:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    file = io.BytesIO()
    torch.jit.save(torch.jit.script(Module()), file)
    return file.getvalue()


def inflated_checkpoint() -> bytes:
    """A checkpoint of torch whose tensor is compressed zeros."""
    plain = io.BytesIO(_saved({"layer1.0.conv1.weight": torch.zeros(64)}))
    with zipfile.ZipFile(plain) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in entries if name.endswith("data/0"))
    return _zip({**entries, name: bytes(BOMB)}, compress=True)


def _claims(shape: tuple[int, ...], dtype: str) -> Callable[[Planted], bytes]:
    """A numpy file whose header claims far more than it holds."""

    def build(planted: Planted) -> bytes:
        header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape!r}, }}"
        header = header.ljust(117) + "\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(16)

    return build


def _safetensors(header: Any, tail: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tail


def inflated_array() -> bytes:
    """A file of numpy whose array is compressed zeros."""
    return _numpy(None, np.savez_compressed, delta=np.zeros(BOMB // 4, np.float32))


class _Odd(dict[str, Any]):
    """A dictionary of a class of its own."""


PAYLOADS: dict[str, Callable[[Planted], bytes]] = {
    **{f"pickle {number}": lambda x, number=number: pickle.dumps(x, number) for number in range(6)},  # type: ignore[misc]
    "pickle of a dictionary": lambda x: pickle.dumps({"state_dict": x, **weights()}),
    "torch": lambda x: _saved(x),
    "torch state dict": lambda x: _saved({**weights(), "x": x}),
    "torch nested": lambda x: _saved({"state_dict": {**weights(), "a": [(x,)]}, "epoch": 1}),
    "torch protocol 4": lambda x: _saved({**weights(), "x": x}, protocol=4),
    "torch before 1.6": lambda x: _saved({**weights(), "x": x}, zipped=False),
    "torch of a class": lambda x: _saved(_Odd(weights(), x=x)),
    "torch module": lambda x: _saved(torch.nn.Sequential(torch.nn.Linear(2, 2))),
    "torch tar": lambda x: _tar({"sys_info": b"", "pickle": pickle.dumps(x), "storages": pickle.dumps(1)}),
    "torchscript": _compiled,
    "zip with a pickle": lambda x: _zip({"archive/data.pkl": pickle.dumps(x, 2), "archive/version": b"3\n"}),
    "npy of objects": lambda x: _numpy(_objects(x)),
    "npz of objects": lambda x: _numpy(None, np.savez, delta=_objects(x)),
    "npy too large": _claims((3, 2**20, 2**20), "<f8"),
    "npy negative": _claims((3, -1, 8), "<f8"),
    "npy of records": _claims((3,), "|V8"),
    "gzip": lambda x: gzip.compress(pickle.dumps(x)),
    "safetensors header is a pickle": lambda x: _safetensors(pickle.dumps(x)),
    "safetensors too long": lambda x: struct.pack("<Q", 2**62) + b"{}",
    "safetensors overlapping": lambda x: _safetensors(
        {name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for name in "ab"}, bytes(16)
    ),
    "safetensors too large": lambda x: _safetensors(
        {"delta": {"dtype": "F32", "shape": [3, 2**20, 2**20], "data_offsets": [0, 16]}}, bytes(16)
    ),
    "marks": lambda x: b"(" * 100_000 + b".",
    "memo": lambda x: b"\x80\x04\x8a\xff" + b"\xff" * 255 + b"r\xff\xff\xff\x7f.",
    "empty": lambda x: b"",
    "text": lambda x: b"import os; os.system('true')\n",
    "directory traversal": lambda x: _zip({"../../data.pkl": pickle.dumps(x, 2)}),
}


def payload(kind: str, marker: Path, seed: int = 0) -> bytes:
    """The content of a file of a kind, with a seeded way to write the marker."""
    return PAYLOADS[kind](Planted(marker, random.Random(f"{kind} {seed}").randrange(1000)))
