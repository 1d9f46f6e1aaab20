/* tests/unit.c - what the rooms of run.c promise, one function a promise.
 *
 *   make tests/unit && tests/unit [PART OF A NAME]
 *
 * Each test is a process of its own, so that one that dies takes no other with it. A failing one
 * prints its name, the line, what it got and what it wanted.
 */
#define main run_main
#include "../run.c"
#undef main
#include <sys/wait.h>

// ------------------------------------------------------------------------------------------------
// Expecting

static const char *sentence;  // the test that runs

__attribute__((noreturn, format(printf, 2, 3)))
static void fail(int line, const char *format, ...) {
    va_list args;
    va_start(args, format);
    printf("%s (tests/unit.c:%d): ", sentence, line);
    vprintf(format, args);
    putchar('\n');
    exit(1);
}

#define EXPECT(what) do { if (!(what)) fail(__LINE__, "got false, wanted %s", #what); } while (0)
#define EXPECT_INT(got, wanted) expect_int(__LINE__, (long long)(got), (long long)(wanted))
#define EXPECT_NEAR(got, wanted, off) \
    expect_near(__LINE__, (double)(got), (double)(wanted), (double)(off))
#define EXPECT_BITS(got, wanted, n) expect_bits(__LINE__, (got), (wanted), (size_t)(n))
#define EXPECT_TEXT(got, n, wanted) \
    expect_text(__LINE__, (got), (size_t)(n), (wanted), strlen(wanted))

static void expect_int(int line, long long got, long long wanted) {
    if (got != wanted)
        fail(line, "got %lld, wanted %lld", got, wanted);
}

static void expect_near(int line, double got, double wanted, double off) {
    if (!(fabs(got - wanted) <= off))
        fail(line, "got %.9g, wanted %.9g within %.2g", got, wanted, off);
}

static void expect_bits(int line, const float *got, const float *wanted, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (bits_of_float(got[i]) != bits_of_float(wanted[i]))
            fail(line, "got %.9g, wanted %.9g at %zu of %zu, bit for bit", (double)got[i],
                 (double)wanted[i], i, n);
}

static void expect_text(int line, const char *got, size_t n, const char *wanted, size_t m) {
    if (n != m || (n && memcmp(got, wanted, n) != 0))
        fail(line, "got '%.*s', wanted '%.*s'", (int)n, got, (int)m, wanted);
}

// What `act` says before it dies with this status must hold `wanted`.
static void expect_death(int line, void (*act)(void *), void *with, int status,
                         const char *wanted) {
    int ends[2], how;
    char said[1024];
    size_t n = 0;
    if (pipe(ends) != 0)
        fail(line, "no pipe");
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        act(with);
        exit(0);
    }
    close(ends[1]);
    for (ssize_t k; n < sizeof said - 1 && (k = read(ends[0], said + n, sizeof said - 1 - n)) > 0;)
        n += (size_t)k;
    said[n] = '\0';
    close(ends[0]);
    waitpid(child, &how, 0);
    if (!WIFEXITED(how) || WEXITSTATUS(how) != status || !strstr(said, wanted))
        fail(line, "got status %#x and '%s', wanted %d and '%s'", (unsigned)how, said, status,
             wanted);
}

// ------------------------------------------------------------------------------------------------
// Making small data

static uint32_t random_bits(uint32_t *state) {
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;  // 24 bits
}

// -1 to 1, the smaller the likelier, as weights and activations are.
static float random_number(uint32_t *state) {
    float a = (float)random_bits(state) * 0x1p-23f - 1, b = (float)random_bits(state) * 0x1p-24f;
    return a * b;
}

static float *random_numbers(size_t n, uint32_t seed) {
    float *x = NEW(float, n);
    for (size_t i = 0; i < n; i++)
        x[i] = random_number(&seed);
    return x;
}

static double largest(const double *x, size_t n) {
    double peak = 0;
    for (size_t i = 0; i < n; i++)
        peak = fabs(x[i]) > peak ? fabs(x[i]) : peak;
    return peak;
}

// Numbers as a matrix like `w`; the tensor owns its data.
static Tensor new_tensor(Tensor w, const float *x) {
    const Type type = w.type;
    const int rows = w.rows, cols = w.cols;
    uint8_t *data = NEW(uint8_t, tensor_bytes(&w));
    size_t wide = group_count(cols) * GROUP;
    float *padded = NEW(float, wide);
    for (int r = 0; is_quantized(type) && r < (int)round_up((size_t)rows, PANEL); r++) {
        memset(padded, 0, wide * sizeof *padded);
        if (r < rows)
            memcpy(padded, x + (size_t)r * (size_t)cols, (size_t)cols * sizeof *padded);
        pack_row(data + (size_t)(r / PANEL) * panel_bytes(type, cols), &w, r, padded);
    }
    for (int i = 0; !is_quantized(type) && i < rows * cols; i++) {
        uint32_t bits = bits_of_float(x[i]);
        bits = type == F16 ? narrow_half(x[i]) : type == BF16 ? bits >> 16 : bits;
        memcpy(data + row_bytes(type, i), &bits, row_bytes(type, 1));
    }
    free(padded);
    w.data = data;
    return w;
}

static void free_tensor(Tensor *w) { free((void *)(uintptr_t)w->data); }

static Tensor random_tensor(Type type, int rows, int cols, uint32_t seed) {
    float *x = random_numbers((size_t)rows * (size_t)cols, seed);
    Tensor w = new_tensor((Tensor){type, rows, cols, true, NULL}, x);
    free(x);
    return w;
}

// A model of random weights in memory.
static Model new_model(Config c, uint32_t seed) {
    Model m = {.config = c, .layers = new_array((size_t)c.n_layers, sizeof *m.layers)};
    for (SlotId s = 0; s < SLOTS; s++)
        for (int l = 0; l < tensors_of(&c, s); l++) {
            Tensor w = blank_tensor(&c, s);
            m.layers[l][s] = random_tensor(w.type, w.rows, w.cols, seed++);
        }
    if (c.flags & TIED)
        m.layers[0][CLASSIFIER] = m.layers[0][EMBEDDING];
    return m;
}

static void free_model(Model *m) {
    for (SlotId s = 0; s < SLOTS; s++)
        for (int l = 0; l < tensors_of(&m->config, s); l++)
            free_tensor(&m->layers[l][s]);
    free(m->layers);
}

// A small model in which no extent is a multiple of another's unit.
static Config small_config(Type type) {
    return (Config){.type = type, .dim = 36, .hidden_dim = 50, .n_layers = 2, .n_heads = 6,
                    .n_kv_heads = 2, .head_dim = 10, .vocab_size = 67, .max_seq_len = 700,
                    .flags = BIASES | HEAD_NORMS, .norm_eps = 1e-5f, .rope_theta = 1e4f};
}

static const int thread_counts[] = {1, 2, 5};

// ------------------------------------------------------------------------------------------------
// Room 1: the foundation

static void what_is_dealt_from_an_arena_lies_apart(void) {
    _Alignas(64) char block[128];
    Arena sizes = {0}, a = {block, 0};
    DEAL(&sizes, char, 3);
    DEAL(&sizes, double, 5);
    char *x = DEAL(&a, char, 3);
    double *y = DEAL(&a, double, 5);
    EXPECT((char *)y - x >= 64 && (uintptr_t)y % 64 == 0 && a.used == sizes.used);
}

static void sizes_that_overflow_are_dealt_as_too_much(void) {
    Arena a = {0};
    for (int i = 0; i < 100; i++)
        DEAL(&a, double, SIZE_MAX / 2);
    EXPECT(a.used >= 100.0 * (double)SIZE_MAX);
}

static void text_grows_by_any_amount(void) {
    Bytes b = {0};
    for (size_t n = 0; n < 300; n++)
        for (size_t i = 0; i < n; i++)
            append(&b, &"0123456789"[(b.n) % 10], 1);
    EXPECT_INT(b.n, 300 * 299 / 2);
    for (size_t i = 0; i < b.n; i++)
        EXPECT_INT(b.at[i], '0' + (char)(i % 10));
    free(b.at);
}

// ------------------------------------------------------------------------------------------------
// Rooms 2 and 3: the model and the checkpoint

static void a_header_written_is_the_config_read(void) {
    Config c = small_config(Q8);
    c.window = 24, c.scaling = LLAMA3, c.factor = 8, c.low_freq_factor = 1, c.high_freq_factor = 4;
    c.original_context = 8192;
    Header h = {MAGIC, 1, c, {0}, HEADER};
    Config back;
    memcpy(&back, (char *)&h + 12, sizeof back);
    for (int i = 0; i < COUNT(fields); i++)
        EXPECT_NEAR(field_value(&back, &fields[i]), field_value(&c, &fields[i]), 0);
}

static void the_tensors_of_all_slots_fill_the_layers_and_the_model(void) {
    Config c = small_config(F32);
    Model m = new_model(c, 1);
    for (SlotId s = 0; s < SLOTS; s++)
        EXPECT(m.layers[tensors_of(&c, s) - 1][s].data != NULL);
    free_model(&m);
}

// ------------------------------------------------------------------------------------------------
// Room 4: threads

typedef struct {
    _Atomic int *done;    // (items)
    _Atomic int *inside;  // (threads) how many calls a thread number has at once
    _Atomic bool crowded;
    int threads;
} Counting;

static void count_items(void *job, int thread, int first, int end) {
    Counting *c = job;
    if (thread < 0 || thread >= c->threads || atomic_fetch_add(&c->inside[thread], 1) != 0)
        c->crowded = true;
    for (int i = first; i < end; i++)
        c->done[i]++;
    atomic_fetch_sub(&c->inside[thread], 1);
}

static void every_item_is_done_exactly_once(void) {
    static const int items[] = {0, 1, 2, 3, 7, 16, 100, 1000};
    static const int counts[] = {1, 2, 3, 5, 8};
    for (int k = 0; k < COUNT(counts); k++) {
        Pool p;
        Counting c = {.done = NEW(_Atomic int, 1000), .inside = NEW(_Atomic int, counts[k]),
                      .threads = counts[k]};
        start_pool(&p, counts[k]);
        for (int job = 0; job < 400; job++) {
            int n = items[job % COUNT(items)];
            if (job % 100 == 99)
                nanosleep(&(struct timespec){0, 2000000}, NULL);  // so that the others fall asleep
            parallel(&p, n, count_items, &c);
            for (int i = 0; i < n; i++)
                EXPECT_INT(atomic_exchange(&c.done[i], 0), 1);
        }
        EXPECT(!c.crowded);
        stop_pool(&p);
        free((void *)c.done);
        free((void *)c.inside);
    }
}

static void a_pool_that_never_worked_stops(void) {
    for (int threads = 1; threads <= 6; threads++) {
        Pool p;
        start_pool(&p, threads);
        stop_pool(&p);
    }
}

