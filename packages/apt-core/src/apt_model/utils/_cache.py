"""The cache manager of 1.x: its calls, on the kernel's caches."""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from apt.cli.screen import in_bytes
from apt.core import cache
from apt.core.errors import AptWarning


class CacheManager:
    """Files that can be made again, by type and name; a type is a folder.

    Args:
        cache_dir: the folder of the types; that of APT's own caches if left out.
        logger: is told what fails.
    """

    def __init__(self, cache_dir: str | Path | None = None, logger: logging.Logger | None = None) -> None:
        self.root = cache.cache_root() if cache_dir is None else Path(cache_dir).expanduser().absolute()
        self.cache_dir = str(self.root)
        self.logger = logger

    def get_cache_path(self, subdir_type: str, filename: str = "") -> str:
        """Where a file of a type lies; the type's folder is made if need be."""
        return str(cache.cache_dir(subdir_type, self.root) / filename)

    def get_cache_size(self, cache_type: str | None = None) -> dict[str, Any]:
        """{"total_size_bytes", "total_size_human", "by_type": {type: {"size_bytes", "size_human", "files"}}}."""
        by_type = {}
        for name in cache.names(self.root):
            if cache_type in (None, name):
                sizes = [size for _, _, size in cache.entries(name, self.root)]
                by_type[name] = {"size_bytes": sum(sizes), "size_human": in_bytes(sum(sizes)), "files": len(sizes)}
        total = cache.size(cache_type, self.root)
        return {"total_size_bytes": total, "total_size_human": in_bytes(total), "by_type": by_type}

    def clean_cache(
        self, cache_type: str | None = None, days: float = 30, exclude: list[str] | None = None
    ) -> dict[str, Any]:
        """Remove what has not been used for so many days; all of it for 0. Folders that APT did not make are left
        alone, with an AptWarning.

        Args:
            exclude: patterns of files that stay.

        Returns:
            {"cleaned_files": files removed, "skipped": files left, "cleaned_dirs": 0, "errors": []}.
        """
        before = self._files(cache_type)
        if days > 0:
            cache.clean(cache_type, self.root, older_than=days * 86400, keep=exclude or ())
        else:
            cache.clean(cache_type, self.root, keep=exclude or ())
        left = self._files(cache_type)
        self._say_what_is_not_ours(cache_type)
        return {"cleaned_files": len(before) - len(left), "cleaned_dirs": 0, "errors": [], "skipped": len(left)}

    def save_to_cache(self, data: str | bytes, subdir_type: str, filename: str, overwrite: bool = False) -> str | None:
        """Write a text, bytes, or a copy of the file that `data` names, and return its path; None if that fails. A file
        that is there stays unless `overwrite`."""
        path = Path(self.get_cache_path(subdir_type, filename))
        if path.exists() and not overwrite:
            return str(path)
        try:
            if isinstance(data, str):
                data = Path(data).read_bytes() if os.path.isfile(data) else data.encode()
            with cache.atomic_write(path) as file:
                file.write(data)
        except OSError as error:
            self._failed(path, error)
            return None
        return str(path)

    def load_from_cache(self, subdir_type: str, filename: str, default: Any = None) -> Any:
        """The text of a file; `default` where there is none."""
        content = self.load_binary_from_cache(subdir_type, filename)
        return default if content is None else content.decode()

    def load_binary_from_cache(self, subdir_type: str, filename: str, default: Any = None) -> Any:
        """The bytes of a file; `default` where there is none."""
        path = Path(self.get_cache_path(subdir_type, filename))
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return default
        except OSError as error:
            self._failed(path, error)
            return default

    def file_exists_in_cache(self, subdir_type: str, filename: str) -> bool:
        """Whether there is such a file."""
        return os.path.isfile(self.get_cache_path(subdir_type, filename))

    def delete_from_cache(self, subdir_type: str, filename: str) -> bool:
        """Remove a file; whether it was there."""
        with suppress(OSError):
            os.unlink(self.get_cache_path(subdir_type, filename))
            return True
        return False

    def _files(self, cache_type: str | None) -> list[Path]:
        return [path for _, path, _ in cache.entries(cache_type, self.root)]

    def _say_what_is_not_ours(self, cache_type: str | None) -> None:
        with suppress(OSError):
            ours = cache.names(self.root)
            others = [path.name for path in self.root.iterdir() if path.is_dir() and path.name not in ours]
            if others := sorted(name for name in others if cache_type in (None, name)):
                warnings.warn(
                    f"{self.root}: {', '.join(others)} left alone, for APT did not make that folder; remove what is "
                    "not needed by hand",
                    AptWarning,
                    stacklevel=3,
                )

    def _failed(self, path: Path, error: OSError) -> None:
        if self.logger is not None:
            self.logger.error("%s: %s", path, error.strerror or error)
