"""Rows of float32 weights -> llama.cpp's quantised blocks, in numpy: nothing to compile, nothing to install.

    packed = quantize(rows, GGMLQuantizationType.Q4_K, importance=importance)     # (rows, bytes of a row)

A block stores small integers and what they are multiplied by. Finding a good multiplier is the work: each block tries
several, keeps the one with the least weighted squared error, and then fits multipliers and integers to each other.
Blocks lie in columns here, values (block, blocks), so that every step is a pass over long contiguous rows, and a piece
of the tensor is small enough to stay in a core's cache. Only correctly rounded operations in a fixed order are used:
the same weights give the same bytes on any machine and any number of threads.

It knows nothing of tensors' names or of files. `mix` says which type a tensor gets.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

PIECE_VALUES = 1 << 15
"""Values that one thread works on at a time: with the scratch space beside them they fit a core's second-level cache."""

FLOAT16_MAX = 65_504.0


def quantize(rows: Floats, kind: Kind, *, importance: Floats | None = None, threads: int | None = None) -> Bytes:
    """Return `rows`, shape (rows, columns), as blocks of `kind`: bytes of shape (rows, bytes of a row).

    `importance`, shape (columns,), is the mean of the squared inputs that each column is multiplied with; the error of
    a weight then counts by it. Columns must be a multiple of the block. Raises ValueError for values that are not
    finite or that no block can hold, and for a kind that is not in `KINDS`.
    """
    if kind not in _ENCODERS:
        raise ValueError(f"{kind.name} cannot be written; known are {', '.join(k.name for k in KINDS)}")
    block, width = GGML_QUANT_SIZES[kind]
    count, columns = rows.shape
    if columns % block:
        raise ValueError(f"rows of {columns} are no whole number of {kind.name} blocks of {block}")
    packed: Bytes = np.empty((count, columns // block * width), dtype=np.uint8)
    step = max(1, PIECE_VALUES // columns)

    def encode(start: int) -> None:
        piece = np.ascontiguousarray(rows[start : start + step], dtype=np.float32)
        check_finite(piece)
        packed[start : start + step] = _ENCODERS[kind](piece, importance).reshape(len(piece), -1)

    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        for done in [pool.submit(encode, start) for start in range(0, count, step)]:
            done.result()
    return packed


def check_finite(values: Floats) -> None:
    """Raise ValueError if a value is not finite, or larger than float16 holds."""
    largest = max(abs(float(values.max())), abs(float(values.min())))
    if not np.isfinite(largest):
        raise ValueError("a value that is not finite")
    if largest > FLOAT16_MAX:
        raise ValueError(f"a value of {largest:.3g}, more than float16 holds")


# ------------------------------------------------------------------------------------------------ blocks and weights


class _Blocks:
    """Blocks in columns: values and the weights of their errors, shape (block, blocks), with room to try codes in."""

    def __init__(self, piece: Floats, size: int, importance: Floats | None) -> None:
        self.values = _columns(piece, size)
        self.weights = _error_weights(piece, size, importance, self.values)
        self.weighted = self.weights * self.values
        self.codes = np.empty_like(self.values)
        self._room = np.empty_like(self.values)
        self.sum_w = self.weights.sum(axis=0)
        self.sum_wx = self.weighted.sum(axis=0)
        self.sum_wxx = np.multiply(self.weighted, self.values, out=self._room).sum(axis=0)

    def round(self, inverse: Floats, offset: Floats | None, low: float, high: float) -> None:
        """Set `codes` to the nearest whole numbers to values * inverse + offset, held within `low` and `high`."""
        np.multiply(self.values, inverse, out=self.codes)
        if offset is not None:
            np.add(self.codes, offset, out=self.codes)
        np.rint(self.codes, out=self.codes)
        np.clip(self.codes, low, high, out=self.codes)

    def sums(self, *, plain: bool = True) -> tuple[Floats, Floats, Floats]:
        """Return the weighted sums of code (zeros unless `plain`), squared code, and value times code of each block."""
        sum_xq = _sum(np.multiply(self.weighted, self.codes, out=self._room))
        room = np.multiply(self.weights, self.codes, out=self._room)
        sum_q = _sum(room) if plain else np.zeros_like(sum_xq)
        return sum_q, _sum(np.multiply(room, self.codes, out=room)), sum_xq


def _sum(room: Floats) -> Floats:
    """Return the sum of every column."""
    total: Floats = np.add.reduce(room, axis=0)
    return total


def _columns(piece: Floats, size: int) -> Floats:
    """Return the blocks of `piece` as columns, shape (size, blocks)."""
    return np.ascontiguousarray(piece.reshape(-1, size).T)


def _error_weights(piece: Floats, size: int, importance: Floats | None, values: Floats) -> Floats:
    """Return how much the error of each value counts, shape (size, blocks).

    Without importance every error counts the same. With it, the importance of the column times sqrt(s + x**2), s being
    the row's mean square: llama.cpp's rule, which keeps large weights of a row exact beyond what the importance says.
    """
    if importance is None:
        return np.ones_like(values)
    rows = len(piece)
    floor = max(float(importance.mean()) * 1e-6, float(np.finfo(np.float32).tiny))
    by_column = np.maximum(importance, np.float32(floor)).reshape(-1, size).T
    energy = np.repeat(np.mean(np.square(piece), axis=1), piece.shape[1] // size)
    return np.asarray(np.tile(by_column, rows) * np.sqrt(np.square(values) + energy), dtype=np.float32)


def _ratio(above: Floats, below: Floats) -> Floats:
    """Return above / below, and 0 where below is 0."""
    return np.divide(above, below, out=np.zeros_like(above), where=below != 0)


def _half(value: Floats) -> Floats:
    """Return what is left of `value` when it is stored as float16."""
    return np.clip(value, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16).astype(np.float32)


# ------------------------------------------------------------------------------------- one multiplier, codes around 0


def _fit_scale(blocks: _Blocks, low: int, high: int, tries: Sequence[float]) -> Floats:
    """Return the multiplier of each block, shape (blocks,), such that multiplier * code is nearest to its values.

    Codes are whole numbers from `low` to `high`. A try t rounds with the multiplier that makes the largest value the
    code t, and is followed by the multiplier that fits those codes best, sum(wxq) / sum(wqq); the best of all is then
    refined by rounding with itself.
    """
    values = blocks.values
    peak = values[np.abs(values).argmax(axis=0), np.arange(values.shape[1])]
    per_peak = _ratio(np.ones_like(peak), peak)
    scale, best = np.zeros_like(peak), np.zeros_like(peak)

    def attempt(inverse: Floats) -> None:
        blocks.round(inverse, None, low, high)
        _, sum_qq, sum_xq = blocks.sums(plain=False)
        fitted = _ratio(sum_xq, sum_qq)
        gain = fitted * sum_xq
        better = gain > best
        np.copyto(best, gain, where=better)
        np.copyto(scale, fitted, where=better)

    for code in tries:
        attempt(np.float32(code) * per_peak)
    for _ in range(REFINEMENTS):
        attempt(_ratio(np.ones_like(scale), scale))
    return scale


REFINEMENTS = 2


def _tries(low: int, high: int, count: int, opposite: int) -> tuple[float, ...]:
    """Return the codes that the largest value of a block is tried as: around `low`, and around `high` as well."""
    wide = [low * (1.4 - 0.6 * step / (count - 1)) for step in range(count)]
    other = [high * (1.1 - 0.2 * step / max(1, opposite - 1)) for step in range(opposite)]
    return (*wide, *other)


def _symmetric(bits: int) -> Callable[[Floats, Floats | None], Bytes]:
    """Return the encoder of Q4_0 or Q5_0: float16 multiplier, codes from -2**(bits - 1), 32 to a block."""
    half = 1 << (bits - 1)
    tries = _tries(-half, half - 1, 18, 3)

    def encode(piece: Floats, importance: Floats | None) -> Bytes:
        blocks = _Blocks(piece, 32, importance)
        scale = _half(_fit_scale(blocks, -half, half - 1, tries))
        blocks.round(_ratio(np.ones_like(scale), scale), None, -half, half - 1)
        codes = (blocks.codes + half).astype(np.uint8)
        return np.hstack([_float16(scale), *_split(codes, bits)])

    return encode


def _split(codes: Bytes, bits: int) -> list[Bytes]:
    """Return codes, shape (32, blocks), as bytes: the fifth bits as one 32-bit word if there are any, then the low four.

    The low bits of code i and of code i + 16 share a byte.
    """
    low = codes & 15
    nibbles = (low[:16] | low[16:] << 4).T
    return [_fifth_bits(codes), nibbles] if bits == 5 else [nibbles]


def _fifth_bits(codes: Bytes) -> Bytes:
    return np.packbits((codes >> 4).T.astype(bool), axis=1, bitorder="little")


def _float16(values: Floats) -> Bytes:
    """Return values, shape (blocks,), as little-endian float16, shape (blocks, 2)."""
    return values.astype("<f2").view(np.uint8).reshape(-1, 2)


def _encode_q8_0(piece: Floats, _: Floats | None) -> Bytes:
    """Q8_0: the largest value of a block is code 127. No search: llama.cpp's bytes, by the `gguf` package."""
    packed: Bytes = quants.quantize(piece, Kind.Q8_0)
    return packed


# -------------------------------------------------------------------------- multiplier and offset, codes from 0 upwards


def _fit_line(blocks: _Blocks, high: int, tries: Sequence[float], *, below_zero: bool) -> tuple[Floats, Floats]:
    """Return multiplier and offset of each block such that multiplier * code + offset is nearest to its values.

    Codes are whole numbers from 0 to `high`; with `below_zero` the offset is never positive. A try t spreads the values
    over the codes from 0 to t, and is followed by the line that fits those codes best; the best of all is then refined
    by rounding with itself.
    """
    lowest, highest = blocks.values.min(axis=0), blocks.values.max(axis=0)
    if below_zero:
        lowest = np.minimum(lowest, 0)
    per_spread = _ratio(np.ones_like(lowest), highest - lowest)
    scale, offset = np.zeros_like(lowest), lowest.copy()
    best = np.full_like(lowest, -np.inf)

    def attempt(inverse: Floats, start: Floats) -> None:
        blocks.round(inverse, -start * inverse, 0, high)
        slope, at, gain = _line(blocks, below_zero=below_zero)
        better = gain > best
        for kept, new in ((best, gain), (scale, slope), (offset, at)):
            np.copyto(kept, new, where=better)

    for code in tries:
        attempt(np.float32(code) * per_spread, lowest)
    for _ in range(REFINEMENTS):
        attempt(_ratio(np.ones_like(scale), scale), offset)
    return scale, offset


def _line(blocks: _Blocks, *, below_zero: bool) -> tuple[Floats, Floats, Floats]:
    """Return slope and offset that fit the codes of each block best, and by how much they lessen the error from sum(wxx).

    Weighted least squares; where the offset would be positive and may not be, the best slope through 0.
    """
    sum_q, sum_qq, sum_xq = blocks.sums()
    spread = blocks.sum_w * sum_qq - np.square(sum_q)
    spread[spread <= np.float32(1e-6) * blocks.sum_w * sum_qq] = 0  # all codes are the same
    slope = _ratio(blocks.sum_w * sum_xq - blocks.sum_wx * sum_q, spread)
    offset = _ratio(blocks.sum_wx - slope * sum_q, blocks.sum_w)
    if below_zero:
        slope = np.where(offset > 0, _ratio(sum_xq, sum_qq), slope)
        offset = np.minimum(offset, 0)
    return slope, offset, slope * sum_xq + offset * blocks.sum_wx


def _with_offset(bits: int) -> Callable[[Floats, Floats | None], Bytes]:
    """Return the encoder of Q4_1 or Q5_1: float16 multiplier and offset, codes from 0, 32 to a block."""
    high = (1 << bits) - 1

    def encode(piece: Floats, importance: Floats | None) -> Bytes:
        blocks = _Blocks(piece, 32, importance)
        scale, offset = _fit_line(blocks, high, _spreads(high), below_zero=False)
        scale, offset = _half(scale), _half(offset)
        inverse = _ratio(np.ones_like(scale), scale)
        blocks.round(inverse, -offset * inverse, 0, high)
        return np.hstack([_float16(scale), _float16(offset), *_split(blocks.codes.astype(np.uint8), bits)])

    return encode


def _spreads(high: int) -> tuple[float, ...]:
    """Return over how many codes the values of a block are tried to be spread."""
    return tuple(high + 0.2 * step for step in range(-5, 6))


# ---------------------------------------------------------------------------------------- super-blocks: 256 to a block


def _super_with_offset(bits: int) -> Callable[[Floats, Floats | None], Bytes]:
    """Return the encoder of Q4_K or Q5_K: eight blocks of 32, whose multipliers and offsets are six-bit codes again."""
    high = (1 << bits) - 1

    def encode(piece: Floats, importance: Floats | None) -> Bytes:
        blocks = _Blocks(piece, 32, importance)
        scale, offset = _fit_line(blocks, high, _spreads(high), below_zero=True)
        steps, scale_codes, offset_codes = _fit_super(blocks, high, scale, -offset)
        _round_super(blocks, high, steps, scale_codes, offset_codes)
        codes = blocks.codes.astype(np.uint8).reshape(32, -1, 8)
        low = codes & 15
        nibbles = (low[:, :, 0::2] | low[:, :, 1::2] << 4).transpose(1, 2, 0).reshape(-1, 128)
        parts = [_float16(steps[0]), _float16(steps[1]), _six_bits(scale_codes, offset_codes)]
        if bits == 5:
            parts.append(np.packbits((codes >> 4).astype(bool), axis=2, bitorder="little")[:, :, 0].T)
        return np.hstack([*parts, nibbles])

    return encode


Steps = tuple[Floats, Floats]
"""What the codes of multipliers and of offsets are multiplied by, each of shape (super-blocks,)."""


def _fit_super(blocks: _Blocks, high: int, scale: Floats, depth: Floats) -> tuple[Steps, Floats, Floats]:
    """Return the steps and the six-bit codes of multipliers and offsets, shape (super-blocks, 8), for given best values.

    `depth` is how far below zero each block starts. In turns: each block takes the best of its neighbouring codes, with
    its values rounded again; then the two steps are fitted to all 256 values.
    """
    scale, depth = scale.reshape(-1, 8), depth.reshape(-1, 8)
    steps = (_half(scale.max(axis=1) / 63), _half(depth.max(axis=1) / 63))
    scale_codes = _nearest_code(scale, steps[0][:, np.newaxis])
    offset_codes = _nearest_code(depth, steps[1][:, np.newaxis])
    for _ in range(ROUNDS):
        scale_codes, offset_codes, sums = _best_neighbours(blocks, high, steps, scale_codes, offset_codes)
        steps = _fit_steps(blocks, steps, scale_codes, offset_codes, sums)
    return steps, scale_codes, offset_codes


ROUNDS = 2


def _nearest_code(value: Floats, step: Floats) -> Floats:
    return np.clip(np.rint(_ratio(value, np.broadcast_to(step, value.shape))), 0, 63)


def _round_super(blocks: _Blocks, high: int, steps: Steps, scale_codes: Floats, offset_codes: Floats) -> Floats:
    """Round the values with the multipliers and offsets that the codes stand for, and return the multipliers (blocks,)."""
    scale = (steps[0][:, np.newaxis] * scale_codes).reshape(-1)
    depth = (steps[1][:, np.newaxis] * offset_codes).reshape(-1)
    inverse = _ratio(np.ones_like(scale), scale)
    blocks.round(inverse, depth * inverse, 0, high)
    return scale


def _best_neighbours(
    blocks: _Blocks, high: int, steps: Steps, scale_codes: Floats, offset_codes: Floats
) -> tuple[Floats, Floats, tuple[Floats, Floats, Floats]]:
    """Return better codes of multipliers and offsets, and the sums of the values' codes that go with them.

    For a multiplier one less, the same and one more, values are rounded and the best offset code for them is taken.
    """
    step = np.repeat(steps[1], 8)
    least = np.full_like(step, np.inf)
    found = [np.empty_like(step) for _ in range(5)]
    for change in (0, -1, 1):
        tried = np.clip(scale_codes + np.float32(change), 0, 63)
        scale = _round_super(blocks, high, steps, tried, offset_codes)
        sum_q, sum_qq, sum_xq = blocks.sums()
        wanted = _ratio(scale * sum_q - blocks.sum_wx, blocks.sum_w)
        offset_code = _nearest_code(np.maximum(wanted, 0), step)
        depth = step * offset_code
        error = scale * (scale * sum_qq - 2 * sum_xq - 2 * depth * sum_q)
        error += depth * (2 * blocks.sum_wx + depth * blocks.sum_w)
        better = error < least
        np.copyto(least, error, where=better)
        for kept, new in zip(found, (tried.reshape(-1), offset_code, sum_q, sum_qq, sum_xq), strict=True):
            np.copyto(kept, new, where=better)
    return found[0].reshape(-1, 8), found[1].reshape(-1, 8), (found[2], found[3], found[4])


def _fit_steps(
    blocks: _Blocks, steps: Steps, scale_codes: Floats, offset_codes: Floats, sums: tuple[Floats, Floats, Floats]
) -> Steps:
    """Return the steps, as float16 holds them, that fit all values of a super-block best: two-by-two least squares."""
    sum_q, sum_qq, sum_xq = (part.reshape(-1, 8) for part in sums)
    aa = (np.square(scale_codes) * sum_qq).sum(axis=1)
    ab = (scale_codes * offset_codes * sum_q).sum(axis=1)
    bb = (np.square(offset_codes) * blocks.sum_w.reshape(-1, 8)).sum(axis=1)
    ax = (scale_codes * sum_xq).sum(axis=1)
    bx = (offset_codes * blocks.sum_wx.reshape(-1, 8)).sum(axis=1)
    area = aa * bb - np.square(ab)
    area[area <= np.float32(1e-6) * aa * bb] = 0
    scale = np.where(area > 0, _ratio(ax * bb - ab * bx, area), _ratio(ax + steps[1] * ab, aa))
    offset = np.where(area > 0, _ratio(ab * ax - aa * bx, area), steps[1])
    kept = (scale > 0) & (offset >= 0)
    return _half(np.where(kept, scale, steps[0])), _half(np.where(kept, offset, steps[1]))


def _six_bits(scale_codes: Floats, offset_codes: Floats) -> Bytes:
    """Return eight multiplier and eight offset codes, shape (super-blocks, 8) each, in the twelve bytes of Q4_K and Q5_K.

    The first four of each take the low six bits of four bytes; of the last four, the low halves share four more bytes
    and the two high bits go on top of the first eight.
    """
    scales, offsets = scale_codes.astype(np.uint8), offset_codes.astype(np.uint8)
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = offsets[:, :4] | (offsets[:, 4:] >> 4) << 6
    third = (scales[:, 4:] & 15) | (offsets[:, 4:] & 15) << 4
    return np.hstack([first, second, third])


def _encode_q6_k(piece: Floats, importance: Floats | None) -> Bytes:
    """Q6_K: sixteen blocks of 16 with codes from -32, whose multipliers are signed eight-bit codes."""
    blocks = _Blocks(piece, 16, importance)
    scale = _fit_scale(blocks, -32, 31, _tries(-32, 31, 12, 0)).reshape(-1, 16)
    peak = np.take_along_axis(scale, np.abs(scale).argmax(axis=1, keepdims=True), axis=1)[:, 0]
    step = _half(peak / -128)
    for _ in range(ROUNDS):
        codes = np.clip(np.rint(_ratio(scale, np.broadcast_to(step[:, np.newaxis], scale.shape))), -128, 127)
        _round_scaled(blocks, step, codes)
        _, sum_qq, sum_xq = blocks.sums(plain=False)
        above = (codes * sum_xq.reshape(-1, 16)).sum(axis=1)
        step = _half(_ratio(above, (np.square(codes) * sum_qq.reshape(-1, 16)).sum(axis=1)))
    _round_scaled(blocks, step, codes)
    whole = (blocks.codes + 32).astype(np.uint8).reshape(16, -1, 16).transpose(1, 2, 0).reshape(-1, 2, 4, 32)
    low = (whole[:, :, :2] & 15) | (whole[:, :, 2:] & 15) << 4
    top = whole >> 4
    high = top[:, :, 0] | top[:, :, 1] << 2 | top[:, :, 2] << 4 | top[:, :, 3] << 6
    scales = codes.astype(np.int8).view(np.uint8)
    return np.hstack([low.reshape(-1, 128), high.reshape(-1, 64), scales, _float16(step)])


def _round_scaled(blocks: _Blocks, step: Floats, codes: Floats) -> None:
    scale = (step[:, np.newaxis] * codes).reshape(-1)
    blocks.round(_ratio(np.ones_like(scale), scale), None, -32, 31)


_ENCODERS: dict[Kind, Callable[[Floats, Floats | None], Bytes]] = {
    Kind.Q8_0: _encode_q8_0,
    Kind.Q6_K: _encode_q6_k,
    Kind.Q5_K: _super_with_offset(5),
    Kind.Q5_1: _with_offset(5),
    Kind.Q5_0: _symmetric(5),
    Kind.Q4_K: _super_with_offset(4),
    Kind.Q4_1: _with_offset(4),
    Kind.Q4_0: _symmetric(4),
}

KINDS = tuple(_ENCODERS)
"""What can be written, from the most bits to the fewest."""
