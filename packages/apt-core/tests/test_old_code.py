"""Code as it was written for 1.x, run as it stands.

What each name does is tested in test_old_model.py and its like; here they are used together, as programs used them.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from fixture_types import RunApt
from torch import nn

from apt_model import _command_line

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*will be removed in APT 4.0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::apt.core.errors.AptWarning"),
]

torch.set_num_threads(1)

TEXTS = [
    f"{name} {verb} the {thing}" for name in ("Ann", "Bob") for verb in ("sees", "has") for thing in ("cat", "sea")
]

SIZES = {
    "d_model": 32, "d_ff": 64, "num_heads": 4, "num_encoder_layers": 1, "num_decoder_layers": 1, "max_seq_len": 48,
}  # fmt: skip


def test_build_train_generate() -> None:
    """A training loop of one's own, on a task that is learnt in seconds: to copy three tokens."""
    from apt_model.config.apt_config import APTConfig
    from apt_model.modeling.apt_model import APTLargeModel

    torch.manual_seed(0)
    config = APTConfig(vocab_size=16, dropout=0.0, init_tau=1.3, sr_ratio=4, **SIZES)
    model = APTLargeModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    criterion = nn.CrossEntropyLoss(ignore_index=config.pad_token_id)
    model.train()
    for epoch in range(2):
        for _ in range(75):
            src = torch.randint(3, 16, (32, 3))
            bos, eos = torch.full((32, 1), config.bos_token_id), torch.full((32, 1), config.eos_token_id)
            tgt = torch.cat([bos, src, eos], dim=1)
            logits = model(src_tokens=src, tgt_tokens=tgt[:, :-1], src_key_padding_mask=src == config.pad_token_id)
            loss = criterion(logits.reshape(-1, config.vocab_size), tgt[:, 1:].reshape(-1))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
            optimizer.step()
            model.update_dynamic_taylor_parameters(5e-3)
        print(f"Epoch {epoch + 1}: {loss.item():.4f}")
    model.eval()
    asked = torch.tensor([[5, 9, 3], [12, 4, 15]])
    output = model.generate(asked, max_length=8, temperature=0.1, top_p=0.9)
    assert output.tolist() == [[1, 5, 9, 3, 2], [1, 12, 4, 15, 2]]


def test_train_save_load_generate_chat(
    tmp_path: Path, run_apt: RunApt, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from apt_model.config.apt_config import APTConfig
    from apt_model.generation.generator import generate_natural_text
    from apt_model.interactive.chat import chat_with_model
    from apt_model.training.checkpoint import load_model, save_model
    from apt_model.training.trainer import train_model

    model, tokenizer, config = train_model(
        epochs=2,
        batch_size=4,
        learning_rate=3e-3,
        save_path="apt_model",
        texts=TEXTS,
        config=APTConfig(dropout=0.1, **SIZES),
    )
    assert config.vocab_size == tokenizer.vocab_size and config.base_lr == 3e-3
    text, output_ids, temperature, top_p = generate_natural_text(
        model, tokenizer, "Ann sees", max_steps=5, temperature=0.7, top_p=0.9
    )
    assert isinstance(text, str) and output_ids.shape[0] == 1 and (temperature, top_p) == (0.7, 0.9)

    save_model(model, tokenizer, "copy", config)
    loaded, _, read = load_model("copy")
    assert read == config
    same, _, _, _ = generate_natural_text(loaded, tokenizer, "Bob has", temperature=0)
    assert same == generate_natural_text(model, tokenizer, "Bob has", temperature=0)[0]

    monkeypatch.setattr(sys, "stdin", io.StringIO("Bob has\n"))
    capsys.readouterr()
    chat_with_model(model_path="copy", temperature=0, force_cpu=True)
    assert capsys.readouterr().out == f"{same}\n"

    # What is left are runs as any other.
    assert run_apt("generate", "copy", "--prompt", "Bob has", "--temperature", "0", "--max-tokens", "60").out == (
        f"{same}\n"
    )
    for folder in ("apt_model", "copy"):
        shown = run_apt("inspect", folder)
        assert shown.code == 0 and "tva_default" in shown.out, shown.err


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """python -m apt_model train ...; python -m apt_model chat ...; python -m apt_model evaluate ..."""
    from apt_model.config.apt_config import APTConfig
    from apt_model.training import _run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_run, "default_config", lambda: APTConfig(**SIZES))  # the real one is 150 times as large
    Path("texts.txt").write_text("\n".join(TEXTS) + "\n")

    def python_m_apt_model(line: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return _command_line.main(line.split()), *capsys.readouterr()

    code, _, err = python_m_apt_model(
        "train --epochs 2 --batch-size 4 --learning-rate 3e-5 --save-path saved --data-path texts.txt --force-cpu"
    )
    new = (
        "apt train -p saved/train.yaml --run-dir saved --epochs 2 --batch-size 4 --training.learning_rate 3e-05 "
        "--training.seed 42 --hardware.device cpu"
    )
    assert code == 0 and f"will be removed in APT 4.0: use {new}\n" in err, err

    monkeypatch.setattr(sys, "stdin", io.StringIO("Ann has\n"))
    code, out, err = python_m_apt_model("chat --model-path saved --temperature 0.7 --top-p 0.9")
    assert code == 0 and out.endswith("\n"), err
    assert "apt chat saved --temperature 0.7 --top-p 0.9 --max-tokens 50" in err

    code, out, err = python_m_apt_model("evaluate --model-path saved --force-cpu")
    assert code == 0 and "val_loss" in out, err
    assert "apt eval saved --device cpu" in err
