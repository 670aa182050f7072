"""How many questions a model answers exactly: with the likeliest tokens, and with a voter."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from apt.builtin.config import VotingConfig
from apt.core.config import RunConfig
from apt.core.errors import ConfigError, DataError
from apt.core.files import read_file
from apt.core.providers.voter import VoterProvider
from apt.core.schedules import Schedule
from apt.inference.generator import Generator
from apt.modeling.layers.mode import evaluation_mode


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and the one answer to it that counts."""

    prompt: str
    answer: str


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a .jsonl file, each line an object with the strings "prompt" and "answer".

    Raises:
        DataError: it cannot be read, or holds something else, or nothing.
    """
    try:
        lines = read_file(Path(path)).decode("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"data.answers_path: {path} cannot be read: {reason}", hint="check the path") from error
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            question = Question(fields["prompt"], fields["answer"])
            fits = isinstance(question.prompt, str) and isinstance(question.answer, str)
        except (ValueError, RecursionError, TypeError, KeyError):
            fits = False
        if not fits:
            raise DataError(
                f'{path}:{number}: no object with the strings "prompt" and "answer"',
                hint='write one in each line: {"prompt": "2+3=", "answer": "5"}',
            )
        questions.append(question)
    if not questions:
        raise DataError(f"{path} holds no question", hint='write one in each line: {"prompt": "2+3=", "answer": "5"}')
    return questions


class Exam:
    """The questions of a run, which are put to its model each time that it is evaluated.

    Args:
        config: the profile. `data.answers_*` and `model.voting.pattern` say what an answer is,
            `model.voting.temperature` how a voter's candidates are sampled.
        schedule: of the run; its `vote_threshold`, if there is one, is the voter's.
        voter: answers too, if given.

    Raises:
        DataError, ConfigError: the questions or the section `model.voting` cannot be used.
    """

    def __init__(self, config: RunConfig, schedule: Schedule, voter: VoterProvider | None = None) -> None:
        assert config.data.answers_path is not None
        self.questions = read_questions(config.data.answers_path)
        self.voting = voting_of(config)
        self._config, self._schedule, self._voter = config, schedule, voter

    def take(self, generator: Generator, epoch: int, step: int) -> dict[str, float]:
        """Ask every question, at this point of the run.

        Returns:
            "answers" (how many were asked), "accuracy" (the share answered exactly by the likeliest tokens) and, with
            a voter, "voted_accuracy" and its "vote_threshold".
        """
        metrics = {"answers": float(len(self.questions)), "accuracy": self._share(generator, 0.0, None)}
        voter = self._voter
        if voter is None:
            return metrics
        if voter.threshold is not None:
            scheduled = self._schedule.get_param("vote_threshold", epoch, step)
            voter.threshold = voter.threshold if scheduled is None else scheduled
        metrics["voted_accuracy"] = self._share(generator, self.voting.temperature, voter)
        return metrics if voter.threshold is None else metrics | {"vote_threshold": voter.threshold}

    def _share(self, generator: Generator, temperature: float, voter: VoterProvider | None) -> float:
        """The share of the questions that is answered exactly."""
        data = self._config.data
        with evaluation_mode(generator.model):
            completions = generator.complete(
                [question.prompt for question in self.questions],
                max_new_tokens=data.answers_max_tokens,
                stop=[data.answers_stop],
                seed=self._config.training.seed,
                voter=voter,
                batch_size=self._config.training.batch_size,
                temperature=temperature,
            )
        given = [self.voting.answer(completion.text) for completion in completions]
        right = sum(a == q.answer.strip() for a, q in zip(given, self.questions, strict=True))
        return right / len(self.questions)


def voting_of(config: RunConfig) -> VotingConfig:
    """The section `model.voting`.

    Raises:
        ConfigError: it does not fit.
    """
    section = {key: value for key, value in config.model.sections.get("voting", {}).items() if key != "enabled"}
    try:
        return VotingConfig.model_validate(section)
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ConfigError(f"model.voting does not fit: {said}") from error
