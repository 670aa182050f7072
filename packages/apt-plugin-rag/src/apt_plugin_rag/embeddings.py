"""Sentence embeddings of a model on disk: sentence-transformers, or model2vec."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from apt.api import ConfigError, ProviderError
from apt_plugin_rag.contents import Floats

FINGERPRINTED = (".json", ".model", ".safetensors", ".txt")


class Embedder:
    """Turns texts into vectors of length one.

    Args:
        path: the model's folder.

    Raises:
        ConfigError: there is no model of a known kind.
        ProviderError: its library is not installed, or cannot load it.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.kind = _kind(self.path)
        self._encode = _load(self.kind, self.path)

    def embed(self, texts: Sequence[str]) -> Floats:
        """float32 [N, D]; zeros for a text in which the model knows nothing."""
        vectors_ND: Floats = np.array(self._encode(list(texts)), np.float32)
        lengths_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
        np.divide(vectors_ND, lengths_N1, out=vectors_ND, where=lengths_N1 > 0)
        return vectors_ND

    @cached_property
    def description(self) -> dict[str, Any]:
        """Its kind, its folder, and a hash of what lies there."""
        content = hashlib.sha256()
        for file in sorted(self.path.rglob("*")):
            if file.suffix in FINGERPRINTED and file.is_file():
                digest = hashlib.sha256(file.read_bytes()).hexdigest()
                content.update(f"{file.relative_to(self.path).as_posix()} {digest}\n".encode())
        return {"kind": self.kind, "model": str(self.path.absolute()), "fingerprint": content.hexdigest()}


def _kind(path: Path) -> str:
    modules, config = _json(path / "modules.json"), _json(path / "config.json")
    # Both libraries write static embeddings, and model2vec needs no torch to read them.
    is_static = isinstance(modules, list) and len(modules) == 1 and "StaticEmbedding" in str(modules)
    if (path / "tokenizer.json").is_file() and (is_static or "model2vec" in str(config)):
        return "model2vec"
    if isinstance(modules, list):
        _check_modules(path, modules)
        return "sentence-transformers"
    what = "is not the folder of a model of sentence-transformers or model2vec" if path.is_dir() else "is no folder"
    raise ConfigError(
        f"the model {path} {what}",
        hint="give the folder of one that was downloaded before, or leave --model out for latent semantic indexing",
    )


def _check_modules(path: Path, modules: list[Any]) -> None:
    """Raise ConfigError where the library would run code of the folder's own: it imports the classes that modules.json
    names, some versions of it from the folder itself, and what is no safetensors is a pickle."""
    for module in modules:
        name = module.get("type") if isinstance(module, dict) else None
        if not isinstance(name, str) or not name.startswith("sentence_transformers."):
            raise ConfigError(
                f"{path / 'modules.json'} names {name!r}, which is no module of sentence-transformers",
                hint="choose a model that needs no code of its own",
            )
    for pickle in path.rglob("pytorch_model*.bin"):
        if not any(pickle.parent.glob("*.safetensors")):
            raise ConfigError(
                f"{pickle} is a pickle, which may run any code and is not read",
                hint="save the model again with sentence-transformers, which writes safetensors",
            )


def _json(path: Path) -> Any:
    """What a file holds; None where there is none, or something else than JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _load(kind: str, path: Path) -> Callable[[list[str]], Any]:
    try:
        if kind == "model2vec":
            from model2vec import StaticModel

            static: Callable[[list[str]], Any] = StaticModel.from_pretrained(path).encode
            return static
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(path), local_files_only=True)
        return lambda texts: model.encode(texts, show_progress_bar=False, convert_to_numpy=True)
    except ImportError as error:
        raise ProviderError(
            f"the model {path} needs {kind}, which is not installed ({error})",
            hint=f'pip install "apt-plugin-rag[{kind}]"',
        ) from error
    except Exception as error:
        text = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ProviderError(f"the model {path} cannot be loaded: {text}", hint="download it again") from error
