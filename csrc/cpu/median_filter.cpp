#include "cpu/median_filter.h"

#include "cpu/vector.h"

namespace pumice {
namespace PUMICE_ISA {
namespace {

// The rows of a tile of kOut columns: fewer for larger windows, of which more is kept, so that all stays in
// the caches. Whole vectors work on what lies to the right of it, hence the margin.
template <int SIZE, class Key>
struct Tile {
    static constexpr int kOut = (SIZE < 5 ? 2048 : SIZE < 9 ? 1024 : 512) / static_cast<int>(sizeof(Key));
    static constexpr int kMargin = 16 > kLanes<Key> ? 16 : kLanes<Key>;  // SIZE - 1, in whole vectors
    static constexpr int kWide = kOut + 2 * kMargin;
    using Row = Key[kWide];

    int64_t left;  // the first column
    Row rows[SIZE + 1];
    bool nan[SIZE + 1];
};

// Row y of the picture, its edges repeated, as keys.
template <int SIZE, class Key>
void load_row(const MedianFilter& a, int64_t plane, int64_t y, Tile<SIZE, Key>& tile) {
    constexpr int64_t radius = SIZE / 2, count = Tile<SIZE, Key>::kOut + SIZE - 1;
    const int64_t slot = (y + SIZE) % (SIZE + 1), first = tile.left - radius;
    const Key* from = static_cast<const Key*>(a.x) + (plane * a.height + within(y, a.height)) * a.width;
    const Key infinity = static_cast<Key>(median_infinity(a.dtype));
    Key* row = tile.rows[slot];
    const int64_t inside = first < 0 ? -first : 0;  // columns [inside, outside) exist
    const int64_t outside = a.width - first < count ? a.width - first : count;
    Key odd = 0;
#pragma omp simd reduction(| : odd)
    for (int64_t i = inside; i < outside; ++i) {
        const Key key = median_key(from[first + i]);
        row[i] = key;
        odd |= static_cast<Key>(key > infinity) | static_cast<Key>(key < static_cast<Key>(~infinity));
    }
    for (int64_t i = 0; i < inside; ++i) row[i] = row[inside];
    for (int64_t i = outside; i < count; ++i) row[i] = row[outside - 1];
    for (int64_t i = count; i < Tile<SIZE, Key>::kWide; ++i) row[i] = 0;
    tile.nan[slot] = odd;
}

// HEIGHT rows: their columns, sorted, and stretches of 2 and 4 columns from every x on. They are what windows
// that overlap have in common.
template <int SIZE, int HEIGHT, class Key>
struct Stretches {
    using Row = typename Tile<SIZE, Key>::Row;
    const Row* one;  // `columns`, or the only row
    Row columns[HEIGHT], two[2 * HEIGHT], four[4 * HEIGHT];

    // Whether a window contains two or more stretches of so many columns side by side.
    static constexpr bool keeps(int columns) { return (columns & (columns - 1)) == 0 && 2 * columns <= SIZE; }

    template <int COLUMNS>
    const Row* kept() const {
        if constexpr (COLUMNS == 1)
            return one;
        else if constexpr (COLUMNS == 2)
            return two;
        else
            return four;
    }

    // Keeps what gathering from x = 0 to `wide` asks for.
    void prepare(const Row* const* rows, int64_t wide) {
        one = HEIGHT == 1 ? rows[0] : columns;
        for (int64_t x = 0; HEIGHT > 1 && x < wide + SIZE - 1; x += kLanes<Key>) {
            Vector<Key> v[HEIGHT];
            PUMICE_UNROLL
            for (int i = 0; i < HEIGHT; ++i) load<Key>(v[i], &(*rows[i])[x]);
            sort<HEIGHT, true>(v);
            PUMICE_UNROLL
            for (int i = 0; i < HEIGHT; ++i) store<Key>(&columns[i][x], v[i]);
        }
        keep<2>(two, wide);
        keep<4>(four, wide);
    }

    // Stretches of COLUMNS columns, each of two half as wide.
    template <int COLUMNS>
    void keep(Row* to, int64_t wide) {
        if constexpr (keeps(COLUMNS)) {
            constexpr int count = COLUMNS * HEIGHT, half = COLUMNS / 2;
            const Row* from = kept<half>();
            for (int64_t x = 0; x < wide + SIZE - COLUMNS; x += kLanes<Key>) {
                Vector<Key> v[count];
                PUMICE_UNROLL
                for (int i = 0; i < count / 2; ++i) {
                    load<Key>(v[i], &from[count / 2 - 1 - i][x]);
                    load<Key>(v[count / 2 + i], &from[i][x + half]);
                }
                merge<count, true, 0, count>(v);
                PUMICE_UNROLL
                for (int i = 0; i < count; ++i) store<Key>(&to[i][x], v[i]);
            }
        }
    }

