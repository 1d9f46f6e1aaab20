/* run.c - LLaMA-02: Llama 2 inference in one C file.
 *
 *   make && ./run model.bin -i "Once upon a time"
 *
 * The architecture is that of Touvron et al., "Llama 2: Open Foundation and Fine-Tuned Chat Models"
 * (2023): RMSNorm, rotary position embedding, attention with grouped key/value heads, SwiGLU.
 * A checkpoint is mapped into memory and never copied; a prompt goes through in batches; text
 * leaves through a BPE tokenizer as soon as it is a whole character. `./run -h` lists options.
 *
 * Rooms, in reading order:
 *    1. Foundation       failing, allocating, files, output, time
 *    2. The model        what a Llama is made of, and the one list of its tensors
 *    3. The checkpoint   from bytes that cannot be trusted to a Model that can
 *    4. Threads          one verb: parallel
 *    5. Vectors          sixteen lanes, one fixed order of sums, on every machine
 *    6. Weights          the types, quantizing, and the one matmul
 *    7. Attention        the cache of keys and values, and what queries make of it
 *    8. The transformer  forward: tokens become hidden states; logits: hidden states become scores
 *    9. The tokenizer    text to tokens and back
 *   10. The sampler      logits to one token
 *   11. A session        feed and reply, the two verbs of every text mode
 *   12. The modes        each a main() of its own
 *   13. The command line one table of options
 *
 * Letters: n tokens at once, t one of them, l a layer, h a head. A comment such as (n, dim) is a
 * shape, the last extent lying together in memory.
 */
#define _GNU_SOURCE
#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#if defined __linux__
#include <sched.h>
#elif defined __APPLE__
#include <sys/sysctl.h>
#endif
#if defined __x86_64__
#include <immintrin.h>
#elif defined __aarch64__
#include <arm_neon.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "checkpoints are little-endian and used in place"
#endif

// ------------------------------------------------------------------------------------------------
// 1. Foundation: failing, allocating, files, output, time

#define VERSION "1.0"
#define INLINE static inline __attribute__((always_inline))
#if defined __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#define UNROLL_OUTER  // clang unrolls no loop around a long one
#else
#define UNROLL _Pragma("GCC unroll 16")
#define UNROLL_OUTER UNROLL
#endif
#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

enum { FAILED = 1, MISUSED = 2 };  // exit statuses; 0 is success

// Print "run: ..." as one line and exit. For what the user can mend: paths, files, options. Names
// and text from files may hold anything, so control characters are not passed on to a terminal.
static void complain(const char *format, va_list args) {
    char line[2048];
    fflush(stdout);
    vsnprintf(line, sizeof line, format, args);
    for (char *c = line; *c; c++) *c = iscntrl((unsigned char)*c) ? '?' : *c;
    fprintf(stderr, "run: %s\n", line);
}

__attribute__((noreturn, format(printf, 1, 2)))
static void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    complain(format, args);
    exit(FAILED);
}

static int least(int a, int b) { return a < b ? a : b; }
static int most(int a, int b) { return a > b ? a : b; }

static size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// n zeroed elements, for free(); dies rather than return NULL, so no caller checks.
static void *new_array(size_t n, size_t size) {
    void *p = calloc(n + !n, size);
    if (!p) die("no memory for %zu times %zu bytes", n, size);
    return p;
}
#define NEW(type, n) ((type *)new_array((n), sizeof(type)))

// Room for at least n elements behind *array, growing by doubling; the elements may move.
static void grow(void **array, size_t *room, size_t n, size_t size) {
    if (n <= *room) return;
    size_t wanted = n > 2 * *room ? n : 2 * *room;
    void *p = wanted <= SIZE_MAX / size ? realloc(*array, wanted * size) : NULL;
    if (!p) die("no memory for %zu times %zu bytes", wanted, size);
    *array = p, *room = wanted;
}

// Many arrays of one lifetime, dealt out from one block that the system fills with zeros page by
// page as it is touched. A first round with `at` NULL only adds up the size.
typedef struct {
    char *at;
    size_t used, size;
} Arena;

static void *deal(Arena *a, size_t n, size_t size) {
    size_t bytes = n <= SIZE_MAX / 4 / size ? round_up(n * size, 64) : SIZE_MAX / 4;
    void *p = a->at ? a->at + a->used : NULL;
    a->used = a->used < SIZE_MAX / 4 ? a->used + bytes : SIZE_MAX / 4;
    return p;
}
#define DEAL(arena, type, n) ((type *)deal((arena), (n), sizeof(type)))

// The block for what a first round added up. `advice` says what would make it smaller.
static Arena open_arena(size_t size, const char *advice) {
    void *at = mmap(NULL, size + !size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (at == MAP_FAILED) die("no memory: %.0f MB wanted; %s", (double)size / 1e6, advice);
    return (Arena){at, 0, size};
}

static void close_arena(Arena *a) { munmap(a->at, a->size + !a->size); }

typedef struct { char *at; size_t n, room; } Bytes;  // text that grows; not a C string
typedef struct { int *at; size_t n, room; } Tokens;  // ids that grow

static void append(Bytes *b, const char *text, size_t n) {
    if (n == 0) return;
    grow((void **)&b->at, &b->room, b->n + n, 1);
    memcpy(b->at + b->n, text, n);
    b->n += n;
}

static void push(Tokens *t, int id) {
    grow((void **)&t->at, &t->room, t->n + 1, sizeof *t->at);
    t->at[t->n++] = id;
}

// A file mapped read-only.
typedef struct {
    const char *path;
    const uint8_t *at;
    size_t size;
} File;

static File open_file(const char *path) {
    struct stat st;
    int fd = open(path, O_RDONLY | O_NONBLOCK);  // a FIFO must not hang here
    if (fd < 0 || fstat(fd, &st) != 0) die("%s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode)) die("%s: not a regular file", path);
    if (st.st_size == 0) die("%s: the file is empty", path);
    void *at = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) die("%s: cannot be mapped: %s", path, strerror(errno));
    close(fd);
    return (File){path, at, (size_t)st.st_size};
}

static void close_file(const File *f) { munmap((void *)(uintptr_t)f->at, f->size); }

static uint32_t read_u32(const void *p) { uint32_t v; memcpy(&v, p, sizeof v); return v; }
static uint64_t read_u64(const void *p) { uint64_t v; memcpy(&v, p, sizeof v); return v; }
static float    read_f32(const void *p) { float v;    memcpy(&v, p, sizeof v); return v; }

// All bytes of a stream.
static Bytes read_all(FILE *in, const char *name) {
    Bytes b = {0};
    char part[1 << 16];
    for (size_t n; (n = fread(part, 1, sizeof part, in)) > 0;) append(&b, part, n);
    if (ferror(in)) die("%s: %s", name, strerror(errno));
    return b;
}

// Text of a file, or of standard input for "-".
static Bytes read_text(const char *path) {
    if (strcmp(path, "-") == 0) return read_all(stdin, "standard input");
    FILE *in = fopen(path, "rb");
    if (!in) die("%s: %s", path, strerror(errno));
    Bytes b = read_all(in, path);
    fclose(in);
    return b;
}

// Where results go: standard output, or a file that takes its name only when it is complete. On
// Linux it has none before, so whatever ends the program leaves nothing behind; elsewhere it is
// PATH.part.
typedef struct {
    FILE *file;
    const char *path;  // NULL for standard output
    char *beside;      // the name before it is renamed; NULL for what cannot be (a device, a pipe)
    bool nameless;
} Output;

__attribute__((noreturn))
static void fail_output(const Output *o) {
    int reason = errno;
    if (o->beside && !o->nameless) unlink(o->beside);
    die("%s: cannot be written: %s", o->path ? o->path : "standard output", strerror(reason));
}

static int open_nameless(const char *path) {
#if defined O_TMPFILE
    const char *slash = strrchr(path, '/');
    char *folder = slash ? strndup(path, (size_t)(slash + 1 - path)) : strdup(".");
    int fd = folder ? open(folder, O_TMPFILE | O_WRONLY, 0666) : -1;
    free(folder);
    return fd;
#else
    (void)path;
    return -1;
#endif
}

static Output open_output(const char *path) {
    struct stat st;
    if (!path || strcmp(path, "-") == 0) return (Output){.file = stdout};
    Output o = {.path = path};
    int fd = -1;
    if (stat(path, &st) != 0 || S_ISREG(st.st_mode)) {
        o.beside = NEW(char, strlen(path) + sizeof ".part");
        sprintf(o.beside, "%s.part", path);
        fd = open_nameless(path);
        o.nameless = fd >= 0;
    }
    o.file = fd >= 0 ? fdopen(fd, "wb") : fopen(o.beside ? o.beside : path, "wb");
    if (!o.file) fail_output(&o);
    return o;
}

static void write_bytes(Output *o, const void *data, size_t n) {
    if (n && fwrite(data, 1, n, o->file) != n) fail_output(o);
}

static void close_output(Output *o) {
    char link[64];
    if (fflush(o->file) != 0 || ferror(o->file)) fail_output(o);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fileno(o->file));
    if (o->nameless) unlink(o->beside);
    if (o->nameless && linkat(AT_FDCWD, link, AT_FDCWD, o->beside, AT_SYMLINK_FOLLOW) != 0)
        fail_output(o);
    o->nameless = false;
    if ((o->path && fclose(o->file) != 0) || (o->beside && rename(o->beside, o->path) != 0))
        fail_output(o);
    free(o->beside);
}

// Ctrl-C held back is asked for between steps, so that no handler is needed, and no variable that
// one would change.
static void hold_interrupt(bool held) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    pthread_sigmask(held ? SIG_BLOCK : SIG_UNBLOCK, &set, NULL);
}

static bool interrupt_waits(void) {
    sigset_t set;
    return sigpending(&set) == 0 && sigismember(&set, SIGINT) == 1;
}

static void take_interrupt(void) {
    sigset_t set;
    int which;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    if (interrupt_waits()) sigwait(&set, &which);
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

// How far a long job is, on a terminal, once it has lasted a second.
typedef struct {
    const char *what;
    double start, shown;
} Progress;

static Progress start_progress(const char *what) { return (Progress){what, seconds(), 0}; }

static void show_progress(Progress *p, double done, double all) {
    double now = seconds();
    if (!isatty(STDERR_FILENO) || now - p->start < 1 || now - p->shown < 0.1) return;
    p->shown = now;
    fprintf(stderr, "\r%s: %3.0f %% ", p->what, all > 0 ? 100 * done / all : 100);
}

static void end_progress(const Progress *p) {
    if (p->shown > 0) fprintf(stderr, "\r\033[K");
}

// ------------------------------------------------------------------------------------------------
// 2. The model: what a Llama is made of

typedef enum { F32, BF16, F16, Q8, Q4, TYPES } Type;

static const char *const type_names[TYPES] = {"f32", "bf16", "f16", "q8", "q4"};

// Weights as they lie in the file; rows go with outputs, columns with inputs.
typedef struct {
    Type type;
    int rows, cols;       // a vector is one row; 0 rows: the model does not have it
    const uint8_t *data;  // row after row; the quantized types in panels, see room 6
} Tensor;

typedef enum { NO_SCALING, LINEAR, LLAMA3, SCALINGS } Scaling;

enum {
    TIED = 1,        // the classifier is the embedding
    BIASES = 2,      // on queries, keys and values
    HEAD_NORMS = 4,  // RMSNorm on each query and key head
    NEIGHBOURS = 8,  // RoPE turns pairs (2i, 2i + 1), otherwise (i, i + head_dim/2)
    ALL_FLAGS = 15
};

typedef struct {
    Type type;       // of the matrices; norms and biases are f32
    int dim;         // width of the residual stream
    int hidden_dim;  // width inside the feed-forward block
    int n_layers;
    int n_heads;     // query heads
    int n_kv_heads;  // n_heads / n_kv_heads query heads share one key and value head
    int head_dim;
    int vocab_size;
    int max_seq_len;
    int window;      // a token sees this many positions, itself included; 0: all
    uint32_t flags;
    float norm_eps, rope_theta;
    Scaling scaling; // of RoPE's frequencies
    float factor, low_freq_factor, high_freq_factor;
    int original_context;
} Config;

typedef struct {
    Tensor attention_norm, wq, wk, wv, bq, bk, bv, q_norm, k_norm, wo;
    Tensor ffn_norm, w1, w3, w2;  // w2(silu(w1 x) * w3 x)
} Layer;

typedef struct {
    Config config;
    Tensor embedding, final_norm, classifier;
    Layer *layers;
    File file;         // the mapping that all tensors point into
    const char *form;  // what kind of file it is
} Model;

static int q_dim(const Config *c) { return c->n_heads * c->head_dim; }
static int kv_dim(const Config *c) { return c->n_kv_heads * c->head_dim; }

typedef enum { ONE, DIM, Q_DIM, KV_DIM, HEAD_DIM, HIDDEN, VOCAB } Extent;

static int extent(const Config *c, Extent e) {
    switch (e) {
    case ONE:      return 1;
    case DIM:      return c->dim;
    case Q_DIM:    return q_dim(c);
    case KV_DIM:   return kv_dim(c);
    case HEAD_DIM: return c->head_dim;
    case HIDDEN:   return c->hidden_dim;
    case VOCAB:    return c->vocab_size;
    }
    return 0;
}

// Every tensor once, in the order of our file: loading, quantizing, counting and printing walk this
// table, and nothing else knows the list.
typedef enum {
    EMBEDDING, ATTENTION_NORM, WQ, WK, WV, BQ, BK, BV, Q_NORM, K_NORM, WO, FFN_NORM, W1, W3, W2,
    FINAL_NORM, CLASSIFIER, SLOTS
} SlotId;

static const struct Slot {
    const char *name;
    bool per_layer;
    size_t at;          // in Layer or in Model
    Extent rows, cols;  // one row: a vector, always f32
} slots[SLOTS] = {
    [EMBEDDING]      = {"embedding",      false, offsetof(Model, embedding),      VOCAB,  DIM},
    [ATTENTION_NORM] = {"attention norm", true,  offsetof(Layer, attention_norm), ONE,    DIM},
    [WQ]             = {"wq",             true,  offsetof(Layer, wq),             Q_DIM,  DIM},
    [WK]             = {"wk",             true,  offsetof(Layer, wk),             KV_DIM, DIM},
    [WV]             = {"wv",             true,  offsetof(Layer, wv),             KV_DIM, DIM},
    [BQ]             = {"bq",             true,  offsetof(Layer, bq),             ONE,    Q_DIM},
    [BK]             = {"bk",             true,  offsetof(Layer, bk),             ONE,    KV_DIM},
    [BV]             = {"bv",             true,  offsetof(Layer, bv),             ONE,    KV_DIM},
    [Q_NORM]         = {"q norm",         true,  offsetof(Layer, q_norm),         ONE,    HEAD_DIM},
    [K_NORM]         = {"k norm",         true,  offsetof(Layer, k_norm),         ONE,    HEAD_DIM},
    [WO]             = {"wo",             true,  offsetof(Layer, wo),             DIM,    Q_DIM},
    [FFN_NORM]       = {"ffn norm",       true,  offsetof(Layer, ffn_norm),       ONE,    DIM},
    [W1]             = {"w1",             true,  offsetof(Layer, w1),             HIDDEN, DIM},
    [W3]             = {"w3",             true,  offsetof(Layer, w3),             HIDDEN, DIM},
    [W2]             = {"w2",             true,  offsetof(Layer, w2),             DIM,    HIDDEN},
    [FINAL_NORM]     = {"final norm",     false, offsetof(Model, final_norm),     ONE,    DIM},
    [CLASSIFIER]     = {"classifier",     false, offsetof(Model, classifier),     VOCAB,  DIM},
};

static bool has_slot(const Config *c, SlotId s) {
    switch (s) {
    case BQ: case BK: case BV:  return c->flags & BIASES;
    case Q_NORM: case K_NORM:   return c->flags & HEAD_NORMS;
    case CLASSIFIER:            return !(c->flags & TIED);
    default:                    return true;
    }
}

static Tensor *tensor_at(Model *m, SlotId s, int layer) {
    char *base = slots[s].per_layer ? (char *)&m->layers[layer] : (char *)m;
    return (Tensor *)(void *)(base + slots[s].at);
}

// The shape and type that a model of this config gives to a slot.
static Tensor blank_tensor(const Config *c, SlotId s) {
    Extent rows = slots[s].rows;
    return (Tensor){rows == ONE ? F32 : c->type, extent(c, rows), extent(c, slots[s].cols), NULL};
}

// Quantized weights: GROUP columns share a scale, a LINE is 4 bytes of each of PANEL rows (room 6).
enum { GROUP = 32, PANEL = 16, LINE = 64 };

static size_t group_count(int cols) { return round_up((size_t)cols, GROUP) / GROUP; }
static size_t panel_count(int rows) { return round_up((size_t)rows, PANEL) / PANEL; }
static size_t group_lines(Type type) { return type == Q8 ? 8 : 4; }

// Bytes of the lines of a panel, after which its scales stand.
static size_t line_bytes(Type type, int cols) {
    return group_count(cols) * group_lines(type) * LINE;
}

static size_t panel_bytes(Type type, int cols) {
    return line_bytes(type, cols) + round_up(group_count(cols) * PANEL * 2, LINE);
}

static size_t row_bytes(Type type, int cols) { return (size_t)cols * (type == F32 ? 4 : 2); }

static bool is_quantized(Type type) { return type == Q8 || type == Q4; }

static size_t tensor_bytes(const Tensor *w) {
    return is_quantized(w->type) ? panel_count(w->rows) * panel_bytes(w->type, w->cols)
                                 : (size_t)w->rows * row_bytes(w->type, w->cols);
}

// ------------------------------------------------------------------------------------------------
// 3. The checkpoint: from bytes that cannot be trusted to a Model that can
//
// Ours: 256 bytes of header (below), then the tensors in the order of `slots`, layer by layer, each
// on a 64-byte boundary. llama2.c's versions 0 and 1 hold f32 kind by kind for all layers,
// unaligned.

enum { HEADER = 256, SIZE_AT = 248, LLAMA2C_MAGIC = 0x616b3432 };
static const char magic[8] = "LLAMA02";

// Where the header holds the config, and the bounds of every number. Extents are bounded so that an
// int counts the elements of a row, 2^20 items do a job (room 4), and no sum of sizes overflows.
static const struct Field {
    const char *name;
    size_t at, member;
    bool real;
    double least, most;
} fields[] = {
    {"type",             12, offsetof(Config, type),             false, 0, TYPES - 1},
    {"dim",              16, offsetof(Config, dim),              false, 1, 1 << 20},
    {"hidden_dim",       20, offsetof(Config, hidden_dim),       false, 1, 1 << 22},
    {"n_layers",         24, offsetof(Config, n_layers),         false, 1, 1 << 14},
    {"n_heads",          28, offsetof(Config, n_heads),          false, 1, 1 << 14},
    {"n_kv_heads",       32, offsetof(Config, n_kv_heads),       false, 1, 1 << 14},
    {"head_dim",         36, offsetof(Config, head_dim),         false, 1, 1 << 12},
    {"vocab_size",       40, offsetof(Config, vocab_size),       false, 1, 1 << 23},
    {"max_seq_len",      44, offsetof(Config, max_seq_len),      false, 1, 1 << 26},
    {"sliding_window",   48, offsetof(Config, window),           false, 0, INT_MAX},
    {"flags",            52, offsetof(Config, flags),            false, 0, ALL_FLAGS},
    {"norm_eps",         56, offsetof(Config, norm_eps),         true,  0, 1},
    {"rope_theta",       60, offsetof(Config, rope_theta),       true,  1e-9, FLT_MAX},
    {"rope_scaling",     64, offsetof(Config, scaling),          false, 0, SCALINGS - 1},
    {"factor",           68, offsetof(Config, factor),           true,  0, FLT_MAX},
    {"low_freq_factor",  72, offsetof(Config, low_freq_factor),  true,  0, FLT_MAX},
    {"high_freq_factor", 76, offsetof(Config, high_freq_factor), true,  0, FLT_MAX},
    {"original_context", 80, offsetof(Config, original_context), false, 0, 1 << 26},
};
enum { FIELDS_END = 84 };

static double field_value(const Config *c, const struct Field *f) {
    const char *at = (const char *)c + f->member;
    return f->real ? (double)read_f32(at) : (double)(int32_t)read_u32(at);
}

static void check_config(const Config *c, const char *path) {
    for (int i = 0; i < COUNT(fields); i++) {
        double v = field_value(c, &fields[i]);
        if (!(v >= fields[i].least && v <= fields[i].most))
            die("%s: %s is %.10g, not in %.10g to %.10g", path, fields[i].name, v,
                fields[i].least, fields[i].most);
    }
    if (c->n_heads % c->n_kv_heads)
        die("%s: n_heads %d is no multiple of n_kv_heads %d", path, c->n_heads, c->n_kv_heads);
    if (c->head_dim % 2) die("%s: head_dim %d is odd, but RoPE turns pairs", path, c->head_dim);
    if (q_dim(c) > 1 << 22)
        die("%s: n_heads %d times head_dim %d is above %d", path, c->n_heads, c->head_dim, 1 << 22);
    if (c->scaling != NO_SCALING && !(c->factor > 0))
        die("%s: factor of RoPE scaling is %g, not above 0", path, (double)c->factor);
    if (c->scaling == LLAMA3 && !(c->low_freq_factor < c->high_freq_factor && c->original_context))
        die("%s: RoPE scaling has low_freq_factor %g, high_freq_factor %g, original_context %d",
            path, (double)c->low_freq_factor, (double)c->high_freq_factor, c->original_context);
}

static bool all_zero(const uint8_t *p, size_t n) {
    while (n && *p == 0) p++, n--;
    return n == 0;
}

// The header of our format; the README has it as a table.
static Config read_config(const File *f) {
    Config c;
    if (f->size < HEADER)
        die("%s: %zu bytes are less than the %d of a header", f->path, f->size, HEADER);
    if (read_u32(f->at + 8) != 1) die("%s: version is %u, wanted 1", f->path, read_u32(f->at + 8));
    if (!all_zero(f->at + FIELDS_END, SIZE_AT - FIELDS_END))
        die("%s: bytes %d to %d of the header are not zero", f->path, FIELDS_END, SIZE_AT - 1);
    if (read_u64(f->at + SIZE_AT) != f->size)
        die("%s: the file has %zu bytes, its header says %llu", f->path, f->size,
            (unsigned long long)read_u64(f->at + SIZE_AT));
    for (int i = 0; i < COUNT(fields); i++)
        memcpy((char *)&c + fields[i].member, f->at + fields[i].at, 4);
    return c;
}

static void make_header(uint8_t *h, const Config *c, uint64_t size) {
    uint32_t version = 1;
    memset(h, 0, HEADER);
    memcpy(h, magic, sizeof magic);
    memcpy(h + sizeof magic, &version, sizeof version);
    for (int i = 0; i < COUNT(fields); i++)
        memcpy(h + fields[i].at, (const char *)c + fields[i].member, 4);
    memcpy(h + SIZE_AT, &size, sizeof size);
}

// The seven ints of llama2.c's headers.
static Config read_llama2c_config(const uint8_t *h, const char *path) {
    Config c = {.type = F32, .flags = NEIGHBOURS, .norm_eps = 1e-5f, .rope_theta = 1e4f};
    int *const ints[] = {&c.dim, &c.hidden_dim, &c.n_layers, &c.n_heads, &c.n_kv_heads,
                         &c.vocab_size, &c.max_seq_len};
    for (int i = 0; i < COUNT(ints); i++) *ints[i] = (int)read_u32(h + 4 * i);
    if (c.n_heads > 0 && c.dim % c.n_heads)
        die("%s: not a checkpoint, or its dim %d is no multiple of its n_heads %d", path, c.dim,
            c.n_heads);
    c.head_dim = c.n_heads > 0 ? c.dim / c.n_heads : 1;
    return c;
}

// Point the next tensor of the file at `*at`; past the end it stays unset and *at tells.
static void take(Model *m, SlotId s, int layer, size_t *at, size_t alignment) {
    if (!has_slot(&m->config, s) || *at > m->file.size) return;
    Tensor *w = tensor_at(m, s, layer);
    *w = blank_tensor(&m->config, s);
    *at = round_up(*at, alignment);
    w->data = m->file.at + *at;
    *at += tensor_bytes(w);
}

static void take_all_layers(Model *m, SlotId s, size_t *at) {
    for (int l = 0; l < (slots[s].per_layer ? m->config.n_layers : 1); l++) take(m, s, l, at, 1);
}

// Where the tensors of our format end.
static size_t take_ours(Model *m) {
    size_t at = HEADER;
    take(m, EMBEDDING, 0, &at, LINE);
    for (int l = 0; l < m->config.n_layers; l++)
        for (SlotId s = ATTENTION_NORM; s <= W2; s++)
            take(m, s, l, &at, LINE);
    take(m, FINAL_NORM, 0, &at, LINE);
    take(m, CLASSIFIER, 0, &at, LINE);
    return at;
}

// llama2.c, version 0: no magic, so it must have exactly the size that its header implies, with or
// without two tables of RoPE (seq_len, head_dim/2). Returns whether it does.
static bool take_version_0(Model *m) {
    static const SlotId order[] = {EMBEDDING, ATTENTION_NORM, WQ, WK, WV, WO, FFN_NORM, W1, W2, W3,
                                   FINAL_NORM};
    const Config *c = &m->config;
    size_t at = 28, tables = (size_t)c->max_seq_len * (size_t)c->head_dim * 4;
    for (int i = 0; i < COUNT(order); i++) take_all_layers(m, order[i], &at);
    Tensor classifier = blank_tensor(c, CLASSIFIER);
    size_t rest = at + (c->flags & TIED ? 0 : tensor_bytes(&classifier));
    if (rest + tables == m->file.size) at += tables;
    take(m, CLASSIFIER, 0, &at, 1);
    return at == m->file.size;
}

static size_t take_version_1(Model *m) {
    static const SlotId order[] = {ATTENTION_NORM, FFN_NORM, FINAL_NORM, EMBEDDING, WQ, WK, WV, WO,
                                   W1, W2, W3, CLASSIFIER};
    size_t at = HEADER;
    for (int i = 0; i < COUNT(order); i++) take_all_layers(m, order[i], &at);
    return at;
}

static void check_size(const Model *m, size_t wanted) {
    if (wanted != m->file.size)
        die("%s: the file has %zu bytes, its shapes want %s%zu", m->file.path, m->file.size,
            wanted > m->file.size ? "at least " : "", wanted);
}

static void open_ours(Model *m) {
    m->form = "LLaMA-02, version 1";
    m->config = read_config(&m->file);
    check_config(&m->config, m->file.path);
    m->layers = NEW(Layer, m->config.n_layers);
    check_size(m, take_ours(m));
}

static void open_version_1(Model *m) {
    const char *path = m->file.path;
    m->form = "llama2.c, version 1";
    if (m->file.size < HEADER)
        die("%s: %zu bytes are less than the %d of a header", path, m->file.size, HEADER);
    if (read_u32(m->file.at + 4) == 2)
        die("%s: llama2.c's int8 (version 2) is not read: export f32 (version 0 or 1) and use "
            "-m quantize", path);
    if (read_u32(m->file.at + 4) != 1)
        die("%s: llama2.c's version is %u, wanted 1", path, read_u32(m->file.at + 4));
    m->config = read_llama2c_config(m->file.at + 8, path);
    m->config.flags |= m->file.at[36] ? TIED : 0;
    check_config(&m->config, path);
    m->layers = NEW(Layer, m->config.n_layers);
    check_size(m, take_version_1(m));
}

static void open_version_0(Model *m) {
    const char *path = m->file.path;
    m->form = "llama2.c, version 0";
    if (m->file.size < 28)
        die("%s: not a checkpoint: %zu bytes hold no header", path, m->file.size);
    Config *c = &m->config;
    *c = read_llama2c_config(m->file.at, path);
    c->flags |= c->vocab_size > 0 ? TIED : 0;
    if (c->vocab_size < 0 && c->vocab_size > INT_MIN) c->vocab_size = -c->vocab_size;
    for (int i = 0; i < COUNT(fields); i++)
        if (!(field_value(c, &fields[i]) >= fields[i].least
              && field_value(c, &fields[i]) <= fields[i].most))
            die("%s: not a checkpoint: no magic, and as llama2.c's version 0 %s would be %.10g",
                path, fields[i].name, field_value(c, &fields[i]));
    check_config(c, path);
    m->layers = NEW(Layer, c->n_layers);
    if (!take_version_0(m))
        die("%s: not a checkpoint, or cut short: without a magic its %zu bytes would have to be "
            "what llama2.c's version 0 implies", path, m->file.size);
}

// What people try that is something else.
static void refuse_strangers(const File *f) {
    static const struct { const char *start; size_t n; const char *what; } strangers[] = {
        {"GGUF", 4, "a GGUF file"},
        {"PK\3\4", 4, "a zip archive, as PyTorch writes"},
        {"ak42", 4, "byte-swapped: written on a big-endian machine"},
        {"LLAMA02T", 8, "a tokenizer"},
    };
    for (int i = 0; i < COUNT(strangers); i++)
        if (f->size >= 8 && memcmp(f->at, strangers[i].start, strangers[i].n) == 0)
            die("%s: this is %s, not a checkpoint; export.py writes one from a model's folder",
                f->path, strangers[i].what);
}

// Map the file, read whichever header it has, point every tensor into it. Dies, naming file and
// field, unless the shapes are sane and the file has exactly the bytes they need.
static Model open_model(const char *path) {
    Model m = {.file = open_file(path)};
    refuse_strangers(&m.file);
    if (m.file.size >= sizeof magic && memcmp(m.file.at, magic, sizeof magic) == 0)
        open_ours(&m);
    else if (m.file.size >= 8 && read_u32(m.file.at) == LLAMA2C_MAGIC)
        open_version_1(&m);
    else
        open_version_0(&m);
    if (m.config.flags & TIED) m.classifier = m.embedding;
    // Read ahead in big steps; pages are only asked for, so a model larger than memory still runs.
    madvise((void *)(uintptr_t)m.file.at, m.file.size, MADV_WILLNEED);
    return m;
}

static void close_model(Model *m) {
    free(m->layers);
    close_file(&m->file);
}

// ------------------------------------------------------------------------------------------------
// 4. Threads: one verb, parallel
//
// A job is n items, claimed a few at a time from one atomic word, so a thread that the system takes
// away holds up what it has claimed and nothing else: one that never woke holds up nothing. Whoever
// waits spins for a moment, as jobs follow each other closely, and then sleeps.

typedef void Work(void *job, int thread, int first, int end);

enum { MAX_THREADS = 1024, MAX_ITEMS = (1 << 20) - 1 };

// The word: 24 bits count the jobs, 20 the items of this job, 20 the items already claimed. A claim
// is a compare-and-swap, so one prepared for an earlier job fails.
typedef struct {
    _Alignas(64) _Atomic uint64_t ticket;
    _Alignas(64) _Atomic int done;     // items of this job
    _Alignas(64) _Atomic(Work *) work;
    _Atomic(void *) job;
    _Atomic bool closing;
    _Atomic int sleepers;              // workers asleep
    _Atomic bool owner_sleeps;
    _Atomic int born;                  // workers that have taken their number
    int threads;                       // the caller of parallel() is one
    pthread_t *workers;
    pthread_mutex_t mutex;
    pthread_cond_t wake, finished;
} Pool;

static uint64_t new_ticket(uint64_t job, int items) { return job << 40 | (uint64_t)items << 20; }
static int items_of(uint64_t ticket) { return (int)(ticket >> 20 & MAX_ITEMS); }
static int claimed_of(uint64_t ticket) { return (int)(ticket & MAX_ITEMS); }
static bool items_left(uint64_t ticket) { return claimed_of(ticket) < items_of(ticket); }

static void relax(void) {
#if defined __x86_64__
    _mm_pause();
#elif defined __aarch64__
    __asm__ volatile("yield");
#endif
}

// Claim a share of what is left, smaller towards the end, do it, and say so. False: nothing was
// left.
static bool work_once(Pool *p, int thread) {
    uint64_t ticket = atomic_load(&p->ticket);
    Work *work;
    void *job;
    int first, n;
    do {
        if (!items_left(ticket)) return false;
        first = claimed_of(ticket);
        n = most(1, (items_of(ticket) - first) / (4 * p->threads));
        work = atomic_load_explicit(&p->work, memory_order_relaxed);
        job = atomic_load_explicit(&p->job, memory_order_relaxed);
    } while (!atomic_compare_exchange_weak(&p->ticket, &ticket, ticket + (uint64_t)n));
    work(job, thread, first, first + n);
    if (atomic_fetch_add(&p->done, n) + n == items_of(ticket) && atomic_load(&p->owner_sleeps)) {
        pthread_mutex_lock(&p->mutex);
        pthread_cond_signal(&p->finished);
        pthread_mutex_unlock(&p->mutex);
    }
    return true;
}

static bool work_waits(Pool *p) { return items_left(atomic_load(&p->ticket)) || p->closing; }
static bool job_done(Pool *p) { return atomic_load(&p->done) == items_of(atomic_load(&p->ticket)); }

// Watch for a moment; true when it came.
static bool spin(Pool *p, bool (*came)(Pool *)) {
    enum { SPINS = 1 << 11 };
    for (int i = 0; i < SPINS; i++) {
        if (came(p)) return true;
        relax();
    }
    return false;
}

static void *worker(void *argument) {
    Pool *p = argument;
    int thread = 1 + atomic_fetch_add(&p->born, 1);
    while (!p->closing) {
        if (work_once(p, thread) || spin(p, work_waits)) continue;
        pthread_mutex_lock(&p->mutex);
        p->sleepers++;
        while (!work_waits(p)) pthread_cond_wait(&p->wake, &p->mutex);
        p->sleepers--;
        pthread_mutex_unlock(&p->mutex);
    }
    return NULL;
}

static void wake_workers(Pool *p) {
    if (p->sleepers == 0) return;
    pthread_mutex_lock(&p->mutex);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->mutex);
}

