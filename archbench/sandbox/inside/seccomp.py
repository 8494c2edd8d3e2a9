"""The system calls a candidate may make: an allow list as a BPF program, built for the machine's processor.

Everything else answers EPERM. In particular: no sockets, no new processes, no exec, no signals, no writing or changing
of files or of their metadata (which Landlock does not cover), no limits or priorities of other processes, no
namespaces, no tracing. Threads stay allowed: `clone` with CLONE_THREAD, while `clone3`, whose flags lie in memory that
a filter cannot see, answers ENOSYS, upon which the C library falls back on `clone`.

No resource limit counts threads reliably (RLIMIT_NPROC counts all of a user's, and does not bind root), so the zygote
does: the kernel asks it about every `clone`, by a listener that a first, small filter makes.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import platform
import struct

# name, number on x86_64, number on aarch64 (- where it has no such call)
ALLOWED = """
read 0 63, readv 19 65, pread64 17 67, write 1 64, writev 20 66, close 3 57, lseek 8 62,
fstat 5 80, stat 4 -, lstat 6 -, newfstatat 262 79, statx 332 291, access 21 -, faccessat 269 48, faccessat2 439 439,
readlink 89 -, readlinkat 267 78, getcwd 79 17, getdents64 217 61, dup 32 23, dup2 33 -, dup3 292 24,
mmap 9 222, mprotect 10 226, munmap 11 215, mremap 25 216, madvise 28 233, brk 12 214,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sigaltstack 131 132,
futex 202 98, set_robust_list 273 99, get_robust_list 274 100, rseq 334 293, set_tid_address 218 96,
sched_yield 24 124, sched_getaffinity 204 123, getcpu 309 168, restart_syscall 219 128, exit 60 93, exit_group 231 94,
nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169,
time 201 -, times 100 153, select 23 -, pselect6 270 72, poll 7 -, ppoll 271 73,
getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177,
getpgrp 111 -, getresuid 118 148, getresgid 120 150, uname 63 160, sysinfo 99 179, getrusage 98 165, getrlimit 97 163,
getrandom 318 278
"""
# Those whose arguments decide, and the one that is said not to exist.
DECIDED = "open 2 -, openat 257 56, ioctl 16 29, fcntl 72 25, prctl 157 167, prlimit64 302 261, clone 56 220"
ABSENT = "clone3 435 435"

ARCHITECTURES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}
"""Column of the table, and what the kernel calls the architecture (AUDIT_ARCH_*)."""

LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
KILL_PROCESS, ERRNO, ASK, ALLOW = 0x80000000, 0x00050000, 0x7FC00000, 0x7FFF0000
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; arguments are 8 bytes, low word first

WRITING = 0o1 | 0o2 | 0o100 | 0o1000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
TERMINAL = (0x5401, 0x5413, 0x5450, 0x5451)  # TCGETS (isatty), TIOCGWINSZ, FIONCLEX, FIOCLEX
DESCRIPTOR = (0, 1, 2, 3, 4, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC; no owner, no lease
PR_SET_NAME = 15
CLONE_THREAD = 0x10000
NEW_NAMESPACES = 0x7E020080  # CLONE_NEW*: mount, cgroup, uts, ipc, user, pid, net, time

PR_SET_NO_NEW_PRIVS = 38
SECCOMP = "seccomp 317 277"
SET_MODE_FILTER, NEW_LISTENER = 1, 8
RECEIVE, SEND = 0xC0502100, 0xC0182101  # ioctls of a listener
NOTICE_BYTES = 80  # struct seccomp_notif
CONTINUE = 1

Instruction = tuple[int, int, int, int]


def reason() -> str | None:
    """Why there is no filter for this machine's processor, or None."""
    if platform.machine() in ARCHITECTURES:
        return None
    return f"no seccomp filter is written for {platform.machine()} (there are {', '.join(ARCHITECTURES)})"


def install() -> None:
    """Put this thread, and all it starts, under the filter for good. Raises OSError where the kernel refuses."""
    _set_filter(filter_program(platform.machine()), 0)


def listen_to_clone() -> int:
    """From now on the kernel asks whoever holds the listener, whose descriptor this is, about each `clone`.

    Raises OSError where the kernel cannot (before 5.5), or where this process is under another listener already.
    """
    column, audit = ARCHITECTURES[platform.machine()]
    clone = _numbers(DECIDED, column)["clone"]
    program = [*_for_architecture(audit), *_case(clone, [_answer(ASK)]), _answer(ALLOW)]
    return _set_filter(program, NEW_LISTENER)


