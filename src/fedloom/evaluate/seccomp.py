"""A filter of system calls that hand out memory which no limit and no resident size shows.

System V segments and anonymous files keep their pages while no process maps them; rings of io_uring are charged to
none. A call of theirs fails with EPERM; a call by another architecture's table ends the program.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Mapping
from types import MappingProxyType

# architecture's audit number, then shmget, msgget, semget, memfd_create, memfd_secret, io_uring_setup
_CALLS: Mapping[str, tuple[int, tuple[int, ...]]] = MappingProxyType(
    {
        "x86_64": (0xC000003E, (29, 68, 64, 319, 447, 425)),
        "aarch64": (0xC00000B7, (194, 186, 190, 279, 447, 425)),
    }
)
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_KILL, _FAIL, _ALLOW = 0x80000000, 0x00050000 | errno.EPERM, 0x7FFF0000
_NUMBER, _ARCHITECTURE = 0, 4  # places in struct seccomp_data
_X32 = 0x40000000  # numbers from here on are another table of x86_64's


def program() -> bytes | None:
    """Return the filter as the kernel reads it (struct sock_filter[]), or None for another machine."""
    if (known := _CALLS.get(platform.machine())) is None:
        return None
    architecture, calls = known
    steps = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER)]
    # each match jumps over those that follow it and over the step that allows
    steps.append((_AT_LEAST, len(calls) + 1, 0, _X32))
    steps += [(_EQUAL, len(calls) - i, 0, call) for i, call in enumerate(calls)]
    steps += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _FAIL)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
