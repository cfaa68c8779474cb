"""Files and archives are looked through by what they are, within bounds; nothing in them is run or unpacked to disk."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import struct
import tarfile
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pierhead.formats import scan as scanner
from pierhead.formats.scan import scan_file, scan_folder

pytestmark = pytest.mark.timeout(60)


class Runs:
    def __reduce__(self) -> Any:
        return os.system, ("id",)


EVIL = pickle.dumps(Runs(), 2)
GOOD = pickle.dumps({"weight": [1.0]}, 2)
BAD_TEMPLATE = "{{ ''.__class__ }}"


def zipped(members: dict[str, bytes], packing: int = zipfile.ZIP_STORED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", packing) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return made.getvalue()


def tarred(members: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return made.getvalue()


def array(descr: str, body: bytes) -> bytes:
    header = str({"descr": descr, "fortran_order": False, "shape": (1,)}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


def onnx(domain: str = "", location: str = "") -> bytes:
    def field(number: int, value: bytes) -> bytes:
        return bytes([number << 3 | 2, len(value)]) + value

    node = field(4, b"Relu") + field(7, domain.encode())
    pair = field(1, b"location") + field(2, location.encode())
    return b"\x08\x08" + field(7, field(1, node) + field(5, field(13, pair) if location else b""))


def verdicts(tmp_path: Path, name: str, data: bytes) -> set[str]:
    path = tmp_path / Path(name).name
    path.write_bytes(data)
    return {f.severity for f in scan_file(path, name)}


UNSAFE = {
    "model.pkl": EVIL,
    "pytorch_model.bin": EVIL,
    "weights.bin": EVIL,
    "noname": EVIL,
    "model.ckpt": b"cos\nsystem\n(S'id'\ntR.",
    "broken.pt": b"\x80\x02}q",
    "notes.md": EVIL,
    "model.pt": zipped({"archive/data.pkl": EVIL, "archive/data/0": b"\x80" * 64}),
    "deflated.pth": zipped({"x/data.pkl": EVIL}, zipfile.ZIP_DEFLATED),
    "weights.safetensors": zipped({"archive/data.pkl": EVIL}),
    "cut.pt": zipped({"archive/data.pkl": EVIL})[:40],
    "layer.tar": tarred({"a/readme.md": b"x", "a/model.pt": zipped({"m/data.pkl": EVIL})}),
    "old.tar": tarred({"pickle": EVIL}),
    "escape.tar": tarred({"../../etc/cron.d/x": b"x"}),
    "absolute.zip": zipped({"/etc/passwd": b"x"}),
    "a.joblib": zlib.compress(EVIL),
    "b.pkl.gz": gzip.compress(EVIL),
    "c.pkl.bz2": bz2.compress(EVIL),
    "d.pkl.xz": lzma.compress(EVIL),
    "e.tar.zst": zstandard.compress(tarred({"m.pkl": EVIL})),
    "objects.npy": array("|O", EVIL),
    "arrays.npz": zipped({"a.npy": array("|O", EVIL)}),
    "odd.npy": b"\x93NUMPY\x01\x00\x04\x00{[[[",
    "chat_template.jinja": BAD_TEMPLATE.encode(),
    "tokenizer_config.json": json.dumps({"chat_template": BAD_TEMPLATE}).encode(),
    "many/tokenizer_config.json": json.dumps({"chat_template": [{"name": "x", "template": BAD_TEMPLATE}]}).encode(),
    "Modelfile": b'FROM x\nTEMPLATE """' + BAD_TEMPLATE.encode() + b'"""\n',
    "escaped/tokenizer_config.json": b'{"chat_templ\\u0061te": "' + BAD_TEMPLATE.encode() + b'"}',
    "long.bin": b"\x80\x02V" + b"a" * (2 << 20) + b"\n0cos\nsystem\n(S'id'\ntR.",
    "long.model": b"S'" + b"a" * (2 << 20) + b"'\n0cos\nsystem\n(S'id'\ntR.",
    "without_a_suffix": b"cos\nsystem\n(S'id'\ntR.",
    "template": BAD_TEMPLATE.encode(),
    "short.npy": b"\x93NUMPY",
    "deep.zip": zipped({"a.zip": zipped({"b.zip": zipped({"c.zip": zipped({"d.pkl": GOOD})})})}),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_what_runs_code_is_found(tmp_path: Path, name: str) -> None:
    assert "unsafe" in verdicts(tmp_path, name, UNSAFE[name])


SAFE = {
    "model.pkl": GOOD,
    "model.pt": zipped({"archive/data.pkl": GOOD, "archive/version": b"3\n", "archive/data/0": EVIL}),
    "weights.bin": bytes(range(256)) * 64,
    "weights.safetensors": struct.pack("<Q", 2) + b"{}",
    "numbers.npy": array("<f4", b"\x80\x02cos\nsystem\n."),
    "numbers.npz": zipped({"a.npy": array("<f4", b"\0" * 4)}),
    "layer.tar": tarred({"config.json": b"{}", "model.pt": zipped({"m/data.pkl": GOOD})}),
    "tokenizer_config.json": json.dumps({"chat_template": "{{ messages[0].content }}"}).encode(),
    "config.json": b'{"architectures": ["X"]}',
    "model.onnx": onnx("com.microsoft"),
    "LICENSE": b"copyright\nall rights reserved\n",
    "long.dat": b"V" + b"a" * (2 << 20) + b"\n0.",
    "readme.md": b"# cos\nsystem\n",
    "params": b'{"stop": ["x"]}',
}


@pytest.mark.parametrize("name", SAFE)
def test_what_runs_nothing_passes(tmp_path: Path, name: str) -> None:
    assert verdicts(tmp_path, name, SAFE[name]) == set()


WARNED = {
    "modeling_x.py": b"print()",
    "config.json": b'{"auto_map": {"AutoModel": "modeling_x.X"}}',
    "model.h5": b"\x89HDF\r\n" + b'{"class_name": "Lambda", "config": {}}',
    "model.keras": zipped({"config.json": b'{"layers": [{"class_name": "Lambda"}]}'}),
    "own.onnx": onnx("evil.ops"),
    "outside.onnx": onnx(location="../../etc/shadow"),
    "script.pt": zipped({"m/code/__torch__.py": b"def f(): pass", "m/data.pkl": b"\x80\x02c__torch__.M\nX\n."}),
}


@pytest.mark.parametrize("name", WARNED)
def test_what_a_reader_should_know_is_said(tmp_path: Path, name: str) -> None:
    assert verdicts(tmp_path, name, WARNED[name]) == {"warning"}


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("a/data.pkl", GOOD)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a/data.pkl", GOOD)
    assert "unsafe" in verdicts(tmp_path, "x.pt", made.getvalue())


def test_bombs_end_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanner, "MAX_UNPACKED", 4 << 20)
    zeros = b"\0" * (64 << 20)
    bombs = {
        "a.pkl.gz": gzip.compress(zeros, 1),
        "b.zip": zipped({"x.pkl": zeros}, zipfile.ZIP_DEFLATED),
        "c.joblib": zlib.compress(zeros, 1),
        "d.tar.zst": zstandard.compress(zeros),
    }
    began = time.monotonic()
    for name, data in bombs.items():
        assert verdicts(tmp_path, name, data) == {"unsafe"}, name
    monkeypatch.setattr(scanner, "MAX_MEMBERS", 10)
    assert "unsafe" in verdicts(tmp_path, "e.zip", zipped({str(i): b"" for i in range(50)}))
    assert "unsafe" in verdicts(tmp_path, "f.tar", tarred({str(i): b"" for i in range(50)}))
    assert time.monotonic() - began < 10


def test_a_real_model_passes(smollm2: Path) -> None:
    assert scan_file(smollm2) == []


def test_a_folder_is_looked_through_and_links_out_of_it_are_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "x.pt").write_bytes(EVIL)
    (tmp_path / "secret").write_text("x")
    (folder / "out").symlink_to(tmp_path / "secret")
    assert {(f.file, f.severity) for f in scan_folder(folder)} == {("deep/x.pt", "unsafe"), ("out", "warning")}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.one_of(st.binary(max_size=300), st.sampled_from(list(UNSAFE.values()) + list(SAFE.values()))),
    name=st.sampled_from([*UNSAFE, *SAFE, *WARNED, "x.h5", "y.onnx", "z.gguf"]),
    cut=st.integers(0, 2000),
)
def test_any_bytes_under_any_name_are_answered(tmp_path: Path, data: bytes, name: str, cut: int) -> None:
    path = tmp_path / "any"
    path.write_bytes(data[: cut or None])
    scan_file(path, name)
