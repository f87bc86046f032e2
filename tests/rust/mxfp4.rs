//! MXFP4: every code under every scale byte, and which tensors form a pair.

use std::path::Path;

use half::{bf16, f16};
use proptest::prelude::*;
use safetensors::Dtype;
use tensorport::Checkpoint;
use tensorport::cast::{OnOverflow, Target};
use tensorport::mxfp4::{Candidate, DecodeTable, Pairing, count_parameters, pair};
use tensorport::simd::Level;

use crate::cast::oracle;
use crate::fixtures::{Tensor, write};

/// The sixteen values as OCP MX v1.0 defines them: sign, two exponent bits, one mantissa bit.
fn e2m1(code: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(code >> 1 & 3), f64::from(code & 1));
    let magnitude = if exponent == 0 { mantissa / 2.0 } else { (1.0 + mantissa / 2.0) * 2f64.powi(exponent - 1) };
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// The sixteen code bytes of one block: each code twice, once in each nibble.
fn all_codes() -> Vec<u8> {
    (0..16).map(|byte: u8| byte | (15 - byte) << 4).collect()
}

#[test]
fn every_code_under_every_scale_is_the_definitions_value() {
    for target in [Target::F16, Target::Bf16, Target::F32] {
        let width = target.dtype().bitsize() / 8;
        let table = DecodeTable::new(target, OnOverflow::Warn);
        for (scale, level) in (0..=255u8).flat_map(|scale| Level::all().into_iter().map(move |level| (scale, level))) {
            let mut out = vec![0xa5; 32 * width];
            let counts = table.decode_with(level, &all_codes(), &[scale], &mut out);
            let (mut overflow, mut underflow, mut largest) = (0, 0, 0f64);
            for (index, stored) in out.chunks(width).enumerate() {
                // The low nibble comes first.
                let byte = u8::try_from(index / 2).unwrap();
                let value = e2m1(if index % 2 == 0 { byte } else { 15 - byte }) * 2f64.powi(i32::from(scale) - 127);
                let mut padded = [0; 4];
                padded[..width].copy_from_slice(stored);
                let bits = u32::from_le_bytes(padded);
                let decoded = match target {
                    Target::F16 => f16::from_le_bytes([stored[0], stored[1]]).to_f64(),
                    Target::Bf16 => bf16::from_le_bytes([stored[0], stored[1]]).to_f64(),
                    Target::F32 => f64::from(f32::from_bits(bits)),
                };
                if scale == 255 {
                    assert!(decoded.is_nan(), "scale 255 is NaN");
                    continue;
                }
                assert_eq!(Some(u64::from(bits)), oracle(target, value), "{target:?}: {value:e} under {scale}");
                if decoded.is_infinite() {
                    overflow += 1;
                    largest = largest.max(value.abs());
                }
                underflow += u64::from(decoded == 0.0 && value != 0.0);
                // Contract: exact in bfloat16 and float32 up to scale byte 252.
                assert!(target == Target::F16 || scale > 252 || decoded == value);
            }
            assert_eq!((counts.overflow, counts.underflow, counts.largest), (overflow, underflow, largest), "{scale}");
        }
    }
}

#[test]
fn saturation_keeps_the_sign() {
    let table = DecodeTable::new(Target::Bf16, OnOverflow::Saturate);
    let mut out = vec![0; 64];
    // Code 7 is 6 and code 15 is -6; both overflow under scale byte 254.
    let counts = table.decode(&[0xf7; 16], &[254], &mut out);
    assert_eq!(counts.overflow, 32);
    for pair in out.chunks(4) {
        let (first, second) = (bf16::from_le_bytes([pair[0], pair[1]]), bf16::from_le_bytes([pair[2], pair[3]]));
        assert_eq!((first, second), (bf16::MAX, bf16::MIN));
    }
}

#[test]
fn blocks_use_their_own_scales() {
    let table = DecodeTable::new(Target::F32, OnOverflow::Error);
    for level in Level::all() {
        let mut out = vec![0; 3 * 32 * 4];
        table.decode_with(level, &[[0x22; 16], [0x22; 16], [0x22; 16]].concat(), &[127, 130, 124], &mut out);
        let values: Vec<f32> = out.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        assert!(values[..32].iter().all(|&value| value == 1.0));
        assert!(values[32..64].iter().all(|&value| value == 8.0));
        assert!(values[64..].iter().all(|&value| value == 0.125));
    }
}

fn candidates<'a>(tensors: &'a [(&'a str, Dtype, &'a [u64])]) -> Vec<Candidate<'a>> {
    let path = Path::new("m.safetensors");
    tensors.iter().map(|&(name, dtype, shape)| Candidate { name, dtype, shape, path }).collect()
}

