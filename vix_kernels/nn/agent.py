"""Agent attention, as a core (see core.py) and as a module."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..ops.agent import agent_attention
from ..ops.checks import autocast
from ..ops.pooling import at_most, most_cells, place, pooled_queries
from ..ops.rope import Rope
from .checks import check_placement
from .core import PrefixCore, SdpaArgs, Site, Tokens, register
from .module import AttentionModule


@register("agent")
@dataclass(frozen=True)
class Agent(PrefixCore):
    """Agent attention (Han et al., arXiv 2312.08874). Agents are means of queries over segments or grid cells.

    The queries are averaged before the rotary embedding is applied.

    Attributes:
        num_agents: number of agents for the tokens after the prefix, limited to the number of these tokens.
        grid_size: (height, width) of the grid that the tokens after the prefix form. This grid is divided into cells, and each
            agent is the mean of the queries in one cell. If None, the model's grid and prefix are used. If the model has no
            grid, each agent is the mean of the queries in a segment of the sequence.
        prefix_tokens: number of leading tokens (class and register tokens). Each of them is a separate agent.
    """

    num_agents: int = 49
    grid_size: tuple[int, int] | None = None
    prefix_tokens: int = 0

    sited = frozenset({"grid_size", "prefix_tokens"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_placement("num_agents", self.num_agents, self.grid_size, self.prefix_tokens)

    def after_prefix(self, prefix_tokens: int) -> Agent:
        return replace(self, prefix_tokens=prefix_tokens)

    def on_grid(self, size: tuple[int, int]) -> Agent:
        return replace(self, grid_size=size, num_agents=most_cells(size, self.num_agents))

    def describe(self) -> str:
        return f"agent, {self.num_agents} agents {place(self.grid_size, self.prefix_tokens)}{self.describe_prefix()}"

    def fit(self, site: Site) -> Agent:
        if self.grid_size is not None or site.grid_size is None:
            return self
        side = next(side for side in range(math.isqrt(self.num_agents), 0, -1) if self.num_agents % side == 0)
        rows, columns = site.grid_size
        count = min(side, rows) * min(self.num_agents // side, columns)
        return replace(self, num_agents=count, grid_size=site.grid_size, prefix_tokens=site.prefix_tokens)

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, rope: Rope | None, tokens: Tokens,
        sdpa: SdpaArgs, backend: str,
    ) -> Tensor:  # fmt: skip
        q, k, v = autocast(q, k, v)
        query_mask = tokens.key_padding_mask if tokens.self_attention else None
        agents, counts = pooled_queries(
            q, at_most(self.num_agents, q.shape[2] - self.prefix_tokens), grid_size=self.grid_size,
            prefix_tokens=self.prefix_tokens, mask=query_mask, backend=backend,
        )  # fmt: skip
        return agent_attention(
            q, k, v, agents, scale=scale, agent_mask=None if query_mask is None else counts > 0,
            key_padding_mask=tokens.key_padding_mask, rope=rope, exact_rows=self.exact_rows(tokens), backend=backend,
        )  # fmt: skip


class AgentAttention(AttentionModule):
    """Agent attention (Han et al., arXiv 2312.08874) with linear layers named as in timm's `Attention` (`qkv`, `proj`).

    Agents are means of queries.

    Args:
        num_agents: number of agents for the tokens after the prefix, limited to the number of these tokens.
        grid_size: (height, width) of the grid that the tokens after the prefix form. This grid is divided into cells, and each
            agent is the mean of the queries in one cell. If None, segments of the sequence are used instead of cells.
        prefix_tokens: number of leading tokens (class and register tokens). Each of them is a separate agent.

    For the other arguments, see AttentionModule. The rotary embedding is not applied to agents.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] | None = None,
        *,
        num_agents: int = 49,
        grid_size: tuple[int, int] | None = None,
        prefix_tokens: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            Agent(num_agents, grid_size, prefix_tokens), dim, num_heads, qkv_bias, qk_norm, proj_bias, attn_drop, proj_drop,
            norm_layer, backend=backend,
        )  # fmt: skip
