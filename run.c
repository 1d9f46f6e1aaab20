/* run.c - LLaMA-02: Llama 2 inference in one C file. make && ./run model.bin -i "Once upon a time"
 *
 * The architecture is that of Touvron et al., "Llama 2: Open Foundation and Fine-Tuned Chat Models"
 * (2023): RMSNorm, rotary position embedding, attention with grouped key/value heads, SwiGLU. A
 * checkpoint is mapped into memory and never copied; a prompt goes through in batches; text leaves
 * through a BPE tokenizer as soon as it is a whole character. `./run -h` lists options.
 * Rooms, in reading order: 1 foundation, 2 the model, 3 the checkpoint, 4 threads, 5 vectors,
 * 6 weights (matmul), 7 attention, 8 the transformer (forward, logits), 9 the tokenizer,
 * 10 the sampler (pick), 11 a session (feed, reply), 12 the modes, 13 the command line.
 * Letters: n tokens at once, t one of them, l a layer, h a head. A comment such as (n, dim) is a
 * shape, the last extent lying together in memory. */
#define _GNU_SOURCE
#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
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
#include <unistd.h>
#if defined __x86_64__
#include <immintrin.h>
#elif defined __aarch64__
#include <arm_neon.h>
#endif

// ------------------------------------------------------------------------------------------------
// 1. Foundation: failing, allocating, files, output, time

#define VERSION "1.0"
#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))
#define INLINE static inline __attribute__((always_inline))
#if defined __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
enum { FAILED = 1, MISUSED = 2 };  // exit statuses; 0 is success

// Print "run: ..." as one line and exit: for what the user can mend, paths, files, options. Text
// from files may hold anything, so control characters are not passed on to a terminal.
__attribute__((noreturn, format(printf, 2, 3)))
static void quit(int status, const char *format, ...) {
    char line[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    for (char *c = line; *c; c++) *c = iscntrl((unsigned char)*c) ? '?' : *c;
    fprintf(stderr, "run: %s\n", line);
    exit(status);
}
#define die(...) quit(FAILED, __VA_ARGS__)
#define misuse(...) quit(MISUSED, __VA_ARGS__)

static int least(int a, int b) { return a < b ? a : b; }
static int most(int a, int b) { return a > b ? a : b; }
static size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }
static uint32_t read_u32(const void *p) { uint32_t v; memcpy(&v, p, sizeof v); return v; }
static float    read_f32(const void *p) { float v;    memcpy(&v, p, sizeof v); return v; }
static bool all_zero(const uint8_t *p, size_t n) { return !*p && !memcmp(p, p + 1, n - 1); }
static void *checked(void *p, size_t n, size_t size) {
    if (!p) die("no memory for %zu times %zu bytes", n, size);
    return p;
}
// n zeroed elements, for free(); dies rather than return NULL, so no caller checks.
static void *new_array(size_t n, size_t size) { return checked(calloc(n + !n, size), n, size); }
#define NEW(type, n) ((type *)new_array((n), sizeof(type)))

// Room for at least n elements behind *array, growing by doubling; the elements may move.
static void grow(void **array, size_t *room, size_t n, size_t size) {
    if (n <= *room) return;
    *room = n > 2 * *room ? n : 2 * *room;
    *array = checked(realloc(*array, *room * size), *room, size);
}
typedef struct { char *at; size_t n, room; } Bytes;  // text that grows; not a C string
typedef struct { int *at; size_t n, room; } Tokens;  // ids that grow
static void append(Bytes *b, const char *text, size_t n) {
    grow((void **)&b->at, &b->room, b->n + n, 1);
    if (n) memcpy(b->at + b->n, text, n);
    b->n += n;
}
static void push(Tokens *t, int id) {
    grow((void **)&t->at, &t->room, t->n + 1, sizeof *t->at);
    t->at[t->n++] = id;
}

enum { PAGE = 2 << 20 };  // bytes of a large page; files are written in as many (see export.py)
#ifndef MADV_HUGEPAGE
#define MADV_HUGEPAGE MADV_NORMAL  // such pages are Linux's
#endif

// Many arrays of one lifetime, dealt out from one block that the system fills with zeros page by
// page when touched. A first round with `at` NULL adds up the bytes: in a double none overflows.
typedef struct { char *at; double used; } Arena;

// A block of this size. What is used all over is best in large pages (Zen 5 as a virtual machine:
// Llama 2's tokens are read in 3 ms, not 8; see open_state), what is not waits for their zeros, 0.1
// to 5 ms a page.
static Arena open_arena(double bytes, bool large_pages, const char *advice) {
    size_t size = round_up((size_t)fmin(bytes, 1e18), PAGE);
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (at == MAP_FAILED) die("no memory for %.0f MB%s", bytes / 1e6, advice);
    if (large_pages) madvise(at, size, MADV_HUGEPAGE);
    return (Arena){at, 0};
}
static void close_arena(Arena *a) { munmap(a->at, round_up((size_t)a->used, PAGE)); }

static void *deal(Arena *a, size_t n, size_t size) {
    void *p = a->at ? a->at + (size_t)a->used : NULL;
    a->used += 64 * ceil((double)n * (double)size / 64);
    return p;
}
#define DEAL(arena, type, n) ((type *)deal((arena), (n), sizeof(type)))

// A file mapped read-only, and what kind of file it is taken for.
typedef struct { const char *path; const uint8_t *at; size_t size; const char *kind; } File;
static File open_file(const char *path, const char *kind) {
    struct stat st;
    int fd = open(path, O_RDONLY | O_NONBLOCK);  // a FIFO must not hang here
    if (fd < 0 || fstat(fd, &st) != 0) die("%s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode) || st.st_size == 0)
        die("%s: %s", path, S_ISREG(st.st_mode) ? "the file is empty" : "not a regular file");
    void *at = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) die("%s: cannot be mapped: %s", path, strerror(errno));
    close(fd);
    return (File){path, at, (size_t)st.st_size, kind};
}
static void close_file(const File *f) { munmap((void *)(uintptr_t)f->at, f->size); }
static void check(const File *f, const char *name, double is, double least, double most) {
    if (!(is >= least && is <= most))
        die("%s: not a %s: its %s is %.10g, not %.10g to %.10g", f->path, f->kind, name, is,
            least, most);
}

// All of a file, or of standard input for "-".
static Bytes read_text(const char *path) {
    FILE *in = strcmp(path, "-") == 0 ? stdin : fopen(path, "rb");
    Bytes b = {0};
    char part[1 << 16];
    for (size_t n; in && (n = fread(part, 1, sizeof part, in)) > 0;) append(&b, part, n);
    if (!in || ferror(in)) die("%s: %s", path, strerror(errno));
    if (in != stdin) fclose(in);
    return b;
}

// Where results go: standard output, or a file that takes its name only when it is
// complete. Until then it has none on Linux, so whatever ends the program leaves nothing behind,
// and elsewhere `part`, PATH.part, NULL for devices and pipes. `written`: by write_bytes alone.
typedef struct { FILE *file; const char *path; char *part, *block; size_t written; } Output;
static void check_output(const Output *o, bool done) {
    if (!done) die("%s: not written: %s", o->path, strerror(errno));
}
#define print(o, ...) check_output(o, fprintf((o)->file, __VA_ARGS__) >= 0)

#ifndef O_TMPFILE
#define O_TMPFILE O_DIRECTORY  // which cannot be opened to write
#endif
static Output open_output(const char *path) {
    struct stat st;
    bool named = path && strcmp(path, "-") != 0;
    Output o = {stdout, named ? path : "standard output", NULL, NULL, 0};
    int fd = -1;
    if (named && (stat(path, &st) != 0 || S_ISREG(st.st_mode))) {
        const char *slash = strrchr(path, '/');
        size_t room = strlen(path) + sizeof ".part";
        o.part = NEW(char, room);
        snprintf(o.part, room, "%.*s.", slash ? (int)(slash + 1 - path) : 0, path);
        fd = open(o.part, O_TMPFILE | O_WRONLY, 0666);
        snprintf(o.part, room, "%s.part", path);
        unlink(o.part);
    }
    if (named) o.file = fd >= 0 ? fdopen(fd, "wb") : fopen(o.part ? o.part : path, "wb");
    check_output(&o, o.file != NULL);
    if (o.part) setvbuf(o.file, o.block = NEW(char, PAGE), _IOFBF, PAGE);
    return o;
}
static void write_bytes(Output *o, const void *data, size_t n) {
    check_output(o, fwrite(data, 1, n, o->file) == n);
    o->written += n;
}
static void send_off(Output *o) { check_output(o, fflush(o->file) == 0); }
static void close_output(Output *o) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fileno(o->file));
    send_off(o);
    if (o->part && linkat(AT_FDCWD, link, AT_FDCWD, o->part, AT_SYMLINK_FOLLOW) != 0)
        check_output(o, access(o->part, F_OK) == 0);
    check_output(o, o->file == stdout || fclose(o->file) == 0);
    check_output(o, !o->part || rename(o->part, o->path) == 0);
    free(o->part), free(o->block);
}

// Ctrl-C held back is asked for between steps: no handler, and no variable that one would change.
static void hold_interrupt(bool held) {
    sigset_t set;
    sigemptyset(&set), sigaddset(&set, SIGINT);
    pthread_sigmask(held ? SIG_BLOCK : SIG_UNBLOCK, &set, NULL);
}

// Whether one has come; it is then forgotten.
static bool take_interrupt(void) {
    sigset_t set;
    int taken;
    return sigpending(&set) == 0 && sigismember(&set, SIGINT) == 1 && sigwait(&set, &taken) == 0;
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

// How far a long job is, on a terminal, once it has lasted a second and until all is done.
typedef struct { const char *what; double all, start, shown; } Progress;
static void show_progress(Progress *p, double done) {
    double now = seconds();
    if (done >= p->all && p->shown > 0) fprintf(stderr, "\r\033[K");
    if (done >= p->all || now < fmax(p->start + 1, p->shown + .1) || !isatty(STDERR_FILENO)) return;
    p->shown = now;
    fprintf(stderr, "\r%s: %3.0f %% ", p->what, 100 * done / p->all);
}

// ------------------------------------------------------------------------------------------------
// 2. The model: what a Llama is made of

typedef enum { NO_SCALING, LINEAR, LLAMA3, SCALINGS } Scaling;  // of RoPE's frequencies
typedef enum { F32, BF16, F16, Q8, Q4, TYPES } Type;
static const char *const type_names[TYPES] = {"f32", "bf16", "f16", "q8", "q4"};

// Weights as they lie in the file, row after row, the quantized types in panels (room 6). Rows go
// with outputs, columns with inputs; a vector is one row, and what the model does not have is none.
typedef struct { Type type; int rows, cols; bool interleaved; const uint8_t *data; } Tensor;

// Flags: the classifier is the embedding; queries, keys and values have biases, each query and key
// head an RMSNorm; RoPE turns pairs (2i, 2i + 1), otherwise (i, i + head_dim/2); the scales of
// quantized weights stand among these, otherwise behind them (room 6).
enum { TIED = 1, BIASES = 2, HEAD_NORMS = 4, NEIGHBOURS = 8, INTERLEAVED = 16, ALL_FLAGS = 31 };

// Four bytes each, as in the header of a checkpoint (room 3).
typedef struct {
    Type type;            // of the matrices; norms and biases are f32
    int dim, hidden_dim;  // width of the residual stream, and inside the feed-forward block
    int n_layers, n_heads, n_kv_heads;  // n_heads / n_kv_heads query heads share a key/value head
    int head_dim, vocab_size, max_seq_len;
    int window;           // a token sees this many positions, itself included; 0: all
    uint32_t flags;
    float norm_eps, rope_theta;
    Scaling scaling;
    float factor, low_freq_factor, high_freq_factor;
    int original_context;
} Config;
static int q_dim(const Config *c) { return c->n_heads * c->head_dim; }
static int kv_dim(const Config *c) { return c->n_kv_heads * c->head_dim; }

// Every tensor once, in the order of our file: loading, quantizing, counting and printing walk this
// table. A layer has those from ATTENTION_NORM to W2, w2(silu(w1 x) * w3 x).
typedef enum { EMBEDDING, ATTENTION_NORM, WQ, WK, WV, BQ, BK, BV, Q_NORM, K_NORM, WO, FFN_NORM,
               W1, W3, W2, FINAL_NORM, CLASSIFIER, SLOTS } SlotId;
typedef enum { ONE, DIM, Q_DIM, KV_DIM, HEAD_DIM, HIDDEN, VOCAB } Extent;

// One row is a vector, always f32. A model has a slot only with its flag; TIED: only without.
static const struct Slot { const char *name; Extent rows, cols; uint32_t flag; } slots[SLOTS] = {
    {"embedding", VOCAB, DIM, 0}, {"attention norm", ONE, DIM, 0},
    {"wq", Q_DIM, DIM, 0}, {"wk", KV_DIM, DIM, 0}, {"wv", KV_DIM, DIM, 0},
    {"bq", ONE, Q_DIM, BIASES}, {"bk", ONE, KV_DIM, BIASES}, {"bv", ONE, KV_DIM, BIASES},
    {"q norm", ONE, HEAD_DIM, HEAD_NORMS}, {"k norm", ONE, HEAD_DIM, HEAD_NORMS},
    {"wo", DIM, Q_DIM, 0}, {"ffn norm", ONE, DIM, 0},
    {"w1", HIDDEN, DIM, 0}, {"w3", HIDDEN, DIM, 0}, {"w2", DIM, HIDDEN, 0},
    {"final norm", ONE, DIM, 0}, {"classifier", VOCAB, DIM, TIED},
};

typedef struct {
    Config config;
    Tensor (*layers)[SLOTS];  // (n_layers); what is no layer's lies with the first
    File file;                // the mapping that all tensors point into
} Model;

// How many tensors a model has of a slot: one, one a layer, or none.
static int tensors_of(const Config *c, SlotId s) {
    if (((c->flags ^ TIED) & slots[s].flag) != slots[s].flag) return 0;
    return s >= ATTENTION_NORM && s <= W2 ? c->n_layers : 1;
}

// The shape and type that a model of this config gives to a slot.
static Tensor blank_tensor(const Config *c, SlotId s) {
    const int of[] = {1, c->dim, q_dim(c), kv_dim(c), c->head_dim, c->hidden_dim, c->vocab_size};
    Extent rows = slots[s].rows;
    return (Tensor){rows == ONE ? F32 : c->type, of[rows], of[slots[s].cols],
                    c->flags & INTERLEAVED, NULL};
}

// The slot after s that the model has, in the order of our file; `layer` goes on with it.
static SlotId next_slot(const Config *c, SlotId s, int *layer) {
    do s = s == W2 && (*layer = (*layer + 1) % c->n_layers) ? ATTENTION_NORM : s + 1;
    while (s < SLOTS && !tensors_of(c, s));
    return s;
}

// Quantized weights: GROUP columns share a scale, a LINE is 4 bytes of each of PANEL rows (room 6).
enum { GROUP = 32, PANEL = 16, LINE = 64 };
static bool is_quantized(Type type) { return type == Q8 || type == Q4; }
static size_t group_count(int cols) { return round_up((size_t)cols, GROUP) / GROUP; }
static size_t panel_count(int rows) { return round_up((size_t)rows, PANEL) / PANEL; }
static size_t group_bytes(Type type) { return (type == Q8 ? 8 : 4) * LINE; }
static size_t row_bytes(Type type, int cols) { return (size_t)cols * (type == F32 ? 4 : 2); }
static size_t panel_bytes(Type type, int cols) {
    const size_t groups = group_count(cols);
    return groups * group_bytes(type) + (groups + 1) / 2 * LINE;
}
// Where in a panel group g has its lines, and its scales: those of two groups fill a line.
static size_t lines_at(const Tensor *w, size_t g) {
    return g * group_bytes(w->type) + (w->interleaved ? (g / 2 + 1) * LINE : 0);
}
static size_t scales_at(const Tensor *w, size_t g) {
    const size_t line = w->interleaved ? lines_at(w, g / 2 * 2) - LINE
                                       : lines_at(w, group_count(w->cols)) + g / 2 * LINE;
    return line + g % 2 * PANEL * 2;
}
static size_t tensor_bytes(const Tensor *w) {
    return is_quantized(w->type) ? panel_count(w->rows) * panel_bytes(w->type, w->cols)
                                 : (size_t)w->rows * row_bytes(w->type, w->cols);
}

// ------------------------------------------------------------------------------------------------
// 3. The checkpoint: from bytes that cannot be trusted to a Model that can
//
// Ours: a header, then the tensors in the order of `slots`, layer by layer, each on a 64-byte
// boundary. llama2.c's versions 0 and 1 hold f32 kind by kind for all layers, unaligned.

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "checkpoints are used in place");
#define MAGIC "LLAMA02"
typedef struct {
    char magic[8];
    uint32_t version;
    Config config;
    uint8_t zero[164];
    uint64_t size;  // of the file
} Header;
enum { HEADER = sizeof(Header) };

// The numbers of a Config in its order, i: int32_t, f: float, and their bounds: an int counts the
// elements of a row, 2^20 items do a job (room 4), and no sum of sizes overflows.
static const struct Field { const char *name; char kind; double least, most; } fields[] = {
    {"type", 'i', 0, TYPES - 1}, {"dim", 'i', 1, 1 << 20}, {"hidden_dim", 'i', 1, 1 << 22},
    {"n_layers", 'i', 1, 1 << 14}, {"n_heads", 'i', 1, 1 << 14}, {"n_kv_heads", 'i', 1, 1 << 14},
    {"head_dim", 'i', 1, 1 << 12}, {"vocab_size", 'i', 1, 1 << 23},
    {"max_seq_len", 'i', 1, 1 << 26}, {"sliding_window", 'i', 0, INT_MAX},
    {"flags", 'i', 0, ALL_FLAGS}, {"norm_eps", 'f', 0, 1}, {"rope_theta", 'f', 1e-9, 3.4e38},
    {"rope_scaling", 'i', 0, SCALINGS - 1}, {"factor", 'f', 0, 3.4e38},
    {"low_freq_factor", 'f', 0, 3.4e38}, {"high_freq_factor", 'f', 0, 3.4e38},
    {"original_context", 'i', 0, 1 << 26},
};
_Static_assert(sizeof(Config) == 4 * COUNT(fields), "each number of a Config has a row");
static double field_value(const Config *c, const struct Field *f) {
    const char *at = (const char *)c + 4 * (f - fields);
    return f->kind == 'f' ? (double)read_f32(at) : (double)(int32_t)read_u32(at);
}
static void check_config(const File *f, const Config *c) {
    for (int i = 0; i < COUNT(fields); i++)
        check(f, fields[i].name, field_value(c, &fields[i]), fields[i].least, fields[i].most);
    if (!is_quantized(c->type)) check(f, "flags", c->flags, 0, INTERLEAVED - 1);
    check(f, "head_dim, which must be even,", c->head_dim, c->head_dim & ~1, c->head_dim & ~1);
    check(f, "n_heads modulo n_kv_heads", c->n_heads % c->n_kv_heads, 0, 0);
    check(f, "n_heads times head_dim", q_dim(c), 1, 1 << 22);
    if (c->scaling) check(f, "factor", (double)c->factor, 1e-9, 3.4e38);
    if (c->scaling != LLAMA3) return;
    check(f, "low_freq_factor", (double)c->low_freq_factor, 0, (double)c->high_freq_factor - 1e-6);
    check(f, "original_context", c->original_context, 1, 1 << 26);
}
static void check_size(const File *f, uint64_t wanted) {
    if (wanted != f->size)
        die("%s: not a %s, or cut short: it has %zu bytes, its header wants %llu", f->path,
            f->kind, f->size, (unsigned long long)wanted);
}

// llama2.c has seven ints. That the classifier is the embedding, a byte after them says in version
// 1, and that the size of the vocabulary is above 0 in version 0.
static Config read_llama2c_config(const File *f, uint32_t version) {
    const int *h = (const void *)(f->at + 8 * version);
    int dim = h[0], heads = h[3], vocab = h[5];
    bool tied = version ? f->at[36] != 0 : vocab > 0;
    if (version == 0 && vocab < 0) vocab = (int)-(uint32_t)vocab;
    if (heads > 0 && dim % heads)
        die("%s: not a %s: its dim %d is no multiple of n_heads %d", f->path, f->kind, dim, heads);
    return (Config){.dim = dim, .hidden_dim = h[1], .n_layers = h[2], .n_heads = heads,
                    .n_kv_heads = h[4], .head_dim = heads > 0 ? dim / heads : 1,
                    .vocab_size = vocab, .max_seq_len = h[6],
                    .flags = NEIGHBOURS | (tied ? TIED : 0), .norm_eps = 1e-5f, .rope_theta = 1e4f};
}

// The tensor points at the bytes from `at` on. Returns where it ends, perhaps behind the file.
static size_t take(Model *m, SlotId s, int l, size_t at) {
    Tensor *w = &m->layers[l][s];
    *w = blank_tensor(&m->config, s);
    w->data = m->file.at + at;
    return at + tensor_bytes(w);
}
static size_t take_ours(Model *m) {
    size_t at = HEADER;
    int l = 0;
    for (SlotId s = 0; s < SLOTS; s = next_slot(&m->config, s, &l))
        at = take(m, s, l, round_up(at, LINE));
    return at;
}

// In version 0 two tables of RoPE (seq_len, head_dim/2) may stand before the classifier; the size
// of the file says whether they do.
static size_t take_llama2c(Model *m, uint32_t version) {
    static const SlotId orders[2][12] = {
        {EMBEDDING, ATTENTION_NORM, WQ, WK, WV, WO, FFN_NORM, W1, W2, W3, FINAL_NORM, CLASSIFIER},
        {ATTENTION_NORM, FFN_NORM, FINAL_NORM, EMBEDDING, WQ, WK, WV, WO, W1, W2, W3, CLASSIFIER}};
    size_t at = version ? HEADER : 28;
    size_t tables = (size_t)m->config.max_seq_len * (size_t)m->config.head_dim * 4;
    for (const SlotId *s = orders[version]; s < orders[version] + 12; s++)
        for (int l = 0; l < tensors_of(&m->config, *s); l++) at = take(m, *s, l, at);
    if (version || at + tables != m->file.size) return at;
    if (!(m->config.flags & TIED)) m->layers[0][CLASSIFIER].data += tables;
    return at + tables;
}

// Map the file, read its header, point every tensor into it. Dies, naming file and field, unless
// numbers are sane and want the file's exact size, by which alone llama2.c's version 0 is known.
static Model open_model(const char *path) {
    static const char *const strangers[][2] = {
        {"GGUF", "a GGUF file"}, {"PK\3\4", "a zip archive, as PyTorch writes"},
        {"LLAMA02T", "a tokenizer"}, {"ak42", "byte-swapped, written on a big-endian machine"},
        {"24ka\2", "llama2.c's int8 (version 2; export 0 or 1, and use -m quantize)"}};
    Model m = {.file = open_file(path, "checkpoint (header: llama2.c, version 0)")};
    File *f = &m.file;  // a page at least is mapped, with zeros behind the end of the file
    const Header *h = (const void *)f->at;
    for (int i = 0; i < COUNT(strangers); i++)
        if (memcmp(f->at, strangers[i][0], strlen(strangers[i][0])) == 0)
            die("%s: this is %s, not a checkpoint; export.py writes one from a model's folder",
                path, strangers[i][1]);
    bool ours = memcmp(f->at, MAGIC, sizeof MAGIC) == 0;
    bool marked = ours || memcmp(f->at, "24ka", 4) == 0;
    if (marked) f->kind = ours ? "checkpoint (header: LLaMA-02, version 1)"
                               : "checkpoint (header: llama2.c, version 1)";
    if (marked) check(f, "version", read_u32(f->at + (ours ? 8 : 4)), 1, 1);
    if (ours) check_size(f, h->size);
    if (ours) check(f, "zero in bytes 84 to 247", !all_zero(h->zero, sizeof h->zero), 0, 0);
    m.config = ours ? h->config : read_llama2c_config(f, marked);
    check_config(f, &m.config);
    m.layers = new_array((size_t)m.config.n_layers, sizeof *m.layers);
    check_size(f, ours ? take_ours(&m) : take_llama2c(&m, marked));
    if (m.config.flags & TIED) m.layers[0][CLASSIFIER] = m.layers[0][EMBEDDING];
    // Read ahead, into large pages where the system can (decoding 1.1B q8 in a virtual machine: 50
    // to 55 tokens/s, not 36 to 43). Only asked for, so a model larger than memory still runs.
    madvise((void *)(uintptr_t)f->at, f->size, MADV_HUGEPAGE);
    madvise((void *)(uintptr_t)f->at, f->size, MADV_WILLNEED);
    return m;
}
static void close_model(Model *m) { free(m->layers), close_file(&m->file); }

