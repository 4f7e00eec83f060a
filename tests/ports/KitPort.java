// A Llama in plain Java (17 and up, no packages), as a stranger's port would be: it reads a kit (python -m parity.kit),
// computes every tap in float32 with all sequences packed in one row, judges itself and writes OUT/NAME.f32.
//
//   java KitPort.java KIT OUT
//   PASS: 34 arrays within their bounds, the worst at 50% (rope.sin)
//
// A third argument plants one mistake: eps, scaling, pairing, heads, document, bf16, swapped or labels.
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.function.BiConsumer;
import java.util.stream.IntStream;

public class KitPort {
    record Array(String file, int offset, int[] shape) {
        int count() { return Arrays.stream(shape).reduce(1, (a, b) -> a * b); }
    }

    record Bound(String metric, int first, int rows, double bound) {}

    final Path out;
    final String mistake;
    final Map<String, Double> config = new HashMap<>(Map.of("low_freq_factor", 1.0, "high_freq_factor", 4.0, "original_context", 8192.0));
    final List<Integer> sequences = new ArrayList<>();
    final Map<String, Array> arrays = new HashMap<>();
    final Map<String, List<Bound>> bounds = new HashMap<>();
    final Map<String, ByteBuffer> files = new HashMap<>();
    int compared, beyond;
    String first, worstName;
    double worst;

    // --- The kit -----------------------------------------------------------------------------------------------------

    KitPort(Path kit, Path out, String mistake) throws IOException {
        this.out = out;
        this.mistake = mistake;
        List<String> lines = Files.readAllLines(kit.resolve("kit.txt"));
        if (!lines.get(0).equals("nanollama.kit/1")) throw new IOException("not a kit: " + kit);
        for (String line : lines.subList(1, lines.size())) {
            String[] w = line.split(" ");
            switch (w[0]) {
                case "config" -> config.put(w[1], Double.parseDouble(w[2]));
                case "sequence" -> sequences.add(Integer.parseInt(w[2]));
                case "array" -> {
                    int[] shape = Arrays.stream(w).skip(5).mapToInt(Integer::parseInt).toArray();
                    arrays.put(w[1], new Array(w[2], Integer.parseInt(w[3]), shape));
                    if (!files.containsKey(w[2])) {
                        ByteBuffer bytes = ByteBuffer.wrap(Files.readAllBytes(kit.resolve(w[2])));
                        files.put(w[2], bytes.order(ByteOrder.LITTLE_ENDIAN));
                    }
                }
                case "bound" -> {
                    Bound bound = new Bound(w[3], Integer.parseInt(w[4]), Integer.parseInt(w[5]), Double.parseDouble(w[6]));
                    if (w[1].equals("fp32")) bounds.computeIfAbsent(w[2], name -> new ArrayList<>()).add(bound);
                }
                default -> { }
            }
        }
    }

    float[] floats(String name) {
        Array a = arrays.get(name);
        float[] x = new float[a.count()];
        for (int i = 0; i < x.length; i++) x[i] = files.get(a.file).getFloat(a.offset + 4 * i);
        return x;
    }

    double[] doubles(String name) {
        Array a = arrays.get(name);
        double[] x = new double[a.count()];
        for (int i = 0; i < x.length; i++) x[i] = files.get(a.file).getDouble(a.offset + 8 * i);
        return x;
    }

    int[] ints(String name) {
        Array a = arrays.get(name);
        int[] x = new int[a.count()];
        for (int i = 0; i < x.length; i++) x[i] = files.get(a.file).getInt(a.offset + 4 * i);
        return x;
    }

    boolean is(String name) { return mistake.equals(name); }
    float real(String key) { return config.get(key).floatValue(); }
    int size(String key) { return config.get(key).intValue(); }

    /** Write an array and judge it by every bound that it has. */
    void emit(String name, float[] mine) {
        ByteBuffer bytes = ByteBuffer.allocate(4 * mine.length).order(ByteOrder.LITTLE_ENDIAN);
        for (float x : mine) bytes.putFloat(x);
        try {
            Files.write(out.resolve(name + ".f32"), bytes.array());
        } catch (IOException error) {
            throw new IllegalStateException(error);
        }
        double[] exact = doubles(name);
        int width = mine.length / arrays.get(name).shape[0];
        for (Bound b : bounds.get(name)) {
            if (b.metric.startsWith("kl_")) continue; // left to parity.kit --check
            double value = measure(b, mine, exact, width);
            if (b.bound > 0 && !(value / b.bound <= worst)) {
                worst = value / b.bound;
                worstName = name;
            }
            if (!(value <= b.bound) && beyond++ == 0) first = name;
        }
        compared++;
    }

