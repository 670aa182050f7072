"""Runs as Hugging Face folders and back: transformers computes the same logits, and so does the run that comes back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from export_samples import LLAMA, SIZES, TEXT, export, import_, logits, make_run, quietly, some_tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

from apt.api import (
    GPT,
    AptError,
    AptWarning,
    ConfigError,
    DataError,
    Generator,
    RunConfig,
    RunFolder,
    load_run,
    registry,
)
from apt_plugin_quant.export.folder import sha256
from apt_plugin_quant.export.hf_config import read_config

TOLERANCE = 2e-5

pytestmark = pytest.mark.filterwarnings("ignore:config.json ends a text with token 0")

KINDS: dict[str, dict[str, Any]] = {
    "plain": LLAMA,
    "grouped, untied": LLAMA | {"mha": {"num_kv_heads": 2}, "tie_embeddings": False},
    "biases": LLAMA | {"mha": {"bias": True, "num_kv_heads": 1}, "swiglu": {"bias": True}},
    "theta, eps": LLAMA | {"rope_theta": 500.0, "norm_eps": 1e-2, "d_ff": 40},
    "experts": LLAMA | {"moe": {"enabled": True, "experts": 5, "top_k": 2}, "mha": {"num_kv_heads": 2}},
    "one expert": LLAMA | {"moe": {"enabled": True, "experts": 3, "top_k": 1}, "tie_embeddings": False},
}


@pytest.fixture(scope="module", autouse=True)
def router() -> Iterator[None]:
    """The router of apt-plugin-moe, in the registry that scripts use, for the length of this file."""
    plugin = pytest.importorskip("apt_plugin_moe.plugin", reason="Mixtral is a model of apt-plugin-moe")
    registry.list_providers()
    before = registry._claims
    registry._claims = {key: list(claims) for key, claims in before.items()}
    plugin.apt_register_providers(registry)
    yield
    registry._claims = before


@pytest.fixture(scope="module", params=KINDS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Path]:
    """A run and its export, of each kind."""
    folder = tmp_path_factory.mktemp("hf")
    run = make_run(folder / "run", KINDS[request.param])
    assert quietly(export, run.path, "--format", "hf", "--out", folder / "out") == 0
    return run, folder / "out"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A folder to spoil."""
    run = make_run(tmp_path / "run", KINDS["grouped, untied"])
    export(run.path, "--format", "hf", "--out", tmp_path / "llama")
    return tmp_path / "llama"


def with_transformers(folder: Path, tokens: Tensor) -> Tensor:
    transformers = pytest.importorskip("transformers", reason="transformers is what is compared with")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        found: Tensor = model(tokens).logits
    return found


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_transformers_computes_the_same(exported: tuple[RunFolder, Path]) -> None:
    run, folder = exported
    tokens = some_tokens(length=60)
    wanted = logits(run, tokens)
    assert wanted.std() > 0.5, "weights so small that nothing shows"
    torch.testing.assert_close(with_transformers(folder, tokens), wanted, rtol=0, atol=TOLERANCE)


def test_what_comes_back_computes_the_same(exported: tuple[RunFolder, Path], tmp_path: Path) -> None:
    run, folder = exported
    tokens = some_tokens()
    assert quietly(import_, "hf", folder, "--out", tmp_path / "back") == 0
    back = RunFolder(tmp_path / "back")
    torch.testing.assert_close(logits(back, tokens), logits(run, tokens), rtol=0, atol=1e-6)
    ours, theirs = (load_run(each, device="cpu").model.state_dict() for each in (run, back))
    beside = (".dense.", ".schedule")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not any(part in name for part in beside))
    text = "".join(Generator.from_run(back, device="cpu").stream("To be", max_new_tokens=5, temperature=0))
    assert text == "".join(Generator.from_run(run, device="cpu").stream("To be", max_new_tokens=5, temperature=0))


