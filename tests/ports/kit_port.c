/* A Llama in plain C, as a stranger's port would be: it reads a kit (python -m parity.kit --out KIT), computes every tap
   of every sequence in float32, judges itself by the kit's bounds and writes OUT/NAME.f32 for `parity.kit --check`.

     cc -O2 -o kit_port kit_port.c -lm && ./kit_port KIT OUT
     PASS: 33 arrays within their bounds, the worst at 50% (rope.sin)

   A third argument plants one mistake: theta, scaling, pairing, eps, bf16, swapped, heads, mask, document, scale, residual
   or nan. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX = 4096 };
typedef struct { char name[96], file[32]; long offset; int rows, width; } Array;   /* rows of `width` numbers */
typedef struct { char array[96], metric[16]; int first, rows; double bound; } Bound;
static Array arrays[MAX];
static Bound bounds[MAX];
static int n_arrays, n_bounds, n_sequences, first_row[MAX], tokens_of[MAX], N;
static int dim, layers, heads, kv_heads, head_dim, hidden, vocab, tied;
static double theta, eps, factor, low = 1, high = 4, context = 8192;
static const char *kit, *out, *mistake = "";
static int compared, beyond;
static double worst;
static char worst_name[96], first_name[96];

static void die(const char *what, const char *name) { fprintf(stderr, "error: %s %s\n", what, name); exit(2); }
static int wrong(const char *name) { return !strcmp(mistake, name); }
static float *floats(size_t n) { float *p = calloc(n, sizeof *p); return p ? p : (die("no memory", ""), p); }

static void setting(const char *key, double x) {
    struct { const char *key; int *to; } whole[] = {{"dim", &dim}, {"n_layers", &layers}, {"n_heads", &heads},
        {"n_kv_heads", &kv_heads}, {"head_dim", &head_dim}, {"hidden_dim", &hidden}, {"vocab_size", &vocab}, {"tied", &tied}};
    struct { const char *key; double *to; } real[] = {{"norm_eps", &eps}, {"rope_theta", &theta}, {"factor", &factor},
        {"low_freq_factor", &low}, {"high_freq_factor", &high}, {"original_context", &context}};
    for (size_t i = 0; i < sizeof whole / sizeof *whole; i++) if (!strcmp(key, whole[i].key)) *whole[i].to = (int)x;
    for (size_t i = 0; i < sizeof real / sizeof *real; i++) if (!strcmp(key, real[i].key)) *real[i].to = x;
}

static void read_table(void) {
    char line[512], word[96], dtype[16];
    snprintf(line, sizeof line, "%s/kit.txt", kit);
    FILE *f = fopen(line, "r");
    if (!f || !fgets(line, sizeof line, f) || strcmp(line, "nanollama.kit/1\n")) die("not a kit:", kit);
    while (fgets(line, sizeof line, f)) {
        Array *a = &arrays[n_arrays];
        Bound *b = &bounds[n_bounds];
        double x;
        int dims, used, n;
        if (n_arrays == MAX || n_bounds == MAX || n_sequences == MAX) die("a larger table than expected:", kit);
        if (sscanf(line, "config %95s %lf", word, &x) == 2) setting(word, x);
        else if (sscanf(line, "sequence %d %d", &first_row[n_sequences], &tokens_of[n_sequences]) == 2)
            N += tokens_of[n_sequences++];
        else if (sscanf(line, "array %95s %31s %ld %d%n", a->name, a->file, &a->offset, &dims, &used) == 4) {
            for (a->rows = a->width = 1; dims > 0; dims--, used += n) {
                int size;
                if (sscanf(line + used, "%d%n", &size, &n) != 1) die("a bad line:", line);
                if (a->rows == 1 && a->width == 1) a->rows = size; else a->width *= size;
            }
            n_arrays++;
        } else if (sscanf(line, "bound %15s %95s %15s %d %d %lf", dtype, b->array, b->metric, &b->first, &b->rows, &b->bound) == 6)
            n_bounds += !strcmp(dtype, "fp32");
    }
    fclose(f);
}

static void *load(const char *name, size_t item, Array *found) {
    for (int i = 0; i < n_arrays; i++) {
        if (strcmp(arrays[i].name, name)) continue;
        char path[512];
        size_t count = (size_t)arrays[i].rows * arrays[i].width;
        snprintf(path, sizeof path, "%s/%s", kit, arrays[i].file);
        FILE *f = fopen(path, "rb");
        void *data = malloc(item * count);
        if (!f || !data || fseek(f, arrays[i].offset, SEEK_SET) || fread(data, item, count, f) != count) die("cannot read", path);
        fclose(f);
        if (found) *found = arrays[i];
        return data;
    }
    return die("the kit has no array", name), NULL;
}

