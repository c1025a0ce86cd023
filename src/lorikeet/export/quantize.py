"""Rows of float32 weights -> llama.cpp's quantised blocks, compiled by numba as it runs: no compiler is needed.

    packed = quantize(rows, GGMLQuantizationType.Q4_K, importance=importance)     # (rows, bytes of a row)

A block stores small whole numbers, its codes, and what they are multiplied by. Finding a good multiplier is the work:
every block tries many, keeps the one with the least weighted squared error, and fits multiplier and codes to each other
until the end. Many blocks go side by side, as lanes of the processor's vectors. The order of additions is fixed
and nothing is fused, so the same weights give the same bytes on any machine and any number of threads.

It knows nothing of tensors' names or of files. `mix` says which type a tensor gets.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Doubles = NDArray[np.float64]

PIECE_VALUES = 1 << 17
"""Values that one thread works on at a time: few enough for the caches."""

LANES = 64
"""Blocks that go side by side."""

FLOAT16_MAX = 65_504.0

REFINEMENTS = 3
"""How often the best multiplier of all tries is fitted to its own codes again."""

SMALL_CODES = 6
"""Codes, on both sides of 0, that the value whose error would cost most is tried as."""

ROUNDS = 4
"""How often the codes of a super-block's multipliers and the steps between them are fitted to each other."""

Function = TypeVar("Function", bound=Callable[..., Any])


def _compiled(function: Function) -> Function:
    """Return `function`, compiled when first called and kept for the next process where a folder can be written to."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)  # type: ignore[no-any-return]  # numba is not annotated
    except RuntimeError:  # no place for its cache
        return njit(**options)(function)  # type: ignore[no-any-return]  # numba is not annotated


def quantize(rows: Floats, kind: Kind, *, importance: Floats | None = None, threads: int | None = None) -> Bytes:
    """Return `rows`, shape (rows, columns), as blocks of `kind`: bytes of shape (rows, bytes of a row).

    `importance`, shape (columns,), is the mean of the squared inputs that each column is multiplied with; the error of
    a weight then counts by it. Columns must be a multiple of the block. Raises ValueError for values that are not
    finite or that float16 cannot hold, and for a kind that is not in `KINDS`.
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


# ------------------------------------------------------------------------------------------------- blocks in lanes
#
# Arrays of values have shape (groups, parts, size, LANES): a lane is one block of the format, its parts are what has a
# multiplier of its own. Arrays of multipliers have shape (groups, parts, LANES). ONE and ZERO keep numba in float32.

ZERO, ONE = np.float32(0), np.float32(1)

MAGIC = np.float32(1.5 * 2**23)
"""Added and taken away again it leaves the nearest whole number, halves to even, for what is within four million."""

ALIKE = 1e-12
"""Codes that vary by less than this, relatively, are all the same but for rounding."""


