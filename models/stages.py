"""Base class and stages of models whose token map shrinks from stage to stage: LeViT and CvT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch import Tensor, nn

from .arguments import check_choice, check_heads
from .backbone import Backbone, Level
from .layers import run_blocks, to_maps, to_tokens
from .mixers import Place
from .positions import POSITIONS, learned_position, rotary_position


class Stage(nn.Module):
    """One stage of a model: (B, C, H, W) -> tokens (B, grid[0] * grid[1], dim).

    A stage creates a token map from the images or from the previous map, and applies blocks to the tokens.

    Args:
        embed: creates the token map: (B, C, H, W) -> (B, dim, *grid).
        norm: normalizes the tokens before the blocks.
        make_block: a function that creates a block, given its Place.
        first_layer: number of blocks in the previous stages.
        position: as in VisionTransformer. Each stage has a separate position encoding.
    """

    def __init__(
        self,
        embed: nn.Module,
        norm: nn.Module,
        make_block: Callable[[Place], nn.Module],
        *,
        grid: tuple[int, int],
        dim: int,
        num_heads: int,
        depth: int,
        first_layer: int,
        position: str,
    ) -> None:
        super().__init__()
        check_choice(POSITIONS, position=position)
        check_heads(dim, num_heads)
        self.grid, self.dim = grid, dim
        self.embed, self.norm = embed, norm
        self.pos_embed = learned_position(position, grid[0] * grid[1], dim)
        self.rope = rotary_position(position, grid, dim, num_heads, depth)
        self.blocks = nn.ModuleList(make_block(Place(first_layer + layer, grid, 0)) for layer in range(depth))

    def forward(self, maps: Tensor, checkpointing: bool) -> Tensor:
        x = self.norm(to_tokens(self.embed(maps)))
        if self.pos_embed is not None:
            x = x + self.pos_embed
        return run_blocks(self.blocks, x, self.rope, checkpointing)


class Pyramid(Backbone):
    """Base class of models that apply `stages` and then `norm`."""

    trunk = "stages"
    stages: nn.ModuleList

    def token_maps(self) -> dict[str, tuple[tuple[int, int], int]]:
        return {level.module: (level.grid, 0) for level in self.levels()}

    def levels(self) -> list[Level]:
        return [Level(f"stages.{number}", stage.dim, stage.grid) for number, stage in enumerate(self.stages)]

    def forward_trunk(self, x: Tensor, levels: int | None = None, outputs: list[Tensor] | None = None) -> Tensor:
        for number, stage in enumerate(islice(self.stages, levels)):
            x = stage(x if number == 0 else to_maps(x, self.stages[number - 1].grid), self.grad_checkpointing)
            if outputs is not None:
                outputs.append(x)
        return x

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)", (0,)), (r"^norm", (99999,))]
        return dict(stem=r"^stages\.0\.(?:embed|norm|pos_embed|rope)", blocks=r"^stages\.(\d+)" if coarse else blocks)


def shrinking(img_size: tuple[int, int], strides: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield the height and width of the token map after each convolution. Convolutions pad by half their kernel size."""
    for stride in strides:
        img_size = tuple((side - 1) // stride + 1 for side in img_size)
        yield img_size
