"""Training, saving and the command line of 1.x: what becomes of texts, folders, tokenizers and checkpoints."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
from small_run import small_config, train
from torch import nn

from apt.cli.main import warnings_in_one_line
from apt.core.errors import AptWarning, CheckpointError, ConfigError, DataError, RunInUseError, UsageError
from apt.core.profiles import resolve
from apt.core.runs import RunFolder
from apt.data.tokenizers import ByteTokenizer, CharTokenizer, HFTokenizer
from apt.inference.generator import Generator
from apt.training.run_lock import only_trainer
from apt_model import _command_line
from apt_model._command_line import translate
from apt_model._tokenizer import OldTokenizer, kernel_tokenizer
from apt_model.config._options import APTConfig, say_once
from apt_model.generation._text import generate_natural_text
from apt_model.interactive._chat import chat_with_model
from apt_model.modeling._model import APTModel
from apt_model.training import _run
from apt_model.training._folder import make_way
from apt_model.training._manager import CheckpointManager
from apt_model.training._run import prepare
from apt_model.training._saved import load_model, save_model
from apt_model.training._train import train_model

torch.set_num_threads(1)

TEXTS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


pytestmark = pytest.mark.filterwarnings("ignore:batches hold:apt.core.errors.AptWarning")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder to work in, where nothing has been said yet."""
    monkeypatch.chdir(tmp_path)
    say_once.cache_clear()
    yield
    say_once.cache_clear()


def small(**options: Any) -> APTConfig:
    sizes = {"d_model": 16, "d_ff": 32, "num_heads": 2, "num_encoder_layers": 1, "num_decoder_layers": 1}
    return APTConfig(**{"vocab_size": 256, "max_seq_len": 16, "sr_ratio": 2, "dropout": 0.0, **sizes, **options})


def prepared(texts: Any, **options: Any) -> dict[str, Any]:
    """The resolved profile of a training of these texts."""
    settings = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "tokenizer_type": "byte", **options}
    profile, overrides = prepare(Path("saved"), texts, small(), **settings)
    return resolve(profile, overrides).config.model_dump()


def written(text: str, name: str) -> Path:
    path = Path(name)
    path.write_text(text)
    return path


