"""Distributions that were never built: what pip would leave of them."""

from __future__ import annotations

import base64
import hashlib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path


def make_distribution(
    site: Path,
    name: str,
    version: str = "1.0",
    *,
    plugins: Mapping[str, str] | None = None,
    modules: Mapping[str, str] | None = None,
    requires: Sequence[str] = (),
    direct_url: str | None = None,
) -> Path:
    """Install a made-up distribution: modules beside a `.dist-info` with METADATA, entry_points.txt and RECORD.

    Args:
        site: the folder to install into, which is there.
        name, version: of the distribution.
        plugins: {name: module} of its entry points in the group `apt.providers`.
        modules: {dotted module name: source}.
        requires: its requirements.
        direct_url: the content of direct_url.json, which tells an editable install.

    Returns the folder, which belongs on the path.
    """
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}\nVersion: of the text\n"
    files = {
        **{f"{module.replace('.', '/')}.py": source for module, source in (modules or {}).items()},
        f"{info}/METADATA": metadata,
    }
    if plugins:
        points = "".join(f"{plugin} = {module}\n" for plugin, module in plugins.items())
        files[f"{info}/entry_points.txt"] = f"[apt.providers]\n{points}"
    if direct_url is not None:
        files[f"{info}/direct_url.json"] = direct_url
    record = ""
    for path, content in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(content)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(content.encode())}\n"
    (site / info / "RECORD").write_text(f"{record}{info}/RECORD,,\n")
    importlib.invalidate_caches()
    return site