static void at_least_one_core_is_usable(void) {
    EXPECT(usable_cores() >= 1 && usable_cores() <= MAX_THREADS);
}

// ------------------------------------------------------------------------------------------------
// Room 5: vectors

// By IEEE 754: sign, 5 bits of exponent, 10 of fraction.
static double half_value(uint16_t h) {
    int exponent = h >> 10 & 31, fraction = h & 1023;
    double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                : exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    return h & 0x8000 ? -size : size;
}

static void all_65536_halves_widen_exactly(void) {
    uint16_t some[WIDTH];
    float wide[WIDTH];
    for (int h = 0; h < 65536; h++) {
        double wanted = half_value((uint16_t)h);
        some[h % WIDTH] = (uint16_t)h;
        float got = widen_half((uint16_t)h);
        EXPECT(isnan(wanted) ? isnan(got) : (double)got == wanted);
        EXPECT(!signbit(got) == !(h >> 15));
        if (h % WIDTH < WIDTH - 1)
            continue;
        store_f32(wide, load_f16(some));
        for (int i = 0; i < WIDTH; i++)
            EXPECT_INT(bits_of_float(wide[i]), bits_of_float(widen_half(some[i])));
    }
}

// The half nearest to x among all of them, even where two are; from 65520 on infinity.
static uint16_t nearest_half(float x) {
    uint16_t sign = signbit(x) ? 0x8000 : 0, low = 0, high = 0x7c00;
    double size = fabs((double)x);
    while (high - low > 1) {
        uint16_t middle = (uint16_t)((low + high) / 2);
        *(half_value(middle) <= size ? &low : &high) = middle;
    }
    double above = high == 0x7c00 ? 65536 : half_value(high), to_low = size - half_value(low);
    bool up = to_low > above - size || (to_low == above - size && low % 2);
    return (uint16_t)(sign | (up ? high : low));
}

static void floats_narrow_to_the_nearest_half_ties_to_even(void) {
    uint32_t seed = 1;
    for (int h = 0; h < 0x7c00; h++) {  // each half, the middle to the next, and just off both
        float x = widen_half((uint16_t)h);
        float next = h == 0x7bff ? 65536 : widen_half((uint16_t)(h + 1)), middle = (x + next) / 2;
        const float near[] = {x, -x, nextafterf(x, 1e9f), nextafterf(x, -1e9f), middle, -middle,
                              nextafterf(middle, 1e9f), nextafterf(middle, 0),
                              x + (next - x) * (float)random_bits(&seed) * 0x1p-24f};
        for (int i = 0; i < COUNT(near); i++) {
            float four[WIDTH] = {near[i]};
            uint16_t narrow[WIDTH];
            store_f16(narrow, load_f32(four));
            EXPECT_INT(narrow_half(near[i]), nearest_half(near[i]));
            EXPECT_INT(narrow[0], nearest_half(near[i]));
        }
    }
    EXPECT_INT(narrow_half(INFINITY), 0x7c00);
    EXPECT_INT(narrow_half(-1e38f), 0xfc00);
    EXPECT((narrow_half(NAN) & 0x7fff) > 0x7c00);
}

static void bf16_is_the_upper_half_of_a_float(void) {
    for (int h = 0; h < 65536; h += WIDTH) {
        uint16_t some[WIDTH];
        uint32_t wide[WIDTH];
        for (int i = 0; i < WIDTH; i++)
            some[i] = (uint16_t)(h + i);
        f32v v = load_weights(BF16, some, WIDTH);
        memcpy(wide, &v, sizeof wide);
        for (int i = 0; i < WIDTH; i++)
            EXPECT_INT(wide[i], (uint32_t)(h + i) << 16);
    }
}

static void the_exponential_is_within_an_ulp_or_so_of_libm(void) {
    double worst = 0;
    for (float x = -87; x <= 88; x += 0x1p-10f) {
        double wanted = exp((double)x), got = (double)exp_of(x);
        double ulp = ldexp(1, ilogb(wanted) - 23);
        worst = fabs(got - wanted) / ulp > worst ? fabs(got - wanted) / ulp : worst;
    }
    EXPECT_NEAR(worst, 0, 1.1);
}

static void the_exponential_has_an_answer_for_everything(void) {
    EXPECT_NEAR(exp_of(0), 1, 0);
    EXPECT_NEAR(exp_of(-87.01f), 0, 0);
    EXPECT_NEAR(exp_of(-INFINITY), 0, 0);
    EXPECT(exp_of(INFINITY) == exp_of(88) && exp_of(1000) == exp_of(88));
}

static void sixteen_lanes_are_joined_in_one_order(void) {
    float *x = random_numbers(4 * WIDTH, 1);
    for (int i = 0; i < 4 * WIDTH; i++)
        x[i] = i % 3 ? x[i] : x[i] * 1e6f;  // so that another order gives other bits
    for (int k = 0; k < 4; k++) {
        const float *v = x + k * WIDTH;
        float a = ((v[0] + v[8]) + (v[4] + v[12])) + ((v[2] + v[10]) + (v[6] + v[14]));
        float b = ((v[1] + v[9]) + (v[5] + v[13])) + ((v[3] + v[11]) + (v[7] + v[15]));
        float wanted = a + b, got = join(load_f32(v));
        EXPECT_BITS(&got, &wanted, 1);
    }
    f32v four[4];
    for (int k = 0; k < 4; k++)
        four[k] = load_f32(x + k * WIDTH);
    Four sums = join4(four);
    for (int k = 0; k < 4; k++) {
        float wanted = join(four[k]), got = sums[k];
        EXPECT_BITS(&got, &wanted, 1);
    }
    free(x);
}

static void the_greatest_lane_is_found_wherever_it_is(void) {
    f32v four[4];
    float x[4][WIDTH];
    for (int lane = 0; lane < WIDTH; lane++) {
        for (int k = 0; k < 4; k++) {
            for (int i = 0; i < WIDTH; i++)
                x[k][i] = (float)(k - 2 - i);
            x[k][(lane + k) % WIDTH] = (float)(100 * k + lane);
            four[k] = load_f32(x[k]);
        }
        Four peaks = greatest4(four);
        for (int k = 0; k < 4; k++) {
            EXPECT_NEAR(greatest(four[k]), 100 * k + lane, 0);
            EXPECT_NEAR(peaks[k], 100 * k + lane, 0);
        }
    }
}

// A register of dot4 against plain C. `w` are the weights as they enter, `zero` included.
static void check_dot4(const uint8_t *stored, const int8_t *x, bool q8) {
    IntPart w, q, sum = (IntPart){0} + 1000;
    memcpy(&w, stored, sizeof w);
    memcpy(&q, x, sizeof q);
    sum = dot4(sum, q8 && Q8_ZERO == 0 ? w ^ (int32_t)0x80808080 : w, q);
    for (int lane = 0; lane < LANES; lane++) {
        int wanted = 1000;
        for (int i = 4 * lane; i < 4 * lane + 4; i++)
            wanted += (q8 ? stored[i] - 128 + Q8_ZERO : stored[i]) * x[i];
        EXPECT_INT(sum[lane], wanted);
    }
}

static void dot4_is_the_product_of_four_bytes(void) {
    uint8_t w[4 * LANES];
    int8_t x[4 * LANES];
    static const int weights[] = {0, 1, 127, 128, 129, 254, 255}, inputs[] = {-127, -1, 0, 1, 127};
    uint32_t seed = 1;
    for (int i = 0; i < COUNT(weights); i++)
        for (int j = 0; j < COUNT(inputs); j++) {
            memset(w, weights[i], sizeof w);
            memset(x, inputs[j], sizeof x);
            check_dot4(w, x, true);
            memset(w, weights[i] % 16, sizeof w);
            check_dot4(w, x, false);
        }
    for (int k = 0; k < 1000; k++) {
        for (int i = 0; i < 4 * LANES; i++)
            w[i] = (uint8_t)random_bits(&seed), x[i] = (int8_t)(random_bits(&seed) % 255 - 127);
        check_dot4(w, x, true);
        for (int i = 0; i < 4 * LANES; i++)
            w[i] &= 15;
        check_dot4(w, x, false);
    }
}

static void part_of_a_vector_is_loaded_and_stored(void) {
    float *x = random_numbers(WIDTH, 1), all[WIDTH];
    for (int n = 0; n <= WIDTH; n++) {
        float *exact = NEW(float, n), *out = NEW(float, n);  // a sanitizer sees one too many
        memcpy(exact, x, (size_t)n * sizeof *x);
        store_f32(all, load_some(exact, n));
        for (int i = 0; i < WIDTH; i++)
            EXPECT_NEAR(all[i], i < n ? x[i] : 0, 0);
        store_some(out, load_f32(x), n);
        EXPECT_BITS(out, x, n);
        free(exact);
        free(out);
    }
    free(x);
}

// ------------------------------------------------------------------------------------------------
// Room 6: weights

static void quantized_weights_come_back_within_half_a_step(void) {
    static const int cols[] = {1, 31, 32, 33, 172};
    for (int k = 0; k < COUNT(cols); k++)
        for (Type type = Q8; type <= Q4; type++) {
            int n = cols[k], rows = 19;
            float *x = random_numbers((size_t)(rows * n), 7), *back = NEW(float, n);
            Tensor w = new_tensor((Tensor){type, rows, n, k % 2, NULL}, x);
            for (int r = 0; r < rows; r++) {
                unpack_row(back, &w, r);
                for (int i = 0; i < n; i++) {
                    float peak = 0;  // of the group; to round q8's scale costs 127/2048 of a step
                    for (int j = i / GROUP * GROUP; j < n && j < i / GROUP * GROUP + GROUP; j++)
                        peak = fabsf(x[r * n + j]) > peak ? fabsf(x[r * n + j]) : peak;
                    float step = type == Q8 ? 0.57f * peak / 127 : peak / 4.5f;
                    EXPECT_NEAR(back[i], x[r * n + i], step + 1e-7f);
                }
            }
            free_tensor(&w);
            free(x);
            free(back);
        }
}

// The squared error of a group as whole numbers of -8 to 7 times max/7, the scale as f16.
static double plain_q4_error(const float *x) {
    float peak = 0;
    for (int i = 0; i < GROUP; i++)
        peak = fabsf(x[i]) > peak ? fabsf(x[i]) : peak;
    double scale = half_value(nearest_half(peak / 7)), error = 0;
    for (int i = 0; i < GROUP; i++) {
        double q = scale > 0 ? nearbyint((double)x[i] / scale) : 0;
        q = q < -8 ? -8 : q > 7 ? 7 : q;
        error += ((double)x[i] - q * scale) * ((double)x[i] - q * scale);
    }
    return error;
}

