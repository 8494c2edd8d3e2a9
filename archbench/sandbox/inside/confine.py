"""What the kernel can be asked to forbid a process for good: files and networks (Landlock), capabilities, resources.

All by ctypes: it needs no package. Landlock and dropped capabilities hold for everything started afterwards; resource
limits are set in each child.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import sys
from pathlib import Path

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same numbers on every processor
LANDLOCK_VERSION = 1
PATH_BENEATH = 1
READ_FILE, READ_DIR = 1 << 2, 1 << 3
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}
"""Landlock ABI to the count of file rights it knows; the rights in between add none."""
TCP, SCOPES = 0b11, 0b11  # bind and connect (ABI 4); abstract unix sockets and signals (ABI 6)

PR_SET_NO_NEW_PRIVS = 38
PR_CAPBSET_DROP, PR_SET_PDEATHSIG, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 24, 1, 47, 4
CAPABILITY_VERSION_3 = 0x20080522
LAST_CAPABILITY = 63

MAX_OPEN_FILES = 64

_libc = ctypes.CDLL(None, use_errno=True)


def landlock_abi() -> int:
    """The kernel's version of Landlock; 0 for none."""
    return max(0, _syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), LANDLOCK_VERSION))


def restrict_files(readable: list[Path]) -> None:
    """From now on this process and its children read only these files and folders (with all below), and change none.

    Names may be listed, too, in the folders of sys.path and in the current one. Metadata (does it exist, how long is
    it) is beyond Landlock: it can be read everywhere. TCP is forbidden from ABI 4 on, signals and abstract sockets to
    processes outside from ABI 6 on. Paths that do not exist are left out. Raises OSError where the kernel refuses.
    """
    abi = landlock_abi()
    rights = FILE_RIGHTS[max(version for version in FILE_RIGHTS if version <= abi)]
    handled = [(1 << rights) - 1, TCP if abi >= 4 else 0, SCOPES if abi >= 6 else 0]
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    attributes = (ctypes.c_uint64 * 3)(*handled)
    ruleset = _check(_syscall(LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), 0))
    for path in readable:
        _allow(ruleset, path, READ_FILE | READ_DIR if path.is_dir() else READ_FILE)
    for folder in _search_path():
        _allow(ruleset, folder, READ_DIR)
    _allow(ruleset, Path.cwd(), READ_DIR)
    _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _check(_syscall(LANDLOCK_RESTRICT, ruleset, 0))
    os.close(ruleset)


def standard_library() -> list[Path]:
    """The interpreter's own modules, without the packages installed beside them, and the C libraries they may load."""
    modules = [
        entry
        for folder in _search_path()
        for entry in sorted(folder.iterdir())
        if entry.name not in ("site-packages", "dist-packages")
    ]
    folders = {path.parent for path in _loaded_libraries()}
    return [*modules, *(library for folder in sorted(folders) for library in sorted(folder.glob("*.so*")))]


def drop_capabilities() -> None:
    """Give up what being root allows, for good. Without effect for an ordinary user."""
    for capability in range(LAST_CAPABILITY + 1):
        _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    _libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    none = (ctypes.c_uint32 * 6)()
    _check(_libc.capset(header, none))


def limit_resources(cpu_s: int, memory_bytes: int) -> None:
    """Caps of this process: processor time, address space, no file to be written, few open files, no core dump."""
    caps = {
        resource.RLIMIT_CPU: (cpu_s, cpu_s + 1),  # the first limit sends a signal that can be caught, the second kills
        resource.RLIMIT_AS: (memory_bytes, memory_bytes),
        resource.RLIMIT_FSIZE: (0, 0),
        resource.RLIMIT_NOFILE: (MAX_OPEN_FILES, MAX_OPEN_FILES),
        resource.RLIMIT_CORE: (0, 0),
    }
    for what, (soft, hard) in caps.items():
        ceiling = resource.getrlimit(what)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(what, (soft, hard))


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, whose id is `parent`, ends."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0))
    if os.getppid() != parent:
        os._exit(1)


def _search_path() -> list[Path]:
    return [Path(entry) for entry in sys.path if Path(entry).is_dir()]


def _loaded_libraries() -> list[Path]:
    """The shared objects mapped into this process, asked of the loader: /proc may not be there."""

    class Info(ctypes.Structure):
        _fields_ = (("address", ctypes.c_void_p), ("name", ctypes.c_char_p))

    found: list[Path] = []
    visitor = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Info), ctypes.c_size_t, ctypes.c_void_p)

    def visit(info, _size, _data):
        name = info.contents.name
        if name and name.startswith(b"/"):
            found.append(Path(os.fsdecode(name)))
        return 0

    _libc.dl_iterate_phdr(visitor(visit), None)
    return found


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # not there, or not ours to read: then there is nothing to allow
    try:
        rule = rights.to_bytes(8, sys.byteorder) + descriptor.to_bytes(4, sys.byteorder)
        _check(_syscall(LANDLOCK_ADD, ruleset, PATH_BENEATH, ctypes.c_char_p(rule), 0))
    finally:
        os.close(descriptor)


def _syscall(number: int, *arguments: object) -> int:
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    answer: int = _libc.syscall(ctypes.c_long(number), *words)
    return answer


def _check(answer: int) -> int:
    if answer < 0:
        number = ctypes.get_errno()
        raise OSError(number, errno.errorcode.get(number, str(number)))
    return answer