// Do items 0 to n of a job on all threads; returns when all are done. Which thread does which items
// is chance, so results must not depend on it.
static void parallel(Pool *p, int n, Work *work, void *job) {
    assert(n >= 0 && n <= MAX_ITEMS);
    if (p->threads == 1 || n <= 1) {
        if (n) work(job, 0, 0, n);
        return;
    }
    atomic_store_explicit(&p->work, work, memory_order_relaxed);
    atomic_store_explicit(&p->job, job, memory_order_relaxed);
    atomic_store(&p->done, 0);
    atomic_store(&p->ticket, new_ticket((atomic_load(&p->ticket) >> 40) + 1, n));
    wake_workers(p);
    while (work_once(p, 0)) ;
    if (spin(p, job_done)) return;
    pthread_mutex_lock(&p->mutex);
    p->owner_sleeps = true;
    while (!job_done(p)) pthread_cond_wait(&p->finished, &p->mutex);
    p->owner_sleeps = false;
    pthread_mutex_unlock(&p->mutex);
}

static void start_pool(Pool *p, int threads) {
    *p = (Pool){.threads = 1, .workers = NEW(pthread_t, threads)};
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->wake, NULL);
    pthread_cond_init(&p->finished, NULL);
    p->threads = threads;
    for (int i = 1; i < threads; i++)
        if (pthread_create(&p->workers[i], NULL, worker, p) != 0)
            die("thread %d of %d cannot be started; -j sets a smaller number", i + 1, threads);
}

static void stop_pool(Pool *p) {
    pthread_mutex_lock(&p->mutex);
    p->closing = true;
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->mutex);
    for (int i = 1; i < p->threads; i++) pthread_join(p->workers[i], NULL);
    free(p->workers);
}

#if defined __linux__
// The first number in a file of the system, or `otherwise`.
static long read_number(const char *path, long otherwise) {
    long v = otherwise;
    FILE *f = fopen(path, "r");
    if (f && fscanf(f, "%ld", &v) != 1) v = otherwise;
    if (f) fclose(f);
    return v;
}

// Cores that the control group's quota pays for, rounded up.
static int quota_cores(void) {
    long quota = -1, period = 0;
    FILE *f = fopen("/sys/fs/cgroup/cpu.max", "r");  // version 2: "max 100000" or "150000 100000"
    if (f && fscanf(f, "%ld %ld", &quota, &period) != 2) quota = -1;
    if (f) {
        fclose(f);
    } else {
        quota = read_number("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", -1);
        period = read_number("/sys/fs/cgroup/cpu/cpu.cfs_period_us", 0);
    }
    return quota > 0 && period > 0 ? (int)((quota + period - 1) / period) : INT_MAX;
}

// Physical cores this process may use: of the hyper-threads of a core only the first is counted,
// and only if it is allowed (or is the first allowed one).
static int usable_cores(void) {
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return 1;
    int cores = 0;
    for (int i = 0; i < CPU_SETSIZE; i++) {
        char path[96];
        snprintf(path, sizeof path,
                 "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", i);
        if (!CPU_ISSET(i, &allowed)) continue;
        long first = read_number(path, i);
        cores += first == i || first < 0 || first >= CPU_SETSIZE || !CPU_ISSET(first, &allowed);
    }
    return most(1, least(cores, quota_cores()));
}
#elif defined __APPLE__
static int usable_cores(void) {
    int cores = 1;
    size_t size = sizeof cores;
    if (sysctlbyname("hw.perflevel0.physicalcpu", &cores, &size, NULL, 0) != 0)
        sysctlbyname("hw.physicalcpu", &cores, &size, NULL, 0);
    return most(1, cores);
}
#else
static int usable_cores(void) { return most(1, (int)sysconf(_SC_NPROCESSORS_ONLN)); }
#endif

// ------------------------------------------------------------------------------------------------
// 5. Vectors: sixteen lanes, one fixed order of sums, on every machine
//
// An f32v is 16 floats whatever the machine: one AVX-512 register, two of AVX, four of NEON or SSE.
// A sum of many products has 16 running sums, lane i taking every 16th, joined at the end in one
// order; multiply-adds are fused everywhere. So the same numbers come out bit for bit on every
// machine. Kernels are written on the steps below and never learn the instruction set.

#if defined __AVX512F__ && defined __AVX512BW__ && defined __AVX512VNNI__
#define STEPS_AVX512
enum { LANES = 16 };
#elif defined __AVX2__ && defined __FMA__ && defined __F16C__
#define STEPS_AVX2
enum { LANES = 8 };
#elif defined __aarch64__
#define STEPS_NEON
enum { LANES = 4 };
#else
enum { LANES = 4 };
#endif
enum { WIDTH = 16, PARTS = WIDTH / LANES };

// A struct of native registers rather than one vector of 64 bytes: gcc 12 keeps the latter in
// memory on machines whose registers are smaller (a dot product then runs 9 times slower).
typedef float    FloatPart __attribute__((vector_size(4 * LANES)));
typedef int32_t  IntPart   __attribute__((vector_size(4 * LANES)));
typedef uint32_t BitPart   __attribute__((vector_size(4 * LANES)));
typedef FloatPart LooseFloats __attribute__((aligned(4), may_alias));
typedef IntPart   LooseInts   __attribute__((aligned(1), may_alias));
typedef struct { FloatPart p[PARTS]; } f32v;
typedef struct { IntPart p[PARTS]; } i32v;

#define EACH_PART UNROLL for (int k = 0; k < PARTS; k++)

INLINE f32v spread(float x) { f32v r; EACH_PART r.p[k] = x - (FloatPart){0}; return r; }
INLINE i32v spread_int(int32_t x) { i32v r; EACH_PART r.p[k] = x - (IntPart){0}; return r; }
INLINE f32v add(f32v a, f32v b) { EACH_PART a.p[k] += b.p[k]; return a; }
INLINE f32v sub(f32v a, f32v b) { EACH_PART a.p[k] -= b.p[k]; return a; }
INLINE f32v mul(f32v a, f32v b) { EACH_PART a.p[k] *= b.p[k]; return a; }
INLINE f32v over(f32v a, f32v b) { EACH_PART a.p[k] /= b.p[k]; return a; }
INLINE f32v as_float(i32v a) { f32v r; EACH_PART r.p[k] = (FloatPart)a.p[k]; return r; }
INLINE i32v as_int(f32v a) { i32v r; EACH_PART r.p[k] = (IntPart)a.p[k]; return r; }

// Where the mask has all bits a, where it has none b.
INLINE f32v choose(i32v mask, f32v a, f32v b) {
    EACH_PART a.p[k] = (FloatPart)(((IntPart)a.p[k] & mask.p[k]) | ((IntPart)b.p[k] & ~mask.p[k]));
    return a;
}

INLINE i32v less(f32v a, f32v b) { i32v r; EACH_PART r.p[k] = a.p[k] < b.p[k]; return r; }
INLINE f32v greater_of(f32v a, f32v b) { return choose(less(a, b), b, a); }

INLINE f32v magnitude(f32v a) {
    EACH_PART a.p[k] = (FloatPart)((IntPart)a.p[k] & 0x7fffffff);
    return a;
}

INLINE f32v load_f32(const float *x) {
    f32v r;
    EACH_PART r.p[k] = *(const LooseFloats *)(x + k * LANES);
    return r;
}

INLINE void store_f32(float *x, f32v v) { EACH_PART *(LooseFloats *)(x + k * LANES) = v.p[k]; }

INLINE i32v load_line(const void *line) {
    i32v r;
    EACH_PART r.p[k] = *(const LooseInts *)((const char *)line + k * sizeof(IntPart));
    return r;
}

INLINE float float_of_bits(uint32_t u) { float f; memcpy(&f, &u, sizeof f); return f; }
INLINE uint32_t bits_of_float(float f) { uint32_t u; memcpy(&u, &f, sizeof u); return u; }

// An IEEE half as a float, exactly.
static float widen_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00)  // infinity; NaN made quiet
        return float_of_bits(sign | 0x7f800000 | rest << 13 | (rest > 0x7c00 ? 0x400000 : 0));
    if (rest < 0x400)    // zero or a multiple of 2^-24
        return float_of_bits(sign | bits_of_float((float)rest * 0x1p-24f));
    return float_of_bits(sign | ((rest << 13) + (112u << 23)));
}

// The nearest IEEE half, ties to even.
static uint16_t narrow_half(float x) {
    uint32_t u = bits_of_float(x), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
    if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (rest >> 13 & 0x3ff));
    if (rest >= 0x47800000)  // 65536 and above
        return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000)   // below the smallest normal half: adding 0.5 rounds to units of 2^-24
        return (uint16_t)(sign | (bits_of_float(float_of_bits(rest) + 0.5f) & 0x7ff));
    return (uint16_t)(sign | (((rest + 0xfff + (rest >> 13 & 1)) >> 13) - (112u << 10)));
}

// The steps that differ between instruction sets, a register at a time:
//   fused        a * b + c, rounded once
//   wide_bf16    bf16 is the upper half of a float
//   wide_f16, narrow_f16
//   dot4         to each 32-bit lane of sum, the product of its 4 weights w (one line of a panel)
//                and the 4 activations x: 16 rows at once. Weights of q8 are stored plus 128; they
//                enter plus Q8_ZERO, which the caller takes off, and byte_weights makes them so.
#if defined STEPS_AVX512
enum { Q8_ZERO = 128, Q_PANELS = 2, Q_TOKENS = 8, F_TOKENS = 5 };
INLINE FloatPart fused(FloatPart a, FloatPart b, FloatPart c) {
    return (FloatPart)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
INLINE FloatPart wide_bf16(const uint16_t *x) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)x));
    return (FloatPart)_mm512_slli_epi32(wide, 16);
}
INLINE FloatPart wide_f16(const uint16_t *x) {
    return (FloatPart)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)x));
}
INLINE void narrow_f16(uint16_t *out, FloatPart x) {
    _mm256_storeu_si256((__m256i *)(void *)out, _mm512_cvtps_ph((__m512)x, 0));
}
INLINE IntPart byte_weights(IntPart w) { return w; }
INLINE IntPart dot4(IntPart sum, IntPart w, IntPart x) {
    return (IntPart)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
}
#elif defined STEPS_AVX2
INLINE FloatPart fused(FloatPart a, FloatPart b, FloatPart c) {
    return (FloatPart)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
INLINE FloatPart wide_bf16(const uint16_t *x) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)x));
    return (FloatPart)_mm256_slli_epi32(wide, 16);
}
INLINE FloatPart wide_f16(const uint16_t *x) {
    return (FloatPart)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)x));
}
INLINE void narrow_f16(uint16_t *out, FloatPart x) {
    _mm_storeu_si128((__m128i *)(void *)out, _mm256_cvtps_ph((__m256)x, 0));
}
#if defined __AVXVNNI__
enum { Q8_ZERO = 128, Q_PANELS = 1, Q_TOKENS = 6, F_TOKENS = 3 };
INLINE IntPart byte_weights(IntPart w) { return w; }
INLINE IntPart dot4(IntPart sum, IntPart w, IntPart x) {
    return (IntPart)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
}
#else
enum { Q8_ZERO = 0, Q_PANELS = 1, Q_TOKENS = 6, F_TOKENS = 3 };
INLINE IntPart byte_weights(IntPart w) { return w ^ (int32_t)0x80808080; }
INLINE IntPart add_pairs(IntPart sum, IntPart pairs) {
    return sum + (IntPart)_mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi16(1));
}
// 8 lines of q4 fit 16 bits: 8 * 2 * 15 * 127 = 30480.
#define STEPS_PAIRS
INLINE IntPart dot_pairs(IntPart pairs, IntPart w, IntPart x) {
    return (IntPart)_mm256_add_epi16((__m256i)pairs, _mm256_maddubs_epi16((__m256i)w, (__m256i)x));
}
// vpmaddubsw adds pairs of unsigned by signed in 16 bits with saturation, so the weight gives its
// sign to the activation: 2 * 128 * 127 just fits.
INLINE IntPart dot4(IntPart sum, IntPart w, IntPart x) {
    __m256i size = _mm256_abs_epi8((__m256i)w), turned = _mm256_sign_epi8((__m256i)x, (__m256i)w);
    return add_pairs(sum, (IntPart)_mm256_maddubs_epi16(size, turned));
}
#endif
#elif defined STEPS_NEON
enum { Q8_ZERO = 0, Q_PANELS = 1, Q_TOKENS = 4, F_TOKENS = 4 };
INLINE FloatPart fused(FloatPart a, FloatPart b, FloatPart c) {
    return (FloatPart)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
INLINE FloatPart wide_bf16(const uint16_t *x) { return (FloatPart)vshll_n_u16(vld1_u16(x), 16); }
INLINE FloatPart wide_f16(const uint16_t *x) {
    return (FloatPart)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x)));
}
INLINE void narrow_f16(uint16_t *out, FloatPart x) {
    vst1_u16(out, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
}
INLINE IntPart byte_weights(IntPart w) { return w ^ (int32_t)0x80808080; }
INLINE IntPart dot4(IntPart sum, IntPart w, IntPart x) {
#if defined __ARM_FEATURE_DOTPROD
    return (IntPart)vdotq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)x);
#else
    int16x8_t low = vmull_s8(vget_low_s8((int8x16_t)w), vget_low_s8((int8x16_t)x));
    int16x8_t high = vmull_high_s8((int8x16_t)w, (int8x16_t)x);
    return sum + (IntPart)vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
#endif
}
#else
enum { Q8_ZERO = 0, Q_PANELS = 1, Q_TOKENS = 4, F_TOKENS = 2 };
INLINE FloatPart fused(FloatPart a, FloatPart b, FloatPart c) {
    UNROLL for (int i = 0; i < LANES; i++)
        c[i] = fmaf(a[i], b[i], c[i]);
    return c;
}
INLINE FloatPart wide_bf16(const uint16_t *x) {
    return (FloatPart)(BitPart){(uint32_t)x[0] << 16, (uint32_t)x[1] << 16,
                                (uint32_t)x[2] << 16, (uint32_t)x[3] << 16};
}
INLINE FloatPart wide_f16(const uint16_t *x) {
    return (FloatPart){widen_half(x[0]), widen_half(x[1]), widen_half(x[2]), widen_half(x[3])};
}
INLINE void narrow_f16(uint16_t *out, FloatPart x) {
    UNROLL for (int i = 0; i < LANES; i++)
        out[i] = narrow_half(x[i]);
}
INLINE IntPart byte_weights(IntPart w) { return w ^ (int32_t)0x80808080; }
INLINE IntPart dot4(IntPart sum, IntPart w, IntPart x) {
    UNROLL for (int byte = 0; byte < 32; byte += 8)  // shifts bring byte 0, 1, 2, 3 down, signed
        sum += ((IntPart)((BitPart)w << (24 - byte)) >> 24)
             * ((IntPart)((BitPart)x << (24 - byte)) >> 24);
    return sum;
}
#endif