    double measure(Bound b, float[] mine, double[] exact, int width) {
        double square = 0, most = 0;
        int differ = 0;
        int[] best = b.metric.equals("tokens") ? ints("best") : null, decided = best == null ? null : ints("decided.fp32");
        for (int row = b.first; row < b.first + b.rows; row++) {
            int top = 0;
            for (int i = 0; i < width; i++) {
                double d = Math.abs(mine[row * width + i] - exact[row * width + i]);
                square += d * d;
                if (!(d <= most)) most = d; // a NaN stays
                if (mine[row * width + i] > mine[row * width + top]) top = i;
            }
            if (best != null && decided[row] == 1 && top != best[row]) differ++;
        }
        return best != null ? differ : b.metric.equals("max") ? most : Math.sqrt(square / (b.rows * width));
    }

    // --- The model ---------------------------------------------------------------------------------------------------

    static float bf16(float x) {
        int word = Float.floatToRawIntBits(x);
        return Float.intBitsToFloat(word + 0x7fff + ((word >>> 16) & 1) & 0xffff0000);
    }

    float[] norm(float[] x, String name) {
        float[] w = floats(name), y = new float[x.length];
        float eps = is("eps") ? 1e-6f : real("norm_eps");
        for (int at = 0; at < x.length; at += w.length) {
            float square = 0;
            for (int i = 0; i < w.length; i++) square += x[at + i] * x[at + i];
            float scale = (float) (1 / Math.sqrt(square / w.length + eps));
            for (int i = 0; i < w.length; i++) y[at + i] = x[at + i] * scale * w[i];
        }
        return y;
    }

    /** x W^T. Four sums side by side: one of thousands of terms rounds more than the references do. */
    float[] linear(float[] x, String name, int columns) {
        float[] w = floats(name);
        int rows = w.length / columns;
        float[] y = new float[x.length / columns * rows], sum = new float[4];
        for (int r = 0; r < x.length / columns; r++) {
            for (int o = 0; o < rows; o++) {
                Arrays.fill(sum, 0);
                for (int i = 0; i < columns; i++) sum[i % 4] += x[r * columns + i] * w[o * columns + i];
                float total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
                y[r * rows + o] = is("bf16") ? bf16(total) : total;
            }
        }
        return y;
    }

    /** float32 at each step: part of the model, and far out it shows. */
    float angle(int position, int j) {
        float factor = real("factor"), low = real("low_freq_factor"), high = real("high_freq_factor");
        float turn = 1 / (float) Math.pow(real("rope_theta"), 2f * j / size("head_dim"));
        if (factor > 0 && !is("scaling")) {
            float wave = 2 * (float) Math.PI / turn;
            float s = Math.max(0, Math.min(1, (real("original_context") / wave - low) / (high - low)));
            turn = (1 - s) * turn / factor + s * turn;
        }
        return position * turn;
    }

    /** Meta's layout: features 2j and 2j+1 turn together. */
    float[] rotate(float[] x, int heads, int[] positions) {
        int width = size("head_dim");
        float[] y = new float[x.length];
        for (int t = 0; t < positions.length; t++) {
            for (int j = 0; j < width / 2; j++) {
                float angle = angle(positions[t], j), cos = (float) Math.cos(angle), sin = (float) Math.sin(angle);
                for (int h = 0; h < heads; h++) {
                    int at = (t * heads + h) * width;
                    int p = is("pairing") ? at + j : at + 2 * j, q = is("pairing") ? at + j + width / 2 : at + 2 * j + 1;
                    y[p] = x[p] * cos - x[q] * sin;
                    y[q] = x[p] * sin + x[q] * cos;
                }
            }
        }
        return y;
    }

    float[] attention(float[] q, float[] k, float[] v, int[] documents) {
        int heads = size("n_heads"), kvHeads = size("n_kv_heads"), width = size("head_dim"), begin = 0;
        float[] y = new float[q.length], p = new float[documents.length];
        for (int t = 0; t < documents.length; t++) {
            if (t > 0 && documents[t] != documents[t - 1] && !is("document")) begin = t;
            for (int h = 0; h < heads; h++) {
                int kv = is("heads") ? h % kvHeads : h / (heads / kvHeads), at = (t * heads + h) * width;
                float most = Float.NEGATIVE_INFINITY, total = 0;
                for (int u = begin; u <= t; u++) {
                    float sum = 0;
                    for (int i = 0; i < width; i++) sum += q[at + i] * k[(u * kvHeads + kv) * width + i];
                    p[u] = sum / (float) Math.sqrt(width);
                    most = Math.max(most, p[u]);
                }
                for (int u = begin; u <= t; u++) total += p[u] = (float) Math.exp(p[u] - most);
                for (int u = begin; u <= t; u++)
                    for (int i = 0; i < width; i++) y[at + i] += p[u] / total * v[(u * kvHeads + kv) * width + i];
            }
        }
        return y;
    }

    static float[] add(float[] x, float[] y) {
        float[] z = new float[x.length];
        for (int i = 0; i < x.length; i++) z[i] = x[i] + y[i];
        return z;
    }

