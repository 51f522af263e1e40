"""SIGKILL at the boundaries of system calls, by strace, which reaches native code and children.

A trial: a store in which all earlier stages are done, one stage run under strace, which kills the
thread that makes the N-th call of a kind; then the same command again, undisturbed. What must hold
is in :mod:`tests.faults.kills.checks`.
"""