static void q4_is_never_worse_than_max_over_7_and_on_the_whole_better(void) {
    double all = 0, plain = 0;
    uint32_t seed = 3;
    for (int k = 0; k < 300; k++) {
        float x[GROUP], back[GROUP];
        double error = 0;
        for (int i = 0; i < GROUP; i++)
            x[i] = random_number(&seed) * (i == k % 64 ? 4 : 1);
        Tensor w = new_tensor((Tensor){Q4, 1, GROUP, true, NULL}, x);
        unpack_row(back, &w, 0);
        for (int i = 0; i < GROUP; i++)
            error += (double)(x[i] - back[i]) * (double)(x[i] - back[i]);
        EXPECT(error <= plain_q4_error(x) * 1.00001);
        all += error, plain += plain_q4_error(x);
        free_tensor(&w);
    }
    EXPECT(all < 0.85 * plain);
}

static void the_error_that_packing_reports_is_the_error_it_made(void) {
    for (Type type = Q8; type <= Q4; type++) {
        int cols = 100;
        float *x = random_numbers(128, 5), back[100];
        memset(x + cols, 0, 28 * sizeof *x);
        uint8_t *panel = NEW(uint8_t, panel_bytes(type, cols));
        Tensor w = {type, PANEL, cols, true, panel};
        double said = pack_row(panel, &w, 3, x), made = 0;
        unpack_row(back, &w, 3);
        for (int i = 0; i < cols; i++)
            made += (double)(x[i] - back[i]) * (double)(x[i] - back[i]);
        EXPECT_NEAR(said, made, 1e-5 * made);
        free(panel);
        free(x);
    }
}

// The first n of rows x, ready for weights of the type of inputs.
static void prepare_rows(Inputs *in, const float *x, int n) {
    in->n = n;
    for (int t = 0; t < n; t++)
        prepare_row(in, t, x + t * in->cols);
}

// Inputs of n rows x for weights of a type, each array by itself: a sanitizer then sees its end.
static Inputs new_inputs(Type type, const float *x, int n, int cols) {
    size_t groups = round_up((size_t)n, (size_t)q_tokens(n)) * group_count(cols);
    Inputs in = {type, cols, n, n % 2 == 0, NEW(float, input_lane(cols, n) * WIDTH),
                 NEW(int8_t, groups * GROUP), NEW(Scale, groups)};
    prepare_rows(&in, x, n);
    return in;
}

static void free_inputs(Inputs *in) {
    free(in->vector);
    free(in->q);
    free(in->scale);
}

// What a Scale stands for.
static double scale_value(const Scale *x) {
    return (double)x->zero / (double)ROUNDER * (double)x->m;
}

// 1 to 4 rows of 5 groups at once: of the last four groups 1, 2, 3 and all are there. One is zeros.
static void activations_become_whole_numbers_no_larger_than_127(void) {
    enum { TOKENS = 11, COLS = 4 * GROUP + 3, GROUPS = 5 };
    float x[TOKENS][GROUPS * GROUP] = {0}, packed[TOKENS][COLS];
    uint32_t seed = 1;
    for (int t = 0; t < TOKENS; t++) {
        for (int i = 0; i < COLS; i++)
            x[t][i] = t == 3 ? 0 : random_number(&seed) * powf(10, (float)(i / GROUP * 4 - 10));
        memcpy(packed[t], x[t], sizeof packed[t]);
    }
    Inputs in = new_inputs(Q8, packed[0], TOKENS, COLS);
    memset(in.q, -128, TOKENS * GROUPS * GROUP);  // new_inputs took one row at a time
    for (int t = 0, n = 1; t < TOKENS; t += n, n = n < 4 ? n + 1 : 1)
        prepare(&in, t, n, 0, packed[t], COLS, COLS);
    for (int t = 0; t < TOKENS; t++)
        for (int g = 0; g < GROUPS; g++) {
            const float *group = x[t] + g * GROUP;
            size_t at = tiled(GROUPS, Q_TOKENS, t, (size_t)g);
            int sum = 0;
            float peak = 0;
            for (int i = 0; i < GROUP; i++)
                peak = fmaxf(peak, fabsf(group[i]));
            const Scale *made = in.scale + at;
            double scale = scale_value(made);
            EXPECT(scale >= (double)peak / 127 * (1 - 1e-7));  // the least of 4 bits that is enough
            EXPECT(peak == 0 || scale < (double)peak / 127 * (1 + 1e-7) + scale / 8);
            EXPECT_INT(bits_of_float((float)scale) & 0xfffff, 0);
            EXPECT(made->m >= 0.5f && made->m < 1);
            EXPECT(made->less == -made->zero * made->m);
            for (int i = 0; i < GROUP; i++) {
                int q = in.q[at * GROUP + (size_t)i];
                sum += q;
                EXPECT(q >= -127);
                EXPECT_NEAR((float)q * (float)scale, group[i], 0.50001f * (float)scale);
            }
            EXPECT_INT(made->start, (int32_t)bits_of_float(made->zero) - Q8_ZERO * sum);
        }
    free_inputs(&in);
}

static Scratch *new_scratch(int threads, int tokens, int cols) {
    Scratch *s = NEW(Scratch, threads);
    for (int i = 0; i < threads; i++) {
        s[i].turned = aligned_alloc(64, WIDTH * strip_lane(cols) * sizeof *s->turned);
        s[i].sums = aligned_alloc(64, 4 * strip_tokens(tokens) * sizeof *s->sums);
        s[i].table = aligned_alloc(64, group_count(cols) * sizeof *s->table);
        s[i].line = aligned_alloc(64, group_count(cols) * sizeof *s->line);
    }
    return s;
}

static void free_scratch(Scratch *s, int threads) {
    for (int i = 0; i < threads; i++)
        free(s[i].turned), free(s[i].sums), free(s[i].table), free(s[i].line);
    free(s);
}

// What goes into a product at (t, i), as the type sees it.
static double input_value(const Inputs *in, const float *x, int t, int i) {
    if (!is_quantized(in->type))
        return (double)x[t * in->cols + i];
    size_t g = tiled(group_count(in->cols), q_tokens(in->n), t, (size_t)(i / GROUP));
    return (double)in->q[g * GROUP + (size_t)(i % GROUP)] * scale_value(in->scale + g);
}

// Every number of a product within 2e-6 of the sum of its terms' sizes.
static void check_product(const float *out, const Tensor *w, const Inputs *in, const float *x) {
    float *row = NEW(float, w->cols);
    for (int r = 0; r < w->rows; r++) {
        unpack_row(row, w, r);
        for (int t = 0; t < in->n; t++) {
            double sum = 0, size = 0;
            for (int i = 0; i < w->cols; i++) {
                double product = (double)row[i] * input_value(in, x, t, i);
                sum += product, size += fabs(product);
            }
            EXPECT_NEAR(out[(size_t)t * (size_t)w->rows + (size_t)r], sum, 2e-6 * size + 1e-30);
        }
    }
    free(row);
}

// A product is right, the same bits for every number of tokens at once and of threads, and twice
// itself where it is added to itself.
static void check_matmul(Type type, int rows, int cols) {
    enum { TOKENS = MANY + 17 };
    static const int at_once[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 24,
                                  MANY - 1, MANY, MANY + 1, TOKENS};
    Tensor w = random_tensor(type, rows, cols, (uint32_t)(rows * cols));
    float *x = random_numbers((size_t)(TOKENS * cols), 99);
    Inputs in = new_inputs(type, x, TOKENS, cols), alone = new_inputs(type, x, 1, cols);
    float *one = NEW(float, TOKENS * rows), *many = NEW(float, TOKENS * rows);
    float *twice = NEW(float, TOKENS * rows);
    Pool pools[COUNT(thread_counts)];
    Scratch *scratch = new_scratch(5, TOKENS, cols);
    for (int k = 0; k < COUNT(thread_counts); k++)
        start_pool(&pools[k], thread_counts[k]);
    for (int t = 0; t < TOKENS; t++) {
        prepare_rows(&alone, x + t * cols, 1);
        matmul(&pools[0], &(Matmul){&w, {one + t * rows}, &alone, scratch, false});
    }
    check_product(one, &w, &in, x);
    for (int i = 0; i < TOKENS * rows; i++)
        twice[i] = one[i] + one[i];
    for (int k = 0; k < COUNT(at_once); k++) {
        int n = at_once[k];
        prepare_rows(&in, x, n);  // how they lie depends on how many there are
        memset(many, -1, (size_t)(TOKENS * rows) * sizeof *many);
        matmul(&pools[k % COUNT(thread_counts)], &(Matmul){&w, {many}, &in, scratch, false});
        EXPECT_BITS(many, one, n * rows);
        for (int i = n * rows; i < TOKENS * rows; i++)
            EXPECT(isnan(many[i]));  // untouched
        matmul(&pools[k % COUNT(thread_counts)], &(Matmul){&w, {many}, &in, scratch, true});
        EXPECT_BITS(many, twice, n * rows);
    }
    for (int k = 0; k < COUNT(thread_counts); k++)
        stop_pool(&pools[k]);
    free_scratch(scratch, 5);
    free_tensor(&w);
    free_inputs(&in);
    free_inputs(&alone);
    free(x);
    free(one);
    free(many);
    free(twice);
}

// Of n tokens at once the last has a number too large for any scale, or no number at all.
static void check_bad_number(Type type, int n, float bad) {
    enum { ROWS_OF_W = 33, COLS = 3 * GROUP };
    Tensor w = random_tensor(type, ROWS_OF_W, COLS, 7);
    float *x = random_numbers((size_t)n * COLS, 5), *out = NEW(float, n * ROWS_OF_W);
    Pool pool;
    Scratch *scratch = new_scratch(1, n, COLS);
    x[(n - 1) * COLS + GROUP + 3] = bad;
    Inputs in = new_inputs(type, x, n, COLS);
    start_pool(&pool, 1);
    matmul(&pool, &(Matmul){&w, {out}, &in, scratch, false});
    for (int i = 0; i < n * ROWS_OF_W; i++)
        EXPECT(isfinite(out[i]) == (i / ROWS_OF_W < n - 1 || fabsf(bad) < 2e33f));
    if (fabsf(bad) < 2e33f)
        check_product(out, &w, &in, x);
    stop_pool(&pool);
    free_scratch(scratch, 1);
    free_tensor(&w);
    free_inputs(&in);
    free(x);
    free(out);
}

static void numbers_too_large_for_whole_numbers_leave_no_finite_product(void) {
    static const int at_once[] = {1, 2, 8, 13, 40};
    const float bad[] = {1e34f, 3.4e38f, INFINITY, -INFINITY, NAN, float_of_bits(0x7fffffff), 1e33f};
    for (int type = Q8; type <= Q4; type++)
        for (int i = 0; i < COUNT(at_once); i++)
            for (int j = 0; j < COUNT(bad); j++)
                check_bad_number((Type)type, at_once[i], bad[j]);
}

