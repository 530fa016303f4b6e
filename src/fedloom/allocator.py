"""The memory allocator: which one is in force, which ones this machine has, and how a command gets the better one.

A training step allocates and frees hundreds of tensors of some MB. glibc maps many of them anew each time, so that the
kernel clears their pages again and again; the allocators named here reuse what was freed. They have to be there before
the process starts, so the command starts itself again with one. docs/performance.md has figures.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

SWITCH = "FEDLOOM_ALLOCATOR"
GUARD = "FEDLOOM_ALLOCATOR_STARTED"
"""Set in the environment of a command that was started again, which therefore does not do it once more."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names that malloc.h gives to mallopt's numbers
_SEPARATORS = re.compile(r"[ :]")  # what LD_PRELOAD separates paths by, so that no path may hold it


class Preload(NamedTuple):
    """An allocator that comes as a library to preload.

    Attributes:
        files: names of the library's file.
        install: the command that installs it on Debian and Ubuntu, or from PyPI.
        settings: variables it needs to keep freed memory. With their defaults jemalloc and mimalloc soon give large
            blocks back, which takes more of the kernel's time than glibc does.
    """

    name: str
    files: tuple[str, ...]
    install: str
    settings: Mapping[str, str]


PRELOADS = (
    Preload("tcmalloc", ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4"), "apt-get install libtcmalloc-minimal4", {}),
    Preload(
        "jemalloc",
        ("libjemalloc.so.2",),
        "apt-get install libjemalloc2",
        {"MALLOC_CONF": "oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:-1"},
    ),
    Preload(
        "mimalloc",
        ("libmimalloc.so.3", "libmimalloc.so.2", "libmimalloc.so.2.0", "libmimalloc.so"),
        "pip install --no-deps cmeel-mimalloc",
        {"MIMALLOC_PURGE_DELAY": "-1"},
    ),
)
"""In order of preference. `benchmarks/allocator.py` tells no clear difference in speed between them; tcmalloc varies
least, takes the least memory and needs no settings."""

NAMES = tuple(one.name for one in PRELOADS)
CHOICES = ("auto", "off", "glibc", *NAMES)

_raised: set[str] = set()  # what `tune` did in this process, which glibc does not tell


def wanted() -> str:
    """Return what FEDLOOM_ALLOCATOR asks for, by default auto.

    Raises:
        RecipeError: it is none of `CHOICES`.
    """
    value = os.environ.get(SWITCH) or "auto"
    if value not in CHOICES:
        _refuse(f"{SWITCH}={value} is not known; allowed: {', '.join(CHOICES)}; `unset {SWITCH}` means auto")
    return value


def found() -> str:
    """Return what is in force: the name of a preload, "glibc tuned", "glibc", or "unknown" on other systems."""
    maps = Path("/proc/self/maps")
    text = maps.read_text(encoding="utf-8", errors="replace") if maps.is_file() else ""
    loaded = re.search(rf"/lib({'|'.join(NAMES)})[^/\n]*\.so", text)
    if loaded:
        return loaded[1]
    if not _has_glibc():
        return "unknown"
    told = "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "") or "MALLOC_MMAP_THRESHOLD_" in os.environ
    return "glibc tuned" if told or _raised else "glibc"


def choose(name: str = "auto") -> tuple[Preload, Path] | None:
    """Return a preload and its library on this machine, or None.

    Args:
        name: the one that is wanted; auto: the most preferred one that is there.
    """
    if sys.platform != "linux":
        return None
    asked = [one for one in PRELOADS if name in ("auto", one.name)]
    libraries = ((one, path) for one in asked for path in _places(one.files) if _fits(path))
    return next(libraries, None)


def environment(preload: Preload, library: Path, base: Mapping[str, str]) -> dict[str, str]:
    """Return an environment like `base` for a process that is to start with the library; what `base` sets is kept."""
    before = [base["LD_PRELOAD"]] if base.get("LD_PRELOAD") else []
    return {**preload.settings, **base, "LD_PRELOAD": ":".join([*before, str(library)])}


def for_child() -> dict[str, str]:
    """Return the environment for a Python process that this one starts, such as a worker: with the preload wanted.

    A program that imports fedloom cannot be started again, but the processes that it starts can have the best.
    """
    asked = wanted()
    choice = None if asked in ("off", "glibc") or found() in NAMES else choose(asked)
    return environment(*choice, os.environ) if choice else dict(os.environ)


def ensure() -> None:
    """Give the running `fedloom` command the allocator that FEDLOOM_ALLOCATOR asks for.

    On Linux it starts the same command again, in the same process, with the library preloaded, and does not return;
    where there is no library, or the process is not the command's own, it tunes glibc. Call it before torch is there.

    Raises:
        RecipeError: the value is not known, or the allocator that it names is not to be had.
    """
    started = os.environ.pop(GUARD, None) is not None  # programs that this one starts are judged anew
    asked, now = wanted(), found()
    if asked == "off":
        return
    if now in NAMES:
        if asked not in ("auto", now):
            _refuse(f"{SWITCH}={asked}, but LD_PRELOAD brings {now}: unset one of them")
        return
    if asked != "glibc":
        _start_again(asked, started)
    tune()


def tune() -> bool:
    """Let glibc keep freed memory in this process, unless FEDLOOM_ALLOCATOR is off; return whether it is so now.

    It is for programs that import fedloom, which cannot be started again: it takes a tenth of a millisecond, may be
    called at any time and more than once, and does nothing where another allocator is in force. It saves page faults;
    a gain in speed could not be measured.
    """
    if wanted() == "off" or found() != "glibc":
        return bool(_raised)
    mallopt = ctypes.CDLL(None).mallopt
    # before glibc 2.35 a threshold above 32 MB was refused
    if any(mallopt(_M_MMAP_THRESHOLD, size) for size in (1 << 30, 32 << 20)) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1):
        _raised.add("thresholds")
    return bool(_raised)