// Where the step to 32 bits is dear, a group of q4 is summed in pairs of 16 bits first.
#if defined STEPS_PAIRS
enum { PAIRS = 1 };
#else
enum { PAIRS = 0 };
INLINE IntPart dot_pairs(IntPart pairs, IntPart w, IntPart x) { return dot4(pairs, w, x); }
INLINE IntPart add_pairs(IntPart sum, IntPart pairs) { return sum + pairs; }
#endif

INLINE f32v fma16(f32v a, f32v b, f32v c) {
    EACH_PART c.p[k] = fused(a.p[k], b.p[k], c.p[k]);
    return c;
}

INLINE f32v load_bf16(const uint16_t *x) {
    f32v r;
    EACH_PART r.p[k] = wide_bf16(x + k * LANES);
    return r;
}

INLINE f32v load_f16(const uint16_t *x) {
    f32v r;
    EACH_PART r.p[k] = wide_f16(x + k * LANES);
    return r;
}

INLINE void store_f16(uint16_t *x, f32v v) { EACH_PART narrow_f16(x + k * LANES, v.p[k]); }

INLINE i32v dot4_line(i32v sum, i32v w, i32v x, bool pairs) {
    EACH_PART sum.p[k] = pairs ? dot_pairs(sum.p[k], w.p[k], x.p[k])
                               : dot4(sum.p[k], w.p[k], x.p[k]);
    return sum;
}

// The one order in which 16 lanes become one number: lanes 8 apart, then 4, 2 and 1 apart.
INLINE float join(f32v v) {
#if defined STEPS_AVX512
    __m512 x = (__m512)v.p[0];
    __m256 h = _mm512_castps512_ps256(x)
             + _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1));
    __m128 q = _mm256_castps256_ps128(h) + _mm256_extractf128_ps(h, 1);
    return (q[0] + q[2]) + (q[1] + q[3]);
#else
    float x[WIDTH];
    store_f32(x, v);
    for (int apart = WIDTH / 2; apart; apart /= 2)
        UNROLL for (int i = 0; i < apart; i++)
            x[i] += x[i + apart];
    return x[0];
#endif
}

INLINE float greatest(f32v v) {
#if defined STEPS_AVX512
    return _mm512_reduce_max_ps((__m512)v.p[0]);
#else
    float x[WIDTH];
    store_f32(x, v);
    for (int apart = WIDTH / 2; apart; apart /= 2)
        UNROLL for (int i = 0; i < apart; i++)
            x[i] = x[i] < x[i + apart] ? x[i + apart] : x[i];
    return x[0];
#endif
}

// Four vectors joined, each as join does. On AVX-512 halves of two vectors are added as one, which
// makes 4 joins cost 16 instructions (a product of 144 tokens by bf16: 3 % faster).
INLINE void join4(float *out, f32v a, f32v b, f32v c, f32v d) {
#if defined STEPS_AVX512
    __m512 A = (__m512)a.p[0], B = (__m512)b.p[0], C = (__m512)c.p[0], D = (__m512)d.p[0];
    __m512 ab = _mm512_shuffle_f32x4(A, B, 0x44) + _mm512_shuffle_f32x4(A, B, 0xee);  // 8 apart
    __m512 cd = _mm512_shuffle_f32x4(C, D, 0x44) + _mm512_shuffle_f32x4(C, D, 0xee);
    __m512 s = _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd);
    s += _mm512_shuffle_ps(s, s, 0x4e);
    s += _mm512_shuffle_ps(s, s, 0xb1);
    __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, s)));
#elif defined STEPS_AVX2
    __m256 A = (__m256)(a.p[0] + a.p[1]), B = (__m256)(b.p[0] + b.p[1]);  // 8 apart
    __m256 C = (__m256)(c.p[0] + c.p[1]), D = (__m256)(d.p[0] + d.p[1]);
    __m256 ab = _mm256_permute2f128_ps(A, B, 0x20) + _mm256_permute2f128_ps(A, B, 0x31);
    __m256 cd = _mm256_permute2f128_ps(C, D, 0x20) + _mm256_permute2f128_ps(C, D, 0x31);
    __m256 s = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xee);
    s = _mm256_hadd_ps(s, s);
    __m128 ac = _mm256_castps256_ps128(s), bd = _mm256_extractf128_ps(s, 1);
    _mm_storeu_ps(out, _mm_unpacklo_ps(ac, bd));
#else
    out[0] = join(a), out[1] = join(b), out[2] = join(c), out[3] = join(d);
#endif
}

// The low byte of each lane.
INLINE void store_bytes(int8_t *out, i32v v) {
#if defined STEPS_AVX512
    _mm_storeu_si128((__m128i *)(void *)out, _mm512_cvtepi32_epi8((__m512i)v.p[0]));
#else
    int32_t all[WIDTH];
    memcpy(all, &v, sizeof all);
    for (int i = 0; i < WIDTH; i++) out[i] = (int8_t)all[i];
#endif
}

// Adding ROUNDER to a float of less than 2^22 rounds it to a whole number, ties to even, which then
// stands in the low bits of the sum.
static const float ROUNDER = 0x1.8p23f;
enum { ROUNDER_BITS = 0x4b400000 };

// e^x to within 1 unit in the last place or so: x = n ln 2 + r, e^r by its series (|r| < 0.35, the
// term r^8/8! is below 6e-9), 2^n into the exponent. Below -87 it gives 0, above 88 e^88.
INLINE f32v exponential(f32v x) {
    const f32v lowest = spread(-87.0f), highest = spread(88.0f);
    i32v too_low = less(x, lowest);
    x = choose(less(highest, x), highest, choose(too_low, lowest, x));
    f32v shifted = fma16(x, spread(0x1.715476p+0f), spread(ROUNDER));
    f32v n = sub(shifted, spread(ROUNDER));
    f32v r = fma16(n, spread(-0x1.62e4p-1f), x);  // ln 2 in two parts, the first short enough
    r = fma16(n, spread(-0x1.7f7d1cp-20f), r);    // that n times it is exact
    static const float series[] = {1 / 720.f, 1 / 120.f, 1 / 24.f, 1 / 6.f, 0.5f, 1.f, 1.f};
    f32v e = spread(1 / 5040.f);
    UNROLL for (int i = 0; i < COUNT(series); i++)
        e = fma16(e, r, spread(series[i]));
    i32v bits = as_int(e), power = as_int(shifted);
    EACH_PART bits.p[k] += (IntPart)((BitPart)power.p[k] << 23);
    return choose(too_low, spread(0), as_float(bits));
}

// A vector of which only the first n lanes are in memory; the others are 0.
INLINE f32v load_some(const float *x, int n) {
    float all[WIDTH] = {0};
    if (n >= WIDTH) return load_f32(x);
    memcpy(all, x, (size_t)n * sizeof *x);
    return load_f32(all);
}

INLINE void store_some(float *out, f32v v, int n) {
    float all[WIDTH];
    if (n >= WIDTH) {
        store_f32(out, v);
    } else {
        store_f32(all, v);
        memcpy(out, all, (size_t)n * sizeof *out);
    }
}

// ------------------------------------------------------------------------------------------------
// 6. Weights: the types, quantizing, and the one matmul
//
// Float matrices lie row after row. Quantized ones lie in panels of 16 rows, each row in groups of
// 32 columns that share a scale. A panel is its 64-byte lines, group after group, then the scales,
// f16 (groups, 16). A line is what one step of dot4 wants, 4 weights of each of the 16 rows:
//
//     byte of line i       0          1          2          3          4        ..  63
//     q8 (8 lines a group) row 0                                       row 1        row 15
//                          col 4i     col 4i+1   col 4i+2   col 4i+3   col 4i       col 4i+3
//     q4 (4 lines)         low halves: col 8i + j, high halves: col 8i + 4 + j for byte j of a row
//
// q8 stores w/scale plus 128, q4 plus 8. Rows and columns that pad are zero, scales that pad are 0.

enum { Q4_ZERO = 8 };
static const uint32_t NIBBLES = 0x0f0f0f0f;

// What goes into a product: n rows of cols numbers, and for quantized weights the same as integers:
// each group of 32 as whole numbers of -127 to 127 times a scale.
typedef struct {
    float *x;        // (n, cols)
    int8_t *q;       // (n, groups, GROUP)
    float *scale;    // (n, groups)
    int32_t *start;  // (n, groups): where a group's sum starts, see q_tile
} Inputs;

// The 4 activations of a line, for every row.
INLINE i32v spread_bytes(const int8_t *q) {
    int32_t four;
    memcpy(&four, q, sizeof four);
    return spread_int(four);
}

// 32 numbers as integers and a scale; returns the sum of the integers. The largest becomes 127.
static int quantize_group(int8_t *q, float *scale, const float *x) {
    f32v a = load_f32(x), b = load_f32(x + WIDTH);
    float peak = greatest(greater_of(magnitude(a), magnitude(b)));
    f32v inverse = spread(peak > 0 ? 127.0f / peak : 0), rounder = spread(ROUNDER);
    f32v shifted[2] = {add(mul(a, inverse), rounder), add(mul(b, inverse), rounder)};
    store_bytes(q, as_int(shifted[0]));
    store_bytes(q + WIDTH, as_int(shifted[1]));
    *scale = peak / 127.0f;
    float sum = join(add(sub(shifted[0], rounder), sub(shifted[1], rounder)));  // exact, or NaN
    return sum == sum ? (int)sum : 0;
}

// Row t of the inputs made ready for weights of this type.
static void prepare(Inputs *in, int t, int cols, Type type) {
    if (!is_quantized(type)) return;
    const float *x = in->x + (size_t)t * (size_t)cols;
    int groups = (int)group_count(cols), zero = type == Q8 ? Q8_ZERO : Q4_ZERO;
    for (int g = 0; g < groups; g++) {
        size_t at = (size_t)t * (size_t)groups + (size_t)g;
        float padded[GROUP] = {0};
        const float *group = x + g * GROUP;
        if ((g + 1) * GROUP > cols)
            group = memcpy(padded, group, (size_t)(cols - g * GROUP) * sizeof *x);
        int sum = quantize_group(in->q + at * GROUP, &in->scale[at], group);
        in->start[at] = ROUNDER_BITS - zero * sum;
    }
}

// A line's weights for dot4. In q4 a line holds two: the low and the high halves of its bytes.
INLINE i32v weights_of_line(Type type, const uint8_t *lines, int i) {
    i32v w = load_line(lines + (size_t)(type == Q8 ? i : i / 2) * LINE);
    UNROLL for (int p = 0; p < PARTS; p++) {
        if (type == Q8)
            w.p[p] = byte_weights(w.p[p]);
        else
            w.p[p] = (IntPart)(((BitPart)w.p[p] >> (i % 2 * 4)) & NIBBLES);
    }
    return w;
}

// P panels by T tokens: out(t, row) = sum over groups of scale_w * scale_x * (integer sum). Lanes
// are rows, so nothing is ever added across lanes.
//
// A group's integer sum starts at ROUNDER_BITS less the zero point times the sum of its
// activations. Read as a float the result is ROUNDER + sum, and s * (ROUNDER + sum) - s * ROUNDER,
// fused, is the s * sum rounded once that a conversion and a product would give: 1 instruction for
// 2 (6 % faster).
INLINE void q_tile(float *out, const Tensor *w, int panel, const Inputs *in, int t0, Type type,
                   const int P, const int T) {
    const int rows = w->rows;
    const int groups = (int)group_count(w->cols);
    const bool pairs = PAIRS && type == Q4;
    const size_t step = panel_bytes(type, w->cols), scales = line_bytes(type, w->cols);
    const size_t lines = group_lines(type) * LINE;
    const uint8_t *at = w->data + (size_t)panel * step, *ahead = at + (size_t)P * step;
    const int8_t *q = in->q + (size_t)t0 * (size_t)groups * GROUP;
    const float *scale = in->scale + (size_t)t0 * (size_t)groups;
    const int32_t *start = in->start + (size_t)t0 * (size_t)groups;
    f32v sum[Q_PANELS][Q_TOKENS];
    UNROLL for (int p = 0; p < P; p++)
        UNROLL for (int t = 0; t < T; t++)
            sum[p][t] = spread(0);
    for (int g = 0; g < groups; g++) {
        if (T == Q_TOKENS)  // each tile sends for its share of the next panels (+23 %)
            __builtin_prefetch(ahead + (size_t)(t0 / T * groups + g) * LINE, 0, 2);
        i32v whole[Q_PANELS][Q_TOKENS];
        UNROLL for (int t = 0; t < T; t++)
            UNROLL for (int p = 0; p < P; p++)
                whole[p][t] = spread_int(pairs ? 0 : start[t * groups + g]);
        UNROLL for (int i = 0; i < 8; i++) {
            i32v line[Q_PANELS];
            UNROLL for (int p = 0; p < P; p++)
                line[p] = weights_of_line(type, at + (size_t)p * step + (size_t)g * lines, i);
            UNROLL for (int t = 0; t < T; t++) {
                i32v x = spread_bytes(q + (size_t)(t * groups + g) * GROUP + 4 * i);
                UNROLL for (int p = 0; p < P; p++)
                    whole[p][t] = dot4_line(whole[p][t], line[p], x, pairs);
            }
        }
        UNROLL for (int p = 0; p < P; p++) {
            const uint8_t *half = at + (size_t)p * step + scales + (size_t)(g * PANEL) * 2;
            f32v s = load_f16((const uint16_t *)(const void *)half);
            f32v less_rounder = mul(s, spread(-ROUNDER));
            UNROLL for (int t = 0; t < T; t++) {
                EACH_PART if (pairs)
                    whole[p][t].p[k] = add_pairs(spread_int(start[t * groups + g]).p[k],
                                                 whole[p][t].p[k]);
                sum[p][t] = fma16(fma16(as_float(whole[p][t]), s, less_rounder),
                                  spread(scale[t * groups + g]), sum[p][t]);
            }
        }
    }
    UNROLL for (int p = 0; p < P; p++)
        UNROLL for (int t = 0; t < T; t++)
            store_some(out + (size_t)(t0 + t) * (size_t)rows + (panel + p) * PANEL, sum[p][t],
                       rows - (panel + p) * PANEL);
}

// All tokens against P panels, the widest tile first.
INLINE void q_panels(float *out, const Tensor *w, int panel, const Inputs *in, int n, Type type,
                     const int P) {
    int t = 0;
    for (; n - t >= Q_TOKENS; t += Q_TOKENS) q_tile(out, w, panel, in, t, type, P, Q_TOKENS);
    for (; n - t >= 4; t += 4) q_tile(out, w, panel, in, t, type, P, 4);
    for (; n - t >= 2; t += 2) q_tile(out, w, panel, in, t, type, P, 2);
    for (; t < n; t++) q_tile(out, w, panel, in, t, type, P, 1);
}

// A matmul is cut into units of 32 rows.
enum { UNIT = 32 };

INLINE void q_unit(float *out, const Tensor *w, int unit, const Inputs *in, int n, Type type) {
    int panel = unit * (UNIT / PANEL), end = least(panel + UNIT / PANEL, (int)panel_count(w->rows));
    for (; end - panel >= Q_PANELS; panel += Q_PANELS)
        q_panels(out, w, panel, in, n, type, Q_PANELS);
    for (; panel < end; panel++) q_panels(out, w, panel, in, n, type, 1);
}

// Float weights. Lane i of a sum takes columns i, i + 16, ..., so that a row is read as it lies.

INLINE f32v load_weights(Type type, const uint8_t *at) {
    const void *weights = at;
    return type == F32 ? load_f32(weights) : type == BF16 ? load_bf16(weights) : load_f16(weights);
}

// The first n of 16 weights; the others are 0.
INLINE f32v load_some_weights(Type type, const uint8_t *at, int n) {
    uint8_t all[WIDTH * sizeof(float)] = {0};
    memcpy(all, at, row_bytes(type, n));
    return load_weights(type, all);
}

// n weights of a row, from column c0 on, as floats.
static void widen_row(float *out, const Tensor *w, int row, int c0, int n) {
    const uint8_t *at = w->data + (size_t)row * row_bytes(w->type, w->cols);
    for (int i = 0; i < n; i += WIDTH) {
        const uint8_t *from = at + row_bytes(w->type, c0 + i);
        store_some(out + i, n - i < WIDTH ? load_some_weights(w->type, from, n - i)
                                          : load_weights(w->type, from), n - i);
    }
}

enum { F_ROWS = 4, COLUMNS = 1024 };

// What a thread needs of its own to multiply by float weights: COLUMNS columns of a unit's rows as
// floats (the odd stride keeps rows out of each other's cache sets), and the sums so far.
typedef struct {
    float w[UNIT][COLUMNS + WIDTH];
    f32v *sums;  // (n, UNIT)
} Scratch;

// A part of a product: columns c0 to c0 + cols of a unit. Its rows lie from `w` on, in the file or,
// as floats, in the scratch; sums begin at the first column and are joined after the last.
typedef struct {
    float *out;
    const Tensor *tensor;
    int first;            // row of the tensor
    int there;            // rows there are
    const uint8_t *w;
    size_t stride;        // from row to row, in bytes
    const float *x;       // (n, tensor->cols)
    int c0, cols;
    f32v *sums;
} Part;

// F_ROWS rows from r on by T tokens from t on. Rows that are not there repeat the last.
INLINE void float_tile(const Part *p, int r, int t0, const Type type, const int T) {
    const size_t x_stride = (size_t)p->tensor->cols, rows = (size_t)p->tensor->rows;
    const float *x = p->x + (size_t)t0 * x_stride + p->c0;
    const uint8_t *w[F_ROWS];
    f32v *sums = p->sums + (size_t)t0 * UNIT + r, sum[F_ROWS][F_TOKENS];
    UNROLL for (int k = 0; k < F_ROWS; k++) {
        w[k] = p->w + (size_t)least(r + k, p->there - 1) * p->stride;
        UNROLL for (int t = 0; t < T; t++)
            sum[k][t] = p->c0 == 0 ? spread(0) : sums[t * UNIT + k];
    }
    int whole = p->cols / WIDTH * WIDTH, rest = p->cols - whole;
    const int H = T == 1 ? PARTS : 1;  // parts at once: as many sums as registers hold
    UNROLL_OUTER for (int h = 0; h < PARTS; h += H)
        for (int i = 0; i < whole; i += WIDTH) {
            f32v v[F_TOKENS];
            UNROLL for (int t = 0; t < T; t++)
                v[t] = load_f32(x + (size_t)t * x_stride + i);
            UNROLL for (int k = 0; k < F_ROWS; k++) {
                f32v row = load_weights(type, w[k] + row_bytes(type, i));
                UNROLL for (int t = 0; t < T; t++)
                    UNROLL for (int j = h; j < h + H; j++)
                        sum[k][t].p[j] = fused(row.p[j], v[t].p[j], sum[k][t].p[j]);
            }
        }
    if (rest)
        UNROLL for (int k = 0; k < F_ROWS; k++) {
            f32v v = load_some_weights(type, w[k] + row_bytes(type, whole), rest);
            UNROLL for (int t = 0; t < T; t++)
                sum[k][t] = fma16(v, load_some(x + (size_t)t * x_stride + whole, rest), sum[k][t]);
        }
    const bool last = p->c0 + p->cols == p->tensor->cols;
    UNROLL for (int t = 0; t < T; t++) {
        if (last) {
            float four[F_ROWS];
            join4(four, sum[0][t], sum[1][t], sum[2][t], sum[3][t]);
            memcpy(p->out + (size_t)(t0 + t) * rows + p->first + r, four,
                   (size_t)least(F_ROWS, p->there - r) * sizeof *four);
        } else {
            UNROLL for (int k = 0; k < F_ROWS; k++)
                sums[t * UNIT + k] = sum[k][t];
        }
    }
}

// Send for a tile's share of the rows that are made floats next: the next columns or the next unit.
__attribute__((noinline))
static void send_ahead(const Part *p, int r, int t, int n) {
    const Tensor *w = p->tensor;
    int c = p->c0 + COLUMNS < w->cols ? p->c0 + COLUMNS : 0;
    size_t stride = row_bytes(w->type, w->cols);
    size_t all = row_bytes(w->type, least(COLUMNS, w->cols - c));
    size_t share = round_up(all * F_TOKENS / (size_t)n, LINE);
    const uint8_t *from = w->data + (size_t)(p->first + (c ? 0 : UNIT) + r) * stride
                        + row_bytes(w->type, c) + (size_t)(t / F_TOKENS) * share;
    for (int k = 0; k < F_ROWS; k++)
        for (size_t at = 0; at < share; at += LINE)
            __builtin_prefetch(from + (size_t)k * stride + at, 0, 2);
}

INLINE void float_tiles(const Part *p, int n, const Type type, const bool ahead) {
    int t = 0;
    for (; n - t >= F_TOKENS; t += F_TOKENS)
        for (int r = 0; r < p->there; r += F_ROWS) {
            if (ahead) send_ahead(p, r, t, n);
            float_tile(p, r, t, type, F_TOKENS);
        }
    for (; n - t >= 2; t += 2)
        for (int r = 0; r < p->there; r += F_ROWS)
            float_tile(p, r, t, type, 2);
    for (int r = 0; r < p->there && t < n; r += F_ROWS) float_tile(p, r, t, type, 1);
}

// Few tokens: rows are used where they lie. Many: a unit's rows are made floats once, COLUMNS at a
// time, so that they and the tokens' share of x stay in the first two caches.
INLINE void float_unit(float *out, const Tensor *w, int unit, const Inputs *in, int n, Scratch *s,
                       const Type type) {
    Part p = {.out = out, .tensor = w, .first = unit * UNIT, .x = in->x, .sums = s->sums};
    p.there = least(UNIT, w->rows - p.first);
    if (n < 2 * F_TOKENS) {
        p.stride = row_bytes(type, w->cols);
        p.w = w->data + (size_t)p.first * p.stride;
        p.cols = w->cols;
        float_tiles(&p, n, type, false);
        return;
    }
    p.w = (const uint8_t *)s->w, p.stride = sizeof s->w[0];
    for (; p.c0 < w->cols; p.c0 += COLUMNS) {
        p.cols = least(COLUMNS, w->cols - p.c0);
        for (int r = 0; r < p.there; r++) widen_row(s->w[r], w, p.first + r, p.c0, p.cols);
        float_tiles(&p, n, F32, true);
    }
}

static void unpack_quantized_row(float *out, const Tensor *w, int row) {
    const uint8_t *panel = w->data + (size_t)(row / PANEL) * panel_bytes(w->type, w->cols);
    const uint8_t *scales = panel + line_bytes(w->type, w->cols);
    for (int i = 0; i < w->cols; i++) {
        int group = i / GROUP, in_group = i % GROUP, four = in_group / 4;
        const uint8_t *lines = panel + (size_t)group * group_lines(w->type) * LINE;
        int byte = lines[(w->type == Q8 ? four : four / 2) * LINE + row % PANEL * 4 + in_group % 4];
        int value = w->type == Q8 ? byte - 128 : (byte >> (four % 2 * 4) & 15) - Q4_ZERO;
        uint16_t half;
        memcpy(&half, scales + (group * PANEL + row % PANEL) * 2, sizeof half);
        out[i] = (float)value * widen_half(half);
    }
}

// One row as floats.
static void unpack_row(float *out, const Tensor *w, int row) {
    if (is_quantized(w->type))
        unpack_quantized_row(out, w, row);
    else
        widen_row(out, w, row, 0, w->cols);
}

// Rows of one unit of out(n, rows) = in(n, cols) w(rows, cols)^T.
static void multiply_unit(float *out, const Tensor *w, int unit, const Inputs *in, int n,
                          Scratch *s) {
    switch (w->type) {
    case F32:  float_unit(out, w, unit, in, n, s, F32);  break;
    case BF16: float_unit(out, w, unit, in, n, s, BF16); break;
    case F16:  float_unit(out, w, unit, in, n, s, F16);  break;
    case Q8:   q_unit(out, w, unit, in, n, Q8);          break;
    case Q4:   q_unit(out, w, unit, in, n, Q4);          break;
    case TYPES: break;
    }
}

// out(n, rows) = in(n, cols) w(rows, cols)^T. Nearly all time goes here. Products of the same
// inputs are done as one job, for fewer meetings of the threads.
typedef struct {
    float *out;
    const Tensor *w;
} Product;