static void check_matmul_of(Type type) {
    static const int rows[] = {1, 15, 16, 17, 33, 515}, cols[] = {1, 31, 32, 33, 172, 1024, 1100};
    for (int i = 0; i < COUNT(rows); i++)
        for (int j = 0; j < COUNT(cols); j++)
            check_matmul(type, rows[i], cols[j]);
}

static void products_of_f32_are_right_and_always_the_same(void) { check_matmul_of(F32); }
static void products_of_bf16_are_right_and_always_the_same(void) { check_matmul_of(BF16); }
static void products_of_f16_are_right_and_always_the_same(void) { check_matmul_of(F16); }
static void products_of_q8_are_right_and_always_the_same(void) { check_matmul_of(Q8); }
static void products_of_q4_are_right_and_always_the_same(void) { check_matmul_of(Q4); }

static void products_are_the_same_wherever_scales_stand(void) {
    static const int cols[] = {32, 33, 96, 1100}, tokens[] = {1, 2, 3, 5, 20};
    enum { HIGH = 161, MOST = 20 };
    for (int k = 0; k < 2 * COUNT(cols) * COUNT(tokens); k++) {
        const int c = cols[k / 2 % COUNT(cols)], n = tokens[k / 2 / COUNT(cols)];
        const Type type = k % 2 ? Q8 : Q4;
        float *x = random_numbers((size_t)(HIGH * c), 5), out[2][MOST * HIGH];
        Inputs in = new_inputs(type, x, n, c);
        Scratch *scratch = new_scratch(1, n, c);
        Pool p;
        start_pool(&p, 1);
        for (int i = 0; i < 2; i++) {
            Tensor w = new_tensor((Tensor){type, HIGH, c, i, NULL}, x);
            matmul(&p, &(Matmul){&w, {out[i]}, &in, scratch, false});
            free_tensor(&w);
        }
        stop_pool(&p);
        EXPECT_BITS(out[0], out[1], n * HIGH);
        free_scratch(scratch, 1);
        free_inputs(&in);
        free(x);
    }
}

static void three_products_in_one_job_are_three_products(void) {
    static const int rows[] = {40, 7, 65};
    float *x = random_numbers(150, 99);
    Inputs in = new_inputs(F32, x, 3, 50);
    Scratch *scratch = new_scratch(2, 3, 50);
    Tensor w[3];
    float *alone[3], *together[3];
    Pool p;
    start_pool(&p, 2);
    Matmul all = {w, {NULL}, &in, scratch, false};
    for (int i = 0; i < 3; i++) {
        w[i] = random_tensor(F32, rows[i], 50, (uint32_t)i);
        alone[i] = NEW(float, 3 * rows[i]), together[i] = NEW(float, 3 * rows[i]);
        all.out[i] = together[i];
        matmul(&p, &(Matmul){&w[i], {alone[i]}, &in, scratch, false});
    }
    matmul(&p, &all);
    stop_pool(&p);
    for (int i = 0; i < 3; i++) {
        EXPECT_BITS(together[i], alone[i], 3 * rows[i]);
        free(alone[i]);
        free(together[i]);
        free_tensor(&w[i]);
    }
    free_scratch(scratch, 2);
    free_inputs(&in);
    free(x);
}

// The stored extremes, which packing never makes but a file may hold.
static void products_of_any_bytes_do_not_saturate(void) {
    for (Type type = Q8; type <= Q4; type++) {
        int rows = 32, cols = 64;
        Tensor w = {type, rows, cols, true, NULL};
        uint8_t *data = NEW(uint8_t, tensor_bytes(&w));
        uint32_t seed = 1;
        for (size_t i = 0; i < tensor_bytes(&w); i++)
            data[i] = (uint8_t[]){0, 255, 128, 1}[random_bits(&seed) % 4];
        for (int r = 0; r < rows; r++)
            for (size_t g = 0; g < group_count(cols); g++)
                memcpy(data + (size_t)(r / PANEL) * panel_bytes(type, cols) + scales_at(&w, g) +
                       r % PANEL * 2, &(uint16_t){0x3c00}, 2);  // 1.0
        w.data = data;
        float x[5 * 64], out[5 * 32];
        for (int i = 0; i < 5 * cols; i++)
            x[i] = random_bits(&seed) % 2 ? 1 : -1;
        Inputs in = new_inputs(type, x, 5, cols);
        Pool p;
        start_pool(&p, 1);
        Scratch *scratch = new_scratch(1, 5, cols);
        matmul(&p, &(Matmul){&w, {out}, &in, scratch, false});
        stop_pool(&p);
        check_product(out, &w, &in, x);
        free_scratch(scratch, 1);
        free_inputs(&in);
        free(data);
    }
}

// ------------------------------------------------------------------------------------------------
// Room 7: attention

// Queries of n steps from position `from` on over a cache filled at random.
typedef struct {
    Model model;
    Pool pool;
    State state;
    Step *steps;
    int n;
    float *q, *keys, *values;  // (n, heads, head_dim), (context, kv_heads, head_dim)
} Scene;

enum { SCENE_CONTEXT = 620 };

static void open_scene(Scene *s, Config c, int threads, int from, int n) {
    c.n_layers = 1;
    *s = (Scene){.model = {.config = c}, .n = n, .steps = NEW(Step, n)};
    size_t kv = SCENE_CONTEXT * (size_t)kv_dim(&c);
    start_pool(&s->pool, threads);
    s->state = (State){.model = &s->model, .pool = &s->pool, .context = SCENE_CONTEXT, .slots = 1,
                       .batch = n, .logit_rows = 1, .steps = s->steps, .n = n};
    open_state(&s->state);
    s->q = random_numbers((size_t)(n * q_dim(&c)), (uint32_t)from);
    s->keys = random_numbers(kv, 2), s->values = random_numbers(kv, 3);
    for (int i = 0; i < n * q_dim(&c); i++)
        s->q[i] *= 8, s->state.q[i] = s->q[i] / sqrtf((float)c.head_dim);
    for (int t = 0; t < n; t++)
        s->steps[t] = (Step){0, 0, from + t};
    for (int pos = 0; pos < from + n; pos++)
        for (int h = 0; h < c.n_kv_heads; h++) {
            size_t at = (size_t)(pos * kv_dim(&c) + h * c.head_dim);
            cache_position(&s->state.cache, 0, (size_t)h, pos, s->keys + at, s->values + at);
        }
    for (size_t i = 0; i < kv && is_quantized(c.type); i++) {
        s->keys[i] = widen_half(narrow_half(s->keys[i]));
        s->values[i] = widen_half(narrow_half(s->values[i]));
    }
}

static void close_scene(Scene *s) {
    close_state(&s->state);
    stop_pool(&s->pool);
    free(s->steps);
    free(s->q);
    free(s->keys);
    free(s->values);
}

// One head of one query by the definition.
static void plain_answer(double *out, const Scene *s, int t, int head) {
    const Config *c = &s->model.config;
    int pos = s->steps[t].pos, width = kv_dim(c), kv_head = head / (c->n_heads / c->n_kv_heads);
    double scores[SCENE_CONTEXT], peak = -INFINITY, total = 0;
    const float *q = s->q + t * q_dim(c) + head * c->head_dim;
    int first = c->window && pos >= c->window ? pos - c->window + 1 : 0;
    for (int p = first; p <= pos; p++) {
        scores[p] = 0;
        for (int i = 0; i < c->head_dim; i++)
            scores[p] += (double)q[i] * (double)s->keys[p * width + kv_head * c->head_dim + i];
        scores[p] /= sqrt(c->head_dim);
        peak = scores[p] > peak ? scores[p] : peak;
    }
    for (int i = 0; i < c->head_dim; i++)
        out[i] = 0;
    for (int p = first; p <= pos; p++) {
        double weight = exp(scores[p] - peak);
        total += weight;
        for (int i = 0; i < c->head_dim; i++)
            out[i] += weight * (double)s->values[p * width + kv_head * c->head_dim + i];
    }
    for (int i = 0; i < c->head_dim; i++)
        out[i] /= total;
}

static Config heads_config(Type type, int heads, int kv_heads, int head_dim, int window) {
    Config c = small_config(type);
    c.n_heads = heads, c.n_kv_heads = kv_heads, c.head_dim = head_dim, c.window = window;
    return c;
}

static void check_attention(Config c, int threads, int from, int n) {
    Scene s;
    double wanted[64];
    open_scene(&s, c, threads, from, n);
    attend(&s.state);
    for (int t = 0; t < n; t++)
        for (int h = 0; h < c.n_heads; h++) {
            plain_answer(wanted, &s, t, h);
            for (int i = 0; i < c.head_dim; i++)
                EXPECT_NEAR(s.state.y[t * q_dim(&c) + h * c.head_dim + i], wanted[i], 3e-6);
        }
    close_scene(&s);
}

static const int windows[] = {0, 1, 24, 256, 300};

static void attention_is_its_definition_for_every_kind_of_head(void) {
    static const struct { int heads, kv_heads, head_dim; } kinds[] = {
        {6, 2, 10}, {4, 4, 16}, {8, 1, 34}, {3, 1, 64}, {5, 5, 2},
    };
    for (int k = 0; k < COUNT(kinds); k++)
        for (int i = 0; i < COUNT(windows); i++)
            for (Type type = F32; type <= Q8; type += Q8) {
                Config c = heads_config(type, kinds[k].heads, kinds[k].kv_heads, kinds[k].head_dim,
                                        windows[i]);
                check_attention(c, 2, 0, 33);
                check_attention(c, 2, 240, 40);
            }
}

static void attention_of_one_token_is_its_definition_at_every_edge_of_a_block(void) {
    static const int positions[] = {0, 1, 15, 16, 17, 254, 255, 256, 257, 271, 511, 512, 513, 600};
    for (int i = 0; i < COUNT(positions); i++)
        for (int k = 0; k < COUNT(windows); k++)
            for (int j = 0; j < COUNT(thread_counts); j++)
                check_attention(heads_config(k % 2 ? Q4 : BF16, 6, 2, 10, windows[k]),
                                thread_counts[j], positions[i], 1);
}

// The answers to all queries of a scene at once.
static float *answers_of(Scene *s) {
    size_t n = (size_t)(s->n * q_dim(&s->model.config));
    float *out = NEW(float, n);
    attend(&s->state);
    memcpy(out, s->state.y, n * sizeof *out);
    return out;
}

// Items are claimed by whoever is free, so none may rely on another having been done.
static void attention_does_not_depend_on_the_order_of_its_items(void) {
    for (int k = 0; k < COUNT(windows); k++) {
        Scene s;
        open_scene(&s, heads_config(F32, 6, 2, 10, windows[k]), 2, 600, 1);
        float queries[60];
        memcpy(queries, s.state.q, sizeof queries);
        float *forwards = answers_of(&s);
        EXPECT_INT(s.state.parts, 600 / BLOCK + 1);
        memcpy(s.state.q, queries, sizeof queries);  // answers take its room
        for (int i = s.model.config.n_kv_heads * s.state.parts; i-- > 0;)
            attend_items(&s.state, 0, i, i + 1);
        each_row(&s.state, finish_row);
        EXPECT_BITS(s.state.y, forwards, 60);
        free(forwards);
        close_scene(&s);
    }
}

