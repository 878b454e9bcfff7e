"""A seccomp filter for Linux: calls that computing needs are allowed, every other call fails with EPERM.

The filter is a classic BPF program over `struct seccomp_data` (Linux: Documentation/userspace-api/seccomp_filter.rst).
It holds for every thread of the process and for all that it starts, and nothing can take it away.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

# name: (number on x86_64, number on aarch64); None where the architecture lacks the call.
_COMPUTE = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None),
    "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215),
    "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "pread64": (17, 67), "readv": (19, 65), "writev": (20, 66), "access": (21, None), "select": (23, None),
    "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233), "dup": (32, 23), "nanosleep": (35, 101),
    "getitimer": (36, 102), "alarm": (37, None), "setitimer": (38, 103), "getpid": (39, 172), "exit": (60, 93),
    "uname": (63, 160), "getcwd": (79, 17), "readlink": (89, None), "gettimeofday": (96, 169),
    "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153),
    "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177),
    "getppid": (110, 173), "rt_sigtimedwait": (128, 137), "sigaltstack": (131, 132), "statfs": (137, 43),
    "fstatfs": (138, 44), "arch_prctl": (158, None), "gettid": (186, 178), "futex": (202, 98),
    "sched_getaffinity": (204, 123), "getdents64": (217, 61), "set_tid_address": (218, 96),
    "restart_syscall": (219, 128), "fadvise64": (221, 223), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "newfstatat": (262, 79), "readlinkat": (267, 78),
    "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73), "set_robust_list": (273, 99),
    "pipe2": (293, 59), "getcpu": (309, 168), "getrandom": (318, 278), "membarrier": (324, 283), "statx": (332, 291),
    "rseq": (334, 293), "faccessat2": (439, 439),
}  # fmt: skip
# Allowed beside those where files may be written; Landlock says where.
_WRITE = {
    "pwrite64": (18, 68), "sendfile": (40, 71), "flock": (73, 32), "fsync": (74, 82), "fdatasync": (75, 83),
    "ftruncate": (77, 46), "chdir": (80, 49), "rename": (82, None), "mkdir": (83, None), "rmdir": (84, None),
    "unlink": (87, None), "umask": (95, 166), "mkdirat": (258, 34), "unlinkat": (263, 35), "renameat": (264, 38),
    "fallocate": (285, 47), "renameat2": (316, 276), "copy_file_range": (326, 285),
}  # fmt: skip
# Allowed beside those where other processes may be started: forks, no programs, and sockets of their own.
_PROCESSES = {
    "dup2": (33, None), "pipe": (22, None), "connect": (42, 203), "accept": (43, 202), "sendto": (44, 206),
    "recvfrom": (45, 207), "sendmsg": (46, 211), "recvmsg": (47, 212), "shutdown": (48, 210), "bind": (49, 200),
    "listen": (50, 201), "getsockname": (51, 204), "getpeername": (52, 205), "socketpair": (53, 199),
    "setsockopt": (54, 208), "getsockopt": (55, 209), "clone": (56, 220), "fork": (57, None), "vfork": (58, None),
    "wait4": (61, 260), "kill": (62, 129), "epoll_wait": (232, None), "epoll_ctl": (233, 21), "tgkill": (234, 131),
    "waitid": (247, 95), "epoll_pwait": (281, 22),
    "accept4": (288, 242), "eventfd2": (290, 19), "epoll_create1": (291, 20), "dup3": (292, 24),
}  # fmt: skip
# Decided by an argument.
_OPEN, _OPENAT, _CLONE, _CLONE3 = (2, None), (257, 56), (56, 220), (435, 435)
_TGKILL, _PRLIMIT, _SOCKET, _FCNTL = (234, 131), (302, 261), (41, 198), (72, 25)
# Of fcntl: F_SETOWN, F_SETSIG, F_SETOWN_EX and F_NOTIFY, by which a file sends signals to whoever is named.
_SIGNALLING = (8, 10, 15, 1026)

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = (
    0x20,
    0x15,
    0x45,
    0x35,
    0x06,
)  # BPF_LD|W|ABS, JMP|JEQ, JSET, JGE, RET
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CLONE_THREAD, _AF_UNIX = 0x00010000, 1
_PR_SET_NO_NEW_PRIVS, _SET_MODE_FILTER, _TSYNC = 38, 1, 1
_SECCOMP = (317, 277)


def available() -> bool:
    """Whether this system is one that `install` knows: Linux on x86_64 or aarch64."""
    return platform.system() == "Linux" and platform.machine() in _ARCHITECTURES


def install(*, write: bool = False, processes: bool = False) -> None:
    """Hold this process, all its threads and descendants, to computing.

    Args:
      write: files may be opened for writing (`data.confined.landlock` says which).
      processes: the process may fork and talk over Unix sockets; programs are never started.

    Raises:
      OSError: the kernel refuses the filter.
    """
    column, architecture = _ARCHITECTURES[platform.machine()]
    program = b"".join(_program(column, architecture, write, processes))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    instructions = ctypes.create_string_buffer(program)
    # struct sock_fprog: a count, padding, a pointer
    filter_program = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(instructions))
    if libc.syscall(_SECCOMP[column], _SET_MODE_FILTER, _TSYNC, filter_program):
        raise OSError(ctypes.get_errno(), "seccomp")


def _program(column: int, architecture: int, write: bool, processes: bool) -> list[bytes]:
    allowed = _COMPUTE | (_WRITE if write else {}) | (_PROCESSES if processes else {})
    program = [
        _bpf(_LOAD, _ARCH),
        _bpf(_EQUAL, architecture, 1, 0),
        _bpf(_RETURN, _KILL),
        _bpf(_LOAD, _NUMBER),
    ]
    # x86_64's x32 calls share the architecture's mark; their numbers begin at 2**30.
    program += [_bpf(_AT_LEAST, 1 << 30, 0, 1), _refusal(errno.EPERM)]
    for numbers in allowed.values():
        if numbers[column] is not None:
            program += [_bpf(_EQUAL, numbers[column], 0, 1), _bpf(_RETURN, _ALLOW)]
    program += _where(_CLONE3[column], [_refusal(errno.ENOSYS)])  # flags lie in memory; libc then calls clone
    program += _where(_CLONE[column], _argument(0, _ANY_BIT, _CLONE_THREAD))
    program += _where(_TGKILL[column], _argument(0, _EQUAL, os.getpid()))
    program += _where(_PRLIMIT[column], _argument(2, _EQUAL, 0))  # reading limits, not setting them
    for call, flags in ((_OPEN[column], 1), (_OPENAT[column], 2)):
        allow = [_bpf(_RETURN, _ALLOW)] if write else _argument(flags, _ANY_BIT, _WRITING, then_allow=False)
        program += _where(call, allow)
    refused = b"".join(_bpf(_EQUAL, command, 0, 1) + _refusal(errno.EPERM) for command in _SIGNALLING)
    body = [_bpf(_LOAD, _ARGUMENTS + 8), *[refused[i : i + 8] for i in range(0, len(refused), 8)]]
    program += _where(_FCNTL[column], [*body, _bpf(_RETURN, _ALLOW)])
    if processes:
        program += _where(_SOCKET[column], _argument(0, _EQUAL, _AF_UNIX))
    return [*program, _refusal(errno.EPERM)]


def _where(number: int | None, body: list[bytes]) -> list[bytes]:
    """`body`, which returns, for the call of this number."""
    return [] if number is None else [_bpf(_EQUAL, number, 0, len(body)), *body]


def _argument(index: int, test: int, value: int, *, then_allow: bool = True) -> list[bytes]:
    """Allow or refuse a call by the low half of an argument."""
    yes, no = _bpf(_RETURN, _ALLOW), _refusal(errno.EPERM)
    first, second = (yes, no) if then_allow else (no, yes)
    return [_bpf(_LOAD, _ARGUMENTS + 8 * index), _bpf(test, value, 0, 1), first, second]


def _refusal(number: int) -> bytes:
    return _bpf(_RETURN, _ERRNO | number)


def _bpf(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, k)
