//! Errors on demand: the n-th write, sync or truncate fails, once or from then on.
//!
//! Invariant: a rule counts only the operations it matches, in files that the filter admits, from when it was made.

use std::fmt;
use std::path::Path;

use libsqlite3_sys::{SQLITE_FULL, SQLITE_IOERR_FSYNC, SQLITE_IOERR_TRUNCATE, SQLITE_IOERR_WRITE};

/// Which operations a fault strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A write to a database, WAL or journal file.
    Write,
    /// A sync of one.
    Sync,
    /// A change of the length of one.
    Truncate,
    /// A write or a sync, counted together.
    WriteOrSync,
}

/// What the struck operation answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Errno {
    /// The device failed (`EIO`): `SQLITE_IOERR_WRITE`, `SQLITE_IOERR_FSYNC` or `SQLITE_IOERR_TRUNCATE`.
    Io,
    /// The disk is full (`ENOSPC`): `SQLITE_FULL`.
    Full,
}

/// An operation on a file that can be cut short or fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    Write,
    Sync,
    Truncate,
}

/// An operation that must fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Injected {
    /// What SQLite is told.
    pub(crate) code: i32,
    /// Half of the failed writes leave a prefix behind, as a full disk does.
    pub(crate) leaves_prefix: bool,
}

/// Admits the files that faults may strike.
pub(crate) type Filter = Box<dyn Fn(&Path) -> bool + Send + Sync>;

/// The rules in force.
#[derive(Default)]
pub(crate) struct Faults {
    rules: Vec<Rule>,
    filter: Option<Filter>,
    injected: u64,
}

#[derive(Debug)]
struct Rule {
    what: Fault,
    error: Errno,
    /// How many matching operations still pass.
    passes: u64,
    lasting: bool,
}

impl Fault {
    fn matches(self, operation: Operation) -> bool {
        match operation {
            Operation::Write => matches!(self, Self::Write | Self::WriteOrSync),
            Operation::Sync => matches!(self, Self::Sync | Self::WriteOrSync),
            Operation::Truncate => matches!(self, Self::Truncate),
        }
    }
}

impl Operation {
    /// The answer of this operation if the device fails.
    pub(crate) fn io_error(self) -> i32 {
        match self {
            Self::Write => SQLITE_IOERR_WRITE,
            Self::Sync => SQLITE_IOERR_FSYNC,
            Self::Truncate => SQLITE_IOERR_TRUNCATE,
        }
    }
}

impl Faults {
    /// Adds a rule that strikes the `n`-th match (1-based), and all after it if `lasting`.
    pub(crate) fn add(&mut self, what: Fault, n: u64, error: Errno, lasting: bool) {
        self.rules.push(Rule { what, error, passes: n.saturating_sub(1), lasting });
    }

    pub(crate) fn clear(&mut self) {
        self.rules.clear();
    }

    pub(crate) fn set_filter(&mut self, filter: Filter) {
        self.filter = Some(filter);
    }

    pub(crate) fn injected(&self) -> u64 {
        self.injected
    }

    /// Does this operation fail? Every rule counts it, the oldest that strikes decides how.
    pub(crate) fn strike(&mut self, operation: Operation, path: &Path) -> Option<Injected> {
        if self.rules.is_empty() || self.filter.as_ref().is_some_and(|admits| !admits(path)) {
            return None;
        }
        let mut error = None;
        self.rules.retain_mut(|rule| {
            if !rule.what.matches(operation) {
                return true;
            }
            if rule.passes > 0 {
                rule.passes -= 1;
                return true;
            }
            error = error.or(Some(rule.error));
            rule.lasting
        });
        let code = match error? {
            Errno::Io => operation.io_error(),
            Errno::Full => SQLITE_FULL,
        };
        self.injected += 1;
        Some(Injected { code, leaves_prefix: self.injected.is_multiple_of(2) })
    }
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faults").field("rules", &self.rules).field("injected", &self.injected).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn struck(faults: &mut Faults, operation: Operation) -> Option<i32> {
        faults.strike(operation, Path::new("/a-wal")).map(|injected| injected.code)
    }

    #[test]
    fn the_nth_match_fails_once() {
        let mut faults = Faults::default();
        faults.add(Fault::Sync, 2, Errno::Io, false);
        assert_eq!(struck(&mut faults, Operation::Sync), None);
        assert_eq!(struck(&mut faults, Operation::Write), None);
        assert_eq!(struck(&mut faults, Operation::Sync), Some(SQLITE_IOERR_FSYNC));
        assert_eq!(struck(&mut faults, Operation::Sync), None);
        assert_eq!(faults.injected(), 1);
    }

    #[test]
    fn a_lasting_fault_lasts_until_it_is_cleared() {
        let mut faults = Faults::default();
        faults.add(Fault::WriteOrSync, 2, Errno::Full, true);
        assert_eq!(struck(&mut faults, Operation::Write), None);
        assert_eq!(struck(&mut faults, Operation::Sync), Some(SQLITE_FULL));
        assert_eq!(struck(&mut faults, Operation::Write), Some(SQLITE_FULL));
        assert_eq!(struck(&mut faults, Operation::Truncate), None);
        faults.clear();
        assert_eq!(struck(&mut faults, Operation::Write), None);
    }

    #[test]
    fn files_outside_the_filter_are_neither_counted_nor_struck() {
        let mut faults = Faults::default();
        faults.set_filter(Box::new(|path| path.to_string_lossy().ends_with("-wal")));
        faults.add(Fault::Write, 1, Errno::Io, false);
        assert_eq!(faults.strike(Operation::Write, Path::new("/a")), None);
        assert_eq!(struck(&mut faults, Operation::Write), Some(SQLITE_IOERR_WRITE));
    }
}
