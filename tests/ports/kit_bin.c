/* A Llama 2 that knows nothing of kits, as llama2.c and llm.c read their files: FOLDER/model.bin is mapped by its header
   of seven int32, FOLDER/state.0.bin, state.1.bin, ... hold tokens and the logits to meet. A token at a time, with a cache.

     python -m parity.kit --unpack kits/llama2 --out FOLDER
     cc -O2 -o kit_bin kit_bin.c -lm && ./kit_bin FOLDER OUT
     4 states: logits within 1.6e-04, losses within 2.3e-06

   OUT/logits.f32 is for `parity.kit --check`. A third argument plants one mistake: eps, pairing, swapped, position (stuck
   at 0), cache (a state is not cleared: the next one sees the last one's tokens) or residual. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HEADER = 256, MAGIC = 20240327 };
typedef struct { int32_t dim, hidden, layers, heads, kv_heads, vocab, context; } Config;
static Config c;
static const float *embedding, *attention_norm, *wq, *wk, *wv, *wo, *ffn_norm, *w1, *w2, *w3, *last_norm, *head;
static const char *mistake = "";

static void die(const char *what, const char *name) { fprintf(stderr, "error: %s %s\n", what, name); exit(2); }
static int wrong(const char *name) { return !strcmp(mistake, name); }

static void *read_all(const char *path, long *size) {
    FILE *f = fopen(path, "rb");
    if (!f) return NULL;
    fseek(f, 0, SEEK_END), *size = ftell(f), rewind(f);
    char *data = malloc(*size);
    if (!data || fread(data, 1, *size, f) != (size_t)*size) die("cannot read", path);
    return fclose(f), data;
}

/* The order of run.c: each kind of weight of all layers together; tables of RoPE before the head are skipped. */
static void map_model(const char *path) {
    long size;
    char *data = read_all(path, &size);
    if (!data) die("no", path);
    memcpy(&c, data, sizeof c);
    int shared = c.vocab > 0;
    c.vocab = abs(c.vocab);
    const float *at = (const float *)(data + sizeof c);
    size_t L = c.layers, C = c.dim, kv = (size_t)c.dim / c.heads * c.kv_heads, F = c.hidden;
    embedding = at, at += (size_t)c.vocab * C, attention_norm = at, at += L * C;
    wq = at, at += L * C * C, wk = at, at += L * kv * C, wv = at, at += L * kv * C, wo = at, at += L * C * C;
    ffn_norm = at, at += L * C, w1 = at, at += L * F * C, w2 = at, at += L * C * F, w3 = at, at += L * F * C;
    last_norm = at, at += C + (size_t)c.context * (c.dim / c.heads);
    head = shared ? embedding : at;
    if ((const char *)(shared ? at : at + (size_t)c.vocab * C) != data + size) die("another size than its header says:", path);
}

static void norm(float *y, const float *x, const float *w) {
    float square = 0;
    for (int i = 0; i < c.dim; i++) square += x[i] * x[i];
    float scale = 1 / sqrtf(square / c.dim + (wrong("eps") ? 1e-6f : 1e-5f));
    for (int i = 0; i < c.dim; i++) y[i] = x[i] * scale * w[i];
}

