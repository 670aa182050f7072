"""A model is what `apt.api.ModelBuilder` builds of a profile; `model.backbone: encdec` is the one of 1.x."""

from apt_model._moved import moved

__getattr__, __dir__ = moved(
    __name__,
    {
        "APTModelConfiguration": ("apt.api:RunConfig", "apt_model.config._options:APTModelConfiguration"),
        "APTModel": ("apt.api:ModelBuilder", "apt_model.modeling._model:APTModel"),
        "APTLargeModel": ("apt.api:ModelBuilder", "apt_model.modeling._model:APTLargeModel"),
        "AutopoieticAttention": (
            "apt.modeling.layers.attention_tva:TVAAttentionLayer",
            "apt_model.modeling._attention:AutopoieticAttention",
        ),
    },
)
