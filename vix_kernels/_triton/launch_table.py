"""The launch table: the tile, the number of warps and the number of stages for each kernel.

The entries were chosen so that the kernels compile without register spills. The exceptions are declared in measure/budgets.py
(SPILLS). The entries have not been measured on a GPU yet. `vix dev tune` proposes better entries.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Size of the tile that one program processes, and the program's warps and stages."""

    slots: int
    tokens: int
    num_warps: int
    num_stages: int
    # Precision of float32 products: "tf32x3" (three TF32 products), "tf32", or "ieee" (fused multiply-adds, to save registers).
    precision: str = "tf32x3"
    # Whether to use two launches, one for dk and one for dv (or one for dq and one for the gradients of slots), because the
    # registers cannot hold both accumulators.
    apart: bool = False
    # Largest number of tiles of slots that a program loads once, before its loop over tokens. If there are more tiles, all of
    # them are loaded again for every tile of tokens.
    resident: int = 0


Key = tuple[str, int, int]  # kernel name, bits per element of the tokens, padded width


def _entries(tiles: dict[tuple[str | int, ...], Tile]) -> dict[Key, Tile]:
    """Return one entry per width. A key of `tiles` consists of a kernel name, bits per element, and one or more widths."""
    entries: dict[Key, Tile] = {}
    for (name, bits, *widths), tile in tiles.items():
        for width in widths:
            if (name, bits, width) in entries:
                raise ValueError(f"{name}, {bits} bits: expected one entry for width {width}, got several")
            entries[name, bits, width] = tile
    return entries


