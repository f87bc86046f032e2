//! Rows of new values into slots of an array.

use std::iter::zip;

use super::floats::{Floats, FloatsMut};

/// Writes rows [batch, T, ..] into an array [batch, S, ..] of the same dtype, each into its slot of `slots` [batch, T]. Of
/// those for one slot the last stays; those for slots that there are not are left out.
///
/// # Panics
/// When lengths or dtypes do not fit.
pub fn write_slots(array: FloatsMut<'_>, rows: Floats<'_>, slots: &[i32], batch: usize) {
    match (array, rows) {
        (FloatsMut::Bf16(array), Floats::Bf16(rows)) => write(array, rows, slots, batch),
        (FloatsMut::F32(array), Floats::F32(rows)) => write(array, rows, slots, batch),
        _ => panic!("rows in the array's dtype"),
    }
}

fn write<T: Copy>(array: &mut [T], rows: &[T], slots: &[i32], batch: usize) {
    if array.is_empty() || rows.is_empty() {
        return;
    }
    let (width, length) = (rows.len() / slots.len(), array.len() / batch);
    assert!(rows.len() == slots.len() * width && slots.len().is_multiple_of(batch), "a slot for each row");
    assert!(array.len() == batch * length && length.is_multiple_of(width), "slots as wide as rows");
    let of_batch = zip(rows.chunks_exact(rows.len() / batch), slots.chunks_exact(slots.len() / batch));
    for (array, (rows, slots)) in zip(array.chunks_exact_mut(length), of_batch) {
        for (row, &slot) in zip(rows.chunks_exact(width), slots) {
            let slot = usize::try_from(slot).ok().filter(|&slot| slot < length / width);
            if let Some(slot) = slot {
                array[slot * width..(slot + 1) * width].copy_from_slice(row);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_go_into_their_slots_and_the_last_one_stays() {
        let mut array = [0.0_f32; 2 * 3 * 2];
        let rows: Vec<f32> = (1_u8..=16).map(f32::from).collect();
        let slots = [2, 0, 2, 3, -1, 1, i32::MIN, i32::MAX];
        write_slots(FloatsMut::F32(&mut array), Floats::F32(&rows), &slots, 2);
        assert_eq!(array, [3.0, 4.0, 0.0, 0.0, 5.0, 6.0, 0.0, 0.0, 11.0, 12.0, 0.0, 0.0]);
        let mut array = [7_u16; 4];
        write_slots(FloatsMut::Bf16(&mut array), Floats::Bf16(&[]), &[], 1);
        assert_eq!(array, [7; 4]);
    }

    #[test]
    #[should_panic(expected = "slots as wide as rows")]
    fn sizes_must_fit() {
        write_slots(FloatsMut::F32(&mut [0.0; 7]), Floats::F32(&[0.0; 2]), &[0], 1);
    }
}
