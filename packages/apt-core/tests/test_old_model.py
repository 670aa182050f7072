"""The config, the model and the attention of 1.x, against plain references and the kernel's own."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.core.config import RunConfig
from apt.core.errors import AptWarning, ConfigError, DataError, ProviderError
from apt.core.profiles import resolve
from apt.modeling.compose import ModelBuilder
from apt.modeling.layers.attention_tva import slice_width
from apt_model.config._options import APTConfig, APTModelConfiguration, say_once, tva_section
from apt_model.modeling._attention import AutopoieticAttention
from apt_model.modeling._model import APTLargeModel, APTModel

torch.set_num_threads(1)

SIZES = {
    "d_model": 32, "d_ff": 64, "num_heads": 4, "num_encoder_layers": 1, "num_decoder_layers": 2, "max_seq_len": 12,
}  # fmt: skip


@pytest.fixture(autouse=True)
def said_nothing() -> Iterator[None]:
    """As in a process that has warned of nothing yet."""
    say_once.cache_clear()
    yield
    say_once.cache_clear()


def make(**options: Any) -> APTLargeModel:
    torch.manual_seed(0)
    return APTLargeModel(APTConfig(**{"vocab_size": 20, "sr_ratio": 4, "dropout": 0.0, **SIZES, **options})).eval()


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 20, (rows, length))


# The config

OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "d_model": st.integers(1, 999),
        "dropout": st.floats(0, 0.9),
        "language": st.sampled_from(["en", "zh"]),
        "epsilon": st.floats(0, 9),
        "of_their_own": st.lists(st.integers()),
    },
)


@settings(deadline=None)
@given(given_options=OPTIONS)
@pytest.mark.filterwarnings("ignore::apt.core.errors.AptWarning")
def test_options_come_back(given_options: dict[str, Any]) -> None:
    config = APTConfig(**given_options)
    assert {name: config.to_dict()[name] for name in given_options} == given_options
    assert config.to_dict().keys() >= APTConfig().to_dict().keys()
    assert APTConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


@pytest.mark.filterwarnings("ignore::apt.core.errors.AptWarning")
def test_options_come_back_from_a_file(tmp_path: Path) -> None:
    config = APTConfig(100, 64, epsilon=2.0, of_their_own={"a": [1]})
    config.save_pretrained(tmp_path / "new" / "folder")
    read = APTConfig.from_pretrained(str(tmp_path / "new" / "folder"))
    assert read.to_dict() == config.to_dict() and read.of_their_own == {"a": [1]}  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"config\.json cannot be read: .*name the folder of a saved model"):
        APTConfig.from_pretrained(tmp_path)
    for content in ("{", "[1]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ConfigError, match="name the folder of a saved model"):
            APTConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json cannot be written"):
        APTConfig(a=object()).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json cannot be written: .*choose another folder"):
        APTConfig().save_pretrained(tmp_path / "config.json" / "below")


def test_the_defaults_are_those_of_old() -> None:
    config = APTConfig()
    assert (config.vocab_size, config.d_model, config.d_ff, config.num_heads) == (50257, 768, 2048, 12)
    assert (config.num_encoder_layers, config.num_decoder_layers, config.max_seq_len) == (6, 6, 512)
    assert (config.sr_ratio, config.init_tau, config.dropout) == (6, 1.3, 0.15)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    other = APTModelConfiguration(d_model=512)
    assert isinstance(other, APTConfig)
    assert (other.vocab_size, other.d_model, other.max_seq_len, other.bos_token_id) == (30522, 512, 2048, 101)
    assert (other.sr_ratio, other.init_tau) == (4, 1.0)


def test_options_by_place() -> None:
    config = APTConfig(1000, 64, 128, 4)
    assert (config.vocab_size, config.d_model, config.d_ff, config.num_heads) == (1000, 64, 128, 4)
    assert APTModelConfiguration(1000, 64).d_model == 64
    with pytest.raises(TypeError):
        APTModelConfiguration(1000, 64, 2048)  # type: ignore[misc, call-arg]
    with pytest.raises(TypeError, match="given twice"):
        APTConfig(1000, vocab_size=1000)
    with pytest.raises(TypeError, match="more than 32"):
        APTConfig(*range(33))


def test_what_says_nothing_is_named_in_one_warning_and_once() -> None:
    with pytest.warns(AptWarning) as told:
        config = APTConfig(epsilon=2.0, use_dbc_dac=True, strange=1, d_model=96, beta=0.003)
        APTConfig(epsilon=2.0, use_dbc_dac=True, strange=1)
    (only,) = [str(warning.message) for warning in told]
    assert only.startswith("APTConfig: epsilon, use_dbc_dac, strange kept") and "docs/migration.md" in only
    assert told[0].filename == __file__
    assert (config.epsilon, config.use_dbc_dac, config.strange) == (2.0, True, 1)  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        APTConfig(vocab_size=9, tokenizer_type="gpt2", language="en", warmup_steps=3)
        APTConfig.from_dict(APTConfig().to_dict())


def test_every_option_that_means_something_reaches_the_profile() -> None:
    options = {
        "vocab_size": 77, "d_model": 48, "d_ff": 96, "num_heads": 3, "num_encoder_layers": 2, "num_decoder_layers": 5,
        "dropout": 0.3, "max_seq_len": 33, "base_lr": 1e-2, "sr_ratio": 2, "init_tau": 0.7, "warmup_steps": 7,
        "weight_decay": 0.5, "layer_norm_eps": 1e-3, "gradient_clip": 0.25, "use_autopoietic": False,
    }  # fmt: skip
    config: RunConfig = resolve(APTConfig(**options).to_profile()).config
    assert config.model.sections["tva"] == {"r": 2, "s": 0.0, "tau": 0.7}
    assert APTConfig.from_profile(config, vocab_size=77).to_dict() == {**APTConfig().to_dict(), **options}
    with pytest.raises(ConfigError, match=r"gpt is no model of 1\.x.*load_run"):
        APTConfig.from_profile(RunConfig())


def test_the_default_ratio_fits_the_default_width() -> None:
    assert APTConfig().to_profile()["model"]["tva"] == {"r": 6, "s": 1.0, "tau": 1.3}
    ModelBuilder(APTConfig().to_profile()).build_attention(768, 12)


@settings(deadline=None)
@given(heads=st.integers(1, 12), size=st.integers(1, 16), wanted=st.integers(1, 40))
def test_a_ratio_that_does_not_fit_becomes_the_nearest(heads: int, size: int, wanted: int) -> None:
    say_once.cache_clear()
    width = heads * size
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ratio = tva_section(width, heads, wanted, 1.0, True)["r"]
    fitting = [r for r in range(1, width + 1) if slice_width(width, heads, r)]
    if not fitting:
        assert ratio == wanted and not told, "the layer itself says what is wrong"
        return
    assert ratio in fitting and all(abs(ratio - wanted) <= abs(other - wanted) for other in fitting)
    assert [f"sr_ratio {wanted} does not fit" in str(warning.message) for warning in told] == [True] * (ratio != wanted)


@pytest.mark.filterwarnings("ignore:sr_ratio 6:apt.core.errors.AptWarning")
def test_sizes_that_do_not_fit_are_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="d_model 30 is not divisible by num_heads 4"):
        APTModel(APTConfig(vocab_size=9, d_model=30, num_heads=4))
    for option, key, value in [
        ("num_heads", "num_heads", 0),
        ("d_model", "d_model", "wide"),
        ("sr_ratio", "tva_default: its section does not fit: r:", 0),
        ("init_tau", "tva_default: its section does not fit: tau:", -1.0),
        ("num_decoder_layers", "num_layers", 1.5),
    ]:
        with pytest.raises(ConfigError, match=key):
            APTModel(APTConfig(**{"vocab_size": 9, "d_model": 32, "num_heads": 4, option: value}))


# The model


def test_forward_is_the_kernels_encoder_decoder() -> None:
    model = make()
    source, target = tokens(3, 5), tokens(3, 4)
    padding = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 2 + [True] * 3])
    wanted = model.backbone(target, source=source, source_padding=padding)
    logits = model(source, target, src_key_padding_mask=padding)
    assert logits.shape == (3, 4, 20)
    torch.testing.assert_close(logits, wanted.logits, rtol=0, atol=0)
    parts = model(src_tokens=source, tgt_tokens=target, src_key_padding_mask=padding, return_dict=True)
    memory = model.encode(source, src_key_padding_mask=padding)
    hidden = model.decode(target, memory, memory_key_padding_mask=padding)
    assert memory.shape == (3, 5, 32) and hidden.shape == (3, 4, 32)
    torch.testing.assert_close(parts["encoder_output"], memory, rtol=0, atol=0)
    torch.testing.assert_close(parts["decoder_output"], hidden)
    torch.testing.assert_close(model.output_projection(hidden), logits)
    torch.testing.assert_close(model(source), model(source, source), rtol=0, atol=0)


def test_masks_that_change_nothing_are_taken_and_others_refused() -> None:
    model = make()
    source, target = tokens(2, 5), tokens(2, 4)
    plain = model(source, target)
    causal = torch.full((4, 4), -math.inf).triu(1)
    late = torch.tensor([[False] * 4, [False, False, True, True]])
    masked = model(
        source,
        target,
        src_mask=torch.zeros(5, 5),
        tgt_mask=causal,
        memory_mask=torch.zeros(4, 5, dtype=torch.bool),
        tgt_key_padding_mask=late,
    )
    torch.testing.assert_close(masked, plain, rtol=0, atol=0)
    other = model(source, target, memory_key_padding_mask=torch.tensor([[False] * 3 + [True] * 2] * 2).float())
    assert not torch.allclose(other, plain), "the decoder sees less of the source"
    for name, mask in {
        "src_mask": torch.ones(5, 5),
        "memory_mask": torch.ones(4, 5),
        "tgt_mask": torch.zeros(4, 4),
        "tgt_key_padding_mask": late.flip(1),
    }.items():
        with pytest.raises(ConfigError, match=name):
            model(source, target, **{name: mask})


def test_generate_takes_the_likeliest_of_a_full_pass_each_time() -> None:
    model = make()
    for parameter in model.backbone.decoder.parameters():
        torch.nn.init.normal_(parameter)  # one that was just made repeats itself
    source = tokens(3, 5)
    written = model.generate(source, max_length=9, temperature=0)
    assert len(set(written.flatten().tolist())) > 3
    assert written[:, 0].tolist() == [1, 1, 1], "bos_token_id"
    for row, ids in zip(source, written.tolist(), strict=True):
        wanted = [1]
        while len(wanted) < 10 and wanted[-1] != 2:
            wanted.append(int(model(row[None], torch.tensor([wanted]))[0, -1].argmax()))
        assert ids == wanted + [0] * (len(ids) - len(wanted)), "behind eos_token_id there is pad_token_id"


def test_rows_end_by_themselves_and_are_padded() -> None:
    model = make()
    source = tokens(6, 4)

    def drawn(**ends: int) -> list[list[int]]:
        torch.manual_seed(0)
        written: list[list[int]] = model.generate(source, max_length=8, temperature=5.0, top_p=1.0, **ends).tolist()
        return written

    free = drawn(eos_token_id=-1)
    end = free[0][3]  # what the first row writes third ends a row now
    ended = drawn(eos_token_id=end, pad_token_id=0)
    assert len({tuple(row).index(end) for row in free if end in row}) > 1, "not all at once"
    for row, whole in zip(ended, free, strict=True):
        stop = next((i for i, token in enumerate(whole) if i and token == end), len(whole))
        assert row == (whole[: stop + 1] + [0] * len(row))[: len(row)]


def test_padding_is_no_part_of_a_source() -> None:
    model = make()
    source = tokens(1, 4)
    wanted = model.generate(source, max_length=6, temperature=0)
    for padded in ([*source[0].tolist(), 0, 0], [0, *source[0].tolist(), 0]):
        beside = torch.tensor([padded, [5, 6, 7, 8, 9, 3]])
        assert torch.equal(model.generate(beside, max_length=6, temperature=0)[:1, : wanted.shape[1]], wanted)
    with pytest.raises(DataError, match="row 1 of input_ids is all padding"):
        model.generate(torch.tensor([[4, 0], [0, 0]]))
    with pytest.raises(DataError, match="reads 12 at most"):
        model.generate(tokens(1, 13))


def test_chance_follows_torchs_seed_and_dropout_is_off() -> None:
    model = make(dropout=0.5).train()
    source = tokens(4, 5)
    torch.manual_seed(1)
    first = model.generate(source, max_length=6)
    torch.manual_seed(1)
    assert torch.equal(model.generate(source, max_length=6), first)
    drawn = [model.generate(source, max_length=6).tolist() for _ in range(5)]
    assert len({str(ids) for ids in drawn}) == 5
    greedy = [model.generate(source, max_length=6, do_sample=False) for _ in range(2)]
    assert torch.equal(*greedy) and model.training
    assert model.generate(source, max_length=99).shape[1] <= 13, "no longer than max_seq_len"


def test_settings_of_generate() -> None:
    model = make()
    with pytest.warns(AptWarning, match="generate: num_beams not used"):
        model.generate(tokens(1, 3), max_length=1, num_beams=4)
    with pytest.raises(ConfigError, match="temperature is -1"):
        model.generate(tokens(1, 3), temperature=-1)
    source = tokens(1, 3)
    greedy = model.generate(source, 6, temperature=0)
    assert torch.equal(model.generate(src_tokens=source, max_length=6, temperature=0), greedy)
    with pytest.raises(TypeError, match="needs input_ids"):
        model.generate()
    assert torch.equal(model.generate(source, 6, 9.0, 1.0, top_k=1), greedy)
    once = model.generate(source, 6, 0.0, repetition_penalty=1e9)[0].tolist()
    assert len(set(once)) == len(once)


# The attention


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_is_called_as_torchs_own(batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = AutopoieticAttention(32, 4, sr_ratio=4, batch_first=batch_first).eval()
    x, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    if not batch_first:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    output, weights = layer(query=x, key=memory, value=memory, key_padding_mask=padding)
    assert output.shape == x.shape and weights.shape == (2, 5, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5))
    assert weights[1, :, 4:].eq(0).all() and weights[0].gt(0).all()
    each = layer(x, memory, memory, key_padding_mask=padding, average_attn_weights=False)[1]
    torch.testing.assert_close(each.mean(1), weights)
    alone, none = layer(x, memory, memory, key_padding_mask=padding, need_weights=False)
    torch.testing.assert_close(alone, output)
    assert none is None
    self_output, self_weights = layer(x, x, x)
    assert self_output.shape == x.shape and self_weights.shape == (2, 5, 5)
    with pytest.raises(ProviderError, match="one latent"):
        layer(x, memory, memory.clone())


def test_attention_without_batch_first_is_the_same_turned() -> None:
    torch.manual_seed(0)
    layer = AutopoieticAttention(32, 4, sr_ratio=4, causal=True).eval()
    x = torch.randn(2, 5, 32)
    wanted, weights = layer(x, x, x)
    layer.batch_first = False
    turned = x.transpose(0, 1)
    output, same = layer(turned, turned, turned)
    torch.testing.assert_close(output.transpose(0, 1), wanted)
    torch.testing.assert_close(same, weights)


def test_attention_knows_no_positions_and_follows_its_mask() -> None:
    torch.manual_seed(0)
    layer = AutopoieticAttention(32, 4, sr_ratio=4).eval()
    x = torch.randn(1, 6, 32)
    order = torch.randperm(6)
    torch.testing.assert_close(layer(x[:, order], x, x)[0], layer(x, x, x)[0][:, order])
    blocked = torch.ones(6, 6, dtype=torch.bool).triu(1)
    added = torch.full((6, 6), -math.inf).triu(1)
    torch.testing.assert_close(layer(x, x, x, attn_mask=blocked)[0], layer(x, x, x, attn_mask=added)[0])
    later = torch.cat([x[:, :4], torch.randn(1, 2, 32)], dim=1)
    torch.testing.assert_close(
        layer(later, later, later, attn_mask=blocked)[0][:, :4], layer(x, x, x, attn_mask=blocked)[0][:, :4]
    )
    assert layer(x, x, x, attn_mask=blocked)[1].triu(1).eq(0).all()


def test_what_a_causal_layer_generates_itself() -> None:
    on, off = (AutopoieticAttention(32, 4, causal=True, use_autopoietic=use, init_tau=0.5) for use in (True, False))
    assert "attention.w" in on.state_dict() and "attention.w" not in off.state_dict()
    assert on.attention.gain == 2.0
    assert "attention.w" not in AutopoieticAttention(32, 4).state_dict(), "not causal by construction"
    for layer in (on, off):
        x = torch.randn(1, 5, 32)
        assert layer(x, x, x)[1].triu(1).eq(0).all()


def test_options_of_the_attention() -> None:
    with pytest.warns(AptWarning, match=r"AutopoieticAttention: eps, alpha, use_dbc_dac not used"):
        AutopoieticAttention(32, 4, 0.1, 1e-6, 0.1, use_dbc_dac=True)
    with pytest.warns(AptWarning, match="sr_ratio 6 does not fit d_model 64 with 4 heads: 4 is used, the nearest"):
        layer = AutopoieticAttention(64, 4, sr_ratio=6)
    assert layer.attention.d_vein == 16
    with pytest.raises(TypeError, match="no option 'tau'"):
        AutopoieticAttention(32, 4, tau=1.0)
    with pytest.raises(ConfigError, match="not divisible"):
        AutopoieticAttention(30, 4)
    x = torch.randn(1, 5, 32)
    dropping = AutopoieticAttention(32, 4, 0.5)
    assert not torch.equal(dropping(x, x, x)[0], dropping(x, x, x)[0])
    assert torch.equal(dropping.eval()(x, x, x)[0], dropping(x, x, x)[0])
