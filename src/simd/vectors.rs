//! Vectors of 64 bytes and what the kernels do with them.

/// A kernel that is written in vectors.
pub(crate) trait VectorKernel {
    /// What it returns.
    type Output;
    /// The loop; `#[inline(always)]`, so that it is compiled within each level's function.
    fn run<V: Vectors>(self, vectors: V) -> Self::Output;
}

/// Vectors of 64 bytes in one or several registers. A value of the type is proof that the processor has them.
///
/// All methods are `#[inline(always)]`, and mean something only within a function compiled for these instructions.
pub(crate) trait Vectors: Copy {
    /// Sixteen f32.
    type Floats: Copy;
    /// Sixteen integers of 32 bits, or thirty-two bfloat16.
    type Words: Copy;
    /// Whether there are registers for 24 sums and what is added to them; otherwise for 12.
    const HAS_MANY_REGISTERS: bool;
    /// Whether [`bf16_dot`](Self::bf16_dot) is one instruction; otherwise activations come in float32.
    const HAS_BF16_DOT: bool;

    /// All zero.
    fn zero(self) -> Self::Floats;
    /// The same value in all lanes.
    fn splat(self, value: f32) -> Self::Floats;
    /// From memory.
    fn load_f32(self, values: &[f32; 16]) -> Self::Floats;
    /// To memory.
    fn store_f32(self, values: Self::Floats) -> [f32; 16];
    /// From memory, little endian.
    fn load(self, bytes: &[u8; 64]) -> Self::Words;
    /// From memory, at most 64 bytes, and zeros behind them.
    #[inline(always)]
    fn load_part(self, bytes: &[u8]) -> Self::Words {
        let mut whole = [0; 64];
        whole[..bytes.len()].copy_from_slice(bytes);
        self.load(&whole)
    }
    /// From memory.
    fn load_words(self, words: &[u32; 16]) -> Self::Words;
    /// The same word in all lanes.
    fn splat_words(self, word: u32) -> Self::Words;
    /// Lane j of vector i becomes lane i of vector j.
    fn transpose(self, rows: [Self::Words; 16]) -> [Self::Words; 16];
    /// To memory.
    fn store_bf16(self, words: Self::Words) -> [u16; 32];
    /// a + b.
    fn add(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// a · b.
    fn mul(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// a · b + c, rounded once where the processor can.
    fn mul_add(self, a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    /// The smaller of each two; `b` where either is NaN.
    fn min(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// The larger of each two; `b` where either is NaN.
    fn max(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// a · 2^n for whole n in −252 ..= 254, rounded once.
    fn scale(self, a: Self::Floats, n: Self::Floats) -> Self::Floats;
    /// The sum of all lanes, in some order.
    fn sum(self, a: Self::Floats) -> f32;
    /// The largest of all lanes; any of them where one is NaN.
    fn largest(self, a: Self::Floats) -> f32;
    /// `values` where a lane's integer of `positions` is in `first ..= last`, −∞ elsewhere.
    fn within(self, values: Self::Floats, positions: Self::Words, first: i32, last: i32) -> Self::Floats;

    /// The same bits.
    fn floats(self, words: Self::Words) -> Self::Floats;

    /// Values of the E2M1 codes in bits 4 `number` .. of both halves of each lane, `number` below 4.
    fn e2m1_pair(self, codes: Self::Words, number: u32) -> [Self::Floats; 2];
    /// For each of M rows the products of all codes of sixteen 32-bit lanes with values: those of the codes in bits 4 j ..
    /// with vector j, summed for each lane.
    #[inline(always)]
    fn e2m1_dot<const M: usize>(self, codes: Self::Words, values: [&[[f32; 16]; 8]; M]) -> [Self::Floats; M] {
        let mut sums = [self.zero(); M];
        for (j, number) in (0..4).zip(0u32..) {
            let [low, high] = self.e2m1_pair(codes, number);
            for m in 0..M {
                sums[m] = self.mul_add(low, self.load_f32(&values[m][j]), sums[m]);
                sums[m] = self.mul_add(high, self.load_f32(&values[m][j + 4]), sums[m]);
            }
        }
        sums
    }
    /// Values of the E2M1 codes in bits `shift` .. `shift` + 4 of each 16-bit lane, as bfloat16.
    fn e2m1_bf16(self, codes: Self::Words, shift: u32) -> Self::Words;
    /// The factors of the scale bytes in bits `shift` .. `shift` + 8 of each lane: 2^(byte − 127), and NaN for 255.
    fn e8m0(self, scales: Self::Words, shift: u32) -> Self::Floats;
    /// The factors of four scale bytes, each on four lanes, the lowest first: 2^(byte − 127). For bytes 1 .. 254.
    fn e8m0_normal(self, scales: u32) -> Self::Floats;
    /// What [`add_exponents`](Self::add_exponents) takes for scale bytes in bits `shift` .. `shift` + 8 of each lane.
    fn exponents(self, scales: Self::Words, shift: u32) -> Self::Words;
    /// bfloat16 values, of which `codes` (in bits `shift` .. `shift` + 4 of each 16-bit lane) say which are not zero,
    /// times 2^(byte − 127) of the scale bytes behind `exponents`. For bytes 2 .. 252.
    fn add_exponents(self, values: Self::Words, codes: Self::Words, shift: u32, exponents: Self::Words) -> Self::Words;

    /// Twice the values of the E2M1 codes in the lower halves of bytes, and in the upper ones, plus
    /// [`E2M1_BIAS`](super::E2M1_BIAS), so that none is negative: bytes.
    fn e2m1_bytes(self, codes: Self::Words) -> [Self::Words; 2];
    /// In each 32-bit lane the products of four unsigned bytes, all at most 24, with four signed ones, above −128, added
    /// to `sums`: exactly, for S at most 4.
    fn dot_bytes<const S: usize>(
        self,
        unsigned: [Self::Words; S],
        signed: [Self::Words; S],
        sums: Self::Words,
    ) -> Self::Words;
    /// The values of signed integers, rounded.
    fn floats_of_ints(self, ints: Self::Words) -> Self::Floats;

    /// The lower bfloat16 of each 32-bit lane.
    fn bf16_even(self, words: Self::Words) -> Self::Floats;
    /// The upper bfloat16 of each 32-bit lane.
    fn bf16_odd(self, words: Self::Words) -> Self::Floats;
    /// In each 32-bit lane both products of bfloat16 added to `sum`. Where it is one instruction, what is subnormal
    /// counts as zero.
    #[inline(always)]
    fn bf16_dot(self, a: Self::Words, b: Self::Words, sum: Self::Floats) -> Self::Floats {
        let sum = self.mul_add(self.bf16_odd(a), self.bf16_odd(b), sum);
        self.mul_add(self.bf16_even(a), self.bf16_even(b), sum)
    }
    /// Asks for the line that is `ahead` bytes behind the start of `bytes`, which need not exist.
    fn prefetch(self, bytes: &[u8], ahead: usize);
}

#[cfg(test)]
mod tests {
    use std::array::from_fn;

    use super::*;
    use crate::simd::Level;

    /// What comes out of each method: its name, its arguments that are constants, and bits.
    struct Methods {
        words: [[u32; 16]; 4],
        /// Numbers of which sums and products are exact.
        floats: [[f32; 16]; 8],
        length: usize,
    }

    impl VectorKernel for Methods {
        type Output = Vec<(&'static str, u32, Vec<u32>)>;

        #[inline(always)]
        fn run<V: Vectors>(self, vectors: V) -> Self::Output {
            let mut results = Vec::new();
            macro_rules! push {
                ($name:literal, $argument:expr, floats $value:expr) => {
                    results.push(($name, $argument, vectors.store_f32($value).map(f32::to_bits).to_vec()));
                };
                ($name:literal, $argument:expr, words $value:expr) => {
                    let halves = vectors.store_bf16($value);
                    results.push(($name, $argument, halves.map(u32::from).to_vec()));
                };
            }
            let words = self.words.map(|words| vectors.load_words(&words));
            let [a, b, c] = [0, 1, 2].map(|number: usize| vectors.load_f32(&self.floats[number]));
            push!("zero", 0, floats vectors.zero());
            push!("splat", 0, floats vectors.splat(self.floats[0][0]));
            push!("splat_words", 0, words vectors.splat_words(self.words[0][0]));
            let bytes: [u8; 64] = from_fn(|byte| self.words[0][byte / 4].to_le_bytes()[byte % 4]);
            push!("load", 0, words vectors.load(&bytes));
            push!("load_part", 0, words vectors.load_part(&bytes[..self.length]));
            let rows = from_fn(|row: usize| {
                let row = self.words[row % 4].map(|word| word.rotate_left(u32::try_from(row).expect("is small")));
                vectors.load_words(&row)
            });
            for (row, number) in vectors.transpose(rows).into_iter().zip(0..) {
                push!("transpose", number, words row);
            }
            push!("add", 0, floats vectors.add(a, b));
            push!("mul", 0, floats vectors.mul(a, b));
            push!("mul_add", 0, floats vectors.mul_add(a, b, c));
            push!("min", 0, floats vectors.min(a, b));
            push!("max", 0, floats vectors.max(a, b));
            push!("scale", 0, floats vectors.scale(a, b));
            results.push(("sum", 0, vec![vectors.sum(a).to_bits()]));
            results.push(("largest", 0, vec![vectors.largest(a).to_bits()]));
            push!("within", 0, floats vectors.within(a, words[1], i32::MIN / 2, i32::MAX / 3));
            push!("floats", 0, floats vectors.floats(words[0]));
            for number in 0..4 {
                let [low, high] = vectors.e2m1_pair(words[0], number);
                push!("e2m1_pair, low", number, floats low);
                push!("e2m1_pair, high", number, floats high);
                push!("e2m1_bf16", number, words vectors.e2m1_bf16(words[0], 4 * number));
                push!("e8m0", number, floats vectors.e8m0(words[1], 8 * number));
                let exponents = vectors.exponents(words[2], 8 * number);
                let values = vectors.e2m1_bf16(words[0], 4 * number);
                push!("add_exponents", number, words vectors.add_exponents(values, words[0], 4 * number, exponents));
            }
            let doubled = self.floats.map(|row| row.map(|x| 2.0 * x));
            for (dot, number) in vectors.e2m1_dot(words[0], [&self.floats, &doubled]).into_iter().zip(0..) {
                push!("e2m1_dot", number, floats dot);
            }
            push!("e8m0_normal", 0, floats vectors.e8m0_normal(self.words[2][0]));
            let [low, high] = vectors.e2m1_bytes(words[0]);
            push!("e2m1_bytes", 0, words low);
            push!("e2m1_bytes", 1, words high);
            push!("dot_bytes", 1, words vectors.dot_bytes([low], [words[3]], words[1]));
            let four = vectors.dot_bytes([low, high, high, low], [words[3]; 4], words[1]);
            push!("dot_bytes", 4, words four);
            push!("floats_of_ints", 0, floats vectors.floats_of_ints(words[0]));
            push!("bf16_even", 0, floats vectors.bf16_even(words[0]));
            push!("bf16_odd", 0, floats vectors.bf16_odd(words[0]));
            let [one, two] = [0, 1].map(|number| vectors.e2m1_bf16(words[number], 4));
            push!("bf16_dot", 0, floats vectors.bf16_dot(one, two, a));
            results
        }
    }

    #[test]
    fn every_level_does_what_plain_arrays_do() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            u32::try_from(state >> 32).expect("32 bits")
        };
        for length in 0..=64 {
            let mut words: [[u32; 16]; 4] = from_fn(|_| from_fn(|_| random()));
            // Scale bytes of exponents that fit, and bytes that are not −128.
            words[2] = words[2].map(|word| u32::from_le_bytes(word.to_le_bytes().map(|byte| byte.clamp(2, 252))));
            words[3] = words[3]
                .map(|word| u32::from_le_bytes(word.to_le_bytes().map(|byte| if byte == 128 { 0 } else { byte })));
            let mut floats: [[f32; 16]; 8] =
                from_fn(|_| from_fn(|_| f32::from(i8::from_le_bytes([random().to_le_bytes()[0]])) / 4.0));
            // Exponents, for one method; −0 would be as small as 0.
            floats[1] = floats[1].map(|x| x.round() + 0.0);
            let of = |level: Level| level.run_vectors(Methods { words, floats, length });
            let expected = of(Level::PLAIN);
            for level in Level::all() {
                for (expected, found) in expected.iter().zip(of(level)) {
                    let is_nan = |bits: u32| f32::from_bits(bits).is_nan();
                    let agrees = expected.2.iter().zip(&found.2).all(|(a, b)| a == b || is_nan(*a) && is_nan(*b));
                    let (name, argument, _) = expected;
                    assert!(agrees, "{name}, {argument}, {level}: {:x?} is not {:x?}", found.2, expected.2);
                }
            }
        }
    }
}
