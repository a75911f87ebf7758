"""An object file of machine code (ELF, 64 bits) -> the names that it takes from elsewhere."""

from __future__ import annotations

import struct

SYMBOLS = 2  # the type of a section that is a table of symbols


def undefined(elf: bytes) -> set[str]:
    """The names of the undefined symbols."""
    assert elf[:5] == b"\x7fELF\x02", "not an ELF file of 64 bits"
    (offset,) = struct.unpack_from("<Q", elf, 0x28)
    size, count = struct.unpack_from("<HH", elf, 0x3A)
    # name, type, flags, address, offset, size, link, info, alignment, size of an entry
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, offset + i * size) for i in range(count)]
    found = set()
    for section in sections:
        if section[1] != SYMBOLS:
            continue
        names = sections[section[6]][4]
        for place in range(section[4], section[4] + section[5], section[9]):
            name, _, _, index = struct.unpack_from("<IBBH", elf, place)
            if index == 0 and name:
                found.add(elf[names + name : elf.index(b"\0", names + name)].decode())
    return found
