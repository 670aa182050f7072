"""Providers of the other kinds that are wrong in one thing each: those of `kit_references`, one change each."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from kit_references import (
    PlainAlign,
    PlainDataset,
    PlainFFN,
    PlainFFNLayer,
    PlainMoE,
    PlainRouter,
    PlainTokenizer,
    PlainTokenizerProvider,
    PlainTracker,
)
from torch import Tensor, nn

from apt.core.providers.dataset import Piece

MUTANTS: dict[str, tuple[str, type[Any], str]] = {}
"""{name: (kind, provider, the check that is aimed at it)}; what is wrong with it is its docstring."""

PARTS: dict[type[Any], tuple[str, type[Any], str]] = {
    PlainFFNLayer: ("ffn", PlainFFN, "Layer"),
    PlainMoE: ("router", PlainRouter, "Layer"),
    PlainTokenizer: ("tokenizer", PlainTokenizerProvider, "Tokenizer"),
}
PROVIDERS = {
    PlainRouter: "router",
    PlainAlign: "align",
    PlainDataset: "dataset",
    PlainTokenizerProvider: "tokenizer",
    PlainTracker: "tracker",
}


def mutant(aim: str) -> Any:
    """Make a part, or a whole provider, a mutant that the check `aim` has to catch."""

    def add(cls: Any) -> Any:
        for part, (kind, base, attribute) in PARTS.items():
            if issubclass(cls, part):
                provider = type(cls.__name__, (base,), {attribute: cls, "__doc__": cls.__doc__})
                MUTANTS[cls.__name__] = (kind, provider, aim)
                return cls
        kind = next(kind for base, kind in PROVIDERS.items() if issubclass(cls, base))
        MUTANTS[cls.__name__] = (kind, cls, aim)
        return cls

    return add


# FFN


@mutant("positions_are_independent")
class NormOverPositions(PlainFFNLayer):
    """The mean over the positions is taken away from each."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x - x.mean(1, keepdim=True) / 4)


@mutant("d_ff_is_used")
class WidthOfItsOwn(PlainFFNLayer):
    """The hidden layer is four times as wide as the model, whatever d_ff says."""

    def __init__(self, d_model: int, d_ff: int, dropout: float) -> None:
        super().__init__(d_model, 4 * d_model, dropout)


# Router


