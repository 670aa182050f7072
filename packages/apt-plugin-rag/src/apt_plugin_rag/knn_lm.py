"""kNN-LM: a datastore of hidden states that is mixed into the next-token distribution.

Khandelwal et al. 2020, "Generalization through Memorization". For every token of the texts, the model's hidden state
before it (the key) and the token itself (the value) are kept. At each step of a generation

    p(y) = lambda p_knn(y) + (1 - lambda) p_lm(y),    p_knn(y) = sum over neighbours with value y of softmax(-d / T)

over the k nearest keys, d being the squared distance. Keys are the model's last hidden states, after its final norm;
the paper takes the input of the last feed-forward layer. T is given in units of the keys' own mean squared distance
from their centre, so that one value serves models of any width.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from apt.api import ConfigError, DataError
from apt.core.providers.retrieval import Passage
from apt_plugin_rag.contents import Document, Floats, Integers, Vectors
from apt_plugin_rag.retrievers import Scored, Settings, StoredRetriever
from apt_plugin_rag.store import Neighbours, Store

if TYPE_CHECKING:
    from torch import Tensor, nn

WINDOWS = 64
"""Windows that the model reads at a time."""

SAMPLED = 256
"""Numbers of each tensor that a fingerprint is made of: training changes all of them."""

QUERIED = 64
"""States at the end of a query by which passages are sought."""

MEASURED = 4096
"""Keys from which the scale of distances is taken."""


class KNNSettings(Settings):
    """A datastore, and how it is mixed in."""

    run: str | None = None
    """The run whose model makes the keys: its folder, or its name in runs/."""
    neighbours: Annotated[int, Field(ge=1)] = 1024
    """k."""
    weight: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """lambda, the share of the datastore."""
    temperature: Annotated[float, Field(gt=0)] = 0.02
    """T, in units of the keys' mean squared distance from their centre."""


class KNNRetriever(StoredRetriever):
    """By hidden states: where the model was in the texts when it was in a state like this."""

    name = "knn_lm"
    Config = KNNSettings
    search_settings = StoredRetriever.search_settings | {"run", "neighbours", "weight", "temperature"}

    @cached_property
    def generator(self) -> Any:
        """The run's model and tokenizer."""
        if self.config.run is None:
            raise ConfigError("knn_lm needs the run whose hidden states it keeps", hint="give --run RUN")
        from apt.api import Generator, find_run

        return Generator.from_run(find_run(self.config.run))

    def embeddings(self) -> dict[str, Any]:
        from apt.api import find_run

        fingerprint = fingerprint_of(self.generator.model)
        run = str(find_run(self.config.run).path.absolute())
        return {"kind": "hidden states of", "model": run, "fingerprint": fingerprint}

    def analyse(self, name: str, sha256: str, passages: Sequence[Passage]) -> Document:
        tokens = [list(self.generator.tokenizer.encode(passage.text)) for passage in passages]
        owners = np.repeat(np.arange(len(tokens)), [len(own) for own in tokens])
        ids = np.array([token for own in tokens for token in own], np.int64)
        # The first token of a document has no state before it.
        states_ND = hidden_states(self.generator.model, ids)[:-1]
        return Document(name, sha256, passages, vectors=Vectors.of(states_ND, owners[1:], ids[1:]))

    def search(self, query: str, k: int) -> list[Scored]:
        """The passages in which the model was in states like those at the end of `query`: by their share in p_knn, the
        mean over the last states."""
        ids = np.array(self.generator.tokenizer.encode(query), np.int64)
        mixer = Mixer(self.store, self.config)
        found = mixer.find(hidden_states(self.generator.model, ids)[-QUERIED:])
        shares: Counter[int] = Counter()
        for neighbours in found:
            shares.update(dict(mixer.passages(neighbours, len(neighbours.passages))))
        return [(passage, share / len(found)) for passage, share in shares.most_common(k)]