static void a_query_gets_the_same_bits_alone_and_among_others(void) {
    for (int k = 0; k < 2 * COUNT(windows); k++) {
        Scene s;
        open_scene(&s, heads_config(k % 2 ? Q8 : F32, 6, 2, 10, windows[k / 2]), 5, 230, 70);
        size_t size = (size_t)(s.n * q_dim(&s.model.config)) * sizeof(float);
        float *queries = memcpy(new_array(size, 1), s.state.q, size);
        float *together = answers_of(&s);
        for (int t = 0; t < s.n; t++) {
            State one = s.state;
            one.steps += t, one.n = 1;
            memcpy(one.q, queries + t * 60, 60 * sizeof *queries);  // answers take its room
            attend(&one);
            EXPECT_BITS(s.state.y, together + t * 60, 60);
        }
        free(together), free(queries);
        close_scene(&s);
    }
}

// ------------------------------------------------------------------------------------------------
// Room 8: the transformer

// By Hugging Face's definition of "llama3": wavelengths against the old context over a factor.
static double plain_frequency(const Config *c, int i) {
    double f = 1 / pow((double)c->rope_theta, 2.0 * i / c->head_dim), wave = 2 * acos(-1) / f;
    double low = (double)c->low_freq_factor, high = (double)c->high_freq_factor;
    if (c->scaling == LINEAR)
        return f / (double)c->factor;
    if (c->scaling == NO_SCALING || wave < c->original_context / high)
        return f;
    if (wave > c->original_context / low)
        return f / (double)c->factor;
    double smooth = (c->original_context / wave - low) / (high - low);
    return (1 - smooth) * f / (double)c->factor + smooth * f;
}

static Config scaled_config(Scaling scaling) {
    Config c = small_config(F32);
    c.head_dim = 64, c.rope_theta = 5e5f, c.scaling = scaling, c.factor = 8;
    c.low_freq_factor = 1, c.high_freq_factor = 4, c.original_context = 256;
    return c;
}

static void frequencies_of_rope_are_those_of_the_papers(void) {
    for (Scaling scaling = NO_SCALING; scaling < SCALINGS; scaling++) {
        Config c = scaled_config(scaling);
        for (int i = 0; i < c.head_dim / 2; i++)
            EXPECT_NEAR(rope_frequency(&c, i), plain_frequency(&c, i), 1e-14);
    }
}

static void a_turned_query_and_key_know_only_their_distance(void) {
    for (int flag = 0; flag <= NEIGHBOURS; flag += NEIGHBOURS) {
        Config c = small_config(F32);
        c.flags = (uint32_t)flag;
        double products[2];
        for (int k = 0; k < 2; k++) {
            float *q = random_numbers(10, 1), *key = random_numbers(10, 2), angles[2][10];
            for (int i = 0; i < 5; i++)
                for (int j = 0; j < 2; j++) {
                    double angle = (j * 13 + k * 100) * plain_frequency(&c, i);
                    angles[j][i] = (float)cos(angle), angles[j][5 + i] = (float)sin(angle);
                }
            rotate(q, angles[1], &c);
            rotate(key, angles[0], &c);
            products[k] = 0;
            for (int i = 0; i < 10; i++)
                products[k] += (double)q[i] * (double)key[i];
            free(q);
            free(key);
        }
        EXPECT_NEAR(products[1], products[0], 1e-6);
    }
}

static void a_norm_leaves_a_mean_square_of_one(void) {
    for (int n = 1; n < 70; n++) {
        float *x = random_numbers((size_t)n, (uint32_t)n), *out = NEW(float, n);
        Tensor w = random_tensor(F32, 1, n, 3);
        double squares = 0;
        for (int i = 0; i < n; i++)
            squares += (double)x[i] * (double)x[i];
        rmsnorm(out, x, &w, 1e-5f);
        for (int i = 0; i < n; i++) {
            double wanted = (double)x[i] / sqrt(squares / n + 1e-5) * (double)vector(&w)[i];
            EXPECT_NEAR(out[i], wanted, 1e-6 * fabs(wanted));
        }
        free(x);
        free(out);
        free_tensor(&w);
    }
}

// The whole model by its definition, in double.
static void plain_norm(double *out, const double *x, const Tensor *w, double eps) {
    double squares = 0;
    for (int i = 0; i < w->cols; i++)
        squares += x[i] * x[i];
    double scale = 1 / sqrt(squares / w->cols + eps);
    for (int i = 0; i < w->cols; i++)
        out[i] = x[i] * scale * (double)vector(w)[i];
}

// out = w x + bias, or added to what is there.
static void plain_product(double *out, const Tensor *w, const Tensor *bias, const double *x,
                          bool adds) {
    float *weights = NEW(float, w->cols);
    for (int r = 0; r < w->rows; r++) {
        double sum = bias && bias->rows ? (double)vector(bias)[r] : 0;
        unpack_row(weights, w, r);
        for (int i = 0; i < w->cols; i++)
            sum += (double)weights[i] * x[i];
        out[r] = adds ? out[r] + sum : sum;
    }
    free(weights);
}

static void plain_heads(double *heads, int n, const Tensor *norm, const Config *c, int pos) {
    int pairs = c->head_dim / 2;
    for (double *head = heads; head < heads + n * c->head_dim; head += c->head_dim) {
        if (norm->rows)
            plain_norm(head, head, norm, (double)c->norm_eps);
        for (int i = 0; i < pairs; i++) {
            double *a = c->flags & NEIGHBOURS ? head + 2 * i : head + i;
            double *b = c->flags & NEIGHBOURS ? a + 1 : a + pairs;
            double angle = pos * plain_frequency(c, i), x = *a, y = *b;
            *a = x * cos(angle) - y * sin(angle), *b = x * sin(angle) + y * cos(angle);
        }
    }
}

// Keys and values of all positions so far are (pos, kv_dim).
static void plain_mix(double *out, const double *q, const double *keys, const double *values,
                      const Config *c, int pos) {
    int d = c->head_dim, wide = kv_dim(c);
    int first = c->window && pos >= c->window ? pos - c->window + 1 : 0;
    for (int h = 0; h < c->n_heads; h++) {
        int at = h / (c->n_heads / c->n_kv_heads) * d;
        double total = 0, weight[SCENE_CONTEXT];
        for (int p = first; p <= pos; p++) {
            double score = 0;
            for (int i = 0; i < d; i++)
                score += q[h * d + i] * keys[p * wide + at + i];
            total += weight[p] = exp(score / sqrt(d));
        }
        for (int i = 0; i < d; i++) {
            out[h * d + i] = 0;
            for (int p = first; p <= pos; p++)
                out[h * d + i] += weight[p] / total * values[p * wide + at + i];
        }
    }
}

static void plain_feed_forward(double *x, const Tensor *w, const Config *c, double *in) {
    double *gate = NEW(double, 2 * (size_t)c->hidden_dim), *up = gate + c->hidden_dim;
    plain_norm(in, x, &w[FFN_NORM], (double)c->norm_eps);
    plain_product(gate, &w[W1], NULL, in, false);
    plain_product(up, &w[W3], NULL, in, false);
    for (int i = 0; i < c->hidden_dim; i++)
        gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i];
    plain_product(x, &w[W2], NULL, gate, true);
    free(gate);
}

static void plain_layer(double *x, const Tensor *w, const Config *c, int n) {
    double *keys = NEW(double, 2 * (size_t)(n * kv_dim(c))), *values = keys + n * kv_dim(c);
    double *in = NEW(double, (size_t)c->dim + 2 * (size_t)q_dim(c)), *q = in + c->dim;
    for (int t = 0; t < n; t++, x += c->dim) {
        double *k = keys + t * kv_dim(c);
        plain_norm(in, x, &w[ATTENTION_NORM], (double)c->norm_eps);
        plain_product(q, &w[WQ], &w[BQ], in, false);
        plain_product(k, &w[WK], &w[BK], in, false);
        plain_product(values + t * kv_dim(c), &w[WV], &w[BV], in, false);
        plain_heads(q, c->n_heads, &w[Q_NORM], c, t);
        plain_heads(k, c->n_kv_heads, &w[K_NORM], c, t);
        plain_mix(q + q_dim(c), q, keys, values, c, t);
        plain_product(x, &w[WO], NULL, q + q_dim(c), true);
        plain_feed_forward(x, w, c, in);
    }
    free(keys);
    free(in);
}

static double *plain_logits(const Model *m, const int *ids, int n) {
    const Config *c = &m->config;
    double *x = NEW(double, n * c->dim), *out = NEW(double, n * c->vocab_size);
    float *row = NEW(float, c->dim);
    for (int t = 0; t < n; t++) {
        unpack_row(row, &m->layers[0][EMBEDDING], ids[t]);
        for (int i = 0; i < c->dim; i++)
            x[t * c->dim + i] = (double)row[i];
    }
    for (int l = 0; l < c->n_layers; l++)
        plain_layer(x, m->layers[l], c, n);
    for (int t = 0; t < n; t++) {
        plain_norm(x + t * c->dim, x + t * c->dim, &m->layers[0][FINAL_NORM], (double)c->norm_eps);
        plain_product(out + t * c->vocab_size, &m->layers[0][CLASSIFIER], NULL, x + t * c->dim,
                      false);
    }
    free(row);
    free(x);
    return out;
}

static void open_it(void *state) { open_state(state); }

static void memory_that_cannot_be_had_is_said_with_what_helps(void) {
    Model m = {.config = small_config(F32)};
    Pool p = {.threads = 1};
    State s = {.model = &m, .pool = &p, .context = 1 << 30, .slots = INT_MAX, .batch = 1};
    expect_death(__LINE__, open_it, &s, FAILED, "a smaller context (-c) helps");
}

static void a_state_begins_as_zeros(void) {
    for (Type type = F32; type <= Q4; type++) {
        Model m = {.config = small_config(type)};
        Pool p = {.threads = 2};
        State s = {.model = &m, .pool = &p, .context = 600, .slots = 2, .batch = 9,
                   .logit_rows = 3};
        open_state(&s);
        memset(s.scratch, 0, 2 * sizeof *s.scratch);  // pointers
        EXPECT(all_zero((uint8_t *)s.arena.at, (size_t)s.arena.used));
        close_state(&s);
    }
}

