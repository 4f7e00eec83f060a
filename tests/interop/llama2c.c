/* A forward pass over llama2.c's files, versions 0, 1 and 2, written from the tables of docs/formats.md alone: it maps
   the file, walks a pointer over it and prints all logits of the given tokens as raw float32.

     cc -O2 -o llama2c llama2c.c -lm && ./llama2c MODEL.bin 1 403 407 > logits.f32

   For test_c_door.py: if a block of the layout moved or the header changed, the numbers would. */
#include <fcntl.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct { const float *f; const int8_t *q; const float *scale; } Matrix;
static int version = 0, group = 1;
static const char *at;

static void die(const char *why) { fprintf(stderr, "%s\n", why); exit(1); }

static const float *floats(size_t n) {
    const float *p = (const float *)at;
    at += 4 * n;
    return p;
}

/* n matrices of one size: plain float32, or numbers and scales of each in turn */
static Matrix *matrices(int count, size_t n) {
    Matrix *m = calloc(count, sizeof *m);
    for (int i = 0; i < count; i++) {
        if (version < 2) { m[i].f = floats(n); continue; }
        m[i].q = (const int8_t *)at;
        at += n;
        m[i].scale = floats(n / group);
    }
    return m;
}

static float weight(const Matrix *m, size_t i) {
    if (m->f) return m->f[i];
    float s;
    memcpy(&s, m->scale + i / group, 4);
    return m->q[i] * s;
}

static void multiply(float *out, const float *x, const Matrix *m, int rows, int columns) {
    for (int r = 0; r < rows; r++) {
        double sum = 0;
        for (int c = 0; c < columns; c++) sum += (double)weight(m, (size_t)r * columns + c) * x[c];
        out[r] = (float)sum;
    }
}

static void norm(float *out, const float *x, const float *w, int n) {
    double square = 0;
    for (int i = 0; i < n; i++) square += (double)x[i] * x[i];
    float scale = 1.0f / sqrtf((float)(square / n) + 1e-5f);
    for (int i = 0; i < n; i++) out[i] = w[i] * (scale * x[i]);
}

static void rotate(float *x, int heads, int d, int position) {
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < d / 2; i++) {
            float angle = position / powf(10000.0f, 2.0f * i / d), c = cosf(angle), s = sinf(angle);
            float *pair = x + h * d + 2 * i, a = pair[0], b = pair[1];
            pair[0] = a * c - b * s;
            pair[1] = a * s + b * c;
        }
}

int main(int argc, char **argv) {
    struct stat st;
    int file = argc > 2 ? open(argv[1], O_RDONLY) : -1;
    if (file < 0 || fstat(file, &st)) die("usage: llama2c MODEL.bin TOKEN ...");
    const char *data = mmap(NULL, st.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    if (data == MAP_FAILED || st.st_size < 256) die("cannot map the file");

    uint32_t magic;
    int32_t head[7];
    memcpy(&magic, data, 4);
    int tied;
    if (magic == 0x616b3432) {
        memcpy(&version, data + 4, 4);
        memcpy(head, data + 8, sizeof head);
        tied = (unsigned char)data[36];
        if (version == 2) memcpy(&group, data + 37, 4);
        at = data + 256;
    } else {
        memcpy(head, data, sizeof head);
        tied = head[5] > 0;
        at = data + 28;
    }
    const int D = head[0], F = head[1], L = head[2], H = head[3], K = head[4], V = abs(head[5]), S = head[6], d = D / H;
    const size_t kv = (size_t)K * d;
    const float *attention_norm, *ffn_norm, *last_norm;
    Matrix *embedding, *wq, *wk, *wv, *wo, *w1, *w2, *w3, *output;
    if (version == 0) {
        embedding = matrices(1, (size_t)V * D);
        attention_norm = floats((size_t)L * D);
    } else {
        attention_norm = floats((size_t)L * D);
        ffn_norm = floats((size_t)L * D);
        last_norm = floats(D);
        embedding = matrices(1, (size_t)V * D);
    }
    wq = matrices(L, (size_t)D * D);
    wk = matrices(L, kv * D);
    wv = matrices(L, kv * D);
    wo = matrices(L, (size_t)D * D);
    if (version == 0) ffn_norm = floats((size_t)L * D);
    w1 = matrices(L, (size_t)F * D);
    w2 = matrices(L, (size_t)D * F);
    w3 = matrices(L, (size_t)F * D);
    if (version == 0) {
        last_norm = floats(D);
        floats((size_t)S * d); /* the tables of cos and sin */
    }
    output = tied ? embedding : matrices(1, (size_t)V * D);
    if (at != data + st.st_size) die("the file is not as long as its header says");

    const int n = argc - 2;
    float *x = malloc(4 * D), *y = malloc(4 * D), *q = malloc(4 * D), *mix = malloc(4 * D), *scores = malloc(4 * n);
    float *gate = malloc(4 * F), *up = malloc(4 * F), *logits = malloc(4 * V);
    float *keys = malloc(4 * L * n * kv), *values = malloc(4 * L * n * kv);
    for (int t = 0; t < n; t++) {
        const int token = atoi(argv[2 + t]);
        for (int i = 0; i < D; i++) x[i] = weight(embedding, (size_t)token * D + i);
        for (int l = 0; l < L; l++) {
            float *k = keys + ((size_t)l * n + t) * kv, *v = values + ((size_t)l * n + t) * kv;
            norm(y, x, attention_norm + (size_t)l * D, D);
            multiply(q, y, wq + l, D, D);
            multiply(k, y, wk + l, (int)kv, D);
            multiply(v, y, wv + l, (int)kv, D);
            rotate(q, H, d, t);
            rotate(k, K, d, t);
            for (int h = 0; h < H; h++) {
                const int from = h / (H / K) * d;
                float most = -INFINITY, sum = 0;
                for (int s = 0; s <= t; s++) {
                    scores[s] = 0;
                    for (int i = 0; i < d; i++) scores[s] += q[h * d + i] * keys[((size_t)l * n + s) * kv + from + i];
                    scores[s] /= sqrtf((float)d);
                    most = fmaxf(most, scores[s]);
                }
                for (int s = 0; s <= t; s++) sum += scores[s] = expf(scores[s] - most);
                for (int i = 0; i < d; i++) {
                    mix[h * d + i] = 0;
                    for (int s = 0; s <= t; s++)
                        mix[h * d + i] += scores[s] / sum * values[((size_t)l * n + s) * kv + from + i];
                }
            }
            multiply(y, mix, wo + l, D, D);
            for (int i = 0; i < D; i++) x[i] += y[i];
            norm(y, x, ffn_norm + (size_t)l * D, D);
            multiply(gate, y, w1 + l, F, D);
            multiply(up, y, w3 + l, F, D);
            for (int i = 0; i < F; i++) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
            multiply(y, gate, w2 + l, D, F);
            for (int i = 0; i < D; i++) x[i] += y[i];
        }
        norm(y, x, last_norm, D);
        multiply(logits, y, output, V, D);
        fwrite(logits, 4, V, stdout);
    }
    return 0;
}
