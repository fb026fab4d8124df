"""Routed rows through their experts and back, dropless: Σ_k gates_TK[:, k] · FF_{expert_ids_TK[:, k]}(x_TD).

Rows are sorted by expert, so that every expert is matrix products on contiguous rows. Two ways, with the same results:

- `_ExpertLoop`: one pass over the experts forward and one backward, in tiles that stay in a processor's cache. Nothing
  of size (R, D) or (R, F) is kept for the backward pass but the first projection; gradients are written where they
  belong, without a copy.
- `grouped_feed_forward`: torch's grouped matrix product, for GPUs, without waiting for the rows' count.

Shape letters: T tokens, K experts a token, R = T·K routed rows, r rows of a tile, D model, F feed-forward, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Order:
    """Routed rows sorted by expert, and the way back."""

    slot_R: Tensor
    """Index into the flattened (T, K) selections of each row."""
    token_R: Tensor
    """Token of each row."""
    row_TK: Tensor
    """Row of each selection; 0 where it was dropped."""
    rows_per_expert: list[int]


def sort_by_expert(expert_ids_TK: Tensor, num_experts: int, kept_TK: Tensor | None = None) -> Order:
    """Put the selections that are kept in the order of their experts; within an expert tokens stay in order."""
    (T, K), E = expert_ids_TK.shape, num_experts
    ids_R = expert_ids_TK.flatten() if kept_TK is None else expert_ids_TK.where(kept_TK, E).flatten()
    rows_per_expert = ids_R.bincount(minlength=E)[:E].tolist()
    slot_R = ids_R.argsort(stable=True)[: sum(rows_per_expert)]
    row_TK = torch.zeros(T * K, dtype=torch.long, device=slot_R.device)
    row_TK[slot_R] = torch.arange(len(slot_R), device=slot_R.device)
    return Order(slot_R, slot_R // K, row_TK.view(T, K), rows_per_expert)


def feed_forward(
    x_TD: Tensor, gates_TK: Tensor, expert_ids_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, act: Activation,
    kept_TK: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Σ_k gates_TK[:, k] · FF_{expert_ids_TK[:, k]}(x_TD), (T, D), the fastest way there is for these tensors.

    An expert without tokens costs nothing and gets a gradient of exactly zero.

    Args:
        gates_TK: gate weights, at least float32; those of dropped rows are 0.
        gate_up_E2FD: gate and up projection of each expert, gate first.
        act: activation function of the gate projection, elementwise.
        kept_TK: False for rows that were dropped; None: all are kept.
    """
    if torch.is_autocast_enabled(x_TD.device.type):
        dtype = torch.get_autocast_dtype(x_TD.device.type)
        x_TD, gate_up_E2FD, down_EDF = x_TD.to(dtype), gate_up_E2FD.to(dtype), down_EDF.to(dtype)
    with torch.autocast(x_TD.device.type, enabled=False):
        if can_group(x_TD, down_EDF):
            return grouped_feed_forward(x_TD, gates_TK, expert_ids_TK, gate_up_E2FD, down_EDF, act)
        order = sort_by_expert(expert_ids_TK, len(gate_up_E2FD), kept_TK)
        inputs = (x_TD, gates_TK, gate_up_E2FD, down_EDF)
        trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        return cast(Tensor, _ExpertLoop.apply(*inputs, order, kept_TK, act, trains))


def tile_rows(width: int) -> int:
    """Rows of a tile for F = width: few enough that the part of its buffers that each thread works on stays in that
    thread's cache, enough that adding up the weights' gradients over tiles costs little."""
    return (512 if width < 512 else 1024) * torch.get_num_threads()


@dataclass(frozen=True)
class Piece:
    """Rows of one expert inside a tile: its matrix products."""

    expert: int
    rows: slice
    """In the order of all routed rows."""
    local: slice
    """The same rows, counted from the tile's first."""
    first: bool
    """Whether they are the expert's first."""


@dataclass(frozen=True)
class Tile:
    """Rows that are worked on together, of one expert or several small ones: elementwise work is shared."""

    rows: slice
    pieces: list[Piece]

    @property
    def size(self) -> int:
        return self.rows.stop - self.rows.start