// ------------------------------------------------------------------------------------------------
// 4. Threads: one verb, parallel
//
// A job is n items, claimed a few at a time from one atomic count: a thread that the system takes
// away holds up what it has claimed and nothing else; one that never woke holds up nothing. Whoever
// waits spins for a moment, as jobs follow each other closely, and then sleeps until a bell rings.

enum { MAX_THREADS = 1024, SPINS = 1 << 11 };
typedef void Work(void *job, int thread, int first, int end);
typedef struct { _Atomic int sleepers; pthread_cond_t rings; } Bell;
typedef struct {
    _Alignas(64) _Atomic int unclaimed;  // items of this job, its last
    _Alignas(64) _Atomic int undone;     // items of this job
    _Alignas(64) Work *work;             // this and the next two: read by who has claimed some
    void *job;
    int items, threads;                  // the caller of parallel() is one of the threads
    _Alignas(64) _Atomic int started;    // workers that have taken their number
    _Atomic int closing;                 // 1: they shall end
    pthread_t workers[MAX_THREADS];
    pthread_mutex_t mutex;
    Bell begun, finished;
} Pool;
static bool work_waits(Pool *p) { return p->unclaimed || p->closing; }
static bool job_done(Pool *p) { return p->undone == 0; }
static void relax(void) {
#if defined __x86_64__
    _mm_pause();
#endif
}

// No ring is lost: a sleeper is counted before it looks again, and looked for after the change, so
// of two that pass each other at least one sees the other; until it waits the mutex is its own.
static void await(Pool *p, Bell *bell, bool (*came)(Pool *)) {
    for (int i = 0; i < SPINS && !came(p); i++) relax();
    if (came(p)) return;
    pthread_mutex_lock(&p->mutex);
    bell->sleepers++;
    while (!came(p)) pthread_cond_wait(&bell->rings, &p->mutex);
    bell->sleepers--;
    pthread_mutex_unlock(&p->mutex);
}
static void ring(Pool *p, Bell *bell) {
    if (bell->sleepers == 0) return;
    pthread_mutex_lock(&p->mutex);
    pthread_cond_broadcast(&bell->rings);
    pthread_mutex_unlock(&p->mutex);
}

// Claim four fifths of an even share of what is left, and do it, until nothing is left. Each touch
// of a count costs, and each piece begins its reading anew: by half of an even share 2 threads of
// Zen 5 decode 15M q8 1.1 times slower and 1.1B q4 1.02 to 1.05 times; by a whole one 16 of a Xeon
// 1.05. So does a stale look at what is left: shares by a plain subtraction, 1.1B on 16 threads
// 8 %. What is claimed is of the present job, which stays that until all its items are done.
static void work_on(Pool *p, int thread) {
    int done = 0;
    for (int left; (left = p->unclaimed) > 0;) {
        int n = most(1, (int)(left * .8 / p->threads));
        if (!atomic_compare_exchange_weak(&p->unclaimed, &left, left - n)) continue;
        p->work(p->job, thread, p->items - left, p->items - left + n);
        done += n;
    }
    if (done && atomic_fetch_sub(&p->undone, done) == done) ring(p, &p->finished);
}
static void *worker(void *pool) {
    Pool *p = pool;
    int thread = 1 + atomic_fetch_add(&p->started, 1);
    for (; !p->closing; await(p, &p->begun, work_waits)) work_on(p, thread);
    return NULL;
}

// Do all items 0 to n of a job. Which thread does which is chance: results must not depend on it.
static void parallel(Pool *p, int n, Work *work, void *job) {
    if (p->threads == 1 || n <= 1) {
        if (n) work(job, 0, 0, n);
        return;
    }
    p->work = work, p->job = job, p->items = n;
    p->undone = n;
    p->unclaimed = n;  // from here on the others may claim
    ring(p, &p->begun);
    work_on(p, 0);
    await(p, &p->finished, job_done);
}
static void start_pool(Pool *p, int threads) {
    *p = (Pool){.threads = threads, .mutex = PTHREAD_MUTEX_INITIALIZER,
                .begun = {0, PTHREAD_COND_INITIALIZER}, .finished = {0, PTHREAD_COND_INITIALIZER}};
    hold_interrupt(true);  // threads inherit this: an interrupt is the caller's
    for (int i = 1; i < threads; i++)
        if (pthread_create(&p->workers[i], NULL, worker, p) != 0)
            die("thread %d of %d cannot be started; -j sets a smaller number", i + 1, threads);
    hold_interrupt(false);
}
static void stop_pool(Pool *p) {
    p->closing = 1;
    ring(p, &p->begun);
    for (int i = 1; i < p->threads; i++) pthread_join(p->workers[i], NULL);
}

#if defined __linux__
// The number that `format` finds in a file of the system, or `otherwise`.
static long read_number(const char *path, const char *format, long otherwise) {
    FILE *f = fopen(path, "r");
    long v, found = f ? fscanf(f, format, &v) : 0;
    if (f) fclose(f);
    return found == 1 ? v : otherwise;
}

// Physical cores this process may use: of the hyper-threads of a core only the first is counted
// (or all that are allowed without it), and no more than the control group's quota pays for.
static int usable_cores(void) {
    static const char siblings[] = "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list";
    static const char group[] = "/sys/fs/cgroup/cpu.max";  // "max 100000" or "150000 100000"
    long quota = read_number("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "%ld", -1);  // version 1
    long period = read_number("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "%ld", 100000);
    int cores = 0;
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return 1;
    for (int i = 0; i < CPU_SETSIZE; i++) {
        char path[sizeof siblings + 8];
        if (!CPU_ISSET(i, &allowed)) continue;
        snprintf(path, sizeof path, siblings, i);
        long first = read_number(path, "%ld", i);
        cores += first == i || !CPU_ISSET(first, &allowed);  // false for any long out of range
    }
    quota = read_number(group, "%ld", quota), period = read_number(group, "%*s %ld", period);
    return most(1, quota > 0 && period > 0 ? least(cores, (int)((quota - 1) / period + 1)) : cores);
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
#define X86(step) _mm512_##step
typedef __m512i Ints;
typedef __m256i Halves;
enum { LANES = 16, Q_PANELS = 2, F_TOKENS = 6, S_TOKENS = 12, STRIP = 32 };  // what registers hold
#elif defined __AVX2__ && defined __FMA__ && defined __F16C__
#define STEPS_AVX2
#define X86(step) _mm256_##step
typedef __m256i Ints;
typedef __m128i Halves;
enum { LANES = 8, Q_PANELS = 1, F_TOKENS = 3, S_TOKENS = 6, STRIP = 16 };
#elif defined __aarch64__
#define STEPS_NEON
enum { LANES = 4, Q_PANELS = 1, F_TOKENS = 4, S_TOKENS = 6, STRIP = 16 };
#else
enum { LANES = 4, Q_PANELS = 1, F_TOKENS = 2, S_TOKENS = 3, STRIP = 16 };
#endif
enum { WIDTH = 16, PARTS = WIDTH / LANES };
static size_t vector_count(int n) { return round_up((size_t)n, WIDTH) / WIDTH; }

// A struct of native registers rather than one vector of 64 bytes: gcc 12 keeps the latter in
// memory on machines whose registers are smaller (a dot product then runs 9 times slower).
typedef float    FloatPart __attribute__((vector_size(4 * LANES)));
typedef int32_t  IntPart   __attribute__((vector_size(4 * LANES)));
typedef uint32_t BitPart   __attribute__((vector_size(4 * LANES)));
typedef IntPart  LooseInts __attribute__((aligned(1), may_alias));
typedef uint16_t HalfPart  __attribute__((vector_size(2 * LANES)));
typedef int8_t   BytePart  __attribute__((vector_size(LANES)));
typedef struct { FloatPart p[PARTS]; } f32v;
typedef struct { IntPart p[PARTS]; } i32v;

#define EACH_PART UNROLL for (int k = 0; k < PARTS; k++)
#define MAP(type, part) type r; EACH_PART r.p[k] = part; return r
INLINE f32v spread(float x) { MAP(f32v, x - (FloatPart){0}); }
INLINE i32v spread_int(int32_t x) { MAP(i32v, x - (IntPart){0}); }
INLINE f32v add(f32v a, f32v b) { MAP(f32v, a.p[k] + b.p[k]); }
INLINE f32v sub(f32v a, f32v b) { MAP(f32v, a.p[k] - b.p[k]); }
INLINE f32v mul(f32v a, f32v b) { MAP(f32v, a.p[k] * b.p[k]); }
INLINE f32v over(f32v a, f32v b) { MAP(f32v, a.p[k] / b.p[k]); }
INLINE f32v as_float(i32v a) { MAP(f32v, (FloatPart)a.p[k]); }
INLINE i32v as_int(f32v a) { MAP(i32v, (IntPart)a.p[k]); }
INLINE i32v less(f32v a, f32v b) { MAP(i32v, a.p[k] < b.p[k]); }
INLINE f32v magnitude(f32v a) { MAP(f32v, (FloatPart)((IntPart)a.p[k] & 0x7fffffff)); }

// Where the mask has all bits a, where it has none b.
INLINE f32v choose(i32v mask, f32v a, f32v b) {
    MAP(f32v, (FloatPart)(((IntPart)a.p[k] & mask.p[k]) | ((IntPart)b.p[k] & ~mask.p[k])));
}

INLINE i32v load_line(const void *line) { MAP(i32v, ((const LooseInts *)line)[k]); }
INLINE f32v load_f32(const float *x) { return as_float(load_line(x)); }
INLINE void store_f32(float *x, f32v v) { EACH_PART ((LooseInts *)x)[k] = (IntPart)v.p[k]; }
INLINE float float_of_bits(uint32_t u) { float f; memcpy(&f, &u, sizeof f); return f; }
INLINE uint32_t bits_of_float(float f) { uint32_t u; memcpy(&u, &f, sizeof u); return u; }

// An IEEE half as a float, exactly: the power of 2 puts right the exponent, of subnormals too.
static float widen_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = (uint32_t)(half & 0x7fff) << 13;
    uint32_t quiet = rest > 0x7c00 << 13 ? 1u << 22 : 0;
    uint32_t finite = bits_of_float(float_of_bits(rest) * 0x1p112f);
    return float_of_bits(sign | (rest >= 0x7c00 << 13 ? 0x7f800000 | rest | quiet : finite));
}

// The nearest IEEE half, ties to even.
static uint16_t narrow_half(float x) {
    uint32_t u = bits_of_float(x), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
    uint32_t half = ((rest + 0xfff + (rest >> 13 & 1)) >> 13) - (112u << 10);
    if (rest > 0x7f800000) half = 0x7e00 | (rest >> 13 & 0x3ff);
    else if (rest >= 0x47800000) half = 0x7c00;  // 65536 and above
    else if (rest < 0x38800000)  // below the smallest normal half: 0.5 rounds to units of 2^-24
        half = bits_of_float(float_of_bits(rest) + 0.5f) & 0x7ff;
    return (uint16_t)(sign | half);
}

// The steps that differ between instruction sets, most a register at a time:
//   hold         keeps a part in its register: gcc 12 otherwise reads it from memory for each
//                product, and loads are the limit (1.2 times: AVX-512 tiles, prompts of Zen 3)
//   greater_of   likewise lesser_of; a if one is no number. By choose prompts are 2 to 3 % slower
//   fused        a * b + c, rounded once; wide_f16, narrow_f16 as widen_half, narrow_half
//   wide_bf16    a float's upper half (AVX2: by a conversion of vectors one token of bf16 takes
//                1.15 times as long)
//   turn4        of four parts, each four lanes of all are turned: rows become columns
//   dot4         to each 32-bit lane of sum, the product of its 4 weights w (one line of a panel)
//                and the 4 activations x: 16 rows at once. Weights of q8 are stored plus 128; they
//                enter plus Q8_ZERO, which the caller takes off
//   dot_pairs    where the step to 32 bits is dear, a group of q4 is summed in pairs of 16 bits
//                first, and add_pairs ends it (AVX2: 1.6 times faster)
//   at_once      gcc 12 otherwise adds a group's products up last (Zen 3: q8 1.1, q4 1.5 times)
//   in_turn      `at` is used after v is known: gcc 12 otherwise sends for all lines of a group in
//                one burst (decoding on Zen 3 and 5: 2 to 5 % slower)
#if defined X86
INLINE Halves load_halves(const uint16_t *x) { Halves h; memcpy(&h, x, sizeof h); return h; }
INLINE FloatPart fused(FloatPart a, FloatPart b, FloatPart c) { return X86(fmadd_ps)(a, b, c); }
INLINE FloatPart hold(FloatPart v) { __asm__("" : "+v"(v)); return v; }
INLINE f32v greater_of(f32v a, f32v b) { MAP(f32v, X86(max_ps)(b.p[k], a.p[k])); }
INLINE f32v lesser_of(f32v a, f32v b) { MAP(f32v, X86(min_ps)(b.p[k], a.p[k])); }
INLINE FloatPart wide_f16(const uint16_t *x) { return X86(cvtph_ps)(load_halves(x)); }
INLINE FloatPart wide_bf16(const uint16_t *x) {
    return (FloatPart)((BitPart)X86(cvtepu16_epi32)(load_halves(x)) << 16);
}
INLINE void narrow_f16(uint16_t *out, FloatPart x) {
    Halves h = X86(cvtps_ph)(x, 0);
    memcpy(out, &h, sizeof h);
}
INLINE void turn4(FloatPart *v) {
    FloatPart a = X86(unpacklo_ps)(v[0], v[1]), b = X86(unpackhi_ps)(v[0], v[1]);
    FloatPart c = X86(unpacklo_ps)(v[2], v[3]), d = X86(unpackhi_ps)(v[2], v[3]);
    v[0] = X86(shuffle_ps)(a, c, 0x44), v[1] = X86(shuffle_ps)(a, c, 0xee);
    v[2] = X86(shuffle_ps)(b, d, 0x44), v[3] = X86(shuffle_ps)(b, d, 0xee);
}
#elif defined STEPS_NEON
INLINE FloatPart fused(FloatPart a, FloatPart b, FloatPart c) {
    return (FloatPart)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
INLINE FloatPart wide_f16(const uint16_t *x) {
    return (FloatPart)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x)));
}
INLINE void narrow_f16(uint16_t *out, FloatPart x) {
    vst1_u16(out, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
}
#else
#define EACH_LANE UNROLL for (int i = 0; i < LANES; i++)
INLINE FloatPart fused(FloatPart a, FloatPart b, FloatPart c) {
    EACH_LANE c[i] = fmaf(a[i], b[i], c[i]);
    return c;
}
INLINE FloatPart wide_f16(const uint16_t *x) {
    FloatPart r;
    uint16_t h[LANES];
    memcpy(h, x, sizeof h);  // bytes, whatever type they were written as
    EACH_LANE r[i] = widen_half(h[i]);
    return r;
}
INLINE void narrow_f16(uint16_t *out, FloatPart x) { EACH_LANE out[i] = narrow_half(x[i]); }
#endif
#if !defined X86
INLINE FloatPart wide_bf16(const uint16_t *x) {
    HalfPart upper;
    memcpy(&upper, x, sizeof upper);
    return (FloatPart)(__builtin_convertvector(upper, BitPart) << 16);
}
INLINE void turn4(FloatPart *v) {
    FloatPart a[4];
    memcpy(a, v, sizeof a);
    UNROLL for (int i = 0; i < 4; i++) UNROLL for (int j = 0; j < 4; j++) v[j][i] = a[i][j];
}
INLINE FloatPart hold(FloatPart v) { return v; }
INLINE f32v greater_of(f32v a, f32v b) { return choose(less(a, b), b, a); }
INLINE f32v lesser_of(f32v a, f32v b) { return choose(less(b, a), b, a); }
#endif

// What pays in tiles of quantized weights, see add_whole. Of AVX-512 machines Zen 4 and 5 have BF16
// but no FP16; they, the Zens before them and Intel's with AVX-VNNI add where they do not multiply.
#if defined STEPS_AVX512 && defined __AVX512BF16__ && !defined __AVX512FP16__
enum { TABLES = 1, AT_A_TIME = 2, ALL_LEAD = 3 };
#elif defined STEPS_AVX2
enum { TABLES = 1, AT_A_TIME = 1, ALL_LEAD = 3 };
#else
enum { TABLES = 0, AT_A_TIME = 1, ALL_LEAD = 1 };
#endif

#if defined STEPS_AVX512 || defined __AVXVNNI__
enum { Q8_ZERO = 128, PAIRS = 0, Q_TOKENS = LANES == 16 ? 8 : 6 };
INLINE IntPart dot4(IntPart sum, IntPart w, IntPart x) {
#if defined STEPS_AVX512
    return (IntPart)_mm512_dpbusd_epi32((Ints)sum, (Ints)w, (Ints)x);
#else
    return (IntPart)_mm256_dpbusd_avx_epi32((Ints)sum, (Ints)w, (Ints)x);
#endif
}
#elif defined STEPS_AVX2
enum { Q8_ZERO = 0, PAIRS = 1, Q_TOKENS = 5 };
INLINE IntPart at_once(IntPart v) { __asm__("" : "+v"(v)); return v; }
INLINE IntPart add_pairs(IntPart sum, IntPart pairs) {
    return at_once(sum + (IntPart)_mm256_madd_epi16((Ints)pairs, _mm256_set1_epi16(1)));
}
INLINE IntPart dot_pairs(IntPart pairs, IntPart w, IntPart x) {  // 8 lines fit: 8 * 2 * 15 * 127
    return at_once((IntPart)_mm256_add_epi16((Ints)pairs, _mm256_maddubs_epi16((Ints)w, (Ints)x)));
}
// vpmaddubsw adds pairs of unsigned by signed in 16 bits with saturation, so the weight gives its
// sign to the activation: 2 * 128 * 127 just fits.
INLINE IntPart dot4(IntPart sum, IntPart w, IntPart x) {
    Ints size = _mm256_abs_epi8((Ints)w), turned = _mm256_sign_epi8((Ints)x, (Ints)w);
    return add_pairs(sum, (IntPart)_mm256_maddubs_epi16(size, turned));
}
#elif defined STEPS_NEON
enum { Q8_ZERO = 0, PAIRS = 0, Q_TOKENS = 4 };
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
enum { Q8_ZERO = 0, PAIRS = 0, Q_TOKENS = 2 };
INLINE IntPart dot4(IntPart sum, IntPart w, IntPart x) {
    UNROLL for (int up = 0; up < 32; up += 8)  // shifts bring byte 3, 2, 1, 0 down, signed
        sum += ((IntPart)((BitPart)w << up) >> 24) * ((IntPart)((BitPart)x << up) >> 24);
    return sum;
}
#endif
#if defined STEPS_AVX512 || defined __AVXVNNI__ || !defined STEPS_AVX2
INLINE IntPart add_pairs(IntPart sum, IntPart pairs) { return sum + pairs; }
INLINE IntPart dot_pairs(IntPart pairs, IntPart w, IntPart x) { return dot4(pairs, w, x); }
#endif

// The eight steps of a group.
#if defined X86 || defined STEPS_NEON
#define EACH_STEP UNROLL for (int i = 0; i < 8; i += AT_A_TIME)
#else
#define EACH_STEP for (int i = 0; i < 8; i++)  // unrolled, gcc 12 takes 2 minutes (riscv64)
#endif

#if defined X86
INLINE void in_turn(const uint8_t **at, IntPart *v) { __asm__("" : "+r"(*at), "+v"(*v)); }
#else
INLINE void in_turn(const uint8_t **at, IntPart *v) { (void)at, (void)v; }
#endif

INLINE f32v fma16(f32v a, f32v b, f32v c) { MAP(f32v, fused(a.p[k], b.p[k], c.p[k])); }
INLINE f32v load_f16(const uint16_t *x) { MAP(f32v, wide_f16(x + k * LANES)); }
INLINE void store_f16(uint16_t *x, f32v v) { EACH_PART narrow_f16(x + k * LANES, v.p[k]); }

typedef float Four __attribute__((vector_size(16)));
typedef uint32_t FourBits __attribute__((vector_size(16)));

// The one order in which 16 lanes become one number: lanes 8 apart, then 4, 2 and 1 apart.
INLINE float join(f32v v) {
    Four q[4], sum;
    memcpy(q, &v, sizeof q);
    sum = (q[0] + q[2]) + (q[1] + q[3]);
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

INLINE float greatest(f32v v) {
#if defined STEPS_AVX512
    return _mm512_reduce_max_ps(v.p[0]);
#else
    float x[WIDTH];
    store_f32(x, v);
    for (int apart = WIDTH / 2; apart; apart /= 2)
        UNROLL for (int i = 0; i < apart; i++) x[i] = x[i] < x[i + apart] ? x[i + apart] : x[i];
    return x[0];
#endif
}

#if defined X86
INLINE FloatPart folded(FloatPart a, FloatPart b, const bool peak) {
    return peak ? (FloatPart)X86(max_ps)(a, b) : a + b;
}
#endif

// Four vectors become four numbers: each what join gives, or its greatest lane. Halves of two are
// folded as one, which makes 4 joins cost 16 instructions (a product of 120 tokens by bf16: 10 %
// faster).
INLINE Four fold4(const f32v *v, const bool peak) {
#if defined STEPS_AVX512
#define FOLD(a, b, low, high) \
    folded(_mm512_shuffle_f32x4(a, b, low), _mm512_shuffle_f32x4(a, b, high), peak)
    FloatPart ab = FOLD(v[0].p[0], v[1].p[0], 0x44, 0xee);  // 8 apart
    FloatPart cd = FOLD(v[2].p[0], v[3].p[0], 0x44, 0xee), s = FOLD(ab, cd, 0x88, 0xdd);
    s = folded(s, _mm512_shuffle_ps(s, s, 0x4e), peak);
    s = folded(s, _mm512_shuffle_ps(s, s, 0xb1), peak);
    return (Four){s[0], s[4], s[8], s[12]};
#elif defined STEPS_AVX2
#define FOLD(a, b) \
    folded(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31), peak)
    FloatPart h[4];
    UNROLL for (int i = 0; i < 4; i++) h[i] = folded(v[i].p[0], v[i].p[1], peak);  // 8 apart
    FloatPart ab = FOLD(h[0], h[1]), cd = FOLD(h[2], h[3]);
    FloatPart s = folded(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee), peak);
    s = folded(s, _mm256_shuffle_ps(s, s, 0xb1), peak);
    return (Four){s[0], s[4], s[2], s[6]};
#else
    Four r;
    UNROLL for (int i = 0; i < 4; i++) r[i] = peak ? greatest(v[i]) : join(v[i]);
    return r;
#endif
}
INLINE Four join4(const f32v *v) { return fold4(v, false); }
INLINE Four greatest4(const f32v *v) { return fold4(v, true); }

// The low byte of each lane, a then b. (By conversion gcc 12 takes them out one by one:
// prompts 3 % slower.)
INLINE void store_bytes(int8_t *out, i32v a, i32v b) {
#if defined STEPS_AVX2
    __m256i low[4], order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    UNROLL for (int k = 0; k < 4; k++) low[k] = (Ints)((k < 2 ? a : b).p[k % 2] & 255);
    Ints first = _mm256_packus_epi32(low[0], low[1]), last = _mm256_packus_epi32(low[2], low[3]);
    Ints all = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(first, last), order);
    memcpy(out, &all, sizeof all);
