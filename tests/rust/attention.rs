//! Attention against the formula in float64, on every level of instructions that the machine has.

use half::bf16;
use tensorport::kernels::{Attention, Floats, FloatsMut, ScopedThreads, attention};
use tensorport::simd::Level;

/// Numbers without a pattern.
struct Random(u64);

impl Random {
    fn below(&mut self, count: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap() % count
    }

    /// In -2 .. 2.
    fn float(&mut self) -> f32 {
        f32::from(u16::try_from(self.below(1 << 16)).unwrap()) / 16384.0 - 2.0
    }

    fn array(&mut self, count: usize, is_bf16: bool) -> Array {
        Array::new((0..count).map(|_| self.float()).collect(), is_bf16)
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

/// Floats in one of the dtypes, and what they mean.
#[derive(Clone)]
struct Array {
    values: Vec<f32>,
    halves: Option<Vec<u16>>,
}

impl Array {
    fn new(values: Vec<f32>, is_bf16: bool) -> Self {
        if !is_bf16 {
            return Self { values, halves: None };
        }
        let halves: Vec<bf16> = values.into_iter().map(bf16::from_f32).collect();
        let values = halves.iter().map(|half| half.to_f32()).collect();
        Self { values, halves: Some(halves.into_iter().map(bf16::to_bits).collect()) }
    }

    fn floats(&self) -> Floats<'_> {
        self.halves.as_ref().map_or(Floats::F32(&self.values), |halves| Floats::Bf16(halves))
    }

    /// With other values in the same dtype.
    fn with(&self, change: impl FnOnce(&mut [f32])) -> Self {
        let mut values = self.values.clone();
        change(&mut values);
        Self::new(values, self.halves.is_some())
    }
}

#[derive(Clone)]
struct Case {
    batch: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    key_heads: usize,
    head_dim: usize,
    query: Array,
    key: Array,
    value: Array,
    query_positions: Vec<i32>,
    key_positions: Vec<i32>,
    sinks: Option<Array>,
    scale: f32,
    window: Option<u32>,
}

impl Case {
    /// Keys in shuffled order, of which some are not there; the last query of the second row is padding.
    fn new(
        random: &mut Random,
        [queries, keys]: [usize; 2],
        [heads, key_heads, head_dim]: [usize; 3],
        [is_query_bf16, are_keys_bf16, are_values_bf16]: [bool; 3],
    ) -> Self {
        let batch = 2;
        let mut key_positions = Vec::new();
        let mut query_positions = Vec::new();
        for row in 0..batch {
            let mut positions: Vec<i32> = (0..i32::try_from(keys).unwrap()).collect();
            random.shuffle(&mut positions);
            let empty = row * (keys / 5);
            positions[..empty].fill(-1);
            key_positions.extend(positions);
            let first = keys.saturating_sub(queries * (row + 1));
            query_positions.extend((first..first + queries).map(|position| i32::try_from(position).unwrap()));
        }
        *query_positions.last_mut().unwrap() = -1;
        Self {
            batch,
            queries,
            keys,
            heads,
            key_heads,
            head_dim,
            query: random.array(batch * queries * heads * head_dim, is_query_bf16),
            key: random.array(batch * keys * key_heads * head_dim, are_keys_bf16),
            value: random.array(batch * keys * key_heads * head_dim, are_values_bf16),
            query_positions,
            key_positions,
            sinks: Some(random.array(heads, false)),
            scale: 0.125,
            window: None,
        }
    }

    fn inputs(&self) -> Attention<'_> {
        Attention {
            query: self.query.floats(),
            key: self.key.floats(),
            value: self.value.floats(),
            query_positions: &self.query_positions,
            key_positions: &self.key_positions,
            sinks: self.sinks.as_ref().map(Array::floats),
            batch: self.batch,
            heads: self.heads,
            key_heads: self.key_heads,
            head_dim: self.head_dim,
            scale: self.scale,
            window: self.window,
        }
    }

    fn run(&self, level: Level, threads: usize) -> Vec<f32> {
        // Whatever stands there is overwritten.
        let mut out = vec![f32::NAN; self.query.values.len()];
        attention(level, &ScopedThreads(threads), &self.inputs(), FloatsMut::F32(&mut out));
        out
    }

    /// Slots that a query sees.
    fn seen(&self, row: usize, query: usize) -> Vec<usize> {
        let at = i64::from(self.query_positions[row * self.queries + query]);
        let is_seen = |slot: &usize| {
            let of = i64::from(self.key_positions[row * self.keys + slot]);
            of >= 0 && of <= at && self.window.is_none_or(|window| at - of < i64::from(window))
        };
        (0..self.keys).filter(is_seen).collect()
    }

