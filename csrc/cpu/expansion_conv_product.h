// SPDX-License-Identifier: Apache-2.0
// y = conv(x, W) + b and dx = conv(dy, W turned round): a panel of W is formed in L2, in the order in which words are
// multiplied, and all tokens of a part go by, patches made a tile at a time in L1. Channels that do not fit a panel are
// summed chunk after chunk, in the work dtype. An output is one thread's.
#pragma once

#include "expansion_conv_patches.h"

namespace {

constexpr int kFormWidth = 320;  // of a gene, that are formed at a time where rows are as long as one likes

// to[r][i] = W[row + r, column + i] as work values, rounded as words are, for `rows` rows and n columns; those that lie
// `ahead` rows further on are asked for.
template <class X>
void form_lines(const Genes& genes, int64_t row, int rows, int64_t column, int n, int64_t ahead, WorkOf<X>* to,
                int64_t stride) {
    typedef SingleTerms<typename Words<X>::Rounded> Terms;
    with_gene_type<X>(genes.dtype, [&](auto g) {
        typedef decltype(g) G;
        for (int r = 0; r < rows; r += kRows) {
            const int some = min64(kRows, rows - r);
            for (int k = 0; k < genes.count && ahead; ++k)
                for (int s = 0; s < some; ++s) {
                    const Matrix& m = genes.matrix[k];
                    const char* const next = reinterpret_cast<const char*>(
                        static_cast<const G*>(m.data) + (row + r + s + ahead) * m.row_stride + column);
                    for (int64_t byte = 0; byte < n * static_cast<int64_t>(sizeof(G)); byte += 64)
                        __builtin_prefetch(next + byte);
                }
            form_block<Terms, G>(genes, row + r, some, column, n, to + r * stride, stride);
        }
    });
}

// Where the forming of a block stands: `columns` output channels of it exist from `column` on, `channels` of the sums
// from `channel` on.
struct Formed {
    int64_t column;
    int columns;
    int64_t channel;
    int channels;
};

// to[tap][word][column] for y: columns are rows of the genes.
template <class X>
void form_rows_block(const ConvProduct& a, const Formed& f, typename Words<X>::Word* to) {
    typedef Words<X> W;
    typedef WorkOf<X> Work;
    constexpr int lanes = W::lanes, stride = kFormWidth + lanes;
    alignas(64) Work strip[lanes][stride], turned[stride][lanes], none[lanes] = {};
    const int taps = a.in.tap_rows * a.in.tap_columns, words = (f.channels + W::terms - 1) / W::terms;
    const int most = kFormWidth / taps / 2 * 2, steps = (f.channels + most - 1) / most;
    const int at_once = ((f.channels + steps - 1) / steps + 1) / 2 * 2;
    for (int half = 0; half < W::columns; half += lanes) {
        const int rows = min64(lanes, f.columns - half);
        if (rows < lanes) memset(strip, 0, sizeof strip);
        for (int c = 0; c < f.channels; c += at_once) {
            const int some = min64(at_once, f.channels - c), n = some * taps;
            const int64_t row = f.column + half;
            if (rows > 0)
                form_lines<X>(a.genes, row, rows, (f.channel + c) * taps, n, row + 2 * lanes <= a.n ? lanes : 0,
                              strip[0], stride);
            for (int i = 0; i < n; i += lanes) turn(&strip[0][i], stride, turned[i]);
            for (int s = 0; s < some; s += W::terms)
                for (int tap = 0; tap < taps; ++tap)
                    W::put(to + (tap * words + (c + s) / W::terms) * W::columns + half, turned[s * taps + tap],
                           s + 1 < some ? turned[(s + 1) * taps + tap] : none);
        }
    }
}

// to[tap][word][column] for dx: columns are input channels, sums run over rows of the genes, taps are turned round.
template <class X>
void form_columns_block(const ConvProduct& a, const Formed& f, typename Words<X>::Word* to) {
    typedef Words<X> W;
    typedef WorkOf<X> Work;
    constexpr int lanes = W::lanes;
    alignas(64) Work strip[kRows * (W::columns * kConvTaps + 2 * lanes)], turned[2][kConvTaps][lanes] = {};
    const int taps = a.in.tap_rows * a.in.tap_columns, words = (f.channels + W::terms - 1) / W::terms;
    const int stride = (W::columns * taps + 2 * lanes) / lanes * lanes;
    if (f.columns < W::columns) memset(strip, 0, sizeof strip);
    for (int c = 0; c < f.channels; c += kRows) {
        const int rows = min64(kRows, f.channels - c);
        form_lines<X>(a.genes, f.channel + c, rows, f.column * taps, f.columns * taps,
                      c + 2 * kRows <= f.channels ? kRows : 0, strip, stride);
        for (int r = 0; r < rows; r += W::terms)
            for (int half = 0; half < W::columns; half += lanes) {
                for (int s = 0; s < W::terms; ++s)
                    for (int tap = 0; tap < taps; tap += lanes) {
                        if (r + s < rows)
                            turn(strip + (r + s) * stride + half * taps + tap, taps, turned[s][tap]);
                        else
                            memset(turned[s][tap], 0, lanes * lanes * sizeof(Work));
                    }
                for (int tap = 0; tap < taps; ++tap)
                    W::put(to + ((taps - 1 - tap) * words + (c + r) / W::terms) * W::columns + half, turned[0][tap],
                           turned[1][tap]);
            }
    }
}

// y of some tokens from their sums, [tokens, panel]; columns [column, column + columns).
template <class X>
void put_tokens(const ConvProduct& a, int64_t token, int64_t tokens, int64_t column, int64_t columns,
                const WorkOf<X>* sums, const WorkOf<X>* bias) {
    typedef Element<WorkOf<X>> Sum;
    constexpr int lanes = Words<X>::lanes;
    X* const y = static_cast<X*>(a.y);
    const int64_t positions = a.in.rows * a.in.columns;
    for (int64_t t = 0; t < tokens;) {
        const int64_t image = (token + t) / positions, position = (token + t) % positions;
        const int some = a.last ? 1 : min64(min64(lanes, tokens - t), positions - position);
        for (int64_t c = 0; c < columns; c += lanes) {
            const int width = min64(lanes, columns - c);
            alignas(64) WorkOf<X> whole[lanes][lanes], turned[lanes][lanes];
            for (int s = 0; s < some; ++s) {
                const Vector<X> v = Sum::load(sums + (t + s) * a.panel + c) + Sum::load(bias + c);
                memcpy(whole[s], &v, sizeof v);
            }
            if (a.last) {
                narrow_row(y + (token + t) * a.n + column + c, whole[0], width);
                continue;
            }
            turn(whole[0], lanes, turned[0]);
            for (int j = 0; j < width; ++j)
                narrow_row(y + (image * a.n + column + c + j) * positions + position, turned[j], some);
        }
        t += some;
    }
}

// What a thread works in.
template <class X>
struct ConvRoom {
    typename Words<X>::Word *lines, *panel;
    WorkOf<X>* sums;
    int64_t depth, block;  // words of a line, and of one block of columns

