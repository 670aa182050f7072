"""`apt cache`: how large the caches are, and how to clean them."""

from __future__ import annotations

from argparse import Namespace

from apt.cli.screen import columns, in_bytes
from apt.core import cache
from apt.core.errors import UsageError


def run_cache_command(args: Namespace) -> int:
    """Show what is cached, or remove it."""
    limits = {"--older-than": args.older_than, "--at-most": args.at_most}
    for option, value in limits.items():
        if value is None:
            continue
        if not args.clean:
            raise UsageError(f"apt cache: {option} goes with --clean", hint=f"apt cache --clean {option} {value:g}")
        if not 0 <= value < float("inf"):
            raise UsageError(f"apt cache: {option} is a number from 0 on, got {value:g}")
    if args.clean:
        removed = cache.clean(
            older_than=None if args.older_than is None else args.older_than * 86400,
            max_bytes=None if args.at_most is None else int(args.at_most * 1e9),
        )
        print(f"Removed {in_bytes(removed)} from {cache.cache_root()}; {in_bytes(cache.size())} are left")
        return 0
    names = cache.names()
    print(f"{cache.cache_root()}: {in_bytes(cache.size())}")
    print(*columns([(name, in_bytes(cache.size(name))) for name in names]), sep="\n") if names else None
    return 0