// Short texts then touch little memory, whatever the context.
static void each_text_fills_its_cache_from_the_front(void) {
    Model m = {.config = small_config(Q8)};
    Pool p = {.threads = 1};
    State s = {.model = &m, .pool = &p, .context = 3 * BLOCK, .slots = 2, .batch = 1,
               .logit_rows = 1};
    open_state(&s);
    const Cache *c = &s.cache;
    const char *next = c->blocks;
    for (int slot = 0; slot < 2; slot++)
        for (int pos = 0; pos < 3 * BLOCK; pos += BLOCK)
            for (size_t h = 0; h < c->heads; h++, next += 2 * BLOCK * c->head_pad * 2)
                EXPECT(block_of(c, slot, h, pos + BLOCK - 1) == next);
    close_state(&s);
}

// Logits of n ids, fed `batch` at a time on some threads.
static float *fed_logits(const Model *m, const int *ids, int n, int batch, int threads) {
    const Config *c = &m->config;
    Pool p;
    State s;
    float *out = NEW(float, n * c->vocab_size);
    Step *steps = NEW(Step, batch);
    start_pool(&p, threads);
    s = (State){.model = m, .pool = &p, .context = n, .slots = 1, .batch = batch,
                .logit_rows = batch};
    open_state(&s);
    for (int at = 0, k; at < n; at += k) {
        k = least(batch, n - at);
        for (int t = 0; t < k; t++)
            steps[t] = (Step){ids[at + t], 0, at + t};
        forward(&s, steps, k, 0);
        memcpy(row(out, at, c->vocab_size), logits(&s, 0, k),
               (size_t)(k * c->vocab_size) * sizeof *out);
    }
    close_state(&s);
    stop_pool(&p);
    free(steps);
    return out;
}

static int *random_ids(int n, int vocab_size) {
    int *ids = NEW(int, n);
    uint32_t seed = 11;
    for (int i = 0; i < n; i++)
        ids[i] = (int)(random_bits(&seed) % (uint32_t)vocab_size);
    return ids;
}

static void check_logits(Config c) {
    enum { TOKENS = MANY + 17 };
    Model m = new_model(c, 5);
    int *ids = random_ids(TOKENS, c.vocab_size), n = TOKENS * c.vocab_size;
    double *wanted = plain_logits(&m, ids, TOKENS), peak = largest(wanted, (size_t)n);
    float *got = fed_logits(&m, ids, TOKENS, 9, 2);
    for (int i = 0; i < n; i++)
        EXPECT_NEAR(got[i], wanted[i], 1e-5 * peak);
    free_model(&m);
    free(ids);
    free(wanted);
    free(got);
}

static void logits_are_those_of_the_definition_with_every_option(void) {
    static const uint32_t flags[] = {0, TIED, BIASES, HEAD_NORMS, NEIGHBOURS, ALL_FLAGS};
    for (int i = 0; i < COUNT(flags); i++)
        for (Type type = F32; type <= F16; type++) {
            Config c = small_config(type);
            c.flags = flags[i], c.window = i % 2 ? 7 : 0;
            check_logits(c);
        }
    for (Scaling scaling = LINEAR; scaling < SCALINGS; scaling++) {
        Config c = scaled_config(scaling);
        c.original_context = 16, c.rope_theta = 100;
        check_logits(c);
    }
}

static void forward_in_batches_equals_one_by_one(void) {
    enum { TOKENS = 270 };  // past a block of attention
    static const int batches[] = {7, 40, TOKENS};
    for (Type type = F32; type < TYPES; type++) {
        Config c = small_config(type);
        c.window = type % 2 ? 100 : 0, c.n_layers = 1;
        Model m = new_model(c, 5);
        int *ids = random_ids(TOKENS, c.vocab_size);
        float *one = fed_logits(&m, ids, TOKENS, 1, 1);
        for (int k = 0; k < COUNT(batches) * COUNT(thread_counts); k++) {
            float *many = fed_logits(&m, ids, TOKENS, batches[k / 3], thread_counts[k % 3]);
            EXPECT_BITS(many, one, TOKENS * c.vocab_size);
            free(many);
        }
        free(one);
        free(ids);
        free_model(&m);
    }
}

static void steps_whose_logits_nobody_wants_leave_the_others_the_same(void) {
    enum { TOKENS = 60, BATCH = 20 };
    for (Type type = F32; type < TYPES; type++)
        for (int wanted = 1; wanted <= 3; wanted++) {  // of the last batch; none of those before
            Config c = small_config(type);
            Model m = new_model(c, 5);
            Pool p;
            int *ids = random_ids(TOKENS, c.vocab_size), first = BATCH - wanted;
            float *one = fed_logits(&m, ids, TOKENS, 1, 1);
            Step steps[TOKENS];
            start_pool(&p, 2);
            State s = {.model = &m, .pool = &p, .context = TOKENS, .slots = 1, .batch = BATCH,
                       .logit_rows = wanted};
            open_state(&s);
            for (int t = 0; t < TOKENS; t++) steps[t] = (Step){ids[t], 0, t};
            forward(&s, steps, BATCH, BATCH);
            forward(&s, steps + BATCH, BATCH, BATCH);
            forward(&s, steps + 2 * BATCH, BATCH, first);
            EXPECT_BITS(logits(&s, first, wanted), one + (TOKENS - wanted) * c.vocab_size,
                        wanted * c.vocab_size);
            close_state(&s);
            stop_pool(&p);
            free(one);
            free(ids);
            free_model(&m);
        }
}

static void sequences_in_two_slots_do_not_see_each_other(void) {
    enum { TOKENS = 12 };
    Config c = small_config(F32);
    Model m = new_model(c, 5);
    Pool p;
    State s;
    int *ids = random_ids(TOKENS + 1, c.vocab_size), size = TOKENS * c.vocab_size;
    float *first = fed_logits(&m, ids, TOKENS, TOKENS, 1);
    float *second = fed_logits(&m, ids + 1, TOKENS, TOKENS, 1);
    start_pool(&p, 2);
    s = (State){.model = &m, .pool = &p, .context = TOKENS, .slots = 2, .batch = 2,
                .logit_rows = 2};
    open_state(&s);
    for (int t = 0; t < TOKENS; t++) {
        forward(&s, (Step[]){{ids[t], 0, t}, {ids[t + 1], 1, t}}, 2, 0);
        float *both = logits(&s, 0, 2);
        EXPECT_BITS(both, first + t * c.vocab_size, c.vocab_size);
        EXPECT_BITS(both + c.vocab_size, second + t * c.vocab_size, c.vocab_size);
    }
    EXPECT(memcmp(first, second, (size_t)size * sizeof *first) != 0);
    close_state(&s);
    stop_pool(&p);
    free(ids);
    free(first);
    free(second);
    free_model(&m);
}

// ------------------------------------------------------------------------------------------------
// Room 9: the tokenizer

typedef struct { char text[16]; float score; } Entry;

// llama2.c's file of 259 first tokens and these, opened; the name is gone when it returns.
static Tokenizer new_tokenizer(const Entry *entries, int n) {
    static const char *const first[] = {"<unk>", "\n<s>\n", "\n</s>\n"};
    char path[] = "/tmp/llama02-unit-XXXXXX";
    int fd = mkstemp(path);
    FILE *out = fdopen(fd, "wb");
    uint32_t longest = 16;
    fwrite(&longest, 4, 1, out);
    for (int i = 0; i < 259 + n; i++) {
        char byte[8];
        snprintf(byte, sizeof byte, "<0x%02X>", (i - 3) & 255);
        const char *text = i < 3 ? first[i] : i < 259 ? byte : entries[i - 259].text;
        float score = i < 259 ? 0 : entries[i - 259].score;
        uint32_t length = (uint32_t)strlen(text);
        fwrite(&score, 4, 1, out);
        fwrite(&length, 4, 1, out);
        fwrite(text, 1, length, out);
    }
    fclose(out);
    Tokenizer t = open_tokenizer(path, 259 + n);
    unlink(path);
    return t;
}

// Greedy joining by its definition: the best pair, the leftmost of equals, again and again.
static void plain_encode(Tokens *out, const Entry *entries, int n, const char *text) {
    char symbol[64][16];
    int count = 0;
    symbol[count][0] = ' ', symbol[count++][1] = '\0';
    for (; *text; text++)
        symbol[count][0] = *text, symbol[count++][1] = '\0';
    for (;;) {
        int best = -1;
        float best_score = -INFINITY;
        for (int i = 0; i + 1 < count; i++)
            for (int k = 0; k < n; k++) {
                size_t left = strlen(symbol[i]);
                if (entries[k].score > best_score && strncmp(entries[k].text, symbol[i], left) == 0
                    && strcmp(entries[k].text + left, symbol[i + 1]) == 0)
                    best = i, best_score = entries[k].score;
            }
        if (best < 0)
            break;
        memcpy(symbol[best] + strlen(symbol[best]), symbol[best + 1], 8);  // words are short
        count--;
        memmove(symbol + best + 1, symbol + best + 2, (size_t)(count - best - 1) * sizeof *symbol);
    }
    for (int i = 0; i < count; i++) {
        int k = 0;
        while (k < n && strcmp(entries[k].text, symbol[i]) != 0)
            k++;
        if (k < n)
            push(out, 259 + k);
        for (const char *p = symbol[i]; k == n && *p; p++)
            push(out, 3 + (uint8_t)*p);
    }
}

static void joining_is_the_best_pair_first_of_equals_the_leftmost(void) {
    uint32_t seed = 1;
    for (int round = 0; round < 40; round++) {
        Entry entries[40];
        int n = 0;
        for (; n < 40; n++) {  // distinct words of a few letters, many scores equal
            int length = 1 + (int)(random_bits(&seed) % 4), same;
            do {
                for (int i = 0; i < length; i++)
                    entries[n].text[i] = " abc"[random_bits(&seed) % 4];
                entries[n].text[length] = '\0';
                for (same = 0; strcmp(entries[same].text, entries[n].text) != 0;)
                    same++;
                length += same < n && length < 6;
            } while (same < n);
            entries[n].score = -(float)(random_bits(&seed) % 12);
        }
        Tokenizer t = new_tokenizer(entries, n);
        for (int k = 0; k < 50; k++) {
            char text[40] = "";
            Tokens got = {0}, wanted = {0};
            for (int i = 0, length = 1 + (int)(random_bits(&seed) % 38); i < length; i++)
                text[i] = " aabc"[random_bits(&seed) % 5];
            encode(&got, &t, text, strlen(text));
            plain_encode(&wanted, entries, n, text);
            EXPECT_INT(got.n, wanted.n);
            for (size_t i = 0; i < got.n; i++)
                EXPECT_INT(got.at[i], wanted.at[i]);
            free(got.at);
            free(wanted.at);
        }
        close_tokenizer(&t);
    }
}

static const Entry some_entries[] = {
    {" ", -3}, {"a", -4}, {"b", -5}, {"ab", -1}, {" a", -2}, {"\xc3\xa9", -6}, {"\xe2\x82\xac", -7},
};