typedef struct {
    Product product[3];
    int count;
    const Inputs *in;
    int n;
    Scratch *scratch;  // (threads)
} Matmul;

static int unit_count(const Tensor *w) { return (int)((size_t)(w->rows + UNIT - 1) / UNIT); }

static void matmul_units(void *job, int thread, int first, int end) {
    const Matmul *m = job;
    const Product *p = m->product;
    int before = 0;
    for (int i = first; i < end; i++) {
        while (i - before >= unit_count(p->w)) before += unit_count(p++->w);
        multiply_unit(p->out, p->w, i - before, m->in, m->n, &m->scratch[thread]);
    }
}

static void matmul(Pool *pool, Matmul *m) {
    int units = 0;
    for (int i = 0; i < m->count; i++) units += unit_count(m->product[i].w);
    parallel(pool, units, matmul_units, m);
}

// Packing: floats into panels.

// 32 weights as whole numbers of lowest to highest times a scale, to q. Returns the squared error;
// *better becomes the scale that suits these whole numbers best, sum xq / sum qq, and *rest the
// squared error that it would leave, sum xx - (sum xq)^2 / sum qq.
static float round_group(float *q, const float *x, float scale, float lowest, float highest,
                         float *better, float *rest) {
    f32v inverse = spread(scale != 0 ? 1 / scale : 0), s = spread(scale);
    f32v error = spread(0), xq = spread(0), qq = spread(0), xx = spread(0);
    for (int i = 0; i < GROUP; i += WIDTH) {
        f32v v = load_f32(x + i), whole = greater_of(spread(lowest), mul(v, inverse));  // not NaN
        whole = choose(less(spread(highest), whole), spread(highest), whole);
        whole = sub(add(whole, spread(ROUNDER)), spread(ROUNDER));
        store_f32(q + i, whole);
        f32v off = sub(v, mul(whole, s));
        error = fma16(off, off, error);
        xx = fma16(v, v, xx);
        xq = fma16(v, whole, xq);
        qq = fma16(whole, whole, qq);
    }
    float sums[4];
    join4(sums, error, xq, qq, xx);
    *better = sums[2] > 0 ? sums[1] / sums[2] : 0;
    *rest = sums[3] - sums[1] * *better;
    return sums[0];
}

static float half_scale(float scale) { return widen_half(narrow_half(scale)); }

// q4: of the scales that put the largest weight between 5.5 and 9 steps from zero, on either side,
// each improved by least squares, the one with the least error, and never worse than the largest at
// 7. Whole numbers are -8 to 7, so the sign matters.
static float q4_scale(const float *x, float peak) {
    float q[GROUP], better, rest, best = half_scale(peak / 7), found = best, least_rest = INFINITY;
    float plain = round_group(q, x, best, -8, 7, &better, &rest);
    for (int i = 0; i < 2 * 15; i++) {
        float steps = 5.5f + (float)(i / 2) * 0.25f;
        round_group(q, x, (i % 2 ? -peak : peak) / steps, -8, 7, &better, &rest);
        if (rest < least_rest) least_rest = rest, found = half_scale(better);
    }
    return round_group(q, x, found, -8, 7, &better, &rest) < plain ? found : best;
}

// One row of a panel, from floats padded with zeros to whole groups; returns the squared error.
static double pack_row(uint8_t *panel, Type type, int row, const float *x, int cols) {
    uint8_t *scales = panel + line_bytes(type, cols);
    double error = 0;
    for (int g = 0; g < (int)group_count(cols); g++) {
        float q[GROUP], better, rest;
        const float *group = x + g * GROUP;
        float peak = greatest(greater_of(magnitude(load_f32(group)),
                                         magnitude(load_f32(group + WIDTH))));
        float scale = type == Q8 ? half_scale(peak / 127) : q4_scale(group, peak);
        float lowest = type == Q8 ? -127 : -8, highest = type == Q8 ? 127 : 7;
        error += round_group(q, group, scale, lowest, highest, &better, &rest);
        uint16_t half = narrow_half(scale);
        memcpy(scales + (g * PANEL + row) * 2, &half, sizeof half);
        uint8_t *lines = panel + (size_t)g * group_lines(type) * LINE + row * 4;
        for (int i = 0; i < GROUP; i++) {
            if (type == Q8)
                lines[i / 4 * LINE + i % 4] = (uint8_t)((int)q[i] + 128);
            else
                lines[i / 8 * LINE + i % 4] |= (uint8_t)(((int)q[i] + Q4_ZERO) << (i / 4 % 2 * 4));
        }
    }
    return error;
}

// ------------------------------------------------------------------------------------------------
// 7. Attention: the cache of keys and values, and what queries make of it
//
// softmax(q k^T / sqrt(head_dim)) v, for each query head over the positions before it (Vaswani et
// al. 2017, 3.2.1); n_heads / n_kv_heads query heads share a key/value head (Ainslie et al. 2023).
// The positions are cut into blocks of BLOCK. Each block gives weights relative to its own largest
// score and the mix of its values; blocks are merged in order (Milakov & Gimelshein 2018). Where a
// block begins and ends depends on nothing but the position, so neither do the bits.

enum { BLOCK = 256 };

#if defined STEPS_AVX512
enum { A_QUERIES = 8, A_SUMS = 16 };  // queries at once, and vectors of sums kept in registers
#elif defined STEPS_NEON
enum { A_QUERIES = 4, A_SUMS = 4 };
#else
enum { A_QUERIES = 4, A_SUMS = 4 };
#endif

// Keys and values of one key/value head in one layer of one sequence:
//     keys    (context/16, head_pad, 16)   16 positions side by side: a score needs no joining
//     values  (context, head_pad)
// as f16 for quantized models and f32 otherwise; head_pad is head_dim rounded up to 16.
typedef struct {
    int context, head_dim, head_pad;
    bool half;
    char *keys, *values;
    size_t head_bytes;  // of one head's keys, and as many of values
} Cache;

INLINE f32v load_cached(const void *from, size_t i, bool half) {
    return half ? load_f16((const uint16_t *)from + i) : load_f32((const float *)from + i);
}

static void cache_key(const Cache *c, size_t head, int pos, const float *key) {
    char *base = c->keys + head * c->head_bytes;
    size_t at = (size_t)(pos / WIDTH) * (size_t)c->head_pad * WIDTH + (size_t)(pos % WIDTH);
    for (int i = 0; i < c->head_dim; i++) {
        if (c->half)
            ((uint16_t *)(void *)base)[at + (size_t)i * WIDTH] = narrow_half(key[i]);
        else
            ((float *)(void *)base)[at + (size_t)i * WIDTH] = key[i];
    }
}

static void cache_value(const Cache *c, size_t head, int pos, const float *value) {
    char *base = c->values + head * c->head_bytes;
    size_t at = (size_t)pos * (size_t)c->head_pad;
    for (int i = 0; i < c->head_dim; i += WIDTH) {
        f32v v = load_some(value + i, least(WIDTH, c->head_dim - i));
        if (c->half)
            store_f16((uint16_t *)(void *)base + at + i, v);
        else
            store_f32((float *)(void *)base + at + i, v);
    }
}

// What a thread needs to work on a block.
typedef struct {
    float *q;           // (head_dim, queries)   scaled by 1/sqrt(head_dim)
    float *weight;      // (queries, BLOCK)      scores, then e^(score - peak)
    float *mix;         // (queries, head_pad)   values mixed by weight
    float *keys;        // (BLOCK, head_pad) each: a block of an f16 cache as floats
    float *values;
    int first[8];       // positions of the block that a query sees, from here
    int end[8];         // to here
    float peak[8];      // largest score
    float total[8];     // sum of weights
} Desk;

// Scores of Q queries at V times 16 positions from vector v0 of the block on. Meanwhile the values
// of the block are sent for, and below the next block's keys: at depth 1,900 a token of 1.1B q8
// then takes 7 ms longer than at depth 0, without it 8 of 80.
INLINE void score_tile(Desk *d, const void *keys, const void *values, int v0, int head_dim,
                       int head_pad, bool half, const int Q, const int V) {
    f32v sum[8][4];
    UNROLL for (int j = 0; j < Q; j++)
        UNROLL for (int v = 0; v < V; v++)
            sum[j][v] = spread(0);
    for (int i = 0; i < head_dim; i++) {
        f32v k[4];
        if (half) __builtin_prefetch((const char *)values + (v0 / V * head_dim + i) * LINE, 0, 2);
        UNROLL for (int v = 0; v < V; v++)
            k[v] = load_cached(keys, (size_t)((v0 + v) * head_pad + i) * WIDTH, half);
        UNROLL for (int j = 0; j < Q; j++) {
            f32v q = spread(d->q[i * Q + j]);
            UNROLL for (int v = 0; v < V; v++)
                sum[j][v] = fma16(q, k[v], sum[j][v]);
        }
    }
    UNROLL for (int j = 0; j < Q; j++)
        UNROLL for (int v = 0; v < V; v++)
            store_f32(d->weight + j * BLOCK + (v0 + v) * WIDTH, sum[j][v]);
}

// V times 16 elements from i0 on of the values at positions first to end, mixed for Q queries.
INLINE void mix_tile(Desk *d, const void *keys, const void *values, int i0, int first, int end,
                     int head_pad, bool half, const int Q, const int V) {
    const char *next = (const char *)keys + BLOCK * head_pad * 2 + i0 / (V * WIDTH) * BLOCK * LINE;
    f32v sum[8][4];
    UNROLL for (int j = 0; j < Q; j++)
        UNROLL for (int v = 0; v < V; v++)
            sum[j][v] = spread(0);
    for (int p = first; p < end; p++) {
        f32v value[4];
        if (half) __builtin_prefetch(next + p * LINE, 0, 2);
        UNROLL for (int v = 0; v < V; v++)
            value[v] = load_cached(values, (size_t)(p * head_pad + i0 + v * WIDTH), half);
        UNROLL for (int j = 0; j < Q; j++) {
            f32v w = spread(d->weight[j * BLOCK + p]);
            UNROLL for (int v = 0; v < V; v++)
                sum[j][v] = fma16(w, value[v], sum[j][v]);
        }
    }
    UNROLL for (int j = 0; j < Q; j++)
        UNROLL for (int v = 0; v < V; v++)
            store_f32(d->mix + j * head_pad + i0 + v * WIDTH, sum[j][v]);
}

static float exp_of(float x) {
    float all[WIDTH];
    store_f32(all, exponential(spread(x)));
    return all[0];
}

// Scores of query j, vectors v0 to v1 of them, to weights; what it does not see gets weight 0.
static void weigh(Desk *d, int j, int v0, int v1) {
    float *w = d->weight + j * BLOCK;
    int first = d->first[j], end = d->end[j];
    for (int p = v0 * WIDTH; p < least(first, v1 * WIDTH); p++) w[p] = -INFINITY;
    for (int p = most(end, v0 * WIDTH); p < v1 * WIDTH; p++) w[p] = -INFINITY;
    f32v peaks = spread(-INFINITY), total = spread(0);
    for (int v = v0; v < v1; v++) peaks = greater_of(peaks, load_f32(w + v * WIDTH));
    float peak = greatest(peaks);
    f32v base = spread(first < end ? peak : 0);
    for (int v = v0; v < v1; v++) {
        f32v e = exponential(sub(load_f32(w + v * WIDTH), base));
        store_f32(w + v * WIDTH, e);
        total = add(total, e);
    }
    d->peak[j] = peak;
    d->total[j] = join(total);
}

// One block for Q queries. Afterwards the desk holds their peaks, totals and mixes.
INLINE void answer_tile(Desk *d, const void *keys, const void *values, const Cache *c, bool half,
                        const int Q) {
    const int V = A_SUMS / Q < 1 ? 1 : A_SUMS / Q > 4 ? 4 : A_SUMS / Q;
    int low = BLOCK, high = 0, dim = c->head_dim, pad = c->head_pad, i = 0;
    for (int j = 0; j < Q; j++) {
        low = least(low, d->first[j] < d->end[j] ? d->first[j] : BLOCK);
        high = most(high, d->end[j]);
    }
    low = least(low, high);
    int v0 = low / WIDTH, v1 = (high + WIDTH - 1) / WIDTH, v = v0;
    for (; v + V <= v1; v += V) score_tile(d, keys, values, v, dim, pad, half, Q, V);
    for (; v < v1; v++) score_tile(d, keys, values, v, dim, pad, half, Q, 1);
    for (int j = 0; j < Q; j++) weigh(d, j, v0, v1);
    for (; i + V * WIDTH <= pad; i += V * WIDTH)
        mix_tile(d, keys, values, i, low, high, pad, half, Q, V);
    for (; i < pad; i += WIDTH) mix_tile(d, keys, values, i, low, high, pad, half, Q, 1);
}

// The same, for a number of queries and a type of cache known only now.
static void answer(Desk *d, const void *keys, const void *values, const Cache *c, bool half,
                   int queries) {
    switch (queries * 2 + half) {
    case 2:  answer_tile(d, keys, values, c, false, 1); break;
    case 3:  answer_tile(d, keys, values, c, true, 1);  break;
    case 4:  answer_tile(d, keys, values, c, false, 2); break;
    case 5:  answer_tile(d, keys, values, c, true, 2);  break;
    case 8:  answer_tile(d, keys, values, c, false, 4); break;
    case 9:  answer_tile(d, keys, values, c, true, 4);  break;
    case 16: answer_tile(d, keys, values, c, false, 8); break;
    case 17: answer_tile(d, keys, values, c, true, 8);  break;
    default: assert(!"1, 2, 4 or 8 queries");
    }
}

// n numbers of an f16 cache as floats.
static void widen(float *out, const void *halves, int n) {
    for (int i = 0; i < n; i += WIDTH) store_f32(out + i, load_f16((const uint16_t *)halves + i));
}

// What a query has gathered so far; the mix of values is relative to the peak. Nothing: total 0.
typedef struct {
    float *peak, *total;
    float *mix;  // (head_dim)
} Answer;

// b comes after a and is added to it.
static void merge(Answer *a, const Answer *b, int head_dim) {
    if (*b->total == 0) return;
    bool first = *a->total == 0;
    float peak = !first && *a->peak > *b->peak ? *a->peak : *b->peak;
    float mine = first ? 0 : exp_of(*a->peak - peak), other = exp_of(*b->peak - peak);
    for (int i = 0; i < head_dim; i++)
        a->mix[i] = (first ? 0 : a->mix[i] * mine) + b->mix[i] * other;
    *a->total = (first ? 0 : *a->total * mine) + *b->total * other;
    *a->peak = peak;
}

// ------------------------------------------------------------------------------------------------
// 8. The transformer: tokens become hidden states, hidden states become logits

// A token on its way through the layers. Sequences in different slots do not see each other.
typedef struct { int id, slot, pos; } Step;

// A run of steps that are neighbours in one sequence; their attention is done together.
typedef struct { int first, n; } Run;

typedef struct {
    const Model *model;
    Pool *pool;
    int batch;            // steps that go through the layers together, at most
    int context;          // positions a slot has room for
    int slots;
    int logit_rows;       // steps whose logits are kept at once
    float *x;             // (batch, dim)           the residual stream
    Inputs in;            // (batch, widest)        what the next product multiplies
    float *h1, *h2;       // (batch, widest)        inside the feed-forward block
    float *q, *k, *v;     // (batch, heads * head_dim)  q in h1's room, k and v in h2's
    float *branch;        // (batch, dim)           what a block adds to x
    double *frequency;    // (head_dim/2)           angle of each RoPE pair per position
    float *angles;        // (batch, 2, head_dim/2) cosines and sines
    Cache cache;          // (slots, layers, kv_heads)
    Run *runs;            // (batch)
    int split;            // so few steps have their attention split by blocks
    float *answers;       // (batch, heads) or (split, blocks, heads) records of attention
    float *logits;        // (logit_rows, vocab)
    Scratch *scratch;     // (threads)
    Desk *desks;          // (threads)
    Arena arena;
} State;

// The widest row that any product takes or gives, but for the logits.
static int widest(const Config *c) {
    return most(most(c->dim, c->hidden_dim), most(q_dim(c), 2 * kv_dim(c)));
}

static void lay_out_cache(Cache *k, Arena *a, const Config *c, int context, int n_slots) {
    k->head_dim = c->head_dim;
    k->head_pad = (int)round_up((size_t)c->head_dim, WIDTH);
    k->context = (int)round_up((size_t)context, BLOCK);
    k->half = is_quantized(c->type);
    k->head_bytes = (size_t)k->context * (size_t)k->head_pad * (k->half ? 2 : 4);
    size_t heads = (size_t)n_slots * (size_t)c->n_layers * (size_t)c->n_kv_heads;
    k->keys = deal(a, heads, k->head_bytes);
    k->values = deal(a, heads, k->head_bytes);
}

static void lay_out_threads(State *s, Arena *a, int threads) {
    size_t batch = (size_t)s->batch, pad = (size_t)s->cache.head_pad;
    bool floats = !is_quantized(s->model->config.type);
    s->desks = DEAL(a, Desk, (size_t)threads);
    s->scratch = DEAL(a, Scratch, floats ? (size_t)threads : 0);
    for (int i = 0; i < threads; i++) {
        Desk d = {
            .q = DEAL(a, float, 8 * pad),        .weight = DEAL(a, float, 8 * BLOCK),
            .mix = DEAL(a, float, 8 * pad),      .keys = DEAL(a, float, BLOCK * pad),
            .values = DEAL(a, float, BLOCK * pad),
        };
        f32v *sums = floats ? DEAL(a, f32v, batch * UNIT) : NULL;
        if (a->at) s->desks[i] = d;
        if (a->at && floats) s->scratch[i].sums = sums;
    }
}

// Every array of the state, once to add up the sizes and once to deal them out.
static void lay_out(State *s, Arena *a, int threads) {
    const Config *c = &s->model->config;
    size_t batch = (size_t)s->batch, wide = (size_t)widest(c), groups = group_count((int)wide);
    bool quantized = is_quantized(c->type);
    size_t blocks = round_up((size_t)s->context, BLOCK) / BLOCK;
    s->x = DEAL(a, float, batch * (size_t)c->dim);
    s->in.x = DEAL(a, float, batch * wide);
    s->in.q = DEAL(a, int8_t, quantized ? batch * groups * GROUP : 0);
    s->in.scale = DEAL(a, float, quantized ? batch * groups : 0);
    s->in.start = DEAL(a, int32_t, quantized ? batch * groups : 0);
    s->q = s->h1 = DEAL(a, float, batch * wide);
    s->k = s->h2 = DEAL(a, float, batch * wide);
    s->v = a->at ? s->k + batch * (size_t)kv_dim(c) : NULL;
    s->branch = DEAL(a, float, batch * (size_t)c->dim);
    s->frequency = DEAL(a, double, (size_t)c->head_dim / 2);
    s->angles = DEAL(a, float, batch * (size_t)c->head_dim);
    s->runs = DEAL(a, Run, batch);
    s->logits = DEAL(a, float, (size_t)s->logit_rows * (size_t)c->vocab_size);
    lay_out_cache(&s->cache, a, c, s->context, s->slots);
    size_t records = batch > (size_t)s->split * blocks ? batch : (size_t)s->split * blocks;
    s->answers = DEAL(a, float, records * (size_t)c->n_heads * (size_t)(s->cache.head_pad + 2));
    lay_out_threads(s, a, threads);
}

// Angle per position of RoPE pair i: theta^(-2i / head_dim) (Su et al. 2021, 3.4.2), slowed down
// for contexts longer than trained on: all of them by a factor, or as Llama 3.1 does, only those
// whose wave is long against the original context, with a ramp between the two.
static double rope_frequency(const Config *c, int i) {
    double f = pow((double)c->rope_theta, -2.0 * i / c->head_dim);
    if (c->scaling == LINEAR) return f / (double)c->factor;
    if (c->scaling == NO_SCALING) return f;
    double waves = c->original_context * f / (2 * 3.14159265358979323846);
    double low = (double)c->low_freq_factor, high = (double)c->high_freq_factor;
    double keep = waves < low ? 0 : waves > high ? 1 : (waves - low) / (high - low);
    return keep * f + (1 - keep) * f / (double)c->factor;
}

// Steps at once: enough that weights read once serve many, in about 12 MB of rows.
static int default_batch(const Config *c) {
    size_t row = sizeof(float) * ((size_t)widest(c) * 3 + 2 * (size_t)c->dim);
    size_t fit = (12u << 20) / row / 40 * 40;  // whole tiles of 5 and of 8
    return fit < 40 ? 40 : fit > 480 ? 480 : (int)fit;
}

typedef struct { int context, slots, logit_rows, batch; } Room;

static void set_room(State *s, const Model *m, Pool *pool, Room room) {
    *s = (State){.model = m, .pool = pool, .batch = room.batch, .context = room.context,
                 .slots = room.slots, .logit_rows = room.logit_rows};
    s->split = most(1, least(room.batch, 2 * pool->threads / m->config.n_kv_heads));
}

// Bytes that a state of this size may come to touch.
static size_t state_bytes(const Model *m, Pool *pool, Room room) {
    State s;
    Arena a = {0};
    set_room(&s, m, pool, room);
    lay_out(&s, &a, pool->threads);
    return a.used;
}

static void open_state(State *s, const Model *m, Pool *pool, Room room) {
    Arena a = open_arena(state_bytes(m, pool, room), "a smaller context (-c) needs less");
    set_room(s, m, pool, room);
    lay_out(s, &a, pool->threads);
    s->arena = a;
    for (int i = 0; i < m->config.head_dim / 2; i++)
        s->frequency[i] = rope_frequency(&m->config, i);
}

static void close_state(State *s) { close_arena(&s->arena); }

// Work on the rows of a batch, one row a token. Many rows are shared out among the threads; a few
// are done at once by the caller.
typedef struct Rows Rows;
typedef void RowWork(const Rows *r, int t);

struct Rows {
    State *s;
    const Config *config;
    const Step *steps;     // (n)
    int n;
    int l;                 // the layer
    RowWork *work;
    const Tensor *weight;  // of the norm
    int runs;              // of attention, see there
    int parts;
};

static void do_rows(void *job, int thread, int first, int end) {
    (void)thread;
    const Rows *r = job;
    for (int t = first; t < end; t++) r->work(r, t);
}

static void each_row(Rows *r, RowWork *work) {
    enum { FEW = 8 };
    r->work = work;
    if (r->n <= FEW)
        do_rows(r, 0, 0, r->n);
    else
        parallel(r->s->pool, r->n, do_rows, r);
}

static float *row(float *rows, int t, int width) { return rows + (size_t)t * (size_t)width; }

static const float *vector(const Tensor *w) { return (const float *)(const void *)w->data; }

static const Layer *layer_of(const Rows *r) { return &r->s->model->layers[r->l]; }

// Which head of the whole cache a step's key/value head in this layer is.
static size_t cache_head(const Rows *r, int t, int kv_head) {
    size_t layer = (size_t)r->steps[t].slot * (size_t)r->config->n_layers + (size_t)r->l;
    return layer * (size_t)r->config->n_kv_heads + (size_t)kv_head;
}

// out = x / rms(x) * weight, rms(x) = sqrt(mean of squares + eps) (Zhang & Sennrich 2019).
static void rmsnorm(float *out, const float *x, const Tensor *weight, float eps) {
    f32v squares = spread(0);
    int n = weight->cols, whole = n / WIDTH * WIDTH;
    for (int i = 0; i < whole; i += WIDTH)
        squares = fma16(load_f32(x + i), load_f32(x + i), squares);
    f32v rest = load_some(x + whole, n - whole);
    squares = fma16(rest, rest, squares);
    float scale = 1 / sqrtf(join(squares) / (float)n + eps);
    for (int i = 0; i < n; i++) out[i] = x[i] * scale * vector(weight)[i];
}

// in = norm(x)
static void norm_row(const Rows *r, int t) {
    const Config *c = r->config;
    rmsnorm(row(r->s->in.x, t, c->dim), row(r->s->x, t, c->dim), r->weight, c->norm_eps);
    prepare(&r->s->in, t, c->dim, c->type);
}

// x += branch
static void add_row(const Rows *r, int t) {
    float *x = row(r->s->x, t, r->config->dim), *branch = row(r->s->branch, t, r->config->dim);
    for (int i = 0; i < r->config->dim; i++) x[i] += branch[i];
}

