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

    /// Values of the E2M1 codes in bits `shift` .. `shift` + 4 of each 32-bit lane.
    fn e2m1(self, codes: Self::Words, shift: u32) -> Self::Floats;
    /// Values of the E2M1 codes in bits 4 `number` .. of both halves of each lane, `number` below 4.
    #[inline(always)]
    fn e2m1_pair(self, codes: Self::Words, number: u32) -> [Self::Floats; 2] {
        [self.e2m1(codes, 4 * number), self.e2m1(codes, 4 * number + 16)]
    }
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
