"""The seccomp filter of a sandboxed process: an allow-list of system calls as a BPF program.

Standard library only: the zygote loads this file by its path. Everything that is not on the list
fails with EPERM, which Python reports as `PermissionError`; memory is never mapped executable.
Layouts and constants: linux/seccomp.h, linux/bpf_common.h, linux/audit.h.
"""

import ctypes
import errno
import os
import platform
import struct
import sys

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
SYSCALLS = {  # name: number on x86-64, number on aarch64
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "nanosleep": (35, 101),
    "getpid": (39, 172),
    "exit": (60, 93),
    "gettimeofday": (96, 169),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "futex": (202, 98),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "getrandom": (318, 278),
}
WITHOUT_EXEC = {"mmap": (9, 222), "mprotect": (10, 226)}  # third argument must not have PROT_EXEC

ALLOW = 0x7FFF0000
REFUSE = 0x00050000 | errno.EPERM
KILL = 0x80000000
_LOAD, _JUMP_EQUAL, _JUMP_BITS, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER, _ARCH, _THIRD_ARGUMENT_LOW = 0, 4, 32  # offsets in struct seccomp_data, little endian
_PROT_EXEC = 4
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _PR_SET_PDEATHSIG = 4, 22, 38, 1
_MODE_FILTER = 2


class Unavailable(Exception):
    """This machine cannot filter system calls; the text says why."""


def program(machine: str) -> bytes:
    """The filter for `machine` (`x86_64` or `aarch64`) as packed `struct sock_filter`s."""
    if machine not in AUDIT_ARCH:
        raise Unavailable(f"no filter for {machine!r}; there are {', '.join(AUDIT_ARCH)}")
    column = list(AUDIT_ARCH).index(machine)
    code = [
        (_LOAD, 0, 0, _ARCH),
        (_JUMP_EQUAL, 1, 0, AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    for numbers in SYSCALLS.values():
        code += [(_JUMP_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, ALLOW)]
    for numbers in WITHOUT_EXEC.values():
        code += [
            (_JUMP_EQUAL, 0, 4, numbers[column]),
            (_LOAD, 0, 0, _THIRD_ARGUMENT_LOW),
            (_JUMP_BITS, 1, 0, _PROT_EXEC),
            (_RETURN, 0, 0, ALLOW),
            (_RETURN, 0, 0, REFUSE),
        ]
    code.append((_RETURN, 0, 0, REFUSE))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _prctl(what: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(*arguments) != 0:
        raise Unavailable(f"{what} failed: {os.strerror(ctypes.get_errno())}")


def die_with_parent() -> None:
    """SIGKILL for this process when the thread that forked it ends."""
    _prctl("prctl(PR_SET_PDEATHSIG)", _PR_SET_PDEATHSIG, 9, 0, 0, 0)


def confine(machine: str = "") -> None:
    """Filter this process's system calls, for good. Raises `Unavailable` with the reason."""
    if sys.platform != "linux":
        raise Unavailable(f"seccomp needs Linux, this is {sys.platform}")
    code = program(machine or platform.machine())
    buffer = ctypes.create_string_buffer(code, len(code))
    whole = _Program(len(code) // 8, ctypes.addressof(buffer))
    _prctl("prctl(PR_SET_DUMPABLE)", _PR_SET_DUMPABLE, 0, 0, 0, 0)
    _prctl("prctl(PR_SET_NO_NEW_PRIVS)", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _prctl("prctl(PR_SET_SECCOMP)", _PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(whole))