def test_what_transformers_saves_is_taken(exported: tuple[RunFolder, Path], tmp_path: Path) -> None:
    """In shards, with the config as that library writes it."""
    transformers = pytest.importorskip("transformers", reason="transformers is what is compared with")
    run, folder = exported
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert (tmp_path / "saved/model.safetensors.index.json").is_file()
    shutil.copy(folder / "tokenizer.json", tmp_path / "saved")
    assert import_("hf", tmp_path / "saved", "--out", tmp_path / "back") == 0
    tokens = some_tokens()
    torch.testing.assert_close(logits(RunFolder(tmp_path / "back"), tokens), logits(run, tokens), rtol=0, atol=1e-6)


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe"])
def test_the_tokenizer_gives_the_same_ids(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    transformers = pytest.importorskip("transformers", reason="transformers is what is compared with")
    run = make_run(tmp_path / "run", LLAMA, tokenizer=tokenizer, bpe={"vocab_size": 257})
    export(run.path, "--format", "hf", "--out", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = load_run(run, device="cpu").tokenizer
    ids = list(ours.encode(TEXT))
    assert theirs.eos_token_id == (ours.eos_id if tokenizer == "bpe" else None)
    assert theirs(TEXT)["input_ids"] == ids
    assert theirs.decode(ids) == TEXT


def test_bf16_is_rounded_once_and_comes_back_as_fp32(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", LLAMA)
    export(run.path, "--format", "hf", "--out", tmp_path / "out", "--dtype", "bf16")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    import_("hf", tmp_path / "out", "--out", tmp_path / "back")
    ours, back = (load_run(each, device="cpu").model.state_dict() for each in (run, RunFolder(tmp_path / "back")))
    for name, tensor in back.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, ours[name].bfloat16().float())


def test_the_routers_temperature_goes_into_its_matrix(tmp_path: Path) -> None:
    def warm(model: GPT) -> None:
        for block in model.blocks:
            block.ffn.set_schedule(active=True, temperature=0.5, capacity=None)  # type: ignore[union-attr,operator]

    run = make_run(tmp_path / "run", KINDS["experts"], change=warm)
    export(run.path, "--format", "hf", "--out", tmp_path / "out")
    tokens = some_tokens()
    torch.testing.assert_close(with_transformers(tmp_path / "out", tokens), logits(run, tokens), rtol=0, atol=TOLERANCE)


def test_experts_that_are_not_on_yet_leave_a_llama(tmp_path: Path) -> None:
    def off(model: GPT) -> None:
        for block in model.blocks:
            block.ffn.set_schedule(active=False, temperature=1.0, capacity=None)  # type: ignore[union-attr,operator]

    run = make_run(tmp_path / "run", LLAMA | {"moe": {"enabled": True, "experts": 3}}, change=off)
    with pytest.warns(AptWarning, match="experts are not switched on yet"):
        export(run.path, "--format", "hf", "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "llama"
    tokens = some_tokens()
    torch.testing.assert_close(with_transformers(tmp_path / "out", tokens), logits(run, tokens), rtol=0, atol=TOLERANCE)


MOE = {"enabled": True, "experts": 3, "top_k": 2}
OBSTACLES: list[tuple[dict[str, Any], list[str]]] = [
    (
        SIZES | {"norm_eps": 1e-5, "positions": "learned"},
        ["model.attention_name: tva_default", "model.ffn_name: default", "model.norm: layernorm", "model.positions"],
    ),
    (LLAMA | {"mha": {"qk_norm": True}}, ["model.mha.qk_norm: true has no counterpart in Llama; use false"]),
    (
        LLAMA | {"mha": {"bias": True}, "swiglu": {"bias": True}, "moe": MOE},
        ["model.mha.bias: true has no counterpart in Mixtral", "model.swiglu.bias"],
    ),
    (
        LLAMA | {"moe": MOE | {"normalize": False, "shared_experts": 1}},
        ["model.moe.normalize: false", "model.moe.shared_experts: 1"],
    ),
]


@pytest.mark.parametrize(("model", "said"), OBSTACLES)
def test_every_obstacle_is_named_at_once(tmp_path: Path, model: dict[str, Any], said: list[str]) -> None:
    run = make_run(tmp_path / "run", model)
    with pytest.raises(ConfigError) as refused:
        export(run.path, "--format", "hf", "--out", tmp_path / "out")
    assert all(part in refused.value.message for part in said), refused.value.message
    assert refused.value.message.count("no counterpart") == len(said)
    assert refused.value.exit_code == 2
    assert list(tmp_path.iterdir()) == [run.path]


def test_a_selection_bias_stands_in_the_way(tmp_path: Path) -> None:
    def tilt(model: GPT) -> None:
        model.get_buffer("blocks.1.ffn.selection_bias")[0] = 0.1

    run = make_run(tmp_path / "run", LLAMA | {"moe": MOE}, change=tilt)
    with pytest.raises(ConfigError, match=r"model\.moe\.bias_rate"):
        export(run.path, "--format", "hf", "--out", tmp_path / "out")


# What is refused of a folder


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "positions are scaled (linear)"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "positions are scaled (llama3)"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ({"sliding_window": 16}, "sliding_window is 16"),
    ({"head_dim": 16}, "head_dim is 16"),
    ({"quantization_config": {"bits": 4}}, "its weights are quantised"),
    ({"num_hidden_layers": "two"}, "num_hidden_layers: input should be a valid integer"),
    ({"num_hidden_layers": 3}, "lacks model.layers.2"),
    ({"num_hidden_layers": 1}, "has also model.layers.1"),
    ({"intermediate_size": 49}, "is [32, 48], and config.json makes it [32, 49]"),
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3, no divisor"),
    ({"model_type": "mixtral"}, "block_sparse_moe"),
    ({"model_type": "mixtral", "attention_bias": True}, "which Mixtral has not"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_what_ours_has_not_is_refused(llama: Path, changes: dict[str, Any], said: str) -> None:
    edit(llama / "config.json", **changes)
    with pytest.raises((ConfigError, DataError)) as refused:
        import_("hf", llama, "--out", llama.parent / "back")
    assert said in refused.value.message
    assert "\n" not in str(refused.value)
    assert not (llama.parent / "back").exists()


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("value", [None, "x", -1, 0, 1, 3, [], {}, {"rope_type": 5}, True, 1e308, 2**70])
def test_a_damaged_config_is_one_line(kind: str, value: object) -> None:
    whole = {"model_type": kind, "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    for key in read_config(Path("config.json"), whole).model_dump():
        try:
            config = read_config(Path("config.json"), whole | {key: value})
            RunConfig.model_validate({"model": config.profile()})
        except AptError as error:
            assert "\n" not in str(error), key
            assert str(error).startswith("config.json: "), key
        else:
            assert config.layout().head_dim % 2 == 0


def test_a_window_as_wide_as_the_context_does_not_matter(llama: Path) -> None:
    edit(llama / "config.json", sliding_window=64, rope_scaling=None)
    assert import_("hf", llama, "--out", llama.parent / "back") == 0


def test_several_reasons_are_one_message(llama: Path) -> None:
    edit(llama / "config.json", hidden_act="gelu", sliding_window=8)
    with pytest.raises(ConfigError, match=r"hidden_act is 'gelu'.*; sliding_window is 8"):
        import_("hf", llama)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "", ".hidden", "c:x"])
def test_an_index_that_points_elsewhere(llama: Path, file: str) -> None:
    names = dict.fromkeys(load_file(llama / "model.safetensors"), file)
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(DataError, match="no file of this folder"):
        import_("hf", llama)


def test_damage(llama: Path) -> None:
    weights = llama / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(DataError, match=r"model\.safetensors cannot be read"):
        import_("hf", llama)
    weights.unlink()
    (llama / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(DataError, match=r"pytorch_model\.bin, a pickle"):
        import_("hf", llama)
    (llama / "pytorch_model.bin").unlink()
    with pytest.raises(DataError, match=r"holds no model\.safetensors"):
        import_("hf", llama)
    (llama / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    with pytest.raises(DataError, match="lacks model"):
        import_("hf", llama)
    (llama / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(DataError, match="no JSON object"):
        import_("hf", llama)
    (llama / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json is not JSON"):
        import_("hf", llama)
    with pytest.raises(DataError, match=r"config\.json cannot be read: No such file"):
        import_("hf", llama.parent / "nowhere")


def test_tokenizers_that_do_not_fit(llama: Path) -> None:
    named = {f"t{i}": i for i in range(300)}
    tokenizer = json.loads((llama / "tokenizer.json").read_text())
    tokenizer["model"] = {"type": "WordLevel", "vocab": named, "unk_token": "t0"}
    (llama / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match=r"ids up to 299, and config\.json a vocab_size of 256"):
        import_("hf", llama)
    (llama / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        import_("hf", llama)


def test_a_text_that_is_not_there(llama: Path) -> None:
    with pytest.raises(DataError, match=r"--train-path: there is no .*nowhere\.txt"):
        import_("hf", llama, "--train-path", llama / "nowhere.txt")


def test_a_run_that_is_there_is_kept(llama: Path) -> None:
    (llama.parent / "back").mkdir()
    with pytest.raises(ConfigError, match="back exists already"):
        import_("hf", llama, "--out", llama.parent / "back")


def test_the_end_of_a_text_is_compared(llama: Path) -> None:
    with pytest.warns(AptWarning, match=r"token 0, and tokenizer\.json has no special token that ends one"):
        import_("hf", llama, "--out", llama.parent / "one")
    edit(llama / "config.json", eos_token_id=[5, 6])
    with pytest.warns(AptWarning, match=r"ends a text with token 5"):
        import_("hf", llama, "--out", llama.parent / "two")
    edit(llama / "config.json", eos_token_id=None)
    assert quietly(import_, "hf", llama, "--out", llama.parent / "three") == 0


def test_weights_that_are_no_floats(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    save_file(weights, llama / "model.safetensors")
    with pytest.raises(DataError, match=r"model\.norm\.weight is of dtype I8"):
        import_("hf", llama)


def test_old_tables_are_passed_over(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, llama / "model.safetensors")
    assert import_("hf", llama, "--out", llama.parent / "back") == 0


def test_an_imported_run_goes_on_and_is_measured(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from apt.core.profiles import resolve
    from apt.evaluation.evaluate import evaluate_run
    from apt.training.trainer import Trainer

    monkeypatch.chdir(llama.parent)
    text = llama.parent / "text.txt"
    text.write_text(TEXT * 40)
    assert quietly(import_, "hf", llama, "--train-path", text) == 0
    run = RunFolder(Path("runs/llama"))
    before = evaluate_run(run, device="cpu")["val_loss"]
    profile = resolve(
        run.profile,
        {"training.max_steps": 3, "training.batch_size": 2, "training.warmup_steps": 0, "data.cache_dir": "cache",
         "training.learning_rate": 1e-2, "hardware.device": "cpu"},
    )  # fmt: skip
    quietly(Trainer(profile, resume=run, quiet=True).train)
    assert evaluate_run(run, device="cpu")["val_loss"] < before
    assert load_run(run, device="cpu").step == 3


def test_the_manifest_knows_every_file(exported: tuple[RunFolder, Path]) -> None:
    _, folder = exported
    manifest = json.loads((folder / "export.json").read_text())
    assert manifest["files"].keys() == {path.name for path in folder.iterdir()} - {"export.json"}
    for name, facts in manifest["files"].items():
        assert facts == {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        assert (folder / name).stat().st_mode == (folder / "export.json").stat().st_mode