    /// The result of one head of a query, and how far from it sums in float32 may be.
    fn expected(&self, row: usize, query: usize, head: usize) -> (Vec<f64>, Vec<f64>) {
        let group = head / (self.heads / self.key_heads);
        let floats = |array: &Array, place: usize| -> Vec<f64> {
            array.values[place * self.head_dim..(place + 1) * self.head_dim].iter().map(|&x| f64::from(x)).collect()
        };
        let of_query = floats(&self.query, (row * self.queries + query) * self.heads + head);
        let place = |slot: usize| (row * self.keys + slot) * self.key_heads + group;
        let sink = self.sinks.as_ref().map_or(f64::NEG_INFINITY, |sinks| f64::from(sinks.values[head]));
        let (mut scores, mut values, mut size) = (Vec::new(), Vec::new(), 0.0_f64);
        for slot in self.seen(row, query) {
            let products = std::iter::zip(&of_query, floats(&self.key, place(slot)))
                .map(|(q, k)| q * k * f64::from(self.scale))
                .collect::<Vec<f64>>();
            size = size.max(products.iter().map(|product| product.abs()).sum());
            scores.push(products.iter().sum::<f64>());
            values.push(floats(&self.value, place(slot)));
        }
        let largest = scores.iter().copied().fold(sink, f64::max);
        if largest == f64::NEG_INFINITY {
            return (vec![0.0; self.head_dim], vec![0.0; self.head_dim]);
        }
        let shares: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
        let total = shares.iter().sum::<f64>() + (sink - largest).exp();
        let mix = |dim: usize, of: fn(f64) -> f64| {
            std::iter::zip(&shares, &values).map(|(share, value)| share / total * of(value[dim])).sum::<f64>()
        };
        #[expect(clippy::cast_precision_loss, reason = "small")]
        let (terms, dims) = (scores.len() as f64 + 8.0, self.head_dim as f64);
        // An error e of a score changes its share by a factor of at most exp(2 e); the rest are sums over the keys.
        let unit = f64::from(f32::EPSILON);
        let factor = (4.0 * dims * unit * size.max(largest.abs())).exp_m1() + 2.0 * terms * unit;
        // Shares that are no normal float32 may be zero.
        let tiny = f64::from(f32::MIN_POSITIVE) * terms;
        (0..self.head_dim).map(|dim| (mix(dim, |x| x), factor * mix(dim, f64::abs) + tiny)).unzip()
    }

    fn assert_right(&self, what: &str) {
        for level in Level::all() {
            for threads in [1, 5] {
                let found = self.run(level, threads);
                for (place, found) in found.chunks(self.head_dim).enumerate() {
                    let (row, rest) = (place / (self.queries * self.heads), place % (self.queries * self.heads));
                    let (query, head) = (rest / self.heads, rest % self.heads);
                    let (expected, bound) = self.expected(row, query, head);
                    for dim in 0..self.head_dim {
                        let (found, expected, bound) = (f64::from(found[dim]), expected[dim], bound[dim]);
                        let is_right = (found - expected).abs() <= bound || found.is_nan() && expected.is_nan();
                        let place = format!("row {row}, query {query}, head {head}, {dim}");
                        assert!(
                            is_right,
                            "{what}, {level}, {threads} threads, {place}: {found} for {expected}, {bound}"
                        );
                    }
                }
            }
        }
    }
}

const BOTH: [bool; 2] = [false, true];

#[test]
fn results_are_those_of_float64_whatever_the_sizes() {
    let random = &mut Random(1);
    for head_dim in [1, 8, 40, 64, 128] {
        for (queries, keys) in [(1, 1), (1, 300), (3, 64), (7, 65), (70, 131)] {
            for heads in [[3, 3], [14, 2], [8, 1]] {
                let dtypes = [random.below(2) == 0, random.below(2) == 0, random.below(2) == 0];
                let case = Case::new(random, [queries, keys], [heads[0], heads[1], head_dim], dtypes);
                case.assert_right(&format!(
                    "{queries} queries, {keys} keys, heads {heads:?} of {head_dim}, {dtypes:?}"
                ));
            }
        }
    }
}

#[test]
fn every_mix_of_dtypes_is_taken() {
    let random = &mut Random(2);
    for query in BOTH {
        for key in BOTH {
            for value in BOTH {
                let case = Case::new(random, [5, 80], [6, 2, 40], [query, key, value]);
                case.assert_right(&format!("{:?}", [query, key, value]));
            }
        }
    }
}

