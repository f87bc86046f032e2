//! Products against float64, on every level of instructions that the machine has.

use std::iter::zip;

use half::bf16;
use tensorport::kernels::{
    ELSEWHERE, Experts, Floats, FloatsMut, Format, Matrix, ScopedThreads, expert_linear, linear, moe,
};
use tensorport::mxfp4::{self, BLOCK_BYTES, MX_BLOCK_SIZE};
use tensorport::simd::Level;

const THREADS: ScopedThreads = ScopedThreads(3);

/// Numbers without a pattern.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn byte(&mut self) -> u8 {
        self.bits().to_le_bytes()[3]
    }

    /// In -4 .. 4, of sizes that differ by powers of two.
    fn float(&mut self) -> f32 {
        let size = f32::from(self.byte()) / 64.0 * 2f32.powi(-i32::from(self.byte() % 8));
        if self.byte() < 128 { size } else { -size }
    }

    fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.float()).collect()
    }
}

/// Rows of a matrix as a checkpoint has them, and what they mean.
struct Weights {
    format: Format,
    int8: bool,
    rows: usize,
    columns: usize,
    bytes: Vec<u8>,
    scales: Vec<u8>,
    values: Vec<f64>,
}

impl Weights {
    fn random(random: &mut Random, format: Format, rows: usize, columns: usize) -> Self {
        match format {
            Format::Mxfp4 => {
                let groups = rows * columns / MX_BLOCK_SIZE;
                let bytes = (0..groups * BLOCK_BYTES).map(|_| random.byte()).collect();
                let scales = (0..groups).map(|_| 120 + random.byte() % 12).collect();
                Self::mxfp4(rows, columns, bytes, scales)
            }
            Format::Bf16 => {
                let halves: Vec<bf16> = random.floats(rows * columns).into_iter().map(bf16::from_f32).collect();
                let values = halves.iter().map(|half| half.to_f64()).collect();
                let bytes = halves.iter().flat_map(|half| half.to_le_bytes()).collect();
                Self { format, int8: false, rows, columns, bytes, scales: Vec::new(), values }
            }
        }
    }

    fn mxfp4(rows: usize, columns: usize, bytes: Vec<u8>, scales: Vec<u8>) -> Self {
        let values = zip(bytes.chunks(BLOCK_BYTES), &scales)
            .flat_map(|(codes, &scale)| {
                codes.iter().flat_map(move |byte| [byte & 0xf, byte >> 4].map(|code| mxfp4::decode_one(code, scale)))
            })
            .collect();
        Self { format: Format::Mxfp4, int8: false, rows, columns, bytes, scales, values }
    }

    /// For activations in int8.
    fn int8(self) -> Self {
        Self { int8: true, ..self }
    }

    fn matrix(&self) -> Matrix<'_> {
        match self.format {
            Format::Mxfp4 if self.int8 => Matrix::mxfp4_int8(self.rows, &self.bytes, &self.scales),
            Format::Mxfp4 => Matrix::mxfp4(self.rows, &self.bytes, &self.scales),
            Format::Bf16 => Matrix::bf16(self.rows, self.columns, &self.bytes),
        }
    }

    /// What activations are when they are multiplied.
    fn seen(&self, x: &[f64]) -> Vec<f64> {
        if self.int8 { in_int8(x) } else { x.to_vec() }
    }

    /// A row times x, and the sum of what its products are without signs.
    fn dot(&self, row: usize, x: &[f64]) -> (f64, f64) {
        let row = &self.values[row * self.columns..(row + 1) * self.columns];
        zip(row, x).map(|(w, x)| w * x).fold((0.0, 0.0), |(sum, size), product| (sum + product, size + product.abs()))
    }
}