// in = silu(h1) * h2, silu(x) = x / (1 + e^-x) (Shazeer 2020).
static void swiglu_row(const Rows *r, int t) {
    int n = r->config->hidden_dim;
    float *h1 = row(r->s->h1, t, n), *h2 = row(r->s->h2, t, n), *out = row(r->s->in.x, t, n);
    for (int i = 0; i < n; i += WIDTH) {
        f32v gate = load_some(h1 + i, n - i), up = load_some(h2 + i, n - i);
        f32v falling = exponential(sub(spread(0), gate));
        store_some(out + i, mul(over(gate, add(spread(1), falling)), up), n - i);
    }
    prepare(&r->s->in, t, n, r->config->type);
}

// Turn each pair of a head by its angle: (a, b) becomes (a cos - b sin, a sin + b cos). A query and
// a key turned so meet in a product that depends only on how far apart they are (Su et al. 2021).
static void rotate(float *head, const float *angles, const Config *c) {
    bool neighbours = c->flags & NEIGHBOURS;
    int pairs = c->head_dim / 2, step = neighbours ? 2 : 1, apart = neighbours ? 1 : pairs;
    for (int i = 0; i < pairs; i++) {
        float *a = head + i * step, *b = a + apart;
        float cosine = angles[i], sine = angles[pairs + i], turned = *a * cosine - *b * sine;
        *b = *a * sine + *b * cosine;
        *a = turned;
    }
}

static void add_bias(float *x, const Tensor *bias) {
    for (int i = 0; bias->rows && i < bias->cols; i++) x[i] += vector(bias)[i];
}

// n query or key heads with their norm, if the model has one, turned to the step's position.
static void place_heads(const Rows *r, int t, float *heads, int n, const Tensor *norm) {
    const Config *c = r->config;
    for (int h = 0; h < n; h++, heads += c->head_dim) {
        if (c->flags & HEAD_NORMS) rmsnorm(heads, heads, norm, c->norm_eps);
        rotate(heads, row(r->s->angles, t, c->head_dim), c);
    }
}

// Queries, keys and values of a step made ready, the latter two put into the cache.
static void place_row(const Rows *r, int t) {
    State *s = r->s;
    const Config *c = r->config;
    const Layer *w = layer_of(r);
    float *q = row(s->q, t, q_dim(c)), *k = row(s->k, t, kv_dim(c)), *v = row(s->v, t, kv_dim(c));
    add_bias(q, &w->bq);
    add_bias(k, &w->bk);
    add_bias(v, &w->bv);
    place_heads(r, t, q, c->n_heads, &w->q_norm);
    place_heads(r, t, k, c->n_kv_heads, &w->k_norm);
    for (int h = 0; h < c->n_kv_heads; h++) {
        size_t head = cache_head(r, t, h);
        cache_key(&s->cache, head, r->steps[t].pos, k + h * c->head_dim);
        cache_value(&s->cache, head, r->steps[t].pos, v + h * c->head_dim);
    }
}

// Cosines and sines of a step's position.
static void angle_row(const Rows *r, int t) {
    int pairs = r->config->head_dim / 2;
    float *angles = row(r->s->angles, t, 2 * pairs);
    for (int i = 0; i < pairs; i++) {
        double angle = r->steps[t].pos * r->s->frequency[i];
        angles[i] = (float)cos(angle);
        angles[pairs + i] = (float)sin(angle);
    }
}

static void embed_row(const Rows *r, int t) {
    const Tensor *w = &r->s->model->embedding;
    unpack_row(row(r->s->x, t, w->cols), w, r->steps[t].id);
}

// Attention is cut into items: a run of steps times a key/value head, and for a few steps also
// times a block, so that a long context of one token can be shared out. What a step's head has
// gathered lies in `parts` records, one for each block then: peak, total and mix side by side.
static Answer answer_at(const Rows *r, int t, int part, int head) {
    size_t at = ((size_t)t * (size_t)r->parts + (size_t)part) * (size_t)r->config->n_heads;
    float *record = r->s->answers + (at + (size_t)head) * (size_t)(r->s->cache.head_pad + 2);
    return (Answer){record, record + 1, record + 2};
}

// The first position that step t sees.
static int first_seen(const Rows *r, int t) {
    int window = r->config->window;
    return window ? most(0, r->steps[t].pos - window + 1) : 0;
}

// The j-th query of a run and a key/value head: its step and its head.
typedef struct { int t, head; } Query;

static Query query_of(const Rows *r, Run run, int kv_head, int j) {
    int group = r->config->n_heads / r->config->n_kv_heads;
    return (Query){run.first + j / group, kv_head * group + j % group};
}

// Queries side by side on the desk, scaled, and what each sees of the block.
static void gather_query(const Rows *r, Desk *d, Query q, int block, int j, int queries) {
    const Config *c = r->config;
    const float *from = row(r->s->q, q.t, q_dim(c)) + q.head * c->head_dim;
    float scale = 1 / sqrtf((float)c->head_dim);
    for (int i = 0; i < c->head_dim; i++) d->q[i * queries + j] = from[i] * scale;
    d->first[j] = most(0, first_seen(r, q.t) - block * BLOCK);
    d->end[j] = most(0, least(r->steps[q.t].pos + 1 - block * BLOCK, BLOCK));
}

// The block's answers for all queries of a run and a key/value head go to their records.
static void attend_block(const Rows *r, Desk *d, Run run, int kv_head, int block,
                         const void *keys, const void *values, bool half) {
    int all = run.n * (r->config->n_heads / r->config->n_kv_heads);
    for (int j0 = 0, n; j0 < all; j0 += n) {
        n = all - j0 >= A_QUERIES ? A_QUERIES : all - j0 >= 4 ? 4 : all - j0 >= 2 ? 2 : 1;
        for (int j = 0; j < n; j++)
            gather_query(r, d, query_of(r, run, kv_head, j0 + j), block, j, n);
        answer(d, keys, values, &r->s->cache, half, n);
        for (int j = 0; j < n; j++) {
            Query q = query_of(r, run, kv_head, j0 + j);
            Answer gathered = answer_at(r, q.t, r->parts > 1 ? block : 0, q.head);
            Answer new = {&d->peak[j], &d->total[j], row(d->mix, j, r->s->cache.head_pad)};
            merge(&gathered, &new, r->config->head_dim);
        }
    }
}

// A block of the cache for all queries of a run; for many queries an f16 cache is made floats
// first.
static void visit_block(const Rows *r, Desk *d, Run run, int kv_head, int block) {
    const Cache *cache = &r->s->cache;
    int last = run.first + run.n - 1, group = r->config->n_heads / r->config->n_kv_heads;
    size_t at = cache_head(r, last, kv_head) * cache->head_bytes
              + (size_t)block * BLOCK * (size_t)cache->head_pad * (cache->half ? 2 : 4);
    const char *keys = cache->keys + at, *values = cache->values + at;
    if (!cache->half || run.n * group < 4 * A_QUERIES) {
        attend_block(r, d, run, kv_head, block, keys, values, cache->half);
        return;
    }
    int seen = (int)round_up((size_t)least(BLOCK, r->steps[last].pos + 1 - block * BLOCK), WIDTH);
    widen(d->keys, keys, seen * cache->head_pad);
    widen(d->values, values, seen * cache->head_pad);
    attend_block(r, d, run, kv_head, block, d->keys, d->values, false);
}

static void attend_items(void *job, int thread, int first, int end) {
    const Rows *r = job;
    const Config *c = r->config;
    for (int i = first; i < end; i++) {
        Run run = r->s->runs[i / r->parts / c->n_kv_heads];
        int kv_head = i / r->parts % c->n_kv_heads, part = i % r->parts;
        for (int j = 0; j < run.n * (c->n_heads / c->n_kv_heads); j++) {
            Query q = query_of(r, run, kv_head, j);
            *answer_at(r, q.t, part, q.head).total = 0;
        }
        int from = first_seen(r, run.first) / BLOCK;
        int to = r->steps[run.first + run.n - 1].pos / BLOCK;
        if (r->parts > 1) from = most(from, part), to = least(to, part);
        for (int block = from; block <= to; block++)
            visit_block(r, &r->s->desks[thread], run, kv_head, block);
    }
}

// in = the answers: parts merged in order, mixes divided by their totals
static void finish_row(const Rows *r, int t) {
    const Config *c = r->config;
    float *out = row(r->s->in.x, t, q_dim(c));
    for (int h = 0; h < c->n_heads; h++, out += c->head_dim) {
        Answer whole = answer_at(r, t, 0, h);
        for (int part = 1; part < r->parts; part++) {
            Answer next = answer_at(r, t, part, h);
            merge(&whole, &next, c->head_dim);
        }
        float share = 1 / *whole.total;
        for (int i = 0; i < c->head_dim; i++) out[i] = whole.mix[i] * share;
    }
    prepare(&r->s->in, t, q_dim(c), c->type);
}

// Steps that are neighbours in one sequence, in runs short enough that a prompt makes items for
// every thread.
static void find_runs(Rows *r) {
    int longest = most(1, 128 * r->config->n_kv_heads / r->config->n_heads);
    Run *run = r->s->runs - 1;
    for (int t = 0; t < r->n; t++) {
        const Step *step = &r->steps[t], *before = step - 1;
        if (t && run->n < longest && step->slot == before->slot && step->pos == before->pos + 1)
            run->n++;
        else
            *++run = (Run){t, 1};
    }
    r->runs = (int)(run + 1 - r->s->runs);
}

// in = attention of the queries over the cache
static void attend(Rows *r) {
    enum { WORTH_SHARING = 1 << 15 };  // multiply-adds, about as long as a meeting of the threads
    int deepest = 0;
    double positions = 0;
    for (int t = 0; t < r->n; t++) {
        deepest = most(deepest, r->steps[t].pos);
        positions += r->steps[t].pos + 1 - first_seen(r, t);
    }
    find_runs(r);
    r->parts = r->n <= r->s->split ? deepest / BLOCK + 1 : 1;
    int items = r->runs * r->config->n_kv_heads * r->parts;
    if (positions * q_dim(r->config) < WORTH_SHARING)
        attend_items(r, 0, 0, items);
    else
        parallel(r->s->pool, items, attend_items, r);
    each_row(r, finish_row);
}

static void norm_in(Rows *r, const Tensor *weight) {
    r->weight = weight;
    each_row(r, norm_row);
}

static void multiply(const Rows *r, Matmul m) {
    m.in = &r->s->in, m.n = r->n, m.scratch = r->s->scratch;
    matmul(r->s->pool, &m);
}

static void attention_block(Rows *r) {
    State *s = r->s;
    const Layer *w = layer_of(r);
    norm_in(r, &w->attention_norm);
    multiply(r, (Matmul){{{s->q, &w->wq}, {s->k, &w->wk}, {s->v, &w->wv}}, .count = 3});
    each_row(r, place_row);
    attend(r);
    multiply(r, (Matmul){{{s->branch, &w->wo}}, .count = 1});
    each_row(r, add_row);
}

static void feed_forward_block(Rows *r) {
    State *s = r->s;
    const Layer *w = layer_of(r);
    norm_in(r, &w->ffn_norm);
    multiply(r, (Matmul){{{s->h1, &w->w1}, {s->h2, &w->w3}}, .count = 2});
    each_row(r, swiglu_row);
    multiply(r, (Matmul){{{s->branch, &w->w2}}, .count = 1});
    each_row(r, add_row);
}

// n <= batch steps go through the layers. Afterwards the cache holds them and x their hidden
// states.
static void forward(State *s, const Step *steps, int n) {
    Rows r = {.s = s, .config = &s->model->config, .steps = steps, .n = n};
    assert(n >= 1 && n <= s->batch);
    each_row(&r, embed_row);
    each_row(&r, angle_row);
    for (r.l = 0; r.l < r.config->n_layers; r.l++) {
        attention_block(&r);
        feed_forward_block(&r);
    }
}

// (n, vocab) scores of the tokens that may follow steps first to first + n of the last forward().
static float *logits(State *s, int first, int n) {
    State from = *s;  // a view of which row `first` is the first
    from.x = row(s->x, first, s->model->config.dim);
    Rows r = {.s = &from, .config = &s->model->config, .n = n};
    assert(n >= 1 && n <= s->logit_rows);
    norm_in(&r, &s->model->final_norm);
    multiply(&r, (Matmul){{{s->logits, &s->model->classifier}}, .count = 1});
    return s->logits;
}

// ------------------------------------------------------------------------------------------------
// 9. The tokenizer: text to ids and back
//
// Text is taken as symbols: characters in SentencePiece's family; bytes in the byte-level family,
// where a rule has cut the text into pieces before. Neighbours are joined, the best pair first.

enum { SENTENCEPIECE, BYTE_LEVEL };                                 // kinds
enum { ADDS_BOS = 1, DUMMY_PREFIX = 2, TAKES_WHOLE = 4, NFC = 8 };  // flags
enum { NO_RULE, LLAMA3_RULE, QWEN2_RULE, GPT2_RULE, SMOLLM_RULE };  // for cutting text
enum { NORMAL = 1, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE };  // types of tokens
// 1 << class of a character: 0 to 3 are in the file
enum { OTHER = 1, LETTER = 2, NUMBER = 4, WHITE = 8, SPACE = 16, LINE_END = 32 };
enum {
    UNICODE = 0x110000,         // codes end here; behind them
    CODES = UNICODE + 256,      // bytes outside any character have one each
    DEEPEST_COMPOSITION = 8,    // Unicode needs 3
    LONGEST_USER_DEFINED = 255,
    MOST_ENDS = 16,
    MOST_MARKS = 255,           // a mark moves over; Unicode's Stream-Safe Text has 30 in a row
    MOST_PROBES = 512,          // so no file makes a lookup slow; honest ones need fewer than 100
};

// How the file begins. Merges (left, right, joined), classes and marks (first code, value) and
// compositions (whole, first, second) follow, as rows of u32, then the tokens.
typedef struct {
    char magic[8];
    uint32_t version, kind, n_tokens, flags, rule, chat;
    int32_t bos, unknown;     // ids, -1: none
    uint32_t n_ends;
    int32_t ends[MOST_ENDS];  // ids that end a text
    uint32_t n_merges, n_classes, n_marks, n_compositions;
    uint8_t zero[124];
    uint64_t size;            // of the file
} TokenizerHeader;

// n bytes, not a C string; those of llama2.c's <0xHH> are `byte`.
typedef struct { const char *at; uint32_t n, type; char byte; } Token;

typedef struct {
    File file;                  // stays mapped: the bytes of tokens are used where they lie
    TokenizerHeader header;
    Token *token;               // (n_tokens)
    struct Entry { uint64_t key, value; } *entry;  // (mask + 1) a hash table; value 0: free
    size_t mask;
    uint8_t *class, *mark;      // (CODES) for the rules; canonical combining classes, for NFC
    uint8_t user_defined[256];  // length of the longest such token that begins with this byte
    bool joined[256][256];      // whether some token has these two bytes side by side
} Tokenizer;

// What an id stands for: no bytes for what is never text.
static Token piece(const Tokenizer *t, int id) {
    Token k = {.at = ""};
    if (id >= 0 && (uint32_t)id < t->header.n_tokens) k = t->token[id];
    if (k.type == CONTROL || k.type == UNKNOWN) k.n = 0;
    return k;
}

// Whether the model says with this id that its text is over.
static bool ends_text(const Tokenizer *t, int id) {
    bool ends = id >= 0 && id == t->header.bos;
    for (uint32_t i = 0; i < t->header.n_ends; i++) ends |= id == t->header.ends[i];
    return ends;
}

// memcmp would take longer for so few.
static bool spells(const Token *k, const char *bytes, size_t n) {
    size_t same = 0;
    while (k->n == n && same < n && k->at[same] == bytes[same]) same++;
    return k->n == n && same == n;
}

// The id of the control token with this name, -1 if there is none.
static int find_control(const Tokenizer *t, const char *name) {
    int id = (int)t->header.n_tokens - 1;
    while (id >= 0 && !(t->token[id].type == CONTROL && spells(&t->token[id], name, strlen(name))))
        id--;
    return id;
}

// What is looked up, by key: for
//     bytes of a token      priority, id     the smallest priority is joined first
//     left, right token     priority, joined
//     APART | code, 0       first, second character
//     TOGETHER | first, second the character
enum { TOGETHER = 1 << 24, APART = 1 << 25 };  // above any id and code

static uint64_t pair(uint32_t first, uint32_t second) { return (uint64_t)first << 32 | second; }

// FNV-1a; the upper bit tells it from the other keys.
static uint64_t key_of(const void *bytes, size_t n) {
    uint64_t h = 0xCBF29CE484222325;
    for (const uint8_t *p = bytes; n > 0; n--) h = (h ^ *p++) * 0x100000001B3;
    return h | 1ull << 63;
}

// The entry of a key, or the free one where it belongs.
static struct Entry *probe(const Tokenizer *t, uint64_t key) {
    const uint64_t odd = 0x9E3779B97F4A7C15;  // 2^64 / golden ratio
    uint64_t h = key * odd;
    h = (h ^ h >> 32) * odd >> 32;
    for (size_t i = 0; i < MOST_PROBES; i++) {
        struct Entry *e = &t->entry[(h + i) & t->mask];
        if (e->value == 0 || e->key == key) return e;
    }
    die("%s: broken: %d of its keys collide", t->file.path, MOST_PROBES);
}

static uint64_t find(const Tokenizer *t, uint64_t key) { return probe(t, key)->value; }

// Of values with the same key the first stays.
static void enter(Tokenizer *t, uint64_t key, uint64_t value) {
    struct Entry *e = probe(t, key);
    if (e->value == 0) *e = (struct Entry){key, value};
}

// Priority and id of the token that text of these bytes can become, 0 if there is none.
static uint64_t find_token(const Tokenizer *t, const uint8_t *bytes, size_t n) {
    uint64_t found = find(t, key_of(bytes, n));
    return found && spells(&t->token[(uint32_t)found], (const char *)bytes, n) ? found : 0;
}

enum { BROKEN = 0, CUT_SHORT = -1 };  // what is no character

// How many bytes the character at p takes, n > 0 being there; BROKEN when there is none, CUT_SHORT
// when all n bytes could begin one: then the code is the byte's. (The Unicode Standard, table 3-7.)
static int utf8(uint32_t *code, const uint8_t *p, size_t n) {
    uint8_t least = *p == 0xE0 ? 0xA0 : *p == 0xF0 ? 0x90 : 0x80;  // of the second byte
    uint8_t most = *p == 0xED ? 0x9F : *p == 0xF4 ? 0x8F : 0xBF;
    int length = *p < 0x80 ? 1 : *p < 0xE0 ? 2 : *p < 0xF0 ? 3 : 4;
    uint32_t bits = length == 1 ? *p : *p & (0x7F >> length);
    *code = (uint32_t)UNICODE + *p;
    if ((*p >= 0x80 && *p < 0xC2) || *p > 0xF4) return BROKEN;
    for (int i = 1; i < length; i++, least = 0x80, most = 0xBF) {
        if ((size_t)i == n) return CUT_SHORT;
        if (p[i] < least || p[i] > most) return BROKEN;
        bits = bits << 6 | (p[i] & 0x3F);
    }
    *code = bits;
    return length;
}

// The code at *p, which moves on.
static uint32_t next_code(const uint8_t **p, const uint8_t *end) {
    uint32_t code;
    *p += most(1, utf8(&code, *p, (size_t)(end - *p)));
    return code;
}

static void append_code(Bytes *out, uint32_t code) {
    size_t n = code < 0x80 || code >= UNICODE ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    char c[4];
    for (size_t i = n; i-- > 1; code >>= 6) c[i] = (char)(0x80 | (code & 0x3F));
    c[0] = (char)(n > 1 ? 0xF00 >> n | code : code & 0xFF);  // the low byte of UNICODE is 0
    append(out, c, n);
}

// ---- Reading the file

static void check(const File *f, const char *name, int64_t value, int64_t least, int64_t most) {
    if (value < least || value > most)
        die("%s: %s is %lld, not %lld to %lld", f->path, name, (long long)value, (long long)least,
            (long long)most);
}

static void check_header(const File *f, const TokenizerHeader *h, int vocab_size) {
    int64_t last = (int64_t)h->n_tokens - 1, size = (int64_t)f->size;
    check(f, "version", h->version, 1, 1);
    check(f, "size in the header", (int64_t)h->size, size, size);
    check(f, "kind", h->kind, SENTENCEPIECE, BYTE_LEVEL);
    check(f, "flags", h->flags, 0, ADDS_BOS | DUMMY_PREFIX | TAKES_WHOLE | NFC);
    check(f, "split rule", h->rule, NO_RULE, h->kind == BYTE_LEVEL ? SMOLLM_RULE : NO_RULE);
    check(f, "chat format", h->chat, 0, 5);
    check(f, "number of tokens (for this model)", h->n_tokens, 1, vocab_size);
    check(f, "id of BOS", h->bos, -1, last);
    check(f, "id of the unknown token", h->unknown, -1, last);
    check(f, "number of ids that end a text", h->n_ends, 0, MOST_ENDS);
    for (uint32_t i = 0; i < MOST_ENDS; i++)
        check(f, "id that ends a text", h->ends[i], 0, i < h->n_ends ? last : 0);
    check(f, "zero of the header", !all_zero(h->zero, sizeof h->zero), 0, 0);
}

// The token at `at`: score, type (by the id in llama2.c's file, which writes bytes as <0xHH>),
// length, bytes. Text can become it, if it is not of a special type. Returns where the next begins.
static size_t read_token(Tokenizer *t, uint32_t id, size_t at, bool own) {
    size_t head = own ? 12 : 8, left = t->file.size - at;
    const uint8_t *start = t->file.at + at, *p = start + head;
    uint32_t n = left < head ? 0 : read_u32(p - 4);
    size_t taken = head + (own ? round_up(n, 4) : n);
    if (left < taken)
        die("%s: token %u of %u runs past the end; is it this model's?", t->file.path, id,
            t->header.n_tokens);
    float score = read_f32(start) + 0.0f;  // -0 is 0
    Token *k = &t->token[id];
    *k = (Token){.at = (const char *)p, .n = n};
    k->type = own ? read_u32(start + 4) : id == 0 ? UNKNOWN : id < 3 ? CONTROL : NORMAL;
    if (!own && id - 3 < 256 && n == 6 && memcmp(p, "<0x", 3) == 0)
        *k = (Token){&k->byte, 1, BYTE, (char)(id - 3)};
    if (k->type < NORMAL || k->type > BYTE || score != score || (k->n == 0) != (k->type == UNUSED)
        || (k->type == BYTE && k->n > 1) || (k->type == USER_DEFINED && n > LONGEST_USER_DEFINED))
        die("%s: token %u has type %u, score %g and %u bytes; wanted a type of 1 to 6, a number, "
            "and bytes: 0 for type 5, 1 for type 6, else more, for type 4 at most %d",
            t->file.path, id, k->type, (double)score, k->n, LONGEST_USER_DEFINED);
    if (k->type != NORMAL && k->type != USER_DEFINED) return at + taken;
    for (uint32_t i = 1; i < n; i++) t->joined[p[i - 1]][p[i]] = true;
    if (k->type == USER_DEFINED && n > t->user_defined[*p]) t->user_defined[*p] = (uint8_t)n;
    uint32_t bits = read_u32(&score), priority = bits >> 31 ? bits : ~bits & INT32_MAX;
    enter(t, key_of(p, n), pair(priority, id));
    return at + taken;
}

static void read_tokens(Tokenizer *t, size_t at, bool own) {
    const File *f = &t->file;
    uint32_t count = t->header.n_tokens;
    t->token = NEW(Token, count);
    for (uint32_t id = 0; id < count; id++) at = read_token(t, id, at, own);
    if (at != f->size)
        die("%s: %zu bytes follow the last of %u tokens; is it this model's?", f->path,
            f->size - at, count);
    for (uint32_t id = 0; id < count; id++)  // last, as other tokens of one byte go before
        if (t->token[id].type == BYTE) enter(t, key_of(t->token[id].at, 1), pair(1, id));
    for (int b = 0; b < 256; b++)  // byte-level text rarely needs all, and some files lack a few
        if (t->header.kind == SENTENCEPIECE && !find_token(t, &(uint8_t){(uint8_t)b}, 1))
            die("%s: no token for byte %d", f->path, b);
}