def answer_clone(listener: int, allowed: bool) -> None:
    """Answers the question that waits at a listener. Raises OSError when whoever asked is gone."""
    notice = bytearray(NOTICE_BYTES)
    fcntl.ioctl(listener, RECEIVE, notice)
    (identity,) = struct.unpack_from("Q", notice)
    error, flags = (0, CONTINUE) if allowed else (-errno.EAGAIN, 0)
    fcntl.ioctl(listener, SEND, struct.pack("QqiI", identity, 0, error, flags))


def _set_filter(program: list[Instruction], flags: int) -> int:
    (number,) = _numbers(SECCOMP, ARCHITECTURES[platform.machine()][0]).values()
    packed = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    memory = ctypes.create_string_buffer(packed, len(packed))
    header = struct.pack("H6xP", len(program), ctypes.addressof(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    refused = libc.prctl(PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero)
    words = [ctypes.c_long(number), ctypes.c_long(SET_MODE_FILTER), ctypes.c_long(flags), ctypes.c_char_p(header)]
    answer: int = -1 if refused else libc.syscall(*words)
    if answer < 0:
        raise OSError(ctypes.get_errno(), "the kernel refuses a seccomp filter")
    return answer


def filter_program(machine: str) -> list[Instruction]:
    """The BPF program as (code, jump if true, jump if false, operand)."""
    column, audit = ARCHITECTURES[machine]
    program = _for_architecture(audit)
    for number in _numbers(ALLOWED, column).values():
        program += _case(number, [_answer(ALLOW)])
    for number in _numbers(ABSENT, column).values():
        program += _case(number, [_answer(ERRNO | errno.ENOSYS)])
    for name, number in _numbers(DECIDED, column).items():
        program += _case(number, _decision(name))
    return [*program, _answer(ERRNO | errno.EPERM)]


def _for_architecture(audit: int) -> list[Instruction]:
    """Kills who calls by another architecture's numbers; then loads the call's number."""
    return [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, audit), _answer(KILL_PROCESS), (LOAD, 0, 0, NUMBER)]


def _decision(name: str) -> list[Instruction]:
    """Instructions that end in an answer, by the call's arguments."""
    if name in ("open", "openat"):
        return _unless_any(1 if name == "open" else 2, WRITING)
    if name == "ioctl":
        return _one_of(1, TERMINAL)
    if name == "fcntl":
        return _one_of(1, DESCRIPTOR)
    if name == "prctl":
        return _one_of(0, (PR_SET_NAME,))
    if name == "prlimit64":  # reading one's own: process 0 (oneself), and no new limit (a null pointer)
        pointer = [*_zero(2), (LOAD, 0, 0, ARGUMENTS + 8 * 2 + 4), (EQUAL, 1, 0, 0), _answer(ERRNO | errno.EPERM)]
        return [*_zero(0), *pointer, _answer(ALLOW)]
    assert name == "clone"
    return [
        (LOAD, 0, 0, ARGUMENTS),
        (ANY_BIT, 1, 0, CLONE_THREAD),
        _answer(ERRNO | errno.EPERM),
        *_unless_any(0, NEW_NAMESPACES),
    ]


def _zero(argument: int) -> list[Instruction]:
    return [(LOAD, 0, 0, ARGUMENTS + 8 * argument), (EQUAL, 1, 0, 0), _answer(ERRNO | errno.EPERM)]


def _unless_any(argument: int, bits: int) -> list[Instruction]:
    return [
        (LOAD, 0, 0, ARGUMENTS + 8 * argument),
        (ANY_BIT, 0, 1, bits),
        _answer(ERRNO | errno.EPERM),
        _answer(ALLOW),
    ]


def _one_of(argument: int, values: tuple[int, ...]) -> list[Instruction]:
    cases = [instruction for value in values for instruction in _case(value, [_answer(ALLOW)])]
    return [(LOAD, 0, 0, ARGUMENTS + 8 * argument), *cases, _answer(ERRNO | errno.EPERM)]


def _case(value: int, then: list[Instruction]) -> list[Instruction]:
    """`then`, which ends in an answer, if the loaded word is `value`; else on to what follows."""
    return [(EQUAL, 0, len(then), value), *then]


def _answer(action: int) -> Instruction:
    return (RETURN, 0, 0, action)


def _numbers(table: str, column: int) -> dict[str, int]:
    rows = [row.split() for row in table.split(",")]
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}