class Mixer:
    """Mixes a datastore into predictions.

    Args:
        store: of a `KNNRetriever`.
        settings: k, lambda and T.
    """

    def __init__(self, store: Store, settings: KNNSettings) -> None:
        self._store, self.settings = store, settings
        keys_ND = store.sample(MEASURED).astype(np.float64)
        self._scale = float(((keys_ND - keys_ND.mean(axis=0)) ** 2).sum(axis=1).mean()) if len(keys_ND) else 1.0

    def find(self, hidden_BD: Floats) -> list[Neighbours]:
        """The neighbours of each state."""
        return self._store.nearest(hidden_BD, self.settings.neighbours)

    def weigh(self, found: Neighbours) -> Floats:
        """How much each neighbour counts; together one."""
        scores = -found.distances.astype(np.float64) / (self.settings.temperature * self._scale)
        shares = np.exp(scores - scores.max(initial=-np.inf))
        weighed: Floats = (shares / shares.sum()).astype(np.float32)
        return weighed

    def probabilities(self, found: Sequence[Neighbours], vocab_size: int) -> Floats:
        """p_knn, [B, V]; zeros in a row without neighbours."""
        p_BV = np.zeros((len(found), vocab_size), np.float32)
        for row, neighbours in zip(p_BV, found, strict=True):
            np.add.at(row, neighbours.values, self.weigh(neighbours))
        return p_BV

    def mix(self, logits_BV: Tensor, found: Sequence[Neighbours]) -> Tensor:
        """The logarithm of p [B, V], in the logits' dtype; the logits themselves where there are no neighbours."""
        import torch

        if any(not len(neighbours.values) for neighbours in found):
            return logits_BV
        share = self.settings.weight
        p_knn_BV = torch.from_numpy(self.probabilities(found, logits_BV.shape[-1])).to(logits_BV.device)
        mixed_BV = share * p_knn_BV + (1 - share) * logits_BV.float().softmax(dim=-1)
        return mixed_BV.log().to(logits_BV.dtype)

    def passages(self, found: Neighbours, k: int) -> list[Scored]:
        """The `k` passages that the neighbours are in, by their share in p_knn."""
        owners, which = np.unique(found.passages, return_inverse=True)
        shares = np.bincount(which, self.weigh(found), minlength=len(owners))
        best = np.argsort(-shares, kind="stable")[:k]
        return list(zip(owners[best].tolist(), shares[best].tolist(), strict=True))


def hidden_states(model: nn.Module, ids: Integers) -> Floats:
    """The last hidden state [N, D] at each of N tokens, fp32.

    Each is taken with as much text before it as fits: windows of the model's longest context overlap by half, and of
    each the second half counts.
    """
    import torch

    device = next(model.parameters()).device
    limit: Any = model.max_seq_len
    parts = []
    with torch.inference_mode():
        for starts, kept in _windows(len(ids), limit):
            tokens_BT = torch.from_numpy(np.stack([ids[start : start + limit] for start in starts])).to(device)
            hidden_BTD = model(tokens_BT).hidden[:, kept:]
            parts.append(hidden_BTD.flatten(0, 1).float().cpu().numpy())
    width: Any = model.d_model
    return np.concatenate(parts or [np.zeros((0, width), np.float32)])


def _windows(count: int, limit: int) -> Iterator[tuple[list[int], int]]:
    """Starts of windows that are read together, and from which of their positions on they count: each of `count`
    positions once, in order."""
    if count:
        yield [0], 0
    step = max(1, limit // 2)
    starts = list(range(step, count - limit + 1, step))
    for first in range(0, len(starts), WINDOWS):
        yield starts[first : first + WINDOWS], limit - step
    done = (starts[-1] if starts else 0) + limit
    if done < count:
        yield [count - limit], limit - (count - done)


def fingerprint_of(model: nn.Module) -> str:
    """A hash of a model's weights, names and shapes: of a sample of each tensor, which any training changes."""
    content = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // SAMPLED)
        sample = flat[::step][:SAMPLED].double().cpu().numpy()
        content.update(f"{name} {list(tensor.shape)} ".encode() + sample.tobytes())
    return content.hexdigest()


def check_model(store: Store, model: nn.Module) -> None:
    """Raise DataError unless the store holds this model's hidden states."""
    made_with = (store.manifest.embeddings if store.manifest is not None else None) or {}
    if made_with.get("fingerprint") != fingerprint_of(model):
        raise DataError(
            f"the store {store.where} holds the hidden states of another model, that of {made_with.get('model')}",
            hint="generate with that run, or index the texts again with --run",
        )
