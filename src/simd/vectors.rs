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
    /// Whether there are registers for sixteen sums, and what is added to them.
    const HAS_MANY_REGISTERS: bool;

    /// Sixteen f32.
    type Floats: Copy;
    /// Sixteen integers of 32 bits, or thirty-two bfloat16.
    type Words: Copy;

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
    /// The 32-bit lanes a0 b0 a1 b1 … of the lower halves, and of the upper ones.
    fn interleave(self, a: Self::Words, b: Self::Words) -> [Self::Words; 2];

    /// Values of the E2M1 codes in bits `shift` .. `shift` + 4 of each 32-bit lane.
    fn e2m1(self, codes: Self::Words, shift: u32) -> Self::Floats;
    /// Values of the E2M1 codes in bits `shift` .. `shift` + 4 of each 16-bit lane, as bfloat16.
    fn e2m1_bf16(self, codes: Self::Words, shift: u32) -> Self::Words;
    /// The factors of four scale bytes, each on four lanes: 2^(byte − 127), and NaN for 255.
    fn e8m0(self, scales: [u8; 4]) -> Self::Floats;
    /// bfloat16 values, of which `codes` (in bits `shift` .. `shift` + 4 of each 16-bit lane) say which are not zero,
    /// times 2^(byte − 127) of four scale bytes, each on eight lanes. For bytes 2 .. 252.
    fn scale_bf16(self, values: Self::Words, codes: Self::Words, shift: u32, scales: [u8; 4]) -> Self::Words;

    /// The lower bfloat16 of each 32-bit lane.
    fn bf16_even(self, words: Self::Words) -> Self::Floats;
    /// The upper bfloat16 of each 32-bit lane.
    fn bf16_odd(self, words: Self::Words) -> Self::Floats;
    /// The first sixteen bfloat16, and the last.
    fn bf16_halves(self, words: Self::Words) -> [Self::Floats; 2];
    /// In each 32-bit lane both products of bfloat16 added to `sum`. Where it is one instruction, what is subnormal
    /// counts as zero.
    #[inline(always)]
    fn bf16_dot(self, a: Self::Words, b: Self::Words, sum: Self::Floats) -> Self::Floats {
        let sum = self.mul_add(self.bf16_odd(a), self.bf16_odd(b), sum);
        self.mul_add(self.bf16_even(a), self.bf16_even(b), sum)
    }
    /// Asks for the line that is `ahead` bytes behind the start of `line`, which need not exist.
    fn prefetch(self, line: &[u8; 64], ahead: usize);
}
