"""How much a program of each kernel works on: powers of two that depend on the sizes of a sample and of its numbers.

They decide the order of every sum, so nothing of a batch or of a run may enter here.
"""

from dataclasses import dataclass

SAMPLE_MAX_N = 8192  # numbers a sample that one program steps alone
SAMPLE_MAX_COLUMNS = 32
CHUNK = 4096  # numbers of a sample that a program takes where several share it; a multiple of a scale's block
MAX_CHUNKS = 512
TINY_BLOCK = 8
TILE_BYTES = 8192  # of accumulators in a tile of columns: 16 registers a thread for four warps


def power_of_two(n: int) -> int:
    """The least power of two that is not below ``n``."""
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class Shape:
    """A tile of ``M`` columns by ``BLOCK`` numbers, and the warps that hold it."""

    M: int
    BLOCK: int
    warps: int


def streaming(m: int, N: int, itemsize: int, tiled: bool = False) -> Shape:
    """For kernels that stream m columns of samples of N numbers of ``itemsize`` bytes."""
    M = power_of_two(m)
    if tiled:
        return Shape(M, TINY_BLOCK, 1)
    room = TILE_BYTES // itemsize // M
    block = min(1024, max(16, room), max(16, power_of_two(N)))
    size = M * block * itemsize
    return Shape(M, block, 1 if 4 * size <= TILE_BYTES else 2 if 2 * size <= TILE_BYTES else 4)


def small(m: int) -> Shape:
    """For the small solve by itself."""
    M = power_of_two(m)
    return Shape(M, 0, 1 if M <= 16 else 4 if M <= 32 else 8 if M <= 64 else 16)


def chain(N: int, itemsize: int) -> Shape:
    """For Broyden's chain with all of z in registers."""
    block = max(16, power_of_two(N))
    size = block * itemsize // 4
    return Shape(1, block, 1 if size <= 256 else 4 if size <= 2048 else 8)


def chunk_size(sizes: list[int]) -> int:
    """Numbers a chunk for tensors of these sizes."""
    size = CHUNK
    while sum(-(-n // size) for n in sizes) > MAX_CHUNKS:
        size *= 2
    return size


def chunk_tile(chunks: int, products: int) -> int:
    """Chunks added up at once, for ``products`` sums side by side."""
    return max(2, min(power_of_two(chunks), 1024 // power_of_two(products)))
