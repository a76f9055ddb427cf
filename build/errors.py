"""What can go wrong in a build, one class and one exit code per kind.

Every message is one sentence or two: the thing and its value, the rule, and what to do. `engines.main` is
the only place that prints them.
"""

from __future__ import annotations


class BuildError(Exception):
    """Base of all errors that a user can cause or cure. Anything else that is raised is a defect of ours."""

    exit_code = 1


class UsageError(BuildError):
    """An option, or a combination of options, that cannot be built."""

    exit_code = 2


class CheckpointError(BuildError):
    """The checkpoint cannot be had: missing, gated, no network, disk full while downloading, damaged."""

    exit_code = 3


class UnsupportedError(BuildError):
    """The checkpoint is fine, but this engine kind cannot hold it, or this machine cannot build it."""

    exit_code = 4


class CompileError(BuildError):
    """The compiler started and failed."""

    exit_code = 5


class StoreError(BuildError):
    """The engine store or the output folder cannot be read or written: disk full, read-only, damaged."""

    exit_code = 6


class VerifyError(BuildError):
    """The engine was built, but it does not say what the checkpoint says."""

    exit_code = 7