/// Rounded to integers times the largest magnitude of each block over 127, in float32.
fn in_int8(x: &[f64]) -> Vec<f64> {
    let block = |block: &[f64]| {
        #[expect(clippy::cast_possible_truncation, reason = "a float32 in the first place, or one that is rounded")]
        let block: Vec<f32> = block.iter().map(|&value| value as f32).collect();
        let scale = block.iter().fold(0.0, |most: f32, value| most.max(value.abs())) / 127.0;
        let round = move |value: f32| if value == 0.0 { 0.0 } else { f64::from((value / scale).round_ties_even()) };
        block.into_iter().map(move |value| round(value) * f64::from(scale))
    };
    x.chunks(MX_BLOCK_SIZE).flat_map(block).collect()
}

/// Activations in both dtypes, and what they mean.
struct Activations {
    floats: Vec<f32>,
    halves: Option<Vec<u16>>,
}

impl Activations {
    fn all(floats: Vec<f32>) -> [Self; 2] {
        let halves: Vec<bf16> = floats.iter().copied().map(bf16::from_f32).collect();
        let rounded = halves.iter().map(|half| half.to_f32()).collect();
        let bits = halves.into_iter().map(bf16::to_bits).collect();
        [Self { floats, halves: None }, Self { floats: rounded, halves: Some(bits) }]
    }

    fn floats(&self) -> Floats<'_> {
        self.halves.as_ref().map_or(Floats::F32(&self.floats), |halves| Floats::Bf16(halves))
    }

    fn row(&self, row: usize, columns: usize) -> Vec<f64> {
        self.floats[row * columns..(row + 1) * columns].iter().map(|&value| f64::from(value)).collect()
    }
}

/// Asserts that a sum in float32 of so many products is right, up to its roundings.
fn assert_sum(found: f32, (expected, size): (f64, f64), terms: usize, what: &str) {
    #[expect(clippy::cast_precision_loss, reason = "small")]
    let tolerance = f64::from(f32::EPSILON) * (terms as f64) * size + f64::from(f32::MIN_POSITIVE);
    assert!((f64::from(found) - expected).abs() <= tolerance, "{what}: found {found}, expected {expected}");
}

#[test]
fn products_are_those_of_float64_whatever_the_sizes() {
    // Miri is slow: a whole chunk and a tail of each format, and two panels.
    let formats = [(Format::Mxfp4, 160), (Format::Bf16, 39), (Format::Mxfp4, 2880), (Format::Bf16, 2880)];
    let sizes = [(1, 3), (2, 7), (5, 18), (1, 31), (3, 25), (4, 5), (5, 61), (9, 13)];
    let (formats, sizes) = if cfg!(miri) { (&formats[..2], &sizes[..3]) } else { (&formats[..], &sizes[..]) };
    assert_products(&mut Random(1), formats, sizes);
    assert_int8_products(&mut Random(1), &[160, 2880][..if cfg!(miri) { 1 } else { 2 }], sizes);
}

/// Each number of rows is divided into tiles of its own widths.
#[test]
#[cfg_attr(miri, ignore = "slow, and the same code as above")]
fn products_are_those_of_float64_for_every_number_of_rows() {
    let sizes: Vec<(usize, usize)> = (1..=26).map(|m| (m, 35)).collect();
    assert_products(&mut Random(5), &[(Format::Mxfp4, 32), (Format::Bf16, 7)], &sizes);
    assert_int8_products(&mut Random(5), &[32, 96], &sizes);
}

fn assert_products(random: &mut Random, matrices: &[(Format, usize)], sizes: &[(usize, usize)]) {
    for &(format, columns) in matrices {
        for &(m, n) in sizes {
            let weights = Weights::random(random, format, n, columns);
            assert_products_with(random, &weights, m, columns + 1);
        }
    }
}

/// Products within a block are exact: there are as many roundings as blocks, and three for each.
fn assert_int8_products(random: &mut Random, columns: &[usize], sizes: &[(usize, usize)]) {
    for &columns in columns {
        for &(m, n) in sizes {
            let weights = Weights::random(random, Format::Mxfp4, n, columns).int8();
            assert_products_with(random, &weights, m, columns / MX_BLOCK_SIZE + 3);
        }
    }
}

