"""A feed-forward layer of many experts, of which each token visits a few."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apt.modeling.layers.counting import flops_per_token
from apt_plugin_moe.capacity import Assignment, assign, places
from apt_plugin_moe.config import MoEConfig
from apt_plugin_moe.dispatch import combine, gather, sort_by_expert
from apt_plugin_moe.experts import SeparateExperts, make_experts, split_output
from apt_plugin_moe.load import Load


class MoEFFN(nn.Module):
    """A mixture of experts in the place of a dense layer (Shazeer et al. 2017; Fedus et al. 2022).

        p = softmax(W x / temperature)                  over E experts, in fp32
        y = sum of g_e FFN_e(x) over the k best         g = p over these, scaled to add up to one

    Until it is `active` it computes the dense layer. The experts exist from the start, as copies of it, and are made
    copies of what it has become when they are switched on (Komatsuzaki et al., "Sparse Upcycling", 2022).

    Args:
        base_ffn: the dense layer, any module with a `d_model`; [B, T, D] to [B, T, D].
        config: the section `model.moe`.
    """

    def __init__(self, base_ffn: nn.Module, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.d_model = int(cast(int, base_ffn.d_model))
        self.active = True
        self.temperature = 1.0
        self.capacity = config.capacity
        self.dense = base_ffn
        self.experts = make_experts(base_ffn, config.experts)
        self.shared = SeparateExperts(base_ffn, config.shared_experts) if config.shared_experts else None
        like = next(base_ffn.parameters(), torch.empty(0))
        # Drawn aside: a run whose experts come later is, until then, the run without them, number for number.
        with torch.random.fork_rng(devices=[]):
            self.router = nn.Linear(self.d_model, config.experts, bias=False, device=like.device, dtype=like.dtype)
            nn.init.normal_(self.router.weight, std=0.02)
        self.selection_bias: Tensor
        self.schedule: Tensor
        self.register_buffer("selection_bias", torch.zeros(config.experts, device=like.device))
        self.register_buffer("schedule", torch.tensor([1.0, 1.0], device=like.device))
        self.register_load_state_dict_post_hook(_read_schedule)  # type: ignore[no-untyped-call]
        self.load = Load()
        self.step_load = Load()
        self._compute: Callable[[MoEFFN, Tensor], tuple[Tensor, Tensor]] = MoEFFN._mixture

    def stay_uncompiled(self) -> None:
        """Stay as it is within a block that is compiled: how many rows each expert gets, and whether one is full, is
        another matter in every step, and would have it compiled anew."""
        self._compute = torch.compiler.disable(MoEFFN._mixture)

    def set_schedule(self, *, active: bool, temperature: float, capacity: float | None) -> None:
        """Set what a schedule moves. Whether it is active and its temperature are part of the state dict: without them
        a checkpoint would not say what the model computes."""
        self.capacity = capacity
        temperature = torch.tensor(temperature, dtype=torch.float32).item()
        if (active, temperature) != (self.active, self.temperature):
            self.schedule.copy_(torch.tensor([float(active), temperature]))
            self.active, self.temperature = active, temperature

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """The output [B, T, D] and the auxiliary loss: 0-d, its weights applied, zero while dense or in evaluation."""
        if not self.active:
            return _with_aux(*split_output(self.dense(x_BTD)))
        return self._compute(self, x_BTD)

    def _mixture(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        logits_BTE = self._logits(x_BTD)
        probs_BTE = (logits_BTE if self.temperature == 1 else logits_BTE / self.temperature).softmax(-1)
        assigned = assign(
            probs_BTE.detach() + self.selection_bias, self.config.top_k, self._limit(x_BTD), self.config.overflow
        )
        weights_Nk = self._weights(probs_BTE.flatten(0, 1), assigned)
        to = sort_by_expert(assigned.experts_Nk, assigned.kept_Nk, self.config.experts)
        y_MD, aux_loss = self.experts(gather(x_BTD.flatten(0, 1), to), to)
        out_BTD = combine(y_MD, weights_Nk, to).view(x_BTD.shape)
        if self.shared is not None:
            for expert in self.shared.each:
                out_BTD = out_BTD + split_output(expert(x_BTD))[0]
            out_BTD = out_BTD / (1 + len(self.shared.each))
        if not self.training:
            return _with_aux(out_BTD, aux_loss)
        self.load.add(assigned)
        self.step_load.add(assigned)
        router_loss = self._router_loss(logits_BTE, probs_BTE, assigned)
        return out_BTD, router_loss if aux_loss is None else router_loss + aux_loss

    def flops_per_token(self, length: int) -> int:
        """Forward FLOPs per token at a context of `length` tokens."""
        dense = flops_per_token(self.dense, length)
        if not self.active:
            return dense
        return (self.config.top_k + self.config.shared_experts) * dense + 2 * self.router.weight.numel()

    def balance(self) -> None:
        """Move each expert's selection bias against its load of this step, and begin the next one."""
        rate = self.config.bias_rate
        if rate and self.step_load:
            demand_E = self.step_load.demand_E.float()
            self.selection_bias += rate * (demand_E.mean() - demand_E).sign()
        self.step_load.clear()

    def _logits(self, x_BTD: Tensor) -> Tensor:
        """[B, T, E] in fp32 whatever the rest is computed in: the choice is sensitive to rounding (Fedus et al.)."""
        jitter = self.config.jitter
        with torch.autocast(x_BTD.device.type, enabled=False):
            x_BTD = x_BTD if x_BTD.dtype == torch.float64 else x_BTD.float()
            if jitter and self.training:
                x_BTD = x_BTD * torch.empty_like(x_BTD).uniform_(1 - jitter, 1 + jitter)
            return F.linear(x_BTD, self.router.weight.to(x_BTD.dtype))

    def _limit(self, x_BTD: Tensor) -> int | None:
        if not self.training or self.capacity is None:
            return None
        return places(x_BTD.shape[0] * x_BTD.shape[1], self.config.top_k, self.config.experts, self.capacity)

    def _weights(self, probs_NE: Tensor, assigned: Assignment) -> Tensor:
        """[N, k]; zero where a choice has no expert. Under `drop` what was dropped still takes its share."""
        weights_Nk = probs_NE.gather(1, assigned.experts_Nk)
        kept_Nk = assigned.kept_Nk
        if kept_Nk is not None and self.config.overflow == "next":
            weights_Nk = weights_Nk * kept_Nk
        if self.config.normalize:
            tiny = torch.finfo(weights_Nk.dtype).tiny
            weights_Nk = weights_Nk / weights_Nk.sum(-1, keepdim=True).clamp_min(tiny)
        if kept_Nk is not None and self.config.overflow == "drop":
            weights_Nk = weights_Nk * kept_Nk
        return weights_Nk

    def _router_loss(self, logits_BTE: Tensor, probs_BTE: Tensor, assigned: Assignment) -> Tensor:
        """balance_loss * E sum_e f_e P_e, f the share of the choices and P the mean probability of expert e, plus
        z_loss * mean(logsumexp(logits)^2)."""
        config = self.config
        loss = probs_BTE.new_zeros(())
        if config.balance_loss:
            share_E = assigned.demand_E / assigned.experts_Nk.numel()
            loss = loss + config.balance_loss * config.experts * (share_E * probs_BTE.mean((0, 1))).sum()
        if config.z_loss:
            loss = loss + config.z_loss * logits_BTE.logsumexp(-1).square().mean()
        return loss


def _with_aux(out: Tensor, aux_loss: Tensor | None) -> tuple[Tensor, Tensor]:
    return out, out.new_zeros((), dtype=torch.float32) if aux_loss is None else aux_loss


def _read_schedule(layer: MoEFFN, incompatible_keys: Any) -> None:
    """A state dict has been loaded: it says whether the experts are on. Read here, once, and not in every forward,
    which would wait for the device."""
    active, temperature = layer.schedule.tolist()
    layer.active, layer.temperature = bool(active), temperature