/* Subtract, square, add; the oracle's token at decided positions. */
static double measure(const Bound *b, const float *mine, const double *exact, int width) {
    double sum = 0, largest = 0;
    int *best = strcmp(b->metric, "tokens") ? NULL : load("best", 4, NULL), differ = 0;
    int *decided = best ? load("decided.fp32", 4, NULL) : NULL;
    for (int r = b->first; r < b->first + b->rows; r++) {
        int top = 0;
        for (int i = 0; i < width; i++) {
            double d = mine[(size_t)r * width + i] - exact[(size_t)r * width + i];
            sum += d * d;
            if (!(fabs(d) <= largest)) largest = fabs(d);
            if (mine[(size_t)r * width + i] > mine[(size_t)r * width + top]) top = i;
        }
        if (best) differ += decided[r] && top != best[r];
    }
    free(best), free(decided);
    return best ? differ : !strcmp(b->metric, "max") ? largest : sqrt(sum / ((double)b->rows * width));
}

/* Write an array and judge it by every bound that it has. */
static void emit(const char *prefix, const char *tap, const float *mine) {
    char name[96], path[512];
    Array a;
    snprintf(name, sizeof name, "%s%s", prefix, tap);
    double *exact = load(name, 8, &a);
    snprintf(path, sizeof path, "%s/%s.f32", out, name);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(mine, 4, (size_t)a.rows * a.width, f) != (size_t)a.rows * a.width || fclose(f)) die("cannot write", path);
    for (int i = 0; i < n_bounds; i++) {
        Bound *b = &bounds[i];
        if (strcmp(b->array, name) || !strncmp(b->metric, "kl_", 3)) continue;   /* KL is left to parity.kit --check */
        double value = measure(b, mine, exact, a.width);
        if (b->bound > 0 && !(value / b->bound <= worst)) worst = value / b->bound, strcpy(worst_name, name);
        if (value <= b->bound) continue;                                         /* false for a NaN */
        if (!beyond++) strcpy(first_name, name);
    }
    compared++;
    free(exact);
}

static void norm(float *y, const float *x, const char *prefix, const char *weight) {
    char name[96];
    snprintf(name, sizeof name, "%s%s", prefix, weight);
    float *w = load(name, 4, NULL);
    for (int r = 0; r < N; r++, x += dim, y += dim) {
        float square = 0;
        for (int i = 0; i < dim; i++) square += x[i] * x[i];
        float scale = 1 / sqrtf(square / dim + (float)(wrong("eps") ? 1e-6 : eps));
        for (int i = 0; i < dim; i++) y[i] = x[i] * scale * w[i];
    }
    free(w);
}

static float bf16(float x) {
    uint32_t word;
    memcpy(&word, &x, 4);
    word = (word + 0x7fff + (word >> 16 & 1)) & 0xffff0000;
    return memcpy(&x, &word, 4), x;
}

/* y (N, rows) = x (N, columns) W^T. Four sums side by side: one of thousands of terms rounds more than the references do. */
static void linear(float *y, const float *x, const char *prefix, const char *weight, int rows, int columns) {
    char name[96];
    snprintf(name, sizeof name, "%s%s", prefix, weight);
    float *w = load(name, 4, NULL);
    for (int r = 0; r < N; r++)
        for (int o = 0; o < rows; o++) {
            const float *a = x + (size_t)r * columns, *b = w + (size_t)o * columns;
            float sum[4] = {0};
            for (int i = 0; i < columns; i++) sum[i % 4] += a[i] * b[i];
            float total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
            y[(size_t)r * rows + o] = wrong("bf16") ? bf16(total) : total;
        }
    free(w);
}

/* Meta's layout: features 2j and 2j+1 turn together. Angles are float32: part of the model, far out it shows. */
static float angle(int position, int j) {
    const float pi = 3.14159265358979f;
    float f = 1 / powf((float)(wrong("theta") ? 10000 : theta), 2.0f * j / head_dim), wave = 2 * pi / f;
    if (factor && !wrong("scaling") && wave > (float)(context / high)) {
        float smooth = (float)((context / wave - low) / (high - low));
        f = wave > (float)(context / low) ? f / (float)factor : (1 - smooth) * f / (float)factor + smooth * f;
    }
    return position * f;
}

static void rotate(float *y, const float *x, int n_heads) {
    for (int s = 0; s < n_sequences; s++)
        for (int t = 0; t < tokens_of[s]; t++)
            for (int h = 0; h < n_heads; h++)
                for (int j = 0; j < head_dim / 2; j++) {
                    int apart = wrong("pairing") ? head_dim / 2 : 1;
                    size_t at = ((size_t)(first_row[s] + t) * n_heads + h) * head_dim + (apart > 1 ? j : 2 * j);
                    float c = cosf(angle(t, j)), d = sinf(angle(t, j)), even = x[at], odd = x[at + apart];
                    y[at] = even * c - odd * d;
                    y[at + apart] = even * d + odd * c;
                }
}

