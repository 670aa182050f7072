"""z-loss (PaLM, section 5): keeps the softmax's normaliser near 1."""

from apt.core.providers.align import AlignProvider


class ZLoss(AlignProvider):
    def get_name(self):
        return "toy_zloss"

    def get_version(self):
        return "0.1.0"

    def compute_align_loss(self, logits, targets, model_state):
        counts_BT = targets != -100
        squares_BT = logits.float().logsumexp(dim=-1).square()
        return 1e-4 * (squares_BT * counts_BT).sum() / counts_BT.sum().clamp(min=1)
