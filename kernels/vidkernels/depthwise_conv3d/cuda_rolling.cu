// Depthwise 3D convolution of channels-last tensors (N, T, H, W, C): README.md tells the design.
//
// A thread owns VECTOR neighbouring channels and STRIP results along W, and walks along T. Every source frame is
// read once and added to all results that are still open, whose partial sums stay in registers.
//
// Macros: KERNEL (FORWARD, INPUT_GRADIENT or WEIGHT_GRADIENT), SCALAR (float, __half, __nv_bfloat16), VECTOR, STRIP,
// CHANNELS (C: columns then are constants in the loads), KT KH KW (taps), ST SH SW (strides), DT DH DW (dilations),
// THREADS of a block and BLOCKS that one processor shall hold, AHEAD (frames that the cache is told of beforehand, 0:
// none), ACTIVATION (of FORWARD: 0 none, 1 relu, 2 silu), BIAS (of WEIGHT_GRADIENT: 1 with the bias's gradient).

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define FORWARD 0
#define INPUT_GRADIENT 1
#define WEIGHT_GRADIENT 2

// In the input's gradient, strips and steps are counted in x, and what is read is the gradient of y.
constexpr bool TRANSPOSED = KERNEL == INPUT_GRADIENT;
constexpr int TAPS = KT * KH * KW;

// Neighbouring threads hold neighbouring channels: LANES groups of VECTOR in a block, as even a split as 32 allow.
constexpr int GROUPS = (CHANNELS + VECTOR - 1) / VECTOR;
constexpr int LANE_TILES = (GROUPS + 31) / 32;
constexpr int LANES = (GROUPS + LANE_TILES - 1) / LANE_TILES;

// Along T, one step of the walk reads IN_STEP source frames and completes OUT_STEP results; OPEN results are under way.
constexpr int SPAN = (KT - 1) * DT + 1;
constexpr int IN_STEP = TRANSPOSED ? 1 : ST;
constexpr int OUT_STEP = TRANSPOSED ? ST : 1;
constexpr int OPEN = TRANSPOSED ? (SPAN > ST ? SPAN : ST) : (SPAN + ST - 1) / ST;

// Along W, a strip reads COLUMNS neighbours. In the gradient a result w collects the sources (w + PW - kw·DW) / SW
// that divide evenly: which do is known here, as strips begin at multiples of SW in w + PW.
constexpr int LEFT = TRANSPOSED ? (KW - 1) * DW / SW : 0;
constexpr int COLUMNS = TRANSPOSED ? (STRIP - 1) / SW + LEFT + 1 : (STRIP - 1) * SW + (KW - 1) * DW + 1;
static_assert(!TRANSPOSED || STRIP % SW == 0, "strips begin at multiples of the stride");
static_assert(COLUMNS <= 32, "columns are bits of a mask");

// The tap along T by which frame `f` of a step enters the open result `q`; -1: none.
__device__ constexpr int tap_of(int f, int q) {
    const int offset = TRANSPOSED ? q : SPAN - ST + f - q * ST;
    return offset >= 0 && offset < SPAN && offset % DT == 0 ? offset / DT : -1;
}

// The source frame `f` of a step, and the result `e` that the step completes; either may lie outside.
__device__ inline int frame_of(int step, int f, int pad) { return TRANSPOSED ? step : step * ST + SPAN - ST + f - pad; }
__device__ inline int result_of(int step, int e, int pad) { return TRANSPOSED ? step * ST + e - pad : step; }

// The column that result `j` of a strip meets with tap `kw`; -1: none.
__device__ constexpr int column_of(int j, int kw) {
    if (!TRANSPOSED) return j * SW + kw * DW;
    const int shifted = j - kw * DW + LEFT * SW;
    return shifted % SW == 0 ? shifted / SW : -1;
}

__device__ constexpr bool column_used(int c) {
    for (int j = 0; j < STRIP; ++j)
        for (int kw = 0; kw < KW; ++kw)
            if (column_of(j, kw) == c) return true;
    return false;
}

__device__ constexpr bool frame_used(int f) {
    for (int q = 0; q < OPEN; ++q)
        if (tap_of(f, q) >= 0) return true;
    return false;
}

// VECTOR scalars as one word of memory. Words, not scalars, are what predicated loads zero and registers hold.
template <int bytes> struct Bits;
template <> struct Bits<2> { using type = unsigned short; };
template <> struct Bits<4> { using type = unsigned; };
template <> struct Bits<8> { using type = uint2; };
using Word = Bits<VECTOR * sizeof(SCALAR)>::type;

