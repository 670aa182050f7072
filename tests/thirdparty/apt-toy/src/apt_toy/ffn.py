"""Squared ReLU (So et al. 2021)."""

from torch import nn
from torch.nn import functional as F

from apt.core.providers.ffn import FFNProvider


class SquaredReLU(FFNProvider):
    def get_name(self):
        return "toy_relu2"

    def get_version(self):
        return "0.1.0"

    def create_layer(self, d_model, d_ff, *, dropout=0.0, **config):
        return SquaredReLULayer(d_model, d_ff, dropout)


class SquaredReLULayer(nn.Module):
    def __init__(self, d_model, d_ff, dropout):
        super().__init__()
        self.d_model = d_model
        self.up = nn.Linear(d_model, d_ff)
        self.down = nn.Linear(d_ff, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.down(F.relu(self.up(x)).square()))