// Each row must join two tokens to the one that has the bytes of both.
static void read_merges(Tokenizer *t, const uint32_t *row) {
    for (uint32_t i = 0; i < t->header.n_merges; i++, row += 3) {
        Token a = piece(t, (int)row[0]), b = piece(t, (int)row[1]), both = piece(t, (int)row[2]);
        if (!a.n || !b.n || both.n != (size_t)a.n + b.n || memcmp(both.at, a.at, a.n)
            || memcmp(both.at + a.n, b.at, b.n))
            die("%s: merge %u is %u and %u to %u, which has not the bytes of both", t->file.path, i,
                row[0], row[1], row[2]);
        enter(t, pair(row[0], row[1]), pair(i + 1, row[2]));
    }
}

// Rows of (first code, value), each valid up to the next, as one value a code.
static uint8_t *read_runs(const File *f, const uint32_t *row, uint32_t rows, int most) {
    uint8_t *values = NEW(uint8_t, CODES);
    check(f, "first code of a table of characters", rows ? row[0] : UNICODE, 0, 0);
    for (uint32_t i = 0; i < rows; i++, row += 2) {
        uint32_t end = i + 1 < rows ? row[2] : UNICODE;
        check(f, "next code of a table of characters", end, (int64_t)row[0] + 1, UNICODE);
        check(f, "value in a table of characters", row[1], 0, most);
        memset(values + row[0], (int)row[1], end - row[0]);
    }
    return values;
}

enum { SYLLABLES = 19 * 21 * 28 };  // of Hangul: leading, vowel and trailing letters or none

// The rows of the file, and Hangul, which it leaves out.
static void read_compositions(Tokenizer *t, const uint32_t *row) {
    const uint32_t n = t->header.n_compositions, never = 1u << 31;  // these are not composed
    for (uint32_t i = 0; i < n + SYLLABLES; i++) {
        uint32_t s = i - n, last = s % 28, whole = 0xAC00 + s;
        uint32_t hangul[] = {whole, last ? whole - last : 0x1100 + s / 588,
                             last ? 0x11A7 + last : 0x1161 + s / 28 % 21};
        const uint32_t *r = i < n ? row + 3 * (size_t)i : hangul;
        uint32_t codes[] = {r[0] & ~never, r[1], r[2]};
        for (int k = 0; k < 3; k++) check(&t->file, "code of a pair", codes[k], 0, UNICODE - 1);
        enter(t, pair(APART | codes[0], 0), pair(codes[1], codes[2]));
        if (r[0] == codes[0]) enter(t, pair(TOGETHER | codes[1], codes[2]), codes[0]);
    }
}

// Our format, with at most the tokens that the model has, or llama2.c's, with exactly them.
static Tokenizer open_tokenizer(const char *path, int vocab_size) {
    Tokenizer t = {.file = open_file(path), .mask = 15};
    const File *f = &t.file;
    TokenizerHeader *h = &t.header;
    bool own = f->size >= sizeof *h && memcmp(f->at, "LLAMA02T", 8) == 0;
    *h = (TokenizerHeader){.version = 1, .n_tokens = (uint32_t)vocab_size, .size = f->size,
                           .flags = ADDS_BOS | DUMMY_PREFIX, .bos = 1, .n_ends = 1, .ends = {2}};
    if (own) memcpy(h, f->at, sizeof *h);
    check_header(f, h, vocab_size);
    size_t start = own ? sizeof *h : 4;  // llama2.c's longest length: not needed
    size_t pairs = (size_t)h->n_merges + h->n_compositions;
    size_t tokens_at = start + 12 * pairs + 8 * ((size_t)h->n_classes + h->n_marks);
    check(f, "number of bytes in front of the tokens", (int64_t)tokens_at, 0, (int64_t)f->size);
    size_t entries = h->n_tokens + 2 * (pairs + (h->flags & NFC ? SYLLABLES : 0));
    while (t.mask < entries + entries / 2) t.mask += t.mask + 1;
    t.entry = NEW(struct Entry, t.mask + 1);
    read_tokens(&t, tokens_at, own);
    const uint32_t *row = (const void *)(f->at + start);
    read_merges(&t, row);
    row += 3 * (size_t)h->n_merges;
    if (h->rule) {
        t.class = read_runs(f, row, h->n_classes, 3);
        t.class[' '] = 4, t.class['\n'] = t.class['\r'] = 5;
    }
    row += 2 * (size_t)h->n_classes;
    if (h->flags & NFC) {
        t.mark = read_runs(f, row, h->n_marks, UINT8_MAX);
        read_compositions(&t, row + 2 * (size_t)h->n_marks);
    }
    return t;
}

static void close_tokenizer(Tokenizer *t) {
    void *blocks[] = {t->token, t->entry, t->class, t->mark};
    for (int i = 0; i < COUNT(blocks); i++) free(blocks[i]);
    close_file(&t->file);
}

// ---- Canonical composition, Unicode's NFC

// Append the parts of a character, of which only the first has parts itself. A mark goes in front
// of those of a higher class.
static void decompose(Tokens *out, const Tokenizer *t, uint32_t code, int depth) {
    uint64_t parts = code < 0x80 || depth == 0 ? 0 : find(t, pair(APART | code, 0));
    if (parts) {
        decompose(out, t, (uint32_t)(parts >> 32), depth - 1);
        if ((uint32_t)parts) decompose(out, t, (uint32_t)parts, 0);
        return;
    }
    push(out, (int)code);
    int *c = out->at + out->n - 1, *end = out->n > MOST_MARKS ? c - MOST_MARKS : out->at;
    for (; c > end && t->mark[code] && t->mark[c[-1]] > t->mark[code]; c--) *c = c[-1];
    *c = (int)code;
}

// Text as NFC has it: each starter (class 0) takes in what combines with it, unless something of
// the same or a higher class, or of class 0, stands between.
static Bytes compose(const Tokenizer *t, const uint8_t *text, size_t n) {
    Tokens codes = {0};
    Bytes out = {0};
    for (const uint8_t *p = text; p < text + n;)
        decompose(&codes, t, next_code(&p, text + n), DEEPEST_COMPOSITION);
    size_t starter = 0, kept = 0;
    for (size_t i = 0; i < codes.n; i++) {
        int code = codes.at[i], class = t->mark[code], whole = 0;
        bool meets = kept > 0 && (kept == starter + 1 || t->mark[codes.at[kept - 1]] < class);
        if (meets && code >= 0x300)  // below nothing combines
            whole = (int)find(t, pair(TOGETHER | (uint32_t)codes.at[starter], (uint32_t)code));
        if (!whole && class == 0) starter = kept;
        codes.at[whole ? starter : kept++] = whole ? whole : code;
    }
    for (size_t i = 0; i < kept; i++) append_code(&out, (uint32_t)codes.at[i]);
    free(codes.at);
    return out;
}

// ---- Encoding: cutting text into pieces, joining symbols

enum { NONE = INT_MAX };  // no token

typedef struct {
    uint32_t end, previous;  // where the next symbol begins, and the one before
    int id, both;            // its token, and that of it and the next one
} Symbol;

typedef struct {
    const Tokenizer *tokenizer;
    const uint8_t *end;  // of what stands between two user-defined tokens
    const uint8_t *run;  // the n bytes of it that are being joined
    size_t n;
    Symbol *symbol;      // (n + 1) each where it begins
    uint64_t *best;      // (2 n) a tree: the smaller order of joins of 2 i and 2 i + 1 is at i
    size_t symbol_room, best_room;
} Encoder;

// The class of the character at p, 0 at the end of the text, and where the next character begins.
static int class_at(const Encoder *e, const uint8_t *p, const uint8_t **next) {
    *next = p;
    return p < e->end ? 1 << e->tokenizer->class[next_code(next, e->end)] : 0;
}

// The end of at most `most` characters of some classes.
static const uint8_t *skip(const Encoder *e, const uint8_t *p, int classes, int most) {
    for (const uint8_t *next; most > 0 && class_at(e, p, &next) & classes; most--) p = next;
    return p;
}

// What an apostrophe draws to itself. Returns its end, or p.
static const uint8_t *contraction_end(const Encoder *e, const uint8_t *p, bool any_case) {
    static const char *const endings[] = {"s", "t", "re", "ve", "m", "ll", "d", "\u017F"};
    int known = any_case ? 8 : 7;  // U+017F is a long s, which is an s when case does not matter
    const char *text = (const char *)p + 1;
    for (int i = 0; i < known && *p == '\''; i++) {
        size_t n = strlen(endings[i]);
        if (n < (size_t)(e->end - p) && !(any_case ? strncasecmp : strncmp)(text, endings[i], n))
            return p + 1 + n;
    }
    return p;
}

// White space: in the newer rules up to its last line end; else all of it at the end of the text;
// else all but the last character, which may belong to what follows.
static const uint8_t *white_end(const Encoder *e, const uint8_t *p, uint32_t rule) {
    const uint8_t *end = p, *last = p, *next, *line_end = NULL;
    int class;
    for (; (class = class_at(e, end, &next)) & (WHITE | SPACE | LINE_END); last = end, end = next)
        if (class == LINE_END) line_end = next;
    if (line_end && rule <= QWEN2_RULE) return line_end;
    bool over = !class || (class == NUMBER && rule == SMOLLM_RULE);
    return over || last == p ? end : last;
}

// The end of the piece that begins at p. The rules:
//     Llama 3  (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|
//              ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
//     Qwen2    the same with \p{N}
//     GPT-2    's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//     SmolLM   each \p{N} alone, then GPT-2's between them
static const uint8_t *piece_end(const Encoder *e, const uint8_t *p) {
    enum { ALL = INT_MAX, ANY = OTHER | WHITE | SPACE };
    static const struct { int before, class, most, after; } parts[][3] = {  // before: at most one
        [LLAMA3_RULE] = {{ANY, LETTER, ALL, 0}, {0, NUMBER, 3, 0}, {SPACE, OTHER, ALL, LINE_END}},
        [QWEN2_RULE] = {{ANY, LETTER, ALL, 0}, {0, NUMBER, 1, 0}, {SPACE, OTHER, ALL, LINE_END}},
        [GPT2_RULE] = {{SPACE, LETTER, ALL, 0}, {SPACE, NUMBER, ALL, 0}, {SPACE, OTHER, ALL, 0}},
        [SMOLLM_RULE] = {{SPACE, LETTER, ALL, 0}, {0, NUMBER, 1, 0}, {SPACE, OTHER, ALL, 0}},
    };
    uint32_t rule = e->tokenizer->header.rule;
    const uint8_t *end = contraction_end(e, p, rule <= QWEN2_RULE);
    for (int i = 0; i < 3 && end == p; i++) {
        const uint8_t *from = skip(e, p, parts[rule][i].before, 1);
        end = skip(e, from, parts[rule][i].class, parts[rule][i].most);
        end = end > from ? skip(e, end, parts[rule][i].after, ALL) : p;
    }
    return end > p ? end : white_end(e, p, rule);
}

// Put down when a symbol is to be joined with the next one, and which join of all is now the best.
static void set_order(Encoder *e, size_t at, uint64_t order) {
    uint64_t *best = e->best;
    best[at += e->n] = order;
    for (; at > 1; at /= 2) best[at / 2] = best[at] < best[at ^ 1] ? best[at] : best[at ^ 1];
}

// Find out what a symbol and the next one become.
static void consider(Encoder *e, uint32_t at) {
    const Tokenizer *t = e->tokenizer;
    Symbol *s = &e->symbol[at];
    uint64_t both = 0;
    if (s->end < e->n && t->header.n_merges)
        both = find(t, pair((uint32_t)s->id, (uint32_t)e->symbol[s->end].id));
    else if (s->end < e->n)
        both = find_token(t, e->run + at, e->symbol[s->end].end - at);
    s->both = (int)both;
    set_order(e, at, both ? pair((uint32_t)(both >> 32), at) : UINT64_MAX);
}

// The symbol at `at`: a character or a byte. Merges join nothing but tokens, so with them a
// character that is none falls into bytes at once.
static Symbol new_symbol(const Encoder *e, uint32_t at, uint32_t previous) {
    const Tokenizer *t = e->tokenizer;
    uint32_t code, length = 1;
    if (t->header.kind == SENTENCEPIECE)
        length = (uint32_t)most(1, utf8(&code, e->run + at, e->n - at));
    uint64_t found = find_token(t, e->run + at, length);
    if (!found && length > 1 && t->header.n_merges)
        found = find_token(t, e->run + at, length = 1);
    return (Symbol){at + length, previous, found ? (int)found : NONE, NONE};
}

// Neighbours become one token, the best pair first, of equals the leftmost. Bytes stand for what is
// no token in the end.
static void join_run(Tokens *out, Encoder *e, const uint8_t *run, size_t n) {
    grow((void **)&e->symbol, &e->symbol_room, n + 1, sizeof *e->symbol);
    grow((void **)&e->best, &e->best_room, 2 * n, sizeof *e->best);
    memset(e->best, -1, 2 * n * sizeof *e->best);
    e->run = run, e->n = n;
    Symbol *s = e->symbol;
    for (uint32_t at = 0, last = 0; at < n; last = at, at = s[at].end) {
        s[at] = new_symbol(e, at, last);
        if (at > 0) consider(e, last);
    }
    while (e->best[1] != UINT64_MAX) {
        uint32_t left = (uint32_t)e->best[1], right = s[left].end;
        s[left].id = s[left].both, s[left].end = s[right].end;
        s[s[right].end].previous = left;
        set_order(e, right, UINT64_MAX);
        if (left > 0) consider(e, s[left].previous);
        consider(e, left);
    }
    for (uint32_t at = 0, i = 0; at < n; i = at = s[at].end) {
        if (s[at].id != NONE) push(out, s[at].id);
        for (uint64_t found; s[at].id == NONE && i < s[at].end; i++)
            if ((found = find_token(e->tokenizer, run + i, 1))) push(out, (int)found);
    }
}

// Text between user-defined tokens. A piece falls into runs wherever two bytes meet that stand
// together in no token: nothing is joined across, so the ids are the same, and the work on a word
// stays in the first cache.
static void encode_section(Tokens *out, Encoder *e, const uint8_t *text, size_t n) {
    const Tokenizer *t = e->tokenizer;
    Bytes composed = {0};
    if (t->header.flags & NFC && n) {
        composed = compose(t, text, n);
        text = (uint8_t *)composed.at, n = composed.n;
    }
    e->end = text + n;
    for (const uint8_t *p = text, *end; p < e->end; p = end) {
        end = t->header.rule ? piece_end(e, p) : e->end;
        uint64_t whole = t->header.flags & TAKES_WHOLE ? find_token(t, p, (size_t)(end - p)) : 0;
        if (whole) push(out, (int)whole);
        for (const uint8_t *from = p; from < end && !whole; from = p) {
            for (p++; p < end && t->joined[p[-1]][*p]; p++) {}
            join_run(out, e, from, (size_t)(p - from));
        }
    }
    free(composed.at);
}

// The longest user-defined token that the text begins with, as find_token; 0 if there is none.
static uint64_t find_user_defined(const Tokenizer *t, const uint8_t *text, size_t n) {
    for (size_t k = n < t->user_defined[*text] ? n : t->user_defined[*text]; k > 0; k--) {
        uint64_t found = find_token(t, text, k);
        if (found && t->token[(uint32_t)found].type == USER_DEFINED) return found;
    }
    return 0;
}

// Append the ids of any n bytes to out: no BOS, and no control tokens, whatever the text says.
static void encode(Tokens *out, const Tokenizer *t, const char *text, size_t n) {
    if (n == 0) return;
    if (n >= UINT32_MAX / 2) die("a text of %zu bytes is too long", n);  // symbols count the bytes
    Bytes spaced = {0};  // as the vocabulary spells it: a space in front, and U+2581 is one
    append(&spaced, " ", t->header.flags & DUMMY_PREFIX ? 1 : 0);
    const char *end = text + n, *sign = NULL;
    for (; text < end; text = sign ? sign + 3 : end) {
        if (t->header.kind == SENTENCEPIECE) sign = memmem(text, (size_t)(end - text), "\u2581", 3);
        append(&spaced, text, (size_t)((sign ? sign : end) - text));
        append(&spaced, " ", sign ? 1 : 0);
    }
    Encoder e = {.tokenizer = t};
    const uint8_t *p = (const uint8_t *)spaced.at, *last = p + spaced.n;
    for (const uint8_t *from = p; from < last; from = p) {
        uint64_t found = 0;
        while (p < last && !(found = find_user_defined(t, p, (size_t)(last - p)))) p++;
        encode_section(out, &e, from, (size_t)(p - from));
        if (found) push(out, (int)found);
        if (found) p += t->token[(uint32_t)found].n;
    }
    free(e.symbol);
    free(e.best);
    free(spaced.at);
}

// ---- Decoding

// Ids go in one by one, bytes come out once they are a character or can never be one.
typedef struct {
    const Tokenizer *tokenizer;
    uint8_t held[4];  // what may be the beginning of a character
    size_t n_held;
    bool begun;
} Decoder;

static void decode(Bytes *out, Decoder *d, int id) {
    Token k = piece(d->tokenizer, id);
    bool prefix = !d->begun && d->tokenizer->header.flags & DUMMY_PREFIX && k.n && *k.at == ' ';
    d->begun |= k.n > 0;
    uint32_t code;
    for (size_t i = prefix; i < k.n; i++) {
        d->held[d->n_held++] = (uint8_t)k.at[i];
        int n;
        while (d->n_held && (n = utf8(&code, d->held, d->n_held)) != CUT_SHORT) {
            n += n == BROKEN;  // its first byte is in no character
            append(out, (char *)d->held, (size_t)n);
            d->n_held -= (size_t)n;
            memmove(d->held, d->held + n, d->n_held);
        }
    }
}

// The end of the text: what is held has no more to wait for.
static void flush(Bytes *out, Decoder *d) {
    append(out, (char *)d->held, d->n_held);
    d->n_held = 0;
}

// ------------------------------------------------------------------------------------------------
// 10. The sampler: logits to one token
//
// In the order of the field: repetition penalty (Keskar et al. 2019), temperature, top-k, top-p
// (Holtzman et al. 2020), min-p. With only temperature and top-p the rule and its random numbers
// are llama2.c's, so the same seed gives the same text.

typedef struct { float p; int id; } Candidate;

typedef struct {
    float temperature, top_p, min_p, penalty;
    int top_k;  // 0: all
} Taste;

// xorshift64* (Vigna 2016): a float in [0, 1) of 24 bits, so every value is exact and 1 not
// reached.
static float random_float(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (float)(uint32_t)((*state * 0x2545f4914f6cdd1dull) >> 32 >> 8) * 0x1p-24f;
}

static int most_likely(const float *logits, int n) {
    int best = 0;
    for (int i = 1; i < n; i++)
        if (logits[i] > logits[best])
            best = i;
    return best;
}

static float peak_of(const float *x, int n) {
    f32v peaks = spread(-INFINITY);
    int whole = n / WIDTH * WIDTH;
    for (int i = 0; i < whole; i += WIDTH) peaks = greater_of(peaks, load_f32(x + i));
    float peak = greatest(peaks);
    for (int i = whole; i < n; i++) peak = x[i] > peak ? x[i] : peak;
    return peak;
}

// Logits, divided by the temperature, to probabilities. Returns the sum of e^(logit - peak).
static float softmax(float *x, int n, float temperature) {
    f32v sum = spread(0);
    for (int i = 0; i < n; i++) x[i] /= temperature;
    f32v peak = spread(peak_of(x, n));
    for (int i = 0; i < n; i += WIDTH) {
        store_some(x + i, exponential(sub(load_some(x + i, n - i), peak)), n - i);
        sum = add(sum, load_some(x + i, n - i));
    }
    float total = join(sum);
    for (int i = 0; i < n; i++) x[i] /= total;
    return total;
}

// Falling probability; among equals the smaller id first.
static int by_probability(const void *a, const void *b) {
    const Candidate *x = a, *y = b;
    return x->p != y->p ? (x->p < y->p) - (x->p > y->p) : (x->id > y->id) - (x->id < y->id);
}

// What top-k, top-p and min-p leave of n probabilities, likeliest first; at least one.
static int shortlist(Candidate *c, const float *p, int n, const Taste *taste) {
    bool nucleus = taste->top_p > 0 && taste->top_p < 1;
    float cutoff = 0, whole = 1;
    if (nucleus && !taste->top_k)  // below it nothing can be among the likeliest
        cutoff = (1 - taste->top_p) / (float)(n - 1);
    int kept = 0;
    for (int i = 0; i < n; i++)
        if (p[i] >= cutoff)
            c[kept++] = (Candidate){p[i], i};
    if (kept == 0) c[kept++] = (Candidate){1, most_likely(p, n)};
    qsort(c, (size_t)kept, sizeof *c, by_probability);
    if (taste->top_k && taste->top_k < kept) {
        kept = taste->top_k, whole = 0;
        for (int i = 0; i < kept; i++) whole += c[i].p;
    }
    float sum = 0;
    for (int i = 0; nucleus && i < kept; i++)
        if ((sum += c[i].p) > taste->top_p * whole)
            kept = i + 1;
    while (kept > 1 && c[kept - 1].p < taste->min_p * c[0].p) kept--;
    return kept;
}

// Tokens of the text become less likely, each once: positive logits divided, negative ones
// multiplied. `old` (vocab) has room for the logits before.
static void penalize(float *logits, Candidate *old, const Tokens *text, float penalty) {
    for (size_t i = 0; i < text->n; i++) old[text->at[i]].p = logits[text->at[i]];
    for (size_t i = 0; i < text->n; i++) {
        float before = old[text->at[i]].p;
        logits[text->at[i]] = before > 0 ? before / penalty : before * penalty;
    }
}

// The next token; the logits are used up. `text` is what the penalty looks back on.
static int pick(float *logits, int n, const Taste *taste, uint64_t *state, Candidate *candidates,
                const Tokens *text) {
    if (taste->penalty != 1) penalize(logits, candidates, text, taste->penalty);
    if (taste->temperature == 0) return most_likely(logits, n);
    softmax(logits, n, taste->temperature);
    float chance = random_float(state), sum = 0;
    bool whole = !taste->top_k && taste->min_p <= 0 && (taste->top_p <= 0 || taste->top_p >= 1);
    if (whole) {
        for (int i = 0; i < n; i++)
            if ((sum += logits[i]) > chance)
                return i;
        return n - 1;
    }
    int kept = shortlist(candidates, logits, n, taste);
    for (int i = 0; i < kept; i++) sum += candidates[i].p;
    float reach = chance * sum;
    sum = 0;
    for (int i = 0; i < kept; i++)
        if ((sum += candidates[i].p) > reach)
            return candidates[i].id;
    return candidates[kept - 1].id;
}

// ------------------------------------------------------------------------------------------------
// 11. A session: feed and reply, the two verbs of every text mode

typedef struct {
    const char *model, *tokenizer, *mode, *prompt, *file, *system, *output, *type, *format, *batch;
    double temperature, top_p, min_p, penalty;
    int64_t steps, threads, context, seed, top_k, depth, width;
    bool verbose, seed_is_time;
} Options;

typedef struct {
    const Options *options;
    Model model;
    Pool pool;
    State state;
    char *tokenizer_path;   // NULL: none is open
    Tokenizer tokenizer;
    Candidate *candidates;  // (vocab)
    Taste taste;
    Output out;
    bool out_is_terminal;
} Session;

// One text in one slot of the cache.
typedef struct {
    int slot;
    Tokens ids;      // all of it
    int pos;         // how many of them are in the cache
    uint64_t random;
    Decoder decoder;
    Bytes ready;     // characters that are complete but not written
    int64_t made;    // tokens of the last reply
} Text;

typedef enum { ENDED, REACHED_LIMIT, CONTEXT_FULL, INTERRUPTED } Stop;

static Text new_text(const Session *s, int slot) {
    // xorshift never leaves state 0, so seed 0 stands for another
    uint64_t seed = s->options->seed ? (uint64_t)s->options->seed : 0x9e3779b97f4a7c15ull;
    return (Text){.slot = slot, .random = seed, .decoder.tokenizer = &s->tokenizer};
}

static void say_seed(const Session *s) {
    if (s->options->temperature > 0 && s->options->seed_is_time)
        fprintf(stderr, "seed %lld\n", (long long)s->options->seed);
}

static void free_text(Text *t) {
    free(t->ids.at);
    free(t->ready.at);
}

// The text goes on with the tokens of n bytes, after BOS if it is at its beginning and the model
// wants one. What is said this way is part of what a decoder sees.
static void feed(Session *s, Text *text, const char *words, size_t n) {
    if (text->ids.n == 0 && s->tokenizer.header.bos >= 0 && s->tokenizer.header.flags & ADDS_BOS)
        push(&text->ids, s->tokenizer.header.bos);
    encode(&text->ids, &s->tokenizer, words, n);
}

