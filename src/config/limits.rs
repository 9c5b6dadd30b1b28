//! Values that are neither too small nor too large, for both kinds of files.

use std::fmt::Display;
use std::ops::{Range, RangeInclusive};

use toml::Spanned;

use super::{Diagnostic, Seconds};

/// Seconds that a service may stay open for one knock: up to a year.
pub(super) const OPENINGS: RangeInclusive<Seconds> = Seconds(1)..=Seconds(365 * 86_400);

/// Where in a file something is wrong, and what.
pub(super) type At<'a> = dyn Fn(Range<usize>, String) -> Diagnostic + 'a;

/// The same of a setting that may be left out.
pub(super) fn within_or<T: Copy + PartialOrd + Display>(
    value: Option<Spanned<T>>,
    default: T,
    allowed: &RangeInclusive<T>,
    what: &str,
    at: &At<'_>,
) -> Result<T, Diagnostic> {
    value.map_or(Ok(default), |value| within(value, allowed, what, at))
}

/// A value that is neither too small nor too large.
pub(super) fn within<T: Copy + PartialOrd + Display>(
    value: Spanned<T>,
    allowed: &RangeInclusive<T>,
    what: &str,
    at: &At<'_>,
) -> Result<T, Diagnostic> {
    if allowed.contains(value.get_ref()) {
        return Ok(value.into_inner());
    }
    let (least, most) = (allowed.start(), allowed.end());
    Err(at(value.span(), format!("{what} must be from {least} to {most}, not {}", value.get_ref())))
}
