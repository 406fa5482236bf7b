"""Device functions shared by the attention kernels: cell indices of a tile, loads of maps and bias tables.

A tile is ROWS x COLUMNS cells of one level, flattened: cell i is (y0 + i // COLUMNS, x0 + i % COLUMNS). So a tile needs
ROWS + COLUMNS bias values per query, not ROWS * COLUMNS.
"""

import triton
import triton.language as tl


@triton.jit
def pick(pointers, level):
    """The pointer at a run-time index `level` of a tuple."""
    chosen = pointers[0]
    for index in tl.static_range(1, len(pointers)):
        chosen = tl.where(level == index, pointers[index], chosen)
    return chosen


@triton.jit
def read_part(table, part):
    """The entries of a part in the table of plan.py: level, first column, first and end row, level height and width."""
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
    """Column bias [N, COLUMNS] of a part, -inf beyond the level's last column."""
    x = x0 + tl.arange(0, COLUMNS)
    return tl.load(rows[:, None] + x[None, :], mask=known[:, None] & (x < width)[None, :], other=-float("inf"))


@triton.jit
def tile_bias(rows, known, column_bias, y, y1, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row + column bias [N, ROWS * COLUMNS] of the tile that begins at row y; -inf outside the part."""
    row = y + tl.arange(0, ROWS)
    row_bias = tl.load(rows[:, None] + row[None, :], mask=known[:, None] & (row < y1)[None, :], other=-float("inf"))
    return tl.reshape(row_bias[:, :, None] + column_bias[:, None, :], (rows.shape[0], ROWS * COLUMNS))


@triton.jit
def cells_of(table, part, y, y1):
    """Rows * columns of the part's level, loaded in every tile: otherwise the compiler would hoist channel * cells of
    all channels out of the loop over tiles and spill registers.
    """
    return tl.load(table + part * 16 + 12, mask=y < y1, other=0).to(tl.int32)


@triton.jit
def tile_cells(x0, y, y1, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Cell indices [ROWS * COLUMNS] of a tile in its level, and which of them lie in the part."""
    index = tl.arange(0, ROWS * COLUMNS)
    row, column = y + index // COLUMNS, x0 + index % COLUMNS
    return row * width + column, (row < y1) & (column < width)


@triton.jit
def map_offsets(channel, cell, cells, channels, LAST: tl.constexpr, WIDE: tl.constexpr):
    """Offsets [channel, cell] in one image of a map, channels-last if LAST, 64-bit if WIDE."""
    if WIDE:
        channel, cell = channel.to(tl.int64), cell.to(tl.int64)
    return channel[:, None] + cell[None, :] * channels if LAST else channel[:, None] * cells + cell[None, :]


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a b, accumulated in the type of total."""
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)