fn assert_products_with(random: &mut Random, weights: &Weights, m: usize, roundings: usize) {
    let (n, columns) = (weights.rows, weights.columns);
    let bias = random.floats(n);
    for x in Activations::all(random.floats(m * columns)) {
        let rows: Vec<Vec<f64>> = (0..m).map(|row| weights.seen(&x.row(row, columns))).collect();
        for level in Level::all() {
            let mut out = vec![f32::NAN; m * n];
            linear(level, &THREADS, x.floats(), &weights.matrix(), Some(Floats::F32(&bias)), FloatsMut::F32(&mut out));
            for (place, &found) in out.iter().enumerate() {
                let (row, column) = (place / n, place % n);
                let (sum, size) = weights.dot(column, &rows[row]);
                let bias = f64::from(bias[column]);
                let what = format!("{:?} [{n}, {columns}], row {row} of {m}, {level}", weights.format);
                assert_sum(found, (sum + bias, size + bias.abs()), roundings, &what);
            }
        }
    }
}

#[test]
fn results_in_bfloat16_are_those_in_float32_rounded_once() {
    let random = &mut Random(2);
    let n = if cfg!(miri) { 3 } else { 29 };
    for m in [1, 3] {
        let weights = Weights::random(random, Format::Mxfp4, n, 96);
        for x in Activations::all(random.floats(m * 96)) {
            let (mut floats, mut halves) = (vec![0.0; m * n], vec![0; m * n]);
            let level = Level::best();
            linear(level, &THREADS, x.floats(), &weights.matrix(), None, FloatsMut::F32(&mut floats));
            linear(level, &THREADS, x.floats(), &weights.matrix(), None, FloatsMut::Bf16(&mut halves));
            let rounded: Vec<u16> = floats.into_iter().map(|value| bf16::from_f32(value).to_bits()).collect();
            assert_eq!(halves, rounded);
        }
    }
}

/// A one-hot x picks single weights: nothing is added, and nothing rounded.
#[test]
#[cfg_attr(miri, ignore = "many values, and Miri is slow")]
fn every_code_under_every_scale_byte_is_exact() {
    let codes: Vec<u8> = (0..16).map(|byte: u8| ((2 * byte) % 16) | (((2 * byte + 1) % 16) << 4)).collect();
    let weights = Weights::mxfp4(256, 32, codes.repeat(256), (0..=255).collect());
    for m in [1, 5] {
        for place in 0..16 {
            let mut one_hot = vec![0.0; m * 32];
            one_hot[(m - 1) * 32 + place] = 1.0;
            for x in Activations::all(one_hot) {
                for level in Level::all() {
                    let mut out = vec![0.0; m * 256];
                    linear(level, &THREADS, x.floats(), &weights.matrix(), None, FloatsMut::F32(&mut out));
                    for (scale, &found) in out[(m - 1) * 256..].iter().enumerate() {
                        let value = weights.values[scale * 32 + place];
                        #[expect(clippy::cast_possible_truncation, reason = "what float32 makes of it")]
                        let mut expected = value as f32;
                        // Infinity times zero, of the other places, is NaN; and where bfloat16 is multiplied by one
                        // instruction, that counts what is subnormal as zero.
                        let is_beyond = m > 1 && scale >= 253;
                        if m > 1 && x.halves.is_some() && expected.is_subnormal() && found == 0.0 {
                            expected = 0.0;
                        }
                        let is_right = found == expected || found.is_nan() && (expected.is_nan() || is_beyond);
                        assert!(is_right, "scale {scale}, place {place}, {level}: found {found}, expected {expected}");
                    }
                }
            }
        }
    }
}

