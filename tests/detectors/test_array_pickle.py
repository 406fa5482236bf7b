"""Pickles of arrays are read, and nothing in a pickle is ever executed."""

import collections
import copyreg
import io
import os
import pickle
import pickletools
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from fastkd.detectors import convert_checkpoint
from fastkd.detectors.weights.array_pickle import read_array_pickle

ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    np.arange(4, dtype=">i4"),
    np.float16([1.5, -2]),
    np.zeros((0, 3), np.float32),
    np.array(3.0, np.float32),
    np.array([True, False]),
    np.arange(24, dtype=np.uint8).reshape(2, 3, 4)[:, ::2],
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_every_protocol(tmp_path, protocol):
    content = collections.OrderedDict(model={f"a{i}": a for i, a in enumerate(ARRAYS)}, again=ARRAYS[0], more=[1, None])
    content["more"] += [("x", 2.5), True, 2**80, "é", b"bytes", {}]
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_array_pickle(path)
    assert found["more"] == content["more"]
    np.testing.assert_array_equal(found["again"], ARRAYS[0])
    for i, expected in enumerate(ARRAYS):
        got = found["model"][f"a{i}"]
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == expected.dtype.newbyteorder("=") and got.shape == expected.shape


def test_pickle_of_python_2(tmp_path):
    """Text is stored as bytes, and arrays under numpy's old module name."""
    path, values = tmp_path / "a.pkl", np.float32([1, 2])
    path.write_bytes(
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\ntcnumpy\ndtype\n(S'f4'\nI0\n"
        b"I1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nT\x08\x00\x00\x00" + values.tobytes() + b"tb."
    )
    np.testing.assert_array_equal(read_array_pickle(path), values)


class Runs:
    """Executes a call when unpickled, which would create a file."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(mark):
    """(name, bytes) of files that would execute code, directly or through numpy or fastkd."""
    array = np.zeros(2, np.float32)
    yield "system", pickle.dumps({"model": {"w": Runs(os.system, f"touch {mark}")}})
    yield "open", pickle.dumps(Runs(open, mark, "w"))
    yield "eval", pickle.dumps(Runs(eval, f"open({mark!r}, 'w')"))
    yield "protocol 0", pickle.dumps(Runs(os.system, f"touch {mark}"), protocol=0)
    yield "inst", f"(S'touch {mark}'\nios\nsystem\n.".encode()
    yield "obj", f"(cos\nsystem\nS'touch {mark}'\no.".encode()
    yield "dotted", b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93" + b"\x8c\x04path\x85R."
    yield "array of objects", pickle.dumps(np.array([Runs(open, mark, "w")], dtype=object))
    yield "array subclass", pickle.dumps(np.ma.masked_array(array))
    yield "tensor", pickle.dumps(torch.zeros(2))
    yield "state of a function", b"cnumpy\ndtype\n}S'__call__'\ncos\nsystem\nsb."
    yield "state of a type", b"cnumpy\nndarray\n}b."
    yield "call of ndarray", b"cnumpy\nndarray\n(I1000000000000\ntR."
    yield "other encoding", b"c_codecs\nencode\n(S'x'\nS'hex'\ntR."
    yield "other reconstruct", b"cnumpy.core.multiarray\n_reconstruct\n(c_codecs\nencode\n(I0\ntS'b'\ntR."
    yield "persistent id", b"P1\n."
    yield "extension", b"\x80\x02\x82\x01."
    yield "extension in the cache", f"\x80\x02\x82\x07(S'touch {mark}'\ntR.".encode("latin-1")
    yield "nested tuple as a key", b"\x80\x04})" + b"\x85" * 150_000 + b"Ns."  # its hash overflows the C stack


@pytest.fixture
def cached_extension():
    """os.system under an extension code that pickle has cached, so that it is not looked up by name."""
    copyreg.add_extension(os.system.__module__, "system", 7)
    assert pickle.loads(pickle.dumps(os.system, protocol=2)) is os.system
    yield
    copyreg.remove_extension(os.system.__module__, "system", 7)


def test_nothing_is_executed(tmp_path, cached_extension):
    mark = str(tmp_path / "executed")
    for name, content in hostile(mark):
        path = tmp_path / "hostile.pkl"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="must hold numpy arrays and nothing else"):
            read_array_pickle(path)
        with pytest.raises(ValueError, match="nothing else"):
            convert_checkpoint(path)
        assert not os.path.exists(mark), name


def test_compressed_torch_files_are_refused(tmp_path):
    """A file of a megabyte may expand to a gigabyte."""
    torch.save({"backbone.body.conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "stored.pth")
    with (
        zipfile.ZipFile(tmp_path / "stored.pth") as stored,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    with pytest.raises(ValueError, match=r"convert: .*packed\.pth is damaged .* is compressed, which torch.save never"):
        convert_checkpoint(tmp_path / "packed.pth")


def test_torch_files_with_code_are_refused(tmp_path):
    mark = str(tmp_path / "executed")
    torch.save({"backbone.body.conv1.weight": Runs(open, mark, "w")}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="damaged or holds more than tensors"):
        convert_checkpoint(tmp_path / "code.pth")
    assert not os.path.exists(mark)


def bomb():
    """Nested lists with 1000 references each: visiting every path would never end."""
    out = io.BytesIO(b"\x80\x04]\x94")
    out.seek(0, 2)
    for level in range(15):
        out.write(b"](" + b"h" + bytes([level]) + (b"h" + bytes([level])) * 999 + b"e\x94")
    return out.getvalue() + b"."


DAMAGED = {
    "nothing": b"",
    "text": b"weights",
    "no end": pickle.dumps(ARRAYS[0])[:-1],
    "cut": pickle.dumps(ARRAYS[:1] * 3)[:60],
    "huge length": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
    "huge text": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.",
    "empty stack": b"\x80\x04\x85.",
    "no mark": b"\x80\x04]e.",
    "no memo": b"\x80\x04h\x07.",
    "memo of nothing": b"\x80\x04\x94.",
    "mark for a result": b"\x80\x04(.",
    "name for a result": b"cnumpy\nndarray\n.",
    "array without state": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR.",
    "inside itself": b"\x80\x04]\x94h\x00a.",
    "unhashable key": b"\x80\x04}]Ns.",
    "build of nothing": b"\x80\x04Nb.",
    "short array": pickle.dumps(ARRAYS[0], protocol=2).replace(b"K\x02K\x03", b"K\x02K\x04"),
    "huge array": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I99999999999999\nt"
    b"cnumpy\ndtype\n(S'f4'\ntRI00\nS'x'\ntb.",
    "deep": b"\x80\x04" + b"]" * 5000 + b"a" * 4999 + b".",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_errors(tmp_path, name):
    path = tmp_path / "damaged.pkl"
    path.write_bytes(DAMAGED[name])
    with pytest.raises(ValueError, match=r"damaged\.pkl") as caught:
        read_array_pickle(path)
    assert len(str(caught.value)) < 500


def test_shared_parts_are_walked_once(tmp_path):
    path = tmp_path / "bomb.pkl"
    path.write_bytes(bomb())
    found = read_array_pickle(path)
    assert len(found) == 1000 and found[0] is found[999]


def test_a_huge_memo_index_takes_no_memory(tmp_path):
    """The C unpickler allocates memory for all smaller indices: 34 GB."""
    path = tmp_path / "memo.pkl"
    path.write_bytes(b"\x80\x02]r" + struct.pack("<I", 2**31) + b".")
    with open(path, "rb") as file:
        assert [argument for _, argument, _ in pickletools.genops(file)][2] == 2**31
    tracemalloc.start()
    assert read_array_pickle(path) == []
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_every_opcode_is_known_or_refused():
    """Opcodes of new protocols are refused until they are reviewed."""
    from fastkd.detectors.weights.array_pickle import _carry_out, _Machine

    refused = set()
    for opcode in pickletools.opcodes:
        try:
            _carry_out(_Machine(stack=[1]), opcode.name, "a b")
        except ValueError as error:
            if f"the instruction {opcode.name}" in str(error):
                refused.add(opcode.name)
        except (KeyError, IndexError):
            pass
    assert {
        "INST",
        "OBJ",
        "NEWOBJ",
        "NEWOBJ_EX",
        "PERSID",
        "BINPERSID",
        "EXT1",
        "EXT2",
        "EXT4",
        "NEXT_BUFFER",
    } <= refused
