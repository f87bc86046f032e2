//! `config.json`, the model's configuration: JSON as Python writes it, which knows constants that JSON does not.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::file;
use crate::float8::BlockSize;
use crate::manifest;

/// The model's configuration, which names dtypes.
pub const CONFIG_NAME: &str = "config.json";

/// The key of a configuration that says how the weights are quantized.
pub const QUANTIZATION_KEY: &str = "quantization_config";

/// Largest configuration that is read.
const MAX_CONFIG_BYTES: u64 = 100_000_000;

/// The configuration at `path` as JSON: its constants that JSON does not know stand in strings.
pub fn read(path: &Path) -> Result<String> {
    let bytes = file::read_bounded(path, MAX_CONFIG_BYTES)?;
    Ok(quote_constants(&String::from_utf8_lossy(&bytes)))
}

/// What is wrong with a configuration that is no JSON object.
pub fn fault(path: &Path, what: impl std::fmt::Display) -> Error {
    Error::file(path, what, "a model configuration: a JSON object")
}

/// The size of the float8 blocks that the configuration in `folder` gives; None where there is none, or it says nothing.
pub fn block_size(folder: &Path) -> Result<Option<BlockSize>> {
    /// The key that transformers and DeepSeek use.
    const KEY: &str = "weight_block_size";
    #[derive(Deserialize)]
    struct Config {
        quantization_config: Option<Value>,
    }
    let path: PathBuf = folder.join(CONFIG_NAME);
    let text = match read(&path) {
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        text => text?,
    };
    if !manifest::is_json_object(text.as_bytes()) {
        return Err(fault(&path, "no JSON object"));
    }
    let config: Config = serde_json::from_str(&text).map_err(|what| fault(&path, what))?;
    let quantization = match config.quantization_config {
        None => return Ok(None),
        Some(Value::Object(quantization)) => quantization,
        Some(other) => return Err(Error::file(&path, format_args!("{QUANTIZATION_KEY} {other}"), "a JSON object")),
    };
    match quantization.get(KEY) {
        None | Some(Value::Null) => Ok(None),
        Some(size) => BlockSize::from_json(size).map(Some).ok_or_else(|| {
            Error::file(&path, format_args!("{KEY} {size}"), "two positive integers: rows and columns of a block")
        }),
    }
}

/// Constants that Python's json writes and JSON does not know, longest first.
const CONSTANTS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// What a constant is quoted with; a control character, which no JSON text holds as such.
const QUOTE: &str = "\\u0000tensorport ";

/// The text with the constants outside strings as strings, so that it is JSON.
fn quote_constants(text: &str) -> String {
    let (mut quoted, mut rest) = (String::with_capacity(text.len()), text);
    let mut in_string = false;
    while let Some(c) = rest.chars().next() {
        let constant = CONSTANTS.iter().find(|constant| !in_string && rest.starts_with(**constant));
        let taken = if let Some(constant) = constant {
            quoted += &format!("\"{QUOTE}{constant}\"");
            constant.len()
        } else if in_string && c == '\\' {
            let escape = rest.chars().take(2).map(char::len_utf8).sum();
            quoted.push_str(&rest[..escape]);
            escape
        } else {
            in_string ^= c == '"';
            quoted.push(c);
            c.len_utf8()
        };
        rest = &rest[taken..];
    }
    quoted
}

/// Undoes what [`read`] did to constants.
#[must_use]
pub fn unquote_constants(text: &str) -> String {
    CONSTANTS.iter().fold(text.to_owned(), |text, constant| text.replace(&format!("\"{QUOTE}{constant}\""), constant))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ordered_map::OrderedMap;
    use serde_json::value::RawValue;

    #[test]
    fn python_constants_survive() {
        let text = r#"{"a": [0.0, Infinity, -Infinity], "b": "NaN \" Infinity", "c": NaN}"#;
        let quoted = quote_constants(text);
        let parsed: OrderedMap<Box<RawValue>> = serde_json::from_str(&quoted).unwrap();
        assert_eq!(parsed.0.len(), 3);
        assert_eq!(unquote_constants(&quoted), text);
    }

    #[test]
    fn block_sizes_are_read_where_they_are_given() {
        let folder = tempfile::tempdir().unwrap();
        let found = |text: &str| {
            std::fs::write(folder.path().join(CONFIG_NAME), text).unwrap();
            block_size(folder.path())
        };
        let size = found(r#"{"limit": Infinity, "quantization_config": {"weight_block_size": [64, 32]}}"#).unwrap();
        assert_eq!(size, Some(BlockSize { rows: 64, columns: 32 }));
        for nothing in
            ["{}", r#"{"quantization_config": null}"#, r#"{"quantization_config": {"weight_block_size": null}}"#]
        {
            assert_eq!(found(nothing).unwrap(), None);
        }
        for nonsense in ["[128, 0]", "[128]", "[1, 2, 3]", "128", "[-1, 128]", "[1.5, 128]", "\"128x128\"", "[]"] {
            let text = format!("{{\"quantization_config\": {{\"weight_block_size\": {nonsense}}}}}");
            let fault = found(&text).unwrap_err().to_string();
            assert!(fault.contains("weight_block_size") && fault.contains("two positive integers"), "{fault}");
        }
        for nonsense in ["[]", "{", r#"{"quantization_config": "fp8"}"#] {
            assert!(matches!(found(nonsense), Err(Error::MalformedFile { .. })), "{nonsense}");
        }
        std::fs::remove_file(folder.path().join(CONFIG_NAME)).unwrap();
        assert_eq!(block_size(folder.path()).unwrap(), None);
    }
}