// All bytes of what ids become.
static Bytes decoded(const Tokenizer *t, const int *ids, size_t n) {
    Bytes out = {0};
    Decoder d = {.tokenizer = t};
    for (size_t i = 0; i < n; i++)
        decode(&out, &d, ids[i]);
    flush(&out, &d);
    return out;
}

static void any_bytes_go_round_unchanged(void) {
    Tokenizer t = new_tokenizer(some_entries, COUNT(some_entries));
    static const uint8_t odd[] = "a \0b\xc3\xa9\xe2\x82\xac\xf0\x9f";  // whole, begun, broken
    uint32_t seed = 1;
    for (int k = 0; k < 3000; k++) {
        char text[50];
        size_t n = random_bits(&seed) % sizeof text;
        for (size_t i = 0; i < n; i++)
            text[i] = (char)(k % 2 ? random_bits(&seed) : odd[random_bits(&seed) % sizeof odd]);
        Tokens ids = {0};
        encode(&ids, &t, text, n);
        Bytes back = decoded(&t, ids.at, ids.n);
        EXPECT_INT(back.n, n);
        EXPECT(n == 0 || memcmp(back.at, text, n) == 0);
        free(ids.at);
        free(back.at);
    }
    close_tokenizer(&t);
}

static void empty_text_has_no_tokens(void) {
    Tokenizer t = new_tokenizer(some_entries, COUNT(some_entries));
    Tokens ids = {0};
    encode(&ids, &t, "", 0);
    EXPECT_INT(ids.n, 0);
    close_tokenizer(&t);
}

static void names_of_control_tokens_in_text_are_text(void) {
    Tokenizer t = new_tokenizer(some_entries, COUNT(some_entries));
    static const char *const names[] = {"<s>", "</s>", "\n<s>\n", "<unk>", "<0x41>"};
    for (int k = 0; k < COUNT(names); k++) {
        Tokens ids = {0};
        encode(&ids, &t, names[k], strlen(names[k]));
        for (size_t i = 0; i < ids.n; i++)
            EXPECT(ids.at[i] > 2 && ids.at[i] != 3 + 0x41);
        free(ids.at);
    }
    close_tokenizer(&t);
}

static void bytes_of_a_character_come_out_with_its_last(void) {
    Tokenizer t = new_tokenizer(some_entries, COUNT(some_entries));
    static const uint8_t llama[] = {0xf0, 0x9f, 0xa6, 0x99};
    Bytes out = {0};
    Decoder d = {.tokenizer = &t};
    decode(&out, &d, 1);
    for (int i = 0; i < 4; i++) {
        EXPECT_INT(out.n, 0);
        decode(&out, &d, 3 + llama[i]);
    }
    EXPECT_TEXT(out.at, out.n, "\xf0\x9f\xa6\x99");
    free(out.at);
    close_tokenizer(&t);
}

static void bytes_that_can_be_no_character_come_out_at_once(void) {
    Tokenizer t = new_tokenizer(some_entries, COUNT(some_entries));
    static const struct { const char *in, *at_once, *in_the_end; } cases[] = {
        {"\x80", "\x80", "\x80"},                      {"\xff" "a", "\xff" "a", "\xff" "a"},
        {"\xf0\x9f" "a", "\xf0\x9f" "a", "\xf0\x9f" "a"}, {"\xf0\x9f", "", "\xf0\x9f"},
        {"\xc0\x80", "\xc0\x80", "\xc0\x80"},
        {"\xed\xa0\x80", "\xed\xa0\x80", "\xed\xa0\x80"},
        {"\xf4\x90", "\xf4\x90", "\xf4\x90"},
        {"\xe2\x82\xe2\x82\xac", "\xe2\x82\xe2\x82\xac", "\xe2\x82\xe2\x82\xac"},
    };
    for (int k = 0; k < COUNT(cases); k++) {
        Bytes out = {0};
        Decoder d = {.tokenizer = &t};
        for (const char *p = cases[k].in; *p; p++)
            decode(&out, &d, 3 + (uint8_t)*p);
        EXPECT_TEXT(out.at, out.n, cases[k].at_once);
        flush(&out, &d);
        EXPECT_TEXT(out.at, out.n, cases[k].in_the_end);
        free(out.at);
    }
    close_tokenizer(&t);
}

static void only_the_very_first_space_is_the_dummy_prefix(void) {
    Tokenizer t = new_tokenizer(some_entries, COUNT(some_entries));
    Bytes out = decoded(&t, (int[]){1, 263, 263, 259, 260}, 5);  // BOS, " a", " a", " ", "a"
    EXPECT_TEXT(out.at, out.n, "a a a");
    free(out.at);
    close_tokenizer(&t);
}

static void control_tokens_print_nothing_and_ids_out_of_range_neither(void) {
    Tokenizer t = new_tokenizer(some_entries, COUNT(some_entries));
    Bytes out = decoded(&t, (int[]){0, 1, 2, -1, 259 + COUNT(some_entries), INT_MAX, INT_MIN}, 7);
    EXPECT_INT(out.n, 0);
    EXPECT(ends_text(&t, 1) && ends_text(&t, 2) && !ends_text(&t, 3) && !ends_text(&t, -1));
    free(out.at);
    close_tokenizer(&t);
}

static void every_code_goes_through_utf8_and_back(void) {
    for (uint32_t code = 0; code < 0x110000; code += code < 0x3000 ? 1 : 251) {
        Bytes out = {0};
        append_code(&out, code);
        const uint8_t *text = (uint8_t *)out.at, *p = text;
        uint32_t back = next_code(&p, text + out.n);
        bool surrogate = code >= 0xD800 && code < 0xE000;
        EXPECT_INT(back, surrogate ? UNICODE + 0xED : code);
        EXPECT_INT(p - text, surrogate ? 1 : out.n);
        for (size_t i = 1; !surrogate && i < out.n; i++) {
            p = text;
            EXPECT_INT(next_code(&p, text + i), CUT_SHORT + *text);
            EXPECT_INT(p - text, 1);
        }
        free(out.at);
    }
}

// ------------------------------------------------------------------------------------------------
// Room 10: the sampler

static void random_numbers_are_those_of_xorshift64star(void) {
    static const struct { uint64_t seed; uint32_t first[4]; } known[] = {  // by the definition
        {1, {4711630, 11259814, 12177677, 5092376}},
        {42, {5688906, 13124075, 13256299, 15838407}},
        {1ull << 63, {15795518, 10844430, 13361427, 7192643}},
        {0x9e3779b97f4a7c15, {885683, 5555276, 11027955, 8220171}},
    };
    for (int k = 0; k < COUNT(known); k++) {
        uint64_t state = known[k].seed;
        for (int i = 0; i < 4; i++)
            EXPECT_NEAR(random_float(&state) * 0x1p24f, known[k].first[i], 0);
    }
}

// Each p the probability of its index, by the definition.
static void plain_softmax(float *p, const float *logits, int n, float temperature) {
    double peak = -INFINITY, total = 0;
    for (int i = 0; i < n; i++)
        peak = (double)(logits[i] / temperature) > peak ? (double)(logits[i] / temperature) : peak;
    for (int i = 0; i < n; i++)
        total += exp((double)(logits[i] / temperature) - peak);
    for (int i = 0; i < n; i++)
        p[i] = (float)(exp((double)(logits[i] / temperature) - peak) / total);
}

static void softmax_gives_probabilities(void) {
    for (int n = 1; n < 70; n++) {
        float *x = random_numbers((size_t)n, (uint32_t)n), *p = NEW(float, n);
        for (int i = 0; i < n; i++)
            x[i] *= 30;
        plain_softmax(p, x, n, 0.7f);
        float sum = softmax(x, n, 0.7f);
        for (int i = 0; i < n; i++)
            EXPECT_NEAR(x[i], p[i], 1e-5f * p[i] + 1e-30f);
        EXPECT(sum >= 1 && sum <= (float)n);
        free(x);
        free(p);
    }
}

// The rule of llama2.c, written down from its description, without a sort.
static int plain_pick(const float *p, int n, float top_p, float chance) {
    float sum = 0;
    if (top_p <= 0 || top_p >= 1) {
        for (int i = 0; i < n; i++)
            if ((sum += p[i]) > chance)
                return i;
        return n - 1;
    }
    int order[128], kept = 0, reached = 0;
    for (int i = 0; i < n; i++)
        if (p[i] >= (1 - top_p) / (float)(n - 1)) {
            int at = kept++;  // behind all that are as likely
            for (; at > 0 && p[order[at - 1]] < p[i]; at--)
                order[at] = order[at - 1];
            order[at] = i;
        }
    while (reached < kept && sum <= top_p)
        sum += p[order[reached++]];
    float reach = chance * sum;
    sum = 0;
    for (int i = 0; i < reached; i++)
        if ((sum += p[order[i]]) > reach)
            return order[i];
    return order[reached - 1];
}

static void sampling_follows_the_rule_of_llama2c(void) {
    static const float top_ps[] = {0.9f, 0, 1, 0.1f, 0.5f, 0.99f}, temperatures[] = {1, 0.3f, 2};
    Candidate candidates[256];
    for (int k = 0; k < 3000; k++) {
        int n = 2 + k % 120;
        float *x = random_numbers((size_t)n, (uint32_t)k), p[128];
        for (int i = 0; i < n; i++)
            x[i] = k % 5 ? x[i] * 10 : (float)(int)(x[i] * 4);  // sometimes many are equal
        float top_p = top_ps[k % COUNT(top_ps)];
        float temperature = temperatures[k % COUNT(temperatures)];
        uint64_t state = (uint64_t)k + 1, same = state;
        plain_softmax(p, x, n, temperature);
        if (k % 5 == 0)  // equals must stay equal: take the program's own
            memcpy(p, x, (size_t)n * sizeof *p), softmax(p, n, temperature);
        int wanted = plain_pick(p, n, top_p, random_float(&same));
        Taste taste = {temperature, top_p, 0, 1, 0};
        EXPECT_INT(pick(x, n, &taste, &state, candidates, &(Tokens){0}), wanted);
        EXPECT_INT(state, same);
        free(x);
    }
}

static int picked(const float *x, int n, Taste taste, uint64_t seed, const Tokens *text) {
    float copy[64];
    Candidate candidates[128];
    memcpy(copy, x, (size_t)n * sizeof *x);
    return pick(copy, n, &taste, &seed, candidates, text);
}

static void temperature_0_takes_the_first_of_the_largest(void) {
    static const float x[] = {1, 3, 2, 3, -1};
    EXPECT_INT(picked(x, 5, (Taste){0, 0.9f, 0, 1, 0}, 1, &(Tokens){0}), 1);
}