    ConvRoom(const ConvProduct& a, int64_t share) {
        const int64_t taps = a.in.tap_rows * a.in.tap_columns;
        depth = (a.chunk + Words<X>::terms - 1) / Words<X>::terms * taps;
        block = depth * Words<X>::columns;
        char* const room = static_cast<char*>(a.workspace) + share * a.room;
        sums = reinterpret_cast<WorkOf<X>*>(room);
        panel = reinterpret_cast<typename Words<X>::Word*>(sums + a.tokens * a.panel);
        lines = panel + depth * a.panel;
    }
};

template <class X>
void form_panel(const ConvProduct& a, int64_t column, int64_t columns, int64_t channel, int channels,
                const ConvRoom<X>& room) {
    constexpr int wide = Words<X>::columns;
    for (int64_t c = 0; c < columns; c += wide) {
        const Formed f = {column + c, static_cast<int>(min64(wide, columns - c)), channel, channels};
        typename Words<X>::Word* const to = room.panel + c / wide * room.block;
        if (a.transposed)
            form_columns_block<X>(a, f, to);
        else
            form_rows_block<X>(a, f, to);
    }
}

// Sums of tokens with the panel: sums[t][column] (+)= patch of t times W, over the channels of a chunk.
template <class X>
void sum_tokens(const ConvProduct& a, int64_t token, int64_t tokens, int64_t columns, int64_t channel, int channels,
                const ConvRoom<X>& room) {
    constexpr int terms = Words<X>::terms, wide = Words<X>::columns;
    const int64_t taps = a.in.tap_rows * a.in.tap_columns, tiles = (tokens + kTileLines - 1) / kTileLines;
    const int64_t stride = room.depth + wide;  // whole vectors are written
    ConvTile<X> tile = {};
    tile.lines = room.lines;
    tile.line_stride = stride;
    tile.depth = (channels + terms - 1) / terms * taps;
    tile.first = channel == 0;
    tile.sum_stride = a.panel;
    for (int64_t j = 0; j < tiles; ++j) {
        const int64_t t = tokens * j / tiles, lines = tokens * (j + 1) / tiles - t;
        make_lines<X>(a.in, token + t, lines, channel, channels, room.lines, stride);
        ask_for_pixels<X>(a.in, token + t + lines, kTileLines, channel, channels);
        for (int64_t c = 0; c < columns; c += wide) {
            tile.block = room.panel + c / wide * room.block;
            tile.sums = room.sums + t * a.panel + c;
            conv_tiles(tile, lines);
        }
    }
}

// Columns [column, column + columns) of y for tokens [token, end).
template <class X>
void conv_part(const ConvProduct& a, int64_t column, int64_t columns, int64_t token, int64_t end,
               const ConvRoom<X>& room) {
    alignas(64) WorkOf<X> bias[kConvPanel + Words<X>::lanes] = {};
    if (a.bias) widen_row(bias, static_cast<const X*>(a.bias) + column, columns);
    bool formed = false;
    for (int64_t t = token; t < end; t += a.tokens) {
        const int64_t some = min64(a.tokens, end - t);
        for (int64_t channel = 0; channel < a.in.channels; channel += a.chunk) {
            const int channels = min64(a.chunk, a.in.channels - channel);
            if (!formed) form_panel<X>(a, column, columns, channel, channels, room);
            formed = channels == a.in.channels;
            sum_tokens<X>(a, t, some, columns, channel, channels, room);
        }
        put_tokens<X>(a, t, some, column, columns, room.sums, bias);
    }
}

template <class X>
void conv_product(const ConvProduct& a) {
    const int64_t tokens = a.in.images * a.in.rows * a.in.columns, panels = (a.n + a.panel - 1) / a.panel;
    const int64_t pieces = panels * a.parts;
#pragma omp parallel for if (a.threads > 1) num_threads(a.threads) schedule(static)
    for (int64_t share = 0; share < a.threads; ++share) {
        const ConvRoom<X> room(a, share);
        for (int64_t piece = pieces * share / a.threads; piece < pieces * (share + 1) / a.threads; ++piece) {
            const int64_t column = piece / a.parts * a.panel, part = piece % a.parts;
            conv_part<X>(a, column, min64(a.panel, a.n - column), tokens * part / a.parts,
                         tokens * (part + 1) / a.parts, room);
        }
    }
}

}  // namespace
