"""`training.compile`: the blocks of a model, each compiled by itself.

Blocks are alike: the compiler works on one, and the others find what it has made, however many there are. What gathers
the weights of a block in shards is done around its forward, and stays out of what is compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from apt.core.errors import TrainingError, in_a_line
from apt.modeling.backbones.gpt import TransformerBlock


class CompiledBlocks(nn.Module):
    """Calls a model with its blocks compiled. The model itself stays as it is, for whoever else calls it.

    Args:
        model: any module; each block is compiled when it is called first.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        blocks = [module for module in model.modules() if isinstance(module, TransformerBlock)]
        self._forwards = [(block, torch.compile(block.forward)) for block in blocks]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns.

        Raises:
            TrainingError: it cannot be compiled.
        """
        for block, compiled in self._forwards:
            block.forward = compiled  # type: ignore[method-assign]
        try:
            return self.model(*args, **kwargs)
        except Exception as error:
            from torch._dynamo.exc import TorchDynamoException  # here, for it takes a second; it has no public name

            if not isinstance(error, TorchDynamoException):
                raise
            raise TrainingError(
                f"training.compile: torch cannot compile the model: {in_a_line(error)}",
                hint="leave training.compile out, or mend that; run.log has all that torch says",
            ) from error
        finally:
            for block, _ in self._forwards:
                del block.forward