class _Blocks:
    """The blocks of a piece: values and how much the error of each counts."""

    def __init__(self, piece: Floats, importance: Floats | None, *, parts: int, size: int) -> None:
        self.count = piece.size // (parts * size)
        groups = -(-self.count // LANES)
        self.values: Floats = np.zeros((groups, parts, size, LANES), dtype=np.float32)
        self.weights: Floats = np.ones_like(self.values)
        _lay_out(piece, _floored(importance, piece.shape[1]), importance is None, self.values, self.weights)

    def multipliers(self) -> Floats:
        """Return room for one number of each part, shape (groups, parts, LANES)."""
        groups, parts, _, lanes = self.values.shape
        return np.zeros((groups, parts, lanes), dtype=np.float32)

    def codes(self, scale: Floats, offset: Floats, low: int, high: int) -> Bytes:
        """Return the codes of all values, less `low`, for their parts' multipliers and offsets, shape (block, part, size)."""
        codes: Bytes = np.empty(self.values.shape, dtype=np.uint8)
        _encode(self.values, scale, offset, np.float32(low), np.float32(high), codes)
        blocks: Bytes = self.by_block(codes)
        return blocks

    def by_block(self, lanes: Any) -> Any:
        """Return an array whose first axis is the group and last the lane as one whose first axis is the block."""
        return np.moveaxis(lanes, -1, 1).reshape(-1, *lanes.shape[1:-1])[: self.count]


def _floored(importance: Floats | None, columns: int) -> Floats:
    """Return importance in which no column counts for nothing; ones where there is none."""
    if importance is None:
        return np.ones(columns, dtype=np.float32)
    least = max(float(importance.mean()) * 1e-6, float(np.finfo(np.float32).tiny))
    return np.maximum(importance, np.float32(least))


@_compiled
def _lay_out(piece: Floats, importance: Floats, by_size: bool, values: Floats, weights: Floats) -> None:
    """Put the blocks of `piece`, shape (rows, columns), into lanes.

    An error counts by the column's importance: the expected squared change of the output. `by_size`, for where there is
    none, multiplies it by sqrt(s + x**2), s being the mean square of the row: llama.cpp's rule, which keeps large weights
    exact.
    """
    rows, columns = piece.shape
    _, parts, size, _ = values.shape
    per_row = columns // (parts * size)
    for row in range(rows):
        energy = 0.0
        for column in range(columns):
            energy += piece[row, column] * piece[row, column]
        mean = np.float32(energy / columns)
        for block in range(per_row):
            group, lane = (row * per_row + block) // LANES, (row * per_row + block) % LANES
            for part in range(parts):
                first = (block * parts + part) * size
                for place in range(size):
                    value = piece[row, first + place]
                    values[group, part, place, lane] = value
                    size_counts = np.sqrt(mean + value * value) if by_size else ONE
                    weights[group, part, place, lane] = importance[first + place] * size_counts


@_compiled
def _tally(
    x: Floats, w: Floats, inverse: Floats, shift: Floats, low: Any, high: Any, q: Doubles, qq: Doubles, xq: Doubles
) -> None:
    """Round x * inverse + shift to codes and set the weighted sums of code, squared code, and value times code.

    `x` and `w` have shape (size, LANES), the others (LANES,). Sums are float64: one column can be a million times as
    important as the rest.
    """
    for lane in range(LANES):
        q[lane] = qq[lane] = xq[lane] = ZERO
    for place in range(x.shape[0]):
        for lane in range(LANES):
            code = (x[place, lane] * inverse[lane] + shift[lane] + MAGIC) - MAGIC
            code = min(max(code, low), high)
            share = np.float64(w[place, lane]) * code
            q[lane] += share
            qq[lane] += share * code
            xq[lane] += share * x[place, lane]


@_compiled
def _error(x: Floats, w: Floats, inverse: Floats, shift: Floats, high: Any, line: Floats, error: Any) -> None:
    """Set the weighted squared error of line[0] * code - line[1], the code being that of `_tally`.

    Difference by difference: from the sums it would be the small difference of large numbers.
    """
    for lane in range(LANES):
        error[lane] = ZERO
    for place in range(x.shape[0]):
        for lane in range(LANES):
            code = (x[place, lane] * inverse[lane] + shift[lane] + MAGIC) - MAGIC
            off = line[0, lane] * min(max(code, ZERO), high) - line[1, lane] - x[place, lane]
            error[lane] += w[place, lane] * off * off


@_compiled
def _encode(values: Floats, scale: Floats, offset: Floats, low: Any, high: Any, codes: Bytes) -> None:
    """Set the codes of all values, less `low`, for the multipliers and offsets of their parts."""
    groups, parts, size, _ = values.shape
    for group in range(groups):
        for part in range(parts):
            for place in range(size):
                for lane in range(LANES):
                    by = scale[group, part, lane]
                    inverse = ONE / by if by != ZERO else ZERO
                    code = ((values[group, part, place, lane] - offset[group, part, lane]) * inverse + MAGIC) - MAGIC
                    codes[group, part, place, lane] = np.uint8(min(max(code, low), high) - low)


def _half(value: Floats) -> Floats:
    """Return what is left of `value` when it is stored as float16."""
    return np.clip(value, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16).astype(np.float32)


def _float16(values: Floats) -> Bytes:
    """Return values, shape (blocks,), as little-endian float16, shape (blocks, 2)."""
    return np.ascontiguousarray(values, dtype="<f2").view(np.uint8).reshape(-1, 2)


# ------------------------------------------------------------------------------------- one multiplier, codes around 0


@_compiled
def _fit_scales(values: Floats, weights: Floats, low: Any, high: Any, tries: Floats, scale: Floats) -> None:
    """Set the multiplier of each part such that multiplier * code, code from `low` to `high`, is nearest to its values.

    A try t rounds with the multiplier that makes the largest value the code t, and is followed by the multiplier that
    fits those codes best, sum(wxq) / sum(wqq). So is every small code for the value whose loss would cost most: with
    some columns a million times as important as others, all depends on those. The best of all is fitted again.
    """
    groups, parts, size, _ = values.shape
    peak, inverse, shift = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.zeros(LANES, np.float32)
    q, qq, xq = np.empty(LANES), np.empty(LANES), np.empty(LANES)
    best, cost, dearest = np.empty(LANES), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for group in range(groups):
        for part in range(parts):
            x, w, fitted = values[group, part], weights[group, part], scale[group, part]
            for lane in range(LANES):
                peak[lane] = best[lane] = fitted[lane] = cost[lane] = dearest[lane] = ZERO
            for place in range(size):
                for lane in range(LANES):
                    value = x[place, lane]
                    if abs(value) > abs(peak[lane]):
                        peak[lane] = value
                    if w[place, lane] * value * value > cost[lane]:
                        cost[lane], dearest[lane] = w[place, lane] * value * value, value
            for number in range(len(tries) + 2 * SMALL_CODES + REFINEMENTS):
                small = number - len(tries)
                for lane in range(LANES):
                    if small < 0:
                        inverse[lane] = tries[number] / peak[lane] if peak[lane] != ZERO else ZERO
                    elif small < 2 * SMALL_CODES:
                        code = np.float32(small // 2 + 1) if small % 2 else -np.float32(small // 2 + 1)
                        inverse[lane] = code / dearest[lane] if dearest[lane] != ZERO else ZERO
                    else:
                        inverse[lane] = ONE / fitted[lane] if fitted[lane] != ZERO else ZERO
                _tally(x, w, inverse, shift, low, high, q, qq, xq)
                for lane in range(LANES):
                    tried = xq[lane] / qq[lane] if qq[lane] > 0.0 else 0.0
                    if tried * xq[lane] > best[lane]:
                        best[lane], fitted[lane] = tried * xq[lane], tried


def _tries(low: int, high: int, *, around_low: int, around_high: int) -> Floats:
    """Return the codes that the largest value of a block is tried as: most around `low`, some around `high`.

    Below `low` the largest values are cut off; far above it fewer codes are used, which fits weights that lie on a
    coarser grid already.
    """
    first = low * np.linspace(1.2, 0.5, around_low)
    return np.concatenate([first, high * np.linspace(1.2, 0.8, around_high)]).astype(np.float32)


def _symmetric(bits: int) -> Callable[[Floats, Floats | None], Bytes]:
    """Return the encoder of Q4_0 or Q5_0: a float16 multiplier and 32 codes from -2**(bits - 1)."""
    half = 1 << (bits - 1)
    tries = _tries(-half, half - 1, around_low=36, around_high=8)

    def encode(piece: Floats, importance: Floats | None) -> Bytes:
        blocks = _Blocks(piece, importance, parts=1, size=32)
        scale = blocks.multipliers()
        _fit_scales(blocks.values, blocks.weights, np.float32(-half), np.float32(half - 1), tries, scale)
        scale = _half(scale)
        codes = blocks.codes(scale, np.zeros_like(scale), -half, half - 1)[:, 0]
        return np.hstack([_float16(blocks.by_block(scale)[:, 0]), *_split(codes, bits)])

    return encode


def _split(codes: Bytes, bits: int) -> list[Bytes]:
    """Return codes, shape (blocks, 32), as bytes: a 32-bit word of the fifth bits if there are any, then the low four.

    The low bits of code i and of code i + 16 share a byte.
    """
    low = codes & 15
    nibbles: Bytes = (low[:, :16] | low[:, 16:] << 4).astype(np.uint8)
    return [np.packbits(codes >> 4, axis=1, bitorder="little"), nibbles] if bits == 5 else [nibbles]


def _as_llama_cpp(kind: Kind) -> Callable[[Floats, Floats | None], Bytes]:
    """Return the encoder that searches nothing: the largest value of a block sets its scale, llama.cpp's bytes, by `gguf`."""

    def encode(piece: Floats, _: Floats | None) -> Bytes:
        packed: Bytes = quants.quantize(piece, kind)
        return packed

    return encode


def _encode_q4_0(piece: Floats, importance: Floats | None) -> Bytes:
    """Q4_0, searched where there is importance: without it a search lowers the error by a tenth and raises KL to f16 as much.

    Measured in docs/decisions/0004-quantisation.md.
    """
    encode = _as_llama_cpp(Kind.Q4_0) if importance is None else _symmetric(4)
    return encode(piece, importance)


# -------------------------------------------------------------------------- multiplier and offset, codes from 0 upwards


@_compiled
def _fit_lines(
    values: Floats, weights: Floats, high: Any, tries: Floats, below_zero: bool, scale: Floats, offset: Floats
) -> None:
    """Set multiplier and offset of each part such that multiplier * code + offset, code from 0 to `high`, is nearest.

    With `below_zero` the offset is never positive. A try (t, u) gives the smallest value the code u and the largest
    the code t, and is followed by the line that fits those codes best: weighted least squares, or the best multiplier
    without an offset where that may not be. The best of all is fitted to its own codes again.
    """
    groups, parts, size, _ = values.shape
    inverse, shift, best = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES)
    q, qq, xq = np.empty(LANES), np.empty(LANES), np.empty(LANES)
    sum_w, sum_wx = np.empty(LANES), np.empty(LANES)
    lowest, highest = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for group in range(groups):
        for part in range(parts):
            x, w, slope, start = values[group, part], weights[group, part], scale[group, part], offset[group, part]
            for lane in range(LANES):
                lowest[lane] = highest[lane] = x[0, lane]
                sum_w[lane] = sum_wx[lane] = ZERO
            for place in range(size):
                for lane in range(LANES):
                    lowest[lane] = min(lowest[lane], x[place, lane])
                    highest[lane] = max(highest[lane], x[place, lane])
                    sum_w[lane] += w[place, lane]
                    sum_wx[lane] += np.float64(w[place, lane]) * x[place, lane]
            for lane in range(LANES):
                if below_zero:
                    lowest[lane] = min(lowest[lane], ZERO)
                slope[lane], start[lane], best[lane] = ZERO, lowest[lane], -np.inf
            for number in range(len(tries) + REFINEMENTS):
                for lane in range(LANES):
                    if number < len(tries):
                        spread = highest[lane] - lowest[lane]
                        inverse[lane] = (tries[number, 0] - tries[number, 1]) / spread if spread > ZERO else ZERO
                        shift[lane] = tries[number, 1] - lowest[lane] * inverse[lane]
                    else:
                        inverse[lane] = ONE / slope[lane] if slope[lane] > ZERO else ZERO
                        shift[lane] = -start[lane] * inverse[lane]
                _tally(x, w, inverse, shift, ZERO, high, q, qq, xq)
                for lane in range(LANES):
                    area = sum_w[lane] * qq[lane] - q[lane] * q[lane]
                    tried = 0.0
                    if area > ALIKE * sum_w[lane] * qq[lane]:
                        tried = (sum_w[lane] * xq[lane] - sum_wx[lane] * q[lane]) / area
                    at = (sum_wx[lane] - tried * q[lane]) / sum_w[lane]
                    if below_zero and at > ZERO:
                        at, tried = 0.0, (xq[lane] / qq[lane] if qq[lane] > 0.0 else 0.0)
                    gain = tried * xq[lane] + at * sum_wx[lane]
                    if gain > best[lane]:
                        best[lane], slope[lane], start[lane] = gain, tried, at


def _spreads(high: int) -> Floats:
    """Return the pairs of codes that the largest and the smallest value of a block are tried as, shape (tries, 2)."""
    tops = [(high + change, 0.0) for change in np.linspace(-1.2, 1.2, 25)]
    both = [(high + change, -change) for change in (-0.5, -0.25, 0.15, 0.3, 0.45, 0.6)]
    return np.array([*tops, *both], dtype=np.float32)


def _with_offset(bits: int) -> Callable[[Floats, Floats | None], Bytes]:
    """Return the encoder of Q4_1 or Q5_1: float16 multiplier and offset, and 32 codes from 0."""
    high = (1 << bits) - 1
    tries = _spreads(high)

    def encode(piece: Floats, importance: Floats | None) -> Bytes:
        blocks = _Blocks(piece, importance, parts=1, size=32)
        scale, offset = blocks.multipliers(), blocks.multipliers()
        _fit_lines(blocks.values, blocks.weights, np.float32(high), tries, False, scale, offset)
        scale, offset = _half(scale), _half(offset)
        codes = blocks.codes(scale, offset, 0, high)[:, 0]
        numbers = [_float16(blocks.by_block(each)[:, 0]) for each in (scale, offset)]
        return np.hstack([*numbers, *_split(codes, bits)])

    return encode


# ---------------------------------------------------------------------------------------- super-blocks: 256 to a block


def _super_with_offset(bits: int) -> Callable[[Floats, Floats | None], Bytes]:
    """Return the encoder of Q4_K or Q5_K: eight parts of 32, whose multipliers and offsets are six-bit codes again."""
    high = (1 << bits) - 1
    tries = _spreads(high)

    def encode(piece: Floats, importance: Floats | None) -> Bytes:
        blocks = _Blocks(piece, importance, parts=8, size=32)
        scale, offset = blocks.multipliers(), blocks.multipliers()
        _fit_lines(blocks.values, blocks.weights, np.float32(high), tries, True, scale, offset)
        steps, six_bit = _fit_super(blocks, high, scale, -offset)
        codes = blocks.codes(steps[0][:, np.newaxis] * six_bit[0], -steps[1][:, np.newaxis] * six_bit[1], 0, high)
        low = codes & 15
        parts = [_float16(blocks.by_block(step)) for step in steps]
        parts.append(_six_bits(*(blocks.by_block(each).astype(np.uint8) for each in six_bit)))
        if bits == 5:
            parts.append(np.packbits(codes >> 4, axis=1, bitorder="little")[:, 0])
        return np.hstack([*parts, (low[:, 0::2] | low[:, 1::2] << 4).reshape(-1, 128)])

    return encode


def _fit_super(blocks: _Blocks, high: int, scale: Floats, depth: Floats) -> tuple[list[Floats], list[Floats]]:
    """Return the steps of multipliers and of offsets, shape (groups, LANES), and their six-bit codes, (groups, 8, LANES).

    `scale` and `depth`, how far below zero each part starts, are what the parts would take by themselves. In turns, each
    part takes the best of its neighbouring codes, and the two steps are fitted to all 256 values.
    """
    steps = [_half(each.max(axis=1) / 63) for each in (scale, depth)]
    six_bit = [_nearest_code(each, step) for each, step in zip((scale, depth), steps, strict=True)]
    for _ in range(ROUNDS):
        fitted = [step.copy() for step in steps]
        _improve_super(blocks.values, blocks.weights, np.float32(high), *steps, *six_bit, *fitted)
        steps = [_half(each) for each in fitted]
    return steps, six_bit


def _nearest_code(value: Floats, step: Floats) -> Floats:
    """Return the six-bit codes of values, shape (groups, parts, LANES), in steps of shape (groups, LANES)."""
    by = np.broadcast_to(step[:, np.newaxis], value.shape)
    return np.clip(np.rint(np.divide(value, by, out=np.zeros_like(value), where=by != 0)), 0, 63)


@_compiled
def _improve_super(
    values: Floats,
    weights: Floats,
    high: Any,
    scale_step: Floats,
    depth_step: Floats,
    scale_codes: Floats,
    depth_codes: Floats,
    fitted_scale: Floats,
    fitted_depth: Floats,
) -> None:
    """Better the six-bit codes in place for given steps, and set the steps that then fit the values of 256 best.

    For a multiplier's code one less, the same and one more, values are rounded and the best offset's code for them is
    taken. The steps solve the two-by-two least squares of value = scale_step * (sc * q) - depth_step * dc.
    """
    groups, parts, size, _ = values.shape
    inverse, shift, least = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    q, qq, xq = np.empty(LANES), np.empty(LANES), np.empty(LANES)
    sum_w, sum_wx = np.empty(LANES), np.empty(LANES)
    kept, tried, error = np.empty((5, LANES)), np.empty((4, LANES), np.float32), np.empty(LANES, np.float32)
    normal = np.empty((5, LANES))
    for group in range(groups):
        normal[:] = ZERO
        for part in range(parts):
            x, w = values[group, part], weights[group, part]
            sum_w[:] = ZERO
            sum_wx[:] = ZERO
            for place in range(size):
                for lane in range(LANES):
                    sum_w[lane] += w[place, lane]
                    sum_wx[lane] += np.float64(w[place, lane]) * x[place, lane]
            least[:] = np.float32(np.inf)
            for change in (0, -1, 1):
                for lane in range(LANES):
                    code = scale_codes[group, part, lane] + np.float32(change)
                    scale = scale_step[group, lane] * min(max(code, ZERO), np.float32(63))
                    inverse[lane] = ONE / scale if scale > ZERO else ZERO
                    shift[lane] = depth_step[group, lane] * depth_codes[group, part, lane] * inverse[lane]
                _tally(x, w, inverse, shift, ZERO, high, q, qq, xq)
                for lane in range(LANES):
                    code = min(max(scale_codes[group, part, lane] + np.float32(change), ZERO), np.float32(63))
                    scale, step = scale_step[group, lane] * code, depth_step[group, lane]
                    below = ZERO
                    if step > ZERO:
                        below = (np.float32((scale * q[lane] - sum_wx[lane]) / (sum_w[lane] * step)) + MAGIC) - MAGIC
                        below = min(max(below, ZERO), np.float32(63))
                    depth = step * below
                    tried[0, lane], tried[1, lane], tried[2, lane], tried[3, lane] = scale, depth, code, below
                _error(x, w, inverse, shift, high, tried, error)
                for lane in range(LANES):
                    if error[lane] < least[lane]:
                        least[lane], code, below = error[lane], tried[2, lane], tried[3, lane]
                        kept[0, lane], kept[1, lane] = code, below
                        kept[2, lane], kept[3, lane], kept[4, lane] = q[lane], qq[lane], xq[lane]
            for lane in range(LANES):
                code, below = kept[0, lane], kept[1, lane]
                scale_codes[group, part, lane], depth_codes[group, part, lane] = code, below
                normal[0, lane] += code * code * kept[3, lane]
                normal[1, lane] += code * below * kept[2, lane]
                normal[2, lane] += below * below * sum_w[lane]
                normal[3, lane] += code * kept[4, lane]
                normal[4, lane] += below * sum_wx[lane]
        for lane in range(LANES):
            aa, ab, bb, ax, bx = normal[0, lane], normal[1, lane], normal[2, lane], normal[3, lane], normal[4, lane]
            area = aa * bb - ab * ab
            if area > ALIKE * aa * bb:
                scale, depth = (ax * bb - ab * bx) / area, (ab * ax - aa * bx) / area
            else:
                depth = depth_step[group, lane]
                scale = (ax + depth * ab) / aa if aa > ZERO else ZERO
            if scale > ZERO and depth >= ZERO:
                fitted_scale[group, lane], fitted_depth[group, lane] = scale, depth


def _six_bits(scales: Bytes, depths: Bytes) -> Bytes:
    """Return eight codes of multipliers and eight of offsets, shape (blocks, 8) each, in Q4_K's twelve bytes.

    The first four of each take the low six bits of four bytes; of the last four, the low halves share four more bytes
    and the two high bits go on top of the first eight.
    """
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = depths[:, :4] | (depths[:, 4:] >> 4) << 6
    third = (scales[:, 4:] & 15) | (depths[:, 4:] & 15) << 4
    return np.hstack([first, second, third])


Q6_TRIES = _tries(-32, 31, around_low=24, around_high=4)


def _encode_q6_k(piece: Floats, importance: Floats | None) -> Bytes:
    """Q6_K: sixteen parts of 16 with codes from -32, whose multipliers are signed eight-bit codes of one step."""
    blocks = _Blocks(piece, importance, parts=16, size=16)
    scale = blocks.multipliers()
    _fit_scales(blocks.values, blocks.weights, np.float32(-32), np.float32(31), Q6_TRIES, scale)
    peak: Floats = np.take_along_axis(scale, np.abs(scale).argmax(axis=1)[:, np.newaxis], axis=1)[:, 0]
    step = _half(peak / np.float32(-128))
    codes = np.zeros_like(scale)
    for _ in range(ROUNDS):
        fitted = step.copy()
        _improve_scaled(blocks.values, blocks.weights, scale, step, codes, fitted)
        step = _half(fitted)
    whole = blocks.codes(step[:, np.newaxis] * codes, np.zeros_like(scale), -32, 31).reshape(-1, 2, 4, 32)
    low = (whole[:, :, :2] & 15) | (whole[:, :, 2:] & 15) << 4
    top = whole >> 4
    high = top[:, :, 0] | top[:, :, 1] << 2 | top[:, :, 2] << 4 | top[:, :, 3] << 6
    multipliers = blocks.by_block(codes).astype(np.int8).view(np.uint8)
    return np.hstack([low.reshape(-1, 128), high.reshape(-1, 64), multipliers, _float16(blocks.by_block(step))])


@_compiled
def _improve_scaled(
    values: Floats, weights: Floats, scale: Floats, step: Floats, codes: Floats, fitted: Floats
) -> None:
    """Set the eight-bit codes of multipliers `scale` for a given step, and the step that then fits all 256 values best."""
    groups, parts, _, _ = values.shape
    inverse, shift = np.empty(LANES, np.float32), np.zeros(LANES, np.float32)
    q, qq, xq = np.empty(LANES), np.empty(LANES), np.empty(LANES)
    above, below = np.empty(LANES), np.empty(LANES)
    for group in range(groups):
        above[:] = ZERO
        below[:] = ZERO
        for part in range(parts):
            for lane in range(LANES):
                by, code = step[group, lane], ZERO
                if by != ZERO:
                    code = (scale[group, part, lane] / by + MAGIC) - MAGIC
                    code = min(max(code, np.float32(-128)), np.float32(127))
                codes[group, part, lane] = code
                inverse[lane] = ONE / (by * code) if by * code != ZERO else ZERO
            _tally(
                values[group, part], weights[group, part], inverse, shift, np.float32(-32), np.float32(31), q, qq, xq
            )
            for lane in range(LANES):
                above[lane] += codes[group, part, lane] * xq[lane]
                below[lane] += codes[group, part, lane] * codes[group, part, lane] * qq[lane]
        for lane in range(LANES):
            if below[lane] > ZERO:
                fitted[group, lane] = above[lane] / below[lane]


_ENCODERS: dict[Kind, Callable[[Floats, Floats | None], Bytes]] = {
    Kind.Q8_0: _as_llama_cpp(Kind.Q8_0),
    Kind.Q6_K: _encode_q6_k,
    Kind.Q5_K: _super_with_offset(5),
    Kind.Q5_1: _with_offset(5),
    Kind.Q5_0: _symmetric(5),
    Kind.Q4_K: _super_with_offset(4),
    Kind.Q4_1: _with_offset(4),
    Kind.Q4_0: _encode_q4_0,
}

KINDS = tuple(_ENCODERS)
"""What can be written, from the most bits to the fewest."""
