/* tests/fuzz.c - bytes of all kinds against the borders of run.c, by clang's libFuzzer.
 *
 *   make fuzz FUZZ_SECONDS=60      each target of the table at the end for a quarter of it
 *   FUZZ=model tests/fuzz FILE...  one target, these inputs: how a finding is looked at
 *
 * die() is no finding: it comes back here, and what it left behind is taken away. A return that leaves
 * memory behind is one, and so are a broken promise and whatever the sanitizers say.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

// ------------------------------------------------------------------------------------------------
// What a dying run.c leaves behind is known here, and exit() comes back

enum { MOST_KEPT = 1 << 12 };

static struct { void *at; size_t mapped; } left_behind[MOST_KEPT];  // mapped 0: of malloc
static int n_kept, opened = -1;
static jmp_buf started;

static void *keep(void *p, size_t mapped) {
    if (p && p != MAP_FAILED) {
        if (n_kept == MOST_KEPT)
            abort();
        left_behind[n_kept].at = p, left_behind[n_kept++].mapped = mapped;
    }
    return p;
}

static void forget(const void *p) {
    for (int i = n_kept; i-- > 0;)
        if (left_behind[i].at == p) {
            left_behind[i] = left_behind[--n_kept];
            return;
        }
}

static void drop_all(void) {
    while (n_kept-- > 0)
        if (left_behind[n_kept].mapped)
            munmap(left_behind[n_kept].at, left_behind[n_kept].mapped);
        else
            free(left_behind[n_kept].at);
    n_kept = 0;
    if (opened >= 0)
        close(opened);
    opened = -1;
}

static void *kept_realloc(void *p, size_t n) {
    forget(p);
    return keep(realloc(p, n), 0);
}

__attribute__((noreturn)) static void come_back(void) { longjmp(started, 1); }

#define calloc(n, size) keep(calloc(n, size), 0)
#define realloc(p, n) kept_realloc(p, n)
#define strdup(text) keep(strdup(text), 0)
#define strndup(text, n) keep(strndup(text, n), 0)
#define free(p) (forget(p), (free)(p))
#define mmap(at, n, ...) keep(mmap(at, n, __VA_ARGS__), n)
#define munmap(p, n) (forget(p), (munmap)(p, n))
#define open(...) (opened = open(__VA_ARGS__))
#define close(fd) (opened = -1, (close)(fd))
#define exit(status) ((void)(status), come_back())
#define main run_main
#include "../run.c"
#undef main

#define PROMISE(what) do { if (!(what)) __builtin_trap(); } while (0)

// ------------------------------------------------------------------------------------------------
// Inputs as files

enum { INPUT, OUTPUT, FILES };
static int file[FILES];        // without a name, kept open
static char path[FILES][32];
static FILE *output;           // the one of OUTPUT

static void put_input(const uint8_t *data, size_t n) {
    PROMISE(ftruncate(file[INPUT], 0) == 0 && pwrite(file[INPUT], data, n, 0) == (ssize_t)n);
}

// ------------------------------------------------------------------------------------------------
// A checkpoint: opened, run, quantized, and that run as well

enum { MOST_BYTES = 1 << 18, HERE = 24 };  // so a few tokens take no time

// A header alone, of our format, is filled up to what its shapes want. Returns the new size.
static size_t fill_up(uint8_t *data, size_t n) {
    Model m = {.file = {"fuzz", data, n, "fuzz"}};
    if (n < HEADER || memcmp(data, MAGIC, sizeof MAGIC) != 0)
        return n;
    memcpy(data + offsetof(Header, size), &(uint64_t){n}, 8);
    m.config = ((const Header *)(const void *)data)->config;
    check_config(&m.file, &m.config);
    m.layers = new_array((size_t)m.config.n_layers, sizeof *m.layers);
    size_t wanted = take_ours(&m);
    free(m.layers);
    wanted = n == HEADER && wanted <= MOST_BYTES ? wanted : n;
    for (size_t i = n; i < wanted; i++) {
        uint64_t noise = hash(no_bytes, &i, sizeof i) >> 40;
        data[i] = (uint8_t)(i % 4 == 3 ? 0x3c | (noise & 0x83) : noise);  // f32 of around 1
    }
    n = wanted;
    memcpy(data + offsetof(Header, size), &(uint64_t){n}, 8);
    return n;
}

static void run_some(const Model *m) {
    enum { TOKENS = 5 };
    const Config *c = &m->config;
    int context = least(HERE, c->max_seq_len), n = least(TOKENS, context);
    Step steps[HERE];
    Pool pool;
    State s;
    uint64_t random = 1;
    Candidate *candidates = NEW(Candidate, 2 * (size_t)c->vocab_size);
    start_pool(&pool, 1);
    s = (State){.model = m, .pool = &pool, .context = context, .slots = 1, .batch = TOKENS,
                .logit_rows = TOKENS};
    open_state(&s);
    for (int at = 0; at < context; at += n) {
        n = least(n, context - at);
        for (int t = 0; t < n; t++)
            steps[t] = (Step){(at + t) * 31 % c->vocab_size, 0, at + t};
        int first = at / n % n;
        forward(&s, steps, n, first);
        float *scores = logits(&s, first, n - first);
        Taste taste = {at ? 1 : 0, 0.9f, 0.01f, 1.1f, at % 7};
        int id = pick(scores, c->vocab_size, &taste, &random, candidates, &(Tokens){&steps[0].id, 1, 1});
        PROMISE(id >= 0 && id < c->vocab_size);
    }
    close_state(&s);
    stop_pool(&pool);
    free(candidates);
}

static void quantize(Session *s, const Options *o) {
    s->options = o;
    start_pool(&s->pool, 1);
    s->out = (Output){.file = output};
    rewind(output);
    PROMISE(ftruncate(file[OUTPUT], 0) == 0);
    run_quantize(s);
    PROMISE(fflush(output) == 0);
    stop_pool(&s->pool);
    Model packed = open_model(path[OUTPUT]);
    run_some(&packed);
    close_model(&packed);
}

static void try_model(const uint8_t *data, size_t n) {
    static uint8_t content[MOST_BYTES];
    Options o = {.output = path[OUTPUT], .type = n & 1 ? "q8" : "q4", .model = "fuzz"};
    if (n > MOST_BYTES)
        return;
    memcpy(content, data, n);
    put_input(content, fill_up(content, n));
    Session s = {.model = open_model(path[INPUT])};
    run_some(&s.model);
    if (s.model.config.type != Q4)
        quantize(&s, &o);
    close_model(&s.model);
}

// ------------------------------------------------------------------------------------------------
// Tokenizers, and text through them

static bool has_all_bytes(const Tokenizer *t) {
    for (int b = 0; b < 256; b++)
        if (!find_token(t, &(uint8_t){(uint8_t)b}, 1))
            return false;
    return true;
}

static Bytes round_trip(const Tokenizer *t, const char *text, size_t n) {
    Tokens ids = {0};
    Bytes out = {0};
    Decoder d = {.tokenizer = t};
    encode(&ids, t, text, n);
    for (size_t i = 0; i < ids.n; i++) {
        PROMISE(ids.at[i] >= 0 && (uint32_t)ids.at[i] < t->header.n_tokens);
        decode(&out, &d, ids.at[i]);
    }
    flush(&out, &d);
    free(ids.at);
    return out;
}

// Any bytes go round unchanged: but SentencePiece's sign for a space becomes one, and NFC, which then
// has nothing more to change, changes what it is for.
static void check_text(const Tokenizer *t, const char *text, size_t n) {
    Bytes once = round_trip(t, text, n), wanted = {0};
    Bytes twice = round_trip(t, once.at, once.n);
    bool composes = t->header.flags & NFC;
    append(&wanted, " ", t->header.flags & DUMMY_PREFIX ? 1 : 0);
    for (size_t i = 0; i < n; i++)
        if (t->header.kind == SENTENCEPIECE && n - i >= 3 && memcmp(text + i, "\xE2\x96\x81", 3) == 0) {
            append(&wanted, " ", 1);
            i += 2;
        } else {
            append(&wanted, text + i, 1);
        }
    size_t prefix = n > 0 && t->header.flags & DUMMY_PREFIX;
    if (!composes && has_all_bytes(t))
        PROMISE(once.n == (n ? wanted.n - prefix : 0)
                && (once.n == 0 || memcmp(once.at, wanted.at + prefix, once.n) == 0));
    if (has_all_bytes(t))
        PROMISE(twice.n == once.n && (once.n == 0 || memcmp(twice.at, once.at, once.n) == 0));
    free(once.at);
    free(twice.at);
    free(wanted.at);
}

// Two bytes are the model's vocabulary; the header's size is made right.
static void try_tokenizer(const uint8_t *data, size_t n) {
    static uint8_t content[MOST_BYTES];
    static const char text[] = "Hello, world's 2 \xe2\x96\x81 e\xcc\x81 \xea\xb0\x80\xe1\x86\xa8\xff\xf0\x9f\x98\n\n 12345";
    if (n < 2 || n > MOST_BYTES)
        return;
    int vocab = 1 + (data[0] | data[1] << 8);
    memcpy(content, data + 2, n -= 2);
    if (n >= sizeof(TokenizerHeader) && memcmp(content, "LLAMA02T", 8) == 0)
        memcpy(content + offsetof(TokenizerHeader, size), &(uint64_t){n}, 8);
    put_input(content, n);
    Tokenizer t = open_tokenizer(path[INPUT], vocab);
    check_text(&t, text, sizeof text - 1);
    check_text(&t, (char *)content + n - least((int)n, 64), (size_t)least((int)n, 64));
    for (int id = -1; id <= vocab; id++)
        PROMISE(piece(&t, id).n < MOST_BYTES && (!ends_text(&t, id) || id < vocab));
    close_tokenizer(&t);
}

// The tokenizers that TOKENIZERS names, separated by colons, on the text; the first byte chooses.
static void try_text(const uint8_t *data, size_t n) {
    enum { MOST_TOKENIZERS = 8 };
    static Tokenizer tokenizers[MOST_TOKENIZERS];
    static int count;
    if (count == 0) {
        char *names = strdup(getenv("TOKENIZERS") ? getenv("TOKENIZERS") : "tokenizer.bin"), *rest = names;
        for (char *name; count < MOST_TOKENIZERS && (name = strsep(&rest, ":"));)
            tokenizers[count++] = open_tokenizer(name, 1 << 20);
        n_kept = 0;  // these stay
    }
    if (n > 0)
        check_text(&tokenizers[data[0] % count], (const char *)data + 1, n - 1);
}

// ------------------------------------------------------------------------------------------------
// Options: words separated by zeros

static void check_number(const Options *o, const struct Option *option) {
    const char *at = (const char *)o + option->at;
    Options usual = parse_options(2, (char *[]){"run", "model", NULL});
    double v = *(const double *)(const void *)at;
    bool left_out = memcmp(at, (char *)&usual + option->at, 8) == 0;
    PROMISE(left_out || (v >= option->least && v <= option->most));
}

static void try_options(const uint8_t *data, size_t n) {
    enum { MOST_WORDS = 64 };
    static char words[4096];
    char *argv[MOST_WORDS + 1] = {"run"};
    int argc = 1;
    if (n >= sizeof words)
        return;
    memcpy(words, data, n);
    words[n] = '\0';
    for (char *p = words; p < words + n && argc < MOST_WORDS; p += strlen(p) + 1)
        argv[argc++] = p;
    Options o = parse_options(argc, argv);
    PROMISE(o.model && o.mode);
    for (int i = 0; i < COUNT(options); i++)
        if (options[i].most > 0)
            check_number(&o, &options[i]);
}

// ------------------------------------------------------------------------------------------------
// All of them

static const struct { const char *name; void (*try)(const uint8_t *data, size_t n); } targets[] = {
    {"model", try_model}, {"tokenizer", try_tokenizer}, {"text", try_text}, {"options", try_options},
};
static void (*target)(const uint8_t *data, size_t n);

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    for (int i = 0; i < COUNT(targets); i++)
        if (strcmp(targets[i].name, getenv("FUZZ") ? getenv("FUZZ") : "") == 0)
            target = targets[i].try;
    if (!target)
        fprintf(stderr, "FUZZ names no target: model, tokenizer, text or options\n"), _exit(MISUSED);
    for (int i = 0; i < FILES; i++) {
        file[i] = memfd_create("fuzz", 0);
        snprintf(path[i], sizeof path[i], "/proc/self/fd/%d", file[i]);
    }
    output = fdopen(file[OUTPUT], "wb");
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    if (setjmp(started) == 0) {
        target(data, n);
        PROMISE(n_kept == 0);
    } else {
        drop_all();
    }
    return 0;
}
