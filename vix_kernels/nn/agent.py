"""Agent attention as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops.agent import agent_attention
from ..ops.checks import autocast
from ..ops.pooling import at_most, pooled_queries
from ..ops.rope import Rope
from .attention import Attention
from .checks import check_placement


class AgentAttention(Attention):
    """Agent attention between timm's linear maps; its agents are pooled queries (Han et al., arXiv 2312.08874).

    Args:
        num_agents: of the tokens behind the prefix; fewer where there are fewer tokens.
        grid_size: height and width of the token map behind the prefix: agents pool its cells. None: segments of the sequence.
        prefix_tokens: tokens in front (class, registers) that are agents of their own.

    Others as in Attention.

    The agents are not rotated, and neither are the queries that they pool.
    """

    has_weights = False

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *args: Any,
        num_agents: int = 49,
        grid_size: tuple[int, int] | None = None,
        prefix_tokens: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, *args, **options)
        check_placement("num_agents", num_agents, grid_size, prefix_tokens)
        self.num_agents, self.grid_size, self.prefix_tokens = num_agents, grid_size, prefix_tokens

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, rope: Rope | None) -> Tensor:
        q, k, v = autocast(q, k, v)
        agents, counts = pooled_queries(
            q, at_most(self.num_agents, q.shape[2] - self.prefix_tokens), grid_size=self.grid_size,
            prefix_tokens=self.prefix_tokens, mask=key_padding_mask, backend=self.backend,
        )  # fmt: skip
        return agent_attention(
            q, k, v, agents, agent_mask=None if key_padding_mask is None else counts > 0, key_padding_mask=key_padding_mask,
            rope=rope, backend=self.backend,
        )  # fmt: skip
