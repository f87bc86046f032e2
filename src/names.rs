//! File names for tensor names, which are untrusted: nothing leaves the output folder, no two meet.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;

use xxhash_rust::xxh3::xxh3_64;

/// Longest stem that is kept whole. With `.part000.npy.tmp` behind it a name stays below the 255 bytes of a file name.
const MAX_STEM_BYTES: usize = 200;

/// Stems that Windows keeps for devices, whatever the extension.
const RESERVED_STEMS: [&str; 4] = ["con", "prn", "aux", "nul"];

/// File stems for `names`, in their order: distinct also when compared without case, and a function of the set alone.
///
/// `.` becomes `_`, other characters outside `[A-Za-z0-9_-]` are percent-escaped. Names that meet, reserved names and
/// over-long ones get `-` and a hash of the whole name.
#[must_use]
pub fn file_stems(names: &[&str]) -> Vec<String> {
    let escaped: Vec<String> = names.iter().map(|name| escape(name)).collect();
    let mut users: HashMap<String, usize> = HashMap::new();
    for stem in &escaped {
        *users.entry(stem.to_ascii_lowercase()).or_default() += 1;
    }
    let is_plain =
        |stem: &str| users[&stem.to_ascii_lowercase()] == 1 && stem.len() <= MAX_STEM_BYTES && !is_reserved(stem);
    let mut taken: HashSet<String> =
        escaped.iter().filter(|stem| is_plain(stem)).map(|stem| stem.to_ascii_lowercase()).collect();
    let mut stems = escaped.clone();
    // In the order of the names themselves, so that the result does not depend on the order of the tensors.
    let mut others: Vec<usize> = (0..names.len()).filter(|&index| !is_plain(&escaped[index])).collect();
    others.sort_by_key(|&index| names[index]);
    for index in others {
        let mut salt = 0;
        stems[index] = loop {
            let stem = suffixed(&escaped[index], names[index], salt);
            if taken.insert(stem.to_ascii_lowercase()) {
                break stem;
            }
            salt += 1;
        };
    }
    stems
}

/// The name with everything that is not harmless in a file name escaped.
fn escape(name: &str) -> String {
    let mut stem = String::with_capacity(name.len());
    for byte in name.bytes() {
        match byte {
            b'.' => stem.push('_'),
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-' => stem.push(char::from(byte)),
            _ => write!(stem, "%{byte:02X}").expect("writing to a String cannot fail"),
        }
    }
    stem
}

fn is_reserved(stem: &str) -> bool {
    let lower = stem.to_ascii_lowercase();
    let numbered =
        |device: &str| lower.strip_prefix(device).is_some_and(|n| n.len() == 1 && n.as_bytes()[0].is_ascii_digit());
    lower.is_empty() || RESERVED_STEMS.contains(&lower.as_str()) || numbered("com") || numbered("lpt")
}

/// The stem, cut to length, with a hash of the name. `salt` parts names whose hashes meet a plain stem.
fn suffixed(escaped: &str, name: &str, salt: u64) -> String {
    let kept = &escaped[..escaped.len().min(MAX_STEM_BYTES - 20)];
    let mut hash = xxh3_64(name.as_bytes());
    if salt > 0 {
        hash = xxh3_64(&[&hash.to_le_bytes()[..], &salt.to_le_bytes()].concat());
    }
    format!("{kept}-{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_names_keep_their_words() {
        assert_eq!(file_stems(&["model.layers.0.q_proj.weight"]), ["model_layers_0_q_proj_weight"]);
    }

    #[test]
    fn hostile_names_are_escaped() {
        assert_eq!(file_stems(&["../../x"]), ["____%2F____%2Fx".replace("____", "__")]);
        for stem in file_stems(&["/etc/passwd", "a\\b", "a\0b", "C:x", "é", " ", "%2F"]) {
            assert!(stem.bytes().all(|b| b.is_ascii_alphanumeric() || b"%_-".contains(&b)), "{stem}");
        }
    }

    #[test]
    fn names_that_meet_get_suffixes_whatever_their_order() {
        let names = ["a.b", "a_b", "A_B", "c"];
        let stems = file_stems(&names);
        let distinct: HashSet<_> = stems.iter().map(|stem| stem.to_ascii_lowercase()).collect();
        assert_eq!(distinct.len(), names.len());
        assert_eq!(stems[3], "c");
        let reversed: Vec<_> = names.iter().rev().copied().collect();
        let mut again = file_stems(&reversed);
        again.reverse();
        assert_eq!(stems, again);
    }

    #[test]
    fn a_suffixed_name_does_not_meet_a_plain_one() {
        let suffixed = suffixed("a_b", "a.b", 0);
        let stems = file_stems(&["a.b", "a_b", &suffixed]);
        assert_eq!(stems[2], suffixed);
        assert_ne!(stems[0], suffixed);
    }

    #[test]
    fn reserved_empty_and_long_names_get_suffixes() {
        let long = "x".repeat(100_000);
        for (name, stem) in
            ["con", "NUL", "com1", "LPT9", "", &long].iter().zip(file_stems(&["con", "NUL", "com1", "LPT9", "", &long]))
        {
            assert!(stem.len() <= MAX_STEM_BYTES && stem.len() > 16, "{name} {stem}");
        }
        assert_eq!(file_stems(&["console", "com10"]), ["console", "com10"]);
    }
}