def words() -> tokenizers.Tokenizer:
    """A tokenizer of the library: a token for each number's name."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *TEXTS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return made


def trained(folder: str = "saved", **options: Any) -> tuple[Any, Any, APTConfig]:
    settings = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "texts": TEXTS, "tokenizer_type": "byte"}
    return train_model(**{**settings, "save_path": folder, "config": small(), **options})


# Texts


def test_texts_are_their_own_targets() -> None:
    data = prepared([*TEXTS, " ", "\n"])["data"]
    assert data["pairs"] == {"source_field": "text", "target_field": "text"}
    lines = Path("saved/texts.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"text": text} for text in TEXTS]
    assert data["train_path"] == str(Path("saved/texts.jsonl").resolve())


@pytest.mark.parametrize(
    ("name", "lines", "fields"),
    [
        ("plain.txt", ["a b", "c"], True),
        ("pairs.txt", ["a\tb", "c\td"], False),
        ("pairs.tsv", ["a\tb", "c\td"], False),
        ("texts.jsonl", ['{"text": "a"}', '{"text": "c"}'], True),
        ("pairs.jsonl", ['{"source": "a", "target": "b"}', '{"source": "c", "target": "d"}'], False),
    ],
)
def test_files_of_texts_and_of_pairs(name: str, lines: list[str], fields: bool) -> None:
    path = written("\n".join(lines) + "\n\n", name)
    data = prepared(path)["data"]
    copied = name == "plain.txt"
    assert data["train_path"] == (str(Path("saved/texts.jsonl").resolve()) if copied else name)
    assert ("pairs" in data) == fields
    first = prepared(path, limit=1)["data"]
    copy = Path(first["train_path"])
    assert copy.parent == Path("saved").resolve() and len(copy.read_text().splitlines()) == 1
    assert ("pairs" in first) == fields and copy.suffix == (".jsonl" if copied else path.suffix)


def test_texts_in_the_folder_itself_stay_readable() -> None:
    Path("saved").mkdir()
    path = written('{"text": "a"}\n{"text": "b"}\n', "saved/mine.jsonl")
    assert Path(prepared(path)["data"]["train_path"]).read_text() == path.read_text()


def test_what_cannot_be_read_is_said() -> None:
    with pytest.raises(DataError, match=r"there is no file train\.txt"):
        prepared(None)
    with pytest.raises(DataError, match=r"there is no file nix\.txt"):
        prepared(Path("nix.txt"))
    with pytest.raises(DataError, match=r"a\.csv: read are \.txt, \.tsv, \.jsonl"):
        prepared(written("a,b", "a.csv"))
    for nothing in ([], ["", " "], written("\n\n", "empty.txt")):
        with pytest.raises(DataError, match="there are no texts"):
            prepared(nothing)
    assert not Path("saved").exists(), "nothing is touched before"
    written("\n".join(TEXTS), "train.txt")
    assert len(Path(prepared(None)["data"]["train_path"]).read_text().splitlines()) == 10


def test_settings_of_a_training() -> None:
    training = prepared(TEXTS * 10, epochs=4, batch_size=5)["training"]
    assert (training["max_epochs"], training["batch_size"], training["learning_rate"]) == (4, 5, 1e-3)
    assert (training["warmup_steps"], training["seed"]) == (4 * 90 // 5 // 10, 42)
    with pytest.warns(AptWarning, match="batches hold 9 texts and not 50"):
        assert prepared(TEXTS, batch_size=50)["training"]["batch_size"] == 9
    for wrong in ({"epochs": 0}, {"batch_size": 0}, {"learning_rate": -1.0}):
        with pytest.raises(ConfigError, match=f"--training.(max_)?{next(iter(wrong))}"):
            prepared(TEXTS, **wrong)


@pytest.mark.parametrize(("old", "new"), [("gpt2", "bpe"), ("chinese-char", "char"), ("chinese-word", "bpe")])
def test_tokenizers_of_old(old: str, new: str) -> None:
    with pytest.warns(AptWarning, match=f"tokenizer_type {old}: {new} is used"):
        assert prepared(TEXTS, tokenizer_type=old)["data"]["tokenizer"] == new


def test_without_a_word_about_the_tokenizer_one_is_learnt() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prepared(TEXTS, tokenizer_type=None)["data"]["tokenizer"] == "bpe"
        assert prepared(TEXTS, tokenizer_type="char")["data"]["tokenizer"] == "char"


def test_a_folder_that_cannot_be_written() -> None:
    written("", "file")
    with pytest.raises(CheckpointError, match="cannot write"):
        prepare(Path("file/saved"), TEXTS, small(), epochs=1, batch_size=1, learning_rate=1.0)


# Folders


def test_a_run_that_was_trained_makes_way_and_is_kept() -> None:
    for number in (1, 2):
        folder = RunFolder(Path("model"))
        folder.path.mkdir()
        folder.profile.write_text(str(number))
        folder.metrics.touch()
        with pytest.warns(AptWarning, match=f"model held a run; it is model-{number} now"):
            make_way(Path("model"))
        assert not Path("model").exists() and Path(f"model-{number}/profile.yaml").read_text() == str(number)


def test_a_run_that_somebody_trains_stays() -> None:
    Path("model").mkdir()
    written("", "model/profile.yaml")
    with only_trainer(Path("model")), pytest.raises(RunInUseError, match="at work in model"):
        make_way(Path("model"))
    assert Path("model/profile.yaml").exists()


def test_what_is_no_trained_run_makes_way_or_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_way(Path("nothing"))
        Path("empty").mkdir()
        make_way(Path("empty"))
        Path("saved").mkdir()
        written("", "saved/profile.yaml")
        make_way(Path("saved"))
        assert not Path("empty").exists() and not Path("saved").exists()
        Path("other").mkdir()
        written("", "other/mine")
        make_way(Path("other"))
        assert Path("other/mine").exists()
        Path("here").mkdir()
        written("", "here/profile.yaml")
        monkeypatch.chdir("here")
        make_way(Path())
        assert Path("profile.yaml").exists(), "nobody's own folder goes"


# Tokenizers


def test_a_tokenizer_is_called_as_of_old(tmp_path: Path) -> None:
    tokenizer = OldTokenizer(CharTokenizer("abc\0"))
    assert tokenizer.encode("cab") == [3, 1, 2]
    ids = tokenizer.encode("cab", return_tensors="pt", max_length=2, truncation=True)
    assert ids.dtype == torch.int64 and ids.tolist() == [[3, 1]]
    assert tokenizer.encode("cab", max_length=2) == [3, 1, 2]
    assert tokenizer.decode(torch.tensor([0, 3, 1, 0])) == "\0ca\0"
    assert tokenizer.decode([0, 3, 1, 0], skip_special_tokens=True) == "ca"
    assert len(tokenizer) == 4 == tokenizer.vocab_size
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    tokenizer.save_pretrained(tmp_path / "a" / "b")
    assert json.loads((tmp_path / "a" / "b" / "tokenizer.json").read_text())["characters"] == "\0abc"


def test_what_a_run_can_keep() -> None:
    byte = ByteTokenizer()
    assert kernel_tokenizer(byte) is byte is kernel_tokenizer(OldTokenizer(byte))
    theirs = words()
    theirs.enable_truncation(1)
    kept = kernel_tokenizer(theirs)
    assert isinstance(kept, HFTokenizer) and kept.encode("two one") == [3, 2]
    assert theirs.encode("two one").ids == [3], "theirs is as it was"
    assert kernel_tokenizer(SimpleNamespace(backend_tokenizer=theirs)).encode("two one") == [3, 2]
    with pytest.raises(ConfigError, match="a run cannot keep a SimpleNamespace"):
        kernel_tokenizer(SimpleNamespace(encode=str.split))
    with pytest.raises(ConfigError, match="the CharTokenizer has no token to end a text"):
        kernel_tokenizer(CharTokenizer("abc"))


def test_a_tokenizer_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words(), eos_token="</s>")
    assert kernel_tokenizer(fast).encode("two one") == [3, 2]


# Training and saving


def test_a_training_leaves_a_run_that_the_kernel_knows_as_its_own() -> None:
    model, tokenizer, config = trained(language="en")
    assert not model.training
    assert (config.vocab_size, config.eos_token_id, config.language, config.base_lr) == (256, 0, "en", 1e-2)
    made = Generator.from_run(RunFolder(Path("saved")), device="cpu").complete(TEXTS, temperature=0, max_new_tokens=16)
    for text, completion in zip(TEXTS, made, strict=True):
        mine, ids, _, _ = generate_natural_text(model, tokenizer, text, temperature=0)
        assert mine == completion.text
        assert ids[0].tolist() == [0, *completion.tokens] + [0] * (completion.ended == "end")
    records = [json.loads(line) for line in Path("saved/metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records if record["event"] == "eval"] == [0, 1]
    assert (Path("saved/plugins.lock.json")).exists()


def test_a_training_tells_whoever_listens(caplog: pytest.LogCaptureFixture) -> None:
    looks = []
    monitor = SimpleNamespace(check_resources=lambda: looks.append(1))
    with caplog.at_level(logging.INFO, "mine"), pytest.warns(AptWarning, match="train_model: enable_guard, multimodal"):
        trained(logger=logging.getLogger("mine"), resource_monitor=monitor, enable_guard=True, multimodal_config={})
    assert len(looks) == 4, "2 epochs of 9 texts, 4 a step"
    assert any("val_loss" in record.getMessage() for record in caplog.records)


def test_training_again_keeps_what_was_there() -> None:
    trained()
    with pytest.warns(AptWarning, match="saved held a run; it is saved-1 now"):
        trained(epochs=1)
    assert load_model("saved-1")[2] == load_model("saved")[2]


def test_one_text_alone_cannot_be_measured() -> None:
    with pytest.raises(DataError, match="one pair alone"):
        trained(texts=["one"])


def test_a_tokenizer_that_is_given_is_used_and_kept() -> None:
    model, tokenizer, config = trained(tokenizer=words(), texts=["one two", "three four", "five six", "seven"])
    assert config.vocab_size == 12 and config.eos_token_id == 1
    assert tokenizer.encode("two one") == [3, 2]
    text, ids, _, _ = generate_natural_text(model, words(), "two one", max_steps=2)
    assert ids[0, 0] == 1 and text == tokenizer.decode([i for i in ids[0].tolist() if i != 1])


@pytest.mark.filterwarnings("ignore:APTConfig. strange:apt.core.errors.AptWarning")
def test_a_model_comes_back_as_it_was_saved() -> None:
    torch.manual_seed(0)
    model = APTModel(small(bos_token_id=7, strange=[1])).eval()
    for _ in range(2):  # the second replaces the first, whole
        with torch.no_grad():
            model.backbone.token_embedding.weight.mul_(1.5)
        save_model(model, ByteTokenizer(), "saved")
        assert os.listdir() == ["saved"]
    loaded, tokenizer, config = load_model("saved", device=torch.device("cpu"))
    assert config.to_dict() == model.config.to_dict()
    source = torch.randint(1, 256, (3, 5))
    torch.testing.assert_close(loaded(source, source), model(source, source), rtol=0, atol=0)
    assert torch.equal(loaded.generate(source, 9, temperature=0), model.generate(source, 9, temperature=0))
    save_model(loaded, tokenizer, "again", APTConfig.from_dict({**config.to_dict(), "language": "zh"}))
    assert load_model("again")[2].language == "zh"
    shutil.move("again", "moved")
    assert load_model("moved")[1].encode("a") == [97]


def test_saving_loses_nothing() -> None:
    model = APTModel(small())
    Path("other").mkdir()
    written("mine", "other/file")
    with pytest.raises(CheckpointError, match="other exists already, and is no run"):
        save_model(model, ByteTokenizer(), "other")
    assert sorted(os.listdir()) == ["other"] and Path("other/file").read_text() == "mine"
    with pytest.raises(ConfigError, match="the tokenizer has 256 tokens, and the model 9"):
        save_model(APTModel(small(vocab_size=9)), ByteTokenizer(), "saved")
    with pytest.raises(CheckpointError, match="cannot write"):
        save_model(model, ByteTokenizer(), "other/file/saved")
    trained()
    with pytest.warns(AptWarning, match="it is saved-1 now"):
        save_model(model, ByteTokenizer(), "saved")
    assert RunFolder(Path("saved-1")).metrics.exists() and not RunFolder(Path("saved")).metrics.exists()


def test_any_run_of_an_encoder_decoder_opens_and_no_other(tmp_path: Path) -> None:
    trained()
    Path("saved/config.json").unlink()  # as a run that `apt train` has made
    config = load_model("saved")[2]
    assert (config.d_model, config.sr_ratio, config.vocab_size, config.bos_token_id) == (16, 2, 256, 0)
    train(small_config(tmp_path, training={"max_steps": 1}), run_dir=Path("gpt"))
    with pytest.raises(ConfigError, match=r"gpt is no model of 1\.x"):
        load_model("gpt")
    with pytest.raises(ConfigError, match="nix is not the folder of a run"):
        load_model("nix")


def test_weights_of_old_are_refused_by_name() -> None:
    Path("old").mkdir()
    written("", "old/model.pt")
    for use in (
        lambda: load_model("old"),
        lambda: chat_with_model("old"),
        lambda: translate(["chat", "--model-path", "old"]),
        lambda: translate(["evaluate", "--model-path", "old"]),
    ):
        with pytest.raises(CheckpointError, match=r"old holds a model of 1\.x, .* train it again"):
            use()
    trained("old")
    assert load_model("old")[2].d_model == 16


# Checkpoints


def looped(model: nn.Module, steps: int, *parts: Any) -> tuple[Any, Any]:
    """Train some steps on what is always the same; returns the optimizer and the scheduler, new ones if none given."""
    optimizer, scheduler = parts or (None, None)
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = scheduler or torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    source = torch.arange(1, 13).view(3, 4)
    for _ in range(steps):
        optimizer.zero_grad()
        model(source, source).logsumexp(-1).sum().backward()
        optimizer.step()
        scheduler.step()
    return optimizer, scheduler


def test_a_loop_goes_on_from_a_checkpoint_as_if_it_had_not_stopped() -> None:
    torch.manual_seed(0)
    model = APTModel(small())
    parts = looped(model, 3)
    manager = CheckpointManager("loop", save_freq=2, logger=logging.getLogger("mine"))
    path = manager.save_checkpoint(model, *parts, 0, 3, [1.0, 0.5], {"val_loss": 0.5}, is_best=True)
    assert Path(path).is_dir() and manager.save_freq == 2
    looped(model, 2, *parts)
    other = APTModel(small())
    others = looped(other, 0)
    assert CheckpointManager("loop").load_checkpoint(other, *others, latest=True) == (
        0,
        3,
        [1.0, 0.5],
        {"val_loss": 0.5},
    )
    looped(other, 2, *others)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert others[1].get_last_lr() == parts[1].get_last_lr()


def test_which_checkpoint_is_loaded() -> None:
    manager = CheckpointManager("loop")
    model = nn.Linear(1, 1, bias=False)
    paths = []
    for step in range(6):
        nn.init.constant_(model.weight, step)
        paths.append(manager.save_checkpoint(model, None, None, step // 2, step, [], is_best=step in (1, 3)))
    assert len(set(paths)) == 6 == len(manager.store.steps()), "all are kept"

    def loaded(**which: Any) -> tuple[float, int]:
        assert manager.load_checkpoint(model, **which)[1] == model.weight.item()
        return model.weight.item(), manager.load_checkpoint(model, **which)[0]

    assert loaded(latest=True) == (5, 2) and loaded(best=True) == (3, 1)
    assert [loaded(checkpoint_path=path)[0] for path in paths] == [0, 1, 2, 3, 4, 5]
    with pytest.raises(CheckpointError, match="which checkpoint"):
        manager.load_checkpoint(model)
    with pytest.raises(CheckpointError, match="nix is no checkpoint of"):
        manager.load_checkpoint(model, checkpoint_path="nix")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is the best"):
        CheckpointManager("other").load_checkpoint(model, best=True)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        CheckpointManager("other").load_checkpoint(model, latest=True)
    with pytest.raises(CheckpointError, match="the checkpoint does not fit"):
        manager.load_checkpoint(nn.Linear(2, 1), latest=True)


def test_the_checkpoints_of_a_run_open_too() -> None:
    model, _, _ = trained()
    other = APTModel(small())
    epoch, step, losses, metrics = CheckpointManager("saved").load_checkpoint(other, latest=True)
    assert (epoch, step, losses) == (2, 4, []) and "val_loss" in metrics
    assert torch.equal(other.backbone.token_embedding.weight, model.backbone.token_embedding.weight)


# Talking, and the command line


def test_what_a_chat_has_no_use_for_is_said() -> None:
    with (
        pytest.warns(AptWarning, match="chat_with_model: custom_prompts, tokenizer_type not used"),
        pytest.raises(ConfigError, match="nix is not the folder of a run"),
    ):
        chat_with_model("nix", custom_prompts={}, tokenizer_type="gpt2")


def test_commands_are_translated() -> None:
    assert translate(["chat", "--model-path", "a", "--max-length", "7", "--force-cpu"]) == [
        ["chat", "a", "--temperature", "0.7", "--top-p", "0.9", "--max-tokens", "7", "--device", "cpu"]
    ]
    assert translate(["evaluate"]) == [["eval", "apt_model"]] == translate(["eval"])
    assert translate(["evaluate", "--model-path", "a", "b"]) == [["eval", "a"], ["eval", "b"]]
    with pytest.warns(AptWarning, match="one model talks, a"):
        assert translate(["chat", "--model-path", "a", "b"])[0][1] == "a"
    with pytest.warns(AptWarning, match="chat: --epochs, --language, --verbose not used"):
        translate(["--language", "zh_CN", "chat", "--verbose", "--epochs", "3"])
    assert translate(["clean-cache", "--clean-days", "7"]) == [["cache", "--clean", "--older-than", "7"]]
    written("\n".join(TEXTS), "train.txt")
    options = ["--max-samples", "5", "--batch-size", "2", "--seed", "1", "--cache-dir", "c", "--tokenizer-type", "byte"]
    assert translate(["train", *options]) == [
        ["train", "-p", "apt_model/train.yaml", "--run-dir", "apt_model", "--epochs", "20", "--batch-size", "2",
         "--training.learning_rate", "3e-05", "--training.seed", "1", "--data.cache_dir", "c"]
    ]  # fmt: skip
    assert len(Path("apt_model/texts.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "no command is not translated"),
        ("test", "use apt generate RUN --prompt TEXT"),
        ("distill", "train, chat, evaluate, clean-cache are"),
        ("chat --temprature 1", "did you mean --temperature"),
        ("train --epochs x", "invalid int value: 'x'"),
    ],
)
def test_lines_that_are_wrong(line: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        translate(line.split())
    assert message in str(raised.value)


def test_what_fails_is_said_in_one_line_with_the_kernels_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _command_line.main(["chat", "--model-path", "nix", "--verbose"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err == [
        "warning: python -m apt_model chat: --verbose not used: nothing reads it any more",
        "warning: python -m apt_model will be removed in APT 4.0: use "
        "apt chat nix --temperature 0.7 --top-p 0.9 --max-tokens 50",
        "error: nix is not the folder of a run (it has no profile.yaml)",
        "  fix: runs in runs: none",
    ]
    assert _command_line.main(["train"]) == 2
    assert capsys.readouterr().err.startswith("error: there is no file train.txt")
    assert _command_line.main(["train", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err

    def broken(arguments: Any) -> Any:
        raise RuntimeError("ours")

    monkeypatch.setattr(_command_line, "translate", broken)
    assert _command_line.main(["train"]) == 1
    assert capsys.readouterr().err.startswith("internal error: RuntimeError: ours")


def test_it_warns_of_its_end_once_for_each_new_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, type[Warning]]] = []

    @contextmanager
    def watched() -> Iterator[None]:
        with warnings_in_one_line(), warnings.catch_warnings(record=True) as caught:
            yield
        shown.extend((str(warning.message), warning.category) for warning in caught)

    monkeypatch.setattr(_command_line, "warnings_in_one_line", watched)
    assert _command_line.main(["evaluate", "--model-path", "nix", "nada"]) == 2
    use = "python -m apt_model will be removed in APT 4.0: use apt eval"
    assert [text for text, _ in shown] == [f"{use} nix", f"{use} nada"]
    assert all(issubclass(category, DeprecationWarning) for _, category in shown)


def test_python_m_apt_model(tmp_path: Path) -> None:
    """In a folder that holds a run called as the package is."""
    (tmp_path / "apt_model").mkdir()
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), "APT_PLUGINS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "apt_model", "evaluate"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert ": use apt eval apt_model\nerror: apt_model is not the folder of a run" in done.stderr


def test_the_default_is_that_of_old() -> None:
    config = _run.default_config()
    assert (config.d_model, config.num_heads, config.num_encoder_layers, config.max_seq_len) == (768, 12, 4, 512)