__device__ inline float widened(float x) { return x; }
__device__ inline float widened(__half x) { return __half2float(x); }
__device__ inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void round_to(float& y, float x) { y = x; }
__device__ inline void round_to(__half& y, float x) { y = __float2half_rn(x); }
__device__ inline void round_to(__nv_bfloat16& y, float x) { y = __float2bfloat16_rn(x); }

__device__ inline void unpack(uint2 word, float (&x)[2], float) {
    x[0] = __uint_as_float(word.x);
    x[1] = __uint_as_float(word.y);
}
__device__ inline void unpack(unsigned word, float (&x)[1], float) { x[0] = __uint_as_float(word); }
__device__ inline void unpack(unsigned word, float (&x)[2], __half) {
    const float2 both = __half22float2(reinterpret_cast<const __half2&>(word));
    x[0] = both.x;
    x[1] = both.y;
}
__device__ inline void unpack(unsigned word, float (&x)[2], __nv_bfloat16) {
    // The upper half of a float; CUDA's own conversion takes an instruction more.
    x[0] = __uint_as_float(word << 16);
    x[1] = __uint_as_float(word & 0xffff0000u);
}
template <class T>
__device__ inline void unpack(unsigned short word, float (&x)[1], T) {
    x[0] = widened(reinterpret_cast<const T&>(word));
}

__device__ inline void store(SCALAR* p, const float (&y)[VECTOR]) {
    SCALAR scalars[VECTOR];
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) round_to(scalars[v], y[v]);
    Word word;
    memcpy(&word, scalars, sizeof(word));
    *reinterpret_cast<Word*>(p) = word;
}

__device__ inline float activated(float z) {
    if (ACTIVATION == 1) return fmaxf(z, 0.0f) + (z != z ? z : 0.0f);  // fmaxf drops NaN
    if (ACTIVATION == 2) return z / (1.0f + __expf(-z));
    return z;
}

struct Sizes {
    int source_t, source_h, source_w;  // of the tensor that is walked along
    int result_t, result_h, result_w;  // of the tensor that strips lie in
    int pad_t, pad_h, pad_w;           // of the convolution
};

// What one block covers; `blockIdx.x` counts channels first, then strips, rows, frames, clips.
struct Tile {
    int strips, rows, frames;
};

__device__ constexpr int divided_up(int a, int b) { return (a + b - 1) / b; }
__device__ inline int divided_down(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// What one thread works on, and which columns exist in each source row that it reads.
struct Place {
    int channel;      // the first of its VECTOR
    int column, row;  // its first result; less than 0 where a strip begins in the padding
    int first, last;  // result frames
    long long clip;
    bool active;
    int offset[KH];  // of the rows in a source frame
    int result;      // of the strip in a result frame
    int announced;   // of what the lane announces; less than 0: nothing
    unsigned columns;
    unsigned rows;

    __device__ inline Place(const Sizes& s, const Tile& g, int lane_tile, long long tile) {
        const int lead = TRANSPOSED ? s.pad_w % STRIP : 0;
        const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
        const int strip_tiles = divided_up(s.result_w + lead, g.strips * STRIP);
        const int row_tiles = divided_up(s.result_h, g.rows), frame_tiles = divided_up(s.result_t, g.frames);
        column = (int(tile % strip_tiles) * g.strips + group % g.strips) * STRIP - lead;
        tile /= strip_tiles;
        row = int(tile % row_tiles) * g.rows + group / g.strips;
        tile /= row_tiles;
        first = int(tile % frame_tiles) * g.frames;
        last = min(first + g.frames, s.result_t);
        clip = tile / frame_tiles;
        channel = (lane_tile * LANES + lane) * VECTOR;
        active = group < g.strips * g.rows && channel < CHANNELS && row < s.result_h;

        const int left = TRANSPOSED ? (column + s.pad_w) / SW - LEFT : column * SW - s.pad_w;
        result = (row * s.result_w + column) * CHANNELS + channel;
        columns = rows = 0;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) columns |= unsigned(left + c >= 0 && left + c < s.source_w) << c;
#pragma unroll
        for (int kh = 0; kh < KH; ++kh) {
            const int shifted = TRANSPOSED ? row + s.pad_h - kh * DH : row * SH - s.pad_h + kh * DH;
            const int source_row = TRANSPOSED ? shifted / SH : shifted;
            const bool meets = shifted >= 0 && source_row < s.source_h && (!TRANSPOSED || shifted % SH == 0);
            rows |= unsigned(meets) << kh;
            offset[kh] = meets ? (source_row * s.source_w + left) * CHANNELS + channel : 0;
        }
        const int shown = lane % COLUMNS;
        announced = rows >> KH / 2 & columns >> shown & 1 ? offset[KH / 2] + shown * CHANNELS : -1;
    }

    // A bit for every result of the strip that lies in the tensor.
    __device__ inline unsigned results(const Sizes& s) const {
        unsigned inside = 0;
#pragma unroll
        for (int j = 0; j < STRIP; ++j) inside |= unsigned(column + j >= 0 && column + j < s.result_w) << j;
        return active ? inside : 0;
    }

    __device__ __forceinline__ void read(const SCALAR* frame, Word (&words)[KH][COLUMNS]) const {
#pragma unroll
        for (int kh = 0; kh < KH; ++kh) {
            const SCALAR* const row = frame + offset[kh];
            const unsigned valid = rows >> kh & 1 ? columns : 0;
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) {
                words[kh][c] = Word{};
                if (column_used(c) && valid >> c & 1) words[kh][c] = *reinterpret_cast<const Word*>(row + c * CHANNELS);
            }
        }
    }

    // Has a frame's middle row brought to the second-level cache (neighbours see to the other rows): every lane names
    // one of the columns, which together touch every sector.
    __device__ __forceinline__ void announce(const SCALAR* frame) const {
#if !defined(VIDKERNELS_HOST)
        if (announced >= 0) asm volatile("prefetch.global.L2 [%0];" ::"l"(frame + announced));
#endif
    }
};