#else
    UNROLL for (int k = 0; k < 2 * PARTS; k++) {
        IntPart part = (k < PARTS ? a : b).p[k % PARTS];
#if defined STEPS_AVX512
        BytePart low = (BytePart)_mm512_cvtepi32_epi8((Ints)part);
#else
        BytePart low = __builtin_convertvector(part, BytePart);
#endif
        memcpy(out + k * LANES, &low, sizeof low);
    }
#endif
}

// Added to a float below 2^22 it rounds that to a whole number, ties to even, in the low bits.
static const float ROUNDER = 0x1.8p23f;

// e^x to within 1 unit in the last place or so: x = n ln 2 + r, e^r by its series (|r| < 0.35, the
// term r^8/8! is below 6e-9), 2^n into the exponent. Below -87 it gives 0, above 88 e^88.
INLINE f32v exponential(f32v x) {
    const f32v lowest = spread(-87.0f), highest = spread(88.0f);
    i32v too_low = less(x, lowest);
    x = lesser_of(greater_of(x, lowest), highest);
    f32v shifted = fma16(x, spread(0x1.715476p+0f), spread(ROUNDER));
    f32v n = sub(shifted, spread(ROUNDER));
    f32v r = fma16(n, spread(-0x1.62e4p-1f), x);  // ln 2 in two parts, the first short enough
    r = fma16(n, spread(-0x1.7f7d1cp-20f), r);    // that n times it is exact
    static const float series[] = {1 / 720.f, 1 / 120.f, 1 / 24.f, 1 / 6.f, 0.5f, 1.f, 1.f};
    f32v e = spread(1 / 5040.f);
    UNROLL for (int i = 0; i < COUNT(series); i++) e = fma16(e, r, spread(series[i]));
    i32v bits = as_int(e), power = as_int(shifted);
    EACH_PART bits.p[k] = (IntPart)((BitPart)bits.p[k] + ((BitPart)power.p[k] << 23));
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
    store_f32(n < WIDTH ? all : out, v);
    if (n < WIDTH) memcpy(out, all, (size_t)n * sizeof *out);
}

// ------------------------------------------------------------------------------------------------
// 6. Weights: the types, quantizing, and the one matmul
//
// Float matrices lie row after row. Quantized ones lie in panels of 16 rows, each row in groups of
// 32 columns that share a scale. A panel is its 64-byte lines, group after group, and before each
// two groups a line of their scales, f16 (2, 16), so that who reads it goes straight on. (Without
// INTERLEAVED all scales stand behind all lines: one token of q8 then takes 1.03 times as long on
// Zen 5, of q4 1.07, built for AVX2 1.12 and 1.18.) A line is what one step of dot4 wants, 4
// weights of each of the 16 rows:
//
//     byte of line i       0          1          2          3          4        ..  63
//     q8 (8 lines a group) row 0                                       row 1        row 15
//                          col 4i     col 4i+1   col 4i+2   col 4i+3   col 4i       col 4i+3
//     q4 (4 lines)         low halves: col 8i + j, high halves: col 8i + 4 + j for byte j of a row
//
// q8 stores w/scale plus 128, q4 plus 8. Rows and columns that pad are zero, scales that pad are 0.

// A unit of a matmul is GROUP rows, a slice some units in a row. Float tiles have F_ROWS rows, or
// from MANY tokens on, where turning weights pays, a STRIP, with REST tokens where S_TOKENS are no
// longer there. Weights are sent for AHEAD bytes in front of where a tile is, inputs of a strip
// SOON numbers.
enum { UNIT_PANELS = GROUP / PANEL, Q4_ZERO = 8, F_ROWS = 4, REST = S_TOKENS / 3, SOON = 768 };
enum { STREAMS = 2 * Q_PANELS };  // AVX2 by four: Zen 3 no better, Zen 5 6 to 10 % slower
enum { MANY = LANES == 16 ? 48 : 16 };  // a Xeon gains from 45 tokens on, Zen 3 from 13
enum { AHEAD = 2560, NEAR = PAIRS ? 1024 : 1536, HELD = 64 << 20 };

// The scale of a group of activations is 2^e m, m of 8/16 to 15/16: so short that products by it
// are exact or stand in a table, see add_sum. (Scales of 24 bits: KL divergence of q8 0.000310 nats
// instead of 0.000328, prompts on Zen 5 5 % slower.)
typedef struct {
    int32_t start;  // of an integer sum: the bits of `zero` less the sum of the group's zero points
    float zero;     // 2^e ROUNDER
    float m, less;  // -zero * m
} Scale;

// What goes into a product, n rows of cols numbers: for float weights vectors, the last padded with
// zeros, for quantized ones groups of 32, whole numbers of -127 to 127 times a scale.
typedef struct {
    Type type; int cols, n;
    bool held;       // the model is no larger than HELD, which a cache may have
    float *vector;   // (n, vectors of a row, WIDTH), of MANY rows turned: see input_lane
    int8_t *q;       // (n / tile, groups of a row, tile, GROUP), tile: q_tokens(n)
    Scale *scale;    // (n / tile, groups of a row, tile)
} Inputs;
// How far ahead T tokens send for weights: NEAR if no cache holds the model (Zen 3: q8 7 %, f32 5 %
// faster; held ones of q8 20 % slower), without PAIRS only for float weights (Zen 5: those 3 to 8 %
// faster, q4 3 to 5 % slower); one token's four streams always (Zen 5: q8 and q4 2 to 5 % faster).
// Tiles of more tokens go in whole `units` of bytes, two further (2 to 8 tokens: Zen 5 1.01 to 1.05
// times faster, built for AVX2 1.02 to 1.1).
INLINE size_t ahead_of(const Inputs *in, Type type, const int T, size_t unit) {
    const bool quantized = is_quantized(type), four = quantized && STREAMS == 4 && T == 1;
    const size_t far = four || (!in->held && (PAIRS || !quantized)) ? NEAR : AHEAD;
    return quantized && T > 1 ? (far / unit + 2) * unit : far;
}
// Tokens whose groups lie side by side: a tile's. Those of one token alone, which only tiles of one
// take, are neighbours, so that they fill whole lines (a thread of Zen 5: q8 2, q4 5 % faster).
static int q_tokens(int n) { return n == 1 ? 1 : Q_TOKENS; }
// Where vector or group i of row t stands; a row has `count`, `tile` tokens lie together.
static size_t tiled(size_t count, int tile, int t, size_t i) {
    return ((size_t)(t / tile) * count + i) * (size_t)tile + (size_t)(t % tile);
}

// Tokens that strips have room for: whole tiles.
static size_t strip_tokens(int n) { return round_up((size_t)n, S_TOKENS); }

// Turned, inputs lie as (WIDTH, n / S_TOKENS, vectors of a row, S_TOKENS), weights of a strip as
// (WIDTH, vectors of a row, STRIP), with room after each lane, lest all lanes of a vector meet in
// one set of a cache (inputs, a Xeon: 4 % of a bf16 prompt). How far lanes are apart:
static size_t input_lane(int cols, int n) { return vector_count(cols) * strip_tokens(n) + WIDTH; }
static size_t strip_lane(int cols) { return (vector_count(cols) + 1) * STRIP; }

// Groups on their way into inputs, up to four: where they go, where they are, and room for those
// that a row's end cuts short.
typedef struct { int n; size_t at[4]; const float *x[4]; float some[4][GROUP]; } Groups;

// Each four become whole numbers, none larger than 127, times the least scale that allows it. Those
// too large for any (2.4e33) or not finite make zero infinite or NaN, and so their products. (One
// by one, Zen 3: 60 ns a group instead of 10, prompts of q8 4 and of q4 7 % slower.)
static void quantize_groups(const Inputs *in, const Groups *g) {
    const int zero_point = in->type == Q8 ? Q8_ZERO : Q4_ZERO;
    const f32v rounder = spread(ROUNDER);
    f32v v[4];
    UNROLL for (int i = 0; i < 4; i++)
        v[i] = greater_of(magnitude(load_f32(g->x[i])), magnitude(load_f32(g->x[i] + WIDTH)));
    const Four exact = greatest4(v) / 127.0f + 0x1p-126f;
    const FourBits scale = ((FourBits)exact + 0xfffffu) & ~0xfffffu;  // rounded up
    const Four inverse = 1.0f / (Four)scale, m = (Four)((scale & 0x7fffffu) | 0x3f000000u);
    UNROLL for (int i = 0; i < 4; i++) {
        f32v by = spread(inverse[i]);
        f32v a = add(mul(load_f32(g->x[i]), by), rounder);
        f32v b = add(mul(load_f32(g->x[i] + WIDTH), by), rounder);
        store_bytes(in->q + g->at[i] * GROUP, as_int(a), as_int(b));
        v[i] = add(sub(a, rounder), sub(b, rounder));
    }
    const Four sum = join4(v);  // exact, or NaN
    const Four zero = (Four)(scale & 0x7f800000u) * (2 * ROUNDER) + sum * 0.0f;
    UNROLL for (int i = 0; i < 4; i++) {
        const int points = zero_point * (sum[i] == sum[i] ? (int)sum[i] : 0);
        const uint32_t start = bits_of_float(zero[i]) - (uint32_t)points;
        in->scale[g->at[i]] = (Scale){(int32_t)start, zero[i], m[i], -zero[i] * m[i]};
    }
}
INLINE void add_group(const Inputs *in, Groups *g, size_t at, const float *x, int there) {
    float *some = g->some[g->n];
    if (there < GROUP) {
        memset(some, 0, sizeof g->some[0]);
        x = memcpy(some, x, (size_t)there * sizeof *x);
    }
    g->at[g->n] = at, g->x[g->n] = x;
    if (++g->n == 4) quantize_groups(in, g), g->n = 0;
}
static void store_vector(const Inputs *in, int t, int i, f32v v) {
    const size_t count = vector_count(in->cols), apart = input_lane(in->cols, in->n);
    if (in->n < MANY) {
        store_f32(in->vector + tiled(count, 1, t, (size_t)i) * WIDTH, v);
        return;
    }
    float lane[WIDTH], *at = in->vector + tiled(count, S_TOKENS, t, (size_t)i);
    store_f32(lane, v);
    UNROLL for (int k = 0; k < WIDTH; k++) at[(size_t)k * apart] = lane[k];
}

// Rows t to t + n get columns `first` to `first` + count: whole groups, or the last of a row. In x
// they are `stride` apart.
static void prepare(const Inputs *in, int t, int n, int first, const float *x, int stride,
                    int count) {
    const bool groups = is_quantized(in->type);
    const int size = groups ? GROUP : WIDTH, tile = q_tokens(in->n);
    const size_t all = group_count(in->cols);
    Groups g;
    g.n = 0;
    for (int i = 0; i < n; i++, x += stride) {
        size_t at = tiled(all, tile, t + i, (size_t)(first / size));
        for (int c = 0; c < count; c += size, at += (size_t)tile)
            if (groups) add_group(in, &g, at, x + c, count - c);
            else store_vector(in, t + i, (first + c) / WIDTH, load_some(x + c, count - c));
    }
    while (g.n) add_group(in, &g, g.at[0], g.x[0], GROUP);  // again, in place of those missing
}
static void prepare_row(const Inputs *in, int t, const float *x) {
    prepare(in, t, 1, 0, x, 0, in->cols);
}

// What a thread has room for: float weights of a strip, turned, and (4, n, STRIP) sums of it; what
// tiles of quantized weights keep, by groups.
typedef struct {
    float *turned; f32v (*sums)[STRIP / WIDTH];
    f32v (*table)[Q_PANELS][8]; i32v (*line)[Q_PANELS][8];
    float *gate, *found;  // (2, n, slice's rows) of gate_units, (A_QUERIES, MIX + head_pad) of look
} Scratch;

// A slice of a product: rows first to end of w by all tokens.
typedef struct {
    float *out; size_t stride;  // its numbers from token to token
    bool adds;                  // to those that are there
    const Tensor *w; const Inputs *in; const Scratch *own;
    int first, end;
} Slice;
INLINE float *out_of(const Slice *s, int t, int row) {
    return s->out + (size_t)t * s->stride + (row - s->first);
}
// The first n lanes of v go out.
INLINE void put(const Slice *s, float *out, f32v v, int n) {
    store_some(out, s->adds ? add(load_some(out, n), v) : v, n);
}

// A line's weights for dot4. In q4 a line holds two: the low and the high halves of its bytes.
INLINE i32v weights_of_line(Type type, const uint8_t *lines, int i) {
    i32v w = load_line(lines + (size_t)(type == Q8 ? i : i / 2) * LINE);
    EACH_PART {
        if (type == Q4) w.p[k] = (IntPart)(((BitPart)w.p[k] >> (i % 2 * 4)) & 0x0f0f0f0f);
        else if (Q8_ZERO == 0) w.p[k] ^= (int32_t)0x80808080;
    }
    return w;
}
INLINE i32v dot(i32v sum, i32v w, i32v x, bool pairs) {
    MAP(i32v, pairs ? dot_pairs(sum.p[k], w.p[k], x.p[k]) : dot4(sum.p[k], w.p[k], x.p[k]));
}
INLINE i32v from_pairs(i32v sum, i32v pairs) { MAP(i32v, add_pairs(sum.p[k], pairs.p[k])); }

// A tile's sums go out, of one that is not whole only those of tokens and rows that there are.
// (Asked for each vector, prompts of q8 on Zen 5 are 1 to 2 % slower by 2,048 columns, 8 by 256.)
INLINE void store_tile(const Slice *s, int panel, int gap, int t0, f32v (*sum)[Q_TOKENS],
                       const int T, const int P) {
    const int row = panel * PANEL, between = gap * PANEL, end = row + (P - 1) * between + PANEL;
    const bool whole = t0 + T <= s->in->n && end <= s->w->rows;
    float *out = out_of(s, t0, row);
    UNROLL for (int t = 0; t < T; t++, out += s->stride) UNROLL for (int p = 0; p < P; p++) {
        const int r = p * between;
        if (whole) put(s, out + r, sum[p][t], WIDTH);
        else if (t0 + t < s->in->n) put(s, out + r, sum[p][t], most(0, s->w->rows - row - r));
    }
}
// Where a tile's sums will go is sent for, as what they are added to (prompts of q8, Zen 5: 3 %);
// not by a tile that leads, which waits for weights (8 tokens of q4 would be 3 % slower).
INLINE void send_for_out(const Slice *s, int panel, int t0, const int T, const int P) {
    const float *out = out_of(s, t0, panel * PANEL);
    UNROLL for (int t = 0; t < T; t++, out += s->stride)
        UNROLL for (int p = 0; p < P; p++) __builtin_prefetch(out + p * PANEL, 1);
}

// A tile is P panels by T tokens: out(t, row) = sum over groups of scale_w * scale_x * (integer
// sum). Lanes are rows: nothing is added across lanes.
//
// Where a tile's next group is: its lines and scales in the first panel, `step` bytes from panel to
// panel, the lines to send for, and its inputs.
typedef struct {
    const uint8_t *lines, *scales, *soon; size_t step;
    const int8_t *q; const Scale *scale;
} Place;
// Where it begins, `ahead` bytes behind what it sends for.
INLINE Place place_of(const Slice *s, int panel, size_t step, size_t ahead, int t0, const int T) {
    const Tensor *w = s->w;
    const size_t first = tiled(group_count(w->cols), q_tokens(T), t0, 0);
    const uint8_t *data = w->data + (size_t)panel * panel_bytes(w->type, w->cols);
    const uint8_t *lines = data + lines_at(w, 0);
    return (Place){lines, data + scales_at(w, 0), lines + ahead, step,
                   s->in->q + first * GROUP, s->in->scale + first};
}
// n groups on, which are so many bytes of lines and of scales.
INLINE Place onward(Place at, size_t lines, size_t scales, int n, const int T) {
    n *= q_tokens(T), at.lines += lines, at.soon += lines, at.scales += scales;
    at.q += n * GROUP, at.scale += n;
    return at;
}

// sum + s * 2^e m * whole, where x is the scale 2^e m. An integer sum starts so that, read as a
// float, it is 2^e (ROUNDER + whole): no conversion. m times that, less m 2^e ROUNDER, fused, is
// exact, as 20 bits of a sum and 4 of m fit a float. So are the products of s by each m: if *s is a
// table of them, one subtraction remains. Either way the sum is rounded once, to the same bits.
INLINE f32v add_sum(f32v sum, i32v whole, const Scale *x, const f32v *s, const bool table) {
    const f32v v = as_float(whole);
    if (table) return fma16(sub(v, spread(x->zero)), s[bits_of_float(x->m) >> 20 & 7], sum);
    return fma16(fma16(v, spread(x->m), spread(x->less)), *s, sum);
}

// The lines of steps i and following of a group, for P panels. A tile that leads sends for weights,
// each line for the one ahead of it (q4: 1.3 times faster; 2 to 8 tokens: q8 1.1 to 1.3, q4 1.2 to
// 1.5), in few instructions; not by prefetchnta, which makes a Xeon decode 3 times slower. It keeps
// for those that follow, if kept is not NULL, what they take from there.
INLINE void take_lines(i32v (*line)[STREAMS], const Place *at, int i, Type type, i32v (*kept)[8],
                       const bool leads, const int P) {
    UNROLL for (int h = 0; h < AT_A_TIME; h++) UNROLL for (int p = 0; p < P; p++) {
        const size_t panel = (size_t)p * at->step, byte = (size_t)(i + h) * group_bytes(type) / 8;
        line[h][p] = kept && !leads ? kept[p][i + h]
                                    : weights_of_line(type, at->lines + panel, i + h);
        if (kept && leads) kept[p][i + h] = line[h][p];
        if (leads && byte % LINE == 0) __builtin_prefetch(at->soon + panel + byte);
    }
}

// What group g adds to the sums of a tile, in eight steps of 4 columns.
//
// The first tile of a panel leads; up to ALL_LEAD all do. For those that follow it keeps, where a
// line is one register, the weights of q4 (a Xeon: 8 to 12 %), and where machines add beside their
// products, tables for add_sum (Zen 5: 3 to 5 %; for one or two tiles q8 would be 5 % slower).
// Which tile it is must be known when this is compiled: branches in its loop make a Xeon's prompts
// 10 % slower. A token takes AT_A_TIME steps before the next, so that sums end among products of
// others (two steps, Zen 5: 2 % faster, a Xeon 3 % slower).
INLINE void add_whole(f32v (*sum)[Q_TOKENS], const Slice *slice, Place at, int g, Type type,
                      const bool leads, const int T, const int P) {
    enum { H = AT_A_TIME };
    const bool pairs = PAIRS && type == Q4, follows = T == Q_TOKENS && !leads;
    const bool keeps = T == Q_TOKENS && leads && slice->in->n > ALL_LEAD * T;
    const bool known = TABLES && follows;
    const bool lines = type == Q4 && PARTS == 1 && (follows || keeps);
    f32v (*table)[8] = TABLES ? slice->own->table[g] : NULL, s[STREAMS];
    i32v whole[STREAMS][Q_TOKENS], line[H][STREAMS], q[H];
    UNROLL for (int p = 0; p < P; p++) {
        s[p] = load_f16((const void *)(at.scales + (size_t)p * at.step));
        if (TABLES && keeps)
            UNROLL for (int k = 0; k < 8; k++) table[p][k] = mul(s[p], spread((float)(k + 8) / 16));
        UNROLL for (int t = 0; t < T; t++)
            whole[p][t] = spread_int(pairs ? 0 : at.scale[t].start);
    }
    EACH_STEP {
        take_lines(line, &at, i, type, lines ? slice->own->line[g] : NULL, leads, P);
        UNROLL for (int t = 0; t < T; t++) {
            UNROLL for (int h = 0; h < H; h++)
                q[h] = spread_int((int32_t)read_u32(at.q + (size_t)t * GROUP + 4 * (i + h)));
            UNROLL for (int p = 0; p < P; p++) UNROLL for (int h = 0; h < H; h++)
                whole[p][t] = dot(whole[p][t], line[h][p], q[h], pairs);
            if (i + H == 8) UNROLL for (int p = 0; p < P; p++) {
                const Scale *x = at.scale + t;
                i32v w = pairs ? from_pairs(spread_int(x->start), whole[p][t]) : whole[p][t];
                sum[p][t] = add_sum(sum[p][t], w, x, known ? table[p] : s + p, known);
            }
        }
        if (T < Q_TOKENS)
            UNROLL for (int p = 0; p < P; p++) in_turn(&at.soon, &whole[p][0].p[0]);
    }
}
INLINE void send_for_line(const uint8_t *at, size_t step, const int P) {
    UNROLL for (int p = 0; p < P; p++) __builtin_prefetch(at + (size_t)p * step);
}

// A matrix whose type is known when this is compiled, and with it what Stride holds.
INLINE Tensor typed(const Tensor *w, Type type) {
    return (Tensor){type, w->rows, w->cols, w->interleaved, w->data};
}

// Two groups and their scales: where to go on from the first of them.
typedef struct { size_t lines, scales; } Stride;
static Stride stride_of(const Tensor *w) {
    return (Stride){lines_at(w, 2) - lines_at(w, 0), scales_at(w, 2) - scales_at(w, 0)};
}

// One token: panels `gap` apart (where that is past the last, the same again). Each is followed by
// its stream's next, so that a stream is read from its first byte to its last. Two groups at a
// time, so that each instruction that reads goes on by the same number of bytes (Zen 5: q8 3 %).
// What bounds it is how far ahead a core reaches, as instructions that wait for memory fill its
// queues. (A thread of Zen 5, share of what memory gives: these lines only XORed and not sent for,
// 100 %; with one or two more additions a line, 95 and 84; XORed and sent for, 97; this, 95.)
INLINE void q_streams(const Slice *slice, int panel, int gap, Type type, const int P) {
    const Tensor w = typed(slice->w, type);
    const int groups = (int)group_count(w.cols), last = (int)panel_count(w.rows) - 1;
    const size_t size = group_bytes(type), bytes = panel_bytes(type, w.cols);
    const size_t step = panel + (P - 1) * gap > last ? 0 : (size_t)gap * bytes;
    const Stride two = stride_of(&w);
    f32v sum[STREAMS][Q_TOKENS] = {0};
    Place at = place_of(slice, panel, step, ahead_of(slice->in, type, 1, two.lines), 0, 1);
    for (int g = 0; g < groups; g += 2, at = onward(at, two.lines, two.scales, 2, 1)) {
        add_whole(sum, slice, at, g, type, true, 1, P);
        if (g + 1 < groups)
            add_whole(sum, slice, onward(at, size, PANEL * 2, 1, 1), g + 1, type, true, 1, P);
        send_for_line(at.soon + 2 * size, step, P);  // of scales: between two groups and two
    }
    store_tile(slice, panel, gap, 0, sum, 1, P);
}

// T tokens from t0 on by panels side by side. The tile that leads sends for lines of the next
// panels where these end; the others each send for a share of them (5 %). One group at a time: by
// two, prompts on Zen 5 are 1 to 3 % slower (on 16 threads of a Xeon 3 % faster).
INLINE void q_tile(const Slice *slice, int panel, int t0, Type type, const bool leads, const int T,
                   const int P) {
    const Tensor w = typed(slice->w, type);
    const int groups = (int)group_count(w.cols), last = (int)panel_count(w.rows) - 1;
    const size_t size = group_bytes(type), bytes = panel_bytes(type, w.cols);
    const size_t step = panel + P - 1 > last ? 0 : bytes;
    const Stride two = stride_of(&w);
    const size_t ahead = ahead_of(slice->in, type, T, two.lines);
    const uint8_t *next = w.data + (size_t)panel * bytes + (size_t)P * step;
    const int turn = (groups + 1) / 2 * 2 - 2 * (int)(ahead / two.lines);
    f32v sum[STREAMS][Q_TOKENS] = {0};
    Place at = place_of(slice, panel, step, ahead, t0, T);
    if (!leads) send_for_out(slice, panel, t0, T, P);
    for (int g = 0; g < groups; g++) {
        const size_t odd = (size_t)(g & 1);
        if (g == turn) at.soon = next + lines_at(&w, 0);
        if (!leads) __builtin_prefetch(next + (size_t)((t0 / T - 1) * groups + g) * LINE, 0, 2);
        add_whole(sum, slice, at, g, type, leads, T, P);
        if (leads && odd) send_for_line(at.soon + size, step, P);
        at = onward(at, size + odd * (two.lines - 2 * size),
                    PANEL * 2 + odd * (two.scales - LINE), 1, T);
    }
    store_tile(slice, panel, 1, t0, sum, T, P);
}