fn names(pairing: &Pairing) -> Vec<&str> {
    pairing.pairs.iter().map(|pair| pair.name.as_str()).collect()
}

const TABLE: [(&str, Dtype, &[u64]); 7] = [
    ("a_blocks", Dtype::U8, &[3, 5, 2, 16]),
    ("a_scales", Dtype::U8, &[3, 5, 2]),
    ("b.blocks", Dtype::U8, &[7, 4, 16]),
    ("b.scales", Dtype::U8, &[7, 4]),
    ("a_bias", Dtype::BF16, &[3, 5]),
    ("c_scales", Dtype::F32, &[11]),
    ("d_blocks", Dtype::F32, &[13]),
];

proptest! {
    #[test]
    fn pairs_are_found_in_any_order(order in Just((0..TABLE.len()).collect::<Vec<_>>()).prop_shuffle()) {
        let shuffled: Vec<_> = order.iter().map(|&index| TABLE[index]).collect();
        let tensors = candidates(&shuffled);
        let pairing = pair(&tensors);
        prop_assert!(pairing.misfits.is_empty());
        let mut found: Vec<_> = pairing
            .pairs
            .iter()
            .map(|pair| (pair.name.as_str(), tensors[pair.blocks].name, tensors[pair.scales].name, &pair.shape[..]))
            .collect();
        found.sort_unstable();
        let expected: [(_, _, _, &[u64]); 2] =
            [("a", "a_blocks", "a_scales", &[3, 5, 64]), ("b", "b.blocks", "b.scales", &[7, 128])];
        prop_assert_eq!(found, expected);
        // 3 5 64 + 7 128 values, 15 of bias, 11 and 13 of the rest; 30 and 28 scales.
        prop_assert_eq!(count_parameters(&tensors), (960 + 896 + 39, 960 + 896 + 39 + 30 + 28));
    }
}

#[test]
fn misfits_are_named_and_do_not_pair() {
    type Row<'a> = (&'a str, Dtype, &'a [u64]);
    let blocks: Row = ("x_blocks", Dtype::U8, &[3, 2, 16]);
    for (tensors, culprit) in [
        (vec![blocks], "x_blocks"),
        (vec![("x_scales", Dtype::U8, &[3, 2][..])], "x_scales"),
        (vec![blocks, ("x.scales", Dtype::U8, &[3, 2])], "x_blocks"),
        (vec![blocks, ("x_scales", Dtype::U8, &[2, 3])], "x_scales"),
        (vec![blocks, ("x_scales", Dtype::U8, &[3, 2, 1])], "x_scales"),
        (vec![blocks, ("x_scales", Dtype::U8, &[6])], "x_scales"),
        (vec![blocks, ("x_scales", Dtype::F8_E8M0, &[3, 2])], "x_scales"),
        (vec![("x_blocks", Dtype::I8, &[3, 2, 16]), ("x_scales", Dtype::U8, &[3, 2])], "x_blocks"),
        (vec![("x_blocks", Dtype::U8, &[3, 2, 32]), ("x_scales", Dtype::U8, &[3, 2])], "x_blocks"),
        (vec![("x_blocks", Dtype::U8, &[16]), ("x_scales", Dtype::U8, &[])], "x_blocks"),
        (vec![("x_blocks", Dtype::U8, &[]), ("x_scales", Dtype::U8, &[])], "x_blocks"),
        (vec![("x_blocks", Dtype::U8, &[0, 1 << 60, 16]), ("x_scales", Dtype::U8, &[0, 1 << 60])], "x_blocks"),
    ] {
        let pairing = pair(&candidates(&tensors));
        assert_eq!(names(&pairing), [""; 0], "{tensors:?}");
        assert!(!pairing.misfits.is_empty(), "{tensors:?}");
        let message = pairing.misfits[0].fault.to_string();
        assert!(message.contains(&format!("{culprit:?}")) && message.contains("m.safetensors"), "{message}");
    }
}

#[test]
fn pairs_across_files_count_once() {
    let folder = tempfile::tempdir().unwrap();
    // The scales come first, and in another file.
    write(&folder.path().join("1.safetensors"), &[Tensor::new("x_scales", Dtype::U8, &[3, 2])]);
    write(&folder.path().join("2.safetensors"), &[Tensor::new("x_blocks", Dtype::U8, &[3, 2, 16])]);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!((checkpoint.total_parameters(), checkpoint.stored_elements()), (192, 198));
}