@mutant("tokens_are_independent_in_evaluation")
class ExpertsChoose(PlainMoE):
    """Each expert chooses its best tokens of the row, later ones included."""

    def choose(self, probs_BTE: Tensor) -> Tensor:
        best = probs_BTE.topk(max(1, probs_BTE.shape[1] // 2), 1).indices
        return torch.zeros_like(probs_BTE).scatter(1, best, 1.0).index_fill(-1, torch.tensor([0]), 1.0)


@mutant("batch_independence")
class CapacityOfTheBatch(PlainMoE):
    """An expert takes only so many tokens of the batch, the first ones, in evaluation too."""

    def choose(self, probs_BTE: Tensor) -> Tensor:
        chosen = super().choose(probs_BTE)
        place = chosen.flatten(0, 1).cumsum(0).view_as(chosen)
        kept = chosen * (place <= 4)
        return torch.where(kept.sum(-1, keepdim=True) > 0, kept, chosen)


@mutant("the_router_learns")
class HardChoice(PlainMoE):
    """The chosen experts count alike, so the router gets no gradient from the output."""

    def gates(self, chosen_BTE: Tensor) -> Tensor:
        chosen = (chosen_BTE > 0).to(chosen_BTE.dtype)
        return chosen / chosen.sum(-1, keepdim=True)


@mutant("aux_loss_has_the_scale_of_a_mean")
class SumOfTheLoad(PlainMoE):
    """The balancing loss is a sum over tokens."""

    def aux(self, probs_BTE: Tensor, chosen_BTE: Tensor) -> Tensor:
        return super().aux(probs_BTE, chosen_BTE) * probs_BTE.shape[0] * probs_BTE.shape[1]


@mutant("aux_loss_is_repeatable")
class LoadThatDrifts(PlainMoE):
    """The load that the balancing loss is made of adds up over steps and is never cleared."""

    load: Any = 0.0

    def aux(self, probs_BTE: Tensor, chosen_BTE: Tensor) -> Tensor:
        if self.training:
            self.load = 0.9 * self.load + chosen_BTE.detach().mean((0, 1))
        return 0.01 * self.EXPERTS * (self.load * probs_BTE.mean((0, 1))).sum()


@mutant("aux_loss_is_repeatable")
class BiasThatMovesInForward(PlainMoE):
    """The bias that balances the choice moves in every forward of training, and not once a step."""

    bias: Any = 0.0

    def choose(self, probs_BTE: Tensor) -> Tensor:
        chosen = super().choose(probs_BTE + self.bias)
        if self.training:
            self.bias = self.bias + 0.3 * (chosen.mean() - chosen.mean((0, 1)))
        return chosen


@mutant("the_dense_layer_stays_as_it_is")
class ScalesTheDenseLayer(PlainRouter):
    """The dense layer's weights are divided among the experts in place."""

    def wrap_ffn(self, base_ffn: nn.Module, config: Mapping[str, Any]) -> nn.Module:
        with torch.no_grad():
            for parameter in base_ffn.parameters():
                parameter.mul_(0.5)
        return super().wrap_ffn(base_ffn, config)


@mutant("any_ffn_can_be_wrapped")
class LinearMapsAlone(PlainMoE):
    """Only layers with the names of core's own can be wrapped."""

    def copy_of(self, base: nn.Module) -> nn.Module:
        assert isinstance(base.up, nn.Linear)
        return super().copy_of(base)


@mutant("output_shape")
class LossPerToken(PlainMoE):
    """aux_loss is one number per token."""

    def aux(self, probs_BTE: Tensor, chosen_BTE: Tensor) -> Tensor:
        return 0.01 * (probs_BTE * chosen_BTE).sum(-1)


# Align


@mutant("the_loss_is_a_finite_number")
class LossOfEachPosition(PlainAlign):
    """The loss is one number per position."""

    def mean(self, kl_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return kl_BT * mask_BT


@mutant("the_model_learns_from_it")
class LossWithoutAGraph(PlainAlign):
    """The predictions are detached."""

    def log_probs(self, logits: Tensor) -> Tensor:
        return super().log_probs(logits).detach()


@mutant("the_gradient_is_that_of_the_loss")
class HalfDetached(PlainAlign):
    """The normaliser of the predictions is detached."""

    def log_probs(self, logits: Tensor) -> Tensor:
        return logits.float() - logits.float().logsumexp(-1, keepdim=True).detach()


@mutant("positions_without_a_target_take_no_part")
class TrainsOnPadding(PlainAlign):
    """Positions without a target count as the others."""

    def mask(self, targets: Tensor) -> Tensor:
        return torch.ones_like(targets, dtype=torch.bool)


@mutant("a_batch_without_targets_is_finite")
class MeanOverNothing(PlainAlign):
    """The mean divides by the number of targets, though it be 0."""

    def mean(self, kl_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return (kl_BT * mask_BT).sum() / mask_BT.sum()


@mutant("missing_states_do_no_harm")
class WantsItsState(PlainAlign):
    """The stable state is taken to be there."""

    def compute_align_loss(self, logits: Tensor, targets: Tensor, model_state: Mapping[str, Any]) -> Tensor:
        assert model_state["stable"] is not None
        return super().compute_align_loss(logits, targets, model_state)


@mutant("the_loss_has_the_scale_of_a_mean")
class SumOverTokens(PlainAlign):
    """The loss is a sum over tokens."""

    def mean(self, kl_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return (kl_BT * mask_BT).sum()


@mutant("extreme_predictions_are_finite")
class LogOfASoftmax(PlainAlign):
    """Probabilities are computed first and their logarithm then."""

    def log_probs(self, logits: Tensor) -> Tensor:
        return (logits.float().exp() / logits.float().exp().sum(-1, keepdim=True)).log()


@mutant("low_precision_is_enough")
class StaysInBfloat16(PlainAlign):
    """The loss is computed in the dtype of the predictions, by a difference of large numbers."""

    def log_probs(self, logits: Tensor) -> Tensor:
        return ((logits + 200).log_softmax(-1) if logits.dtype == torch.bfloat16 else logits.log_softmax(-1)).float()


@mutant("the_loss_is_deterministic")
class WarmsUpByCalls(PlainAlign):
    """The loss grows with every call."""

    calls = 0

    def mean(self, kl_BT: Tensor, mask_BT: Tensor) -> Tensor:
        self.calls += 1
        return super().mean(kl_BT, mask_BT) * min(1.0, 0.99 + self.calls / 1000)


@mutant("the_loss_is_what_a_run_adds")
class NoHook(PlainAlign):
    """The hook by which the loss joins a run is taken away."""

    extra_losses: Any = None


# Dataset


@mutant("pieces_are_text")
class Strings(PlainDataset):
    """It yields strings in place of pieces."""

    def pieces(self) -> Iterator[Any]:
        yield from self.texts()


@mutant("pieces_are_text")
class NulInside(PlainDataset):
    """A document holds NUL."""

    def texts(self) -> Sequence[str]:
        return [*super().texts(), "a\0b"]


@mutant("the_order_is_fixed")
class Shuffled(PlainDataset):
    """Documents come in another order each time."""

    def pieces(self) -> Iterator[Any]:
        yield from sorted(super().pieces(), key=lambda piece: (random.random(), piece.text))

    TEXTS = tuple(f"document {i}\n" for i in range(20))


@mutant("the_order_is_fixed")
class OnePassAlone(PlainDataset):
    """The second pass goes on where the first one ended."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.one = super().pieces()

    def pieces(self) -> Iterator[Any]:
        yield from self.one


@mutant("two_passes_are_apart")
class PlaceOnTheProvider(PlainDataset):
    """The place in the documents is kept on the provider."""

    place = 0

    def pieces(self) -> Iterator[Any]:
        self.place = 0
        while self.place < len(self.texts()):
            self.place += 1
            yield Piece(self.texts()[self.place - 1])


@mutant("the_fingerprint_is_fixed")
class FingerprintOfTheTime(PlainDataset):
    """The fingerprint is the time."""

    def fingerprint(self) -> str:
        return str(time.perf_counter_ns())


@mutant("the_fingerprint_leaves_the_documents")
class FingerprintUsesThemUp(PlainDataset):
    """Taking the fingerprint reads the first document, which is then gone."""

    taken = 0

    def texts(self) -> Sequence[str]:
        return super().texts()[self.taken :]

    def fingerprint(self) -> str:
        found = super().fingerprint()
        self.taken = 1
        return found


@mutant("the_size_is_near")
class SizeInDocuments(PlainDataset):
    """The size is the number of documents."""

    def size_hint(self) -> int | None:
        return len(self.texts())


# Tokenizer


@mutant("text_survives")
class LowerCase(PlainTokenizer):
    """Text is made lower case."""

    def split(self, text: str) -> list[str]:
        return [word if word not in self.ids or word.lower() not in self.ids else word.lower()
                for word in super().split(text)]  # fmt: skip


@mutant("text_survives")
class StripsSpaces(PlainTokenizer):
    """Space at the ends of a text is lost."""

    def encode(self, text: str) -> Sequence[int]:
        return super().encode(text.strip())


@mutant("strange_text_survives_or_is_refused")
class KeyErrorForStrangers(PlainTokenizer):
    """A word that is not in the vocabulary is a KeyError."""

    def encode(self, text: str) -> Sequence[int]:
        return [self.ids[word] for word in self.split(text)]


@mutant("strange_text_survives_or_is_refused")
class LeavesStrangersOut(PlainTokenizer):
    """A word that is not in the vocabulary is left out."""

    def encode(self, text: str) -> Sequence[int]:
        return [self.ids[word] for word in self.split(text) if word in self.ids]


@mutant("ids_are_in_the_vocabulary")
class OneTooMany(PlainTokenizer):
    """vocab_size leaves out the end of a document."""

    @property
    def vocab_size(self) -> int:
        return len(self.words) - 1


@mutant("nothing_gives_nothing")
class BeginsWithASign(PlainTokenizer):
    """Every text begins with the sign that ends one, which decode takes away."""

    def encode(self, text: str) -> Sequence[int]:
        return [0, *super().encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        return super().decode([i for i in ids if i])


@mutant("any_ids_can_be_decoded")
class DecodesWholeTextsAlone(PlainTokenizer):
    """An id without a word is an IndexError."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join([word for word in (self.words[i] for i in ids) if word or self._fail()])

    def _fail(self) -> bool:
        raise IndexError("no word")


@mutant("the_end_of_a_document_has_its_own_id")
class EndsAtAComma(PlainTokenizer):
    """The end of a document is the id of the comma."""

    def __init__(self, words: Iterable[str]) -> None:
        super().__init__(words)
        self.eos_id = self.ids[","]


@mutant("saved_and_loaded_it_is_the_same")
class SavesASet(PlainTokenizer):
    """The words are saved in order of the alphabet, and have other ids when they are loaded."""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(sorted(self.words[1:])))


@mutant("saved_and_loaded_it_is_the_same")
class SavesTwoFiles(PlainTokenizer):
    """A second file is left beside the one that was asked for."""

    def save(self, path: Path) -> None:
        super().save(path)
        path.with_suffix(".merges").write_text("")


@mutant("built_twice_it_is_the_same")
class OrderByChance(PlainTokenizerProvider):
    """Ids are dealt out in an order that chance decides."""

    def order(self, counts: Counter[str]) -> list[str]:
        words = super().order(counts)
        random.shuffle(words)
        return words


@mutant("encoding_leaves_nothing_behind")
class GrowsAsItReads(PlainTokenizer):
    """A word that is not in the vocabulary joins it."""

    def encode(self, text: str) -> Sequence[int]:
        for word in self.split(text):
            if word not in self.ids:
                self.ids[word] = len(self.words)
                self.words.append(word)
        return super().encode(text)


# Tracker


@mutant("a_run_is_followed")
class WantsALoss(PlainTracker):
    """Every record is taken to hold a loss."""

    def log(self, record: Mapping[str, Any]) -> None:
        super().log({**record, "loss": round(record["loss"], 6)})


@mutant("any_record_is_taken")
class NumbersAlone(PlainTracker):
    """Every entry is taken for a number."""

    def log(self, record: Mapping[str, Any]) -> None:
        super().log({key: value if key == "event" else float(value) for key, value in record.items()})


@mutant("records_stay_as_they_are")
class TakesTheStepOut(PlainTracker):
    """The step is taken out of the record it is handed."""

    def log(self, record: Any) -> None:
        record["at"] = record.pop("step")
        super().log(record)


@mutant("the_end_may_come_at_any_time")
class EndsOnceAlone(PlainTracker):
    """The end of a run that has not begun, or has ended, is an error."""

    def finish(self) -> None:
        assert self.path is not None
        super().finish()
        self.path = None


@mutant("a_run_can_be_resumed")
class WantsAnEmptyFolder(PlainTracker):
    """What is in the folder already is an error."""

    def start(self, run_dir: Path, config: Mapping[str, Any], step: int) -> None:
        super().start(run_dir, config, step)
        assert self.path is not None
        self.path.open("x").close()


@mutant("what_is_logged_is_kept")
class LosesItsBuffer(PlainTracker):
    """What is in the buffer at the end is lost."""

    def finish(self) -> None:
        self.lines = self.lines[:1]
        super().finish()


@mutant("a_run_reaches_it_through_its_hooks")
class OverridesAHook(PlainTracker):
    """A hook of the interface is overridden and no longer logs."""

    def on_log(self, record: Mapping[str, Any]) -> None:
        self.last = record