def release() -> None:
    """Give freed memory back to the system, where the allocator in force is glibc's or tcmalloc; others keep it."""
    if not _has_glibc():
        return
    library = ctypes.CDLL(None)
    library.malloc_trim(0)
    if found() == "tcmalloc":
        library.MallocExtension_ReleaseFreeMemory()


def _start_again(asked: str, started: bool) -> None:
    """Replace this process by the same command with a library preloaded; return where that cannot be."""
    choice, words = choose(asked), _command()
    if choice is None:
        if asked != "auto":
            _refuse(_absent(asked))
        return
    preload, library = choice
    if started:
        if asked != "auto":
            _refuse(f"{SWITCH}={asked}, but {library} could not be preloaded; `export {SWITCH}=auto` goes on without")
        return
    if words is not None:
        os.execve(words[0], words, {**environment(preload, library, os.environ), GUARD: "1"})


def _command() -> list[str] | None:
    """Return the words that start this very command again, or None where the process is not the command's own.

    A test, a notebook or a program that calls the command's functions must never be replaced.
    """
    main = sys.modules.get("__main__")
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None) or ""
    own = spec.name.partition(".")[0] == "fedloom" if spec else Path(file).name == "fedloom"
    return [sys.executable, *sys.orig_argv[1:]] if own and sys.executable else None


def _places(files: tuple[str, ...]) -> Iterator[Path]:
    """Yield where the files may lie: the environment of this Python, what the loader knows, the usual folders."""
    folders = [*(Path(entry) / "cmeel.prefix" / "lib" for entry in sys.path if entry)]
    folders += [Path(sys.prefix) / "lib", Path(sys.base_prefix) / "lib"]
    folders += [Path(entry) for entry in os.environ.get("LD_LIBRARY_PATH", "").split(":") if entry]
    usual = [Path(f"/usr/lib/{os.uname().machine}-linux-gnu"), *map(Path, ("/usr/local/lib", "/usr/lib64", "/usr/lib"))]
    cache = Path("/etc/ld.so.cache")
    known = cache.read_bytes() if cache.is_file() else b""
    for file in files:
        yield from (folder / file for folder in folders)
        for path in re.findall(rb"\0(/[^\0]*/" + re.escape(file.encode()) + rb")(?=\0)", known):
            yield Path(os.fsdecode(path))
        yield from (folder / file for folder in usual)


def _fits(library: Path) -> bool:
    """Return whether the loader of this Python could preload the file: there, for the same processor, a plain path."""
    if _SEPARATORS.search(str(library)) or not library.is_file() or not library.is_absolute():
        return False
    return _kind(library) == _kind(Path("/proc/self/exe"))


def _kind(file: Path) -> bytes:
    """Return the bytes of an ELF file that tell its word size and processor."""
    with file.open("rb") as opened:
        head = opened.read(20)
    return head[:6] + head[18:]


def _has_glibc() -> bool:
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, ValueError, OSError):  # Windows, macOS, musl
        return False


def _absent(name: str) -> str:
    if sys.platform != "linux":
        return f"{SWITCH}={name}: an allocator can be preloaded on Linux only; `unset {SWITCH}`"
    install = next(one.install for one in PRELOADS if one.name == name)
    return f"{SWITCH}={name}: no library of it is on this machine; `{install}` brings it, `unset {SWITCH}` does without"


def _refuse(message: str) -> NoReturn:
    from fedloom.types import RecipeError  # imports torch, which takes a second or two

    raise RecipeError(message)