static void attention(float *y, const float *q, const float *k, const float *v) {
    int group = heads / kv_heads;
    float *p = floats(N);
    for (int s = 0; s < n_sequences; s++)
        for (int h = 0; h < heads; h++)
            for (int t = 0; t < tokens_of[s]; t++) {
                int kv = wrong("heads") ? h % kv_heads : h / group, seen = t + 1 + (wrong("mask") && t + 1 < tokens_of[s]);
                int from = wrong("document") ? 0 : first_row[s], to_row = first_row[s] + seen;   /* rows that are seen */
                const float *query = q + ((size_t)(first_row[s] + t) * heads + h) * head_dim;
                float *to = y + ((size_t)(first_row[s] + t) * heads + h) * head_dim, most = -INFINITY, total = 0;
                for (int u = from; u < to_row; u++) {
                    const float *key = k + ((size_t)u * kv_heads + kv) * head_dim;
                    float sum = 0;
                    for (int i = 0; i < head_dim; i++) sum += query[i] * key[i];
                    p[u] = wrong("scale") ? sum : sum / sqrtf((float)head_dim);
                    if (p[u] > most) most = p[u];
                }
                for (int u = from; u < to_row; u++) total += p[u] = expf(p[u] - most);
                memset(to, 0, sizeof *to * head_dim);
                for (int u = from; u < to_row; u++)
                    for (int i = 0; i < head_dim; i++) to[i] += p[u] / total * v[((size_t)u * kv_heads + kv) * head_dim + i];
            }
    free(p);
}

int main(int argc, char **argv) {
    if (argc < 3) die("usage: kit_port KIT OUT", "[MISTAKE]");
    kit = argv[1], out = argv[2], mistake = argc > 3 ? argv[3] : "";
    read_table();
    int q_width = heads * head_dim, kv_width = kv_heads * head_dim, *tokens = load("tokens", 4, NULL);
    float *h = floats((size_t)N * dim), *x = floats((size_t)N * dim), *y = floats((size_t)N * (dim > q_width ? dim : q_width));
    float *q = floats((size_t)N * q_width), *k = floats((size_t)N * kv_width), *v = floats((size_t)N * kv_width);
    float *qr = floats((size_t)N * q_width), *kr = floats((size_t)N * kv_width);
    float *gate = floats((size_t)N * hidden), *up = floats((size_t)N * hidden), *logits = floats((size_t)N * vocab);
    float *table = load("tok_embeddings.weight", 4, NULL);
    for (int r = 0; r < N; r++) memcpy(h + (size_t)r * dim, table + (size_t)tokens[r] * dim, 4 * dim);
    emit("", "embed", h);
    for (int l = 0; l < layers; l++) {
        char p[32];
        snprintf(p, sizeof p, "layers.%d.", l);
        norm(x, h, p, "attention_norm.weight"), emit(p, "attn_norm", x);
        linear(q, x, p, "attention.wq.weight", q_width, dim), emit(p, "q", q);
        linear(k, x, p, "attention.wk.weight", kv_width, dim), emit(p, "k", k);
        linear(v, x, p, "attention.wv.weight", kv_width, dim), emit(p, "v", v);
        rotate(qr, q, heads), emit(p, "q_rope", qr);
        rotate(kr, k, kv_heads), emit(p, "k_rope", kr);
        attention(y, qr, kr, v), emit(p, "attn_mix", y);
        linear(x, y, p, "attention.wo.weight", dim, q_width), emit(p, "attn_out", x);
        for (int i = 0; i < N * dim; i++) h[i] += x[i];
        norm(x, h, p, "ffn_norm.weight"), emit(p, "ffn_norm", x);
        linear(gate, x, p, wrong("swapped") ? "feed_forward.w3.weight" : "feed_forward.w1.weight", hidden, dim);
        linear(up, x, p, wrong("swapped") ? "feed_forward.w1.weight" : "feed_forward.w3.weight", hidden, dim);
        emit(p, "gate", gate), emit(p, "up", up);
        for (int i = 0; i < N * hidden; i++) gate[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
        emit(p, "ffn_mix", gate);
        linear(y, gate, p, "feed_forward.w2.weight", dim, hidden), emit(p, "ffn_out", y);
        for (int i = 0; i < N * dim; i++) h[i] = (wrong("residual") ? x[i] : h[i]) + y[i];
        emit(p, "out", h);
    }
    norm(x, h, "", "norm.weight"), emit("", "final_norm", x);
    linear(logits, x, "", tied ? "tok_embeddings.weight" : "output.weight", vocab, dim);
    if (wrong("nan")) logits[vocab] = NAN;
    emit("", "logits", logits);

    Array rope;
    int *positions = load("rope.positions", 4, &rope), pairs = head_dim / 2;
    float *cosine = floats((size_t)rope.rows * pairs), *sine = floats((size_t)rope.rows * pairs);
    for (int i = 0; i < rope.rows * pairs; i++)
        cosine[i] = cosf(angle(positions[i / pairs], i % pairs)), sine[i] = sinf(angle(positions[i / pairs], i % pairs));
    emit("rope.", "cos", cosine), emit("rope.", "sin", sine);

    if (beyond) return printf("FAIL: %d bounds exceeded, first at %s\n", beyond, first_name), 1;
    return printf("PASS: %d arrays within their bounds, the worst at %.0f%% (%s)\n", compared, 100 * worst, worst_name), 0;
}