#if KERNEL != WEIGHT_GRADIENT

// A thread's walk. The open results are a ring: result q of a step lies in slot (q + PHASE · OUT_STEP) % OPEN, and
// the phases, which come round after OPEN steps, are code of their own: registers have no run-time index.
struct Walk {
    Place place;
    float weight[KT][KH][KW][VECTOR];
    float start[VECTOR];
    float sum[OPEN][STRIP][VECTOR];
    // Of the step; what differs between threads are the offsets in them.
    const SCALAR* frame;
    SCALAR* completed;
    long long source_frame, result_frame;
    int step, end;
    int pad, frames;  // of the source
    unsigned results;

    template <int PHASE>
    __device__ __forceinline__ void advance() {
#pragma unroll
        for (int f = 0; f < IN_STEP; ++f) {
            const int t = frame_of(step, f, pad);
            if (frame_used(f) && t >= 0 && t < frames) {
                if (AHEAD && t + AHEAD < frames) place.announce(frame + AHEAD * source_frame);
                add<PHASE>(f);
            }
            frame += source_frame;
        }
#pragma unroll
        for (int e = 0; e < OUT_STEP; ++e) {
            const int slot = (e + PHASE * OUT_STEP) % OPEN, u = result_of(step, e, pad);
            const unsigned stored = u >= place.first && u < place.last ? results : 0;
#pragma unroll
            for (int j = 0; j < STRIP; ++j) {
                float y[VECTOR];
#pragma unroll
                for (int v = 0; v < VECTOR; ++v) {
                    y[v] = activated(sum[slot][j][v]);
                    sum[slot][j][v] = start[v];
                }
                if (stored >> j & 1) store(completed + place.result + j * CHANNELS, y);
            }
            completed += result_frame;
        }
        ++step;
    }

    template <int PHASE>
    __device__ __forceinline__ void add(int f) {
        Word words[KH][COLUMNS];
        place.read(frame, words);
#pragma unroll
        for (int kh = 0; kh < KH; ++kh) {
            // Most rows of a strided convolution's gradient meet only some taps.
            if (TRANSPOSED && SH > 1 && !(place.rows >> kh & 1)) continue;
            float x[COLUMNS][VECTOR];
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
                if (column_used(c)) unpack(words[kh][c], x[c], SCALAR{});
#pragma unroll
            for (int q = 0; q < OPEN; ++q) {
                const int kt = tap_of(f, q), slot = (q + PHASE * OUT_STEP) % OPEN;
                if (kt < 0) continue;
#pragma unroll
                for (int i = 0; i < KW * STRIP * VECTOR; ++i) {
                    const int kw = i / (STRIP * VECTOR), j = i / VECTOR % STRIP, v = i % VECTOR, c = column_of(j, kw);
                    if (c >= 0) sum[slot][j][v] += weight[kt][kh][kw][v] * x[c][v];
                }
            }
        }
    }

