"""What a run is: the pydantic models behind a profile. Every key is listed here once, with its unit and its default.
All of it is frozen: what a plugin does to it changes no run.

Unknown keys are errors. The one exception: `model`, `data` and `training` also hold the sections of providers
(`model.tva`, `data.stdlib`, ...), which the providers themselves validate.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from apt.core.frozen import frozen

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Side = Annotated[int, Field(gt=0, le=2**24)]
"""Of a tensor: far beyond any model, and small enough for sums with it to come to an end."""
Heads = Annotated[int, Field(gt=0, le=2**16)]
Layers = Annotated[int, Field(gt=0, le=10_000)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of a profile: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class NoConfig(Section):
    """The section of a provider that has nothing to set."""


class OpenSection(Section):
    """A part of a profile that also holds the sections of providers, as mappings."""

    model_config = ConfigDict(extra="allow")

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """The providers' sections that the profile gives, by name."""
        return dict(self.__pydantic_extra__ or {})

    @model_validator(mode="after")
    def _freeze_sections(self) -> Self:
        extra = self.__pydantic_extra__ or {}
        extra.update(frozen(extra))
        return self


class ModelConfig(OpenSection):
    """The shape of the model and the names of its parts."""

    backbone: Literal["gpt", "encdec"] = "gpt"
    """How the parts are put together: `gpt` continues texts; `encdec`, an encoder-decoder, writes the target that goes
    with a source."""
    vocab_size: Side | None = None
    """Rows of the embedding; taken from the tokenizer if left out."""
    max_seq_len: Side = 256
    """Longest context, in tokens; training uses blocks of this length."""
    d_model: Side = 256
    """Width of the residual stream."""
    num_heads: Heads = 4
    num_layers: Layers = 4
    num_encoder_layers: Layers | None = None
    """Layers of the encoder of `encdec`, beside the `num_layers` of its decoder; as many if left out."""
    d_ff: Side | None = None
    """Width of the FFN's hidden layer; 4 * d_model if left out."""
    attention_name: str = "tva_default"
    ffn_name: str = "default"
    router_name: str = "topk_moe"
    """Router that wraps the FFN where `model.moe.enabled` is true."""
    align_name: str | None = None
    """Alignment that adds its loss to the cross-entropy; none if left out."""
    voter_name: str | None = None
    """Voter that answers the questions of `data.answers_path` beside the likeliest tokens; none if left out."""
    quant_name: str | None = None
    """Scheme in which the weights are kept, as `apt quantize` writes it; such a model is used, and not trained."""
    qat_name: str | None = None
    """Scheme that training prepares the weights for (quantisation-aware training); none if left out."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: Annotated[float, Field(gt=0)] | None = None
    """Added under the root of the norms; 1e-5 for layernorm and 1e-6 for rmsnorm if left out."""
    positions: Literal["rope", "learned"] = "rope"
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    """Base of the rotary angles."""
    tie_embeddings: bool = True
    """Whether the output projection is the embedding."""
    dropout: Fraction = 0.0
    """Probability of dropping, in training, on embeddings, attention weights and the outputs of both sublayers."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelConfig:
        if self.d_model % self.num_heads:
            fits = [h for h in range(1, min(self.d_model, 2 * self.num_heads) + 1) if self.d_model % h == 0]
            raise ValueError(
                f"d_model {self.d_model} is not divisible by num_heads {self.num_heads}; heads that fit: "
                + ", ".join(map(str, fits))
            )
        return self

    @model_validator(mode="after")
    def _encoder_belongs_to_encdec(self) -> ModelConfig:
        if self.num_encoder_layers is not None and self.backbone != "encdec":
            raise ValueError(f"num_encoder_layers: the backbone {self.backbone} has no encoder; set backbone: encdec")
        return self

    @property
    def hidden_size(self) -> int:
        """Width of the FFN's hidden layer."""
        return self.d_ff or 4 * self.d_model


class DataConfig(OpenSection):
    """Where the text comes from and how it becomes tokens."""

    dataset: str | None = None
    """A dataset provider, such as `stdlib`; `files` if `train_path` is given."""
    train_path: str | None = None
    """A .txt, .jsonl or .parquet file, or a folder of them, for the dataset `files`."""
    val_path: str | None = None
    """Likewise, for validation; without it, the end of the training text is held out."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the tokens, from the end, that is held out where there is no `val_path`."""
    text_field: str = "text"
    """The field or column of .jsonl and .parquet that holds the text."""
    tokenizer: str = "byte"
    """`byte`, `char`, `bpe`, another tokenizer provider, or the path of a tokenizer.json."""
    vocab_size: Side = 4096
    """Size of the vocabulary that `bpe` learns."""
    answers_path: str | None = None
    """A .jsonl file with "prompt" and "answer" in each line: how many are answered exactly is measured after each
    epoch. `model.voting.pattern` says what the answer in a text is."""
    answers_max_tokens: PositiveInt = 128
    """Longest text that is read as an answer, in tokens."""
    answers_stop: str = "\n"
    """String that ends an answer; none if empty."""
    document_mask: bool = False
    """Whether attention keeps the documents that share a block apart."""
    workers: Annotated[int, Field(ge=0, le=64)] = 0
    """Threads that make the next batches while a step computes, for a text that does not fit into memory; 0 for none.
    The batches are the same for any number."""
    cache_dir: str | None = None
    """Where tokens are cached; the user's cache folder if left out."""


