//! How names of keys and hashes of ids look in logs, errors and metrics.

use std::fmt;

/// Digits of the short form: enough to tell entities apart in a log, too few to look one up by.
pub(crate) const SHORT_DIGITS: usize = 12;

/// Writes the first `digits` hex digits of `bytes`.
pub(crate) fn write(f: &mut fmt::Formatter<'_>, bytes: &[u8], digits: usize) -> fmt::Result {
    bytes.iter().take(digits / 2).try_for_each(|byte| write!(f, "{byte:02x}"))
}