    template <int PHASE>
    __device__ __forceinline__ void round() {
        if constexpr (PHASE < OPEN) {
            if (step >= end) return;
            advance<PHASE>();
            round<PHASE + 1>();
        }
    }
};

// y = activation(bias + x ∗ weight), or with TRANSPOSED the gradient of x from that of y (then `source` is y's).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) walk(
    const SCALAR* __restrict__ source, const SCALAR* __restrict__ weight, const SCALAR* __restrict__ bias,
    SCALAR* __restrict__ result, int source_t, int source_h, int source_w, int result_t, int result_h, int result_w,
    int pad_t, int pad_h, int pad_w, int strips, int rows, int frames) {
    // Filters lie tap by tap, so that lanes read neighbouring words; the odd row length spreads the stores over banks.
    __shared__ float taps[TAPS][LANES * VECTOR + VECTOR];
    const int lane_tile = blockIdx.x % LANE_TILES;
    const int base = lane_tile * LANES * VECTOR;
    const int held = min(LANES * VECTOR, CHANNELS - base);
    for (int i = threadIdx.x; i < held * TAPS; i += blockDim.x)
        taps[i % TAPS][i / TAPS] = widened(weight[base * TAPS + i]);
    __syncthreads();

    const Sizes s{source_t, source_h, source_w, result_t, result_h, result_w, pad_t, pad_h, pad_w};
    Walk w{Place(s, {strips, rows, frames}, lane_tile, blockIdx.x / LANE_TILES)};
    const Place& p = w.place;
    if (!p.active) return;
#pragma unroll
    for (int i = 0; i < TAPS * VECTOR; ++i)
        w.weight[i / (VECTOR * KW * KH)][i / (VECTOR * KW) % KH][i / VECTOR % KW][i % VECTOR] =
            taps[i / VECTOR][p.channel - base + i % VECTOR];
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) w.start[v] = bias ? widened(bias[p.channel + v]) : 0.0f;
#pragma unroll
    for (int i = 0; i < OPEN * STRIP * VECTOR; ++i)
        w.sum[i / (STRIP * VECTOR)][i / VECTOR % STRIP][i % VECTOR] = w.start[i % VECTOR];

    // The first step is the first that adds to the first result; the last one completes the last.
    w.step = TRANSPOSED ? divided_down(p.first + s.pad_t - (SPAN - 1), ST) : p.first - (OPEN - 1);
    w.end = TRANSPOSED ? (p.last - 1 + s.pad_t) / ST + 1 : p.last;
    w.pad = s.pad_t;
    w.frames = s.source_t;
    w.results = p.results(s);
    w.source_frame = (long long)s.source_h * s.source_w * CHANNELS;
    w.result_frame = (long long)s.result_h * s.result_w * CHANNELS;
    w.frame = source + (p.clip * s.source_t + frame_of(w.step, 0, s.pad_t)) * w.source_frame;
    w.completed = result + (p.clip * s.result_t + result_of(w.step, 0, s.pad_t)) * w.result_frame;
    while (w.step < w.end) w.round<0>();
}

#else

// A thread's walk for the gradient of the weight: as that of the forward pass, with the gradient of the open results
// in the ring, and sums over all that the thread comes past.
struct Collector {
    float sum[KT][KH][KW][VECTOR];
    float bias[VECTOR];
    float open[OPEN][STRIP][VECTOR];
    const SCALAR* frame;
    const SCALAR* begun;  // the result frame that the step opens
    long long source_frame, result_frame;
    int step, end;
    int pad, frames;
    unsigned results;

    template <int PHASE>
    __device__ __forceinline__ void advance(const Place& place) {
        constexpr int opened = (OPEN - 1 + PHASE) % OPEN;
        const unsigned read = step + OPEN - 1 >= place.first && step + OPEN - 1 < place.last ? results : 0;
#pragma unroll
        for (int j = 0; j < STRIP; ++j) {
            Word word{};
            if (read >> j & 1) word = *reinterpret_cast<const Word*>(begun + place.result + j * CHANNELS);
            unpack(word, open[opened][j], SCALAR{});
#pragma unroll
            for (int v = 0; v < VECTOR; ++v) bias[v] += BIAS ? open[opened][j][v] : 0.0f;
        }
        begun += result_frame;
#pragma unroll
        for (int f = 0; f < IN_STEP; ++f) {
            const int t = frame_of(step, f, pad);
            if (frame_used(f) && t >= 0 && t < frames) {
                if (AHEAD && t + AHEAD < frames) place.announce(frame + AHEAD * source_frame);
                add<PHASE>(place, f);
            }
            frame += source_frame;
        }
        ++step;
    }