#[test]
fn a_query_sees_so_many_keys() {
    let random = &mut Random(3);
    let mut case = Case::new(random, [90, 200], [4, 2, 16], [true; 3]);
    for window in [1, 2, 63, 64, 128, 1000, u32::MAX] {
        case.window = Some(window);
        case.assert_right(&format!("window {window}"));
    }
}

/// With one sum over all of these keys it would be 7e-6.
#[test]
fn many_keys_add_few_errors() {
    let random = &mut Random(9);
    let mut case = Case::new(random, [1, 60_000], [3, 1, 5], [false, true, false]);
    case.value = case.value.with(|values| values.iter_mut().for_each(|value| *value += 2.5));
    (case.scale, case.query_positions) = (0.01, vec![i32::MAX; 2]);
    for level in Level::all() {
        // Each row of the batch as a whole.
        let found = case.run(level, 1);
        let expected = (0..6).flat_map(|place| case.expected(place / 3, 0, place % 3).0);
        let errors = std::iter::zip(found, expected).map(|(found, expected)| (f64::from(found) / expected - 1.0).abs());
        let worst = errors.fold(0.0, f64::max);
        assert!(worst < 3e-6, "{level}: {worst}");
    }
}

#[test]
fn positions_may_be_any_that_int32_holds() {
    let random = &mut Random(4);
    let mut case = Case::new(random, [9, 70], [2, 1, 8], [false; 3]);
    for positions in [&mut case.query_positions, &mut case.key_positions] {
        for position in positions {
            *position = if *position < 0 { i32::MIN } else { i32::MAX - 69 + *position };
        }
    }
    for window in [None, Some(0), Some(3), Some(u32::MAX)] {
        case.window = window;
        case.assert_right(&format!("window {window:?}"));
    }
}

/// Keys in their order, so that blocks lie before, on and behind the diagonal.
#[test]
fn blocks_that_nobody_sees_are_left_out() {
    let random = &mut Random(5);
    let mut case = Case::new(random, [300, 300], [2, 1, 16], [true; 3]);
    case.query_positions = (0..300).chain(0..300).collect();
    case.key_positions = case.query_positions.clone();
    for window in [None, Some(100)] {
        case.window = window;
        case.assert_right(&format!("window {window:?}"));
    }
    // What nobody sees is not read: the first key's value would spoil what is multiplied by it.
    case.window = Some(100);
    case.value = case.value.with(|values| values[..16].fill(f32::NAN));
    let found = case.run(Level::best(), 2);
    assert!(found[..100 * 32].iter().all(|value| value.is_nan()));
    assert!(found[200 * 32..].iter().all(|value| value.is_finite()));
}

#[test]
fn what_stands_at_no_position_is_never_read() {
    let random = &mut Random(6);
    for dtypes in [[true; 3], [false; 3]] {
        let case = Case::new(random, [6, 90], [4, 2, 40], dtypes);
        let spoil = |array: &Array, positions: &[i32], bad: f32| {
            array.with(|values| {
                let width = values.len() / positions.len();
                for (values, position) in std::iter::zip(values.chunks_mut(width), positions) {
                    if *position < 0 {
                        values.fill(bad);
                    }
                }
            })
        };
        for bad in [f32::NAN, f32::INFINITY] {
            let spoiled = Case {
                query: spoil(&case.query, &case.query_positions, bad),
                key: spoil(&case.key, &case.key_positions, bad),
                value: spoil(&case.value, &case.key_positions, bad),
                ..case.clone()
            };
            for level in Level::all() {
                assert_eq!(spoiled.run(level, 3), case.run(level, 3), "{level}");
            }
        }
    }
}

#[test]
fn nan_in_a_query_or_a_key_reaches_those_that_see_it() {
    let random = &mut Random(7);
    let mut case = Case::new(random, [20, 130], [4, 2, 16], [false; 3]);
    case.window = Some(10);
    let slot = case.seen(0, 12)[0];
    let spoiled = Case {
        query: case.query.with(|query| query[(5 * 4 + 1) * 16] = f32::NAN),
        key: case.key.with(|key| key[(slot * 2 + 1) * 16 + 7] = f32::NAN),
        ..case.clone()
    };
    for level in Level::all() {
        let (found, clean) = (spoiled.run(level, 2), case.run(level, 2));
        for (place, (found, clean)) in std::iter::zip(found.chunks(16), clean.chunks(16)).enumerate() {
            let (row, query, head) = (place / 80, place / 4 % 20, place % 4);
            let sees = row == 0 && head >= 2 && case.seen(0, query).contains(&slot);
            if sees || (row, query, head) == (0, 5, 1) {
                assert!(found.iter().all(|value| value.is_nan()), "{level}, {place}");
            } else {
                assert_eq!(found, clean, "{level}, {place}");
            }
        }
    }
}

