"""The retrievers are the package apt-plugin-rag."""

from apt_model._moved import moved

__getattr__, __dir__ = moved(
    __name__,
    {
        "BM25Retriever": "apt_plugin_rag.retrievers:BM25Retriever",
        "DenseRetriever": "apt_plugin_rag.retrievers:DenseRetriever",
        "HybridRetriever": "apt_plugin_rag.retrievers:HybridRetriever",
        "KNNRetriever": "apt_plugin_rag.knn_lm:KNNRetriever",
    },
    package="apt-plugin-rag",
)
