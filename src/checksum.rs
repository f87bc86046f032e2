//! XXH3-128 checksums: of tensors, of their parts, of whole small files.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

/// A 128-bit XXH3 hash with seed 0; 32 lower-case hexadecimal digits in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checksum(pub u128);

impl Checksum {
    /// Checksum of some bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(xxh3_128(bytes))
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl Serialize for Checksum {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Checksum {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = text.len() == 32 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let value = u128::from_str_radix(&text, 16).ok().filter(|_| digits);
        value
            .map(Self)
            .ok_or_else(|| serde::de::Error::custom(format_args!("{text:?}, not 32 lower-case hexadecimal digits")))
    }
}

/// Checksums of one tensor: of all its data, and of the part in each of its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorChecksums {
    /// Of all its data, in order.
    pub whole: Checksum,
    /// Of its data in each file.
    pub parts: Vec<Checksum>,
}

/// Takes in a tensor's data part by part, in order.
pub struct TensorHasher {
    whole: Xxh3,
    /// None while the tensor has one part, whose checksum is that of the whole.
    part: Option<Xxh3>,
    parts: Vec<Checksum>,
}

impl TensorHasher {
    /// A hasher for a tensor of this many parts.
    #[must_use]
    pub fn new(parts: usize) -> Self {
        Self { whole: Xxh3::new(), part: (parts > 1).then(Xxh3::new), parts: Vec::with_capacity(parts) }
    }

    /// Takes in the next bytes; `ends_part` says that they are the last of their part.
    pub fn update(&mut self, bytes: &[u8], ends_part: bool) {
        self.whole.update(bytes);
        if let Some(part) = &mut self.part {
            part.update(bytes);
        }
        if ends_part {
            let hasher = self.part.as_mut().unwrap_or(&mut self.whole);
            self.parts.push(Checksum(hasher.digest128()));
            if let Some(part) = &mut self.part {
                part.reset();
            }
        }
    }

    /// The checksums after the last part.
    #[must_use]
    pub fn finish(self) -> TensorChecksums {
        TensorChecksums { whole: Checksum(self.whole.digest128()), parts: self.parts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_have_their_own_checksums() {
        let mut hasher = TensorHasher::new(2);
        hasher.update(b"ab", false);
        hasher.update(b"c", true);
        hasher.update(b"de", true);
        let sums = hasher.finish();
        assert_eq!(sums.whole, Checksum::of(b"abcde"));
        assert_eq!(sums.parts, [Checksum::of(b"abc"), Checksum::of(b"de")]);
    }

    #[test]
    fn one_part_is_the_whole() {
        let mut hasher = TensorHasher::new(1);
        hasher.update(b"abc", true);
        let sums = hasher.finish();
        assert_eq!(sums.parts, [sums.whole]);
    }

    #[test]
    fn json_is_32_digits() {
        let sum = Checksum(0xab);
        let json = serde_json::to_string(&sum).unwrap();
        assert_eq!(json, format!("\"{}ab\"", "0".repeat(30)));
        assert_eq!(serde_json::from_str::<Checksum>(&json).unwrap(), sum);
        for wrong in ["\"ab\"", &json.to_uppercase(), "1", &format!("\"+{}\"", "0".repeat(31))] {
            assert!(serde_json::from_str::<Checksum>(wrong).is_err(), "{wrong}");
        }
    }
}