    // The values of COLUMNS columns from x on, in order; places LOW to HIGH - 1 of it are right.
    template <int COLUMNS, bool RISING, int LOW, int HIGH>
    PUMICE_MEMBER void gather(int64_t x, Vector<Key>* v) const {
        constexpr int count = COLUMNS * HEIGHT;
        if constexpr (keeps(COLUMNS)) {
            const Row* from = kept<COLUMNS>();
            PUMICE_UNROLL
            for (int i = 0; i < count; ++i) load<Key>(v[i], &from[RISING ? i : count - 1 - i][x]);
        } else {
            constexpr int half = half_of(COLUMNS), first = half * HEIGHT;
            gather<half, !RISING, 0, first>(x, v);
            gather<COLUMNS - half, RISING, 0, count - first>(x + half, v + first);
            merge<count, RISING, LOW, HIGH>(v);
        }
    }
};

// Two rows of medians, from SIZE + 1 rows.
template <int SIZE, class Key>
void two_rows(const typename Tile<SIZE, Key>::Row* const* rows, int64_t wide, Key* upper, Key* lower) {
    using Share = MedianShare<SIZE>;
    Stretches<SIZE, Share::kRows, Key> shared;
    Stretches<SIZE, 1, Key> above, below;
    shared.prepare(rows + 1, wide);
    above.prepare(rows, wide);
    below.prepare(rows + SIZE, wide);
    for (int64_t x = 0; x < wide; x += kLanes<Key>) {
        Vector<Key> middle[SIZE * Share::kRows], row[SIZE];
        shared.template gather<SIZE, true, Share::kLow, Share::kLow + Share::kCount>(x, middle);
        above.template gather<SIZE, true, 0, SIZE>(x, row);
        store<Key>(upper + x, median_of<SIZE>(middle + Share::kLow, row));
        below.template gather<SIZE, true, 0, SIZE>(x, row);
        store<Key>(lower + x, median_of<SIZE>(middle + Share::kLow, row));
    }
}

// A window with a NaN has no median but NaN.
template <int SIZE, class Key>
void spread_nan(Dtype dtype, const typename Tile<SIZE, Key>::Row* const* rows, int64_t wide, Key* medians) {
    const int32_t infinity = median_infinity(dtype);
    for (int64_t x = 0; x < wide; ++x)
        for (int i = 0; i < SIZE * SIZE; ++i)
            if (median_is_nan((*rows[i / SIZE])[x + i % SIZE], infinity))
                medians[x] = static_cast<Key>(median_nan(infinity));
}

template <int SIZE, class Key>
void filter(const MedianFilter& a, int64_t plane, int64_t begin, int64_t end) {
    using Tiles = Tile<SIZE, Key>;
    constexpr int radius = SIZE / 2, kept = SIZE + 1;
    Tiles tile;
    for (tile.left = 0; tile.left < a.width; tile.left += Tiles::kOut) {
        const int64_t wide = a.width - tile.left < Tiles::kOut ? a.width - tile.left : Tiles::kOut;
        for (int64_t y = begin - radius; y < begin + radius; ++y) load_row(a, plane, y, tile);
        for (int64_t y = begin; y < end; y += 2) {
            load_row(a, plane, y + radius, tile);
            load_row(a, plane, y + radius + 1, tile);
            const typename Tiles::Row* rows[kept];
            bool nan = false;
            for (int i = 0; i < kept; ++i) {
                const int64_t slot = (y - radius + i + SIZE) % kept;
                rows[i] = &tile.rows[slot];
                nan |= tile.nan[slot];
            }
            typename Tiles::Row medians[2];
            two_rows<SIZE>(rows, wide, medians[0], medians[1]);
            for (int64_t row = 0; row < 2 && y + row < end; ++row) {
                if (nan) spread_nan<SIZE>(a.dtype, rows + row, wide, medians[row]);
                Key* to = static_cast<Key*>(a.out) + (plane * a.height + y + row) * a.width + tile.left;
#pragma omp simd
                for (int64_t x = 0; x < wide; ++x) to[x] = median_key(medians[row][x]);
            }
        }
    }
}

template <int SIZE>
void filter_stored(const MedianFilter& a, int64_t plane, int64_t begin, int64_t end) {
    if (a.dtype == Dtype::f32)
        filter<SIZE, int32_t>(a, plane, begin, end);
    else
        filter<SIZE, int16_t>(a, plane, begin, end);
}

}  // namespace

void median_filter_rows(const MedianFilter& a, int64_t plane, int64_t begin, int64_t end) {
    switch (a.size) {
        case 3:
            return filter_stored<3>(a, plane, begin, end);
        case 5:
            return filter_stored<5>(a, plane, begin, end);
        case 7:
            return filter_stored<7>(a, plane, begin, end);
        case 9:
            return filter_stored<9>(a, plane, begin, end);
        case 11:
            return filter_stored<11>(a, plane, begin, end);
        case 13:
            return filter_stored<13>(a, plane, begin, end);
        case 15:
            return filter_stored<15>(a, plane, begin, end);
    }
}

}  // namespace PUMICE_ISA
}  // namespace pumice