static void linear(float *y, const float *x, const float *w, int rows, int columns) {
    for (int o = 0; o < rows; o++, w += columns) {
        float sum[4] = {0};
        for (int i = 0; i < columns; i++) sum[i % 4] += x[i] * w[i];
        y[o] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
}

static void rotate(float *x, int heads, int position) {
    int D = c.dim / c.heads, apart = wrong("pairing") ? D / 2 : 1;
    for (int j = 0; j < D / 2; j++) {
        float angle = position / powf(10000, 2.0f * j / D), cosine = cosf(angle), sine = sinf(angle);
        for (int h = 0; h < heads; h++) {
            float *a = x + h * D + (apart > 1 ? j : 2 * j), *b = a + apart, even = *a, odd = *b;
            *a = even * cosine - odd * sine, *b = even * sine + odd * cosine;
        }
    }
}

/* One token: keys and values of `seen` tokens are in the cache, (layer, token, kv heads, head_dim). */
static void forward(float *logits, int token, int seen, int position, float *keys, float *values, int room) {
    int D = c.dim / c.heads, kv = D * c.kv_heads;
    float h[c.dim], x[c.dim], q[c.dim], y[c.dim], gate[c.hidden], up[c.hidden], p[seen + 1];
    memcpy(h, embedding + (size_t)token * c.dim, sizeof h);
    for (int l = 0; l < c.layers; l++) {
        float *K = keys + (size_t)l * room * kv, *V = values + (size_t)l * room * kv;
        norm(x, h, attention_norm + l * c.dim);
        linear(q, x, wq + (size_t)l * c.dim * c.dim, c.dim, c.dim);
        linear(K + (size_t)seen * kv, x, wk + (size_t)l * kv * c.dim, kv, c.dim);
        linear(V + (size_t)seen * kv, x, wv + (size_t)l * kv * c.dim, kv, c.dim);
        rotate(q, c.heads, position), rotate(K + (size_t)seen * kv, c.kv_heads, position);
        for (int n = 0; n < c.heads; n++) {
            int at = n / (c.heads / c.kv_heads) * D;
            float most = -INFINITY, total = 0;
            for (int u = 0; u <= seen; u++) {
                float sum = 0;
                for (int i = 0; i < D; i++) sum += q[n * D + i] * K[(size_t)u * kv + at + i];
                p[u] = sum / sqrtf((float)D);
                if (p[u] > most) most = p[u];
            }
            for (int u = 0; u <= seen; u++) total += p[u] = expf(p[u] - most);
            for (int i = 0; i < D; i++) {
                float sum = 0;
                for (int u = 0; u <= seen; u++) sum += p[u] / total * V[(size_t)u * kv + at + i];
                x[n * D + i] = sum;
            }
        }
        linear(y, x, wo + (size_t)l * c.dim * c.dim, c.dim, c.dim);
        for (int i = 0; i < c.dim; i++) h[i] += y[i];
        norm(x, h, ffn_norm + l * c.dim);
        linear(gate, x, (wrong("swapped") ? w3 : w1) + (size_t)l * c.hidden * c.dim, c.hidden, c.dim);
        linear(up, x, (wrong("swapped") ? w1 : w3) + (size_t)l * c.hidden * c.dim, c.hidden, c.dim);
        for (int i = 0; i < c.hidden; i++) gate[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
        linear(y, gate, w2 + (size_t)l * c.dim * c.hidden, c.dim, c.hidden);
        for (int i = 0; i < c.dim; i++) h[i] = (wrong("residual") ? x[i] : h[i]) + y[i];
    }
    norm(x, h, last_norm);
    linear(logits, x, head, c.vocab, c.dim);
}

static double nats(const float *z, int label) {
    double most = z[0], total = 0;
    for (int i = 1; i < c.vocab; i++) if (z[i] > most) most = z[i];
    for (int i = 0; i < c.vocab; i++) total += exp(z[i] - most);
    return most + log(total) - z[label];
}

int main(int argc, char **argv) {
    if (argc < 3) die("usage: kit_bin FOLDER OUT", "[MISTAKE]");
    mistake = argc > 3 ? argv[3] : "";
    char path[512];
    snprintf(path, sizeof path, "%s/model.bin", argv[1]), map_model(path);
    snprintf(path, sizeof path, "%s/logits.f32", argv[2]);
    FILE *out = fopen(path, "wb");
    if (!out) die("cannot write", path);
    int states = 0, seen = 0, room = 0;
    double worst = 0, worst_loss = 0;
    float *keys = NULL, *values = NULL, *logits = malloc(sizeof *logits * c.vocab);
    for (long size; ; states++) {
        snprintf(path, sizeof path, "%s/state.%d.bin", argv[1], states);
        int32_t *state = read_all(path, &size);
        if (!state) break;
        int T = state[3], labels = 0;
        const int32_t *x = state + HEADER, *y = x + T;
        const float *expected = (const float *)(y + T), *loss = expected + (size_t)T * c.vocab;
        if (state[0] != MAGIC || state[2] != 1 || (const char *)(loss + 1) != (char *)state + size) die("no state of this model:", path);
        if (!wrong("cache")) seen = 0;
        size_t row = (size_t)c.dim / c.heads * c.kv_heads * sizeof *keys;
        int wanted = seen + T;
        if (wrong("cache") ? !keys : 1) {   /* the mistake keeps one cache for all states */
            room = wrong("cache") ? 4096 : wanted;
            keys = realloc(keys, row * c.layers * room), values = realloc(values, row * c.layers * room);
        }
        double sum = 0;
        for (int t = 0; t < T; t++, seen++) {
            forward(logits, x[t], seen, wrong("position") ? 0 : t, keys, values, room);
            for (int i = 0; i < c.vocab; i++) {
                double d = fabs(logits[i] - expected[(size_t)t * c.vocab + i]);
                if (!(d <= worst)) worst = d;
            }
            if (y[t] >= 0) sum += nats(logits, y[t]), labels++;
            if (fwrite(logits, 4, c.vocab, out) != (size_t)c.vocab) die("cannot write", argv[2]);
        }
        if (labels && !(fabs(sum / labels - *loss) <= worst_loss)) worst_loss = fabs(sum / labels - *loss);
        free(state);
    }
    if (fclose(out)) die("cannot write", argv[2]);
    return printf("%d states: logits within %.1e, losses within %.1e\n", states, worst, worst_loss), 0;
}
