//! A Llama in plain Rust (no crates), as a stranger's port would be: it reads a kit (python -m parity.kit), computes every
//! tap in float32 with all sequences packed in one row, judges itself and writes OUT/NAME.f32 for `parity.kit --check`.
//!
//!     rustc --edition 2021 -O -o kit_port kit_port.rs && ./kit_port KIT OUT
//!     PASS: 34 arrays within their bounds, the worst at 50% (rope.sin)
//!
//! A third argument plants one mistake: eps, scaling, pairing, heads, document, bf16, swapped or labels.
use std::collections::HashMap;
use std::{env, fs, process};

struct Array {
    file: String,
    offset: usize,
    shape: Vec<usize>,
}

struct Bound {
    metric: String,
    first: usize,
    rows: usize,
    bound: f64,
}

#[derive(Default)]
struct Verdict {
    compared: usize,
    beyond: usize,
    first: String,
    worst: f64,
    worst_name: String,
}

struct Kit {
    folder: String,
    out: String,
    mistake: String,
    config: HashMap<String, f64>,
    sequences: Vec<usize>, // tokens of each
    arrays: HashMap<String, Array>,
    bounds: HashMap<String, Vec<Bound>>,
    files: HashMap<String, Vec<u8>>,
}

// --- The kit ---------------------------------------------------------------------------------------------------------

fn number(word: &str) -> usize {
    word.parse().expect("a whole number")
}

impl Kit {
    fn read(folder: &str, out: &str, mistake: &str) -> Kit {
        let text = fs::read_to_string(format!("{folder}/kit.txt")).expect("kit.txt");
        assert!(text.starts_with("nanollama.kit/1\n"), "not a kit: {folder}");
        let mut kit = Kit {
            folder: folder.into(),
            out: out.into(),
            mistake: mistake.into(),
            config: HashMap::new(),
            sequences: vec![],
            arrays: HashMap::new(),
            bounds: HashMap::new(),
            files: HashMap::new(),
        };
        for line in text.lines().skip(1) {
            let w: Vec<&str> = line.split(' ').collect();
            match w[0] {
                "config" => {
                    kit.config.insert(w[1].into(), w[2].parse().expect("a number"));
                }
                "sequence" => kit.sequences.push(number(w[2])),
                "array" => {
                    let shape = w[5..].iter().map(|x| number(x)).collect();
                    kit.arrays.insert(w[1].into(), Array { file: w[2].into(), offset: number(w[3]), shape });
                    if !kit.files.contains_key(w[2]) {
                        let bytes = fs::read(format!("{folder}/{}", w[2])).expect("a file of the kit");
                        kit.files.insert(w[2].into(), bytes);
                    }
                }
                "bound" if w[1] == "fp32" => kit.bounds.entry(w[2].into()).or_default().push(Bound {
                    metric: w[3].into(),
                    first: number(w[4]),
                    rows: number(w[5]),
                    bound: w[6].parse().expect("a number"),
                }),
                _ => {}
            }
        }
        kit
    }

    fn bytes(&self, name: &str, width: usize) -> impl Iterator<Item = &[u8]> {
        let a = self.arrays.get(name).unwrap_or_else(|| panic!("{}: no array {name}", self.folder));
        let count: usize = a.shape.iter().product();
        self.files[&a.file][a.offset..a.offset + count * width].chunks_exact(width)
    }