# A suffix marks an entry for a variant of a kernel. Entries "..._heavy" are for launches that need many registers. By default,
# a launch is heavy if its slots have the tokens' dtype, for example because they are computed from tokens. For
# broadcast_forward and broadcast_tokens, a launch with RoPE is also heavy. For aggregate_tokens, a launch with more than 128
# slots or with float16 is also heavy. For broadcast_slots, a launch is heavy if it uses RoPE or computes dslots, and the dtype
# of the slots does not matter. Entries "..._learned" are for launches that compute dslots, and entries "..._half" are for
# float16. If a variant has no entry, the entry without a suffix is used. An entry with a suffix takes precedence over an
# override without a suffix. To override such an entry for an architecture, add an override with the suffix.
TABLE = _entries(
    {
        ("aggregate_forward", 16, 16, 32): Tile(128, 64, 8, 1),
        ("aggregate_forward", 16, 64): Tile(128, 32, 8, 1),
        ("aggregate_forward", 16, 128): Tile(64, 64, 8, 1),
        ("aggregate_forward", 16, 256): Tile(16, 32, 8, 1),
        ("aggregate_forward", 32, 16, 32, 64): Tile(128, 32, 8, 1),
        ("aggregate_forward", 32, 128): Tile(32, 16, 8, 1),
        ("aggregate_forward", 32, 256): Tile(16, 16, 8, 1, "ieee"),
        ("broadcast_forward", 16, 16, 32): Tile(32, 64, 4, 1),
        ("broadcast_forward_heavy", 16, 16, 32): Tile(64, 64, 4, 1),
        ("broadcast_forward", 16, 64): Tile(32, 128, 8, 1),
        ("broadcast_forward_heavy", 16, 64): Tile(32, 64, 4, 1),
        ("broadcast_forward", 16, 128): Tile(32, 32, 4, 1),
        ("broadcast_forward", 16, 256): Tile(32, 16, 8, 1),
        ("broadcast_forward", 32, 16, 32): Tile(64, 64, 8, 1),
        ("broadcast_forward", 32, 64): Tile(32, 64, 8, 1),
        ("broadcast_forward", 32, 128): Tile(32, 32, 8, 1),
        ("broadcast_forward", 32, 256): Tile(16, 16, 8, 1, "ieee"),
        ("broadcast_tokens", 16, 16, 32): Tile(64, 64, 4, 1, resident=2),
        ("broadcast_tokens", 16, 64): Tile(32, 64, 4, 1),
        ("broadcast_tokens", 16, 128): Tile(32, 32, 8, 1),
        ("broadcast_tokens_heavy", 16, 128): Tile(64, 32, 8, 1),
        ("broadcast_tokens", 16, 256): Tile(32, 16, 8, 1),
        ("broadcast_tokens", 32, 16): Tile(32, 64, 8, 1),
        ("broadcast_tokens", 32, 32): Tile(16, 64, 8, 1),
        ("broadcast_tokens", 32, 64): Tile(32, 16, 4, 1),
        ("broadcast_tokens", 32, 128): Tile(32, 16, 8, 1),
        ("broadcast_tokens", 32, 256): Tile(16, 16, 8, 1, "ieee"),
        ("broadcast_slots", 16, 16, 32): Tile(64, 64, 4, 1),
        ("broadcast_slots", 16, 64): Tile(32, 64, 4, 1),
        ("broadcast_slots_heavy", 16, 64): Tile(16, 32, 2, 1),
        ("broadcast_slots", 16, 128): Tile(16, 64, 4, 1),
        ("broadcast_slots_heavy", 16, 128): Tile(16, 16, 4, 1),
        ("broadcast_slots", 16, 256): Tile(16, 16, 8, 1),
        ("broadcast_slots", 32, 16): Tile(64, 32, 8, 1),
        ("broadcast_slots", 32, 32, 64): Tile(32, 16, 8, 1),
        ("broadcast_slots", 32, 128, 256): Tile(16, 16, 8, 1, "ieee"),
        ("aggregate_tokens", 16, 16, 32): Tile(32, 128, 8, 2),
        ("aggregate_tokens", 16, 64): Tile(16, 64, 4, 1),
        ("aggregate_tokens_heavy", 16, 64): Tile(32, 64, 4, 1),
        ("aggregate_tokens", 16, 128): Tile(16, 32, 4, 1, apart=True),
        ("aggregate_tokens", 16, 256): Tile(16, 32, 8, 1, apart=True),
        ("aggregate_tokens", 32, 16): Tile(32, 32, 8, 1),
        ("aggregate_tokens", 32, 32): Tile(16, 32, 8, 1),
        ("aggregate_tokens", 32, 64): Tile(32, 32, 8, 1),
        ("aggregate_tokens", 32, 128): Tile(16, 16, 8, 1),
        ("aggregate_tokens", 32, 256): Tile(16, 16, 8, 1, "ieee", apart=True),
        ("aggregate_slots", 16, 16, 32): Tile(128, 64, 8, 1),
        ("aggregate_slots", 16, 64): Tile(64, 32, 4, 1),
        ("aggregate_slots", 16, 128): Tile(64, 32, 4, 1),
        ("aggregate_slots", 16, 256): Tile(16, 32, 8, 1),
        ("aggregate_slots", 32, 16): Tile(64, 32, 8, 1),
        ("aggregate_slots", 32, 32): Tile(64, 16, 8, 1),
        ("aggregate_slots", 32, 64): Tile(32, 32, 8, 1),
        ("aggregate_slots", 32, 128): Tile(16, 16, 4, 1, "ieee"),
        ("aggregate_slots", 32, 256): Tile(16, 16, 8, 1, "ieee"),
        ("linear_aggregate_forward", 16, 16, 32): Tile(64, 64, 8, 1),
        ("linear_aggregate_forward", 16, 64): Tile(64, 32, 4, 1),
        ("linear_aggregate_forward", 16, 128): Tile(32, 16, 4, 1),
        ("linear_aggregate_forward", 16, 256): Tile(16, 16, 8, 1),
        ("linear_aggregate_forward", 32, 16, 32): Tile(64, 32, 4, 1),
        ("linear_aggregate_forward", 32, 64): Tile(32, 16, 8, 1),
        ("linear_aggregate_forward", 32, 128): Tile(16, 16, 8, 1, "ieee"),
        ("linear_aggregate_forward", 32, 256): Tile(16, 16, 8, 1, "ieee"),
        ("linear_broadcast_forward", 16, 16, 32): Tile(64, 64, 4, 1),
        ("linear_broadcast_forward", 16, 64): Tile(16, 64, 4, 1),
        ("linear_broadcast_forward", 16, 128): Tile(16, 16, 4, 1),
        ("linear_broadcast_forward", 16, 256): Tile(16, 32, 8, 1),
        ("linear_broadcast_forward", 32, 16, 32): Tile(64, 32, 4, 1),
        ("linear_broadcast_forward", 32, 64): Tile(16, 32, 8, 1),
        ("linear_broadcast_forward", 32, 128): Tile(16, 16, 8, 1, "ieee"),
        ("linear_broadcast_forward", 32, 256): Tile(16, 16, 8, 1, "ieee"),
        ("linear_aggregate_tokens", 16, 16, 32): Tile(32, 64, 8, 1),
        ("linear_aggregate_tokens", 16, 64): Tile(32, 32, 4, 1),
        ("linear_aggregate_tokens", 16, 128): Tile(16, 32, 8, 1),
        ("linear_aggregate_tokens", 16, 256): Tile(16, 32, 8, 1),
        ("linear_aggregate_tokens", 32, 16, 32): Tile(16, 64, 8, 1),
        ("linear_aggregate_tokens", 32, 64): Tile(32, 16, 8, 1),
        ("linear_aggregate_tokens", 32, 128): Tile(16, 16, 4, 1, "ieee"),
        ("linear_aggregate_tokens", 32, 256): Tile(16, 16, 8, 1, "ieee"),
        ("linear_broadcast_tokens", 16, 16, 32): Tile(32, 64, 8, 1),
        ("linear_broadcast_tokens", 16, 64): Tile(32, 32, 4, 1),
        ("linear_broadcast_tokens", 16, 128): Tile(16, 16, 4, 1),
        ("linear_broadcast_tokens", 16, 256): Tile(32, 16, 8, 1),
        ("linear_broadcast_tokens", 32, 16): Tile(64, 32, 4, 1),
        ("linear_broadcast_tokens", 32, 32, 64): Tile(32, 32, 8, 1),
        ("linear_broadcast_tokens", 32, 128): Tile(32, 16, 8, 1),
        ("linear_broadcast_tokens", 32, 256): Tile(16, 16, 8, 1, "ieee"),
        ("linear_broadcast_slots", 16, 16, 32): Tile(64, 32, 4, 1),
        ("linear_broadcast_slots", 16, 64): Tile(32, 32, 4, 1),
        ("linear_broadcast_slots", 16, 128): Tile(32, 16, 4, 1),
        ("linear_broadcast_slots", 16, 256): Tile(16, 16, 8, 1),
        ("linear_broadcast_slots", 32, 16, 32, 64): Tile(16, 32, 4, 1),
        ("linear_broadcast_slots", 32, 128): Tile(16, 16, 8, 1),
        ("linear_broadcast_slots", 32, 256): Tile(16, 16, 8, 1, "ieee"),
        ("linear_aggregate_slots", 16, 16, 32): Tile(64, 64, 8, 1),
        ("linear_aggregate_slots", 16, 64): Tile(64, 32, 4, 1),
        ("linear_aggregate_slots", 16, 128): Tile(64, 64, 8, 1),
        ("linear_aggregate_slots", 16, 256): Tile(32, 32, 4, 1),
        ("linear_aggregate_slots", 32, 16, 32): Tile(32, 32, 4, 1),
        ("linear_aggregate_slots", 32, 64): Tile(32, 16, 8, 1),
        ("linear_aggregate_slots", 32, 128): Tile(16, 16, 8, 1),
        ("linear_aggregate_slots", 32, 256): Tile(16, 16, 8, 1, "ieee"),
        ("project_forward", 16, 16, 32): Tile(64, 32, 4, 1),
        ("project_forward", 16, 64): Tile(64, 64, 4, 1),
        ("project_forward", 16, 128): Tile(64, 32, 4, 1),
        ("project_forward", 16, 256): Tile(32, 32, 4, 1),
        ("project_forward", 32, 16, 32, 64): Tile(64, 32, 4, 1),
        ("project_forward", 32, 128): Tile(32, 32, 4, 1),
        ("project_forward", 32, 256): Tile(32, 16, 8, 1),
        ("project_tokens", 16, 16, 32, 64): Tile(64, 64, 4, 2),
        ("project_tokens", 16, 128): Tile(32, 64, 8, 1),
        ("project_tokens", 16, 256): Tile(32, 32, 8, 1),
        ("project_tokens", 32, 16, 32, 64): Tile(32, 32, 4, 1),
        ("project_tokens", 32, 128): Tile(16, 32, 4, 1),
        ("project_tokens", 32, 256): Tile(16, 16, 8, 1),
        ("project_weights", 16, 16, 32, 64): Tile(64, 64, 4, 1),
        ("project_weights", 16, 128): Tile(64, 32, 8, 1),
        ("project_weights", 16, 256): Tile(32, 32, 8, 1),
        ("project_weights", 32, 16, 32, 64): Tile(32, 32, 4, 1),
        ("project_weights", 32, 128): Tile(32, 16, 8, 1),
        ("project_weights", 32, 256): Tile(16, 16, 8, 1, "ieee"),
        ("rotate", 16, 16, 32): Tile(0, 128, 4, 1),
        ("rotate", 16, 64): Tile(0, 64, 4, 1),
        ("rotate", 16, 128): Tile(0, 32, 4, 1),
        ("rotate", 16, 256): Tile(0, 16, 4, 1),
        ("rotate", 32, 16): Tile(0, 128, 4, 1),
        ("rotate", 32, 32): Tile(0, 64, 4, 1),
        ("rotate", 32, 64): Tile(0, 32, 4, 1),
        ("rotate", 32, 128): Tile(0, 16, 4, 1),
        ("rotate", 32, 256): Tile(0, 8, 4, 1),
        # For the pinv kernels, width is the number of landmarks, `slots` is the largest number of landmarks whose matrices are
        # kept in registers, and `tokens` is the number of columns that a product sums over at a time.
        ("pinv_forward", 16, 16): Tile(16, 16, 4, 1, "tf32"),
        ("pinv_forward", 16, 32): Tile(32, 16, 4, 1, "tf32"),
        ("pinv_forward", 16, 64): Tile(64, 32, 4, 1, "tf32"),
        ("pinv_forward", 16, 128): Tile(0, 16, 8, 1, "tf32"),
        ("pinv_forward", 32, 16): Tile(16, 16, 4, 1),
        ("pinv_forward", 32, 32): Tile(32, 16, 4, 1),
        ("pinv_forward", 32, 64, 128): Tile(0, 16, 8, 1),
        ("pinv_backward", 16, 16, 32): Tile(0, 16, 4, 1, "tf32"),
        ("pinv_backward", 16, 64, 128): Tile(0, 16, 8, 1, "tf32"),
        ("pinv_backward", 32, 16, 32): Tile(0, 16, 4, 1),
        ("pinv_backward", 32, 64, 128): Tile(0, 16, 8, 1),
        ("landmarks", 16, 16): Tile(16, 4, 1, 1),
        ("landmarks", 16, 32): Tile(8, 4, 1, 1),
        ("landmarks", 16, 64): Tile(4, 4, 1, 1),
        ("landmarks", 16, 128): Tile(2, 4, 1, 1),
        ("landmarks", 16, 256): Tile(1, 4, 1, 1),
        ("landmarks", 32, 16): Tile(8, 8, 1, 1),
        ("landmarks", 32, 32): Tile(4, 8, 1, 1),
        ("landmarks", 32, 64): Tile(2, 8, 1, 1),
        ("landmarks", 32, 128): Tile(1, 8, 1, 1),
        ("landmarks", 32, 256): Tile(1, 4, 1, 1),
        ("landmarks_backward", 16, 16, 32): Tile(0, 64, 4, 1),
        ("landmarks_backward", 16, 64): Tile(0, 32, 4, 1),
        ("landmarks_backward", 16, 128): Tile(0, 16, 4, 1),
        ("landmarks_backward", 16, 256): Tile(0, 8, 4, 1),
        ("landmarks_backward", 32, 16, 32): Tile(0, 64, 4, 1),
        ("landmarks_backward", 32, 64): Tile(0, 32, 4, 1),
        ("landmarks_backward", 32, 128): Tile(0, 16, 4, 1),
        ("landmarks_backward", 32, 256): Tile(0, 8, 4, 1),
        # For the token_conv kernels, `slots` is the largest number of tokens that a product sums over at a time.
        ("token_conv_forward", 16, 16, 32, 64): Tile(64, 64, 4, 1),
        ("token_conv_forward", 16, 128, 256): Tile(64, 64, 8, 1),
        ("token_conv_forward", 32, 16, 32, 64): Tile(32, 32, 4, 1),
        ("token_conv_forward", 32, 128): Tile(64, 32, 8, 1),
        ("token_conv_forward", 32, 256): Tile(32, 32, 8, 1),
        ("token_conv_backward", 16, 16): Tile(64, 64, 4, 1),
        ("token_conv_backward", 16, 32): Tile(64, 64, 8, 1),
        ("token_conv_backward", 16, 64): Tile(64, 64, 4, 1),
        ("token_conv_backward", 16, 128, 256): Tile(64, 64, 8, 1),
        ("token_conv_backward", 32, 16, 32): Tile(32, 32, 4, 1),
        ("token_conv_backward", 32, 64, 128, 256): Tile(32, 32, 8, 1),
        # For the dft kernels, the same entry is used for any number of channels, and `slots` is the number of columns.
        ("dft_channels", 16, 64): Tile(128, 64, 8, 2),
        ("dft_channels", 32, 64): Tile(128, 64, 8, 1),
        ("dft_tokens", 16, 64): Tile(64, 128, 8, 2),
        ("dft_tokens", 32, 64): Tile(64, 128, 8, 1),
    }
)
# Tiles of at least 64 tokens or slots use warp-group instructions, which need fewer registers for operands.
_WARP_GROUP = _entries(
    {
        ("aggregate_forward", 16, 16, 32, 64): Tile(128, 128, 8, 1),
        ("aggregate_forward", 16, 128): Tile(128, 64, 8, 1),
        ("aggregate_forward_heavy", 16, 128): Tile(64, 32, 4, 1),
        ("aggregate_tokens", 16, 16, 32): Tile(128, 64, 4, 1, resident=1),
        ("aggregate_tokens_heavy", 16, 16, 32): Tile(64, 64, 4, 1, resident=1),
        ("aggregate_tokens", 16, 64): Tile(64, 128, 8, 1),
        ("aggregate_tokens_heavy", 16, 64): Tile(64, 128, 8, 1),
        ("aggregate_slots", 16, 64): Tile(128, 64, 8, 1),
        ("aggregate_slots", 16, 128): Tile(128, 32, 8, 1),
        ("broadcast_forward", 16, 16, 32): Tile(128, 64, 4, 1, resident=2),
        ("broadcast_forward_heavy", 16, 16, 32): Tile(128, 64, 4, 1, resident=1),
        ("broadcast_forward", 16, 64): Tile(128, 128, 8, 1, resident=2),
        ("broadcast_forward_heavy", 16, 64): Tile(128, 128, 8, 1, resident=1),
        ("broadcast_forward", 16, 128): Tile(32, 64, 4, 1),
        ("broadcast_tokens", 16, 16, 32): Tile(128, 64, 4, 1, resident=1),
        ("broadcast_tokens", 16, 64): Tile(128, 128, 8, 1, resident=2),
        ("broadcast_tokens_heavy", 16, 64): Tile(64, 128, 8, 1),
        ("broadcast_tokens", 16, 128): Tile(64, 128, 8, 1),
        ("broadcast_tokens_heavy", 16, 128): Tile(32, 32, 4, 1),
        ("broadcast_slots", 16, 16, 32): Tile(128, 64, 4, 1),
        ("broadcast_slots_heavy", 16, 16, 32, 64): Tile(64, 64, 4, 1),
        ("broadcast_slots", 16, 64): Tile(128, 128, 8, 1),
        ("broadcast_slots", 16, 128): Tile(64, 128, 8, 1),
        ("broadcast_slots_heavy", 16, 128): Tile(32, 128, 8, 1, apart=True),
        ("dft_channels", 16, 64): Tile(128, 64, 8, 3),
        ("dft_tokens", 16, 64): Tile(128, 128, 8, 3),
        # A tile of 128 slots holds all random features if there are at most 128, so a program loads them only once.
        ("linear_aggregate_forward", 16, 16, 32): Tile(128, 64, 4, 1),
        ("linear_aggregate_forward", 16, 64): Tile(64, 64, 4, 1),
        ("linear_aggregate_forward", 16, 128): Tile(64, 64, 8, 1),
        ("linear_aggregate_tokens", 16, 16, 32): Tile(128, 64, 4, 1),
        ("linear_aggregate_tokens_half", 16, 16, 32): Tile(64, 64, 4, 1),
        ("linear_aggregate_tokens", 16, 64): Tile(64, 64, 4, 1),
        ("linear_aggregate_tokens_half", 16, 64): Tile(32, 64, 4, 1),
        ("linear_aggregate_tokens", 16, 128): Tile(64, 64, 8, 1),
        ("linear_aggregate_tokens_half", 16, 128): Tile(16, 32, 8, 1),
        ("linear_aggregate_slots", 16, 16, 32, 64): Tile(64, 64, 4, 1),
        ("linear_broadcast_forward", 16, 16, 32): Tile(128, 64, 4, 1),
        ("linear_broadcast_forward", 16, 64): Tile(64, 64, 4, 1),
        ("linear_broadcast_forward", 16, 128): Tile(64, 64, 8, 1),
        ("linear_broadcast_tokens", 16, 16, 32): Tile(128, 64, 4, 1),
        ("linear_broadcast_tokens", 16, 64): Tile(64, 64, 4, 1),
        ("linear_broadcast_tokens_half", 16, 64): Tile(32, 64, 4, 1),
        ("linear_broadcast_slots", 16, 16, 32): Tile(128, 64, 4, 1),
        ("linear_broadcast_slots_learned", 16, 16, 32): Tile(64, 64, 4, 1),
        ("linear_broadcast_slots", 16, 64): Tile(64, 64, 4, 1),
        ("linear_broadcast_slots_learned", 16, 64): Tile(32, 64, 4, 1),
        ("linear_broadcast_slots", 16, 128): Tile(64, 64, 4, 1),
        ("linear_broadcast_slots_learned", 16, 128): Tile(32, 32, 8, 1),
    }
)
# Without warp-group instructions, each warp multiplies 16 rows of a tile. With more than one warp per 16 rows, several warps
# compute the same logits.
_WARP_ROWS = _entries(
    {
        ("broadcast_forward", 32, 16, 32): Tile(64, 64, 4, 1),
        ("broadcast_forward", 32, 64): Tile(32, 64, 4, 1),
        ("broadcast_tokens", 32, 16, 32): Tile(32, 64, 4, 1),
        ("broadcast_tokens", 32, 128): Tile(32, 16, 4, 1),
        ("broadcast_slots", 32, 16, 32): Tile(32, 32, 2, 1),
        ("broadcast_slots", 32, 64): Tile(16, 32, 2, 1),
        ("aggregate_tokens", 32, 16, 32): Tile(32, 32, 2, 1),
        ("aggregate_tokens", 32, 64): Tile(32, 16, 2, 1),
        ("aggregate_tokens", 32, 128): Tile(16, 32, 4, 1),
        ("aggregate_slots", 32, 16, 32): Tile(64, 32, 4, 1),
        ("aggregate_slots", 32, 64): Tile(64, 16, 4, 1),
        ("aggregate_forward", 32, 128): Tile(16, 32, 8, 1),
    }
)
_SMALL = _entries(
    {  # for architectures with 99 KiB of shared memory per block
        ("linear_broadcast_tokens", 16, 256): Tile(16, 32, 8, 1),
        ("token_conv_backward", 16, 128): Tile(32, 64, 8, 1),
        ("aggregate_slots", 32, 128): Tile(16, 16, 8, 1, "ieee"),
    }
)
_CDNA = _entries(
    {  # for kernels that fit in registers only with one stage or a different tile
        ("aggregate_tokens", 16, 32): Tile(32, 128, 8, 1),
        ("aggregate_tokens", 16, 128): Tile(16, 64, 8, 1),
        ("aggregate_tokens", 32, 128): Tile(16, 32, 8, 1),
        ("pinv_forward", 16, 64): Tile(0, 16, 8, 1, "tf32"),
    }
)
# Overrides of entries in TABLE, by architecture.
OVERRIDES: dict[str, dict[Key, Tile]] = {
    "sm_80": _WARP_ROWS
    | _entries(
        {
            ("aggregate_slots", 16, 32): Tile(128, 32, 8, 1),
        }
    ),
    "sm_86": _SMALL | _WARP_ROWS,
    "sm_89": _SMALL | _WARP_ROWS | _entries({("project_forward", 16, 128): Tile(64, 32, 8, 1)}),
    "sm_120": _SMALL
    | _WARP_ROWS
    | _entries(
        {
            ("aggregate_tokens", 16, 32): Tile(32, 128, 8, 1),
            ("aggregate_tokens", 16, 64): Tile(32, 32, 2, 1),
            ("aggregate_tokens_heavy", 16, 64): Tile(32, 32, 2, 1),
            ("aggregate_slots", 16, 64): Tile(128, 32, 8, 1),
            ("project_forward", 16, 128): Tile(64, 32, 8, 1),
            ("token_conv_backward", 16, 64): Tile(64, 64, 8, 1),
            ("pinv_backward", 16, 128): Tile(0, 32, 4, 1, "tf32"),
            ("broadcast_tokens", 32, 128): Tile(16, 16, 8, 1, "ieee"),
        }
    ),
    "sm_90": _WARP_GROUP
    | _entries(
        {
            ("aggregate_tokens", 16, 128): Tile(32, 64, 8, 1, apart=True),
            ("broadcast_tokens_heavy", 16, 128): Tile(64, 64, 8, 1),
            ("project_tokens", 16, 16): Tile(64, 64, 4, 1),
            ("aggregate_forward", 32, 128): Tile(16, 32, 8, 1),
            ("aggregate_tokens", 32, 16, 32, 64): Tile(16, 64, 4, 1),
            ("aggregate_slots", 32, 16, 32): Tile(64, 64, 4, 1),
            ("aggregate_slots", 32, 64): Tile(64, 32, 4, 1),
            ("broadcast_forward", 32, 16, 32): Tile(64, 128, 8, 1),
            ("broadcast_forward", 32, 64): Tile(32, 128, 8, 1),
            ("broadcast_forward", 32, 128): Tile(32, 16, 8, 1),
            ("broadcast_slots", 32, 16, 32): Tile(16, 64, 4, 1),
            ("broadcast_slots", 32, 64): Tile(32, 64, 4, 1),
            ("linear_broadcast_slots", 32, 64): Tile(16, 16, 8, 1),
            ("broadcast_tokens", 32, 16, 32): Tile(32, 128, 8, 1),
            ("broadcast_tokens", 32, 64): Tile(32, 64, 4, 1),
            ("broadcast_tokens", 32, 128): Tile(16, 16, 8, 1, "ieee"),
            ("pinv_forward", 32, 64): Tile(64, 16, 4, 1),
            ("pinv_backward", 16, 64): Tile(64, 32, 8, 1, "tf32"),  # 8 warps, because 4 warps spill up to 24 bytes
            ("dft_channels", 32, 64): Tile(64, 128, 8, 1),
        }
    ),
    "sm_100": _WARP_GROUP
    | _entries(
        {
            ("aggregate_tokens", 16, 16, 32): Tile(64, 64, 4, 1, resident=2),
            ("aggregate_tokens_heavy", 16, 16, 32): Tile(64, 64, 4, 1),
            ("aggregate_tokens", 16, 128): Tile(64, 64, 8, 1, apart=True),
            ("broadcast_tokens", 16, 64): Tile(64, 128, 8, 1),
            ("broadcast_slots", 16, 64): Tile(32, 64, 4, 1),
            ("broadcast_slots", 16, 128): Tile(64, 64, 8, 1),
            ("broadcast_slots_heavy", 16, 128): Tile(64, 64, 8, 1),
            ("broadcast_tokens", 16, 128): Tile(64, 64, 8, 1),
            ("broadcast_tokens_heavy", 16, 128): Tile(32, 64, 8, 1),
            ("linear_broadcast_tokens", 16, 128): Tile(16, 64, 4, 1),
            ("linear_broadcast_slots_learned", 16, 128): Tile(64, 64, 8, 1),
            ("token_conv_backward", 16, 128): Tile(32, 64, 8, 1),
            ("dft_channels", 16, 64): Tile(128, 128, 8, 3),
        }
    ),
    "gfx90a": _CDNA,
    "gfx942": _CDNA,
    "gfx950": _CDNA,
}


def entries(arch: str) -> dict[Key, Tile]:
    """Return the launch table for `arch`: TABLE, with the overrides for `arch` applied."""
    return TABLE | OVERRIDES.get(arch, {})


INTERPRETER = Tile(32, 16, 1, 1, resident=2)  # small enough that every loop runs more than once even on small inputs