def cut_into_tiles(rows_per_expert: list[int], largest: int) -> list[Tile]:
    """All routed rows as tiles of at most `largest` rows; an expert with more rows is cut into equal pieces."""
    tiles: list[Tile] = []
    start = 0
    for expert, count in enumerate(rows_per_expert):
        number = -(-count // largest)
        for i in range(number):
            begin, end = start + count * i // number, start + count * (i + 1) // number
            joins = bool(tiles) and number == 1 and end - tiles[-1].rows.start <= largest
            before = tiles.pop() if joins else Tile(slice(begin, begin), [])
            origin = before.rows.start
            piece = Piece(expert, slice(begin, end), slice(begin - origin, end - origin), i == 0)
            tiles.append(Tile(slice(origin, end), [*before.pieces, piece]))
        start += count
    return tiles


class _ExpertLoop(torch.autograd.Function):
    """All experts, forward and backward. Kept for the backward pass: x (T, D) and the first projection h (R, 2F)."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, gates_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, order: Order,
        kept_TK: Tensor | None, act: Activation, trains: bool,
    ) -> Tensor:  # fmt: skip
        R, (_, D, width) = len(order.token_R), down_EDF.shape
        tiles = cut_into_tiles(order.rows_per_expert, tile_rows(width))
        largest = max((tile.size for tile in tiles), default=0)
        h_R2F = x_TD.new_empty(R if trains else largest, 2 * width)
        y_RD, x_buffer, a_buffer = x_TD.new_empty(R, D), x_TD.new_empty(largest, D), x_TD.new_empty(largest, width)
        for tile in tiles:
            r = tile.size
            x_rD = torch.index_select(x_TD, 0, order.token_R[tile.rows], out=x_buffer[:r])
            h_r2F = h_R2F[tile.rows] if trains else h_R2F[:r]
            for piece in tile.pieces:
                torch.mm(x_rD[piece.local], gate_up_E2FD[piece.expert].t(), out=h_r2F[piece.local])
            a_rF = _activate(act, h_r2F[:, :width], a_buffer[:r]).mul_(h_r2F[:, width:])
            for piece in tile.pieces:
                torch.mm(a_rF[piece.local], down_EDF[piece.expert].t(), out=y_RD[piece.rows])
        if trains:
            ctx.save_for_backward(x_TD, gates_TK, gate_up_E2FD, down_EDF, h_R2F)
            ctx.order, ctx.kept_TK, ctx.act, ctx.tiles = order, kept_TK, act, tiles
        return _weighted_sum(y_RD, order.row_TK, gates_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gates_TK, gate_up_E2FD, down_EDF, h_R2F = ctx.saved_tensors
        order, width = ctx.order, down_EDF.shape[2]
        needs_x, needs_gates, needs_gate_up, needs_down = ctx.needs_input_grad[:4]
        R, D = len(order.token_R), x_TD.shape[1]
        dx_RD = x_TD.new_empty(R, D) if needs_x else None
        dgates_R = gates_TK.new_zeros(R, 1)
        dgate_up = _gradient(gate_up_E2FD, order.rows_per_expert) if needs_gate_up else None
        ddown = _gradient(down_EDF, order.rows_per_expert) if needs_down else None
        gates_R1 = gates_TK.flatten()[order.slot_R][:, None].to(x_TD.dtype)
        largest = max((tile.size for tile in ctx.tiles), default=0)
        rD, rF = (lambda: x_TD.new_empty(largest, D)), (lambda: x_TD.new_empty(largest, width))
        x_buffer, dy_buffer, a_buffer, s_buffer, da_buffer = rD(), rD(), rF(), rF(), rF()
        dh_buffer = x_TD.new_empty(largest, 2 * width)
        for tile in ctx.tiles:
            rows, r = tile.rows, tile.size
            token_r, gates_r1 = order.token_R[rows], gates_R1[rows]
            gate_rF, up_rF = h_R2F[rows, :width], h_R2F[rows, width:]
            dh_r2F = dh_buffer[:r]
            dgate_rF, dup_rF = dh_r2F[:, :width], dh_r2F[:, width:]
            dy_rD = torch.index_select(grad[0], 0, token_r, out=dy_buffer[:r])
            s_rF = _activate(ctx.act, gate_rF, s_buffer[:r])
            a_rF = torch.mul(s_rF, up_rF, out=a_buffer[:r])
            da_rF = da_buffer[:r]  # for a gate of 1
            for piece in tile.pieces:
                torch.mm(dy_rD[piece.local], down_EDF[piece.expert], out=da_rF[piece.local])
            if needs_gates:  # y = g · W a, so dg = dy · W a = (Wᵀ dy) · a
                dgates_R[rows] = torch.mul(da_rF, a_rF, out=dgate_rF).sum(dim=1, keepdim=True, dtype=gates_TK.dtype)
            if ddown is not None:
                _accumulate(ddown, tile, dy_rD.mul_(gates_r1), a_rF)
            if dx_RD is None and dgate_up is None:
                continue
            torch.mul(da_rF.mul_(gates_r1), s_rF, out=dup_rF)
            _activation_gradient(ctx.act, da_rF.mul_(up_rF), gate_rF, dgate_rF)
            if dgate_up is not None:
                x_rD = torch.index_select(x_TD, 0, token_r, out=x_buffer[:r])
                _accumulate(dgate_up, tile, dh_r2F, x_rD)
            if dx_RD is not None:
                for piece in tile.pieces:
                    torch.mm(dh_r2F[piece.local], gate_up_E2FD[piece.expert], out=dx_RD[piece.rows])
        dx = None if dx_RD is None else _weighted_sum(dx_RD, order.row_TK, ctx.kept_TK)
        dgates = dgates_R[order.row_TK.flatten()].view_as(gates_TK) if needs_gates and R else None
        if dgates is not None and ctx.kept_TK is not None:
            dgates = dgates * ctx.kept_TK
        return dx, dgates, dgate_up, ddown, None, None, None, None


def _gradient(weight: Tensor, rows_per_expert: list[int]) -> Tensor:
    """Room for the gradient of stacked weights; zero for experts without rows, which no tile will write."""
    gradient = torch.empty_like(weight)
    for expert, rows in enumerate(rows_per_expert):
        if not rows:
            gradient[expert].zero_()
    return gradient


def _accumulate(total_EMN: Tensor, tile: Tile, left_rM: Tensor, right_rN: Tensor) -> None:
    """Add leftᵀ · right of every expert's rows to its total; the first rows overwrite it."""
    for piece in tile.pieces:
        left, right, total = left_rM[piece.local], right_rN[piece.local], total_EMN[piece.expert]
        if piece.first:
            torch.mm(left.t(), right, out=total)
        else:
            total.addmm_(left.t(), right)


def _weighted_sum(rows_RD: Tensor, row_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """y_TD[t] = Σ_k weights_TK[t, k] · rows_RD[row_TK[t, k]], added up in float32 at least; no weights: all are 1."""
    if not len(rows_RD):  # all were dropped, or there are no tokens
        return rows_RD.new_zeros(len(row_TK), rows_RD.shape[1])
    if rows_RD.dtype in (torch.float32, torch.float64):
        weights_TK = None if weights_TK is None else weights_TK.to(rows_RD.dtype)
        return F.embedding_bag(row_TK, rows_RD, mode="sum", per_sample_weights=weights_TK)
    rows_TKD = rows_RD.index_select(0, row_TK.flatten()).view(*row_TK.shape, -1).float()
    return (rows_TKD if weights_TK is None else rows_TKD * weights_TK[..., None]).sum(dim=1).to(rows_RD.dtype)


def is_silu(act: Activation) -> bool:
    """True for torch's and transformers' SiLU."""
    return act is F.silu or type(act).__name__ in ("SiLU", "SiLUActivation")


def _activate(act: Activation, x: Tensor, out: Tensor) -> Tensor:
    return cast(Tensor, torch.ops.aten.silu.out(x, out=out)) if is_silu(act) else out.copy_(act(x))


def _activation_gradient(act: Activation, grad: Tensor, x: Tensor, out: Tensor) -> None:
    """out = grad · act'(x)."""
    if is_silu(act):
        torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out)
        return
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out.copy_(torch.autograd.grad(act(x), x, grad)[0])


def can_group(x_TD: Tensor, down_EDF: Tensor) -> bool:
    """Whether torch's grouped matrix product takes these tensors: a GPU from SM80 on, 16- or 32-bit numbers, and rows
    aligned to 16 bytes."""
    if x_TD.device.type != "cuda" or x_TD.dtype == torch.float64:
        return False
    if not all(size * x_TD.element_size() % 16 == 0 for size in (x_TD.shape[1], down_EDF.shape[2])):
        return False
    # torch's compiler cannot trace the question: whoever compiles a layer has asked it before.
    return torch.compiler.is_compiling() or torch.cuda.get_device_capability(x_TD.device) >= (8, 0)


def grouped_feed_forward(
    x_TD: Tensor, gates_TK: Tensor, expert_ids_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, act: Activation
) -> Tensor:
    """`feed_forward` with torch's grouped matrix product. Dropped rows are computed, their gate of 0 drops them: that
    saves waiting for their number."""
    (T, K), E = expert_ids_TK.shape, len(gate_up_E2FD)
    ids_R, slot_R = expert_ids_TK.flatten().sort(stable=True)
    row_TK = torch.empty_like(slot_R).scatter_(0, slot_R, torch.arange(T * K, device=slot_R.device)).view(T, K)
    ends_E = torch.searchsorted(ids_R, torch.arange(E, device=ids_R.device), right=True).to(torch.int32)
    x_RD = cast(Tensor, _Gather.apply(x_TD, slot_R // K, row_TK))
    gate_RF, up_RF = F.grouped_mm(x_RD, gate_up_E2FD.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    y_RD = F.grouped_mm(act(gate_RF) * up_RF, down_EDF.transpose(1, 2), offs=ends_E)
    y_RD = y_RD * gates_TK.flatten()[slot_R][:, None]  # in the gates' type, float32
    return cast(Tensor, _Scatter.apply(y_RD, slot_R // K, row_TK)).to(x_TD.dtype)


class _Gather(torch.autograd.Function):
    """x_RD[r] = x_TD[token_R[r]]. The backward pass gathers too, which is faster than scattering."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return x_TD.index_select(0, token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
        (row_TK,) = ctx.saved_tensors
        return _weighted_sum(grad[0], row_TK, None), None, None


class _Scatter(torch.autograd.Function):
    """The transpose of `_Gather`: y_TD[t] = Σ_k y_RD[row_TK[t, k]]."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, token_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(token_R)
        return _weighted_sum(y_RD, row_TK, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
        (token_R,) = ctx.saved_tensors
        return grad[0].index_select(0, token_R), None, None