/// 127 is its own integer: what comes out is 127 times single weights, but where float32 ends before.
#[test]
#[cfg_attr(miri, ignore = "many values, and Miri is slow")]
fn in_int8_every_code_under_every_scale_byte_is_exact() {
    let codes: Vec<u8> = (0..16).map(|byte: u8| ((2 * byte) % 16) | (((2 * byte + 1) % 16) << 4)).collect();
    let weights = Weights::mxfp4(256, 32, codes.repeat(256), (0..=255).collect()).int8();
    for (m, place) in [1, 4, 5, 9].into_iter().flat_map(|m| (0..32).map(move |place| (m, place))) {
        let mut one_hot = vec![0.0; m * 32];
        one_hot[(m - 1) * 32 + place] = 127.0;
        for x in Activations::all(one_hot) {
            for level in Level::all() {
                let mut out = vec![0.0; m * 256];
                linear(level, &THREADS, x.floats(), &weights.matrix(), None, FloatsMut::F32(&mut out));
                for (scale, &found) in out[(m - 1) * 256..].iter().enumerate() {
                    let expected = 127.0 * weights.values[scale * 32 + place];
                    // Twice 127 times 6 is less than 2^11, and is multiplied by at most 2^127.
                    let is_beyond = scale > 244 && found.is_infinite() && (found > 0.0) == (expected > 0.0);
                    let is_right = f64::from(found) == expected || found.is_nan() && expected.is_nan() || is_beyond;
                    assert!(is_right, "scale {scale}, place {place}, {level}: found {found}, expected {expected}");
                }
            }
        }
    }
}

/// The largest sums that there are, of both signs, and the smallest activations.
#[test]
fn in_int8_extremes_are_exact() {
    let codes =
        [[0x77; BLOCK_BYTES], [0xff; BLOCK_BYTES], [0x7f; BLOCK_BYTES], [0xf7; BLOCK_BYTES]].as_flattened().to_vec();
    let weights = Weights::mxfp4(4, 32, codes, vec![127; 4]).int8();
    for (m, level) in [1, 5].into_iter().flat_map(|m| Level::all().into_iter().map(move |level| (m, level))) {
        // 2^112, and not by powi: Miri rounds that one way or the other.
        for size in [1.0, f32::MIN_POSITIVE, f32::from_bits((127 + 112) << 23)] {
            let x: Vec<f32> =
                (0..m * 32).map(|place| if place / 32 % 2 == 0 { 127.0 * size } else { -127.0 * size }).collect();
            let mut out = vec![0.0; m * 4];
            linear(level, &THREADS, Floats::F32(&x), &weights.matrix(), None, FloatsMut::F32(&mut out));
            for (row, found) in out.chunks(4).enumerate() {
                let sum = 32.0 * 6.0 * 127.0 * size * if row % 2 == 0 { 1.0 } else { -1.0 };
                assert_eq!(found, [sum, -sum, 0.0, 0.0], "row {row} of {m}, {level}");
            }
        }
        // Less than the smallest scale there is: as integers times that, rather than divided by zero.
        let x = vec![3.0 * f32::MIN_POSITIVE; m * 32];
        let mut out = vec![1.0; m * 4];
        linear(level, &THREADS, Floats::F32(&x), &weights.matrix(), None, FloatsMut::F32(&mut out));
        assert_eq!(out[..4], [32.0 * 18.0 * f32::MIN_POSITIVE, -32.0 * 18.0 * f32::MIN_POSITIVE, 0.0, 0.0], "{level}");
    }
}

#[test]
fn in_int8_nan_and_infinity_make_their_rows_nan() {
    let random = &mut Random(3);
    let weights = Weights::random(random, Format::Mxfp4, 13, 96).int8();
    for (m, level) in [4, 7].into_iter().flat_map(|m| Level::all().into_iter().map(move |level| (m, level))) {
        let mut floats = vec![1.0; m * 96];
        (floats[40], floats[96 + 40]) = (f32::NAN, f32::NEG_INFINITY);
        for x in Activations::all(floats) {
            let mut out = vec![0.0; m * 13];
            linear(level, &THREADS, x.floats(), &weights.matrix(), None, FloatsMut::F32(&mut out));
            assert!(out[..26].iter().all(|value| value.is_nan()), "{level}");
            assert!(out[26..].iter().all(|value| value.is_finite()), "{level}");
        }
    }
}