    /** Logits of tokens packed in one row; `tap` sees what is computed on the way. */
    float[] forward(int[] tokens, int[] documents, int[] positions, BiConsumer<String, float[]> tap) {
        int dim = size("dim"), heads = size("n_heads"), kvHeads = size("n_kv_heads");
        float[] table = floats("tok_embeddings.weight"), h = new float[tokens.length * dim];
        for (int t = 0; t < tokens.length; t++) System.arraycopy(table, tokens[t] * dim, h, t * dim, dim);
        tap.accept("embed", h);
        for (int l = 0; l < size("n_layers"); l++) {
            String p = "layers." + l + ".", att = p + "attention.", ffn = p + "feed_forward.";
            float[] x = step(tap, p + "attn_norm", norm(h, p + "attention_norm.weight"));
            float[] q = step(tap, p + "q", linear(x, att + "wq.weight", dim));
            float[] k = step(tap, p + "k", linear(x, att + "wk.weight", dim));
            float[] v = step(tap, p + "v", linear(x, att + "wv.weight", dim));
            q = step(tap, p + "q_rope", rotate(q, heads, positions));
            k = step(tap, p + "k_rope", rotate(k, kvHeads, positions));
            float[] mix = step(tap, p + "attn_mix", attention(q, k, v, documents));
            h = add(h, step(tap, p + "attn_out", linear(mix, att + "wo.weight", heads * size("head_dim"))));
            x = step(tap, p + "ffn_norm", norm(h, p + "ffn_norm.weight"));
            float[] gate = step(tap, p + "gate", linear(x, ffn + (is("swapped") ? "w3" : "w1") + ".weight", dim));
            float[] up = step(tap, p + "up", linear(x, ffn + (is("swapped") ? "w1" : "w3") + ".weight", dim));
            for (int i = 0; i < gate.length; i++) gate[i] = gate[i] / (1 + (float) Math.exp(-gate[i])) * up[i];
            tap.accept(p + "ffn_mix", gate);
            h = step(tap, p + "out", add(h, step(tap, p + "ffn_out", linear(gate, ffn + "w2.weight", size("hidden_dim")))));
        }
        float[] x = step(tap, "final_norm", norm(h, "norm.weight"));
        return step(tap, "logits", linear(x, size("tied") == 1 ? "tok_embeddings.weight" : "output.weight", dim));
    }

    static float[] step(BiConsumer<String, float[]> tap, String name, float[] x) {
        tap.accept(name, x);
        return x;
    }

    /** Mean -log p of the labels that are not ignored, nats. */
    float loss(float[] logits, int[] targets) {
        int vocab = size("vocab_size"), count = 0;
        double nats = 0;
        for (int t = 0; t < targets.length; t++) {
            if (targets[t] < 0 && !is("labels")) continue;
            double total = 0, most = Double.NEGATIVE_INFINITY;
            for (int i = 0; i < vocab; i++) most = Math.max(most, logits[t * vocab + i]);
            for (int i = 0; i < vocab; i++) total += Math.exp(logits[t * vocab + i] - most);
            nats += most + Math.log(total) - logits[t * vocab + Math.max(targets[t], 0)];
            count++;
        }
        return (float) (nats / count);
    }

    static float[] map(float[] x, java.util.function.DoubleUnaryOperator of) {
        float[] y = new float[x.length];
        for (int i = 0; i < x.length; i++) y[i] = (float) of.applyAsDouble(x[i]);
        return y;
    }

    int judge() {
        int n = sequences.stream().mapToInt(Integer::intValue).sum();
        int[] documents = IntStream.range(0, sequences.size()).flatMap(s -> IntStream.range(0, sequences.get(s)).map(t -> s)).toArray();
        int[] positions = sequences.stream().flatMapToInt(length -> IntStream.range(0, length)).toArray();
        forward(Arrays.copyOf(ints("tokens"), n), documents, positions, this::emit);
        int[] far = ints("rope.positions");
        int pairs = size("head_dim") / 2;
        float[] angles = new float[far.length * pairs];
        for (int i = 0; i < angles.length; i++) angles[i] = angle(far[i / pairs], i % pairs);
        emit("rope.cos", map(angles, Math::cos));
        emit("rope.sin", map(angles, Math::sin));
        if (arrays.containsKey("train.loss")) {
            int columns = arrays.get("train.tokens").shape[2], count = arrays.get("train.tokens").shape[1] * columns;
            int[] rows = IntStream.range(0, count).map(i -> i / columns).toArray(); // batch 0, a document a row
            int[] places = IntStream.range(0, count).map(i -> i % columns).toArray();
            float[] logits = forward(Arrays.copyOf(ints("train.tokens"), count), rows, places, (name, x) -> { });
            emit("train.loss", new float[] {loss(logits, Arrays.copyOf(ints("train.targets"), count))});
        }
        if (beyond > 0) System.out.printf("FAIL: %d bounds exceeded, first at %s%n", beyond, first);
        else System.out.printf("PASS: %d arrays within their bounds, the worst at %.0f%% (%s)%n", compared, 100 * worst, worstName);
        return beyond > 0 ? 1 : 0;
    }

    public static void main(String[] args) throws IOException {
        System.exit(new KitPort(Path.of(args[0]), Path.of(args[1]), args.length > 2 ? args[2] : "").judge());
    }
}