    fn f32(&self, name: &str) -> Vec<f32> {
        self.bytes(name, 4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn f64(&self, name: &str) -> Vec<f64> {
        self.bytes(name, 8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn i32(&self, name: &str) -> Vec<i32> {
        self.bytes(name, 4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn is(&self, mistake: &str) -> bool {
        self.mistake == mistake
    }

    fn real(&self, key: &str) -> f32 {
        self.config[key] as f32
    }

    fn size(&self, key: &str) -> usize {
        self.config[key] as usize
    }

    /// Write an array and judge it by every bound that it has.
    fn emit(&self, verdict: &mut Verdict, name: &str, mine: &[f32]) {
        let bytes: Vec<u8> = mine.iter().flat_map(|x| x.to_le_bytes()).collect();
        fs::write(format!("{}/{name}.f32", self.out), bytes).expect("an array is written");
        let (exact, width) = (self.f64(name), mine.len() / self.arrays[name].shape[0]);
        // KL is left to parity.kit --check.
        for b in self.bounds[name].iter().filter(|b| !b.metric.starts_with("kl_")) {
            let value = self.measure(b, mine, &exact, width);
            if b.bound > 0.0 && !(value / b.bound <= verdict.worst) {
                (verdict.worst, verdict.worst_name) = (value / b.bound, name.into());
            }
            if !(value <= b.bound) {
                if verdict.beyond == 0 {
                    verdict.first = name.into();
                }
                verdict.beyond += 1;
            }
        }
        verdict.compared += 1;
    }

    fn measure(&self, b: &Bound, mine: &[f32], exact: &[f64], width: usize) -> f64 {
        let rows = b.first..b.first + b.rows;
        if b.metric == "tokens" {
            let (best, decided) = (self.i32("best"), self.i32("decided.fp32"));
            let top = |r: usize| (0..width).fold(0, |t, i| if mine[r * width + i] > mine[r * width + t] { i } else { t });
            return rows.filter(|&r| decided[r] == 1 && top(r) != best[r] as usize).count() as f64;
        }
        let (mut square, mut most) = (0.0, 0.0);
        for at in rows.start * width..rows.end * width {
            let d = (f64::from(mine[at]) - exact[at]).abs();
            square += d * d;
            if !(d <= most) {
                most = d; // a NaN stays
            }
        }
        if b.metric == "max" { most } else { (square / (b.rows * width) as f64).sqrt() }
    }

    // --- The model ---------------------------------------------------------------------------------------------------

    fn norm(&self, x: &[f32], name: &str) -> Vec<f32> {
        let (w, eps) = (self.f32(name), if self.is("eps") { 1e-6 } else { self.real("norm_eps") });
        let mut y = Vec::with_capacity(x.len());
        for row in x.chunks(w.len()) {
            let square: f32 = row.iter().map(|v| v * v).sum();
            let scale = 1.0 / (square / w.len() as f32 + eps).sqrt();
            y.extend(row.iter().zip(&w).map(|(v, w)| v * scale * w));
        }
        y
    }

    /// x W^T. Four sums side by side: one of thousands of terms rounds more than the references do.
    fn linear(&self, x: &[f32], name: &str, columns: usize) -> Vec<f32> {
        let w = self.f32(name);
        let mut y = Vec::with_capacity(x.len() / columns * (w.len() / columns));
        for row in x.chunks(columns) {
            for weight in w.chunks(columns) {
                let mut sum = [0f32; 4];
                for (i, (a, b)) in row.iter().zip(weight).enumerate() {
                    sum[i % 4] += a * b;
                }
                let total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
                y.push(if self.is("bf16") { bf16(total) } else { total });
            }
        }
        y
    }

    /// Angles are float32 at each step: part of the model, and far out it shows.
    fn angle(&self, position: i32, j: usize) -> f32 {
        let (factor, context) = (self.real("factor"), self.config.get("original_context").copied().unwrap_or(8192.0) as f32);
        let mut turn = 1.0 / self.real("rope_theta").powf(2.0 * j as f32 / self.size("head_dim") as f32);
        if factor > 0.0 && !self.is("scaling") {
            let (low, high) = (self.real("low_freq_factor"), self.real("high_freq_factor"));
            let wave = 2.0 * std::f32::consts::PI / turn;
            let s = ((context / wave - low) / (high - low)).clamp(0.0, 1.0);
            turn = (1.0 - s) * turn / factor + s * turn;
        }
        position as f32 * turn
    }

    /// Meta's layout: features 2j and 2j+1 turn together.
    fn rotate(&self, x: &[f32], heads: usize, positions: &[i32]) -> Vec<f32> {
        let (width, mut y) = (self.size("head_dim"), x.to_vec());
        for (t, &position) in positions.iter().enumerate() {
            for j in 0..width / 2 {
                let (sin, cos) = self.angle(position, j).sin_cos();
                for h in 0..heads {
                    let at = (t * heads + h) * width;
                    let (p, q) = if self.is("pairing") { (at + j, at + j + width / 2) } else { (at + 2 * j, at + 2 * j + 1) };
                    y[p] = x[p] * cos - x[q] * sin;
                    y[q] = x[p] * sin + x[q] * cos;
                }
            }
        }
        y
    }

    fn attention(&self, q: &[f32], k: &[f32], v: &[f32], documents: &[usize]) -> Vec<f32> {
        let (heads, kv_heads, width) = (self.size("n_heads"), self.size("n_kv_heads"), self.size("head_dim"));
        let mut y = vec![0f32; q.len()];
        for (t, document) in documents.iter().enumerate() {
            let begin = if self.is("document") { 0 } else { documents.iter().position(|d| d == document).unwrap() };
            for h in 0..heads {
                let kv = if self.is("heads") { h % kv_heads } else { h / (heads / kv_heads) };
                let at = (t * heads + h) * width;
                let other = |u: usize| (u * kv_heads + kv) * width;
                let score = |u: usize| (0..width).map(|i| q[at + i] * k[other(u) + i]).sum::<f32>() / (width as f32).sqrt();
                let scores: Vec<f32> = (begin..=t).map(score).collect();
                let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let total: f32 = scores.iter().map(|s| (s - most).exp()).sum();
                for (u, s) in (begin..=t).zip(&scores) {
                    for i in 0..width {
                        y[at + i] += (s - most).exp() / total * v[other(u) + i];
                    }
                }
            }
        }
        y
    }

    /// Logits of tokens packed in one row; `tap(name, array)` sees what is computed on the way.
    fn forward(&self, tokens: &[i32], documents: &[usize], positions: &[i32], tap: &mut dyn FnMut(&str, &[f32])) -> Vec<f32> {
        let (dim, heads, kv_heads) = (self.size("dim"), self.size("n_heads"), self.size("n_kv_heads"));
        let table = self.f32("tok_embeddings.weight");
        let mut h: Vec<f32> = tokens.iter().flat_map(|&t| &table[t as usize * dim..][..dim]).copied().collect();
        tap("embed", &h);
        for l in 0..self.size("n_layers") {
            let p = format!("layers.{l}.");
            let weight = |name: &str| format!("{p}{name}.weight");
            let mut step = |name: &str, x: Vec<f32>| {
                tap(&format!("{p}{name}"), &x);
                x
            };
            let x = step("attn_norm", self.norm(&h, &weight("attention_norm")));
            let q = step("q", self.linear(&x, &weight("attention.wq"), dim));
            let k = step("k", self.linear(&x, &weight("attention.wk"), dim));
            let v = step("v", self.linear(&x, &weight("attention.wv"), dim));
            let q = step("q_rope", self.rotate(&q, heads, positions));
            let k = step("k_rope", self.rotate(&k, kv_heads, positions));
            let mix = step("attn_mix", self.attention(&q, &k, &v, documents));
            let y = step("attn_out", self.linear(&mix, &weight("attention.wo"), heads * self.size("head_dim")));
            h = add(&h, &y);
            let x = step("ffn_norm", self.norm(&h, &weight("ffn_norm")));
            let (w1, w3) = if self.is("swapped") { ("w3", "w1") } else { ("w1", "w3") };
            let gate = step("gate", self.linear(&x, &weight(&format!("feed_forward.{w1}")), dim));
            let up = step("up", self.linear(&x, &weight(&format!("feed_forward.{w3}")), dim));
            let mix = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            let mix = step("ffn_mix", mix);
            let y = step("ffn_out", self.linear(&mix, &weight("feed_forward.w2"), self.size("hidden_dim")));
            h = step("out", add(&h, &y));
        }
        let x = self.norm(&h, "norm.weight");
        tap("final_norm", &x);
        let head = if self.size("tied") == 1 { "tok_embeddings.weight" } else { "output.weight" };
        let logits = self.linear(&x, head, dim);
        tap("logits", &logits);
        logits
    }

    /// Mean -log p of the labels that are not ignored, nats.
    fn loss(&self, logits: &[f32], targets: &[i32]) -> f32 {
        let (mut nats, mut count) = (0f64, 0);
        for (row, &target) in logits.chunks(self.size("vocab_size")).zip(targets) {
            if target < 0 && !self.is("labels") {
                continue;
            }
            let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let total: f64 = row.iter().map(|z| f64::from(z - most).exp()).sum();
            nats += f64::from(most) + total.ln() - f64::from(row[target.max(0) as usize]);
            count += 1;
        }
        (nats / f64::from(count)) as f32
    }
}

fn add(x: &[f32], y: &[f32]) -> Vec<f32> {
    x.iter().zip(y).map(|(a, b)| a + b).collect()
}

fn bf16(x: f32) -> f32 {
    let word = x.to_bits();
    f32::from_bits(word.wrapping_add(0x7fff + ((word >> 16) & 1)) & 0xffff_0000)
}

fn main() {
    let args: Vec<String> = env::args().collect();
    if args.len() < 3 {
        eprintln!("usage: kit_port KIT OUT [MISTAKE]");
        process::exit(2);
    }
    let kit = Kit::read(&args[1], &args[2], args.get(3).map_or("", |s| s));
    let mut verdict = Verdict::default();
    let documents: Vec<usize> = kit.sequences.iter().enumerate().flat_map(|(s, &n)| vec![s; n]).collect();
    let positions: Vec<i32> = kit.sequences.iter().flat_map(|&n| 0..n as i32).collect();
    kit.forward(&kit.i32("tokens"), &documents, &positions, &mut |name, x| kit.emit(&mut verdict, name, x));
    let far = kit.i32("rope.positions");
    let angles: Vec<f32> = far.iter().flat_map(|&p| (0..kit.size("head_dim") / 2).map(move |j| (p, j)))
        .map(|(p, j)| kit.angle(p, j)).collect();
    kit.emit(&mut verdict, "rope.cos", &angles.iter().map(|a| a.cos()).collect::<Vec<_>>());
    kit.emit(&mut verdict, "rope.sin", &angles.iter().map(|a| a.sin()).collect::<Vec<_>>());
    if let Some(a) = kit.arrays.get("train.tokens") {
        let (rows, columns) = (a.shape[1], a.shape[2]); // batch 0, a document a row
        let documents: Vec<usize> = (0..rows * columns).map(|i| i / columns).collect();
        let positions: Vec<i32> = (0..rows * columns).map(|i| (i % columns) as i32).collect();
        let tokens = &kit.i32("train.tokens")[..rows * columns];
        let logits = kit.forward(tokens, &documents, &positions, &mut |_, _| {});
        kit.emit(&mut verdict, "train.loss", &[kit.loss(&logits, &kit.i32("train.targets")[..rows * columns])]);
    }
    if verdict.beyond > 0 {
        println!("FAIL: {} bounds exceeded, first at {}", verdict.beyond, verdict.first);
        process::exit(1);
    }
    let (worst, name) = (100.0 * verdict.worst, verdict.worst_name);
    println!("PASS: {} arrays within their bounds, the worst at {worst:.0}% ({name})", verdict.compared);
}