// All tokens against a slice, the widest tile first; of the last tile some may not be there. One
// token takes STREAMS panels at once, each stream in order through its part of the slice, as memory
// gives more to who reads so than to who reads neighbours (Zen 5: q4 1.08 to 1.15, q8 1.01 to 1.05
// times faster, built for AVX2 1.05 and 1.1; a Xeon: no difference). What need not be is not built:
// a rest of few tokens is told that it leads, a PAIR of streams leaves no rest of panels.
INLINE void q_slice(const Slice *s, Type type) {
    enum { P = Q_PANELS, Q = Q_TOKENS, FEW = Q > 4 ? 4 : Q > 2 ? 2 : 0, PAIR = STREAMS == 2 };
    const int n = s->in->n, first = s->first / PANEL, end = (s->end - 1) / PANEL + 1;
    const int gap = n == 1 ? (end - first + PAIR) / STREAMS : 0;  // odd only where w ends
    const int lead = n > ALL_LEAD * Q ? Q : n;
    int p = first;
    for (; p < first + gap; p++) q_streams(s, p, gap, type, STREAMS);
    p = first + STREAMS * gap;
    for (; !PAIR && n == 1 && p < end; p += UNIT_PANELS) q_streams(s, p, 1, type, UNIT_PANELS);
    for (; p < end; p += P) {
        int t = 0;
        for (; n - t > FEW && t < lead; t += Q) q_tile(s, p, t, type, true, Q, P);
        for (; n - t > FEW; t += Q) q_tile(s, p, t, type, false, Q, P);
        if (FEW > 2 && n - t > 2) q_tile(s, p, t, type, true, 4, P), t += 4;
        if (FEW > 0 && n > t) q_tile(s, p, t, type, true, 2, P);
    }
}

// Float weights. Lane i of a product's 16 sums takes columns i, i + 16, ... Few tokens keep the 16
// in a vector, so that a row is read as it lies.

// A part of 16 weights; all 16, of which only the first n are in memory: the others are 0.
INLINE FloatPart load_part(Type type, const void *at) {
    if (type == F32) return (FloatPart)*(const LooseInts *)at;
    return type == BF16 ? wide_bf16(at) : wide_f16(at);
}
INLINE f32v load_weights(Type type, const void *at, int n) {
    uint8_t all[WIDTH * sizeof(float)] = {0};
    if (n < WIDTH) at = memcpy(all, at, row_bytes(type, n));
    MAP(f32v, load_part(type, (const char *)at + row_bytes(type, k * LANES)));
}

// Rows r, r + gap, r + 2 gap and r + 3 gap of a tensor; past the last, the last again.
INLINE void find_rows(const uint8_t **row, const Tensor *w, int r, int gap) {
    UNROLL for (int k = 0; k < F_ROWS; k++)
        row[k] = w->data + (size_t)least(r + k * gap, w->rows - 1) * row_bytes(w->type, w->cols);
}

// The columns of rows that make no whole vector, padded with zeros. Rows then are those.
typedef struct { uint8_t row[F_ROWS][WIDTH * sizeof(float)]; } Ends;
INLINE void cut_ends(Ends *e, const uint8_t **row, Type type, int cols) {
    const size_t bytes = row_bytes(type, cols % WIDTH), whole = row_bytes(type, cols) - bytes;
    *e = (Ends){0};
    UNROLL for (int k = 0; k < F_ROWS; k++) row[k] = memcpy(e->row[k], row[k] + whole, bytes);
}

// To sums, H parts of each, the products of T tokens, `apart` numbers from token to token, and
// F_ROWS rows at byte `at`.
INLINE void add_products(f32v (*sum)[F_ROWS], const float *x, size_t apart, const uint8_t **row,
                         size_t at, const Type type, const int T, const int H) {
    f32v v[F_TOKENS];
    UNROLL for (int t = 0; t < T; t++) UNROLL for (int j = 0; j < H; j++)
        v[t].p[j] = hold(load_part(F32, x + (size_t)t * apart + j * LANES));
    UNROLL for (int k = 0; k < F_ROWS; k++) UNROLL for (int j = 0; j < H; j++) {
        FloatPart u = hold(load_part(type, row[k] + at + row_bytes(type, j * LANES)));
        UNROLL for (int t = 0; t < T; t++)
            sum[t][k].p[j] = fused(u, v[t].p[j], sum[t][k].p[j]);
    }
}

// F_ROWS rows, r and others `gap` apart, by T tokens from t0 on, H parts of their vectors at a
// time: as many sums as registers hold. A gap is a quarter of the slice, as memory gives more to
// who reads four streams, each in order, than to who reads neighbours (one token, Zen 5: 1.2 to 1.3
// times faster in slices of 32 rows, then 1.06 to 1.4 in longer ones). Weights are sent for (1 or 2
// tokens of bf16: 1.1 or 1.9 times faster).
INLINE void float_tile(const Slice *p, int r, int gap, int t0, const Type type, const int T) {
    const Tensor *w = p->w;
    const int whole = w->cols / WIDTH, H = T == 1 ? PARTS : 1;
    const size_t apart = vector_count(w->cols) * WIDTH, step = row_bytes(type, WIDTH);
    const int skipped = r + 1 < p->first + gap ? 0 : (F_ROWS - 1) * gap;  // rows to the next slice
    const size_t beyond = (size_t)skipped * row_bytes(type, w->cols);
    const size_t ahead = ahead_of(p->in, type, T, 1);
    const uint8_t *row[F_ROWS];
    f32v all[F_TOKENS][F_ROWS];
    for (int h = 0; h < PARTS; h += H) {
        const float *x = p->in->vector + (size_t)t0 * apart + h * LANES;
        const size_t part = row_bytes(type, h * LANES);
        f32v sum[F_TOKENS][F_ROWS] = {0};
        find_rows(row, w, r, gap);
        for (int i = 0; i < whole; i++, x += WIDTH) {
            const size_t at = (size_t)i * step + part, left = (size_t)(whole - i) * step;
            const size_t to = at + ahead + (left > ahead ? 0 : beyond);
            add_products(sum, x, apart, row, at, type, T, H);
            UNROLL for (int k = 0; k < F_ROWS; k++) __builtin_prefetch(row[k] + to);
        }
        if (whole * WIDTH < w->cols) {
            Ends ends;
            cut_ends(&ends, row, type, w->cols);
            add_products(sum, x, apart, row, part, type, T, H);
        }
        UNROLL for (int t = 0; t < T; t++) UNROLL for (int k = 0; k < F_ROWS; k++)
            UNROLL for (int j = 0; j < H; j++) all[t][k].p[h + j] = sum[t][k].p[j];
    }
    UNROLL for (int t = 0; t < T; t++) {
        Four four = join4(all[t]);
        float *out = out_of(p, t0 + t, r);
        UNROLL for (int k = 0; k < F_ROWS; k++)
            if (r + k * gap < p->end) out[k * gap] = p->adds ? out[k * gap] + four[k] : four[k];
    }
}
INLINE void few_tokens(const Slice *p, const Type type) {
    const int n = p->in->n, T = F_TOKENS, gap = (p->end - p->first - 1) / F_ROWS + 1;
    for (int r = p->first, t; r < p->first + gap; r++) {
        for (t = 0; n - t >= T; t += T) float_tile(p, r, gap, t, type, F_TOKENS);
        for (; T > 2 && n - t >= 2; t += 2) float_tile(p, r, gap, t, type, 2);
        if (t < n) float_tile(p, r, gap, t, type, 1);
    }
}

// Many tokens take one lane after the other: its columns, a sixteenth of all, are a matrix of their
// own, where the lanes of vectors are rows and nothing is added across them. For this weights and
// inputs are turned: lane 0 of all vectors, then lane 1, ... What a strip of rows has of a lane
// fits the first cache, and inputs come in the order they lie in. (Zen 3: products are 95 % of the
// multiply-adds there are, turning included, and prompts of bf16 1.15 to 1.25 times faster than by
// tiles of columns; a Xeon: 1.16 to 1.25.)

// n vectors of 4 rows, from byte `at` on, become columns of a strip.
INLINE void turn_vectors(float *out, size_t apart, const uint8_t **row, size_t at, Type type,
                         int n) {
    for (int i = 0; i < n; i++, out += STRIP) UNROLL for (int h = 0; h < WIDTH; h += LANES) {
        FloatPart v[F_ROWS];
        UNROLL for (int k = 0; k < F_ROWS; k++)
            v[k] = load_part(type, row[k] + at + row_bytes(type, i * WIDTH + h));
        turn4(v);
        UNROLL for (int j = 0; j < LANES; j++)
            memcpy(out + (size_t)(h + j) * apart, (const Four *)&v[j % 4] + j / 4, sizeof(Four));
    }
}

// The strip from row r on, turned: some vectors of all rows at a time, so that the lines they go to
// stay in the first cache until they are full.
INLINE void turn_strip(const Slice *p, int r, const Type type) {
    enum { AT_ONCE = 4 };
    const int cols = p->w->cols, whole = cols / WIDTH;
    const size_t apart = strip_lane(cols);
    const uint8_t *row[F_ROWS];
    Ends ends;
    for (int i = 0; i * WIDTH < cols; i += AT_ONCE) for (int k = 0; k < STRIP; k += F_ROWS) {
        const int n = least(AT_ONCE, whole - i);
        float *turned = p->own->turned + i * STRIP + k;
        find_rows(row, p->w, r + k, 1);
        turn_vectors(turned, apart, row, row_bytes(type, i * WIDTH), type, n);
        if (n == AT_ONCE || whole * WIDTH == cols) continue;
        cut_ends(&ends, row, type, cols);
        turn_vectors(turned + n * STRIP, apart, row, 0, type, 1);
    }
}

// The strip by T tokens, of one lane. Lanes come in such an order, 0, 8, 4, 12, 2, .., that sums
// are joined as join does it as soon as there are two: what waits is a level, of 1, 2, 4, 8 lanes.
// Each tile sends for `share` lines of the next strip (Zen 3: 1.06 to 1.14 times faster), and for
// inputs wanted SOON (1.03 to 1.08).
INLINE void strip_tile(const Slice *p, int r, int j, int t0, int share, const int T) {
    enum { V = STRIP / WIDTH };
    const Inputs *in = p->in;
    const int lane = (j & 1) << 3 | (j & 2) << 1 | (j & 4) >> 1 | j >> 3;
    const size_t count = vector_count(in->cols);
    const float *w = p->own->turned + (size_t)lane * strip_lane(in->cols);
    const float *x = in->vector + (size_t)lane * input_lane(in->cols, in->n) +
                     tiled(count, S_TOKENS, t0, 0);
    const uint8_t *next = p->w->data + row_bytes(p->w->type, in->cols) * (size_t)(r + STRIP);
    f32v sum[S_TOKENS][V] = {0}, (*level)[V] = p->own->sums + t0;
    for (int i = share * (t0 / S_TOKENS * WIDTH + j), end = i + share; i < end; i++)
        __builtin_prefetch(next + (size_t)i * LINE, 0, 2);
    for (size_t i = 0; i < count; i++, w += STRIP, x += S_TOKENS) {
        f32v u[V];
        __builtin_prefetch(x + SOON);
        UNROLL for (int v = 0; v < V; v++) EACH_PART
            u[v].p[k] = hold(load_part(F32, w + v * WIDTH + k * LANES));
        UNROLL for (int t = 0; t < T; t++) {
            FloatPart of_token = hold(x[t] - (FloatPart){0});
            UNROLL for (int v = 0; v < V; v++) EACH_PART
                sum[t][v].p[k] = fused(u[v].p[k], of_token, sum[t][v].p[k]);
        }
    }
    for (int l = j; l & 1; l >>= 1, level += strip_tokens(in->n))
        UNROLL for (int t = 0; t < T; t++) UNROLL for (int v = 0; v < V; v++)
            sum[t][v] = add(level[t][v], sum[t][v]);
    UNROLL for (int t = 0; t < T; t++) UNROLL for (int v = 0; v < V; v++) {
        const int at = r + v * WIDTH;
        if (j < WIDTH - 1) level[t][v] = sum[t][v];
        else if (t0 + t < in->n) put(p, out_of(p, t0 + t, at), sum[t][v], most(0, p->end - at));
    }
}
// One function for all types, as turned weights are floats.
__attribute__((noinline)) static void multiply_strip(const Slice *p, int r, int share) {
    const int n = p->in->n, T = S_TOKENS;
    for (int j = 0; j < WIDTH; j++) {
        int t = 0;
        for (; n - t >= T; t += T) strip_tile(p, r, j, t, share, S_TOKENS);
        for (; t < n; t += REST) strip_tile(p, r, j, t, share, REST);
    }
}
INLINE void many_tokens(const Slice *p, const Type type) {
    const int n = p->in->n, T = S_TOKENS, tiles = (n - 1) / T + 1;
    const size_t lines = row_bytes(type, p->w->cols) * STRIP / LINE;
    const int share = (int)(lines / WIDTH / (size_t)tiles) + 1;
    for (int r = p->first; r < p->end; r += STRIP) {
        turn_strip(p, r, type);
        multiply_strip(p, r, share);
    }
}

INLINE void float_slice(const Slice *p, const Type type) {
    if (p->in->n < MANY) few_tokens(p, type);
    else many_tokens(p, type);
}

// Tiles inlined into what calls them keep sums in memory (gcc 12: 5 % slower): hence the table.
static void f32_slice(const Slice *p) { float_slice(p, F32); }
static void bf16_slice(const Slice *p) { float_slice(p, BF16); }
static void f16_slice(const Slice *p) { float_slice(p, F16); }
static void q8_slice(const Slice *p) { q_slice(p, Q8); }
static void q4_slice(const Slice *p) { q_slice(p, Q4); }
static void (*const multiply_slice[])(const Slice *p) = {
    [F32] = f32_slice, [BF16] = bf16_slice, [F16] = f16_slice, [Q8] = q8_slice, [Q4] = q4_slice};

// Where column i of a row's group lies among the group's lines, in which half of the byte if q4.
static size_t byte_of(Type type, int row, int i) {
    return (size_t)(i / (type == Q8 ? 4 : 8) * LINE + row % PANEL * 4 + i % 4);
}
static int shift_of(Type type, int i) { return type == Q8 ? 0 : i / 4 % 2 * 4; }
static int zero_of(Type type) { return type == Q8 ? 128 : Q4_ZERO; }

// One row as floats.
static void unpack_row(float *out, const Tensor *w, int row) {
    const uint8_t *at = w->data + (size_t)row * row_bytes(w->type, w->cols);
    for (int i = 0, left = w->cols; !is_quantized(w->type) && left > 0; i += WIDTH, left -= WIDTH)
        store_some(out + i, load_weights(w->type, at + row_bytes(w->type, i), left), left);
    if (!is_quantized(w->type)) return;
    const uint8_t *panel = w->data + (size_t)(row / PANEL) * panel_bytes(w->type, w->cols);
    for (int i = 0; i < w->cols; i++) {
        const size_t g = (size_t)(i / GROUP), lines = lines_at(w, g);
        int byte = panel[lines + byte_of(w->type, row, i % GROUP)] >> shift_of(w->type, i);
        uint16_t half;
        memcpy(&half, panel + scales_at(w, g) + row % PANEL * 2, sizeof half);
        out[i] = (float)((w->type == Q8 ? byte : byte & 15) - zero_of(w->type)) * widen_half(half);
    }
}

static int unit_count(int rows) { return (rows - 1) / GROUP + 1; }
// Some units of in(n, cols) w(rows, cols)^T, whose first number is out: the rows of the slice.
static void multiply_units(Slice s, int unit, int units) {
    s.first = unit * GROUP, s.end = least(s.first + units * GROUP, s.w->rows);
    multiply_slice[s.w->type](&s);
}

// Units of a slice, of those that are left: all for one token, whose weights come from memory.
// Those of many tokens come from the cache, where few fit.
static int slice_units(const Inputs *in, int left) { return in->n == 1 ? left : 1; }

// out(n, rows) = in(n, cols) w(rows, cols)^T, or += if it adds. Nearly all time goes here. Products
// by tensors that follow each other are done as one job, for fewer meetings of the threads.
typedef struct {
    const Tensor *w; float *out[3]; const Inputs *in; Scratch *scratch; bool adds;
} Matmul;
static void matmul_units(void *job, int thread, int first, int end) {
    const Matmul *m = job;
    Slice s = {.adds = m->adds, .w = m->w, .in = m->in, .own = &m->scratch[thread]};
    for (int i = first, before = 0, some, n; i < end; i += some) {
        while (i - before >= (n = unit_count(s.w->rows))) before += n, s.w++;
        s.out = m->out[s.w - m->w] + (i - before) * GROUP, s.stride = (size_t)s.w->rows;
        some = slice_units(m->in, least(end, before + n) - i);
        multiply_units(s, i - before, some);
    }
}
static void matmul(Pool *pool, Matmul *m) {
    int units = 0;
    for (int i = 0; i < 3 && m->out[i]; i++) units += unit_count(m->w[i].rows);
    parallel(pool, units, matmul_units, m);
}

// Packing: floats into panels.

// 32 weights as whole numbers times a scale, to q. Returns the squared error; *better becomes the
// scale that suits these whole numbers best, sum xq / sum qq, and *rest the squared error that it
// would leave, sum xx - (sum xq)^2 / sum qq.
static float round_group(float *q, const float *x, Type type, float scale, float *better,
                         float *rest) {
    f32v inverse = spread(scale != 0 ? 1 / scale : 0), s = spread(scale);
    f32v lowest = spread(type == Q8 ? -127 : -8), highest = spread(type == Q8 ? 127 : 7);
    f32v error = spread(0), xq = error, qq = error, xx = error;
    for (int i = 0; i < GROUP; i += WIDTH) {
        f32v v = load_f32(x + i), whole = greater_of(lowest, mul(v, inverse));  // not NaN
        whole = lesser_of(whole, highest);
        whole = sub(add(whole, spread(ROUNDER)), spread(ROUNDER));
        store_f32(q + i, whole);
        f32v off = sub(v, mul(whole, s));
        error = fma16(off, off, error), xx = fma16(v, v, xx);
        xq = fma16(v, whole, xq), qq = fma16(whole, whole, qq);
    }
    const Four sums = join4((f32v[]){error, xq, qq, xx});
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
    float plain = round_group(q, x, Q4, best, &better, &rest);
    for (int i = 0; i < 2 * 15; i++) {
        float steps = 5.5f + (float)(i / 2) * 0.25f;
        round_group(q, x, Q4, (i % 2 ? -peak : peak) / steps, &better, &rest);
        if (rest < least_rest) least_rest = rest, found = half_scale(better);
    }
    return round_group(q, x, Q4, found, &better, &rest) < plain ? found : best;
}