// Run what the cache does not hold yet through the model, a batch at a time. Returns the logits of
// what may follow.
static float *catch_up(Session *s, Text *text) {
    State *state = &s->state;
    Progress progress = start_progress("reading");
    int from = text->pos, all = (int)text->ids.n, n = 0;
    Step *steps = NEW(Step, least(state->batch, all - from));
    assert(all > from && all <= state->context);
    for (; text->pos < all; text->pos += n) {
        n = least(state->batch, all - text->pos);
        for (int t = 0; t < n; t++)
            steps[t] = (Step){text->ids.at[text->pos + t], text->slot, text->pos + t};
        forward(state, steps, n);
        show_progress(&progress, text->pos + n - from, all - from);
    }
    end_progress(&progress);
    free(steps);
    return logits(state, n - 1, 1);
}

// A model's words must not steer a terminal.
static void disarm(Bytes *b) {
    for (size_t i = 0; i < b->n; i++)
        if (iscntrl((unsigned char)b->at[i]) && !strchr("\n\t", b->at[i]))
            b->at[i] = '?';
}

// Write what is ready, and send it off so that it is seen at once.
static void show_ready(Session *s, Text *text) {
    if (s->out_is_terminal) disarm(&text->ready);
    write_bytes(&s->out, text->ready.at, text->ready.n);
    if (text->ready.n && fflush(s->out.file) != 0) fail_output(&s->out);
    text->ready.n = 0;
}

// Sample the next token. False: it ends the text and is no part of it.
static bool extend(Session *s, Text *text, float *scores) {
    int id = pick(scores, s->model.config.vocab_size, &s->taste, &text->random, s->candidates,
                  &text->ids);
    if (ends_text(&s->tokenizer, id)) return false;
    push(&text->ids, id);
    decode(&text->ready, &text->decoder, id);
    text->made++;
    return true;
}

// Sample and write tokens until the model ends, `limit` are out or the context is full. `scores`
// are those of a catch_up().
static Stop reply(Session *s, Text *text, float *scores, int64_t limit) {
    for (text->made = 0; text->made < limit; scores = catch_up(s, text)) {
        if (interrupt_waits()) return INTERRUPTED;
        if (!extend(s, text, scores)) return ENDED;
        show_ready(s, text);
        if (text->made == limit) break;
        if ((int)text->ids.n > s->state.context) return CONTEXT_FULL;
    }
    return REACHED_LIMIT;
}

// Beside NAME.bin as NAME.tokenizer.bin, beside it as tokenizer.bin, or in the current folder.
static char *find_tokenizer(const char *model) {
    const char *slash = strrchr(model, '/'), *name = slash ? slash + 1 : model;
    const char *dot = strrchr(name, '.');
    int stem = dot ? (int)(dot - model) : (int)strlen(model);
    size_t room = strlen(model) + sizeof ".tokenizer.bin";
    char *path = NEW(char, room);
    snprintf(path, room, "%.*s.tokenizer.bin", stem, model);
    if (access(path, F_OK) != 0)
        snprintf(path, room, "%.*stokenizer.bin", (int)(name - model), model);
    if (access(path, F_OK) != 0) snprintf(path, room, "tokenizer.bin");
    if (access(path, F_OK) != 0)
        die("no tokenizer: neither beside %s nor in this folder; -z names one", model);
    return path;
}

// Threads that a model is worth: below about 2 MB of weights each, they cost more than they bring.
static int useful_threads(const Model *m) {
    size_t worth = m->file.size / (2 << 20);
    return worth < 1 ? 1 : worth > MAX_THREADS ? MAX_THREADS : (int)worth;
}

static void open_session(Session *s, const Options *o) {
    *s = (Session){.options = o, .model = open_model(o->model)};
    s->taste = (Taste){(float)o->temperature, (float)o->top_p, (float)o->min_p, (float)o->penalty,
                       (int)o->top_k};
    int threads = o->threads ? (int)o->threads : least(usable_cores(), useful_threads(&s->model));
    hold_interrupt(true);  // threads inherit this: an interrupt is the main thread's
    start_pool(&s->pool, threads);
    hold_interrupt(false);
}

static void need_tokenizer(Session *s) {
    const char *named = s->options->tokenizer;
    int vocab = s->model.config.vocab_size;
    s->tokenizer_path = named ? strdup(named) : find_tokenizer(s->options->model);
    s->tokenizer = open_tokenizer(s->tokenizer_path, vocab);
    if (!named && strcmp(s->tokenizer_path, "tokenizer.bin") == 0
        && s->tokenizer.header.n_tokens != (uint32_t)vocab)
        die("tokenizer.bin has %u tokens, the model %d: -z names the model's own",
            s->tokenizer.header.n_tokens, vocab);
}

// Room for texts of as many tokens as the model or -c allows, or fewer where `most_tokens` is
// enough.
static void need_state(Session *s, int64_t most_tokens, int n_slots, int logit_rows) {
    const Config *c = &s->model.config;
    int64_t context = s->options->context ? s->options->context : c->max_seq_len;
    if (context > c->max_seq_len)
        die("%s: the context is %d tokens, -c asks for %lld", s->model.file.path, c->max_seq_len,
            (long long)context);
    context = context < most_tokens ? context : most_tokens;
    int batch = most(default_batch(c), most(n_slots, logit_rows));
    open_state(&s->state, &s->model, &s->pool, (Room){(int)context, n_slots, logit_rows, batch});
    s->candidates = NEW(Candidate, c->vocab_size);
}

static void close_session(Session *s) {
    if (s->state.arena.at) close_state(&s->state);
    stop_pool(&s->pool);
    if (s->tokenizer_path) close_tokenizer(&s->tokenizer);
    free(s->tokenizer_path);
    free(s->candidates);
    close_model(&s->model);
}

// ------------------------------------------------------------------------------------------------
// 12. The modes: each a main() of its own

// The text of -i, or of the file of -f, or nothing.
static Bytes prompt_of(const Options *o) {
    Bytes b = {0};
    if (o->prompt && strcmp(o->prompt, "-") != 0)
        append(&b, o->prompt, strlen(o->prompt));
    else if (o->prompt || o->file)
        b = read_text(o->prompt ? "-" : o->file);
    return b;
}

static void say_speed(const char *what, double tokens, double time) {
    fprintf(stderr, "%s %.0f tokens in %.3f s, %.1f tokens/s\n", what, tokens, time,
            time > 0 ? tokens / time : 0);
}

static void end_line(Session *s, Text *text) {
    flush(&text->ready, &text->decoder);
    append(&text->ready, "\n", 1);
    show_ready(s, text);
}

// Continue the prompt.
static void run_generate(Session *s) {
    const Options *o = s->options;
    need_tokenizer(s);
    Text text = new_text(s, 0);
    Bytes prompt = prompt_of(o);
    feed(s, &text, prompt.at, prompt.n);
    if (text.ids.n == 0)
        die("nothing to begin with: the prompt is empty and the tokenizer has no BOS");
    int given = (int)text.ids.n;
    need_state(s, given + o->steps, 1, 1);
    if (given > s->state.context)
        die("the prompt has %d tokens, the context %d", given, s->state.context);
    for (int i = 0; i < given; i++) decode(&text.ready, &text.decoder, text.ids.at[i]);
    say_seed(s);
    double start = seconds();
    float *scores = catch_up(s, &text);
    double middle = seconds();
    show_ready(s, &text);
    Stop stop = reply(s, &text, scores, o->steps);
    double end = seconds();
    end_line(s, &text);
    if (stop == CONTEXT_FULL)
        fprintf(stderr, "the context of %d tokens is full\n", s->state.context);
    say_speed("prompt", given, middle - start);
    say_speed("generated", (double)text.made, end - middle);
    free(prompt.at);
    free_text(&text);
}

// A chat is turns: `first` or, later, `again`; `before`; the system prompt once; `user`. In them $
// is the system prompt, % the message, and {name} the control token of that name; what lies between
// control tokens is encoded as one text. Sources: the models' published templates.
static const struct Format {
    const char *name, *first, *again, *before, *system, *user;
    bool strips;  // white space around messages
} formats[] = {
    {"none", "", "", "", "", "", false},
    {"llama2", "{<s>}", "{</s>}{<s>}", "[INST] ", "<<SYS>>\n$\n<</SYS>>\n\n", "% [/INST]", true},
    {"llama3", "{<|begin_of_text|>}", "{<|eot_id|>}", "",
     "{<|start_header_id|>}system{<|end_header_id|>}\n\n${<|eot_id|>}",
     "{<|start_header_id|>}user{<|end_header_id|>}\n\n%{<|eot_id|>}"
     "{<|start_header_id|>}assistant{<|end_header_id|>}\n\n", true},
    {"chatml", "", "{<|im_end|>}\n", "", "{<|im_start|>}system\n${<|im_end|>}\n",
     "{<|im_start|>}user\n%{<|im_end|>}\n{<|im_start|>}assistant\n", false},
    {"mistral", "{<s>}", "{</s>}", "[INST] ", "$\n\n", "% [/INST]", false},
    {"zephyr", "", "{</s>}\n", "", "<|system|>\n${</s>}\n",
     "<|user|>\n%{</s>}\n<|assistant|>\n", false},
    {"mistral3", "{<s>}", "{</s>}", "{[INST]}", "$\n\n", "%{[/INST]}", false},  // own tokens
};

static const struct Format *format_of(const Session *s) {
    const char *name = s->options->format;
    uint32_t number = s->tokenizer.header.chat;
    for (int i = 1; name && i < COUNT(formats); i++)
        if (strcmp(name, formats[i].name) == 0)
            return &formats[i];
    if (name) die("-x wants llama2, llama3, chatml, mistral, mistral3 or zephyr, not '%s'", name);
    if (number == 0 || number >= COUNT(formats))
        die("%s names no chat format; -x does", s->tokenizer_path);
    bool own = strcmp(formats[number].name, "mistral") == 0
               && find_control(&s->tokenizer, "[INST]") >= 0;
    return own ? &formats[COUNT(formats) - 1] : &formats[number];
}

// A template with its messages becomes tokens of the text.
static void feed_template(Session *s, Text *text, const char *template, Bytes message) {
    Bytes run = {0}, prompt = {(char *)s->options->system, 0, 0};
    prompt.n = prompt.at ? strlen(prompt.at) : 0;
    for (const char *p = template; *p; p++) {
        const Bytes *insert = *p == '%' ? &message : *p == '$' ? &prompt : NULL;
        const char *close = *p == '{' ? strchr(p, '}') : NULL;
        if (insert)
            append(&run, insert->at, insert->n);
        else if (!close)
            append(&run, p, 1);
        if (!close && p[1]) continue;
        encode(&text->ids, &s->tokenizer, run.at, run.n);
        run.n = 0;
        if (close) {
            char *name = strndup(p + 1, (size_t)(close - p - 1));
            int id = find_control(&s->tokenizer, name);
            if (id < 0)
                die("%s has no token %s, which the chat format wants", s->tokenizer_path, name);
            push(&text->ids, id);
            free(name);
            p = close;
        }
    }
    free(run.at);
}

static Bytes stripped(Bytes b, bool at_begin) {
    while (b.n && isspace((unsigned char)b.at[b.n - 1])) b.n--;
    while (b.n && at_begin && isspace((unsigned char)*b.at)) b.at++, b.n--;
    return b;
}

// A message becomes a turn of the text.
static void feed_turn(Session *s, Text *text, const struct Format *f, Bytes message) {
    bool begins = text->ids.n == 0, system = begins && s->options->system && *s->options->system;
    if (f->strips)  // Llama 2 strips the system prompt and the message as one
        message = stripped(message, !(system && *f->before));
    char *template = NEW(char, 1024);
    snprintf(template, 1024, "%s%s%s%s", begins ? f->first : f->again, f->before,
             system ? f->system : "", f->user);
    feed_template(s, text, template, message);
    free(template);
}

static void show_fed(const Text *text, size_t from) {
    fputs("fed", stderr);
    for (size_t i = from; i < text->ids.n; i++) fprintf(stderr, " %d", text->ids.at[i]);
    fputc('\n', stderr);
}

// One message and its answer. A conversation that no longer fits begins again, with the system
// prompt and this message.
static void talk(Session *s, Text *text, const struct Format *f, Bytes message) {
    size_t before = text->ids.n;
    feed_turn(s, text, f, message);
    if ((int)text->ids.n >= s->state.context && before > 0) {
        fprintf(stderr, "the context of %d tokens is full: beginning again\n", s->state.context);
        text->ids.n = 0, text->pos = 0, before = 0;
        feed_turn(s, text, f, message);
    }
    if (s->options->verbose) show_fed(text, before);
    if ((int)text->ids.n > s->state.context) {
        fprintf(stderr, "the message has %zu tokens, the context %d\n", text->ids.n,
                s->state.context);
        text->ids.n = 0, text->pos = 0;
        return;
    }
    text->decoder = (Decoder){.tokenizer = &s->tokenizer};
    hold_interrupt(true);
    Stop stop = reply(s, text, catch_up(s, text), s->options->steps);
    if (stop == INTERRUPTED) take_interrupt();
    hold_interrupt(false);
    end_line(s, text);
    if (stop == CONTEXT_FULL) {
        fprintf(stderr, "the context of %d tokens is full: beginning again\n", s->state.context);
        text->ids.n = 0, text->pos = 0;
    }
}

// Turns from -i and then, line by line, from standard input.
static void run_chat(Session *s) {
    need_tokenizer(s);
    const struct Format *format = format_of(s);
    bool terminal = isatty(STDIN_FILENO) && isatty(STDERR_FILENO);
    Text text = new_text(s, 0);
    char *line = NULL;
    size_t room = 0;
    need_state(s, INT64_MAX, 1, 1);
    say_seed(s);
    if (s->options->prompt)
        talk(s, &text, format, (Bytes){(char *)s->options->prompt, strlen(s->options->prompt), 0});
    for (;;) {
        if (terminal) fputs("> ", stderr);
        ssize_t n = getline(&line, &room, stdin);
        if (n < 0) break;
        while (n && (line[n - 1] == '\n' || line[n - 1] == '\r')) n--;
        if (n) talk(s, &text, format, (Bytes){line, (size_t)n, 0});
    }
    if (terminal) fputc('\n', stderr);
    free(line);
    free_text(&text);
}

// Bytes as a JSON string; what is not UTF-8 becomes U+FFFD.
static void append_json(Bytes *out, const char *text, size_t n) {
    append(out, "\"", 1);
    for (size_t i = 0; i < n;) {
        uint32_t code;
        char escape[8];
        int length = utf8(&code, (const uint8_t *)text + i, n - i);
        if (length <= 0)
            append(out, "\xEF\xBF\xBD", 3);
        else if (code < 32 || code == 127)
            append(out, escape, (size_t)snprintf(escape, sizeof escape, "\\u%04x", code));
        else {
            append(out, "\\", code == '"' || code == '\\');
            append(out, text + i, (size_t)length);
        }
        i += length <= 0 ? 1 : (size_t)length;
    }
    append(out, "\"", 1);
}

// Scoring: what the model thought of each token of a text. The text is cut into windows of the
// context, each with BOS in front if the model wants one and nothing else of the text before; the
// first token of a window without BOS has no score.
typedef void Judge(Session *s, void *sums, int id, float *scores);

static void score_text(Session *s, Judge *judge, void *sums) {
    enum { ROWS = 32 };
    Bytes words = prompt_of(s->options);
    Tokens ids = {0};
    need_tokenizer(s);
    const TokenizerHeader *h = &s->tokenizer.header;
    bool bos = h->bos >= 0 && h->flags & ADDS_BOS;
    encode(&ids, &s->tokenizer, words.at, words.n);
    if (ids.n < 2) die("the text has %zu tokens, too few to score", ids.n);
    need_state(s, (int64_t)ids.n + bos, 1, ROWS);
    if (s->state.context < 2) die("a context of 1 token has no room for one to score");
    Progress progress = start_progress("scoring");
    for (size_t at = 0, n; at < ids.n; at += n - bos) {
        n = bos + (size_t)least(s->state.context - bos, (int)(ids.n - at));
        const int *window = ids.at + at - bos;  // window[0] is BOS if there is one
        for (size_t from = 0; from < n; from += ROWS) {
            Step steps[ROWS];
            int rows = least(ROWS, (int)(n - from));
            for (int t = 0; t < rows; t++) {
                int pos = (int)from + t;
                steps[t] = (Step){bos && pos == 0 ? h->bos : window[pos], 0, pos};
            }
            forward(&s->state, steps, rows);
            float *scores = logits(&s->state, 0, rows);
            for (int t = 0; t < rows && from + (size_t)t + 1 < n; t++)
                judge(s, sums, window[from + (size_t)t + 1],
                      row(scores, t, s->model.config.vocab_size));
            show_progress(&progress, (double)(at + from), (double)ids.n);
        }
    }
    end_progress(&progress);
    free(words.at);
    free(ids.at);
}

// Natural logarithm of the probability that logits give to a token; they become probabilities.
static double log_probability(float *scores, int n, int id) {
    double above = (double)scores[id] - (double)peak_of(scores, n);
    return above - log((double)softmax(scores, n, 1));
}

typedef struct { double nats, tokens; } Loss;

static void add_loss(Session *s, void *sums, int id, float *scores) {
    Loss *loss = sums;
    loss->nats -= log_probability(scores, s->model.config.vocab_size, id);
    loss->tokens++;
}

static void run_perplexity(Session *s) {
    Loss loss = {0, 0};
    score_text(s, add_loss, &loss);
    double mean = loss.nats / loss.tokens;
    if (fprintf(s->out.file, "nats %.6f per token\nperplexity %.4f\ntokens %.0f\n", mean, exp(mean),
                loss.tokens) < 0)
        fail_output(&s->out);
}

// A token as a line: its text, log-probability, rank, and the likeliest with their probabilities.
// On a terminal as text on a ground that grows from none over yellow to red with its surprise.
static void show_score(Session *s, void *unused, int id, float *scores) {
    enum { SHOWN = 3 };
    (void)unused;
    int n = s->model.config.vocab_size, rank = 1, likeliest[SHOWN];
    double score = log_probability(scores, n, id);
    Token p = piece(&s->tokenizer, id);
    Bytes line = {0};
    for (int i = 0; i < n; i++)
        rank += scores[i] > scores[id] || (scores[i] == scores[id] && i < id);
    if (isatty(fileno(s->out.file))) {
        int ground = score > -1 ? 255 : score > -3 ? 230 : score > -5 ? 222 : score > -8 ? 209
                                                                                       : 196;
        append(&line, p.at, p.n);
        disarm(&line);
        fprintf(s->out.file, "\033[30;48;5;%dm%.*s\033[0m", ground, (int)line.n, line.at);
        free(line.at);
        return;
    }
    append_json(&line, p.at, p.n);
    fprintf(s->out.file, "%d\t%.*s\t%.4f\t%d", id, (int)line.n, line.at, score, rank);
    for (int k = 0; k < SHOWN && k < n; k++) {
        likeliest[k] = most_likely(scores, n);
        p = piece(&s->tokenizer, likeliest[k]);
        line.n = 0;
        append_json(&line, p.at, p.n);
        fprintf(s->out.file, "\t%.*s\t%.4f", (int)line.n, line.at, (double)scores[likeliest[k]]);
        scores[likeliest[k]] = -1;
    }
    fputc('\n', s->out.file);
    free(line.at);
}

static void run_score(Session *s) { score_text(s, show_score, NULL); }

// Many prompts, one a line, decoded together: the weights are read once for all of them.
typedef struct {
    Text text;
    size_t line;       // which it is; 0: the slot is free
    Bytes prompt;
} Task;

typedef struct {
    FILE *in;
    size_t read;       // lines begun
    size_t written;    // lines whose results are out
    Bytes *results;    // those that wait for an earlier one, by line - 1
    size_t room;
} Queue;

static const char *const stops[] = {"end", "limit", "context"};

// The result of a task, out as soon as all before it are.
static void finish_task(Queue *q, Task *t, Stop stop) {
    Bytes out = {0};
    char numbers[64];
    flush(&t->text.ready, &t->text.decoder);
    append(&out, "{\"prompt\": ", 11);
    append_json(&out, t->prompt.at, t->prompt.n);
    append(&out, ", \"text\": ", 10);
    append_json(&out, t->text.ready.at, t->text.ready.n);
    append(&out, numbers, (size_t)snprintf(numbers, sizeof numbers, ", \"tokens\": %lld, \"stop\": "
                                           "\"%s\"}\n", (long long)t->text.made, stops[stop]));
    grow((void **)&q->results, &q->room, q->read, sizeof *q->results);
    q->results[t->line - 1] = out;
    free(t->prompt.at);
    free_text(&t->text);
    *t = (Task){0};
}

// Results in order, as far as they are there.
static void write_results(Session *s, Queue *q) {
    for (; q->written < q->read && q->results[q->written].n; q->written++) {
        write_bytes(&s->out, q->results[q->written].at, q->results[q->written].n);
        free(q->results[q->written].at);
    }
    if (fflush(s->out.file) != 0) fail_output(&s->out);
}

// One more token for a task, from the logits before it; the task is finished when that was its
// last.
static void extend_task(Session *s, Queue *q, Task *t, float *scores) {
    if (!extend(s, &t->text, scores))
        finish_task(q, t, ENDED);
    else if (t->text.made >= s->options->steps)
        finish_task(q, t, REACHED_LIMIT);
    else if ((int)t->text.ids.n > s->state.context)
        finish_task(q, t, CONTEXT_FULL);
}

// The next line as a task in a free slot; false: there are no more.
static bool start_task(Session *s, Queue *q, Task *t, int slot) {
    size_t room = 0;
    char *line = NULL;
    ssize_t n = getline(&line, &room, q->in);
    if (n < 0) {
        free(line);
        return false;
    }
    n -= n && line[n - 1] == '\n';
    grow((void **)&q->results, &q->room, q->read + 1, sizeof *q->results);
    q->results[q->read++] = (Bytes){0};
    *t = (Task){.text = new_text(s, slot), .line = q->read, .prompt = {line, (size_t)n, room}};
    feed(s, &t->text, line, (size_t)n);
    for (size_t i = 0; i < t->text.ids.n; i++)
        decode(&t->text.ready, &t->text.decoder, t->text.ids.at[i]);
    t->text.ready.n = 0;  // only the answer is text
    if (t->text.ids.n == 0 || (int)t->text.ids.n > s->state.context)
        finish_task(q, t, CONTEXT_FULL);
    else if (s->options->steps == 0)
        finish_task(q, t, REACHED_LIMIT);
    else
        extend_task(s, q, t, catch_up(s, &t->text));
    return true;
}

// All tasks go one token further.
static void step_tasks(Session *s, Queue *q, Task *tasks, int width) {
    Step *steps = NEW(Step, width);
    Task **active = NEW(Task *, width);
    int n = 0;
    for (int i = 0; i < width; i++)
        if (tasks[i].line) {
            Text *text = &tasks[i].text;
            steps[n] = (Step){text->ids.at[text->ids.n - 1], i, text->pos++};
            active[n++] = &tasks[i];
        }
    if (n) {
        forward(&s->state, steps, n);
        float *scores = logits(&s->state, 0, n);
        for (int i = 0; i < n; i++)
            extend_task(s, q, active[i], row(scores, i, s->model.config.vocab_size));
    }
    free(steps);
    free(active);
}

static void run_batch(Session *s) {
    const char *path = s->options->batch ? s->options->batch : "-";
    int width = s->options->width ? (int)s->options->width : 8;
    Queue q = {.in = strcmp(path, "-") == 0 ? stdin : fopen(path, "r")};
    if (!q.in) die("%s: %s", path, strerror(errno));
    need_tokenizer(s);
    need_state(s, INT64_MAX, width, width);
    say_seed(s);
    Task *tasks = NEW(Task, width);
    double begin = seconds(), made = 0;
    for (bool more = true, busy = true; busy;) {
        busy = false;
        for (int i = 0; i < width; i++) {
            while (more && tasks[i].line == 0) more = start_task(s, &q, &tasks[i], i);
            busy |= tasks[i].line != 0;
            made += tasks[i].line != 0;
        }
        step_tasks(s, &q, tasks, width);
        write_results(s, &q);
    }
    say_speed("generated", made, seconds() - begin);
    if (q.in != stdin) fclose(q.in);
    free(q.results);
    free(tasks);
}

