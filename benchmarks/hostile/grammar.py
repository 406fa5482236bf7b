"""Mutations that know a file's format: JSON values and text, chunks of JPEG and PNG, opcodes of a pickle, zip members.

Every function draws from the random.Random that it is given, so a case is reproduced by reader and number.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import json
import pickle
import pickletools
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

EVIL_TEXTS = (
    "", " ", "\0", "a\0b", "\x1b[2J\x1b[1;31m", "\u202eabc", "\ud800", "<script>alert(1)</script>", "$\\frac{",
    "<img src=x onerror=y>", "[bold]", "[/x]", "{0}", "%s%n", "../../etc/passwd", "/etc/passwd", "../outside.png", "..",
    ".", "a/../b", "C:\\x", "x" * 5000, "\U0001f600", "NaN", "__class__", "1e999", "\n\n", "'; drop", "caf\u00e9",
    "\ufeff", "os:system", "json:loads",
)  # fmt: skip
EVIL_NUMBERS = (
    0, -1, 1, 2, 3, 255, 256, 2**31 - 1, 2**31, 2**32, -(2**31), 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 10**30,
    10**400, 0.0, -0.0, 0.5, 1e-320, 1e-9, 1e9, 1e38, 1e39, 1e300, -1e300, 1.7e308, float("nan"), float("inf"),
    float("-inf"),
)  # fmt: skip
LITERALS = (
    "9" * 10_000, "-" + "9" * 10_000, "1." + "0" * 10_000, "1e" + "9" * 100, "1e-99999", "[" * 100_000, "NaN",
    '{"a":' * 100_000, "[" * 3000 + "]" * 3000, "-Infinity", "tru", "0x10", "'x'", '"\\ud800"', '"\\x"', '"\n"', ",",
    "]", "}", "", "01", '"' + "y" * 1_000_000 + '"',
)  # fmt: skip


def evil_value(rng: random.Random, depth: int = 0) -> Any:
    """A JSON value of any kind."""
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind < 2:
        return rng.choice(EVIL_NUMBERS)
    if kind == 2:
        return rng.choice(EVIL_TEXTS)
    if kind == 3:
        return rng.choice((None, True, False))
    if kind == 4:
        return rng.choice(([], {}))
    if kind < 7:
        return [evil_value(rng, depth + 1) for _ in range(rng.randint(1, 5))]
    return {rng.choice(EVIL_TEXTS): evil_value(rng, depth + 1) for _ in range(rng.randint(1, 4))}


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every entry of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from places(item)


def mutate_value(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value with one to three entries replaced, removed, doubled, swapped or nudged."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        found = list(places(value))
        if not found:
            return evil_value(rng)
        owner, key = rng.choice(found)
        kind = rng.randrange(7)
        if kind == 0:
            del owner[key]
        elif kind == 1 and isinstance(owner, list):
            owner.insert(rng.randint(0, len(owner)), copy.deepcopy(owner[key]))
        elif kind == 2:
            other, place = rng.choice(found)
            if place in other if isinstance(other, dict) else place < len(other):
                owner[key] = copy.deepcopy(other[place])
        elif kind == 3 and type(owner[key]) in (int, float) and abs(owner[key]) < 1e300:
            owner[key] = rng.choice((-owner[key], owner[key] * 1e6, owner[key] + 1, str(owner[key]), float(owner[key])))
        elif kind == 4 and isinstance(owner, dict):
            owner[rng.choice(EVIL_TEXTS)] = owner.pop(key)
        else:
            owner[key] = evil_value(rng)
    return value


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Flips, cuts, doubles, overwrites and inserts bytes, one to eight times."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        at = rng.randint(0, len(data))
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.choice((0, 1, 127, 128, 254, 255))
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randint(1, 8))
        elif kind == 3:
            del data[at : at + rng.choice((1, 4, 64))]
        elif kind == 4 and rng.random() < 0.2:
            del data[at:]
        else:
            start = rng.randint(0, len(data))
            data[at:at] = data[start : start + rng.choice((1, 8, 64))]
    return bytes(data)


def json_text(rng: random.Random, value: Any) -> bytes:
    """A mutated JSON file: its value, a literal in its text, its encoding, or its bytes."""
    kind = rng.randrange(10)
    if kind < 6:
        return _dump(mutate_value(rng, value))
    if kind < 8:  # a literal that Python's writer would not write, in the place of a value
        marked = copy.deepcopy(value)
        found = list(places(marked))
        owner, key = rng.choice(found)
        owner[key] = "@here@"
        return _dump(marked).replace(b'"@here@"', rng.choice(LITERALS).encode("utf-8", "surrogatepass"), 1)
    if kind == 8:
        return json.dumps(value).encode(rng.choice(("utf-8-sig", "utf-16", "utf-32", "utf-16-be", "latin-1")))
    return mutate_bytes(rng, _dump(value))


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


BOMBS = (10**7, 10**9)  # bytes that a compressed chunk expands to; the limit of a case is 600 MB


@functools.cache
def zlib_bomb(size: int) -> bytes:
    """`size` zero bytes, compressed to a thousandth."""
    packer, block = zlib.compressobj(9, wbits=-15), min(size, 10**6)
    packed = packer.compress(bytes(block)) + packer.flush(zlib.Z_FULL_FLUSH)  # independent of what comes before it
    checksum = (size % 65521) << 16 | 1  # Adler-32 of zeros
    return b"\x78\xda" + packed * (size // block) + b"\x03\0" + checksum.to_bytes(4, "big")


def png(rng: random.Random, content: bytes) -> bytes:
    """A PNG with changed chunks and right checksums: sizes, kinds, order, bombs; or changed bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, content)
    chunks, at = [], 8
    while at < len(content):
        (size,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += 12 + size
    for _ in range(rng.randint(1, 3)):
        where, kind = rng.randrange(len(chunks)), rng.randrange(7)
        name, data = chunks[where]
        if kind == 0 and len(chunks[0][1]) == 13:
            header = bytearray(chunks[0][1])
            number = rng.choice((0, 1, 64, 10_000, 2**16, 2**31 - 1, 2**32 - 1))
            struct.pack_into(">I", header, rng.choice((0, 4)), number)
            header[rng.randint(8, 12)] = rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
            chunks[0] = (chunks[0][0], bytes(header))
        elif kind == 1:
            chunks[where] = (name, mutate_bytes(rng, data))
        elif kind == 2:
            chunks.insert(where, (rng.choice((b"PLTE", b"tRNS", b"acTL", b"fdAT", b"IDAT", b"IEND", b"eXIf")), data))
        elif kind == 3:
            chunks.insert(1, (b"zTXt", b"k\0\0" + zlib_bomb(rng.choice((10**4, *BOMBS)))))
        elif kind == 4:
            chunks.insert(1, (rng.choice((b"iCCP", b"iTXt")), b"k\0\0" + zlib_bomb(rng.choice(BOMBS))))
        elif kind == 5:
            bomb = zlib_bomb(rng.choice(BOMBS))
            chunks = [(n, bomb if n == b"IDAT" else d) for n, d in chunks]
        elif len(chunks) > 1:
            del chunks[where]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return content[:8] + body


def jpeg(rng: random.Random, content: bytes) -> bytes:
    """A JPEG with changed segments: sizes, tables, kinds of frame, order; or changed bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, content)
    segments, at = [], 2
    while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] != 0xDA:
        (size,) = struct.unpack(">H", content[at + 2 : at + 4])
        segments.append(bytearray(content[at : at + 2 + size]))
        at += 2 + size
    scan = content[at:]
    for _ in range(rng.randint(1, 3)):
        where, kind = rng.randrange(len(segments)), rng.randrange(7)
        segment = segments[where]
        if kind == 0:
            for frame in (s for s in segments if s[1] in (0xC0, 0xC1, 0xC2) and len(s) > 9):
                struct.pack_into(">HH", frame, 5, rng.choice((0, 1, 64, 65535)), rng.choice((0, 1, 64, 65500)))
        elif kind == 1:
            segment[1] = rng.choice((0xC0, 0xC2, 0xC4, 0xC9, 0xDB, 0xDD, 0xE0, 0xE1, 0xED, 0xFE, 0xD9))
        elif kind == 2:
            struct.pack_into(">H", segment, 2, rng.choice((0, 1, 2, 3, 65535)))
        elif kind == 3:
            segments.insert(rng.randint(0, len(segments)), bytearray(segment))
        elif kind == 4 and len(segments) > 1:
            del segments[where]
        elif kind == 5:
            scan = mutate_bytes(rng, scan)
        else:
            segments[where] = segment[:4] + bytearray(mutate_bytes(rng, bytes(segment[4:])))
    return content[:2] + b"".join(map(bytes, segments)) + scan


def payloads(mark: str) -> tuple[bytes, ...]:
    """Pickle instructions that would run code if they were obeyed; `mark` is the file that it would make."""
    text = f"touch {mark}".encode()
    return (
        b"cos\nsystem\n(S'" + text + b"'\ntR", b"(S'" + text + b"'\nios\nsystem\n",
        b"(cos\nsystem\nS'" + text + b"'\no",
        b"cbuiltins\nopen\n(S'" + mark.encode() + b"'\nS'w'\ntR",
        b"cbuiltins\nexec\n(S'open(\"" + mark.encode() + b"\",\"w\")'\ntR",
        b"cnumpy\nfromfile\n(S'/etc/passwd'\ntR", b"ctorch.hub\nload\n(S'x'\ntR", b"P1\n", b"\x82\x01",
        b"\x8a\xff", b"r\xff\xff\xff\x7f",
        b"\x8e" + struct.pack("<Q", 2**62), b"\x85" * 2000, b"]" * 2000 + b"a" * 1999, b"}" + b"\x85" * 3000 + b"Ns",
    )  # fmt: skip


def pickled(rng: random.Random, content: bytes, mark: str) -> bytes:
    """A pickle with instructions removed, doubled, swapped, changed or added."""
    if rng.random() < 0.2:
        return mutate_bytes(rng, content)
    starts = [position for _, _, position in pickletools.genops(content)] + [len(content)]
    parts = [content[a:b] for a, b in itertools.pairwise(starts)]
    for _ in range(rng.randint(1, 3)):
        where, kind = rng.randrange(len(parts)), rng.randrange(6)
        if kind == 0:
            del parts[where]
        elif kind == 1:
            parts.insert(where, rng.choice(parts))
        elif kind == 2:
            other = rng.randrange(len(parts))
            parts[where], parts[other] = parts[other], parts[where]
        elif kind == 3:
            parts[where] = mutate_bytes(rng, parts[where])
        elif kind == 4:
            parts[where] = pickle.dumps(evil_value(rng), protocol=rng.choice((0, 2, 4)))[:-1]
        else:
            parts.insert(where, rng.choice(payloads(mark)))
        if not parts:
            return b""
    return b"".join(parts)


@functools.cache
def zip_bomb(content: bytes) -> bytes:
    """A zip whose tensors' bytes are a gigabyte of zeros, compressed to a thousandth."""
    source, out = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    with zipfile.ZipFile(out, "w", compresslevel=1) as archive:
        for name in source.namelist():
            with archive.open(_compressed(name) if "/data/" in name else zipfile.ZipInfo(name), "w") as member:
                for _ in range(10**3 if "/data/" in name else 0):
                    member.write(bytes(10**6))
                if "/data/" not in name:
                    member.write(source.read(name))
    return out.getvalue()


def _compressed(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


def zipped(rng: random.Random, content: bytes, change: Callable[[random.Random, bytes], bytes]) -> bytes:
    """A zip, as torch.save writes it, with members changed, renamed, left out, compressed; or with changed bytes."""
    if rng.random() < 0.25:
        return mutate_bytes(rng, content)
    if rng.random() < 0.01:
        return zip_bomb(content)
    source, out = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    target, mode = source.namelist(), rng.randrange(5)
    chosen = next((n for n in target if n.endswith("data.pkl")), target[0]) if mode < 3 else rng.choice(target)
    with zipfile.ZipFile(out, "w") as archive:
        for name in target:
            data = source.read(name)
            if name == chosen:
                if mode == 4 and rng.random() < 0.5:
                    continue
                data = (
                    change(rng, data) if mode < 3 else rng.choice((mutate_bytes(rng, data), data[:-4], b"", data * 3))
                )
                if rng.random() < 0.1:
                    name = rng.choice(("../../evil", "/etc/evil", name.upper(), name + "\0"))
            packed = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name), data, packed)
    return out.getvalue()


def safetensors(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file with a changed header, offsets, lengths or bytes."""
    (size,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    kind = rng.randrange(6)
    if kind == 0:
        return mutate_bytes(rng, content)
    if kind == 1:
        length = rng.choice((0, 1, size - 1, size + 1, 10**8, 2**40, 2**63, 2**64 - 1))
        return struct.pack("<Q", length) + content[8:]
    if kind == 2:
        body = rng.choice((body[:-1], body + b"\0" * 8, b"", mutate_bytes(rng, body)))
    if kind == 3:
        entry = header[rng.choice([name for name in header if name != "__metadata__"])]
        field = rng.choice(("dtype", "shape", "data_offsets"))
        entry[field] = rng.choice((
            "F16", "I64", "BOOL", "F8_E4M3", [2**40, 2**40], [0], [], [-1], [0, 0], [0, 2**63], [8, 4],
            [2**62, 2**62, 4],
        ))  # fmt: skip
    text = json_text(rng, header) if kind in (4, 5) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body