static void top_k_of_1_is_greedy_and_of_k_among_the_k_best(void) {
    for (uint64_t seed = 1; seed < 200; seed++) {
        float *x = random_numbers(50, (uint32_t)seed);
        int best = most_likely(x, 50), better = 0;
        int one = picked(x, 50, (Taste){1, 0, 0, 1, 1}, seed, &(Tokens){0});
        int five = picked(x, 50, (Taste){1, 0, 0, 1, 5}, seed, &(Tokens){0});
        for (int i = 0; i < 50; i++)
            better += x[i] > x[five];
        EXPECT_INT(one, best);
        EXPECT(better < 5);
        free(x);
    }
}

static void min_p_takes_only_what_is_likely_beside_the_likeliest(void) {
    static const float x[] = {0, 0, 3, 2.9f, 0.5f, 1, 2};  // e^-0.1 is 0.9, e^-1 is 0.37
    bool seen[7] = {0};
    for (uint64_t seed = 1; seed < 500; seed++)
        seen[picked(x, 7, (Taste){1, 0, 0.36f, 1, 0}, seed * 7919, &(Tokens){0})] = true;
    EXPECT(seen[2] && seen[3] && seen[6] && !seen[0] && !seen[1] && !seen[4] && !seen[5]);
}

static void the_penalty_is_taken_once_from_each_token_of_the_text(void) {
    float x[] = {4, -4, 4, 1};
    Candidate old[4];
    penalize(x, old, &(Tokens){(int[]){0, 1, 0, 1, 1}, 5, 5}, 2);
    EXPECT_NEAR(x[0], 2, 0);
    EXPECT_NEAR(x[1], -8, 0);
    EXPECT_NEAR(x[2], 4, 0);
    EXPECT_NEAR(x[3], 1, 0);
}

static void logits_that_are_no_numbers_stay_in_range(void) {
    static const float odd[] = {NAN, INFINITY, -INFINITY, 0, 1e38f, -1e38f};
    static const Taste tastes[] = {
        {0, 0.9f, 0, 1, 0}, {1, 0.9f, 0, 1, 0}, {1, 0, 0, 1, 0}, {1, 0.9f, 0, 1, 3},
        {1, 0.5f, 0.1f, 1.5f, 0}, {1e-3f, 0.9f, 0, 1, 0}, {1e3f, 0.9f, 0.5f, 1e-3f, 2},
    };
    uint32_t seed = 1;
    Tokens text = {(int[]){0, 3, 3, 9}, 4, 4};
    for (int k = 0; k < 4000; k++) {
        float x[33];
        int n = 10 + k % 24;
        for (int i = 0; i < n; i++)
            x[i] = k < 6 ? odd[k] : random_bits(&seed) % 3 ? odd[random_bits(&seed) % 6]
                                                           : random_number(&seed);
        int id = picked(x, n, tastes[k % COUNT(tastes)], (uint64_t)k + 1, &text);
        EXPECT(id >= 0 && id < n);
    }
}

static void a_vocabulary_of_one_has_one_choice(void) {
    static const float x[] = {-3};
    EXPECT_INT(picked(x, 1, (Taste){1, 0.9f, 0, 1, 0}, 1, &(Tokens){0}), 0);
}

// ------------------------------------------------------------------------------------------------
// Room 13: the command line

static Options parsed(int n, char **words) {
    char *argv[16] = {"run"};
    memcpy(argv + 1, words, (size_t)n * sizeof *words);
    return parse_options(n + 1, argv);
}
#define PARSED(...) parsed(COUNT(((char *[]){__VA_ARGS__})), (char *[]){__VA_ARGS__})

static void options_have_the_defaults_of_llama2c(void) {
    Options o = PARSED("m.bin");
    EXPECT_TEXT(o.model, strlen(o.model), "m.bin");
    EXPECT_TEXT(o.mode, strlen(o.mode), "generate");
    EXPECT_NEAR(o.taste.temperature, 1, 0);
    EXPECT_NEAR(o.taste.top_p, 0.9f, 0);
    EXPECT_INT(o.steps, 256);
}

static void every_option_sets_its_own_field_and_no_other(void) {
    Options o = PARSED("-t", "0.5", "m.bin", "-n", "7", "-i", "-", "-p", "1e-1", "-s", "0", "-v");
    EXPECT_NEAR(o.taste.temperature, 0.5, 0);
    EXPECT_NEAR(o.taste.top_p, 0.1f, 0);
    EXPECT_INT(o.steps, 7);
    EXPECT_INT(o.seed, 0);
    EXPECT(o.verbose && strcmp(o.prompt, "-") == 0 && !o.file && !o.output && o.threads == 0);
    for (int i = 0; i < COUNT(options); i++)
        for (int j = 0; j < i; j++)
            EXPECT(options[i].at != options[j].at && options[i].letter != options[j].letter);
}

static void parse(void *words) {
    char **w = words;
    int n = 0;
    while (w[n])
        n++;
    parsed(n, w);
}

static void numbers_with_anything_else_in_them_are_refused(void) {
    static char *whole[] = {"", " 1", "1 ", "1x", "x", "0x10", "1e3", "--1", "1.5", "+", "-", "nan",
                            "9223372036854775808"};
    static char *real[] = {"", "nan", "inf", "-1", "1e999", "0,5", "1 ", "-inf", "-nan", "1001"};
    for (int i = 0; i < COUNT(whole); i++) {
        char *words[] = {"m.bin", "-n", whole[i], NULL};
        expect_death(__LINE__, parse, words, MISUSED, "-n wants");
    }
    for (int i = 0; i < COUNT(real); i++) {
        char *words[] = {"m.bin", "-t", real[i], NULL};
        expect_death(__LINE__, parse, words, MISUSED, "-t wants");
    }
}

// ------------------------------------------------------------------------------------------------
// All of them

typedef struct { const char *name; void (*run)(void); } Test;
#define TEST(name) {#name, name}

static const Test tests[] = {
    TEST(what_is_dealt_from_an_arena_lies_apart),
    TEST(sizes_that_overflow_are_dealt_as_too_much),
    TEST(memory_that_cannot_be_had_is_said_with_what_helps),
    TEST(a_state_begins_as_zeros),
    TEST(each_text_fills_its_cache_from_the_front),
    TEST(text_grows_by_any_amount),
    TEST(a_header_written_is_the_config_read),
    TEST(the_tensors_of_all_slots_fill_the_layers_and_the_model),
    TEST(every_item_is_done_exactly_once),
    TEST(a_pool_that_never_worked_stops),
    TEST(at_least_one_core_is_usable),
    TEST(all_65536_halves_widen_exactly),
    TEST(floats_narrow_to_the_nearest_half_ties_to_even),
    TEST(bf16_is_the_upper_half_of_a_float),
    TEST(the_exponential_is_within_an_ulp_or_so_of_libm),
    TEST(the_exponential_has_an_answer_for_everything),
    TEST(sixteen_lanes_are_joined_in_one_order),
    TEST(the_greatest_lane_is_found_wherever_it_is),
    TEST(dot4_is_the_product_of_four_bytes),
    TEST(part_of_a_vector_is_loaded_and_stored),
    TEST(activations_become_whole_numbers_no_larger_than_127),
    TEST(quantized_weights_come_back_within_half_a_step),
    TEST(q4_is_never_worse_than_max_over_7_and_on_the_whole_better),
    TEST(the_error_that_packing_reports_is_the_error_it_made),
    TEST(products_of_f32_are_right_and_always_the_same),
    TEST(products_of_bf16_are_right_and_always_the_same),
    TEST(products_of_f16_are_right_and_always_the_same),
    TEST(products_of_q8_are_right_and_always_the_same),
    TEST(products_of_q4_are_right_and_always_the_same),
    TEST(numbers_too_large_for_whole_numbers_leave_no_finite_product),
    TEST(products_are_the_same_wherever_scales_stand),
    TEST(three_products_in_one_job_are_three_products),
    TEST(products_of_any_bytes_do_not_saturate),
    TEST(attention_is_its_definition_for_every_kind_of_head),
    TEST(attention_of_one_token_is_its_definition_at_every_edge_of_a_block),
    TEST(attention_does_not_depend_on_the_order_of_its_items),
    TEST(a_query_gets_the_same_bits_alone_and_among_others),
    TEST(frequencies_of_rope_are_those_of_the_papers),
    TEST(a_turned_query_and_key_know_only_their_distance),
    TEST(a_norm_leaves_a_mean_square_of_one),
    TEST(logits_are_those_of_the_definition_with_every_option),
    TEST(forward_in_batches_equals_one_by_one),
    TEST(steps_whose_logits_nobody_wants_leave_the_others_the_same),
    TEST(sequences_in_two_slots_do_not_see_each_other),
    TEST(joining_is_the_best_pair_first_of_equals_the_leftmost),
    TEST(any_bytes_go_round_unchanged),
    TEST(empty_text_has_no_tokens),
    TEST(names_of_control_tokens_in_text_are_text),
    TEST(bytes_of_a_character_come_out_with_its_last),
    TEST(bytes_that_can_be_no_character_come_out_at_once),
    TEST(only_the_very_first_space_is_the_dummy_prefix),
    TEST(control_tokens_print_nothing_and_ids_out_of_range_neither),
    TEST(every_code_goes_through_utf8_and_back),
    TEST(random_numbers_are_those_of_xorshift64star),
    TEST(softmax_gives_probabilities),
    TEST(sampling_follows_the_rule_of_llama2c),
    TEST(temperature_0_takes_the_first_of_the_largest),
    TEST(top_k_of_1_is_greedy_and_of_k_among_the_k_best),
    TEST(min_p_takes_only_what_is_likely_beside_the_likeliest),
    TEST(the_penalty_is_taken_once_from_each_token_of_the_text),
    TEST(logits_that_are_no_numbers_stay_in_range),
    TEST(a_vocabulary_of_one_has_one_choice),
    TEST(options_have_the_defaults_of_llama2c),
    TEST(every_option_sets_its_own_field_and_no_other),
    TEST(numbers_with_anything_else_in_them_are_refused),
};

// True when the test, in a process of its own, came to its end.
static bool passes(const Test *t) {
    int how;
    sentence = t->name;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        t->run();
        exit(0);
    }
    waitpid(child, &how, 0);
    if (WIFSIGNALED(how))
        printf("%s: got signal %d, wanted an end\n", t->name, WTERMSIG(how));
    else if (WEXITSTATUS(how) > 1)
        printf("%s: got status %d, wanted 0\n", t->name, WEXITSTATUS(how));
    return WIFEXITED(how) && WEXITSTATUS(how) == 0;
}

int main(int argc, char **argv) {
    int passed = 0, failed = 0;
    for (int i = 0; i < COUNT(tests); i++) {
        if (argc > 1 && !strstr(tests[i].name, argv[1]))
            continue;
        *(passes(&tests[i]) ? &passed : &failed) += 1;
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
