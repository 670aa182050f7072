"""Registers the providers that come with core."""

from typing import Any

from apt.core.registry import Registry
from apt.hookspecs import hookimpl

API_VERSION = (1, 1)

LAYERS = "apt.modeling.layers"
VOTING = "apt.builtin.config:VotingConfig"


@hookimpl
def apt_register_providers(registry: Registry) -> None:
    def register(kind: str, name: str, target: str, **options: Any) -> None:
        registry.register(kind, name, target, version="1.0.0", **options)

    tva, mha, ffn = (f"{LAYERS}.config:{name}" for name in ("TVAConfig", "MHAConfig", "FFNConfig"))
    register(
        "attention", "tva_default", f"{LAYERS}.attention_tva:TVAAttention", default=True, section="tva", config=tva
    )
    register("attention", "mha", f"{LAYERS}.attention_mha:MHAAttention", config=mha)
    register("ffn", "default", f"{LAYERS}.ffn:DefaultFFN", default=True, config=ffn)
    register("ffn", "swiglu", f"{LAYERS}.ffn:SwiGLU", config=ffn)
    register("dataset", "files", "apt.data.sources:FilesDataset")
    register("dataset", "pairs", "apt.data.pairs:PairsDataset", config="apt.data.config:PairsConfig")
    register("dataset", "stdlib", "apt.data.sources:StdlibDataset")
    register("tokenizer", "byte", "apt.data.tokenizers:ByteTokenizerProvider")
    register("tokenizer", "char", "apt.data.tokenizers:CharTokenizerProvider")
    register("tokenizer", "bpe", "apt.data.tokenizers:BPETokenizerProvider")
    register("tokenizer", "file", "apt.data.tokenizers:FileTokenizerProvider")
    register("tracker", "tensorboard", "apt.training.trackers:TensorBoardTracker")
    register("voter", "entropy", "apt.builtin.voter:EntropyVoter", section="voting", config=VOTING)
    register("voter", "self_consistency", "apt.builtin.voter:SelfConsistencyVoter", section="voting", config=VOTING)
