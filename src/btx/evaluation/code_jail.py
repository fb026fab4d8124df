"""The program inside the fence: what `btx.evaluation.code_execution` starts in its own process. Standard library only.

It is handed to `python -I -S -B -c`, so it imports nothing of btx. It reads its settings from standard input, fences
itself in, runs ./program.py and writes what happened as one line of JSON to standard output. A fence that this machine
does not have is reported, not silently left out.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import runpy
import struct
import sys
from typing import Any

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 8, 38
CAPABILITY_VERSION, CAP_DAC_READ_SEARCH = 0x20080522, 2
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # landlock's system calls, the same on every architecture
FS_EXECUTE, FS_READ_FILE, FS_READ_DIR = 1 << 0, 1 << 2, 1 << 3
FS_BITS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # landlock version → kinds of access to files it knows
EPERM, PR_SET_SECCOMP, SECCOMP_FILTER = 1, 22, 2
FORBIDDEN = {
    "x86_64": (0xC000003E, (272, 308, 29, 68, 64, 240, 248, 249, 250, 425)),
    "aarch64": (0xC00000B7, (97, 268, 194, 186, 190, 180, 217, 218, 219, 425)),
}
"""Machine → its audit number, and its numbers of unshare and setns (new namespaces), shmget, msgget, semget and mq_open
(they outlive the process), add_key, request_key and keyctl (so do keys), io_uring_setup (a way around all this)."""
NET_BITS, SCOPE_BITS = 0b11, 0b11  # bind and connect TCP; abstract sockets and signals


def limit_resources(settings: dict[str, Any]) -> dict[str, bool]:
    """Hard limits, which the program cannot raise again; what could be set."""
    wanted = {
        "cpu": (resource.RLIMIT_CPU, settings["cpu_s"]),
        "memory": (resource.RLIMIT_AS, settings["memory_bytes"]),
        "file_size": (resource.RLIMIT_FSIZE, settings["file_bytes"]),
        "open_files": (resource.RLIMIT_NOFILE, settings["open_files"]),
        "core": (resource.RLIMIT_CORE, 0),
        "processes": (resource.RLIMIT_NPROC, 0),
    }
    done = {}
    for name, (kind, value) in wanted.items():
        try:
            resource.setrlimit(kind, (value, value))
            done[name] = True
        except (OSError, ValueError):
            done[name] = False
    return done


def leave_network(libc: ctypes.CDLL) -> bool:
    """Move into a network of its own that has no devices (Linux)."""
    if not hasattr(libc, "unshare"):
        return False
    return libc.unshare(CLONE_NEWNET | (0 if os.geteuid() == 0 else CLONE_NEWUSER)) == 0


def allow_writes_in(folder: str, libc: ctypes.CDLL) -> bool:
    """Nothing outside `folder` is written, made, removed or started as a program any more (Linux 5.13, landlock)."""
    if sys.platform != "linux":
        return False
    version = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    if version < 1:
        return False
    access = (1 << FS_BITS[min(version, 5)]) - 1 & ~(FS_READ_FILE | FS_READ_DIR)
    attributes = struct.pack("=QQQ", access, NET_BITS, SCOPE_BITS)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = libc.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
    inside = os.open(folder, os.O_RDONLY)
    rule = struct.pack("=Qi", access & ~FS_EXECUTE, inside)
    # A system call has up to four arguments here; unused ones have to be zero.
    done = (
        ruleset >= 0
        and libc.syscall(ADD_RULE, ruleset, ctypes.c_int(1), rule, ctypes.c_uint(0)) == 0
        and libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
        and libc.syscall(RESTRICT_SELF, ruleset, ctypes.c_uint(0)) == 0
    )
    os.close(inside)
    if ruleset >= 0:
        os.close(ruleset)
    return done


def forbid_calls(libc: ctypes.CDLL) -> bool:
    """Refuse the system calls of `FORBIDDEN` from here on (seccomp)."""
    if sys.platform != "linux" or os.uname().machine not in FORBIDDEN or not sys.maxsize > 1 << 32:
        return False
    audit, numbers = FORBIDDEN[os.uname().machine]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06  # BPF: load a word, compare and jump, return
    refused = 0x00050000 | EPERM
    steps = [
        (load, 0, 0, 4),
        (equal, 1, 0, audit),
        (give, 0, 0, refused),  # another architecture's calls
        (load, 0, 0, 0),
        (at_least, 0, 1, 1 << 30),
        (give, 0, 0, refused),  # the x32 calls of x86_64
    ]
    for number in numbers:
        steps += [(equal, 0, 1, number), (give, 0, 0, refused)]
    steps.append((give, 0, 0, 0x7FFF0000))  # all else is allowed
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(code)))
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    return libc.prctl(PR_SET_SECCOMP, SECCOMP_FILTER, ctypes.byref(program), 0, 0) == 0


def keep_capabilities(kept: int, libc: ctypes.CDLL) -> bool:
    """Give up all capabilities but those in the mask `kept`, among the lower 32."""
    effective_permitted_inheritable = struct.pack("=6I", kept, kept, 0, 0, 0, 0)  # the lower 32, then the higher
    return libc.capset(struct.pack("=Ii", CAPABILITY_VERSION, 0), effective_permitted_inheritable) == 0


def become(user: int, read_all: bool, libc: ctypes.CDLL) -> None:
    """Give up root's rights for good; with `read_all` keep the one to read any file."""
    keep = read_all and hasattr(libc, "capset")
    if keep:
        libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    if keep and not keep_capabilities(1 << CAP_DAC_READ_SEARCH, libc):
        raise OSError("the capabilities of root could not be given up")


def run(path: str) -> str:
    """Run a program to its end; "" if it ended in the ordinary way, else why not."""
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit:
        return "it left before its end (SystemExit)"
    except BaseException as error:
        with contextlib.suppress(BaseException):
            return f"{type(error).__name__}: {error}"[:300]
        return type(error).__name__
    return ""


def main() -> None:
    settings = json.loads(sys.stdin.readline())
    report = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    libc = ctypes.CDLL(None, use_errno=True)
    fences = {"network": leave_network(libc)}
    if settings["user"] is not None:
        become(settings["user"], settings["read_all"], libc)
        fences["network"] = fences["network"] or leave_network(libc)  # root in a container may lack the right to
    if settings["user"] is None and hasattr(libc, "capset"):
        keep_capabilities(0, libc)  # whoever makes a user namespace has all of them in it
    fences["writes"] = allow_writes_in(".", libc)
    fences["calls"] = forbid_calls(libc)
    fences |= limit_resources(settings)
    token = settings.pop("token")
    why = run("program.py")
    os.write(report, json.dumps({"token": token, "why": why, "fences": fences}).encode())
    os._exit(0)  # no atexit functions, no threads


if __name__ == "__main__":
    main()