// Token ids in decimal, separated by white space.
static Tokens read_ids(const char *path, int vocab_size) {
    const char *name = path ? path : "standard input";
    Bytes b = read_text(path ? path : "-");
    Tokens ids = {0};
    append(&b, "", 1);
    for (char *p = b.at, *end; (p += strspn(p, " \t\r\n")) < b.at + b.n - 1; p = end) {
        errno = 0;
        long id = strtol(p, &end, 10);
        if (end == p || (*end && !strchr(" \t\r\n", *end)) || errno || id < 0 || id >= vocab_size)
            die("%s: '%.*s' at byte %td is not a token id of 0 to %d", name,
                least(20, (int)strcspn(p, " \t\r\n")), p, p - b.at, vocab_size - 1);
        push(&ids, (int)id);
    }
    if (ids.n == 0) die("%s: no token ids", name);
    free(b.at);
    return ids;
}

// Token ids from -f, their logits as float32 (tokens, vocabulary) to -o.
static void run_logits(Session *s) {
    enum { ROWS = 32 };
    const Config *c = &s->model.config;
    Tokens ids = read_ids(s->options->file, c->vocab_size);
    need_state(s, (int64_t)ids.n, 1, ROWS);
    if (ids.n > (size_t)s->state.context)
        die("there are %zu tokens, the context is %d", ids.n, s->state.context);
    Step *steps = NEW(Step, ids.n);
    for (size_t i = 0; i < ids.n; i++) steps[i] = (Step){ids.at[i], 0, (int)i};
    Progress progress = start_progress("logits");
    int batch = s->options->width ? least(s->state.batch, (int)s->options->width) : s->state.batch;
    for (int at = 0, n; at < (int)ids.n; at += n) {
        n = least(batch, (int)ids.n - at);
        forward(&s->state, steps + at, n);
        for (int t = 0; t < n; t += ROWS) {
            int rows = least(ROWS, n - t);
            write_bytes(&s->out, logits(&s->state, t, rows),
                        (size_t)rows * (size_t)c->vocab_size * sizeof(float));
        }
        show_progress(&progress, at + n, (double)ids.n);
    }
    end_progress(&progress);
    free(steps);
    free(ids.at);
}

// The ids of the text, one a line, without BOS.
static void run_tokens(Session *s) {
    need_tokenizer(s);
    Bytes text = prompt_of(s->options);
    Tokens ids = {0};
    encode(&ids, &s->tokenizer, text.at, text.n);
    for (size_t i = 0; i < ids.n; i++)
        if (fprintf(s->out.file, "%d\n", ids.at[i]) < 0)
            fail_output(&s->out);
    free(text.at);
    free(ids.at);
}

static double parameters(const Model *m) {
    double sum = 0;
    for (SlotId i = 0; i < SLOTS; i++) {
        Tensor w = blank_tensor(&m->config, i);
        double layers = slots[i].per_layer ? m->config.n_layers : 1;
        sum += has_slot(&m->config, i) ? layers * w.rows * w.cols : 0;
    }
    return sum;
}

// What the checkpoint and the tokenizer hold, and the memory they take: one `name value` a line.
static void run_info(Session *s) {
    const Config *c = &s->model.config;
    FILE *out = s->out.file;
    int context = s->options->context ? least((int)s->options->context, c->max_seq_len)
                                      : c->max_seq_len;
    Room room = {context, 1, 1, default_batch(c)};
    fprintf(out, "file %s\nformat %s\nweights %s\nparameters %.0f\n", s->model.file.path,
            s->model.form, type_names[c->type], parameters(&s->model));
    for (int i = 1; i < COUNT(fields); i++)
        fprintf(out, "%s %.10g\n", fields[i].name, field_value(c, &fields[i]));
    fprintf(out, "weights %.1f MB\nstate %.1f MB\nthreads %d\n", (double)s->model.file.size / 1e6,
            (double)state_bytes(&s->model, &s->pool, room) / 1e6, s->pool.threads);
    need_tokenizer(s);
    const TokenizerHeader *t = &s->tokenizer.header;
    fprintf(out, "tokenizer %s\nkind %s\ntokens %u\nbos %d\n", s->tokenizer_path,
            t->kind == SENTENCEPIECE ? "SentencePiece" : "byte-level", t->n_tokens, t->bos);
    for (uint32_t i = 0; i < t->n_ends; i++) fprintf(out, "end %d\n", t->ends[i]);
}

// Writing the model in another type, panel by panel.
typedef struct {
    const Tensor *from;
    Type type;
    int first;        // panel that `panels` begins with
    uint8_t *panels;
    float *rows;      // (threads, columns padded to groups)
    double *error, *power;  // (panels) sums of squares
} Packing;

static void pack_panels(void *job, int thread, int first, int end) {
    const Packing *p = job;
    const Tensor *w = p->from;
    size_t wide = group_count(w->cols) * GROUP, bytes = panel_bytes(p->type, w->cols);
    float *x = p->rows + (size_t)thread * wide;
    for (int i = first; i < end; i++) {
        memset(p->panels + (size_t)i * bytes, 0, bytes);
        p->error[i] = p->power[i] = 0;
        for (int r = 0; r < PANEL; r++) {
            int row = (p->first + i) * PANEL + r;
            memset(x, 0, wide * sizeof *x);
            if (row < w->rows) unpack_row(x, w, row);
            for (int j = 0; j < w->cols; j++) p->power[i] += (double)x[j] * (double)x[j];
            p->error[i] += pack_row(p->panels + (size_t)i * bytes, p->type, r, x, w->cols);
        }
    }
}

// A matrix in panels to the output; adds to the sums of squares of its errors and weights.
static void write_packed(Session *s, const Tensor *w, Type type, const char *name, double *sums,
                         Progress *progress, double all) {
    enum { AT_ONCE = 64 };
    Packing p = {.from = w, .type = type};
    int panels = (int)panel_count(w->rows);
    size_t bytes = panel_bytes(type, w->cols);
    double error[AT_ONCE], power[AT_ONCE];
    p.panels = new_array(AT_ONCE, bytes);
    p.rows = NEW(float, (size_t)s->pool.threads * group_count(w->cols) * GROUP);
    p.error = error, p.power = power;
    for (p.first = 0; p.first < panels; p.first += AT_ONCE) {
        int n = least(AT_ONCE, panels - p.first);
        parallel(&s->pool, n, pack_panels, &p);
        for (int i = 0; i < n; i++) sums[0] += error[i], sums[1] += power[i];
        if (!(sums[0] < INFINITY && sums[1] < INFINITY))
            die("%s: %s holds weights that are infinite, not numbers or too large for %s",
                s->model.file.path, name, type_names[type]);
        write_bytes(&s->out, p.panels, (size_t)n * bytes);
        show_progress(progress, (double)(w->data - s->model.file.at), all);
    }
    free(p.panels);
    free(p.rows);
}

// One tensor, from the next 64-byte boundary on; returns where it ends.
static uint64_t write_tensor(Session *s, SlotId id, int layer, Type type, uint64_t at, double *sums,
                             Progress *progress) {
    static const uint8_t zeros[LINE] = {0};
    const Tensor *w = tensor_at(&s->model, id, layer);
    if (!has_slot(&s->model.config, id)) return at;
    Tensor packed = {slots[id].rows == ONE ? F32 : type, w->rows, w->cols, NULL};
    uint64_t begin = round_up(at, LINE);
    write_bytes(&s->out, zeros, begin - at);
    if (packed.type == F32)
        write_bytes(&s->out, w->data, tensor_bytes(w));
    else
        write_packed(s, w, type, slots[id].name, sums, progress, (double)s->model.file.size);
    return begin + tensor_bytes(&packed);
}

static void run_quantize(Session *s) {
    const Options *o = s->options;
    Config c = s->model.config;
    if (!o->output || !o->type)
        die("-m quantize wants -q q8 or -q q4, and -o for the file to write");
    Type type = strcmp(o->type, "q8") == 0 ? Q8 : Q4;
    if (strcmp(o->type, type_names[type]) != 0) die("-q wants q8 or q4, not '%s'", o->type);
    if (c.type == Q4) die("%s: q4 is not quantized again", o->model);
    c.type = type;
    double sums[SLOTS][2] = {0};
    uint8_t header[HEADER];
    uint64_t at = HEADER;
    make_header(header, &c, 0);
    write_bytes(&s->out, header, HEADER);
    Progress progress = start_progress("quantizing");
    at = write_tensor(s, EMBEDDING, 0, type, at, sums[EMBEDDING], &progress);
    for (int l = 0; l < c.n_layers; l++)
        for (SlotId i = ATTENTION_NORM; i <= W2; i++)
            at = write_tensor(s, i, l, type, at, sums[i], &progress);
    at = write_tensor(s, FINAL_NORM, 0, type, at, sums[FINAL_NORM], &progress);
    at = write_tensor(s, CLASSIFIER, 0, type, at, sums[CLASSIFIER], &progress);
    end_progress(&progress);
    make_header(header, &c, at);
    if (fseek(s->out.file, 0, SEEK_SET) != 0) fail_output(&s->out);
    write_bytes(&s->out, header, HEADER);
    for (SlotId i = 0; i < SLOTS && o->verbose; i++)
        if (sums[i][1] > 0)
            fprintf(stderr, "%-15s relative root mean square error %.5f\n", slots[i].name,
                    sqrt(sums[i][0] / sums[i][1]));
}

// Measuring: what the machine can do, and what share of it the model's work reaches.

enum { READ_PART = 1 << 16, COUNT_ITEMS = 1 << 10 };

typedef struct {
    const uint8_t *at;
    uint8_t *sums;  // (threads, LINE), so that the work is not optimised away
} Ceiling;

// Read 64 KB an item, as fast as lines can be loaded.
static void read_items(void *job, int thread, int first, int end) {
    const Ceiling *c = job;
    i32v sum[4] = {load_line(c->sums + thread * LINE), spread_int(0), spread_int(0), spread_int(0)};
    for (size_t i = (size_t)first * READ_PART; i < (size_t)end * READ_PART; i += 4 * LINE)
        UNROLL for (int j = 0; j < 4; j++) {
            i32v line = load_line(c->at + i + (size_t)j * LINE);
            EACH_PART sum[j].p[k] ^= line.p[k];
        }
    UNROLL for (int j = 0; j < 4; j++)
        EACH_PART sum[0].p[k] ^= sum[j].p[k];
    memcpy(c->sums + thread * LINE, sum, LINE);
}

enum { CHAINS = 12 };  // independent sums: as many as latency times units, and registers, want

// CHAINS multiply-adds of a register, 1024 times an item.
static void multiply_items(void *job, int thread, int first, int end) {
    const Ceiling *c = job;
    FloatPart sum[CHAINS], x = (FloatPart)*(const LooseInts *)(c->sums + thread * LINE);
    UNROLL for (int j = 0; j < CHAINS; j++)
        sum[j] = x + (float)j;
    for (int i = first * 1024; i < end * 1024; i++)
        UNROLL for (int j = 0; j < CHAINS; j++)
            sum[j] = fused(x, x, sum[j]);
    UNROLL for (int j = 1; j < CHAINS; j++)
        sum[0] += sum[j];
    memcpy(c->sums + thread * LINE, sum, sizeof *sum);
}

static void dot_items(void *job, int thread, int first, int end) {
    const Ceiling *c = job;
    IntPart sum[CHAINS], x = *(const LooseInts *)(c->sums + thread * LINE);
    UNROLL for (int j = 0; j < CHAINS; j++)
        sum[j] = x + j;
    for (int i = first * 1024; i < end * 1024; i++)
        UNROLL for (int j = 0; j < CHAINS; j++)
            sum[j] = dot4(sum[j], x, sum[j]);  // of x and x all would share one
    UNROLL for (int j = 1; j < CHAINS; j++)
        sum[0] ^= sum[j];
    memcpy(c->sums + thread * LINE, sum, sizeof *sum);
}

enum { TRIALS = 5 };

static int by_value(const void *a, const void *b) {
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

// Median time of a job.
static double time_job(Pool *pool, int items, Work *work, void *job) {
    double times[TRIALS];
    for (int i = 0; i < TRIALS; i++) {
        double start = seconds();
        parallel(pool, items, work, job);
        times[i] = seconds() - start;
    }
    qsort(times, TRIALS, sizeof *times, by_value);
    return times[TRIALS / 2];
}

// Run n steps from position `from` on, `batch` at a time, with logits after each batch.
static void run_steps(Session *s, int from, int n, int batch) {
    Step *steps = NEW(Step, n);
    for (int i = 0; i < n; i++)
        steps[i] = (Step){(from + i) * 7 % s->model.config.vocab_size, 0, from + i};
    for (int at = 0, k; at < n; at += k) {
        k = least(batch, n - at);
        forward(&s->state, steps + at, k);
        logits(&s->state, k - 1, 1);
    }
    free(steps);
}

// Tokens a second of that, the median of TRIALS.
static double speed_of(Session *s, int from, int n, int batch) {
    double times[TRIALS];
    for (int i = 0; i < TRIALS; i++) {
        double start = seconds();
        run_steps(s, from, n, batch);
        times[i] = seconds() - start;
    }
    qsort(times, TRIALS, sizeof *times, by_value);
    return n / times[TRIALS / 2];
}

static void say(Session *s, const char *name, double value, const char *unit) {
    if (fprintf(s->out.file, "%s %.*f %s\n", name, value < 100 ? 2 : 0, value, unit) < 0
        || fflush(s->out.file) != 0)
        fail_output(&s->out);
}

// Multiply-adds of weights for one token, the classifier's apart; bytes of weights read for one.
static double token_products(const Model *m, double *bytes) {
    const Config *c = &m->config;
    double sum = 0;
    *bytes = 0;
    for (SlotId i = 0; i < SLOTS; i++) {
        Tensor w = blank_tensor(c, i);
        if (!has_slot(c, i) || (i == EMBEDDING && !(c->flags & TIED))) continue;
        double layers = slots[i].per_layer ? c->n_layers : 1;
        *bytes += layers * (double)tensor_bytes(&w);
        sum += slots[i].per_layer && slots[i].rows != ONE ? layers * w.rows * w.cols : 0;
    }
    return sum;
}

// One `name value unit` a line: the machine's ceilings, then speeds and their share of them.
static void run_bench(Session *s) {
    const Config *c = &s->model.config;
    int longest = s->options->context ? (int)s->options->context : c->max_seq_len;
    int depth = least((int)s->options->depth, longest - 1), prompt = least(512, longest);
    int decoded = least(64, longest - depth);
    need_state(s, longest, 1, 1);
    Ceiling ceiling = {s->model.file.at, NEW(uint8_t, s->pool.threads * LINE)};
    int parts = (int)most(1, (int)(s->model.file.size / READ_PART)), threads = s->pool.threads;
    if (s->model.file.size < READ_PART)
        die("%s: too small to measure anything with", s->model.file.path);
    double bytes, products = token_products(&s->model, &bytes);
    double read = (double)parts * READ_PART / time_job(&s->pool, parts, read_items, &ceiling);
    double once = (double)COUNT_ITEMS * threads * 1024 * CHAINS * LANES;
    double fma = once / time_job(&s->pool, COUNT_ITEMS * threads, multiply_items, &ceiling);
    double dot = once * 4 / time_job(&s->pool, COUNT_ITEMS * threads, dot_items, &ceiling);
    double multiply = is_quantized(c->type) ? dot : fma;
    say(s, "threads", threads, "threads");
    say(s, "read", read / 1e9, "GB/s");
    say(s, "multiply-add", 2 * fma / 1e9, "GFLOP/s");
    say(s, "dot-product", 2 * dot / 1e9, "GOP/s");
    double speed = speed_of(s, 0, prompt, s->state.batch);
    say(s, "prompt", speed, "tokens/s");
    say(s, "prompt-share", 100 * speed * products / multiply, "%");
    speed = speed_of(s, 0, least(64, longest), 1);
    say(s, "decode", speed, "tokens/s");
    say(s, "decode-share", 100 * speed * bytes / read, "%");
    if (depth > 0) {
        if (depth > prompt) run_steps(s, prompt, depth - prompt, s->state.batch);
        double deep = speed_of(s, depth, decoded, 1);
        say(s, "depth", depth, "tokens");
        say(s, "decode-deep", deep, "tokens/s");
        say(s, "decode-deep-share", 100 * deep / speed, "%");
    }
    free(ceiling.sums);
}

// ------------------------------------------------------------------------------------------------
// 13. The command line

static const struct Mode {
    const char *name, *does;
    void (*run)(Session *s);
} modes[] = {
    {"generate",   "continue the prompt (default)",                          run_generate},
    {"chat",       "talk: turns from -i and standard input",               run_chat},
    {"batch",      "complete the lines of -b, JSON lines out",             run_batch},
    {"perplexity", "how well the text of -i or -f is foreseen",            run_perplexity},
    {"score",      "the same, token by token",                             run_score},
    {"logits",     "token ids of -f to logits: float32 (tokens, vocabulary)", run_logits},
    {"tokens",     "ids of the prompt, one a line, without BOS",             run_tokens},
    {"info",       "what the checkpoint and the tokenizer hold",             run_info},
    {"quantize",   "write the model as -q to -o",                            run_quantize},
    {"bench",      "measure the machine and what share of it is reached",    run_bench},
};

// One row an option: parsing, checking and the usage are all read from here.
typedef enum { TEXT, WHOLE, REAL, SWITCH } Kind;
#define TO(field) offsetof(Options, field)
static const struct Option {
    char letter;
    Kind kind;
    const char *value, *does;
    size_t at;
    double least, most;
} options[] = {
    {'i', TEXT,   "TEXT", "prompt, - for standard input",                    TO(prompt), 0, 0},
    {'f', TEXT,   "FILE", "prompt or token ids from a file",                 TO(file), 0, 0},
    {'o', TEXT,   "FILE", "results go there (standard output)",              TO(output), 0, 0},
    {'m', TEXT,   "MODE", "what to do, below",                               TO(mode), 0, 0},
    {'z', TEXT,   "FILE", "tokenizer (NAME.tokenizer.bin, tokenizer.bin)",   TO(tokenizer), 0, 0},
    {'n', WHOLE,  "N",    "tokens to generate (256)",                        TO(steps), 0, 1e9},
    {'t', REAL,   "X",    "temperature, 0 takes the likeliest (1.0)",      TO(temperature), 0, 1e3},
    {'p', REAL,   "X",    "top-p, 0 and 1: off (0.9)",                       TO(top_p), 0, 1},
    {'k', WHOLE,  "N",    "top-k, 0: off (0)",                               TO(top_k), 0, 1e9},
    {'l', REAL,   "X",    "min-p, 0: off (0)",                               TO(min_p), 0, 1},
    {'r', REAL,   "X",    "repetition penalty, 1: off (1.0)",               TO(penalty), 1e-3, 1e3},
    {'s', WHOLE,  "N",    "seed of the random numbers (time)",               TO(seed), 0, 9e15},
    {'c', WHOLE,  "N",    "context in tokens (the model's)",                 TO(context), 1, 1e9},
    {'j', WHOLE,  "N",    "threads (physical cores)",                  TO(threads), 1, MAX_THREADS},
    {'y', TEXT,   "TEXT", "chat: system prompt",                             TO(system), 0, 0},
    {'x', TEXT,   "NAME", "chat: format, if not the tokenizer's",            TO(format), 0, 0},
    {'b', TEXT,   "FILE", "batch: prompts, one a line, - for standard input", TO(batch), 0, 0},
    {'w', WHOLE,  "N",    "batch: prompts at once (8); logits: tokens at once", TO(width), 1, 1e6},
    {'q', TEXT,   "TYPE", "quantize to q8 or q4",                            TO(type), 0, 0},
    {'d', WHOLE,  "N",    "bench: depth of the second decoding",             TO(depth), 0, 1e9},
    {'v', SWITCH, "",     "say more: errors of quantizing, ids that chat feeds", TO(verbose), 0, 0},
};

__attribute__((noreturn))
static void finish_page(const char *text) {
    Output out = open_output(NULL);
    write_bytes(&out, text, strlen(text));
    close_output(&out);
    exit(0);
}

__attribute__((noreturn))
static void print_usage(void) {
    FILE *out = stdout;
    fprintf(out, "usage: ./run MODEL [options]\n\noptions\n");
    for (int i = 0; i < COUNT(options); i++)
        fprintf(out, "  -%c %-5s %s\n", options[i].letter, options[i].value, options[i].does);
    fprintf(out, "  -h       this page; --version prints %s\n\nmodes\n", VERSION);
    for (int i = 0; i < COUNT(modes); i++)
        fprintf(out, "  %-10s %s\n", modes[i].name, modes[i].does);
    fprintf(out, "\nexit status: 0 done, %d failed, %d wrong usage\n", FAILED, MISUSED);
    finish_page("");
}

__attribute__((noreturn, format(printf, 1, 2)))
static void misuse(const char *format, ...) {
    va_list args;
    va_start(args, format);
    complain(format, args);
    exit(MISUSED);
}

// The whole text must be a number within the option's bounds.
static void parse_number(Options *o, const struct Option *option, const char *text) {
    char *end;
    void *at = (char *)o + option->at;
    errno = 0;
    double v = option->kind == REAL ? strtod(text, &end) : (double)strtoll(text, &end, 10);
    if (end == text || *end || errno || isspace((unsigned char)*text)
        || !(v >= option->least && v <= option->most))
        misuse("-%c wants a %snumber of %.10g to %.10g, not '%s'", option->letter,
               option->kind == WHOLE ? "whole " : "", option->least, option->most, text);
    if (option->kind == REAL)
        *(double *)at = v;
    else
        *(int64_t *)at = strtoll(text, NULL, 10);
}

// The option at argv[*i], and its value, which may follow.
static void parse_option(Options *o, int argc, char **argv, int *i) {
    const char *letter = argv[*i] + 1;
    const struct Option *option = NULL;
    for (int j = 0; j < COUNT(options); j++)
        if (letter[0] == options[j].letter && letter[1] == '\0')
            option = &options[j];
    if (!option) misuse("unknown option '%s'", argv[*i]);
    void *at = (char *)o + option->at;
    if (option->kind == SWITCH) {
        *(bool *)at = true;
        return;
    }
    if (++*i == argc) misuse("-%c wants a value", option->letter);
    if (option->kind == TEXT)
        *(const char **)at = argv[*i];
    else
        parse_number(o, option, argv[*i]);
}

static Options parse_options(int argc, char **argv) {
    Options o = {.mode = "generate", .temperature = 1, .top_p = 0.9, .penalty = 1, .steps = 256,
                 .seed = -1};
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "-h") == 0 || strcmp(argv[i], "--help") == 0) {
            print_usage();
        } else if (strcmp(argv[i], "--version") == 0) {
            finish_page("LLaMA-02 " VERSION "\n");
        } else if (argv[i][0] == '-' && argv[i][1]) {
            parse_option(&o, argc, argv, &i);
        } else if (o.model) {
            misuse("two models: '%s' and '%s'", o.model, argv[i]);
        } else {
            o.model = argv[i];
        }
    }
    if (!o.model) misuse("no model");
    if (o.batch) o.mode = "batch";
    return o;
}

static const struct Mode *find_mode(const char *name) {
    for (int i = 0; i < COUNT(modes); i++)
        if (strcmp(name, modes[i].name) == 0)
            return &modes[i];
    misuse("unknown mode '%s'", name);
}

// A mapped file that becomes shorter while it is read ends here.
static void on_bus_error(int signal) {
    static const char text[] = "run: a file became shorter while it was being read\n";
    (void)signal;
    if (write(STDERR_FILENO, text, sizeof text - 1) < 0)
        _exit(FAILED);  // nothing is left to say it with
    _exit(FAILED);
}

#ifndef TESTING
int main(int argc, char **argv) {
    Options o = parse_options(argc, argv);
    const struct Mode *mode = find_mode(o.mode);
    signal(SIGBUS, on_bus_error);
    signal(SIGXFSZ, SIG_IGN);  // a file too large is an error of its write
    o.seed_is_time = o.seed < 0;
    o.seed = o.seed_is_time ? (int64_t)time(NULL) : o.seed;
    static Session s;
    open_session(&s, &o);
    s.out = open_output(o.output);
    s.out_is_terminal = isatty(fileno(s.out.file));
    mode->run(&s);
    close_output(&s.out);
    close_session(&s);
    return 0;
}
#endif
