// The two products that assembly is made of on a CPU, in single precision: a few rows against very
// many numbers, which may lie in bfloat16. compiled.py tells what they compute and hands them memory that they can read,
// docs/performance.md what they gain.
//
// Both read the large matrix once, at the rate of the memory, and keep all that they add up in
// registers. Compiled once for each instruction set, without any header of torch's or Python's.

#include <cstring>
#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#else  // AVX2
constexpr int LANES = 8, REGISTERS = 16;
#endif

// Numbers in a register, and the same in memory, at any address.
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define UNROLL _Pragma("GCC unroll 16")

namespace {

Vector load(const float *from) { return *reinterpret_cast<const Loose *>(from); }

// bfloat16 is the upper half of a float.
struct BFloat16 {
    unsigned short bits;
};
typedef unsigned Bits __attribute__((vector_size(4 * LANES)));
typedef unsigned short Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

Vector load(const BFloat16 *from) {
    const Halves halves = *reinterpret_cast<const Halves *>(from);
    return reinterpret_cast<Vector>(__builtin_convertvector(halves, Bits) << 16);
}

float single(float x) { return x; }

float single(BFloat16 x) {
    const unsigned bits = unsigned(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

void store(float *to, Vector x) { *reinterpret_cast<Loose *>(to) = x; }

float total(Vector x) {
    float lanes[LANES];
    std::memcpy(lanes, &x, sizeof lanes);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

// Rows are taken in shares as equal as they can be; the size of the next.
long share(long left, long shares) { return (left + shares - 1) / shares; }

// ---- out[b, r] = scales[b, r] * sum over k of alpha[b, r, k] * cells[b, index[k]] ---------------

struct Mix {
    long num_blocks, num_rows, num_cells, width;
    const float *alpha;
    long alpha_block, alpha_row;  // strides, in numbers
    const void *cells;
    long cells_block, cells_cell;
    long cells_are_bfloat16;  // else single precision
    const long *index;    // num_cells of them, or null for all in order
    const float *scales;  // contiguous, or null
    float *out;
    long out_block;
    const long *out_rows;  // where rows start
};

// Cells ahead of the one being added that are asked for.
constexpr long AHEAD = 8;

enum Fetch { THIS_TILE, NEXT_TILE };

// Adds up ROWS rows of VECTORS registers each. The first rows of a tile bring its cells into the
// cache and are bound by the memory; meanwhile the last rows ask for those of the next tile.
template <typename Cell, int ROWS, int VECTORS, Fetch FETCH>
void mix_tile(const Mix &m, long block, long row, long column) {
    Vector sums[ROWS][VECTORS] = {};
    const float *alpha = m.alpha + block * m.alpha_block + row * m.alpha_row;
    const Cell *cells = static_cast<const Cell *>(m.cells) + block * m.cells_block + column;
    for (long k = 0; k < m.num_cells; k++) {
        const Cell *cell = cells + (m.index ? m.index[k] : k) * m.cells_cell;
        if (FETCH == THIS_TILE) {
            const long then = k + AHEAD < m.num_cells ? k + AHEAD : k;
            const Cell *later = cells + (m.index ? m.index[then] : then) * m.cells_cell;
            UNROLL for (int v = 0; v < VECTORS; v++) __builtin_prefetch(later + v * LANES);
        } else {
            UNROLL for (int v = 0; v < VECTORS; v++)
                __builtin_prefetch(cell + (VECTORS + v) * LANES, 0, 2);
        }
        Vector x[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) x[v] = load(cell + v * LANES);
        UNROLL for (int r = 0; r < ROWS; r++) {
            const float factor = alpha[r * m.alpha_row + k];
            UNROLL for (int v = 0; v < VECTORS; v++) sums[r][v] += factor * x[v];
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++) {
        float *out = m.out + block * m.out_block + m.out_rows[row + r] + column;
        const float scale = m.scales ? m.scales[block * m.num_rows + row + r] : 1;
        UNROLL for (int v = 0; v < VECTORS; v++) store(out + v * LANES, scale * sums[r][v]);
    }
}

// Blocks narrower than a register.
template <typename Cell>
void mix_narrow(const Mix &m, long block, long row, long num_rows) {
    for (long r = row; r < row + num_rows; r++) {
        const float *alpha = m.alpha + block * m.alpha_block + r * m.alpha_row;
        float sums[LANES] = {};
        for (long k = 0; k < m.num_cells; k++) {
            const Cell *cell = static_cast<const Cell *>(m.cells) + block * m.cells_block +
                               (m.index ? m.index[k] : k) * m.cells_cell;
            for (long i = 0; i < m.width; i++) sums[i] += alpha[k] * single(cell[i]);
        }
        float *out = m.out + block * m.out_block + m.out_rows[r];
        const float scale = m.scales ? m.scales[block * m.num_rows + r] : 1;
        for (long i = 0; i < m.width; i++) out[i] = scale * sums[i];
    }
}

using TileFunction = void (*)(const Mix &, long, long, long);

template <typename Cell, int ROWS, Fetch FETCH>
TileFunction tile_of(int vectors) {
    switch (vectors) {
        case 1: return mix_tile<Cell, ROWS, 1, FETCH>;
        case 2: return mix_tile<Cell, ROWS, 2, FETCH>;
        case 4: return mix_tile<Cell, ROWS, 4, FETCH>;
        case 8: return mix_tile<Cell, ROWS, 8, FETCH>;
        default: return mix_tile<Cell, ROWS, 16, FETCH>;
    }
}

constexpr int MAX_ROWS = 6;

template <typename Cell, Fetch FETCH>
TileFunction tile_of(int rows, int vectors) {
    switch (rows) {
        case 1: return tile_of<Cell, 1, FETCH>(vectors);
        case 2: return tile_of<Cell, 2, FETCH>(vectors);
        case 3: return tile_of<Cell, 3, FETCH>(vectors);
        case 4: return tile_of<Cell, 4, FETCH>(vectors);
        case 5: return tile_of<Cell, 5, FETCH>(vectors);
        default: return tile_of<Cell, 6, FETCH>(vectors);
    }
}

template <typename Cell>
void mix(const Mix &m, int num_threads) {
    // Even few rows in two shares, so that there is one to fetch in. Wide tiles for few rows: the
    // sums fill the registers.
    const long shares = m.num_rows <= 3 ? 1 : m.num_rows <= 6 ? 2 : share(m.num_rows, MAX_ROWS);
    const int widest = REGISTERS / (m.num_rows == 1 ? 2 : m.num_rows <= 6 ? 4 : 8);
    const long step = widest * LANES;
    // The last tile has what is left over as well.
    const long steps = m.width < step ? 1 : m.width / step;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (long tile = 0; tile < m.num_blocks * steps; tile++) {
        const long block = tile / steps, place = tile % steps;
        const long end = place == steps - 1 ? m.width : (place + 1) * step;
        long column = place * step;
        while (column < end) {
            int vectors = widest;
            while (vectors * LANES > end - column) vectors /= 2;
            if (vectors == 0 && m.width >= LANES) {
                // Some columns again, to the same result.
                vectors = 1;
                column = end - LANES;
            }
            long row = 0;
            for (long i = 0; i < shares; i++) {
                const long rows = share(m.num_rows - row, shares - i);
                if (vectors == 0)
                    mix_narrow<Cell>(m, block, row, rows);
                else if (i == 0)
                    tile_of<Cell, THIS_TILE>(rows, vectors)(m, block, row, column);
                else
                    tile_of<Cell, NEXT_TILE>(rows, vectors)(m, block, row, column);
                row += rows;
            }
            column = vectors == 0 ? end : column + vectors * LANES;
        }
    }
}

}  // namespace

// Which source this was compiled from: compiled.py takes no other than the one it lies beside.
extern "C" const char *kw_mm_built_from() { return KW_MM_BUILT_FROM; }

extern "C" void kw_mm_mix(const Mix *m, int num_threads) {
    (m->cells_are_bfloat16 ? mix<BFloat16> : mix<float>)(*m, num_threads);
}

// ---- out[r, k] = sum over d of grads[r, d] * cells[k, d] ----------------------------------------

namespace {

struct Sums {
    long num_rows, num_cells, size;
    const float *grads;
    long grads_row;  // strides, in numbers
    const float *cells;
    long cells_cell;
    float *out;  // contiguous
};

// Numbers summed over at a time: gradients of so many stay in the cache from cell to cell.
constexpr long CHUNK = 2048;
constexpr int MAX_CELLS = REGISTERS / 8;

template <int ROWS, int CELLS, bool FETCH>
void sum_tile(const Sums &s, long row, long cell, long start, long length, float *out) {
    Vector sums[ROWS][CELLS] = {};
    const float *grads = s.grads + row * s.grads_row + start;
    const float *cells = s.cells + cell * s.cells_cell + start;
    long d = 0;
    for (; d + LANES <= length; d += LANES) {
        Vector x[CELLS];
        UNROLL for (int k = 0; k < CELLS; k++) x[k] = load(cells + k * s.cells_cell + d);
        if (FETCH) {
            UNROLL for (int k = 0; k < CELLS; k++)
                __builtin_prefetch(cells + (CELLS + k) * s.cells_cell + d, 0, 2);
        }
        UNROLL for (int r = 0; r < ROWS; r++) {
            const Vector grad = load(grads + r * s.grads_row + d);
            UNROLL for (int k = 0; k < CELLS; k++) sums[r][k] += grad * x[k];
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int k = 0; k < CELLS; k++) {
        float sum = total(sums[r][k]);
        for (long i = d; i < length; i++)
            sum += grads[r * s.grads_row + i] * cells[k * s.cells_cell + i];
        out[(row + r) * s.num_cells + cell + k] += sum;
    }
}

using SumFunction = void (*)(const Sums &, long, long, long, long, float *);

template <int ROWS, bool FETCH>
SumFunction sum_of(int cells) {
    switch (cells) {
        case 1: return sum_tile<ROWS, 1, FETCH>;
        case 2: return sum_tile<ROWS, 2, FETCH>;
        case 3: return sum_tile<ROWS, 3, FETCH>;
        default: return sum_tile<ROWS, 4, FETCH>;
    }
}

template <bool FETCH>
SumFunction sum_of(int rows, int cells) {
    switch (rows) {
        case 1: return sum_of<1, FETCH>(cells);
        case 2: return sum_of<2, FETCH>(cells);
        case 3: return sum_of<3, FETCH>(cells);
        case 4: return sum_of<4, FETCH>(cells);
        case 5: return sum_of<5, FETCH>(cells);
        default: return sum_of<6, FETCH>(cells);
    }
}

}  // namespace

extern "C" void kw_mm_sum_products(const Sums *sums, int num_threads) {
    const Sums &s = *sums;
    const long numel = s.num_rows * s.num_cells, shares = share(s.num_rows, MAX_ROWS);
    // Parts are added in the order of their threads, so that results are the same digits each time.
    std::vector<float> parts(num_threads * numel);
    const long chunks = share(s.size, CHUNK), per_thread = share(chunks, num_threads);
#pragma omp parallel for schedule(static, 1) num_threads(num_threads)
    for (int thread = 0; thread < num_threads; thread++) {
        const long stop = (thread + 1) * per_thread < chunks ? (thread + 1) * per_thread : chunks;
        for (long chunk = thread * per_thread; chunk < stop; chunk++) {
            const long start = chunk * CHUNK;
            const long length = s.size - start < CHUNK ? s.size - start : CHUNK;
            for (long cell = 0; cell < s.num_cells; cell += MAX_CELLS) {
                const long left = s.num_cells - cell, cells = left < MAX_CELLS ? left : MAX_CELLS;
                long row = 0;
                for (long i = 0; i < shares; i++) {
                    const long rows = share(s.num_rows - row, shares - i);
                    (i == shares - 1 ? sum_of<true> : sum_of<false>)(rows, cells)(
                        s, row, cell, start, length, parts.data() + thread * numel);
                    row += rows;
                }
            }
        }
    }
    std::memset(s.out, 0, numel * sizeof(float));
    for (int thread = 0; thread < num_threads; thread++)
        for (long i = 0; i < numel; i++) s.out[i] += parts[thread * numel + i];
}