#[test]
fn a_query_that_sees_nothing_is_zero() {
    let random = &mut Random(8);
    for has_sinks in BOTH {
        let mut case = Case::new(random, [3, 70], [4, 2, 8], [true; 3]);
        if !has_sinks {
            case.sinks = None;
        }
        case.key_positions[70..].fill(-1);
        case.query_positions[1] = -7;
        for level in Level::all() {
            let found = case.run(level, 4);
            for (query, found) in found.chunks(32).enumerate() {
                assert_eq!(found.iter().all(|value| *value == 0.0), query == 1 || query >= 3, "{level}, {query}");
            }
        }
        case.assert_right("some see nothing");
        let none =
            Case { keys: 0, key: random.array(0, true), value: random.array(0, true), key_positions: vec![], ..case };
        assert!(none.run(Level::best(), 2).iter().all(|value| *value == 0.0));
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let random = &mut Random(9);
    for keys in [40, 300] {
        let mut case = Case::new(random, [2, keys], [4, 2, 16], [false; 3]);
        case.scale = 1000.0;
        case.assert_right("large scores");
        case.scale = -1e30;
        for level in Level::all() {
            assert!(case.run(level, 2).iter().all(|value| value.is_finite()), "{level}");
        }
    }
}

#[test]
fn sinks_take_their_share() {
    let random = &mut Random(10);
    let mut case = Case::new(random, [1, 600], [4, 2, 16], [true; 3]);
    for sinks in [[f32::NEG_INFINITY; 4], [1e4; 4], [-1e4; 4], [0.0, 3.0, f32::NEG_INFINITY, 50.0]] {
        case.sinks = Some(Array::new(sinks.to_vec(), false));
        case.assert_right(&format!("sinks {sinks:?}"));
    }
    case.sinks = Some(Array::new(vec![f32::NEG_INFINITY; 4], true));
    let without = Case { sinks: None, ..case.clone() };
    assert_eq!(case.run(Level::best(), 2), without.run(Level::best(), 2));
    case.sinks = Some(Array::new(vec![f32::NAN, 0.0, f32::INFINITY, 0.0], false));
    let found = case.run(Level::best(), 2);
    let is_nan: Vec<bool> = found.chunks(16).take(4).map(|head| head.iter().all(|value| value.is_nan())).collect();
    assert_eq!(is_nan, [true, false, true, false]);
}

#[test]
fn a_score_of_minus_infinity_is_as_good_as_no_key() {
    let random = &mut Random(11);
    let case = Case::new(random, [4, 100], [2, 1, 8], [false; 3]);
    let query = case.query.with(|query| query.iter_mut().for_each(|value| *value = value.abs() + 1.0));
    let key = case.key.with(|key| key[..37 * 8].fill(f32::NEG_INFINITY));
    let mut hidden = Case { query: query.clone(), ..case.clone() };
    hidden.key_positions[..37].fill(-1);
    let case = Case { query, key, ..case };
    for level in Level::all() {
        assert_eq!(case.run(level, 2), hidden.run(level, 2), "{level}");
    }
    let key = case.key.with(|key| key.fill(f32::NEG_INFINITY));
    let alone = Case { key, sinks: None, ..case };
    assert!(alone.run(Level::best(), 2).iter().all(|value| *value == 0.0));
}

#[test]
fn results_in_bfloat16_are_those_in_float32_rounded_once() {
    let random = &mut Random(12);
    let case = Case::new(random, [3, 90], [4, 2, 40], [true; 3]);
    let mut halves = vec![0; case.query.values.len()];
    attention(Level::best(), &ScopedThreads(2), &case.inputs(), FloatsMut::Bf16(&mut halves));
    let rounded = case.run(Level::best(), 2).into_iter().map(|value| bf16::from_f32(value).to_bits());
    assert_eq!(halves, rounded.collect::<Vec<u16>>());
}

#[test]
#[should_panic(expected = "a value for each key")]
fn lengths_must_fit() {
    let random = &mut Random(13);
    let mut case = Case::new(random, [1, 10], [2, 1, 8], [true; 3]);
    case.value = random.array(7, true);
    case.run(Level::best(), 1);
}