class TrainingConfig(OpenSection):
    """How the model is trained."""

    max_epochs: PositiveInt = 1
    max_steps: PositiveInt | None = None
    """Optimizer steps after which the run ends, if the epochs have not ended it before."""
    batch_size: PositiveInt = 16
    """Sequences per optimizer step and accumulation step."""
    gradient_accumulation: PositiveInt = 1
    """Batches whose gradients make one optimizer step."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate of AdamW."""
    min_learning_rate: Annotated[float, Field(ge=0)] | None = None
    """Where the schedule ends, at most the peak; a tenth of it if left out."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Steps in which the learning rate rises linearly."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay, on matrices alone."""
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    gradient_clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient; 0 leaves it as it is."""
    on_not_finite: Literal["stop", "skip", "rollback"] = "stop"
    """What happens when a loss, a gradient or a weight is NaN or infinite: end the run, pass the step over, or go back
    to the last checkpoint's weights and on with the text."""
    mixed_precision: Literal["auto", "bf16", "off"] | bool = "auto"
    """bf16 autocast. `auto` uses it where it pays: on GPUs that have it, and on CPUs that have it for wide models."""
    compile: bool = False
    """Compile the model's blocks with `torch.compile`."""
    eval_every: PositiveInt | None = None
    """Steps between evaluations; the end of each epoch is always evaluated."""
    eval_batches: PositiveInt | None = None
    """Batches of the held-out text to evaluate; all of it if left out."""
    log_every: PositiveInt = 10
    """Steps between records of the metrics."""
    trackers: tuple[str, ...] = ()
    """Tracker providers to send the metrics to, beside the run's own metrics.jsonl."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0

    @model_validator(mode="after")
    def _rate_falls(self) -> TrainingConfig:
        if self.min_learning_rate is not None and self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate:g} is above learning_rate {self.learning_rate:g}"
            )
        return self


class CheckpointConfig(Section):
    """What is kept of a run."""

    every: PositiveInt | None = None
    """Steps between checkpoints; the end of each epoch is always saved."""
    keep_last: PositiveInt = 2
    """How many of the newest checkpoints are kept."""
    keep_every: PositiveInt | None = None
    """Steps between checkpoints that are kept for good: the first one at or after each multiple; none if left out."""
    keep_best: bool = True
    """Whether the one with the lowest validation loss is kept as well."""
    asynchronous: bool = True
    """Whether training goes on while a copy of its state is written; if not, it waits, and needs no copy."""


class HardwareConfig(Section):
    """What the run runs on."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    threads: Annotated[int, Field(gt=0, le=1024)] | None = None
    """CPU threads of torch; torch's own choice if left out."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What each of several processes keeps: the whole model, or with `fsdp` its shard of it."""


class ChatConfig(Section):
    """How `apt chat` writes what was said for the model to continue: the system text, then each turn, which is `user`,
    the message, `end`, `assistant`, the reply, `end`."""

    system: str = ""
    """Text before the first turn."""
    user: str = "User: "
    """Stands before each message, and ends a reply."""
    assistant: str = "Assistant: "
    """Stands before each reply."""
    end: Annotated[str, Field(min_length=1)] = "\n"
    """Stands after each message and each reply, and so ends a reply."""


class RunConfig(Section):
    """A whole profile."""

    name: str = "run"
    """The profile's name, of letters, digits, `_`, `.` and `-`; the run's folder is called after it."""
    description: str = ""
    """One line for `apt profile list`."""
    smaller_profile: str | None = None
    """The profile to train where this one does not fit into memory."""
    plugins: tuple[str, ...] | None = None
    """The plugins that may be used; all that are installed if left out, none if empty."""
    on_plugin_error: Literal["drop", "stop"] = "drop"
    """What happens when an effect of a plugin fails: go on without it, or save and stop."""
    output_dir: str = "runs"
    """The folder in which the run's own folder is made."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    schedules: Annotated[dict[str, Any], AfterValidator(frozen), Field(validate_default=True)] = {}
    """`enable_NAME_at_epoch`, `enable_NAME_at_step`, and values that anneal: see `apt.core.schedules`."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    chat: ChatConfig = ChatConfig()
    hardware: HardwareConfig = HardwareConfig()

    @property
    def sections(self) -> dict[str, dict[str, dict[str, Any]]]:
        """{"model": {...}, "data": {...}, "training": {...}}: the providers' sections that the profile gives."""
        return {name: part.sections for name, part in self if isinstance(part, OpenSection)}

    @field_validator("name")
    @classmethod
    def _name_is_a_folders(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name):
            raise ValueError(
                "a name has letters, digits, '_', '.' and '-', at most 100: the run's folder is called after it"
            )
        return name