    template <int PHASE>
    __device__ __forceinline__ void add(const Place& place, int f) {
        Word words[KH][COLUMNS];
        place.read(frame, words);
#pragma unroll
        for (int kh = 0; kh < KH; ++kh) {
            float x[COLUMNS][VECTOR];
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
                if (column_used(c)) unpack(words[kh][c], x[c], SCALAR{});
#pragma unroll
            for (int q = 0; q < OPEN; ++q) {
                const int kt = tap_of(f, q), slot = (q + PHASE) % OPEN;
                if (kt < 0) continue;
#pragma unroll
                for (int i = 0; i < KW * STRIP * VECTOR; ++i) {
                    const int kw = i / (STRIP * VECTOR), j = i / VECTOR % STRIP, v = i % VECTOR;
                    sum[kt][kh][kw][v] += open[slot][j][v] * x[column_of(j, kw)][v];
                }
            }
        }
    }

    template <int PHASE>
    __device__ __forceinline__ void round(const Place& place) {
        if constexpr (PHASE < OPEN) {
            if (step >= end) return;
            advance<PHASE>(place);
            round<PHASE + 1>(place);
        }
    }
};

// Sums of gradient · x over the tiles that a block takes: (splits, taps and bias, C) in float32.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) collect(
    const SCALAR* __restrict__ source, const SCALAR* __restrict__ gradient, float* __restrict__ partial,
    int source_t, int source_h, int source_w, int result_t, int result_h, int result_w, int pad_t, int pad_h,
    int pad_w, int strips, int rows, int frames, long long tiles, int splits) {
    __shared__ float kept[KW * VECTOR][THREADS];
    const Sizes s{source_t, source_h, source_w, result_t, result_h, result_w, pad_t, pad_h, pad_w};
    const int lane_tile = blockIdx.x % LANE_TILES, split = blockIdx.x / LANE_TILES;
    Collector c;
#pragma unroll
    for (int i = 0; i < TAPS * VECTOR; ++i)
        c.sum[i / (VECTOR * KW * KH)][i / (VECTOR * KW) % KH][i / VECTOR % KW][i % VECTOR] = 0.0f;
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) c.bias[v] = 0.0f;
    c.pad = s.pad_t;
    c.frames = s.source_t;
    c.source_frame = (long long)s.source_h * s.source_w * CHANNELS;
    c.result_frame = (long long)s.result_h * s.result_w * CHANNELS;
    for (long long tile = split; tile < tiles; tile += splits) {
        const Place p(s, {strips, rows, frames}, lane_tile, tile);
        c.results = p.results(s);
        if (!c.results) continue;
#pragma unroll
        for (int i = 0; i < OPEN * STRIP * VECTOR; ++i) c.open[i / (STRIP * VECTOR)][i / VECTOR % STRIP][i % VECTOR] = 0.0f;
        c.step = p.first - (OPEN - 1);
        c.end = p.last;
        c.frame = source + (p.clip * s.source_t + frame_of(c.step, 0, s.pad_t)) * c.source_frame;
        c.begun = gradient + (p.clip * s.result_t + p.first) * c.result_frame;
        while (c.step < c.end) c.round<0>(p);
    }
    // The groups of a block are added in their order, one row of taps after the other.
    const int first = lane_tile * LANES * VECTOR, held = min(LANES * VECTOR, CHANNELS - first);
    float* const out = partial + (long long)split * (TAPS + BIAS) * CHANNELS + first;
#pragma unroll
    for (int line = 0; line < KT * KH + BIAS; ++line) {
        const int width = line < KT * KH ? KW : 1;
        __syncthreads();
#pragma unroll
        for (int kw = 0; kw < width; ++kw)
#pragma unroll
            for (int v = 0; v < VECTOR; ++v)
                kept[kw * VECTOR + v][threadIdx.x] =
                    line < KT * KH ? c.sum[line / KH][line % KH][kw][v] : c.bias[v];
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < width * held; i += blockDim.x) {
            const int channel = i % held, kw = i / held;
            float total = 0.0f;
#pragma unroll 1
            for (int group = 0; group < strips * rows; ++group)
                total += kept[kw * VECTOR + channel % VECTOR][group * LANES + channel / VECTOR];
            out[(long long)(line * KW + kw) * CHANNELS + channel] = total;
        }
    }
}

#endif