// A row of w, from floats padded to whole groups, to its panel of zeros; returns the squared error.
static double pack_row(uint8_t *panel, const Tensor *w, int row, const float *x) {
    double error = 0;
    for (size_t g = 0; g < group_count(w->cols); g++, x += GROUP) {
        float q[GROUP], better, rest, peak = 0;
        for (int i = 0; i < GROUP; i++) peak = fmaxf(peak, fabsf(x[i]));
        float scale = w->type == Q8 ? half_scale(peak / 127) : q4_scale(x, peak);
        uint16_t half = narrow_half(scale);
        error += round_group(q, x, w->type, scale, &better, &rest);
        memcpy(panel + scales_at(w, g) + row % PANEL * 2, &half, sizeof half);
        for (int i = 0; i < GROUP; i++)
            panel[lines_at(w, g) + byte_of(w->type, row, i)] |=
                (uint8_t)(((int)q[i] + zero_of(w->type)) << shift_of(w->type, i));
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

// A tile is A_QUERIES queries at most, with A_SUMS vectors of sums, which registers hold.
enum { BLOCK = 256, A_QUERIES = LANES == 16 ? 8 : 4, A_SUMS = LANES == 16 ? 16 : 4 };
static float *row(float *rows, int t, int width) { return rows + (size_t)t * (size_t)width; }

// Blocks lie as (slots, context / BLOCK, layers, kv_heads), so that a text fills memory from the
// front; in each the keys and then the values, as f16 for quantized models and f32 otherwise.
// head_pad is head_dim rounded up to 16:
//     keys    (BLOCK/16, head_pad, 16)   16 positions side by side: scores need no joining
//     values  (BLOCK, head_pad)
typedef struct {
    int context, head_dim, head_pad, sight;  // sight: positions that a query sees, its own included
    size_t heads;                            // layers * kv_heads
    bool half; void *blocks;
} Cache;
// Of head l * kv_heads + h.
static char *block_of(const Cache *c, int slot, size_t head, int pos) {
    size_t before = (size_t)slot * (size_t)(c->context / BLOCK) + (size_t)(pos / BLOCK);
    size_t first = (before * c->heads + head) * BLOCK;
    return (char *)c->blocks + first * 2 * (size_t)c->head_pad * (c->half ? 2 : 4);
}
static void cache_position(const Cache *c, int slot, size_t head, int pos, const float *k,
                           const float *v) {
    size_t in = (size_t)pos % BLOCK, pad = (size_t)c->head_pad, value = (BLOCK + in) * pad;
    size_t key = in / WIDTH * WIDTH * pad + in % WIDTH;
    uint16_t *halves = (void *)block_of(c, slot, head, pos);
    float *floats = (void *)halves;
    for (int i = 0; i < c->head_dim; i++, key += WIDTH)
        if (c->half) halves[key] = narrow_half(k[i]);
        else floats[key] = k[i];
    for (int i = 0; i < c->head_dim; i += WIDTH, value += WIDTH)
        if (c->half) store_f16(halves + value, load_some(v + i, c->head_dim - i));
        else store_f32(floats + value, load_some(v + i, c->head_dim - i));
}

// For each query j, vectors mixed: out(j, v) = sum over terms i of share(j, i) * vector(i, v). Its
// scores are columns of keys mixed by itself, its answer is values mixed by its weights.
typedef struct {
    float *out[A_QUERIES];
    const float *share[A_QUERIES];
    int terms; bool half;
    size_t step, apart;           // numbers from term to term, and from vector to vector
    const char *vectors, *ahead;  // and what is wanted next
} Mix;

// Vectors v0 to v0 + V. Meanwhile what is next of an f16 cache is sent for: a token of 1.1B q8 at
// depth 1,900 then takes 7 ms longer than at depth 0, without it 8 of 80.
INLINE void mix_tile(const Mix *m, int v0, const bool half, const int Q, const int V) {
    const size_t size = half ? 2 : 4;
    const char *from = m->vectors + (size_t)v0 * m->apart * size;
    const char *ahead = m->ahead + (size_t)v0 * (size_t)m->terms * WIDTH * size;
    f32v sum[A_QUERIES][4] = {0};
    for (int i = 0; i < m->terms; i++, from += m->step * size) {
        f32v vector[4];
        UNROLL for (int v = 0; v < V; v++) {
            const char *at = from + (size_t)v * m->apart * size;
            if (half && v % 2 == 0) __builtin_prefetch(ahead + (i * V + v) * WIDTH * 2, 0, 2);
            vector[v] = half ? load_f16((const void *)at) : load_f32((const void *)at);
        }
        UNROLL for (int j = 0; j < Q; j++) {
            f32v share = spread(m->share[j][i]);
            UNROLL for (int v = 0; v < V; v++) sum[j][v] = fma16(share, vector[v], sum[j][v]);
        }
    }
    UNROLL for (int j = 0; j < Q; j++)
        UNROLL for (int v = 0; v < V; v++) store_f32(m->out[j] + (v0 + v) * WIDTH, sum[j][v]);
}
INLINE void mix_tiles(const Mix *m, int n, const int Q, const int V) {
    int v = 0;
    for (; n - v >= V; v += V) m->half ? mix_tile(m, v, true, Q, V) : mix_tile(m, v, false, Q, V);
    for (; v < n; v++) m->half ? mix_tile(m, v, true, Q, 1) : mix_tile(m, v, false, Q, 1);
}

// All vectors, for as few queries as there are tiles for.
static void mix(const Mix *m, int count, int queries) {
    if (queries == 1)      mix_tiles(m, count, 1, 4);
    else if (queries <= 4) mix_tiles(m, count, 4, A_SUMS / 4);
    else                   mix_tiles(m, count, A_QUERIES, A_SUMS / A_QUERIES);
}

// What a query has gathered, numbers: the largest score, and relative to it the sum of weights and
// the mix of values (head_pad). Nothing: the sum is 0.
enum { PEAK, TOTAL, MIX };
static float exp_of(float x) { return exponential(spread(x)).p[0][0]; }

// b comes after a, is added to it and left empty.
static void merge(float *a, float *b, int head_dim) {
    if (a[TOTAL] == 0) memcpy(a, b, (size_t)(MIX + head_dim) * sizeof *a);
    else if (b[TOTAL] != 0) {
        float apart = a[PEAK] - b[PEAK], small = exp_of(-fabsf(apart));  // the larger peak's is 1
        float mine = apart < 0 ? small : 1, other = apart < 0 ? 1 : small;
        for (int i = TOTAL; i < MIX + head_dim; i++) a[i] = a[i] * mine + b[i] * other;
        a[PEAK] = apart < 0 ? b[PEAK] : a[PEAK];
    }
    b[TOTAL] = 0;
}

// n scores, whole vectors, of each of Q queries become weights relative to its largest score, which
// goes into what it found (`size` numbers a query) with their sum. (One query after the other waits
// for its own sums: Zen 5, 8 queries, 1.3 times slower.)
INLINE void weigh(float *found, int size, float (*w)[BLOCK], int n, const int Q) {
    f32v peaks[4], total[4] = {0}, base[4];
    UNROLL for (int j = 0; j < 4; j++) peaks[j] = spread(-INFINITY);
    for (int p = 0; p < n; p += WIDTH)
        UNROLL for (int j = 0; j < Q; j++) peaks[j] = greater_of(peaks[j], load_f32(w[j] + p));
    const Four peak = greatest4(peaks);
    UNROLL for (int j = 0; j < Q; j++) base[j] = spread(peak[j] > -INFINITY ? peak[j] : 0);
    for (int p = 0; p < n; p += WIDTH) UNROLL for (int j = 0; j < Q; j++) {
        f32v e = exponential(sub(load_f32(w[j] + p), base[j]));
        store_f32(w[j] + p, e);
        total[j] = add(total[j], e);
    }
    const Four sum = join4(total);
    UNROLL for (int j = 0; j < Q; j++, found += size) found[PEAK] = peak[j], found[TOTAL] = sum[j];
}

static void weigh_all(float *found, int size, float (*w)[BLOCK], int n, int queries) {
    int j = 0;
    for (; queries - j >= 4; j += 4) weigh(found + j * size, size, w + j, n, 4);
    for (; j < queries; j++) weigh(found + j * size, size, w + j, n, 1);
}

// Of n scores a query sees those from `first` to `end`; the others become what has no weight.
static void hide(float *w, int n, int first, int end) {
    for (int p = 0; p < least(first, n); p++) w[p] = -INFINITY;
    for (int p = most(0, end); p < n; p++) w[p] = -INFINITY;
}

// A head of a step, q (head_dim) scaled by 1/sqrt(head_dim), and what it has gathered so far.
typedef struct { const float *q; int pos; float *answer; } Query;

// n queries, the last of which is the furthest, gather what they see of the block from position
// `start` on: each what it finds there in `found`, then all in its answer.
static void look(const Query *q, int n, const Cache *c, const char *keys, int start, float *found) {
    const int pad = c->head_pad, size = MIX + pad, terms = least(BLOCK, q[n - 1].pos + 1 - start);
    const int vectors = (terms + WIDTH - 1) / WIDTH;
    const char *values = keys + BLOCK * row_bytes(c->half ? F16 : F32, pad);
    _Alignas(LINE) float weight[A_QUERIES][BLOCK];
    Mix scores = {.terms = c->head_dim, .half = c->half, .step = WIDTH,
                  .apart = (size_t)pad * WIDTH, .vectors = keys, .ahead = values};
    Mix mixes = {.terms = terms, .half = c->half, .step = (size_t)pad, .apart = WIDTH,
                 .vectors = values, .ahead = values + (values - keys)};
    if (terms <= 0) return;
    for (int j = 0; j < A_QUERIES; j++) {  // the last stands in for those that are missing
        int k = least(j, n - 1);
        scores.share[j] = q[k].q, mixes.share[j] = scores.out[j] = weight[k];
        mixes.out[j] = found + k * size + MIX;
    }
    mix(&scores, vectors, n);
    for (int j = 0; j < n; j++) {
        int end = q[j].pos + 1 - start;
        hide(weight[j], vectors * WIDTH, end - c->sight, end);
    }
    weigh_all(found, size, weight, vectors * WIDTH, n);
    mix(&mixes, pad / WIDTH, n);
    for (int j = 0; j < n; j++) merge(q[j].answer, found + j * size, c->head_dim);
}

// ------------------------------------------------------------------------------------------------
// 8. The transformer: tokens become hidden states, hidden states become logits

// A token on its way through the layers. Sequences in different slots do not see each other.
typedef struct { int id, slot, pos; } Step;
typedef struct State {
    const Model *model; Pool *pool;  // the first six are set before open_state
    int context, slots;     // positions a sequence has room for, and how many sequences
    int batch, logit_rows;  // steps in the layers at once, and logits kept at once, at most
    float *x;               // (batch, dim)     the residual stream
    Inputs in, gated;       // (batch, dim or q_dim), (batch, hidden_dim)  of the next product
    float *y;               // (batch, dim or q_dim)  rows on their way there
    float *q, *k, *v;       // (batch, heads, head_dim)  q in the room of y
    float *angles;          // (batch, 2, head_dim/2)    cosines and sines
    float *logits;          // (logit_rows, vocab)
    float *answers;         // (records, heads, MIX + head_pad)  empty but inside attend
    Scratch *scratch;       // (threads)
    Cache cache;            // (slots, layers, kv_heads)
    Arena arena;
    const Step *steps;      // (n)  what goes through
    int n, l, run, parts, records;  // l: the layer; the others: see attend
    const Tensor *norm;     // weight of the next norm
    void (*work)(struct State *s, int t);  // of each_row
} State;
static int widest(const Config *c) { return most(most(c->dim, c->hidden_dim), q_dim(c)); }
static const float *vector(const Tensor *w) { return (const float *)(const void *)w->data; }
static Inputs deal_inputs(Arena *a, Type type, int n, int cols, size_t model_bytes) {
    const size_t q = is_quantized(type) ? round_up((size_t)n, Q_TOKENS) * group_count(cols) : 0;
    const size_t f = is_quantized(type) ? 0 : input_lane(cols, n);
    return (Inputs){type, cols, n, model_bytes <= HELD, DEAL(a, float, f * WIDTH),
                    DEAL(a, int8_t, q * GROUP), DEAL(a, Scale, q)};
}
static Scratch deal_scratch(Arena *a, const Config *c, int n, size_t answer) {
    const size_t q = is_quantized(c->type), f = !q;
    const size_t groups = q * group_count(widest(c)), one = sizeof(f32v) * Q_PANELS;
    const size_t gate = GROUP * (size_t)most(n, (int)group_count(c->hidden_dim));
    return (Scratch){DEAL(a, float, f * WIDTH * strip_lane(widest(c))),
                     deal(a, f * 4 * strip_tokens(n), STRIP * sizeof(float)),
                     deal(a, TABLES * groups, 8 * one),
                     deal(a, c->type == Q4 ? groups : 0, 8 * one),
                     DEAL(a, float, 2 * gate), DEAL(a, float, A_QUERIES * answer)};
}

// Every array of the state, once to add up the sizes and once to deal them out.
static void lay_out(State *s, Arena *a) {
    const Config *c = &s->model->config;
    const int pad = (int)round_up((size_t)c->head_dim, WIDTH), wide = most(c->dim, q_dim(c));
    const int context = (int)round_up((size_t)s->context, BLOCK);
    size_t batch = (size_t)s->batch, answer = (size_t)(MIX + pad);
    size_t heads = (size_t)c->n_layers * (size_t)c->n_kv_heads;
    s->x = DEAL(a, float, batch * (size_t)c->dim);
    s->q = s->y = DEAL(a, float, batch * (size_t)wide);
    s->k = DEAL(a, float, batch * (size_t)kv_dim(c));
    s->v = DEAL(a, float, batch * (size_t)kv_dim(c));
    s->in = deal_inputs(a, c->type, s->batch, wide, s->model->file.size);
    s->gated = deal_inputs(a, c->type, s->batch, c->hidden_dim, s->model->file.size);
    s->angles = DEAL(a, float, batch * (size_t)c->head_dim);
    s->logits = DEAL(a, float, (size_t)s->logit_rows * (size_t)c->vocab_size);
    s->records = most(s->batch, least(s->batch + context / BLOCK, INT_MAX / c->n_kv_heads));
    s->answers = DEAL(a, float, (size_t)s->records * (size_t)c->n_heads * answer);
    s->cache = (Cache){context, c->head_dim, pad, least(c->window ? c->window : context, context),
                       heads, is_quantized(c->type), NULL};
    s->cache.blocks = deal(a, (size_t)s->slots * heads,
                           (size_t)context * 2 * (size_t)pad * (s->cache.half ? 2 : 4));
    s->scratch = DEAL(a, Scratch, (size_t)s->pool->threads);
    for (int i = 0; i < s->pool->threads; i++) {
        Scratch own = deal_scratch(a, c, s->batch, answer);
        if (a->at) s->scratch[i] = own;
    }
}

// Bytes that a state of this size may come to touch.
static double state_bytes(State s) { Arena a = {0}; lay_out(&s, &a); return a.used; }

// Large pages serve models that no cache holds (Zen 5 as a virtual machine: prompts of q8 2 to 4 %,
// of bf16 4 to 5 % faster, decoding at 1,900 4 to 14 %).
static void open_state(State *s) {
    bool held = s->model->file.size <= HELD;
    s->arena = open_arena(state_bytes(*s), !held, "; a smaller context (-c) helps");
    lay_out(s, &s->arena);
}
static void close_state(State *s) { close_arena(&s->arena); }

// Steps at once: enough that weights read once serve many, in 15 MB; in 30 with many threads, whose
// meetings take long (16 threads: 6 % faster), and with float weights, whose turning then serves
// more (2 threads of bf16: 7 %; q8 gains nothing).
static int default_batch(const Config *c, const Pool *p) {
    size_t room = (is_quantized(c->type) && p->threads <= 4 ? 15u : 30u) << 20;
    size_t row_size = sizeof(float) * ((size_t)widest(c) + 4 * (size_t)c->dim);
    return most(48, least(528, (int)(room / row_size / 24 * 24)));  // whole tiles of 6, 8 and 12
}

// Work on the rows of a batch, one row a token.
static void do_rows(void *job, int thread, int first, int end) {
    State *s = job;
    (void)thread;
    for (int t = first; t < end; t++) s->work(s, t);
}
static void each_row(State *s, void (*work)(State *s, int t)) {
    s->work = work;
    parallel(s->pool, s->n, do_rows, s);
}

// Angle per position of RoPE pair i: theta^(-2i / head_dim) (Su et al. 2021, 3.4.2), slowed down
// for contexts longer than trained on: all of them by a factor, or as Llama 3.1 does, only those
// whose wave is long against the original context, with a ramp between the two.
static double rope_frequency(const Config *c, int i) {
    double f = pow((double)c->rope_theta, -2.0 * i / c->head_dim);
    if (c->scaling != LLAMA3) return c->scaling == LINEAR ? f / (double)c->factor : f;
    double waves = c->original_context * f / (2 * 3.14159265358979323846);
    double low = (double)c->low_freq_factor, high = (double)c->high_freq_factor;
    double keep = waves < low ? 0 : waves > high ? 1 : (waves - low) / (high - low);
    return keep * f + (1 - keep) * f / (double)c->factor;
}

// x = the embedding; cosines and sines of the position
static void enter_row(State *s, int t) {
    const Config *c = &s->model->config;
    float *angles = row(s->angles, t, c->head_dim);
    unpack_row(row(s->x, t, c->dim), &s->model->layers[0][EMBEDDING], s->steps[t].id);
    for (int i = 0; i < c->head_dim / 2; i++) {
        double angle = s->steps[t].pos * rope_frequency(c, i);
        angles[i] = (float)cos(angle), angles[i + c->head_dim / 2] = (float)sin(angle);
    }
}

// out = x / rms(x) * weight, rms(x) = sqrt(mean of squares + eps) (Zhang & Sennrich 2019).
static void rmsnorm(float *out, const float *x, const Tensor *weight, float eps) {
    f32v squares = spread(0);
    int n = weight->cols;
    for (int i = 0; i < n; i += WIDTH)
        squares = fma16(load_some(x + i, n - i), load_some(x + i, n - i), squares);
    float scale = 1 / sqrtf(join(squares) / (float)n + eps);
    for (int i = 0; i < n; i++) out[i] = x[i] * scale * vector(weight)[i];
}

// in = norm(x)
static void norm_row(State *s, int t) {
    const Config *c = &s->model->config;
    float *y = row(s->y, t, c->dim);
    rmsnorm(y, row(s->x, t, c->dim), s->norm, c->norm_eps);
    prepare_row(&s->in, t, y);
}

// h1 = silu(h1) * h2, silu(x) = x / (1 + e^-x) (Shazeer 2020): n numbers in whole vectors.
static void swiglu(float *h1, const float *h2, int n) {
    for (int i = 0; i < n; i += WIDTH) {
        f32v gate = load_f32(h1 + i), up = load_f32(h2 + i);
        f32v bottom = add(spread(1), exponential(sub(spread(0), gate)));
        store_f32(h1 + i, mul(over(gate, bottom), up));
    }
}

// gated = swiglu(w1 in, w3 in). Columns become inputs where they are made: prompts are 2 to 4 %
// faster than by way of whole rows.
static void gate_units(void *job, int thread, int first, int end) {
    State *s = job;
    const Tensor *w1 = &s->model->layers[s->l][W1], *w3 = &s->model->layers[s->l][W3];
    Slice slice = {.in = &s->in, .own = &s->scratch[thread]};
    for (int i = first, some; i < end; i += some) {
        some = slice_units(&s->in, end - i);
        const int rows = some * GROUP, cols = least(rows, w1->rows - i * GROUP);
        float *h1 = slice.own->gate, *h2 = row(h1, s->n, rows);
        slice.stride = (size_t)rows;
        slice.out = h1, slice.w = w1, multiply_units(slice, i, some);
        slice.out = h2, slice.w = w3, multiply_units(slice, i, some);
        swiglu(h1, h2, s->n * rows);
        prepare(&s->gated, 0, s->n, i * GROUP, h1, rows, cols);
    }
}

// Turn each pair of a head by its angle: (a, b) becomes (a cos - b sin, a sin + b cos). A query and
// a key turned so meet in a product that depends only on how far apart they are (Su et al. 2021).
static void rotate(float *head, const float *angles, const Config *c) {
    bool neighbours = c->flags & NEIGHBOURS;
    int pairs = c->head_dim / 2, step = neighbours ? 2 : 1, apart = neighbours ? 1 : pairs;
    for (int i = 0; i < pairs; i++) {
        float *a = head + i * step, *b = a + apart, x = *a, y = *b;
        *a = x * angles[i] - y * angles[pairs + i];
        *b = x * angles[pairs + i] + y * angles[i];
    }
}
static void add_bias(float *x, const Tensor *bias) {  // of 0 columns if the model has none
    for (int i = 0; i < bias->cols; i++) x[i] += vector(bias)[i];
}
static size_t cache_head(const State *s, int kv_head) {
    return (size_t)s->l * (size_t)s->model->config.n_kv_heads + (size_t)kv_head;
}

// Biases and norms of a row's heads, if the model has them, and turns.
static void turn_heads(const State *s, int t, float *x, int heads, SlotId bias, SlotId norm) {
    const Config *c = &s->model->config;
    const Tensor *w = s->model->layers[s->l];
    add_bias(x, &w[bias]);
    for (int h = 0; h < heads; h++, x += c->head_dim) {
        if (c->flags & HEAD_NORMS) rmsnorm(x, x, &w[norm], c->norm_eps);
        rotate(x, row(s->angles, t, c->head_dim), c);
    }
}

// Queries are turned and divided by sqrt(head_dim); keys, turned, and values go to the cache.
static void place_row(State *s, int t) {
    const Config *c = &s->model->config;
    float *q = row(s->q, t, q_dim(c)), *k = row(s->k, t, kv_dim(c)), *v = row(s->v, t, kv_dim(c));
    turn_heads(s, t, q, c->n_heads, BQ, Q_NORM);
    for (int i = 0; i < q_dim(c); i++) q[i] *= 1 / sqrtf((float)c->head_dim);
    turn_heads(s, t, k, c->n_kv_heads, BK, K_NORM);
    add_bias(v, &s->model->layers[s->l][BV]);
    const Step *step = &s->steps[t];
    for (int h = 0; h < c->n_kv_heads; h++, k += c->head_dim, v += c->head_dim)
        cache_position(&s->cache, step->slot, cache_head(s, h), step->pos, k, v);
}

// What a step's head has gathered from one of the parts of its blocks.
static float *answer_at(const State *s, int t, int part, int head) {
    int size = MIX + s->cache.head_pad;
    return row(row(s->answers, t * s->parts + part, s->model->config.n_heads * size), head, size);
}
static Query query_of(const State *s, int t, int part, int head) {
    const Config *c = &s->model->config;
    const float *q = row(s->q, t, q_dim(c)) + head * c->head_dim;
    return (Query){q, s->steps[t].pos, answer_at(s, t, part, head)};
}

// An item is `run` steps in a row of one sequence, every parts-th block and a key/value head.
static void attend_items(void *job, int thread, int first, int end) {
    State *s = job;
    const Config *c = &s->model->config;
    const int group = c->n_heads / c->n_kv_heads;
    for (int item = first; item < end; item++) {
        int kv_head = item % c->n_kv_heads, part = item / c->n_kv_heads % s->parts;
        int t = item / c->n_kv_heads / s->parts * s->run, n = least(s->run, s->n - t);
        int slot = s->steps[t].slot, pos = s->steps[t].pos, queries = n * group;
        for (int i = part; i * BLOCK < pos + n; i += s->parts) {
            if ((i + 1) * BLOCK <= pos + 1 - s->cache.sight) continue;
            const char *block = block_of(&s->cache, slot, cache_head(s, kv_head), i * BLOCK);
            Query q[A_QUERIES];
            for (int j = 0, k = 0; j < queries; j++) {
                q[k++] = query_of(s, t + j / group, part, kv_head * group + j % group);
                if (k < A_QUERIES && j + 1 < queries) continue;
                look(q, k, &s->cache, block, i * BLOCK, s->scratch[thread].found), k = 0;
            }
        }
    }
}

// in = the answers: parts merged in order, mixes divided by their totals. Leaves them empty.
static void finish_row(State *s, int t) {
    const Config *c = &s->model->config;
    float *y = row(s->y, t, q_dim(c)), *out = y;
    for (int h = 0; h < c->n_heads; h++, out += c->head_dim) {
        float *whole = answer_at(s, t, 0, h);
        for (int p = 1; p < s->parts; p++) merge(whole, answer_at(s, t, p, h), c->head_dim);
        float share = 1 / whole[TOTAL];
        for (int i = 0; i < c->head_dim; i++) out[i] = whole[MIX + i] * share;
        whole[TOTAL] = 0;
    }
    prepare_row(&s->in, t, y);
}

// in = attention of the queries over the cache. Steps run together if all are neighbours, and each
// block is an item of its own while there are records enough.
static void attend(State *s) {
    enum { WORTH_SHARING = 1 << 15 };  // multiply-adds, about as long as a meeting of the threads
    const Config *c = &s->model->config;
    const Step *first = s->steps;
    int deepest = 0, heads = c->n_kv_heads;
    s->run = most(1, least(128 * heads / c->n_heads, s->n * heads / (4 * s->pool->threads)));
    for (int t = 0; t < s->n; t++) {
        deepest = most(deepest, first[t].pos);
        if (first[t].slot != first->slot || first[t].pos != first->pos + t) s->run = 1;
    }
    s->parts = deepest / BLOCK + 1;
    if (s->n * s->parts > s->records) s->parts = 1;
    int items = (s->n + s->run - 1) / s->run * heads * s->parts;
    if ((double)s->n * deepest * q_dim(c) < WORTH_SHARING) attend_items(s, 0, 0, items);
    else parallel(s->pool, items, attend_items, s);
    s->in.cols = q_dim(c);
    each_row(s, finish_row);
}
static void normalize(State *s, const Tensor *weight) {
    s->norm = weight, s->in.cols = weight->cols;
    each_row(s, norm_row);
}

// A view of rows first to end, for which `in`, `gated` and y begin anew.
static State rows_of(const State *s, int first, int end) {
    const Config *c = &s->model->config;
    State view = *s;
    view.x = row(s->x, first, c->dim), view.q = row(s->q, first, q_dim(c));
    view.steps = s->steps + first, view.n = view.in.n = view.gated.n = end - first;
    return view;
}

// n <= batch steps go through the layers into the cache; x are then the hidden states of those from
// `first` on. The last layer makes only keys and values of the others (prompts 4 %).
static void forward(State *s, const Step *steps, int n, int first) {
    assert(n >= 1 && n <= s->batch && first >= 0 && first <= n);
    s->steps = steps, s->n = s->in.n = n;
    each_row(s, enter_row);
    for (s->l = 0; s->l < s->model->config.n_layers; s->l++) {
        const Tensor *w = s->model->layers[s->l];
        normalize(s, &w[ATTENTION_NORM]);
        matmul(s->pool, &(Matmul){&w[WQ], {s->q, s->k, s->v}, &s->in, s->scratch, false});
        each_row(s, place_row);
        int from = s->l + 1 < s->model->config.n_layers ? 0 : first;
        if (from == n) break;
        State rows = rows_of(s, from, n);
        attend(&rows);
        matmul(s->pool, &(Matmul){&w[WO], {rows.x}, &rows.in, s->scratch, true});
        normalize(&rows, &w[FFN_NORM]);
        parallel(s->pool, unit_count(w[W1].rows), gate_units, &rows);
        matmul(s->pool, &(Matmul){&w[W2], {rows.x}, &rows.gated, s->scratch, true});
    }
}

// (n, vocab) scores of the tokens that may follow steps first to first + n of the last forward().
static float *logits(const State *s, int first, int n) {
    State rows = rows_of(s, first, first + n);
    assert(n >= 1 && n <= s->logit_rows);
    normalize(&rows, &s->model->layers[0][FINAL_NORM]);
    const Tensor *w = &s->model->layers[0][CLASSIFIER];
    matmul(s->pool, &(Matmul){w, {s->logits}, &rows.in, s->scratch, false});
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
enum { OTHER = 1, LETTER = 2, NUMBER = 4, WHITE = 8, SPACE = 16, LINE_END = 32, END = 64 };
enum {
    UNICODE = 0x110000,          // codes end here; behind are those of bytes in no character
    CUT_SHORT = UNICODE + 256, CODES = CUT_SHORT + 256,
    SYLLABLES = 19 * 21 * 28,    // of Hangul: leading, vowel and trailing letters or none
    DEEPEST_COMPOSITION = 8,     // Unicode needs 3
    MOST_MARKS = 255,            // a mark moves over; Unicode's Stream-Safe Text has 30 in a row
    MOST_PROBES = 512,           // so no file makes a lookup slow; honest ones need fewer than 100
    NONE = INT_MAX, MOST_ENDS = 16, LONGEST_USER_DEFINED = 255,  // NONE: no token
};

// How the file begins. Merges (left, right, joined), classes and marks (first code, value) and
// compositions (whole, first, second) follow as rows of u32, then the tokens.
typedef struct {
    char magic[8];
    uint32_t version, kind, n_tokens, flags, rule, chat;
    int32_t bos, unknown;  // ids, -1: none
    uint32_t n_ends;
    int32_t ends[MOST_ENDS];
    uint32_t n_merges, n_classes, n_marks, n_compositions;
    uint8_t zero[124];
    uint64_t size;  // of the file
} TokenizerHeader;

// n bytes, not a C string; those of llama2.c's <0xHH> are `byte`.
typedef struct { const char *at; size_t n; uint32_t type; char byte; } Token;
typedef struct {
    File file;                  // stays mapped: the bytes of tokens are used where they lie
    TokenizerHeader header;
    Token *token;               // (n_tokens)
    int byte_token[256];        // what a byte alone becomes, or NONE
    struct Entry { uint64_t key, value; } *entry;  // (mask + 1) a hash table; value 0: free
    size_t mask;
    uint8_t *class, *mark;      // (CODES) OTHER is 1 << 0, ..; canonical combining class, for NFC
    Arena arena;                // holds the four
    uint8_t user_defined[256];  // length of the longest such token that begins with this byte
    bool joined[256][256];      // whether some token has these two bytes side by side
} Tokenizer;

// What an id stands for: no bytes for what is never text.
static Token piece(const Tokenizer *t, int id) {
    Token k = (uint32_t)id < t->header.n_tokens ? t->token[id] : (Token){.at = ""};
    if (k.type == CONTROL || k.type == UNKNOWN) k.n = 0;
    return k;
}

// Whether the model says with this id that its text is over.
static bool ends_text(const Tokenizer *t, int id) {
    bool ends = id >= 0 && id == t->header.bos;
    for (uint32_t i = 0; i < t->header.n_ends; i++) ends |= id == t->header.ends[i];
    return ends;
}
static bool spells(Token k, const void *p, size_t n) { return k.n == n && !memcmp(k.at, p, n); }

// The id of the control token with this name, -1 if there is none.
static int find_control(const Tokenizer *t, const char *name, size_t n) {
    int id = (int)t->header.n_tokens - 1;
    while (id >= 0 && !(t->token[id].type == CONTROL && spells(t->token[id], name, n))) id--;
    return id;
}

// What is looked up, by key: for
//     hash of a token       priority, id     the smallest priority is joined first
//     left, right token     priority, joined
//     APART | code, 0       first, second character
//     TOGETHER | first, second the character
enum { TOGETHER = 1 << 24, APART = 1 << 25 };  // above any id and code
static const uint64_t no_bytes = 0xCBF29CE484222325;  // the hash of
static uint64_t pair(uint32_t first, uint32_t second) { return (uint64_t)first << 32 | second; }

// FNV-1a of bytes that follow those of hash h; the upper bit tells it from the other keys.
static uint64_t hash(uint64_t h, const void *bytes, size_t n) {
    for (const uint8_t *p = bytes; n > 0; n--) h = (h ^ *p++) * 0x100000001B3 | 1ull << 63;
    return h;
}

// The entry of a key, or the free one where it belongs.
static struct Entry *probe(const Tokenizer *t, uint64_t key) {
    const uint64_t odd = 0x9E3779B97F4A7C15, mixed = key * odd;  // 2^64 / golden ratio
    const uint64_t h = (mixed ^ mixed >> 32) * odd >> 32;
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
    uint64_t found = find(t, hash(no_bytes, bytes, n));
    return found && spells(t->token[(uint32_t)found], bytes, n) ? found : 0;
}

// The code at *at, which moves on; of a byte outside any character UNICODE + byte, or CUT_SHORT +
// byte if all up to `end` may begin one. (The Unicode Standard, table 3-7.)
static uint32_t next_code(const uint8_t **at, const uint8_t *end) {
    const uint8_t *p = (*at)++, first = *p++;
    uint8_t least = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;  // of the second byte
    uint8_t most = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
    int more = first < 0x80 ? 0 : first < 0xE0 ? 1 : first < 0xF0 ? 2 : 3;
    uint32_t code = more ? first & (0x3F >> more) : first;
    if ((first >= 0x80 && first < 0xC2) || first > 0xF4) return UNICODE + first;
    for (; more > 0; more--, least = 0x80, most = 0xBF) {
        if (p == end) return CUT_SHORT + first;
        if (*p < least || *p > most) return UNICODE + first;
        code = code << 6 | (*p++ & 0x3F);
    }
    *at = p;
    return code;
}

static void append_code(Bytes *out, uint32_t code) {
    size_t n = code < 0x80 || code >= UNICODE ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    char c[4];
    for (size_t i = n; i-- > 1; code >>= 6) c[i] = (char)(0x80 | (code & 0x3F));
    c[0] = (char)(n > 1 ? 0xF00 >> n | code : code);  // the low byte of UNICODE is 0
    append(out, c, n);
}

static void check_header(const File *f, const TokenizerHeader *h, int vocab_size) {
    double last = h->n_tokens - 1.0;
    check(f, "version", h->version, 1, 1);
    check(f, "size in the header", (double)h->size, (double)f->size, (double)f->size);
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

// Tokens fill the file from `at` on: score, type, length, bytes. llama2.c's leaves the type to the
// id, and writes bytes as <0xHH>. Text can become those that are not of a special type.
static void read_tokens(Tokenizer *t, size_t at, bool own) {
    const File *f = &t->file;
    uint32_t count = t->header.n_tokens, head = own ? 12 : 8;
    for (uint32_t id = 0; id < count; id++) {
        const uint8_t *start = f->at + at, *p = start + head;
        size_t n = at + head > f->size ? 0 : read_u32(p - 4);
        at += head + (own ? round_up(n, 4) : n);
        if (at > f->size || (id + 1 == count && at != f->size))
            die("%s: token %u of %u ends at byte %zu, the file at %zu; is it this model's?",
                f->path, id, count, at, f->size);
        float score = read_f32(start) + 0.0f;  // -0 is 0
        uint32_t bits = read_u32(&score), priority = bits >> 31 ? bits : ~bits & INT32_MAX;
        uint32_t type = own ? read_u32(start + 4) : id == 0 ? UNKNOWN : id < 3 ? CONTROL : NORMAL;
        Token *k = &t->token[id];
        *k = (Token){(const char *)p, n, type, 0};
        if (!own && id - 3 < 256 && n == 6 && memcmp(p, "<0x", 3) == 0)
            *k = (Token){&k->byte, 1, BYTE, (char)(id - 3)};
        if (type < NORMAL || type > BYTE || score != score || (n == 0) != (type == UNUSED)
            || (type == BYTE && n > 1) || (type == USER_DEFINED && n > LONGEST_USER_DEFINED))
            die("%s: token %u: type %u of 1 to 6, score %g, %zu bytes, of which type 4 has 1 to "
                "%d, 5 none, 6 one", f->path, id, type, (double)score, n, LONGEST_USER_DEFINED);
        if (k->type != NORMAL && k->type != USER_DEFINED) continue;
        for (size_t i = 1; i < n; i++) t->joined[p[i - 1]][p[i]] = true;
        if (type == USER_DEFINED && n > t->user_defined[*p]) t->user_defined[*p] = (uint8_t)n;
        enter(t, hash(no_bytes, p, n), pair(priority, id));
    }
    for (uint32_t id = 0; id < count; id++)  // last, as other tokens of one byte go before
        if (t->token[id].type == BYTE) enter(t, hash(no_bytes, t->token[id].at, 1), pair(1, id));
    for (int b = 0; b < 256; b++) {
        uint64_t found = find_token(t, &(uint8_t){(uint8_t)b}, 1);
        t->byte_token[b] = found ? (int)found : NONE;  // byte-level text rarely needs all
        if (!found && t->header.kind == SENTENCEPIECE) die("%s: no token for byte %d", f->path, b);
    }
}

// Each row must join two tokens to the one that has the bytes of both.
static void read_merges(Tokenizer *t, const uint32_t *row) {
    for (uint32_t i = 0; i < t->header.n_merges; i++, row += 3) {
        Token a = piece(t, (int)row[0]), b = piece(t, (int)row[1]), both = piece(t, (int)row[2]);
        if (!a.n || !b.n || both.n != a.n + b.n || memcmp(both.at, a.at, a.n)
            || memcmp(both.at + a.n, b.at, b.n))
            die("%s: merge %u joins tokens %u and %u to %u, which has not the bytes of both",
                t->file.path, i, row[0], row[1], row[2]);
        enter(t, pair(row[0], row[1]), pair(i + 1, row[2]));
    }
}

// Rows of (first code, value), each valid up to the next, as one value a code.
static void read_runs(uint8_t *values, const File *f, const uint32_t *row, uint32_t rows,
                      int most) {
    check(f, "first code of a table of characters", rows ? row[0] : UNICODE, 0, 0);
    for (uint32_t i = 0; i < rows; i++, row += 2) {
        uint32_t end = i + 1 < rows ? row[2] : UNICODE;
        check(f, "next code of a table of characters", end, row[0] + 1.0, UNICODE);
        check(f, "value in a table of characters", row[1], 0, most);
        memset(values + row[0], (int)row[1], end - row[0]);
    }
}

// The rows of the file, and Hangul, which it leaves out.
static void read_compositions(Tokenizer *t, const uint32_t *row) {
    const uint32_t n = t->header.n_compositions, never = 1u << 31;  // these are not composed
    for (uint32_t i = 0; i < n + SYLLABLES; i++) {
        uint32_t s = i - n, last = s % 28, whole = 0xAC00 + s;
        uint32_t hangul[] = {whole, last ? whole - last : 0x1100 + s / 588,
                             last ? 0x11A7 + last : 0x1161 + s / 28 % 21};
        const uint32_t *r = i < n ? row + 3 * (size_t)i : hangul;
        uint32_t codes[] = {r[0] & ~never, r[1], r[2]};
        for (int k = 0; k < 3; k++) check(&t->file, "composition's code", codes[k], 0, UNICODE - 1);
        enter(t, pair(APART | codes[0], 0), pair(codes[1], codes[2]));
        if (r[0] == codes[0]) enter(t, pair(TOGETHER | codes[1], codes[2]), codes[0]);
    }
}

// As lay_out does: once to add up the sizes, once to deal them out.
static void lay_out_tables(Tokenizer *t, Arena *a) {
    t->token = DEAL(a, Token, t->header.n_tokens);
    t->entry = DEAL(a, struct Entry, t->mask + 1);
    t->class = DEAL(a, uint8_t, t->header.rule ? CODES : 0);
    t->mark = DEAL(a, uint8_t, t->header.flags & NFC ? CODES : 0);
}

// Our format, with at most the tokens that the model has, or llama2.c's, with exactly them.
static Tokenizer open_tokenizer(const char *path, int vocab_size) {
    Tokenizer t = {.file = open_file(path, "tokenizer"), .mask = 15};
    const File *f = &t.file;
    TokenizerHeader *h = &t.header;
    bool own = f->size >= sizeof *h && memcmp(f->at, "LLAMA02T", 8) == 0;
    *h = (TokenizerHeader){.version = 1, .n_tokens = (uint32_t)vocab_size, .size = f->size,
                           .flags = ADDS_BOS | DUMMY_PREFIX, .bos = 1, .n_ends = 1, .ends = {2}};
    if (own) memcpy(h, f->at, sizeof *h);
    check_header(f, h, vocab_size);
    size_t start = own ? sizeof *h : 4;  // llama2.c's longest length: not needed
    size_t classes = 3 * (size_t)h->n_merges, marks = classes + 2 * (size_t)h->n_classes;
    size_t compositions = marks + 2 * (size_t)h->n_marks;
    size_t words = compositions + 3 * (size_t)h->n_compositions, tokens = start + 4 * words;
    check(f, "number of bytes in front of the tokens", (double)tokens, 0, (double)f->size);
    size_t wanted = words + 2 * (size_t)h->n_tokens + (h->flags & NFC ? 3 * SYLLABLES : 0);
    while (t.mask < wanted) t.mask += t.mask + 1;  // a row of 3 words has 2 keys at most: 2/3 full
    lay_out_tables(&t, &t.arena);
    t.arena = open_arena(t.arena.used, true, "");
    lay_out_tables(&t, &t.arena);
    const uint32_t *rows = (const void *)(f->at + start);
    read_tokens(&t, tokens, own);
    read_merges(&t, rows);
    if (h->rule) {
        read_runs(t.class, f, rows + classes, h->n_classes, 3);
        t.class[' '] = 4, t.class['\n'] = t.class['\r'] = 5;
    }
    if (h->flags & NFC) {
        read_runs(t.mark, f, rows + marks, h->n_marks, UINT8_MAX);
        read_compositions(&t, rows + compositions);
    }
    return t;
}
static void close_tokenizer(Tokenizer *t) { close_arena(&t->arena), close_file(&t->file); }

// Append the parts of a character, of which only the first has parts itself. A mark goes in front
// of those of a higher class.
static void decompose(Tokens *out, const Tokenizer *t, uint32_t code, int depth) {
    uint64_t parts = code < 0x80 || depth == 0 ? 0 : find(t, pair(APART | code, 0));
    if (parts) decompose(out, t, (uint32_t)(parts >> 32), depth - 1);
    if (parts && !(code = (uint32_t)parts)) return;
    push(out, (int)code);
    int *c = out->at + out->n - 1, *end = out->n > MOST_MARKS ? c - MOST_MARKS : out->at;
    for (; c > end && t->mark[code] && t->mark[c[-1]] > t->mark[code]; c--) *c = c[-1];
    *c = (int)code;
}

// Text as Unicode's NFC has it: each starter (class 0) takes in what combines with it, unless
// something of the same or a higher class, or of class 0, stands between.
static Bytes compose(const Tokenizer *t, const uint8_t *text, size_t n) {
    Tokens codes = {0};
    Bytes out = {0};
    for (const uint8_t *p = text; p < text + n;)
        decompose(&codes, t, next_code(&p, text + n), DEEPEST_COMPOSITION);
    size_t starter = 0, kept = 0;
    for (size_t i = 0; i < codes.n; i++) {
        int code = codes.at[i], class = t->mark[code], whole = 0;
        if (code >= 0x300 && kept && (kept == starter + 1 || t->mark[codes.at[kept - 1]] < class))
            whole = (int)find(t, pair(TOGETHER | (uint32_t)codes.at[starter], (uint32_t)code));
        if (!whole && class == 0) starter = kept;
        codes.at[whole ? starter : kept++] = whole ? whole : code;
    }
    for (size_t i = 0; i < kept; i++) append_code(&out, (uint32_t)codes.at[i]);
    free(codes.at);
    return out;
}

// Where the next symbol begins, and the one before; its token, and that of it and the next one.
typedef struct { uint32_t end, previous; int id, both; } Symbol;
typedef struct {
    const Tokenizer *tokenizer;
    const uint8_t *text, *run;  // between two user-defined tokens; n bytes of it, being joined
    size_t size, n, room;
    uint8_t *class;             // (size + 1) 1 << class of a character where it begins, else 0
    Symbol *symbol;             // (n + 1) each where it begins; behind them, in the same memory:
    uint64_t *best;             // (2 n) a tree: the smaller order of joins of 2 i and 2 i + 1 at i
} Encoder;

// The end of at most `most` characters of some classes.
static size_t skip(const Encoder *e, size_t at, uint32_t classes, uint32_t most) {
    for (; most > 0 && e->class[at] & classes; most--)
        while (!e->class[++at]) {}
    return at;
}

// The end of the piece that begins at `at`: of the first expression that fits. The rules:
//     Llama 3  (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|
//              ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
//     Qwen2    the same with \p{N}
//     GPT-2    's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//     SmolLM   each \p{N} alone, then GPT-2's between them
static size_t piece_end(const Encoder *e, size_t at) {
    enum { ALL = UINT32_MAX, ANY = OTHER | WHITE | SPACE };
    static const struct { uint32_t before, class, most, after; } parts[][3] = {  // before: 0 or 1
        [LLAMA3_RULE] = {{ANY, LETTER, ALL, 0}, {0, NUMBER, 3, 0}, {SPACE, OTHER, ALL, LINE_END}},
        [QWEN2_RULE] = {{ANY, LETTER, ALL, 0}, {0, NUMBER, 1, 0}, {SPACE, OTHER, ALL, LINE_END}},
        [GPT2_RULE] = {{SPACE, LETTER, ALL, 0}, {SPACE, NUMBER, ALL, 0}, {SPACE, OTHER, ALL, 0}},
        [SMOLLM_RULE] = {{SPACE, LETTER, ALL, 0}, {0, NUMBER, 1, 0}, {SPACE, OTHER, ALL, 0}},
    };
    static const char *const endings[] = {"s", "t", "re", "ve", "m", "ll", "d", "\u017F"};
    uint32_t rule = e->tokenizer->header.rule;
    bool newer = rule <= QWEN2_RULE;  // case does not matter, so U+017F, the long s, is an s
    for (int i = 0; e->text[at] == '\'' && i < (newer ? 8 : 7); i++) {
        const char *text = (const char *)e->text + at + 1;
        size_t n = strlen(endings[i]);
        if (n < e->size - at && !(newer ? strncasecmp : strncmp)(text, endings[i], n))
            return at + 1 + n;
    }
    for (int i = 0; i < 3; i++) {
        size_t from = skip(e, at, parts[rule][i].before, 1);
        size_t end = skip(e, from, parts[rule][i].class, parts[rule][i].most);
        if (end > from) return skip(e, end, parts[rule][i].after, ALL);
    }
    size_t end = skip(e, at, WHITE | SPACE | LINE_END, ALL), last = end - 1;
    for (size_t i = end; newer && i > at; i--)
        if (e->class[i - 1] == LINE_END) return i;
    while (!e->class[last]) last--;  // which may belong to what follows
    bool over = e->class[end] == END || (e->class[end] == NUMBER && rule == SMOLLM_RULE);
    return over || last == at ? end : last;
}

// Find out what a symbol and the next one become, put down when, and which join of all is the best.
static void consider(Encoder *e, uint32_t at) {
    const Tokenizer *t = e->tokenizer;
    Symbol *s = &e->symbol[at], *next = &e->symbol[s->end];
    uint64_t *best = e->best, found = s->end >= e->n ? 0
        : t->header.n_merges ? find(t, pair((uint32_t)s->id, (uint32_t)next->id))
                             : find_token(t, e->run + at, next->end - at);
    s->both = (int)found;
    best[at + e->n] = found ? pair((uint32_t)(found >> 32), at) : UINT64_MAX;
    for (size_t i = at + e->n; i > 1; i /= 2)
        best[i / 2] = best[i] < best[i ^ 1] ? best[i] : best[i ^ 1];
}

// Neighbours become one token, the best pair first, of equals the leftmost. Bytes stand for what is
// no token in the end: with merges, which join nothing but tokens, at once.
static void join_run(Tokens *out, Encoder *e, const uint8_t *run, size_t n) {
    const Tokenizer *t = e->tokenizer;
    grow((void **)&e->symbol, &e->room, 2 * n + 1, sizeof *e->symbol);
    Symbol *s = e->symbol;
    e->run = run, e->n = n, e->best = (uint64_t *)(s + n + 1);
    memset(e->best, -1, 2 * n * sizeof *e->best);
    for (uint32_t at = 0, last = 0; at < n; last = at, at = s[at].end) {
        const uint8_t *p = run + at, *next = p;
        if (t->header.kind == SENTENCEPIECE) next_code(&next, run + n);
        uint64_t found = next > p + 1 ? find_token(t, p, (size_t)(next - p)) : 0;
        bool byte = next <= p + 1 || (!found && t->header.n_merges);
        int id = found ? (int)found : byte ? t->byte_token[*p] : NONE;
        s[at] = (Symbol){byte ? at + 1 : (uint32_t)(next - run), last, id, NONE};
        if (at > 0) consider(e, last);
    }
    while (e->best[1] != UINT64_MAX) {
        uint32_t left = (uint32_t)e->best[1], right = s[left].end, end = s[right].end;
        s[left].id = s[left].both, s[left].end = end;
        s[end].previous = left;
        s[right].end = (uint32_t)n;  // so it is joined no more
        consider(e, right);
        if (left > 0) consider(e, s[left].previous);
        consider(e, left);
    }
    for (uint32_t at = 0, i = 0; at < n; i = at = s[at].end) {
        if (s[at].id != NONE) push(out, s[at].id);
        for (; s[at].id == NONE && i < s[at].end; i++)
            if (t->byte_token[run[i]] != NONE) push(out, t->byte_token[run[i]]);
    }
}

// Text between user-defined tokens. A piece falls into runs wherever two bytes meet that stand
// together in no token: nothing is joined across, and a run stays in the first cache.
static void encode_section(Tokens *out, const Tokenizer *t, const uint8_t *text, size_t n) {
    const TokenizerHeader *h = &t->header;
    Bytes composed = {0};
    size_t plain = h->flags & NFC ? 0 : n;
    while (plain < n && text[plain] < 0xCC) plain++;  // nothing below U+0300 combines
    if (plain < n) composed = compose(t, text, n);
    if (composed.n) text = (uint8_t *)composed.at, n = composed.n;
    if (n >= UINT32_MAX) die("a text of %zu bytes is too long", n);  // symbols count the bytes
    Encoder e = {.tokenizer = t, .text = text, .size = n, .class = NEW(uint8_t, n + 1)};
    e.class[n] = END;
    for (const uint8_t *p = text, *from = p; h->rule && p < text + n; from = p)
        e.class[from - text] = (uint8_t)(1 << t->class[next_code(&p, text + n)]);
    for (size_t at = 0, end; at < n; at = end) {
        end = h->rule ? piece_end(&e, at) : n;
        uint64_t whole = h->flags & TAKES_WHOLE ? find_token(t, text + at, end - at) : 0;
        if (whole) push(out, (int)whole);
        for (size_t from = at; from < end && !whole; from = at) {
            for (at++; at < end && t->joined[text[at - 1]][text[at]]; at++) {}
            join_run(out, &e, text + from, at - from);
        }
    }
    free(composed.at), free(e.class), free(e.symbol);
}

// The longest user-defined token that the text begins with, NULL if there is none.
static const Token *find_user_defined(const Tokenizer *t, const uint8_t *text, size_t n) {
    const Token *longest = NULL;
    uint64_t h = no_bytes;
    for (size_t i = 0; i < n && i < t->user_defined[*text]; i++) {
        const Token *k = &t->token[(uint32_t)find(t, h = hash(h, text + i, 1))];
        if (k->type == USER_DEFINED && spells(*k, text, i + 1)) longest = k;
    }
    return longest;
}

// Append the ids of any n bytes to out: no BOS, and no control tokens, whatever the text says.
static void encode(Tokens *out, const Tokenizer *t, const char *text, size_t n) {
    uint8_t *spaced = NEW(uint8_t, n + 1), *last = spaced;
    if (n && t->header.flags & DUMMY_PREFIX) *last++ = ' ';
    for (const char *end = n ? text + n : text; text < end; last++) {  // U+2581 is a space
        bool sign = t->header.kind == SENTENCEPIECE && end - text > 2 && !memcmp(text, "\u2581", 3);
        *last = sign ? ' ' : (uint8_t)*text;
        text += sign ? 3 : 1;
    }
    const Token *token;
    for (const uint8_t *p = spaced, *from = p; p < last; from = p) {
        for (token = NULL; p < last && !(token = find_user_defined(t, p, (size_t)(last - p)));) p++;
        encode_section(out, t, from, (size_t)(p - from));
        if (token) push(out, (int)(token - t->token)), p += token->n;
    }
    free(spaced);
}

// Bytes come out once they are a character or can never be one, and are held until then.
typedef struct { const Tokenizer *tokenizer; char held[4]; size_t n_held; bool begun; } Decoder;
static void decode(Bytes *out, Decoder *d, int id) {
    Token k = piece(d->tokenizer, id);
    bool prefix = !d->begun && d->tokenizer->header.flags & DUMMY_PREFIX && k.n && *k.at == ' ';
    d->begun |= k.n > 0;
    for (size_t i = prefix; i < k.n; i++) {
        d->held[d->n_held++] = k.at[i];
        const uint8_t *held = (uint8_t *)d->held, *from = held, *p = held, *end = p + d->n_held;
        while (p < end && next_code(&p, end) < CUT_SHORT) from = p;
        append(out, d->held, (size_t)(from - held));
        d->n_held = (size_t)(end - from);
        memmove(d->held, from, d->n_held);
    }
}
// The end of the text: what is held has no more to wait for.
static void flush(Bytes *out, Decoder *d) { append(out, d->held, d->n_held), d->n_held = 0; }

// ------------------------------------------------------------------------------------------------
// 10. The sampler: logits to one token
//
// In the order of the field: repetition penalty (Keskar et al. 2019), temperature, top-k, top-p
// (Holtzman et al. 2020), min-p. With only temperature and top-p the rule and its random numbers
// are llama2.c's, so the same seed gives the same text.

typedef struct { union { float p; uint32_t bits; }; int id; } Candidate;
typedef struct { double temperature, top_p, min_p, penalty, top_k; } Taste;  // top_k 0: all

// xorshift64* (Vigna 2016): a float in [0, 1) of 24 bits, so every value is exact, 1 not reached.
static float random_float(uint64_t *state) {
    *state ^= *state >> 12, *state ^= *state << 25, *state ^= *state >> 27;
    return (float)(uint32_t)((*state * 0x2545f4914f6cdd1dull) >> 32 >> 8) * 0x1p-24f;
}

// The first of the largest. A vector at a time, few of which hold anything larger.
static int most_likely(const float *x, int n) {
    int best = 0;
    for (int first = 0; first < n; first += WIDTH)
        if (greatest(load_some(x + first, n - first)) > x[best])
            for (int i = first; i < least(first + WIDTH, n); i++)
                if (x[i] > x[best]) best = i;
    return best;
}

// Logits, divided by the temperature, to probabilities. Returns the sum of e^(logit - peak).
static float softmax(float *x, int n, float temperature) {
    f32v sum = spread(0), heat = spread(temperature);
    f32v peak = spread(x[most_likely(x, n)] / temperature);
    for (int i = 0; i < n; i += WIDTH) {
        store_some(x + i, exponential(sub(over(load_some(x + i, n - i), heat), peak)), n - i);
        sum = add(sum, load_some(x + i, n - i));
    }
    float total = join(sum);
    for (int i = 0; i < n; i++) x[i] /= total;
    return total;
}

// Falling probability; among equals the smaller id first, as each pass keeps the order it finds.
// A pass for each byte of p, whose bits rise with it, as it is not negative. c has room for 2n.
static void sort_candidates(Candidate *c, int n) {
    for (int shift = 0; shift < 32; shift += 8) {
        Candidate *from = shift % 16 ? c + n : c, *to = shift % 16 ? c : c + n;
        int at[256 + 1] = {0};
        for (int i = 0; i < n; i++) at[(~from[i].bits >> shift & 255) + 1]++;
        for (int b = 0; b < 256; b++) at[b + 1] += at[b];
        for (int i = 0; i < n; i++) to[at[~from[i].bits >> shift & 255]++] = from[i];
    }
}

// What top-k, top-p and min-p leave of n probabilities, likeliest first: how many (> 0), their sum.
static int shortlist(Candidate *c, float *sum, const float *p, int n, const Taste *taste) {
    float top_p = taste->top_p > 0 && taste->top_p < 1 ? (float)taste->top_p : INFINITY, whole = 1;
    float cutoff = taste->top_k ? 0 : (1 - top_p) / (float)(n - 1);  // below it nothing is in top-p
    int found = 0, kept = 0;
    for (int i = 0; i < n; i++)
        if (p[i] >= cutoff) c[found++] = (Candidate){.p = p[i], .id = i};
    if (found == 0) c[found++] = (Candidate){.p = 1, .id = most_likely(p, n)};
    sort_candidates(c, found);
    if (taste->top_k && taste->top_k < found) {
        found = (int)taste->top_k, whole = 0;
        for (int i = 0; i < found; i++) whole += c[i].p;
    }
    for (*sum = 0; kept < found && !(*sum > top_p * whole); *sum += c[kept++].p)
        if (c[kept].p < (float)taste->min_p * c[0].p) break;
    return kept;
}

// Each token of the text becomes less likely, once. `old` (vocab) has room for the logits before.
static void penalize(float *logits, Candidate *old, const Tokens *text, float penalty) {
    for (size_t i = 0; i < text->n; i++) old[text->at[i]].p = logits[text->at[i]];
    for (size_t i = 0; i < text->n; i++) {
        float was = old[text->at[i]].p;
        logits[text->at[i]] = was > 0 ? was / penalty : was * penalty;
    }
}

// The next token; the logits are used up. c has room for 2n, the penalty looks back on `text`.
static int pick(float *logits, int n, const Taste *taste, uint64_t *state, Candidate *c,
                const Tokens *text) {
    if (taste->penalty != 1) penalize(logits, c, text, (float)taste->penalty);
    if (taste->temperature == 0) return most_likely(logits, n);
    softmax(logits, n, (float)taste->temperature);
    float chance = random_float(state), sum = 0, running = 0;
    bool all = !taste->top_k && taste->min_p <= 0 && (taste->top_p <= 0 || taste->top_p >= 1);
    for (int i = 0; all && i < n; i++)
        if ((running += logits[i]) > chance || i == n - 1) return i;
    int kept = shortlist(c, &sum, logits, n, taste), i = 0;
    while (i < kept - 1 && !((running += c[i].p) > chance * sum)) i++;
    return c[i].id;
}

// ------------------------------------------------------------------------------------------------
// 11. A session: feed and reply, the two verbs of every text mode

typedef struct {
    const char *model, *tokenizer, *mode, *prompt, *file, *system, *output, *type, *format, *batch;
    const char *verbose;                                 // NULL: no
    double steps, threads, context, seed, depth, width;  // whole; a negative seed is the time
    Taste taste;
} Options;
typedef enum { GOES_ON, ENDED, REACHED_LIMIT, CONTEXT_FULL, INTERRUPTED } Stop;

// One text in one slot of the cache.
typedef struct {
    int slot, pos;            // the first pos of its tokens are in the cache
    Tokens ids; bool bos;     // whether the first is BOS
    uint64_t random; Decoder decoder;
    Bytes words, ready;       // that it begins with; characters that are complete but not written
    int made; Stop stop;      // tokens of the last reply, and why it has ended
} Text;
typedef struct {
    const Options *options;
    Model model; Pool pool; State state; Tokenizer tokenizer; Output out;
    char *tokenizer_path; uint64_t seed;
    Candidate *candidates;  // (2, vocab)
    Step *steps;            // (context)  of one text
    Text text;              // the one of every mode but batch
} Session;
static Text new_text(const Session *s, int slot, Bytes words) {
    return (Text){.slot = slot, .words = words, .decoder = {.tokenizer = &s->tokenizer},
                  .random = s->seed ? s->seed : 0x9e3779b97f4a7c15};  // xorshift never leaves 0
}
static void free_text(Text *t) { free(t->words.at), free(t->ids.at), free(t->ready.at); }
static void say_seed(const Session *s) {
    if (s->options->taste.temperature > 0 && s->options->seed < 0)
        fprintf(stderr, "seed %lld\n", (long long)s->seed);
}

// The words of a new text become its ids, after BOS if the model wants one, and are ready.
static void feed(Session *s, Text *text) {
    const TokenizerHeader *h = &s->tokenizer.header;
    text->bos = h->bos >= 0 && h->flags & ADDS_BOS;
    if (text->bos) push(&text->ids, h->bos);
    encode(&text->ids, &s->tokenizer, text->words.at, text->words.n);
    for (size_t i = 0; i < text->ids.n; i++) decode(&text->ready, &text->decoder, text->ids.at[i]);
}

// Run what the cache lacks. Returns the logits after it; with nothing to run, those that are there.
static float *catch_up(Session *s, Text *text) {
    int from = text->pos, all = (int)text->ids.n, n = 0;
    Progress progress = {"reading", all - from, seconds(), 0};
    for (int t = from; t < all; t++) s->steps[t] = (Step){text->ids.at[t], text->slot, t};
    for (; text->pos < all; text->pos += n) {
        n = least(s->state.batch, all - text->pos);
        forward(&s->state, s->steps + text->pos, n, text->pos + n < all ? n : n - 1);
        show_progress(&progress, text->pos + n - from);
    }
    return n ? logits(&s->state, n - 1, 1) : s->state.logits;
}

// What is ready is seen at once. A model's words must not steer a terminal.
static void show_ready(Session *s, Text *text) {
    Bytes *b = &text->ready;
    for (size_t i = 0; isatty(fileno(s->out.file)) && i < b->n; i++)
        if (iscntrl((unsigned char)b->at[i]) && !strchr("\n\t", b->at[i])) b->at[i] = '?';
    if (b->n) write_bytes(&s->out, b->at, b->n);  // NULL otherwise
    send_off(&s->out);
    b->n = 0;
}

// Sample the next token. One that ends the text is no part of it.
static Stop extend(Session *s, Text *text, float *scores) {
    int id = pick(scores, s->model.config.vocab_size, &s->options->taste, &text->random,
                  s->candidates, &text->ids);
    if (ends_text(&s->tokenizer, id)) return text->stop = ENDED;
    push(&text->ids, id);
    decode(&text->ready, &text->decoder, id);
    bool full = (int)text->ids.n > s->state.context, enough = ++text->made >= s->options->steps;
    return text->stop = enough ? REACHED_LIMIT : full ? CONTEXT_FULL : GOES_ON;
}

// Sample and write tokens until one ends the text, -n are out or the context is full; end the line.
static void reply(Session *s, Text *text) {
    int context = s->state.context;
    text->made = 0, text->stop = s->options->steps ? GOES_ON : REACHED_LIMIT;
    if ((int)text->ids.n > context) text->stop = CONTEXT_FULL;
    while (!text->stop) {
        show_ready(s, text);
        float *scores = catch_up(s, text);
        if (take_interrupt()) text->stop = INTERRUPTED;
        else extend(s, text, scores);
    }
    flush(&text->ready, &text->decoder);
    append(&text->ready, "\n", 1);
    show_ready(s, text);
    if (text->stop == CONTEXT_FULL) fprintf(stderr, "the context of %d is full\n", context);
}

// Beside NAME.bin as NAME.tokenizer.bin, beside it as tokenizer.bin, or in the current folder.
static char *find_tokenizer(const char *model) {
    const char *slash = strrchr(model, '/'), *name = slash ? slash + 1 : model;
    const char *end = model + strlen(model), *dot = strrchr(name, '.');
    int stem = (int)((dot ? dot : end) - model), folder = (int)(name - model);
    size_t room = strlen(model) + sizeof ".tokenizer.bin";
    char *path = NEW(char, room);
    snprintf(path, room, "%.*s.tokenizer.bin", stem, model);
    if (access(path, F_OK) != 0) snprintf(path, room, "%.*stokenizer.bin", folder, model);
    if (access(path, F_OK) != 0) snprintf(path, room, "tokenizer.bin");
    if (access(path, F_OK) != 0) die("no tokenizer beside %s, nor here; -z names one", model);
    return path;
}
static void need_tokenizer(Session *s) {
    const char *named = s->options->tokenizer;
    int vocab = s->model.config.vocab_size;
    s->tokenizer_path = named ? strdup(named) : find_tokenizer(s->options->model);
    s->tokenizer = open_tokenizer(s->tokenizer_path, vocab);
    int size = (int)s->tokenizer.header.n_tokens;
    if (!named && strcmp(s->tokenizer_path, "tokenizer.bin") == 0 && size != vocab)
        die("tokenizer.bin has %d tokens, the model %d: -z names the model's own", size, vocab);
    s->text = new_text(s, 0, (Bytes){0});
}
enum { ROWS = 32 };  // of logits at once; those that nobody asks for take no memory

// Room for texts of n tokens and `more`, or as many of those as the model or -c allows.
static void need_state(Session *s, size_t n, double more, int n_slots) {
    const Config *c = &s->model.config;
    int context = s->options->context ? (int)s->options->context : c->max_seq_len;
    if (context > c->max_seq_len)
        die("the model's context is %d tokens, -c asks for %d", c->max_seq_len, context);
    if (n > (size_t)context) die("the context %d has no room for a prompt of %zu", context, n);
    context = (int)fmin(context, (double)n + more);
    s->state = (State){.model = &s->model, .pool = &s->pool, .context = context, .slots = n_slots,
                       .batch = most(default_batch(c, &s->pool), n_slots),
                       .logit_rows = most(ROWS, n_slots)};
    open_state(&s->state);
    s->candidates = NEW(Candidate, 2 * (size_t)c->vocab_size);
    s->steps = NEW(Step, (size_t)context);
}

// ------------------------------------------------------------------------------------------------
// 12. The modes: each a main() of its own

// The session's text begins with that of -i, or of the file of -f, or with nothing.
static Text *given_text(Session *s) {
    const char *prompt = s->options->prompt, *path = prompt ? prompt : s->options->file;
    need_tokenizer(s);
    if (prompt && strcmp(prompt, "-") != 0) append(&s->text.words, prompt, strlen(prompt));
    else if (path) s->text.words = read_text(path);
    feed(s, &s->text);
    return &s->text;
}

// The next line of a stream, without its end; false: there is none, and *line is empty.
static bool read_line(Bytes *line, FILE *in, const char *name) {
    ssize_t n = feof(in) ? -1 : getline(&line->at, &line->room, in);
    if (n < 0 && !feof(in)) die("%s: %s", name, strerror(errno));
    if (n > 0) line->n = (size_t)n - (line->at[n - 1] == '\n');
    else free(line->at), *line = (Bytes){0};
    return n > 0;
}
static void say_speed(const char *what, double n, double time) {
    fprintf(stderr, "%s %.0f tokens in %.3f s, %.1f tokens/s\n", what, n, time, n / (time + 1e-9));
}

static void run_generate(Session *s) {
    Text *text = given_text(s);
    size_t given = text->ids.n;
    if (given == 0) die("nothing to begin with: an empty prompt, and a tokenizer without BOS");
    need_state(s, given, s->options->steps, 1);
    say_seed(s);
    double start = seconds();
    catch_up(s, text);
    double middle = seconds();
    reply(s, text);
    say_speed("prompt", (double)given, middle - start);
    say_speed("generated", (double)text->made, seconds() - middle);
}

// A chat is turns, as the models' published templates have them: `first` or, later, `again`; the
// system prompt, $, once; `user`, with the message, %. {name} is a control token; what lies between
// two is one text. White space goes from around the message, or from around $ and it as one.
static const struct Format {
    const char *name, *first, *again, *system, *user; enum { NO, MESSAGE, BOTH } strips;
} formats[] = {
    {"none", "", "", "", "", NO},
    {"llama2", "{<s>}[INST] ", "{</s>}{<s>}[INST] ", "<<SYS>>\n$\n<</SYS>>\n\n", "% [/INST]", BOTH},
    {"llama3", "{<|begin_of_text|>}", "{<|eot_id|>}",
     "{<|start_header_id|>}system{<|end_header_id|>}\n\n${<|eot_id|>}",
     "{<|start_header_id|>}user{<|end_header_id|>}\n\n%{<|eot_id|>}"
     "{<|start_header_id|>}assistant{<|end_header_id|>}\n\n", MESSAGE},
    {"chatml", "", "{<|im_end|>}\n", "{<|im_start|>}system\n${<|im_end|>}\n",
     "{<|im_start|>}user\n%{<|im_end|>}\n{<|im_start|>}assistant\n", NO},
    {"mistral", "{<s>}[INST] ", "{</s>}[INST] ", "$\n\n", "% [/INST]", NO},
    {"zephyr", "", "{</s>}\n", "<|system|>\n${</s>}\n", "<|user|>\n%{</s>}\n<|assistant|>\n", NO},
    {"mistral3", "{<s>}{[INST]}", "{</s>}{[INST]}", "$\n\n", "%{[/INST]}", NO},
};
enum { MISTRAL = 4, MISTRAL3 = 6 };  // the latter where the brackets are tokens of their own

// A message becomes a turn of the text.
static void feed_turn(Session *s, Tokens *ids, const struct Format *f, Bytes message) {
    const char *system = ids->n == 0 && s->options->system ? s->options->system : "";
    const char *parts[] = {ids->n ? f->again : f->first, *system ? f->system : "", f->user};
    bool front = f->strips == MESSAGE || (f->strips == BOTH && !*system);
    Bytes words = {0};
    while (f->strips && message.n && isspace((unsigned char)message.at[message.n - 1])) message.n--;
    while (front && message.n && isspace((unsigned char)*message.at)) message.at++, message.n--;
    for (int i = 0; i < COUNT(parts); i++)
        for (const char *p = parts[i]; *p; p++)
            if (*p == '%') append(&words, message.at, message.n);
            else if (*p == '$') append(&words, system, strlen(system));
            else if (*p != '{') append(&words, p, 1);
            else {
                size_t n = strcspn(++p, "}");
                int id = find_control(&s->tokenizer, p, n);
                if (id < 0) die("%s has no token %.*s for a chat", s->tokenizer_path, (int)n, p);
                encode(ids, &s->tokenizer, words.at, words.n);
                push(ids, id);
                words.n = 0, p += n;
            }
    encode(ids, &s->tokenizer, words.at, words.n);
    free(words.at);
}

// One message and its answer. If the context is full, the text begins again, with this message.
static void talk(Session *s, const struct Format *f, Bytes message) {
    Text *text = &s->text;
    Tokens *ids = &text->ids;
    size_t before = ids->n, context = (size_t)s->state.context;
    feed_turn(s, ids, f, message);
    if (before > 0 && ids->n >= context) {
        fprintf(stderr, "the context of %zu is full: beginning again\n", context);
        before = ids->n = 0, text->pos = 0;
        feed_turn(s, ids, f, message);
    }
    for (size_t i = before; s->options->verbose && i < ids->n; i++)
        fprintf(stderr, "%s %d%s", i > before ? "" : "fed", ids->at[i], i + 1 < ids->n ? "" : "\n");
    if (ids->n > context) fprintf(stderr, "the message has %zu tokens\n", ids->n);
    text->decoder = (Decoder){.tokenizer = &s->tokenizer};
    hold_interrupt(true);
    reply(s, text);
    hold_interrupt(false);
}

// Turns from -i and then, line by line, from standard input.
static void run_chat(Session *s) {
    bool terminal = isatty(STDIN_FILENO) && isatty(STDERR_FILENO);
    Bytes line = {0};
    need_tokenizer(s);
    need_state(s, 0, INFINITY, 1);
    const char *name = s->options->format;
    int i = name ? COUNT(formats) - 1 : (int)s->tokenizer.header.chat;
    while (name && i > 0 && strcmp(name, formats[i].name) != 0) i--;
    if (i == 0) die("-x wants llama2, llama3, chatml, mistral, mistral3 or zephyr, not '%s'",
                    name ? name : "none");
    if (i == MISTRAL && find_control(&s->tokenizer, "[INST]", 6) >= 0) i = MISTRAL3;
    say_seed(s);
    if (s->options->prompt) append(&line, s->options->prompt, strlen(s->options->prompt));
    do {
        while (line.n && line.at[line.n - 1] == '\r') line.n--;
        if (line.n) talk(s, &formats[i], line);
    } while (fputs(terminal ? "> " : "", stderr), read_line(&line, stdin, "standard input"));
    if (terminal) fputc('\n', stderr);
}

// What stands before, and bytes as a JSON string; what is not UTF-8 becomes U+FFFD.
static void print_json(Output *o, const char *before, const void *text, size_t n) {
    print(o, "%s\"", before);
    for (const uint8_t *p = n ? text : "", *from = p, *end = p + n; p < end; from = p) {
        uint32_t code = next_code(&p, end);
        if (code >= UNICODE) print(o, "\uFFFD");
        else if (code < 32 || code == 127) print(o, "\\u%04x", code);
        else print(o, "%s%.*s", code == '"' || code == '\\' ? "\\" : "", (int)(p - from), from);
    }
    print(o, "\"");
}

// Put a text with its words into a slot of the cache. Returns it, or NULL if it ends at once.
static Text *start_text(Session *s, Text *text, int slot) {
    *text = new_text(s, slot, text->words);
    feed(s, text);
    text->ready.n = 0;  // only the answer is
    bool fits = text->ids.n > 0 && text->ids.n <= (size_t)s->state.context;
    text->stop = !fits ? CONTEXT_FULL : s->options->steps ? GOES_ON : REACHED_LIMIT;
    return text->stop || extend(s, text, catch_up(s, text)) ? NULL : text;
}
static void write_result(Session *s, Text *t) {
    static const char *const reasons[] = {"", "end", "limit", "context"};  // of Stop
    flush(&t->ready, &t->decoder);
    print_json(&s->out, "{\"prompt\": ", t->words.at, t->words.n);
    print_json(&s->out, ", \"text\": ", t->ready.at, t->ready.n);
    print(&s->out, ", \"tokens\": %d, \"stop\": \"%s\"}\n", t->made, reasons[t->stop]);
    send_off(&s->out), free_text(t);  // who asks line by line waits for it
    *t = (Text){0};
}

// Prompts, one a line, decoded together. Results wait in a ring for those before them.
static void run_batch(Session *s) {
    enum { WAITING = 1 << 13 };
    const char *path = s->options->batch ? s->options->batch : "-";
    int width = s->options->width ? (int)s->options->width : 8;
    size_t places = (size_t)width + WAITING, begun = 0, written = 0;
    FILE *in = strcmp(path, "-") == 0 ? stdin : fopen(path, "r");
    if (!in) die("%s: %s", path, strerror(errno));
    need_tokenizer(s);
    need_state(s, 0, INFINITY, width);
    say_seed(s);
    Text *ring = NEW(Text, places), **running = NEW(Text *, width);
    Step *steps = NEW(Step, width);
    double begin = seconds(), made = 0;
    for (int n = 1; n > 0 || !feof(in);) {
        n = 0;
        for (int i = 0; i < width; i++) {
            Text *t = running[i];
            for (; !t && begun - written < places; t = start_text(s, &ring[begun++ % places], i))
                if (!read_line(&ring[begun % places].words, in, path)) break;
            if ((running[i] = t)) steps[n++] = (Step){t->ids.at[t->ids.n - 1], i, t->pos++};
        }
        if (n > 0) forward(&s->state, steps, n, 0), logits(&s->state, 0, n);
        for (int i = 0; i < n; i++) {
            Text **t = &running[steps[i].slot];
            if (extend(s, *t, row(s->state.logits, i, s->model.config.vocab_size))) *t = NULL;
        }
        for (Text *t; t = &ring[written % places], written < begun && t->stop; written++)
            made += (double)t->made, write_result(s, t);
    }
    say_speed("generated", made, seconds() - begin);
    if (in != stdin) fclose(in);
    free(ring), free(running), free(steps);
}
typedef struct { double nats, tokens; bool shows; } Loss;  // so far, and whether each is shown

// A token and the logits before it. It is shown as a line of text, log-probability, rank and the
// likeliest tokens; on a terminal on a ground that goes with its surprise over yellow to red.
static void judge(Session *s, Loss *loss, int id, float *p) {
    int n = s->model.config.vocab_size, rank = 1;
    Token words = piece(&s->tokenizer, id);
    double above = (double)p[id] - (double)p[most_likely(p, n)];
    double score = above - log((double)softmax(p, n, 1));  // of its probability
    loss->nats -= score, loss->tokens++;
    if (!loss->shows) return;
    if (isatty(fileno(s->out.file))) {
        static const uint8_t grounds[] = {255, 230, 230, 222, 222, 209, 209, 209, 196};
        print(&s->out, "\033[30;48;5;%dm", grounds[score > -8 ? (int)-score : 8]);
        append(&s->text.ready, words.at, words.n);
        show_ready(s, &s->text);
        print(&s->out, "\033[0m");
        return;
    }
    for (int i = 0; i < n; i++) rank += p[i] > p[id] || (p[i] == p[id] && i < id);
    print(&s->out, "%d", id);
    print_json(&s->out, "\t", words.at, words.n);
    print(&s->out, "\t%.4f\t%d", score, rank);
    for (int k = 0, best; k < 3 && k < n; p[best] = -1, k++) {
        words = piece(&s->tokenizer, best = most_likely(p, n));
        print_json(&s->out, "\t", words.at, words.n);
        print(&s->out, "\t%.4f", (double)p[best]);
    }
    print(&s->out, "\n");
}

// The logits after each token of the text are judged, or written if `loss` is NULL. The text is cut
// into windows of the context, each with BOS, if any, and seeing nothing of those before.
static void judge_text(Session *s, Loss *loss) {
    State *state = &s->state;
    const Tokens *ids = &s->text.ids;
    int batch = s->options->width ? least(state->batch, (int)s->options->width) : state->batch;
    int vocab = s->model.config.vocab_size;
    Progress progress = {"reading", (double)ids->n, seconds(), 0};
    s->steps[0] = (Step){ids->at[0], 0, 0};
    for (size_t at = s->text.bos; at < ids->n;) {
        int n = s->text.bos;
        for (; n < state->context && at < ids->n; n++) s->steps[n] = (Step){ids->at[at++], 0, n};
        for (int t = 0; t < n; t++) {
            int done = t % batch, left = least(batch - done, n - t);
            if (done == 0) forward(state, s->steps + t, left, 0);
            if (done % ROWS == 0) logits(state, done, least(ROWS, left));
            float *scores = row(state->logits, done % ROWS, vocab);
            if (!loss) write_bytes(&s->out, scores, (size_t)vocab * sizeof *scores);
            else if (t + 1 < n) judge(s, loss, s->steps[t + 1].id, scores);
            show_progress(&progress, (double)at - n + t + 1);
        }
    }
}

// For perplexity too, which shows no tokens but what they come to.
static void run_score(Session *s) {
    Loss loss = {0, 0, strcmp(s->options->mode, "score") == 0};
    Text *text = given_text(s);
    size_t n = text->ids.n - text->bos;
    if (n < 2) die("the text has %zu tokens, too few to score", n);
    need_state(s, 2, (double)text->ids.n - 2, 1);
    text->ready.n = 0;  // the text is shown token by token, or not at all
    judge_text(s, &loss);
    if (!loss.shows) print(&s->out, "nats %.6f per token\nperplexity %.4f\ntokens %.0f\n",
                           loss.nats / loss.tokens, exp(loss.nats / loss.tokens), loss.tokens);
}

// Decimal token ids of -f become the text; the logits after each, float32 (n, vocab), go to -o.
static void run_logits(Session *s) {
    static const char space[] = " \t\r\n";
    const char *path = s->options->file, *name = path ? path : "standard input";
    int vocab = s->model.config.vocab_size;
    Tokens *ids = &s->text.ids;
    Bytes b = read_text(path ? path : "-");
    append(&b, "", 1);
    for (char *p = b.at, *end; (p += strspn(p, space)) < b.at + b.n - 1; p = end) {
        long id = strtol(p, &end, 10);  // the largest long for what is larger
        int length = (int)strcspn(p, space);
        if (length == 0 || end != p + length || id < 0 || id >= vocab)
            die("%s: '%.*s' at byte %td is not a token id of 0 to %d", name, least(20, length), p,
                p - b.at, vocab - 1);
        push(ids, (int)id);
    }
    free(b.at);
    if (ids->n == 0) die("%s: no token ids", name);
    need_state(s, ids->n, 0, 1);
    judge_text(s, NULL);
}

static void run_tokens(Session *s) {
    Text *text = given_text(s);
    for (size_t i = text->bos; i < text->ids.n; i++) print(&s->out, "%d\n", text->ids.at[i]);
}
// Bytes that a token reads, and its products if nobody asks for its logits.
typedef struct { double parameters, bytes, products; } Cost;
static Cost cost_of(const Config *c) {
    Cost cost = {0, 0, 0};
    for (SlotId i = 0; i < SLOTS; i++) {
        Tensor w = blank_tensor(c, i);
        double count = tensors_of(c, i), size = count * w.rows * w.cols;
        cost.parameters += size;
        cost.bytes += i == EMBEDDING && !(c->flags & TIED) ? 0 : count * (double)tensor_bytes(&w);
        if (i < ATTENTION_NORM || i > W2 || slots[i].rows == ONE) continue;
        cost.products += i < WO ? size : size - size / c->n_layers;
    }
    return cost;
}

// What the checkpoint and the tokenizer hold, and the memory they take: one `name value` a line.
static void run_info(Session *s) {
    const Model *m = &s->model;
    const Config *c = &m->config;
    int context = s->options->context ? (int)s->options->context : INT_MAX;
    State state = {.model = m, .pool = &s->pool, .context = least(context, c->max_seq_len),
                   .slots = 1, .batch = default_batch(c, &s->pool), .logit_rows = 1};
    print(&s->out, "file %s\nformat %s\nweights %s\nparameters %.0f\n", m->file.path, m->file.kind,
          type_names[c->type], cost_of(c).parameters);
    for (int i = 1; i < COUNT(fields); i++)
        print(&s->out, "%s %.10g\n", fields[i].name, field_value(c, &fields[i]));
    print(&s->out, "weights %.1f MB\nstate %.1f MB\nthreads %d\n", (double)m->file.size / 1e6,
          state_bytes(state) / 1e6, s->pool.threads);
    need_tokenizer(s);
    const TokenizerHeader *t = &s->tokenizer.header;
    print(&s->out, "tokenizer %s\nkind %s\ntokens %u\nbos %d\n", s->tokenizer_path,
          t->kind == SENTENCEPIECE ? "SentencePiece" : "byte-level", t->n_tokens, t->bos);
    for (uint32_t i = 0; i < t->n_ends; i++) print(&s->out, "end %d\n", t->ends[i]);
}

// Rows of a matrix in another type: threads pack them, and then they go out.
enum { PACKED = 64 * PANEL };
typedef struct {
    const Tensor *from, *to; int first; uint8_t *panels;  // of the rows, what they become
    double error[PACKED], power[PACKED];  // sums of squares
} Packing;
static void pack_rows(void *job, int thread, int first, int end) {
    Packing *p = job;
    const Tensor *w = p->from;
    (void)thread;
    for (int i = first; i < end; i++) {
        uint8_t *panel = p->panels + (size_t)(i / PANEL) * panel_bytes(p->to->type, w->cols);
        float *x = NEW(float, group_count(w->cols) * GROUP);
        if (p->first + i < w->rows) unpack_row(x, w, p->first + i);
        for (int j = 0; j < w->cols; j++) p->power[i] += (double)x[j] * (double)x[j];
        p->error[i] = pack_row(panel, p->to, i, x);
        free(x);
    }
}

// Adds to the sums of squares of errors and of weights.
static void write_packed(Session *s, const Tensor *w, const Tensor *to, double sums[2],
                         Progress *p) {
    size_t bytes = panel_bytes(to->type, w->cols);
    uint8_t *panels = new_array(PACKED / PANEL, bytes);
    for (int first = 0, rows; first < w->rows; first += rows) {
        Packing job = {w, to, first, memset(panels, 0, PACKED / PANEL * bytes), {0}, {0}};
        rows = least(PACKED, (int)panel_count(w->rows) * PANEL - first);
        parallel(&s->pool, rows, pack_rows, &job);
        for (int i = 0; i < rows; i++) sums[0] += job.error[i], sums[1] += job.power[i];
        write_bytes(&s->out, panels, (size_t)rows / PANEL * bytes);
        show_progress(p, (double)s->out.written);
    }
    free(panels);
}

static void run_quantize(Session *s) {
    static const uint8_t zeros[LINE] = {0};
    const Options *o = s->options;
    const char *type = o->type ? o->type : "", *path = o->output ? o->output : "";
    Model *m = &s->model, to = *m;
    double sums[SLOTS][2] = {0};
    int l = 0;
    to.config.type = strcmp(type, "q4") == 0 ? Q4 : Q8;
    if (m->config.type == Q4 || !*path || strcmp(type, type_names[to.config.type]) != 0)
        die("quantize wants a model not q4, -q q8 or q4, and -o FILE, not %s, -q '%s' and -o '%s'",
            o->model, type, path);
    to.config.flags |= INTERLEAVED;
    to.layers = new_array((size_t)to.config.n_layers, sizeof *to.layers);
    Header header = {MAGIC, 1, to.config, {0}, take_ours(&to)};
    write_bytes(&s->out, &header, HEADER);
    Progress progress = {"quantizing", (double)header.size, seconds(), 0};
    for (SlotId i = 0; i < SLOTS; i = next_slot(&to.config, i, &l)) {
        const Tensor *w = &m->layers[l][i], *packed = &to.layers[l][i];
        write_bytes(&s->out, zeros, round_up(s->out.written, LINE) - s->out.written);
        if (packed->type == F32) write_bytes(&s->out, w->data, tensor_bytes(w));
        else write_packed(s, w, packed, sums[i], &progress);
        if (!(sums[i][0] < INFINITY && sums[i][1] < INFINITY))
            die("%s: %s has weights that are no numbers or too large", o->model, slots[i].name);
    }
    show_progress(&progress, progress.all);
    free(to.layers);
    for (SlotId i = 0; i < SLOTS && o->verbose; i++)
        if (sums[i][1] > 0) fprintf(stderr, "%-15s relative root mean square error %.5f\n",
                                    slots[i].name, sqrt(sums[i][0] / sums[i][1]));
}

// Measuring. CHAINS independent sums are as many as latency times units, and registers, want.
enum { CHAINS = 12, ROUNDS = 64, ROUND = CHAINS * LANES * 4, TRIALS = 5 };

// n items of a ceiling, over and over, or n steps from position `from` on, `batch` at a time and
// then logits. A share is of the row `limit`: `use` are the units of it that a step takes.
typedef struct {
    const char *name, *unit;
    enum { STEPS, READ, MULTIPLY, DOT, DOT_PAIRS } what;
    int n, from, batch, limit;
    double worth, use, speed[TRIALS];
    const uint8_t *at;
} Trial;

// Reading is in four places at once: in one it is slower (Zen 3: 17 instead of 22 GB/s).
INLINE const LooseInts *read_from(const Trial *t, size_t round, int chain) {
    const size_t quarter = (size_t)t->n * ROUNDS * ROUND / 4;
    const uint8_t *at = t->at + (size_t)(chain % 4) * quarter + round * (ROUND / 4);
    return (const LooseInts *)at + chain / 4;
}

// An item is ROUNDS times CHAINS registers read, multiply-adds or dot products of them. Each has a
// loop of its own: gcc 12 leaves the choice in a common one (Zen 3, q4: 160 GOP/s instead of 240).
INLINE void strain_by(int what, const Trial *t, size_t first, size_t end) {
    IntPart sum[CHAINS], x = (IntPart)((float)t->n - (FloatPart){0});
    UNROLL for (int j = 0; j < CHAINS; j++) sum[j] = x + j;
    for (size_t i = first * ROUNDS; i < end * ROUNDS; i++)
        UNROLL for (int j = 0; j < CHAINS; j++)
            if (what == READ) sum[j] ^= *read_from(t, i, j);
            else if (what == DOT) sum[j] = dot4(sum[j], x, sum[j]);  // x and x would share one
            else if (what == DOT_PAIRS) sum[j] = dot_pairs(sum[j], x, sum[j]);
            else sum[j] = (IntPart)fused((FloatPart)x, (FloatPart)x, (FloatPart)sum[j]);
    UNROLL for (int j = 1; j < CHAINS; j++) sum[0] ^= sum[j];
    (void)*(volatile IntPart *)sum;  // so that no work is left out
}
static void strain(void *job, int thread, int first, int end) {
    const Trial *t = job;
    (void)thread;
    if (t->what == READ) strain_by(READ, t, first, end);
    if (t->what == MULTIPLY) strain_by(MULTIPLY, t, first, end);
    if (t->what == DOT) strain_by(DOT, t, first, end);
    if (t->what == DOT_PAIRS) strain_by(DOT_PAIRS, t, first, end);
}

// How often a second an item or step is done, times its worth. The text is in the cache already.
// A ceiling is one only if it can be kept up (Zen 5: 7 % more in 7 ms than in longer runs).
static double attempt(Session *s, Trial *t, Text *text) {
    double start = seconds(), times = 0;
    for (; t->what != STEPS && seconds() < start + .2; times++) parallel(&s->pool, t->n, strain, t);
    for (text->pos = t->from; t->what == STEPS && text->pos < t->from + t->n; catch_up(s, text))
        text->ids.n = (size_t)(text->pos + t->batch);
    return (t->what == STEPS ? 1 : times * t->worth) * t->n / (seconds() - start);
}
static int rising(const void *a, const void *b) {
    return *(const double *)a < *(const double *)b ? -1 : *(const double *)a > *(const double *)b;
}
static void print_median(Session *s, const char *name, const char *end, const double *of) {
    double sorted[TRIALS];
    qsort(memcpy(sorted, of, sizeof sorted), TRIALS, sizeof *of, rising);
    print(&s->out, "%s%s %.*f", name, end, sorted[TRIALS / 2] < 100 ? 2 : 0, sorted[TRIALS / 2]);
}

// The machine's ceilings, speeds and their share of them: one `name value unit` a line. All are
// tried in turn and each share is of one turn, as a shared machine drifts; medians are printed.
static void run_bench(Session *s) {
    need_state(s, 0, INFINITY, 1);
    const Config *c = &s->model.config;
    Cost cost = cost_of(c);
    int context = s->state.context, prompt = least(512, context), items = s->pool.threads << 12;
    int depth = least((int)s->options->depth, context - 1);
    int n = (int)fmin((double)(s->model.file.size / (ROUNDS * ROUND)), INT_MAX);
    if (n == 0) die("%s: too small to measure anything with", s->model.file.path);
    double bytes = 1e-9 * ROUNDS * ROUND, sums = bytes / 4 * 2;
    enum { SUMS, DOTS, PROMPT, READS, DECODE, DEEP };
    Trial trials[] = {
        {"multiply-add", "GFLOP/s", MULTIPLY, items, .worth = sums},
        {"dot-product", "GOP/s", c->type == Q4 ? DOT_PAIRS : DOT, items, .worth = sums * 4},
        {"prompt", "tokens/s", STEPS, prompt, 0, prompt,
         is_quantized(c->type) ? DOTS : SUMS, .use = 2e-9 * cost.products},
        {"read", "GB/s", READ, n, .worth = bytes, .at = s->model.file.at},
        {"decode", "tokens/s", STEPS, least(64, context), 0, 1, READS, .use = 1e-9 * cost.bytes},
        {"decode-deep", "tokens/s", STEPS, least(64, context - depth), depth, 1, DECODE, .use = 1}};
    int count = depth > 0 ? COUNT(trials) : DEEP;
    Text text = {0};
    Progress progress = {"measuring", TRIALS * count, seconds(), 0};
    for (int i = 0; i < most(prompt, depth + 64) && i < context; i++)
        push(&text.ids, i * 7 % c->vocab_size);
    catch_up(s, &text);
    for (int i = 0; i < TRIALS * count; i++) {
        trials[i % count].speed[i / count] = attempt(s, &trials[i % count], &text);
        show_progress(&progress, i + 1);
    }
    print(&s->out, "threads %d threads\n", s->pool.threads);
    for (Trial *t = trials; t < trials + count; t++) {
        double shares[TRIALS];
        for (int i = 0; i < TRIALS; i++)
            shares[i] = 100 * t->speed[i] * t->use / trials[t->limit].speed[i];
        if (t == trials + DEEP) print(&s->out, "depth %d tokens\n", depth);
        print_median(s, t->name, "", t->speed), print(&s->out, " %s\n", t->unit);
        if (t->what == STEPS) print_median(s, t->name, "-share", shares), print(&s->out, " %%\n");
    }
    free_text(&text);
}

// ------------------------------------------------------------------------------------------------
// 13. The command line

static const struct Mode { const char *name, *does; void (*run)(Session *s); } modes[] = {
    {"generate",   "continue the prompt (default)",                          run_generate},
    {"chat",       "talk: turns from -i and standard input",               run_chat},
    {"batch",      "complete the lines of -b, JSON lines out",             run_batch},
    {"perplexity", "how well the text of -i or -f is foreseen",            run_score},
    {"score",      "the same, token by token",                             run_score},
    {"logits",     "token ids of -f to logits: float32 (tokens, vocabulary)", run_logits},
    {"tokens",     "ids of the prompt, one a line, without BOS",             run_tokens},
    {"info",       "what the checkpoint and the tokenizer hold",             run_info},
    {"quantize",   "write the model as -q to -o",                            run_quantize},
    {"bench",      "measure the machine and what share of it is reached",    run_bench},
};

// One row an option: parsing, checking and the usage are all read from here. A value N is whole and
// an X is not, both in bounds; what is none of these is text; an option of no value is a switch.
#define TO(field) offsetof(Options, field)
static const struct Option { char letter; const char *value, *does; size_t at; double least, most; }
options[] = {
    {'i', "TEXT", "prompt, - for standard input",                        TO(prompt), 0, 0},
    {'f', "FILE", "prompt or token ids from a file",                     TO(file), 0, 0},
    {'o', "FILE", "results go there (standard output)",                  TO(output), 0, 0},
    {'m', "MODE", "what to do, below",                                   TO(mode), 0, 0},
    {'z', "FILE", "tokenizer (NAME.tokenizer.bin, tokenizer.bin)",       TO(tokenizer), 0, 0},
    {'n', "N",    "tokens to generate (256)",                            TO(steps), 0, 1e9},
    {'t', "X",    "temperature, 0 takes the likeliest (1.0)",    TO(taste.temperature), 0, 1e3},
    {'p', "X",    "top-p, 0 and 1: off (0.9)",                           TO(taste.top_p), 0, 1},
    {'k', "N",    "top-k, 0: off (0)",                                   TO(taste.top_k), 0, 1e9},
    {'l', "X",    "min-p, 0: off (0)",                                   TO(taste.min_p), 0, 1},
    {'r', "X",    "repetition penalty, 1: off (1.0)",              TO(taste.penalty), 1e-3, 1e3},
    {'s', "N",    "seed of the random numbers (time)",                   TO(seed), 0, 9e15},
    {'c', "N",    "context in tokens (the model's)",                     TO(context), 1, 1e9},
    {'j', "N",    "threads (physical cores)",                       TO(threads), 1, MAX_THREADS},
    {'y', "TEXT", "chat: system prompt",                                 TO(system), 0, 0},
    {'x', "NAME", "chat: format, if not the tokenizer's",                TO(format), 0, 0},
    {'b', "FILE", "batch: prompts, one a line, - for standard input",    TO(batch), 0, 0},
    {'w', "N",    "batch: prompts at once (8); logits: tokens at once",  TO(width), 1, 1e6},
    {'q', "TYPE", "quantize to q8 or q4",                                TO(type), 0, 0},
    {'d', "N",    "bench: depth of the second decoding",                 TO(depth), 0, 1e9},
    {'v', "",     "say more: errors of quantizing, ids that chat feeds", TO(verbose), 0, 0},
};

static void print_page(bool usage) {
    Output out = open_output(NULL);
    print(&out, usage ? "usage: ./run MODEL [options]\n\noptions\n" : "LLaMA-02 " VERSION "\n");
    for (int i = 0; usage && i < COUNT(options); i++)
        print(&out, "  -%c %-5s %s\n", options[i].letter, options[i].value, options[i].does);
    if (usage) print(&out, "  -h       this page; --version prints " VERSION "\n\nmodes\n");
    for (int i = 0; usage && i < COUNT(modes); i++)
        print(&out, "  %-10s %s\n", modes[i].name, modes[i].does);
    if (usage) print(&out, "\nexit status: 0 done, %d failed, %d wrong usage\n", FAILED, MISUSED);
    close_output(&out);
    exit(0);
}

// The number that a word is to its very end, within the option's bounds.
static double parse_number(const struct Option *o, const char *word) {
    char *end;
    bool whole = *o->value == 'N', spaced = isspace((unsigned char)*word);
    double v = whole ? (double)strtoll(word, &end, 10) : (double)strtof(word, &end);
    if (end > word && !*end && !spaced && v >= o->least && v <= o->most) return v;
    misuse("-%c wants a %snumber of %.10g to %.10g, not '%s'", o->letter, whole ? "whole " : "",
           o->least, o->most, word);
}

static Options parse_options(int argc, char **argv) {
    Options o = {.mode = "generate", .taste = {1, 0.9f, 0, 1, 0}, .steps = 256, .seed = -1};
    for (int i = 1; i < argc; i++) {
        const char *word = argv[i];
        const struct Option *option = options, *end = options + COUNT(options);
        bool help = strcmp(word, "-h") == 0 || strcmp(word, "--help") == 0;
        if (help || strcmp(word, "--version") == 0) print_page(help);
        if (*word != '-') {
            if (o.model) misuse("two models: '%s' and '%s'", o.model, word);
            o.model = word;
            continue;
        }
        while (option < end && (word[1] != option->letter || word[2])) option++;
        if (option == end) misuse("unknown option '%s'", word);
        if (*option->value && ++i == argc) misuse("%s wants a value", word);
        void *at = (char *)&o + option->at;
        if (option->most > 0) *(double *)at = parse_number(option, argv[i]);
        else *(const char **)at = argv[i];
    }
    if (!o.model) misuse("no model");
    if (o.batch) o.mode = "batch";
    return o;
}

// A mapped file that becomes shorter while it is read ends here.
static void on_bus_error(int signal) {
    static const char text[] = "run: a file became shorter while it was being read\n";
    (void)signal, (void)!write(STDERR_FILENO, text, sizeof text - 1);
    _exit(FAILED);
}

int main(int argc, char **argv) {
    static Session s;
    Options o = parse_options(argc, argv);
    const struct Mode *mode = modes, *end = modes + COUNT(modes);
    while (mode < end && strcmp(mode->name, o.mode) != 0) mode++;
    if (mode == end) misuse("unknown mode '%s'", o.mode);
    signal(SIGBUS, on_bus_error);
    signal(SIGXFSZ, SIG_IGN);  // a file too large is an error of its write
    s.options = &o, s.seed = (uint64_t)(o.seed < 0 ? (double)time(NULL) : o.seed);
    s.model = open_model(o.model);
    int worth = (int)(s.model.file.size >> 21);  // threads: 2 MB of weights bring what one costs
    start_pool(&s.pool, o.threads ? (int)o.threads : most(1, least(usable_cores(), worth)));
    s.out = open_output(o.output);
    mode->run(&s);
    close_output(&s.out);
    stop_pool(&s.pool);
    if (s.state.arena.at) close_state(&s.state);
    if (s.tokenizer_path) close_tokenizer(&s.tokenizer);
    free(s.tokenizer_path), free(s.candidates), free(s.steps), free_text(&s.text);
    close_model(&s.model);
    return 0;
}
