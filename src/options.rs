//! Options of a conversion that decide its bytes: what manifests and journals state.

use globset::GlobSet;
use serde::{Deserialize, Serialize};

use crate::cast::{OnOverflow, Target};
use crate::error::{Error, Result};
use crate::mxfp4::ScaleRule;
use crate::select;

/// Options of a conversion that change its bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// Output format.
    pub format: Format,
    /// Precision of the float tensors.
    pub precision: Precision,
    /// What becomes of MXFP4 pairs, or what becomes one.
    pub mxfp4: Mxfp4Mode,
    /// What becomes of float8 weights with block scales.
    #[serde(default, skip_serializing_if = "Float8Mode::is_keep")]
    pub float8: Float8Mode,
    /// Globs of the float matrices to encode; [`Mxfp4Mode::Quantize`] alone takes them, and needs them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantize: Option<Vec<String>>,
    /// How the scales of the encoded matrices are chosen; None is the default. [`Mxfp4Mode::Quantize`] alone takes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale_rule: Option<ScaleRule>,
    /// Largest shard, in GB (10^9 bytes) of tensor data.
    pub shard_size: f64,
    /// Globs of the tensors to take; None takes all.
    pub include: Option<Vec<String>>,
    /// Globs of the tensors to leave out.
    pub exclude: Option<Vec<String>>,
    /// What becomes of values beyond the range of `precision`.
    pub on_overflow: OnOverflow,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            format: Format::NumpyDirect,
            precision: Precision::Source,
            mxfp4: Mxfp4Mode::Keep,
            float8: Float8Mode::Keep,
            quantize: None,
            scale_rule: None,
            shard_size: 1.8,
            include: None,
            exclude: None,
            on_overflow: OnOverflow::Error,
        }
    }
}

impl Options {
    /// The shard limit in bytes.
    pub fn shard_bytes(&self) -> Result<u64> {
        let bytes = (self.shard_size * 1e9).round();
        if !(1.0..=9e18).contains(&bytes) {
            return Err(Error::Argument {
                name: "shard_size",
                found: format!("{} GB", self.shard_size),
                expected: "a size in GB between 1e-9 and 9e9".into(),
            });
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "in range by the check above")]
        Ok(bytes as u64)
    }

    /// These options as a manifest states them: with what was left open, if they do not contradict each other.
    pub fn settled(&self) -> Result<Self> {
        let scale_rule = self.quantization()?.map(|quantization| quantization.rule);
        Ok(Self { scale_rule, ..self.clone() })
    }

    /// What to encode and how, for [`Mxfp4Mode::Quantize`].
    pub(crate) fn quantization(&self) -> Result<Option<Quantization<'_>>> {
        if self.mxfp4 != Mxfp4Mode::Quantize {
            let found = |name, value| Err(Error::Argument { name, found: value, expected: ONLY_QUANTIZE.into() });
            return match (&self.quantize, self.scale_rule) {
                (Some(globs), _) => found("quantize", format!("{globs:?}")),
                (None, Some(rule)) => found("scale_rule", format!("{rule:?}").to_lowercase()),
                (None, None) => Ok(None),
            };
        }
        match self.quantize.as_deref() {
            None | Some([]) => Err(Error::Argument {
                name: "quantize",
                found: "no glob".into(),
                expected: "at least one: the names of the matrices that mxfp4=\"quantize\" encodes".into(),
            }),
            Some(patterns) => Ok(Some(Quantization {
                patterns,
                globs: select::compile("quantize", patterns)?,
                rule: self.scale_rule.unwrap_or_default(),
            })),
        }
    }
}

/// What `quantize` and `scale_rule` need.
const ONLY_QUANTIZE: &str = "none unless mxfp4 is \"quantize\"";

/// Which matrices to encode, and how.
pub(crate) struct Quantization<'a> {
    /// The globs as they were given, for messages.
    pub patterns: &'a [String],
    /// The globs that choose the matrices.
    pub globs: GlobSet,
    /// How scales are chosen.
    pub rule: ScaleRule,
}

/// Output formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// One npy file per tensor in shard folders.
    #[value(alias = "numpy")]
    NumpyDirect,
    /// Flat maps of arrays in Flax's convention.
    Msgpack,
    /// Pickles of dicts of NumPy arrays.
    #[value(alias = "jax")]
    JaxPickle,
    /// safetensors files and their index.
    Safetensors,
    /// A checkpoint for orbax.
    Orbax,
}

impl Format {
    /// Its name in manifests and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::NumpyDirect => "numpy-direct",
            Self::Msgpack => "msgpack",
            Self::JaxPickle => "jax-pickle",
            Self::Safetensors => "safetensors",
            Self::Orbax => "orbax",
        }
    }
}

/// Target precision of the float tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum Precision {
    /// As in the source, bit for bit.
    Source,
    /// IEEE binary16.
    Float16,
    /// bfloat16.
    Bfloat16,
    /// IEEE binary32.
    Float32,
}

impl Precision {
    /// The dtype that F64, F32, F16 and BF16 tensors are cast to; None for `source`.
    #[must_use]
    pub fn target(self) -> Option<Target> {
        match self {
            Self::Source => None,
            Self::Float16 => Some(Target::F16),
            Self::Bfloat16 => Some(Target::Bf16),
            Self::Float32 => Some(Target::F32),
        }
    }
}

/// What becomes of MXFP4 pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum Mxfp4Mode {
    /// Blocks and scales stay two u8 tensors.
    Keep,
    /// Each pair becomes one float tensor, the contraction axis last.
    Dequantize,
    /// Float matrices that globs choose become pairs; pairs stay.
    Quantize,
}

/// What becomes of float8 weights with block scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum Float8Mode {
    /// Weights and scales stay two tensors.
    #[default]
    Keep,
    /// Each pair becomes one float tensor with the name of the weight.
    Dequantize,
}

impl Float8Mode {
    /// True for [`Float8Mode::Keep`], which manifests do not state.
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
    fn is_keep(&self) -> bool {
        *self == Self::Keep
    }
}
