"""Registers the providers that come with core."""

from apt.core.registry import Registry
from apt.hookspecs import hookimpl

API_VERSION = (1, 0)


@hookimpl
def apt_register_providers(registry: Registry) -> None:
    register = registry.register
    register(
        "attention",
        "tva_default",
        "apt.modeling.layers.attention_tva:TVAAttention",
        True,
        version="1.0.0",
        section="tva",
    )
    register("attention", "mha", "apt.modeling.layers.attention_mha:MHAAttention", version="1.0.0")
    register("ffn", "default", "apt.modeling.layers.ffn:DefaultFFN", True, version="1.0.0")
    register("ffn", "swiglu", "apt.modeling.layers.ffn:SwiGLU", version="1.0.0")
    register("dataset", "files", "apt.data.sources:FilesDataset", version="1.0.0")
    register("dataset", "pairs", "apt.data.pairs:PairsDataset", version="1.0.0")
    register("dataset", "stdlib", "apt.data.sources:StdlibDataset", version="1.0.0")
    register("tokenizer", "byte", "apt.data.tokenizers:ByteTokenizerProvider", version="1.0.0")
    register("tokenizer", "char", "apt.data.tokenizers:CharTokenizerProvider", version="1.0.0")
    register("tokenizer", "bpe", "apt.data.tokenizers:BPETokenizerProvider", version="1.0.0")
    register("tokenizer", "file", "apt.data.tokenizers:FileTokenizerProvider", version="1.0.0")
    register("tracker", "tensorboard", "apt.training.trackers:TensorBoardTracker", version="1.0.0")
    register("voter", "entropy", "apt.builtin.voter:EntropyVoter", version="1.0.0", section="voting")
    register("voter", "self_consistency", "apt.builtin.voter:SelfConsistencyVoter", version="1.0.0", section="voting")
