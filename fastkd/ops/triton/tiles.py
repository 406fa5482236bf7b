"""Device functions that the attention kernels share: places of a tile, reads of maps and bias tables.

A tile is ROWS x COLUMNS cells of one level, in a row: cell i is (y0 + i // COLUMNS, x0 + i % COLUMNS). Bias and its
gradient are then small: a tile reads ROWS and COLUMNS numbers for a query, not ROWS * COLUMNS.
"""

import triton
import triton.language as tl


@triton.jit
def pick(pointers, level):
    """The pointer of a level (a number known at run time) out of a tuple."""
    chosen = pointers[0]
    for index in tl.static_range(1, len(pointers)):
        chosen = tl.where(level == index, pointers[index], chosen)
    return chosen


@triton.jit
def read_part(table, part):
    """What plan.py wrote about a part: level, first column, first and end row, rows and columns of the level."""
    entry = table + part * 16
    level = tl.load(entry).to(tl.int32)
    x0 = tl.load(entry + 1).to(tl.int32)
    y0 = tl.load(entry + 2).to(tl.int32)
    y1 = tl.load(entry + 3).to(tl.int32)
    height = tl.load(entry + 4).to(tl.int32)
    width = tl.load(entry + 5).to(tl.int32)
    return level, x0, y0, y1, height, width


@triton.jit
def bias_rows(pointers, table, part, level, image, head, query, AXIS: tl.constexpr):
    """Pointers [N] to the queries' rows of a level's bias table of rows (AXIS 0) or columns (AXIS 1)."""
    entry = table + part * 16 + 6 + 3 * AXIS
    begin = tl.load(table + part * 16 + 13 + AXIS)
    start = pick(pointers, level) + begin + image * tl.load(entry) + head * tl.load(entry + 1)
    return start + query.to(tl.int64) * tl.load(entry + 2)


@triton.jit
def column_bias_of(rows, known, x0, width, COLUMNS: tl.constexpr):
    """[N, COLUMNS] of a part's columns, -inf behind the level's last."""
    x = x0 + tl.arange(0, COLUMNS)
    return tl.load(rows[:, None] + x[None, :], mask=known[:, None] & (x < width)[None, :], other=-float("inf"))


@triton.jit
def tile_bias(rows, known, column_bias, y, y1, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[N, ROWS * COLUMNS]: row + column bias of a tile that begins in row y; -inf outside the part."""
    row = y + tl.arange(0, ROWS)
    row_bias = tl.load(rows[:, None] + row[None, :], mask=known[:, None] & (row < y1)[None, :], other=-float("inf"))
    return tl.reshape(row_bias[:, :, None] + column_bias[:, None, :], (rows.shape[0], ROWS * COLUMNS))


@triton.jit
def cells_of(table, part, y, y1):
    """Rows * columns of the part's level, read anew in every tile y: were it known before the loop over tiles,
    compilers would keep channel * cells of all channels of a thread in registers, more than there are.
    """
    return tl.load(table + part * 16 + 12, mask=y < y1, other=0).to(tl.int32)


@triton.jit
def tile_cells(x0, y, y1, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Places [ROWS * COLUMNS] of a tile's cells in the level, and which of them the part has."""
    index = tl.arange(0, ROWS * COLUMNS)
    row, column = y + index // COLUMNS, x0 + index % COLUMNS
    return row * width + column, (row < y1) & (column < width)


@triton.jit
def map_offsets(channel, cell, cells, channels, LAST: tl.constexpr, WIDE: tl.constexpr):
    """Offsets [channel, cell] in one image of a map, channels-last where LAST; WIDE: they need 64 bits."""
    if WIDE:
        channel, cell = channel.to(tl.int64), cell.to(tl.int64)
    return channel[:, None] + cell[None, :] * channels if LAST else channel[:, None] * cells + cell[None, :]


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a b, added up in the type of total."""
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)
