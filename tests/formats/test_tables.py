"""The tables of tensor and file types are those of the engine that is installed."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import xllamacpp

from pierhead.formats.ggml import FILE_TYPES, REMOVED_TYPES, TENSOR_TYPES


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    (path,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    library = ctypes.CDLL(str(path))
    if not hasattr(library, "ggml_type_size") or not hasattr(library, "llama_ftype_name"):
        pytest.skip("this build of the engine does not export its tables")
    library.ggml_type_size.restype = ctypes.c_size_t
    library.ggml_blck_size.restype = ctypes.c_int64
    library.ggml_type_name.restype = ctypes.c_char_p
    library.llama_ftype_name.restype = ctypes.c_char_p
    return library


def test_every_tensor_type_of_the_engine_is_known_with_its_size(library: ctypes.CDLL) -> None:
    for number in range(int(xllamacpp.ggml_type.GGML_TYPE_COUNT)):
        block, size = library.ggml_blck_size(number), library.ggml_type_size(number)
        if not size:
            assert number in REMOVED_TYPES
            continue
        known = TENSOR_TYPES[number]
        assert (known.block, known.size) == (block, size)
        assert known.name.lower() == library.ggml_type_name(number).decode().lower()


def test_every_file_type_of_the_engine_is_known(library: ctypes.CDLL) -> None:
    for number in range(64):
        name: str = library.llama_ftype_name(number).decode()
        if name.startswith("unknown"):
            assert number not in FILE_TYPES
        else:
            assert FILE_TYPES[number].split("_")[0] == name.removeprefix("all ").split(" ")[0].split("_")[0]