#[test]
fn nan_and_infinity_reach_their_rows_alone() {
    let random = &mut Random(3);
    let weights = Weights::random(random, Format::Bf16, 13, 70);
    for (m, level) in [4, 7].into_iter().flat_map(|m| Level::all().into_iter().map(move |level| (m, level))) {
        let mut floats = vec![1.0; m * 70];
        (floats[3], floats[70 + 3]) = (f32::NAN, f32::INFINITY);
        for x in Activations::all(floats) {
            let mut out = vec![0.0; m * 13];
            linear(level, &THREADS, x.floats(), &weights.matrix(), None, FloatsMut::F32(&mut out));
            assert!(out[..13].iter().all(|value| value.is_nan()), "{level}");
            assert!(out[13..26].iter().all(|value| !value.is_finite()), "{level}");
            assert!(out[26..].iter().all(|value| value.is_finite()), "{level}");
        }
    }
}

#[test]
fn each_row_meets_its_experts_matrix_and_rows_without_one_become_nan() {
    let random = &mut Random(4);
    let (experts, n, columns) = (5, if cfg!(miri) { 3 } else { 27 }, 64);
    // Expert 1 has no row, expert 3 has many.
    let ids = [3, 0, -1, 3, 3, 5, 4, 3, 2, i32::MIN, 3, 3];
    for (int8, x) in [false, true]
        .map(|int8| Activations::all(random.floats(ids.len() * columns)).map(|x| (int8, x)))
        .into_iter()
        .flatten()
    {
        let weights = Weights { int8, ..Weights::random(random, Format::Mxfp4, experts * n, columns) };
        for level in Level::all() {
            let mut out = vec![0.0; ids.len() * n];
            let result = FloatsMut::F32(&mut out);
            expert_linear(level, &THREADS, x.floats(), &weights.matrix(), experts, &ids, result);
            for (place, &found) in out.iter().enumerate() {
                let (row, column) = (place / n, place % n);
                match usize::try_from(ids[row]).ok().filter(|&expert| expert < experts) {
                    Some(expert) => {
                        let sum = weights.dot(expert * n + column, &weights.seen(&x.row(row, columns)));
                        assert_sum(found, sum, columns, &format!("row {row}, {level}"));
                    }
                    None => assert!(found.is_nan(), "row {row}, {level}"),
                }
            }
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "many values, and Miri is slow: it runs a mixture in the tests of the handlers")]
fn a_mixture_is_that_of_float64() {
    let random = &mut Random(5);
    let (count, hidden, width, k) = (6, 64, 96, 3);
    for (format, int8) in [(Format::Mxfp4, false), (Format::Bf16, false), (Format::Mxfp4, true)] {
        let gate_up = Weights { int8, ..Weights::random(random, format, count * 2 * width, hidden) };
        let down = Weights { int8, ..Weights::random(random, format, count * hidden, width) };
        // A value between the layers that is nearly half an integer may become either neighbour.
        let tolerance = if int8 { 5e-3 } else { 1e-4 };
        let biases = [random.floats(count * 2 * width), random.floats(count * hidden)];
        let experts = Experts {
            count,
            gate_up: gate_up.matrix(),
            gate_up_bias: Floats::F32(&biases[0]),
            down: down.matrix(),
            down_bias: Floats::F32(&biases[1]),
            limit: 7.0,
            alpha: 1.702,
        };
        for tokens in [1, 2, 7, 130] {
            let mut indices: Vec<i32> = (0..tokens * k).map(|_| i32::from(random.byte() % 6)).collect();
            let weights: Vec<f32> = random.floats(tokens * k);
            if tokens == 7 {
                (indices[3], indices[8], indices[20]) = (6, -1, ELSEWHERE);
            }
            for x in Activations::all(random.floats(tokens * hidden)) {
                for level in Level::all() {
                    let mut out = vec![0.0; tokens * hidden];
                    moe(level, &THREADS, x.floats(), &indices, &weights, &experts, FloatsMut::F32(&mut out));
                    for (token, found) in out.chunks(hidden).enumerate() {
                        let expected = mixture(
                            &x.row(token, hidden),
                            &indices[token * k..(token + 1) * k],
                            &weights[token * k..(token + 1) * k],
                            (&gate_up, &down, &biases),
                            (count, hidden, width),
                        );
                        let size = expected.iter().fold(0.0, |size: f64, value| size.max(value.abs()));
                        for (&found, expected) in zip(found, expected) {
                            let is_close = (f64::from(found) - expected).abs() <= tolerance * size;
                            let what = format!("{format:?}, token {token} of {tokens}, {level}");
                            assert!(is_close || found.is_nan() && expected.is_nan(), "{what}: {found}, {expected}");
                        }
                    }
                }
            }
        }
    }
}

/// The formula for one token.
fn mixture(
    x: &[f64],
    indices: &[i32],
    weights: &[f32],
    (gate_up, down, biases): (&Weights, &Weights, &[Vec<f32>; 2]),
    (count, hidden, width): (usize, usize, usize),
) -> Vec<f64> {
    let mut out = vec![0.0; hidden];
    let x = gate_up.seen(x);
    for (&index, &weight) in zip(indices, weights) {
        if index == ELSEWHERE {
            continue;
        }
        let Some(expert) = usize::try_from(index).ok().filter(|&expert| expert < count) else {
            return vec![f64::NAN; hidden];
        };
        let row = |row: usize| gate_up.dot(row, &x).0 + f64::from(biases[0][row]);
        let inner: Vec<f64> = (0..width)
            .map(|place| {
                let first = 2 * (expert * width + place);
                let (gate, up) = (row(first).min(7.0), row(first + 1).clamp(-7.0, 7.0));
                gate / (1.0 + (-1.702 * gate).exp()) * (up + 1.0)
            })
            .collect();
        let inner = down.seen(&inner);
        for (place, out) in out.iter_mut().enumerate() {
            let row = expert * hidden + place;
            *out += f64::from(weight) * (down.dot(row, &inner).0 + f64::from(biases[1][row]));
        }
    }
    out
}

#[test]
fn nothing_is_computed_of_nothing() {
    let level = Level::best();
    linear(level, &THREADS, Floats::F32(&[]), &Matrix::bf16(3, 4, &[0; 24]), None, FloatsMut::F32(&mut []));
    linear(level, &THREADS, Floats::F32(&[]), &Matrix::bf16(0, 4, &[]), None, FloatsMut::F32(&mut []));
    expert_linear(level, &THREADS, Floats::F32(&[]), &Matrix::mxfp4(0, &[], &[]), 0, &[], FloatsMut::F32(&mut []));
    let mut out = [7.0; 3];
    linear(level, &THREADS, Floats::F32(&[]), &Matrix::bf16(3, 0, &[]), None, FloatsMut::F32(&mut out));
    assert_eq!(out, [0.0; 3]);
    // Nothing stands between the layers: the second adds its bias alone.
    let experts = Experts {
        count: 2,
        gate_up: Matrix::bf16(0, 3, &[]),
        gate_up_bias: Floats::F32(&[]),
        down: Matrix::bf16(6, 0, &[]),
        down_bias: Floats::F32(&[0.0, 0.0, 0.0, 1.0, 2.0, 3.0]),
        limit: 7.0,
        alpha: 1.702,
    };
    moe(level, &THREADS, Floats::F32(&[1.0; 3]), &[1], &[0.5], &experts, FloatsMut::F32(&mut out));
    assert_eq!(out, [0.5, 1.0, 1.5]);
}

#[test]
#[should_panic(expected = "one scale for each block")]
fn scales_must_fit_their_blocks() {
    let _ = Matrix::mxfp4(1, &[0; 32], &[127]);
}
