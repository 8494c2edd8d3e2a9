"""Attempts to get out, made inside the sandbox before any candidate is let in. Sent there as a candidate is.

A probe that returns without an exception got through, unless it returns False. New ones are found by their name.
"""

from __future__ import annotations

import ctypes
import os
import resource
import socket
import subprocess
import sys
import threading

libc = ctypes.CDLL(None, use_errno=True)


def system_call(number, *arguments):
    """A raw system call, past every wrapper; raises OSError when it is refused."""
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    answer = libc.syscall(ctypes.c_long(number), *words)
    if answer < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return answer


def probe_connects_by_tcp(target):
    socket.create_connection(("127.0.0.1", target["port"]), timeout=2).close()


def probe_sends_by_udp(target):
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", target["port"]))


def probe_connects_to_a_unix_socket(target):
    socket.socket(socket.AF_UNIX).connect(target["socket"])


def probe_opens_a_netlink_socket(target):
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)


def probe_reads_a_file_outside(target):
    with open(target["file"]) as file:
        file.read()


def probe_lists_a_folder_outside(target):
    os.listdir(target["folder"])


def probe_reads_the_accounts(target):
    with open("/etc/passwd") as file:
        file.read()


def probe_reads_process_memory(target):
    os.open("/proc/self/mem", os.O_RDONLY)


def probe_reads_the_environment_of_a_process(target):
    for process in ("self", os.getppid(), target["process"]):
        with open(f"/proc/{process}/environ", "rb") as file:
            file.read()


def probe_has_an_environment(target):
    return bool(dict(os.environ)) or libc.getenv(b"ARCHBENCH_PROBE") != 0


def probe_has_descriptors(target):
    """Only the null device, and its own report, may be open."""
    for descriptor in range(4, 256):
        try:
            os.fstat(descriptor)
        except OSError:
            continue
        return True
    return False


def probe_writes_a_file_outside(target):
    with open(target["file"], "a") as file:
        file.write("x")


def probe_makes_a_file_outside(target):
    os.close(os.open(os.path.join(target["folder"], "made"), os.O_WRONLY | os.O_CREAT))


def probe_makes_a_file_here(target):
    os.close(os.open("made", os.O_WRONLY | os.O_CREAT))


def probe_truncates(target):
    os.truncate(target["file"], 0)


def probe_makes_a_folder(target):
    os.mkdir(os.path.join(target["folder"], "made-too"))


def probe_links(target):
    os.symlink(target["file"], os.path.join(target["folder"], "link"))


def probe_renames(target):
    os.rename(target["file"], target["file"] + "-moved")
    os.rename(target["file"] + "-moved", target["file"])


def probe_changes_a_mode(target):
    os.chmod(target["file"], 0o600)


def probe_changes_an_owner(target):
    os.chown(target["file"], -1, -1)


def probe_changes_a_time(target):
    os.utime(target["file"], (0, 0))


def probe_changes_an_attribute(target):
    os.setxattr(target["file"], "user.archbench", b"x")


def probe_deletes(target):
    os.unlink(target["file"])


def probe_signals_its_parent(target):
    os.kill(os.getppid(), 0)


def probe_signals_the_caller(target):
    os.kill(target["process"], 0)


def probe_signals_everyone(target):
    os.kill(-1, 0)


def probe_limits_its_parent(target):
    resource.prlimit(os.getppid(), resource.RLIMIT_CORE, (0, 0))


def probe_limits_the_caller(target):
    resource.prlimit(target["process"], resource.RLIMIT_CORE, (0, 0))


def probe_raises_its_own_limits(target):
    resource.setrlimit(resource.RLIMIT_AS, resource.getrlimit(resource.RLIMIT_AS))


def probe_sets_a_priority(target):
    os.setpriority(os.PRIO_PROCESS, os.getppid(), os.getpriority(os.PRIO_PROCESS, os.getppid()))


def probe_traces_its_parent(target):
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(0x4206, os.getppid(), None, None) < 0:  # PTRACE_SEIZE: unlike ATTACH it does not stop it
        raise OSError


def probe_reads_its_parents_memory(target):
    class Vector(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    buffer = ctypes.create_string_buffer(8)
    here = Vector(ctypes.addressof(buffer), 8)
    if libc.process_vm_readv(os.getppid(), ctypes.byref(here), 1, ctypes.byref(here), 1, 0) < 0:
        raise OSError


def probe_forks(target):
    if os.fork() == 0:
        os._exit(0)


def probe_spawns(target):
    os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {})


def probe_runs_a_shell(target):
    subprocess.run(["/bin/sh", "-c", "true"], check=True)


def probe_executes(target):
    """Nothing lies at this path: to hear so is to have been allowed to ask."""
    try:
        os.execv("/nowhere/at/all", ["nothing"])
    except FileNotFoundError:
        return True


def probe_makes_a_file_in_memory(target):
    os.memfd_create("x")


def probe_takes_much_memory(target):
    bytearray(2 * target["memory_bytes"])


def probe_leaves_its_session(target):
    os.setsid()


def probe_makes_a_namespace(target):
    if libc.unshare(0x10000000):  # CLONE_NEWUSER
        raise OSError


def probe_uses_an_io_ring(target):
    system_call(425, 1, ctypes.create_string_buffer(256))


def probe_opens_a_process(target):
    os.pidfd_open(os.getppid())


def probe_starts_threads_without_end(target):
    """400 idle threads: more than a child may start, and fewer than its memory would allow."""
    threading.stack_size(32 * 1024)
    leave = threading.Event()
    try:
        for _ in range(400):
            threading.Thread(target=leave.wait, daemon=True).start()
    finally:
        leave.set()


def works():
    """What honest code needs: threads, and modules that were not loaded beforehand."""
    import colorsys
    import zlib

    found = []
    thread = threading.Thread(target=lambda: found.append(zlib.crc32(b"x")))
    thread.start()
    thread.join()
    return len(found) == 1 and colorsys.rgb_to_hsv(0, 0, 0) == (0, 0, 0)


def got_through(target):
    """The names of the probes that were not stopped."""
    through = []
    for name, probe in list(globals().items()):
        if name.startswith("probe_"):
            try:
                if probe(target) is not False:
                    through.append(name.removeprefix("probe_"))
            except Exception:
                pass  # refused, which is how it should be; a refusal has many forms
    return through
